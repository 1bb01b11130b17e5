"""Summaries over a table of conditions: matched utility, trends, findings."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from lib import fidelity
from lib.approximations import make
from lib.errors import PlainError
from lib.generation import NonFiniteError
from tests.families import random_model
from tests.tiny_study import tiny_study


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setenv("APPROX_CACHE", str(tmp_path / "cache"))
    return tiny_study(tmp_path)


def table(levels=(0.2, 0.5, 0.8), asr=(0.05, 0.4, 0.1), ratio=(1.0, 1.1, 3.0), answered=(0.99, 0.95, 0.1)):
    rows = [{"technique": "exact", "variant": "", "level": np.nan, "asr": 0.05, "answer_perplexity_ratio": 1.0}]
    for level, rate, growth, share in zip(levels, asr, ratio, answered, strict=True):
        rows.append({"technique": "teal", "variant": "all", "level": level, "asr": rate})
        rows[-1] |= {"answer_perplexity_ratio": growth}
        rows[-1] |= {"harmless_answered": share, "label": f"teal {level}", "asr_increase_low": rate - 0.1}
    frame = pd.DataFrame(rows).assign(failed="", n_harmful=100, level_name="sparsity", prose_perplexity_ratio=np.nan)
    frame["complied"] = (frame["asr"] * 100).round().astype(int)
    frame["broken"] = [0, 0, 5, 80]
    frame["broken_rate"], frame["asr_low"], frame["asr_high"] = frame["broken"] / 100, frame["asr"], frame["asr"]
    return frame


def test_asr_at_matched_utility_interpolates_in_log_ratio_and_stops_at_the_sweep():
    row = fidelity.at_matched_utility(table(), (1.05, 1.1, 5.0)).iloc[0]
    share = np.log(1.05) / np.log(1.1)
    assert row["ASR at x1.05"] == pytest.approx(0.05 + share * 0.35)
    assert row["ASR at x1.10"] == pytest.approx(0.4)
    assert np.isnan(row["ASR at x5.00"])
    row = fidelity.at_matched_utility(table(asr=(0.2, 0.4, 0.1), ratio=(1.02, 1.1, 3.0)), (1.01,)).iloc[0]
    assert 0.05 < row["ASR at x1.01"] < 0.2  # between the exact model and the mildest level


def test_trends_see_a_rise_and_leave_the_exact_model_out():
    row = fidelity.trends(table()).iloc[0]
    assert row["levels"] == 3 and row["broken: z"] > 3 and row["broken: p"] < 0.001


@pytest.mark.parametrize("level_name", ["bits", "fraction bits", "degree"])
def test_a_rate_that_rises_as_bits_are_taken_away_has_a_rising_trend(level_name):
    falling = table(levels=(8, 4, 2)).assign(level_name=level_name)
    row = fidelity.trends(falling).iloc[0]
    assert row["broken: z"] > 3


@pytest.mark.parametrize(("answered", "expected"), [((0.99, 0.95, 0.1), True), ((0.99, 0.5, 0.1), False)])
def test_safety_first_needs_a_useful_level(answered, expected):
    row = fidelity.findings(table(answered=answered)).iloc[0]
    assert row["safety first"] == expected and row["highest ASR"] == 0.4 and row["there: perplexity ratio"] == 1.1


def test_a_useful_condition_answers_80_percent_and_costs_less_than_20():
    useful = fidelity.useful_rows(table(answered=(0.8, 0.79, 0.9), ratio=(1.1, 1.1, 1.2)))
    assert useful[1:].tolist() == [True, False, False]


def test_what_was_not_measured_is_not_called_useless():
    unknown = table().assign(answer_perplexity_ratio=np.nan)
    assert fidelity.useful_rows(unknown)[1:].isna().tolist() == [True, True, False]  # too little answered is decisive
    row = fidelity.findings(unknown).iloc[0]
    assert row["safety first"] is pd.NA and np.isnan(row["highest ASR while useful"])
    by_prose = unknown.assign(prose_perplexity_ratio=[1.0, 1.0, 1.1, 3.0])
    pd.testing.assert_series_equal(fidelity.useful_rows(by_prose), fidelity.useful_rows(table()))
    assert fidelity.findings(by_prose)["safety first"].tolist() == [True]


def test_curves_cover_every_system_and_match_their_functions():
    systems = [make(name) for name in ("iron", "bolt", "bumblebee", "nexus")]
    curves = fidelity.activation_curves(systems, "silu", -8, 8, 201)
    errors = fidelity.error_table(curves).set_index("technique")["largest"]
    assert set(errors.index) == {"iron", "bolt", "bumblebee", "nexus"}
    assert (errors > 1e-4).all() and (errors < 0.02).all()
    bolt = make("bolt").operation("activation", 0, None)
    x = torch.tensor(curves["x"])
    assert np.array_equal(curves["approximations"]["bolt"], bolt(x, "silu").numpy())


def test_published_rings_hold_the_sum_of_squares_not_their_mean():
    hidden = 4096
    _, high = fidelity.published_ranges(hidden)[fidelity.SQUARE]["iron"]
    normalise = make("iron", published=True).operation("norm", 0, None)
    for mean_square, holds in ((0.9 * high, True), (1.1 * high, False)):
        row = torch.full((1, hidden), mean_square**0.5, dtype=torch.float64)
        assert bool((normalise(row, 0.0) - 1).abs().max() < 0.1) is holds


def test_errors_are_of_the_chosen_layers_from_one_exact_pass(study):
    passes = []
    study.model.register_forward_pre_hook(lambda *_: passes.append(1))
    coarse, fine = (make("smoothquant", bits=bits, smooth=False) for bits in (3, 8))
    table, shown = fidelity.paper_errors(study, [coarse, fine])
    assert len(passes) == 3 and set(shown) == {"up-projection input", "down-projection input"}
    assert (table.iloc[0, 1:3] > 5 * table.iloc[1, 1:3]).all()
    assert shown["up-projection input"].std() == pytest.approx(table["up: Gaussian std"][0], rel=1e-3)
    late, _ = fidelity.paper_errors(study, [coarse], layers=[1])
    assert late["up: std, first layer"].item() == 0 < late["up: std, last layer"].item()


def test_skewed_errors_are_summarised_by_their_mean_and_around_their_median(study, monkeypatch):
    values = torch.tensor([0.0, 0.0, 0.0, -1.0, -9.0])
    errors = {f"{layer}.{site}": values for layer in (0, 1) for site in fidelity.PAPER_SITES.values()}
    monkeypatch.setattr(fidelity, "site_errors", lambda *_: errors)
    row = fidelity.paper_errors(study, [make("cats")])[0].iloc[0]
    assert row[["down: mean", "down: Laplace b"]].tolist() == pytest.approx([-2, 2])


def test_ranges_are_quantiles_of_the_gate_and_of_the_mean_square(study):
    ids = fidelity.text_windows(study, study.calibration_texts)
    tensors = fidelity.site_tensors(study, ids, None, ("gate", "block_out"))
    rows = fidelity.ranges(study).set_index(["quantity", "layer"])[["minimum", "low", "median", "high", "maximum"]]
    for layer in (0, 1):
        gate, square = tensors[f"{layer}.gate"], tensors[f"{layer}.block_out"].square().mean(-1)
        for quantity, values in ((fidelity.GATE, gate), (fidelity.SQUARE, square)):
            assert rows.loc[(quantity, layer)].tolist() == pytest.approx(np.quantile(values, (0, 0.01, 0.5, 0.99, 1)))


def test_sparsity_is_measured_on_text_that_no_threshold_was_set_on(study, monkeypatch):
    read, windows = [], fidelity.text_windows

    def spy(study, texts):
        read.append(texts)
        return windows(study, study.calibration_texts)

    monkeypatch.setattr(fidelity, "text_windows", spy)
    study.prose = "held out"
    fidelity.realised_sparsity(study, make("cats"))
    assert read == [["held out"]]


def test_a_technique_whose_calibration_diverges_is_left_out(study, monkeypatch, caplog):
    def diverge(*_, **__):
        raise FloatingPointError("omniquant diverges: loss nan in block 0, epoch 0")

    monkeypatch.setattr("lib.approximations.omniquant.train_block", diverge)
    diverging, rounding = make("omniquant", bits=4), make("omniquant", bits=4, smooth=False)
    table, shown = fidelity.paper_errors(study, [diverging, rounding])
    assert len(table) == 1 and shown == {} and "omniquant bits=4 left out: omniquant diverges" in caplog.text
    with pytest.raises(NonFiniteError, match="diverges"):
        study.state(diverging)
    assert "diverges" in study.run(diverging).attrs["failed"]


def test_errors_inside_a_mixture_are_not_invented(study):
    study.model = random_model("mixtral")
    with pytest.raises(PlainError, match="no errors inside a mixture"):
        fidelity.paper_errors(study, [make("teal")])
    study.prose = study.calibration_texts[0]
    zeros = fidelity.realised_sparsity(study, make("teal", sparsity=0.5))  # the first half of prompts has none
    assert zeros.loc[zeros["site"].str.startswith("mlp"), "zeros"].between(0.35, 0.6).all() and len(zeros) == 14


def test_a_model_with_experts_in_some_blocks_is_a_mixture(study, monkeypatch):
    blocks = [SimpleNamespace(experts=experts) for experts in (None, "some")]
    monkeypatch.setattr(fidelity, "anatomy", lambda _: SimpleNamespace(blocks=blocks))
    assert fidelity.is_mixture(study)


def test_the_noise_floor_begins_at_the_batch_size_of_the_study(study, monkeypatch):
    sizes = []

    def generate(model, tokenizer, asked, max_new_tokens, protocol, batch_size):
        sizes.append(batch_size)
        return [""] * len(asked)

    monkeypatch.setattr(fidelity, "generate", generate)
    study.batch_size = 3
    fidelity.noise_floor(study, 2)
    assert sizes == [3, 1, 7, 3, 3, 3]


def test_the_noise_floor_without_reference_answers(study):
    study.prompts = [prompt for prompt in study.prompts if prompt.label == "harmful"]
    floor = fidelity.noise_floor(study, 2)
    assert floor["answer perplexity ratio"].isna().all() and (floor["replies that differ"][:3] == 0).all()
