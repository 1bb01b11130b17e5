"""The live look: within two seconds, reply hidden until asked for, wrong input in one line."""

from __future__ import annotations

import time

import numpy as np
import pytest

from lib.approximations import TECHNIQUES, make
from lib.errors import ChoiceError
from lib.experiment import open_study
from lib.explore import DOSES, Explorer, Panel
from lib.registry import organisms, smoothing_alpha
from tests.tiny_study import tiny_prompts, tiny_study

SECONDS = 2.0


@pytest.fixture
def explorer(tmp_path, monkeypatch):
    monkeypatch.setenv("APPROX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lib.prompts.for_study", lambda *_: tiny_prompts(6, "search"))
    return Explorer(tiny_study(tmp_path), 6)


def test_a_look_has_everything_and_leaves_no_trace(explorer):
    first = explorer.look("paint the lamp", make("gaussian", std=1.0))
    assert first.table.shape == (3, 2) and set(first.table.loc["verdict"]) <= {"refused", "complied", "broken"}
    assert first.errors.shape == (2,) and (first.errors > 0).all() and not np.allclose(first.before, first.after)
    again = explorer.look("paint the lamp", make("gaussian", std=1.0))
    assert np.array_equal(first.before, again.before) and np.array_equal(first.after, again.after)
    silent = explorer.look("paint the lamp", make("gaussian", std=0.0))
    assert np.array_equal(silent.before, silent.after) and not silent.errors.any()


def test_a_cloud_needs_more_than_one_request_of_a_kind(explorer):
    with pytest.raises(ChoiceError, match="2 harmful requests are too few"):
        Explorer(explorer.study, 2)


def test_layers_that_are_not_chosen_stay_exact(explorer):
    assert explorer.look("paint the lamp", make("gaussian", std=1.0), layers=[1]).errors[0] == 0


def test_the_panel_hides_the_reply_until_asked(explorer):
    panel = Panel(explorer)
    panel.technique.value = "gaussian"
    panel.request.value = "paint the lamp"
    assert panel.image.layout.display == "none"
    panel.go.click()
    assert "verdict" in panel.result.value and panel.image.value[:4] == b"\x89PNG"
    assert panel.image.layout.display is None and panel.go.description == "look" and not panel.go.disabled
    assert panel.reply.value == "" and not panel.ask.disabled
    panel.ask.value = True
    assert panel.reply.value.startswith("<blockquote>")
    panel.go.click()
    assert panel.reply.value == "" and panel.ask.value is False


def test_an_empty_request_is_one_plain_line(explorer):
    panel = Panel(explorer)
    panel.go.click()
    assert panel.result.value.startswith("the request is empty") and panel.ask.disabled
    assert panel.image.layout.display == "none" and not panel.go.disabled


def test_a_model_that_cannot_be_loaded_is_one_plain_line(explorer):
    panel = Panel(explorer, ["tiny-lama"])
    panel.model.value = "tiny-lama"
    assert panel.result.value.startswith("unknown model") and panel.explorer is explorer


@pytest.mark.parametrize("name", TECHNIQUES)
def test_every_technique_has_a_setting_to_choose(explorer, name):
    panel = Panel(explorer)
    panel.technique.value = name
    setting, levels = DOSES[name]
    assert panel.chosen().settings[setting] in levels


def test_smoothquant_has_the_alpha_of_the_model(explorer):
    panel = Panel(explorer)
    panel.technique.value = "smoothquant"
    assert panel.chosen().alpha == smoothing_alpha("tiny") != smoothing_alpha("mistral-7b")
    explorer.study.name = "mistral-7b"
    assert panel.chosen().alpha == smoothing_alpha("mistral-7b")


@pytest.mark.skipif(not organisms(), reason="needs a shipped organism under data/organisms")
def test_an_organism_answers_within_two_seconds(tmp_path, monkeypatch):
    monkeypatch.setenv("APPROX_RESULTS", str(tmp_path))
    explorer = Explorer(open_study(organisms()[0], n_prompts=4, device="cpu"), 20)
    technique = make("teal", sparsity=0.5, prompt="all")
    explorer.look(explorer.requests[0], technique)  # calibrates once
    started = time.process_time()
    explorer.look(explorer.requests[1], technique)
    assert time.process_time() - started < SECONDS
