"""The table of controls: the runs measured alike, observations read, documents written between markers."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from lib import controls
from lib.conditions import grid
from tests.tiny_study import tiny_study


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Two runs of the shipped organism, two conditions, documents and files in a folder of the test."""
    for name in ("RESULTS", "FIGURES"):
        monkeypatch.setenv(f"APPROX_{name}", str(tmp_path / name.lower()))
    monkeypatch.setattr(controls, "RUNS", {"shipped": (None, 0), "again": (None, 0)})
    monkeypatch.setattr(controls, "TABLE", tmp_path / "controls.csv")
    few = grid("cats", sparsity=[0.5]) + grid("iron", controls.WHOLE, published=[False])
    monkeypatch.setattr(controls, "conditions", lambda search: few)
    monkeypatch.setattr(controls, "CLOSE_LOOK", controls.CLOSE_LOOK[:1])
    page = tmp_path / "page.md"
    start, end = "<!-- controls: written by lib.controls -->", "<!-- end of controls -->"
    page.write_text(f"# Before\n\n{start}\nstale\n{end}\n\nAfter\n")
    monkeypatch.setattr(controls, "PAGES", (page,))
    return page


def test_measures_every_run_and_writes_figure_table_and_page(small, tmp_path):
    controls.main(n_prompts=12)
    plt.close("all")
    rows = pd.read_csv(tmp_path / "controls.csv")
    assert rows["run"].tolist() == ["shipped", "again"]
    same = rows.drop(columns="run")
    assert same.iloc[0].equals(same.iloc[1])  # one model under two names
    assert rows["exact ASR"].between(0, 0.3).all() and rows["harmless answered"].between(0.5, 1).all()
    assert (rows["early - late, low"] <= rows["early - late"]).all()
    assert set(rows["observation 2"]) <= {"held", "not shown"}
    figures = {path.suffix for path in (tmp_path / "figures").glob("controls*")}
    assert {".pdf", ".png", ".csv"} <= figures
    text = small.read_text()
    assert text.startswith("# Before") and text.endswith("After\n") and "stale" not in text
    assert text.count("| shipped |") == 1 and f"{rows['exact ASR'][0]:.1%}" in text
    controls.main(n_prompts=12)
    assert small.read_text() == text  # measured once, written the same


def test_the_text_counts_the_runs_on_which_an_observation_holds():
    row = {"exact ASR": 0.01, "harmless answered": 0.9, "highest ASR while useful": 0.02, "by": "teal", "sweeps": 12}
    row |= {"early - late": 0.1, "early - late, low": 0.02, "early - late, high": 0.2, "moved": 1, "looked at": 2}
    first = {"run": "a", "safety lost first": 0, "under": [], "observation 2": "held"}
    second = {"run": "b", "safety lost first": 10, "under": ["teal"], "observation 2": "not shown"}
    text = controls.markdown(pd.DataFrame([row | first, row | second]), 150)
    assert "shows in 1 of 2 runs, under teal" in text and "it holds\nin 1 of 2" in text and "+10 [+2, +20]" in text
    assert "in 0 of 2. Observations that\nsurvive every run: none." in text
    assert "survive every run: 2." in controls.markdown(pd.DataFrame([row | first, row | first]), 150)
    assert "| 10 of 12 (teal) |" in text and "| 0 of 12 |" in text
    unmeasured = controls.markdown(pd.DataFrame([row | first | dict.fromkeys(controls.EARLY_LATE, math.nan)]), 150)
    assert "| - | 1 of 2 |" in unmeasured


def test_noise_that_cannot_do_the_damage_leaves_the_second_observation_unmeasured(tmp_path, monkeypatch):
    monkeypatch.setenv("APPROX_CACHE", str(tmp_path / "cache"))
    study = tiny_study(tmp_path)
    monkeypatch.setattr(controls.layer_study, "thirds", lambda _: {n: [(0,)] for n in controls.layer_study.THIRDS})
    monkeypatch.setattr("lib.noise_study.answer_perplexity", lambda *_: 2.0)  # whatever the noise
    row = controls.second_observation(study, study)
    assert math.isnan(row["early - late"]) and row["observation 2"] == "not shown"
