"""BumbleBee: piecewise polynomials, exponential by squaring, Goldschmidt division, inverse root without iteration.

    GELU(x)  ~ x/2 + P(|x|) on [-3, 3), x above, 0 below                       (P is BOLT's polynomial)
    SiLU(x)  ~ x s(x) on [-8, 8), x above, 0 below; s a quartic in |x|
    exp(x)   ~ (1 + x/2^5)^(2^5), 0 below -14
    1/sqrt x ~ 2^(-(e+1)/2) r(x 2^-(e+1)), r a quartic on [1/4, 1/2)

Source: Lu, Huang, Gu, Li, Liu, Hong, Ren, Wei, Chen, "BumbleBee: Secure Two-party Inference Framework for Large
Transformers", NDSS 2025, with constants and number formats as in its public code OpenBumbleBee (high confidence): a
ring of 64 bits with 18 fraction bits, GELU in 32 bits with 12. The paper prints an older GELU of four segments; the
code's current one is used. Not emulated: the off-by-one of shared products and comparisons that read 4 fraction bits.

With fewer fraction bits than the system's own its tensors get coarser, and with them the coefficients of reciprocal and
inverse root and the constant term of SiLU's sigmoid; the other coefficients keep their bits.
Order of operations that the code leaves to its compiler (normalisation: 1/n as a public constant of 18 bits) is our
reading, of medium confidence. SiLU and RMSNorm need no construction: the system runs LLaMA.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from lib.approximations.bolt import PUBLISHED_GELU
from lib.approximations.fixed_point import constant, decode, floor_log2, multiply
from lib.approximations.polynomialization import (
    Polynomialization,
    by_kind,
    fill_invisible,
    in_blocks,
    is_real,
    normalise_real,
    real_valued,
    softmax_real,
)
from lib.approximations.technique import State, check_choice, evaluate_polynomial

RING_BITS, FRACTION_BITS = 64, 18
GELU_RING_BITS, GELU_FRACTION_BITS = 32, 12
GELU_CUT_OFF, SILU_CUT_OFF, EXP_CUT_OFF = 3, 8, -14
SIGMOID = (0.49352908920523014, 0.3028510171823098, -0.06808619212463336, 0.006747908074344234, -0.0002472776978734074)
QUARTIC_BITS = 21
"""Working fraction bits of the last term of SIGMOID, whose coefficient is tiny."""
RSQRT = (4.14285016, -15.47994394, 38.4714796, -49.86605845, 26.02942339)
SQUARINGS = 5
MEAN_BITS = 18
VALID_FRACTION_BITS = tuple(range(2, 21))


def _encode(x: Tensor, fraction_bits: int) -> Tensor:
    """x 2^s cut toward zero, saturated at 2^(64 - 2)."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * 2.0**fraction_bits).clamp_(-(2.0**62), 2.0**62).to(torch.int64)


# GELU and SiLU --------------------------------------------------------------------------------------------------------


def _gelu_real(x: Tensor) -> Tensor:
    y = x.abs().clamp(max=GELU_CUT_OFF)
    inside = evaluate_polynomial(PUBLISHED_GELU, y) + x / 2
    return torch.where(x < -GELU_CUT_OFF, 0.0, torch.where(x < GELU_CUT_OFF, inside, x))


def gelu(x: Tensor, arithmetic: str = "fixed", fraction_bits: int = FRACTION_BITS) -> Tensor:
    """BOLT's polynomial with cut-off 3, in a ring of 32 bits with at most 12 fraction bits. Max error 8.8e-3."""
    if is_real(arithmetic):
        return real_valued(_gelu_real, x)
    s = min(fraction_bits, GELU_FRACTION_BITS)
    narrow = 64 - GELU_RING_BITS
    encoded = _encode(x, fraction_bits) >> (fraction_bits - s)
    encoded = encoded.bitwise_left_shift_(narrow).bitwise_right_shift_(narrow)
    limit = GELU_CUT_OFF << s
    y = encoded.abs().clamp_(max=limit)
    y2 = (y * y) >> s
    y3, y4 = (y * y2) >> s, (y2 * y2) >> s
    c0, c1, c2, c3, c4 = (constant(c, GELU_FRACTION_BITS) for c in PUBLISHED_GELU)
    terms = (y * c1).add_(y2, alpha=c2).add_(y3, alpha=c3).add_(y4, alpha=c4).add_(c0 << s)
    inside = terms.add_(encoded, alpha=1 << (GELU_FRACTION_BITS - 1)).bitwise_right_shift_(GELU_FRACTION_BITS)
    result = torch.where(encoded < limit, inside, encoded).masked_fill_(encoded < -limit, 0)
    return decode(result, s, x)


