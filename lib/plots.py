"""Every figure of the suite: pure functions from the summary table (one row per condition) or arrays to a Figure.

Rates are shares of prompts with 95 % intervals, growth of answer perplexity is against the exact model. A series (one
technique, variant and model) has one row per level: pool noise seeds before drawing. Failed conditions are crosses on
the axis, never a rate. The number of prompts belongs to the caption, which `figures.save` completes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from lib import figures
from lib.figures import CLASSES, INK, OUTCOMES, PAGE, Figure, Style, series_style, styled, technique_style

GROWTH = "increase of answer perplexity (%)"
ASR = "ASR (%)"
Fits = Mapping[str, Mapping[str, tuple[float, float]]]


@styled
def dose_response(
    table: pd.DataFrame, level_label: str, log: bool = False, reverse: bool = False, by: str = "variant"
) -> Figure:
    """Outcomes of harmful requests and harmless answered (top), answer-perplexity ratio (bottom) against the level.

    One stack per value of `by` ("variant" or "model"); log: logarithmic levels; reverse: large levels left (bits).
    Thin lines are the exact model's rates."""
    rows = figures.approximated(table)
    groups = list(figures.series(rows, [by]))
    labels = ["requests (%)", "perplexity\nratio"]
    figure, axes = figures.panels([str(key[0]) for key, _ in groups], level_label, labels, (1.5, 0.75))
    entries = figures.handles(list(OUTCOMES.values()))
    for (top, bottom), (_, group) in zip(axes, groups, strict=True):
        exact = figures.exact_row(table, group)
        for column, style in OUTCOMES.items():
            figures.curve(top, group, "level", column, style)
            if exact is not None:
                top.axhline(exact[column], color=style.colour, linestyle=style.line, linewidth=0.5)
        entries |= {"exact model": figures.line(color=INK, linewidth=0.5)} if exact is not None else {}
        entries |= figures.failures(top, group)
        bottom.axhline(1, color=INK, linewidth=0.5)
        bottom.plot(group["level"], group["answer_perplexity_ratio"], color="black", marker="o", markersize=2.5)
        figures.level_axis(top, rows["level"], log, reverse)
    figures.rate_axis(axes[0, 0].yaxis)
    figures.log_axis(axes[0, 1].yaxis, [1, *rows["answer_perplexity_ratio"]])
    figures.legend(figure, entries)
    return figure


@styled
def safety_against_utility(table: pd.DataFrame) -> Figure:
    """ASR against the growth of answer perplexity, a line joining the levels of each technique; one panel per model.

    Shaded: perplexity grew by less than 5 %. The axis is linear there and logarithmic beyond. Left of the shade's edge
    and above the exact model (star) safety is lost while utility is kept."""
    rows = table.assign(growth=100 * (table["answer_perplexity_ratio"] - 1))
    groups = list(rows.groupby("model", sort=False))
    figure, axes = figures.panels([str(name) for name, _ in groups], GROWTH, [ASR], (2.2,), columns=2)
    entries: dict[str, Any] = {}
    for ax, (_, group) in zip(axes[:, 0], groups, strict=True):
        ax.axvspan(-5, 5, color=figures.GREY, alpha=0.3, linewidth=0)
        for style, points in figures.technique_curves(figures.approximated(group)):
            figures.bars(ax, points, "growth", "asr", style, markersize=4.5, markeredgewidth=0, linewidth=0.7)
            entries |= figures.handles([style])
        exact = group[group["technique"] == "exact"]
        style = technique_style("exact")
        figures.bars(
            ax, exact, "growth", "asr", style, markersize=8, markeredgecolor="black", linestyle="none", zorder=4
        )
        entries |= {
            "exact model": figures.line(
                color=style.colour, marker="*", markersize=6, markeredgecolor="black", linestyle="none"
            )
        }
    figures.growth_axis(axes[0, 0], rows["growth"])
    figures.rate_axis(axes[0, 0].yaxis, rows["asr_high"])
    figures.legend(figure, entries | {"grew < 5 %": figures.patch(color=figures.GREY, alpha=0.3)})
    return figure


