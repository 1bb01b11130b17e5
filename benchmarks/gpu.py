"""Full-size speed on one GPU, as one table: random weights in the shape of Llama-3.1-8B, bf16.

    python benchmarks/gpu.py [--out FILE]    writes gpu.md beside this file, row by row
    python benchmarks/gpu.py --tiny          the same lines of code on a CPU and a toy model; writes nothing

Needs a card with 40 GB and, beside what torch and transformers bring, psutil, requests and scipy.

Floor of a decoding step: (bytes of the weights + bytes of keys and values) / copy bandwidth measured here. Speeds do
not depend on what the weights are; nothing is downloaded. The authors had no GPU: only --tiny has been run, and the
toy model on the tests' stand-in for one. Techniques are those that need no calibration.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from lib.approximations import make
from lib.batches import pad_left
from lib.generation import greedy
from lib.patching import approximated
from lib.utility import perplexity

LLAMA_8B = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=False,
    rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
)  # fmt: skip
TOY = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
)  # fmt: skip
SYSTEMS = ("iron", "bolt", "bumblebee")
LIGHT = {f"{name}, activation, real": make(name, parts=("activation",), arithmetic="real") for name in SYSTEMS}
LIGHT |= {"teal": make("teal", thresholds="paper"), "smoothquant, 8 bits": make("smoothquant", smooth=False)}
UNCAPTURED = {"gaussian": make("gaussian", std=0.01)}  # a replayed graph would repeat the draws


@dataclass(frozen=True)
class Sizes:
    """What is measured: rows and tokens of a batch, prompts of a condition, windows of text, sides of a matrix."""

    batch: int = 64
    prompt: int = 64
    new: int = 128
    prompts: int = 520
    window: int = 1024
    windows: int = 64
    matrix: int = 8192
    copied: int = 2**30
    rounds: int = 2


SMALL = Sizes(batch=4, prompt=8, new=12, prompts=10, window=32, windows=4, matrix=128, copied=2**20, rounds=1)


def seconds(work: Callable[[], Any], rounds: int = 1) -> float:
    """Median over rounds; a GPU is waited for."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    times = []
    for _ in range(rounds):
        wait()
        started = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def random_model(config: LlamaConfig, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """Made on the device; no reply ends."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    model.generation_config.pad_token_id = model.config.pad_token_id = 0
    return model


def random_batch(model: PreTrainedModel, rows: int, length: int) -> dict[str, Tensor]:
    ids = torch.randint(3, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids.to(model.device), "attention_mask": torch.ones_like(ids).to(model.device)}


class Bench:
    """The measurements; each returns the cells of a row: what, measured, aim, whether it is met."""

    def __init__(self, model: PreTrainedModel, sizes: Sizes) -> None:
        self.model, self.sizes = model, sizes
        self.batch = random_batch(model, sizes.batch, sizes.prompt)
        self.bandwidth = self.copy_bandwidth()
        self.rate = self.matmul_rate()
        self.exact = 0.0

    def copy_bandwidth(self) -> float:
        """Bytes per second, read and written, of a large copy."""
        source = torch.zeros(self.sizes.copied, dtype=torch.uint8, device=self.model.device)
        target = torch.empty_like(source)
        target.copy_(source)
        return 2 * 10 * source.numel() / seconds(lambda: [target.copy_(source) for _ in range(10)], 3)

    def matmul_rate(self) -> float:
        """Floating-point operations per second of a large product in the model's dtype."""
        side = self.sizes.matrix
        a = torch.randn(side, side, device=self.model.device, dtype=self.model.dtype)
        a @ a
        return 10 * 2 * side**3 / seconds(lambda: [a @ a for _ in range(10)], 3)

    def decode(self, generate: Callable[[int], Any]) -> float:
        """Tokens per second of decoding: the time of all tokens less that of the first, which reads the prompt."""
        generate(self.sizes.new)
        first, every = (seconds(partial(generate, n), self.sizes.rounds) for n in (1, self.sizes.new))
        return self.sizes.batch * (self.sizes.new - 1) / max(every - first, 1e-9)

    def ours(self, n: int) -> list[list[int]]:
        return greedy(self.model, self.batch, n)

    def plain(self, n: int) -> list[list[int]]:
        """With the attention that Transformers takes by itself."""
        self.model.set_attn_implementation("sdpa")
        output = self.model.generate(**self.batch, max_new_tokens=n, do_sample=False)
        self.model.set_attn_implementation("eager")
        return output[:, self.sizes.prompt :].tolist()

    def floor(self) -> float:
        """Tokens per second if a step did nothing but read weights, keys and values once."""
        config, element = self.model.config, self.model.dtype.itemsize
        weights = sum(p.numel() for p in self.model.parameters()) - config.vocab_size * config.hidden_size
        slots = self.sizes.batch * (self.sizes.prompt + self.sizes.new / 2)
        cached = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * slots
        return self.sizes.batch * self.bandwidth / ((weights + cached) * element)

    def decoding(self) -> list[tuple[str, str, str, bool | None]]:
        plain = self.decode(self.plain)
        self.exact = self.decode(self.ours)
        same = [a == b for x, y in zip(self.plain(self.sizes.new), self.ours(self.sizes.new), strict=True)
                for a, b in zip(x, y, strict=True)]  # fmt: skip
        share = self.exact / self.floor()
        return [
            ("plain generate, tokens/s", f"{plain:,.0f}", "", None),
            ("ours, tokens/s", f"{self.exact:,.0f}", "", None),
            ("ours / plain generate", f"{self.exact / plain:.2f}", "3", self.exact / plain >= 3),
            ("ours / memory-bandwidth floor", f"{share:.2f}", "0.50", share >= 0.5),
            ("equal tokens, ours and plain generate", f"{sum(same) / len(same):.1%}", "", None),
        ]

    def technique(self, name: str, least: float | None) -> list[tuple[str, str, str, bool | None]]:
        if not self.exact:
            raise RuntimeError("the exact model's speed is missing")
        with approximated(self.model, (LIGHT | UNCAPTURED)[name]):
            ratio = self.decode(self.ours) / self.exact
        return [(f"{name}: patched / exact", f"{ratio:.2f}", f"{least or ''}", least and ratio >= least)]

    def condition(self) -> list[tuple[str, str, str, bool | None]]:
        """Replies to prompts of 16 to 64 tokens, sorted by length."""
        chance = torch.Generator().manual_seed(2)
        lengths = torch.randint(16, 65, (self.sizes.prompts,), generator=chance).sort().values.tolist()
        rows = [torch.randint(3, self.model.config.vocab_size, (n,), generator=chance).tolist() for n in lengths]
        batches = [rows[start : start + self.sizes.batch] for start in range(0, len(rows), self.sizes.batch)]
        spent = seconds(lambda: [greedy(self.model, pad_left(batch, 0), self.sizes.new) for batch in batches])
        return [(f"{len(rows)} prompts x {self.sizes.new} tokens, s", f"{spent:.1f}", "30", spent < 30)]

    def text(self) -> list[tuple[str, str, str, bool | None]]:
        """Perplexity's share of the matrix rate: 2 operations per weight and token, and those of attention."""
        config, (n, length) = self.model.config, (self.sizes.windows, self.sizes.window)
        ids = random_batch(self.model, n, length)["input_ids"].flatten().tolist()
        weights = sum(p.numel() for p in self.model.parameters()) - config.vocab_size * config.hidden_size
        attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * length
        measure = partial(perplexity, self.model, lambda text, verbose: {"input_ids": ids}, "", length)
        perplexity(self.model, lambda text, verbose: {"input_ids": ids[:length]}, "", length)
        spent = seconds(measure, self.sizes.rounds)
        share = n * length * (2 * weights + attention) / spent / self.rate
        return [("perplexity, tokens/s", f"{n * length / spent:,.0f}", "", None),
                ("perplexity / measured matmul rate", f"{share:.2f}", "0.40", share >= 0.4)]  # fmt: skip


def lines(bench: Bench) -> Iterator[str]:
    """The table's lines as they are measured; a measurement that fails is a line that says so."""
    work = {"decoding": bench.decoding, "condition": bench.condition, "perplexity": bench.text}
    work |= {name: partial(bench.technique, name, 0.9) for name in LIGHT}
    work |= {name: partial(bench.technique, name, None) for name in UNCAPTURED}
    yield from ("| measured | | aim | |", "|---|---:|---:|---|")
    yield f"| copy bandwidth, GB/s | {bench.bandwidth / 1e9:,.0f} | | |"
    yield f"| matmul rate, TFLOP/s | {bench.rate / 1e12:,.1f} | | |"
    for name, measure in work.items():
        try:
            rows = measure()
        except (RuntimeError, ArithmeticError) as error:
            rows = [(name, f"failed: {str(error).splitlines()[0][:80]}", "", False)]
        words = {True: "met", False: "missed", None: ""}
        yield from (f"| {what} | {value} | {aim} | {words[met]} |" for what, value, aim, met in rows)


def main(arguments: list[str] | None = None) -> list[str]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a toy model on a CPU: a check of this script")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"), help="the file to write")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING)  # says where a step could not be captured
    if not options.tiny and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU; --tiny runs the script on a CPU")
    started, table = time.perf_counter(), []
    model = random_model(TOY, "cpu", torch.float32) if options.tiny else random_model(LLAMA_8B, "cuda", torch.bfloat16)
    sizes = SMALL if options.tiny else Sizes()
    card = "CPU, toy model" if options.tiny else torch.cuda.get_device_name()
    for line in lines(Bench(model, sizes)):
        print(line, flush=True)
        table.append(line)
        about = (
            f"{date.today()}, {card}. torch {version('torch')}, transformers {version('transformers')}, {model.dtype}, "
            f"batch {sizes.batch}, prompts of {sizes.prompt} tokens; {time.perf_counter() - started:.0f} s in all."
        )
        if not options.tiny:
            options.out.write_text("\n".join(["# Speed on a GPU", "", about, "", *table, ""]))
    return table


if __name__ == "__main__":
    main()
