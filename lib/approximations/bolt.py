"""BOLT: one degree-4 minimax polynomial in |x|, a quadratic exponential, and SIRNN's reciprocal and inverse root.

    GELU(x) ~ x/2 + P(|x|) for |x| < 2.7, else max(x, 0);    P = minimax of GELU_erf(y) - y/2 on [0, 2.7]
    exp(x)  ~ 2^-l (0.3585 (p + 1.353)^2 + 0.344),           x = p - l ln 2, p in (-ln 2, 0]

Source: Pang, Zhu, Möllering, Zheng, Schneider, "BOLT: Privacy-Preserving, Accurate and Efficient Inference for
Transformers", S&P 2024, sections on GELU, softmax and LayerNorm, with every constant as in its public code (high
confidence). The code evaluates GELU with 11 fraction bits in a ring of 20 and keeps 4 of them, and sums softmax in 19
bits: fine for BERT, and available here as `published`.

Our constructions: SiLU (same form, refitted by the same recipe, cut-off 6.5 where the polynomial's error and the cut
tail are equally large), other degrees, RMSNorm (LayerNorm without the mean), and a softmax sum in the whole ring.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.special import erf
from torch import Tensor

from lib.approximations import fixed_point, remez
from lib.approximations.fixed_point import (
    FRACTION_BITS,
    RING_BITS,
    VALID_FRACTION_BITS,
    WIDE_RING_BITS,
    normalise,
    reciprocal,
    rsqrt,
)
from lib.approximations.polynomialization import Polynomialization, by_kind, is_real, real_valued
from lib.approximations.technique import State, check_choice, evaluate_polynomial

__all__ = ["Bolt", "exp", "gelu", "normalise", "reciprocal", "rsqrt", "silu", "softmax"]

CUT_OFF = {"gelu": 2.7, "silu": 6.5}
PUBLISHED_GELU = (
    0.001620808531841547, -0.03798164612714154, 0.5410550166368381, -0.18352506127082727, 0.020848611754127593,
)  # fmt: skip
PUBLISHED_MOTZKIN = (
    0.14439048359960427, -0.7077117131613893, 4.5702822654246535, -8.15444702051307, 16.382265425072532,
)  # fmt: skip
SILU = (-0.01027753474289613, 0.04392223092916936, 0.2498198806097572, -0.04621434800584379, 0.002863781099608562)
PUBLISHED_DEGREE = 4
DEGREES = tuple(range(1, 9))
SUM_BITS = 19
PUBLISHED_ACTIVATION = {"fraction_bits": 11, "ring_bits": 20, "output_bits": 4}
PUBLISHED_NORM_BITS = 5


@lru_cache(maxsize=64)
def coefficients(kind: str, degree: int = PUBLISHED_DEGREE) -> tuple[float, ...]:
    """c0, c1, ... in t = y / T of the polynomial that is added to x/2. kind: "gelu" or "silu"."""
    check_choice("bolt", "degree", degree, DEGREES)
    cut_off = CUT_OFF[kind]
    if degree == PUBLISHED_DEGREE:
        in_y = PUBLISHED_GELU if kind == "gelu" else SILU
        return tuple(c * cut_off**power for power, c in enumerate(in_y))
    targets = {"gelu": lambda y: y / 2 * erf(y / math.sqrt(2)), "silu": lambda y: y / 2 * np.tanh(y / 2)}
    return tuple(remez.minimax(targets[kind], cut_off, degree)[0].tolist())


@lru_cache(maxsize=64)
def _even_part(kind: str, degree: int) -> fixed_point.Table:
    """The table of P(y) at scale s over encoded y in [0, T): Motzkin's form for the published GELU, else Horner."""

    def table(fraction_bits: int) -> Tensor:
        s, multiply = fraction_bits, partial(fixed_point.multiply, shift=fraction_bits, ring_bits=RING_BITS)
        y = torch.arange(fixed_point.constant(CUT_OFF[kind], s))
        if kind == "gelu" and degree == PUBLISHED_DEGREE:
            g0, g1, g2, g3, g4 = (fixed_point.constant(g, s) for g in PUBLISHED_MOTZKIN)
            linear = multiply(y, g0)
            z = multiply(linear + g1, y) + g2
            return multiply(z + linear + g3, z) + g4
        t = multiply(y, fixed_point.constant(1 / CUT_OFF[kind], s))
        *lower, leading = (fixed_point.constant(c, s) for c in coefficients(kind, degree))
        result = torch.full_like(y, leading)
        for c in reversed(lower):
            result = multiply(result, t) + c
        return result

    return table


