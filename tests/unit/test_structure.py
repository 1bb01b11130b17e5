"""The shape of the house: imports go one way, modules are short and documented, notebooks only call lib."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIB = ROOT / "lib"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in LIB.rglob("*.py")
}
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

LAYERS: tuple[frozenset[str], ...] = tuple(
    frozenset(layer.split())
    for layer in (
        "errors paths processes",
        "approximations registry",
        "anatomy models eager",
        "patching",
        "download statistics parameters execute published estimates degeneration merge",
        "prompts results workflow batches",
        "calibration generation judging",
        "utility judges_classifier judge_check refusal_score harness",
        "organisms",
        "summary",
        "conditions",
        "experiment",
        "fidelity grids hidden_states layer_study noise_study placement savings",
        "defence defence_training defence_study attack_search",
        "figures",
        "plots state_plots placement_plots defence_plots",
        "report report_page reading explore controls",
        "run",
    )
)
"""Rooms from low to high: a module imports from lower layers, or from its own package."""

STRANGERS_TO_MODELS = {"judging", "degeneration", "judges_classifier", "judge_check", "statistics", "figures", "plots"}
LONGER_THAN_400_LINES = {"lib.organisms.freeform"}  # a list of texts
PRINTERS = {"lib.run", "lib.workflow", "lib.execute"}
NOTEBOOK_PACKAGES = {"lib", "pandas", "numpy", "IPython", "ipywidgets"}


def room(module: str) -> str:
    """lib.organisms.corpus -> organisms."""
    return module.split(".")[1] if "." in module else ""


def level(module: str) -> int:
    found = [i for i, layer in enumerate(LAYERS) if room(module) in layer]
    assert found, f"{module} has no layer: add it to LAYERS"
    return found[0]


def imports(tree: ast.AST) -> list[str]:
    """Full names of everything imported anywhere in a module, `from lib import x` as lib.x."""
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names += [name if name in MODULES else str(node.module) for name in inner]
    return names


def own_imports(module: str) -> list[str]:
    return [name for name in imports(ast.parse(MODULES[module].read_text())) if name.split(".")[0] == "lib"]


def reachable(module: str) -> set[str]:
    """Every module of lib that importing this one brings in at the top level, itself included."""
    seen, todo = set(), [module]
    while todo:
        current = todo.pop()
        if current in seen or current not in MODULES:
            continue
        seen.add(current)
        top = ast.Module(ast.parse(MODULES[current].read_text()).body, [])
        lazy = {id(n) for f in ast.walk(top) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
        top_nodes = [node for node in ast.walk(top) if id(node) not in lazy]
        todo += [n for node in top_nodes if isinstance(node, ast.Import | ast.ImportFrom) for n in imports(node)]
    return seen


def test_the_layers_hold_what_exists():
    assert len(MODULES) > 30
    listed = [name for layer in LAYERS for name in layer]
    assert len(listed) == len(set(listed))


def points_up(module: str, imported: str) -> bool:
    """To a higher layer, or to one beside it that needs this module."""
    return level(imported) > level(module) or (level(imported) == level(module) and module in reachable(imported))


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"lib"}))
def test_imports_go_down(module):
    allowed_upward = {"lib.approximations.technique": {"lib.calibration"}}.get(module, set())
    others = [name for name in own_imports(module) if room(name) not in ("", room(module))]
    assert {name for name in others if points_up(module, name)} <= allowed_upward


def test_approximations_know_tensors_only():
    packages = {"torch", "numpy", "scipy", "lib"} | set(sys.stdlib_module_names)
    for module in (m for m in MODULES if m.startswith("lib.approximations")):
        found = imports(ast.parse(MODULES[module].read_text()))
        assert {name.split(".")[0] for name in found} <= packages, module
        ours = {name for name in found if name.startswith("lib")} - {"lib.calibration"}
        assert all(name.startswith("lib.approximations") for name in ours), module
        assert "lib.calibration" not in found or module == "lib.approximations.technique"


def test_judges_statistics_and_figures_never_load_models():
    for name in STRANGERS_TO_MODELS:
        assert not {"lib.models", "lib.patching", "lib.calibration"} & reachable(f"lib.{name}"), name


def test_only_figures_imports_matplotlib():
    for module, path in MODULES.items():
        packages = {name.split(".")[0] for name in imports(ast.parse(path.read_text()))}
        assert not packages & {"matplotlib", "seaborn"} or module == "lib.figures", module


def test_modules_are_short_and_documented():
    longer = {module for module, path in MODULES.items() if len(path.read_text().splitlines()) > 400}
    assert longer <= LONGER_THAN_400_LINES
    undocumented = [m for m, path in MODULES.items() if not ast.get_docstring(ast.parse(path.read_text()))]
    assert undocumented == []


def test_lib_does_not_print():
    for module, path in MODULES.items():
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        prints = any(isinstance(call, ast.Name) and call.id == "print" for call in calls)
        assert not prints or module in PRINTERS or module.endswith("__main__"), module


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_tracked_files_are_small_and_hold_no_path_of_a_machine():
    files = tracked()
    assert sum(path.stat().st_size for path in files) < 45 * 2**20
    marks = [b"/" + folder + b"/" for folder in (b"work", b"root", b"home/user")]
    offenders = []
    for path in files:
        content = path.read_bytes()
        if b"\0" not in content[:8192] and any(mark in content for mark in marks):
            offenders.append(str(path.relative_to(ROOT)))
    assert [name for name in offenders if name != ".ci/run"] == []


def cells(notebook: Path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == kind]


def python_of(cell: dict) -> ast.Module:
    lines = "".join(cell["source"]).splitlines()
    return ast.parse("\n".join(line for line in lines if not line.lstrip().startswith(("%", "!"))))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_only_call_lib(notebook):
    code = cells(notebook, "code")
    for cell in code:
        assert cell["outputs"] == [] and cell["execution_count"] is None
        tree = python_of(cell)
        definitions = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        assert not any(isinstance(node, definitions) for node in ast.walk(tree))
        found = {name.split(".")[0] for name in imports(tree)}
        assert found <= NOTEBOOK_PACKAGES | set(sys.stdlib_module_names)
    tagged = [cell for cell in code if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1
