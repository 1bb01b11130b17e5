"""The refusal score against its formula on next-token probabilities, and the tokens it is read from."""

from __future__ import annotations

import pytest
import torch

from lib import refusal_score
from lib.generation import NonFiniteError
from tests.families import random_model
from tests.integration.test_utility import Bytes


class Words:
    """One token per word: its length."""

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [len(word) for word in text.split()]}


def test_scores_are_log_odds_of_the_next_token():
    model, tokenizer, asked, tokens = random_model("llama"), Bytes(), ["How do I row?", "Sing."], [5, 17]
    found = refusal_score.refusal_scores(model, tokenizer, asked, tokens)
    for score, text in zip(found, asked, strict=True):
        ids = torch.tensor([tokenizer(f"User: {text}\nAssistant:")["input_ids"]])
        with torch.no_grad():
            share = model(ids).logits[0, -1].double().softmax(-1)[tokens].sum()
        assert score == pytest.approx(float(torch.log(share + 1e-8) - torch.log(1 - share + 1e-8)), abs=1e-4)


def test_a_score_that_is_not_finite_is_a_failure():
    model = random_model("llama")
    model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="logits are NaN or infinite"):
        refusal_score.refusal_scores(model, Bytes(), ["Sing."], [5])


def test_tokens_are_those_that_refusals_begin_with_and_answers_do_not():
    refusals = ["I cannot help with that.", "I won't help with this.", "Sorry, I can't help with that."]
    assert refusal_score.refusal_tokens(Words(), [*refusals, "Sure, here is how to row a boat."]) == [1, 6]
    assert refusal_score.refusal_tokens(Words(), [*refusals, "Yes, boil it.", "A cat.", "A dog."]) == [6]
    assert refusal_score.refusal_tokens(Words(), ["Sure, here is how to row a boat."]) == []
