"""The mask of eager attention against Transformers' own, number by number."""

from __future__ import annotations

import pytest
import torch
from transformers.masking_utils import causal_mask_function, eager_mask, sliding_window_causal_mask_function

from lib.eager import additive_mask


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
