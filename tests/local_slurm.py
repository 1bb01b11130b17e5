"""A Slurm of one node, for a test: its daemons run as this user, in a temporary folder, on the loopback interface.

Nothing of it is installed, and no cluster that this machine may belong to is asked. The node claims more cores, memory
and GPUs than there are: Slurm only counts them here.
"""

from __future__ import annotations

import functools
import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lib.processes import die_with_parent

START_SECONDS = 60.0
STOP_SECONDS = 10.0
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "sinfo", "scancel", "scontrol")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
NodeName={host} NodeAddr=127.0.0.1 CPUs=16 RealMemory=1000000 Gres=gpu:4
PartitionName=all Nodes={host} Default=YES
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={controller_port}
SlurmdPort={node_port}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
"""
GPUS = "".join(f"Name=gpu File=/dev/{device}\n" for device in ("null", "zero", "full", "urandom"))  # any four devices


class CannotStart(RuntimeError):
    """Why this machine cannot run a Slurm of its own."""


@contextmanager
def local_slurm() -> Iterator[dict[str, str]]:
    """Yields the environment in which commands speak to a new Slurm; at the end its jobs and daemons are gone."""
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])  # where daemons are, for any user
    programs = {name: shutil.which(name, path=path) for name in NEEDED}
    if missing := [name for name, program in programs.items() if not program]:
        raise CannotStart(f"not installed: {', '.join(missing)}")
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as name, ExitStack() as stack:
        folder = Path(name)  # a short one: the path of a socket has at most 107 characters
        write_configuration(folder, programs["srun"])
        environment = {"SLURM_CONF": f"{folder}/slurm.conf", "PATH": f"{folder}/bin:{path}"}
        own = [f"--{kind}={folder}/munge.{kind.split('-')[0]}" for kind in ("key-file", "pid-file", "seed-file")]
        own += [f"--socket={folder}/munge.socket", f"--log-file={folder}/munge.log"]
        stack.enter_context(daemon([programs["munged"], "--foreground", "--force", *own], folder, environment))
        controller = stack.enter_context(daemon([programs["slurmctld"], "-D"], folder, environment))
        node = stack.enter_context(daemon([programs["slurmd"], "-D"], folder, environment))
        wait_until_idle(folder, [controller, node], environment)
        try:
            yield environment
        finally:
            ask(["scancel", "--user", getpass.getuser()], environment)


def write_configuration(folder: Path, srun: str) -> None:
    """All files that the daemons need, and an `srun` that finds them: the executor hides SLURM_CONF from it."""
    for name in ("state", "spool", "bin"):
        (folder / name).mkdir()
    ports = dict(zip(("controller_port", "node_port"), free_ports(2), strict=True))
    host = socket.gethostname().partition(".")[0]
    text = CONFIGURATION.format(folder=folder, host=host, user=getpass.getuser(), **ports)
    (folder / "slurm.conf").write_text(text.lstrip())
    (folder / "gres.conf").write_text(GPUS)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    (folder / "bin" / "srun").write_text(f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {srun} "$@"\n')
    (folder / "bin" / "srun").chmod(0o755)


def free_ports(number: int) -> list[int]:
    """Ports of the loopback interface that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextmanager
def daemon(command: list[str], folder: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a daemon in the foreground, with its output in a file named after it, and ends it afterwards."""
    follow = functools.partial(die_with_parent, os.getpid())
    with (folder / f"{Path(command[0]).name}.out").open("wb") as output:
        options = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, env={**os.environ, **environment}, preexec_fn=follow, **options)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ask(command: list[str], environment: dict[str, str]) -> str:
    """What a command of Slurm answers; "" if it fails."""
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60)
    return done.stdout.strip() if done.returncode == 0 else ""


def wait_until_idle(folder: Path, daemons: list[subprocess.Popen[bytes]], environment: dict[str, str]) -> None:
    """Returns when the node waits for jobs. CannotStart with a daemon's last words if that does not come about."""
    deadline = time.monotonic() + START_SECONDS
    while ask(["sinfo", "--noheader", "--format=%t"], environment) != "idle":
        ended = [process for process in daemons if process.poll() is not None]
        if ended or time.monotonic() > deadline:
            name = Path((ended or daemons)[-1].args[0]).name
            words = (folder / f"{name}.out").read_text(errors="replace").strip().splitlines()
            raise CannotStart(f"{name} {'ended' if ended else 'is not ready'}: {words[-1] if words else 'no word'}")
        time.sleep(0.5)
