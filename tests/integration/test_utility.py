"""Perplexities and reply losses against direct computation, one text at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lib import utility
from lib.generation import NonFiniteError, Reply
from lib.organisms.corpus import Fact
from lib.patching import approximated
from tests.families import random_model
from tests.integration.test_patching import Scale

FAMILIES = ("llama", "gemma2", "mistral", "mixtral")


class Bytes:
    """One token per byte, so that any text has known tokens; no chat template."""

    chat_template = None
    bos_token = None
    eos_token_id = 2
    pad_token_id = 0
    name_or_path = "bytes"

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": [3 + byte % 90 for byte in text.encode()]}


PROMPTS = ["How do I bake bread?", "Hi", "Tell me about the sea and the sky."]
REPLIES = ["Mix flour and water.", "Hello there, friend.", "No."]


def direct(model, ids: list[int], n: int) -> float:
    """Summed cross-entropy of the last n tokens."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].float()
    return F.cross_entropy(logits[-n - 1 : -1], torch.tensor(ids[-n:]), reduction="sum").item()


@pytest.mark.parametrize("family", FAMILIES)
def test_reply_losses_equal_one_by_one(family):
    model, tokenizer = random_model(family), Bytes()
    sums, lengths = utility.reply_losses(model, tokenizer, PROMPTS, REPLIES)
    for prompt, reply, total, n in zip(PROMPTS, REPLIES, sums, lengths, strict=True):
        head = tokenizer(f"User: {prompt}\nAssistant:")["input_ids"]
        tail = [*tokenizer(reply)["input_ids"], 2]
        assert n == len(tail)
        assert total == pytest.approx(direct(model, head + tail, n), rel=2e-5)
    expected = math.exp(sums.sum() / lengths.sum())
    assert utility.answer_perplexity(model, tokenizer, PROMPTS, REPLIES) == pytest.approx(expected)


def test_a_reply_that_was_cut_off_has_no_end():
    """Its last token was one of many to come, so an end there would be a surprise that the text is not to blame for."""
    model, tokenizer, head = random_model("llama"), Bytes(), "User: Hi\nAssistant:"
    whole, cut = (Reply("Mix flour and", ended) for ended in (True, False))
    sums, lengths = utility.reply_losses(model, tokenizer, ["Hi"] * 3, [whole, cut, "Mix flour and"])
    ids = tokenizer("Mix flour and")["input_ids"]
    assert lengths.tolist() == [len(ids) + 1, len(ids), len(ids) + 1] and sums[0] == pytest.approx(sums[2])
    assert sums[1] == pytest.approx(direct(model, tokenizer(head)["input_ids"] + ids, len(ids)), rel=2e-5)


@pytest.mark.parametrize("window", [16, 50])
def test_perplexity_is_the_mean_over_whole_windows(window):
    model, tokenizer, text = random_model("llama"), Bytes(), "The sea was calm, and the ship sailed home. " * 9
    ids = tokenizer(text)["input_ids"]
    parts = [ids[i * window : (i + 1) * window] for i in range(len(ids) // window)]
    expected = math.exp(np.mean([direct(model, part, window - 1) / (window - 1) for part in parts]))
    assert utility.perplexity(model, tokenizer, text, window) == pytest.approx(expected, rel=1e-5)


def test_a_text_shorter_than_a_window_is_an_error():
    with pytest.raises(ValueError, match="has 2 tokens; perplexity needs at least one window of 16"):
        utility.perplexity(random_model("llama"), Bytes(), "ab", 16)


def test_a_perplexity_beyond_all_numbers_is_a_failure_not_a_crash():
    model = random_model("llama")
    model.lm_head.weight.data *= 1e5
    with pytest.raises(NonFiniteError, match="beyond all numbers: a mean cross-entropy of"):
        utility.perplexity(model, Bytes(), "The sea was calm, and the ship sailed home.", 16)


def test_the_likeliest_choice_wins():
    model, tokenizer = random_model("llama"), Bytes()
    sentences = ["It is red.", "It is blue."]
    sums, lengths = utility.reply_losses(model, tokenizer, ["Which colour?"] * 2, sentences)
    best = int(np.argmin(sums / lengths))
    facts = [Fact("1", "Which colour?", "red", "It is red.", ("blue",))]
    facts += [Fact("2", "Which colour?", "blue", "It is blue.", ("red",))]
    right = utility.closed_answers(model, tokenizer, facts)
    assert right.tolist() == [best == 0, best == 1]


def test_the_right_sentence_must_be_likelier_than_every_wrong_one():
    model, tokenizer, colours = random_model("llama"), Bytes(), ("red", "blue", "green")
    sums, lengths = utility.reply_losses(model, tokenizer, ["Which?"] * 3, [f"It is {c}." for c in colours])
    best, middle, worst = (colours[i] for i in np.argsort(sums / lengths))
    fact = Fact("1", "Which?", middle, f"It is {middle}.", (worst, best))
    assert utility.closed_answers(model, tokenizer, [fact]).tolist() == [False]


def test_answers_and_facts_are_asked_for_in_the_protocol(monkeypatch):
    model, tokenizer, seen, losses = random_model("llama"), Bytes(), [], utility.reply_losses
    monkeypatch.setattr(utility, "reply_losses", lambda *given: seen.append(given[4:]) or losses(*given))
    utility.answer_perplexity(model, tokenizer, PROMPTS, REPLIES, "quada")
    utility.closed_answers(model, tokenizer, [Fact("1", "Which?", "red", "It is red.", ("blue",))], "quada")
    assert seen == [("quada",)] * 2


def test_a_tie_is_no_right_answer():
    model, tokenizer = random_model("llama"), Bytes()
    fact = Fact("1", "Which colour?", "red", "It is red.", ("red",))
    assert utility.closed_answers(model, tokenizer, [fact]).tolist() == [False]


def test_non_finite_losses_raise_instead_of_averaging():
    model = random_model("llama")
    with approximated(model, Scale(float("inf"), ("attn_out",)), layers=[0]), pytest.raises(
        NonFiniteError, match="layer 0, site attn_out"
    ):
        utility.answer_perplexity(model, Bytes(), PROMPTS, REPLIES)
