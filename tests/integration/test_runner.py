"""From a command line to executed notebooks, on fixtures that need no model: runs, reruns, failures, kills."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lib.paths import ROOT

FIXTURES = ROOT / "tests" / "notebooks" / "fixtures"
COMMAND = [sys.executable, "-P", "-m", "lib.run"]


class Runner:
    """The runner in a folder of its own, with a model folder `tiny` and its own copies of the fixture notebooks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results = folder / "out" / "results"
        self.notebooks = folder / "notebooks"
        self.notebooks.mkdir()
        for path in FIXTURES.glob("*.ipynb"):
            (self.notebooks / path.name).write_bytes(path.read_bytes())
        (folder / "tiny").mkdir()
        (folder / "tiny" / "config.json").write_text("{}")
        kept = {key: value for key, value in os.environ.items() if not key.startswith("APPROX_")}
        self.environment = {**kept, "PYTHONPATH": str(ROOT), "APPROX_NOTEBOOKS": str(self.notebooks)}

    def start(self, *flags: str, **environment: str) -> subprocess.Popen[str]:
        models = [] if {"--clean", "--import", "--list"} & set(flags) else ["--models", str(self.folder / "tiny")]
        command = [*COMMAND, *models, "--out", str(self.folder / "out"), *flags]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": self.folder}
        return subprocess.Popen(command, env={**self.environment, **environment}, start_new_session=True, **options)

    def run(self, *flags: str, **environment: str) -> tuple[int, str, str]:
        process = self.start(*flags, **environment)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def conditions(self) -> dict[str, str]:
        return {path.name: path.read_text() for path in (self.results / "conditions" / "tiny").glob("[0-9]*.txt")}

    def age(self, condition: str) -> int:
        return (self.results / "conditions" / "tiny" / condition).stat().st_mtime_ns

    def executed(self, name: str) -> dict:
        """The one executed copy of a notebook."""
        (path,) = [*self.results.glob(f"*/{name}.ipynb"), *self.results.glob(f"{name}.ipynb")]
        return json.loads(path.read_text())

    def printed(self, name: str) -> str:
        cells = self.executed(name)["cells"]
        return "".join("".join(output.get("text", "")) for cell in cells for output in cell.get("outputs", []))

    def processes(self) -> list[int]:
        """Processes that run for this folder: their command line or environment names it."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                text = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                alive = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
            except OSError:
                continue
            if alive and str(self.folder).encode() in text and int(entry.name) != os.getpid():
                found.append(int(entry.name))
        return found

    def all_gone(self, seconds: float = 5.0) -> bool:
        deadline = time.monotonic() + seconds
        while self.processes():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def wait_for(self, pattern: str, seconds: float = 40.0) -> None:
        deadline = time.monotonic() + seconds
        while not list(self.results.glob(pattern)):
            assert time.monotonic() < deadline, f"{pattern} did not appear"
            time.sleep(0.02)


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[Runner]:
    made = Runner(tmp_path)
    yield made
    for process in made.processes():
        os.kill(process, signal.SIGKILL)


SQUARES = {f"{number}.txt": f"{number} squared is {number**2}" for number in range(3)}


def test_runs_then_reruns_only_what_changed(runner: Runner) -> None:
    status, out, err = runner.run()
    assert (status, err) == (0, "")
    assert runner.conditions() == SQUARES
    stored = "['conditions/tiny/0.txt', 'conditions/tiny/1.txt', 'conditions/tiny/2.txt']"
    assert f"1 {stored} figures" in runner.printed("09_report")  # it ran last
    *lines, last = out.splitlines()
    assert sum("started" in line for line in lines) == sum(" done " in line for line in lines) == 3
    assert lines[0].startswith("[1/3] ") and "09_report of 1 model" in lines[-1] and last.startswith("3 jobs done")

    began = time.monotonic()
    status, out, err = runner.run()
    assert (status, err) == (0, "") and out.startswith("nothing to do: 3 jobs are up to date")
    assert time.monotonic() - began < 20

    flags = ["--notebooks", "01", "02", "--set", "threshold=2"]
    out = runner.run(*flags, "--dry-run")[1]
    assert "up to date  01_squares" in out and "would run  02_threshold" in out
    source = runner.notebooks / "01_squares.ipynb"
    source.write_text(source.read_text().replace("n: int = 3", "n: int = 4"))
    assert "would run  01_squares" in runner.run("--notebooks", "01", "--dry-run")[1]
    status, out, _ = runner.run(*flags)
    assert status == 0 and "[2/2]" in out and "threshold 2" in runner.printed("02_threshold")
    assert runner.conditions()["3.txt"] == "3 squared is 9"


def test_a_file_that_a_parameter_names_makes_a_job_out_of_date(runner: Runner) -> None:
    """Here one of the model's folder; a prompt file is named in the same way."""
    assert runner.run("--notebooks", "01")[0] == 0
    assert "up to date  01_squares" in runner.run("--notebooks", "01", "--dry-run")[1]
    (runner.folder / "tiny" / "config.json").write_text('{"changed": true}')
    assert "would run  01_squares" in runner.run("--notebooks", "01", "--dry-run")[1]


