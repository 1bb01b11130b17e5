"""What makes a run safe to kill at any moment: children die with their parent, and locks with their holder."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)
STOPPING = (signal.SIGINT, signal.SIGTERM)


def die_with_parent(parent: int) -> None:
    """Has the kernel kill this process when `parent`, its parent, ends (Linux); ends it now if that is already gone.

    Signals that its parent held back as it started this process reach it again."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    if sys.platform == "linux":
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


@contextmanager
def signals_held() -> Iterator[None]:
    """Signals to stop arrive after this block: what a handler raises in the midst of a fork is lost."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


@contextmanager
def lock(path: Path, wait: float) -> Iterator[int]:
    """Holds an exclusive lock on `path`, waiting up to `wait` seconds; yields its descriptor.

    The operating system drops the lock with the last process that holds the descriptor, so it is never stale.
    TimeoutError if another process holds it.
    """
    deadline = time.monotonic() + wait
    while (descriptor := _locked(path)) is None:
        if time.monotonic() >= deadline:
            raise TimeoutError(f"{path} is held by another process")
        time.sleep(0.1)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _locked(path: Path) -> int | None:
    """A descriptor that locks the file at `path`; None if another holds it, or deleted the file that was opened."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    return None
