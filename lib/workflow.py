"""Runs a graph of jobs by Snakemake: what is not up to date, one line of progress per job, and stopping at a signal.

Snakemake and every job below it die with this process, and a lock on the results folder keeps a second run out of it;
so a run may be killed at any moment, and the next one takes up what is not finished.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lib.estimates import Need, need
from lib.parameters import UsageError
from lib.paths import ROOT
from lib.processes import die_with_parent, lock, signals_held

RUN_LOCK_SECONDS = 3.0  # a killed run lets go within moments
STOP_SECONDS, CANCEL_SECONDS = 5.0, 30.0  # cancelling submitted jobs takes longer
RUN_LOCK = ".run.lock"
LONG = 2.0  # minutes


@dataclass(frozen=True)
class Job:
    """One notebook for one model (or for all). key: where its executed copy goes, below the results folder."""

    key: str
    title: str
    source: str
    parameters: dict[str, Any]
    after: list[str]

    @property
    def notebook(self) -> str:
        """The number its file begins with."""
        return Path(self.source).name.partition("_")[0]

    @property
    def files(self) -> list[Path]:
        """What its parameters name by full path: files of prompts, pairs and attacks, and those in a model's folder."""
        given = [one for value in self.parameters.values() for one in (value if isinstance(value, list) else [value])]
        paths = [Path(one) for one in given if isinstance(one, str) and os.path.isabs(one)]
        return [file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path])]


