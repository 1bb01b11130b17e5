"""A random pre-norm decoder block in plain torch whose named sites can be edited, and its calibration statistics."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lib.approximations import teal
from lib.approximations.technique import State, Step, Technique

HEAD, HEADS, KV_HEADS, INTERMEDIATE = 8, 4, 2, 48
HIDDEN = HEAD * HEADS
SHAPES = {
    "q": (HIDDEN, HIDDEN),
    "k": (HEAD * KV_HEADS, HIDDEN),
    "v": (HEAD * KV_HEADS, HIDDEN),
    "o": (HIDDEN, HIDDEN),
    "gate": (INTERMEDIATE, HIDDEN),
    "up": (INTERMEDIATE, HIDDEN),
    "down": (HIDDEN, INTERMEDIATE),
}
Edit = Callable[[str, Tensor], Tensor]


def rotate(x: Tensor) -> Tensor:
    """Rotary embedding of x [batch, heads, seq, head]."""
    angles = torch.arange(x.shape[2])[:, None] * 100.0 ** -torch.arange(0, 1, 2 / HEAD)
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], -1) * sin


class TinyBlock:
    """Grouped-query attention and a gated MLP; two channels of each norm are outliers, as in real models."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weights = {
            name: torch.randn(shape, generator=generator) / shape[1] ** 0.5 for name, shape in SHAPES.items()
        }
        self.norms = {name: torch.ones(HIDDEN) for name in ("attn", "mlp")}
        for norm in self.norms.values():
            norm[[3, 17]] = torch.tensor([12.0, 30.0])

    def __call__(self, x: Tensor, edit: Edit = lambda site, t: t) -> Tensor:
        """x [batch, seq, hidden] -> [batch, seq, hidden], each named tensor passed through edit."""
        w, batch, seq = self.weights, x.shape[0], x.shape[1]

        def project(site: str, name: str, t: Tensor) -> Tensor:
            return F.linear(edit(f"{site}.{name}", t), w[name])

        def heads(t: Tensor) -> Tensor:
            t = t.reshape(batch, seq, -1, HEAD).transpose(1, 2)
            return t.repeat_interleave(HEADS // t.shape[1], dim=1)

        attn_in = edit("attn_in", F.rms_norm(x, (HIDDEN,), self.norms["attn"]))
        q, k, v = (edit(name, project("attn_in", name, attn_in)) for name in "qkv")
        q, k = edit("q_rotary", rotate(heads(q))), edit("k_rotary", rotate(heads(k)))
        out = F.scaled_dot_product_attention(q, k, edit("v_heads", heads(v)), is_causal=True)
        x = x + F.linear(edit("attn_out", out.transpose(1, 2).reshape(batch, seq, -1)), w["o"])
        mlp_in = edit("mlp_in", F.rms_norm(x, (HIDDEN,), self.norms["mlp"]))
        act = edit("act", F.silu(edit("gate", project("mlp_in", "gate", mlp_in))))
        return x + F.linear(edit("mlp_mid", act * project("mlp_in", "up", mlp_in)), w["down"])


def applied(technique: Technique, state: State | None, step: Step | None = None, layer: int = 0) -> Edit:
    """The edit that puts the technique in every site of its own; all positions are real unless a step is given."""

    def edit(site: str, t: Tensor) -> Tensor:
        now = step or Step(torch.ones(t.shape[:2], dtype=torch.bool), prefill=True)
        return technique.transform(site, layer, state)(t, now) if site in technique.sites else t

    return edit


class TinyStatistics:
    """Statistics of one TinyBlock on x [batch, seq, hidden]."""

    n_layers, head_dim = 1, HEAD

    def __init__(self, block: TinyBlock, x: Tensor) -> None:
        self.block, self.x = block, x
        self.stored: dict[str, dict[str, Tensor]] = {}
        self.seen: dict[str, Tensor] = {}
        self.histograms: dict[str, tuple[Tensor, Tensor]] = {}

        def note(site: str, t: Tensor) -> Tensor:
            self.seen[site] = t
            return t

        self.reference = block(x, note)

    def histogram(self, layer: int, site: str) -> tuple[Tensor, Tensor]:
        if site not in self.histograms:
            self.histograms[site] = teal.histogram(self.seen[site])
        return self.histograms[site]

    def channel_max(self, layer: int, site: str) -> Tensor:
        return self.seen[site].abs().flatten(0, 1).amax(0)

    def weight_max(self, layer: int, projection: str) -> Tensor:
        return self.block.weights[projection].abs().amax(0)

    def mean_square(self, layer: int, site: str) -> tuple[float, float]:
        raise AssertionError("no technique of these tests asks for it")

    def parameters(self, layer: int) -> dict[str, int]:
        return {name: weight.numel() for name, weight in self.block.weights.items()}

    def dense_inputs(self, layer: int) -> Tensor:
        return self.x

    def run_block(
        self, layer: int, inputs: Tensor, technique: Technique | None = None, state: State | None = None
    ) -> Tensor:
        return self.block(inputs, applied(technique, state)) if technique else self.block(inputs)

    def kept(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        if name not in self.stored:
            self.stored[name] = compute()
        return self.stored[name]
