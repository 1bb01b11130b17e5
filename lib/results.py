"""Results on disk: named by what decides them, written atomically, never computed twice.

    replies/<key>.parquet    id, reply, ended                key: weights, technique, setting, layers, prompts, ...
    verdicts/<key>.parquet   id, verdict, nll, asr_keyword   key: the replies' key, the judge's version, the base
    records/<key>.json       utility measures, provenance, times

A file is either whole or absent, so a killed run loses at most the condition under way, and two runs that compute the
same condition write the same tables, and the same measures into records that differ in times and commit alone. Replies
stay in these files: they are never printed or committed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from lib.errors import ChoiceError
from lib.paths import ROOT, atomic, results_folder, safe_name, write_whole

log = logging.getLogger(__name__)

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "scipy", "statsmodels", "pandas")


def content_key(content: Any) -> str:
    """24 hexadecimal digits of the sha256 of anything JSON can hold, keys sorted."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:24]


SOURCES = {file.relative_to(ROOT): file.read_text() for file in (ROOT / "lib").rglob("*.py")}
"""The code as it was when it was loaded: files may change while a kernel lives."""


def source_hash(*names: str) -> str:
    """Hash of the source files of modules such as "lib.generation": the code version in a key."""
    return content_key([SOURCES[Path(name.replace(".", "/") + ".py")] for name in sorted(set(names))])


def read_whole(path: Path, read: Callable[[Path], Any]) -> Any:
    """What `read` makes of a file; None if it is not there, or is damaged, as a power failure may leave it."""
    try:
        return read(path) if path.is_file() else None
    except (ValueError, OSError) as error:  # pyarrow's and JSON's own are among them
        log.warning("%s is damaged (%s): computing it again", path, str(error).partition("\n")[0])
        return None


@dataclass(frozen=True)
class Store:
    """The result files of one model."""

    folder: Path

    def read_table(self, kind: str, key: str) -> pd.DataFrame | None:
        """A stored table, or None if it has to be computed."""
        return read_whole(self.folder / kind / f"{key}.parquet", pd.read_parquet)

    def write_table(self, kind: str, key: str, table: pd.DataFrame) -> None:
        """Stores a table under (kind, key), whole or not at all."""
        with atomic(self.folder / kind / f"{key}.parquet") as temporary:
            table.to_parquet(temporary, index=False)

    def read_record(self, key: str) -> dict[str, Any] | None:
        """A stored record, or None if its condition has to be computed."""
        return read_whole(self.folder / "records" / f"{key}.json", lambda path: json.loads(path.read_text()))

    def write_record(self, key: str, record: Mapping[str, Any]) -> None:
        """Stores a record as JSON, whole or not at all."""
        text = json.dumps(record, indent=1, sort_keys=True, default=str)
        write_whole(self.folder / "records" / f"{key}.json", text)


def store_for(model: str) -> Store:
    """The store of a model under the results folder; ChoiceError in one line if it cannot be written."""
    folder = results_folder() / safe_name(model)
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise ChoiceError(f"results folder {folder} cannot be written; choose another with --out or APPROX_RESULTS")
    return Store(folder)


def rejudging() -> bool:
    """Whether stored verdicts are to be computed again (APPROX_REJUDGE=1)."""
    return os.environ.get("APPROX_REJUDGE") == "1"


@cache
def provenance() -> dict[str, Any]:
    """Commit ("unknown" without git), package versions and platform: what a record needs to be repeated."""
    command, commit = ["git", "-C", str(ROOT), "rev-parse", "HEAD"], "unknown"
    with suppress(FileNotFoundError):
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or commit
    versions = {name: version(name) for name in PACKAGES}
    return {"commit": commit, "python": platform.python_version(), "machine": platform.machine(), **versions}
