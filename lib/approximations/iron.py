"""Iron: GELU in its tanh form, softmax and normalisation by SIRNN's lookup tables in fixed point, no polynomial at all.

    exp(-a)   product of table entries, one per 8-bit digit of a
    tanh(u)   (1 - E) / (1 + E),  E = exp(-2|u|), with the reciprocal of 1 + E from a table of 32 lines
    GELU(x)   x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), a floor after every product

Source: Hao, Li, Chen, Xing, Xu, Zhang, "Iron: Private Inference on Transformers", NeurIPS 2022, sections on GELU,
softmax and LayerNorm, with the call parameters of its public code (ring of 37 bits, 12 fraction bits, 8-bit digits) and
the tables of SIRNN (Rathee et al., S&P 2021) behind those calls: high confidence. Order of the products in GELU as in
BOLT's re-implementation; the original differs by a few units in the last place. The plaintext script published with
Iron loses the slope of the reciprocal when it normalises; that slip is not reproduced here.

Our constructions: SiLU as x sigmoid(x) with SIRNN's sigmoid, and RMSNorm (LayerNorm without the mean). Iron has no
real-valued form: "real" here keeps the tables of lines, with exact entries, and drops every rounding and the ring; its
activations are in float32, but for float64 tensors (5e-7 relative to the input apart), everything else in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from lib.approximations import fixed_point
from lib.approximations.fixed_point import (
    FRACTION_BITS,
    RING_BITS,
    VALID_FRACTION_BITS,
    WIDE_RING_BITS,
    constant,
    decode,
    encode,
    lookup,
    multiply,
    normalise,
    reciprocal,
    rsqrt,
)
from lib.approximations.polynomialization import Polynomialization, by_kind, is_real, real_valued
from lib.approximations.technique import State, check_choice

__all__ = ["Iron", "exp", "gelu", "normalise", "reciprocal", "rsqrt", "silu", "softmax"]

CUBIC, ROOT = 0.044715, math.sqrt(2 / math.pi)
DIGIT_BITS = 8


@lru_cache(maxsize=64)
def _exp_table(output_bits: int, input_bits: int | None = None) -> Tensor:
    """e^-a at scale `output_bits` for a = 0, 1, 2, ... at scale `input_bits`, up to where it is 0 for good.

    A table per 8-bit digit of a, multiplied as a tree; floors can only lower the product. None: the same scale.
    """
    input_bits = output_bits if input_bits is None else input_bits
    a = torch.arange(math.ceil(output_bits * math.log(2) * 2**input_bits) + 2)
    factors = []
    for digit in range(math.ceil(RING_BITS / DIGIT_BITS)):
        values = (a >> (DIGIT_BITS * digit)) & (2**DIGIT_BITS - 1)
        exact = torch.exp(-values.to(torch.float64) * 2.0 ** (DIGIT_BITS * digit - input_bits))
        factors.append((exact * 2.0**output_bits).floor().to(torch.int64))
    while len(factors) > 1:
        pairs = [(a * b) >> output_bits for a, b in zip(factors[::2], factors[1::2], strict=False)]
        factors = pairs + factors[2 * len(pairs) :]
    return factors[0]


def _inverse_of_one_plus(e: Tensor, fraction_bits: int) -> Tensor:
    """1/(1 + E) at scale s for E in [0, 1]; a denominator of exactly 2 is replaced by the number below it."""
    denominator = (2**fraction_bits + e).clamp(max=2 ** (fraction_bits + 1) - 1)
    return fixed_point.reciprocal_normalised(denominator, fraction_bits, fraction_bits)


def _tanh_table(fraction_bits: int) -> Tensor:
    """tanh(u) at scale s for u = 0, 1, ... units; the last entry is its limit."""
    e = _exp_table(fraction_bits, fraction_bits - 1)
    return ((2**fraction_bits - e) * _inverse_of_one_plus(e, fraction_bits)) >> fraction_bits


def _sigmoid_table(fraction_bits: int) -> Tensor:
    """sigmoid(u) at scale s for u from -(n - 1) to n - 1 units, n the length of the table of exp."""
    e = _exp_table(fraction_bits)
    inverse = _inverse_of_one_plus(e, fraction_bits)
    negative = ((e * inverse) >> fraction_bits).flip(0)
    return torch.cat((negative[:-1], inverse))


@lru_cache(maxsize=64)
def _real_lines(fraction_bits: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Intercepts and slopes in E, [cells] each, of the lines of the table of 1/(1 + E), unrounded, for E in [0, 1]."""
    squares, intercepts = fixed_point.reciprocal_cells(fraction_bits)
    left = torch.arange(len(squares), dtype=torch.float64) / len(squares)
    return (intercepts + left / squares).to(device, dtype), (-1 / squares).to(device, dtype)


