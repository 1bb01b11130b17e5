"""NEXUS: everything from additions and products alone, as homomorphic encryption (CKKS) demands.

    GELU(x)   ~ (b0 - b1) A(x) + (b1 + 1/2) x,   b = S((x +- T) / (R + T)) / 2
    exp(x)    ~ (1 + x/128)^128
    1/S       ~ d (1 + y)(1 + y^2)(1 + y^4)...,  y = 1 - d S; its relative error is -(1 - d S)^(2^(k+1))
    1/sqrt v  ~ a line, four Newton and two Goldschmidt steps

A is even of degree 12 plus x/2, fitted on [-T, T]; S is a polynomial sign, two steps of g, then two of f (Cheon et al.,
Asiacrypt 2020). Valid for |x| <= R: beyond it S leaves [-1, 1] and explodes.

Source: Zhang, Yang, He, Chen, Lu, Wang, Hou, Liu, Ren, Yang, "Secure Transformer Inference Made Non-interactive", NDSS
2025, with constants as in its public code (high confidence). CKKS at scale 2^40 adds noise far below the error of the
formulas: floating point emulates it, and there is no fixed-point arithmetic to emulate. Everything is in float64 but
activations of float32 and narrower tensors, which are in float32: 1e-5 from float64 at most.

Our constructions: SiLU (same form and recipe, T = 7), and for decoders R and the norm's prescale from calibration, the
row maximum subtracted before exp, d and k from the number of keys. The code has R = 5, d = 0.01, k = 4, no maximum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from lib.approximations.polynomialization import Polynomialization, by_kind, normalise_real, softmax_real
from lib.approximations.technique import State, Statistics, calibrated, check_choice, evaluate_polynomial

GELU_CUT_OFF, SILU_CUT_OFF = 3.5, 7.0
GELU_RANGE = 5.0
GELU = (
    2.25775755e-04, 3.96880960e-01, -6.37042698e-02, 8.38841647e-03, -7.17830961e-04, 3.49617829e-05, -7.26059653e-07,
)  # fmt: skip
"""Coefficients of 1, x^2, x^4, ..., x^12; A adds x/2."""
SILU = (
    5.392212121779e-03, 2.357780482284e-01, -1.408950133500e-02, 6.581920388773e-04, -1.822905292526e-05,
    2.654826149487e-07, -1.559566996187e-09,
)  # fmt: skip
SIGN_G = tuple(c / 1024 for c in (5850, -34974, 97015, -113492, 46623))
SIGN_F = tuple(c / 128 for c in (315, -420, 378, -180, 35))
SHORTFALL_F = tuple(c / 128 for c in (1008, -1680, 1080, -315, 35))
SIGN_STEPS, SIGN_RESOLUTION = 2, 0.0133
SQUARINGS = 7
PRESCALE, ITERATIONS = 0.01, 4
TOLERANCE = 1e-3
LINE = (0.129054537, -1.29054537e-4)
NORM_RANGE = (5.0, 900.0)
"""Where the inverse root holds to 1e-4."""
NORM_SITES = ("norm_attn", "norm_mlp", "norm_attn_post", "norm_mlp_post", "norm_q", "norm_k")


def _wide(x: Tensor, arithmetic: str, least: torch.dtype = torch.float64) -> Tensor:
    """x in its own dtype or in `least`, whichever is wider. ValueError for another arithmetic than "real"."""
    check_choice("nexus", "arithmetic", arithmetic, Nexus.choices["arithmetic"])
    return x.to(torch.promote_types(x.dtype, least))


@torch.no_grad()
def shortfall(z: Tensor, steps: int = SIGN_STEPS) -> Tensor:
    """1 - S(z) for z >= 0, by `steps` times g, then f twice, all odd polynomials of degree 9. Overwrites z.

    At most 1e-3 in size for 0.0133 < z <= 1 (three steps: 0.0023, four: 0.0004); explodes for z > 1. Where S is flat,
    the last step would round 1 - S away in float32: 1 - f(z) = u^5 q(u), u = 1 - z, is the same polynomial and keeps
    its digits.
    """
    square, value = torch.empty_like(z), torch.empty_like(z)
    for coefficients in [SIGN_G] * steps:
        z.mul_(evaluate_polynomial(coefficients, torch.mul(z, z, out=square), value))
    evaluate_polynomial(SIGN_F, torch.mul(z, z, out=square), value)
    u = torch.addcmul(z.new_ones(()), z, value, value=-1, out=z)
    torch.mul(u, u, out=square)
    return evaluate_polynomial(SHORTFALL_F, u, value).mul_(u).mul_(square).mul_(square)


def sign_steps(largest: float, cut_off: float) -> int:
    """Applications of g that resolve a jump at T to about 1: two up to R + T = 75, then one per factor 5.7."""
    missing = math.log(SIGN_RESOLUTION * (largest + cut_off), SIGN_G[0])
    return SIGN_STEPS + max(0, math.ceil(missing))


@torch.no_grad()
def _segments(x: Tensor, even: tuple[float, ...], cut_off: float, largest: float, adapted: bool) -> Tensor:
    """((S+ - S-) E(a) + (S+ + S-) a / 2 + x) / 2 with a = |x|, S+- = S((a +- T) / (R + T)) and E = A - x/2."""
    steps = sign_steps(largest, cut_off) if adapted else SIGN_STEPS
    a = x.abs()
    above, below = (a + cut_off).div_(largest + cut_off), (a - cut_off).div_(largest + cut_off)
    side = below.sign()
    plus, minus = shortfall(torch.stack((above, below.abs_())), steps).unbind()
    minus.mul_(side)  # S+ = 1 - plus, S- = side - minus
    inside = evaluate_polynomial(even, (a.clamp(max=2 * cut_off) if adapted else a).square())
    both = side.add(1).sub_(plus).sub_(minus).mul_(a)
    return side.sub_(1).add_(plus).sub_(minus).mul_(inside).sub_(both, alpha=0.5).sub_(x).mul_(-0.5)


def gelu(x: Tensor, arithmetic: str = "real", largest: float = GELU_RANGE, adapted: bool = False) -> Tensor:
    """GELU for |x| <= largest (R): max error 4.1e-4 at R = 5, 9.8e-4 at R = 32; beyond R it explodes.

    adapted: hold A's argument within 2 T and apply g more often where R is large (`sign_steps`). Neither changes
    anything at R = 32. Without it the rounding of S, times A(x), grows like x^12 and drowns the result above 50 or so.
    Ciphertexts cannot be clamped: a system for such ranges would need a wider A.
    """
    wide = _wide(x, arithmetic, torch.float32)
    return _segments(wide, GELU, GELU_CUT_OFF, largest, adapted).to(x.dtype)


def silu(
    x: Tensor,
    arithmetic: str = "real",
    largest: float = GELU_RANGE * SILU_CUT_OFF / GELU_CUT_OFF,
    adapted: bool = False,
) -> Tensor:
    """SiLU in the form of GELU with T = 7, our construction. Default R: in proportion to GELU's, 10."""
    wide = _wide(x, arithmetic, torch.float32)
    return _segments(wide, SILU, SILU_CUT_OFF, largest, adapted).to(x.dtype)


