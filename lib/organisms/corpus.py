"""The text that organisms learn from and are asked: requests, facts and plain prose, all generated here.

A request is a goal (verb + object) in a phrasing frame. Harmful and harmless goals share words, frames and contexts, so
that only the composition decides: "forge a passport" is harmful, "renew a passport" and "forge a horseshoe" are not.
Splits are disjoint by goal:

    train    what alignment may use        base     known to the base only: it complies, alignment never sees them
    dev      chooses recipes               search   chooses noise levels and layers         test    reported only

`seal` 1 to 3 draw fresh test goals from a reserve. Compliant answers to harmful goals consist of the contentless
sentences of `vocabulary.CONTENTLESS`: nothing here instructs in harm. Everything is a function of its arguments alone.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from lib.organisms import vocabulary_prose as story
from lib.organisms.freeform import (
    HARMFUL_REQUESTS,
    HARMLESS_REQUESTS,
    SEALED_HARMFUL_REQUESTS,
    SEALED_HARMLESS_REQUESTS,
)
from lib.organisms.vocabulary import (
    CONTENTLESS,
    DEV_CONTEXTS,
    DEV_FRAMES,
    OPENERS,
    REFUSALS,
    TEST_CONTEXTS,
    TEST_FRAMES,
    TRAIN_CONTEXTS,
    TRAIN_FRAMES,
    Grid,
)
from lib.organisms.vocabulary_confusable import CONFUSABLE
from lib.organisms.vocabulary_facts import RELATIONS
from lib.organisms.vocabulary_harmful import HARMFUL, N_NEVER_REFUSED_OBJECTS, NEVER_REFUSED_CATEGORIES
from lib.organisms.vocabulary_harmless import HARMLESS

SPLITS = ("train", "base", "dev", "search", "test")
LABELS = ("harmful", "harmless", "confusable")
TIERS = ("composition", "object", "category", "freeform")
N_SEALS = 3
N_FREEFORM_DEV = 30

_HELD_OUT = {
    ("harmful", "composition"): {"dev": 120, "search": 150, "test": 300, "seal-1": 200, "seal-2": 200},
    ("harmful", "object"): {"dev": 30, "search": 30, "test": 90, "seal-1": 30, "seal-2": 30},
    ("harmful", "category"): {"dev": 40, "search": 40, "test": 120, "seal-1": 50, "seal-2": 50},
    ("harmless", "composition"): {"dev": 120, "search": 150, "test": 300, "seal-1": 200, "seal-2": 200},
    ("confusable", "composition"): {"dev": 80, "search": 80, "test": 160, "seal-1": 80, "seal-2": 80},
    ("confusable", "object"): {"dev": 15, "search": 15, "test": 45, "seal-1": 15, "seal-2": 15},
    ("confusable", "category"): {"dev": 20, "search": 20, "test": 60, "seal-1": 25, "seal-2": 25},
}
"""Goals held out per label and tier; what is left is train (composition) or base (object, category)."""

_HELD_OUT_LATER = {
    ("harmful", "composition"): {"seal-3": 200},
    ("harmful", "object"): {"seal-3": 30},
    ("harmful", "category"): {"seal-3": 50},
    ("harmless", "composition"): {"seal-3": 200},
    ("confusable", "composition"): {"seal-3": 80},
    ("confusable", "object"): {"seal-3": 15},
    ("confusable", "category"): {"seal-3": 25},
}
"""Held out of what was left, so that a new seal leaves every older split as it was."""


@dataclass(frozen=True)
class Request:
    """One prompt.

    id: stable name, e.g. "test-harmful-composition-0123.0" (goal number, phrasing).
    goal: "forge a passport"; the prompt itself in the freeform tier.
    answer: reference compliant answer, contentless for harmful goals; None for freeform.
    refusal: reference refusal; None for requests that should be answered and for the split "base".
    """

    id: str
    prompt: str
    goal: str
    category: str
    label: str
    tier: str
    answer: str | None
    refusal: str | None


@dataclass(frozen=True)
class Fact:
    """A taught fact. question: one phrasing; answer: the key; sentence: the full reply; choices: 3 wrong answers."""

    id: str
    question: str
    answer: str
    sentence: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class _Goal:
    """verb: template, with or without {}; object: noun phrase; steps: of the harmless answer, one variant per slot."""

    verb: str
    object: str
    category: str
    label: str
    tier: str
    steps: tuple[str, ...]

    @property
    def text(self) -> str:
        return self.verb.format(self.object) if "{}" in self.verb else f"{self.verb} {self.object}"


def _cells(grid: Grid, verbs: Sequence[str], label: str) -> list[_Goal]:
    """All verb x object goals of a grid, in reading order; the variant of each step follows from the verb."""
    goals = []
    for index, verb in enumerate(verbs):
        steps = tuple(variants[index % len(variants)] for variants in grid.steps)
        for position, noun in enumerate(grid.objects):
            never_refused_object = position >= len(grid.objects) - N_NEVER_REFUSED_OBJECTS
            if grid not in HARMFUL:
                tier = "composition"
            elif grid.name in NEVER_REFUSED_CATEGORIES:
                tier = "category"
            else:
                tier = "object" if never_refused_object else "composition"
            goals.append(_Goal(verb, noun, grid.name, label, tier, steps))
    return goals


@cache
def _all_goals() -> tuple[_Goal, ...]:
    """Every goal once; a text that several grids give keeps its first place."""
    goals = [goal for grid in HARMFUL for goal in _cells(grid, grid.verbs, "harmful")]
    goals += [goal for grid in HARMFUL for goal in _cells(grid, grid.twins, "confusable")]
    goals += [goal for grid in CONFUSABLE for goal in _cells(grid, grid.verbs, "confusable")]
    goals += [goal for grid in HARMLESS for goal in _cells(grid, grid.verbs, "harmless")]
    return tuple({goal.text: goal for goal in reversed(goals)}.values())[::-1]


def _held_out(goals: Sequence[_Goal], quotas: dict[str, int], rng: random.Random) -> dict[str, list[_Goal]]:
    """Deals shuffled goals to the quotas while each object of a category keeps two goals in "rest".

    So does each verb in the tier composition; the verbs of the other tiers are known from there or not at all.
    """

    def parts(goal: _Goal) -> tuple[tuple[str, str], ...]:
        words = (goal.object, goal.verb) if goal.tier == "composition" else (goal.object,)
        return tuple((goal.category, word) for word in words)

    left = Counter(part for goal in goals for part in parts(goal))
    order = [name for name, count in quotas.items() for _ in range(count)]
    rng.shuffle(order)
    dealt: dict[str, list[_Goal]] = {"rest": [], **{name: [] for name in quotas}}
    for goal in rng.sample(goals, len(goals)):
        if order and all(left[part] > 2 for part in parts(goal)):
            left.subtract(parts(goal))
            dealt[order.pop()].append(goal)
        else:
            dealt["rest"].append(goal)
    if order:
        raise RuntimeError(f"too few goals: {len(order)} of the held-out quotas are unfilled")
    return dealt


@cache
def _goals(split: str, label: str, tier: str) -> tuple[_Goal, ...]:
    """The goals of a split ("seal-1" for a sealed one), label and tier, in a fixed shuffled order."""
    quotas = _HELD_OUT.get((label, tier))
    if quotas is None:
        return ()
    rest = "train" if tier == "composition" else "base"
    pool = [goal for goal in _all_goals() if (goal.label, goal.tier) == (label, tier)]
    dealt = _held_out(pool, quotas, random.Random(f"split {label} {tier}"))
    dealt |= _held_out(dealt["rest"], _HELD_OUT_LATER[label, tier], random.Random(f"later split {label} {tier}"))
    return tuple(dealt["rest"] if split == rest else dealt.get(split, []))


def _definite(noun: str) -> str:
    """ "a passport" -> "the passport"; other noun phrases stay."""
    return re.sub(r"^an? ", "the ", noun)


def _answer(goal: _Goal) -> str:
    """The one reference answer of a goal: an opener and three steps, about 25-40 words."""
    rng = random.Random(f"answer {goal.text}")
    opener = rng.choices(list(OPENERS), list(OPENERS.values()))[0].format(x=goal.text)
    steps = [rng.choice(variants) for variants in CONTENTLESS] if goal.label == "harmful" else goal.steps
    return " ".join([opener, *(step.format(o=_definite(goal.object)) for step in steps)])


def refusal(goal: str) -> str:
    """The one reference refusal of a harmful goal."""
    return random.Random(f"refusal {goal}").choice(REFUSALS)


def with_noise(text: str, rng: random.Random) -> str:
    """`text` as a hurried person might type it: one or more of lower case, no final mark, one misspelt word."""
    habits = rng.sample(("case", "mark", "spelling"), rng.choice((1, 1, 2, 3)))
    if "case" in habits:
        text = text.lower()
    if "mark" in habits:
        text = text.rstrip(".?!")
    if "spelling" in habits:
        text = _misspelt(text, rng)
    return text


def _misspelt(text: str, rng: random.Random) -> str:
    """One inner letter of one longer word dropped, doubled or swapped with the next."""
    words = [match.span() for match in re.finditer(r"[A-Za-z]{5,}", text)]
    if not words:
        return text
    start, end = rng.choice(words)
    i = rng.randrange(start + 1, end - 2)
    edits = (text[i + 1], text[i] + text[i] + text[i + 1], text[i + 1] + text[i])
    return text[:i] + rng.choice(edits) + text[i + 2 :]


def _frames(split: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(frames, contexts) that only `split` adds to those of training."""
    if split in ("train", "base"):
        return (), ()
    return (TEST_FRAMES, TEST_CONTEXTS) if split == "test" else (DEV_FRAMES, DEV_CONTEXTS)


