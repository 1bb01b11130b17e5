"""What a job needs, before anything is loaded: memory of its model, and a rough time.

    on a CPU     minutes of the notebook on tiny-llama x size of the weights / size of tiny-llama's
    on a GPU     utility x conditions x batches x passes x max(weights / rate, shortest pass) + preparation + loading

The minutes were measured on one core beside another notebook. The GPU's rates are assumed, not measured: half of
3.3 TB/s, the memory bandwidth of an H100-class card, and a tenth of its 1 PFLOP/s. An estimate is good to a factor of
two or three.
"""

from __future__ import annotations

from argparse import ArgumentParser
from dataclasses import dataclass
from typing import Any, NamedTuple

from lib.paths import ROOT, between_markers
from lib.registry import REGISTRY, gigabytes


class Size(NamedTuple):
    """Of a notebook's default run: conditions, harmful requests, requests of any kind for each harmful one."""

    conditions: int
    n_prompts: int
    requests_each: float


STUDY = ("01", "02", "03", "04", "05", "06")  # of every registered model, in the README
MINUTES = {"01": 2.1, "02": 2.8, "03": 2.3, "04": 1.2, "05": 2.5, "06": 0.4, "07": 6.4, "08": 3.7}
"""Notebook -> minutes of a default run on tiny-llama; others, of a user's own: `OTHER_MINUTES`."""
SIZES = {
    "01": Size(31, 150, 2.0),
    "02": Size(34, 150, 2.0),
    "03": Size(30, 150, 2.0),
    "04": Size(60, 85, 1.5),
    "05": Size(64, 85, 1.5),
    "06": Size(10, 150, 2.0),
    "07": Size(40, 100, 2.5),
    "08": Size(40, 200, 2.0),
}
OTHER_MINUTES, OTHER_SIZE = 5.0, Size(40, 150, 2.0)
FAST_SHARE = 0.12
TINY_GIGABYTES = 0.00513
GPU_BATCH, GPU_RATE, GPU_LOADING = 64, 1650.0, 120.0  # prompts, GB/s, s
GPU_PASS, UNCAPTURED, UNCAPTURED_PASS = 0.01, ("04", "05"), 0.03  # s; noise cannot be captured
PREPARATION = {"02": 1e6, "03": 6 * 10 * 16 * 2048 * 4}
"""Notebook -> operations per weight: TEAL's greedy search; OmniQuant, 6 levels x 10 epochs x 16 windows."""
GPU_FLOPS = 1e14
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
    float32 = parameters.get("dtype") == "float32" or (not gpu and parameters.get("dtype", "auto") == "auto")
    weights = (2 if float32 else 1) * size
    usual = SIZES.get(notebook, OTHER_SIZE)
    share = parameters.get("n_prompts", usual.n_prompts) / usual.n_prompts
    share *= FAST_SHARE if parameters.get("fast") else 1.0
    if not gpu:
        minutes = MINUTES.get(notebook, OTHER_MINUTES) * share * max(1.0, size / TINY_GIGABYTES)
        return Need(0.5 + ROOM * weights, minutes)
    batches = -(-usual.n_prompts * usual.requests_each * share // GPU_BATCH)
    passes = parameters.get("max_new_tokens", 48) + PREFILL
    shortest_pass = UNCAPTURED_PASS if notebook in UNCAPTURED else GPU_PASS
    seconds = UTILITY * usual.conditions * batches * passes * max(weights / GPU_RATE, shortest_pass)
    preparation = PREPARATION.get(notebook, 0) * size * 5e8 / GPU_FLOPS
    return Need(1 + ROOM * weights, (seconds + preparation + GPU_LOADING) / 60)


def study_plan(n_prompts: int = 373, max_new_tokens: int = 128) -> str:
    """A Markdown table: GPU memory and hours of notebooks 01 to 06 per registered model, for AdvBench's test split."""
    asked = {"n_prompts": n_prompts, "max_new_tokens": max_new_tokens, "dtype": "bfloat16"}
    columns = ["model", "GPU memory", *STUDY, "GPU hours"]
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    total = 0.0
    for name in REGISTRY:
        needs = [need(notebook, {"model": name} | asked, gpu=True) for notebook in STUDY]
        hours = [(one.minutes or 0.0) / 60 for one in needs]
        total += sum(hours)
        cells = " | ".join(f"{hour:.1f}" for hour in hours)
        lines.append(f"| `{name}` | {needs[0].gigabytes or 0.0:.0f} GB | {cells} | {sum(hours):.0f} |")
    return "\n".join([*lines, f"| all | | {' | ' * (len(STUDY) - 1)} | {total:.0f} |"])


if __name__ == "__main__":
    ArgumentParser("python -m lib.estimates", description="Writes the plan of the study into README.md").parse_args()
    page = ROOT / "README.md"
    plan = between_markers(page.read_text(encoding="utf-8"), "study plan", "lib.estimates", study_plan())
    page.write_text(plan, encoding="utf-8")
