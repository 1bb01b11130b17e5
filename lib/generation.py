"""Batched greedy replies, always with an attention mask; in fp32 the tokens of `model.generate(do_sample=False)`.

Prompts are sorted by length, padded on the left and decoded together. What a batch's prompts begin with alike is read
once; only the last position's logits are computed; a row leaves the batch when its reply ends. On one GPU decoding
takes place in fixed shapes instead: a static key-value cache, and one step captured as a CUDA graph with whatever
patches are on the model, then replayed. A capture is used only if every patch fired in it and its first replay gives
the logits of an ordinary step; otherwise the ordinary step goes on. No GPU has run this yet: the stand-in of the tests
computes on the CPU and refuses what CUDA refuses, as in a captured step waiting and copies from the host.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import StaticLayer

from lib.anatomy import text_config
from lib.approximations import Technique
from lib.batches import batch_is_free, pad_left, part_by_part, techniques_on
from lib.eager import decoding
from lib.models import fitting_rows
from lib.patching import engaged, first_non_finite
from lib.prompts import encode

log = logging.getLogger(__name__)

CPU_BATCH, GPU_BATCH = 128, 64
KEPT_SHARE = 0.9  # finished rows leave once fewer than this share goes on: leaving copies the key-value cache
SHARED_PREFIX = 16  # tokens: a shorter common beginning is not worth a forward pass of its own
WARM_UP = 3  # ordinary steps before a capture, in which libraries choose and load their kernels
LOOK_EVERY = 8  # steps in fixed shapes between two looks at which rows have ended: each look waits for the GPU
SAME_LOGITS = 0.01  # largest relative distance of a replayed step's logits from an ordinary step's (bf16 rounding)

Replay = Callable[[], None]
UNCAPTURED: WeakKeyDictionary[PreTrainedModel, set[tuple[Technique | None, ...]]] = WeakKeyDictionary()
"""Models with the techniques under which a capture failed: it may leave CUDA in disorder, so it is tried once."""


class NonFiniteError(ArithmeticError):
    """The model's logits became NaN or infinite; the message names the first layer and site where that happened."""


class Reply(str):
    """The text of a reply. ended: whether the model ended it, or it was cut off at the last token allowed."""

    ended: bool

    def __new__(cls, text: str, ended: bool) -> Reply:
        reply = super().__new__(cls, text)
        reply.ended = ended
        return reply


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int = 128,
    protocol: str = "chat",
    batch_size: int | None = None,
    progress: str | None = None,
) -> list[Reply]:
    """Greedy replies, one per prompt, special tokens removed.

    batch_size: None chooses one for the device and its free memory; out of memory halves it, which changes no reply.
    Where a patch makes replies depend on the batch (noise, one step size per tensor), its size is never changed.
    progress: label of a progress bar. Raises NonFiniteError when the (patched) model computes NaN or infinity.
    """
    encoded = encode(tokenizer, prompts, protocol)
    order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i]), i))
    free, most = batch_is_free(model), CPU_BATCH if model.device.type == "cpu" else GPU_BATCH
    longest = max(map(len, encoded), default=0) + max_new_tokens
    positions = getattr(text_config(model), "max_position_embeddings", None) or longest
    if longest > positions:
        log.warning("prompts and replies have up to %d tokens, the model has %d positions", longest, positions)
    size = batch_size or (fitting_rows(model, longest, most) if free else most)
    replies = [Reply("", False)] * len(encoded)
    with tqdm(total=len(order), desc=progress, disable=progress is None, leave=False) as bar:

        def decode(rows: Sequence[int]) -> None:
            tokens = greedy(model, pad_left([encoded[i] for i in rows], tokenizer.pad_token_id), max_new_tokens)
            texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
            for i, text, ids in zip(rows, texts, tokens, strict=True):
                replies[i] = Reply(text.strip(), len(ids) < max_new_tokens)
            bar.update(len(rows))

        part_by_part(model, order, size, decode, f"replies depend on the batch: choose a batch_size below {size}")
    return replies


