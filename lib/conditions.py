"""What is run: a technique at one setting in chosen layers; how it is named, and which code decides it.

    grid("teal", sparsity=(0.25, 0.5)) -> a condition per level of the dose axis
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import getsource
from typing import Any

from lib import calibration
from lib.approximations import Technique, make
from lib.errors import choosing

EXACT = "exact"
Layers = Sequence[int] | None


@dataclass(frozen=True)
class Condition:
    """A technique at one level of its dose axis; `variant` tells series of one technique apart."""

    technique: Technique
    level_name: str
    level: float
    variant: str = ""
    layers: Layers = None


def grid(
    name: str, variant: str = "", layers: Layers = None, fixed: Mapping[str, Any] | None = None, **dose: Any
) -> list[Condition]:
    """Conditions of technique `name` along one setting: grid("teal", sparsity=(0.25, 0.5), fixed={"prompt": "all"}).

    Settings without numbers are levelled by their place. ValueError unless exactly one setting is varied; ChoiceError
    for an unknown technique, setting or level.
    """
    if len(dose) != 1:
        raise ValueError(f"vary exactly one setting of {name}, not {', '.join(dose) or 'none'}")
    ((setting, levels),) = dose.items()
    axis = setting.replace("_", " ")
    with choosing():
        techniques = [make(name, **{setting: level}, **(fixed or {})) for level in levels]
    return [
        Condition(technique, axis, float(level if isinstance(level, int | float) else place), variant, layers)
        for place, (technique, level) in enumerate(zip(techniques, levels, strict=True))
    ]


def describe(technique: Technique | None) -> str:
    """Short text for a condition: the technique and the settings that differ from its defaults."""
    if technique is None:
        return EXACT
    default = type(technique)().settings
    changed = [f"{key}={_printed(value)}" for key, value in technique.settings.items() if value != default[key]]
    return f"{technique.name} {', '.join(changed)}".strip()


def _printed(value: Any) -> str:
    """A setting in few characters: items joined, four digits."""
    if isinstance(value, tuple | list):
        return "+".join(map(_printed, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def layer_text(layers: Layers) -> str:
    """"all", "3" or "0-2", or a list where there are gaps."""
    if layers is None:
        return "all"
    ordered = sorted(layers)
    if ordered == list(range(ordered[0], ordered[-1] + 1)):
        return str(ordered[0]) if len(ordered) == 1 else f"{ordered[0]}-{ordered[-1]}"
    return ",".join(map(str, ordered))


def technique_modules(technique: Technique | None) -> set[str]:
    """Modules whose code decides what a technique computes."""
    if technique is None:
        return set()
    parts = [technique, *(part for part, _ in technique.split(None))]
    own = {cls.__module__ for part in parts for cls in type(part).__mro__ if cls.__module__.startswith("lib.")}
    return own.union(*map(_imported, own), calibration.CODE if technique.needs_calibration else ())


@cache
def _imported(module: str) -> set[str]:
    """The modules of `lib.approximations` that a module imports, directly or through others."""
    nodes = [node for node in ast.walk(ast.parse(getsource(sys.modules[module]))) if isinstance(node, ast.ImportFrom)]
    named = {f"{node.module}{end}" for node in nodes for end in ("", *(f".{each.name}" for each in node.names))}
    found = {name for name in named & set(sys.modules) if name.startswith("lib.approximations.")}
    return found.union(*map(_imported, found))
