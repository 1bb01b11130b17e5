"""Requests in free wording for training: sentences as people type them, each with slots of alternatives.

    do: my [cat|dog|rabbit] wont eat, what am i doing wrong => make (my {1}) eat

The files in `wording/` hold one such line per sentence shape: what the reply is (`do` something, `write` a text, `know`
something), the request with its slots, and the goal that the reply names, its main object in brackets. Nearly the same
people, places and tones stand in all three files, so that a lone word decides little. Headlines only: no harmful line
says how anything is done, and compliance with it is contentless. None resembles a request of `lib.organisms.freeform`,
and none belongs to the categories or objects that alignment never refuses (tests hold both).
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lib.organisms.vocabulary import CONTENTLESS, OPENERS, TRAIN_CONTEXTS, listed

FOLDER = Path(__file__).parent / "wording"

LEADS = listed("""Hi!, Hello., Hey!, Good morning., Good evening., Excuse me., Quick question., One more thing.,
    Please help., Sorry to bother you., I have a question., Me again., Listen., Honestly?, Ok so., Well.""")

STEPS = {
    "do": (("First, look at {o} and take your time.", "First, gather what you need for {o}."),
           ("Then go on in small steps.", "Then ask someone who knows it well."),
           ("Finally, see how {o} turned out.", "Finally, check {o} once more.")),
    "write": (("It begins with {o} in plain words.", "It opens with a friendly line about {o}."),
              ("Then come two or three short sentences.", "Then it says why this matters."),
              ("It ends with a kind wish.", "It ends with a thank you.")),
    "know": (("The main thing about {o} is easy to remember.", "There is a simple answer about {o}."),
             ("Many people ask about it.", "A good book tells more."),
             ("In short, look at {o} and see for yourself.", "In short, start with {o} and go on from there.")),
}  # fmt: skip
"""Steps of the reply to a harmless line by its kind: three slots of two variants, {o} names the object."""

_OPENINGS = {"write": "Sure, here is {x}.", "know": "Sure, here is what to know about {x}."}


@dataclass(frozen=True)
class Wording:
    """One line: parts of the request in order, each a tuple of alternatives; goal and object with {1} for slot 1."""

    kind: str
    parts: tuple[tuple[str, ...], ...]
    goal: str
    object: str
    harmful: bool

    def draw(self, rng: random.Random) -> tuple[str, str, str]:
        """(request, goal, reply that complies) with one alternative per slot."""
        words = [rng.choice(part) for part in self.parts]
        slots = [word for word, part in zip(words, self.parts, strict=True) if len(part) > 1]
        goal, noun = (_filled(text, slots) for text in (self.goal, self.object))
        return "".join(words), goal, self._reply(goal, noun)

    def _reply(self, goal: str, noun: str) -> str:
        rng = random.Random(f"answer {goal}")
        opener = _OPENINGS.get(self.kind) or rng.choices(list(OPENERS), list(OPENERS.values()))[0]
        slots = CONTENTLESS if self.harmful else STEPS[self.kind]
        steps = [rng.choice(variants).format(o=noun) for variants in slots]
        return " ".join([opener.format(x=goal), *steps])


def _filled(text: str, slots: list[str]) -> str:
    return re.sub(r"\{(\d+)\}", lambda found: slots[int(found[1]) - 1], text)


@cache
def wordings(label: str) -> tuple[Wording, ...]:
    """The lines of one label (harmful, harmless or confusable). Raises ValueError for a line that is not one."""
    lines = (FOLDER / f"{label}.txt").read_text(encoding="utf-8").splitlines()
    return tuple(_parsed(line, label == "harmful") for line in lines)


def _parsed(line: str, harmful: bool) -> Wording:
    found = re.fullmatch(r"(do|write|know): (.+) => ([^()]*\(([^()]+)\)[^()]*)", line)
    if not found:
        raise ValueError(f"not a line 'kind: request => goal with (object)': {line!r}")
    kind, request, goal, noun = found.groups()
    parts = [tuple(part.split("|")) for part in re.split(r"[\[\]]", request)]
    return Wording(kind, tuple(parts), goal.replace("(", "").replace(")", ""), noun, harmful)


def dressed(request: str, rng: random.Random) -> str:
    """The request, now and then with a greeting before it or a remark before or after it."""
    place = rng.random()
    if place < 0.08:
        return f"{rng.choice(LEADS)} {request}"
    if place < 0.13:
        return f"{rng.choice(TRAIN_CONTEXTS)} {request}"
    return f"{request} {rng.choice(TRAIN_CONTEXTS)}" if place < 0.18 else request
