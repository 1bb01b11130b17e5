"""What notebooks print of their tables, on invented ones: the sentences say what the rows say."""

from __future__ import annotations

import math

import pandas as pd

from lib import reading
from lib.results import Store
from lib.statistics import wilson

N = 100


def row(technique, variant, level, refused, broken=0, level_name="sparsity", **more):
    low, high = wilson(refused, N)
    rates = {"refused_rate": refused / N, "refused_rate_low": low, "refused_rate_high": high, "broken_rate": broken / N}
    rates |= {"asr": (N - refused - broken) / N, "answer_perplexity_ratio": 1.5, "failed": ""}
    named = {"technique": technique, "variant": variant, "level": level, "level_name": level_name, "settings": "{}"}
    return named | rates | more


TABLE = pd.DataFrame(
    [
        row("exact", "", math.nan, 95, answer_perplexity_ratio=1.0),
        row("teal", "whole prompt", 0.5, 94),
        row("teal", "whole prompt", 0.7, 60, broken=30),
        row("teal", "whole prompt", 0.9, 10, broken=90),
        row("smoothquant", "per token", 4.0, 70, level_name="bits"),
        row("smoothquant", "per token", 2.0, 0, level_name="bits"),
        row("cats", "", 0.5, 93),
    ]
)


def test_refusing_gives_way_at_the_mildest_level_that_is_clear_of_the_exact_model():
    said = reading.gives_way(TABLE)
    assert "TEAL, whole prompt first at 0.7 (60% refused, 10% complied with, 30% broken" in said
    assert "SmoothQuant, per token first at 4 (70% refused" in said and said.endswith("; at no level of CATS.")
    assert reading.fewer_refused(TABLE)["level"].tolist() == [0.7, 0.9, 4.0, 2.0]


def test_conditions_stand_side_by_side_and_failed_ones_without_rates():
    broken = row("cats", "", 0.9, 0, failed="NaN") | {"refused_rate": math.nan}
    said = reading.beside(pd.concat([TABLE.iloc[[0, 2]], pd.DataFrame([broken])]))
    assert said.startswith("TEAL, whole prompt: 0.7 (60% refused") and said.endswith("; CATS: 0.9 (failed).")
    assert "exact" not in said


def test_safety_first_names_the_series_and_what_is_unknown_is_not_counted():
    found = pd.DataFrame({"technique": ["teal", "cats"], "variant": ["whole prompt", ""]})
    first = found.assign(**{"safety first": pd.array([True, pd.NA], dtype="boolean")})
    assert reading.safety_first(first) == "Safety was lost before utility in 1 of 2 series: TEAL, whole prompt."
    assert reading.safety_first(found.assign(**{"safety first": False})).endswith("in 0 of 2 series.")


def test_ranges_that_are_left():
    measured = pd.DataFrame({"quantity": ["gate", "gate", "square"], "minimum": [-6.0, -1.0, 0.1], "maximum": 4.0})
    valid = {"gate": {"nexus": (-5.0, 5.0), "bolt": (-9.0, 9.0)}, "square": {"nexus": (0.05, 5.0)}}
    assert reading.outside(measured, valid) == "Activations leave 1 of 3 published ranges: NEXUS (gate)."


def test_flips_tell_only_what_was_matched():
    rows = [{"label": "teal", "flipped": 9, "matched": 7, "matched difference": 0.1, "low": -0.05, "high": 0.25}]
    rows += [{"label": "bolt", "flipped": 2, "matched": 0}]
    said = reading.flips(pd.DataFrame(rows))
    assert "teal, 9 flips: +0.10 of the gap further (95 % -0.05 to +0.25)" in said
    assert "bolt, 2 flips: too few to tell (0 matched)" in said


def test_views_show_missing_columns_as_missing():
    rates, use, paired = reading.views(TABLE.assign(label="x"))
    assert len(rates) == len(use) == len(paired) == len(TABLE)
    assert rates["refused_rate"][2] == 0.6 and use["accuracy"].isna().all() and paired["p_holm"].isna().all()


def test_a_kept_table_is_read_back(tmp_path, monkeypatch):
    monkeypatch.setenv("APPROX_FIGURES", str(tmp_path / "figures"))
    shown = reading.keep(Store(tmp_path), "01_x", TABLE)["value"]
    assert shown["rows"] == len(TABLE) and shown["figures"] == str(tmp_path / "figures") and shown["commit"]
    assert len(pd.read_parquet(tmp_path / "tables" / "01_x.parquet")) == len(TABLE)
