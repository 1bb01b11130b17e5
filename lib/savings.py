"""Rungs of a technique in groups of layers, and what each saves of the whole model.

    saving(placement) = sum over groups g of savings[g, r_g]          r_g: the rung of group g, 0 is exact

    sparsification      s w / n      sparsity s of one of n layers, in which it spares the share w of the weights
    quantization        (16 - b) / n      bits b of the activations; reported as the mean bits that are left
    polynomialization   replaced non-linear operations / all of them

Layers count alike: decoders repeat one block. TEAL spares every projection's weights; CATS those of up and down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lib.anatomy import PROJECTIONS, Anatomy, Block
from lib.approximations import Technique, teal
from lib.approximations.plan import Plan

EXACT_BITS = 16  # of an activation that is not quantized
AXES = {
    "sparsification": ("sparsity", "model-wide sparsity"),
    "quantization": ("bits", "mean activation bits"),
    "polynomialization": ("parts", "share of operations replaced"),
}
"""Category -> (the setting that is placed, what it saves)."""
Placement = tuple[int, ...]
Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Ladder:
    """Rungs of one technique in groups of layers. Rung 0 is exact, rung r the technique rungs[r - 1].

    savings: [groups, rungs + 1], what each rung of a group adds to the model-wide saving: a share, or bits per value.
    """

    groups: Groups
    rungs: tuple[Technique, ...]
    savings: NDArray[np.float64]

    @property
    def top(self) -> int:
        return len(self.rungs)

    @property
    def category(self) -> str:
        return self.rungs[0].category

    def saving(self, placement: Placement) -> float:
        return float(self.savings[np.arange(len(self.groups)), list(placement)].sum())

    def level(self, placement: Placement) -> float:
        """The saving as it is reported: a share, or the mean bits that are left."""
        saving = self.saving(placement)
        return EXACT_BITS - saving if self.category == "quantization" else saving

    def uniform(self, rung: int) -> Placement:
        return (rung,) * len(self.groups)

    def plan(self, placement: Placement) -> Plan:
        """The placement as a plan; groups on the same rung are joined, exact ones left out."""
        layers: dict[int, tuple[int, ...]] = {}
        for group, rung in zip(self.groups, placement, strict=True):
            layers[rung] = (*layers.get(rung, ()), *group)
        return Plan(tuple((self.rungs[rung - 1], layers[rung]) for rung in sorted(layers) if rung))

    def technique(self, placement: Placement) -> Technique | None:
        """What runs the placement: None for exact, the technique itself where all layers share a rung, else a plan."""
        if not any(placement):
            return None
        return self.rungs[placement[0] - 1] if len(set(placement)) == 1 else self.plan(placement)


def layer_groups(n_layers: int, n_groups: int) -> Groups:
    """Consecutive groups of nearly equal size. ValueError unless there are 1 to n_layers of them."""
    if not 1 <= n_groups <= n_layers:
        raise ValueError(f"{n_groups} layer groups are not valid; this model's {n_layers} layers make 1 to {n_layers}")
    return tuple(tuple(part.tolist()) for part in np.array_split(np.arange(n_layers), n_groups))


def ladder(body: Anatomy, technique: Technique, groups: Groups, levels: Sequence[Any]) -> Ladder:
    """The technique at each of the levels, by rising aggressiveness; its other settings are kept.

    ValueError for a technique without a level, for no levels, and for levels that do not save more and more."""
    rungs = tuple(replace(technique, **{setting_of(technique): level}) for level in levels)
    savings = np.array([[0.0, *(group_saving(body, rung, group) for rung in rungs)] for group in groups])
    if not rungs or (np.diff(savings) <= 0).any():
        raise ValueError(f"{technique.name}: levels {list(levels)} are not valid; each must save more than the last")
    return Ladder(groups, rungs, savings)


def setting_of(technique: Technique) -> str:
    """The setting that is placed. ValueError for a technique whose level saves nothing."""
    if technique.category not in AXES:
        valid = ", ".join(AXES)
        raise ValueError(f"{technique.name} has no level that saves anything; choose a technique of {valid}")
    return AXES[technique.category][0]


def group_saving(body: Anatomy, technique: Technique, layers: Sequence[int]) -> float:
    """What a technique in some layers adds to the model-wide saving (unit of `Ladder.savings`).

    Sparsity: of all projection inputs, in shares of a block's weights; blocks count alike. Operations: activation,
    softmax and every norm once per block, the final norm with the last block.
    """
    blocks = [body.blocks[layer] for layer in layers]
    if technique.category == "sparsification":
        return sum(technique.settings["sparsity"] * treated_weights(technique, b) for b in blocks) / len(body.blocks)
    if technique.category == "quantization":
        return len(blocks) * max(0, EXACT_BITS - technique.settings["bits"]) / len(body.blocks)
    counts = [{"activation": 1, "softmax": 1, "norm": len(block.norms)} for block in body.blocks]
    counts[-1]["norm"] += 1
    replaced = sum(counts[layer][name] for layer in layers for name in technique.operations)
    return replaced / sum(sum(count.values()) for count in counts)


def treated_weights(technique: Technique, block: Block) -> float:
    """Share of a block's projection weights that a sparsity spares: of all that TEAL reads, of up and down in CATS."""
    spared = [name for name, site in teal.SITES.items() if site in technique.sites]
    spared = ["up", "down"] if technique.name == "cats" else spared
    if len(spared) == len(PROJECTIONS):
        return 1.0
    if block.experts is not None:
        raise ValueError(f"{technique.name} treats part of a block, whose share in a mixture of experts is not defined")
    sizes = {name: projection.weight.numel() for name, projection in block.projections.items()}
    return sum(sizes[name] for name in spared) / sum(sizes.values())
