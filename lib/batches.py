"""Batches of prompts: padded on the left, sorted by length, divided where the memory of a GPU does not suffice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lib.approximations import Technique
from lib.patching import engaged

UNDIVIDED = "what is measured depends on the batch, which is not divided: use more GPUs or a smaller model"


def pad_left(rows: Sequence[list[int]], pad: int) -> dict[str, Tensor]:
    """{"input_ids", "attention_mask"} [batch, seq], shorter rows filled on the left."""
    length = max(map(len, rows))
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def techniques_on(model: PreTrainedModel) -> tuple[Technique | None, ...]:
    """The technique of every patch that is on the model now; None for one that only observes."""
    return tuple(technique for technique, _ in engaged(model))


def batch_is_free(model: PreTrainedModel) -> bool:
    """Whether a reply is the same in every batch: not so under noise or quantization of a whole tensor at once."""
    return all(technique is None or technique.per_token for technique in techniques_on(model))


def part_by_part(
    model: PreTrainedModel, items: Any, size: int, apply: Callable[[Any], None], advice: str = UNDIVIDED
) -> None:
    """apply(part) for parts of up to `size` items, in their order. Out of GPU memory halves the size where that changes
    no result; else torch.OutOfMemoryError with the advice."""
    while len(items):
        part = items[:size]
        try:
            apply(part)
        except torch.OutOfMemoryError:
            if len(part) == 1 or not batch_is_free(model):
                advice = advice if len(part) > 1 else "use more GPUs or a smaller model"
                raise torch.OutOfMemoryError(f"out of GPU memory; {advice}") from None
        else:
            items = items[size:]
            continue
        torch.cuda.empty_cache()  # here, where nothing holds the tensors of the pass that failed
        size = len(part) // 2


def map_batches(
    model: PreTrainedModel,
    encoded: Sequence[list[int]],
    size: int,
    apply: Callable[[dict[str, Tensor], list[int]], Any],
    pad: int,
) -> None:
    """Calls apply(left-padded batch with its position_ids on the model's device, row numbers), sorted by length."""

    def forward(rows: list[int]) -> None:
        batch = pad_left([encoded[i] for i in rows], pad)
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        apply({key: value.to(model.device) for key, value in batch.items()}, rows)

    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    part_by_part(model, order, size, forward)
