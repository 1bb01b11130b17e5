"""CATS: contextually-aware thresholding for sparsity (Lee et al., COLM 2024, arXiv 2404.08763).

    a = SiLU(W_gate x),    a -> a where |a| > t, else 0,    y = W_down (a * W_up x)

One threshold per layer, the s-quantile of |a| on calibration text. Every position is treated, prompts included, and
nothing but the gate branch: a sparsity s of `act` is s (w_up + w_down) / sum(w) of the whole block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lib.approximations.teal import sparsify
from lib.approximations.technique import State, Statistics, Step, Technique, Transform, calibrated


def bin_edges(centers: Tensor) -> Tensor:
    """Edges float64 [bins + 1] of a histogram with equal inner bins and two outer bins of their own width."""
    centers = centers.double().cpu()
    half = (centers[-2] - centers[1]) / (len(centers) - 3) / 2
    inner = torch.linspace(float(centers[1] - half), float(centers[-2] + half), len(centers) - 1, dtype=torch.float64)
    return torch.cat([2 * centers[:1] - inner[:1], inner, 2 * centers[-1:] - inner[-1:]])


def threshold(centers: Tensor, counts: Tensor, sparsity: float) -> Tensor:
    """The sparsity-quantile (float32 scalar) of |a| from the histogram of the signed a: centers [bins], counts [bins].

    Counts are spread evenly within their bins. The released code takes the left edge of a bin of width 2e-4 instead,
    which is the same to within that bin. 0 for sparsity 0. Where the central 98 % of the values are equal, their
    magnitude.
    """
    if sparsity == 0:
        return torch.zeros(())
    if centers[1] == centers[-2]:
        return centers[1].float().cpu().abs()
    edges = bin_edges(centers).numpy()
    below = np.concatenate([[0.0], counts.double().cpu().cumsum(0).numpy()])
    magnitudes = np.sort(np.abs(np.append(edges, 0.0)))
    within = np.interp(magnitudes, edges, below) - np.interp(-magnitudes, edges, below)
    wanted = sparsity * below[-1]
    k = int(np.searchsorted(within, wanted))
    share = (wanted - within[k - 1]) / (within[k] - within[k - 1])
    return torch.tensor(magnitudes[k - 1] + share * (magnitudes[k] - magnitudes[k - 1]), dtype=torch.float32)


@dataclass(frozen=True)
class Cats(Technique):
    """CATS at one sparsity of the activation output (not of the block), within [0, 1)."""

    name: ClassVar[str] = "cats"
    category: ClassVar[str] = "sparsification"

    sparsity: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"cats: sparsity={self.sparsity} is not valid; choose a number within [0, 1)")

    @property
    def sites(self) -> tuple[str, ...]:
        return ("act",)

    @property
    def needs_calibration(self) -> bool:
        return True

    def fit(self, statistics: Statistics) -> dict[str, Tensor]:
        """State: the threshold of every layer under "layer.act"."""
        return {
            f"{layer}.act": threshold(*statistics.histogram(layer, "act"), self.sparsity)
            for layer in range(statistics.n_layers)
        }

    def transform(self, site: str, layer: int, state: State | None) -> Transform:
        cutoff = float(calibrated(self.name, state, f"{layer}.{site}"))

        def zero_small(x: Tensor, step: Step) -> Tensor:
            return sparsify(x, cutoff) if cutoff > 0 else x

        return zero_small
