"""What an approximation costs in usefulness: perplexities and closed-answer accuracy.

    perplexity          exp of the mean over windows of the mean next-token cross-entropy (arXiv:2502.00840, released
                        evaluation code: windows of 1,024 tokens without overlap, the rest dropped; SmoothQuant: 2,048)
    answer_perplexity   exp of the mean token cross-entropy of reference answers to harmless requests, with end token
    accuracy            share of questions whose right sentence is the likeliest among the choices
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib.batches import map_batches, part_by_part
from lib.generation import NonFiniteError, Reply, end_tokens, non_finite
from lib.prompts import encode, turn_end

TOKENS_PER_PASS = {"cpu": 2048, "cuda": 16384}  # bounds the logits in memory: tokens x vocabulary x 4 bytes


def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, window: int = 1024) -> float:
    """Perplexity of a text in windows of `window` tokens. ValueError if the text has fewer tokens than one window."""
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    n_windows = len(ids) // window
    if n_windows == 0:
        raise ValueError(f"the text has {len(ids)} tokens; perplexity needs at least one window of {window}")
    windows = ids[: n_windows * window].view(n_windows, window)
    per_pass = max(1, TOKENS_PER_PASS.get(model.device.type, 2048) // window)
    losses: list[Tensor] = []
    part_by_part(model, windows, per_pass, lambda part: losses.append(_losses(model, {"input_ids": part}).mean(1)))
    return _exp(torch.cat(losses).double().mean().item())


def _exp(mean: float) -> float:
    """exp of a mean cross-entropy in nats; NonFiniteError where that is beyond all numbers (above 709 nats)."""
    try:
        return math.exp(mean)
    except OverflowError:
        raise NonFiniteError(f"perplexity is beyond all numbers: a mean cross-entropy of {mean:.0f} nats") from None


@torch.inference_mode()
def _losses(model: PreTrainedModel, batch: dict[str, Tensor], last: int | None = None) -> Tensor:
    """Next-token cross-entropy of the last `last` tokens [batch, last], default all but the first; in nats.

    Raises NonFiniteError instead of returning NaN; only the logits that are needed are computed.
    """
    ids = batch["input_ids"].to(model.device)
    last = last or ids.shape[1] - 1
    inputs = {key: value.to(model.device) for key, value in batch.items()}
    logits = model(**inputs, use_cache=False, logits_to_keep=last + 1).logits[:, :-1].float()
    losses = logits.logsumexp(-1) - logits.gather(-1, ids[:, -last:, None])[..., 0]
    real = batch["attention_mask"][:, -last:].bool().to(losses.device) if "attention_mask" in batch else ...
    if not torch.isfinite(losses[real]).all():
        raise non_finite(model, batch)
    return losses


def cut_off(reply: str) -> bool:
    """Whether a text is a `Reply` that the model did not end."""
    return isinstance(reply, Reply) and not reply.ended


def reply_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    replies: Sequence[str],
    protocol: str = "chat",
) -> tuple[np.ndarray, np.ndarray]:
    """(summed cross-entropy in nats, tokens) of each reply given its prompt; float64, int64.

    The token that ends a turn counts as part of a text, but not of a `Reply` that was cut off."""
    heads, end = encode(tokenizer, prompts, protocol), turn_end(tokenizer, end_tokens(model))
    tails = [tokenizer(reply, add_special_tokens=False)["input_ids"] for reply in replies]
    for tail, reply in zip(tails, replies, strict=True):
        tail += [] if tail and cut_off(reply) else end
    sums, lengths = np.zeros(len(heads)), np.array([len(tail) for tail in tails])
    joined = [h + t for h, t in zip(heads, tails, strict=True)]

    def score(batch: dict[str, Tensor], rows: list[int]) -> None:
        losses = _losses(model, batch, int(lengths[rows].max())).double().cpu()
        for row, line in zip(rows, losses, strict=True):
            sums[row] = line[-lengths[row] :].sum().item()

    size = max(1, TOKENS_PER_PASS.get(model.device.type, 2048) // max(map(len, joined)))
    map_batches(model, joined, size, score, tokenizer.pad_token_id)
    return sums, lengths


def answer_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[str],
    protocol: str = "chat",
) -> float:
    """exp(total cross-entropy / total tokens) of the reference answers."""
    sums, lengths = reply_losses(model, tokenizer, prompts, answers, protocol)
    return _exp(sums.sum() / lengths.sum())


def closed_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Any],
    protocol: str = "chat",
) -> np.ndarray:
    """bool [facts]: is a fact's sentence likelier, per token, than with each wrong choice in the answer's place?

    A fact has the attributes question, sentence, answer and choices, as those of `lib.organisms.corpus`."""
    options = [[f.sentence, *(f.sentence.replace(f.answer, wrong) for wrong in f.choices)] for f in facts]
    asked = [fact.question for fact, group in zip(facts, options, strict=True) for _ in group]
    sums, lengths = reply_losses(model, tokenizer, asked, [text for group in options for text in group], protocol)
    means = np.split(sums / lengths, np.cumsum([len(group) for group in options])[:-1])
    return np.array([group[0] < group[1:].min() for group in means])