def test_a_report_is_out_of_date_when_any_run_wrote_a_table(runner: Runner) -> None:
    assert runner.run()[0] == 0
    assert "up to date  09_report" in runner.run("--notebooks", "09", "--dry-run")[1]
    (kept,) = (runner.results / "logs" / "source-cache").rglob("Snakefile")
    table = runner.results / "tiny" / "tables" / "01_squares.parquet"
    table.parent.mkdir(parents=True, exist_ok=True)
    table.with_name(".01_squares-half.parquet").write_bytes(b"")  # as a killed job leaves
    assert "up to date  09_report" in runner.run("--notebooks", "09", "--dry-run")[1]
    older = "an older version, which Snakemake would go on reading"
    kept.write_text(older)
    table.write_bytes(b"")
    assert "would run  09_report" in runner.run("--notebooks", "09", "--dry-run")[1]
    assert kept.read_text() == older  # a dry run leaves the files of a run, which may be under way, alone
    assert runner.run("--notebooks", "09")[0] == 0
    assert older not in [path.read_text() for path in (runner.results / "logs" / "source-cache").rglob("Snakefile")]


def test_the_kernel_is_this_interpreter_and_rejudge_runs_every_job_again(runner: Runner) -> None:
    kernels = runner.folder / "jupyter" / "kernels" / "python3"
    kernels.mkdir(parents=True)
    spec = {"argv": ["/bin/false", "{connection_file}"], "display_name": "elsewhere", "language": "python"}
    (kernels / "kernel.json").write_text(json.dumps(spec))
    status, out, _ = runner.run("--notebooks", "01", JUPYTER_PATH=str(runner.folder / "jupyter"))
    assert status == 0, out
    (runner.results / "conditions" / "tiny" / "0.txt").write_text("an older verdict")
    assert runner.run("--notebooks", "01", "--rejudge")[0] == 0
    assert runner.conditions() == SQUARES


def test_a_failing_notebook_is_kept_apart_and_the_others_go_on(runner: Runner) -> None:
    source = runner.notebooks / "00_interactive.ipynb"
    source.write_text(source.read_text().replace(r'print(\"interactive\")', "import os; os.kill(os.getpid(), 9)"))
    status, out, err = runner.run("--notebooks", "00", "01", "02", "09", "--set", "threshold=12")
    assert status == 1 and err == ""
    assert "failed: ValueError: threshold 12 is above 9\n" in out and "Traceback" not in out
    assert "failed: the kernel was killed" in out
    assert out.splitlines()[-1].startswith("3 of 4 jobs are not done")  # the report waits for all
    assert runner.conditions() == SQUARES
    (failed,) = runner.results.glob("*/02_threshold.failed.ipynb")
    assert not failed.with_name("02_threshold.ipynb").exists()
    (log,) = runner.results.glob("logs/*/02_threshold.log")
    assert "ValueError" in log.read_text()
    assert runner.run("--notebooks", "02", "--set", "threshold=2")[0] == 0
    assert not failed.exists()


def kill_parent(process: subprocess.Popen[str], runner: Runner) -> None:
    process.kill()


def kill_all(process: subprocess.Popen[str], runner: Runner) -> None:
    for found in runner.processes():
        try:
            os.kill(found, signal.SIGKILL)
        except ProcessLookupError:
            continue  # it went with its parent


def interrupt(process: subprocess.Popen[str], runner: Runner) -> None:
    process.send_signal(signal.SIGINT)


def terminate(process: subprocess.Popen[str], runner: Runner) -> None:
    process.terminate()