def _real_inverse_of_one_plus(e: Tensor, fraction_bits: int) -> Tensor:
    """1/(1 + E) for E in [0, 1]: `fixed_point.reciprocal_real` where its argument is normalised already."""
    intercepts, slopes = _real_lines(fraction_bits, e.dtype, e.device)
    cell = (e * len(slopes)).to(torch.int32).clamp_(0, len(slopes) - 1).reshape(-1)
    return intercepts.index_select(0, cell).view(e.shape).addcmul_(slopes.index_select(0, cell).view(e.shape), e)


def _gelu_real(x: Tensor, fraction_bits: int) -> Tensor:
    u = x.addcmul(x * x, x, value=CUBIC)
    e = u.abs().mul_(-2 * ROOT).exp_()
    tanh = (1 - e).mul_(_real_inverse_of_one_plus(e, fraction_bits)).copysign_(u)
    return tanh.add_(1).mul_(x).mul_(0.5)


def _silu_real(x: Tensor, fraction_bits: int) -> Tensor:
    inverse = _real_inverse_of_one_plus(x.abs().neg_().exp_(), fraction_bits)
    return inverse.mul_(x.clamp(max=0).exp_()).mul_(x)


def gelu(
    x: Tensor, arithmetic: str = "fixed", fraction_bits: int = FRACTION_BITS, ring_bits: int = RING_BITS
) -> Tensor:
    """GELU_tanh by the table tanh; at most 9 units of 2^-12 off on [-16, 16]. In (37, 12) x^3 wraps from |x| = 256."""
    if is_real(arithmetic):
        return real_valued(partial(_gelu_real, fraction_bits=fraction_bits), x, torch.float32)
    s, product = fraction_bits, partial(multiply, shift=fraction_bits, ring_bits=ring_bits)
    encoded = encode(x, s, ring_bits)
    cube = product(product(encoded, encoded), encoded)
    u = product((product(cube, constant(CUBIC, s))).add_(encoded), constant(ROOT, s))
    tanh = lookup(_tanh_table, s, u.abs()).mul_(u.sign_()).add_(2**s)
    return decode(product(encoded >> 1, tanh), s, x)


def silu(
    x: Tensor, arithmetic: str = "fixed", fraction_bits: int = FRACTION_BITS, ring_bits: int = RING_BITS
) -> Tensor:
    """x sigmoid(x) by the table sigmoid. Our construction; Iron defines no SiLU."""
    if is_real(arithmetic):
        return real_valued(partial(_silu_real, fraction_bits=fraction_bits), x, torch.float32)
    encoded = encode(x, fraction_bits, ring_bits)
    middle = len(_exp_table(fraction_bits)) - 1
    sigmoid = lookup(_sigmoid_table, fraction_bits, encoded + middle)
    return decode(multiply(encoded, sigmoid, fraction_bits, ring_bits), fraction_bits, x)


def exp(x: Tensor, arithmetic: str = "fixed", fraction_bits: int = FRACTION_BITS) -> Tensor:
    """e^x for x <= 0 (positive x reads as 0) by the digit tables, whose exact entries multiply to e^x itself."""
    return fixed_point.exp(torch.exp, _exp_table, x, arithmetic, fraction_bits)


def softmax(scores: Tensor, visible: Tensor, arithmetic: str = "fixed", **constants: Any) -> Tensor:
    """Softmax over visible keys, scores [..., query, key]; each row is divided by its sum with the table reciprocal.

    constants: fraction_bits, ring_bits.
    """
    return fixed_point.softmax(torch.exp, _exp_table, scores, visible, arithmetic, **constants)


@dataclass(frozen=True)
class Iron(Polynomialization):
    """Iron in a decoder. Dose axes: `parts`, `fraction_bits`.

    `published` is the ring of 37 bits, where GELU wraps at |x| = 256 and a sum of squares at 2^24. The default holds
    the same integers in a ring of 48 bits, where they wrap at 3251 and 2^35 (at 12 fraction bits).
    """

    name: ClassVar[str] = "iron"
    choices = Polynomialization.choices | {"fraction_bits": VALID_FRACTION_BITS}
    fraction_bits: int = FRACTION_BITS

    def operation(self, operation: str, layer: int, state: State | None, site: str = "") -> Callable[..., Tensor]:
        check_choice(self.name, "operation", operation, self.operations)
        settings: dict[str, Any] = {
            "arithmetic": self.arithmetic,
            "fraction_bits": self.fraction_bits,
            "ring_bits": RING_BITS if self.published else WIDE_RING_BITS,
        }
        if operation == "activation":
            return by_kind(partial(silu, **settings), partial(gelu, **settings))
        if operation == "softmax":
            return partial(softmax, **settings)
        return lambda x, eps: normalise(x, **settings)
