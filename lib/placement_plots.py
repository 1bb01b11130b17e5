"""Figures of safe placement: the frontier of safety against savings, and the level that every layer got.

Pure functions from the tables of `lib.placement` to a Figure; one column of axes per technique.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from lib import figures
from lib.figures import BLUE, INK, RED, Figure, Style, styled, technique_style

CRITERIA = {"asr": "ASR", "over_refusal": "over-refusal", "broken": "broken"}
HIGHEST = 0.2  # increase to which an axis reaches at least
EDGE = 104  # percent: where an axis ends beyond the highest and the lowest value that is drawn
PLACEMENTS = {"uniform": Style("uniform", BLUE, "s", "--"), "placed": Style("placed", RED, "o")}


@styled
def frontier(table: pd.DataFrame, tolerance: float) -> Figure:
    """Increase over exact of ASR, over-refusal and broken replies (points) against what is saved; a column a technique.

    table: rows of `placement.Search.table` and `placement.validate`, with `stage` "search" or "sealed". Small markers:
    search prompts; large and outlined: sealed ones. Bars are 95 %; what lies beyond the axis, which ends at `HIGHEST`
    or half above the tolerance, is a triangle at its edge."""
    edges = -0.6 * tolerance, max(HIGHEST, 1.5 * tolerance)
    groups = list(table[table["failed"] == ""].groupby("technique", sort=False))
    names = [technique_style(str(name)).label for name, _ in groups]
    axis_names = [str(rows["level_name"].iloc[0]) for _, rows in groups]
    y_labels = [f"{label}\n(points)" for label in CRITERIA.values()]
    figure, axes = figures.panels(names, axis_names, y_labels, (0.95,) * 3, columns=3, share="y")
    for stack, (_, rows) in zip(axes, groups, strict=True):
        for ax, criterion in zip(stack, CRITERIA, strict=True):
            ax.axhline(0, color=INK, linewidth=0.5)
            ax.axhline(100 * tolerance, color="black", linestyle="--", linewidth=0.8)
            for (placement, stage), points in rows.groupby(["placement", "stage"], sort=False):
                _points(ax, points.sort_values("level"), criterion, PLACEMENTS[placement], stage == "sealed", edges)
        if figures.falling(str(rows["level_name"].iloc[0])):
            stack[0].invert_xaxis()
    for ax in axes[0]:
        ax.set_ylim(*(EDGE * edge for edge in edges))
    entries = figures.handles(list(PLACEMENTS.values()))
    look: dict[str, Any] = {"linestyle": "none", "markersize": 6, "markeredgecolor": "black"}
    for name, style in PLACEMENTS.items():
        entries[f"{name}, sealed prompts"] = figures.line(**style.keywords() | look)
    return figures.legend(figure, entries | {"tolerance": figures.line(color="black", linestyle="--", linewidth=0.8)})


def _points(
    ax: Any, rows: pd.DataFrame, criterion: str, style: Style, sealed: bool, edges: tuple[float, float]
) -> None:
    """Search prompts: a thin line with small markers and bars. Sealed prompts: one outlined marker with its bar.

    edges: lowest and highest increase that is drawn, shares; a triangle points at what lies beyond."""
    column = f"{criterion}_increase"
    middle, low, high = (100 * rows[column + end].astype(float).clip(*edges) for end in ("", "_low", "_high"))
    look: dict[str, Any] = {"markersize": 3, "linewidth": 0.6, "alpha": 0.7}
    if sealed:
        look = {"markersize": 6.5, "linestyle": "none", "markeredgecolor": "black", "zorder": 5}
    spread = np.clip([middle - low, high - middle], 0, None)
    ax.errorbar(rows["level"], middle, yerr=spread, elinewidth=1.2 if sealed else 0.4, **style.keywords() | look)
    for marker, edge, beyond in zip("v^", edges, (rows[column] < edges[0], rows[column] > edges[1]), strict=True):
        mark = {"marker": marker, "color": "black", "linestyle": "none", "markersize": 4, "clip_on": False, "zorder": 6}
        if beyond.any():  # an empty line that is not clipped undoes the layout
            ax.plot(rows["level"][beyond], [EDGE * edge] * beyond.sum(), **mark)


@styled
def layer_levels(table: pd.DataFrame) -> Figure:
    """The level of each layer, uniform and placed, a panel per technique; table: of `placement.layer_levels`."""
    groups = list(table.groupby("technique", sort=False))
    names = [technique_style(str(name)).label for name, _ in groups]
    figure, axes = figures.panels(names, "layer", [""], (1.3,), columns=3, share="")
    for ax, (_, rows) in zip(axes[:, 0], groups, strict=True):
        for name, points in rows.groupby("placement", sort=False):
            ax.plot(points["layer"], points["level"], **PLACEMENTS[name].keywords(), drawstyle="steps-mid")
        layers = np.unique(rows["layer"])
        ax.set_xticks(layers[:: 1 + len(layers) // 12])
        setting = str(rows["setting"].iloc[0])
        ax.set_ylabel("operations replaced" if setting == "parts" else setting)
        if (rows["level"] % 1 == 0).all():
            ax.set_yticks(range(int(rows["level"].min()), int(rows["level"].max()) + 1))
        if figures.falling(setting):
            ax.invert_yaxis()
    return figures.legend(figure, figures.handles(list(PLACEMENTS.values())))