def end_tokens(model: PreTrainedModel) -> list[int]:
    """Ids that end a reply, from the generation settings, else the configuration."""
    end = model.generation_config.eos_token_id
    end = model.config.eos_token_id if end is None else end
    return list(end) if isinstance(end, list | tuple) else [] if end is None else [end]


@torch.inference_mode()
def greedy(
    model: PreTrainedModel, batch: dict[str, Tensor], max_new_tokens: int, fixed_shapes: bool | None = None
) -> list[list[int]]:
    """The most likely continuation of each left-padded row, up to `max_new_tokens` or an end token (not included).

    fixed_shapes: decode in place, as on a GPU; None: where `capturable` says so. Raises NonFiniteError.
    """
    if fixed_shapes is None:
        fixed_shapes = model.device.type == "cuda" and capturable(model)
    with decoding(model):
        replies = _decode(model, batch, max_new_tokens, fixed_shapes)
        if replies is None:
            raise non_finite(model, batch, lambda: _decode(model, batch, max_new_tokens, fixed_shapes=False))
    ends = set(end_tokens(model))
    lengths = [next((i for i, token in enumerate(reply) if token in ends), len(reply)) for reply in replies]
    return [reply[:length] for reply, length in zip(replies, lengths, strict=True)]


def _decode(
    model: PreTrainedModel, batch: dict[str, Tensor], max_new_tokens: int, fixed_shapes: bool
) -> list[list[int]] | None:
    """Replies with what may follow their end token; None for logits that are not finite."""
    cache = DynamicCache() if fixed_shapes else DynamicCache(config=model.config)
    mask, positions, logits = read_prompts(model, batch, cache)
    if not torch.isfinite(logits).all():
        return None
    decode = decode_in_place if fixed_shapes else decode_shrinking
    return decode(model, cache, mask, positions[:, -1:] + 1, logits.argmax(-1, keepdim=True), max_new_tokens)


def read_prompts(model: PreTrainedModel, batch: dict[str, Tensor], cache: Cache) -> tuple[Tensor, Tensor, Tensor]:
    """Fills the cache; returns (mask of what it holds [batch, slots], positions [batch, new], last logits).

    A common beginning is read once and copied to every row; then padding stands behind it, in the middle of a row.
    """
    ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
    prefix = shared_prefix(model, batch)
    if prefix:
        row = torch.tensor([prefix], device=model.device)
        run(model, row, torch.ones_like(row), torch.arange(len(prefix), device=model.device)[None], cache)
        cache.batch_repeat_interleave(len(ids))
        rows = [line[real.bool()].tolist()[len(prefix) :] for line, real in zip(ids, mask, strict=True)]
        rest = pad_left(rows, 0)
        ids, mask = rest["input_ids"].to(ids.device), rest["attention_mask"].to(ids.device)
        mask = torch.cat([mask.new_ones(len(ids), len(prefix)), mask], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, len(prefix) :]
    return mask, positions, run(model, ids, mask, positions, cache)


def shared_prefix(model: PreTrainedModel, batch: dict[str, Tensor]) -> list[int]:
    """Tokens with which all prompts begin, if they may be read apart: none where windows slide over the padding behind
    them, or where a patch looks at whole prompts or batches, or observes. Two tokens of every prompt are left."""
    whole = any(technique is None or technique.whole_prompt for technique in techniques_on(model))
    if whole or not batch_is_free(model) or not attends_fully(model):
        return []
    pairs = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    rows = [line[real.bool()].tolist() for line, real in pairs]
    longest = min(map(len, rows)) - 2
    common = next((i for i, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1), longest)
    return rows[0][: min(common, longest)] if len(rows) > 1 and min(common, longest) >= SHARED_PREFIX else []


def attends_fully(model: PreTrainedModel) -> bool:
    """Whether every layer of the model looks at all earlier tokens: no sliding windows, no recurrence."""
    kinds = getattr(text_config(model), "layer_types", None) or ["full_attention"]
    return set(kinds) == {"full_attention"} and not any(DynamicCache(config=model.config).is_sliding)


def run(model: PreTrainedModel, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
    """Logits of the last position [batch, vocabulary]."""
    return model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]


