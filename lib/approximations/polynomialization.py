"""What the four polynomialization systems have in common: settings, masked softmax, normalisation by an inverse root.

Iron, BOLT, BumbleBee and NEXUS all replace non-linear functions by what secure computation can evaluate. Each module
holds the functions of one system, `f(x, arithmetic="real" | "fixed", **its constants)`, floating point in and out; this
one holds the frame that puts them into a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from lib.approximations.technique import OPERATIONS, Technique, check_choice

ARITHMETICS = ("real", "fixed")
BLOCK = 2**15


@dataclass(frozen=True)
class Polynomialization(Technique):
    """Settings of every polynomialization system.

    parts: the operations it replaces, any non-empty subset of "activation", "softmax", "norm", in any order.
    arithmetic: "real" evaluates the formulas in floating point, "fixed" emulates the ring arithmetic bit by bit.
    published: the literal system of the paper; what its ranges cannot hold wraps or explodes. The default is adapted to
        decoders: each system says how.
    choices: the valid values of settings that have a list of them.
    """

    category: ClassVar[str] = "polynomialization"
    choices: ClassVar[dict[str, tuple[object, ...]]] = {"arithmetic": ARITHMETICS, "published": (False, True)}

    parts: tuple[str, ...] = OPERATIONS
    arithmetic: str = "fixed"
    published: bool = False

    def __post_init__(self) -> None:
        parts = (self.parts,) if isinstance(self.parts, str) else tuple(self.parts)
        if not parts:
            raise ValueError(f"{self.name}: parts is empty; choose at least one of {', '.join(OPERATIONS)}")
        for part in parts:
            check_choice(self.name, "parts", part, OPERATIONS)
        for name, valid in self.choices.items():
            check_choice(self.name, name, getattr(self, name), valid)
        for field in fields(self) if self.published else ():
            if field.name not in ("parts", "published"):
                check_choice(f"{self.name} (published)", field.name, getattr(self, field.name), (field.default,))
        object.__setattr__(self, "parts", tuple(part for part in OPERATIONS if part in parts))

    @property
    def operations(self) -> tuple[str, ...]:
        return self.parts


def is_real(arithmetic: str) -> bool:
    """Whether the arithmetic is "real", not "fixed". ValueError for any other."""
    if arithmetic not in ARITHMETICS:
        raise ValueError(f"arithmetic={arithmetic!r} is not valid; choose one of {', '.join(ARITHMETICS)}")
    return arithmetic == "real"


def by_kind(silu: Callable[[Tensor], Tensor], gelu: Callable[[Tensor], Tensor]) -> Callable[[Tensor, str], Tensor]:
    """The activation f(x, kind). Both forms of GELU get the system's one GELU: they differ by at most 4.8e-4."""
    return lambda x, kind: in_blocks(silu if kind == "silu" else gelu, x)


def in_blocks(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """An elementwise function, on CPU block by block so that its temporaries stay in cache: several times faster."""
    if x.device.type != "cpu" or x.numel() <= BLOCK:
        return function(x)
    return torch.cat([function(block) for block in x.reshape(-1).split(BLOCK)]).view(x.shape)


def real_valued(function: Callable[[Tensor], Tensor], x: Tensor, least: torch.dtype = torch.float64) -> Tensor:
    """function evaluated in the dtype of x or in `least`, whichever is wider, and returned in the dtype of x."""
    return function(x.to(torch.promote_types(x.dtype, least))).to(x.dtype)


def fill_invisible(scores: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [..., query, key] with every invisible entry set to its row's largest visible score (0 in empty rows).

    Masked scores are huge finite negatives or -inf; no fixed-point number may be made from them. Returns the filled
    scores and that maximum [..., query, 1].
    """
    largest = scores.masked_fill(~visible, -torch.inf).amax(-1, keepdim=True)
    largest = largest.masked_fill(~visible.any(-1, keepdim=True), 0)
    return torch.where(visible, scores, largest), largest


def softmax_real(
    scores: Tensor, visible: Tensor, exp: Callable[[Tensor], Tensor], reciprocal: Callable[[Tensor], Tensor]
) -> Tensor:
    """exp(x - max) * reciprocal(sum) over visible keys, in float64; 0 elsewhere, and in rows without a visible key."""
    filled, largest = fill_invisible(scores, visible)
    weights = exp(filled.to(torch.float64) - largest).masked_fill(~visible, 0)
    total = weights.sum(-1, keepdim=True)
    total = total.masked_fill(~visible.any(-1, keepdim=True), 1)
    return (weights * reciprocal(total)).to(scores.dtype)


def normalise_real(x: Tensor, rsqrt: Callable[[Tensor], Tensor], eps: float = 0.0) -> Tensor:
    """x rsqrt(mean(x^2) + eps) over the last axis in float64."""
    wide = x.to(torch.float64)
    return (wide * rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
