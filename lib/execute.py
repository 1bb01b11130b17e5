"""One job of the graph: executes one notebook for one model, and leaves its executed copy whole or not at all.

The kernel is this very interpreter's, whatever kernels the user has registered, and the job and its kernel are killed
when the run above them ends. A job holds a lock until its kernel is gone, so no two ever write the same results.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import papermill
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from lib.paths import results_folder
from lib.processes import die_with_parent, lock

ORPHAN_SECONDS = 60.0  # how long a job of a killed run may take to disappear
MESSAGE_LENGTH = 300


def locks_folder() -> Path:
    """Folder of the locks that jobs hold, under the results."""
    return results_folder() / "logs" / "locks"


class Kernel(AsyncKernelManager):
    """A kernel of this interpreter that dies with this process and keeps `inherited` descriptors, its locks, open."""

    inherited: tuple[int, ...] = ()

    @property
    def kernel_spec(self) -> KernelSpec:
        """This interpreter, whatever kernels the user has registered."""
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, language="python", display_name="Python 3")

    async def start_kernel(self, **options: Any) -> None:  # type: ignore[override]
        follow = functools.partial(die_with_parent, os.getpid())
        await super().start_kernel(preexec_fn=follow, pass_fds=self.inherited, **options)


def execute(job: dict[str, Any], final: Path) -> None:
    """Runs a notebook; its executed copy moves to `final`, or to NAME.failed.ipynb if a cell fails."""
    partial = final.with_name(f".{final.stem}.partial.ipynb")
    failed = final.with_name(f"{final.stem}.failed.ipynb")
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(
            job["source"],
            partial,
            job["parameters"],
            kernel_name="python3",
            language="python",
            progress_bar=False,
            cwd=Path(job["source"]).parent,
            kernel_manager_class=Kernel,
        )
    except (PapermillExecutionError, DeadKernelError):
        if partial.is_file():
            os.replace(partial, failed)
        raise
    os.replace(partial, final)
    failed.unlink(missing_ok=True)


def describe(error: Exception) -> str:
    """One plain line for what went wrong in a job."""
    if isinstance(error, DeadKernelError):
        return "the kernel was killed; most often too little memory, so try --jobs 1 or a smaller batch_size"
    if isinstance(error, PapermillExecutionError):
        text = f"{error.ename}: {error.evalue}"
    else:
        text = f"{type(error).__name__}: {error}"
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).strip().splitlines()
    return lines[0][:MESSAGE_LENGTH]


@contextmanager
def own_devices(gpus: list[str], workers: int) -> Iterator[int | None]:
    """Gives this job its share of the GPUs: one of `workers` slots, held by a lock until its kernel is gone."""
    if workers == 1 or not gpus:
        yield None
        return
    with ExitStack() as stack:
        for slot in itertools.cycle(range(workers)):
            with suppress(TimeoutError):
                held = stack.enter_context(lock(locks_folder() / f"gpu-slot-{slot}", wait=0.2))
                break
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[slot::workers] or [gpus[slot % len(gpus)]])
        yield held


def report(plan: dict[str, Any], key: str, state: str, **details: Any) -> None:
    """Appends one line to this job's events, which the run turns into progress."""
    line = json.dumps({"job": key, "state": state, **details}) + "\n"
    with open(Path(plan["events"]) / f"{key.replace('/', '--')}.jsonl", "ab", buffering=0) as stream:
        stream.write(line.encode())


def run_job(plan: dict[str, Any], key: str) -> int:
    """Runs the job `key` of a plan under its lock and reports how it went; 0 if it succeeded."""
    started = time.monotonic()
    try:
        with (
            lock(locks_folder() / key.replace("/", "--"), wait=ORPHAN_SECONDS) as held,
            own_devices(plan["gpus"], plan["workers"]) as slot,
        ):
            Kernel.inherited = (held,) if slot is None else (held, slot)
            report(plan, key, "started")
            execute(plan["jobs"][key], results_folder() / f"{key}.ipynb")
    except Exception as error:
        traceback.print_exc()
        report(plan, key, "failed", message=describe(error))
        return 1
    report(plan, key, "done", seconds=time.monotonic() - started)
    return 0


def main(arguments: list[str]) -> int:
    """python -m lib.execute PLAN JOB PARENT: what a rule of the Snakefile calls."""
    plan_path, key, parent = arguments
    die_with_parent(int(parent))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the kernel is interrupted, then stopped
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    plan = json.loads(Path(plan_path).read_text())
    if plan["workers"] > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(plan["threads"]))
    return run_job(plan, key)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
