"""Where the sites are in a decoder: found by structure, not by model name.

A pre-norm decoder block computes, with r the residual stream,

    attn_in = norm_attn(r)            q, k, v = W attn_in            attn_probs = softmax(q k^T)      (per head)
    attn_out = attn_probs v           r = r + [norm_attn_post](W_o attn_out)
    mlp_in = norm_mlp(r)              gate, up = W mlp_in            act = activation(gate)
    mlp_mid = act * up                block_out = r + [norm_mlp_post](W_down mlp_mid)

Bracketed norms exist in Gemma-2 and Gemma-3, norm_q and norm_k in Qwen3 and Gemma-3. Phi-3 fuses q, k, v and gate, up
into one linear layer each; mixtures hold their experts' weights in one tensor behind a router.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
READERS = {"attn_in": ("q", "k", "v"), "mlp_in": ("gate", "up")}
NORM_SITES = ("norm_attn", "norm_mlp", "norm_attn_post", "norm_mlp_post", "norm_q", "norm_k")
ATTENTION_SITES = ("attn_probs", "q_rotary", "k_rotary", "v_heads")
EXPERT_SITES = ("mlp_in", "mlp_in.gate", "mlp_in.up", "gate", "act", "mlp_mid")
FINAL = -1  # layer number of what lies behind the last block
SCALED_BY_ONE_PLUS = ("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm")
SCALED_BEFORE_CAST = (*SCALED_BY_ONE_PLUS, "Olmo2RMSNorm")  # the others cast to the model's dtype, then scale


class UnknownAnatomy(ValueError):
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
    """One decoder block. `projections` is empty for gate, up, down in a mixture, whose `experts` hold them."""

    index: int
    module: nn.Module
    attention: nn.Module
    mlp: nn.Module
    activation: nn.Module
    norms: dict[str, nn.Module]
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
    stacks = (m for m in model.modules() if isinstance(getattr(m, "layers", None), nn.ModuleList))
    decoder: Any = next((m for m in stacks if hasattr(m, "norm")), None)  # an image encoder's stack has none
    if decoder is None:
        raise UnknownAnatomy(f"{type(model).__name__}: no stack of decoder blocks ('layers' and a final 'norm') found")
    config = text_config(model)
    blocks = tuple(_block(index, layer, config) for index, layer in enumerate(decoder.layers))
    return Anatomy(decoder, blocks, decoder.norm, _activation_kind(config))


def text_config(model: Any) -> Any:
    """The configuration of the language model, also where it is part of a larger one."""
    return model.config.get_text_config()


def _block(index: int, layer: nn.Module, config: Any) -> Block:
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    if attention is None or mlp is None:
        raise UnknownAnatomy(f"block {index} ({type(layer).__name__}): no 'self_attn' and 'mlp' found")
    if hasattr(mlp, "shared_expert") or hasattr(mlp, "shared_experts"):
        raise UnknownAnatomy(f"block {index} ({type(mlp).__name__}): a shared expert is not supported")
    experts = getattr(mlp, "experts", None)
    holder = mlp if experts is None else experts
    activation = getattr(holder, "act_fn", None) or getattr(holder, "activation_fn", None)
    if activation is None:
        raise UnknownAnatomy(f"block {index} ({type(mlp).__name__}): no activation 'act_fn' or 'activation_fn' found")
    return Block(
        index=index,
        module=layer,
        attention=attention,
        mlp=mlp,
        activation=activation,
        norms=_norms(layer, attention),
        projections=_attention_projections(attention, config) | ({} if experts is not None else _mlp_projections(mlp)),
        experts=experts,
        router=getattr(mlp, "gate", None) if experts is not None else None,
    )


def _norms(layer: nn.Module, attention: nn.Module) -> dict[str, nn.Module]:
    """Norms by site. `post_attention_layernorm` stands before the MLP, but closes the attention where another norm
    closes the MLP (Gemma-2, OLMo-2)."""
    closed = hasattr(layer, "post_feedforward_layernorm")
    after_attention = getattr(layer, "post_attention_layernorm", None)
    found = {
        "norm_attn": getattr(layer, "input_layernorm", None),
        "norm_attn_post": after_attention if closed else None,
        "norm_mlp": getattr(layer, "pre_feedforward_layernorm", None) if closed else after_attention,
        "norm_mlp_post": getattr(layer, "post_feedforward_layernorm", None),
        "norm_q": getattr(attention, "q_norm", None),
        "norm_k": getattr(attention, "k_norm", None),
    }
    return {site: norm for site, norm in found.items() if norm is not None}


def _whole(linear: Any) -> Projection:
    return Projection(linear, 0, linear.out_features)


def _attention_projections(attention: Any, config: Any) -> dict[str, Projection]:
    found = {"o": _whole(attention.o_proj)} if hasattr(attention, "o_proj") else {}
    if hasattr(attention, "qkv_proj"):
        fused, head = attention.qkv_proj, attention.head_dim
        q, kv = config.num_attention_heads * head, config.num_key_value_heads * head
        starts = {"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv)}
        return found | {name: Projection(fused, *rows) for name, rows in starts.items()}
    return found | {n: _whole(getattr(attention, f"{n}_proj")) for n in "qkv" if hasattr(attention, f"{n}_proj")}


def _mlp_projections(mlp: Any) -> dict[str, Projection]:
    found = {"down": _whole(mlp.down_proj)} if hasattr(mlp, "down_proj") else {}
    if hasattr(mlp, "gate_up_proj"):
        fused, half = mlp.gate_up_proj, mlp.gate_up_proj.out_features // 2
        return found | {"gate": Projection(fused, 0, half), "up": Projection(fused, half, 2 * half)}
    return found | {n: _whole(getattr(mlp, f"{n}_proj")) for n in ("gate", "up") if hasattr(mlp, f"{n}_proj")}


def _activation_kind(config: Any) -> str:
    name = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", "silu")
    kinds = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
    if name not in kinds:
        raise UnknownAnatomy(f"activation {name!r} is not known; known are {', '.join(kinds)}")
    return kinds[name]


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
    """The concrete sites a name stands for in this block: `norm` means every norm it has. Empty if it has none."""
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
    needed = {"attn_in": "q", "attn_out": "o", "mlp_in": "gate", "mlp_mid": "down"}.get(site, site.split(".")[-1])
    return [site] if needed in block.projections else []
