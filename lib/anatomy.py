"""Where the sites are in a decoder: found by structure, not by model name.

A pre-norm decoder block computes, with r the residual stream,

    attn_in = norm_attn(r)            q, k, v = W attn_in            attn_probs = softmax(q k^T)      (per head)
    attn_out = attn_probs v           r = r + [norm_attn_post](W_o attn_out)
    mlp_in = norm_mlp(r)              gate, up = W mlp_in            act = activation(gate)
    mlp_mid = act * up                block_out = r + [norm_mlp_post](W_down mlp_mid)

Bracketed norms exist in Gemma-2, Gemma-3 and GLM-4, norm_q and norm_k in Qwen3 and Gemma-3. Phi-3 fuses q, k, v
and gate, up into one linear layer each; mixtures hold their experts' weights in one tensor behind a router.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.errors import PlainError

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
READERS = {"attn_in": ("q", "k", "v"), "mlp_in": ("gate", "up")}
NEEDED = {
    **{name: name for name in ("q", "k", "v", "gate")},
    **{"attn_in": "q", "attn_out": "o", "mlp_in": "gate", "mlp_mid": "down"},
    **{f"{tensor}.{name}": name for tensor, names in READERS.items() for name in names},
}
"""Site -> the projection without which a block does not have it."""
NORM_SITES = ("norm_attn", "norm_mlp", "norm_attn_post", "norm_mlp_post", "norm_q", "norm_k")
ATTENTION_SITES = ("attn_probs", "q_rotary", "k_rotary", "v_heads")
EXPERT_SITES = ("mlp_in", "mlp_in.gate", "mlp_in.up", "gate", "act", "mlp_mid")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
FINAL = -1  # layer number of what lies behind the last block
SCALED_BY_ONE_PLUS = ("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm", "VaultGemmaRMSNorm")
SCALED_BEFORE_CAST = (*SCALED_BY_ONE_PLUS, "Olmo2RMSNorm", "Olmo3RMSNorm", "FlexOlmoRMSNorm", "HeliumRMSNorm")
"""The other norms round to the model's dtype, then scale."""


class UnknownAnatomy(PlainError, ValueError):
    """The model has no decoder blocks, or a block lacks a part that a request needs."""


@dataclass(frozen=True)
class Projection:
    """Rows `start:stop` of a linear layer; a whole layer, or a logical part of a fused one."""

    module: nn.Linear
    start: int
    stop: int

    @property
    def fused(self) -> bool:
        return self.stop - self.start != self.module.out_features

    @property
    def weight(self) -> Tensor:
        return self.module.weight[self.start : self.stop]


@dataclass(frozen=True)
class Block:
    """One decoder block. `projections` is empty for gate, up, down in a mixture, whose `experts` hold them.

    other_norms: names of the norms for which no site is known."""

    index: int
    module: nn.Module
    attention: nn.Module
    mlp: nn.Module
    activation: nn.Module
    norms: dict[str, nn.Module]
    other_norms: tuple[str, ...]
    projections: dict[str, Projection]
    experts: Any
    router: Any


@dataclass(frozen=True)
class Anatomy:
    """The decoder's parts: `decoder` holds the blocks, `final_norm` stands before the head."""

    decoder: nn.Module
    blocks: tuple[Block, ...]
    final_norm: nn.Module
    activation: str  # silu, gelu or gelu_tanh


def anatomy(model: nn.Module) -> Anatomy:
    """Finds the parts of any decoder built like the Hugging Face ones. UnknownAnatomy says what was not found."""
    stacks = [m for m in model.modules() if isinstance(getattr(m, "layers", None), nn.ModuleList)]
    decoders: list[Any] = [stack for stack in stacks if hasattr(stack, "norm")]  # an image encoder's stack has none
    if len(decoders) != 1:
        found = "several stacks" if decoders else "no stack"
        raise UnknownAnatomy(f"{type(model).__name__}: {found} of decoder blocks ('layers' and a final 'norm') found")
    (decoder,), config = decoders, text_config(model)
    blocks = tuple(_block(index, layer, config) for index, layer in enumerate(decoder.layers))
    return Anatomy(decoder, blocks, decoder.norm, _activation_kind(blocks[0].activation))


def text_config(model: Any) -> Any:
    """The configuration of the language model, also where it is part of a larger one."""
    return model.config.get_text_config()


def _block(index: int, layer: Any, config: Any) -> Block:
    """One block; UnknownAnatomy if a part is missing, or if it has one that would be passed over in silence."""

    def unknown(part: nn.Module, what: str) -> UnknownAnatomy:
        return UnknownAnatomy(f"block {index} ({type(part).__name__}): {what}")

    absent = [repr(name) for name in ("self_attn", "mlp") if not hasattr(layer, name)]
    if absent:
        raise unknown(layer, f"no {' and '.join(absent)} found")
    attention, mlp = layer.self_attn, layer.mlp
    if hasattr(mlp, "shared_expert") or hasattr(mlp, "shared_experts"):
        raise unknown(mlp, "a shared expert is not supported")
    if any("sink" in name for name, _ in attention.named_parameters(recurse=False)):
        raise unknown(attention, "attention sinks are not supported")
    experts = getattr(mlp, "experts", None)
    holder = mlp if experts is None else experts
    activation = getattr(holder, "act_fn", None) or getattr(holder, "activation_fn", None)
    if activation is None:
        raise unknown(mlp, "no activation 'act_fn' or 'activation_fn' found")
    projections = _attention_projections(attention, config) | ({} if experts is not None else _mlp_projections(mlp))
    absent = [name for name in (PROJECTIONS[:4] if experts is not None else PROJECTIONS) if name not in projections]
    if absent:
        raise unknown(layer, f"no linear layer found for {', '.join(absent)}")
    norms = _norms(layer, attention)
    found = [id(norm) for norm in norms.values()]
    others = [n for n, m in layer.named_modules() if "norm" in type(m).__name__.lower() and id(m) not in found]
    router = getattr(mlp, "gate", getattr(mlp, "router", None)) if experts is not None else None
    return Block(index, layer, attention, mlp, activation, norms, tuple(others), projections, experts, router)


