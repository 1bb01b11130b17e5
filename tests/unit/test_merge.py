"""Results of another machine: a union of files, whole or not at all."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest

from lib import run
from lib.merge import merge
from lib.parameters import UsageError
from lib.results import Store

EMPTY_WEIGHTS = (2).to_bytes(8, "little") + b"{}"  # of safetensors: the length of a header, and the header


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def fill(folder: Path, model: str, keys: list[str], note: str = "") -> Path:
    store = Store(folder / model)
    for key in keys:
        store.write_table("replies", key, pd.DataFrame({"id": [key], "reply": ["..."]}))
        store.write_record(key, {"key": key})
    store.write_table("tables", "02_sparsification", pd.DataFrame({"note": [note]}))
    return folder


def test_a_merge_is_a_union_and_what_is_here_stays(tmp_path: Path) -> None:
    here = fill(tmp_path / "here", "m", ["a", "b"], "here")
    there = fill(tmp_path / "there", "m", ["b", "c"], "there")
    fill(there, "n", ["d"])
    (there / "m" / ".half-written.json").write_text("{")
    write(there / "m" / ".ipynb_checkpoints" / "01_x-checkpoint.ipynb", b"{}")
    (there / "m" / "01_x.failed.ipynb").write_text("{")
    (there / "logs").mkdir()
    (there / "logs" / "plan.json").write_text("{}")
    merged = merge(there, here)
    assert (merged.copied, merged.present, merged.different) == (2 + 3, 2, 1)
    for model, key in (("m", "a"), ("m", "b"), ("m", "c"), ("n", "d")):
        assert Store(here / model).read_record(key) == {"key": key}
        assert Store(here / model).read_table("replies", key)["id"].tolist() == [key]
    assert Store(here / "m").read_table("tables", "02_sparsification")["note"].tolist() == ["here"]
    assert not list(here.rglob("*checkpoint*")) and not (here / "logs").exists()
    assert not list(here.rglob("*failed*")) and not list(here.rglob(".half*"))
    again = merge(there, here)
    assert again.copied == 0 and again.present + again.different == 8


def test_defended_models_and_attacks_come_whole_and_records_that_differ_in_time_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = fill(tmp_path / "here", "m", ["a"]), fill(tmp_path / "there", "m", ["a"])
    Store(there / "m").write_record("a", {"key": "a", "seconds": 2.0})
    files = ["defended/x/defence.json", "defended/x/model.safetensors", "defended/x/chat_template.jinja"]
    files.append("attacks/gcg-x.jsonl")
    content = {file: b"{}" if file.endswith(".json") else EMPTY_WEIGHTS for file in files}
    for file in files:
        write(there / "m" / file, content[file])
    write(here / "m" / files[1], b"cut off")  # of a training that was killed as it saved
    write(there / "m" / "defended" / "killed" / "checkpoints" / "1" / "model.safetensors", EMPTY_WEIGHTS)
    copied: list[str] = []
    monkeypatch.setattr("shutil.copyfile", lambda old, new: (copied.append(old.name), write(new, old.read_bytes())))
    merged = merge(there, here)
    assert (merged.copied, merged.different) == (len(files), 0)
    assert copied[-1] == "defence.json"  # by which a training is known to be finished, if this is killed
    assert all((here / "m" / file).read_bytes() == content[file] for file in files)
    assert not (here / "m" / "defended" / "killed").exists()
    assert Store(here / "m").read_record("a") == {"key": "a"}


@pytest.mark.parametrize("file", ["replies/a.parquet", "records/a.json", "defended/x/model.safetensors"])
def test_a_file_cut_off_on_the_way_stops_everything(tmp_path: Path, file: str) -> None:
    here, there = tmp_path / "here", fill(tmp_path / "there", "m", ["a"])
    write(there / "m" / "defended" / "x" / "model.safetensors", EMPTY_WEIGHTS)
    write(there / "m" / "defended" / "x" / "defence.json", b"{}")
    whole = there / "m" / file
    whole.write_bytes(whole.read_bytes()[:-1])
    with pytest.raises(UsageError, match=rf"{re.escape(file)} cannot be read"):
        merge(there, here)
    assert not here.exists()


def test_what_is_no_results_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photos" / "2026").mkdir(parents=True)
    for folder, line in ((tmp_path / "photos", "holds no results"), (tmp_path / "nowhere", "no folder")):
        with pytest.raises(UsageError, match=line):
            merge(folder, tmp_path / "here")
    own = fill(tmp_path / "own", "m", ["a"])
    with pytest.raises(UsageError, match="own results folder"):
        merge(own, own)


def test_the_command_line_takes_a_folder_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run.signal, "signal", lambda number, handler: None)
    for name in ("RESULTS", "FIGURES"):
        monkeypatch.setenv(f"APPROX_{name}", str(tmp_path / name.lower()))
    there = fill(tmp_path / "there", "m", ["a"])
    assert run.main(["--import", str(there)]) == 0
    assert capsys.readouterr().out.startswith("3 files copied")
    assert json.loads((tmp_path / "results" / "m" / "records" / "a.json").read_text()) == {"key": "a"}
    assert run.main(["--import", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err == f"run_all.sh: --import: there is no folder {tmp_path / 'nowhere'}\n"
