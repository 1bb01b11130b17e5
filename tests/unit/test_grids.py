"""The conditions of notebooks 01 to 03: the notebooks' defaults are the library's, and short lists drop no variant."""

from __future__ import annotations

import pytest

from lib import grids
from lib.parameters import read_notebook
from lib.paths import ROOT


@pytest.mark.parametrize(
    ("notebook", "defaults"),
    [
        (
            "01_polynomialization",
            {"systems": grids.SYSTEMS, "fraction_bits": grids.FRACTION_BITS, "degrees": grids.DEGREES},
        ),
        ("02_sparsification", {"levels": grids.SPARSITIES}),
        ("03_quantization", {"levels": grids.BITS, "epochs": grids.EPOCHS}),
    ],
)
def test_a_notebook_measures_the_default_grid(notebook, defaults):
    parameters = read_notebook(ROOT / "notebooks" / f"{notebook}.ipynb").parameters
    for name, value in defaults.items():
        found = parameters[name].default
        assert (tuple(found) if isinstance(found, list) else found) == value


def test_notebooks_that_measure_levels_of_others_train_omniquant_as_long():
    for name in ("04_noise_sweep", "06_hidden_states", "07_defence"):
        assert "grids.EPOCHS" in (ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"), name


def series(conditions):
    return {(c.technique.name, c.variant) for c in conditions}


def test_one_level_still_gives_every_variant():
    assert series(grids.sparsification([0.5])) == series(grids.sparsification())
    assert series(grids.quantization(0.5, [4])) == series(grids.quantization(0.5))
    assert {c.level for c in grids.sparsification([0.5]) + grids.quantization(0.5, [4])} == {0.5, 4.0}


def test_rarer_variants_are_measured_at_levels_of_the_main_ones():
    every = grids.sparsification()
    levels = {variant: [c.level for c in every if c.variant == variant] for variant in {c.variant for c in every}}
    assert levels["whole prompt"] == list(grids.SPARSITIES)
    assert levels["greedy, whole prompt"] == levels["decoding only"] == [0.5, 0.7, 0.9]
    assert levels["paper thresholds"] == [0.25, 0.5] and levels[""] == [0.25, 0.5, 0.65, 0.75, 0.9]


def test_layers_and_settings_reach_every_condition():
    conditions = grids.polynomialization(layers=(0,)) + grids.sparsification(layers=(0,))
    conditions += grids.quantization(0.85, epochs=2, layers=(0,))
    assert {c.layers for c in conditions} == {(0,)}
    assert {c.technique.settings["epochs"] for c in conditions if c.variant == "learned"} == {2}
    smooth = [c.technique.settings for c in conditions if c.technique.name == "smoothquant"]
    assert {s["alpha"] for s in smooth if s["smooth"]} == {0.85}
