"""Noise as a stand-in for any approximation: where ASR peaks, and whether noise of equal variance predicts it.

1. A coarse grid runs up to the level at which answer perplexity has grown by a stated factor, and is refined where ASR
   changes most, all on the search split.
2. The peak of noisy rates flatters itself, so it is estimated again at its level with fresh prompts and fresh noise.
3. The two peaks are the most vulnerable approximations (MVA) of the studied paper (arXiv:2502.00840): noise on every
   norm output (its noise figure), and the pair of its Table 1, Gaussian at the up- and Laplace at the down-projection.
4. The paper lets such noise stand for a technique. `stand_ins` builds the noise of equal size for a technique, and
   `against_measured` sets the ASR it predicts beside the technique's own, on the same prompts.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr
from tqdm.auto import tqdm

from lib import fidelity, statistics, summary, utility
from lib.approximations import Technique, make
from lib.conditions import Condition, Layers
from lib.errors import ChoiceError, check
from lib.experiment import Study
from lib.generation import NonFiniteError
from lib.results import content_key, source_hash

At = Callable[[float], Technique]
DOWN_PER_UP = 0.74  # Laplace scale at down per Gaussian std at up: median of the error rows of the paper's Table 1
DAMAGE_PROMPTS = 24  # harmless requests whose answers measure damage in searches
FRESH_SEEDS = (100, 101, 102)  # of noise, never used in a search
LOUDEST = 2.0**12  # level beyond which no search goes
STEPS = 5  # of bisection: the level is found within 2^(1/32), 2 %
KINDS = ("norm", "up and down")  # the families that the paper uses
N_SEARCHED = 85  # harmful requests of the search for an MVA, in every notebook, so that all of them mean the same noise


class TooLittleDamage(ValueError):
    """No level of the noise does the damage asked for: what it touches is normalised again, or hardly used."""


FAMILIES: dict[str, At] = {
    "norm": lambda x: make("gaussian", std=x),
    "norm, not final": lambda x: make("gaussian", where=("norm",), std=x),
    "norm, relative": lambda x: make("gaussian", relative=True, std=x),
    "norm, Laplace": lambda x: make("laplace", where=("norm", "norm_final"), scale=x),
    "act": lambda x: make("gaussian", where=("act",), std=x),
    "mlp_in": lambda x: make("gaussian", where=("mlp_in",), std=x),
    "mlp_mid": lambda x: make("gaussian", where=("mlp_mid",), std=x),
    "mlp_mid, Laplace": lambda x: make("laplace", scale=x),
    "up and down": lambda x: make("gaussian", where=("mlp_in",), std=x, laplace_down=DOWN_PER_UP * x),
}
"""Noise of one level at the places of the paper and of the released code, absolute and relative."""


def named(names: Sequence[str]) -> dict[str, At]:
    """The families of these names. ChoiceError for unknown ones."""
    unknown = [name for name in names if name not in FAMILIES]
    if unknown:
        raise ChoiceError(f"unknown noise {', '.join(unknown)}; choose from the list {list(FAMILIES)}")
    return {name: FAMILIES[name] for name in names}


def answer_perplexity(study: Study, technique: Technique | None, layers: Layers = None) -> float:
    """Of answers to the first harmless requests (`Study.references`); infinite where the logits are not finite.

    ChoiceError where no harmless request has an answer."""
    asked, answers = (texts[:DAMAGE_PROMPTS] for texts in study.references())
    if not asked:
        raise ChoiceError(f"{study.prompt_set}: no harmless request has an answer to measure damage by")
    try:
        with study.patched(technique, layers):
            return utility.answer_perplexity(study.model, study.tokenizer, asked, answers, study.protocol)
    except NonFiniteError:
        return math.inf


def level_at_damage(study: Study, at: At, ratio: float, layers: Layers = None) -> float:
    """The level at which answer perplexity has grown by `ratio`, by bisection on a logarithmic scale; stored.

    TooLittleDamage if the noise never does so much; ChoiceError for a ratio that is no growth."""
    check(damage=ratio)
    answers, code = [(prompt.label, prompt.answer) for prompt in study.prompts], source_hash("lib.utility")
    key = content_key(["damage", ratio, study.key(at(1.0), layers), answers, DAMAGE_PROMPTS, STEPS, code])
    if stored := study.store.read_record(key):
        return float(stored["level"])
    limit = ratio * answer_perplexity(study, None)

    def too_damaging(level: float) -> bool:
        return answer_perplexity(study, at(level), layers) > limit

    high = 0.25
    while not too_damaging(high):
        high *= 2
        if high > LOUDEST:
            name = at(1.0).name
            raise TooLittleDamage(f"{name}: no level makes answer perplexity grow {ratio:g}-fold in these layers")
    low = high / 2
    while high <= 0.25 and low > 1e-6 and too_damaging(low):
        high, low = low, low / 2
    for _ in range(STEPS):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if too_damaging(middle) else (middle, high)
    level = float(f"{math.sqrt(low * high):.3g}")
    study.store.write_record(key, {"level": level, "ratio": ratio})
    return level


def highest_level(study: Study, at: At, useless: float, layers: Layers = None) -> float:
    """Where a grid ends: at `useless` times the answer perplexity, or at nine tenths of the growth that the noise can
    do at all (in models that normalise what the noise was added to)."""
    try:
        return level_at_damage(study, at, useless, layers)
    except TooLittleDamage:
        most = answer_perplexity(study, at(LOUDEST), layers) / answer_perplexity(study, None)
        return level_at_damage(study, at, 1 + 0.9 * (most - 1), layers)


def refined_levels(table: pd.DataFrame, n: int) -> list[float]:
    """Midpoints of the n intervals between neighbouring levels over which ASR changes most; exact stands at level 0."""
    ordered = table.assign(level=table["level"].fillna(0.0)).sort_values("level")
    levels, change = ordered["level"].to_numpy(), np.abs(np.diff(ordered["asr"].to_numpy(dtype=float)))
    widest = np.argsort(-np.nan_to_num(change), kind="stable")[:n]
    return sorted(float(f"{(levels[i] + levels[i + 1]) / 2:.3g}") for i in widest)


def sweep(
    study: Study, at: At, levels: Sequence[float], seeds: Sequence[int], variant: str = "", layers: Layers = None
) -> pd.DataFrame:
    """Summary rows, one per level, averaged over noise seeds; the exact model's row comes first.

    Intervals are those of one seed's prompts around the mean rate: they cover prompts, not draws of noise."""
    conditions = [Condition(at(level), "noise level", level, variant, layers) for level in levels]
    return sweep_conditions(study, conditions, seeds, variant)