def decode_shrinking(
    model: PreTrainedModel, cache: Cache, mask: Tensor, positions: Tensor, tokens: Tensor, max_new_tokens: int
) -> list[list[int]] | None:
    """Replies from the first token [batch, 1] on; finished rows leave the batch. None: logits that are not finite."""
    ends = torch.tensor(end_tokens(model), device=tokens.device)
    replies: list[list[int]] = [[] for _ in range(len(tokens))]
    rows, going = list(range(len(tokens))), torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
    for step in range(max_new_tokens):
        if step:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            logits = run(model, tokens, mask, positions, cache)
            if not torch.isfinite(logits[going]).all():
                return None
            tokens, positions = logits.argmax(-1, keepdim=True), positions + 1
        going &= ~torch.isin(tokens[:, 0], ends)
        for row, token in zip(rows, tokens[:, 0].tolist(), strict=True):
            replies[row].append(token)
        kept = going.nonzero().flatten()
        if not len(kept):
            break
        if len(kept) < KEPT_SHARE * len(rows):
            rows = [rows[i] for i in kept.tolist()]
            tokens, positions, mask, going = tokens[kept], positions[kept], mask[kept], going[kept]
            cache.batch_select_indices(kept.cpu())  # from where every GPU takes it that holds some of the layers
    return replies


def capturable(model: PreTrainedModel) -> bool:
    """Whether a decoding step is the same work every time: one device, no noise (whose draws a replay would repeat), no
    experts (which are chosen by number), attention over keys and values only."""
    config = text_config(model)
    experts = any(getattr(config, name, None) for name in ("num_local_experts", "num_experts"))
    several = len(set(getattr(model, "hf_device_map", {"": 0}).values())) > 1
    kinds = set(getattr(config, "layer_types", None) or []) <= {"full_attention", "sliding_attention"}
    return batch_is_free(model) and kinds and not experts and not several


class FixedShapes:
    """A batch whose every tensor stays in place while it is decoded, so that one step can be captured and replayed.

    Sliding windows are left to the mask, so that every layer's cache has the same full shape. The mask shows slots that
    are still empty too: causality hides them. tokens, positions [batch, 1]; replies [batch, max_new_tokens].
    """

    def __init__(
        self, model: PreTrainedModel, cache: Cache, mask: Tensor, positions: Tensor, tokens: Tensor, max_new_tokens: int
    ) -> None:
        self.model, self.positions, self.tokens = model, positions, tokens
        self.layers: list[Any] = [fixed_layer(layer, max_new_tokens) for layer in cache.layers]
        self.cache = Cache(layers=self.layers)
        self.mask = torch.cat([mask, mask.new_ones(len(mask), max_new_tokens)], dim=1)
        self.replies = tokens.repeat(1, max_new_tokens)
        self.written = tokens.new_zeros(1)
        self.ends = torch.tensor(end_tokens(model), device=tokens.device, dtype=tokens.dtype)
        self.going = (tokens != self.ends).all(1)  # rows that have not ended; what follows an end may be anything
        self.finite = torch.ones((), dtype=torch.bool, device=tokens.device)
        self.logits = tokens.new_empty(0)

    def step(self) -> None:
        """Decodes one token per row. Nothing here waits for the device."""
        self.logits = run(self.model, self.tokens, self.mask, self.positions, self.cache)
        self.finite.logical_and_((torch.isfinite(self.logits).all(1) | ~self.going).all())
        self.tokens.copy_(self.logits.argmax(-1, keepdim=True))
        self.going.logical_and_((self.tokens != self.ends).all(1))
        self.positions.add_(1)
        self.written.add_(1)
        self.replies.index_copy_(1, self.written, self.tokens)

    def back(self, tokens: Tensor, going: Tensor) -> None:
        """Undoes a step that began with these; the slot it filled is filled anew by the next."""
        self.tokens.copy_(tokens)
        self.going.copy_(going)
        self.positions.sub_(1)
        self.written.sub_(1)
        for layer in self.layers:
            layer.cumulative_length.sub_(1)


def fixed_layer(layer: Any, room: int) -> StaticLayer:
    """A layer's keys and values with room for more; the layer gives up its own."""
    fixed = StaticLayer(layer.keys.shape[2] + room)
    fixed.update(layer.keys, layer.values)
    layer.keys = layer.values = None
    return fixed


