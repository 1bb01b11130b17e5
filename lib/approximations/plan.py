"""A plan: techniques, or settings of one technique, side by side in different layers; kept as JSON.

    {"groups": [{"technique": "teal", "settings": {"sparsity": 0.6}, "layers": [0, 1]}, ...]}

`lib.patching.approximated` applies a plan as it applies a technique. Layers that no group names stay exact. The final
norm belongs to the last block, as everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from lib.approximations import make
from lib.approximations.technique import State, Technique

Group = tuple[Technique, tuple[int, ...]]


@dataclass(frozen=True)
class Plan(Technique):
    """groups: (technique, its layers) pairs. ValueError for a layer that is below 0 or stands in two groups."""

    name: ClassVar[str] = "plan"
    category: ClassVar[str] = "plan"

    groups: tuple[Group, ...] = ()

    def __post_init__(self) -> None:
        layers = [layer for _, chosen in self.groups for layer in chosen]
        twice = sorted({layer for layer in layers if layers.count(layer) > 1 or layer < 0})
        if twice:
            raise ValueError(f"plan: layers {twice} are not valid; name every layer once, counted from 0")

    @property
    def per_token(self) -> bool:
        return all(technique.per_token for technique, _ in self.groups)

    @property
    def whole_prompt(self) -> bool:
        return any(technique.whole_prompt for technique, _ in self.groups)

    @property
    def needs_calibration(self) -> bool:
        return any(technique.needs_calibration for technique, _ in self.groups)

    def split(self, layers: Iterable[int] | None) -> list[tuple[Technique, Iterable[int] | None]]:
        wanted = None if layers is None else set(layers)
        parts = [(one, [n for n in own if wanted is None or n in wanted]) for one, own in self.groups]
        return [(technique, chosen) for technique, chosen in parts if chosen]

    def joined(self, states: list[State | None]) -> dict[str, Tensor]:
        """The groups' states, in their order, each for its own layers: state keys begin with the layer."""
        state: dict[str, Tensor] = {}
        last = max(layer for _, layers in self.groups for layer in layers)
        for (_, layers), found in zip(self.groups, states, strict=True):
            own = {str(layer) for layer in (*layers, *([-1] if last in layers else []))}
            state |= {key: value for key, value in (found or {}).items() if key.partition(".")[0] in own}
        return state

    @property
    def settings(self) -> dict[str, Any]:
        groups = [{"technique": t.name, "settings": t.settings, "layers": list(layers)} for t, layers in self.groups]
        return {"groups": groups}


def load(path: str | Path) -> Plan:
    """The plan in a JSON file, whatever else the file says. ValueError in one line if it holds none, or one with
    unknown techniques or settings."""
    try:
        stored = json.loads(Path(path).read_text())["groups"]
        groups = [(group["technique"], dict(group["settings"]), tuple(map(int, group["layers"]))) for group in stored]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        needed = "every group needs technique, settings and layers"
        raise ValueError(f"{path} is not a plan: {needed} ({error!r})") from None
    return Plan(tuple((make(name, **settings), layers) for name, settings, layers in groups))