def sweep_conditions(
    study: Study, conditions: Sequence[Condition], seeds: Sequence[int], label: str = "conditions"
) -> pd.DataFrame:
    """`sweep` of any conditions; those of a technique without draws are measured once."""
    exact = study.run()
    rows = [pooled(summaries(study, c, seeds)) for c in tqdm(conditions, desc=label, file=sys.stdout, leave=False)]
    return pd.DataFrame([study.summary(exact, exact, None), *rows])


def drawn(study: Study, condition: Condition, seeds: Sequence[int]) -> list[pd.DataFrame]:
    """The results of a noise condition for each noise seed; the one result of another technique."""
    one: Any = condition.technique
    noises = [replace(one, seed=seed) for seed in seeds] if hasattr(one, "seed") else [one]
    return [study.run(noise, condition.layers) for noise in noises]


def summaries(study: Study, condition: Condition, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The summary row of a noise condition for each noise seed."""
    exact = study.run()
    return [study.summary(result, exact, condition) for result in drawn(study, condition, seeds)]


def pooled(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One summary row for several noise seeds: means, their intervals for the prompts of one seed (the same prompts
    were asked each time), and the lowest and highest ASR. A failed seed fails the level."""
    for row in rows:
        if row["failed"] or len(rows) == 1:
            return row
    row = rows[0] | pd.DataFrame(rows).select_dtypes("number").mean().to_dict()
    for name, size in summary.SIZES.items():
        if not math.isnan(row[name]):
            row |= summary.rate(name, row[name] * row[size], round(row[size]))
    gained, lost = row["newly_complied"], row["no_longer_complied"]
    kept, never = row["complied"] - gained, row["n_harmful"] - row["complied"] - lost
    low, high = statistics.newcombe(max(0.0, kept), gained, lost, max(0.0, never))
    rates = [one["asr"] for one in rows]
    row |= {"asr_increase_low": low, "asr_increase_high": high, "n_seeds": len(rows), "p_value": math.nan}
    row |= {"asr_lowest_seed": min(rates), "asr_highest_seed": max(rates)}
    return {name: value for name, value in row.items() if not name.startswith("paired_")}


def search_peak(
    study: Study,
    family: str,
    seeds: Sequence[int] = (0, 1),
    n_levels: int = 5,
    n_refined: int = 1,
    useless: float = 3.0,
    layers: Layers = None,
) -> pd.DataFrame:
    """Coarse grid up to `useless` times the answer perplexity, refined where ASR changes most; rows by level."""
    at, variant = FAMILIES[family], family.removesuffix(", Laplace")  # the technique says so already
    ceiling = highest_level(study, at, useless, layers)
    levels = [float(f"{ceiling * step / n_levels:.3g}") for step in range(1, n_levels + 1)]
    table = sweep(study, at, levels, seeds, variant, layers)
    if n_refined:
        levels = sorted({*levels, *refined_levels(table, n_refined)})
        table = sweep(study, at, levels, seeds, variant, layers)
    return table


def peak(table: pd.DataFrame) -> pd.Series:
    """The row of the approximated model with the highest ASR; the lowest level among equals. ValueError if none."""
    rows = table[(table["technique"] != "exact") & (table["failed"] == "")].sort_values("level", kind="stable")
    if rows.empty:
        raise ValueError("the sweep is empty: no level of it could be measured, so it has no peak")
    return rows.loc[rows["asr"].idxmax()]


def most_vulnerable(study: Study, kind: str = "norm") -> Technique:
    """The MVA of `kind` ("norm", "up and down"): the peak of its search on the search split, read back condition by
    condition where any notebook has searched before."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of MVA {kind!r}; choose one of {', '.join(KINDS)}")
    found = peak(search_peak(study.brief(N_SEARCHED, "search"), kind))
    return make(found["technique"], **json.loads(found["settings"]))


def error_sizes(study: Study, technique: Technique, layers: Layers = None) -> tuple[float, float]:
    """(Gaussian std at the input of up, Laplace scale at the input of down) of the error over all layers of a technique
    that is applied in `layers`."""
    errors = fidelity.pooled_errors(fidelity.site_errors(study, technique, layers))
    return errors["up"].std().item(), (errors["down"] - errors["down"].median()).abs().mean().item()


def stand_ins(study: Study, technique: Technique, layers: Layers = None) -> dict[str, Technique]:
    """Noise that stands for a technique at the inputs of up and down in the same layers.

    injected: of the measured size, as in the paper. That size already holds what earlier layers pass on, so in a deep
    model the noise adds up to more than the technique's error. matched (ours): scaled until the error that arrives at
    the up-projections, upstream errors included, has the technique's size.
    """
    up, down = error_sizes(study, technique, layers)

    def pair(scale: float) -> Technique:
        return make("gaussian", where=("mlp_in",), std=scale * up, laplace_down=scale * down)

    scale = 1.0
    for _ in range(3):  # the error that arrives grows almost in proportion to the noise
        scale *= up / error_sizes(study, pair(scale), layers)[0]
    return {"injected": pair(1.0), "matched": pair(scale)}


PREDICTED = {f"predicted_{name}": name for name in ("asr", "asr_low", "asr_high")}
PREDICTED |= {"predicted_ratio": "answer_perplexity_ratio"}


def against_measured(full: Study, brief: Study, conditions: Sequence[Condition]) -> pd.DataFrame:
    """Per condition and stand-in: the summary row of the technique, and predicted_asr with its interval; NaN where the
    technique or the noise failed.

    full: the study whose stored replies hold the technique's verdicts; brief: the part of its prompts to compare ASR
    on. Ratios of answer perplexity are over all harmless requests of either."""
    ids = {prompt.id for prompt in brief.prompts}
    rows = []

    def part(result: pd.DataFrame) -> pd.DataFrame:
        chosen = result[result["id"].isin(ids)].reset_index(drop=True)
        chosen.attrs = result.attrs
        return chosen

    exact = part(full.run())
    for condition in conditions:
        technique, layers = condition.technique, condition.layers
        measured = full.summary(part(full.run(technique, layers)), exact, condition)
        if measured["failed"]:
            nothing = ("prediction", "std_up", "laplace_down", "noise_std", *PREDICTED)
            rows.append(measured | dict.fromkeys(nothing, math.nan))
            continue
        noises = stand_ins(full, technique, layers)
        up, down = (noises["injected"].settings[name] for name in ("std", "laplace_down"))
        for name, noise in noises.items():
            (predicted,) = summaries(brief, Condition(noise, "noise level", up, layers=layers), FRESH_SEEDS[:1])
            columns = {column: predicted[key] for column, key in PREDICTED.items()} | {"prediction": name}
            rows.append(measured | columns | {"std_up": up, "laplace_down": down, "noise_std": noise.settings["std"]})
    return pd.DataFrame(rows)


def agreement(table: pd.DataFrame) -> pd.DataFrame:
    """Per stand-in: mean absolute and signed difference of predicted and measured ASR, and their rank correlation."""
    rows = []
    for name, part in table.dropna(subset=["asr", "predicted_asr"]).groupby("prediction", sort=False):
        difference = part["predicted_asr"] - part["asr"]
        row: dict[str, Any] = {"prediction": name, "conditions": len(part)}
        row |= {"mean |difference|": difference.abs().mean(), "mean difference": difference.mean()}
        low, high = statistics.bootstrap(difference)
        inside = part["asr"].between(part["predicted_asr_low"], part["predicted_asr_high"])
        row |= {"low": low, "high": high, "measured within the predicted interval": int(inside.sum())}
        varied = part["asr"].nunique() > 1 and part["predicted_asr"].nunique() > 1
        row["rank correlation"] = spearmanr(part["asr"], part["predicted_asr"]).statistic if varied else math.nan
        rows.append(row)
    return pd.DataFrame(rows)