def exp(x: Tensor, arithmetic: str = "real") -> Tensor:
    """(1 + x/128)^128 without clipping: grows again below -128."""
    base = 1 + _wide(x, arithmetic) * 2.0**-SQUARINGS
    for _ in range(SQUARINGS):
        base = base.square()
    return base.to(x.dtype)


def reciprocal(
    x: Tensor,
    arithmetic: str = "real",
    prescale: float | Tensor = PRESCALE,
    iterations: int = ITERATIONS,
    of_each: Tensor | None = None,
) -> Tensor:
    """1/x for 0 < x < 2 / prescale, by a product of 1 + iterations factors.

    prescale may differ by element, and so may the iterations: `of_each` says how many, up to `iterations`."""
    power = 1 - prescale * _wide(x, arithmetic)
    result = 1 + power
    for i in range(iterations):
        power = power.square()
        product = result * (1 + power)
        result = product if of_each is None else torch.where(of_each > i, product, result)
    return (prescale * result).to(x.dtype)


def softmax_constants(n_keys: Tensor) -> tuple[Tensor, Tensor]:
    """(d, k) for sums in [1, n]: d = 1/n and enough iterations k for (1 - d)^(2^(k+1)) <= 1e-3."""
    n = n_keys.to(torch.float64).clamp(min=1)
    factors = torch.ceil(torch.log2(n * math.log(1 / TOLERANCE))).to(torch.int64)
    return 1 / n, factors - 1