def _activation(
    kind: str,
    x: Tensor,
    arithmetic: str,
    degree: int = PUBLISHED_DEGREE,
    fraction_bits: int = FRACTION_BITS,
    ring_bits: int = RING_BITS,
    output_bits: int | None = None,
) -> Tensor:
    """x/2 + P(|x|) below the cut-off of `kind`, else max(x, 0)."""
    cut_off = CUT_OFF[kind]
    if is_real(arithmetic):
        in_t = coefficients(kind, degree)

        def formula(wide: Tensor) -> Tensor:
            y = wide.abs()
            inside = wide / 2 + evaluate_polynomial(in_t, y.clamp(max=cut_off) / cut_off)
            return torch.where(y < cut_off, inside, (wide + y) / 2)

        return real_valued(formula, x)
    encoded = fixed_point.encode(x, fraction_bits, ring_bits)
    y = encoded.abs()
    inside = (encoded >> 1).add_(fixed_point.lookup(_even_part(kind, degree), fraction_bits, y))
    result = torch.where(y < fixed_point.constant(cut_off, fraction_bits), inside, encoded.clamp_(min=0))
    if output_bits is None:
        return fixed_point.decode(result, fraction_bits, x)
    return fixed_point.decode(result >> (fraction_bits - output_bits), output_bits, x)


def gelu(x: Tensor, arithmetic: str = "fixed", **constants: Any) -> Tensor:
    """Cut-off 2.7; largest error 9.4e-3, the jump there. The public code computes in (20, 11) and keeps 4 bits.

    constants: degree, fraction_bits s, ring_bits l, output_bits: fraction bits kept of the result by a floor; None
    keeps all. In fixed point the input wraps beyond |x| = 2^(l - s - 1).
    """
    return _activation("gelu", x, arithmetic, **constants)


def silu(x: Tensor, arithmetic: str = "fixed", **constants: Any) -> Tensor:
    """Cut-off 6.5, with the minimax of SiLU(y) - y/2 on [0, 6.5]. Our construction. constants: as of `gelu`."""
    return _activation("silu", x, arithmetic, **constants)


def _exp_real(x: Tensor) -> Tensor:
    octaves = torch.floor(x / -math.log(2))
    p = x + octaves * math.log(2)
    return (0.3585 * (p + 1.353).square() + 0.344) * torch.exp2(-octaves)


def _exp_table(fraction_bits: int) -> Tensor:
    """exp(-a) at scale s for a = 0, 1, ... units; the last entry is 0. Constants rounded to nearest, as in the code."""
    s = fraction_bits
    x = -torch.arange((s + 2) * 2**s)
    octaves = ((x * round(-(2**s) / math.log(2))) >> s) >> s
    q = x + (((octaves << s) * round(2**s * math.log(2))) >> s) + round(1.353 * 2**s)
    q = (((q * q) >> s) * round(0.3585 * 2**s) >> s) + round(0.344 * 2**s)
    values = q >> octaves.clamp(max=s + 1)
    values[-1] = 0
    return values


def exp(x: Tensor, arithmetic: str = "fixed", fraction_bits: int = FRACTION_BITS) -> Tensor:
    """e^x for x <= 0 (positive x reads as 0): range reduction by ln 2 and a quadratic. Max relative error 3.1e-3."""
    return fixed_point.exp(_exp_real, _exp_table, x, arithmetic, fraction_bits)


def softmax(scores: Tensor, visible: Tensor, arithmetic: str = "fixed", **constants: Any) -> Tensor:
    """Softmax over visible keys, scores [..., query, key]. The public code has sum_bits=19: a sum of 128 wraps.

    constants: fraction_bits, ring_bits, sum_bits.
    """
    return fixed_point.softmax(_exp_real, _exp_table, scores, visible, arithmetic, **constants)


@dataclass(frozen=True)
class Bolt(Polynomialization):
    """BOLT in a decoder. Dose axes: `parts`, `fraction_bits` (of the fixed arithmetic), `degree` (of the activation).

    Default: the published functions with all fraction bits kept and a ring of 48 bits, where a sum of squares wraps at
    2^35 (at 12 fraction bits). `published`: the activation in a ring of 20 bits with one fraction bit less and 4 bits
    kept, softmax sums in 19 bits, everything else in 37, normalisation cut to 5 bits (the public code cuts it after the
    learned weight, here it is cut before).
    """

    name: ClassVar[str] = "bolt"
    choices = Polynomialization.choices | {"fraction_bits": VALID_FRACTION_BITS, "degree": DEGREES}
    fraction_bits: int = FRACTION_BITS
    degree: int = PUBLISHED_DEGREE

    def operation(self, operation: str, layer: int, state: State | None, site: str = "") -> Callable[..., Tensor]:
        check_choice(self.name, "operation", operation, self.operations)
        shared: dict[str, Any] = {"arithmetic": self.arithmetic, "fraction_bits": self.fraction_bits}
        ring_bits = RING_BITS if self.published else WIDE_RING_BITS
        if operation == "activation":
            in_ring = PUBLISHED_ACTIVATION if self.published else {"ring_bits": ring_bits, "degree": self.degree}
            settings = shared | in_ring
            return by_kind(partial(silu, **settings), partial(gelu, **settings))
        if operation == "softmax":
            return partial(softmax, **shared, ring_bits=ring_bits, sum_bits=SUM_BITS if self.published else None)
        output_bits = PUBLISHED_NORM_BITS if self.published else None
        return lambda x, eps: normalise(x, **shared, ring_bits=ring_bits, output_bits=output_bits)
