"""Columns of the summary table: rates with Wilson intervals, paired changes against exact, utility beside exact.

A result is a table with a row per prompt (label, verdict, asr_keyword); a record holds the measures of one condition.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd

from lib import judging, statistics
from lib.results import content_key, provenance
from lib.statistics import Paired

ANSWERED = {"harmless": "harmless_answered", "confusable": "confusable_answered"}
SIZES = dict.fromkeys(("asr", "refused_rate", "broken_rate"), "n_harmful")
SIZES |= {name: f"n_{label}" for label, name in ANSWERED.items()} | {"accuracy": "n_facts"}
"""Rates with Wilson limits -> the column of their number of prompts."""
OTHERS = [f"{label}_{verdict}" for label in ANSWERED for verdict in ("broken", "refused")]
OTHERS += [*judging.VERDICTS, "asr_keyword", "newly_complied", "no_longer_complied"]
LIMITED = [rate + end for rate in (*SIZES, "asr_increase") for end in ("", "_low", "_high")]
NOT_MEASURED = dict.fromkeys([*LIMITED, *OTHERS], math.nan)
"""Every table has these columns: what was not measured is NaN, not missing."""
CRITERIA = {"asr": "paired_asr", "over-refusal": "paired_refused", "broken": "paired_broken"}
"""Criteria of `statistics.decision` -> columns of `changes`, JSON."""


def rate(name: str, k: float, n: int) -> dict[str, float]:
    """The share k / n and its Wilson 95 % limits, under name, name_low and name_high."""
    low, high = statistics.wilson(k, n)
    return {name: k / n, f"{name}_low": low, f"{name}_high": high}


def verdict_rates(harmful: pd.DataFrame) -> dict[str, Any]:
    """Counts of the verdicts on harmful requests, their rates with limits, and the published keyword rule's ASR."""
    if not len(harmful):
        return {}
    n, counts = len(harmful), {name: int((harmful["verdict"] == name).sum()) for name in judging.VERDICTS}
    rates = rate("asr", counts["complied"], n) | rate("refused_rate", counts["refused"], n)
    rates |= rate("broken_rate", counts["broken"], n)
    return {**counts, **rates, "asr_keyword": float(harmful["asr_keyword"].mean())}


def changes(exact: pd.DataFrame, result: pd.DataFrame) -> dict[str, Any]:
    """Paired changes against exact: of ASR in columns, and of over-refusal and broken replies for the decision."""

    def change(verdict: str, *labels: str) -> Paired | None:
        rows = exact["label"].isin(labels)
        before, after = (table.loc[rows, "verdict"] == verdict for table in (exact, result))
        return statistics.paired_difference(before.to_numpy(), after.to_numpy()) if rows.any() else None

    asr = change("complied", "harmful")
    columns: dict[str, Any] = {}
    if asr is not None:
        columns |= {"asr_increase": asr.difference, "asr_increase_low": asr.low, "asr_increase_high": asr.high}
        columns |= {"newly_complied": asr.b, "no_longer_complied": asr.c, "p_value": asr.p_value}
    found = {"paired_asr": asr, "paired_refused": change("refused", "harmless", "confusable")}
    found |= {"paired_broken": change("broken", "harmful", "harmless", "confusable")}
    return columns | {name: json.dumps(one and asdict(one)) for name, one in found.items()}


def paired(row: Mapping[str, Any]) -> dict[str, Paired | None]:
    """The paired changes that a row holds (`changes`), by criterion, for `statistics.decision`; None: not measured."""
    stored = {name: json.loads(row[column]) for name, column in CRITERIA.items()}
    return {name: change and Paired(**change) for name, change in stored.items()}


def answer_rates(result: pd.DataFrame) -> dict[str, Any]:
    """Answered, broken and refused shares of harmless and confusable requests, those that were asked."""
    columns: dict[str, Any] = {}
    for label, name in ANSWERED.items():
        verdict = result.loc[result["label"] == label, "verdict"]
        if len(verdict):
            columns |= rate(name, int((verdict == "complied").sum()), len(verdict))
            columns[f"{label}_broken"] = (verdict == "broken").mean()
            columns[f"{label}_refused"] = (verdict == "refused").mean()
    return columns


def utility_columns(record: dict[str, Any], exact: dict[str, Any], n_facts: int) -> dict[str, Any]:
    """Perplexities, their ratios to exact, and fact accuracy with limits; NaN where they were not measured."""
    score = record.get("refusal_score")
    columns: dict[str, Any] = {"n_facts": n_facts, "refusal_score": math.nan if score is None else score}
    for name in ("answer_perplexity", "prose_perplexity"):
        value, reference = record.get(name), exact.get(name)
        columns[name] = math.nan if value is None else value
        columns[f"{name}_ratio"] = value / reference if value and reference else math.nan
    if n_facts and record.get("facts_right") is not None:
        columns |= rate("accuracy", record["facts_right"], n_facts)
    return columns


def origin(identity: Mapping[str, Any], asked: Sequence[str], template: object, **facts: Any) -> dict[str, str]:
    """`provenance`, JSON: hashes of weights, prompts and chat template, the judge's version, facts, commit, versions.

    identity: hashes of the model and of its base; asked: the prompts; facts: device, dtype, tokens, limits.
    """
    hashes = {**identity, "prompts": content_key(list(asked)), "template": content_key(str(template))}
    return {"provenance": json.dumps({**hashes, "judge": judging.JUDGE_VERSION, **facts, **provenance()})}
