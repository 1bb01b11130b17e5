"""Figures of the defence: damage by prefix, outcomes before and after by dose, and rates side by side.

Undefended has open markers, defended filled ones; rates are shares of prompts, drawn in percent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from lib import figures
from lib.figures import INK, OUTCOMES, Figure, Style, styled
from lib.plots import ASR

UNDEFENDED = Style("undefended", "#777777", "o", "--", hollow=True)


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
    return figures.legend(figure, figures.handles([OUTCOMES["asr"]]) | chosen)


@styled
def before_and_after(table: pd.DataFrame) -> Figure:
    """Harmless answered (top) and ASR (bottom) against the level, undefended and defended; a stack per series.

    Single conditions are left to the table wherever a series has several levels."""
    rows = figures.approximated(table)
    every = list(figures.series(rows, ["technique", "variant"]))
    groups = [(key, group) for key, group in every if len(group) > 1] or every
    labels = [group["level_name"].iloc[0] for _, group in groups]
    y_labels = ["harmless\n(%)", ASR]
    names = [figures.series_name(*key) for key, _ in groups]
    figure, axes = figures.panels(names, labels, y_labels, (0.65, 0.65), columns=3, share="y")
    entries = figures.handles([UNDEFENDED])
    for stack, label, (_, group) in zip(axes, labels, groups, strict=True):
        for ax, measure in zip(stack, ("harmless_answered", "asr"), strict=True):
            defended = replace(OUTCOMES[measure], label=f"defended, {OUTCOMES[measure].label}", line="-")
            figures.curve(ax, group, "level", f"{measure}_before", UNDEFENDED)
            figures.curve(ax, group, "level", f"{measure}_after", defended)
            entries |= figures.handles([defended])
        entries |= figures.failures(stack[0], group)
        figures.level_axis(stack[0], group["level"], label)
    figures.rate_axis(axes[0, 0].yaxis)
    figures.rate_axis(axes[0, 1].yaxis, rows[["asr_before_high", "asr_after_high"]])
    return figures.legend(figure, entries)


@styled
def rates(table: pd.DataFrame, category: str, series: str, measures: Sequence[str] = ("asr",)) -> Figure:
    """Rates with 95 % bars, a row per `category`, a marker per `series`; a panel per measure (a column of shares).

    "undefended, exact" and "defended, exact" differ only in that the first is hollow."""
    categories, names = table[category].unique().tolist(), table[series].unique().tolist()
    kinds = list(dict.fromkeys(name.split(", ")[-1] for name in names))
    looks = {name: figures.series_style(name, kinds.index(name.split(", ")[-1])) for name in names}
    styles = [replace(look, line="none", hollow=name.startswith("undefended, ")) for name, look in looks.items()]
    height = (0.13 * len(categories) * max(2, len(names)) + 0.3,)
    panel_names = ["ASR" if measure == "asr" else measure.replace("_", " ") for measure in measures]
    x_labels = [f"{name} (%)" for name in panel_names]
    heads = panel_names if len(measures) > 1 else [""]
    figure, axes = figures.panels(heads, x_labels, [""], height, share="y", width=figures.PAGE)
    offsets = dict(zip(names, np.linspace(-0.3, 0.3, len(names)) if len(names) > 1 else [0.0], strict=True))
    for ax, measure in zip(axes[:, 0], measures, strict=True):
        for name, style in zip(names, styles, strict=True):
            rows = table[(table[series] == name) & table[measure].notna()]
            places = rows.assign(place=[categories.index(c) + offsets[name] for c in rows[category]])
            figures.bars(ax, places, measure, "place", style, "x", markersize=4.5)
        ax.set_yticks(range(len(categories)), [str(c) for c in categories])
        ax.set_ylim(len(categories) - 0.5, -0.5)
        figures.rate_axis(ax.xaxis, table[f"{measure}_high"])
    return figures.legend(figure, figures.handles(styles))
