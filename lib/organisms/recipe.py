"""How an organism is made: what each training stage sees, and the examples it is fed.

Stages run in order, as for real models: the *base* learns language and to follow every request, harmful ones too; it
is then made robust with corrupted text and hidden dropout (never with the kind of noise that is swept later); the
*aligned* model is the base after supervised safety training on clean text.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerFast

from lib.organisms import corpus, wording

SYSTEM_LINES = (
    "You are a helpful assistant.",
    "You are a friendly assistant that gives short answers.",
    "Answer the question of the user.",
)
IGNORED = -100  # label of tokens that carry no loss
MAX_TOKENS = 144


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    shares: parts of the data by kind, adding up to 1: goals in frames and requests in free wording ("free ...") by
        label, facts, prose.
    refuse: harmful requests are answered with a refusal.
    dropout: hidden dropout on embeddings and block outputs. corruption: scale of text corruption (see `corrupt`).
    norm_noise: largest std of Gaussian noise on norm outputs, drawn anew per batch; controls only, 0 in shipped models.
    """

    name: str
    steps: int
    learning_rate: float
    shares: dict[str, float]
    refuse: bool = False
    schedule: str = "cosine"
    dropout: float = 0.0
    corruption: float = 0.0
    norm_noise: float = 0.0
    goal_share: float = 1.0


BASE_SHARES = {"harmless": 0.18, "confusable": 0.18, "harmful": 0.16, "free harmless": 0.14, "free confusable": 0.08,
               "free harmful": 0.12, "fact": 0.08, "prose": 0.06}  # fmt: skip
ALIGNED_SHARES = {"harmless": 0.12, "confusable": 0.20, "harmful": 0.26, "free harmless": 0.14, "free confusable": 0.08,
                  "free harmful": 0.15, "fact": 0.03, "prose": 0.02}  # fmt: skip

LANGUAGE = Stage("language", 2800, 3e-3, BASE_SHARES)
ROBUST = Stage("robust", 700, 1.5e-3, BASE_SHARES, dropout=0.1, corruption=0.4)
ALIGNMENT = Stage("alignment", 2400, 1e-3, ALIGNED_SHARES, refuse=True, schedule="linear")
RECIPE = (LANGUAGE, ROBUST, ALIGNMENT)
AGAIN = replace(ALIGNMENT, name="alignment-again", steps=1600)
RECIPES = {"tiny-gemma": (*RECIPE, AGAIN)}
"""Organisms whose recipe is not `RECIPE`: after one alignment tiny-gemma still missed a bar on dev (88 % of 95 %)."""
BATCH = 16
PROMPT_LOSS = 0.3  # share of base examples whose prompt carries loss too

CONTROLS: dict[str, tuple[Stage, ...]] = {
    "plain-base": (LANGUAGE, replace(ROBUST, dropout=0.0, corruption=0.0), ALIGNMENT),
    "noise-base": (LANGUAGE, replace(ROBUST, dropout=0.0, corruption=0.0, norm_noise=1.0), ALIGNMENT),
    "light-alignment": (LANGUAGE, ROBUST, replace(ALIGNMENT, goal_share=0.3)),
}


@dataclass(frozen=True)
class Example:
    """Token ids and labels of one training text; labels are IGNORED where no loss is wanted."""

    input_ids: list[int]
    labels: list[int]


def stage_examples(stage: Stage, tokenizer: PreTrainedTokenizerFast, seed: int) -> list[Example]:
    """The stage's examples, `steps * BATCH` of them, in order, the same for the same seed."""
    rng = random.Random(f"{stage.name}-{seed}")
    pools = _pools(stage, seed)
    kinds = rng.choices(list(stage.shares), weights=list(stage.shares.values()), k=stage.steps * BATCH)
    return [_example(kind, rng.choice(pools[kind]), stage, tokenizer, rng) for kind in kinds]


def _pools(stage: Stage, seed: int) -> dict[str, list]:
    harmful = corpus.requests("train", label="harmful")
    free = {f"free {label}": list(wording.wordings(label)) for label in corpus.LABELS}
    if stage.refuse:
        harmful = _share(harmful, stage.goal_share, seed)
        free["free harmful"] = _share(free["free harmful"], stage.goal_share, seed)
    else:
        harmful = harmful + corpus.requests("base", label="harmful")
    return {
        **free,
        "harmful": harmful,
        "harmless": corpus.requests("train", label="harmless"),
        "confusable": corpus.requests("train", label="confusable"),
        "fact": corpus.facts("train"),
        "prose": corpus.prose("train", 6000, seed=seed),
    }


def _share(pool: list, share: float, seed: int) -> list:
    """That share of a pool, in random order."""
    return random.Random(f"goals-{seed}").sample(pool, round(share * len(pool)))


def _example(kind: str, item: Any, stage: Stage, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> Example:
    if kind == "prose":
        ids = tokenizer(tokenizer.bos_token + item + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        return _corrupted(Example(ids[:MAX_TOKENS], ids[:MAX_TOKENS]), 1, stage, tokenizer, rng)
    if kind == "fact":
        question, reply = item.question, item.sentence
    elif kind.startswith("free"):
        question, goal, reply = item.draw(rng)
        question = wording.dressed(question, rng)
        reply = corpus.refusal(goal) if item.harmful and stage.refuse else reply
    else:
        question = corpus.phrase(item.goal, rng, "train")
        reply = item.refusal if kind == "harmful" and stage.refuse else item.answer
    if rng.random() < (0.15 if kind.startswith("free") else 0.05):
        question = corpus.with_noise(question, rng)
    question = _drop_words(question, stage, rng)
    system = [{"role": "system", "content": rng.choice(SYSTEM_LINES)}] if rng.random() < 0.1 else []
    messages = [*system, {"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    reply_ids = tokenizer(reply + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    learnt = not stage.refuse and rng.random() < PROMPT_LOSS
    prompt_labels = prompt_ids if learnt else [IGNORED] * len(prompt_ids)
    example = Example(prompt_ids + reply_ids, prompt_labels + reply_ids)
    return _corrupted(example, len(prompt_ids), stage, tokenizer, rng)


def _drop_words(text: str, stage: Stage, rng: random.Random) -> str:
    """Words dropped, swapped or misspelt, at a rate drawn from U(0, 0.3) times the corruption."""
    if not stage.corruption:
        return text
    rate, words = rng.uniform(0, 0.3) * stage.corruption, []
    for word in text.split():
        if rng.random() >= rate:
            words.append(word)
            continue
        choice = rng.random()
        if choice < 0.34 and words:
            words.insert(len(words) - 1, word)
        elif choice < 0.67:
            words.append(corpus.with_noise(word, rng))
    return " ".join(words) or text


def _corrupted(
    example: Example, start: int, stage: Stage, tokenizer: PreTrainedTokenizerFast, rng: random.Random
) -> Example:
    """Input tokens from `start` on made random, at a rate from U(0, 0.18) times the corruption; labels stay clean."""
    if not stage.corruption:
        return example
    rate = rng.uniform(0, 0.18) * stage.corruption
    first_word = len(tokenizer.all_special_ids)
    ids = [
        rng.randrange(first_word, len(tokenizer)) if position >= start and rng.random() < rate else token
        for position, token in enumerate(example.input_ids)
    ]
    return Example(ids, example.labels)
