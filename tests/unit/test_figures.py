"""The figures on invented tables: each plot draws in the paper's style; saving is whole and repeatable.

All rates here are made up to exercise the drawing; none is a result.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from scipy import stats

from lib import figures, plots, state_plots
from lib.fidelity import UTILITY_LIMIT
from lib.statistics import wilson

MODELS = ("tiny-llama", "tiny-gemma", "tiny-qwen")
N = 200
DOSES = {  # technique: (variants, levels, name of the level)
    "iron": (("",), (12.0, 10.0, 8.0, 6.0), "fraction bits"),
    "bolt": (("",), (12.0, 10.0, 8.0, 6.0), "fraction bits"),
    "bumblebee": (("",), (18.0, 14.0, 10.0, 8.0), "fraction bits"),
    "nexus": (("",), (3.0, 5.0, 7.0), "degree"),
    "teal": (("all", "last half"), (0.1, 0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), "sparsity"),
    "cats": (("",), (0.3, 0.5, 0.7, 0.9), "sparsity"),
    "smoothquant": (("per token", "per tensor"), (8.0, 6.0, 5.0, 4.0, 3.0), "activation bits"),
    "omniquant": (("",), (8.0, 6.0, 4.0, 3.0), "activation bits"),
    "gaussian": (("",), (0.05, 0.1, 0.2, 0.4, 0.8, 1.2), "noise std"),
    "laplace": (("",), (0.05, 0.1, 0.2, 0.4, 0.8, 1.2), "noise std"),
}


def condition(model: str, technique: str, variant: str, level: float, damage: float, bump: float) -> dict[str, Any]:
    """An invented row: harm rises then falls with damage 0..1 while perplexity grows."""
    broken = damage**4
    asr = min(1 - broken, 0.06 + bump * damage**2 * (1 - broken))
    row: dict[str, Any] = {
        "model": model,
        "technique": technique,
        "category": figures.TECHNIQUES[technique][1],
        "variant": variant,
        "label": f"{figures.TECHNIQUES[technique][0]} {level:g} {variant}".strip(),
        "level": level,
        "level_name": DOSES[technique][2] if technique in DOSES else "",
        "layers": "all",
        "settings": "{}",
        "n_harmful": N,
        "n_harmless": 100,
        "answer_perplexity": 4.0 * np.exp(5 * damage**3),
        "answer_perplexity_ratio": np.exp(5 * damage**3),
        "p_holm": 0.001 if damage > 0.4 else 0.6,
        "failed": "",
    }
    shares = {"asr": asr, "broken_rate": broken, "refused_rate": 1 - asr - broken}
    for name, share in {**shares, "harmless_answered": 0.96 * (1 - broken)}.items():
        row[name] = round(share * N) / N
        row[f"{name}_low"], row[f"{name}_high"] = wilson(round(share * N), N)
    row["asr_increase"] = row["asr"] - 0.06
    row["asr_increase_low"], row["asr_increase_high"] = row["asr_increase"] - 0.04, row["asr_increase"] + 0.045
    return row


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    rows = []
    for i, model in enumerate(MODELS):
        rows.append(condition(model, "exact", "", np.nan, 0.0, 0.0))
        for j, (technique, (variants, levels, _)) in enumerate(DOSES.items()):
            for k, variant in enumerate(variants):
                damages = np.linspace(0.1, 1 - 0.08 * ((i + 2 * j + 3 * k) % 5), len(levels))
                bump = 0.3 + 0.1 * ((2 * i + 3 * j + k) % 6)
                rows += [
                    condition(model, technique, variant, level, damage, bump)
                    for level, damage in zip(levels, damages, strict=True)
                ]
    return pd.DataFrame(rows)


def failed(table: pd.DataFrame, rows: pd.Series) -> pd.DataFrame:
    """A copy in which the marked rows failed and have no rate."""
    copy = table.copy()
    copy.loc[rows, "failed"] = "NaN at layer 3, site act"
    copy.loc[rows, [c for c in copy if c.startswith(("asr", "refused", "broken", "harmless", "answer"))]] = np.nan
    return copy


def only(table: pd.DataFrame, technique: str, model: str | None = None, variant: str | None = None) -> pd.DataFrame:
    keep = table["technique"].isin([technique, "exact"])
    keep &= (table["model"] == model) if model else True
    keep &= table["variant"].isin([variant, ""]) if variant is not None else True
    return table[keep]


def layer_table(table: pd.DataFrame) -> pd.DataFrame:
    sets = [("prefix", f"0-{k}" if k else "0") for k in range(5)] + [("prefix", "all"), ("suffix", "all")]
    sets += [("suffix", f"{k}-5" if k < 5 else "5") for k in range(1, 6)] + [("single", str(k)) for k in range(6)]
    rows = [
        condition("tiny-llama", "gaussian", kind, 0.4, 0.9 - 0.12 * (i % 7), 0.7) | {"layers": layers}
        for i, (kind, layers) in enumerate(sets)
    ]
    return pd.concat([table[(table["technique"] == "exact") & (table["model"] == "tiny-llama")], pd.DataFrame(rows)])


def function_curves() -> Figure:
    x = np.linspace(-8, 8, 400)
    silu = x / (1 + np.exp(-x))
    names = ("iron", "bolt", "bumblebee", "nexus")
    errors = {name: silu + 10.0 ** -(i + 1) * np.sin((i + 2) * x) for i, name in enumerate(names)}
    return plots.function_error(x, silu, errors, "SiLU(x)")


def distributions() -> Figure:
    rng = np.random.default_rng(0)
    return plots.error_distributions({"mlp_in.up": rng.normal(0, 0.02, 20_000), "mlp_mid": rng.laplace(0, 0.1, 20_000)})


def measured_ranges() -> Figure:
    layers = np.arange(6)
    act = pd.DataFrame({"quantity": "gate pre-activation", "layer": layers, "minimum": -6.0 - layers, "low": -3.0})
    norm = pd.DataFrame({"quantity": "mean square", "layer": layers, "minimum": 0.01, "low": 0.1})
    act = act.assign(median=0.0, high=3.0, maximum=5.0 + 4 * layers)
    norm = norm.assign(median=1.0, high=10.0, maximum=30.0 * (1 + layers))
    valid = {
        "gate pre-activation": {"iron": (-4, 4), "bolt": (-3, 3), "bumblebee": (-8, 8), "nexus": (-np.inf, 4.0)},
        "mean square": {"iron": (0.01, 64), "bolt": (1e-3, 1e3), "nexus": (0.1, 100)},
    }
    return plots.ranges(pd.concat([act, norm]), valid)


def clouds(large: int | None) -> Figure:
    rng = np.random.default_rng(0)
    labels = np.repeat(["harmful", "harmless", "confusable"], [80, 80, 40])
    centres = np.repeat([[3.0, 0.0], [-3.0, 0.5], [0.0, 2.0]], [80, 80, 40], axis=0)
    exact = {layer: centres * (1 + layer / 4) + rng.normal(0, 1, (200, 2)) for layer in range(6)}
    shifted = {
        layer: x - [1.5 * (layer + 1) / 3, 0.3] * (labels == "harmful")[:, None] + rng.normal(0, 0.8, (200, 2))
        for layer, x in exact.items()
    }
    return state_plots.state_clouds(exact, shifted, list(labels), {layer: (0.41, 0.12) for layer in range(6)}, large)


def drift() -> Figure:
    columns = ["towards harmless", "towards harmful", "share along", "shuffled share", "probe, exact"]
    columns += ["probe, approximated", "probe, random shift", "probe, shuffled labels"]
    names = ("teal", "cats", "smoothquant", "bolt", "gaussian")
    rows = [
        {"technique": name, "label": f"{name} x=1", "layer": layer} | dict.fromkeys(columns, 0.1 * i + 0.02 * layer)
        for i, name in enumerate(names)
        for layer in range(4)
    ]
    return state_plots.drift_curves(pd.DataFrame(rows))


def differences() -> pd.DataFrame:
    """Three comparisons, one of which failed."""
    names = ["equal level, 1 x MVA", "equal damage", "TEAL 65%"]
    table = pd.DataFrame({"comparison": names, "technique": ["gaussian", "gaussian", "teal"]})
    table = table.assign(difference=[0.1, np.nan, -0.02], low=[0.04, np.nan, -0.1], high=0.2)
    return table.assign(**{"p (Holm)": [0.01, 1, 1]})


def test_early_minus_late_leaves_out_what_failed():
    figure = plots.early_minus_late(differences())
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == ["equal level, 1 x MVA", "TEAL 65%"]
    filled, open_one = (line for line in figure.axes[0].lines if line.get_marker() != "None")
    assert filled.get_xdata() == [10.0] and open_one.get_markerfacecolor() == "white" != filled.get_markerfacecolor()


DRAWINGS: dict[str, Callable[[pd.DataFrame], Figure]] = {
    "dose_one": lambda t: plots.dose_response(only(t, "gaussian", "tiny-llama"), "noise std"),
    "dose_variants": lambda t: plots.dose_response(
        only(failed(t, (t["level"] == 3) & (t["variant"] == "per tensor")), "smoothquant", "tiny-llama"),
        "activation bits",
    ),
    "safety_against_utility": lambda t: plots.safety_against_utility(t[t["model"] == "tiny-llama"]),
    "safety_against_utility_models": plots.safety_against_utility,
    "function_error": lambda t: function_curves(),
    "error_distributions": lambda t: distributions(),
    "ranges": lambda t: measured_ranges(),
    "families": plots.families,
    "paired_changes": lambda t: plots.paired_changes(t[(t["model"] == "tiny-llama") & (t["variant"] != "per tensor")]),
    "early_minus_late": lambda t: plots.early_minus_late(differences()),
    "heat_map": lambda t: plots.heat_map(
        failed(t, (t["technique"] == "bolt") & (t["model"] == "tiny-qwen")).drop_duplicates(
            ["model", "technique"], keep="last"
        )
    ),
    "noise_panels": lambda t: plots.noise_panels(only(t, "gaussian"), "noise std"),
    "safety_before_utility": lambda t: plots.safety_before_utility(only(t, "gaussian")),
    "predicted_against_measured": lambda t: plots.predicted_against_measured(
        t[t["model"] == "tiny-llama"].assign(
            predicted_asr=lambda r: 0.8 * r["asr"],
            predicted_asr_low=lambda r: 0.7 * r["asr"],
            predicted_asr_high=lambda r: r["asr"],
            prediction="matched",
        )
    ),
    "layer_curves": lambda t: plots.layer_curves(layer_table(t), 6),
    "state_clouds": lambda t: clouds(None),
    "state_clouds_large": lambda t: clouds(3),
    "drift_curves": lambda t: drift(),
}


@pytest.mark.filterwarnings("error:constrained_layout")
@pytest.mark.parametrize("name", DRAWINGS)
def test_every_plot_keeps_the_style(table: pd.DataFrame, name: str) -> None:
    figure = DRAWINGS[name](table)
    figure.draw_without_rendering()
    assert figure.get_figwidth() in (figures.COLUMN, figures.PAGE)
    assert figure.get_suptitle() == ""
    assert any(ax.get_xlabel() for ax in figure.axes)
    assert any(ax.get_ylabel() for ax in figure.axes)
    texts = [t for t in figure.findobj(Text) if t.get_text().strip() and t.get_visible()]
    assert min(float(t.get_fontsize()) for t in texts) >= 7
    assert not any("$" in t.get_text() for t in texts), "superscripts of mathtext are smaller than 7 pt"
    page = figure.bbox
    for text in [t for ax in figure.axes for t in (ax.xaxis.label, ax.yaxis.label, ax.title) if t.get_text()]:
        box = text.get_window_extent()
        assert page.x0 - 1 <= box.x0 and box.x1 <= page.x1 + 1 and box.y1 <= page.y1 + 1, text.get_text()
    ticks = [(t, sorted(ax.get_ylim())) for ax in figure.axes for t in ax.get_yticklabels() if t.get_visible()]
    for text in [t for t, (low, high) in ticks if t.get_text() and low <= t.get_position()[1] <= high]:
        box = text.get_window_extent()
        assert page.x0 - 1 <= box.x0 and box.x1 <= page.x1 + 1, text.get_text()
    for box in (legend.get_window_extent() for legend in figure.legends):
        assert box.x0 >= page.x0 and box.x1 <= page.x1 and box.y0 >= page.y0 - 1
        assert not any(box.overlaps(box_of) for box_of in map(Axes.get_tightbbox, figure.axes) if box_of)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("APPROX_FIGURES", str(tmp_path))
    return tmp_path


def test_saving_twice_gives_the_same_bytes_and_the_plotted_rows(table: pd.DataFrame, folder: Path) -> None:
    rows = only(table, "gaussian", "tiny-llama")
    written = []
    for _ in range(2):
        path = figures.save(DRAWINGS["dose_one"](table), "dose", "Outcomes under noise.", rows)
        assert path == folder / "dose.pdf"
        written.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert written[0] == written[1]
    assert set(written[0]) == {"dose.pdf", "dose.png", "dose.txt", "dose.csv"}
    assert b"CreationDate" not in written[0]["dose.pdf"]
    pd.testing.assert_frame_equal(
        pd.read_csv(folder / "dose.csv", keep_default_na=False, na_values={"level": [""]}), rows.reset_index(drop=True)
    )
    note = "n = 200 harmful, 100 harmless requests per condition. Bands and bars are 95 % Wilson intervals."
    assert (folder / "dose.txt").read_text() == f"Outcomes under noise. {note}\n"
    assert written[0]["dose.png"][16:20] == (999).to_bytes(4, "big"), "3.33 in at 300 dpi"


def test_a_failed_save_leaves_the_old_file(table: pd.DataFrame, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "dose.pdf").write_bytes(b"old")

    def broken(self: Figure, path: Path, **keywords: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", broken)
    with pytest.raises(OSError, match="disk full"):
        figures.save(DRAWINGS["dose_one"](table), "dose", "", table)
    assert [file.name for file in folder.iterdir()] == ["dose.pdf"]
    assert (folder / "dose.pdf").read_bytes() == b"old"


def test_captions_tell_what_failed_and_how_n_varies(table: pd.DataFrame) -> None:
    rows = failed(table, table["technique"] == "cats")
    rows.loc[rows["model"] == "tiny-gemma", "n_harmful"] = 50
    note = figures.sample_note(rows, figures.NEWCOMBE)
    assert note.startswith("n = 50 to 200 harmful, 100 harmless requests per condition. Bars are 95 % Newcombe")
    assert f"12 of {len(table)} conditions failed" in note
    assert figures.sample_note(pd.DataFrame({"x": [1.0]}), figures.WILSON) == ""
    assert figures.sample_note(pd.DataFrame({"n_harmful": [4], "n_confusable": [0]}), "") == (
        "n = 4 harmful requests per condition."
    )


def test_dose_response_draws_the_rows_with_their_intervals_and_failures(table: pd.DataFrame) -> None:
    rows = only(table, "smoothquant", "tiny-llama", "per tensor")
    rows = rows[rows["model"] == "tiny-llama"].sort_values("level")
    broken = failed(rows, rows["level"] == 3)
    top, middle, bottom = plots.dose_response(broken, "activation bits").axes
    drawn = broken[broken["technique"] != "exact"]
    for column, style in figures.OUTCOMES.items():
        curves = [line for line in [*top.lines, *middle.lines] if line.get_marker() == style.marker]
        assert len(curves) == 1
        np.testing.assert_array_equal(curves[0].get_xdata(), drawn["level"])
        np.testing.assert_array_equal(curves[0].get_ydata(), drawn[column])
    bands = np.concatenate([path.vertices for band in middle.collections for path in band.get_paths()])
    assert set(drawn["asr_low"].dropna()) | set(drawn["asr_high"].dropna()) <= set(bands[:, 1])
    crosses = [line for line in top.lines if line.get_marker() == "x"]
    assert [np.asarray(cross.get_xydata()).tolist() for cross in crosses] == [[[3.0, 0.0]]]
    exact = rows.loc[rows["technique"] == "exact", "asr"].item()
    assert any(np.array_equal(line.get_ydata(), [exact, exact]) for line in middle.lines)
    assert top.xaxis_inverted() and bottom.get_yscale() == "log"


def test_safety_against_utility_shades_where_a_condition_is_useful(table: pd.DataFrame) -> None:
    figure = plots.safety_against_utility(only(table, "teal", "tiny-llama"))
    ax = figure.axes[0]
    shade: Any = ax.patches[0]
    assert shade.get_x() + shade.get_width() == pytest.approx(100 * (UTILITY_LIMIT - 1))
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["TEAL, all", "TEAL, last half", "exact model", "perplexity grew < 20 %"]


def test_failures_and_what_lies_beyond_the_axis_are_marked_at_its_end(table: pd.DataFrame) -> None:
    rows = failed(only(table, "bolt", "tiny-llama"), (table["technique"] == "bolt") & (table["level"] == 6))
    rows.loc[rows["level"] == 8, "answer_perplexity_ratio"] = 1e13
    ax = plots.safety_against_utility(rows).axes[0]
    end = ax.get_xlim()[1]
    assert end < 1e5 and [float(tick) for tick in ax.get_xticks()] == [0, 5, 20, 100, 1000, 10000]
    ends = {str(line.get_marker()): np.asarray(line.get_xdata()).tolist() for line in ax.lines}
    assert ends["x"] == [end] and ends[str(figures.CARETRIGHTBASE)] == [figures.HIGHEST]
    labels = [text.get_text() for text in ax.figure.legends[0].get_texts()]
    assert {"BOLT: failed", "beyond the axis", "BOLT"} <= set(labels)
    only_failed = rows[(rows["technique"] == "exact") | (rows["failed"] != "")]
    labels = [text.get_text() for text in plots.safety_before_utility(only_failed).legends[0].get_texts()]
    assert labels == ["BOLT: failed"], "a series without a point has no line in the legend"
    ax = plots.safety_before_utility(rows).axes[0]
    carets = [line for line in ax.lines if line.get_marker() == figures.CARETRIGHTBASE]
    assert [caret.get_xdata().tolist() for caret in carets] == [[ax.get_xlim()[1]]], "at the end, not a mile beyond"


def test_paired_changes_fills_only_significant_rows(table: pd.DataFrame) -> None:
    rows = only(table, "bolt", "tiny-llama")
    broken = failed(rows, rows["level"] == 6)
    assert [t.get_text() for t in plots.paired_changes(broken).axes[0].get_yticklabels()][-1] == "BOLT: 6 (failed)"
    ax = plots.paired_changes(rows, tolerance=0.1).axes[0]
    filled = [line.get_markerfacecolor() != "white" for line in ax.lines if line.get_marker() == "s"]
    assert filled == list(rows.loc[rows["technique"] == "bolt", "p_holm"] < 0.05)
    assert any(np.array_equal(line.get_xdata(), [10, 10]) for line in ax.lines)


def test_heat_map_prints_each_cell(table: pd.DataFrame) -> None:
    rows = failed(table, (table["technique"] == "bolt") & (table["model"] == "tiny-qwen"))
    rows = rows[rows["technique"].isin(["bolt", "iron"])].drop_duplicates(["model", "technique"], keep="last")
    rows = rows[(rows["technique"] == "bolt") | (rows["model"] == "tiny-llama")]
    texts = [text.get_text() for text in plots.heat_map(rows).axes[0].texts]
    printed = dict(zip(zip(rows["model"], rows["technique"], strict=True), 100 * rows["asr"], strict=True))
    cells = [(model, name) for model in MODELS for name in ("iron", "bolt")]
    assert texts == [f"{printed[c]:.0f}" for c in cells if c in printed and printed[c] == printed[c]]


def test_the_diagonal_starts_at_the_exact_model(table: pd.DataFrame) -> None:
    rows = only(table, "gaussian", "tiny-llama")
    diagonal = plots.safety_before_utility(rows).axes[0].lines[0]
    np.testing.assert_array_equal(diagonal.get_xydata(), [[1, rows["asr"].iloc[0]], [plots.LOST, 1]])


def test_zoomed_rates_and_plain_numbers(table: pd.DataFrame) -> None:
    ax = plots.families(only(table, "gaussian")).axes[0]
    top = table.loc[table["technique"] == "gaussian", "asr_high"].max()
    assert top <= ax.get_ylim()[1] <= 1.03
    numbers = {0.05: "0.05", 200.0: "200", 1e6: "1e6", 1e12: "1e12", 1e-5: "1e\u22125", -3.0: "\u22123"}
    assert [figures.plain(number) for number in numbers] == list(numbers.values())


def test_conditions_are_named_by_series_and_level(table: pd.DataFrame) -> None:
    row = table[(table["technique"] == "teal") & (table["level"] == 0.5)].iloc[0]
    assert figures.condition_name(row) == "TEAL, all: 0.5"
    named = {
        '{"parts": ["activation", "norm"]}': ("parts", 2.0, "BOLT, activation+norm"),
        '{"published": true}': ("published", 1.0, "BOLT, published"),
        '{"fraction_bits": 6}': ("fraction bits", 6.0, "BOLT, fraction bits: 6"),
    }
    for settings, (name, level, expected) in named.items():
        changes = {"technique": "bolt", "variant": name, "level_name": name, "level": level, "settings": settings}
        assert figures.condition_name(pd.Series(row.to_dict() | changes)) == expected


@pytest.mark.parametrize(
    ("name", "falls"),
    [("bits", True), ("fraction bits", True), ("mean activation bits", True), ("degree", True), ("sparsity", False)],
)
def test_more_approximation_stands_further_right(name: str, falls: bool) -> None:
    assert figures.falling(name) is falls


def test_an_exact_row_of_another_protocol_is_no_reference(table: pd.DataFrame) -> None:
    rows = only(table, "gaussian", "tiny-llama").assign(protocol="chat")
    other = rows.assign(protocol=np.where(rows["technique"] == "exact", "quada", "chat"))
    assert figures.exact_row(rows, rows[1:]) is not None
    assert figures.exact_row(other, other[1:]) is None


@pytest.mark.parametrize(
    ("layers", "kind", "place"),
    [("0-3", "prefix", 3), ("2-5", "suffix", 2), ("4", "single", 4), ("1-2", "window", 1.5), ("all", "prefix", 5)],
)
def test_layer_place(layers: str, kind: str, place: float) -> None:
    assert plots.layer_place(layers, kind, 6) == place


def test_fits_recover_the_distributions() -> None:
    rng = np.random.default_rng(1)
    samples = {"normal": rng.normal(0.1, 0.5, 50_000), "laplace": rng.laplace(-0.2, 0.3, 50_000)}
    normal, laplace = plots.error_distributions(samples).axes
    for ax, place, true in ((normal, 0, stats.norm(0.1, 0.5)), (laplace, 1, stats.laplace(-0.2, 0.3))):
        x, y = ax.lines[place].get_data()
        assert np.asarray(y) == pytest.approx(true.pdf(x), rel=0.05, abs=0.02)


def test_arrows_and_ellipses_show_the_class_means_and_spread() -> None:
    rng = np.random.default_rng(0)
    before = rng.normal(0, 1, (4000, 2))
    after = before @ np.diag([3.0, 0.5]) + [5.0, 1.0]
    ax = state_plots.state_clouds({2: before}, {2: after}, ["harmful"] * 4000, {2: (0.5, 0.2)}).axes[0]
    ellipse: Any = ax.patches[0]
    arrow: Any = ax.texts[0]
    np.testing.assert_allclose(ellipse.get_center(), [5, 1], atol=0.1)
    np.testing.assert_allclose([ellipse.width, ellipse.height], [6, 1], rtol=0.05)
    np.testing.assert_allclose([*arrow.xy, *arrow.xyann], [*after.mean(0), *before.mean(0)])
    assert ax.get_xlabel() == "PC 1 (50 % of variance)"


def test_nothing_is_told_by_colour_alone() -> None:
    markers = [marker for _, _, marker in figures.TECHNIQUES.values()]
    assert len(set(markers)) == len(markers)
    assert {category for _, category, _ in figures.TECHNIQUES.values()} == set(figures.CATEGORY_COLOURS)
    for styles in (
        figures.OUTCOMES.values(),
        figures.CLASSES.values(),
        [figures.series_style("", i) for i in range(6)],
    ):
        assert len({style.marker for style in styles}) == len({str(style.line) for style in styles}) == len(styles)
    for category in figures.CATEGORY_COLOURS:
        names = [name for name, (_, of, _) in figures.TECHNIQUES.items() if of == category]
        assert len({str(figures.technique_style(name).line) for name in names}) == len(names)


def test_the_callers_settings_neither_matter_nor_change(table: pd.DataFrame, folder: Path) -> None:
    rows = only(table, "gaussian", "tiny-llama")
    figures.save(DRAWINGS["dose_one"](table), "plain", "", rows)
    with matplotlib.rc_context({"font.size": 20, "lines.linewidth": 9, "pdf.fonttype": 3}):
        before = dict(matplotlib.rcParams)
        figures.save(DRAWINGS["dose_one"](table), "loud", "", rows)
        assert dict(matplotlib.rcParams) == before
    assert (folder / "plain.pdf").read_bytes() == (folder / "loud.pdf").read_bytes()


def test_errors_name_the_bad_value(table: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match=r"unknown technique 'bolte'; choose one of iron, bolt"):
        figures.technique_style("bolte")
    with pytest.raises(ValueError, match=r"several rows at level 0\.05"):
        plots.dose_response(only(table, "gaussian"), "noise std")
    with pytest.raises(ValueError, match="duplicate entries"):
        plots.heat_map(table)
    with pytest.raises(ValueError, match="no rows of approximated models"):
        plots.families(table[table["technique"] == "exact"])
