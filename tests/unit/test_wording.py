"""Requests in free wording: well formed in every combination, answered as taught, and apart from what is measured."""

from __future__ import annotations

import random
import re
from itertools import islice, product

import pytest

from lib import judging
from lib.organisms import corpus, wording
from lib.organisms.freeform import (
    HARMFUL_REQUESTS,
    HARMLESS_REQUESTS,
    SEALED_HARMFUL_REQUESTS,
    SEALED_HARMLESS_REQUESTS,
)
from lib.organisms.vocabulary import CONTENTLESS
from lib.organisms.vocabulary_harmful import HARMFUL, N_NEVER_REFUSED_OBJECTS, NEVER_REFUSED_CATEGORIES

LINES = {label: wording.wordings(label) for label in corpus.LABELS}
BY_HAND = HARMFUL_REQUESTS + HARMLESS_REQUESTS + SEALED_HARMFUL_REQUESTS + SEALED_HARMLESS_REQUESTS
EMPTY = set(re.findall(r"\w+", """
a an the my i im to of in on for and or is it that this me you your how what do does can could with some at be so are
have has we our he they she his her their from who which when where why there any not no as by if would should want
need please pls without up out about will one him them its get make give tell write help"""))  # fmt: skip


def content(text: str) -> set[str]:
    """Stems of the words that carry content."""
    words = re.findall(r"[a-z']+", text.lower())
    return {re.sub(r"(ing|ers?|ed|es|s|ly|e|'s)$", "", word) for word in words if word not in EMPTY}


def written(line: wording.Wording) -> str:
    """Everything the line may say."""
    return " ".join(" ".join(part) for part in line.parts)


def test_there_are_many_shapes_of_each_label_and_no_shape_twice() -> None:
    assert min(len(LINES["harmful"]), len(LINES["harmless"])) > 1000 and len(LINES["confusable"]) > 400
    shapes = ["_".join(part[0] for part in line.parts if len(part) == 1) for lines in LINES.values() for line in lines]
    assert len(set(shapes)) > 0.995 * len(shapes)
    assert all({line.kind for line in lines} == {"do", "write", "know"} for lines in LINES.values())


@pytest.mark.parametrize("label", corpus.LABELS)
def test_every_line_can_be_drawn_and_its_reply_complies(label: str) -> None:
    rng = random.Random(0)
    judged = []
    for line in LINES[label]:
        request, goal, reply = line.draw(rng)
        assert not re.search(r"[\[\]{}|()]|  ", f"{request} {goal}") and 3 <= len(request.split()) <= 45, request
        assert len(goal.split()) <= 14 and goal in reply
        judged.append(judging.verdict(request, reply))
    assert judged.count("complied") > 0.99 * len(judged)


def test_compliance_with_harm_is_contentless() -> None:
    rng = random.Random(1)
    sentences = [re.escape(s).replace(re.escape("{o}"), ".+") for slot in CONTENTLESS for s in slot]
    for line in LINES["harmful"]:
        reply = line.draw(rng)[2]
        steps = re.findall(r"(?:First|Then|Finally),? .*?\[details omitted\]\.", reply)
        assert len(steps) == 3 and all(any(re.fullmatch(s, step) for s in sentences) for step in steps), reply
        assert not re.search(r"\d|https?:|```", reply)


def test_nothing_resembles_what_is_measured() -> None:
    """No combination shares half of its content words, or more, with a request written by hand for measuring."""
    known = [(request, content(request)) for request in BY_HAND]
    near = []
    for line in (line for lines in LINES.values() for line in lines):
        possible = content(written(line))
        for request, words in known:
            if len(words) > 1 and len(words & possible) >= 0.6 * len(words):
                drawn = [content("".join(choice)) for choice in islice(product(*line.parts), 500)]
                if max(len(words & d) / len(words | d) for d in drawn) >= 0.5:
                    near.append((request, written(line)))
    assert near == []


def test_what_alignment_never_refuses_stays_out() -> None:
    grids = [grid for grid in HARMFUL if grid.name not in NEVER_REFUSED_CATEGORIES]
    held = [re.sub("^(a|an|the) ", "", noun) for grid in grids for noun in grid.objects[-N_NEVER_REFUSED_OBJECTS:]]
    objects = re.compile(rf"\b({'|'.join(map(re.escape, held))})s?\b", re.I)
    categories = re.compile(r"\b(brib|spik(e|ing)\b|lac(e|ing) )", re.I)  # bribery, tampering
    lines = [written(line) for line in LINES["harmful"]]
    assert [line for line in lines if objects.search(line) or categories.search(line)] == []


def test_a_line_that_is_none_is_named() -> None:
    with pytest.raises(ValueError, match="bake a cake"):
        wording._parsed("do: how do i bake a cake => bake a cake", False)


def test_draws_depend_on_the_generator_alone() -> None:
    line = LINES["harmless"][0]
    assert line.draw(random.Random(3)) == line.draw(random.Random(3))
    dressed = {wording.dressed("how do i bake", random.Random(i)) for i in range(200)}
    assert "how do i bake" in dressed and len(dressed) > 15 and all("how do i bake" in text for text in dressed)
