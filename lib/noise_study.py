"""Noise as a stand-in for any approximation: where ASR peaks, and whether noise of equal variance predicts it.

1. A coarse grid runs up to the level at which answer perplexity has grown by a stated factor, and is refined where ASR
   changes most, all on the search split.
2. The peak of noisy rates flatters itself, so it is estimated again at its level with fresh prompts and fresh noise.
3. The two peaks, the most vulnerable approximations (MVA) of the studied paper (arXiv:2502.00840), are kept for the
   defence: noise on every norm output (its noise figure), and Gaussian noise at the up- with Laplace noise at the
   down-projection (its Table 1).
4. The paper lets such noise stand for a technique. `stand_ins` builds the noise of equal size for a technique, and
   `against_measured` sets the ASR it predicts beside the technique's own, on the same prompts.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr
from tqdm.auto import tqdm

from lib import fidelity, statistics, utility
from lib.approximations import Technique, make
from lib.experiment import Condition, Layers, Study
from lib.generation import NonFiniteError
from lib.patching import approximated
from lib.paths import atomic
from lib.results import content_key, source_hash

At = Callable[[float], Technique]
DOWN_PER_UP = 0.74  # Laplace scale at down per Gaussian std at up: median of the error rows of the paper's Table 1
DAMAGE_PROMPTS = 24  # harmless requests whose reference answers measure damage in searches
FRESH_SEEDS = (100, 101, 102)  # of noise, never used in a search
LOUDEST = 2.0**12  # level beyond which no search goes
STEPS = 5  # of bisection: the level is found within 2^(1/32), 2 %
KINDS = ("norm", "up and down")  # the families that the paper uses


class TooLittleDamage(ValueError):
    """No level of the noise does the damage asked for: what it touches is normalised again, or hardly used."""


def families() -> dict[str, At]:
    """Name -> noise of one level: the places of the paper and of the released code, absolute and relative."""

    def noise(name: str = "gaussian", **fixed: Any) -> At:
        return lambda level: make(name, **{"std" if name == "gaussian" else "scale": level}, **fixed)

    return {
        "norm": noise(),
        "norm, not final": noise(where=("norm",)),
        "norm, relative": noise(relative=True),
        "norm, Laplace": noise("laplace", where=("norm", "norm_final")),
        "act": noise(where=("act",)),
        "mlp_in": noise(where=("mlp_in",)),
        "mlp_mid": noise(where=("mlp_mid",)),
        "mlp_mid, Laplace": noise("laplace"),
        "up and down": lambda x: make("gaussian", where=("mlp_in",), std=x, laplace_down=DOWN_PER_UP * x),
    }


def answer_perplexity(study: Study, technique: Technique | None, layers: Layers = None) -> float:
    """Of the first harmless requests' reference answers; infinite where the logits are not finite."""
    rows = [i for i in study.rows("harmless") if study.prompts[i].answer][:DAMAGE_PROMPTS]
    asked, answers = ([getattr(study.prompts[i], name) for i in rows] for name in ("prompt", "answer"))
    state = None if technique is None else study.state(technique)
    patch = nullcontext() if technique is None else approximated(study.model, technique, state, layers)
    try:
        with patch:
            return utility.answer_perplexity(study.model, study.tokenizer, asked, answers, study.protocol)
    except (NonFiniteError, OverflowError):
        return math.inf


def level_at_damage(study: Study, at: At, ratio: float, layers: Layers = None) -> float:
    """The level at which answer perplexity has grown by `ratio`, by bisection on a logarithmic scale; stored.

    TooLittleDamage if the noise never does so much."""
    key = content_key(["damage", ratio, study.key(at(1.0), layers), DAMAGE_PROMPTS, STEPS])
    if stored := study.store.read_record(key):
        return float(stored["level"])
    limit = ratio * answer_perplexity(study, None)

    def harmful(level: float) -> bool:
        return answer_perplexity(study, at(level), layers) > limit

    high = 0.25
    while not harmful(high):
        high *= 2
        if high > LOUDEST:
            name = at(1.0).name
            raise TooLittleDamage(f"{name}: no level makes answer perplexity grow {ratio:g}-fold in these layers")
    low = high / 2
    while high <= 0.25 and low > 1e-6 and harmful(low):
        high, low = low, low / 2
    for _ in range(STEPS):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if harmful(middle) else (middle, high)
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