def _silu_real(x: Tensor) -> Tensor:
    positive = evaluate_polynomial(SIGMOID, x.abs().clamp(max=SILU_CUT_OFF))
    inside = x * torch.where(x >= 0, positive, 1 - positive)
    return torch.where(x < -SILU_CUT_OFF, 0.0, torch.where(x < SILU_CUT_OFF, inside, x))


def silu(x: Tensor, arithmetic: str = "fixed", fraction_bits: int = FRACTION_BITS) -> Tensor:
    """x s(x) on [-8, 8), s a quartic in |x| reflected for negative x. Max error 9.9e-3, in fixed point 1.2e-2."""
    if is_real(arithmetic):
        return real_valued(_silu_real, x)
    s, precise = fraction_bits, max(fraction_bits, FRACTION_BITS)
    encoded = _encode(x, s)
    limit = SILU_CUT_OFF << s
    y = encoded.abs().clamp_(max=limit)
    y2 = (y * y) >> s
    y3, y4 = (y * y2) >> s, (y2 * y2) >> s
    c1, c2, c3 = (constant(c, precise) for c in SIGMOID[1:4])
    positive = (y * c1).add_(y2, alpha=c2).add_(y3, alpha=c3).bitwise_right_shift_(precise)
    positive.add_(y4.mul_(constant(SIGMOID[4], QUARTIC_BITS)).bitwise_right_shift_(QUARTIC_BITS))
    positive.add_(constant(SIGMOID[0], s))
    sigmoid = torch.where(encoded >= 0, positive, (1 << s) - positive)
    inside = sigmoid.mul_(encoded).bitwise_right_shift_(s)
    result = torch.where(encoded < limit, inside, encoded).masked_fill_(encoded < -limit, 0)
    return decode(result, s, x)


# exp, reciprocal, softmax ---------------------------------------------------------------------------------------------


def _exp_real(x: Tensor, squarings: int) -> Tensor:
    base = 1 + x.clamp(min=EXP_CUT_OFF) * 2.0**-squarings
    for _ in range(squarings):
        base = base.square()
    return base.masked_fill(x < EXP_CUT_OFF, 0)


def _exp_fixed(x: Tensor, s: int, squarings: int) -> Tensor:
    """The same on encoded x <= 0; x / 2^n is a floor shift."""
    base = (x.clamp(min=EXP_CUT_OFF << s) >> squarings).add_(1 << s)
    for _ in range(squarings):
        base = base.mul_(base).bitwise_right_shift_(s)
    return base.masked_fill_(x < EXP_CUT_OFF << s, 0)


def exp(x: Tensor, arithmetic: str = "fixed", fraction_bits: int = FRACTION_BITS, squarings: int = SQUARINGS) -> Tensor:
    """(1 + x/2^n)^(2^n) for x <= 0 (positive x reads as 0), n = squarings; 0 below -14."""
    if is_real(arithmetic):
        return real_valued(partial(_exp_real, squarings=squarings), x.clamp(max=0))
    encoded = _encode(x.clamp(max=0), fraction_bits)
    return decode(_exp_fixed(encoded, fraction_bits, squarings), fraction_bits, x)


def _reciprocal_real(b: Tensor) -> Tensor:
    c, exponent = torch.frexp(b)
    r = 2.9142 - 2 * c
    e = 1 - c * r
    for _ in range(2):
        r, e = r * (1 + e), e * e
    return torch.ldexp(r, -exponent)


def _reciprocal_fixed(b: Tensor, s: int) -> Tensor:
    """1/b at scale s by two Goldschmidt iterations; b < 1 unit is read as 1 unit."""
    b = b.clamp(min=1)
    exponent = floor_log2(b) + 1
    c = (b << (s - exponent).clamp(min=0)) >> (exponent - s).clamp(min=0)
    r = constant(2.9142, s) - 2 * c
    e = (1 << s) - ((c * r) >> s)
    for _ in range(2):
        r, e = (r * ((1 << s) + e)) >> s, (e * e) >> s
    return (r << (s - exponent).clamp(min=0)) >> (exponent - s).clamp(min=0)


def reciprocal(x: Tensor, arithmetic: str = "fixed", fraction_bits: int = FRACTION_BITS) -> Tensor:
    """1/x for x > 0: normalised to [1/2, 1), a line, two Goldschmidt iterations. Relative error 5.4e-5 in the reals."""
    if is_real(arithmetic):
        return real_valued(_reciprocal_real, x)
    return decode(_reciprocal_fixed(_encode(x, fraction_bits), fraction_bits), fraction_bits, x)


