"""The command line: what is refused with which line, which jobs are planned, and how values get their types."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pandas as pd
import papermill
import pytest

from lib import estimates, execute, merge, paths, processes, registry, results, run, workflow
from lib.parameters import UsageError, convert, read_notebook, read_notebooks, read_parameters
from lib.paths import ROOT, safe_name
from lib.processes import lock

FIXTURES = ROOT / "tests" / "notebooks" / "fixtures"


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two organisms, `tiny-llama` and `tiny-qwen`, and the fixture notebooks; everything written goes to tmp_path."""
    for name in ("tiny-llama", "tiny-llama-base", "tiny-qwen"):
        (tmp_path / "organisms" / name).mkdir(parents=True)
        (tmp_path / "organisms" / name / "config.json").write_text("{}")
    monkeypatch.setattr(registry, "ORGANISMS", tmp_path / "organisms")
    for name in [name for name in os.environ if name.startswith("APPROX_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(run.signal, "signal", lambda number, handler: None)  # pytest keeps its own Ctrl-C
    monkeypatch.setenv("APPROX_NOTEBOOKS", str(FIXTURES))
    for name in ("RESULTS", "FIGURES"):
        monkeypatch.setenv(f"APPROX_{name}", str(tmp_path / name.lower()))
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--models tiny-lama", "unknown model 'tiny-lama'; choose one of tiny-llama, tiny-qwen, llama-2-7b"),
        ("--models organisms", "folder 'organisms' holds no model: config.json is missing"),
        ("--notebooks 01 42", "unknown notebook '42'; choose from 00_interactive, 01_squares, 02_threshold"),
        ("--set m=3", "--set m=3: no chosen notebook has that parameter; choose from n, levels, label, seed, fast"),
        ("--notebooks 02 --set n=3", "--set n=3: no chosen notebook has that parameter; choose from threshold, seed"),
        ("--notebooks 02 --fast", "--set fast=true: no chosen notebook has that parameter"),
        ("--set n=many", "--set n=many: n is int in 01_squares"),
        ("--set levels=0.1,x", "--set levels=0.1,x: levels is list[float] in 01_squares"),
        ("--set levels=0.1,,", "--set levels=0.1,,: levels is list[float] in 01_squares"),
        ("--set levels={[]:1}", "--set levels={[]:1}: levels is list[float] in 01_squares"),
        (f"--models {'m' * 300}", "[Errno 36] File name too long: "),
        ("--set n", "--set n: write it as name=value"),
        ("--set model=x", "--set model=x: choose models with --models"),
        ("--seed x", "--set seed=x: seed is int in 01_squares"),
        ("--seed=-1", "seed cannot be -1; give a whole number from 0"),
        ("--set seed=-1", "seed cannot be -1; give a whole number from 0"),
        ("--jobs x", "argument --jobs: invalid int value: 'x'"),
        ("--jobs 0", "--jobs 0: give a number from 1"),
        ("--profile lsf", "unknown profile 'lsf'; choose from slurm"),
        ("--profile=", "unknown profile ''; choose from slurm"),
        ("--models odd/{a} --notebooks 01", "{a}-"),
        ("--models odd/-b --notebooks 01", "-b-"),
        ("--set label=/tmp/{a}.csv", "/tmp/{a}.csv: a path may not contain braces"),
        ("--set levels=", "levels is empty; give at least one"),
        ("--set levels=0.5,0.5", "levels has 0.5 twice; give each once"),
        ("--set fast=yes", "--set fast=yes: fast is bool (true or false) in 01_squares"),
        ("--clean --models tiny-qwen", "--clean concerns all models and notebooks: leave out --models"),
        ("--list --set n=3", "--list concerns all models and notebooks: leave out --models, --notebooks and --set"),
        (f"--out {run.ROOT}", "--out is the repository itself: name a folder for this run"),
        ("--dry", "unrecognized arguments: --dry"),
        ("--list --clean", "argument --clean: not allowed with argument --list"),
        ("--models tiny-qwen --set seed=1 --out organisms/tiny-llama/config.json", "cannot write to "),
    ],
)
def test_bad_input_gets_one_line_before_any_work(
    flags: str, line: str, folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folders)
    for name in ("{a}", "-b"):
        (folders / "odd" / name).mkdir(parents=True)
        (folders / "odd" / name / "config.json").touch()
    assert run.main(flags.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith(f"run_all.sh: {line}")
    assert not (folders / "results").exists()


@pytest.mark.parametrize("memory", ["80GB", "0", "-1", "nan"])
def test_the_memory_of_a_gpu_is_a_number(
    memory: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("APPROX_GPU_GIGABYTES", memory)
    assert run.main(["--notebooks", "01"]) == 2
    assert f"APPROX_GPU_GIGABYTES={memory}: give the memory of one GPU" in capsys.readouterr().err


def test_notebooks_that_cannot_be_told_apart_or_read(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = folders / "notebooks"
    place.mkdir()
    for name, text, line in [
        ("", "", f"no notebook NN_name.ipynb in {place}"),
        ("01_squares.ipynb", (FIXTURES / "01_squares.ipynb").read_text(), ""),
        ("01_squares_mine.ipynb", (FIXTURES / "01_squares.ipynb").read_text(), "01_squares and 01_squares_mine in "),
        ("01_squares_mine.ipynb", "[]", f"{place / '01_squares_mine.ipynb'} is not a readable notebook: "),
        ("01_squares_mine.ipynb", '{"cells": [1]}', f"{place / '01_squares_mine.ipynb'} is not a readable notebook: "),
    ]:
        if name:
            (place / name).write_text(text)
        if line:
            with pytest.raises(UsageError, match=f"^{re.escape(line)}"):
                read_notebooks(place)
        else:
            assert list(read_notebooks(place)) == ["01"]


def test_a_report_alone_needs_no_model(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(run.registry, "check", asked.append)
    monkeypatch.setattr(workflow.Graph, "run", lambda graph, pending: 0)
    assert run.main(["--models", "Owner/Name", "--notebooks", "09"]) == 0 and asked == []
    assert run.main(["--models", "Owner/Name", "--notebooks", "01", "02", "09"]) == 0 and asked == ["Owner/Name"]


def test_a_damaged_result_is_computed_again(folders: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = results.store_for("tiny")
    store.write_record("key", {"a": 1})
    store.write_table("replies", "key", pd.DataFrame({"id": ["a"] * 99}))
    assert store.read_record("key") == {"a": 1} and len(store.read_table("replies", "key")) == 99
    for path in (store.folder / "records" / "key.json", store.folder / "replies" / "key.parquet"):
        path.write_bytes(path.read_bytes()[:-1])
    assert store.read_record("key") is None and store.read_table("replies", "key") is None
    assert [f"{name} is damaged" in caplog.text for name in ("key.json", "key.parquet")] == [True, True]


def test_provenance_without_git(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folders))
    assert results.provenance.__wrapped__()["commit"] == "unknown"


def test_too_little_disk(folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(run.shutil, "disk_usage", lambda folder: usage(250e6))
    assert run.main([]) == 2
    assert "results has only 250 MB left and a run needs 1 GB" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_results_folder(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folders / "results").mkdir(mode=0o555)
    assert run.main([]) == 2
    assert "Permission denied; choose another folder with --out" in capsys.readouterr().err


def test_a_damaged_organism_stops_the_run(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folders / "organisms" / "tiny-llama" / "SHA256SUMS").write_text(f"{'0' * 64}  config.json\n")
    assert run.main([]) == 2
    assert "tiny-llama: config.json is damaged" in capsys.readouterr().err


def test_slurm_needs_slurm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(run.shutil, "which", lambda name: None)
    assert run.main(["--profile", "slurm"]) == 2
    assert "sbatch is not on this machine" in capsys.readouterr().err


def planned(flags: str) -> dict[str, workflow.Job]:
    options = run.parse(flags.split())
    notebooks = run.chosen_notebooks(options.notebooks, run.read_notebooks(FIXTURES))
    return {job.key: job for job in run.plan(options, notebooks, run.chosen_models(options))}


LLAMA = ["tiny-llama/01_squares", "tiny-llama/02_threshold"]
QWEN = ["tiny-qwen/01_squares", "tiny-qwen/02_threshold"]


@pytest.mark.parametrize(
    ("flags", "keys"),
    [
        ("", [*LLAMA, *QWEN, "tiny-llama/07_demanding", "09_report"]),
        ("--full", [*LLAMA, *QWEN, "tiny-llama/07_demanding", "tiny-qwen/07_demanding", "09_report"]),
        ("--fast", [*LLAMA, "tiny-llama/07_demanding", "09_report"]),
        ("--models tiny-qwen", [*QWEN, "09_report"]),
        ("--models tiny-qwen --notebooks 07", ["tiny-qwen/07_demanding"]),
        ("--notebooks 00 09_report", ["tiny-llama/00_interactive", "tiny-qwen/00_interactive", "09_report"]),
        ("--models Owner/Name --notebooks 01", ["Owner--Name/01_squares"]),
        ("--models tiny-qwen tiny-qwen --notebooks 01", ["tiny-qwen/01_squares"]),
        ("--models tiny-llama --models tiny-qwen --notebooks 01 --notebooks 02", [*LLAMA, *QWEN]),
    ],
)
def test_the_graph(flags: str, keys: list[str]) -> None:
    jobs = planned(flags)
    assert sorted(jobs) == sorted(keys)
    if "09_report" in jobs:
        assert sorted(jobs["09_report"].after) == sorted(set(keys) - {"09_report"})


def test_settings_reach_the_notebooks_that_have_them() -> None:
    jobs = planned("--seed 3 --fast --set n=7 --set levels=0.25")
    assert jobs["tiny-llama/01_squares"].parameters == {
        "model": "tiny-llama",
        "n": 7,
        "levels": [0.25],
        "seed": 3,
        "fast": True,
    }
    assert jobs["tiny-llama/02_threshold"].parameters == {"model": "tiny-llama", "seed": 3}
    assert jobs["09_report"].parameters == {"models": ["tiny-llama"], "fast": True}


def test_model_folders_are_made_absolute_and_kept_apart(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for parent in ("one", "two"):
        (folders / parent / "mine").mkdir(parents=True)
        (folders / parent / "mine" / "config.json").write_text("{}")
    monkeypatch.chdir(folders)
    jobs = planned("--models one/mine two/mine ./one/mine/ --notebooks 01 09")
    *models, listed = [job.parameters.get("model") or job.parameters["models"] for job in jobs.values()]
    assert models == listed == [str(folders / parent / "mine") for parent in ("one", "two")]
    assert [key.startswith("mine-") for key in jobs] == [True, True, False]
    assert list(planned("--models tiny-llama/ --notebooks 01")) == ["tiny-llama/01_squares"]


def test_altered_runs_do_not_draw_over_full_ones(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, expected in [
        ("", ROOT / "figures"),
        ("--fast", folders / "results" / "figures"),
        ("--seed 1", folders / "results" / "figures"),
        (f"--out {folders}/elsewhere --fast", folders / "elsewhere" / "figures"),
    ]:
        monkeypatch.delenv("APPROX_FIGURES", raising=False)
        monkeypatch.setenv("APPROX_RESULTS", str(folders / "results"))
        run.set_folders(run.parse(flags.split()))
        assert os.environ["APPROX_FIGURES"] == str(expected)


def test_list_names_models_notebooks_and_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--list"]) == 0
    out = capsys.readouterr().out
    assert "tiny-qwen" in out and "google/gemma-2-9b-it" in out and "tiny-llama-base" not in out
    assert "advbench" in out and "Zou et al. 2023, arXiv:2307.15043; MIT" in out
    assert "\n01_squares\n" in out and "n: int = 3" in out and "how many squares" in out


def test_dry_run_of_a_new_folder_writes_nothing(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--dry-run", "--fast"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "4 of 4 jobs would run"
    assert not (folders / "results").exists()


def test_clean_deletes_only_what_a_run_made(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = folders / "results"
    assert run.main(["--clean"]) == 0
    assert capsys.readouterr().out.startswith("nothing to delete")
    results.mkdir()
    (results / "thesis.tex").write_text("years of work")
    assert run.main(["--clean"]) == 2
    assert (results / "thesis.tex").exists()
    for name in (
        workflow.RUN_LOCK,
        "09_report.ipynb",
        "report.html",
        "figures/a.pdf",
        "tiny/records/a.json",
        "tiny/.x",
    ):
        (results / name).parent.mkdir(parents=True, exist_ok=True)
        (results / name).touch()
    (results / "tiny-qwen").mkdir()  # of a job that was killed at once
    (results / "photos").mkdir()
    (results / "photos" / "1.jpg").touch()
    assert run.main(["--clean"]) == 0
    assert capsys.readouterr().out.endswith("results but for photos, thesis.tex, with files that no run made\n")
    assert {path.name for path in results.rglob("*")} == {"thesis.tex", "photos", "1.jpg"}


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("3", "int", 3),
        ("1e-3", "float", 0.001),
        ("True", "bool", True),
        ("12", "str", "12"),
        ("a=b", "str", "a=b"),
        ("[0.1, 2]", "list[float]", [0.1, 2.0]),
        ("bolt,iron", "list[str]", ["bolt", "iron"]),
        ("['norm, Laplace', 'act']", "list[str]", ["norm, Laplace", "act"]),
        ("0, 3", "list[int]", [0, 3]),
        ("[]", "list[int]", []),
        ("", "list[int]", []),
        ("{'a': 1}", "dict", {"a": 1}),
    ],
)
def test_values_get_their_declared_type(text: str, kind: str, value: object) -> None:
    converted = convert(text, kind)
    assert converted == value and type(converted) is type(value)


@pytest.mark.parametrize(
    ("text", "kind"),
    [("1.5", "int"), ("yes!", "bool"), ("none", "int"), ("3", "dict"), ("{[]: 1}", "dict"), ("a", "list[int]"),
     ("[1.5]", "list[int]"), ("[", "list[int]"), ("1,", "list[int]"), ("a,", "list[str]"), ("1", "int | None"),
     ("[]", "dict")],
)  # fmt: skip
def test_values_of_another_type_are_refused(text: str, kind: str) -> None:
    with pytest.raises(ValueError, match="is not"):
        convert(text, kind)


def test_parameters_are_those_papermill_finds() -> None:
    for path in [*FIXTURES.glob("*.ipynb"), *(ROOT / "notebooks").glob("*.ipynb")]:
        ours = read_notebook(path).parameters
        theirs = papermill.inspect_notebook(str(path))
        assert set(ours) - set(theirs) <= {"label"}  # whose default papermill cannot read
        for name, parameter in theirs.items():
            assert ours[name].help == parameter["help"] and ours[name].kind == parameter["inferred_type_name"]
            assert convert(str(ours[name].default), ours[name].kind) == ours[name].default


def test_a_default_that_is_no_literal_is_refused() -> None:
    with pytest.raises(ValueError, match="malformed"):
        read_parameters("n: int = other + 1")


def test_gpus_are_counted_without_torch(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = folders / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: A (UUID: x)'\necho '  MIG 1g: (UUID: y)'\necho 'GPU 1: A (UUID: z)'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folders}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert workflow.visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert workflow.visible_gpus() == ["3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert workflow.visible_gpus() == []


def test_each_job_gets_its_own_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    from lib.execute import own_devices

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    seen = []
    with own_devices(["4", "5", "6", "7"], 2):
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
        with own_devices(["4", "5", "6", "7"], 2):
            seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert seen == ["4,6", "5,7"]
    with own_devices(["4"], 2), own_devices(["4"], 2):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "4"


def test_a_lock_has_one_holder(tmp_path: Path) -> None:
    with lock(tmp_path / "held", wait=0), pytest.raises(TimeoutError), lock(tmp_path / "held", wait=0.2):
        pass
    with lock(tmp_path / "held", wait=0):
        pass


def test_a_lock_outlives_a_file_that_was_deleted_under_it(tmp_path: Path) -> None:
    path = tmp_path / "held"
    with lock(path, wait=0):
        waiting = os.open(path, os.O_RDWR)  # what a second run opened before the first one deleted the file
        path.unlink()
        with lock(path, wait=0), pytest.raises(TimeoutError), lock(path, wait=0):
            pass
    os.close(waiting)


def test_a_run_that_waits_does_not_take_the_lock_of_a_deleted_file(tmp_path: Path, monkeypatch) -> None:
    path, flock = tmp_path / "held", processes.fcntl.flock

    def deleted_meanwhile(descriptor: int, kind: int) -> None:
        monkeypatch.setattr(processes.fcntl, "flock", flock)
        path.unlink()
        flock(descriptor, kind)

    monkeypatch.setattr(processes.fcntl, "flock", deleted_meanwhile)
    with lock(path, wait=1), pytest.raises(TimeoutError), lock(path, wait=0):
        pass


def test_files_are_found_from_where_the_command_was_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.jsonl").write_text("{}\n")
    (tmp_path / "earlier").mkdir()
    (tmp_path / "bolt").mkdir()
    monkeypatch.chdir(tmp_path)
    assert convert("mine.jsonl", "str") == str(tmp_path / "mine.jsonl")
    assert convert("mine.jsonl,bolt", "list[str]") == [str(tmp_path / "mine.jsonl"), "bolt"]
    assert convert("./earlier", "str") == str(tmp_path / "earlier")
    assert convert("advbench", "str") == "advbench"


def test_one_name_for_a_model_folder_everywhere(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folders / "mine").mkdir()
    (folders / "mine" / "config.json").write_text("{}")
    monkeypatch.chdir(folders)
    (job,) = planned("--models ./mine --notebooks 01").values()
    store = results.store_for(str(job.parameters["model"]))
    assert job.key == f"{store.folder.name}/01_squares" and store.folder.name == safe_name("./mine")
    assert [safe_name(name) for name in ("tiny-llama", "Owner/Name")] == ["tiny-llama", "Owner--Name"]
    store.write_record("key", {})
    (store.folder / "01_squares.ipynb").write_text("{}")
    assert {path.name for path in merge.found(folders / "results")} == {"key.json", "01_squares.ipynb"}


def test_empty_variables_are_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RESULTS", "CACHE", "FIGURES", "NOTEBOOKS"):
        monkeypatch.setenv(f"APPROX_{name}", "")
    assert paths.results_folder() == paths.DATA / "results" and paths.figures_folder() == ROOT / "figures"
    assert paths.cache_folder() == paths.DATA / "cache"
    assert run.main(["--list", "--fast"]) == 0
    assert os.environ["APPROX_FIGURES"] == str(paths.DATA / "results" / "figures")


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("prompt_set=advbensch", "unknown prompt set 'advbensch'; valid: advbench, "),
        ("prompt_set=organisms.jsonl", "organisms.jsonl, line 1: not JSON"),
        ("protocol=chatty", "unknown protocol 'chatty'; choose one of chat, quada"),
        ("dtype=fp16", "unknown dtype 'fp16'; choose one of auto, float32, bfloat16, float16"),
        ("layers=x", "--set layers=x: layers is list[int] in 01_polynomialization"),
    ],
)
def test_choices_are_checked_before_any_work(
    setting: str, line: str, folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("APPROX_NOTEBOOKS", str(ROOT / "notebooks"))
    (folders / "organisms.jsonl").write_text("no")
    monkeypatch.chdir(folders)
    assert run.main(["--set", setting]) == 2
    assert capsys.readouterr().err.startswith(f"run_all.sh: {line}")


def test_estimates_know_the_default_of_each_notebook() -> None:
    notebooks = run.read_notebooks(ROOT / "notebooks")
    defaults = {number: notebooks[number].parameters["n_prompts"].default for number in estimates.SIZES}
    assert defaults == {number: size.n_prompts for number, size in estimates.SIZES.items()}


def test_the_dtypes_are_those_of_models() -> None:
    from lib import models

    with pytest.raises(models.ModelError, match=f"choose one of {', '.join(run.DTYPES)}$"):
        models.best_dtype("fp16", "cpu")


def test_clean_follows_a_link_and_says_what_it_cannot_do(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folders / "disk" / "tiny").mkdir(parents=True)
    (folders / "disk" / workflow.RUN_LOCK).touch()
    (folders / "results").symlink_to(folders / "disk")
    assert run.main(["--clean"]) == 0 and list((folders / "disk").iterdir()) == []
    (folders / "disk" / workflow.RUN_LOCK).touch()

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(processes.os, "open", refuse)
    assert run.main(["--clean"]) == 2
    assert "cannot lock" in capsys.readouterr().err


def test_progress_leaves_half_written_lines_and_reads_each_job_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [workflow.Job(f"tiny/0{i}", f"0{i} tiny", "", {}, []) for i in (1, 2)]
    progress, plan = workflow.Progress(jobs, tmp_path), {"events": str(tmp_path)}
    execute.report(plan, "tiny/01", "started")
    execute.report(plan, "tiny/02", "started")
    assert len(list(tmp_path.glob("*.jsonl"))) == 2  # on a shared disk no two nodes write one file
    progress.read(tmp_path)
    with (tmp_path / "tiny--01.jsonl").open("a") as stream:
        stream.write('{"job": "tiny/01", "st')
        stream.flush()
        progress.read(tmp_path)
        stream.write('ate": "done", "seconds": 2}\n')
    progress.read(tmp_path)
    assert progress.done == 1 and progress.states == {"tiny/01": "done", "tiny/02": "started"}
    assert capsys.readouterr().out.count("\n") == 3
    progress.show("tiny/01", "started")  # a cluster may do a job twice
    assert progress.done == 0
    progress.show("tiny/01", "done", 2)
    assert progress.done == 1


def test_a_signal_in_the_midst_of_a_fork_is_not_lost(tmp_path: Path) -> None:
    code = """
import os, signal, subprocess, sys
from lib.processes import die_with_parent, signals_held
def stop(number, frame):
    raise KeyError("stopped")
signal.signal(signal.SIGTERM, stop)
os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGTERM))
child = [sys.executable, "-c", "import signal; print(signal.pthread_sigmask(signal.SIG_BLOCK, ()))"]
try:
    with signals_held():
        subprocess.Popen(child, preexec_fn=lambda: die_with_parent(os.getppid())).wait()
except KeyError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["set()", "'stopped'"] and done.stderr == ""


@pytest.mark.parametrize(
    "parameters, line",
    [
        ({"doses": [-1.0]}, "doses cannot be -1.0; give a number above 0"),
        ({"tolerance": 5.0}, "tolerance cannot be 5.0; give a share between 0 and 1"),
        ({"split": "all"}, "split=all is for another prompt_set"),
        ({"prompt_set": "none.csv"}, "none.csv"),
    ],
)
def test_parameters_that_cannot_be_stop_before_any_job(parameters, line):
    with pytest.raises(UsageError, match=re.escape(line)):
        run.check_choices(parameters)
    run.check_choices({"split": "all", "prompt_set": "advbench", "tolerance": 0.05})
