"""Attacks: templates and files, judged beside the plain request, verdicts stored and replies not; GCG by nanogcg."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lib import attack_search
from lib.approximations import make
from lib.errors import ChoiceError, PlainError
from lib.prompts import Attack, render
from tests.tiny_study import tiny_study


@pytest.fixture
def study(tmp_path):
    return tiny_study(tmp_path)


def requests(study):
    return [study.prompts[i] for i in study.rows("harmful")]


def test_every_template_holds_the_request_and_files_join_them(tmp_path):
    for attack in attack_search.TEMPLATES:
        assert attack.template.count("{prompt}") == 1
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"id": "tail", "suffix": "now, please"}) + "\n")
    found = attack_search.chosen_attacks([file])
    assert [attack.id for attack in found] == ["opening", "role", "no-refusal", "tail"]
    file.write_text(json.dumps({"id": "role", "suffix": "x"}))
    with pytest.raises(ChoiceError, match="several attacks have the id role"):
        attack_search.chosen_attacks([file])
    for reserved in attack_search.RESERVED:
        file.write_text(json.dumps({"id": reserved, "suffix": "x"}))
        with pytest.raises(ChoiceError, match=f"several attacks have the id {reserved}"):
            attack_search.chosen_attacks([file])
    with pytest.raises(ChoiceError, match=r"there is no file .*missing\.jsonl"):
        attack_search.chosen_attacks([tmp_path / "missing.jsonl"])


def test_replies_to_attacked_texts_are_judged_beside_the_plain_request(study, monkeypatch):
    asked, texts = [], []

    def reply(model, tokenizer, prompts, *_):
        texts.extend(prompts)
        return ["I cannot help with that."] * len(prompts)

    judge = type(study).judge
    monkeypatch.setattr(attack_search, "generate", reply)
    monkeypatch.setattr(type(study), "judge", lambda self, p, r: asked.extend(p) or judge(self, p, r))
    harmful = requests(study)[:3]
    table = attack_search.success({"exact": (study, None)}, harmful, [Attack("a", "Well: {prompt}")])
    assert texts == [p.prompt for p in harmful] + [f"Well: {p.prompt}" for p in harmful]
    assert asked == [p.prompt for p in harmful] * 2
    assert table["attack"].tolist() == ["none", "a"] and table["refused_rate"].tolist() == [1, 1]


def test_verdicts_are_stored_and_replies_are_not(study, monkeypatch):
    rounding = make("smoothquant", bits=3, smooth=False)
    targets = {"exact": (study, None), "approximated": (study, rounding)}
    suffixes = {requests(study)[1].id: Attack("own", "{prompt} zz")}
    attacks = attack_search.TEMPLATES[:1]
    table = attack_search.success(targets, requests(study), attacks, suffixes)
    assert table["n_harmful"].tolist() == [6, 6, 6, 6, 1, 1] and table["attack"].tolist()[-1] == "gcg"
    assert not (study.store.folder / "replies").exists()
    monkeypatch.setattr(attack_search, "generate", lambda *_: pytest.fail("generated again"))
    assert attack_search.success(targets, requests(study), attacks, suffixes).equals(table)
    stricter = replace(study, nll_limit=0.5)  # judged anew
    with pytest.raises(pytest.fail.Exception, match="generated again"):
        attack_search.success({"exact": (stricter, None)}, requests(study), [])


def test_verdicts_follow_the_requests_the_judge_and_its_code_whatever_else_the_study_asks(study, monkeypatch):
    written = []

    def reply(model, tokenizer, prompts, *_):
        written.append(len(prompts))
        return ["I cannot help with that."] * len(prompts)

    monkeypatch.setattr(attack_search, "generate", reply)
    asked, texts = requests(study)[:3], ["paint"] * 3
    first = attack_search.verdicts((study, None), asked, texts)
    other = replace(study, prompts=study.prompts[:4])  # another n_prompts
    assert attack_search.verdicts((other, None), asked, texts).equals(first) and written == [3]
    monkeypatch.setenv("APPROX_REJUDGE", "1")
    assert attack_search.verdicts((study, None), asked, texts).equals(first) and written == [3, 3]
    monkeypatch.delenv("APPROX_REJUDGE")
    monkeypatch.setattr(attack_search, "source_hash", lambda *names: f"new code of {names}")
    attack_search.verdicts((study, None), asked, texts)
    assert written == [3, 3, 3]


def test_gcg_asks_for_the_first_sentence_of_the_answer(study):
    request = requests(study)[0]
    for answer in ("Take it.", "Take it. Then rest.", "Take it"):
        assert attack_search.compliant_opening(replace(request, answer=answer)) == "Take it."
    assert attack_search.compliant_opening(request) == attack_search.OPENING


def test_gcg_says_how_to_get_nanogcg(study, monkeypatch):
    monkeypatch.setitem(sys.modules, "nanogcg", None)
    attack_search.check_gcg(0)
    with pytest.raises(PlainError, match="GCG needs nanogcg"):
        attack_search.check_gcg(1)
    with pytest.raises(ChoiceError, match="gcg cannot be -1"):
        attack_search.check_gcg(-1)
    with pytest.raises(PlainError, match=r"requirements-extra\.txt"):
        attack_search.gcg_suffixes(study, requests(study)[:1])


TURNS = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}:{% endfor %}"
NO_SYSTEM = "{{ raise_exception('no') if messages[0]['role'] == 'system' }}"
TEMPLATES = {"with BOS": TURNS, "no system turn": NO_SYSTEM + TURNS, "none": None}


@pytest.mark.parametrize("protocol", ["chat", "quada"])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_gcg_sees_the_prompt_as_evaluation_puts_it_and_is_read_back(study, monkeypatch, template, protocol):
    """A stand-in for nanogcg: it drops the template's BOS and trusts the tokenizer to add it, as nanogcg does."""
    study.tokenizer.chat_template, study.protocol = template, protocol
    seen = []

    def run(model, tokenizer, message, target, config):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
        )
        if tokenizer.bos_token and text.startswith(tokenizer.bos_token):
            text = text.replace(tokenizer.bos_token, "")
        seen.append(tokenizer(text.split("{optim_str}")[0])["input_ids"])
        torch.use_deterministic_algorithms(True, warn_only=True)
        return SimpleNamespace(best_string=f"s{len(seen)}", best_loss=1.0)

    monkeypatch.setitem(sys.modules, "nanogcg", SimpleNamespace(GCGConfig=SimpleNamespace, run=run))
    asked, tokenizer = requests(study)[:2], study.tokenizer
    found = attack_search.gcg_suffixes(study, asked, steps=2, width=4)
    assert {name: attack.template for name, attack in found.items()} == {
        asked[0].id: "{prompt} s1", asked[1].id: "{prompt} s2"
    }  # fmt: skip
    (text,), special = render(tokenizer, [f"{asked[0].prompt} {{optim_str}}"], protocol)
    before = text.split("{optim_str}")[0]
    assert seen[0] == tokenizer(before, add_special_tokens=special)["input_ids"] and asked[0].prompt in before
    assert tokenizer.bos_token == "<s>" and not torch.are_deterministic_algorithms_enabled()
    monkeypatch.setitem(sys.modules, "nanogcg", None)
    assert attack_search.gcg_suffixes(study, asked, steps=2, width=4) == found
    with pytest.raises(PlainError):  # another opening to make likely is another search
        attack_search.gcg_suffixes(study, [replace(asked[0], answer="Take it."), asked[1]], steps=2, width=4)


@pytest.mark.skipif(importlib.util.find_spec("nanogcg") is None, reason="nanogcg, an optional extra, is not installed")
def test_gcg_finds_suffixes(study):
    study.tokenizer.chat_template = "{{ messages[0]['content'] }}:"
    found = attack_search.gcg_suffixes(study, requests(study)[:1], steps=2, width=8)
    assert len(found) == 1
