"""Every figure of the suite: pure functions from the summary table (one row per condition) or arrays to a Figure.

Rates are shares of prompts with 95 % intervals, growth of answer perplexity is against the exact model. A series (one
technique, variant and model) has one row per level: pool noise seeds before drawing. Failed conditions are crosses on
the axis, never a rate; where perplexity is the axis, they stand at its end. The number of prompts belongs to the
caption, which `figures.save` completes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

from lib import figures
from lib.figures import INK, OUTCOMES, PAGE, Figure, Style, series_style, styled, technique_style

GROWTH = "increase of answer perplexity (%)"
ASR = "ASR (%)"
USEFUL = 20.0  # percent: a condition whose answer perplexity grew by less is useful (`fidelity.UTILITY_LIMIT`)
LOST = 10.0  # answer-perplexity ratio at which utility counts as wholly lost
EXACT = {"exact model": figures.line(color=INK, linewidth=0.5)}


@styled
def dose_response(table: pd.DataFrame, level_label: str) -> Figure:
    """Outcomes of harmful requests and harmless answered (top), ASR on its own axis, answer-perplexity ratio (bottom).

    One stack per technique and variant, against the level. Thin lines are the exact model's rates."""
    rows = figures.approximated(table)
    rows = rows.assign(ratio=rows["answer_perplexity_ratio"].clip(upper=figures.HIGHEST))
    groups = list(figures.series(rows, ["technique", "variant"]))
    names = [figures.series_name(*key) for key, _ in groups]
    figure, axes = figures.panels(names, level_label, ["requests (%)", ASR, "perplexity\nratio"], (1.4, 0.8, 0.7))
    entries = figures.handles(list(OUTCOMES.values()))
    for (top, middle, bottom), (_, group) in zip(axes, groups, strict=True):
        exact = figures.exact_row(table, group)
        for column, style in OUTCOMES.items():
            ax = middle if column == "asr" else top
            figures.curve(ax, group, "level", column, style)
            if exact is not None:
                ax.axhline(exact[column], color=style.colour, linestyle=style.line, linewidth=0.5)
        entries |= EXACT if exact is not None else {}
        entries |= figures.failures(top, group)
        bottom.axhline(1, color=INK, linewidth=0.5)
        bottom.plot(group["level"], group["ratio"], color="black", marker="o", markersize=2.5)
        entries |= figures.beyond(bottom, group, "level", "ratio", "y")
        figures.level_axis(top, rows["level"], level_label)
    figures.rate_axis(axes[0, 0].yaxis)
    figures.rate_axis(axes[0, 1].yaxis, rows["asr_high"])
    figures.log_axis(axes[0, 2].yaxis, [1, *rows["ratio"]])
    return figures.legend(figure, entries)


@styled
def safety_against_utility(table: pd.DataFrame) -> Figure:
    """ASR against the growth of answer perplexity, a line joining the levels of each technique; one panel per model.

    Shaded: perplexity grew by less than `USEFUL`. The axis is linear to 5 % and logarithmic beyond. Star: the exact
    model. Bars are of single rates: whether ASR rose is told by the paired change, which they only hint at."""
    growth = 100 * (table["answer_perplexity_ratio"] - 1)
    rows = table.assign(growth=growth.clip(upper=figures.HIGHEST))
    groups = list(rows.groupby("model", sort=False))
    figure, axes = figures.panels([str(name) for name, _ in groups], GROWTH, [ASR], (2.2,), columns=2)
    figures.growth_axis(axes[0, 0], rows["growth"])
    entries: dict[str, Any] = {}
    for ax, (_, group) in zip(axes[:, 0], groups, strict=True):
        ax.axvspan(-USEFUL, USEFUL, color=figures.GREY, alpha=0.3, linewidth=0)
        entries |= _curves(ax, group, "growth", figures.HIGHEST, markersize=4.5, markeredgewidth=0, linewidth=0.7)
        exact = group[group["technique"] == "exact"]
        look: dict[str, Any] = {"markersize": 8, "markeredgecolor": "black", "linestyle": "none"}
        figures.bars(ax, exact, "growth", "asr", technique_style("exact"), **look, zorder=4)
        entries["exact model"] = figures.line(**technique_style("exact").keywords() | look | {"markersize": 6})
    figures.rate_axis(axes[0, 0].yaxis, rows["asr_high"])
    shade = {f"perplexity grew < {USEFUL:.0f} %": figures.patch(color=figures.GREY, alpha=0.3)}
    return figures.legend(figure, entries | shade)


