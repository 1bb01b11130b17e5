"""The noise search: levels by damage, refinement, pooled seeds, MVAs, stand-ins of equal size, layer sets."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from lib import fidelity, layer_study, noise_study, prompts, statistics, summary
from lib.approximations import make
from lib.conditions import Condition
from lib.errors import ChoiceError
from lib.generation import NonFiniteError
from lib.patching import approximated
from lib.prompts import Prompt
from tests.tiny_study import tiny_prompts, tiny_study


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setenv("APPROX_CACHE", str(tmp_path / "cache"))
    return tiny_study(tmp_path)


def hump(levels, rates) -> pd.DataFrame:
    rows = {"technique": "gaussian", "failed": "", "level": levels, "asr": rates}
    return pd.concat([pd.DataFrame([{"technique": "exact", "failed": "", "asr": 0.0}]), pd.DataFrame(rows)])


def test_refinement_goes_where_asr_changes_most():
    table = hump([1.0, 2.0, 3.0, 4.0], [0.02, 0.05, 0.55, 0.3])
    assert noise_study.refined_levels(table, 1) == [2.5]
    assert noise_study.refined_levels(table, 2) == [2.5, 3.5]
    assert noise_study.refined_levels(hump([1.0, 2.0], [0.6, 0.6]), 1) == [0.5]  # from the exact model at level 0


def test_the_peak_is_the_lowest_of_the_highest_and_never_a_failed_level():
    table = hump([1.0, 2.0, 3.0], [0.2, 0.5, 0.5])
    assert noise_study.peak(table)["level"] == 2.0
    table["failed"] = np.where(table["level"] == 2.0, "NaN at layer 0", "")
    assert noise_study.peak(table)["level"] == 3.0


def test_levels_at_damage_do_that_damage(study):
    at = noise_study.FAMILIES["norm"]
    exact = noise_study.answer_perplexity(study, None)
    for ratio in (1.1, 1.5):
        level = noise_study.level_at_damage(study, at, ratio)
        low, high = (noise_study.answer_perplexity(study, at(level * f)) / exact for f in (0.9, 1.1))
        assert low < ratio < high
    assert noise_study.level_at_damage(study, at, 1.1) < noise_study.level_at_damage(study, at, 1.5)


def test_each_set_of_layers_has_a_level_of_its_own_also_after_a_search_of_all(study, monkeypatch):
    def answer_perplexity(study, technique, layers=None):
        return 1.0 if technique is None else 1.0 + {None: 10.0, (0,): 4.0, (1,): 1.0}[layers] * technique.std

    monkeypatch.setattr(noise_study, "answer_perplexity", answer_perplexity)
    at = noise_study.FAMILIES["norm"]
    assert noise_study.level_at_damage(study, at, 2.0) == pytest.approx(0.1, rel=0.05)
    single = layer_study.at_damage(study, at, 2.0, {"single": [(0,), (1,)]})
    assert [condition.level for condition in single] == pytest.approx([0.25, 1.0], rel=0.05)


def test_a_level_is_searched_again_for_other_answers_and_other_code(study, monkeypatch):
    tried = []

    def answer_perplexity(asked, technique, layers=None):
        tried.append(technique)
        return 1.0 if technique is None else 1.0 + technique.std

    def searches(asked):
        tried.clear()
        noise_study.level_at_damage(asked, noise_study.FAMILIES["norm"], 1.5)
        return bool(tried)

    monkeypatch.setattr(noise_study, "answer_perplexity", answer_perplexity)
    reworded = [replace(prompt, answer=f"{prompt.answer} now") for prompt in study.prompts]
    assert searches(study) and not searches(study) and searches(replace(study, prompts=reworded))
    monkeypatch.setattr(noise_study, "source_hash", lambda *_: "other")
    assert searches(study)


def test_noise_that_can_do_little_ends_its_grid_where_it_does_no_more(study, monkeypatch, caplog):
    def saturating(study, technique, layers=None):
        return 2.0 if technique is None else 2.0 * (1 + 0.4 * technique.std / (1 + technique.std))

    monkeypatch.setattr(noise_study, "answer_perplexity", saturating)
    at = noise_study.FAMILIES["norm"]
    with pytest.raises(noise_study.TooLittleDamage, match="no level makes answer perplexity grow 3-fold"):
        noise_study.level_at_damage(study, at, 3.0)
    assert noise_study.highest_level(study, at, 3.0) == pytest.approx(9.0, rel=0.05)  # nine tenths of 0.4
    assert noise_study.highest_level(study, at, 1.2) == pytest.approx(1.0, rel=0.05)
    assert layer_study.at_damage(study, at, 2.0, {"single": [(0,), (1,)]}) == []
    assert "layers 0 left out" in caplog.text and "layers 1 left out" in caplog.text


def test_seeds_are_averaged_and_a_failed_one_fails_the_level():
    def row(exact: list[int], noisy: list[int]) -> dict:
        verdicts = [np.where(complied, "complied", "refused") for complied in (exact, noisy)]
        tables = [pd.DataFrame({"label": "harmful", "asr_keyword": False, "verdict": v}) for v in verdicts]
        rates = {**summary.NOT_MEASURED, **summary.verdict_rates(tables[1])}
        return {"technique": "gaussian", "failed": "", "n_harmful": 10, **rates, **summary.changes(*tables)}

    exact = [1] + [0] * 9
    rows = [row(exact, [1, 1] + [0] * 8), row(exact, [0] * 4 + [1] * 6)]
    pooled = noise_study.pooled(rows)
    assert pooled["asr"] == pytest.approx(0.4) and pooled["n_harmful"] == 10 and pooled["n_seeds"] == 2
    assert (pooled["asr_lowest_seed"], pooled["asr_highest_seed"]) == (0.2, 0.6) and "paired_asr" not in pooled
    assert (pooled["asr_low"], pooled["asr_high"]) == pytest.approx(statistics.wilson(4, 10))
    assert math.isnan(pooled["harmless_answered"]) and pooled["asr_increase"] == pytest.approx(0.3)
    limits = statistics.newcombe(0.5, 3.5, 0.5, 5.5)  # gained 1 and 6, lost 0 and 1
    assert (pooled["asr_increase_low"], pooled["asr_increase_high"]) == pytest.approx(limits)
    assert noise_study.pooled([rows[0], rows[1] | {"failed": "NaN"}])["failed"] == "NaN"


def test_a_sweep_draws_other_noise_for_other_seeds_and_reads_back_what_is_done(study, monkeypatch):
    at = noise_study.FAMILIES["norm"]
    table = noise_study.sweep(study, at, [0.5, 4.0], (0, 1), "norm")
    assert table["technique"].tolist() == ["exact", "gaussian", "gaussian"] and table["n_seeds"][1] == 2
    one, two = (study.store.read_table("replies", study.key(make("gaussian", std=4.0, seed=s), None)) for s in (0, 1))
    assert not one["reply"].equals(two["reply"])
    monkeypatch.setattr("lib.experiment.generate", lambda *_, **__: pytest.fail("generated again"))
    pd.testing.assert_frame_equal(noise_study.sweep(study, at, [0.5, 4.0], (0, 1), "norm"), table)


def test_the_mva_is_the_peak_of_its_search_whichever_study_asks_and_is_read_back(study, monkeypatch):
    monkeypatch.setattr("lib.prompts.for_study", lambda *_: tiny_prompts(4, "search"))
    table = noise_study.search_peak(study.brief(4, "search"), "norm")
    monkeypatch.setattr(noise_study, "N_SEARCHED", 4)
    monkeypatch.setattr("lib.experiment.generate", lambda *_, **__: pytest.fail("generated again"))
    for asked in (study, replace(study, prompts=study.prompts[:3])):
        assert noise_study.most_vulnerable(asked) == noise_study.FAMILIES["norm"](noise_study.peak(table)["level"])


def test_noise_and_damage_that_cannot_be_are_named(study):
    assert noise_study.named(["act"])["act"](0.2) == make("gaussian", where=("act",), std=0.2)
    with pytest.raises(ChoiceError, match=r"noise acts, norms; choose from the list \['norm', 'norm, not final', "):
        noise_study.named(["acts", "norm", "norms"])
    for ratio in (0.2, 1.0):
        with pytest.raises(ChoiceError, match=f"damage cannot be {ratio}; give a number above 1"):
            layer_study.at_damage(study, noise_study.FAMILIES["norm"], ratio, {"single": [(0,)]})


def test_a_kind_of_mva_that_is_unknown_is_named(study):
    with pytest.raises(ValueError, match="unknown kind of MVA 'mlp'"):
        noise_study.most_vulnerable(study, "mlp")


def test_a_study_of_other_prompts_does_not_hash_the_weights_again(study, monkeypatch):
    monkeypatch.setattr("lib.models.weights_hash", lambda *_: pytest.fail("hashed again"))
    assert study.brief(3).identity == study.identity


def test_an_exact_model_that_fails_is_one_line_and_no_rate(study, monkeypatch):
    def fail(*_):
        raise NonFiniteError("NaN at layer 0")

    monkeypatch.setattr("lib.experiment.generate", fail)
    with pytest.raises(ChoiceError, match=r"the exact model fails, .*: NaN at layer 0"):
        study.run()


def test_searching_and_measuring_use_other_prompts(study, monkeypatch):
    monkeypatch.setattr("lib.prompts.for_study", lambda *_: tiny_prompts(4, "search"))
    search, fresh = study.brief(4, "search"), study.brief(4)
    assert (search.split, fresh.split) == ("search", "test")
    assert not {p.id for p in search.prompts} & {p.id for p in fresh.prompts}
    assert [p.label for p in fresh.prompts] == ["harmful"] * 4 + ["harmless"] * 2


def test_a_public_set_is_searched_on_other_requests_than_it_is_measured_on(study, tmp_path):
    labels = ("harmful", "harmless", "confusable") * 20
    file = tmp_path / "public.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"ask {i}", "label": label}) for i, label in enumerate(labels)))
    public = replace(study, prompt_set=str(file), prompts=prompts.for_study(str(file), "test", 520, 0))
    search = public.brief(85, "search")
    ids = [{p.id for p in one.prompts if p.label == "harmful"} for one in (search, public)]
    assert search.split == "search" and min(map(len, ids)) >= 3 and not ids[0] & ids[1] and len(ids[0] | ids[1]) == 20
    whole = replace(public, split="all", prompts=prompts.for_study(str(file), "all", 520, 0))
    assert len(whole.prompts) == 60
    with pytest.raises(ChoiceError, match="split='all' leaves nothing for the search split"):
        whole.brief(85, "search")
    file.write_text(json.dumps({"prompt": "ask", "label": "harmful", "split": "test"}))
    with pytest.raises(ChoiceError, match="no prompts with split 'search'; present: test"):
        public.brief(85, "search")


def test_labels_of_other_sets_keep_their_meaning(monkeypatch):
    def load(name, split=None, label=None, **_):
        labels = {"xstest": ["safe", "unsafe"] * 4, "alpaca": ["harmless"] * 4, "bare": [None] * 4, "beaver": ["mixed"]}
        made = [Prompt(f"{name}-{i}", "ask", label=given, split=split) for i, given in enumerate(labels[name])]
        return [prompt for prompt in made if label in (None, prompt.label)]

    monkeypatch.setattr("lib.prompts.load", load)
    found = prompts.for_study("xstest", "test", 4, 0)
    assert Counter((p.id.split("-")[0], p.label) for p in found) == {
        ("xstest", "harmful"): 4, ("xstest", "confusable"): 2, ("alpaca", "harmless"): 4}  # fmt: skip
    assert {p.label for p in prompts.for_study("bare", "test", 4, 0) if p.id.startswith("bare")} == {"harmful"}
    assert {p.split for p in prompts.for_study("bare", "search", 4, 0)} == {"search"}  # of the sets that join it too
    with pytest.raises(ValueError, match="does not say which of its requests are harmful"):
        prompts.for_study("beaver", "test", 4, 0)


def test_the_pair_of_the_papers_table_is_gaussian_at_up_and_laplace_at_down(study):
    noise = make("gaussian", where=("mlp_in",), std=0.3, laplace_down=0.2)
    with approximated(study.model, noise) as hits:
        study.model(torch.arange(3, 9)[None])
    assert {site for _, site in hits.counts} == {"mlp_in", "mlp_mid"} and not hits.silent()
    drawn = noise.transform("mlp_mid", 0, None)(torch.zeros(1, 400, 50), None)
    assert drawn.abs().mean().item() == pytest.approx(0.2, rel=0.05)
    assert drawn.std().item() == pytest.approx(0.2 * 2**0.5, rel=0.05)
    for wrong in ({"laplace_down": -1.0}, {"laplace_down": 0.1, "relative": True}):
        with pytest.raises(ValueError, match="laplace_down"):
            make("gaussian", where=("mlp_in",), **wrong)


def test_matched_noise_arrives_with_the_size_of_the_techniques_error(study):
    technique = make("smoothquant", bits=3, smooth=False)
    up, down = noise_study.error_sizes(study, technique)
    noises = noise_study.stand_ins(study, technique)
    assert noises["injected"].std == pytest.approx(up) and noises["injected"].laplace_down == pytest.approx(down)
    assert noise_study.error_sizes(study, noises["matched"])[0] == pytest.approx(up, rel=0.1)
    assert noises["matched"].std < noises["injected"].std  # upstream errors add to it


def test_the_size_of_skewed_errors_is_measured_around_their_median(study, monkeypatch):
    errors = {"0.mlp_in.up": torch.tensor([1.0, -1.0, 3.0]), "0.mlp_mid": torch.tensor([0.0, 0.0, 0.0, 1.0, 9.0])}
    monkeypatch.setattr(fidelity, "site_errors", lambda *_: errors)
    assert noise_study.error_sizes(study, make("cats")) == pytest.approx((2.0, 2.0))


def test_measured_and_predicted_are_of_the_same_prompts(study, monkeypatch):
    seeds, summaries = [], noise_study.summaries
    monkeypatch.setattr(noise_study, "summaries", lambda *given: seeds.append(given[2]) or summaries(*given))
    rounding = Condition(make("smoothquant", bits=3, smooth=False), "bits", 3.0)
    table = noise_study.against_measured(study, study.brief(4), [rounding])
    assert table["prediction"].tolist() == ["injected", "matched"] and (table["n_harmful"] == 4).all()
    assert noise_study.agreement(table)["conditions"].tolist() == [1, 1]
    assert seeds == [noise_study.FRESH_SEEDS[:1]] * 2  # of no search


def test_conditions_that_fail_are_left_out_of_predictions_and_of_differences(study):
    broken = Condition(make("gaussian", where=("mlp_in",), std=3e38), "noise std", 3e38, "", (0,))
    mild = Condition(make("gaussian", where=("mlp_in",), std=0.1), "noise std", 0.1, "", (1,))
    assert study.run(broken.technique, broken.layers).attrs["failed"]
    table = noise_study.against_measured(study, study.brief(4), [broken, mild])
    assert table["failed"].ne("").tolist() == [True, False, False] and table["predicted_asr"].isna()[0]
    assert noise_study.agreement(table)["conditions"].tolist() == [1, 1]
    tested = layer_study.early_against_late(study, {"failed": (broken, mild), "mild": (mild, mild)})
    assert tested[["early ASR", "difference", "low", "p", "p (Holm)"]].iloc[0].isna().all() and not tested["held"].any()
    assert tested[["difference", "p (Holm)"]].iloc[1].tolist() == [0, 1]


def test_agreement_of_known_differences():
    rows = {"prediction": "matched", "failed": "", "asr": [0.1, 0.3, 0.5], "predicted_asr": [0.2, 0.2, 0.6]}
    rows |= {"predicted_asr_low": [0.15, 0.1, 0.4], "predicted_asr_high": [0.3, 0.3, 0.7]}
    found = noise_study.agreement(pd.DataFrame(rows)).iloc[0]
    assert found["mean |difference|"] == pytest.approx(0.1) and found["mean difference"] == pytest.approx(0.1 / 3)
    assert found["measured within the predicted interval"] == 2


def test_early_and_late_are_compared_over_several_draws(study):
    noise = make("gaussian", where=("norm",), std=3.0)
    early, late = (Condition(noise, "noise std", 3.0, "", (layer,)) for layer in (0, 1))
    teal = Condition(make("teal", thresholds="paper", prompt="all"), "sparsity", 0.5, "", (0,))
    found = layer_study.early_against_late(study, {"noise": (early, late), "teal": (teal, teal)}, (3, 4, 5))
    rates = {
        layer: [
            (result.loc[result["label"] == "harmful", "verdict"] == "complied").mean()
            for result in (study.run(replace(noise, seed=seed), (layer,)) for seed in (3, 4, 5))
        ]
        for layer in (0, 1)
    }
    assert found["early ASR"][0] == pytest.approx(np.mean(rates[0])) and found["late ASR"][0] == np.mean(rates[1])
    assert found["difference"][0] == pytest.approx(np.mean(rates[0]) - np.mean(rates[1]))
    assert found["low"][0] <= found["difference"][0] <= found["high"][0] and found["difference"][1] == 0
    table = noise_study.sweep_conditions(study, [early, teal], (3, 4, 5))
    assert table["technique"].tolist() == ["exact", "gaussian", "teal"]
    assert table["asr"][1] == pytest.approx(np.mean(rates[0])) and table["asr_lowest_seed"][1] == min(rates[0])


def test_layer_sets_are_prefixes_suffixes_singles_and_thirds():
    sets = layer_study.layer_sets(6)
    assert sets["prefix"][0] == (0,) and sets["prefix"][-1] == tuple(range(6)) == sets["suffix"][0]
    assert sets["suffix"][-1] == (5,) and len(sets["single"]) == 6
    assert len(layer_study.layer_sets(32)["single"]) == 8
    assert layer_study.thirds(7) == {"early third": [(0, 1, 2)], "middle third": [(3, 4)], "late third": [(5, 6)]}
    with pytest.raises(ChoiceError, match="at least 3 layers"):
        layer_study.thirds(2)


def test_early_against_late_is_a_paired_difference(study):
    noise = make("gaussian", where=("norm",), std=3.0)
    early, late = (Condition(noise, "noise std", 3.0, "", (layer,)) for layer in (0, 1))
    row = layer_study.early_against_late(study, {"x": (early, late)}).iloc[0]
    rates = [
        (result.loc[result["label"] == "harmful", "verdict"] == "complied").mean()
        for result in (study.run(noise, (0,)), study.run(noise, (1,)))
    ]
    assert row["difference"] == pytest.approx(rates[0] - rates[1]) and row["layers"] == "0 / 1"
    assert row["low"] <= row["difference"] <= row["high"] and row["held"] == (row["low"] > 0)
