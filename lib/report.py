"""The stored tables of notebooks 01 to 03 for all models as one: decisions, comparisons, the numbers of the README.

A decision compares an approximated model with its exact self on the same prompts (`lib.statistics.decision`):
re-validated, not re-validated, or undecided, against tolerances in points. `lib.report_page` makes the page of it.
"""

from __future__ import annotations

import json
import logging
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from lib import defence_study, fidelity, figures, judge_check, published, statistics, summary
from lib.approximations import OPERATIONS
from lib.errors import ChoiceError, PlainError, check
from lib.paths import ROOT, between_markers, results_folder
from lib.results import safe_name

log = logging.getLogger(__name__)

TABLES = ("01_polynomialization", "02_sparsification", "03_quantization")
GROWTH = f"{100 * (fidelity.UTILITY_LIMIT - 1):.0f} %"
USEFUL = f"useful (answer perplexity grew by less than {GROWTH}, at least {100 * fidelity.ANSWERED_LIMIT:.0f} %"
USEFUL += " of harmless requests answered)"
CURVES = ("", "whole prompt", "per token", "learned", "fraction bits")  # variants: one curve for each technique
BASELINES = ("plain rounding", "paper thresholds")  # series that are not the technique whose name they bear
CONDITION = ["model", "technique", "variant", "settings", "layers", "protocol", "prompt_set", "split"]


def gather(models: Sequence[str] = (), folder: Path | str | None = None) -> pd.DataFrame:
    """All stored tables of a results folder, one below the other, published figures beside.

    models: none for all; those without a table are left out with a warning. folder: None for this run's. The exact
    model stands in every table: one row of it is kept per model, protocol, prompt set and split, the one with most
    prompts. PlainError if there are no tables."""
    where = Path(folder) if folder else results_folder()
    paths = [path for name in TABLES for path in sorted(where.glob(f"*/tables/{name}.parquet"))]
    measured = {path.parent.parent.name for path in paths}
    if missing := [model for model in models if safe_name(model) not in measured]:
        log.warning("left out, no tables of notebooks 01 to 03: %s", ", ".join(missing))
    wanted = set(map(safe_name, models)) or measured
    paths = [path for path in paths if path.parent.parent.name in wanted]
    if folder and not where.is_dir():
        raise PlainError(f"there is no folder {where}: give the full path of a results folder")
    if not paths:
        inner = " (its folder results has some)" if list(where.glob("results/*/tables")) else ""
        raise PlainError(f"no tables in {where}{inner}: run the notebooks 01, 02 and 03 first")
    joined = pd.concat([pd.read_parquet(path) for path in paths], ignore_index=True)
    exact = joined["technique"] == "exact"
    by_size = joined[exact].sort_values("n_harmful", ascending=False, kind="stable")
    largest = by_size.drop_duplicates(list(figures.CONTEXT)).sort_index()
    return published.beside(pd.concat([largest, joined[~exact]], ignore_index=True))


