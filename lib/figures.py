"""The look of every figure: sizes, colours, markers, axes of rates and perplexities, and saving; `lib.plots` draws.

One style file (paper.mplstyle: 3.33 in or 7 in wide, 8 pt text, nothing below 7) in Paul Tol's "bright" colours. A
category of techniques always has the same colour, a technique the same marker, an outcome the same colour, marker and
line style: nothing is told by colour alone. Only this module imports matplotlib and seaborn. Its figures belong to no
window or pyplot state, so a notebook shows one by naming it in the last line of a cell, after `%matplotlib inline`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import CARETRIGHTBASE, CARETUPBASE
from matplotlib.patches import Ellipse, Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, Locator, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray
from seaborn import heatmap as heatmap

from lib.paths import atomic, figures_folder, write_whole

COLUMN, PAGE = 3.33, 7.0  # widths, inches
DPI = 300  # of saved PNG files
STYLE = Path(__file__).with_name("paper.mplstyle")
PALETTE = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#BBBBBB")
BLUE, RED, GREEN, YELLOW, CYAN, PURPLE, GREY = PALETTE
INK = "#333333"  # thin reference lines and notes
HIGHEST = 1e4  # of a growth in percent or a ratio: what lies beyond is marked at the edge of the axis
STEPS = (1, 2, 2.5, 5, 10)  # between ticks
WILSON = "Bands and bars are 95 % Wilson intervals."
NEWCOMBE = "Bars are 95 % Newcombe intervals of the paired difference."

CATEGORY_COLOURS = {
    "polynomialization": BLUE,
    "sparsification": RED,
    "quantization": GREEN,
    "noise": PURPLE,
    "exact": GREY,
}
TECHNIQUES = {  # name: (as printed, category, marker)
    "iron": ("Iron", "polynomialization", "o"),
    "bolt": ("BOLT", "polynomialization", "s"),
    "bumblebee": ("BumbleBee", "polynomialization", "^"),
    "nexus": ("NEXUS", "polynomialization", "D"),
    "teal": ("TEAL", "sparsification", "v"),
    "cats": ("CATS", "sparsification", "P"),
    "smoothquant": ("SmoothQuant", "quantization", "<"),
    "omniquant": ("OmniQuant", "quantization", "d"),
    "gaussian": ("Gaussian", "noise", "p"),
    "laplace": ("Laplace", "noise", "X"),
    "exact": ("exact", "exact", "*"),
}
CONTEXT = ("model", "protocol", "prompt_set", "split")  # an exact row is a reference only where all of these agree
LINE_STYLES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
LineStyle = str | tuple[int, tuple[int, ...]]
styled = matplotlib.style.context(STYLE, after_reset=True)
"""Decorator: draws in the paper's style, whatever the caller's matplotlib settings are, and leaves those alone."""


@dataclass(frozen=True)
class Style:
    """How one series looks: colour, marker (filled or hollow), line style, and its name in a legend."""

    label: str
    colour: str
    marker: str
    line: LineStyle = "-"
    hollow: bool = False

    def keywords(self) -> dict[str, Any]:
        """Keywords of `Axes.plot` and `Line2D`."""
        edge, face = (self.colour, "none") if self.hollow else ("white", self.colour)
        look = {"color": self.colour, "marker": self.marker, "linestyle": self.line}
        return look | {"markeredgecolor": edge, "markerfacecolor": face}


OUTCOMES = {  # by the column of the table that holds the rate
    "refused_rate": Style("refused", BLUE, "s", "--"),
    "asr": Style("complied (ASR)", RED, "o"),
    "broken_rate": Style("broken", PURPLE, "^", ":"),
    "harmless_answered": Style("harmless answered", GREEN, "D", "-."),
}
CLASSES = {  # of prompts, by their label
    "harmful": Style("harmful", RED, "o"),
    "harmless": Style("harmless", BLUE, "s", "--"),
    "confusable": Style("confusable", YELLOW, "^", ":"),
}


def technique_style(name: str, series: int = 0) -> Style:
    """Style of a technique; `series` counts its variants. ValueError for unknown names.

    Techniques of a category differ by marker and line style, variants of a technique by line style."""
    if name not in TECHNIQUES:
        raise ValueError(f"unknown technique {name!r}; choose one of {', '.join(TECHNIQUES)}")
    label, category, marker = TECHNIQUES[name]
    place = [other for other, (_, of, _) in TECHNIQUES.items() if of == category].index(name)
    return Style(label, CATEGORY_COLOURS[category], marker, LINE_STYLES[(place + series) % len(LINE_STYLES)])


def printed(name: str) -> str:
    """A technique's name as it is printed; other names as they are."""
    return TECHNIQUES[name][0] if name in TECHNIQUES else name