def _curves(ax: Any, rows: pd.DataFrame, x: str, highest: float, **look: Any) -> dict[str, Any]:
    """ASR with bars against column x, clipped to `highest`, a curve per technique and variant, failures at the axis'
    end: legend entries."""
    entries: dict[str, Any] = {}
    notes: dict[str, Any] = {}
    for style, points in figures.technique_curves(figures.approximated(rows)):
        figures.bars(ax, points, x, "asr", style, **look)
        entries |= figures.handles([style]) if points["asr"].notna().any() else {}
        notes |= figures.beyond(ax, points, x, "asr", "x", highest)
        ends = points.assign(end=ax.get_xlim()[1])
        notes |= figures.failures(ax, ends, "end", f"{style.label}: failed")
    return entries | notes


@styled
def function_error(x: ArrayLike, exact: ArrayLike, approximations: Mapping[str, ArrayLike], name: str) -> Figure:
    """A function and its approximation (top), the absolute error on a logarithmic axis (bottom); all arrays [n].

    approximations: by technique, a stack each. Errors below 1e-6 are not drawn; name: of the function."""
    curves = {figures.printed(technique): np.asarray(y, dtype=float) for technique, y in approximations.items()}
    errors = [np.abs(y - np.asarray(exact, dtype=float)) for y in curves.values()]
    figure, axes = figures.panels(list(curves), "x", [name, "absolute error"], (1.0, 1.0), width=PAGE)
    for (top, bottom), y, error in zip(axes, curves.values(), errors, strict=True):
        top.plot(x, exact, color="black", linewidth=2.5, alpha=0.25)
        top.plot(x, y, color=figures.BLUE, linewidth=0.8)
        bottom.plot(x, np.where(error > 1e-6, error, np.nan), color=figures.BLUE, linewidth=0.6)
    figures.log_axis(axes[0, 1].yaxis, np.maximum(np.concatenate(errors), 1e-6))
    entries = {"exact": figures.line(color="black", linewidth=2.5, alpha=0.25)}
    return figures.legend(figure, entries | {"approximated": figures.line(color=figures.BLUE, linewidth=0.8)})


@styled
def error_distributions(errors: Mapping[str, ArrayLike]) -> Figure:
    """Densities of measured errors per site (any shape) with Gaussian and Laplace densities, logarithmic.

    The histogram spans the middle 99.8 % of the values; densities and maximum-likelihood fits are of all of them."""
    figure, axes = figures.panels(list(errors), "error", ["density"], (1.5,), share="")
    fits = {"gaussian": (stats.norm, "black", "--"), "laplace": (stats.laplace, figures.PURPLE, "-")}
    entries: dict[str, Any] = {"measured": figures.patch(color=figures.GREY)}
    for ax, values in zip(axes[:, 0], errors.values(), strict=True):
        data = np.asarray(values, dtype=float).ravel()
        low, high = np.quantile(data, [0.001, 0.999])
        counts, edges = np.histogram(data, bins=60, range=(low, high))
        height = counts / (data.size * np.diff(edges))
        ax.stairs(height, edges, fill=True, color=figures.GREY)
        grid, floor = np.linspace(low, high, 300), height[height > 0].min() / 2
        for name, (distribution, colour, line) in fits.items():
            ax.plot(grid, distribution.pdf(grid, *distribution.fit(data)), color=colour, linestyle=line)
            entries[f"{technique_style(name).label} fit"] = ax.lines[-1]
        figures.log_axis(ax.yaxis, height)
        ax.set_ylim(bottom=floor)
    return figures.legend(figure, entries)


