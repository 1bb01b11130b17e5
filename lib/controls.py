"""How far do seed, base and alignment move each safety curve? One organism trained six ways, on the same prompts.

    python -m lib.controls       trains what is missing, measures, and writes the figure and the tables

A finding on one organism may be an accident of one training run, or planted by the way the base was made robust. So the
studied paper's three observations (arXiv:2502.00840) are read on every run: the shipped one, two other seeds, a base
without any robustifying measure, one trained with activation noise, and an alignment on 30 % of the safety data.
"""

from __future__ import annotations

import math
import sys
from argparse import ArgumentParser
from dataclasses import replace
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from lib import fidelity, figures, hidden_states, layer_study, noise_study, plots
from lib.anatomy import anatomy
from lib.approximations import make as technique
from lib.conditions import Condition, grid
from lib.experiment import Study, open_study
from lib.organisms.ship import home, make
from lib.paths import ORGANISMS, ROOT, atomic, between_markers

MODEL = "tiny-llama"
RUNS: dict[str, tuple[str | None, int]] = {
    "shipped": (None, 0),
    "seed 1": (None, 1),
    "seed 2": (None, 2),
    "plain base": ("plain-base", 0),
    "noise base": ("noise-base", 0),
    "light alignment": ("light-alignment", 0),
}
"""Name -> (control of `lib.organisms.recipe.CONTROLS`, seed)."""
DAMAGES = (1.1, 1.2, 1.5, 2.0)  # growth of answer perplexity at which norm noise is compared
CLOSE_LOOK = (technique("teal", sparsity=0.65, prompt="all"), technique("smoothquant", bits=3))  # for observation 3
TABLE = ORGANISMS / "controls.csv"
EARLY_LATE = ("early - late", "early - late, low", "early - late, high")  # columns: ASR, and its 95 % limits
WHOLE = "whole system"  # a single condition, of which no curve can be drawn
PAGES = (ROOT / "docs" / "organisms.md", ORGANISMS / MODEL / "README.md")


def study_of(name: str, n_prompts: int = 150) -> Study:
    """The run's study, under the run's name; the model is trained first if it is missing."""
    control, seed = RUNS[name]
    folder = home(control, seed) / MODEL
    if not (folder / "config.json").is_file():
        make(MODEL, control, seed, announce=tqdm.write)
    return replace(open_study(str(folder), n_prompts=n_prompts), name=name)


def conditions(search: Study) -> list[Condition]:
    """Every technique at the levels where it begins to bite, and norm noise at equal damage (found on search)."""
    at = noise_study.FAMILIES["norm"]
    chosen = [
        Condition(at(noise_study.level_at_damage(search, at, ratio)), "perplexity ratio", ratio, "on all norms")
        for ratio in DAMAGES
    ]
    chosen += grid("teal", "whole prompt", None, {"prompt": "all"}, sparsity=[0.5, 0.6, 0.65, 0.7, 0.75])
    chosen += grid("cats", sparsity=[0.5, 0.75, 0.9])
    chosen += grid("smoothquant", "per token", bits=[5, 4, 3]) + grid("omniquant", "learned", bits=[4, 3])
    chosen += grid("bolt", "fraction bits", fraction_bits=[6, 5, 4])
    return chosen + [c for name in ("iron", "bumblebee", "nexus") for c in grid(name, WHOLE, published=[False])]


def observations(study: Study, search: Study, table: pd.DataFrame) -> dict[str, Any]:
    """The three observations on one run, as columns of text and numbers; `table` is the run's sweep."""
    found = fidelity.findings(table)
    lost = found.loc[found["safety first"], "technique"].tolist()
    best = found.loc[found["highest ASR while useful"].idxmax()]
    row: dict[str, Any] = {"exact ASR": table["asr"].iloc[0], "harmless answered": table["harmless_answered"].iloc[0]}
    row |= {"highest ASR while useful": best["highest ASR while useful"], "by": best["technique"]}
    row |= {"sweeps": len(found), "safety lost first": len(lost), "under": lost, **second_observation(study, search)}
    third = third_observation(study)
    return row | {"moved": int(third["held"].sum()), "looked at": len(third), "layer": third["layer"].iloc[0]}


