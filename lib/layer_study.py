"""Which layers carry safety: prefixes, suffixes, single layers and thirds, at equal level and at equal damage.

An approximation of one level damages early layers more, because its error passes through all later ones. So layers are
also compared at equal damage: the level at which answer perplexity has grown by the same factor. The paper's second
observation (arXiv:2502.00840), that the first layers matter most, is tested as a paired difference: the same prompts
with the first third of the layers approximated, and with the last.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lib import statistics
from lib.approximations import Technique
from lib.conditions import Condition, layer_text
from lib.errors import ChoiceError
from lib.experiment import Study
from lib.noise_study import At, TooLittleDamage, drawn, level_at_damage, pooled, summaries

log = logging.getLogger(__name__)

THIRDS = ("early third", "middle third", "late third")
LayerSets = dict[str, list[tuple[int, ...]]]


def layer_sets(n_layers: int, most: int = 8) -> LayerSets:
    """Layer sets by kind: prefix and suffix of growing length, single layers; at most `most` of each, evenly spread."""
    marks = np.unique(np.linspace(0, n_layers - 1, min(most, n_layers)).round().astype(int)).tolist()
    everything = tuple(range(n_layers))
    return {
        "prefix": [everything[: mark + 1] for mark in marks],
        "suffix": [everything[mark:] for mark in marks],
        "single": [(mark,) for mark in marks],
    }


def thirds(n_layers: int) -> LayerSets:
    """The three thirds of the layers by name. ChoiceError for fewer than three layers."""
    if n_layers < 3:
        raise ChoiceError(f"thirds need at least 3 layers, this model has {n_layers}")
    parts = np.array_split(np.arange(n_layers), 3)
    return {name: [tuple(part.tolist())] for name, part in zip(THIRDS, parts, strict=True)}


def at_level(technique: Technique, level_name: str, level: float, sets: LayerSets) -> list[Condition]:
    """The technique in every layer set; `variant` is the set's kind."""
    return [Condition(technique, level_name, level, kind, layers) for kind, chosen in sets.items() for layers in chosen]


def at_damage(search: Study, at: At, ratio: float, sets: LayerSets) -> list[Condition]:
    """In every layer set the noise whose answer perplexity has grown by `ratio` there; levels from the search split.

    Sets in which no level does so much damage are left out with a warning. ChoiceError for a ratio that is no growth.
    """
    conditions = []
    for kind, chosen in sets.items():
        for layers in chosen:
            try:
                level = level_at_damage(search, at, ratio, layers)
            except TooLittleDamage as error:
                log.warning("layers %s left out: %s", layer_text(layers), error)
            else:
                conditions.append(Condition(at(level), "noise level", level, kind, layers))
    return conditions


def early_against_late(
    study: Study, pairs: Mapping[str, Sequence[Condition]], seeds: Sequence[int] = (0,)
) -> pd.DataFrame:
    """The paper's second observation: ASR with the early minus ASR with the late condition of each pair, same prompts.

    seeds: the draws of noise over which the verdicts on a prompt are averaged. Columns: the rates, the paired
    difference with its 95 % interval (Newcombe's; of several draws the bootstrap's over prompts), its exact McNemar or
    randomisation p and Holm's over the pairs (all NaN where a condition failed), both answer-perplexity ratios; "held":
    the interval lies above 0."""
    rows = []
    for name, (early, late) in pairs.items():
        results = [drawn(study, condition, seeds) for condition in (early, late)]
        first, last = (pooled(summaries(study, condition, seeds)) for condition in (early, late))
        row: dict[str, Any] = {"comparison": name, "layers": f"{first['layers']} / {last['layers']}"}
        row |= {column: first[column] for column in ("technique", "n_harmful", "n_harmless")}
        row |= {"early ASR": first["asr"], "late ASR": last["asr"], **_difference(*results)}
        row |= {"early ratio": first["answer_perplexity_ratio"], "late ratio": last["answer_perplexity_ratio"]}
        rows.append(row | {"held": row["low"] > 0})
    table = pd.DataFrame(rows)
    table.insert(table.columns.get_loc("p") + 1, "p (Holm)", statistics.holm(table["p"].tolist()))
    return table


def _difference(early: Sequence[pd.DataFrame], late: Sequence[pd.DataFrame]) -> dict[str, float]:
    """ASR of `early` minus that of `late` on the same prompts, its limits and p; NaN where a draw failed."""
    names = ("difference", "low", "high", "p")
    if any(result.attrs["failed"] for result in (*early, *late)):
        return dict.fromkeys(names, math.nan)
    complied = [
        np.array([result.loc[result["label"] == "harmful", "verdict"] == "complied" for result in draws])
        for draws in (late, early)
    ]
    if len(early) == len(late) == 1:
        change = statistics.paired_difference(*(outcomes[0] for outcomes in complied))
        return dict(zip(names, (change.difference, change.low, change.high, change.p_value), strict=True))
    return dict(zip(names, statistics.paired_means(*(outcomes.mean(0) for outcomes in complied)), strict=True))
