"""The typed parameters of notebooks: lines `name: type = literal  # help` of the cell tagged `parameters`.

They are read without running the notebook. papermill only warns of a parameter that a notebook does not have, and does
not check types; here both are refused.
"""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class UsageError(Exception):
    """Bad input; the message is the one line that the user gets."""


@dataclass(frozen=True)
class Parameter:
    """A parameter. kind: its declared type as written."""

    name: str
    kind: str
    default: Any
    help: str


@dataclass(frozen=True)
class Notebook:
    """A notebook NN_name.ipynb. A report takes `models`, every other one takes `model`."""

    path: Path
    parameters: dict[str, Parameter]

    @property
    def name(self) -> str:
        """File name without its ending: 02_sparsification."""
        return self.path.stem

    @property
    def number(self) -> str:
        """The two digits by which it is chosen: 02."""
        return self.path.stem[:2]

    @property
    def is_report(self) -> bool:
        """Whether it runs once, after all others, for all models."""
        return "models" in self.parameters


def read_notebooks(folder: Path) -> dict[str, Notebook]:
    """All notebooks of a folder by number, in order. UsageError for one that cannot be read or takes no model, for two
    with one number, and if there are none."""
    found: dict[str, Notebook] = {}
    for path in sorted(folder.glob("[0-9][0-9]_*.ipynb")):
        notebook = read_notebook(path)
        if (other := found.setdefault(notebook.number, notebook)) is not notebook:
            raise UsageError(f"{other.name} and {notebook.name} in {folder} have the same number; rename one of them")
    if not found:
        raise UsageError(f"no notebook NN_name.ipynb in {folder}")
    return found


def read_notebook(path: Path) -> Notebook:
    """A notebook and its parameters, without running it."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        tagged = [cell for cell in cells if "parameters" in cell.get("metadata", {}).get("tags", [])]
        source = "".join(tagged[0]["source"]) if tagged else ""
        parameters = {parameter.name: parameter for parameter in read_parameters(source)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SyntaxError) as error:
        raise UsageError(f"{path} is not a readable notebook: {error}") from None
    if not {"model", "models"} & set(parameters):
        raise UsageError(f"{path.name} has no parameter 'model' in a cell tagged 'parameters'")
    return Notebook(path, parameters)


def read_parameters(source: str) -> list[Parameter]:
    """The assignments `name: type = literal  # help` of a cell, in order. ValueError if a default is no literal."""
    lines = source.splitlines()
    found = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            comment = lines[(node.end_lineno or 1) - 1].encode()[node.end_col_offset or 0 :].decode()
            kind, default = ast.unparse(node.annotation), ast.literal_eval(node.value)
            found.append(Parameter(node.target.id, kind, default, comment.strip().lstrip("# ")))
    return found


def convert(text: str, kind: str) -> Any:
    """What was typed, in its declared type: of `READERS`, or a list of one of these. ValueError else."""
    text = text.strip()
    try:
        if not kind.startswith("list["):
            return READERS[kind](text)
        typed = ast.literal_eval(text) if text.startswith("[") else text.split(",") if text else []
        items = [str(item).strip() for item in typed]
        if "" in items:
            raise ValueError(f"{text!r} lacks an item")
        return [READERS[kind[5:-1]](item) for item in items]
    except (ValueError, SyntaxError, TypeError, KeyError):
        raise ValueError(f"{text!r} is not {kind}") from None


def absolute(text: str) -> str:
    """The full path of a file, or of a folder written with a slash: notebooks run in their own folder; else itself."""
    path = Path(text).expanduser()
    return os.path.abspath(path) if path.is_file() or ("/" in text and path.is_dir()) else text


READERS: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "str": absolute,
    "bool": lambda text: {"true": True, "false": False, "1": True, "0": False}[text.lower()],
    "dict": lambda text: {**ast.literal_eval(text)},
}
"""Type of a parameter -> what reads one value of it; ValueError, TypeError, KeyError or SyntaxError for another."""


def settings_for(notebooks: Sequence[Notebook], settings: Sequence[str]) -> dict[str, dict[str, Any]]:
    """For each notebook, by name, the values of the settings, NAME=VALUE, that it has a parameter for.

    UsageError for a setting of another form, for one that no notebook has, naming those there are, for one that other
    flags choose, and for a value of the wrong type.
    """
    values: dict[str, dict[str, Any]] = {notebook.name: {} for notebook in notebooks}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"--set {setting}: write it as name=value")
        if name in ("model", "models"):
            raise UsageError(f"--set {setting}: choose models with --models")
        takers = [notebook for notebook in notebooks if name in notebook.parameters]
        if not takers:
            names = dict.fromkeys(name for notebook in notebooks for name in notebook.parameters)
            known = ", ".join(name for name in names if name not in ("model", "models"))
            raise UsageError(f"--set {setting}: no chosen notebook has that parameter; choose from {known}")
        for notebook in takers:
            kind = notebook.parameters[name].kind
            try:
                values[notebook.name][name] = convert(text, kind)
            except ValueError:
                words = " (true or false)" if kind == "bool" else ""
                raise UsageError(f"--set {setting}: {name} is {kind}{words} in {notebook.name}") from None
    return values
