"""The graph of jobs on Slurm: what each job would ask for, a submission to stand-ins, a real one where it can be.

The stand-ins take Slurm's place at its command line: `sbatch` notes what was asked and runs it on this machine.
"""

from __future__ import annotations

import json
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lib import registry, workflow
from lib.paths import ROOT
from lib.run import chosen_notebooks, parse, plan, read_notebooks

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


@pytest.mark.matrix
def test_a_run_through_stand_in_commands(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Submits, waits, merges: takes about a minute, because the executor first asks for states after 40 s."""
    tools = results / "slurm"
    tools.mkdir()
    for name, code in STAND_IN.items():
        path = tools / name
        path.write_text(f"#!{sys.executable}\n{code}")
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    run_on_slurm(results, monkeypatch)
    submitted = [json.loads(path.read_text()) for path in tools.glob("*.json")]
    assert len(submitted) == 2 and sum("--gpus=1" in " ".join(call) for call in submitted) == 1


@pytest.mark.skipif(not shutil.which("sbatch"), reason="Slurm is not installed: no sbatch on this machine")
def test_a_run_on_real_slurm(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_on_slurm(results, monkeypatch)


def run_on_slurm(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """./run_all.sh --profile slurm on a notebook without a model, and its report; a second run has nothing to do."""
    (results / "tiny").mkdir()
    (results / "tiny" / "config.json").write_text("{}")
    monkeypatch.setenv("APPROX_NOTEBOOKS", str(FIXTURES))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, "-P", "-m", "lib.run", "--profile", "slurm", "--models", str(results / "tiny")]
    command += ["--notebooks", "01", "09", "--out", str(results)]
    first = subprocess.run(command, capture_output=True, text=True, timeout=400)
    log = results / "results" / "logs" / "snakemake.log"
    assert first.returncode == 0, first.stdout + first.stderr + (log.read_text() if log.is_file() else "")
    assert "2 jobs done" in first.stdout
    assert len(list((results / "results").glob("**/01_squares.ipynb"))) == 1
    assert "nothing to do" in subprocess.run(command, capture_output=True, text=True, timeout=100).stdout