def series_name(technique: str, variant: str) -> str:
    """As "TEAL, whole prompt"; a technique without variants is named alone."""
    return f"{printed(technique)}, {variant}" if variant else printed(technique)


def level_text(row: pd.Series) -> str:
    """A condition's level: "0.65", or "activation+softmax", the parts it replaces; "" where it has none."""
    value = json.loads(row["settings"]).get(row["level_name"].replace(" ", "_"), row["level"])
    if isinstance(value, list):
        return "+".join(value)
    return "" if isinstance(value, bool) or pd.isna(value) else f"{value:g}"


def condition_name(row: pd.Series) -> str:
    """As "TEAL, whole prompt: 0.65", a series and its level, or "Iron, activation+softmax", the parts it replaces."""
    level, name = level_text(row), series_name(row["technique"], row["variant"])
    if level[:1].isalpha():
        return series_name(row["technique"], level)
    return f"{name}: {level}" if level else name


def falling(level_name: str) -> bool:
    """Whether a lower level (of bits, of a degree) approximates more, and so stands further right."""
    return "bits" in level_name or level_name == "degree"


def series_style(label: str, number: int) -> Style:
    """Style of the number-th of several models or layer sets: colour, marker and line style all differ."""
    markers = "osv^DPX"
    return Style(label, PALETTE[number % 6], markers[number % len(markers)], LINE_STYLES[number % len(LINE_STYLES)])


