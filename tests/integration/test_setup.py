"""Set-up by shell, in a copied tree where every Python is a stand-in whose environments install nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lib.paths import ROOT

VENV = """#!/bin/bash
if [ "$1 $2" = "-m pip" ]; then echo "$*" >>{calls}; sleep "${{STAND_IN_SECONDS:-0}}"; echo "${{STAND_IN_ERROR:-}}"
    [ -z "${{STAND_IN_ERROR:-}}" ]; exit; fi
exec {python} "$@"
"""
PYTHON = """#!/bin/bash
if [ "$1 $2" != "-m venv" ]; then exec {python} "$@"; fi
for folder; do :; done
if [ "$3" = --clear ]; then rm -r "$folder"; fi
mkdir -p "$folder/bin" && cp {folder}/venv-python "$folder/bin/python"
"""
PYTHONS = ("python3", "python3.11", "python3.12", "python3.13")
NO_ENSUREPIP = """#!/bin/bash
case "$*" in *ensurepip*) exit 1 ;; esac
exec {python} "$@"
"""


class Tree:
    """A copied tree whose run_all.sh prints its arguments, and a PATH that starts with stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tree = folder / "tree"
        self.calls = folder / "calls"
        (self.tree / "lib").mkdir(parents=True)
        (self.tree / "lib" / "__init__.py").touch()
        (self.tree / "lib" / "run.py").write_text("import sys\nprint('ran', *sys.argv[1:])\n")
        for name in ("setup.sh", "run_all.sh", "requirements.in", "requirements.txt", "pyproject.toml"):
            shutil.copy(ROOT / name, self.tree)
        (folder / "other" / "lib").mkdir(parents=True)  # of another project, on the user's path
        (folder / "other" / "lib" / "__init__.py").touch()
        (folder / "other" / "lib" / "run.py").write_text("print('another project')\n")
        (folder / "bin").mkdir()
        for name in PYTHONS:
            self.stand_in(name, PYTHON)
        self.stand_in("../venv-python", VENV)
        kept = {key: value for key, value in os.environ.items() if not key.startswith("APPROX_")}
        path = f"{folder / 'bin'}:{os.environ['PATH']}"
        self.environment = {**kept, "PATH": path, "PYTHONPATH": str(folder / "other")}

    def stand_in(self, name: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(text.format(python=sys.executable, folder=self.folder, calls=self.calls))
        path.chmod(0o755)

    def start(self, *flags: str, **environment: str) -> subprocess.Popen[str]:
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        return subprocess.Popen([self.tree / "run_all.sh", *flags], env={**self.environment, **environment}, **options)

    def run(self, *flags: str, **environment: str) -> tuple[int, str, str]:
        process = self.start(*flags, **environment)
        try:
            out, err = process.communicate(timeout=60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        return process.returncode, out, err

    def installs(self) -> int:
        return len(self.calls.read_text().splitlines())

    def change(self) -> None:
        with (self.tree / "requirements.txt").open("a") as stream:
            stream.write("\n")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_installs_once_and_again_after_a_change(tree: Tree) -> None:
    status, out, err = tree.run("--fast", "a b")
    assert (status, err) == (0, "") and out.splitlines()[-1] == "ran --fast a b"
    assert tree.installs() == 2  # the pinned list, then this project
    assert tree.run() == (0, "ran\n", "")
    assert tree.installs() == 2
    tree.change()
    assert tree.run()[0] == 0
    assert tree.installs() == 4


def test_an_interrupted_set_up_begins_anew(tree: Tree) -> None:
    assert tree.run()[0] == 0
    tree.change()
    process = tree.start(STAND_IN_SECONDS="30")
    while tree.installs() < 3:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    half_written = tree.tree / ".venv" / "half-written"
    half_written.touch()
    assert tree.run()[0] == 0
    assert not half_written.exists() and tree.installs() == 5


def test_a_python_that_was_removed_is_replaced(tree: Tree) -> None:
    assert tree.run()[0] == 0
    python = tree.tree / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to("/removed/python3.10")
    status, out, err = tree.run()
    assert (status, err) == (0, "") and out.endswith("ran\n") and tree.installs() == 4


def test_the_search_path_of_cd_does_no_harm(tree: Tree) -> None:
    command = ["bash", "tree/run_all.sh", "x"]
    environment = tree.environment | {"CDPATH": str(tree.folder)}
    done = subprocess.run(command, env=environment, cwd=tree.folder, capture_output=True, text=True)
    assert done.stdout.endswith("ran x\n") and (tree.tree / ".venv" / "stamp").is_file(), done.stderr


def test_two_at_once_install_once(tree: Tree) -> None:
    first = tree.start("one", STAND_IN_SECONDS="1")
    while not tree.calls.exists():
        time.sleep(0.05)
    status, out, _ = tree.run("two")
    assert (status, out) == (0, "set-up: waiting for another one\nran two\n")
    assert first.communicate(timeout=30)[0].endswith("ran one\n") and tree.installs() == 2


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("python3.11", NO_ENSUREPIP, "apt install python3."),
        ("df", "#!/bin/bash\necho head\necho disk 1 1 100 1 /\n", "and only 100 MB are free"),
    ],
)
def test_what_is_missing_is_said_in_one_line(tree: Tree, name: str, text: str, line: str) -> None:
    tree.stand_in(name, text)
    status, out, err = tree.run()
    assert (status, out) == (2, "") and err.count("\n") == 1 and err.startswith("set-up: ") and line in err


def test_an_old_python_is_named(tree: Tree) -> None:
    for name in PYTHONS:
        tree.stand_in(name, '#!/bin/bash\nif [ "$1" = --version ]; then echo Python 3.9.2; else exit 1; fi\n')
    status, out, err = tree.run()
    assert (status, out) == (2, "") and err.count("\n") == 1 and "found is only Python 3.9.2" in err


@pytest.mark.parametrize(
    ("error", "line"),
    [
        ("WARNING: NewConnectionError: Name or service not known", "the package index cannot be reached"),
        ("ERROR: No matching distribution found for torch", "pip failed: ERROR: No matching distribution found for"),
        ("ERROR: Ignored the following versions\nERROR: No matching distribution", "pip failed: ERROR: No matching"),
    ],
)
def test_a_failing_installation_says_why_and_is_repeated(tree: Tree, error: str, line: str) -> None:
    status, out, err = tree.run(STAND_IN_ERROR=error)
    assert status == 2 and "ran" not in out and err.count("\n") == 1 and err.startswith(f"set-up: {line}")
    assert tree.run()[0] == 0


def test_an_existing_environment_is_used_as_it_is(tree: Tree) -> None:
    assert tree.run("x", APPROX_PYTHON=sys.executable)[:2] == (0, "ran x\n")
    assert not tree.calls.exists() and not (tree.tree / ".venv").exists()
    with (tree.tree / "requirements.in").open("a") as stream:
        stream.write("no-such-package\n")
    status, out, err = tree.run(APPROX_PYTHON=sys.executable)
    assert (status, out) == (2, "") and "lacks no-such-package;" in err
    status, _, err = tree.run(APPROX_PYTHON="no-such-interpreter")
    assert status == 2 and err == "set-up: APPROX_PYTHON=no-such-interpreter is not an interpreter\n"
