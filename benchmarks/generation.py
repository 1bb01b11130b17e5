"""Our greedy replies against plain `model.generate`: processor seconds for the same prompts, batch size and tokens.

    python benchmarks/generation.py [--model tiny-llama] [--rounds 5] [--prompts 128]

Alternating in one process; a speed-up is the median over rounds of plain / ours. Processor time, so run one thread. In
float32 the replies are the same tokens, which is checked. Prints a Markdown table and writes generation.md beside this
file.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lib import models
from lib.generation import end_tokens, greedy, pad_left
from lib.organisms import corpus
from lib.prompts import render

BATCH, NEW = 64, 96
CASES = {
    "replies of the same length": ("chat", False, 1.0),
    "replies of different length": ("chat", True, 1.3),
    "different length, a long common beginning": ("quada", True, 1.3),
}
"""What is decoded -> protocol, whether replies may end, and the speed-up aimed at."""

Rows = list[list[int]]


def plain(model: PreTrainedModel, rows: Rows) -> Rows:
    """Batches in the order of the prompts, each decoded until its longest reply ends."""
    stop = end_tokens(model)
    replies: Rows = []
    for start in range(0, len(rows), BATCH):
        batch = pad_left(rows[start : start + BATCH], model.config.pad_token_id)
        output = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
        for reply in output[:, batch["input_ids"].shape[1] :].tolist():
            replies.append(reply[: next((i for i, token in enumerate(reply) if token in stop), NEW)])
    return replies


def ours(model: PreTrainedModel, rows: Rows) -> Rows:
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    replies: Rows = [[] for _ in rows]
    for start in range(0, len(rows), BATCH):
        chosen = order[start : start + BATCH]
        found = greedy(model, pad_left([rows[i] for i in chosen], model.config.pad_token_id), NEW)
        for i, reply in zip(chosen, found, strict=True):
            replies[i] = reply
    return replies


def compare(model: PreTrainedModel, rows: Rows, ends: bool, rounds: int) -> tuple[float, bool]:
    """(median of plain / ours in seconds, whether all tokens are the same)."""
    kept, ratios, same = model.generation_config.eos_token_id, [], True
    if not ends:
        model.generation_config.eos_token_id = model.config.eos_token_id = None
    for _ in range(rounds):
        started = time.process_time()
        expected = plain(model, rows)
        middle = time.process_time()
        found = ours(model, rows)
        ratios.append((middle - started) / (time.process_time() - middle))
        same &= found == expected
    model.generation_config.eos_token_id = model.config.eos_token_id = kept
    return statistics.median(ratios), same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-llama")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=128)
    options = parser.parse_args()
    model, tokenizer = models.load(options.model, "cpu", "float32")
    labels = ("harmful", "harmless")
    pool = [request.prompt for label in labels for request in corpus.requests("dev", label)]
    asked = random.Random(0).sample(pool, options.prompts)
    table = ["| replies | plain / ours | aim | | same tokens |", "|---|---:|---:|---|---|"]
    for case, (protocol, ends, aim) in CASES.items():
        texts, special = render(tokenizer, asked, protocol)
        rows = [tokenizer(text, add_special_tokens=special)["input_ids"] for text in texts]
        found, same = compare(model, rows, ends, options.rounds)
        verdict = "met" if found >= aim else "missed"
        table.append(f"| {case} | {found:.2f} | {aim:.1f} | {verdict} | {'all' if same else 'NO'} |")
        print(table[-1], flush=True)
    about = (
        f"{date.today()}, {options.model}, float32. torch {version('torch')}, transformers {version('transformers')}, "
        f"{torch.get_num_threads()} thread(s), load {os.getloadavg()[0]:.1f} of {os.cpu_count()} CPUs. "
        f"{options.prompts} prompts, batches of {BATCH}, up to {NEW} new tokens; median of {options.rounds} rounds."
    )
    Path(__file__).with_suffix(".md").write_text("\n".join(["# Greedy replies on a CPU", "", about, "", *table, ""]))


if __name__ == "__main__":
    main()
