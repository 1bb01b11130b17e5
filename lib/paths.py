"""Folders of the project, files that are either whole or not there, and parts of pages that scripts keep up to date."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"
ORGANISMS = DATA / "organisms"


def results_folder() -> Path:
    """Where results go: APPROX_RESULTS if set, else data/results."""
    return Path(os.environ.get("APPROX_RESULTS", DATA / "results"))


def cache_folder() -> Path:
    """Where downloads and calibration states go: APPROX_CACHE if set, else data/cache."""
    return Path(os.environ.get("APPROX_CACHE", DATA / "cache"))


def figures_folder() -> Path:
    """Where figures go: APPROX_FIGURES if set, else figures."""
    return Path(os.environ.get("APPROX_FIGURES", ROOT / "figures"))


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` and moves it into place on success; nothing half-written survives."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def between_markers(page: str, name: str, writer: str, text: str) -> str:
    """The page with `text` between the comments that open and close the part `name`; at its end if it has none yet."""
    start, end = f"<!-- {name}: written by {writer} -->", f"<!-- end of {name} -->"
    before, _, rest = page.partition(start)
    after = rest.partition(end)[2] if rest else "\n"
    return f"{before.rstrip()}\n\n{start}\n{text}\n{end}{after}"