def approximated(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of approximated models."""
    return table[table["technique"] != "exact"]


def exact_row(table: pd.DataFrame, rows: pd.DataFrame) -> pd.Series | None:
    """The exact model's (first) row measured like `rows` (same model, protocol, prompts), or None."""
    exact = table[table["technique"] == "exact"]
    for column in CONTEXT:
        if column in table:
            exact = exact[exact[column] == rows[column].iloc[0]]
    return exact.iloc[0] if len(exact) else None


def series(rows: pd.DataFrame, keys: list[str], x: str = "level") -> Iterator[tuple[tuple[str, ...], pd.DataFrame]]:
    """(key, rows by rising x) of each series, in the table's order. ValueError for a series with two rows at one x."""
    for key, group in rows.groupby(keys, sort=False, dropna=False):
        if group[x].duplicated().any():
            level = group.loc[group[x].duplicated(), x].iloc[0]
            raise ValueError(f"{', '.join(map(str, key))}: several rows at {x} {level}; pool or select them first")
        yield key, group.sort_values(x)


def named_groups(rows: pd.DataFrame, keys: list[str], x: str | None = "level") -> list[tuple[str, pd.DataFrame]]:
    """(heading, rows) per combination of the keys; headed by those that differ. x: one row per value of it, or None."""
    differing = [i for i, key in enumerate(keys) if rows[key].nunique() > 1]
    groups = series(rows, keys, x) if x else rows.groupby(keys, sort=False)
    return [(", ".join(printed(str(key[i])) for i in differing if key[i]), group) for key, group in groups]


def technique_curves(rows: pd.DataFrame) -> Iterator[tuple[Style, pd.DataFrame]]:
    """(style, rows) per technique and variant; variants of a technique differ by line style and stand in the label."""
    seen: dict[str, int] = {}
    for (name, variant), group in series(rows, ["technique", "variant"]):
        style = technique_style(name, seen.get(name, 0))
        seen[name] = seen.get(name, 0) + 1
        yield replace(style, label=series_name(name, variant)), group


def panels(
    names: Sequence[str],
    x_label: str | Sequence[str],
    y_labels: Sequence[str],
    heights: Sequence[float] = (1.5,),
    columns: int = 4,
    share: str = "xy",
    width: float | None = None,
) -> tuple[Figure, NDArray[Any]]:
    """A figure with a stack of axes per name: (figure, axes [len(names), len(heights)]); headed where several.

    heights: of the axes of a stack, inches; share: the axes that all stacks have in common, of "x", "y", "xy" and "".
    Labels stand only where no neighbour shares them. One stack is a column wide, several a page, unless width says."""
    if not names:
        raise ValueError("nothing to draw: the table has no rows of approximated models")
    columns, depth = min(len(names), columns), len(heights)
    rows = ceil(len(names) / columns)
    size = (width or (COLUMN if len(names) == 1 else PAGE), rows * (sum(heights) + 0.2 * (len(names) > 1)) + 0.35)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.add_gridspec(rows * depth, columns, height_ratios=list(heights) * rows)
    axes = np.empty((len(names), depth), dtype=object)
    labels = [x_label] * len(names) if isinstance(x_label, str) else x_label
    for i, name in enumerate(names):
        row, column = divmod(i, columns)
        for j in range(depth):
            same_x = axes[0, 0] if "x" in share else axes[i, 0]
            same_y = axes[0, j] if "y" in share else None
            axes[i, j] = ax = figure.add_subplot(grid[row * depth + j, column], sharex=same_x, sharey=same_y)
            bottom = j == depth - 1 and not ("x" in share and i + columns < len(names))
            ax.tick_params(which="both", labelbottom=bottom, labelleft=column == 0 or "y" not in share)
            ax.set_xlabel(labels[i] if bottom else "")
            ax.set_ylabel(y_labels[j] if column == 0 else "")
        if len(names) > 1:
            axes[i, 0].set_title(name)
    return figure, axes


def legend(figure: Figure, styles: Mapping[str, Any]) -> Figure:
    """The figure, taller by a legend of label -> artist below the axes, in as many columns as fit."""
    per_entry = 0.053 * max(map(len, styles)) + 0.55  # inches: 7 pt letters, the handle and its gap
    rows = ceil(len(styles) / max(1, int(figure.get_figwidth() / per_entry)))
    figure.set_figheight(figure.get_figheight() + 0.15 * rows + 0.05)
    figure.legend(list(styles.values()), list(styles), loc="outside lower center", ncols=ceil(len(styles) / rows))
    return figure


def handles(styles: Sequence[Style]) -> dict[str, Any]:
    """Label -> legend artist of styles."""
    return {style.label: line(**style.keywords()) for style in styles}


def line(**keywords: Any) -> Line2D:
    """A legend artist for a line or marker."""
    return Line2D([], [], **keywords)


def patch(**keywords: Any) -> Patch:
    """A legend artist for a shaded region."""
    return Patch(**{"linewidth": 0, **keywords})


def curve(ax: Axes, rows: pd.DataFrame, x: str, y: str, style: Style, **keywords: Any) -> None:
    """Column y of rows against column x, with its 95 % band where rows have y_low and y_high."""
    ax.plot(rows[x], rows[y], **style.keywords() | keywords)
    if f"{y}_low" in rows:
        limits = rows[f"{y}_low"], rows[f"{y}_high"]
        ax.fill_between(rows[x].astype(float), *limits, color=style.colour, alpha=0.15, linewidth=0)


def bars(ax: Axes, rows: pd.DataFrame, x: str, y: str, style: Style, along: str = "y", **keywords: Any) -> None:
    """Points at columns x and y with 95 % bars along "x" or "y", from that column's _low and _high."""
    value = rows[{"x": x, "y": y}[along]]
    sides = np.clip([value - rows[f"{value.name}_low"], rows[f"{value.name}_high"] - value], 0, None)
    ax.errorbar(rows[x], rows[y], **{f"{along}err": sides}, **style.keywords() | keywords, elinewidth=0.6)


def cloud(ax: Axes, before: NDArray[Any], after: NDArray[Any], style: Style, segments: bool) -> None:
    """Points `before` [n, 2], an arrow between the means, one standard deviation of `after`; segments: each shift."""
    ax.plot(*before.T, color=style.colour, marker=style.marker, linestyle="none", alpha=0.45, markersize=3, mew=0)
    if segments:
        steps = np.stack([before, after, np.full_like(after, np.nan)], axis=1).reshape(-1, 2)
        ax.plot(*steps.T, color=style.colour, linewidth=0.4, alpha=0.5)
    values, vectors = np.linalg.eigh(np.cov(after.T))
    width, height = 2 * np.sqrt(np.clip(values[::-1], 0, None))
    angle = float(np.degrees(np.arctan2(*vectors[::-1, 1])))
    edge = {"edgecolor": style.colour, "facecolor": "none", "linestyle": "--", "linewidth": 1.0}
    ax.add_patch(Ellipse(tuple(after.mean(0)), width, height, angle=angle, **edge))
    arrow = {"arrowstyle": "-|>", "color": "black", "shrinkA": 0, "shrinkB": 0, "mutation_scale": 7, "linewidth": 1.0}
    ax.annotate("", after.mean(0), before.mean(0), arrowprops=arrow, zorder=5)
    ax.plot(*before.mean(0), color=style.colour, marker=style.marker, markeredgecolor="black", markersize=5, zorder=6)


def _failed(rows: pd.DataFrame) -> pd.DataFrame:
    """The conditions that failed; none in a table that does not say."""
    return rows[rows["failed"].fillna("") != ""] if "failed" in rows else rows[:0]


def failures(ax: Axes, rows: pd.DataFrame, x: str = "level", label: str = "failed") -> dict[str, Any]:
    """Marks conditions that failed (NaN or infinite logits) by a cross on the x axis; returns their legend entry."""
    failed = _failed(rows)
    if failed.empty:
        return {}
    look: dict[str, Any] = {"color": "black", "marker": "x", "linestyle": "none", "markeredgewidth": 1.0}
    crosses = ax.plot(failed[x], np.zeros(len(failed)), **look, transform=ax.get_xaxis_transform(), clip_on=False)
    crosses[0].set_in_layout(False)
    return {label: line(**look)}


def beyond(ax: Axes, rows: pd.DataFrame, x: str, y: str, along: str, highest: float = HIGHEST) -> dict[str, Any]:
    """Marks points whose column `along` ("x" or "y") was clipped to `highest`, by a caret: their legend entry."""
    over = rows[rows[{"x": x, "y": y}[along]] >= highest]
    if over.empty:
        return {}
    look: dict[str, Any] = {"color": "black", "linestyle": "none", "markersize": 4}
    look["marker"] = {"x": CARETRIGHTBASE, "y": CARETUPBASE}[along]
    ax.plot(over[x], over[y], **look, clip_on=False, zorder=5)
    return {"beyond the axis": line(**look)}


def plain(value: float, _: object = None) -> str:
    """A number without superscripts, which would be smaller than 7 pt: 0.05, 200, 1e6."""
    return f"{value:g}".replace("e+0", "e").replace("e+", "e").replace("e-0", "e-").replace("-", "\N{MINUS SIGN}")


def rate_axis(axis: Any, rates: Any = 1.0) -> None:
    """Shares printed in percent, from 0 to the first of 15, 25, 50, 75 and 100 % above the largest of the rates."""
    ticks, highest = [0, 0.25, 0.5, 0.75, 1], np.nan_to_num(np.asarray(rates, dtype=float)).max(initial=0.0)
    top = next((tick for tick in (0.15, *ticks[1:]) if tick >= highest), 1)
    axis.axes.set(**{f"{axis.axis_name}lim": (-0.03 * top, 1.03 * top)})
    axis.set_major_locator(FixedLocator(ticks) if top > 0.5 else MaxNLocator(5, steps=STEPS))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}"))


