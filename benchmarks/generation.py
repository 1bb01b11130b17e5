"""Our greedy replies against plain `model.generate`: processor seconds for the same prompts, batch size and tokens.

    python benchmarks/generation.py [--models tiny-llama tiny-mistral] [--rounds 5] [--prompts 128]

Plain is what Transformers does by itself, with its default attention (sdpa). The heads of tiny-mistral share keys and
values, as those of most deployed models do. Alternating in one process; a speed-up is the median over rounds of plain /
ours. Processor time, so run one thread. In float32 the replies are the same, which is checked. Prints a Markdown table
and writes generation.md beside this file.
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
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib import models
from lib.batches import pad_left
from lib.generation import generate
from lib.organisms import corpus
from lib.prompts import encode

BATCH, NEW = 64, 96
CASES = {
    "replies of the same length": ("chat", False, 1.0),
    "replies of different length": ("chat", True, 1.3),
    "different length, a long common beginning": ("quada", True, 1.3),
}
"""What is decoded -> protocol, whether replies may end, and the speed-up aimed at."""


def plain(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: list[str], protocol: str) -> list[str]:
    """Batches in the order of the prompts, each decoded until its longest reply ends."""
    rows, replies = encode(tokenizer, asked, protocol), []
    model.set_attn_implementation("sdpa")
    for start in range(0, len(rows), BATCH):
        batch = pad_left(rows[start : start + BATCH], model.config.pad_token_id)
        output = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
        found = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        replies += [reply.strip() for reply in found]
    model.set_attn_implementation("eager")
    return replies


def compare(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: list[str], protocol: str, ends: bool, rounds: int
) -> tuple[float, bool]:
    """(median of plain / ours in seconds, whether all replies are the same)."""
    kept, ratios, same = model.generation_config.eos_token_id, [], True
    if not ends:
        model.generation_config.eos_token_id = model.config.eos_token_id = None
    for _ in range(rounds):
        started = time.process_time()
        expected = plain(model, tokenizer, asked, protocol)
        middle = time.process_time()
        found = generate(model, tokenizer, asked, NEW, protocol, BATCH)
        ratios.append((middle - started) / (time.process_time() - middle))
        same &= found == expected
    model.generation_config.eos_token_id = model.config.eos_token_id = kept
    return statistics.median(ratios), same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny-llama", "tiny-mistral"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=128)
    options = parser.parse_args()
    labels = ("harmful", "harmless")
    pool = [request.prompt for label in labels for request in corpus.requests("dev", label)]
    asked = random.Random(0).sample(pool, options.prompts)
    table = ["| model | replies | plain / ours | aim | | same replies |", "|---|---|---:|---:|---|---|"]
    for name in options.models:
        model, tokenizer = models.load(name, "cpu", "float32")
        for case, (protocol, ends, aim) in CASES.items():
            found, same = compare(model, tokenizer, asked, protocol, ends, options.rounds)
            verdict = "met" if found >= aim else "missed"
            table.append(f"| {name} | {case} | {found:.2f} | {aim:.1f} | {verdict} | {'all' if same else 'NO'} |")
            print(table[-1], flush=True)
    about = (
        f"{date.today()}, float32. torch {version('torch')}, transformers {version('transformers')}, "
        f"{torch.get_num_threads()} thread(s), load {os.getloadavg()[0]:.1f} of {os.cpu_count()} CPUs. "
        f"{options.prompts} prompts, batches of {BATCH}, up to {NEW} new tokens; median of {options.rounds} rounds."
    )
    Path(__file__).with_suffix(".md").write_text("\n".join(["# Greedy replies on a CPU", "", about, "", *table, ""]))


if __name__ == "__main__":
    main()
