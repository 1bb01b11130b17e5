"""Training of the organisms: a killed run ends with the same weights, recipes share their first stages, NaN stops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from lib.organisms import recipe, training
from lib.organisms.recipe import CONTROLS, IGNORED, LANGUAGE, RECIPE, ROBUST
from lib.paths import ORGANISMS

STAGE = replace(ROBUST, steps=4)


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


def trained(tokenizer, folder, stage=STAGE) -> LlamaForCausalLM:
    model = small_model(tokenizer)
    training.run_stage(model, tokenizer, stage, 0, folder, "cpu")
    return model


def test_a_killed_stage_resumes_to_the_same_weights(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAVE_STEPS", 2)
    straight = trained(tokenizer, tmp_path / "straight")

    calls, loss = [], training.per_example_loss

    def killed(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return loss(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "per_example_loss", killed)
        trained(tokenizer, tmp_path / "killed")
    assert (tmp_path / "killed" / "checkpoint-2").is_dir()
    resumed = trained(tokenizer, tmp_path / "killed")
    for (name, a), b in zip(straight.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_loss_that_is_not_finite_stops_with_the_stage_named(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "per_example_loss", lambda model, *_: model.lm_head.weight.sum() * torch.nan)
    with pytest.raises(FloatingPointError, match="robust"):
        trained(tokenizer, tmp_path)


def test_recipes_share_the_stages_that_they_begin_with(tmp_path):
    folders = training.stage_folders("tiny-llama", 0, RECIPE, tmp_path)
    light = training.stage_folders("tiny-llama", 0, CONTROLS["light-alignment"], tmp_path)
    plain = training.stage_folders("tiny-llama", 0, CONTROLS["plain-base"], tmp_path)
    assert folders[:2] == light[:2] and folders[2] != light[2]
    assert folders[0] == plain[0] and folders[1] != plain[1] and folders[2] != plain[2]
    assert folders != training.stage_folders("tiny-llama", 1, RECIPE, tmp_path)


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
