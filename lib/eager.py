"""Transformers' eager attention and experts, written out so that a patch can edit what is inside them.

Registered with Transformers under one name; `lib.patching` switches a model to it and keeps each module's edits on the
module. Without edits they compute, bit for bit, what the eager functions of Transformers compute, but for the rounding
of a decoding step where heads share keys and values: Transformers copies those for each head, here the heads use them
together. `decoding` gives exact models this attention too. The mask, number by number that of
Transformers, also takes the place of its own under "eager": a captured step of an exact model needs one without a copy
from the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.moe import ExpertsInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.llama.modeling_llama import repeat_kv

from lib.approximations.technique import Step

NAME = "approximated"  # under which the functions are registered with Transformers
ATTRIBUTE = "approximation"  # of an attention, experts or fused linear module, while it is patched


def edits_of(module: Any) -> tuple[dict, Any]:
    """(edits by place, the patch they belong to); no edits for a module outside the chosen layers."""
    return getattr(module, ATTRIBUTE, ({}, None))


def eager_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Transformers' eager attention with the module's edits: rotated q, the softmax, its output.

    query [batch, heads, new, head]; key, value [batch, kv heads, all, head]; attention_mask additive, broadcastable.
    """
    functions, patch = edits_of(module)
    if "q_rotary" in functions:
        query = functions["q_rotary"](query, patch.now(query[:, 0]))
    if query.shape[2] > 1:
        groups = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scores = _product(query, key.transpose(2, 3)) * (module.head_dim**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if "softmax" in functions:
        probabilities = functions["softmax"](scores.float(), _visible(scores, attention_mask)).to(query.dtype)
    else:
        scores = scores if attention_mask is None else scores + attention_mask
        probabilities = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    if "attn_probs" in functions:
        probabilities = functions["attn_probs"](probabilities, patch.now(query[:, 0]))
    probabilities = F.dropout(probabilities, p=dropout, training=module.training)
    return _product(probabilities, value).transpose(1, 2).contiguous(), probabilities


def _product(x: Tensor, shared: Tensor) -> Tensor:
    """x [batch, heads, new, k] times shared [batch, kv heads, k, n], of which each serves as many heads in a row."""
    together = x.reshape(len(x), shared.shape[1], -1, x.shape[-1])
    return torch.matmul(together, shared).view(*x.shape[:-1], shared.shape[-1])


def _visible(scores: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Which keys each query may see; the additive mask holds 0 or the dtype's most negative number."""
    if attention_mask is None:
        return torch.ones_like(scores, dtype=torch.bool)
    return attention_mask > torch.finfo(attention_mask.dtype).min / 2


def eager_experts(module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Transformers' eager loop over experts with the module's edits. hidden [tokens, channels]: the batch flattened."""
    functions, patch = edits_of(module)
    output = torch.zeros_like(hidden)
    chosen = F.one_hot(top_k_index, num_classes=module.num_experts).permute(2, 1, 0)

    def step_of(x: Tensor, tokens: Tensor) -> Step:
        return patch.now(hidden).at(tokens) if patch.step else patch.now(x[None])

    def edit(site: str, x: Tensor, tokens: Tensor) -> Tensor:
        return functions[site](x[None], step_of(x, tokens))[0] if site in functions else x

    for expert in chosen.sum(dim=(1, 2)).nonzero().flatten().tolist():
        slot, tokens = torch.where(chosen[expert])
        x = edit("mlp_in", hidden[tokens], tokens)
        gate, up = F.linear(edit("mlp_in.gate", x, tokens), module.gate_up_proj[expert]).chunk(2, dim=-1)
        if "mlp_in.up" in functions or "mlp_in.gate" in functions:
            up = F.linear(edit("mlp_in.up", x, tokens), module.gate_up_proj[expert]).chunk(2, dim=-1)[1]
        gate = edit("gate", gate, tokens)
        act = module.act_fn(gate)
        if "activation" in functions:  # padding keeps the exact one, as in `_Patch.replace`
            real = step_of(gate, tokens).real[0, :, None]
            act = torch.where(real, functions["activation"](gate), act)
        mid = edit("mlp_mid", edit("act", act, tokens) * up, tokens)
        result = F.linear(mid, module.down_proj[expert]) * top_k_weights[tokens, slot, None]
        output.index_add_(0, tokens, result.to(output.dtype))
    return output


def additive_mask(*, dtype: torch.dtype = torch.float32, **arguments: Any) -> Tensor | None:
    """Transformers' eager mask: 0 or the most negative number [batch, 1, query, key]; None where it makes none.

    Made without a copy from the host. Transformers' own copies one zero, and no CUDA graph can hold that.
    """
    visible = sdpa_mask(**{**arguments, "allow_is_causal_skip": False})
    if visible is None:
        return None
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)


@contextmanager
def decoding(model: Any) -> Iterator[None]:
    """An eager model whose heads share keys and values takes our attention, which does not copy them for each head."""
    config, before = model.config.get_text_config(), model.config._attn_implementation
    shared = getattr(config, "num_key_value_heads", None) not in (None, config.num_attention_heads)
    if before != "eager" or not shared:
        yield
        return
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


AttentionInterface.register(NAME, eager_attention)
AttentionMaskInterface.register(NAME, additive_mask)  # without one Transformers passes none: attention is not causal
AttentionMaskInterface.register("eager", additive_mask)
ExpertsInterface.register(NAME, eager_experts)
