"""Hidden states: captured like Transformers' own, measures on clouds whose answer is known, and every control."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from scipy.spatial.distance import pdist
from sklearn.decomposition import PCA

from lib import hidden_states as hs
from lib.approximations import make
from lib.errors import ChoiceError
from lib.prompts import Prompt, render
from tests.families import random_model
from tests.tiny_study import tiny_study

RNG = np.random.default_rng(0)
LABELS = np.array(["harmful"] * 60 + ["harmless"] * 60)


def clouds(gap: float = 4.0, hidden: int = 12, seed: int = 0) -> np.ndarray:
    """Two Gaussian clouds of 60, apart by `gap` along the first coordinate."""
    points = np.random.default_rng(seed).standard_normal((120, hidden))
    points[:60, 0] += gap
    return points.astype(np.float32)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APPROX_CACHE", str(folder / "cache"))
        yield tiny_study(folder)


def test_states_are_those_of_output_hidden_states(study):
    states = hs.capture(study, study.prompts)
    texts, special = render(study.tokenizer, [p.prompt for p in study.prompts], study.protocol)
    for row, text in enumerate(texts):
        batch = study.tokenizer(text, add_special_tokens=special, return_tensors="pt")
        with torch.no_grad():
            output = study.model(input_ids=batch["input_ids"], output_hidden_states=True)
        np.testing.assert_allclose(states[0][row], output.hidden_states[1][0, -1].numpy(), atol=1e-5)
    assert sorted(states) == [0, 1] and states[1].shape == (12, 32)


def test_a_mixture_has_no_state_inside_its_experts(study):
    mixture = replace(study, model=random_model("mixtral"), identity={})
    with pytest.raises(ValueError, match="mlp_mid of a mixture has no single state per token"):
        hs.capture(mixture, study.prompts, site="mlp_mid")


def test_the_batch_does_not_matter(study, monkeypatch):
    together = hs.capture(study, study.prompts)
    monkeypatch.setattr(hs, "BATCH_TOKENS", 1)
    alone = hs.capture(study, study.prompts)
    for layer in together:
        np.testing.assert_allclose(together[layer], alone[layer], atol=1e-5)


def test_an_approximation_in_the_last_layer_leaves_the_first_alone(study):
    exact = hs.capture(study, study.prompts)
    rough = hs.capture(study, study.prompts, make("gaussian", std=0.5), layers=[1])
    assert np.array_equal(exact[0], rough[0]) and not np.allclose(exact[1], rough[1], atol=1e-2)
    mild = make("gaussian", std=0.1)
    assert np.array_equal(hs.capture_all(study, study.prompts, [mild], layers=[1])[mild][0], exact[0])


def test_capture_states_its_bounds(study):
    with pytest.raises(ValueError, match=r"q_rotary is not .* choose a site such as block_out"):
        hs.capture(study, study.prompts, site="q_rotary")
    wrong = [("position -99", {"position": -99}), ("site 'nowhere' matches nothing", {"site": "nowhere"})]
    wrong += [(r"layers \[9\] are not valid", {"technique": make("gaussian"), "layers": [9]})]
    for message, choice in wrong:  # all of them are parameters of a notebook
        with pytest.raises(ChoiceError, match=message):
            hs.capture(study, study.prompts, **choice)
    first = hs.capture(study, study.prompts, position=-2)
    assert not np.allclose(first[0], hs.capture(study, study.prompts)[0])


def test_the_direction_places_the_two_means_half_a_gap_from_the_middle():
    states = clouds()
    direction = hs.refusal_direction(states, LABELS)
    places = direction.place(states)
    assert places[:60].mean() == pytest.approx(0.5, abs=1e-6) and places[60:].mean() == pytest.approx(-0.5, abs=1e-6)
    assert np.linalg.norm(direction.u) == pytest.approx(1) and abs(direction.u[0]) > 0.9
    assert hs.fisher_separation(direction.place(clouds(seed=1)), LABELS) > 5


def test_fisher_separation_divides_by_the_variances_of_samples():
    labels = ["harmful", "harmful", "harmless", "harmless"]
    assert hs.fisher_separation(np.array([2.0, 4.0, 0.0, -2.0]), labels) == pytest.approx(16 / (2 + 2))


def test_a_layer_in_which_all_states_are_alike_has_no_direction_and_is_never_the_best():
    alike, apart = np.tile(clouds()[0], (120, 1)), clouds()
    alike[:60] *= np.float32(1 + 2e-7)  # as batches of other sizes round
    states = {0: alike, 1: apart, 2: apart + clouds(seed=1)}
    directions = {layer: hs.refusal_direction(x, LABELS) for layer, x in states.items()}
    assert np.isnan(directions[0].gap) and np.isnan(directions[0].place(alike)).all()
    separations = [hs.fisher_separation(directions[layer].place(states[layer]), LABELS) for layer in (1, 2)]
    assert hs.best_layer(states, directions, LABELS) == 1 + int(np.argmax(separations))


def test_classical_mds_of_euclidean_distances_is_pca():
    states = clouds()
    mds, pca = hs.classical_mds(states), PCA(2).fit_transform(states)
    np.testing.assert_allclose(pdist(mds), pdist(pca), rtol=1e-4)


def test_principal_axes_keep_the_exact_origin():
    states = clouds()
    axes = hs.principal_axes(states)
    moved = axes.transform(states + np.float32(3)) - axes.transform(states)
    assert np.allclose(moved, moved[0], atol=1e-4) and np.abs(axes.transform(states).mean(0)).max() < 1e-4


def test_the_probe_meets_only_unseen_groups_and_shuffled_labels_give_chance():
    states, groups = clouds(), np.arange(120) % 60
    truth = LABELS == "harmful"
    found = hs.probe_accuracy(states, {"exact": states, "swapped": states[::-1]}, truth, groups)
    assert found["exact"] > 0.9 and found["swapped"] < 0.1
    noise = np.random.default_rng(3).standard_normal((120, 200)).astype(np.float32)  # any fit is overfitting
    assert abs(hs.probe_accuracy(noise, {"x": noise}, truth, groups)["x"] - 0.5) < 0.2


def test_a_probe_that_says_harmful_to_all_is_right_half_the_time():
    states, truth = clouds()[:90], (LABELS == "harmful")[:90]  # 60 harmful, 30 harmless
    far = np.zeros_like(states)
    far[:, 0] = 50
    assert hs.probe_accuracy(states, {"far": far}, truth, np.arange(90))["far"] == 0.5


def test_prompts_with_a_common_goal_are_in_one_fold(monkeypatch):
    met = []

    def probe(exact, tests, labels, groups):
        met.append(groups)
        return dict.fromkeys(tests, 0.5)

    monkeypatch.setattr(hs, "probe_accuracy", probe)
    asked = [Prompt(id=str(i), prompt="x", goal=f"goal {i % 30}", label=str(x)) for i, x in enumerate(LABELS)]
    states = {0: clouds()}
    hs.layer_table(states, states, asked, {0: hs.refusal_direction(clouds(), LABELS)})
    assert met[0] == [prompt.goal for prompt in asked]


def test_the_share_of_random_directions_is_what_their_distribution_says(monkeypatch):
    monkeypatch.setattr(hs, "CONTROLS", 50_000)
    states = clouds()
    row = hs.drift(states, states + clouds(seed=5), LABELS, hs.refusal_direction(clouds(seed=1), LABELS))
    squared_cosine = stats.beta(0.5, 5.5)  # with any direction, in 12 dimensions
    assert row["random share"] == pytest.approx(squared_cosine.ppf(0.975), rel=0.05)


def test_cosine_drift_is_of_harmful_prompts_and_seen_from_the_midpoint():
    states, steps = clouds().astype(float), clouds(seed=4)

    def drifted(rows, offset=0.0):
        moved = states.copy()
        moved[rows] += steps[rows]
        direction = hs.refusal_direction(states + offset, LABELS)
        return hs.drift(states + offset, moved + offset, LABELS, direction)["cosine drift"]

    harmful = drifted(LABELS == "harmful")
    assert 0.05 < harmful == pytest.approx(drifted(LABELS == "harmful", offset=100.0))
    assert drifted(LABELS == "harmless") == pytest.approx(0, abs=1e-9)


def test_drift_tells_a_move_from_a_blur_and_from_chance():
    states, direction = clouds(), hs.refusal_direction(clouds(seed=1), LABELS)
    moved = states.copy()
    moved[:60] -= np.float32(0.3 * direction.gap) * direction.u.astype(np.float32)
    row = hs.drift(states, moved, LABELS, direction)
    assert row["towards harmless"] == pytest.approx(0.3, abs=1e-3) and row["towards harmful"] == pytest.approx(0)
    assert row["share along"] > 0.99 > row["random share"]
    blurred = direction.midpoint + 0.7 * (states - direction.midpoint)
    row = hs.drift(states, blurred, LABELS, direction)
    assert row["towards harmless"] == pytest.approx(row["towards harmful"], abs=0.05) and row["towards harmless"] > 0.1
    row = hs.drift(states, hs.random_shift(states, moved), LABELS, direction)
    assert row["towards harmless_low"] < 0 < row["towards harmless_high"]


def test_a_random_shift_is_as_long_as_the_real_one():
    states = clouds()
    moved = states + np.float32(0.5) * clouds(seed=5)
    shifted = hs.random_shift(states, moved)
    real, random = (np.linalg.norm(x - states, axis=1) for x in (moved, shifted))
    np.testing.assert_allclose(real, random, rtol=1e-4)
    assert not np.allclose(moved, shifted, atol=0.1)


def test_flips_compare_at_equal_margin():
    margins = np.random.default_rng(0).uniform(0, 1, 400)
    moved = 1 - margins  # those near the border move more, whether or not they flip
    flipped = np.random.default_rng(1).uniform(size=400) > margins
    row = hs.flips(margins, moved, flipped)
    assert row["difference"] > 0.2 and abs(row["matched difference"]) < 0.02
    row = hs.flips(margins, moved + 0.3 * flipped, flipped)
    assert row["matched difference"] == pytest.approx(0.3, abs=0.02) and row["low"] > 0.25
    assert "matched difference" not in hs.flips(margins, moved, np.zeros(400, dtype=bool))


def test_flipped_prompts_without_three_others_near_are_not_matched():
    margins = np.array([0.5] * 6 + [0.3] * 5 + [0.7] * 5 + [-0.3] * 3 + [1.3] * 3)
    assert margins.std() / 4 < 0.2 < margins.std()
    assert hs.flips(margins, margins, np.arange(22) < 6)["matched"] == 0


class Flips:
    """A study of 40 harmful and 20 harmless requests that refuses 30; approximated, every third is complied with."""

    def __init__(self):
        verdicts = ["complied"] * 10 + ["refused"] * 30 + ["complied"] * 20
        labels = ["harmful"] * 40 + ["harmless"] * 20
        self.exact = pd.DataFrame({"id": [str(i) for i in range(60)], "label": labels, "verdict": verdicts})
        self.asked = []

    def run(self, technique=None, layers=None):
        self.asked.append((technique, layers))
        flipped = ["refused" if i % 3 else "complied" for i in range(60)]
        return self.exact if technique is None else self.exact.assign(verdict=flipped)


def test_flips_are_among_refused_harmful_requests_under_the_technique_in_its_layers():
    study, technique, places = Flips(), make("teal"), np.linspace(0, 1, 60)
    after = places - np.where(np.arange(60) % 3, 0.1, 0.5)
    asked = [Prompt(id=str(i), prompt="x") for i in range(60)]
    found = hs.flip_table(study, asked, {technique: after, make("gaussian"): after}, places, [0])
    assert study.asked == [(None, None), (technique, [0])]
    assert found[["flipped", "others", "difference"]].to_numpy().tolist() == [pytest.approx([10, 20, 0.4])]


def test_the_third_observation_asks_for_more_than_harmless_prompts_may_move():
    def held(low=0.05, high=0.15, shuffled=0.4):
        limits = {"towards harmless_low": 0.2, "towards harmless_high": 0.4, "towards harmful": (low + high) / 2}
        limits |= {"towards harmful_low": low, "towards harmful_high": high, "towards harmless": 0.3}
        shares = {"share along": 0.5, "shuffled share": shuffled, "random share": 0.1}
        row = hs.third_observation(pd.DataFrame([{"technique": "teal", "layer": 3, **limits, **shares}])).iloc[0]
        return row[["not a blur", "not a translation", "not by chance", "held"]].tolist()

    assert held() == [True] * 4
    assert held(low=0.13, high=0.25) == [False, True, True, False]
    assert held(low=-0.25, high=-0.1) == [True, False, True, False]
    assert held(shuffled=0.6) == [True, True, False, True]


def test_layer_table_and_the_third_observation(study):
    states = {0: clouds(), 1: clouds(seed=2)}
    directions = {layer: hs.refusal_direction(clouds(seed=9), LABELS) for layer in states}
    rough = {layer: x.copy() for layer, x in states.items()}
    rough[1][:60, 0] -= 1.5
    asked = [Prompt(id=str(i), prompt=str(i), label=str(label)) for i, label in enumerate(LABELS)]
    table = hs.layer_table(states, rough, asked, directions).assign(technique="teal")
    found = hs.third_observation(table)
    assert found["held"].tolist() == [False, True]
    assert (table["probe, exact"] > 0.85).all() and (abs(table["probe, shuffled labels"] - 0.5) < 0.2).all()


def test_too_few_prompts_for_a_probe_are_named():
    asked = [Prompt(id=str(i), prompt=str(i), label="harmful" if i < 3 else "harmless") for i in range(4)]
    states = {0: clouds()[:4]}
    with pytest.raises(ChoiceError, match="4 harmful and harmless prompts are too few"):
        hs.layer_table(states, states, asked, {0: hs.refusal_direction(clouds(), LABELS)})


def test_techniques_without_finite_states_are_left_out(study, monkeypatch, caplog):
    def diverge(*_, **__):
        raise FloatingPointError("omniquant diverges: loss nan in block 0, epoch 0")

    monkeypatch.setattr("lib.approximations.omniquant.train_block", diverge)
    mild, loud = make("gaussian", std=0.1), make("gaussian", where=("mlp_in",), std=3e38)
    found = hs.capture_all(study, study.prompts, [make("omniquant", bits=4), mild, loud])
    assert list(found) == [mild] and np.array_equal(found[mild][1], hs.capture(study, study.prompts, mild)[1])
    assert "omniquant bits=4 left out: omniquant diverges" in caplog.text
    assert "left out: its states are NaN or infinite" in caplog.text


def test_fitting_and_reported_prompts_never_meet(study):
    fit, asked = hs.fitting_prompts(study, 10)
    assert len(fit) == 20 and not {p.prompt for p in fit} & {p.prompt for p in asked}
    public = replace(study, prompt_set="advbench")
    fit, asked = hs.fitting_prompts(public)
    assert not {p.id for p in fit} & {p.id for p in asked} and len(fit) + len(asked) == len(study.prompts)