def test_a_stopped_run_leaves_no_orphan_and_is_taken_up(runner: Runner) -> None:
    flags = ["--notebooks", "01", "--set", "n=6"]
    expected = {f"{number}.txt": f"{number} squared is {number**2}" for number in range(6)}
    finished: dict[str, int] = {}
    for stop, moment in [
        (kill_parent, "logs/plan.json"),  # while the graph is read
        (kill_all, "logs/locks/*01_squares"),  # while the kernel starts
        (interrupt, "conditions/*/0.txt"),  # each in the middle of the next condition
        (kill_parent, "conditions/*/1.txt"),
        (kill_all, "conditions/*/2.txt"),
        (interrupt, "logs/plan.json"),
        (terminate, "logs/plan.json"),
    ]:
        for path in runner.results.glob("logs/*"):
            if path.is_file():
                path.unlink()  # so that a moment is this run's
        process = runner.start(*flags, FIXTURE_SECONDS="0.7")
        runner.wait_for(moment)
        began = time.monotonic()
        stop(process, runner)
        _, err = process.communicate(timeout=20)
        if stop in (interrupt, terminate):
            assert process.returncode == 130 and len(err.splitlines()) == 1 and "finished is kept" in err
            assert time.monotonic() - began < 8
        assert runner.all_gone()
        assert runner.conditions().items() <= expected.items()  # none half written
        assert not list(runner.results.glob("*/01_squares.ipynb"))
        finished = {name: runner.age(name) for name in runner.conditions()} | finished
    assert len(finished) >= 3

    status, out, err = runner.run(*flags)
    assert (status, err) == (0, ""), out
    assert runner.conditions() == expected
    assert "\n".join(expected.values()) in runner.printed("01_squares")
    assert finished == {name: runner.age(name) for name in finished}  # nothing computed twice


def test_a_second_run_in_the_same_folder_is_refused(runner: Runner) -> None:
    first = runner.start("--notebooks", "01", FIXTURE_SECONDS="3")
    runner.wait_for("logs/locks/*01_squares")
    status, out, err = runner.run("--notebooks", "01")
    assert status == 2 and out == "" and len(err.splitlines()) == 1 and "another run is under way" in err
    status, _, err = runner.run("--clean")
    assert status == 2 and "another run is under way" in err
    out, err = first.communicate(timeout=60)
    assert first.returncode == 0, err
    assert runner.conditions() == SQUARES
    status, out, _ = runner.run("--clean")
    assert status == 0 and "but for conditions, with" in out
    assert {path.name for path in runner.results.iterdir()} == {"conditions"}


def test_odd_folders_foreign_profiles_and_what_another_machine_ran_with_other_parameters(runner: Runner) -> None:
    assert runner.run("--notebooks", "01", "--set", "n=4")[0] == 0
    (made,) = runner.results.glob("*/01_squares.ipynb")
    (made.parent / "records").mkdir()
    (runner.folder / "profiles" / "default").mkdir(parents=True)
    (runner.folder / "profiles" / "default" / "config.yaml").write_text("no-such-flag: 1")
    here = str(runner.folder / "a folder: #1, ours")
    assert runner.run("--import", str(runner.results), "--out", here)[1].startswith("1 files copied")
    assert "up to date  01_squares" in runner.run("--notebooks", "01", "--set", "n=4", "--dry-run", "--out", here)[1]
    environment = {"SNAKEMAKE_PROFILE": str(runner.folder / "profiles" / "default")}
    assert runner.run("--notebooks", "01", "--out", here, **environment)[1].splitlines()[-1].startswith("1 jobs done")
    copy = Path(here, "results", made.relative_to(runner.results))
    assert "3 squared" not in copy.read_text()
    copy.write_text("{")
    assert "would run  01_squares" in runner.run("--notebooks", "01", "--dry-run", "--out", here)[1]


def test_a_kill_before_snakemake_notes_that_a_job_is_done(runner: Runner) -> None:
    flags = ["--notebooks", "01", "02"]
    assert runner.run(*flags)[0] == 0
    (executed,) = runner.results.glob("*/01_squares.ipynb")
    name = base64.b64encode(str(executed.relative_to(runner.results)).encode()).decode()
    notes = runner.results / ".snakemake"
    (notes / "metadata" / name).rename(notes / "incomplete" / name)
    status, out, err = runner.run(*flags, "--set", "threshold=2")
    assert (status, err) == (0, "") and out.splitlines()[-1].startswith("1 jobs done")