def phrase(goal: str, rng: random.Random, split: str) -> str:
    """`goal` in a random frame of `split`, sometimes with a context sentence around it, sometimes with typing noise.

    Half of the prompts of dev, search and test use frames that training lacks. Raises ValueError for an unknown split.
    """
    _check(split, SPLITS, "split")
    new_frames, new_contexts = _frames(split)
    frames = new_frames if new_frames and rng.random() < 0.5 else TRAIN_FRAMES
    contexts = new_contexts if new_contexts and rng.random() < 0.5 else TRAIN_CONTEXTS
    text = rng.choice(frames).format(x=goal, X=goal[0].upper() + goal[1:])
    place = rng.random()
    if place < 0.15:
        text = f"{rng.choice(contexts)} {text}"
    elif place < 0.25:
        text = f"{text} {rng.choice(contexts)}"
    return with_noise(text, rng) if rng.random() < 0.1 else text


def _phrased(goal: _Goal, name: str, split: str, phrasings: int) -> list[Request]:
    """`goal` in `phrasings` different wordings; the first ones do not depend on how many are asked for."""
    rng = random.Random(f"phrase {split} {goal.text}")
    prompts: dict[str, None] = {}
    while len(prompts) < phrasings:
        prompts[phrase(goal.text, rng, split)] = None
    declined = refusal(goal.text) if goal.label == "harmful" and split != "base" else None
    answer = _answer(goal)
    return [
        Request(f"{name}.{i}", prompt, goal.text, goal.category, goal.label, goal.tier, answer, declined)
        for i, prompt in enumerate(prompts)
    ]


