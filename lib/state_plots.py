"""Figures of notebooks 00, 04 and 06 besides those of `lib.plots`: pure functions from tables or arrays to a Figure."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lib import figures
from lib.figures import CLASSES, INK, PAGE, Figure, styled, technique_style
from lib.plots import ASR

DRIFT = {  # panel: (y label, column, column of the thin control lines)
    "harmful prompts": ("move towards harmless\n(share of the gap)", "towards harmless", None),
    "harmless prompts": ("move towards harmful\n(share of the gap)", "towards harmful", None),
    "direction": ("share of the shift along\nthe refusal direction", "share along", "shuffled share"),
    "linear probe": ("balanced accuracy", "probe, approximated", "probe, random shift"),
}


@styled
def drift_curves(table: pd.DataFrame) -> Figure:
    """Where each technique moves the states, by layer: rows of `hidden_states.layer_table` with a column technique.

    Bands: 95 % bootstrap intervals. Thin lines of the same colour: the control of that panel (97.5 % of directions from
    shuffled labels; a shift of the same size in a random direction). Black: the probe on exact states; dotted: with
    shuffled labels."""
    labels = [panel[0] for panel in DRIFT.values()]
    figure, axes = figures.panels(list(DRIFT), "layer", [""], (1.35,), columns=2, share="", width=PAGE)
    entries: dict[str, Any] = {}
    for ax, label, (_, column, control) in zip(axes[:, 0], labels, DRIFT.values(), strict=True):
        for number, (name, rows) in enumerate(table.groupby("technique", sort=False)):
            style = technique_style(str(name), number)
            figures.curve(ax, rows, "layer", column, style, linewidth=0.9)
            if control:
                ax.plot(rows["layer"], rows[control], color=style.colour, linestyle=style.line, linewidth=0.4)
            entries |= figures.handles([style])
        ax.set_ylabel(label)
        ax.axhline(0.5 if "probe" in column else 0, color=INK, linewidth=0.5)
        ax.xaxis.set_major_locator(figures.MaxNLocator(8, integer=True))
    exact = table.drop_duplicates("layer")
    axes[-1, 0].plot(exact["layer"], exact["probe, exact"], color="black")
    axes[-1, 0].plot(exact["layer"], exact["probe, shuffled labels"], color="black", linestyle=":")
    entries |= {"exact states": figures.line(color="black")}
    entries |= {"shuffled labels": figures.line(color="black", linestyle=":")}
    figures.legend(figure, entries | {"control": figures.line(color=INK, linewidth=0.4)})
    return figure


@styled
def on_noise_axis(curve: pd.DataFrame, points: pd.DataFrame) -> Figure:
    """ASR against the size of the error that arrives at the up-projections: noise (curve) and techniques (points).

    Both tables: std_up and asr with its interval; points: technique and label, one row per condition."""
    figure, axes = figures.panels([""], "std of the error at the input of up", [ASR], (2.2,))
    ax, entries = axes[0, 0], dict[str, Any]()
    noise = technique_style("gaussian")
    figures.curve(ax, curve.sort_values("std_up"), "std_up", "asr", noise)
    entries["Gaussian noise on the norms"] = figures.line(**noise.keywords())
    for name, rows in points.groupby("technique", sort=False):
        style = technique_style(str(name))
        figures.bars(ax, rows, "std_up", "asr", style, linestyle="none", markersize=5, zorder=4)
        entries |= {style.label: figures.line(**style.keywords() | {"linestyle": "none"})}
    figures.rate_axis(ax.yaxis, [*curve["asr_high"], *points["asr_high"]])
    figures.legend(figure, entries)
    return figure


@styled
def one_prompt(
    cloud: NDArray[Any],
    labels: Sequence[str],
    before: NDArray[Any],
    after: NDArray[Any],
    errors: NDArray[Any],
    layer: int,
) -> Figure:
    """Left: one prompt before and after [2] among exact states [n, 2] on their principal axes, at one layer.

    Right: the size of its error by layer [layers], in shares of the gap between harmful and harmless states."""
    figure, axes = figures.panels([f"layer {layer}", "error"], "", [""], (1.9,), columns=2, share="", width=PAGE)
    (left,), (right,) = axes
    kinds = [style for name, style in CLASSES.items() if (np.asarray(labels) == name).any()]
    for style in kinds:
        points = cloud[np.asarray(labels) == style.label]
        left.plot(*points.T, color=style.colour, marker=style.marker, linestyle="none", alpha=0.4, mew=0, markersize=3)
    left.annotate("", after, before, arrowprops={"arrowstyle": "-|>", "color": "black", "shrinkA": 0, "shrinkB": 0})
    left.plot(*before, marker="*", color="black", markersize=9)
    left.set(xlabel="PC 1", ylabel="PC 2", xticks=[], yticks=[])
    right.bar(np.arange(len(errors)), errors, color=figures.GREY)
    right.set(xlabel="layer", ylabel="share of the gap")
    right.xaxis.set_major_locator(figures.MaxNLocator(8, integer=True))
    entries = {s.label: figures.line(**s.keywords() | {"linestyle": "none"}) for s in kinds}
    entries |= {"this request, exact": figures.line(color="black", marker="*", linestyle="none")}
    entries |= {"approximated": figures.line(color="black", marker=r"$\rightarrow$", linestyle="none", markersize=8)}
    figures.legend(figure, entries)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG image, for a widget."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
