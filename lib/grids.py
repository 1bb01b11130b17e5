"""The conditions that notebooks 01 to 03 measure, and the defence measures again: techniques, variants and levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lib.approximations import OPERATIONS
from lib.conditions import Condition, Layers, grid
from lib.errors import ChoiceError

SYSTEMS = ("iron", "bolt", "bumblebee", "nexus")
FRACTION_BITS, DEGREES = (12, 8, 6, 5, 4, 3), (4, 3, 2, 1)
SPARSITIES = (0.1, 0.25, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.9)
BITS = (8, 6, 5, 4, 3, 2)
EPOCHS = 10


def polynomialization(
    systems: Sequence[str] = SYSTEMS,
    fraction_bits: Sequence[int] = FRACTION_BITS,
    degrees: Sequence[int] = DEGREES,
    layers: Layers = None,
) -> list[Condition]:
    """Each system in parts, whole and as published; BOLT at falling precision and with polynomials of lower degree.

    ChoiceError for a system that is none."""
    if unknown := [name for name in systems if name not in SYSTEMS]:
        raise ChoiceError(f"unknown systems {', '.join(unknown)}; choose from {', '.join(SYSTEMS)}")
    parts = [*((name,) for name in OPERATIONS), OPERATIONS]
    found = [c for name in systems for c in grid(name, "parts", layers, parts=parts)]
    found += [c for name in systems for c in grid(name, "published", layers, published=[True])]
    found += grid("bolt", "fraction bits", layers, fraction_bits=fraction_bits)
    return found + grid("bolt", "degree", layers, {"parts": ("activation",), "arithmetic": "real"}, degree=degrees)


def sparsification(levels: Sequence[float] = SPARSITIES, layers: Layers = None) -> list[Condition]:
    """TEAL on half of the prompt and on all of it, its other variants and CATS at some of the levels."""
    whole, some = {"prompt": "all"}, _some(levels, 3, 3)
    found = grid("teal", "last half of prompt", layers, {"prompt": "last_half"}, sparsity=levels)
    found += grid("teal", "whole prompt", layers, whole, sparsity=levels)
    found += grid("teal", "greedy, whole prompt", layers, whole | {"allocation": "greedy"}, sparsity=some)
    found += grid("teal", "paper thresholds", layers, whole | {"thresholds": "paper"}, sparsity=_some(levels[:4], 1, 2))
    found += grid("teal", "decoding only", layers, {"prompt": "decode"}, sparsity=some)
    return found + grid("cats", "", layers, sparsity=_some(levels, 1, 2))


def quantization(
    alpha: float, levels: Sequence[int] = BITS, epochs: int = EPOCHS, layers: Layers = None
) -> list[Condition]:
    """SmoothQuant per token and per tensor, OmniQuant, and plain rounding. alpha: SmoothQuant's, which depends on the
    model (`registry.smoothing_alpha`); epochs: of OmniQuant's training."""
    smooth: dict[str, Any] = {"alpha": alpha}
    found = grid("smoothquant", "per token", layers, smooth, bits=levels)
    found += grid("smoothquant", "per tensor, static", layers, smooth | {"per": "static"}, bits=levels)
    found += grid("smoothquant", "per tensor, dynamic", layers, smooth | {"per": "tensor"}, bits=_some(levels, 1, 2))
    found += grid("smoothquant", "plain rounding", layers, {"smooth": False}, bits=_some(levels, 1))
    found += grid("omniquant", "learned", layers, {"epochs": epochs}, bits=levels)
    return found + grid("omniquant", "plain rounding", layers, {"smooth": False}, bits=_some(levels, 3))


def _some(levels: Sequence[Any], start: int, step: int = 1) -> Sequence[Any]:
    """Every step-th level from the start-th on, or the last alone where there are so few."""
    return levels[start::step] or levels[-1:]
