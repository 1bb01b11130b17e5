"""Takes results that another machine computed into this one's: every file of its models' folders.

Results are named by what decides them (`lib.results`), so two machines never mean different things by one name and a
merge is a union of files. What is here stays. A summary table or an executed notebook bears the name of its notebook
instead: one that is here stays too, and is counted. Records of one condition differ in times and commit alone.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pyarrow.lib
import pyarrow.parquet

from lib.paths import atomic

SKIPPED = ("logs", ".snakemake")


class MergeError(ValueError):
    """A folder that cannot be taken in; the message is one line."""


@dataclass(frozen=True)
class Merged:
    """How many files came in, were here already, and are here with another content under the same name."""

    copied: int
    present: int
    different: int


def merge(source: Path, target: Path) -> Merged:
    """Copies what `target` lacks, each file whole or not at all. MergeError, before anything is copied, for a folder
    without results and for a file that cannot be read."""
    if not source.is_dir():
        raise MergeError(f"there is no folder {source}")
    if source.resolve() == target.resolve():
        raise MergeError(f"{source} is this run's own results folder")
    files = [file for file in found(source) if not file.is_symlink()]
    if not files:
        raise MergeError(f"{source} holds no results: no file under MODEL/replies, records, verdicts or tables")
    for file in files:
        check(file)
    missing = [file for file in files if not (target / file.relative_to(source)).exists()]
    for file in missing:
        with atomic(target / file.relative_to(source)) as temporary:
            shutil.copyfile(file, temporary)
    old = [file for file in files if file not in set(missing)]
    other = [file for file in old if file.read_bytes() != (target / file.relative_to(source)).read_bytes()]
    different = sum(file.parent.name != "records" for file in other)
    return Merged(len(missing), len(old) - different, different)


def found(source: Path) -> list[Path]:
    """The result files of a folder's models, half-written and foreign ones left out."""
    models = [path for path in sorted(source.iterdir()) if path.is_dir() and path.name not in SKIPPED]
    stores = [path for path in models if (path / "records").is_dir() or (path / "tables").is_dir()]
    files = [file for store in stores for file in sorted(store.rglob("*")) if file.is_file()]
    return [file for file in files if not file.name.startswith(".") and not file.stem.endswith(".failed")]


def check(file: Path) -> None:
    """MergeError for a file that a transfer has cut off."""
    try:
        if file.suffix == ".parquet":
            pyarrow.parquet.read_metadata(file)
        elif file.suffix in (".json", ".ipynb"):
            json.loads(file.read_text(encoding="utf-8"))
    except (pyarrow.lib.ArrowInvalid, ValueError, OSError) as error:
        raise MergeError(f"{file} cannot be read ({str(error).splitlines()[0]}); copy it again") from None
