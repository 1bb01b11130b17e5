"""The graph of jobs on Slurm: what each job would ask for, a submission to stand-ins, a real one where it can be.

The stand-ins take Slurm's place at its command line: `sbatch` notes what was asked and runs it on this machine.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lib import registry, workflow
from lib.paths import ROOT
from lib.run import chosen_notebooks, parse, plan, read_notebooks
from tests.local_slurm import CannotStart, local_slurm

FIXTURES = ROOT / "tests" / "notebooks" / "fixtures"
MODELS = ["qwen2-7b", "qwen2.5-32b", "mixtral-8x7b", "owner/name"]


def graph_of(models: list[str], folder: Path, *flags: str) -> workflow.Graph:
    options = parse([*flags, "--profile", "slurm"])
    notebooks = chosen_notebooks(["01", "09"], read_notebooks(FIXTURES))
    jobs = {job.key: job for job in plan(options, notebooks, models)}
    return workflow.Graph(jobs, folder / "results", folder / "results" / "logs", None, "slurm")


def dry_run(graph: workflow.Graph) -> dict[str, dict[str, int]]:
    """Job -> the numbers among its resources, as Snakemake would submit them."""
    graph.write()
    process = graph.start("--dry-run", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    out = process.communicate(timeout=120)[0]
    assert process.returncode == 0, out
    found = {}
    for text in out.split("\nrule notebook:")[1:]:
        key = re.search(r"output: (\S+)\.ipynb", text).group(1)
        resources = re.search(r"resources: (.*)", text).group(1)
        found[key] = {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)(?:,|$)", resources)}
    return found


@pytest.fixture
def results(tmp_path: Path) -> Path:
    (tmp_path / "results").mkdir()
    return tmp_path


def test_every_job_asks_for_what_its_model_needs(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = dry_run(graph_of(MODELS, results))
    assert set(asked) == {f"{name.replace('/', '--')}/01_squares" for name in MODELS} | {"09_report"}
    gpus = {key.partition("/")[0]: needs["gpu"] for key, needs in asked.items()}
    assert gpus == {"qwen2-7b": 1, "qwen2.5-32b": 2, "mixtral-8x7b": 2, "owner--name": 1, "09_report": 0}
    for name in MODELS[:3]:
        weights = 1000 * registry.REGISTRY[name].gigabytes
        assert 2 * weights < asked[f"{name}/01_squares"]["mem_mb"] < 4 * weights + 20000
    assert all(needs["runtime"] == 720 for needs in asked.values())
    monkeypatch.setenv("APPROX_GPU_GIGABYTES", "40")
    assert dry_run(graph_of(MODELS[1:2], results))["qwen2.5-32b/01_squares"]["gpu"] == 3


def test_the_report_waits_for_all_jobs_and_one_plan_holds_them(results: Path) -> None:
    graph = graph_of(MODELS, results)
    graph.write()
    written = json.loads((graph.logs / "plan.json").read_text())
    assert written["gpus"] == [] and written["workers"] == 1  # Slurm hands them out
    assert sorted(written["jobs"]["09_report"]["after"]) == sorted(set(graph.jobs) - {"09_report"})
    assert written["jobs"]["owner--name/01_squares"]["gigabytes"] is None


STAND_IN = {
    "sbatch": """
import json, pathlib, subprocess, sys
folder = pathlib.Path(__file__).parent
number = len(list(folder.glob("*.json"))) + 1
arguments = sys.argv[1:]
command = next(a for a in arguments if a.startswith("--wrap="))[7:]
(folder / f"{number}.json").write_text(json.dumps(arguments))
log = open(arguments[arguments.index("--output") + 1].replace("%j", str(number)), "w")
note = f"({command}); echo $? > {folder}/{number}.rc"
environment = {**__import__("os").environ, "SLURM_JOB_ID": str(number), "SLURM_CPUS_ON_NODE": "1"}
subprocess.Popen(["bash", "-c", note], stdout=log, stderr=log, start_new_session=True, env=environment)
print(number)
""",
    "sacct": """
import pathlib
folder = pathlib.Path(__file__).parent
for path in folder.glob("*.json"):
    done = path.with_suffix(".rc")
    state = "RUNNING" if not done.exists() else "COMPLETED" if done.read_text().strip() == "0" else "FAILED"
    print(f"{path.stem}|{state}")
""",
    "srun": """
import os, sys
arguments = sys.argv[1:]
while arguments and arguments[0].startswith("-"):
    arguments.pop(0)
os.execvp(arguments[0], arguments)
""",
    **dict.fromkeys(("squeue", "sinfo", "scontrol", "scancel", "sacctmgr", "sshare"), ""),
}


def put_in_front(name: str, code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a command of Slurm, found before any other."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{code}")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    if not os.environ["PATH"].startswith(f"{folder}:"):
        monkeypatch.setenv("PATH", str(folder), prepend=":")


@pytest.mark.matrix
def test_a_run_through_stand_in_commands(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Submits, waits, merges."""
    tools = results / "slurm"
    for name, code in STAND_IN.items():
        put_in_front(name, code, tools, monkeypatch)
    done = run_on_slurm(results, FIXTURES, "01", "09")
    assert done.returncode == 0 and "2 jobs done" in done.stdout, told(done, results)
    submitted = [json.loads(path.read_text()) for path in tools.glob("*.json")]
    assert len(submitted) == 2 and sum("--gpus=1" in " ".join(call) for call in submitted) == 1
    assert "nothing to do" in run_on_slurm(results, FIXTURES, "01", "09").stdout


