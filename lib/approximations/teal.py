"""TEAL: training-free activation sparsity by magnitude (Liu et al., ICLR 2025, arXiv 2408.14690).

    S_t(x) = x where |x| > t, else 0                       one fixed threshold t per layer and projection input

A target sparsity s sets t as the (0.5 + s/2) quantile of x in a calibration histogram: the s-quantile of |x| where x is
symmetric around 0. *Uniform* gives every projection the same s; *greedy* spreads a block's budget over its
seven projections by the error each makes in the block's output (paper, block-wise greedy optimisation; rules as in the
released code). The released evaluation leaves the first half of a prompt dense, its fast inference all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from statistics import NormalDist
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from lib.approximations.technique import State, Statistics, Step, Technique, Transform, calibrated, check_choice

BINS = 10_000
SEARCH_TOKENS = 512  # of the calibration text, on which the greedy search measures errors
GREEDY_TARGET = 0.9  # of a block, where the search ends

SITES = {
    "q": "attn_in.q",
    "k": "attn_in.k",
    "v": "attn_in.v",
    "o": "attn_out",
    "gate": "mlp_in.gate",
    "up": "mlp_in.up",
    "down": "mlp_mid",
}
"""Projection -> the site it reads."""

PAPER_THRESHOLDS = {0.1: (0.04, 0.003), 0.25: (0.11, 0.007), 0.5: (0.24, 0.017), 0.9: (0.57, 0.055)}
"""Sparsity -> thresholds at (mlp_in, mlp_mid) for all layers, as the studied paper prints them (QuadA, Table 1)."""


def histogram(values: Tensor) -> tuple[Tensor, Tensor]:
    """TEAL's histogram of values of any shape: (centers float32 [10000], counts int64 [10000]).

    One bin from the minimum to the 1st percentile, 9,998 equal bins up to the 99th, one to the maximum; a centre is
    the midpoint of its edges, in the two wide outer bins too. Raises ValueError on an empty or non-finite tensor.
    """
    values = values.detach().flatten().float()
    on_cpu = values.device.type == "cpu"  # where NumPy sorts ten times faster
    values = torch.from_numpy(np.sort(values.numpy())) if on_cpu else values.sort().values
    n = len(values)
    if n == 0 or not torch.isfinite(values[[0, -1]]).all():
        raise ValueError(f"histogram: {n} values of which the extremes must be finite")
    cut = math.floor(0.01 * n)
    inner = torch.linspace(float(values[cut]), float(values[min(n - cut, n - 1)]), BINS - 1, device=values.device)
    edges = torch.cat([values[:1], inner, values[-1:]])
    below = torch.searchsorted(values, inner)
    counts = torch.diff(below, prepend=below.new_zeros(1), append=below.new_full((1,), n))
    return (edges[:-1] + edges[1:]) / 2, counts


def threshold(centers: Tensor, counts: Tensor, sparsity: float) -> Tensor:
    """Threshold (float32 scalar) for a target sparsity from a histogram: centers [bins], counts [bins].

    The value at cumulative probability 0.5 + sparsity/2, interpolated between bin centres in float32, exactly as the
    released code does it: half a bin low, slightly negative where x is skewed, and the last centre for a sparsity of
    1 or more. 0 for sparsity 0. Raises ValueError below 0.
    """
    if not sparsity >= 0:
        raise ValueError(f"threshold: sparsity={sparsity} is not valid; choose a number of at least 0")
    centers = centers.float()
    if sparsity == 0:
        return centers.new_zeros(())
    cumulative = counts.float().cumsum(0)
    wanted = (0.5 + sparsity / 2) * cumulative[-1]
    k = int(torch.searchsorted(cumulative, wanted))
    if k in (0, len(centers)):
        return centers[0 if k == 0 else -1].clone()
    share = (wanted - cumulative[k - 1]) / (cumulative[k] - cumulative[k - 1])
    return centers[k - 1] + share * (centers[k] - centers[k - 1])


def paper_threshold(sparsity: float, site: str) -> float:
    """The studied paper's threshold at mlp_in or mlp_mid, one for all layers.

    At levels the paper does not list, the quantile of |x| for the distributions it names: N(0, 0.35^2) at mlp_in and
    Laplace(0, 0.024) at mlp_mid, which reproduce its printed values.
    """
    if sparsity in PAPER_THRESHOLDS:
        mlp_in, mlp_mid = PAPER_THRESHOLDS[sparsity]
        return mlp_mid if site == "mlp_mid" else mlp_in
    if site == "mlp_mid":
        return -0.024 * math.log1p(-sparsity)
    return NormalDist(0.0, 0.35).inv_cdf(0.5 + sparsity / 2)


def sparsify(x: Tensor, threshold: float | Tensor) -> Tensor:
    """x with the entries of |x| <= threshold (a scalar) set to 0, compared in float32; NaN stays NaN."""
    return hardshrink(x.float(), float(threshold)).to(x.dtype)


Trace = dict[str, Tensor]
"""Record of one greedy search, float64, a row per step.

