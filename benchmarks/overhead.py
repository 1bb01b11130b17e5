"""What each technique costs: patched against unpatched tokens per second, and the seconds its calibration takes.

    python benchmarks/overhead.py [--model tiny-llama] [--rounds 5] [--only teal cats]

One process decodes the same 64 prompts with the exact and with the patched model in turn; a ratio is the median over
rounds of exact time / patched time, so that a busy machine slows both sides. Prints a Markdown table and, for a whole
run, writes it to overhead.md beside this file.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lib import models
from lib.approximations import Technique, make
from lib.calibration import Calibration, window_length, windows
from lib.conditions import describe
from lib.generation import greedy
from lib.organisms import corpus
from lib.patching import approximated
from lib.registry import organisms

ROWS, PROMPT, NEW = 64, 24, 40
LIGHT, HEAVY = 0.75, 1 / 3
PREPARATION = {"calibration": 10, "OmniQuant, training": 120}

CASES: tuple[tuple[Technique, float], ...] = (
    (make("gaussian"), LIGHT),
    (make("laplace"), LIGHT),
    (make("gaussian", relative=True), LIGHT),
    (make("teal"), LIGHT),
    (make("teal", prompt="all"), LIGHT),
    (make("teal", thresholds="paper"), LIGHT),
    (make("cats"), LIGHT),
    (make("smoothquant", smooth=False), LIGHT),
    (make("smoothquant"), LIGHT),
    (make("smoothquant", per="tensor"), LIGHT),
    (make("smoothquant", per="static"), LIGHT),
    (make("smoothquant", attention=True), LIGHT),
    (make("omniquant", smooth=False, attention=False), LIGHT),
    (make("omniquant", train=False, attention=False), LIGHT),
    (make("omniquant", train=False), LIGHT),
    *((make(name, parts=("activation",), arithmetic="real"), LIGHT) for name in ("iron", "bolt", "bumblebee", "nexus")),
    *((make(name, arithmetic="real"), HEAVY) for name in ("iron", "bolt", "bumblebee")),
    (make("nexus", range_margin=16.0), HEAVY),  # replies go on past their end here, where calibration never was
    *((make(name, parts=("activation",)), HEAVY) for name in ("iron", "bolt", "bumblebee")),
    *((make(name), HEAVY) for name in ("iron", "bolt", "bumblebee")),
)
"""Technique and the least ratio aimed at: light for real arithmetic on activations, heavy for softmax, norm, rings."""


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def ratio(model: PreTrainedModel, ids: Tensor, technique: Technique, state: Any, rounds: int) -> float:
    """Median of exact time / patched time over alternating rounds, after a warm-up."""
    prompts = ids[:ROWS, :PROMPT]
    batch = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts)}
    ratios = []
    for turn in range(rounds + 1):
        exact = seconds(lambda: greedy(model, batch, NEW))
        with approximated(model, technique, state):
            patched = seconds(lambda: greedy(model, batch, NEW))
        if turn:
            ratios.append(exact / patched)
    return statistics.median(ratios)


def verdict(met: bool) -> str:
    return "met" if met else "missed"


def overheads(model: PreTrainedModel, ids: Tensor, rounds: int, only: list[str]) -> list[str]:
    lines = ["| technique | patched / exact | aim | |", "|---|---:|---:|---|"]
    measured = Calibration(model, ids)
    for technique, aim in CASES:
        if only and technique.name not in only:
            continue
        state = technique.fit(measured) if technique.needs_calibration else None
        found = ratio(model, ids, technique, state, rounds)
        lines.append(f"| {describe(technique)} | {found:.2f} | {aim:.2f} | {verdict(found >= aim)} |")
        print(lines[-1], flush=True)
    return lines


def preparations(model: PreTrainedModel, ids: Tensor) -> list[str]:
    """Seconds of calibration, of TEAL's greedy search and of OmniQuant's training, from an empty cache."""
    measured: list[Calibration] = []
    times = {"calibration": seconds(lambda: measured.append(Calibration(model, ids)))}
    times["OmniQuant, training"] = seconds(lambda: make("omniquant").fit(measured[0]))
    rows = [
        f"| {name} | {spent:.1f} | {PREPARATION[name]} | {verdict(spent <= PREPARATION[name])} |"
        for name, spent in times.items()
    ]
    greedy_search = seconds(lambda: make("teal", allocation="greedy").fit(measured[0]))
    rows.append(f"| TEAL, greedy search | {greedy_search:.1f} | | |")
    return ["| preparation | seconds | aim | |", "|---|---:|---:|---|", *rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-llama", choices=organisms())
    parser.add_argument("--rounds", type=int, default=5)
    names = sorted({technique.name for technique, _ in CASES})
    parser.add_argument("--only", nargs="+", choices=names, default=[], help="these techniques; no file is written")
    options = parser.parse_args()
    model, tokenizer = models.load(options.model, "cpu", "float32")
    ids = windows(tokenizer, corpus.prose("train", 400), window_length(model))  # [windows, length]
    model.generation_config.eos_token_id = []  # every row decodes all its tokens
    with tempfile.TemporaryDirectory() as folder:
        os.environ["APPROX_CACHE"] = folder
        prepared = [] if options.only else preparations(model, ids)
        table = [*overheads(model, ids, options.rounds, options.only), "", *prepared]
    if options.only:
        return
    about = (
        f"{date.today()}, organism {options.model}, float32. torch {version('torch')}, transformers "
        f"{version('transformers')}, {platform.processor() or platform.machine()}, {torch.get_num_threads()} "
        f"thread(s), load {os.getloadavg()[0]:.1f} of {os.cpu_count()} CPUs. "
        f"{ROWS} prompts of {PROMPT} tokens, {NEW} new tokens; median of {options.rounds} alternations."
    )
    report = "\n".join(["# Cost of each technique", "", about, "", *table, ""])
    print(report)
    Path(__file__).with_suffix(".md").write_text(report)


if __name__ == "__main__":
    main()
