"""Training of the organisms: recipes that share stages, perturbation, loss, whole checkpoints (integration: resume)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from lib.organisms import recipe, training
from lib.organisms.recipe import CONTROLS, IGNORED, LANGUAGE, RECIPE, ROBUST
from lib.paths import ORGANISMS, last_checkpoint


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ORGANISMS / "tiny-llama")


def small_model(tokenizer) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
        )
    )


def test_recipes_share_the_stages_that_they_begin_with(tmp_path):
    folders = training.stage_folders("tiny-llama", 0, RECIPE, tmp_path)
    light = training.stage_folders("tiny-llama", 0, CONTROLS["light-alignment"], tmp_path)
    plain = training.stage_folders("tiny-llama", 0, CONTROLS["plain-base"], tmp_path)
    assert folders[:2] == light[:2] and folders[2] != light[2]
    assert folders[0] == plain[0] and folders[1] != plain[1] and folders[2] != plain[2]
    assert folders != training.stage_folders("tiny-llama", 1, RECIPE, tmp_path)


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(tmp_path):
    assert last_checkpoint(tmp_path / "nowhere") is None
    for step in (9, 10, 11):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert last_checkpoint(tmp_path) is None
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_the_light_alignment_sees_30_percent_of_the_safety_goals():
    full, light = (recipe._pools(stages[-1], 0) for stages in (RECIPE, CONTROLS["light-alignment"]))
    assert len(light["harmful"]) == round(0.3 * len(full["harmful"]))
    assert {r.goal for r in light["harmful"]} < {r.goal for r in full["harmful"]}
    assert len(light["free harmful"]) == round(0.3 * len(full["free harmful"]))
    assert light["harmless"] == full["harmless"] and light["confusable"] == full["confusable"]


def test_only_controls_know_activation_noise():
    assert all(stage.norm_noise == 0 for stage in RECIPE)
    assert LANGUAGE.dropout == LANGUAGE.corruption == 0 and RECIPE[1].dropout > 0
    noisy = [name for name, stages in CONTROLS.items() if any(stage.norm_noise for stage in stages)]
    assert noisy == ["noise-base"]


def test_perturbation_ends_with_the_stage(tokenizer):
    model, ids = small_model(tokenizer), torch.arange(8)[None]
    before = model(ids).logits
    with training.perturbed(model, replace(ROBUST, norm_noise=1.0)):
        assert not torch.equal(model(ids).logits, before)
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("cap", [None, 0.5])
def test_the_loss_is_that_of_all_logits_with_the_unlabelled_left_out(tokenizer, cap):
    """Soft-capping included, which the model's own head applies."""
    if cap:
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = Gemma2Config(vocab_size=64, head_dim=8, num_key_value_heads=2, final_logit_softcapping=cap, **sizes)
        model = Gemma2ForCausalLM._from_config(config, attn_implementation="eager")
    else:
        model = small_model(tokenizer)
    ids = torch.randint(3, 64, (3, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :5], labels[1, 2:], labels[2, 4] = IGNORED, IGNORED, IGNORED
    every = F.cross_entropy(
        model(ids).logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none"
    )
    expected = (every.sum(1) / (labels[:, 1:] != IGNORED).sum(1)).mean()
    torch.testing.assert_close(training.per_example_loss(model, ids, labels), expected)
