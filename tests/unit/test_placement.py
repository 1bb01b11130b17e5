"""Safe placement: plans that go through JSON, savings that add up, a search that keeps to its rule, sealed prompts."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from lib import placement, placement_plots, savings, statistics
from lib.anatomy import anatomy
from lib.approximations import make, plan
from lib.approximations.plan import Plan
from lib.errors import ChoiceError
from lib.organisms import corpus
from lib.patching import approximated
from tests.families import random_model
from tests.tiny_study import tiny_study

TEXTS = ["paint the lamp and the wheel. " * 100]


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setenv("APPROX_CACHE", str(tmp_path / "cache"))
    return tiny_study(tmp_path)


def logits(model, technique=None, state=None, layers=None):
    ids = torch.arange(4, 44).view(2, 20)
    with torch.inference_mode():
        if technique is None:
            return model(input_ids=ids).logits
        with approximated(model, technique, state, layers) as hits:
            out = model(input_ids=ids).logits
        assert not hits.silent()
    return out


# ------------------------------------------------------------------ plans


PLANS = {
    "one technique at two levels": Plan(((make("smoothquant", bits=3), (0,)), (make("smoothquant", bits=6), (1,)))),
    "other operations per layer": Plan(((make("bolt", parts=("norm",)), (0,)), (make("bolt", fraction_bits=8), (1,)))),
    "techniques side by side": Plan(((make("teal", sparsity=0.6, prompt="all"), (1,)), (make("cats"), (0,)))),
    "one layer exact": Plan(((make("nexus", parts=("activation", "norm")), (1,)),)),
    "nothing": Plan(),
}


@pytest.mark.parametrize("one", PLANS.values(), ids=PLANS)
def test_a_plan_survives_json_and_acts_like_nested_techniques(one, study, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"model": "any", **one.settings}))
    read = plan.load(path)
    assert read == one
    model, before = study.model, logits(study.model)
    state = read.calibrate(model, study.tokenizer, TEXTS)
    placed = logits(model, read, state)
    states = [technique.calibrate(model, study.tokenizer, TEXTS) for technique, _ in one.groups]
    nested = before
    if one.groups:
        (technique, layers), *rest = one.groups
        with approximated(model, technique, states[0], layers):
            nested = logits(model, *(rest[0][0], states[1], rest[0][1]) if rest else ())
        assert not torch.equal(placed, before)
    assert torch.equal(placed, nested)
    assert torch.equal(logits(model), before)


def test_a_plan_can_be_narrowed_to_some_of_its_layers(study):
    coarse, fine = make("smoothquant", bits=3, smooth=False), make("smoothquant", bits=6, smooth=False)
    both = Plan(((coarse, (0,)), (fine, (1,))))
    assert torch.equal(logits(study.model, both, layers=(1,)), logits(study.model, fine, layers=(1,)))


def test_the_final_norm_follows_the_last_block(study):
    one = Plan(((make("nexus", parts=("activation",)), (0,)), (make("nexus"), (1,))))
    state = one.calibrate(study.model, study.tokenizer, TEXTS)
    whole = make("nexus").calibrate(study.model, study.tokenizer, TEXTS)
    assert {key for key in state if key.startswith("-1.")} == {key for key in whole if key.startswith("-1.")} != set()


def test_bad_plans_are_refused_in_one_line(study, tmp_path):
    teal = make("teal", prompt="all", thresholds="paper")
    with pytest.raises(ValueError, match=r"plan: layers \[1\] are not valid"):
        Plan(((teal, (0, 1)), (make("cats"), (1,))))
    with pytest.raises(ValueError, match=r"layers \[7\] are not valid; this model has layers 0 to 1"):
        logits(study.model, Plan(((teal, (0, 7)),)))
    with pytest.raises(ValueError, match="needs calibration"):
        logits(study.model, Plan(((make("teal"), (0,)),)))
    path = tmp_path / "plan.json"
    for text, message in (
        ('{"groups": [{"technique": "teal"}]}', "every group needs"),
        ('{"groups": [{"technique": "tael", "settings": {}, "layers": [0]}]}', "unknown technique 'tael'"),
        ('{"groups": [{"technique": "teal", "settings": {"x": 1}, "layers": [0]}]}', "unknown setting x"),
        ("[]", "not a plan"),
        ("{", "is not JSON"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message) as error:
            plan.load(path)
        assert "\n" not in str(error.value)


def test_replies_of_a_plan_are_stored_by_its_contents_and_the_code_of_its_techniques(study, monkeypatch):
    one, other = (Plan(((make("teal", sparsity=s), (0,)), (make("teal"), (1,)))) for s in (0.6, 0.7))
    assert study.key(one, None) != study.key(other, None)
    seen = []
    monkeypatch.setattr("lib.experiment.source_hash", lambda *names: seen.extend(names) or "")
    study.key(one, None)
    assert {"lib.approximations.teal", "lib.approximations.plan", "lib.calibration"} <= set(seen)


# ------------------------------------------------------------------ savings


def test_savings_are_those_of_the_whole_model(study):
    body = anatomy(study.model)
    groups = savings.layer_groups(len(body.blocks), 2)
    teal = savings.ladder(body, make("teal"), groups, (0.4, 0.8))
    assert teal.level((1, 2)) == pytest.approx(0.6) and teal.level((2, 2)) == pytest.approx(0.8)
    quant = savings.ladder(body, make("smoothquant"), groups, (8, 4))
    assert quant.level((0, 0)) == 16 and quant.level((1, 2)) == pytest.approx(6) and quant.saving((1, 2)) == 10
    bolt = savings.ladder(body, make("bolt"), groups, (("softmax",), ("softmax", "norm", "activation")))
    assert bolt.level((2, 2)) == pytest.approx(1)
    assert bolt.level((1, 0)) == pytest.approx(1 / 9)  # of 2 x (activation, softmax, 2 norms) + 1 norm
    assert bolt.level((0, 2)) == pytest.approx(5 / 9)
    block = body.blocks[0]
    sizes = {name: block.projections[name].weight.numel() for name in block.projections}
    cats = savings.ladder(body, make("cats"), groups, (0.5,))
    assert cats.level((1, 1)) == pytest.approx(0.5 * (sizes["up"] + sizes["down"]) / sum(sizes.values()))


def test_placements_become_the_technique_itself_or_a_plan(study):
    ladder = savings.ladder(anatomy(study.model), make("teal"), ((0,), (1,)), (0.4, 0.8))
    assert ladder.technique((0, 0)) is None and ladder.technique((2, 2)) == make("teal", sparsity=0.8)
    assert ladder.plan((2, 2)) == Plan(((make("teal", sparsity=0.8), (0, 1)),))
    assert ladder.technique((2, 0)) == Plan(((make("teal", sparsity=0.8), (0,)),))


@pytest.mark.parametrize(
    ("technique", "groups", "levels", "message"),
    [
        (make("gaussian"), 2, None, "gaussian has no level that saves anything; choose a technique of spars"),
        (make("teal"), 3, None, "3 layer groups are not valid; this model's 2 layers make 1 to 2"),
        (make("teal"), 0, None, "0 layer groups are not valid"),
        (make("teal"), 2, (), r"teal: levels \[\] are not valid"),
        (make("smoothquant"), 2, (4, 8), "must save more"),
        (make("teal"), 2, (0.5, 1.5), "sparsity=1.5 is not valid"),
    ],
)
def test_a_ladder_that_cannot_be_built_says_why(study, technique, groups, levels, message):
    with pytest.raises(ChoiceError, match=message):
        placement.ladder(study, technique, groups, levels)


def test_a_mixture_has_no_sparsity_of_a_part():
    body = anatomy(random_model("mixtral"))
    assert savings.ladder(body, make("teal"), ((0,),), (0.5,)).level((1,)) == pytest.approx(0.5 / len(body.blocks))
    with pytest.raises(ValueError, match="mixture of experts is not defined"):
        savings.ladder(body, make("cats"), ((0,),), (0.5,))


# ------------------------------------------------------------------ search


def toy_ladder(study, levels=(0.25, 0.5, 0.75)):
    return savings.ladder(anatomy(study.model), make("teal"), ((0,), (1,)), levels)


def test_the_path_trades_damage_for_savings(study):
    ladder = toy_ladder(study)
    damage = np.array([[0, 1.0, 4.0, np.inf], [0, 0.1, 0.2, 0.3]])  # the first group is dear
    found = placement.path(ladder, damage)
    assert found == [(0, 0), (0, 3), (1, 3), (2, 3)] or found == [(0, 3), (1, 3), (2, 3)]
    everything = [(a, b) for a in range(3) for b in range(4)]
    for chosen in found:  # nothing does less damage and saves as much
        cost = damage[0, chosen[0]] + damage[1, chosen[1]]
        assert not any(
            damage[0, a] + damage[1, b] < cost - 1e-9 and ladder.saving((a, b)) >= ladder.saving(chosen) - 1e-9
            for a, b in everything
        )


@pytest.mark.filterwarnings("error")
def test_the_climb_passes_over_rungs_of_infinite_damage(study, monkeypatch):
    monkeypatch.setattr(placement.Search, "safe", lambda self, tried: self.rows.setdefault(tried, {}) is not None)
    found = placement.Search(study, toy_ladder(study))
    assert found.climb((0, 0), np.array([[0, 1.0, np.inf, np.inf], [0, 0.1, 0.2, 0.3]])) == (1, 3)


def test_the_climb_raises_first_what_costs_least_per_saving(study, monkeypatch):
    tried = []
    monkeypatch.setattr(placement.Search, "safe", lambda self, chosen: tried.append(chosen))
    found = placement.Search(study, toy_ladder(study, (0.1, 0.9)))
    found.climb((0, 1), np.array([[0, 1.0, 9.0], [0, 0.5, 2.5]]))  # 1 for 0.05 more, or 2 for 0.4 more
    assert tried == [(0, 2), (1, 1)]


def test_the_tolerance_bounds_every_criterion(study, monkeypatch):
    worse = statistics.paired_difference([0] * 200, [1] * 16 + [0] * 184)
    monkeypatch.setattr(placement, "paired", lambda row: dict.fromkeys(("asr", "over-refusal", "broken"), worse))
    ladder = toy_ladder(study)
    rows = [placement.measured(study, ladder, (0, 0), tolerance) for tolerance in (0.05, 0.15)]
    assert [row["decision"] for row in rows] == ["undecided", "re-validated"]
    assert rows[0]["unmet"] == "asr; over-refusal; broken" and rows[0]["over_refusal_increase"] == worse.difference


def test_bisection_asks_little_and_never_about_0():
    for last in range(9):
        asked = []
        assert placement.last_safe(8, lambda i, last=last, asked=asked: asked.append(i) or i <= last) == last
        assert len(asked) <= 4 and 0 not in asked


@pytest.fixture
def judged(study, monkeypatch):
    """A study whose placements are safe up to a weighted sum of rungs, and the placements it was asked about."""
    asked, weights, limit = [], (3, 1), 6

    def measured(study, ladder, chosen, tolerance):
        asked.append(chosen)
        safe = np.dot(weights, chosen) <= limit
        return {"rungs": json.dumps(chosen), "decision": statistics.DECISIONS[0 if safe else 2]}

    exact = pd.DataFrame({"label": ["harmful", "harmless"], "verdict": ["refused", "complied"]})
    monkeypatch.setattr(placement, "measured", measured)
    monkeypatch.setattr(type(study), "run", lambda self: exact)
    slopes = np.array(weights)[:, None] * np.arange(4)
    monkeypatch.setattr(placement, "screen", lambda study, ladder: slopes.astype(float))
    return study, asked, exact


def test_the_search_beats_uniform_and_keeps_what_is_safe(judged):
    study, asked, _ = judged
    ladder = toy_ladder(study)
    found = placement.search(study, ladder)
    assert found.uniform == (1, 1) and found.placed == (1, 3)
    assert ladder.saving(found.placed) > ladder.saving(found.uniform)
    assert len(asked) == len(set(asked)) == len(found.rows) and (0, 0) not in asked
    refused = [chosen for chosen, row in found.rows.items() if not row["safe"]]
    for place, chosen in enumerate(asked):  # nothing above what was refused before
        earlier = [tried for tried in refused if asked.index(tried) < place]
        assert not any(np.greater_equal(chosen, tried).all() for tried in earlier)


def test_what_saves_less_than_uniform_is_no_start_of_the_climb(judged, monkeypatch):
    study, *_ = judged
    monkeypatch.setattr(placement, "path", lambda *_: [(1, 0), (3, 3)])
    assert placement.search(study, toy_ladder(study), budget=1).placed == (1, 1)


def test_settings_of_techniques_are_checked():
    chosen = placement.chosen(["teal", "cats"], {"teal": {"prompt": "all"}, "bolt": {"fraction_bits": 8}})
    assert chosen == {"teal": make("teal", prompt="all"), "cats": make("cats")}
    for names, settings, line in (
        (["teal"], {"teel": {}}, "settings: unknown technique 'teel'; choose among iron"),
        (["teal"], {"teal": 3}, "settings: teal cannot have 3"),
        (["teal"], {"teal": {"promt": "all"}}, "promt"),
        (["teel"], {}, "unknown technique 'teel'"),
        ([], {}, "techniques is empty"),
    ):
        with pytest.raises(ChoiceError, match=line):
            placement.chosen(names, settings)


def test_the_search_stops_at_its_budget_and_where_nothing_is_refused(judged):
    study, asked, exact = judged
    for tolerance in (5, 0):  # points, or nothing
        with pytest.raises(ChoiceError, match=f"tolerance cannot be {tolerance}; give a share"):
            placement.search(study, toy_ladder(study), tolerance)
    with pytest.raises(ChoiceError, match="budget cannot be 0"):
        placement.search(study, toy_ladder(study), 0.05, 0)
    with pytest.raises(ChoiceError, match="n_prompts cannot be -1"):
        placement.searching(study, -1)
    placement.search(study, toy_ladder(study), budget=1)
    spent = len(asked)
    assert spent <= 4  # the bisections, and no climb
    exact["verdict"] = "complied"
    with pytest.raises(ChoiceError, match="tiny refuses none of 6 harmful requests: it has no safety to keep"):
        placement.search(study, toy_ladder(study))
    assert len(asked) == spent


def test_the_screen_is_zero_for_exact_grows_with_the_level_and_is_stored(study, monkeypatch):
    study.prompts[9:] = [replace(prompt, label="confusable") for prompt in study.prompts[9:]]
    ladder = toy_ladder(study, (0.3, 0.9))
    damage = placement.screen(study, ladder)
    assert (damage[:, 0] == 0).all() and damage[:, 2].sum() > np.abs(damage[:, 1]).sum()
    assert damage[0, 2] != damage[1, 2]
    replies = study.replies()
    losses = [placement.utility.reply_losses(study.model, study.tokenizer, [p.prompt for p in rows], given, "chat")
              for rows, given in ((study.prompts[:6], replies[:6]), (study.prompts[6:], replies[6:]))]
    assert placement.reply_nll(study) == pytest.approx(np.mean([s.sum() / n.sum() for s, n in losses]))
    monkeypatch.setattr(placement.utility, "reply_losses", lambda *_: pytest.fail("measured again"))
    assert np.array_equal(placement.screen(study, ladder), damage)


def test_operations_are_added_by_the_damage_they_do(study, monkeypatch):
    harm = {"activation": 2.0, "softmax": 3.0, "norm": 1.0}
    monkeypatch.setattr(placement, "reply_nll", lambda study, technique: harm[technique.parts[0]])
    found = placement.nested_operations(study, make("bolt"))
    assert found == [("norm",), ("norm", "activation"), ("norm", "activation", "softmax")]


def test_a_measured_row_holds_the_paired_changes_and_their_decision(study, tmp_path):
    ladder = toy_ladder(study, (0.3, 0.9))
    found = placement.Search(study, ladder, uniform=(0, 0), placed=(2, 1))
    table = placement.validate(study, found)
    assert table["placement"].tolist() == ["uniform", "placed"] and (table["technique"] == "teal").all()
    assert table["level"].tolist() == pytest.approx([0.0, 0.6])
    exact, changed = study.run(), study.run(ladder.technique((2, 1)))
    broken = [(rows["verdict"] == "broken").mean() for rows in (exact, changed)]
    assert table["broken_increase"].tolist() == pytest.approx([0.0, broken[1] - broken[0]])
    assert (table["decision"] == "undecided").all() and (table["asr_increase_high"] > 0.05).all()  # six prompts
    path = placement.save(found, table)
    assert placement.save(replace(found, study=study.brief(4)), table) != path  # another search keeps its own plan
    fewer = placement.validate(study.brief(4), found)
    assert placement.save(found, fewer) != path  # and so does a validation on other sealed prompts
    assert json.loads(path.read_text())["sealed"]["n_harmful"] == 6
    written = json.loads(path.read_text())
    assert plan.load(path) == ladder.plan((2, 1)) and written["sealed"]["decision"] == "undecided"
    same = placement.validate(study, replace(found, placed=(0, 0)))  # nothing gained: one row for each all the same
    assert same["label"].tolist() == ["teal uniform", "teal placed"]
    row = placement.gain(found, table)
    assert row["gain"] == pytest.approx(0.6) and row["n sealed"] == 12
    bits = savings.ladder(anatomy(study.model), make("smoothquant"), ((0,), (1,)), (8, 4))
    fewer = placement.gain(replace(found, ladder=bits, uniform=(1, 1)), table)
    assert fewer["gain"] == 2  # from 8 to a mean of 6
    levels = placement.layer_levels(found)
    assert levels[levels["placement"] == "placed"]["level"].tolist() == [0.9, 0.3]


def test_sealed_prompts_are_decided_by_the_tolerance_of_the_search(study, monkeypatch):
    monkeypatch.setattr(placement, "measured", lambda *given: {"technique": "teal", "tolerance": given[3]})
    found = placement.Search(study, toy_ladder(study), tolerance=0.2, uniform=(1, 1), placed=(2, 1))
    assert placement.validate(study, found)["tolerance"].tolist() == [0.2, 0.2]


def test_a_placement_that_fails_on_sealed_prompts_was_asked_as_many(study, monkeypatch):
    ladder = toy_ladder(study, (0.3, 0.9))
    run, placed = type(study).run, ladder.technique((2, 1))

    def failing(self, technique=None, layers=None):
        result = run(self)
        result.attrs = {**result.attrs, "failed": "NaN at layer 0" if technique == placed else ""}
        return result

    monkeypatch.setattr(type(study), "run", failing)
    found = placement.Search(study, ladder, uniform=(0, 0), placed=(2, 1))
    table = placement.validate(study, found)
    assert table[["decision", "unmet"]].iloc[1].tolist() == ["not re-validated", "failed"]
    assert placement.gain(found, table)["n sealed"] == 12


# ------------------------------------------------------------------ prompts and pictures


def test_sealed_requests_are_fresh_and_as_many_as_asked(study):
    found = placement.sealed(study, 1200)
    labels = [prompt.label for prompt in found.prompts]
    assert {label: labels.count(label) for label in set(labels)} == {"harmful": 600, "harmless": 300, "confusable": 300}
    assert len({prompt.prompt for prompt in found.prompts}) > 1190 and len({p.id for p in found.prompts}) == 1200
    goals = {prompt.goal for prompt in found.prompts}
    for split in ("train", "dev", "search", "test"):
        assert not goals & {request.goal for request in corpus.requests(split)}
    few = [placement.sealed(study, 40, seal) for seal in (1, 2)]
    first, second = ({prompt.goal for prompt in one.prompts} for one in few)
    assert len(first) == len(second) == 40 and not first & second and few[1].split == "seal-2"
    assert len(placement.sealed(study, 4).prompts) == 4
    for n, message in ((100_000, "seal 1 holds"), (3, "3 sealed requests are too few: 4 at least")):
        with pytest.raises(ChoiceError, match=message):
            placement.sealed(study, n)


def test_the_search_asks_every_goal_once_before_any_twice(study):
    searched = placement.searching(study, 40)
    assert {p.split for p in searched.prompts} == {"search"} and len(searched.prompts) == 80
    assert len({p.goal for p in searched.prompts}) == 80


def frontier_table() -> pd.DataFrame:
    rows = []
    for technique, levels, name in (("teal", (0.4, 0.6), "model-wide sparsity"),
                                    ("smoothquant", (8, 4), "mean activation bits")):
        for kind in ("uniform", "placed"):
            for level, stage in ((levels[0], "search"), (levels[1], "search"), (levels[0], "sealed")):
                row = {"technique": technique, "placement": kind, "stage": stage, "level": level, "failed": ""}
                for criterion in placement_plots.CRITERIA:
                    row |= {f"{criterion}_increase{end}": v for end, v in (("", 0.1), ("_low", 0.0), ("_high", 0.4))}
                rows.append(row | {"level_name": name})
    return pd.DataFrame(rows)


def test_the_frontier_shows_both_placements_and_turns_bits_around():
    figure = placement_plots.frontier(frontier_table(), 0.05)
    assert len(figure.axes) == 6 and tuple(placement_plots.CRITERIA) == placement.CRITERIA
    assert [ax.xaxis_inverted() for ax in figure.axes] == [False] * 3 + [True] * 3
    assert all(ax.get_ylim()[1] < 21 for ax in figure.axes)


def test_the_frontier_shows_its_tolerance_and_marks_what_lies_beyond_its_edges():
    table = frontier_table()
    table[[name for name in table if name.endswith("_increase")]] = [[-0.4] * 3, [0.9] * 3, [0.1] * 3] * 4
    for tolerance in (0.05, 0.3):
        for ax in placement_plots.frontier(table, tolerance).axes:
            low, high = ax.get_ylim()
            assert low < -60 * tolerance and high > 100 * tolerance
            marks = {line.get_marker(): list(line.get_ydata()) for line in ax.lines if len(line.get_ydata())}
            assert marks["v"] == pytest.approx([low]) and marks["^"] == pytest.approx([high])


def test_levels_are_drawn_per_layer():
    rows = [{"technique": "smoothquant", "setting": "bits", "placement": kind, "layer": layer, "level": 8.0 - layer}
            for kind in ("uniform", "placed") for layer in range(4)]
    figure = placement_plots.layer_levels(pd.DataFrame(rows))
    assert len(figure.axes) == 1 and figure.axes[0].yaxis_inverted() and len(figure.axes[0].lines) == 2
