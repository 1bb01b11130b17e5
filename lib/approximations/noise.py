"""Gaussian and Laplace noise: stand-ins for the error of any approximation.

    x -> x + e,    e ~ N(0, std^2)  or  e ~ Laplace(0, scale), independent for every element and every forward pass

Noise on the output of every norm, the final one included, is what the released code of the studied paper (QuadA, USENIX
Security 2025) calls "LN" noise, and noise on the activation output its "FFN" noise. The same paper fits a normal
distribution to each technique's error at the up-projection and a Laplace distribution at the down-projection.
"""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from lib.approximations.technique import State, Statistics, Step, Technique, Transform, calibrated, check_choice

HISTOGRAMS: dict[str, dict[str, str]] = {
    "norm": {"norm_attn": "attn_in", "norm_mlp": "mlp_in"},
    "norm_final": {},
    "act": {"act": "act"},
    "mlp_in": {"mlp_in": "mlp_in"},
    "mlp_mid": {"mlp_mid": "mlp_mid"},
}
"""Place for noise ("norm": the output of every norm in a block) -> its sites that have a calibrated histogram."""


def central_rms(centers: Tensor, counts: Tensor) -> Tensor:
    """Root mean square (scalar, float32) of a histogram's inner bins: the central 98 % of the values.

    The first and the last bin of `teal.histogram` reach to the extremes, so their centres say nothing about size.
    Equal values fill no inner bin: theirs is the magnitude.
    """
    if centers[1] == centers[-2]:
        return centers[1].float().abs()
    centers, weights = centers[1:-1].double(), counts[1:-1].double()
    return ((centers.square() * weights).sum() / weights.sum()).sqrt().float()


@dataclass(frozen=True)
class Noise(Technique, ABC):
    """Additive noise; the subclasses choose the distribution.

    where: places of `HISTOGRAMS`.
    relative: the level is in units of the activation's own size: at sites with a histogram the calibrated `central_rms`
        of that layer and site; at the other norms, whose output has a nearly constant size, the token's own root mean
        square.
    seed: with layer and site it decides the draws, so the same seed gives the same tokens for the same batches.
    """

    category: ClassVar[str] = "noise"

    where: tuple[str, ...] = ("norm", "norm_final")
    relative: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        where = (self.where,) if isinstance(self.where, str) else self.where
        object.__setattr__(self, "where", tuple(dict.fromkeys(where)))  # twice the same draws would double the noise
        for place in self.where:
            check_choice(self.name, "where", place, tuple(HISTOGRAMS))
        if not (math.isfinite(self.level) and self.level >= 0):
            raise ValueError(f"{self.name}: level {self.level} is not valid; choose a finite number of at least 0")

    @property
    @abstractmethod
    def level(self) -> float:
        """The std or scale, in the activation's units, or in units of its own size if relative."""

    @abstractmethod
    def draw(self, shape: torch.Size, generator: Generator) -> Tensor:
        """A float32 sample of unit level on the generator's device."""

    @property
    def per_token(self) -> bool:
        return False

    @property
    def sites(self) -> tuple[str, ...]:
        return self.where

    @property
    def histograms(self) -> dict[str, str]:
        """Site -> the histogram its level refers to; empty for absolute noise."""
        return {site: of for place in self.where for site, of in HISTOGRAMS[place].items() if self.relative}

    @property
    def needs_calibration(self) -> bool:
        return bool(self.histograms)

    def fit(self, statistics: Statistics) -> dict[str, Tensor]:
        """State: the central root mean square under "layer.site"."""
        return {
            f"{layer}.{site}": central_rms(*statistics.histogram(layer, histogram))
            for layer in range(statistics.n_layers)
            for site, histogram in self.histograms.items()
        }

    def transform(self, site: str, layer: int, state: State | None) -> Transform:
        unit: float | None = None if self.relative else 1.0
        if site in self.histograms:
            unit = float(calibrated(self.name, state, f"{layer}.{site}"))
        seed = zlib.crc32(f"{self.seed}.{layer}.{site}".encode())
        generators: dict[torch.device, Generator] = {}

        def add_noise(x: Tensor, step: Step) -> Tensor:
            if x.device not in generators:
                generators[x.device] = torch.Generator(x.device).manual_seed(seed)
            size = unit if unit is not None else x.float().square().mean(-1, keepdim=True).sqrt()
            return x + (self.level * size * self.draw(x.shape, generators[x.device])).to(x.dtype)

        return add_noise


@dataclass(frozen=True)
class Gaussian(Noise):
    """N(0, std^2) noise. The default std is where the paper's noise sweep peaks for Llama-3.1-8B-Instruct (read off a
    plot).

    laplace_down: scale of Laplace noise at the input of the down-projection besides; with where=("mlp_in",) this is the
        pair by which the paper's Table 1 summarises a technique. Absolute levels only.
    """

    name: ClassVar[str] = "gaussian"

    std: float = 0.075
    laplace_down: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.laplace_down) and self.laplace_down >= 0):
            raise ValueError(f"{self.name}: laplace_down={self.laplace_down} is not valid; choose a finite number >= 0")
        if self.laplace_down and (self.relative or "mlp_mid" in self.where):
            raise ValueError(f"{self.name}: laplace_down is absolute and needs mlp_mid for itself: drop one of them")

    @property
    def sites(self) -> tuple[str, ...]:
        return (*self.where, "mlp_mid") if self.laplace_down else self.where

    def transform(self, site: str, layer: int, state: State | None) -> Transform:
        if self.laplace_down and site == "mlp_mid":
            return Laplace(where=("mlp_mid",), scale=self.laplace_down, seed=self.seed).transform(site, layer, state)
        return super().transform(site, layer, state)

    @property
    def level(self) -> float:
        return self.std

    def draw(self, shape: torch.Size, generator: Generator) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)


@dataclass(frozen=True)
class Laplace(Noise):
    """Laplace(0, scale) noise, standard deviation sqrt(2) scale. The default scale is the one the paper fits to
    SmoothQuant W16A4 at the down-projection."""

    name: ClassVar[str] = "laplace"

    where: tuple[str, ...] = ("mlp_mid",)
    scale: float = 0.024

    @property
    def level(self) -> float:
        return self.scale

    def draw(self, shape: torch.Size, generator: Generator) -> Tensor:
        """-sign(u) log(1 - |u|) with u uniform on (-1, 1) is Laplace(0, 1)."""
        u = torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float32).mul_(2).sub_(1)
        return torch.log1p(u.abs().clamp_(max=1 - 2**-24).neg_()).copysign_(u)