@contextmanager
def fixed_frequencies(model: PreTrainedModel, length: int) -> Iterator[bool]:
    """Some rotary embeddings ask in every step how long a sequence is, which waits for the GPU; LongRoPE's (Phi-3.5) do
    not here if none outgrows their first window. length: of the longest prompt and reply. Yields whether none asks."""
    asking: Any = [m for m in model.modules() if getattr(m, "rope_type", None) in ("longrope", "dynamic")]
    window = "original_max_position_embeddings"
    small = [m for m in asking if m.rope_type == "longrope" and length <= m.config.rope_parameters[window]]
    for module in small:
        module.rope_type = "default"
    try:
        yield len(small) == len(asking)
    finally:
        for module in small:
            module.rope_type = "longrope"


def cuda_graph(batch: FixedShapes) -> Replay:
    """One step as a CUDA graph. The outer context brings the stream back where a capture fails on its way out."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        batch.step()
    return graph.replay


def replay_if_same(capture: Callable[[FixedShapes], Replay], batch: FixedShapes) -> Replay:
    """Takes one step; returns the captured one, or the ordinary one where the capture fails or is not the same, which
    is logged and noted in UNCAPTURED."""
    every = [hits for _, hits in engaged(batch.model)]
    counts, done = [hits.counts.copy() for hits in every], int(batch.written)
    before, finite = (batch.tokens.clone(), batch.going.clone()), batch.finite.clone()
    try:
        replay = capture(batch)
        for old, hits in zip(counts, every, strict=True):
            if unfired := sorted(place for place, count in hits.counts.items() if count == old[place]):
                raise RuntimeError(f"patches that did not fire: {unfired[:3]}")
        replay()
        replayed = batch.logits.clone()
        batch.back(*before)
        batch.step()
        if not torch.dist(replayed, batch.logits) <= SAME_LOGITS * batch.logits.norm():  # NaN is not the same either
            raise RuntimeError("a replayed step gives other logits")
    except RuntimeError as error:  # its context: why a capture failed, where that ends with another error
        log.warning("decoding without a captured step: %s", str(error.__context__ or error).splitlines()[0])
        UNCAPTURED.setdefault(batch.model, set()).add(techniques_on(batch.model))
        if int(batch.written) > done:
            batch.back(*before)
        batch.finite.copy_(finite)
        batch.step()
        return batch.step
    return replay


def decode_in_place(
    model: PreTrainedModel,
    cache: Cache,
    mask: Tensor,
    positions: Tensor,
    tokens: Tensor,
    max_new_tokens: int,
    capture: Callable[[FixedShapes], Replay] | None = None,
) -> list[list[int]] | None:
    """As `decode_shrinking`, but all rows stay to the end. capture: None stands for `cuda_graph` on a GPU."""
    capture = capture or (cuda_graph if model.device.type == "cuda" else None)
    capture = None if techniques_on(model) in UNCAPTURED.get(model, ()) else capture
    batch = FixedShapes(model, cache, mask, positions, tokens, max_new_tokens)
    replay: Replay = batch.step
    with fixed_frequencies(model, batch.mask.shape[1]) as steady:
        for number in range(1, max_new_tokens):
            if capture and steady and number == WARM_UP + 1:
                replay = replay_if_same(capture, batch)
            else:
                replay()
            if number % LOOK_EVERY == 0 and not batch.going.any():
                break
    return batch.replies[:, : int(batch.written) + 1].tolist() if batch.finite else None


def non_finite(
    model: PreTrainedModel, batch: dict[str, Tensor], again: Callable[[], Any] | None = None
) -> NonFiniteError:
    """The error that names where NaN or infinity first appears in a second run: `again`, or one pass over the batch."""
    inputs = {key: value.to(model.device) for key, value in batch.items()}
    place = first_non_finite(model, again or (lambda: model(**inputs)))
    where = f"first at layer {place[0]}, site {place[1]}" if place else "but not in a second run"
    return NonFiniteError(f"logits are NaN or infinite, {where}")