@dataclass(frozen=True)
class Graph:
    """Jobs by key, and how to run them. jobs_at_once: None for one per GPU, else two. profile: of a cluster."""

    jobs: dict[str, Job]
    results: Path
    logs: Path
    jobs_at_once: int | None = None
    profile: str | None = None
    rerun_all: bool = False

    @property
    def source_cache(self) -> Path:
        """Where Snakemake keeps its copy of the Snakefile: with the logs, which a dry run has for itself."""
        return self.logs / "source-cache"

    @cached_property
    def needs(self) -> dict[str, Need]:
        """What each job needs where it will run."""
        return {key: need(job.notebook, job.parameters, bool(self.profile)) for key, job in self.jobs.items()}

    @property
    def events(self) -> Path:
        """The folder where each job tells what happens to it, a JSON object per line of a file of its own: cluster
        nodes that append to one file on a shared disk lose lines."""
        return self.logs / "events"

    def write(self) -> None:
        """Writes what the Snakefile and `lib.execute` read. On a cluster the scheduler hands out cores and GPUs.

        Snakemake keeps a copy of the Snakefile and does not see that the original changed: it goes."""
        shutil.rmtree(self.source_cache, ignore_errors=True)
        cores = len(os.sched_getaffinity(0))
        gpus = [] if self.profile else visible_gpus()
        workers = 1 if self.profile else self.jobs_at_once or len(gpus) or min(2, cores)
        jobs = {
            key: asdict(job)
            | {"gigabytes": self.needs[key].gigabytes, "files": [str(path) for path in job.files if path.is_file()]}
            for key, job in self.jobs.items()
        }
        content = {
            "jobs": jobs,
            "events": str(self.events),
            "workers": workers,
            "threads": max(1, cores // workers),
            "gpus": gpus,
        }
        shutil.rmtree(self.events, ignore_errors=True)
        self.events.mkdir(parents=True)
        (self.logs / "plan.json").write_text(json.dumps(content, indent=1))

    def start(self, *more: str, **options: Any) -> subprocess.Popen[str]:
        """Starts Snakemake, in a session of its own, without its lock, which would outlive a kill, and its notes of
        parameters and unfinished outputs, which a kill loses: outputs are whole or absent, and name their parameters.
        """
        plan = self.logs / "plan.json"
        named = plan.relative_to(self.results) if plan.is_relative_to(self.results) else plan  # read as YAML
        forced = [f"{key}.ipynb" for key in self.forced()]
        long = [f"{key}.ipynb" for key, one in self.needs.items() if (one.minutes or 0) >= LONG]
        if self.profile:
            scale = ["--profile", str(ROOT / "profiles" / self.profile)]
            scale += ["--jobs", str(self.jobs_at_once)] if self.jobs_at_once else []
            if self.profile == "slurm" and not keeps_accounts():
                scale += ["--slurm-status-command", "squeue"]
        else:
            scale = ["--cores", str(json.loads(plan.read_text())["workers"])]
        command = [
            *(sys.executable, "-P", "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile")),
            *("--directory", str(self.results), "--config", f"plan={named}"),
            *("--runtime-source-cache-path", str(self.source_cache)),
            *("--workflow-profile", "none", "--rerun-triggers", "mtime"),
            *("--nolock", "--ignore-incomplete", "--keep-going"),
            *scale,
            *more,
            *(["--forcerun", *forced] if forced else []),
            *(["--prioritize", *long] if long else []),  # first, lest one of them runs alone at the end
            "--",
            *(f"{key}.ipynb" for key in self.jobs),
        ]
        follow = functools.partial(die_with_parent, os.getpid())
        options = {"stdin": subprocess.DEVNULL, "text": True, "start_new_session": True, **options}
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONPATH": path}
        environment.pop("SNAKEMAKE_PROFILE", None)  # the user's, for other work
        with signals_held():
            return subprocess.Popen(command, preexec_fn=follow, env=environment, **options)

    def forced(self) -> list[str]:
        """Jobs that run whatever the age of their outputs: all, or those that no executed copy with the same parameters
        shows to be done, here or on another machine."""
        done = {key for key, job in self.jobs.items() if noted(self.results / f"{key}.ipynb") == job.parameters}
        return [key for key in self.jobs if self.rerun_all or key not in done]

    def pending(self) -> list[Job]:
        """The jobs that are not up to date. Snakemake is asked only where there is something to compare with."""
        self.write()
        if len(self.forced()) == len(self.jobs):
            return list(self.jobs.values())
        with self.start("--summary", stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            answer = process.communicate()[0]
        rows = [line.split("\t") for line in answer.splitlines()]
        if process.returncode != 0:
            (self.logs / "snakemake.log").write_text(answer)
            raise RuntimeError(f"Snakemake could not read the graph of jobs; see {self.logs / 'snakemake.log'}")
        waiting = {row[0].removesuffix(".ipynb") for row in rows if row[-1] == "update pending"}
        return [job for key, job in self.jobs.items() if key in waiting]

    def run(self, pending: list[Job]) -> int:
        """Runs what is pending and prints its progress. Returns how many jobs are not done at the end."""
        progress = Progress(pending, self.logs)
        with (self.logs / "snakemake.log").open("w") as log:
            process = self.start(stdout=log, stderr=subprocess.STDOUT)
            try:
                while process.poll() is None:
                    progress.read(self.events)
                    time.sleep(0.2)
            except KeyboardInterrupt:
                stop(process, CANCEL_SECONDS if self.profile else STOP_SECONDS)
                raise
            progress.read(self.events)
        progress.close(slurm_verdicts((self.logs / "snakemake.log").read_text(errors="replace")))
        return len(pending) - progress.done


def noted(path: Path) -> dict[str, Any] | None:
    """The parameters that papermill noted in an executed notebook; None if there is none that can be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["metadata"]["papermill"]["parameters"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def stop(process: subprocess.Popen[str], seconds: float) -> None:
    """Interrupts Snakemake and its jobs, which tidy up; kills what is left after `seconds`, or at a second signal."""
    with suppress(ProcessLookupError):  # it has just ended by itself
        try:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(seconds)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class Progress:
    """Prints one line when a job starts and one when it ends."""

    def __init__(self, pending: list[Job], logs: Path) -> None:
        self.jobs = {job.key: job for job in pending}
        self.logs = logs
        self.width = max(len(job.title) for job in pending)
        self.shown: Counter[Path] = Counter()  # lines, by file
        self.states: dict[str, str] = {}  # the last one of each job that was started, in this order

    @property
    def done(self) -> int:
        """How many jobs are done."""
        return sum(state == "done" for state in self.states.values())

    def read(self, events: Path) -> None:
        """Shows the events that were written since the last call; a line that is half written is left for the next."""
        for path in sorted(events.glob("*.jsonl")):
            for line in path.read_text(encoding="utf-8").split("\n")[self.shown[path] : -1]:
                self.shown[path] += 1
                self.show(**json.loads(line))

    def show(self, job: str, state: str, seconds: float = 0.0, message: str = "") -> None:
        """One line for an event of `lib.execute.report`: started, done (after seconds) or failed (with a message)."""
        self.states[job] = state
        number = list(self.states).index(job) + 1
        text = {"started": "started", "done": f"done {seconds:.0f} s", "failed": f"failed: {message}"}[state]
        print(f"[{number}/{len(self.jobs)}] {self.jobs[job].title:<{self.width}}  {text}", flush=True)

    def close(self, verdicts: dict[str, str]) -> None:
        """Reports jobs that ended, or were refused, without a word. verdicts: what Slurm said of them, if anything."""
        running = {job for job, state in self.states.items() if state == "started"}
        for job in sorted(running | (self.jobs.keys() & verdicts.keys() - self.states.keys())):
            self.show(job, "failed", message=verdicts.get(job, f"it was killed; see {self.logs / job}.log"))


def slurm_verdicts(log: str) -> dict[str, str]:
    """Job -> how Slurm refused or ended it, each way once, in Snakemake's log. Of a local run: nothing."""
    found: dict[str, list[str]] = {}
    for block in log.split("\nError in rule ")[1:]:
        job = re.search(r"^    output: (.+)\.ipynb$", block, re.MULTILINE)
        refusal = re.search(r"The error message was '(.+?)'\.$", block, re.MULTILINE | re.DOTALL)
        state = re.search(r"SLURM status is: '(\w+)'", block)
        if job and refusal:
            found.setdefault(job[1], []).append(f"Slurm refused it: {' '.join(refusal[1].split())}")
        elif job and state:
            found.setdefault(job[1], []).append(f"Slurm ended it: {state[1]}")
    return {job: "; ".join(dict.fromkeys(said)) for job, said in found.items()}


def visible_gpus() -> list[str]:
    """The NVIDIA GPUs this run may use, asked of the driver: importing torch for that takes seconds."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu not in ("", "-1")]
    if not shutil.which("nvidia-smi"):
        return []
    answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    return [str(index) for index in range(len(re.findall(r"^GPU \d+:", answer, re.MULTILINE)))]


def keeps_accounts() -> bool:
    """Whether Slurm keeps accounts. Without them sacct, which the executor asks by default, never tells of any job."""
    return bool(shutil.which("sacct")) and subprocess.run(["sacct", "--noheader"], capture_output=True).returncode == 0


@contextmanager
def sole_run(results: Path) -> Iterator[None]:
    """One run at a time per results folder. UsageError if another is under way, or the folder cannot be locked."""
    with ExitStack() as stack:
        try:
            stack.enter_context(lock(results / RUN_LOCK, RUN_LOCK_SECONDS))
        except TimeoutError:
            raise UsageError(f"another run is under way in {results}; wait for it, or use --out") from None
        except OSError as error:
            raise UsageError(f"cannot lock {results}: {error.strerror}; choose another folder with --out") from None
        yield
