"""A noise sweep the way the released code of the studied paper does it, against ours.

    python benchmarks/sweep.py [--model tiny-llama] [--levels 8] [--prompts 64] [--rounds 3] [--threads 2 1]

Released way: for every noise level a new process that loads the model and calls `model.generate` on batches in the
order of the prompts; then a process that judges what was written. Ours: one `Study`, which also scores refusals and
the perplexity of answers. Same model, prompts, noise (our patch on both sides: compared is the work around it), greedy
decoding, number of tokens and judge; ways alternate. The released code's batch size is not published: 8 is our choice.

Rows in between take one thing over at a time. Processor seconds of each way's processes stand beside the wall clock,
because they barely depend on what else the machine does. One thread gains less than two: a second one shortens the
computing, the larger share of our time, but not the starting of processes, the larger share of the released way's.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

PLAIN_BATCH, NEW, LARGEST = 8, 48, 0.4
AIM = 4.0
WAYS = {
    "released": "released way: a process and a load per level, plain generate, judged afterwards",
    "one process": "+ loading: one process, one load, judged in it",
    "batches": "+ batching: sorted, larger batches whose finished rows leave",
    "ours": "ours, first time: a study with its utility measures",
    "again": "+ reuse: ours, asked for again",
}
ROOT = Path(__file__).resolve().parents[1]


def stds(levels: int) -> list[float]:
    return [LARGEST * (number + 1) / levels for number in range(levels)]


def study(options: argparse.Namespace) -> Any:
    """A study of these prompts. Imported late, here and below: the process that measures needs no torch."""
    from lib.experiment import open_study

    full = open_study(options.model, "cpu", "float32", n_prompts=options.prompts, split="dev", max_new_tokens=NEW)
    return full.brief(options.prompts)


def plain_replies(options: argparse.Namespace, std: float, subject: Any = None) -> list[str]:
    """Replies of `model.generate` under noise, batches in the order of the prompts."""
    from lib.approximations import make
    from lib.batches import pad_left
    from lib.models import load
    from lib.patching import approximated
    from lib.prompts import render

    model, tokenizer = load(options.model, "cpu", "float32") if subject is None else subject
    texts, special = render(tokenizer, json.loads(Path(options.folder, "prompts.json").read_text()))
    rows = [tokenizer(text, add_special_tokens=special)["input_ids"] for text in texts]
    replies: list[str] = []
    with approximated(model, make("gaussian", std=std)):
        for start in range(0, len(rows), PLAIN_BATCH):
            batch = pad_left(rows[start : start + PLAIN_BATCH], tokenizer.pad_token_id)
            output = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
            replies += tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return replies


def worker(options: argparse.Namespace) -> None:
    """One process of a way."""
    folder = Path(options.folder)
    if options.worker == "prompts":
        (folder / "prompts.json").write_text(json.dumps([prompt.prompt for prompt in study(options).prompts]))
    elif options.worker == "level":
        replies = plain_replies(options, options.std)
        (folder / f"{options.std}.json").write_text(json.dumps(replies))
    elif options.worker == "judge":
        judged, asked = study(options), json.loads((folder / "prompts.json").read_text())
        for std in stds(options.levels):
            judged.judge(asked, json.loads((folder / f"{std}.json").read_text()))
    elif options.worker == "one process":
        judged = study(options)
        asked = [prompt.prompt for prompt in judged.prompts]
        for std in stds(options.levels):
            judged.judge(asked, plain_replies(options, std, (judged.model, judged.tokenizer)))
    elif options.worker == "batches":
        from lib.approximations import make
        from lib.generation import generate
        from lib.patching import approximated

        judged = study(options)
        asked = [prompt.prompt for prompt in judged.prompts]
        for std in stds(options.levels):
            with approximated(judged.model, make("gaussian", std=std)):
                replies = generate(judged.model, judged.tokenizer, asked, NEW)
            judged.judge(asked, replies)
    else:
        from lib.conditions import grid

        study(options).sweep(grid("gaussian", std=tuple(stds(options.levels))))


def process(options: argparse.Namespace, folder: str, job: str, *more: str) -> None:
    """Runs a worker to its end, its results in `folder`."""
    command = [sys.executable, str(Path(__file__)), "--worker", job, "--folder", folder, "--model", options.model]
    command += ["--levels", str(options.levels), "--prompts", str(options.prompts), *more]
    places = {"APPROX_RESULTS": f"{folder}/results", "APPROX_CACHE": f"{folder}/cache", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, env={**os.environ, **places}, stdout=subprocess.DEVNULL)


def released(options: argparse.Namespace, folder: str, way: str) -> None:
    for std in stds(options.levels):
        process(options, folder, "level", "--std", str(std))
    process(options, folder, "judge")


def measured(work: Callable[[], None]) -> tuple[float, float]:
    """(wall-clock seconds, processor seconds of the processes it started)."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    work()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - started, spent


def one_round(options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Every way once, from an empty results folder; `again` finds what `ours` stored."""
    times = {}
    with tempfile.TemporaryDirectory() as folder:
        process(options, folder, "prompts")
        for way in WAYS:
            times[way] = measured(partial(released if way == "released" else process, options, folder, way))
    return times


def table(rounds: list[dict[str, tuple[float, float]]]) -> list[str]:
    """Medians, and ratios to the released way within each round."""
    lines = ["| way | wall clock, s | processor, s | speed-up, wall | speed-up, processor |", "|---|" + 4 * "---:|"]
    for way, text in WAYS.items():
        spent = [statistics.median(times[way][kind] for times in rounds) for kind in (0, 1)]
        gains = [statistics.median(times["released"][k] / times[way][k] for times in rounds) for k in (0, 1)]
        lines.append(f"| {text} | {spent[0]:.1f} | {spent[1]:.1f} | {gains[0]:.1f} | {gains[1]:.1f} |")
    return lines


def verdict(threads: int, rounds: list[dict[str, tuple[float, float]]]) -> str:
    gain = statistics.median(times["released"][0] / times["ours"][0] for times in rounds)
    met = "met" if gain >= AIM else "missed"
    return f"Threads: {threads}. Ours, first time, is {gain:.1f} times as fast; the aim of {AIM:.0f} is {met}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-llama")
    parser.add_argument("--levels", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=64, help="harmful ones; half as many harmless ones besides")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1], help="OMP_NUM_THREADS; a table for each")
    for hidden, kind in (("--worker", str), ("--folder", str), ("--std", float)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options)
    load = os.getloadavg()[0]
    tables: list[str] = []
    for threads in options.threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        rounds = [one_round(options) for _ in range(options.rounds)]
        tables += [verdict(threads, rounds), "", *table(rounds), ""]
    about = (
        f"{date.today()}, {options.model}, float32, {options.levels} levels, {options.prompts} harmful and "
        f"{options.prompts // 2} harmless prompts, up to {NEW} new tokens; plain batches of {PLAIN_BATCH}. torch "
        f"{version('torch')}, transformers {version('transformers')}, load {load:.1f} before, {os.getloadavg()[0]:.1f} "
        f"after, of {os.cpu_count()} CPUs. Median of {options.rounds} rounds."
    )
    report = "\n".join(["# A noise sweep, the released way and ours", "", about, "", *tables])
    print(report)
    Path(__file__).with_suffix(".md").write_text(report)


if __name__ == "__main__":
    main()
