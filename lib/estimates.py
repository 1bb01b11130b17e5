"""What a job needs, before anything is loaded: memory of its model, and a rough time.

    on a CPU     minutes of the notebook on tiny-llama x size of the weights / size of tiny-llama's
    on a GPU     conditions x batches x passes per batch x max(weights / rate, seconds per pass) + loading

The minutes were measured on one core of a busy machine. The GPU's rate is assumed, not measured: half of 3.3 TB/s, the
memory bandwidth of an H100-class card. Real conditions vary; an estimate is good to a factor of two or three.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lib.registry import gigabytes

MINUTES = {"01": 7.5, "02": 8.0, "03": 6.5, "04": 5.5, "05": 3.5, "06": 1.0}
"""Notebook -> minutes of a default run on tiny-llama, for others see `OTHER_MINUTES`."""
CONDITIONS = {"01": (31, 500), "02": (34, 500), "03": (30, 500), "04": (50, 150), "05": (46, 150), "06": (10, 500)}
"""Notebook -> (conditions, prompts of each) of a default run on tiny-llama, exact model included."""
OTHER_MINUTES, OTHER_CONDITIONS = 10.0, (40, 500)
FAST_SHARE = 0.12
TINY_GIGABYTES = 0.00513
GPU_BATCH, GPU_RATE, GPU_PASS, GPU_LOADING = 64, 1650.0, 0.01, 120.0  # prompts, GB/s, s, s
UTILITY = 1.3  # perplexities and scores besides the replies
PREFILL = 8  # passes that reading a batch of prompts is worth
ROOM = 1.25  # weights, activations, keys and values over weights alone


@dataclass(frozen=True)
class Need:
    """gigabytes: of the device's memory, None where the model's size is unknown; minutes: None likewise."""

    gigabytes: float | None
    minutes: float | None

    def __str__(self) -> str:
        if self.gigabytes is None or self.minutes is None:
            return "size unknown"
        hours = self.minutes / 60
        time = f"{self.minutes:.0f} min" if hours < 2 else f"{hours:.0f} h" if hours < 48 else f"{hours / 24:.0f} days"
        return f"{self.gigabytes:.1f} GB, {f'about {time}' if self.minutes >= 1 else 'under 1 min'}"


def need(notebook: str, parameters: dict[str, Any], gpu: bool) -> Need:
    """What one job needs. A report (parameter `models`) reads tables only."""
    if "models" in parameters:
        return Need(0.5, 0.5)
    size = gigabytes(parameters["model"])
    if size is None:
        return Need(None, None)
    wide = parameters.get("dtype") == "float32" or (not gpu and parameters.get("dtype", "auto") == "auto")
    held = (2 if wide else 1) * size
    conditions, rows = CONDITIONS.get(notebook, OTHER_CONDITIONS)
    share = parameters.get("n_prompts", rows / 2) * 2 / rows * (FAST_SHARE if parameters.get("fast") else 1.0)
    if not gpu:
        minutes = MINUTES.get(notebook, OTHER_MINUTES) * share * max(1.0, size / TINY_GIGABYTES)
        return Need(0.5 + ROOM * held, minutes)
    batches = -(-rows * share // GPU_BATCH)
    passes = parameters.get("max_new_tokens", 48) + PREFILL
    seconds = UTILITY * conditions * batches * passes * max(held / GPU_RATE, GPU_PASS)
    return Need(1 + ROOM * held, (seconds + GPU_LOADING) / 60)
