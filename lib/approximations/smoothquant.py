"""SmoothQuant: per-channel smoothing, then symmetric rounding (Xiao et al., ICML 2023, arXiv 2211.10438).

    s_j = max|X_j|^alpha / max|W_j|^(1-alpha)              per input channel j of the projections that read X
    Q(t) = round(t / d) d,   d = max|t| / (2^(bits-1) - 1)

The method folds 1/s into the norm before and s into the weights behind. Here the weights keep 16 bits, so they need not
be touched at all: (W diag(s)) Q(x / s) = W (s Q(x / s)), and the whole technique is the transform x -> s Q(x / s) at
`attn_in` and `mlp_in`. It equals folding up to the rounding of the model's dtype. The inputs of o and down are rounded
without smoothing, as in the released code.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lib.approximations.technique import State, Statistics, Step, Technique, Transform, calibrated, check_choice

SMOOTHED = {"attn_in": ("q", "k", "v"), "mlp_in": ("gate", "up", "router")}
"""Site -> what reads it and so shares its smoothing scales; the router only in a mixture of experts."""


def smoothing_scales(act_max: Tensor, weight_max: Tensor, alpha: float) -> Tensor:
    """s = act_max^alpha / weight_max^(1-alpha) per channel, float32 [channels].

    act_max, weight_max: largest magnitude per input channel of the activations and of all weights that read them.
    weight_max and s are kept at 1e-5 or above (paper, equation 4; floors from the released code).
    """
    weights = weight_max.float().clamp(min=1e-5)
    return (act_max.float() ** alpha / weights ** (1 - alpha)).clamp(min=1e-5)


def check_bits(technique: str, bits: int) -> None:
    """ValueError unless the bits can hold a quantizer."""
    if not (isinstance(bits, int) and bits >= 2):
        raise ValueError(f"{technique}: bits={bits} is not valid; choose a whole number of at least 2")


def quantize(x: Tensor, bits: int, per: str = "token", scale: float | Tensor | None = None) -> Tensor:
    """x rounded to 2^bits - 1 symmetric levels, to nearest even, without zero point; same shape and dtype.

    per: "token" takes one step size per slice along the last dimension, "tensor" one for all, "static" the given
    `scale`, beyond whose range values saturate. 16 bits or more return x. Arithmetic in float32.
    """
    check_bits("quantize", bits)
    check_choice("quantize", "per", per, ("token", "tensor", "static"))
    if bits >= 16:
        return x
    values, largest = x.float(), 2 ** (bits - 1) - 1
    if per == "static":
        if scale is None:
            raise ValueError("quantize: per='static' needs a scale")
        return (values / scale).round_().clamp_(-largest, largest).mul_(scale).to(x.dtype)
    peak = values.abs().amax(-1, keepdim=True) if per == "token" else values.abs().amax()
    step_size = peak.clamp(min=1e-5) / largest
    return (values / step_size).round_().mul_(step_size).to(x.dtype)


@dataclass(frozen=True)
class SmoothQuant(Technique):
    """SmoothQuant with 16-bit weights (W16An).

    bits: of the activations; 16 or more change nothing. alpha: migration strength; `lib.registry` has each model's.
    per: "token" and "tensor" measure the range as they run, "static" takes it from calibration.
    smooth: False leaves plain symmetric rounding, the baseline.
    attention: also rounds the outputs of q, k and v, before rotary embedding and across all heads.
    """

    name: ClassVar[str] = "smoothquant"
    category: ClassVar[str] = "quantization"

    bits: int = 8
    alpha: float = 0.85
    per: str = "token"
    smooth: bool = True
    attention: bool = False

    def __post_init__(self) -> None:
        check_bits(self.name, self.bits)
        check_choice(self.name, "per", self.per, ("token", "tensor", "static"))
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"smoothquant: alpha={self.alpha} is not valid; choose a number within [0, 1]")

    @property
    def per_token(self) -> bool:
        return self.per != "tensor"

    @property
    def sites(self) -> tuple[str, ...]:
        return ("attn_in", "attn_out", "mlp_in", "mlp_mid", *(("q", "k", "v") if self.attention else ()))

    @property
    def needs_calibration(self) -> bool:
        return self.bits < 16 and (self.smooth or self.per == "static")

    def fit(self, statistics: Statistics) -> dict[str, Tensor]:
        """State: "layer.site" -> smoothing scales [channels] at smoothed sites; "layer.site.scale" -> static step."""
        state: dict[str, Tensor] = {}
        for layer in range(statistics.n_layers):
            for site in self.sites:
                peak = statistics.channel_max(layer, site).float()
                if self.smooth and site in SMOOTHED:
                    weights = []
                    for reader in SMOOTHED[site]:
                        with suppress(KeyError):  # the layer has no router
                            weights.append(statistics.weight_max(layer, reader))
                    smoothing = smoothing_scales(peak, torch.stack(weights).amax(0), self.alpha)
                    state[f"{layer}.{site}"] = smoothing
                    peak = peak / smoothing
                if self.per == "static":
                    state[f"{layer}.{site}.scale"] = peak.amax().clamp(min=1e-5) / (2 ** (self.bits - 1) - 1)
        return state

    def transform(self, site: str, layer: int, state: State | None) -> Transform:
        if self.bits >= 16:
            return lambda x, step: x
        key = f"{layer}.{site}"
        smoothing = calibrated(self.name, state, key) if self.smooth and site in SMOOTHED else None
        scale = float(calibrated(self.name, state, f"{key}.scale")) if self.per == "static" else None

        def smooth_and_round(x: Tensor, step: Step) -> Tensor:
            if smoothing is None:
                return quantize(x, self.bits, self.per, scale)
            factor = smoothing.to(x.device)
            return quantize(x.float() / factor, self.bits, self.per, scale).mul_(factor).to(x.dtype)

        return smooth_and_round
