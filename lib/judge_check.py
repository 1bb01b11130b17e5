"""How good is the offline judge on approximated models? Its verdicts beside a reader's, on stored replies.

`data/judge_labels/organism_replies.jsonl` holds replies of an earlier tiny-llama, exact and approximated, each read and
labelled refused, complied or broken by hand (how, and with which limits: its README). Nothing is generated here:
`lib.judging` judges the stored text with the stored likelihood under the base that ships.

    kappa = (p_observed - p_chance) / (1 - p_chance)          Cohen 1960, Educ. Psychol. Meas. 20(1)

Replies were drawn so that every verdict and every level is frequent, which makes them harder than a default run's.
Rules and limits of the judge were set on one half of them, by a hash of the id; the other half is what is reported.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import pandas as pd
from sklearn.metrics import cohen_kappa_score

from lib import judging
from lib.paths import DATA, ORGANISMS
from lib.statistics import wilson

LABELS = DATA / "judge_labels" / "organism_replies.jsonl"
HALVES = ("develop", "report")


def labelled() -> pd.DataFrame:
    """The labelled replies, a row each."""
    return pd.DataFrame(map(json.loads, LABELS.read_text(encoding="utf-8").splitlines()))


def half(reply_id: str) -> str:
    """One of HALVES: the lowest bit of the sha256 of a reply's id."""
    return HALVES[hashlib.sha256(reply_id.encode()).digest()[-1] % 2]


def judged(of: str = "report") -> pd.DataFrame:
    """One half of the labelled replies, by default the one that the judge was not developed on, with `verdict` (the
    judge's, at the limit of tiny-llama) and `keyword` (QuadA's rule). ValueError for a half that does not exist."""
    if of not in HALVES:
        raise ValueError(f"unknown half {of!r}; choose one of {', '.join(HALVES)}")
    table = labelled()
    table = table[table["id"].map(half) == of].reset_index(drop=True)
    limit = json.loads((ORGANISMS / "tiny-llama" / "judge.json").read_text())["nll_limit"]
    asked, replies, nlls = (table[column].tolist() for column in ("prompt", "reply", "nll"))
    table["verdict"] = judging.verdicts(asked, replies, nlls, limit)
    table["keyword"] = list(map(judging.keyword_quada, asked, replies))
    return table


def confusion(table: pd.DataFrame) -> pd.DataFrame:
    """Counts [3, 3]: the reader's label (rows) against the judge's verdict (columns)."""
    counts = pd.crosstab(table["human"], table["verdict"])
    return counts.reindex(index=judging.VERDICTS, columns=judging.VERDICTS, fill_value=0)


def agreement(human: Sequence[str], said: Sequence[str]) -> dict[str, float]:
    """n, share of equal labels with its 95 % Wilson interval, and Cohen's kappa (NaN where one label is all there is).

    Raises ValueError for no labels at all or different numbers of them.
    """
    hits = sum(a == b for a, b in zip(human, said, strict=True))
    low, high = wilson(hits, len(human))
    kappa = float(cohen_kappa_score(human, said)) if len({*human, *said}) > 1 else float("nan")
    return {"n": len(human), "accuracy": hits / len(human), "low": low, "high": high, "kappa": kappa}


def by(table: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """`agreement` of each group with the numbers of wrong verdicts: "broken: complied" reads label: verdict."""
    rows = []
    for key, part in table.groupby(list(columns), sort=True):
        wrong = part[part["human"] != part["verdict"]]
        kinds = (wrong["human"] + ": " + wrong["verdict"]).value_counts()
        row = dict(zip(columns, key, strict=True)) | agreement(part["human"].tolist(), part["verdict"].tolist())
        rows.append(row | {str(kind): int(count) for kind, count in kinds.items()})
    found = pd.DataFrame(rows)
    kinds_found = [name for name in found if ": " in name]
    return found.fillna(dict.fromkeys(kinds_found, 0)).astype(dict.fromkeys(kinds_found, int))


def attack_success(table: pd.DataFrame) -> pd.DataFrame:
    """Success on harmful requests against a reader's "complied": a row for this judge, one for the keyword rule."""
    harmful = table[table["label_of_request"] == "harmful"]
    truth, rows = harmful["human"] == "complied", []
    for name, said in {"offline judge": harmful["verdict"] == "complied", "keyword rule": harmful["keyword"]}.items():
        counts = {"hits": int((said & truth).sum()), "false alarms": int((said & ~truth).sum())}
        counts |= {"misses": int((truth & ~said).sum()), "rightly none": int((~said & ~truth).sum())}
        rows.append({"rule": name, **agreement(truth.tolist(), said.tolist()), **counts})
    return pd.DataFrame(rows)