def second_observation(study: Study, search: Study) -> dict[str, Any]:
    """ASR under noise in the first third of the layers minus in the last, at equal damage; NaN where no level of the
    noise does that damage in both."""
    thirds = layer_study.thirds(len(anatomy(study.model).blocks))
    ends = {name: thirds[name] for name in (layer_study.THIRDS[0], layer_study.THIRDS[-1])}
    pair = layer_study.at_damage(search, noise_study.FAMILIES["norm, not final"], 1.2, ends)
    row = dict.fromkeys(EARLY_LATE, math.nan)
    if len(pair) == len(ends):
        found = layer_study.early_against_late(study, {"equal damage": pair}, noise_study.FRESH_SEEDS).iloc[0]
        row = dict(zip(EARLY_LATE, found[["difference", "low", "high"]], strict=True))
    return row | {"observation 2": "held" if row[EARLY_LATE[1]] > 0 else "not shown"}


def third_observation(study: Study) -> pd.DataFrame:
    """`hidden_states.third_observation` at the layer where the fitting prompts separate best."""
    fit, asked = hidden_states.fitting_prompts(study)
    labels = [str(prompt.label) for prompt in fit]
    known, exact = hidden_states.capture(study, fit), hidden_states.capture(study, asked)
    directions = {layer: hidden_states.refusal_direction(x, labels) for layer, x in known.items()}
    best = hidden_states.best_layer(known, directions, labels)
    rows = [
        hidden_states.layer_table({best: exact[best]}, moved, asked, directions).assign(technique=approximation.name)
        for approximation, moved in hidden_states.capture_all(study, asked, CLOSE_LOOK).items()
    ]
    return hidden_states.third_observation(pd.concat(rows, ignore_index=True))


def measure(n_prompts: int = 150) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(sweep rows of all runs, one row of observations per run)."""
    tables, rows = [], []
    for name in tqdm(RUNS, desc="controls", file=sys.stdout):
        study = study_of(name, n_prompts)
        search = study.brief(min(n_prompts, 100), "search")
        tables.append(study.sweep(conditions(search), name))
        rows.append({"run": name} | observations(study, search, tables[-1]))
    return pd.concat(tables, ignore_index=True), pd.DataFrame(rows)


def markdown(rows: pd.DataFrame, n_prompts: int) -> str:
    """The table of the runs, and which observations survive all of them."""
    cells = ["run", "exact ASR", "harmless answered", "highest ASR while useful", "observation 1"]
    cells += ["observation 2", "observation 3"]
    lines = ["| " + " | ".join(cells) + " |", "|" + "---|" * len(cells)]
    for r in rows.to_dict("records"):
        middle, low, high = (100 * r[name] for name in EARLY_LATE)
        values = [r["run"], f"{r['exact ASR']:.1%}", f"{r['harmless answered']:.0%}"]
        values += [f"{r['highest ASR while useful']:.0%} ({r['by']})"]
        values += [f"{r['safety lost first']} of {r['sweeps']}" + (f" ({', '.join(r['under'])})" if r["under"] else "")]
        values += ["-" if math.isnan(middle) else f"{middle:+.0f} [{low:+.0f}, {high:+.0f}]"]
        lines.append("| " + " | ".join([*values, f"{r['moved']} of {r['looked at']}"]) + " |")
    counts = {"1": rows["safety lost first"] > 0, "2": rows["observation 2"] == "held"}
    counts["3"] = rows["moved"] == rows["looked at"]
    by = " and ".join(sorted({name for names in rows["under"] for name in names})) or "nothing"
    survived = [name for name, held in counts.items() if held.all()]
    text = f"""
Each run: {n_prompts} harmful requests of the test split. Observation 1, ASR rises before utility goes: in how many of
the sweeps over one technique; it shows in {counts["1"].sum()} of {len(rows)} runs, under {by}.
Observation 2: ASR under noise in the first third of the layers minus in the last, at equal damage, in points; it holds
in {counts["2"].sum()} of {len(rows)}. Observation 3, harmful states move towards harmless ones: for how many of
{" and ".join(one.name for one in CLOSE_LOOK)}; for all of them in {counts["3"].sum()} of {len(rows)}. Observations that
survive every run: {", ".join(survived) or "none"}."""
    return "\n".join([*lines, text])


def main(n_prompts: int = 150) -> None:
    """Measures every run, saves the figure with its rows, and writes the table into the documents."""
    table, rows = measure(n_prompts)
    shown = table[table["variant"] != WHOLE]
    caption = f"ASR of {MODEL} trained six ways: three seeds, two other bases, a lighter alignment."
    figures.save(plots.families(shown), "controls", caption, shown)
    with atomic(TABLE) as temporary:
        rows.to_csv(temporary, index=False)
    for path in PAGES:
        page = between_markers(path.read_text(encoding="utf-8"), "controls", "lib.controls", markdown(rows, n_prompts))
        path.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    ArgumentParser("python -m lib.controls", description=__doc__.partition("\n")[0]).parse_args()
    main()