def _ticks(axis: Any, locator: Locator) -> None:
    """Plain numbers where the locator says, and no other ticks."""
    axis.set_major_locator(locator)
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(plain))


def log_axis(axis: Any, values: Any) -> None:
    """A logarithmic axis with as many plain numbers as the finite positive values span."""
    finite = np.asarray(values, dtype=float)
    finite = finite[np.isfinite(finite) & (finite > 0)]
    span = finite.max() / finite.min() if finite.size else 1.0
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    many = LogLocator(subs=(1, 2, 5) if span < 60 else (1,), numticks=6)
    _ticks(axis, MaxNLocator(4, steps=STEPS) if span < 4 else many)


def wide_axis(axis: Any, values: NDArray[Any]) -> None:
    """Logarithmic where all values [n] are positive, else linear within +-1 and logarithmic beyond."""
    if (values > 0).all():
        return log_axis(axis, values)
    axis.axes.set(**{f"{axis.axis_name}scale": "symlog"})
    _ticks(axis, FixedLocator([sign * 10.0**power for power in range(0, 7) for sign in (-1, 1)] + [0]))


def growth_axis(ax: Axes, growth: Any) -> None:
    """x axis of growth in percent: linear to 5 %, logarithmic to HIGHEST, so that small losses of utility show."""
    top = min(HIGHEST, max(100.0, float(np.nanmax(growth, initial=0.0))))
    ax.set_xscale("symlog", linthresh=5, linscale=0.8)
    ax.set_xlim(min(-1.0, 1.2 * float(np.nanmin(growth, initial=0.0))), 1.5 * top)
    _ticks(ax.xaxis, FixedLocator([tick for tick in (0, 5, 20, 100, 1e3, 1e4) if tick <= top]))


