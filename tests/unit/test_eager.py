"""The mask and the attention of `lib.eager` against Transformers' own, number by number."""

from __future__ import annotations

import pytest
import torch
from transformers.masking_utils import causal_mask_function, eager_mask, sliding_window_causal_mask_function
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from lib import eager
from lib.eager import NAME, additive_mask, decoding, eager_attention
from lib.generation import greedy
from tests.families import left_padded_batch, random_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("pattern", [causal_mask_function, sliding_window_causal_mask_function(3)])
def test_the_mask_is_that_of_transformers(dtype, padded, pattern):
    real = torch.ones(2, 9, dtype=torch.bool)
    real[1, :4] = False
    arguments = {"batch_size": 2, "q_length": 5, "kv_length": 9, "q_offset": 4, "mask_function": pattern}
    arguments |= {"dtype": dtype, "attention_mask": real if padded else None, "allow_is_causal_skip": True}
    ours, theirs = additive_mask(**arguments), eager_mask(**arguments)
    assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("heads_sharing", [1, 2, 4])
@pytest.mark.parametrize("new", [1, 5])
def test_the_attention_is_that_of_transformers(heads_sharing, new):
    chance = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, length, 8, generator=chance)
        for heads, length in ((4, new), (4 // heads_sharing, 9), (4 // heads_sharing, 9))
    )
    module = torch.nn.Module().eval()
    module.num_key_value_groups, module.head_dim = heads_sharing, 8
    mask = torch.zeros(2, 1, new, 9)
    mask[1, ..., :4] = torch.finfo(torch.float32).min
    arguments = (module, query, key, value, mask)
    ours, theirs = eager_attention(*arguments, softcap=3.0), eager_attention_forward(*arguments, softcap=3.0)
    for found, expected in zip(ours, theirs, strict=True):
        if new > 1 or heads_sharing == 1:
            assert torch.equal(found, expected)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family, used", [("mistral", True), ("gemma3", True), ("llama", False)])
def test_an_exact_model_decodes_without_copies_of_shared_keys(family, used, monkeypatch):
    """Only where heads share keys and values; then each layer copies them once, while prompts are read."""
    model, copies = random_model(family), []
    monkeypatch.setattr(eager, "repeat_kv", lambda x, groups: copies.append(x) or x.repeat_interleave(groups, 1))
    batch = left_padded_batch()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    expected = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert greedy(model, {"input_ids": ids, "attention_mask": mask}, 6) == expected[:, ids.shape[1] :].tolist()
    assert len(copies) == (2 * model.config.num_hidden_layers if used else 0)
    assert model.config._attn_implementation == "eager"


def test_a_model_is_given_back_its_attention():
    model = random_model("mistral")
    with pytest.raises(ZeroDivisionError), decoding(model):
        assert model.config._attn_implementation == NAME
        1 / 0  # noqa: B018
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    with decoding(model):
        assert model.config._attn_implementation == "sdpa"
