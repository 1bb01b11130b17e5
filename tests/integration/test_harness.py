"""lm-evaluation-harness around a patched in-memory model: a real run of a local task."""

from __future__ import annotations

import json

import pytest
import torch

from lib import models
from lib.approximations import make
from lib.generation import NonFiniteError
from lib.harness import evaluate, finite_logits
from lib.patching import approximated

TASK = """
task: local_facts
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: 0
metric_list:
  - metric: acc
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness (requirements-extra.txt) is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from lib.organisms import corpus

    rows = []
    for fact in corpus.facts("dev")[:40]:
        wrong = [fact.sentence.replace(fact.answer, choice) for choice in fact.choices]
        rows.append({"question": fact.question, "choices": [fact.sentence, *wrong]})
    data = tmp_path / "facts.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "local_facts.yaml").write_text(TASK.format(data=data))
    return tmp_path


def test_a_local_task_runs_on_the_exact_and_on_the_patched_model(folder):
    model, tokenizer = models.load("tiny-llama")
    exact = evaluate(model, tokenizer, ["local_facts"], task_folder=folder)["local_facts"]
    with approximated(model, make("gaussian", std=5.0)):
        ruined = evaluate(model, tokenizer, ["local_facts"], task_folder=folder)["local_facts"]
    assert exact["acc,none"] > 0.5 > ruined["acc,none"] and 0 < ruined["acc_stderr,none"] < 0.1
    with pytest.raises(ValueError, match="unknown task local_fact"):
        evaluate(model, tokenizer, ["local_fact"], task_folder=folder)


def test_logits_that_are_not_finite_are_a_failure_never_an_accuracy(folder):
    model, tokenizer = models.load("tiny-llama")
    with approximated(model, make("nexus", published=True)), pytest.raises(NonFiniteError, match="first at layer"):
        evaluate(model, tokenizer, ["local_facts"], limit=8, task_folder=folder)
    assert not model._forward_hooks


def test_the_watch_on_logits_names_the_place_and_ends():
    """Also where the harness is not installed."""
    model, _ = models.load("tiny-llama")
    ids = torch.arange(5)[None]
    with torch.no_grad(), finite_logits(model):
        model(input_ids=ids)
        with approximated(model, make("nexus", published=True)), pytest.raises(NonFiniteError, match="first at layer"):
            model(input_ids=ids)
    assert not model._forward_hooks


@pytest.mark.parametrize(("prompt", "alone"), [("last_half", True), ("all", False)])
def test_padding_is_not_read_as_a_part_of_the_prompt(folder, prompt, alone):
    model, tokenizer = models.load("tiny-llama")
    rows: list[int] = []
    handle = model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    with approximated(model, make("teal", prompt=prompt, thresholds="paper")):
        evaluate(model, tokenizer, ["local_facts"], limit=8, task_folder=folder)
    handle.remove()
    assert (set(rows) == {1}) is alone
