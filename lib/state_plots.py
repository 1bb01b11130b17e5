"""Figures of notebooks 00, 04 and 06 besides those of `lib.plots`: pure functions from tables or arrays to a Figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lib import figures
from lib.figures import CLASSES, INK, PAGE, Figure, styled, technique_style
from lib.plots import ASR

DRIFT = (  # y label, column, column of the pale control lines
    ("towards harmless\n(share of the gap)", "towards harmless", None),
    ("towards harmful\n(share of the gap)", "towards harmful", None),
    ("share of the shift\non the direction", "share along", "shuffled share"),
    ("probe, balanced\naccuracy", "probe, approximated", "probe, random shift"),
)


@styled
def state_clouds(
    exact: Mapping[int, NDArray[Any]],
    shifted: Mapping[int, NDArray[Any]],
    labels: Sequence[str],
    explained: Mapping[int, tuple[float, float]],
    large: int | None = None,
    axis: str = "PC",
) -> Figure:
    """Hidden states on the first two principal axes of the exact states, a panel per layer; points light, by class.

    exact, shifted: layer -> [n, 2], the same prompts in the same axes; labels [n]: "harmful", "harmless", "confusable";
    explained: layer -> shares of variance. Arrows join the class means, dashed ellipses hold one standard deviation of
    the approximated states. large: one layer at page width, with each prompt's own shift; axis: name of the axes."""
    layers = list(exact) if large is None else [large]
    classes = np.asarray(labels)
    height = 1.5 if large is None else 4.0
    figure, axes = figures.panels([""] * len(layers), "", [""], (height,), share="", width=PAGE)
    kinds = [style for name, style in CLASSES.items() if (classes == name).any()]
    for ax, layer in zip(axes[:, 0], layers, strict=True):
        for style in kinds:
            before, after = exact[layer][classes == style.label], shifted[layer][classes == style.label]
            figures.cloud(ax, before, after, style, segments=large is not None)
        first, second = (f"{axis} {i} ({100 * share:.0f} % of variance)" for i, share in enumerate(explained[layer], 1))
        ax.set(title=f"layer {layer}", xlabel=first, ylabel=second, xticks=[], yticks=[])
    entries = {s.label: figures.line(**s.keywords() | {"linestyle": "none", "markersize": 5}) for s in kinds}
    entries["approximated: mean shift"] = figures.line(color="black", marker=">", markevery=[1])
    entries["approximated: 1 standard deviation"] = figures.line(color=INK, linestyle="--")
    if large is not None:
        entries["shift of one prompt"] = figures.line(color=INK, linewidth=0.4)
    return figures.legend(figure, entries)


@styled
def drift_curves(table: pd.DataFrame) -> Figure:
    """Where each technique moves the states, by layer: rows of `hidden_states.layer_table` with technique and label.

    A column per category, a row per measure. Bands: 95 % bootstrap intervals. Pale lines: the control of that measure
    (97.5 % of directions from shuffled labels; a shift of the same size in a random direction). Black: the probe on
    exact states; dotted: with shuffled labels."""
    groups = list(table.groupby(table["technique"].map(lambda name: figures.TECHNIQUES[name][1]), sort=False))
    names, labels = [str(name) for name, _ in groups], [label for label, _, _ in DRIFT]
    figure, axes = figures.panels(names, "layer", labels, (1.0,) * len(DRIFT), width=PAGE)
    entries: dict[str, Any] = {}
    for stack, (_, group) in zip(axes, groups, strict=True):
        for label, rows in group.groupby("label", sort=False):
            style = replace(technique_style(rows["technique"].iloc[0]), label=str(label))
            entries |= figures.handles([style])
            for ax, (_, column, control) in zip(stack, DRIFT, strict=True):
                figures.curve(ax, rows, "layer", column, style, linewidth=0.9)
                if control:
                    ax.plot(rows["layer"], rows[control], color=style.colour, linestyle=style.line, alpha=0.4)
        for ax in stack[:2]:
            ax.axhline(0, color=INK, linewidth=0.5)
        exact = group.drop_duplicates("layer")
        stack[-1].plot(exact["layer"], exact["probe, exact"], color="black", linewidth=0.8)
        stack[-1].plot(exact["layer"], exact["probe, shuffled labels"], color="black", linestyle=":")
    axes[0, 0].xaxis.set_major_locator(figures.MaxNLocator(6, integer=True))
    entries |= {"exact states": figures.line(color="black", linewidth=0.8)}
    entries |= {"shuffled labels": figures.line(color="black", linestyle=":")}
    return figures.legend(figure, entries | {"control": figures.line(color=INK, alpha=0.4)})


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
    return figures.legend(figure, entries)


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
    return figures.legend(figure, entries)


def png(figure: Figure) -> bytes:
    """The figure as a PNG image, for a widget."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