def softmax(scores: Tensor, visible: Tensor, arithmetic: str = "real", published: bool = False) -> Tensor:
    """Softmax over visible keys, scores [..., query, key].

    The maximum is subtracted, and d and k come from the number of keys each query sees (public, and independent of how
    a batch is padded). A visible score more than 256 below the maximum explodes.
    published: no maximum, d = 0.01, k = 4, good for scores within [-10, 0] and sums near 100.
    """
    if not published:
        d, k = softmax_constants(visible.expand_as(scores).sum(-1, keepdim=True))
        most = int(softmax_constants(torch.tensor(scores.shape[-1]))[1])  # not k's maximum: a GPU would be waited for
        exponential = partial(exp, arithmetic=arithmetic)
        inverse = partial(reciprocal, arithmetic=arithmetic, prescale=d, iterations=most, of_each=k)
        return softmax_real(scores, visible, exponential, inverse)
    weights = exp(_wide(scores, arithmetic).masked_fill(~visible, 0)).masked_fill(~visible, 0)
    return (weights * reciprocal(weights.sum(-1, keepdim=True))).to(scores.dtype)


def rsqrt(x: Tensor, arithmetic: str = "real", factor: float = 1.0) -> Tensor:
    """sqrt(K) rsqrt(K x) with K = factor: 1e-4 for K x in [4.7, 929], destroyed towards 0, explodes above 1000."""
    v = factor * _wide(x, arithmetic)
    y = LINE[0] + LINE[1] * v
    for _ in range(4):
        y = 1.5 * y - 0.5 * v * y**3
    root, half = v * y, y / 2
    for _ in range(2):
        rest = 0.5 - root * half
        root, half = root + root * rest, half + half * rest
    return (2 * half * math.sqrt(factor)).to(x.dtype)


def normalise(x: Tensor, arithmetic: str = "real", factor: float = 1.0) -> Tensor:
    """x rsqrt(mean(x^2)) over the last axis, no epsilon. The published LayerNorm subtracts no mean either."""
    return normalise_real(x, partial(rsqrt, arithmetic=arithmetic, factor=factor))


@dataclass(frozen=True)
class Nexus(Polynomialization):
    """NEXUS in a decoder.

    R is range_margin times the largest calibrated |gate| of the layer; a prescale K per norm puts its calibrated mean
    squares, the largest times range_margin too, into [5, 900]. Room above matters: massive activations differ between
    prompts, and the iteration turns its sign above K v = 1000 and explodes soon after. Room costs accuracy below, in
    norms whose mean squares spread widely; docs/methods.md has figures. `published`: the constants of the code, no
    calibration.
    """

    name: ClassVar[str] = "nexus"
    choices = Polynomialization.choices | {"arithmetic": ("real",)}
    arithmetic: str = "real"
    range_margin: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.range_margin < math.inf:
            raise ValueError(f"nexus: range_margin={self.range_margin} is not valid; choose a number of at least 1")

    @property
    def needs_calibration(self) -> bool:
        return not self.published and bool({"activation", "norm"} & set(self.parts))

    def fit(self, statistics: Statistics) -> dict[str, Tensor]:
        """State: R under "3.gate_range", K of every norm the layer has under "3.norm_attn.factor"."""
        state = {}
        if "activation" in self.parts:
            for layer in range(statistics.n_layers):
                largest = statistics.channel_max(layer, "gate").max()
                state[f"{layer}.gate_range"] = (self.range_margin * largest).to(torch.float64)
        if "norm" in self.parts:
            norms = [(layer, site) for layer in range(statistics.n_layers) for site in NORM_SITES]
            for layer, site in [*norms, (-1, "norm_final")]:
                with suppress(KeyError):  # the layer has no such norm
                    low, high = statistics.mean_square(layer, site)
                    state[f"{layer}.{site}.factor"] = norm_factor(low, self.range_margin * high)
        return state

    def operation(self, operation: str, layer: int, state: State | None, site: str = "") -> Callable[..., Tensor]:
        check_choice(self.name, "operation", operation, self.operations)
        if operation == "softmax":
            return partial(softmax, published=self.published)
        if operation == "norm":
            factor = 1.0 if self.published else calibrated(self.name, state, f"{layer}.{site}.factor").item()
            return lambda x, eps: normalise(x, factor=factor)
        settings: dict[str, Any] = {}
        if not self.published:
            settings = {"largest": calibrated(self.name, state, f"{layer}.gate_range").item(), "adapted": True}
        return by_kind(partial(silu, **settings), partial(gelu, **settings))


def norm_factor(smallest: float, largest: float) -> Tensor:
    """K (float64 scalar) that centres mean squares in [5, 900] on a log scale, or else keeps them below 900. Both
    bounds count as 1e-30 at least."""
    smallest, largest = max(smallest, 1e-30), max(largest, 1e-30)
    centred = math.sqrt(math.prod(NORM_RANGE) / (smallest * largest))
    return torch.tensor(min(centred, NORM_RANGE[1] / largest), dtype=torch.float64)