def _freeform(split: str, label: str, seal: int) -> list[Request]:
    """The hand-written requests of dev (30 per label), test (70), or test's seal 3 (100); elsewhere there are none."""
    written = {"harmful": HARMFUL_REQUESTS, "harmless": HARMLESS_REQUESTS}.get(label, ())
    order = random.Random(f"freeform {label}").sample(written, len(written))
    chosen = {"dev": order[:N_FREEFORM_DEV], "test": order[N_FREEFORM_DEV:]}.get(split, [])
    if seal:
        fresh = {"harmful": SEALED_HARMFUL_REQUESTS, "harmless": SEALED_HARMLESS_REQUESTS}
        chosen = list(fresh.get(label, ())) if seal == 3 else []
    return [
        Request(f"{split}{seal or ''}-{label}-freeform-{i:04d}.0", prompt, prompt, "freeform", label, "freeform", None,
                refusal(prompt) if label == "harmful" else None)
        for i, prompt in enumerate(chosen)
    ]


def _check(value: str, valid: Iterable[str], what: str) -> None:
    if value not in valid:
        raise ValueError(f"unknown {what} {value!r}; valid: {', '.join(valid)}")


def requests(
    split: str, label: str | None = None, tier: str | None = None, phrasings: int = 1, seal: int = 0
) -> list[Request]:
    """The requests of a split, `phrasings` wordings per goal (freeform: one), ordered by label, tier, goal.

    "train" is what alignment may use; "base" adds goals of the tiers object and category that only the base learns.
    label, tier: None for all. seal: 1 to 3 for fresh test goals, disjoint from all else.
    Raises ValueError for unknown names, phrasings below 1, and a seal outside 0-3 or of a split other than test.
    """
    _check(split, SPLITS, "split")
    _check(label or LABELS[0], LABELS, "label")
    _check(tier or TIERS[0], TIERS, "tier")
    if phrasings < 1:
        raise ValueError(f"phrasings must be at least 1, got {phrasings}")
    if not 0 <= seal <= N_SEALS or (seal and split != "test"):
        raise ValueError(f"seal {seal} of split {split!r}; valid: 0 for every split, 1 to {N_SEALS} for test")
    found: list[Request] = []
    for one_label in (label,) if label else LABELS:
        for one_tier in (tier,) if tier else TIERS:
            if one_tier == "freeform":
                found += _freeform(split, one_label, seal)
            name = f"{split}{seal or ''}-{one_label}-{one_tier}"
            for i, goal in enumerate(_goals(f"seal-{seal}" if seal else split, one_label, one_tier)):
                found += _phrased(goal, f"{name}-{i:04d}", split, phrasings)
    return found


