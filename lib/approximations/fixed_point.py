"""Two's-complement fixed point, and the lookup-table reciprocal and inverse square root that Iron and BOLT share.

A real r is held as the integer floor(r 2^s) modulo 2^l: a ring of l bits with s fraction bits, written (l, s). Nothing
saturates: what leaves the ring wraps. A product is ((a b) mod 2^(l+s)) >> s with a floor shift, so each product is on
average half a unit too small. int64 holds all of it, because 2^(l+s) divides 2^64: an overflowing int64 product keeps
the bits that matter.

Sources: the lookup tables are those of SIRNN (Rathee et al., S&P 2021; math functions of the public library), which
Iron (Hao et al., NeurIPS 2022) and BOLT (Pang et al., S&P 2024) call at l = 37, s = 12. Confidence: read in source
code. The normalisation without a mean (RMSNorm) is our construction; the systems define LayerNorm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor

from lib.approximations.polynomialization import fill_invisible, is_real, normalise_real, real_valued, softmax_real

Table = Callable[[int], Tensor]
"""fraction bits -> int64 [entries]"""

RING_BITS = 37
FRACTION_BITS = 12
WIDE_RING_BITS = 48
"""Bits of the default ring: the same integers as in RING_BITS wherever that does not wrap."""
MEAN_BITS = 24
"""Fraction bits of the public constant 1/n, twice those of the published activations."""
VALID_FRACTION_BITS = tuple(range(2, 17))


def wrap(integers: Tensor, bits: int) -> Tensor:
    """The representative of `integers` modulo 2^bits in [-2^(bits-1), 2^(bits-1))."""
    return (integers << (64 - bits)).bitwise_right_shift_(64 - bits)


def encode(x: Tensor, fraction_bits: int, ring_bits: int = RING_BITS) -> Tensor:
    """floor(x 2^s) modulo 2^l as int64. What would leave int64 is taken as 2^62, which is 0 in every ring."""
    wide = x if x.dtype == torch.float64 else x.float()
    scaled = (wide * 2.0**fraction_bits).floor_().clamp_(-(2.0**62), 2.0**62)
    return wrap(scaled.to(torch.int64), ring_bits)


def decode(integers: Tensor, fraction_bits: int, like: Tensor) -> Tensor:
    """integers 2^-s in the dtype of `like`, and NaN where `like` (broadcastable) has no fixed-point value."""
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    return integers.to(wide).mul_(2.0**-fraction_bits).add_(0.0 * like).to(like.dtype)


def constant(value: float, fraction_bits: int) -> int:
    """A public constant, cut toward zero as a cast from double to integer does."""
    return int(value * 2.0**fraction_bits)


def multiply(a: Tensor, b: Tensor | int, shift: int, ring_bits: int) -> Tensor:
    """((a b) mod 2^(l + shift)) >> shift, a floor; exact while l + shift <= 64."""
    excess = max(64 - ring_bits - shift, 0)
    return (a * b).bitwise_left_shift_(excess).bitwise_right_shift_(excess + shift)


def floor_log2(v: Tensor) -> Tensor:
    """floor(log2 v) of positive integers below 2^53."""
    return torch.frexp(v.to(torch.float64)).exponent.to(torch.int64) - 1


def lookup(table: Table, fraction_bits: int, index: Tensor) -> Tensor:
    """table(s)[index]; an index outside the table reads its first or last entry."""
    values = _on_device(table, fraction_bits, index.device)
    return values.index_select(0, index.clamp(0, len(values) - 1).reshape(-1)).view(index.shape)


@lru_cache(maxsize=64)
def _on_device(table: Table, fraction_bits: int, device: torch.device) -> Tensor:
    return table(fraction_bits).to(device)


# Reciprocal -----------------------------------------------------------------------------------------------------------


def reciprocal_index_bits(fraction_bits: int) -> int:
    """m: the table of 1/B has 2^m cells on [1, 2)."""
    return max(math.ceil((fraction_bits - 2) / 2), 0)


@lru_cache(maxsize=64)
def reciprocal_cells(fraction_bits: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Per cell: z = p (p + 1/k) for its left end p, and the intercept (1/(2k) + sqrt z) / z, both float64 [k]."""
    k = 2 ** reciprocal_index_bits(fraction_bits)
    p = 1 + torch.arange(k, dtype=torch.float64, device=device) / k
    z = p * (p + 1 / k)
    return z, (1 / (2 * k) + z.sqrt()) / z


def _reciprocal_table(fraction_bits: int) -> Tensor:
    """Per cell: slope and intercept of its line, int64 [2, k]."""
    m, (squares, intercepts) = reciprocal_index_bits(fraction_bits), reciprocal_cells(fraction_bits)
    lines = torch.stack((2.0 ** (m + 3) / squares, 2.0 ** (2 * m + 2) * intercepts))
    return lines.floor().to(torch.int64)