def test_a_refused_job_tells_what_slurm_said(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, code in STAND_IN.items():
        put_in_front(name, code, results / "slurm", monkeypatch)
    put_in_front("sbatch", "import sys\nsys.exit('sbatch: error: Invalid account')", results / "slurm", monkeypatch)
    done = run_on_slurm(results, FIXTURES, "01", "09")
    assert done.returncode == 1 and "failed: Slurm refused it: sbatch: error: Invalid account\n" in done.stdout


def test_a_job_that_slurm_ended_tells_why(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    log = "".join(
        f"""
Error in rule notebook:
    message: SLURM-job '{number}' failed, SLURM status is: '{state}'. Reason: Unknown.
    jobid: 0
    output: tiny/01_squares.ipynb
"""
        for number, state in enumerate(("OUT_OF_MEMORY", "TIMEOUT", "TIMEOUT"))
    )
    verdicts = workflow.slurm_verdicts(log)
    assert verdicts == {"tiny/01_squares": "Slurm ended it: OUT_OF_MEMORY; Slurm ended it: TIMEOUT"}
    progress = workflow.Progress([workflow.Job("tiny/01_squares", "01_squares tiny", "", {}, [])], tmp_path)
    progress.show("tiny/01_squares", "started")
    progress.close(verdicts)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith("failed: Slurm ended it: OUT_OF_MEMORY; Slurm ended it: TIMEOUT")


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Slurm of this machine alone, or the test is skipped with the reason."""
    try:
        with local_slurm() as environment:
            for name, value in environment.items():
                monkeypatch.setenv(name, value)
            yield
    except CannotStart as reason:
        pytest.skip(f"no Slurm can be started here: {reason}")


def notebooks_that_need_two_gpus(folder: Path) -> Path:
    """The fixtures, of which 02 fails as long as it has a single GPU."""
    shutil.copytree(FIXTURES, folder)
    path = folder / "02_threshold.ipynb"
    notebook = json.loads(path.read_text())
    notebook["cells"][-1]["source"] = (
        "import os\n\nif ',' not in os.environ['CUDA_VISIBLE_DEVICES']:\n    raise MemoryError('one GPU is too small')"
    )
    path.write_text(json.dumps(notebook))
    return folder


@pytest.mark.matrix
def test_a_run_on_real_slurm(results: Path, slurm: None) -> None:
    """One job succeeds, another does with more at its second attempt; Slurm's own records agree. Takes a minute."""
    notebooks = notebooks_that_need_two_gpus(results / "notebooks")
    done = run_on_slurm(results, notebooks, "01", "02")
    assert done.returncode == 0 and "2 jobs done" in done.stdout, told(done, results)
    assert done.stdout.count("failed: MemoryError: one GPU is too small") == 1
    assert sorted(submissions()) == [
        ("01_squares", "COMPLETED", 1, 18000),
        ("02_threshold", "COMPLETED", 2, 27000),
        ("02_threshold", "FAILED", 1, 18000),
    ]
    logs = results / "results" / "logs"
    assert {path.stem for path in logs.glob("tiny-*/*.log")} == {"01_squares", "02_threshold"}
    assert len(list(logs.glob("slurm/**/*.log"))) == 1  # of what failed
    assert {path.stem for path in (results / "results").glob("tiny-*/*.ipynb")} == {"01_squares", "02_threshold"}
    assert "nothing to do" in run_on_slurm(results, notebooks, "01", "02").stdout


def submissions() -> list[tuple[str, str, int, int]]:
    """What Slurm was asked for, as it says itself: notebook, state, GPUs and MB of every job."""
    shown = subprocess.run(["scontrol", "--oneliner", "show", "job"], capture_output=True, text=True, check=True).stdout
    found = []
    for line in shown.splitlines():
        notebook = re.search(r" Comment=\S*?(\d\d_[a-z]+)", line)[1]
        gpus = re.search(r" TresPerJob=gres.gpu:(\d+)", line)
        memory = re.search(r" MinMemoryNode=(\d+)M", line)[1]
        found.append((notebook, re.search(r" JobState=(\w+)", line)[1], int(gpus[1]) if gpus else 0, int(memory)))
    return found


def run_on_slurm(folder: Path, source: Path, *notebooks: str) -> subprocess.CompletedProcess[str]:
    """./run_all.sh --profile slurm, on a folder that passes for a model."""
    (folder / "tiny").mkdir(exist_ok=True)
    (folder / "tiny" / "config.json").write_text("{}")
    command = [sys.executable, "-P", "-m", "lib.run", "--profile", "slurm", "--models", str(folder / "tiny")]
    command += ["--notebooks", *notebooks, "--out", str(folder)]
    environment = {**os.environ, "APPROX_NOTEBOOKS": str(source), "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


def told(done: subprocess.CompletedProcess[str], folder: Path) -> str:
    """All that there is to say of a run that should have succeeded."""
    logs = (folder / "results" / "logs").rglob("*.log")
    return "\n".join([done.stdout, done.stderr, *(f"{path}:\n{path.read_text()}" for path in logs)])
