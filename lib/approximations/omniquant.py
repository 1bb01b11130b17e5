"""OmniQuant: asymmetric rounding with a learnable equivalent transformation (Shao et al., ICLR 2024, arXiv 2308.13137).

    h = (max x - min x) / (2^bits - 1),  z = round(-min x / h),  Q(x) = (clamp(round(x / h) + z, 0, 2^bits - 1) - z) h

Scales s per channel are learned block by block so that the rounded block gives the dense block's output (paper, section
3.3). The method absorbs them into norms and weights. The weights keep 16 bits here, so, as for SmoothQuant, nothing
needs to be absorbed and the same function is had by transforms alone:

    attn_in, mlp_in: s Q(x / s)     attn_out, v: s Q(x / s), one s     q: s Q(q / s),  k: Q(s k) / s     mlp_mid: Q(x)

Attention is linear in v for every channel and sees q and k as products only, so these equal the absorbed form. q, k and
v are rounded per token and head, q and k after rotary embedding. Two choices of ours make the scales exact where the
released code is not: one scale per key/value channel serves all query heads of its group, and the two channels of a
rotated pair (i and i + head_dim/2) share theirs. Learnable weight clipping acts on rounded weights only: with 16-bit
weights it is inert and left out, and so are the shifts, which the released code does not use for Llama-type models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from lib.approximations.smoothquant import check_bits, smoothing_scales
from lib.approximations.technique import State, Statistics, Step, Technique, Transform, calibrated

SCALE_OF = {
    "attn_in": "attn_in",
    "attn_out": "v",
    "mlp_in": "mlp_in",
    "q_rotary": "qk",
    "k_rotary": "qk",
    "v_heads": "v",
}
"""Site -> name of its scales; mlp_mid has none, because the product SiLU(gate) up blocks the absorption."""

SMALLEST_SCALE = 0.01
TRAINING_WINDOWS = 16  # of the calibration text; one optimiser step each


def quantize(x: Tensor, bits: int) -> Tensor:
    """x rounded to 2^bits levels between minimum and maximum of each slice along the last dimension; shape, dtype of x.

    The range need not contain 0. Gradients pass straight through the rounding of x / h and through h, not through z
    (released code, as are the bounds of h and z, except that the one of z grows with the levels: its 1e4 would cut off
    zero-centred tokens above 13 bits). 16 bits or more return x. Arithmetic in float32.
    """
    check_bits("quantize", bits)
    if bits >= 16:
        return x
    values, levels = x.float(), 2**bits - 1
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    step_size = ((high - low) / levels).clamp(1e-5, 1e4)
    limit = max(1e4, levels)
    zero = (-low / step_size).clamp(-limit, limit).round()
    codes = values / step_size
    codes = codes + (codes.round() - codes).detach() if codes.requires_grad else codes.round_()
    return codes.add_(zero).clamp_(0, levels).sub_(zero).mul_(step_size).to(x.dtype)


def spread_scales(scales: Tensor, site: str, shape: torch.Size) -> Tensor:
    """Scales shaped to divide the tensor at a site.

    attn_in, mlp_in: [channels] as they are. v [kv_heads, head_dim] becomes [heads, 1, head_dim] at v_heads and
    [heads * head_dim] at attn_out; qk [kv_heads, head_dim / 2] becomes [heads, 1, head_dim], both halves alike.
    Each key/value head's scales serve all query heads of its group.
    """
    if site in ("attn_in", "mlp_in"):
        return scales
    if SCALE_OF[site] == "qk":
        scales = torch.cat([scales, scales], dim=-1)
    n_heads = shape[-1] // scales.shape[-1] if site == "attn_out" else shape[1]
    per_head = scales.repeat_interleave(n_heads // scales.shape[0], dim=0)
    return per_head.flatten() if site == "attn_out" else per_head.unsqueeze(1)


def initial_scales(statistics: Statistics, layer: int, alpha: float) -> dict[str, Tensor]:
    """Scales before training, float32: SmoothQuant's formula with the weights of q, of o and of up alone; ones for qk.

    For v the maxima over the query heads of a group stand for its key/value channel (our choice, see above).
    """
    head_dim = statistics.head_dim
    kv_heads = statistics.channel_max(layer, "v").numel() // head_dim

    def group_max(per_channel: Tensor) -> Tensor:
        return per_channel.reshape(kv_heads, -1, head_dim).amax(1)

    def scales(site: str, projection: str) -> tuple[Tensor, Tensor]:
        return statistics.channel_max(layer, site), statistics.weight_max(layer, projection)

    attn_out, weight = scales("attn_out", "o")
    return {
        "attn_in": smoothing_scales(*scales("attn_in", "q"), alpha),
        "mlp_in": smoothing_scales(*scales("mlp_in", "up"), alpha),
        "v": smoothing_scales(group_max(attn_out), group_max(weight), alpha),
        "qk": torch.ones(kv_heads, head_dim // 2),
    }


def keep_from_zero(scales: Tensor) -> Tensor:
    """Scales of magnitude below 0.01 pushed to 0.01, keeping their sign (0 goes up)."""
    return torch.where(scales < 0, scales.clamp(max=-SMALLEST_SCALE), scales.clamp(min=SMALLEST_SCALE))


def train_block(
    run_block: Callable[[dict[str, Tensor], Tensor], Tensor],
    initial: dict[str, Tensor],
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    auxiliary_targets: Sequence[Tensor] | None = None,
    *,
    epochs: int = 20,
    learning_rate: float = 5e-3,
    block: str = "block",
) -> dict[str, Tensor]:
    """Trained scales of one block (paper, section 3.1; optimiser settings of the released code).

    run_block(scales, x): the block with rounded activations, differentiable in the scales, which alone get gradients.
    inputs: hidden states [1, seq, hidden] that leave the rounded blocks before; one optimiser step each.
    targets: the dense block's output on dense inputs; auxiliary_targets: the dense block's output on `inputs`, which
    adds the loss that the released code calls aug_loss.
    AdamW without weight decay, constant learning rate, mean squared error. Raises FloatingPointError naming `block`
    when the loss is not finite.
    """
    scales = {name: keep_from_zero(value.detach().float()).requires_grad_() for name, value in initial.items()}
    optimiser = torch.optim.AdamW(scales.values(), lr=learning_rate, weight_decay=0.0)
    for epoch in range(epochs):
        for i, (x, target) in enumerate(zip(inputs, targets, strict=True)):
            with torch.enable_grad():
                output = run_block(scales, x)
                loss = mse_loss(output.float(), target.float())
                if auxiliary_targets is not None:
                    loss = loss + mse_loss(output.float(), auxiliary_targets[i].float())
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"omniquant diverges: loss {loss.item()} in {block}, epoch {epoch}")
            optimiser.zero_grad()
            loss.backward(inputs=list(scales.values()))
            optimiser.step()
            with torch.no_grad():
                for value in scales.values():
                    value.copy_(keep_from_zero(value))
    return {name: value.detach() for name, value in scales.items()}


@dataclass(frozen=True)
class OmniQuant(Technique):
    """OmniQuant with 16-bit weights (W16An).

    bits: of the activations; 16 or more change nothing. alpha: of the initial scales.
    smooth: False leaves plain asymmetric rounding. train: False keeps the initial scales. Both are baselines.
    attention: also rounds q, k and v, per token and head.
    epochs, learning_rate, aug_loss: of the training, see `train_block`; 1e-3 with alpha 0.75 where it diverges.
    """

    name: ClassVar[str] = "omniquant"
    category: ClassVar[str] = "quantization"

    bits: int = 8
    alpha: float = 0.5
    smooth: bool = True
    train: bool = True
    attention: bool = True
    epochs: int = 20
    learning_rate: float = 5e-3
    aug_loss: bool = False

    def __post_init__(self) -> None:
        check_bits(self.name, self.bits)
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"omniquant: alpha={self.alpha} is not valid; choose a number within [0, 1]")
        if not (self.epochs >= 1 and self.learning_rate > 0):
            raise ValueError(f"omniquant: epochs={self.epochs} and learning_rate={self.learning_rate} must be positive")

    @property
    def sites(self) -> tuple[str, ...]:
        """q_rotary, k_rotary, v_heads: [batch, heads or kv heads, new tokens, head_dim], after rotary embedding."""
        heads = ("q_rotary", "k_rotary", "v_heads") if self.attention else ()
        return ("attn_in", "attn_out", "mlp_in", "mlp_mid", *heads)

    @property
    def needs_calibration(self) -> bool:
        return self.smooth and self.bits < 16

    @torch.no_grad()
    def fit(self, statistics: Statistics) -> dict[str, Tensor]:
        """State: "layer.name" -> scales, with the names of `SCALE_OF` and shapes as in `spread_scales`.

        FloatingPointError where the training diverges (`train_block`)."""
        state: dict[str, Tensor] = {}
        inputs: list[Tensor] = []  # what leaves the rounded blocks before
        for layer in range(statistics.n_layers):
            scales = initial_scales(statistics, layer, self.alpha)
            if self.train:
                inputs = inputs or list(statistics.dense_inputs(0)[:TRAINING_WINDOWS].split(1))
                scales = self._trained(statistics, layer, scales, inputs)
                inputs = [self._rounded(statistics, layer, scales, x) for x in inputs]
            state |= {f"{layer}.{name}": value for name, value in scales.items()}
        return state

    def _rounded(self, statistics: Statistics, layer: int, scales: dict[str, Tensor], x: Tensor) -> Tensor:
        """The block's output with rounded activations."""
        return statistics.run_block(layer, x, self, {f"{layer}.{name}": value for name, value in scales.items()})

    def _trained(
        self, statistics: Statistics, layer: int, initial: dict[str, Tensor], inputs: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """The block's scales trained towards the exact block's output on what the exact blocks before give it."""
        dense = statistics.dense_inputs(layer)[:TRAINING_WINDOWS]
        return train_block(
            partial(self._rounded, statistics, layer),
            initial,
            inputs,
            statistics.run_block(layer, dense).split(1),
            [statistics.run_block(layer, x) for x in inputs] if self.aug_loss else None,
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            block=f"block {layer}",
        )

    def transform(self, site: str, layer: int, state: State | None) -> Transform:
        if self.bits >= 16:
            return lambda x, step: x
        if not self.smooth or site not in SCALE_OF:
            return lambda x, step: quantize(x, self.bits)
        scales = calibrated(self.name, state, f"{layer}.{SCALE_OF[site]}")

        @lru_cache(maxsize=4)
        def spread(shape: torch.Size, device: torch.device) -> Tensor:
            return spread_scales(scales.to(device), site, shape)

        def scale_and_round(x: Tensor, step: Step) -> Tensor:
            factor = spread(x.shape, x.device)
            if site == "k_rotary":
                return quantize(x.float() * factor, self.bits).div_(factor).to(x.dtype)
            return quantize(x.float() / factor, self.bits).mul_(factor).to(x.dtype)

        return scale_and_round
