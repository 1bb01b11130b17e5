"""Folders of the project, files that are either whole or not there, and parts of pages that scripts keep up to date."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"
ORGANISMS = DATA / "organisms"


def results_folder() -> Path:
    """Where results go: APPROX_RESULTS if set, else data/results."""
    return Path(os.environ.get("APPROX_RESULTS") or DATA / "results")


def cache_folder() -> Path:
    """Where downloads and calibration states go: APPROX_CACHE if set, else data/cache."""
    return Path(os.environ.get("APPROX_CACHE") or DATA / "cache")


def figures_folder() -> Path:
    """Where figures go: APPROX_FIGURES if set, else figures."""
    return Path(os.environ.get("APPROX_FIGURES") or ROOT / "figures")


def safe_name(model: str) -> str:
    """A model's name for files: hub ids lose their slash, folders keep their last part and a hash of the whole path."""
    if Path(model).is_absolute() or ("/" in model and Path(model).is_dir()):
        path = os.path.abspath(model)
        return f"{os.path.basename(path)}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"
    return model.replace("/", "--")


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
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint that a Trainer left in `folder`, None if there is none.

    A killed save leaves a folder without trainer_state.json, which is written last."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda path: int(path.name.rsplit("-", 1)[1]))) if whole else None


def between_markers(page: str, name: str, writer: str, text: str) -> str:
    """The page with `text` between the comments that open and close the part `name`; at its end if it has none yet."""
    start, end = f"<!-- {name}: written by {writer} -->", f"<!-- end of {name} -->"
    before, _, rest = page.partition(start)
    after = rest.partition(end)[2] if rest else "\n"
    return f"{before.rstrip()}\n\n{start}\n{text}\n{end}{after}"