def _norms(layer: nn.Module, attention: nn.Module) -> dict[str, nn.Module]:
    """Norms by site. `post_attention_layernorm` stands before the MLP, but closes the attention where another norm
    stands before the MLP (Gemma-2) or closes it (OLMo-2)."""
    after_attention = getattr(layer, "post_attention_layernorm", None)
    before_mlp = getattr(layer, "pre_feedforward_layernorm", None)
    closing = before_mlp is not None or hasattr(layer, "post_feedforward_layernorm")
    found = {
        "norm_attn": getattr(layer, "input_layernorm", None),
        "norm_attn_post": after_attention if closing else getattr(layer, "post_self_attn_layernorm", None),  # GLM-4
        "norm_mlp": before_mlp if closing else after_attention,
        "norm_mlp_post": getattr(layer, "post_feedforward_layernorm", getattr(layer, "post_mlp_layernorm", None)),
        "norm_q": getattr(attention, "q_norm", None),
        "norm_k": getattr(attention, "k_norm", None),
    }
    return {site: norm for site, norm in found.items() if norm is not None}


def _whole(parent: nn.Module, **names: str) -> dict[str, Projection]:
    """Projection -> whole linear layer of the parent, for those of projection=name that are there."""
    layers: dict[str, Any] = {projection: getattr(parent, name, None) for projection, name in names.items()}
    return {name: Projection(x, 0, x.out_features) for name, x in layers.items() if hasattr(x, "out_features")}


def _attention_projections(attention: Any, config: Any) -> dict[str, Projection]:
    fused: Any = getattr(attention, "qkv_proj", None)
    found = _whole(attention, o="o_proj")
    if not hasattr(fused, "out_features"):
        return found | _whole(attention, q="q_proj", k="k_proj", v="v_proj")
    q, kv = (n * attention.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    starts = {"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv)}
    return found | {name: Projection(fused, *rows) for name, rows in starts.items()}


def _mlp_projections(mlp: Any) -> dict[str, Projection]:
    fused: Any = getattr(mlp, "gate_up_proj", None)
    found = _whole(mlp, down="down_proj")
    if not hasattr(fused, "out_features"):
        return found | _whole(mlp, gate="gate_proj", up="up_proj")
    half = fused.out_features // 2
    return found | {"gate": Projection(fused, 0, half), "up": Projection(fused, half, 2 * half)}


def _activation_kind(activation: Any) -> str:
    """silu, gelu or gelu_tanh, by what the module computes: configurations name it in several places."""
    x = torch.linspace(-4, 4, 33)
    if isinstance(activation, nn.Module) and not list(activation.parameters()):
        for kind, function in ACTIVATIONS.items():
            if torch.allclose(activation.forward(x), function(x), rtol=0, atol=1e-5):
                return kind
    raise UnknownAnatomy(f"activation {type(activation).__name__} is not known; known are {', '.join(ACTIVATIONS)}")


def norm_parts(norm: Any) -> tuple[Tensor, float, float]:
    """(weight, offset, eps) of an RMSNorm that scales by offset + weight: offset 1 in Gemma, 0 elsewhere.

    UnknownAnatomy for any other norm, found by giving it ones."""
    eps = getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", None)
    if eps is None or not hasattr(norm, "weight") or getattr(norm, "bias", None) is not None:
        raise UnknownAnatomy(f"{type(norm).__name__} is not an RMSNorm: its normalisation cannot be replaced")
    offset = 1.0 if type(norm).__name__ in SCALED_BY_ONE_PLUS else 0.0
    scale = norm.forward(torch.ones_like(norm.weight))  # of a vector whose root mean square is 1
    if not torch.allclose(scale.float(), offset + norm.weight.float(), rtol=0.02, atol=0.02):
        raise UnknownAnatomy(f"{type(norm).__name__} scales in a way that is not known: it cannot be replaced")
    return norm.weight, offset, eps


def expand_sites(block: Block, site: str) -> list[str]:
    """The concrete sites a name stands for in this block: `norm` means every norm it has. Empty if it has none.

    UnknownAnatomy for `norm` where the block has norms that no site is known for."""
    if site == "norm" and block.other_norms:
        kind, names = type(block.module).__name__, ", ".join(block.other_norms)
        raise UnknownAnatomy(f"block {block.index} ({kind}): no site is known for its norms {names}")
    if site == "norm":
        return [name for name in NORM_SITES if name in block.norms]
    if site in NORM_SITES:
        return [site] if site in block.norms else []
    if site in ATTENTION_SITES or site in ("block_out", "act"):
        return [site]
    if block.experts is not None and site in EXPERT_SITES:
        return [site]
    if site == "router":
        return [site] if block.router is not None else []
    return [site] if NEEDED.get(site) in block.projections else []
