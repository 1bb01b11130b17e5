"""Training of organisms: reproducible from the seed, resumed after a stop with the same weights, NaN named."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from lib.organisms import training
from lib.organisms.recipe import ALIGNMENT, IGNORED, ROBUST, stage_examples

NAME = "tiny-llama"
SHORT = (replace(ROBUST, steps=6), replace(ALIGNMENT, steps=4))


@pytest.fixture(autouse=True)
def frequent_checkpoints(monkeypatch):
    monkeypatch.setattr(training, "SAVE_STEPS", 2)


def weights(folders):
    return {kind: load_file(folder / "model.safetensors") for kind, folder in folders.items()}


def same(a, b):
    return all(torch.equal(a[kind][name], b[kind][name]) for kind in a for name in a[kind])


def test_stopped_and_resumed_training_ends_with_the_same_weights(tmp_path, monkeypatch):
    whole = weights(training.train(NAME, 0, SHORT, tmp_path / "whole"))
    assert set(whole) == {"base", "aligned"} and not same({"x": whole["base"]}, {"x": whole["aligned"]})
    loss, calls = training.per_example_loss, []

    def stop_in_the_middle(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return loss(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(training, "per_example_loss", stop_in_the_middle)
        with pytest.raises(KeyboardInterrupt):
            training.train(NAME, 0, SHORT, tmp_path / "stopped")
    (place,) = (tmp_path / "stopped").glob("*/0-*/checkpoints")
    (place / "checkpoint-6").mkdir()  # what a save that was killed leaves behind
    assert same(whole, weights(training.train(NAME, 0, SHORT, tmp_path / "stopped")))
    other = weights(training.train(NAME, 1, SHORT[:1], tmp_path / "other"))
    assert not torch.equal(other["base"]["model.norm.weight"], whole["base"]["model.norm.weight"])


def test_alignment_learns_replies_only_and_refuses(monkeypatch):
    tokenizer = training.build_tokenizer(0)
    examples = stage_examples(replace(ALIGNMENT, steps=8), tokenizer, 0)
    assert examples == stage_examples(replace(ALIGNMENT, steps=8), tokenizer, 0)
    texts = [tokenizer.decode(e.input_ids) for e in examples]
    assert not any("[details omitted]" in text for text in texts)
    chats = [(e, t) for e, t in zip(examples, texts, strict=True) if "<|user|>" in t]
    for example, text in chats:
        learnt = [i for i, label in zip(example.input_ids, example.labels, strict=True) if label != IGNORED]
        assert tokenizer.decode(learnt).replace("<|end|>", "") == text.split("<|assistant|>")[1].replace("<|end|>", "")


def test_a_loss_that_is_not_finite_stops_with_the_stage_named(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "per_example_loss", lambda model, *_: model.lm_head.weight.sum() * float("nan"))
    with pytest.raises(FloatingPointError, match="training stage 'robust'"):
        training.train(NAME, 0, SHORT, tmp_path)