def reciprocal_normalised(b: Tensor, b_bits: int, fraction_bits: int) -> Tensor:
    """1/B at scale s for B in [1, 2) at scale `b_bits`: one line per table cell, no iteration."""
    m, q = reciprocal_index_bits(fraction_bits), b_bits
    slope, intercept = _on_device(_reciprocal_table, fraction_bits, b.device)[:, (b >> (q - m)) & (2**m - 1)]
    rest = b & (2 ** (q - m) - 1)
    return ((intercept << (q + 1 - m)) - slope * rest) >> (q + m + 3 - fraction_bits)


def divide_integers(a: Tensor | int, b: Tensor, fraction_bits: int, ring_bits: int = RING_BITS) -> Tensor:
    """a/b, all at scale s, b > 0 (b < 1 unit is read as 1 unit): normalise b, look 1/b up, multiply, denormalise."""
    b = b.clamp(min=1)
    left = ring_bits - 1 - floor_log2(b)
    inverse = reciprocal_normalised(b << left, ring_bits - 1, fraction_bits)
    quotient = (inverse * a).bitwise_right_shift_(fraction_bits)
    return quotient.bitwise_left_shift_(left).bitwise_right_shift_(ring_bits - 1 - fraction_bits)


def reciprocal_real(b: Tensor, fraction_bits: int = FRACTION_BITS) -> Tensor:
    """1/b, b > 0, from the same table with unrounded entries and no ring. float64 in, float64 out."""
    mantissa, exponent = torch.frexp(b)
    beyond = 2 * mantissa - 1
    squares, intercepts = reciprocal_cells(fraction_bits, b.device)
    k = len(squares)
    index = (beyond * k).to(torch.int64).clamp_(0, k - 1)
    rest = beyond.sub_(index / k).div_(squares[index])
    return intercepts[index].sub_(rest).mul_(torch.exp2((1 - exponent).to(intercepts.dtype)))


# Inverse square root --------------------------------------------------------------------------------------------------


def rsqrt_index_bits(fraction_bits: int) -> int:
    """m: the table of 1/sqrt has 2^m cells on [1, 2) and as many on [2, 4)."""
    return math.ceil(fraction_bits / 2) if fraction_bits <= 14 else math.ceil(math.ceil(fraction_bits / 2) / 2)


def _rsqrt_cells(fraction_bits: int) -> Tensor:
    """1/sqrt of the left ends of the cells of [1, 2), then of [2, 4). float64 [2^(m+1)]."""
    k = 2 ** rsqrt_index_bits(fraction_bits)
    left_ends = 1 + torch.arange(k, dtype=torch.float64) / k
    return torch.cat((left_ends, 2 * left_ends)).rsqrt()


def _rsqrt_table(fraction_bits: int) -> Tensor:
    k_bits = rsqrt_index_bits(fraction_bits)
    return (2.0 ** (k_bits + 2) * _rsqrt_cells(fraction_bits)).floor().to(torch.int64)


def rsqrt_integers(v: Tensor, fraction_bits: int, ring_bits: int = RING_BITS) -> Tensor:
    """1/sqrt(v) at scale s: table, then one Newton step (two above 14 fraction bits). v < 1 unit is read as 1 unit."""
    s, m = fraction_bits, rsqrt_index_bits(fraction_bits)
    v = v.clamp(min=1)
    n = floor_log2(v)
    normalised = v << (ring_bits - 2 - n)
    odd = (n - s) & 1
    index = (normalised >> (ring_bits - 2 - m)) & (2**m - 1)
    guess = lookup(_rsqrt_table, s, index + (odd << m))
    b = (normalised << odd) >> (ring_bits - 2 - s)
    b = (guess * guess * b) >> (2 * m + 4)
    correction = 3 * 2**s - b
    g = (guess * correction) >> (m + 3)
    if s > 14:
        b = (((correction * correction) >> (s + 2)) * b) >> s
        g = (g * (3 * 2**s - b)) >> (s + 1)
    guard = (ring_bits - 1 - s) // 2
    return (g << (((s - n + 1) >> 1) + guard)) >> guard


def rsqrt_real(v: Tensor, fraction_bits: int = FRACTION_BITS) -> Tensor:
    """1/sqrt(v), v > 0, from the same table with unrounded entries, and the same Newton steps. float64."""
    mantissa, exponent = torch.frexp(v.clamp(min=torch.finfo(v.dtype).tiny))
    odd = (exponent - 1) & 1
    cells = _on_device(_rsqrt_cells, fraction_bits, v.device)
    k = len(cells) // 2
    index = ((2 * mantissa - 1) * k).to(torch.int64).clamp(0, k - 1)
    b = torch.ldexp(mantissa, 1 + odd)
    guess = cells[index + odd * k]
    for _ in range(1 if fraction_bits <= 14 else 2):
        guess = 0.5 * guess * (3 - guess * guess * b)
    return torch.ldexp(guess, -((exponent - 1 - odd) >> 1))


