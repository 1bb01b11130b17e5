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

import pyarrow.parquet
from safetensors import SafetensorError, safe_open

from lib.parameters import UsageError
from lib.paths import atomic

STORED = ("replies", "verdicts", "records", "tables", "defended", "plans", "attacks")
"""The folders in a model's folder."""
SKIPPED = ("logs", ".snakemake")
TRAINED = "defence.json"  # written last into a defended model's folder


@dataclass(frozen=True)
class Merged:
    """How many files came in, were here already, and are here with another content under the same name."""

    copied: int
    present: int
    different: int


def merge(source: Path, target: Path) -> Merged:
    """Copies what `target` lacks, each file whole or not at all. UsageError, before anything is copied, for a folder
    without results and for a file that cannot be read."""
    if not source.is_dir():
        raise UsageError(f"--import: there is no folder {source}")
    if source.resolve() == target.resolve():
        raise UsageError(f"--import: {source} is this run's own results folder")
    files = found(source)
    if not files:
        raise UsageError(f"--import: {source} holds no results: no folder of a model with records or tables in it")
    for file in files:
        check(source / file)
    present = [file for file in files if whole(target, file)]
    missing = sorted(set(files) - set(present), key=lambda file: (file.name == TRAINED, file))
    for file in missing:
        with atomic(target / file) as temporary:
            shutil.copyfile(source / file, temporary)
    other = [file for file in present if (source / file).read_bytes() != (target / file).read_bytes()]
    different = sum(file.parent.name != "records" for file in other)
    return Merged(len(missing), len(present) - different, different)


def found(source: Path) -> list[Path]:
    """The result files of a folder's models, relative to it; half-written and foreign ones and links are left out."""
    models = [path for path in sorted(source.iterdir()) if path.is_dir() and path.name not in SKIPPED]
    stores = [path for path in models if (path / "records").is_dir() or (path / "tables").is_dir()]
    files = [file for store in stores for file in sorted(store.rglob("*")) if not file.is_symlink()]
    names = [file.relative_to(source) for file in files if not file.stem.endswith(".failed")]
    return [name for name in names if whole(source, name) and not any(part.startswith(".") for part in name.parts[1:])]


def whole(folder: Path, name: Path) -> bool:
    """Whether a results folder has the file `name` and, if it belongs to a defended model, has all of that model."""
    trained = name.parts[1] != "defended" or (folder.joinpath(*name.parts[:3]) / TRAINED).is_file()
    return trained and (folder / name).is_file()


def check(file: Path) -> None:
    """UsageError for a file that a transfer has cut off."""
    try:
        if file.suffix == ".parquet":
            pyarrow.parquet.read_metadata(file)
        elif file.suffix == ".safetensors":
            with safe_open(file, "np"):
                pass
        elif file.suffix in (".json", ".ipynb"):
            json.loads(file.read_text(encoding="utf-8"))
    except (SafetensorError, ValueError, OSError) as error:
        why = str(error).partition("\n")[0]
        raise UsageError(f"--import: {file} cannot be read ({why}); copy it again") from None
