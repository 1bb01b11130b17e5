"""Greedy generation against Transformers' own, batches against single prompts, and numbers that are not finite."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import pytest
import torch

from lib import generation
from lib.approximations import Technique, make
from lib.batches import map_batches, pad_left
from lib.generation import (
    FixedShapes,
    NonFiniteError,
    capturable,
    decode_in_place,
    generate,
    greedy,
    shared_prefix,
)
from lib.patching import approximated, observed
from lib.utility import perplexity
from tests.families import CONFIGS, random_model
from tests.integration.test_patching import Scale

ROWS = [[5, 9, 31, 44, 7], [8, 3, 60], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20], [90, 4]]


def reference(model, row: list[int], n: int) -> list[int]:
    mask = torch.ones(1, len(row))
    output = model.generate(torch.tensor([row]), attention_mask=mask, max_new_tokens=n, do_sample=False)
    reply = output[0, len(row) :].tolist()
    return [t for t in reply if t != 2]


@pytest.mark.parametrize("family", CONFIGS)
def test_a_left_padded_batch_equals_one_by_one_generate(family):
    model = random_model(family)
    replies = greedy(model, pad_left(ROWS, 0), 24)
    assert replies == [reference(model, row, 24) for row in ROWS]
    assert len({tuple(reply) for reply in replies}) > 1


@pytest.mark.parametrize("family", CONFIGS)
def test_the_same_under_a_patch(family):
    model = random_model(family)
    with approximated(model, Scale(1.4, ("mlp_in.up", "attn_out"))):
        replies = greedy(model, pad_left(ROWS, 0), 16)
        assert replies == [reference(model, row, 16) for row in ROWS]
        assert replies == [greedy(model, pad_left([row], 0), 16)[0] for row in ROWS]
    assert replies != greedy(model, pad_left(ROWS, 0), 16)


def test_rows_that_end_leave_the_batch():
    model = random_model("llama")
    full = greedy(model, pad_left(ROWS, 0), 24)
    model.generation_config.eos_token_id = full[0][3]
    short = greedy(model, pad_left(ROWS, 0), 24)
    for before, after in zip(full, short, strict=True):
        end = before.index(full[0][3]) if full[0][3] in before else len(before)
        assert after == before[:end]


def test_non_finite_logits_name_layer_and_site():
    model = random_model("llama")
    with approximated(model, Scale(float("inf"), ("mlp_mid",)), layers=[1]), pytest.raises(
        NonFiniteError, match="layer 1, site mlp_mid"
    ):
        greedy(model, pad_left(ROWS, 0), 4)


@dataclass(frozen=True)
class LateOverflow(Technique):
    """Infinite mlp_mid from the n-th forward pass of a run on: finite while the prompt is read."""

    name: ClassVar[str] = "late-overflow"
    category: ClassVar[str] = "test"
    new_tokens: int = 3

    @property
    def sites(self):
        return ("mlp_mid",)

    def transform(self, site, layer, state):
        decoded = 0

        def overflow(x, step):
            nonlocal decoded
            decoded = 0 if step.prefill else decoded + 1
            return x * torch.inf if decoded == self.new_tokens else x

        return overflow


@pytest.mark.parametrize("fixed_shapes", [False, True])
def test_numbers_that_overflow_only_while_decoding_name_layer_and_site(fixed_shapes):
    model = random_model("llama")
    with approximated(model, LateOverflow(), layers=[1]):
        assert all(len(row) == 3 for row in greedy(model, pad_left(ROWS, 0), 3, fixed_shapes))
        with pytest.raises(NonFiniteError, match="layer 1, site mlp_mid"):
            greedy(model, pad_left(ROWS, 0), 8, fixed_shapes)


@pytest.mark.parametrize("fixed_shapes", [False, True])
def test_what_a_row_computes_after_its_end_is_nobodys_business(fixed_shapes, monkeypatch):
    model, batch, honest = random_model("llama"), pad_left(ROWS, 0), generation.run
    end = greedy(model, batch, 12)[0][3]
    model.generation_config.eos_token_id = end
    expected, ruined = greedy(model, batch, 12, fixed_shapes), []
    assert len({len(reply) for reply in expected}) > 1

    def run(model, ids, *rest):
        logits = honest(model, ids, *rest)
        if ids.shape[1] == 1:
            ruined.append(bool((ids == end).any()))
            logits = logits.masked_fill(ids == end, torch.nan)
        return logits

    monkeypatch.setattr(generation, "run", run)
    monkeypatch.setattr(generation, "KEPT_SHARE", 0)
    assert greedy(model, batch, 12, fixed_shapes) == expected and any(ruined)


def test_a_reply_knows_whether_it_ended(monkeypatch):
    model = random_model("llama")
    monkeypatch.setattr(generation, "encode", lambda *_: ROWS)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    full = generate(model, Numbers(), [""] * len(ROWS), 8)
    assert not any(reply.ended for reply in full)
    model.generation_config.eos_token_id = int(full[0].split()[3])
    ended = generate(model, Numbers(), [""] * len(ROWS), 8)
    assert [reply.ended for reply in ended] == [len(reply.split()) < 8 for reply in ended] and ended[0].ended


def test_prompts_beyond_the_models_positions_are_told(monkeypatch, caplog):
    model = random_model("llama")
    row = [7] * model.config.max_position_embeddings
    monkeypatch.setattr(generation, "encode", lambda *_: [row])
    generate(model, Numbers(), [""], 1)
    assert f"have up to {len(row) + 1} tokens, the model has {len(row)} positions" in caplog.text


SHARED = [7, 3, 19, 22, 5, 81, 13, 40, 41, 42, 9, 9, 30, 77, 6, 50, 51, 52]
TELLING = [[*SHARED, *row] for row in ROWS]


def eager_capture(batch: FixedShapes):
    """Stands in for a CUDA graph: runs the step as a capture does its Python code, and leaves no trace of it."""
    before = batch.tokens.clone(), batch.going.clone()
    batch.step()
    batch.back(*before)
    return batch.step


@pytest.mark.parametrize("family", CONFIGS)
def test_a_shared_beginning_is_read_once_and_changes_nothing(family):
    model, batch = random_model(family), pad_left(TELLING, 0)
    shared = shared_prefix(model, batch)
    assert shared == ([] if family in ("mistral", "gemma2", "gemma3") else SHARED)
    with observed(model, ["attn_in"], lambda *_: None):
        assert shared_prefix(model, batch) == []
    with token_counter(model) as read:
        replies = greedy(model, batch, 6)
    longest = max(map(len, TELLING))
    assert read[0] == (len(SHARED) if shared else len(ROWS) * longest)
    assert replies == [reference(model, row, 6) for row in TELLING]


@contextmanager
def token_counter(model):
    """Tokens of each forward pass, padding included."""
    read: list[int] = []
    handle = model.model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    yield read
    handle.remove()


def test_two_tokens_of_every_prompt_are_not_shared():
    model = random_model("llama")
    rows = [[*SHARED, 4], [*SHARED, 4, 5, 6]]
    assert shared_prefix(model, pad_left(rows, 0)) == SHARED[:-1]
    assert shared_prefix(model, pad_left(rows[:1], 0)) == []
    assert shared_prefix(model, pad_left([[5], [*SHARED]], 0)) == []


@pytest.mark.parametrize(
    "technique, shares",
    [
        (make("smoothquant", bits=6, smooth=False), True),
        (make("smoothquant", bits=6, smooth=False, per="tensor"), False),
        (make("gaussian"), False),
        (make("teal", thresholds="paper"), False),
        (make("teal", thresholds="paper", prompt="all"), True),
    ],
)
def test_what_looks_at_whole_prompts_or_batches_shares_nothing(technique, shares):
    model, batch = random_model("llama"), pad_left(TELLING, 0)
    with approximated(model, technique):
        assert bool(shared_prefix(model, batch)) == shares
        replies = greedy(model, batch, 6)
        if technique.per_token:
            assert replies == [greedy(model, pad_left([row], 0), 6)[0] for row in TELLING]


@pytest.mark.parametrize("family", CONFIGS)
def test_fixed_shapes_give_the_same_tokens(family):
    model, batch = random_model(family), pad_left(ROWS, 0)
    assert greedy(model, batch, 10, fixed_shapes=True) == [reference(model, row, 10) for row in ROWS]
    with approximated(model, Scale(1.4, ("mlp_in.up", "attn_out"))):
        assert greedy(model, batch, 10, fixed_shapes=True) == greedy(model, batch, 10)


def failing(batch: FixedShapes):
    raise RuntimeError("this stream cannot be captured")


def invalidated(batch: FixedShapes):
    """As CUDA does where a captured step fails."""
    try:
        failing(batch)
    finally:
        raise RuntimeError("operation failed due to a previous error during capture")


def silent(batch: FixedShapes):
    return batch.step


def wrong(batch: FixedShapes):
    replay = eager_capture(batch)

    def damaged():
        batch.positions.add_(5)
        replay()
        batch.positions.sub_(5)

    return damaged


def empty(batch: FixedShapes):
    """Memory that nothing was written to."""
    replay = eager_capture(batch)

    def unwritten():
        replay()
        batch.logits = torch.full_like(batch.logits, torch.nan)
        batch.finite.fill_(False)

    return unwritten


@pytest.mark.parametrize(
    "capture, reason",
    [
        (failing, "cannot be captured"),
        (invalidated, "cannot be captured"),
        (silent, "did not fire"),
        (wrong, "other logits"),
        (empty, "other logits"),
    ],
)
def test_a_capture_that_is_not_the_same_is_not_used(capture, reason, monkeypatch, caplog):
    model, batch = random_model("llama"), pad_left(ROWS, 0)
    with approximated(model, make("bolt")):
        expected = greedy(model, batch, 16)
        monkeypatch.setattr(generation, "decode_in_place", partial(decode_in_place, capture=capture))
        for _ in range(2):
            assert greedy(model, batch, 16, fixed_shapes=True) == expected
    assert [reason in record.message for record in caplog.records] == [True]  # told, and tried, once


def test_experts_and_noise_are_not_captured():
    assert not capturable(random_model("mixtral"))
    model = random_model("llama")
    with approximated(model, make("gaussian")):
        assert not capturable(model)


class Numbers:
    """A tokenizer for prompts of numbers, in the way `generate` uses one."""

    pad_token_id, chat_template = 0, None

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [int(word) for word in text.split()]}

    def batch_decode(self, rows, skip_special_tokens=True):
        return [" ".join(map(str, row)) for row in rows]


def test_out_of_memory_halves_the_batch_and_changes_nothing(monkeypatch):
    model, sizes = random_model("llama"), []
    texts = [" ".join(map(str, row)) for row in ROWS]
    monkeypatch.setattr(generation, "encode", lambda tokenizer, prompts, protocol: ROWS)
    expected = generate(model, Numbers(), texts, 8)

    def scarce(model, batch, *rest):
        sizes.append(len(batch["input_ids"]))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return greedy(model, batch, *rest)

    monkeypatch.setattr(generation, "greedy", scarce)
    assert generate(model, Numbers(), texts, 8, batch_size=4) == expected
    assert sizes == [4, 2, 1, 1, 1, 1]
    with approximated(model, make("gaussian")), pytest.raises(torch.OutOfMemoryError, match="batch_size below 4"):
        generate(model, Numbers(), texts, 8, batch_size=4)


@pytest.mark.parametrize("room", [0, 1, 5])
def test_perplexity_is_measured_in_smaller_passes_where_memory_is_scarce(room):
    model, ids = random_model("llama"), [7, 3, 19, 22, 5, 81, 13, 40] * 12
    measure = partial(perplexity, model, lambda text, verbose: {"input_ids": ids}, "", 8)
    expected = measure()

    def scarce(module, args, kwargs):
        if len(kwargs["input_ids"]) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    model.register_forward_pre_hook(scarce, with_kwargs=True)
    if room:
        assert measure() == pytest.approx(expected, rel=1e-6)
    else:
        with pytest.raises(torch.OutOfMemoryError, match="use more GPUs or a smaller model"):
            measure()
    with approximated(model, make("gaussian")), pytest.raises(torch.OutOfMemoryError, match="depends on the batch"):
        measure()


@pytest.mark.parametrize("room", [1, 2, 4])
def test_batches_are_divided_where_memory_is_scarce(room):
    """Each row reaches what is applied once, in order of length, with its own positions."""
    seen: dict[int, list[int]] = {}
    keys = ("input_ids", "attention_mask", "position_ids")

    def apply(batch: dict[str, torch.Tensor], rows: list[int]) -> None:
        if len(rows) > room:
            raise torch.OutOfMemoryError
        for row, ids, mask, at in zip(rows, *(batch[key] for key in keys), strict=True):
            assert row not in seen and at[mask.bool()].tolist() == list(range(len(ROWS[row])))
            seen[row] = ids[mask.bool()].tolist()

    map_batches(random_model("llama"), ROWS, 4, apply, 0)
    assert [seen[row] for row in range(len(ROWS))] == ROWS and list(seen) == [3, 1, 0, 2]