sparsities [steps, projections], in the order of `SITES`; effective [steps], of the whole block; errors [steps].
"""


def greedy_allocation(
    block_error: Callable[[dict[str, float]], float],
    weights: Mapping[str, float],
    step: float = 0.05,
    target: float = GREEDY_TARGET,
) -> Trace:
    """Spread a block's sparsity over its projections: always raise the one that costs the least error.

    block_error: sparsity of each projection -> error of the block's output, see `activation_error`.
    weights: relative parameter counts, with 1 for q, in the order of the trace's columns. A step adds step / weight to
    one projection and the same step / sum(weights) to the block's effective sparsity, until that reaches target. A
    projection at 1 or more is left alone.
    """
    if not (step > 0 and 0 < target <= 1):
        raise ValueError(f"greedy_allocation: step={step} must be positive and target={target} within (0, 1]")
    taken = dict.fromkeys(weights, 0)
    rows: list[list[int]] = []
    errors: list[float] = []

    def error_with(projection: str) -> float:
        tried = {**taken, projection: taken[projection] + 1}
        return block_error({name: n * step / weights[name] for name, n in tried.items()})

    while len(rows) * step / sum(weights.values()) < target:
        candidates = {name: error_with(name) for name, n in taken.items() if n * step / weights[name] < 1}
        best = min(candidates, key=candidates.__getitem__)
        taken[best] += 1
        rows.append(list(taken.values()))
        errors.append(candidates[best])
    sizes = torch.tensor(list(weights.values()), dtype=torch.float64)
    sparsities = torch.tensor(rows) * (step / sizes)
    effective = sparsities @ sizes / sizes.sum()
    return {"sparsities": sparsities, "effective": effective, "errors": torch.tensor(errors, dtype=torch.float64)}


def activation_error(output: Tensor, reference: Tensor) -> Tensor:
    """Error of block outputs [windows, seq, channels] in the last quarter of each window, a scalar.

    Euclidean norm of the difference along the tokens for every channel, averaged over channels and windows. It grows
    with the square root of the number of tokens.
    """
    start = int(0.75 * reference.shape[1])
    return (output - reference)[:, start:].float().norm(dim=1).mean()


def allocate(trace: Trace, target: float) -> dict[str, float]:
    """Sparsity of each projection of `SITES` in the recorded row whose effective sparsity is nearest to target.

    Of two equally near rows the sparser one, where the released code lets rounding errors decide.
    """
    distance = (trace["effective"] - target).abs()
    row = int((distance <= distance.min() + 1e-9).nonzero()[-1])
    return dict(zip(SITES, trace["sparsities"][row].tolist(), strict=True))


def layer_thresholds(statistics: Statistics, layer: int, sparsities: Mapping[str, float]) -> dict[str, Tensor]:
    """State of one layer: "layer.site" -> threshold for the sparsity of the projection that reads the site."""
    return {
        f"{layer}.{SITES[name]}": threshold(*statistics.histogram(layer, SITES[name].partition(".")[0]), sparsity)
        for name, sparsity in sparsities.items()
    }


@torch.no_grad()
def greedy_search(statistics: Statistics, layer: int) -> Trace:
    """`greedy_allocation` on this layer's real block with dense inputs. ValueError for a mixture of experts."""
    sizes = statistics.parameters(layer)
    if set(SITES) - set(sizes):
        raise ValueError("teal: allocation='greedy' needs blocks of seven linear layers; choose uniform")
    windows = statistics.dense_inputs(layer)
    inputs = windows[: max(1, SEARCH_TOKENS // windows.shape[1])]
    reference = statistics.run_block(layer, inputs)

    @cache
    def thresholds(projection: str, sparsity: float) -> dict[str, Tensor]:
        return layer_thresholds(statistics, layer, {projection: sparsity})

    def block_error(sparsities: dict[str, float]) -> float:
        state = {key: value for tried in sparsities.items() for key, value in thresholds(*tried).items()}
        return float(activation_error(statistics.run_block(layer, inputs, Teal(), state), reference))

    return greedy_allocation(block_error, {name: sizes[name] / sizes["q"] for name in SITES})


@dataclass(frozen=True)
class Teal(Technique):
    """TEAL at one sparsity.

    sparsity: target share of zeros within [0, 1); above about 0.98 the histogram's outer bins blur the threshold.
    allocation: "uniform", or "greedy", whose search ends at 0.9.
    prompt: the part of a prompt that is sparsified: "last_half" (released evaluation), "all" or "decode" (none).
    thresholds: "calibrated", or "paper" for the studied paper's global pair at mlp_in and mlp_mid, which is not TEAL.
    """

    name: ClassVar[str] = "teal"
    category: ClassVar[str] = "sparsification"

    sparsity: float = 0.5
    allocation: str = "uniform"
    prompt: str = "last_half"
    thresholds: str = "calibrated"

    def __post_init__(self) -> None:
        check_choice(self.name, "allocation", self.allocation, ("uniform", "greedy"))
        check_choice(self.name, "prompt", self.prompt, ("last_half", "all", "decode"))
        check_choice(self.name, "thresholds", self.thresholds, ("calibrated", "paper"))
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"teal: sparsity={self.sparsity} is not valid; choose a number within [0, 1)")
        if self.thresholds == "paper" and self.allocation == "greedy":
            raise ValueError("teal: allocation='greedy' is not valid with thresholds='paper'; choose uniform")
        if self.allocation == "greedy" and self.sparsity > GREEDY_TARGET:
            raise ValueError(f"teal: greedy sparsity={self.sparsity} is not valid; choose at most {GREEDY_TARGET}")

    @property
    def whole_prompt(self) -> bool:
        return self.prompt == "last_half"

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(site for site in SITES.values() if self.thresholds == "calibrated" or site.startswith("mlp"))

    @property
    def needs_calibration(self) -> bool:
        return self.thresholds == "calibrated"

    def fit(self, statistics: Statistics) -> dict[str, Tensor]:
        """State: "layer.site" -> threshold, of every layer. ValueError for a greedy search in a mixture of experts."""
        state: dict[str, Tensor] = {}
        for layer in range(statistics.n_layers):
            sparsities = dict.fromkeys(SITES, self.sparsity)
            if self.allocation == "greedy" and self.sparsity > 0:
                trace = statistics.kept(f"greedy{layer}", partial(greedy_search, statistics, layer))
                sparsities = allocate(trace, self.sparsity)
            state |= layer_thresholds(statistics, layer, sparsities)
        return state

    def transform(self, site: str, layer: int, state: State | None) -> Transform:
        """Zeroes what is small: in decode steps always, of a prompt's n tokens the last floor(n/2), all or none."""
        if self.thresholds == "paper":
            cutoff = paper_threshold(self.sparsity, site.partition(".")[0])
        else:
            cutoff = float(calibrated(self.name, state, f"{layer}.{site}"))

        def zero_small(x: Tensor, step: Step) -> Tensor:
            if cutoff <= 0 or (step.prefill and self.prompt == "decode"):
                return x
            if step.prefill and self.prompt == "last_half":
                return torch.where(step.second_half.unsqueeze(-1), sparsify(x, cutoff), x)
            return sparsify(x, cutoff)

        return zero_small