def coarse_levels(ceiling: float, n: int) -> list[float]:
    """n equal steps up to the ceiling, to three digits."""
    return [float(f"{ceiling * step / n:.3g}") for step in range(1, n + 1)]


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

    Intervals are Wilson's for one seed's number of prompts, as if more seeds told nothing: a little too wide."""
    exact = study.run()
    conditions = [Condition(at(level), "noise level", level, variant, layers) for level in levels]
    rows = [pooled(summaries(study, c, seeds)) for c in tqdm(conditions, desc=variant, file=sys.stdout, leave=False)]
    return pd.DataFrame([study.summary(exact, exact, None), *rows])


def summaries(study: Study, condition: Condition, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The summary row of a noise condition for each noise seed."""
    exact, noises = study.run(), [replace(condition.technique, seed=seed) for seed in seeds]  # type: ignore[call-arg]
    return [study.summary(study.run(noise, condition.layers), exact, condition) for noise in noises]


def pooled(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One summary row for several noise seeds: means, and the lowest and highest ASR. A failed seed fails the level."""
    for row in rows:
        if row["failed"] or len(rows) == 1:
            return row
    row = rows[0] | pd.DataFrame(rows).select_dtypes("number").mean().to_dict()
    rates = [one["asr"] for one in rows]
    row |= {"n_seeds": len(rows), "asr_lowest_seed": min(rates), "asr_highest_seed": max(rates), "p_value": math.nan}
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
    at, variant = families()[family], family.removesuffix(", Laplace")  # the technique says so already
    levels = coarse_levels(highest_level(study, at, useless, layers), n_levels)
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


def keep_most_vulnerable(study: Study, kind: str, found: pd.Series, fresh: pd.Series) -> dict[str, Any]:
    """Writes the MVA of `kind` into mva.json of the study's store, with what search and fresh data gave; the record."""
    measures = ["split", "n_harmful", "n_seeds", "asr", "asr_low", "asr_high", "answer_perplexity_ratio"]
    record: dict[str, Any] = {"technique": found["technique"], "settings": json.loads(found["settings"])}
    record |= {"level": float(found["level"]), **_identity(study)}
    for name, row in (("search", found), ("fresh", fresh)):
        record[name] = json.loads(row.reindex(measures).dropna().to_json())
    path = study.store.folder / "mva.json"
    stored = json.loads(path.read_text()) if path.is_file() else {}
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(stored | {kind: record}, indent=1))
    return record


def _identity(study: Study) -> dict[str, str]:
    """What a stored MVA is valid for."""
    return {"weights": study.identity["weights"], "code": source_hash("lib.approximations.noise", "lib.patching")}


def stored_most_vulnerable(study: Study, kind: str) -> Technique | None:
    """The stored MVA for these weights and this noise, or None."""
    path = study.store.folder / "mva.json"
    record = json.loads(path.read_text()).get(kind) if path.is_file() else None
    if record is None or any(record[name] != value for name, value in _identity(study).items()):
        return None
    return make(record["technique"], **record["settings"])


