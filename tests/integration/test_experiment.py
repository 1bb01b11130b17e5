"""Studies on the shipped organism: stored by content, resumed after kills, failures named, tables that add up."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import pandas as pd
import pytest
import torch

from lib import calibration, experiment, fidelity, judging, models, noise_study, prompts, results, utility
from lib.approximations import Technique, make
from lib.approximations.plan import Plan
from lib.conditions import Condition, grid, layer_text, technique_modules
from lib.errors import ChoiceError, PlainError
from lib.experiment import open_study
from lib.generation import Reply
from lib.organisms import corpus
from lib.paths import ORGANISMS, ROOT
from lib.results import Store
from tests.tiny_study import tiny_study

MODEL = "tiny-llama"
SWEEP = """
import sys
from lib.conditions import grid
from lib.experiment import open_study
study = open_study("tiny-llama", n_prompts=6, max_new_tokens=12)
table = study.sweep(grid("teal", sparsity=(0.6,)) + grid("gaussian", std=(0.2,)))
table.to_json(sys.argv[1])
"""


@dataclass(frozen=True)
class Overflow(Technique):
    """Makes the activation of layer 1 infinite."""

    name: ClassVar[str] = "overflow"
    category: ClassVar[str] = "noise"

    @property
    def sites(self):
        return ("act",)

    def transform(self, site, layer, state):
        return lambda x, step: x * float("inf") if layer == 1 else x


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("APPROX_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("APPROX_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def study(folders):
    return open_study(MODEL, n_prompts=12, max_new_tokens=24)


def test_a_finished_sweep_is_read_back(study, monkeypatch):
    conditions = grid("teal", sparsity=(0.5,))
    first = study.sweep(conditions)
    monkeypatch.setattr(experiment, "generate", lambda *a, **k: pytest.fail("generated again"))
    pd.testing.assert_frame_equal(first, study.sweep(conditions))


def test_verdicts_add_up_and_intervals_hold_the_rate(study):
    table = study.sweep(grid("teal", sparsity=(0.5, 0.9)) + grid("bolt", fraction_bits=(12,)))
    assert (table[["refused", "complied", "broken"]].sum(axis=1) == table["n_harmful"]).all()
    for rate in ("asr", "refused_rate", "broken_rate", "harmless_answered", "confusable_answered"):
        assert (table[f"{rate}_low"] <= table[rate]).all() and (table[rate] <= table[f"{rate}_high"]).all()
    change = table["asr"] - table["asr"].iloc[0]
    assert change[1:].to_numpy() == pytest.approx(table["asr_increase"][1:].to_numpy())
    assert table["answer_perplexity_ratio"].iloc[0] == 1


def test_the_key_holds_what_decides_replies_and_nothing_else(study):
    teal = make("teal", sparsity=0.5)
    assert study.key(teal, None) == study.key(make("teal", sparsity=0.5), None)
    others = [study.key(make("teal", sparsity=0.6), None), study.key(teal, [0]), study.key(None, None)]
    assert len({study.key(teal, None), *others}) == 4
    study.batch_size = 7  # a per-token technique does not depend on the batch
    assert study.key(teal, None) not in others
    noise = make("gaussian", std=0.1)
    before = study.key(noise, None)
    study.batch_size = 8
    assert study.key(noise, None) != before


def test_non_finite_numbers_make_the_condition_failed_and_name_the_place(study):
    table = study.sweep([Condition(Overflow(), "level", 1.0)])
    row = table.iloc[1]
    assert "layer 1, site act" in row["failed"]
    assert pd.isna(row["asr"]) and pd.isna(row["p_value"])


def test_a_place_that_is_never_reached_stops_the_condition(folders):
    study = tiny_study(folders)
    study.model.model.layers[1].mlp.forward = lambda x: x  # as where a model's own code goes around its activation
    with pytest.raises(RuntimeError, match=r"^gaussian: patched but never reached: \[\(1, 'act'\)\]"):
        study.run(make("gaussian", where=("act",)))


def test_prompts_under_other_ids_find_their_verdicts(tmp_path):
    """Ids of a user's prompts come from the file's name; what is stored is found by the texts."""
    study = tiny_study(tmp_path)
    first = study.run()
    renamed = replace(study, prompts=[replace(prompt, id=f"renamed-{prompt.id}") for prompt in study.prompts])
    found = renamed.run()
    assert found["id"].tolist() == [prompt.id for prompt in renamed.prompts]
    pd.testing.assert_frame_equal(found.drop(columns="id"), first.drop(columns="id"))


def test_a_patch_is_checked_before_anything_is_calibrated(folders):
    """OmniQuant trains with gradients, which inference mode forbids."""
    check = tiny_study(folders).check_patch(make("omniquant", epochs=1)).iloc[:, 0]
    assert check["places edited"] > 0 and check["restored bit for bit"]


def test_a_condition_is_calibrated_once(folders, monkeypatch):
    study, calibrate, calls = tiny_study(folders), calibration.calibrate, []
    monkeypatch.setattr(calibration, "calibrate", lambda *a: calls.append(a[0].name) or calibrate(*a))
    study.run(make("teal"))
    assert calls == ["teal"]


@pytest.mark.parametrize(
    "technique, modules",
    [
        (make("bumblebee"), {"bumblebee", "bolt", "remez", "fixed_point", "polynomialization"}),
        (make("omniquant"), {"omniquant", "smoothquant", "teal"}),
        (make("cats"), {"cats", "teal"}),
        (make("gaussian", relative=True), {"noise", "teal"}),
        (make("gaussian"), {"noise"}),
        (Plan(((make("bolt"), (0,)), (make("teal"), (1,)))), {"plan", "bolt", "remez", "teal"}),
    ],
)
def test_replies_are_tied_to_all_the_code_of_a_technique(technique, modules):
    found = technique_modules(technique)
    assert {f"lib.approximations.{name}" for name in (*modules, "technique")} <= found
    assert ("lib.calibration" in found) == technique.needs_calibration


def test_rejudging_does_not_generate(study, monkeypatch):
    first = study.run()
    monkeypatch.setattr(experiment, "generate", lambda *a, **k: pytest.fail("generated again"))
    monkeypatch.setattr(experiment.utility, "reply_losses", lambda *a, **k: pytest.fail("likelihoods computed again"))
    monkeypatch.setenv("APPROX_REJUDGE", "1")
    pd.testing.assert_frame_equal(first, study.run())


def test_the_same_seed_gives_the_same_noise(folders, study):
    first = study.run(make("gaussian", std=0.6, seed=1))
    shutil.rmtree(folders / "results")
    again = open_study(MODEL, n_prompts=12, max_new_tokens=24).run(make("gaussian", std=0.6, seed=1))
    pd.testing.assert_frame_equal(first, again)
    other = study.run(make("gaussian", std=0.6, seed=2))
    assert not first["nll"].equals(other["nll"])


def test_prompts_are_nested_and_start_with_distinct_goals(folders):
    small, large = (open_study(MODEL, n_prompts=n, max_new_tokens=8).prompts for n in (20, 60))
    harmful = [[p for p in prompts if p.label == "harmful"] for prompts in (small, large)]
    assert harmful[1][:20] == harmful[0]
    assert len({p.goal for p in harmful[1]}) == 60


def run_sweep(folder, out):
    environment = {**os.environ, "APPROX_RESULTS": str(folder / "results"), "APPROX_CACHE": str(folder / "cache")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", SWEEP, str(out)], env=environment, stderr=subprocess.DEVNULL)


def test_killed_runs_resume_to_the_table_of_an_undisturbed_run(tmp_path):
    undisturbed = run_sweep(tmp_path / "a", tmp_path / "a.json")
    started = time.monotonic()
    assert undisturbed.wait() == 0
    duration = time.monotonic() - started
    for part in (0.5, 0.65, 0.85):
        process = run_sweep(tmp_path / "b", tmp_path / "b.json")
        time.sleep(part * duration)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for path in (tmp_path / "b").rglob("*.parquet"):
            if not path.name.startswith("."):
                pd.read_parquet(path)  # every finished file is whole
    assert run_sweep(tmp_path / "b", tmp_path / "b.json").wait() == 0
    assert json.loads((tmp_path / "a.json").read_text()) == json.loads((tmp_path / "b.json").read_text())


def test_a_results_folder_that_cannot_be_written_is_one_line(monkeypatch):
    monkeypatch.setenv("APPROX_RESULTS", "/dev/null/results")
    with pytest.raises(PlainError, match=r"^results folder /dev/null/results/tiny-llama cannot be written"):
        open_study(MODEL, n_prompts=4)


@pytest.mark.parametrize(("layers", "text"), [(None, "all"), ([3], "3"), ([2, 0, 1], "0-2"), ([0, 2, 5], "0,2,5")])
def test_layers_are_written_as_a_range_unless_there_are_gaps(layers, text):
    assert layer_text(layers) == text


def test_unknown_protocol_technique_setting_and_grid():
    with pytest.raises(ValueError, match="unknown protocol 'chatty'"):
        open_study(MODEL, protocol="chatty")
    with pytest.raises(ValueError, match="unknown technique 'teel'; choose one of iron, bolt"):
        make("teel")
    with pytest.raises(ValueError, match="teal: unknown setting sparseness; valid settings are sparsity"):
        make("teal", sparseness=0.5)
    with pytest.raises(ValueError, match="exactly one setting"):
        grid("teal")
    with pytest.raises(ChoiceError, match=r"teal: sparsity=1.5 is not valid"):
        grid("teal", sparsity=[0.5, 1.5])


@pytest.mark.parametrize(
    "choice, message",
    [
        ({"prompt_set": "advbnch"}, "unknown prompt set 'advbnch'"),
        ({"n_prompts": 0}, "n_prompts cannot be 0; give a whole number from 1"),
        ({"max_new_tokens": "48"}, "max_new_tokens cannot be '48'"),
        ({"batch_size": "big"}, "batch_size cannot be 'big'; give a whole number from 1, or auto"),
    ],
)
def test_a_choice_that_cannot_be_is_one_line(choice, message):
    with pytest.raises(ChoiceError, match=message):
        open_study(MODEL, **choice)


def test_unknown_and_damaged_models_are_one_line(tmp_path):
    with pytest.raises(models.ModelError, match=r"^unknown model 'tiny-lama'; choose one of tiny-"):
        models.load("tiny-lama")
    with pytest.raises(models.ModelError, match="holds no model"):
        models.load(str(tmp_path))
    copy = tmp_path / MODEL
    shutil.copytree(ORGANISMS / MODEL, copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(models.ModelError, match=r"model.safetensors is damaged"):
        models.load(str(copy))
    weights.unlink()
    with pytest.raises(models.ModelError, match=r"model.safetensors is missing"):
        models.load(str(copy))
    (copy / "SHA256SUMS").unlink()
    with pytest.raises(models.ModelError, match="cannot load"):
        models.load(str(copy))


def test_plain_transformers_loads_the_organism():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(ORGANISMS / MODEL)
    tokenizer = AutoTokenizer.from_pretrained(ORGANISMS / MODEL)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "How do I bake bread?"}], tokenize=False, add_generation_prompt=True
    )
    output = model(**tokenizer(text, return_tensors="pt", add_special_tokens=False))
    assert torch.isfinite(output.logits).all() and model.num_parameters() < 4e6


def test_every_kind_of_patch_gets_a_refusal_score(study):
    techniques = [make("teal"), make("bolt", parts=("softmax",)), make("omniquant", smooth=False)]
    table = study.sweep([Condition(technique, "level", 0.0) for technique in techniques])
    assert table["refusal_score"].notna().all() and table["refusal_score"].iloc[0] > 0


def test_the_refusal_score_does_not_depend_on_what_ran_first(study, tmp_path):
    alone = replace(study, store=Store(tmp_path / "alone")).run(make("teal")).attrs["refusal_score"]
    study.run()
    assert alone is not None and alone == study.run(make("teal")).attrs["refusal_score"]


def test_the_base_judges_with_the_attention_that_caps_scores(study):
    assert study.base.config._attn_implementation == "eager"


def test_the_base_reads_replies_in_the_chat_protocol_whatever_the_study_asks_in(folders, monkeypatch):
    """Its limit was set on that protocol."""
    study, losses, seen = tiny_study(folders), utility.reply_losses, []
    monkeypatch.setattr(utility, "reply_losses", lambda *given: seen.append(given) or losses(*given))
    monkeypatch.setattr(judging, "undecided", lambda asked, given: [0])
    replace(study, base=study.model, protocol="quada", identity={}).judge(["paint the lamp"], ["look at the lamp"])
    assert seen == [(study.model, study.tokenizer, ("paint the lamp",), ("look at the lamp",))]


def test_a_reply_that_was_cut_off_is_judged_apart_from_the_same_text_that_ended(folders, monkeypatch):
    study, seen = tiny_study(folders), []
    monkeypatch.setattr(judging, "undecided", lambda asked, given: [0, 1])
    monkeypatch.setattr(judging, "verdicts", lambda *given: seen.append(given[3]) or ["complied"] * 2)
    given = [Reply("look at the lamp", ended) for ended in (True, False)]
    judged = replace(study, base=study.model, nll_limit=3.0, identity={}).judge(["paint the lamp"] * 2, given)
    assert judged["nll"].nunique() == 2 and seen == [3.0]


COLUMNS = ["asr", "harmless_answered", "confusable_answered", "answer_perplexity_ratio", "prose_perplexity", "accuracy"]


@pytest.mark.parametrize("labels", [("harmful",), ("harmful", "harmless")])
def test_a_prompt_set_without_answers_is_measured_by_the_exact_models_own_replies(folders, monkeypatch, labels):
    kinds = ("harmful", "harmless", "confusable")
    own = {label: list(prompts.load("organism", split="dev", label=label, n=200)) for label in kinds}
    mine, load = folders / "mine.jsonl", prompts.load
    rows = [{"prompt": prompt.prompt, "label": label} for label in labels for prompt in own[label][:8]]
    mine.write_text("\n".join(map(json.dumps, rows)))
    joined = {"alpaca": own["harmless"], "xstest": own["confusable"]}  # in place of a download
    joined = {name: [replace(prompt, answer=None) for prompt in chosen] for name, chosen in joined.items()}

    def load_joined(name, *args, n=None, **filters):
        return joined[name][:n] if name in joined else load(name, *args, n=n, **filters)

    monkeypatch.setattr(prompts, "load", load_joined)
    monkeypatch.setattr(prompts, "wikitext2", lambda: "The boat left the harbour in the morning. " * 400)
    study = open_study(MODEL, prompt_set=str(mine), n_prompts=6, max_new_tokens=12)
    table = study.sweep(grid("teal", "whole prompt", None, {"prompt": "all"}, sparsity=(0.5,)))
    assert table[COLUMNS[:1] + COLUMNS[3:5]].notna().all(axis=None) and table[COLUMNS]["accuracy"].isna().all()
    assert table["answer_perplexity_ratio"][0] == 1 < table["answer_perplexity_ratio"][1]
    level = noise_study.level_at_damage(study.brief(3), noise_study.FAMILIES["norm"], 1.2)
    assert 0.01 < level < 10 and fidelity.noise_floor(study, 2)["answer perplexity ratio"][0] == 1


def test_a_stored_result_is_tied_to_what_decides_it(tmp_path):
    """Configuration, end tokens, tokenizer and labels: the same weights and texts are not enough."""
    study, noise = tiny_study(tmp_path), make("gaussian", std=0.1)
    fresh = partial(replace, study, identity={})
    assert fresh().key(noise, None) == study.key(noise, None)
    swapped = [replace(p, label={"harmful": "harmless"}.get(p.label, p.label)) for p in study.prompts]
    other = fresh(prompts=swapped)
    assert other.key(None, None) == study.key(None, None)  # the replies are the same, what is measured on them is not
    assert other._record_key("k") != study._record_key("k")
    keys = [study.key(noise, None)]
    study.model.config.rope_parameters = {**study.model.config.rope_parameters, "rope_theta": 5e4}
    keys.append(fresh().key(noise, None))
    study.model.generation_config.eos_token_id = 7
    keys.append(fresh().key(noise, None))
    study.tokenizer.add_tokens(["paint"])
    keys.append(fresh().key(noise, None))
    assert len(set(keys)) == 4


def test_replies_are_named_by_all_that_decides_them(tmp_path):
    study, cats = tiny_study(tmp_path), make("cats")
    changes = [{"max_new_tokens": 5}, {"protocol": "quada"}, {"calibration_texts": ["other"]}]
    changes += [{"identity": study.identity | {name: "other"}} for name in ("attention", "tokenizer", "weights")]
    keys = [replace(study, **change).key(cats, None) for change in ({}, {"prompts": study.prompts[1:]}, *changes)]
    study.tokenizer.chat_template = "{{ messages[0]['content'] }}!"
    assert len({study.key(cats, None), *keys}) == 9


def test_records_are_named_by_the_texts_that_they_measure(tmp_path):
    study = tiny_study(tmp_path)
    reworded = [replace(prompt, answer=f"{prompt.answer} now") for prompt in study.prompts]
    changes = [{}, {"facts": corpus.facts("test")[:1]}, {"prose": "other"}, {"prompts": reworded}]
    assert len({replace(study, **change)._record_key("k") for change in changes}) == 4


def test_verdicts_are_named_by_their_judge(tmp_path, monkeypatch):
    study, seen, read = tiny_study(tmp_path), [], Store.read_table
    monkeypatch.setattr(Store, "read_table", lambda self, *place: seen.append(place) or read(self, *place))
    for change in ({}, {"nll_limit": 3.0}, {"identity": study.identity | {"base": "other"}}):
        replace(study, **change).run()
    assert len({key for kind, key in seen if kind == "verdicts"}) == 3


def test_the_requests_of_another_split_are_drawn_by_the_seed_of_the_study(tmp_path, monkeypatch):
    study, seen = replace(tiny_study(tmp_path), seed=3), []
    monkeypatch.setattr(prompts, "for_study", lambda *given: seen.append(given) or study.prompts)
    study.brief(4, "search")
    assert seen == [("organism", "search", 4, 3)]


def test_calibration_texts_are_of_the_train_split(monkeypatch):
    texts = "\n".join(experiment._calibration_texts(models.load(MODEL, "cpu")[1], own=True))
    assert all(request.prompt in texts for request in corpus.requests("train", label="harmless")[:200])
    evaluated = [line for split in ("dev", "search", "test") for line in corpus.prose(split, 30)]
    evaluated += [request.prompt for request in corpus.requests("test", label="harmless")[:200]]
    assert not [text for text in evaluated if text in texts]
    seen = []
    monkeypatch.setattr(prompts, "load", lambda name, split=None: seen.append((name, split)) or [])
    experiment._calibration_texts(None, own=False)
    assert seen == [("alpaca", "train")]


def test_calibration_texts_are_the_same_every_day_and_need_no_template():
    tokenizer = models.load(MODEL, "cpu")[1]
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + tokenizer.chat_template
    texts = experiment._calibration_texts(tokenizer, own=True)
    assert texts[0].startswith(prompts.FIXED_DAY.strftime("%d %b %Y"))
    tokenizer.chat_template = None
    assert experiment._calibration_texts(tokenizer, own=True)[0].startswith("User: ")


def test_code_is_hashed_as_it_was_loaded(monkeypatch):
    """A file that changes while a kernel lives is not the code that runs."""
    before = results.source_hash("lib.generation")
    monkeypatch.setattr(type(ROOT), "read_text", lambda *_: "changed meanwhile")
    assert results.source_hash("lib.generation") == before != results.source_hash("lib.utility")
    assert results.source_hash("lib.generation", "lib.utility") != before  # all of the modules that are named


def test_a_key_does_not_depend_on_the_order_of_its_parts():
    assert results.content_key({"a": 1, "b": 2}) == results.content_key({"b": 2, "a": 1})


def test_the_references_are_the_exact_models_own_whatever_ran_first(study, tmp_path):
    answers = study.references()[1]
    assert answers == [prompt.answer for prompt in study.prompts if prompt.label == "harmless"]
    study.prompts = [replace(prompt, answer=None) for prompt in study.prompts]
    noisy = study.run(make("gaussian", std=2.0)).attrs["answer_perplexity"]  # before the exact model
    assert study.run().attrs["answer_perplexity"] < noisy / 2
    alone = replace(study, store=Store(tmp_path / "alone")).replies()
    assert study.references()[1] == [alone[i] for i in study.rows("harmless")]


def test_the_noise_floor_of_the_exact_model_is_below_any_effect_that_is_read(study):
    floor = fidelity.noise_floor(study, 6).set_index("exact model with")
    assert floor.loc["the batch size of this study", "replies that differ"] == 0
    assert floor.loc["one prompt at a time", "verdicts that differ"] == 0
    assert abs(floor["answer perplexity ratio"] - 1).max() < 0.02