@styled
def ranges(table: pd.DataFrame, valid: Mapping[str, Mapping[str, tuple[float, float]]]) -> Figure:
    """Measured ranges per layer beside the range for which each technique is valid.

    table: columns quantity (with its unit), layer, minimum, low (1 %), median, high (99 %), maximum. valid: quantity ->
    technique -> (low, high), infinite where open. Thin line minimum to maximum, thick line 1 to 99 %, dot median."""
    groups = list(table.groupby("quantity", sort=False))
    figure, axes = figures.panels([""] * len(groups), "layer; valid ranges", [""], (1.6,), columns=2, share="")
    entries = {
        "minimum to maximum": figures.line(color=INK, linewidth=0.8),
        "1 % to 99 %": figures.line(color=INK, linewidth=3),
        "median": figures.line(color="white", marker="o", markeredgecolor="black", linestyle="none"),
    }
    for ax, (quantity, rows) in zip(axes[:, 0], groups, strict=True):
        ax.vlines(rows["layer"], rows["minimum"], rows["maximum"], color=INK, linewidth=0.8)
        ax.vlines(rows["layer"], rows["low"], rows["high"], color=INK, linewidth=3)
        ax.plot(rows["layer"], rows["median"], color="white", marker="o", markeredgecolor="black", linestyle="none")
        figures.wide_axis(ax.yaxis, rows[["minimum", "maximum"]].to_numpy().ravel())
        ax.set_ylabel(fill(str(quantity), 20))
        start, bounds = rows["layer"].max() + 1.5, valid.get(str(quantity), {})
        places, limits = start + np.arange(len(bounds)), np.reshape([*bounds.values()], (-1, 2))
        ends = np.array([*limits[np.isfinite(limits)], *ax.get_ylim()])
        ax.set_ylim(ends.min(), ends.max())
        low, high = limits.clip(ends.min(), ends.max()).T
        styles = [technique_style(name) for name in bounds]
        ax.bar(places, high - low, 0.7, low, color=[style.colour for style in styles], alpha=0.5, linewidth=0)
        layers = rows["layer"].to_numpy()[:: 1 + len(rows) // 16]
        ax.set_xticks([*layers, *places], [*layers, *(style.label for style in styles)], rotation=90)
    return figures.legend(figure, entries | {"valid range": figures.patch(color=figures.BLUE, alpha=0.5)})


@styled
def families(table: pd.DataFrame) -> Figure:
    """ASR against level, one panel per technique and variant, one curve per model; rows need level_name."""
    rows = figures.approximated(table)
    models = {model: series_style(model, i) for i, model in enumerate(rows["model"].unique())}
    groups = list(rows.groupby(["technique", "variant"], sort=False))
    names = [figures.series_name(*key) for key, _ in groups]
    labels = [group["level_name"].iloc[0] for _, group in groups]
    figure, axes = figures.panels(names, labels, [ASR], (1.4,), columns=3, share="y")
    entries = figures.handles(list(models.values()))
    for ax, label, (_, group) in zip(axes[:, 0], labels, groups, strict=True):
        _beside(ax, group, "level", "model", models)
        entries |= figures.failures(ax, group)
        figures.level_axis(ax, group["level"], label)
    figures.rate_axis(axes[0, 0].yaxis, rows["asr_high"])
    return figures.legend(figure, entries)


def _beside(ax: Any, rows: pd.DataFrame, x: str, key: str, styles: Mapping[str, Style]) -> None:
    """ASR with bars against x, a curve per value of `key`; curves stand a little apart, or bars would hide others."""
    apart, middle, places = 0.015 * np.ptp(rows[x]), (len(styles) - 1) / 2, list(styles)
    for (name,), points in figures.series(rows, [key], x):
        moved = points[x] + apart * (places.index(name) - middle)
        figures.bars(ax, points.assign(**{x: moved}), x, "asr", styles[name])


@styled
def paired_changes(table: pd.DataFrame, tolerance: float = 0.05) -> Figure:
    """Forest plot of the paired increase of ASR over the exact model, a row per condition; tolerance: a share.

    Filled markers: the Holm-adjusted p-value is below 0.05; open: not."""
    rows = figures.approximated(table).reset_index(drop=True)
    names = rows.apply(figures.condition_name, axis=1)
    names = rows["model"] + ", " + names if rows["model"].nunique() > 1 else names
    names = names.where(rows["asr_increase"].notna(), names + " (failed)")
    width, height = figures.PAGE if names.str.len().max() > 24 else None, (0.16 * len(rows) + 0.15,)
    figure, axes = figures.panels([""], "increase of ASR (points)", ["condition"], height, width=width)
    ax = axes[0, 0]
    entries = _forest(ax, rows, ["asr_increase", "asr_increase_low", "asr_increase_high"], "p_holm", names)
    ax.axvline(100 * tolerance, color="black", linestyle="--", linewidth=0.8)
    tolerated = figures.line(color="black", linestyle="--", linewidth=0.8)
    return figures.legend(figure, {"tolerance": tolerated, **entries})


@styled
def early_minus_late(table: pd.DataFrame) -> Figure:
    """Forest plot of ASR with the first third of the layers approximated minus ASR with the last, a row per comparison.

    table: of `layer_study.early_against_late`. Filled markers: the Holm-adjusted p-value is below 0.05; open: not."""
    rows = table.dropna(subset=["difference"]).reset_index(drop=True)
    height = (0.2 * len(rows) + 0.5,)
    figure, axes = figures.panels([""], "ASR, early minus late (points)", ["comparison"], height)
    entries = _forest(axes[0, 0], rows, ["difference", "low", "high"], "p (Holm)", rows["comparison"])
    return figures.legend(figure, entries)


def _forest(ax: Any, rows: pd.DataFrame, columns: list[str], p: str, names: pd.Series) -> dict[str, Any]:
    """A change and its limits, shares in `columns`, per row; returns the entry of the legend."""
    for place, row in rows.iterrows():
        style = technique_style(row["technique"])
        values = 100 * row[columns].astype(float)
        ax.plot(values.iloc[1:], [place, place], color=style.colour, linewidth=1.2)
        fill = style.colour if row[p] < 0.05 else "white"
        ax.plot(values.iloc[0], place, color=style.colour, marker=style.marker, markerfacecolor=fill, markersize=4.5)
    ax.axvline(0, color=INK, linewidth=0.5)
    ax.set_yticks(range(len(rows)), names)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    return {"filled: p (Holm) < 0.05": figures.line(color=INK, marker="o", linestyle="none")}


@styled
def heat_map(table: pd.DataFrame, label: str = ASR) -> Figure:
    """ASR by model and technique, printed in each cell in percent. Blank: not measured.

    ValueError where a cell would hold several conditions."""
    cells = table.pivot(index="model", columns="technique", values="asr")
    cells = 100 * cells.reindex(index=table["model"].unique(), columns=table["technique"].unique()).astype(float)
    width = None if cells.shape[1] <= 6 else PAGE
    figure, axes = figures.panels([""], "technique", ["model"], (0.2 * len(cells) + 0.9,), width=width)
    ax = axes[0, 0]
    cells = cells.rename(columns=figures.printed)
    look: dict[str, Any] = {"cmap": "Blues", "vmin": 0, "linewidths": 1, "annot_kws": {"fontsize": 7}}
    bar = {"label": label, "location": "top", "aspect": 40}
    figures.heatmap(cells, ax=ax, annot=True, fmt=".0f", cbar_kws=bar, **look)
    ax.set(xlabel="technique", ylabel="model")
    ax.tick_params(length=0, rotation=0)
    ax.set_xticks(ax.get_xticks(), ax.get_xticklabels(), rotation=40, ha="right", rotation_mode="anchor")
    return figure


@styled
def noise_panels(table: pd.DataFrame, level_label: str) -> Figure:
    """The published layout: per model ASR (left axis, red) and perplexity (right axis, blue, dashed) against noise.

    Thin lines are the exact model's. A panel per model, technique and variant, headed by what differs between them."""
    groups = figures.named_groups(figures.approximated(table), ["model", "technique", "variant"])
    left, right, perplexity = OUTCOMES["asr"], Style("perplexity", figures.BLUE, "s", "--"), "answer_perplexity"
    figure, axes = figures.panels([name for name, _ in groups], level_label, [ASR], (1.3,), columns=3, share="y")
    entries = figures.handles([left, right])
    for ax, (_, group) in zip(axes[:, 0], groups, strict=True):
        other, exact = ax.twinx(), figures.exact_row(table, group)
        other.spines["right"].set_visible(True)
        figures.curve(ax, group, "level", "asr", left)
        figures.curve(other, group, "level", perplexity, right)
        for axes_of, column, style in ((ax, "asr", left), (other, perplexity, right)):
            axes_of.tick_params(axis="y", colors=style.colour)
            if exact is not None:
                axes_of.axhline(exact[column], color=style.colour, linestyle=style.line, linewidth=0.5)
        figures.log_axis(other.yaxis, group[perplexity])
        figures.level_axis(ax, group["level"], level_label)
        entries |= figures.failures(ax, group) | (EXACT if exact is not None else {})
        last = ax.get_subplotspec().is_last_col() or ax is axes[-1, 0]
        other.set_ylabel("perplexity" if last else "", color=right.colour)
    figures.rate_axis(axes[0, 0].yaxis, pd.concat([group["asr_high"] for _, group in groups]))
    return figures.legend(figure, entries)


@styled
def safety_before_utility(table: pd.DataFrame) -> Figure:
    """ASR against the logarithm of the perplexity ratio, one curve per technique and variant, one panel per model.

    The diagonal (our construction) runs from the exact model to (LOST, ASR 1): on it equal shares of safety and of
    utility are lost, if utility counts as wholly lost at that ratio. Above the diagonal safety goes first, below it
    utility. Carets stand for what lies beyond the axis."""
    end = 1.3 * LOST
    rows = figures.approximated(table)
    rows = rows.assign(ratio=rows["answer_perplexity_ratio"].clip(upper=end))
    groups = list(rows.groupby("model", sort=False))
    figure, axes = figures.panels([name for name, _ in groups], "answer-perplexity ratio", [ASR], (2.0,), columns=3)
    figures.log_axis(axes[0, 0].xaxis, [1, LOST])
    axes[0, 0].set_xlim(0.93, end)
    entries: dict[str, Any] = {}
    for ax, (_, group) in zip(axes[:, 0], groups, strict=True):
        exact = figures.exact_row(table, group)
        start = 0.0 if exact is None else float(exact["asr"])
        ax.plot([1, LOST], [start, 1], color=INK, linewidth=0.8, linestyle="-")
        ax.plot(1, start, marker="*", markersize=8, color=figures.GREY, markeredgecolor="black", zorder=4)
        entries |= _curves(ax, group, "ratio", end)
        look = {"transform": ax.transAxes, "fontsize": 7, "color": INK}
        ax.text(0.03, 0.97, "safety\nlost first", va="top", **look)
        ax.text(0.97, 0.97, "utility lost first", va="top", ha="right", **look)
    figures.rate_axis(axes[0, 0].yaxis, rows["asr_high"])
    return figures.legend(figure, entries)


@styled
def predicted_against_measured(table: pd.DataFrame) -> Figure:
    """Measured ASR against the ASR that noise of the same size gives, equal on the line; a panel per `prediction`.

    table: besides technique, variant, level and asr with its interval, predicted_asr (+ _low, _high), prediction."""
    groups = list(figures.approximated(table).groupby("prediction"))
    figure, axes = figures.panels([str(n) for n, _ in groups], "ASR under noise (%)", [f"measured {ASR}"], (2.6,))
    entries: dict[str, Any] = {}
    for ax, (_, rows) in zip(axes[:, 0], groups, strict=True):
        ax.plot([0, 1], [0, 1], color=INK, linewidth=0.5)
        for style, points in figures.technique_curves(rows):
            hollow = replace(style, line="none", hollow=True)
            for along in ("x", "y"):
                figures.bars(ax, points, "predicted_asr", "asr", hollow, along, markersize=5)
            entries |= figures.handles([hollow])
    for axis in (axes[0, 0].xaxis, axes[0, 0].yaxis):
        figures.rate_axis(axis, table[["asr_high", "predicted_asr_high"]])
    return figures.legend(figure, entries)


def layer_place(layers: str, variant: str, n_layers: int) -> float:
    """Where a layer set stands: a prefix at its last layer, a suffix at its first, others in their middle."""
    numbers = [0, n_layers - 1] if layers == "all" else [int(number) for number in re.findall(r"\d+", layers)]
    return {"prefix": max(numbers), "suffix": min(numbers)}.get(variant, (min(numbers) + max(numbers)) / 2)


@styled
def layer_curves(table: pd.DataFrame, n_layers: int) -> Figure:
    """ASR by layer: curves for variant "prefix", "suffix", "single", "window"; a panel per model and technique.

    A prefix stands at its last layer, a suffix at its first, other sets in their middle. Thin line: the exact model."""
    rows = figures.approximated(table)
    places = [layer_place(layers, v, n_layers) for layers, v in zip(rows["layers"], rows["variant"], strict=True)]
    groups = figures.named_groups(rows.assign(place=places), ["model", "technique"], None)
    kinds = {kind: series_style(kind, i) for i, kind in enumerate(rows["variant"].unique())}
    x_label = "layer (prefix: its last, suffix: its first)"
    figure, axes = figures.panels([name for name, _ in groups], x_label, [ASR], (1.6,), columns=3)
    entries = figures.handles(list(kinds.values()))
    for ax, (_, group) in zip(axes[:, 0], groups, strict=True):
        exact = figures.exact_row(table, group)
        if exact is not None:
            ax.axhline(exact["asr"], color=INK, linewidth=0.5)
            entries |= EXACT
        _beside(ax, group, "place", "variant", kinds)
        entries |= figures.failures(ax, group, "place")
    axes[0, 0].xaxis.set_major_locator(figures.MaxNLocator(6, integer=True))
    figures.rate_axis(axes[0, 0].yaxis, rows["asr_high"])
    return figures.legend(figure, entries)
