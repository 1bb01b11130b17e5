"""Figures of the defence: damage by prefix, outcomes before and after by dose, and rates side by side.

Before is dashed with open markers, after is solid and filled; rates are shares of prompts, drawn in percent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from lib import figures
from lib.figures import INK, OUTCOMES, Figure, styled
from lib.plots import ASR

BEFORE_AFTER = ("asr", "harmless_answered")


@styled
def prefixes(table: pd.DataFrame, tau: int) -> Figure:
    """ASR (top) and refusal score (bottom) with the perturbation in the first tau layers; the chosen tau is dotted."""
    figure, axes = figures.panels([""], "first layers perturbed", [ASR, "refusal\nscore"], (1.3, 0.8))
    top, bottom = axes[0]
    rows = table[table["failed"] == ""]
    figures.curve(top, rows, "tau", "asr", OUTCOMES["asr"])
    bottom.plot(rows["tau"], rows["refusal_score"], color="black", marker="o", markersize=2.5)
    for ax in (top, bottom):
        ax.axvline(tau, color=INK, linestyle=":", linewidth=0.8)
    figures.rate_axis(top.yaxis, rows["asr_high"])
    bottom.xaxis.set_major_locator(figures.MaxNLocator(6, integer=True))
    chosen = {"chosen prefix": figures.line(color=INK, linestyle=":")}
    figures.legend(figure, figures.handles([OUTCOMES["asr"]]) | chosen)
    return figure


@styled
def before_and_after(table: pd.DataFrame) -> Figure:
    """ASR and harmless answered against the level, undefended and defended; a panel per technique and variant."""
    rows = figures.approximated(table)
    groups = list(rows.groupby(["technique", "variant"], sort=False))
    names = [", ".join(filter(None, (figures.technique_style(name).label, variant))) for (name, variant), _ in groups]
    labels = [group["level_name"].iloc[0] for _, group in groups]
    figure, axes = figures.panels(names, labels, ["requests (%)"], (1.4,), columns=3, share="y")
    entries: dict[str, Any] = {}
    for ax, (_, group) in zip(axes[:, 0], groups, strict=True):
        group = group.sort_values("level")
        for measure in BEFORE_AFTER:
            style = OUTCOMES[measure]
            for when, line, fill in (("before", "--", "white"), ("after", "-", style.colour)):
                look: dict[str, Any] = {"linestyle": line, "markerfacecolor": fill, "markeredgecolor": style.colour}
                figures.curve(ax, group, "level", f"{measure}_{when}", style, **look)
                entries[f"{style.label}, {when}"] = figures.line(**style.keywords() | look)
        entries |= figures.failures(ax, group)
        figures.level_axis(ax, group["level"], reverse="bits" in group["level_name"].iloc[0])
    figures.rate_axis(axes[0, 0].yaxis)
    figures.legend(figure, entries)
    return figure


@styled
def rates(table: pd.DataFrame, category: str, series: str, measures: Sequence[str] = ("asr",)) -> Figure:
    """Rates with 95 % bars, a row per `category`, a marker per `series`; a panel per measure (a column of shares)."""
    categories, names = table[category].unique().tolist(), table[series].unique().tolist()
    styles = {name: figures.series_style(str(name), i) for i, name in enumerate(names)}
    height = (0.13 * len(categories) * max(2, len(names)) + 0.3,)
    titles = {"asr": "ASR", "harmless_answered": "harmless answered", "confusable_answered": "confusable answered"}
    panel_names = [titles.get(measure, measure) for measure in measures]
    x_labels = [f"{name} (%)" for name in panel_names]
    heads = panel_names if len(measures) > 1 else [""]
    figure, axes = figures.panels(heads, x_labels, [""], height, share="y", width=figures.PAGE)
    offsets = dict(zip(names, np.linspace(-0.3, 0.3, len(names)) if len(names) > 1 else [0.0], strict=True))
    for ax, measure in zip(axes[:, 0], measures, strict=True):
        for name, style in styles.items():
            rows = table[(table[series] == name) & table[measure].notna()]
            places = rows.assign(place=[categories.index(c) + offsets[name] for c in rows[category]])
            figures.bars(ax, places, measure, "place", style, "x", linestyle="none")
        ax.set_yticks(range(len(categories)), [str(c) for c in categories])
        ax.set_ylim(len(categories) - 0.5, -0.5)
        figures.rate_axis(ax.xaxis, table[f"{measure}_high"])
    entries = {s.label: figures.line(color=s.colour, marker=s.marker, linestyle="none") for s in styles.values()}
    figures.legend(figure, entries)
    return figure