def level_axis(ax: Axes, levels: Any, level_name: str) -> None:
    """The dose axis: whole-numbered levels (bits) are ticked one by one; more approximation stands further right."""
    unique = np.unique(np.asarray(levels, dtype=float))
    unique = unique[np.isfinite(unique)]
    if len(unique) <= 8 and (unique == unique.round()).all():
        ax.set_xticks(unique, [f"{level:.0f}" for level in unique])
    else:
        _ticks(ax.xaxis, MaxNLocator(4, steps=STEPS))
    if falling(level_name) and not ax.xaxis_inverted():
        ax.invert_xaxis()


def sample_note(table: pd.DataFrame, intervals: str) -> str:
    """The end of a caption: n per condition from the counts in the table, the intervals, and what failed."""
    sizes, parts = [], []
    for label in CLASSES:
        n = table.get(f"n_{label}", pd.Series(dtype=float)).dropna()
        if n.max() > 0:
            sizes.append(f"{n.min():.0f}{'' if n.min() == n.max() else f' to {n.max():.0f}'} {label}")
    if sizes:
        parts.append(f"n = {', '.join(sizes)} requests per condition.")
    if intervals and any(column.endswith("_low") for column in table):
        parts.append(intervals)
    if failed := len(_failed(table)):
        parts.append(f"{failed} of {len(table)} conditions failed (NaN or infinite logits) and have no rate.")
    return " ".join(parts)


@styled
def save(figure: Figure, name: str, caption: str, table: pd.DataFrame, intervals: str = WILSON) -> Path:
    """Writes <name>.pdf, .png, .txt (caption, n, intervals) and .csv: the PDF's path.

    table: the plotted rows; where a figure shows thousands of values, the numbers that sum them up.
    Goes to APPROX_FIGURES or figures. Each file is whole or absent; the same figure gives the same bytes."""
    folder = figures_folder()
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for ax in figure.axes:  # the layout's last digits differ from run to run
        ax.set_position(np.round(ax.get_position().bounds, 6))
    for suffix, metadata in (("pdf", {"CreationDate": None}), ("png", None)):
        with atomic(folder / f"{name}.{suffix}") as path:
            figure.savefig(path, format=suffix, metadata=metadata, dpi=DPI)
    write_whole(folder / f"{name}.txt", f"{caption.rstrip()} {sample_note(table, intervals)}".rstrip() + "\n")
    with atomic(folder / f"{name}.csv") as path:
        table.to_csv(path, index=False)
    return folder / f"{name}.pdf"