def deployable(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of exact and of whole techniques: without those that replace some of a model's functions to explain."""
    parts = [json.loads(settings).get("parts", OPERATIONS) for settings in table["settings"]]
    whole = table[[set(chosen) == set(OPERATIONS) for chosen in parts]]
    return whole.assign(variant=whole["variant"].replace("parts", "all parts"))


def strongest(table: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Per model and technique, deployed as such, the row with the highest `measure`: without what stands beside a
    technique only to be compared with it."""
    whole = deployable(table)
    ordered = whole[~whole["variant"].isin(BASELINES)].sort_values(measure, ascending=False, kind="stable")
    return ordered.drop_duplicates(["model", "technique"])


# ------------------------------------------------------------------ decisions


def decide(table: pd.DataFrame, tolerance: float = statistics.TOLERANCE) -> pd.DataFrame:
    """The table with a `decision` per condition, the criteria it misses, the smallest increase of ASR that its prompts
    would have shown (`detectable`, a share), and the number of prompts that would decide (`n_needed`).

    ChoiceError for a tolerance that is no share."""
    check(tolerance=tolerance)
    outcomes = [_decision(row, tolerance) for row in table.to_dict("records")]
    return table.assign(**{key: [o[key] for o in outcomes] for key in ("decision", "unmet", "detectable", "n_needed")})


def _decision(row: dict[str, Any], tolerance: float) -> dict[str, Any]:
    nothing = {"unmet": "", "detectable": np.nan, "n_needed": None}
    if row["technique"] == "exact":
        return {**nothing, "decision": "reference"}
    if row["failed"]:
        return {**nothing, "decision": "failed", "unmet": row["failed"]}
    changes = summary.paired(row)
    if changes["asr"] is None:
        return {**nothing, "decision": "not measured", "unmet": "no harmful requests"}
    result = statistics.decision(changes, tolerance)
    found = {"decision": result.decision, "unmet": "; ".join(result.unmet), "n_needed": result.n_needed}
    return {**found, "detectable": detectable(changes["asr"])}


def detectable(change: statistics.Paired) -> float:
    """The smallest difference, a share, that a test at 5 % on as many prompts finds with 80 % power (Connor 1987).

    It depends on how many verdicts change at all: the share that did here, or, where that is too small for any
    difference to be found, the smallest share at which one is: that where all changes go one way.
    """
    needed = stats.norm.ppf([0.975, 0.8]).sum() ** 2 / change.n
    discordance = min(1.0, max((change.b + change.c) / change.n, needed))
    return statistics.minimum_detectable_change(change.n, discordance)


def verdicts(table: pd.DataFrame) -> pd.DataFrame:
    """One decision per model, technique and variant, over the levels that stay useful (`fidelity.useful_rows`; over all
    where none does): the worst of them, with the evidence at the condition whose increase of ASR may be largest."""
    rows = []
    whole = deployable(table[table["technique"] != "exact"])
    for (model, technique, variant), part in whole.groupby(["model", "technique", "variant"], sort=False):
        decided = part[part["decision"].isin(statistics.DECISIONS)]
        useful = decided[fidelity.useful_rows(decided)]
        pool = useful if len(useful) else decided
        row: dict[str, Any] = {"model": model, "technique": technique, "variant": variant}
        good = useful.loc[useful["decision"] == "re-validated", "level"] if len(part) > 1 else []
        row |= {"decision": part["decision"].iloc[0], "useful levels": f"{len(useful)} of {len(part)}"}
        row |= {"re-validated at": ", ".join(f"{level:g}" for level in good)}
        if not len(pool):
            row |= {"not met": part["unmet"].iloc[0]}
        else:
            worst_first = ("not re-validated", "undecided", "re-validated")
            worst = next(name for name in worst_first if (pool["decision"] == name).any())
            found = pool[pool["decision"] == worst]
            row |= {"decision": worst, **_evidence(found.loc[found["asr_increase_high"].idxmax()])}
        rows.append(row)
    return pd.DataFrame(rows).fillna("-").replace("", "-")


def _evidence(row: pd.Series) -> dict[str, Any]:
    """What a decision rests on, in points."""
    changes = {name.replace("asr", "ASR"): change for name, change in summary.paired(row).items()}
    found = {f"increase of {name} (points)": points(change) if change else "-" for name, change in changes.items()}
    found |= {"n": f"{row['n_harmful']:.0f}", "detectable increase of ASR (points)": f"{100 * row['detectable']:.1f}"}
    found |= {"n that would decide": "-" if pd.isna(row["n_needed"]) else f"{row['n_needed']:.0f}"}
    return found | {"not met": row["unmet"], "shown by": row["label"]}


def points(change: statistics.Paired) -> str:
    """A paired change with its 95 % interval, in points."""
    value, low, high = (round(100 * x, 1) + 0.0 for x in (change.difference, change.low, change.high))  # no -0.0
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


def compare(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """Conditions that two runs share, in the order of `after`: ASR and decision of each, and the change with its 95 %
    interval. Prompts are not paired across runs: Newcombe's interval for independent rates (Statistics in Medicine
    1998, 17:873, method 10), too wide rather than too narrow. ChoiceError where the runs share no condition."""
    wanted = ["label", "asr", "asr_low", "asr_high", "decision"]
    joined = after[CONDITION + wanted].merge(before[CONDITION + wanted[1:]], on=CONDITION, suffixes=("", "_before"))
    if joined.empty:
        raise ChoiceError("the two runs share no condition: same models, techniques, settings and prompts are needed")
    change = joined["asr"] - joined["asr_before"]
    below = np.hypot(joined["asr"] - joined["asr_low"], joined["asr_high_before"] - joined["asr_before"])
    above = np.hypot(joined["asr_high"] - joined["asr"], joined["asr_before"] - joined["asr_low_before"])
    return joined[["model", "technique", "variant", "label"]].assign(
        **{"ASR before": joined["asr_before"], "ASR after": joined["asr"], "change": change},
        **{"change, low": change - below, "change, high": change + above},
        **{"decision before": joined["decision_before"], "decision after": joined["decision"]},
    )


# ------------------------------------------------------------------ findings


def by_technique(table: pd.DataFrame) -> pd.DataFrame:
    """`fidelity.findings` of every model, the model named first."""
    found = deployable(table).groupby("model", sort=False).apply(fidelity.findings)
    return found.droplevel(1).reset_index()


def early_warning(table: pd.DataFrame) -> pd.DataFrame:
    """Rank correlation over conditions of the refusal score with ASR, per model."""
    rows = []
    for model, part in table[table["failed"] == ""].dropna(subset=["refusal_score", "asr"]).groupby("model"):
        rho, p = stats.spearmanr(part["refusal_score"], part["asr"])
        rows.append({"model": model, "conditions": len(part), "Spearman rho": rho, "p": p})
    return pd.DataFrame(rows)


# ------------------------------------------------------------------ README


def findings_text(rows: pd.DataFrame) -> str:
    """A sentence and a table of findings from the rows of the headline figure."""
    found = by_technique(rows)
    exact = rows[rows["technique"] == "exact"].set_index("model")
    fluent = rows[(rows["technique"] != "exact") & (rows["answer_perplexity_ratio"] < fidelity.UTILITY_LIMIT)]
    lost, worst = int(found["safety first"].sum()), fluent.loc[fluent["harmless_answered"].idxmin()]
    rose = int(((fluent["p_holm"] < 0.05) & (fluent["asr_increase"] > 0)).sum())
    lines = [f"Safety was lost before utility in {lost} of {len(found)} sweeps by the 95 % intervals of conditions;"]
    lines += [f"after Holm's correction within a notebook ASR rose in {rose} of {len(fluent)} fluent conditions,"]
    lines += [f"those in which answer perplexity had grown by less than {GROWTH}. There ASR reached"]
    lines += [f"{_percent(fluent['asr'].max())} at most, and harmless requests answered fell to"]
    lines += [f"{_percent(worst['harmless_answered'])} ({worst['model']}, {worst['label']}), with"]
    lines += [f"{_percent(worst['harmless_refused'])} of them refused. Replies to harmful requests were broken in"]
    lines += [f"{100 * fluent['broken_rate'].mean():.1f} % on average; had all of these complied,"]
    lines += [f"ASR would reach {_percent((fluent['asr'] + fluent['broken_rate']).max())}.", ""]
    lines += ["| model | technique | ASR exact | highest ASR while useful | highest ASR | safety lost before utility |"]
    lines.append("|---|---|---|---|---|---|")
    said = {True: "yes", False: "no", pd.NA: "not measured"}
    for row in found.to_dict("records"):
        useful = row["highest ASR while useful"]
        name = f"{row['technique']}{', ' + row['variant'] if row['variant'] else ''}"
        lines.append(
            f"| {row['model']} | {name} | {_percent(exact.loc[row['model'], 'asr'])} | {_percent(useful)} | "
            f"{_percent(row['highest ASR'])} ({row['95 % interval']}) | {said[row['safety first']]} |"
        )
    return "\n".join(lines)


def _percent(share: float) -> str:
    return "-" if np.isnan(share) else f"{100 * share:.0f} %"


def layers_text(rows: pd.DataFrame) -> str:
    """The second observation at equal damage, from the rows of its figure."""
    found = rows.set_index("comparison").loc["equal damage"]
    value, low, high = (f"{100 * found[name]:+.1f}" for name in ("difference", "low", "high"))
    said = "holds" if found["low"] > 0 else "is not shown"
    return f"""That the first layers matter most {said} on `tiny-llama` at equal damage to fluency: noise in the first
third of the layers instead of the last changed ASR by {value} points ({low} to {high}, three draws).
`05_layer_sensitivity` measures it; [docs/organisms.md](docs/organisms.md) has the other two organisms."""


def teal_text(rows: pd.DataFrame) -> str:
    """What published TEAL does beside the harder form of the headline, from the rows of its trade-off."""
    found = rows[fidelity.useful_rows(rows) & (rows["variant"] == "last half of prompt")]
    return f"""TEAL *whole prompt* is this project's harder case; published TEAL spares the first half of a prompt, and
there `tiny-llama` complied with {_percent(found["asr"].max())} at most while useful (`02_sparsification`)."""


def variants_text(rows: pd.DataFrame, attacks: pd.DataFrame) -> str:
    """A table of the variants of the defence and a sentence on attacks, from the rows of the two figures."""
    first, parts = rows.iloc[0], rows.set_index(["recipe", "approximation"])
    lines = [f"| {first['n_harmful']:.0f} harmful, {first['n_harmless']:.0f} harmless | ASR | under the MVA |"]
    lines = [f"{lines[0]} harmless answered | under the MVA |", "|---|---|---|---|---|"]
    for recipe in rows["recipe"].unique():
        found = [parts.loc[recipe, kind] for kind in ("exact", "MVA")]
        cells = [_percent(one[measure]) for measure in ("asr", "harmless_answered") for one in found]
        lines.append(f"| {recipe} | {' | '.join(cells)} |")
    named = attacks[attacks["attack"] == "no-refusal"].set_index("model")
    before, after = (named.loc[f"{who}, exact"] for who in ("undefended", "defended"))
    lines += ["", f"Asked not to refuse, the exact organism complies with {_percent(before['asr'])} of"]
    lines += [f"{before['n_harmful']} requests, the defended one with {_percent(after['asr'])}."]
    return "\n".join(lines)


def placement_text(rows: pd.DataFrame) -> str:
    """What placement gained, from the rows of its figure."""
    lines = []
    for technique, found in rows[rows["stage"] == "sealed"].groupby("technique", sort=False):
        uniform, placed = (found[found["placement"] == name].iloc[0] for name in ("uniform", "placed"))
        line = f"- {technique}, {placed['level_name']}: {uniform['level']:.2f} with one level for all layers, "
        decisions = (uniform["decision"], placed["decision"])
        said = f"both {decisions[0]}" if decisions[0] == decisions[1] else " and ".join(decisions)
        line += f"{placed['level']:.2f} placed; on sealed requests {said}, ASR "
        exact = 100 * (uniform["asr"] - uniform["asr_increase"])
        lines.append(f"{line}{100 * uniform['asr']:.1f} % and {100 * placed['asr']:.1f} % (exact {exact:.1f} %).")
    return "\n".join(lines)


def judge_text(read: pd.DataFrame) -> str:
    """How often the judge agrees with a reader; read: replies labelled by reading, and its verdicts."""
    every, strong = (judge_check.agreement(part["human"].tolist(), part["verdict"].tolist())
                     for part in (read, read[read["strength"] == "strong"]))  # fmt: skip
    low, high = (f"{100 * every[limit]:.0f}" for limit in ("low", "high"))
    lines = [f"The judge is a set of rules. On {every['n']} replies of an earlier `tiny-llama`, labelled by reading,"]
    lines += [f"drawn to be difficult and not used to set the rules, it agrees with {_percent(every['accuracy'])}"]
    lines += [f"[{low}, {high}] (`09_report`); at strong levels, where text is half garbled, with"]
    lines += [f"{_percent(strong['accuracy'])} of {strong['n']}. Of"]
    harmful = judge_check.attack_success(read).iloc[0]
    lines += [f"{harmful['hits'] + harmful['misses']} replies that comply with a harmful request it misses"]
    lines += [f"{harmful['misses']}, taking them for broken, and it raises {harmful['false alarms']} false alarms: an"]
    lines += ["ASR is rather too low than too high, by no more than the share of broken replies."]
    return "\n".join(lines)


def committed_rows(figure: str) -> pd.DataFrame:
    """The rows of a committed figure."""
    rows = pd.read_csv(ROOT / "figures" / f"{figure}.csv", keep_default_na=False, na_values=["nan", "NaN", ""])
    text = rows.columns.intersection(["variant", "failed", "level_name"])
    return rows.assign(**{name: rows[name].astype(object).fillna("") for name in text})


def readme_parts() -> dict[str, str]:
    """What stands between the README's markers, by their name: from the rows of the committed figures."""
    kinds = ["defence", "defence_variants", "defence_attacks", "placement", "layers_early_late"]
    kinds += ["sparsification_tradeoff"]
    defence, variants, attacks, placement, layers, teal = (committed_rows(f"{kind}_tiny-llama") for kind in kinds)
    return {
        "findings": findings_text(committed_rows("headline")),
        "layers": layers_text(layers),
        "teal": teal_text(teal),
        "defence": "\n".join(f"- {sentence}" for sentence in defence_study.conclusions(defence)),
        "variants": variants_text(variants, attacks),
        "placement": placement_text(placement),
        "judge": judge_text(judge_check.judged()),
    }


if __name__ == "__main__":
    ArgumentParser("python -m lib.report", description="Writes the figures' numbers into README.md").parse_args()
    file = ROOT / "README.md"
    page = file.read_text(encoding="utf-8")
    for name, text in readme_parts().items():
        page = between_markers(page, name, "lib.report", text)
    file.write_text(page, encoding="utf-8")
