"""What a notebook shows of its table: three views, sentences that answer its questions, and where it was kept."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from lib import figures
from lib.paths import figures_folder
from lib.results import Store, provenance

RATES = ["label", "variant", "level", "refused_rate", "asr", "asr_low", "asr_high", "broken_rate", "asr_keyword"]
USE = ["label", "harmless_answered", "confusable_answered", "answer_perplexity_ratio", "prose_perplexity_ratio"]
PAIRED = ["label", "variant", "asr_increase", "asr_increase_low", "asr_increase_high", "p_holm", "failed"]


def views(table: pd.DataFrame) -> tuple[pd.DataFrame, ...]:
    """The summary table in three: verdicts on harmful requests, utility, paired changes against the exact model.

    Ratios of perplexity are text: one broken condition would have pandas print all as powers of ten."""
    rates, use, paired = (table.reindex(columns=columns) for columns in (RATES, [*USE, "accuracy"], PAIRED))
    ratios = use.filter(like="ratio").map("{:.4g}".format, na_action="ignore")
    return rates.round(3), use.assign(**ratios).round(3), paired.round(4)


def keep(store: Store, name: str, table: pd.DataFrame) -> pd.DataFrame:
    """Stores a notebook's table for the report: where it went and from what it was made, to be shown."""
    store.write_table("tables", name, table)
    places = {"rows": len(table), "results": str(store.folder), "figures": str(figures_folder())}
    return pd.DataFrame({"value": places | provenance()})


def safety_first(found: pd.DataFrame) -> str:
    """In which series safety was lost before utility; found: of `fidelity.findings`."""
    lost = found[found["safety first"]]
    names = [figures.series_name(*key) for key in zip(lost["technique"], lost["variant"], strict=True)]
    return f"Safety was lost before utility in {len(lost)} of {len(found)} series" + _listed(names)


def fewer_refused(table: pd.DataFrame) -> pd.DataFrame:
    """The conditions in which fewer harmful requests are refused than by the exact model: 95 % intervals apart."""
    exact = table[table["technique"] == "exact"].iloc[0]
    return table[table["refused_rate_high"] < exact["refused_rate_low"]]


def gives_way(table: pd.DataFrame) -> str:
    """Where refusing gives way: the mildest level of each series in `fewer_refused`, and what replies are there."""
    fewer, found, nowhere = fewer_refused(table), [], []
    for key, rows in figures.approximated(table).groupby(["technique", "variant"], sort=False):
        rising = not figures.falling(rows["level_name"].iloc[0])
        weak = fewer[fewer.index.isin(rows.index)].sort_values("level", ascending=rising)
        if len(weak):
            found.append(f"{figures.series_name(*key)} first at {weak['level'].iloc[0]:g} ({_replies(weak.iloc[0])})")
        else:
            nowhere.append(figures.series_name(*key))
    found += [f"at no level of {', '.join(nowhere)}"] if nowhere else []
    return f"Fewer harmful requests are refused than by the exact model: {'; '.join(found)}."


def beside(rows: pd.DataFrame) -> str:
    """What becomes of harmful requests in a few conditions, in one sentence."""
    found = [(figures.condition_name(row), row) for _, row in figures.approximated(rows).iterrows()]
    return "; ".join(f"{name} ({'failed' if row['failed'] else _replies(row)})" for name, row in found) + "."


def flips(table: pd.DataFrame) -> str:
    """Whether prompts whose verdict flips move further than others equally clear; table: of `flip_table`."""
    found = []
    for row in table.to_dict("records"):
        told = f"too few to tell ({row['matched']} matched)"
        if row["matched"] and pd.notna(row.get("matched difference")):
            told = f"{row['matched difference']:+.2f} of the gap further (95 % {row['low']:+.2f} to {row['high']:+.2f})"
        found.append(f"{row['label']}, {row['flipped']} flips: {told}")
    return f"Flipped prompts against others equally clear: {'; '.join(found) or 'none measured'}."


def outside(measured: pd.DataFrame, valid: Mapping[str, Mapping[str, tuple[float, float]]]) -> str:
    """Which published ranges the measured values (of `fidelity.ranges`) leave."""
    found = []
    for quantity, rows in measured.groupby("quantity", sort=False):
        low, high = rows["minimum"].min(), rows["maximum"].max()
        bounds = valid.get(str(quantity), {}).items()
        found += [f"{figures.printed(name)} ({quantity})" for name, (a, b) in bounds if low < a or high > b]
    return f"Activations leave {len(found)} of {sum(map(len, valid.values()))} published ranges" + _listed(found)


def _listed(names: list[str]) -> str:
    return f": {', '.join(names)}." if names else "."


def _replies(row: pd.Series) -> str:
    shares = f"{row['refused_rate']:.0%} refused, {row['asr']:.0%} complied with, {row['broken_rate']:.0%} broken"
    return f"{shares}, answer perplexity x{row['answer_perplexity_ratio']:.3g}"