def softmax(
    scores: Tensor,
    visible: Tensor,
    arithmetic: str = "fixed",
    fraction_bits: int = FRACTION_BITS,
    squarings: int = SQUARINGS,
) -> Tensor:
    """Softmax over visible keys, scores [..., query, key]: exp(x - max) times one reciprocal of the row's sum."""
    if is_real(arithmetic):
        return softmax_real(scores, visible, partial(_exp_real, squarings=squarings), _reciprocal_real)
    filled, largest = fill_invisible(scores, visible)
    below_largest = _encode(filled, fraction_bits).sub_(_encode(largest, fraction_bits))
    weights = in_blocks(partial(_exp_fixed, s=fraction_bits, squarings=squarings), below_largest)
    weights.masked_fill_(~visible, 0)
    inverse = _reciprocal_fixed(weights.sum(-1, keepdim=True), fraction_bits)
    extent = torch.maximum(largest.abs(), filled.amin(-1, keepdim=True).abs())
    return decode(weights.mul_(inverse).bitwise_right_shift_(fraction_bits), fraction_bits, extent)


# Inverse square root and normalisation --------------------------------------------------------------------------------


def _rsqrt_real(v: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(v.clamp(min=torch.finfo(v.dtype).tiny))
    return evaluate_polynomial(RSQRT, mantissa / 2) * torch.exp2(-(exponent + 1).to(v.dtype) / 2)


def _rsqrt_fixed(v: Tensor, s: int) -> Tensor:
    """1/sqrt(v) at scale s; odd octaves times floor(2^(s/2) sqrt 2), at half scale. v < 1 unit is read as 1 unit."""
    v = v.clamp(min=1)
    octave = floor_log2(v) + 2 - s
    u = (v << (-octave).clamp(min=0)) >> octave.clamp(min=0)
    r = torch.full_like(u, constant(RSQRT[-1], s))
    for c in reversed(RSQRT[:-1]):
        r = ((r * u) >> s) + constant(c, s)
    odd, half = octave & 1, s // 2
    r = torch.where(odd == 1, (r * constant(math.sqrt(2), half)) >> half, r)
    power = (octave + odd) >> 1
    return (r << (-power).clamp(min=0)) >> power.clamp(min=0)


def rsqrt(x: Tensor, arithmetic: str = "fixed", fraction_bits: int = FRACTION_BITS) -> Tensor:
    """1/sqrt(x) for x > 0: a quartic on one octave, no Newton step. Relative error 8.2e-5 in the reals."""
    if is_real(arithmetic):
        return real_valued(_rsqrt_real, x)
    return decode(_rsqrt_fixed(_encode(x, fraction_bits), fraction_bits), fraction_bits, x)


def normalise(x: Tensor, eps: float = 0.0, arithmetic: str = "fixed", fraction_bits: int = FRACTION_BITS) -> Tensor:
    """x rsqrt(mean(x^2) + eps) over the last axis; eps below 2^-s vanishes."""
    if is_real(arithmetic):
        return normalise_real(x, _rsqrt_real, eps)
    s, share = fraction_bits, round(2**MEAN_BITS / x.shape[-1])
    product = partial(multiply, ring_bits=RING_BITS)
    encoded = _encode(x, s)
    mean_square = product(product(encoded, encoded, s).sum(-1, keepdim=True), share, MEAN_BITS) + constant(eps, s)
    result = product(encoded, _rsqrt_fixed(mean_square, s), s)
    return decode(result, s, x.abs().amax(-1, keepdim=True))


@dataclass(frozen=True)
class BumbleBee(Polynomialization):
    """BumbleBee in a decoder. Dose axes: `parts`, `fraction_bits`.

    `published` changes nothing: the system runs LLaMA and GPT-2. In its ring of 64 bits a square wraps, at 18 fraction
    bits, where |x| reaches 2^13.5 = 11,585.
    """

    name: ClassVar[str] = "bumblebee"
    choices = Polynomialization.choices | {"fraction_bits": VALID_FRACTION_BITS}
    fraction_bits: int = FRACTION_BITS

    def operation(self, operation: str, layer: int, state: State | None, site: str = "") -> Callable[..., Tensor]:
        check_choice(self.name, "operation", operation, self.operations)
        settings: dict[str, Any] = {"arithmetic": self.arithmetic, "fraction_bits": self.fraction_bits}
        if operation == "activation":
            return by_kind(partial(silu, **settings), partial(gelu, **settings))
        return partial(softmax if operation == "softmax" else normalise, **settings)