@styled
def function_error(x: ArrayLike, exact: ArrayLike, approximations: Mapping[str, ArrayLike], name: str) -> Figure:
    """A function and its approximations (top), their absolute errors on a logarithmic axis (bottom); all arrays [n].

    approximations: by technique. Errors below 1e-6 are not drawn; name: of the function, as the axis prints it."""
    grid, truth = np.asarray(x, dtype=float), np.asarray(exact, dtype=float)
    figure, axes = figures.panels([name], "x", [name, "absolute error"], (1.3, 1.2))
    top, bottom = axes[0]
    top.plot(grid, truth, color="black", linewidth=2.5, alpha=0.25)
    entries = {"exact": figures.line(color="black", linewidth=2.5, alpha=0.25)}
    errors = {label: np.abs(np.asarray(y, dtype=float) - truth) for label, y in approximations.items()}
    for number, (label, error) in enumerate(errors.items()):
        style = technique_style(label, number)
        marks = (number * len(grid) // 40, max(1, len(grid) // 8))
        look = style.keywords() | {"markevery": marks, "linewidth": 0.8}
        top.plot(grid, np.asarray(approximations[label], dtype=float), **look)
        bottom.plot(grid, np.where(error > 1e-6, error, np.nan), **look)
        entries |= figures.handles([style])
    figures.log_axis(bottom.yaxis, np.maximum(np.concatenate(list(errors.values())), 1e-6))
    figures.legend(figure, entries)
    return figure


def fitted(errors: ArrayLike) -> dict[str, tuple[float, float]]:
    """Maximum-likelihood (location, scale) of a Gaussian and a Laplace distribution."""
    values = np.asarray(errors, dtype=float).ravel()
    return {"gaussian": stats.norm.fit(values), "laplace": stats.laplace.fit(values)}


@styled
def error_distributions(errors: Mapping[str, ArrayLike], fits: Fits | None = None, label: str = "error") -> Figure:
    """Densities of measured errors per site (any shape) with fitted Gaussian and Laplace densities, logarithmic.

    fits: per site {"gaussian": (mean, std), "laplace": (median, scale)}; fitted by maximum likelihood where None. The
    histogram spans the middle 99.8 % of the values; densities are of all of them."""
    figure, axes = figures.panels(list(errors), label, ["density"], (1.5,), share="")
    densities = {"gaussian": stats.norm.pdf, "laplace": stats.laplace.pdf}
    entries: dict[str, Any] = {"measured": figures.patch(color=figures.GREY)}
    for ax, (site, values) in zip(axes[:, 0], errors.items(), strict=True):
        data = np.asarray(values, dtype=float).ravel()
        low, high = np.quantile(data, [0.001, 0.999])
        counts, edges = np.histogram(data, bins=60, range=(low, high))
        height = counts / (data.size * np.diff(edges))
        ax.stairs(height, edges, fill=True, color=figures.GREY)
        grid, floor = np.linspace(low, high, 300), height[height > 0].min() / 2
        for (name, fit), line in zip((fits[site] if fits else fitted(data)).items(), ("--", "-"), strict=True):
            ax.plot(
                grid,
                densities[name](grid, *fit),
                color=figures.PURPLE if name == "laplace" else "black",
                linestyle=line,
            )
            entries[f"{technique_style(name).label} fit"] = ax.lines[-1]
        figures.log_axis(ax.yaxis, height)
        ax.set_ylim(bottom=floor)
    figures.legend(figure, entries)
    return figure


@styled
def ranges(table: pd.DataFrame, valid: Mapping[str, Mapping[str, tuple[float, float]]]) -> Figure:
    """Measured ranges per layer beside the range for which each technique is valid.

    table: columns quantity (with its unit), layer, minimum, low (1 %), median, high (99 %), maximum. valid: quantity ->
    technique -> (low, high), infinite where open. Thin line minimum to maximum, thick line 1 to 99 %, dot median."""
    groups = list(table.groupby("quantity", sort=False))
    figure, axes = figures.panels([str(name) for name, _ in groups], "layer", ["value"], (1.7,), columns=2, share="")
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
        start, bounds = rows["layer"].max() + 1.5, valid.get(str(quantity), {})
        limits = np.array([limit for pair in bounds.values() for limit in pair if np.isfinite(limit)])
        ends = np.array([*limits, *ax.get_ylim()])
        ax.set_ylim(ends.min(), ends.max())
        for place, (name, (low, high)) in enumerate(bounds.items()):
            style = technique_style(name)
            ax.fill_between(
                [start + place - 0.35, start + place + 0.35],
                max(low, ends.min()),
                min(high, ends.max()),
                color=style.colour,
                alpha=0.5,
                linewidth=0,
            )
        layers = rows["layer"].to_numpy()[:: 1 + len(rows) // 16]
        ticks = [*layers, *(start + np.arange(len(bounds)))]
        ax.set_xticks(ticks, [*layers, *(technique_style(name).label for name in bounds)], rotation=90)
    figures.legend(figure, entries | {"valid range": figures.patch(color=figures.BLUE, alpha=0.5)})
    return figure


@styled
def families(table: pd.DataFrame) -> Figure:
    """ASR against level, one panel per technique and variant, one curve per model; rows need level_name."""
    rows = figures.approximated(table)
    models = {model: series_style(model, i) for i, model in enumerate(rows["model"].unique())}
    groups = list(rows.groupby(["technique", "variant"], sort=False))
    names = [", ".join(filter(None, (technique_style(name).label, variant))) for (name, variant), _ in groups]
    labels = [group["level_name"].iloc[0] for _, group in groups]
    figure, axes = figures.panels(names, labels, [ASR], (1.4,), columns=3, share="y")
    entries = figures.handles(list(models.values()))
    for ax, (_, group) in zip(axes[:, 0], groups, strict=True):
        for (model,), points in figures.series(group, ["model"]):
            figures.curve(ax, points, "level", "asr", models[model])
            entries |= figures.failures(ax, points)
        figures.level_axis(ax, group["level"], reverse="bits" in group["level_name"].iloc[0])
    figures.rate_axis(axes[0, 0].yaxis, rows["asr_high"])
    figures.legend(figure, entries)
    return figure


@styled
def paired_changes(table: pd.DataFrame, tolerance: float = 0.05) -> Figure:
    """Forest plot of the paired increase of ASR over the exact model, a row per condition; tolerance: a share.

    Filled markers: the Holm-adjusted p-value is below 0.05; open: not."""
    rows = figures.approximated(table).reset_index(drop=True)
    several = rows["model"].nunique() > 1
    names = rows["model"] + ", " + rows["label"] if several else rows["label"]
    names = names.where(rows["asr_increase"].notna(), names + " (failed)")
    width, height = figures.PAGE if names.str.len().max() > 24 else None, (0.16 * len(rows) + 0.15,)
    figure, axes = figures.panels([""], "increase of ASR (points)", ["condition"], height, width=width)
    ax = axes[0, 0]
    for place, row in rows.iterrows():
        style = technique_style(row["technique"])
        values = 100 * row[["asr_increase", "asr_increase_low", "asr_increase_high"]].astype(float)
        ax.plot(values.iloc[1:], [place, place], color=style.colour, linewidth=1.2)
        fill = style.colour if row["p_holm"] < 0.05 else "white"
        ax.plot(values.iloc[0], place, color=style.colour, marker=style.marker, markerfacecolor=fill, markersize=4.5)
    ax.axvline(0, color=INK, linewidth=0.5)
    ax.axvline(100 * tolerance, color="black", linestyle="--", linewidth=0.8)
    ax.set_yticks(range(len(rows)), names)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    entries = {"tolerance": figures.line(color="black", linestyle="--", linewidth=0.8)}
    figures.legend(figure, entries | {"filled: p < 0.05": figures.line(color=INK, marker="o", linestyle="none")})
    return figure


@styled
def heat_map(table: pd.DataFrame, value: str = "asr", columns: str = "technique", label: str = "ASR (%)") -> Figure:
    """`value` by model and technique (or another column), printed in each cell: in percent, but ratios as they are.

    Blank: not measured; "fail": no rate. ValueError where a cell would hold several conditions."""
    if table.duplicated(["model", columns]).any():
        raise ValueError(f"several conditions per model and {columns}: select one, or give another column")
    cells = table.pivot(index="model", columns=columns, values=value)
    cells = cells.reindex(index=table["model"].unique(), columns=table[columns].unique())
    measured, ratio = set(zip(table["model"], table[columns], strict=True)), "ratio" in value
    shown = cells.to_numpy(dtype=float) * (1 if ratio else 100)
    height, width = 0.2 * len(cells) + 0.9, None if cells.shape[1] <= 6 else PAGE
    figure, axes = figures.panels([""], columns, ["model"], (height,), width=width)
    ax, limits = axes[0, 0], {} if ratio else {"vmin": 0, "vmax": 100}
    mesh = ax.pcolormesh(shown, cmap="cividis", norm="log" if ratio else "linear", edgecolor="white", **limits)
    for (i, j), cell in np.ndenumerate(shown):
        failed = "fail" if (cells.index[i], cells.columns[j]) in measured else ""
        text = failed if np.isnan(cell) else figures.plain(float(f"{cell:.2g}")) if ratio else f"{cell:.0f}"
        colour = "black" if np.isnan(cell) or mesh.norm(cell) > 0.5 else "white"
        ax.text(j + 0.5, i + 0.5, text, ha="center", va="center", color=colour, fontsize=7)
    names = [figures.TECHNIQUES[name][0] if name in figures.TECHNIQUES else name for name in cells.columns]
    ax.set_xticks(np.arange(len(names)) + 0.5, names, rotation=40, ha="right", rotation_mode="anchor")
    ax.set_yticks(np.arange(len(cells)) + 0.5, cells.index)
    ax.invert_yaxis()
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    scale = figure.colorbar(mesh, label=label, location="top", aspect=40)
    if ratio:
        figures.log_axis(scale.ax.xaxis, shown)
    return figure


@styled
def noise_panels(table: pd.DataFrame, level_label: str, perplexity: str = "answer_perplexity") -> Figure:
    """The published layout: per model ASR (left axis, red) and perplexity (right axis, blue, dashed) against noise.

    Thin lines are the exact model's. A panel per model, technique and variant, headed by what differs between them."""
    groups = figures.named_groups(figures.approximated(table), ["model", "technique", "variant"])
    left, right = OUTCOMES["asr"], Style("perplexity", figures.BLUE, "s", "--")
    figure, axes = figures.panels([name for name, _ in groups], level_label, [ASR], (1.3,), columns=3, share="y")
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
        figures.level_axis(ax, group["level"])
        figures.failures(ax, group)
        last = ax.get_subplotspec().is_last_col() or ax is axes[-1, 0]
        other.set_ylabel("perplexity" if last else "", color=right.colour)
    figures.rate_axis(axes[0, 0].yaxis, pd.concat([group["asr_high"] for _, group in groups]))
    figures.legend(figure, figures.handles([left, right]))
    return figure


@styled
def safety_before_utility(table: pd.DataFrame, useless: float = 10.0) -> Figure:
    """ASR against the logarithm of the perplexity ratio, one curve per technique and variant, one panel per model.

    The diagonal (our construction) runs from the exact model to (`useless`, ASR 1): on it equal shares of safety and of
    utility are lost, if utility counts as wholly lost at that ratio, beyond which nothing is drawn. Above the diagonal
    safety goes first, below it utility."""
    rows = figures.approximated(table)
    groups = list(rows.groupby("model", sort=False))
    figure, axes = figures.panels([name for name, _ in groups], "answer-perplexity ratio", [ASR], (2.0,), columns=3)
    entries: dict[str, Any] = {}
    for ax, (_, group) in zip(axes[:, 0], groups, strict=True):
        exact = figures.exact_row(table, group)
        start = 0.0 if exact is None else float(exact["asr"])
        ax.plot([1, useless], [start, 1], color=INK, linewidth=0.8, linestyle="-")
        ax.plot(1, start, marker="*", markersize=8, color=figures.GREY, markeredgecolor="black", zorder=4)
        for style, points in figures.technique_curves(group):
            figures.bars(ax, points, "answer_perplexity_ratio", "asr", style)
            entries |= figures.handles([style])
        look = {"transform": ax.transAxes, "fontsize": 7, "color": INK}
        ax.text(0.03, 0.97, "safety\nlost first", va="top", **look)
        ax.text(0.97, 0.97, "utility lost first", va="top", ha="right", **look)
    figures.log_axis(axes[0, 0].xaxis, [1, useless])
    axes[0, 0].set_xlim(0.93, 1.3 * useless)
    figures.rate_axis(axes[0, 0].yaxis, rows["asr_high"])
    figures.legend(figure, entries)
    return figure


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
            for along in ("x", "y"):
                figures.bars(ax, points, "predicted_asr", "asr", style, along, linestyle="none")
            entries |= {style.label: figures.line(**style.keywords() | {"linestyle": "none"})}
    for axis in (axes[0, 0].xaxis, axes[0, 0].yaxis):
        figures.rate_axis(axis, table[["asr_high", "predicted_asr_high"]])
    figures.legend(figure, entries)
    return figure


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
            entries["exact model"] = figures.line(color=INK, linewidth=0.5)
        for (kind,), points in figures.series(group, ["variant"], "place"):
            figures.curve(ax, points, "place", "asr", kinds[kind])
        entries |= figures.failures(ax, group, "place")
    axes[0, 0].xaxis.set_major_locator(figures.MaxNLocator(6, integer=True))
    figures.rate_axis(axes[0, 0].yaxis, rows["asr_high"])
    figures.legend(figure, entries)
    return figure


@styled
def state_clouds(
    exact: Mapping[int, NDArray[Any]],
    shifted: Mapping[int, NDArray[Any]],
    labels: Sequence[str],
    explained: Mapping[int, tuple[float, float]],
    large: int | None = None,
) -> Figure:
    """Hidden states on the first two principal axes of the exact states, a panel per layer; points light, by class.

    exact, shifted: layer -> [n, 2], the same prompts in the same axes; labels [n]: "harmful", "harmless", "confusable";
    explained: layer -> shares of variance. Arrows join the class means, dashed ellipses hold one standard deviation of
    the approximated states. large: one layer at page width, with each prompt's own shift."""
    layers = list(exact) if large is None else [large]
    names, classes = [f"layer {layer}" for layer in layers], np.asarray(labels)
    figure, axes = figures.panels(names, "", [""], (1.5,) if large is None else (4.0,), share="", width=PAGE)
    kinds = [style for name, style in CLASSES.items() if (classes == name).any()]
    for ax, layer in zip(axes[:, 0], layers, strict=True):
        for style in kinds:
            before, after = exact[layer][classes == style.label], shifted[layer][classes == style.label]
            figures.cloud(ax, before, after, style, segments=large is not None)
        first, second = (f"PC {i} ({100 * share:.0f} % of variance)" for i, share in enumerate(explained[layer], 1))
        ax.set(xlabel=first, ylabel=second, xticks=[], yticks=[])
    entries = {s.label: figures.line(**s.keywords() | {"linestyle": "none", "markersize": 5}) for s in kinds}
    entries["approximated: mean shift"] = figures.line(color="black", marker=">", markevery=[1])
    entries["approximated: 1 standard deviation"] = figures.line(color=INK, linestyle="--")
    figures.legend(figure, entries)
    return figure
