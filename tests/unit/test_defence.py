"""The defence: clean reference, perturbed prefix, regulariser, resume, disjoint goals, the choice of tau, the bar."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from lib import defence, defence_plots, defence_study, defence_training, models, noise_study, prompts
from lib.approximations import make
from lib.conditions import Condition
from lib.defence_training import Pair, Recipe
from lib.errors import ChoiceError
from lib.organisms import corpus
from lib.patching import approximated
from tests.families import random_model
from tests.tiny_study import WORDS, character_tokenizer, tiny_study

NOISE = make("gaussian", where=("norm",), std=0.5)
SHORT = Recipe(NOISE, 1, steps=4, batch=4, learning_rate=1e-2)
PAIRS = [
    Pair(f"break the {word} {i}", "No.", f"take the {word}", i % 2 == 0, f"break {word} {i}")
    for i, word in enumerate(WORDS)
]
OTHERS = [replace(pair, goal=f"{pair.goal} again", prompt=f"{pair.prompt} again") for pair in PAIRS]
"""Pairs that share nothing with the prompts of a tiny study."""


@pytest.fixture(autouse=True)
def frequent_checkpoints(monkeypatch):
    monkeypatch.setattr(defence_training, "SAVE_STEPS", 2)


def train(folder, recipe=SHORT, pairs=PAIRS):
    return defence_training.train(random_model("llama"), character_tokenizer(), pairs, recipe, folder)


def weights(folder, dtype="auto"):
    return models.load(str(folder), "cpu", dtype)[0].state_dict()


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in b)


def trainer(folder, recipe=SHORT):
    return defence_training._trainer(random_model("llama"), character_tokenizer(), PAIRS, recipe, folder, None, "chat")


def batch(trainer):
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


# ------------------------------------------------------------------ training


@pytest.mark.parametrize("rank", [0, 2])
def test_the_reference_is_the_clean_original_and_the_policy_is_not(tmp_path, rank):
    """In the first step policy and reference have the same weights: without perturbation their ratio is 0."""
    for recipe, clean in ((replace(SHORT, rank=rank), False), (Recipe(None, 0, batch=4, rank=rank), True)):
        one = trainer(tmp_path, recipe)
        inputs = batch(one)
        reference = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        ids, mask = inputs["input_ids"], inputs["completion_mask"][:, 1:].bool()
        with torch.no_grad():
            logits = random_model("llama")(input_ids=ids, attention_mask=inputs["attention_mask"]).logits
        exact = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].masked_fill(~mask, 0).sum(1)
        torch.testing.assert_close(reference, exact, rtol=1e-4, atol=1e-3)
        one.model.train()
        one.compute_loss(one.model, inputs)
        policy = one._metrics["train"]["logps/chosen"][0]
        assert (abs(policy - exact[: len(exact) // 2].mean().item()) < 1e-2) == clean


def test_only_the_first_tau_layers_are_perturbed_and_the_hooks_are_gone_afterwards(tmp_path, monkeypatch):
    seen = []

    def spy(model, technique, state, layers):
        seen.append((list(layers), technique.inner.seed))
        return approximated(model, technique, state, layers)

    monkeypatch.setattr(defence_training, "approximated", spy)
    one = trainer(tmp_path)
    one.model.train()
    first, second = batch(one), batch(one)
    for inputs in (first, second):
        one.compute_loss(one.model, dict(inputs))
    one.state.global_step = 1
    one.compute_loss(one.model, dict(first))
    assert [layers for layers, _ in seen] == [[0]] * 3
    assert len({seed for _, seed in seen}) >= 2 and seen[0][1] != seen[2][1]  # fresh noise every step
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in one.model.modules())
    with trainer(tmp_path, replace(SHORT, seed=1))._approximated(first["input_ids"]):
        assert seen[-1][1] != seen[0][1]


def test_the_recipes_beta_is_that_of_the_training(tmp_path):
    assert trainer(tmp_path, replace(SHORT, beta=0.7)).args.beta == 0.7


def test_the_regularisers_gradient_reaches_the_first_block_alone(tmp_path):
    def gradients(weight):
        one = trainer(tmp_path / str(weight), replace(SHORT, weight=weight))
        one.compute_loss(one.model, batch(one)).backward()
        return {name: parameter.grad for name, parameter in one.model.named_parameters()}

    without, with_it = gradients(0.0), gradients(5.0)
    changed = {name for name in without if not torch.allclose(without[name], with_it[name], atol=1e-6)}
    assert "model.layers.0.mlp.down_proj.weight" in changed
    assert not any(name.startswith(("model.layers.1", "model.norm")) for name in changed)


def test_mean_cosine_is_that_of_all_pairs():
    states = torch.randn(5, 7)
    cosines = torch.nn.functional.cosine_similarity(states[:, None], states[None], dim=-1)
    expected = cosines[~torch.eye(5, dtype=torch.bool)].mean()
    torch.testing.assert_close(defence_training.mean_cosine(states), expected)
    assert defence_training.mean_cosine(states[:1]).item() == 0


def test_harmful_prompts_are_drawn_together_at_their_last_token(tmp_path):
    one = trainer(tmp_path, Recipe(None, 0, batch=8))
    inputs = batch(one)
    ids, mask, begins = inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"][:8].argmax(1)
    with torch.no_grad():
        states = random_model("llama")(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[1]
    last = states[torch.arange(8), begins - 1][inputs["harmful"]]
    one.compute_loss(one.model, dict(inputs))
    expected = defence_training.mean_cosine(last).item()
    assert len(last) == 4 and one._metrics["train"]["likeness"] == pytest.approx([expected], abs=1e-5)


def test_only_harmful_prompts_are_drawn_together(tmp_path):
    one = trainer(tmp_path)
    inputs = batch(one)
    one.compute_loss(one.model, inputs | {"harmful": torch.zeros(4, dtype=torch.bool)})
    assert one._metrics["train"]["likeness"] == [0.0]


def test_stopped_and_resumed_training_ends_with_the_same_weights(tmp_path, monkeypatch):
    whole = weights(train(tmp_path / "whole"))
    cosine, calls = defence_training.mean_cosine, []

    def stop(states):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return cosine(states)

    with monkeypatch.context() as patch:
        patch.setattr(defence_training, "mean_cosine", stop)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "stopped")
    (tmp_path / "stopped" / "checkpoints" / "checkpoint-4").mkdir()  # what a save that was killed leaves behind
    assert not (tmp_path / "stopped" / "defence.json").exists() and (tmp_path / "stopped" / "checkpoints").is_dir()
    assert same(weights(train(tmp_path / "stopped")), whole)
    assert not same(weights(train(tmp_path / "other", replace(SHORT, seed=1))), whole)
    record = json.loads((tmp_path / "whole" / "defence.json").read_text())
    assert record["recipe"]["perturbation"][0] == "gaussian" and not (tmp_path / "whole" / "checkpoints").exists()


@pytest.mark.parametrize("perturbation", [NOISE, make("smoothquant", bits=3, smooth=False)])
def test_small_steps_move_the_weights_of_a_bfloat16_model(tmp_path, perturbation):
    model = random_model("llama").bfloat16()
    recipe = replace(SHORT, perturbation=perturbation, steps=12, learning_rate=1e-4)
    defence_training.train(model, character_tokenizer(), PAIRS, recipe, tmp_path)
    after = weights(tmp_path, "bfloat16")
    before = {name: value for name, value in model.state_dict().items() if value.ndim == 2}
    changed = [(after[name] != value).float().mean() for name, value in before.items()]
    assert after["model.norm.weight"].dtype == torch.bfloat16 and np.mean(changed) > 0.4  # in bfloat16 0.15


def test_a_loss_that_is_not_finite_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(defence_training, "mean_cosine", lambda states: states.sum() * float("nan"))
    with pytest.raises(FloatingPointError, match="NaN or infinite at step 1"):
        train(tmp_path)


def test_lora_sft_and_a_real_technique_train_and_load(tmp_path):
    original = random_model("llama").state_dict()
    for name, recipe in {
        "lora": replace(SHORT, rank=2, steps=2),
        "sft": replace(SHORT, objective="sft", steps=2),
        "teal": replace(SHORT, perturbation=make("smoothquant", bits=3, smooth=False), steps=2),
    }.items():
        assert not same(weights(train(tmp_path / name, recipe)), original)


def test_rounding_lets_the_gradient_through_and_keeps_its_values():
    rounding = make("smoothquant", bits=3, smooth=False)
    x = torch.randn(1, 4, 8, requires_grad=True)
    step = defence_training.Step(torch.ones(1, 4, dtype=torch.bool), True)
    site = rounding.sites[0]
    edited = defence_training.StraightThrough(rounding).transform(site, 0, None)(x, step)
    torch.testing.assert_close(edited, rounding.transform(site, 0, None)(x, step))
    edited.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    with pytest.raises(ValueError, match="bolt replaces functions"):
        defence_training.StraightThrough(make("bolt"))


# ------------------------------------------------------------------ pairs


def test_organism_pairs_refuse_harm_only_and_share_no_goal_with_evaluation():
    pairs = defence.organism_pairs(400)
    assert pairs == defence.organism_pairs(400) != defence.organism_pairs(400, seed=1)
    assert 0.4 < np.mean([pair.harmful for pair in pairs]) < 0.6
    labels = {request.goal: request.label for request in corpus.requests("train")}
    assert np.mean([labels[pair.goal] == "confusable" for pair in pairs]) == pytest.approx(0.25, abs=0.06)
    refusals = {request.refusal for request in corpus.requests("train", label="harmful")}
    assert all((pair.chosen in refusals) == pair.harmful != (pair.rejected in refusals) for pair in pairs)
    evaluated = prompts.load("organism")
    assert {prompt.split for prompt in evaluated} == {"dev", "search", "test"}
    trained = {defence.plain(r.goal) for r in corpus.requests("train")}
    sealed = {defence.plain(r.goal) for seal in (1, 2) for r in corpus.requests("test", seal=seal)}
    assert not trained & ({defence.plain(str(prompt.goal)) for prompt in evaluated} | sealed)
    assert defence.disjoint(pairs, evaluated) == pairs


def test_pairs_that_evaluation_uses_are_dropped(caplog):
    asked = prompts.Prompt(id="a", prompt="Break the STONE, 0!", goal="something")
    with caplog.at_level(logging.WARNING):
        assert defence.disjoint(PAIRS, [asked]) == PAIRS[1:]
    assert "1 of 8" in caplog.text
    with pytest.raises(ChoiceError, match="all 1 preference pairs"):
        defence.disjoint(PAIRS[:1], [asked])


def test_files_of_pairs_take_the_safer_response(tmp_path):
    pku = {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 0, "safer_response_id": 1}
    rows = [pku | {"is_response_0_safe": False, "is_response_1_safe": True},
            pku | {"is_response_0_safe": True, "is_response_1_safe": True},
            {"prompt": "q", "chosen": "c", "rejected": "r", "harmful": False, "goal": "g"}]  # fmt: skip
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    pairs = defence.read_pairs(file)
    assert pairs == [Pair("p", "b", "a", True, "p"), Pair("p", "b", "a", False, "p"), Pair("q", "c", "r", False, "g")]
    assert set(defence.read_pairs(file, 2)) <= set(pairs)
    wrong = [json.dumps(rows[2] | change) for change in ({"goal": 7}, {"harmful": "false"})]
    wrong += ['{"prompt": "p"}', '{"prompt": "p", "chosen": "", "rejected": "r"}', "[1]", "x", json.dumps(pku)]
    for bad in wrong:
        file.write_text(json.dumps(rows[0]) + "\n" + bad)
        with pytest.raises(ChoiceError, match=r"pairs\.jsonl, line 2"):
            defence.read_pairs(file)
    file.write_text("\n")
    with pytest.raises(ValueError, match="no preference pairs"):
        defence.read_pairs(file)
    with pytest.raises(ChoiceError, match=r"there is no file .*missing\.jsonl"):
        defence.read_pairs(tmp_path / "missing.jsonl")


# ------------------------------------------------------------------ choices


def test_a_recipe_is_checked():
    with pytest.raises(ValueError, match="give both, or neither"):
        Recipe(NOISE, 0)
    with pytest.raises(ChoiceError, match="unknown objective 'ppo'"):
        Recipe(NOISE, 1, objective="ppo")
    for name, wrong in {"steps": 0, "rank": -1, "learning_rate": 0.0}.items():
        with pytest.raises(ChoiceError, match=f"{name} cannot be {wrong}"):
            Recipe(NOISE, 1, **{name: wrong})


def prefix_table(asr, scores, low):
    n = len(asr)
    table = pd.DataFrame({"tau": range(n), "asr": asr, "refusal_score": scores, "failed": ""})
    return table.assign(asr_increase_low=[np.nan, *[low] * (n - 1)])


def test_tau_is_the_smallest_prefix_that_explains_the_damage():
    table = prefix_table([0.0, 0.2, 0.33, 0.5, 0.4], [5, 4.9, 4, 2, 1], 0.1)
    assert defence.sensitive_prefix(table, 0.2) == (2, "asr")
    assert defence.sensitive_prefix(table, 0.5) == (1, "asr")
    exactly = prefix_table([0 / 85, 12 / 85, 15 / 85], [5, 5, 5], 0.01)
    assert defence.sensitive_prefix(exactly, 0.2) == (1, "asr")
    flat = prefix_table([0.0, 0.0, 0.01], [5, 4, 1], -0.02)
    assert defence.sensitive_prefix(flat, 0.2) == (2, "refusal_score")
    assert defence.sensitive_prefix(prefix_table([0.0, 0.0], [5, 6], -0.1)) == (1, "no damage")
    with pytest.raises(ValueError, match="empty"):
        defence.sensitive_prefix(table.iloc[:1])
    with pytest.raises(ValueError, match="noise in all layers failed"):
        defence.sensitive_prefix(table.assign(failed=["", *[""] * (len(table) - 2), "NaN at layer 0"]))


def test_the_prefix_sweep_measures_growing_prefixes_and_needs_refusals(tmp_path, monkeypatch):
    study = tiny_study(tmp_path)
    with pytest.raises(ChoiceError, match="refuses none of 6 harmful requests: it has no safety to keep"):
        defence.prefix_damage(study, NOISE)
    monkeypatch.setattr(type(study), "check_refusals", lambda _: 1)
    table = defence.prefix_damage(study, NOISE, seeds=(0, 1))
    assert table["tau"].tolist() == [0, 1, 2] and table["layers"].tolist() == ["all", "0", "0-1"]
    assert table["n_seeds"].tolist()[1:] == [2, 2]


def test_a_defended_study_is_stored_by_content_and_keeps_prompts_and_judge(tmp_path, monkeypatch):
    monkeypatch.setattr("lib.prompts.load", lambda *_, **__: pytest.fail("not needed"))
    study, pairs = replace(tiny_study(tmp_path), prompt_set="own"), OTHERS
    after, folder = defence.defend(study, replace(SHORT, steps=2), pairs)
    assert folder.is_relative_to(tmp_path) and (folder / "model.safetensors").is_file()
    assert after.prompts == study.prompts and after.identity["weights"] != study.identity["weights"]
    monkeypatch.setattr(defence_training, "train", lambda *_: pytest.fail("trained again"))
    again, _ = defence.defend(study, replace(SHORT, steps=2), pairs)
    assert again.identity == after.identity
    with pytest.raises(ValueError, match="tau 3 is not valid: tiny has 2 layers"):
        defence.defend(study, replace(SHORT, tau=3), pairs)
    places = {
        defence.defended_folder(changed, replace(SHORT, perturbation=p), pairs)
        for changed in (study, replace(study, calibration_texts=["other"]))
        for p in (NOISE, make("smoothquant"))
    }
    assert len(places) == 3  # what SmoothQuant was calibrated on decides the weights
    assert {"lib.prompts", "lib.anatomy"} <= set(defence.CODE)  # how pairs are put, and where the first layers are
    study.tokenizer.chat_template = "{{ messages[0]['content'] }}!"
    assert defence.defended_folder(study, replace(SHORT, steps=2), pairs) != folder
    with pytest.raises(ChoiceError, match="evaluation prompts"):
        defence.defend(study, SHORT, [replace(pairs[0], goal=study.prompts[0].goal), *pairs[1:]])


def test_a_defended_model_is_named_by_all_that_decides_its_weights(tmp_path):
    study = replace(tiny_study(tmp_path), prompt_set="own")
    recipes = [replace(SHORT, **change) for change in ({}, {"beta": 0.3}, {"seed": 1}, {"weight": 0.0})]
    places = [defence.defended_folder(study, recipe, OTHERS) for recipe in recipes]
    changes = [{"identity": study.identity | {name: "other"}} for name in ("attention", "tokenizer", "weights")]
    for change in ({"protocol": "quada"}, *changes):
        places.append(defence.defended_folder(replace(study, **change), SHORT, OTHERS))
    places.append(defence.defended_folder(study, SHORT, OTHERS[1:]))
    assert len(set(places)) == len(places)


def test_a_defence_is_trained_in_the_protocol_of_its_study(tmp_path, monkeypatch):
    study, seen = replace(tiny_study(tmp_path), prompt_set="own", protocol="quada"), []
    monkeypatch.setattr(defence_training, "train", lambda *given: seen.append(given[6:]))
    monkeypatch.setattr(models, "load", lambda *_: (study.model, None))
    defence.defend(study, SHORT, OTHERS)
    assert seen == [("quada",)]


# ------------------------------------------------------------------ before and after


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    before = tiny_study(tmp_path_factory.mktemp("study"))
    after = replace(before, model=random_model("llama"))
    torch.nn.init.normal_(after.model.model.layers[0].mlp.down_proj.weight, std=0.3)
    after = replace(after, name="after", identity={})
    conditions = [Condition(make("smoothquant", bits=b, smooth=False), "bits", b, "plain") for b in (4, 2)]
    return before, after, conditions, defence_study.compared(before, after, conditions)


def test_before_and_after_are_paired_by_prompt(comparison):
    before, after, conditions, table = comparison
    assert table["technique"].tolist() == ["exact", "smoothquant", "smoothquant"]
    for row, condition in zip(table.to_dict("records"), [None, *conditions], strict=True):
        runs = [study.run(condition and condition.technique) for study in (before, after)]
        rates = [(run.loc[run["label"] == "harmful", "verdict"] == "complied").mean() for run in runs]
        assert [row["asr_before"], row["asr_after"]] == rates and row["change"] == pytest.approx(rates[1] - rates[0])
        assert row["growth"] == pytest.approx(runs[1].attrs["answer_perplexity"] / runs[0].attrs["answer_perplexity"])
        own = runs[1].attrs["answer_perplexity"] / after.run().attrs["answer_perplexity"]
        assert row["ratio_after"] == pytest.approx(own)
    with pytest.raises(ValueError, match="no conditions to measure"):
        defence_study.compared(before, after, [])


def test_the_p_value_is_of_asr_also_where_other_requests_change_more(tmp_path, monkeypatch):
    study = tiny_study(tmp_path)
    exact = study.run()
    verdicts = np.where(exact["label"] == "harmful", "complied", "refused")
    before, after = exact.assign(verdict="complied"), exact.assign(verdict=verdicts)
    before.attrs = after.attrs = exact.attrs
    monkeypatch.setattr(type(study), "run", lambda self, *_: after if self.name == "after" else before)
    condition = Condition(make("cats"), "sparsity", 0.5)
    table = defence_study.compared(study, replace(study, name="after"), [condition])
    assert (table["p_value"] == 1).all() and (table["harmless_change"] == -1).all()


def row(asr, asr_after, harmless=0.95, change=0.0, growth=1.0, ratio=1.1, technique="teal"):
    return {"technique": technique, "label": "a", "failed": "", "ratio_before": ratio,
            "asr_before": asr, "asr_after": asr_after, "growth": growth,
            "harmless_answered_before": harmless, "harmless_answered_after": harmless + change,
            "harmless_change": change, "p_holm": 0.01, "change": asr_after - asr,
            "held_out": technique == "omniquant"}  # fmt: skip


def test_the_bar_asks_for_safety_answers_and_fluency_where_it_applies():
    rows = [row(0.02, 0.02, technique="exact"), row(0.4, 0.09), row(0.4, 0.11), row(0.16, 0.05), row(0.4, 0.0, 0.7)]
    rows += [row(0.4, 0.0, change=-0.04), row(0.4, 0.0, growth=1.06), row(0.4, 0.0, ratio=1.6)]
    rows += [row(0.15, 0.0) | {"p_holm": 0.2}]
    table = defence_study.judged(pd.DataFrame(rows))
    assert table["attackable"].tolist() == [False, True, True, True, False, True, True, False, False]
    assert table.loc[table["attackable"], "met"].tolist() == [True, False, True, False, False]
    first, cost, peak, tested = defence_study.conclusions(table)
    assert "met in 2 of 5 conditions that qualify (ASR 4, harmless 4, perplexity 4)" in first
    assert "useful or not, is 40.0 % (a); the defended one's there 9.0 %" in peak
    assert "2.0 % to 2.0 %" in cost and "fell in 5 and rose in 0 of 6 useful" in tested
    assert "fell most under a: from 95.0 % to 91.0 %" in tested
    rows = [row(0.02, 0.02, technique="exact"), row(0.04, 0.01, technique="omniquant")]
    calm = defence_study.judged(pd.DataFrame(rows))
    first, *_, held = defence_study.conclusions(calm)
    assert first.startswith("No condition qualifies") and "(1 conditions), its ASR is 4.0 % at most" in first
    assert "4.0 % before and 1.0 % after" in held


def test_a_condition_that_breaks_a_model_counts_as_missed_after_and_not_at_all_before():
    lost = {"failed": "NaN", "asr_after": np.nan, "harmless_change": np.nan, "growth": np.nan}
    rows = [row(0.02, 0.02, technique="exact"), row(0.4, 0.0) | lost, row(np.nan, 0.0) | lost]
    table = defence_study.judged(pd.DataFrame(rows))
    assert table["attackable"].tolist() == [False, True, False] and not table["met"][1]
    first, _, peak, _ = defence_study.conclusions(table)
    assert "met in 0 of 1 conditions that qualify" in first and peak == "No approximated model could be measured."


def test_the_main_conditions_leave_no_technique_out():
    every = {c.technique.name for c in defence_study.every_condition("tiny-llama")}
    assert {c.technique.name for c in defence_study.main_conditions("tiny-llama")} == every
    assert defence.HELD_OUT in every
    half = [c.level for c in defence_study.main_conditions("tiny-llama") if c.technique.name == defence.HELD_OUT]
    assert half == [8, 5, 3]


def test_balanced_asks_as_many_harmless_as_harmful(tmp_path):
    study = defence_study.balanced(tiny_study(tmp_path), 4)
    assert [p.label for p in study.prompts] == ["harmful"] * 4 + ["harmless"] * 4


def test_figures_show_every_row(comparison):
    *_, table = comparison
    figure = defence_plots.before_and_after(table.assign(level=[np.nan, 4.0, 2.0]))
    assert [len(ax.get_lines()) for ax in figure.axes] == [2, 2]
    prefixes = prefix_table([0.0, 0.2, 0.4], [5.0, 4.0, 2.0], 0.1)
    prefixes = prefixes.assign(asr_low=prefixes["asr"] / 2, asr_high=prefixes["asr"] + 0.1)
    assert len(defence_plots.prefixes(prefixes, 1).axes) == 2
    rates = pd.DataFrame({"attack": ["a", "b"] * 2, "model": ["x"] * 2 + ["y"] * 2, "asr": [0.1, 0.2, 0.3, 0.4]})
    rates = rates.assign(asr_low=0.0, asr_high=0.5)
    ticks = defence_plots.rates(rates, "attack", "model").axes[0].get_yticklabels()
    assert [tick.get_text() for tick in ticks] == ["a", "b"]


def test_an_empty_sweep_has_no_peak():
    table = pd.DataFrame({"technique": ["exact", "gaussian"], "failed": ["", "NaN"], "level": [0.0, 1.0], "asr": 0.0})
    with pytest.raises(ValueError, match="the sweep is empty"):
        noise_study.peak(table)


def test_variants_change_one_part_each_and_are_measured_beside_the_undefended_model(tmp_path):
    variants = defence.variants(SHORT, 2)
    assert list(variants) == ["no perturbation", "all layers", "no regulariser", "TEAL as perturbation",
                              "objective sft", "objective both"]  # fmt: skip
    changed = {name: {k for k, v in vars(r).items() if v != vars(SHORT)[k]} for name, r in variants.items()}
    assert changed["no perturbation"] == {"perturbation", "tau"} and changed["no regulariser"] == {"weight"}
    assert all(len(fields) == 1 for name, fields in changed.items() if name != "no perturbation")
    study = replace(tiny_study(tmp_path, 2), prompt_set="own")
    table = defence_study.ablated(study, {"short": replace(SHORT, steps=1)}, OTHERS, NOISE)
    assert table[["recipe", "approximation"]].to_numpy().tolist() == [
        ["undefended", "exact"], ["undefended", "MVA"], ["short", "exact"], ["short", "MVA"]
    ]  # fmt: skip
    assert table["n_seeds"].tolist()[1::2] == [len(noise_study.FRESH_SEEDS)] * 2
    folder = defence.defended_folder(study, replace(SHORT, steps=1), OTHERS)
    assert models.load(str(folder), "cpu")[1].padding_side == "left"


def test_noise_is_measured_in_units_of_the_mva_and_in_the_chosen_layers(tmp_path, monkeypatch):
    monkeypatch.setattr(noise_study, "most_vulnerable", lambda study, kind: noise_study.FAMILIES[kind](0.4))
    found = defence_study.noise_conditions(tiny_study(tmp_path), (0.5, 2.0), (0,))
    assert [c.technique.std for c in found] == [0.2, 0.8] * 2 and {c.layers for c in found} == {(0,)}
    assert [c.level for c in found] == [0.5, 2.0] * 2 and found[-1].technique.laplace_down == pytest.approx(0.592)


def test_answers_end_as_the_template_ends_a_turn():
    """Gemma and Phi-3 end a turn with another token than a text."""
    tokenizer = character_tokenizer()
    other = next(token for token in range(60, 90) if token != tokenizer.eos_token_id)
    mark = tokenizer.convert_ids_to_tokens(other)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}" + mark + "{% endfor %}"
    for ends, wanted in (([other, tokenizer.eos_token_id], other), ([], tokenizer.eos_token_id)):
        rows = defence_training.tokenised(tokenizer, PAIRS, "chat", ends)
        assert {row[f"{kind}_ids"][-1] for row in rows for kind in ("chosen", "rejected")} == {wanted}