def most_vulnerable(study: Study, kind: str = "norm", n: int = 85, useless: float = 3.0) -> Technique:
    """The MVA of `kind` ("norm", "up and down"): the stored one, else searched for on the search split and stored.

    n: harmful requests, the same in notebooks 04 to 07, so that it does not matter which of them comes first."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of MVA {kind!r}; choose one of {', '.join(KINDS)}")
    found = stored_most_vulnerable(study, kind)
    if found is None:
        row = peak(search_peak(study.brief(n, "search"), kind, useless=useless))
        fresh = peak(sweep(study.brief(n), families()[kind], [row["level"]], FRESH_SEEDS))
        keep_most_vulnerable(study, kind, row, fresh)
        found = make(row["technique"], **json.loads(row["settings"]))
    return found


def error_sizes(study: Study, technique: Technique) -> tuple[float, float]:
    """(Gaussian std at the input of up, Laplace scale at the input of down) of a technique's error over all layers."""
    errors = fidelity.site_errors(study, technique)
    up, down = (
        torch.cat([value.flatten() for name, value in errors.items() if name.endswith(site)])
        for site in fidelity.PAPER_SITES.values()
    )
    return up.std().item(), (down - down.median()).abs().mean().item()


def stand_ins(study: Study, technique: Technique) -> dict[str, Technique]:
    """Noise that stands for a technique at the inputs of up and down in every block.

    injected: of the measured size, as in the paper. That size already holds what earlier layers pass on, so in a deep
    model the noise adds up to more than the technique's error. matched (ours): scaled until the error that arrives at
    the up-projections, upstream errors included, has the technique's size.
    """
    up, down = error_sizes(study, technique)
    at = families()["up and down"]
    scale, pair = 1.0, make("gaussian", where=("mlp_in",), std=up, laplace_down=down)
    noises = {"injected": pair}
    for _ in range(3):  # the error that arrives grows almost in proportion to the noise
        scale *= up / error_sizes(study, pair)[0]
        pair = replace(at(1.0), std=scale * up, laplace_down=scale * down)  # type: ignore[call-arg]
    return noises | {"matched": pair}


def against_measured(
    full: Study, brief: Study, conditions: Sequence[Condition], seeds: Sequence[int] = FRESH_SEEDS[:1]
) -> pd.DataFrame:
    """Per condition and stand-in: the summary row of the technique, and predicted_asr with its interval.

    full: the study whose stored replies hold the technique's verdicts; brief: the part of its prompts to compare on."""
    ids = {prompt.id for prompt in brief.prompts}
    rows = []

    def part(result: pd.DataFrame) -> pd.DataFrame:
        chosen = result[result["id"].isin(ids)].reset_index(drop=True)
        chosen.attrs = result.attrs
        return chosen

    exact = part(full.run())
    for condition in conditions:
        measured = full.summary(part(full.run(condition.technique)), exact, condition)
        up, down = error_sizes(full, condition.technique)
        for name, noise in stand_ins(full, condition.technique).items():
            predicted = pooled(summaries(brief, Condition(noise, "noise level", up), seeds))
            columns = {f"predicted_{key}": predicted[key] for key in ("asr", "asr_low", "asr_high")}
            columns |= {"predicted_ratio": predicted["answer_perplexity_ratio"], "prediction": name}
            rows.append(measured | columns | {"std_up": up, "laplace_down": down, "noise_std": noise.settings["std"]})
    return pd.DataFrame(rows)


def agreement(table: pd.DataFrame) -> pd.DataFrame:
    """Per stand-in: mean absolute and signed difference of predicted and measured ASR, and their rank correlation."""
    rows = []
    for name, part in table[table["failed"] == ""].groupby("prediction", sort=False):
        difference = part["predicted_asr"] - part["asr"]
        row: dict[str, Any] = {"prediction": name, "conditions": len(part)}
        row |= {"mean |difference|": difference.abs().mean(), "mean difference": difference.mean()}
        low, high = statistics.bootstrap(difference, seed=0)
        inside = part["asr"].between(part["predicted_asr_low"], part["predicted_asr_high"])
        row |= {"low": low, "high": high, "measured within the predicted interval": int(inside.sum())}
        varied = part["asr"].nunique() > 1 and part["predicted_asr"].nunique() > 1
        row["rank correlation"] = spearmanr(part["asr"], part["predicted_asr"]).statistic if varied else math.nan
        rows.append(row)
    return pd.DataFrame(rows)