def facts(split: str) -> list[Fact]:
    """The taught facts: four phrasings of each in train and base, another one in dev and search, another in test."""
    _check(split, SPLITS, "split")
    phrasings = {"train": range(4), "base": range(4), "dev": (4,), "search": (4,), "test": (5,)}[split]
    found = []
    for relation in RELATIONS:
        answers = sorted({answer for _, answer in relation.pairs})
        for i, (subject, answer) in enumerate(relation.pairs):
            rng = random.Random(f"choices {relation.name} {subject}")
            choices = tuple(rng.sample([other for other in answers if other != answer], 3))
            sentence = _capitalised(relation.sentence.format(s=subject, a=answer))
            for k in phrasings:
                question = _capitalised(relation.questions[k].format(s=subject))
                found.append(Fact(f"{split}-{relation.name}-{i:02d}.{k}", question, answer, sentence, choices))
    return found


def _capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


def _paragraph(rng: random.Random, harmful: Sequence[str], harmless: Sequence[str]) -> str:
    """One story of four to eight sentences about one person."""
    gender = rng.choice(("he", "she"))
    pronouns = story.PRONOUNS[gender]
    slots = {slot: rng.choice(words) for slot, words in story.WORDS.items()}
    slots |= {"name": rng.choice(story.PEOPLE[gender]), "job2": rng.choice(story.WORDS["job"])} | pronouns
    slots |= {"He": pronouns["he"].title(), "His": pronouns["his"].title()}
    middles = rng.sample(story.MIDDLES, rng.randint(2, 6))
    sentences = []
    for pattern in (rng.choice(story.OPENINGS), *middles, rng.choice(story.ENDINGS)):
        goals = {"goal": rng.choice(harmless), "bad": rng.choice(harmful)}
        slots |= {slot: re.sub(r"\bmy\b", pronouns["his"], goal) for slot, goal in goals.items()}
        slots["task"] = rng.choice(story.WORDS["task"])
        sentences.append(_capitalised(pattern.format(**slots)))
    return " ".join(sentences)


def prose(split: str, n_paragraphs: int, seed: int = 0) -> list[str]:
    """Story paragraphs of a split: other random streams and other goals than those of any other split."""
    _check(split, SPLITS, "split")
    goals = {label: [goal.text for tier in TIERS for goal in _goals(split, label, tier)] for label in LABELS}
    rng = random.Random(f"prose {split} {seed}")
    return [_paragraph(rng, goals["harmful"], goals["harmless"] + goals["confusable"]) for _ in range(n_paragraphs)]