# The functions Iron and BOLT share, floating point in and out ---------------------------------------------------------


def reciprocal(x: Tensor, arithmetic: str = "fixed", fraction_bits: int = FRACTION_BITS) -> Tensor:
    """1/x for x > 0 by the table of lines. "real" keeps the table and drops the rounding."""
    if is_real(arithmetic):
        return real_valued(partial(reciprocal_real, fraction_bits=fraction_bits), x)
    return decode(divide_integers(2**fraction_bits, encode(x, fraction_bits), fraction_bits), fraction_bits, x)


def rsqrt(x: Tensor, arithmetic: str = "fixed", fraction_bits: int = FRACTION_BITS) -> Tensor:
    """1/sqrt(x) for x > 0 by table and Newton step. "real" keeps both and drops the rounding."""
    if is_real(arithmetic):
        return real_valued(partial(rsqrt_real, fraction_bits=fraction_bits), x)
    return decode(rsqrt_integers(encode(x, fraction_bits), fraction_bits), fraction_bits, x)


def exp(real: Callable[[Tensor], Tensor], table: Table, x: Tensor, arithmetic: str, fraction_bits: int) -> Tensor:
    """e^x for x <= 0 (positive x reads as 0).

    real: the function in floating point. table: of e^-a over a = 0, 1, ... units; its last entry is 0.
    """
    if is_real(arithmetic):
        return real_valued(real, x.clamp(max=0))
    magnitude = -encode(x.clamp(max=0), fraction_bits, 63)
    return decode(lookup(table, fraction_bits, magnitude), fraction_bits, x)


def softmax(
    real: Callable[[Tensor], Tensor],
    table: Table,
    scores: Tensor,
    visible: Tensor,
    arithmetic: str,
    fraction_bits: int = FRACTION_BITS,
    ring_bits: int = RING_BITS,
    sum_bits: int | None = None,
) -> Tensor:
    """exp(x - max) / sum over visible keys, with the table reciprocal; real and table as in `exp`.

    scores [..., query, key]; visible bool, broadcastable. sum_bits: width of the unsigned sum and of the division,
    where a sum of 2^(sum_bits - s) or more wraps; None keeps the ring. Rows without a visible key are 0.
    """
    if is_real(arithmetic):
        return softmax_real(scores, visible, real, partial(reciprocal_real, fraction_bits=fraction_bits))
    filled, largest = fill_invisible(scores, visible)
    magnitude = wrap(encode(largest, fraction_bits, ring_bits) - encode(filled, fraction_bits, ring_bits), ring_bits)
    weights = lookup(table, fraction_bits, magnitude).masked_fill_(~visible, 0)
    total = weights.sum(-1, keepdim=True)
    total = wrap(total, ring_bits) if sum_bits is None else total & (2**sum_bits - 1)
    probabilities = divide_integers(weights, total, fraction_bits, sum_bits or ring_bits)
    extent = torch.maximum(largest.abs(), filled.amin(-1, keepdim=True).abs())
    return decode(probabilities, fraction_bits, extent)


def mean_of(total: Tensor, count: int) -> Tensor:
    """floor(total floor(2^24 / count) / 2^24): the mean of `count` integers by a public constant, in two steps, because
    the product itself may need more than 64 bits."""
    share, low = 2**MEAN_BITS // count, total & (2**MEAN_BITS - 1)
    return (total >> MEAN_BITS) * share + (low * share >> MEAN_BITS)


def normalise(
    x: Tensor,
    arithmetic: str = "fixed",
    fraction_bits: int = FRACTION_BITS,
    ring_bits: int = RING_BITS,
    output_bits: int | None = None,
) -> Tensor:
    """x rsqrt(mean(x^2)) over the last axis: RMSNorm, our construction.

    No epsilon: 12 fraction bits cannot hold one. The sum of squares wraps at 2^(l-s-1). output_bits: fraction bits kept
    of the result by a floor; None keeps all.
    """
    if is_real(arithmetic):
        return normalise_real(x, partial(rsqrt_real, fraction_bits=fraction_bits))
    s, encoded = fraction_bits, encode(x, fraction_bits, ring_bits)
    squares = multiply(encoded, encoded, s, ring_bits)
    mean_square = mean_of(wrap(squares.sum(-1, keepdim=True), ring_bits), x.shape[-1])
    result = multiply(encoded, rsqrt_integers(mean_square, s, ring_bits), s, ring_bits)
    extent = x.abs().amax(-1, keepdim=True)
    if output_bits is None:
        return decode(result, s, extent)
    return decode(result >> (s - output_bits), output_bits, extent)
