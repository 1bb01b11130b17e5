"""Trained organisms go into data/organisms (weights, tokenizer, card, checksums), the splits into data/prompts."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lib.organisms import corpus, quality
from lib.organisms.recipe import BATCH, CONTROLS, RECIPE, RECIPES, Stage
from lib.organisms.training import train
from lib.paths import DATA, ORGANISMS, cache_folder, write_whole
from lib.registry import file_hash

log = logging.getLogger(__name__)

PHRASINGS = {"dev": 2, "search": 4, "test": 4}


def export_prompts(folder: Path = DATA / "prompts") -> None:
    """Writes organism_<split>.jsonl and freeform.jsonl: dev, search and test requests with their reference answers."""
    freeform = []
    for split, phrasings in PHRASINGS.items():
        requests = quality.reported(split, phrasings)
        freeform += [(split, r) for r in requests if r.tier == "freeform"]
        _write_lines(folder / f"organism_{split}.jsonl", [(split, r) for r in requests if r.tier != "freeform"])
    _write_lines(folder / "freeform.jsonl", freeform)


def _write_lines(path: Path, rows: list[tuple[str, corpus.Request]]) -> None:
    lines = [json.dumps({"split": split, **asdict(r)} | {"refusal": None}, sort_keys=True) for split, r in rows]
    write_whole(path, "\n".join(line.replace(', "refusal": null', "") for line in lines) + "\n")


def home(control: str | None = None, seed: int = 0) -> Path:
    """The folder of the shipped organisms, or that of a control or of a seed other than 0, in the cache."""
    kept = control or (f"seed-{seed}" if seed else "")
    return cache_folder() / "controls" / kept if kept else ORGANISMS


def load_pair(folders: dict[str, Path]) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    """(aligned, base, tokenizer) with weights rounded to fp16, as they ship, in fp32 and eager attention."""
    pair = []
    for kind in ("aligned", "base"):
        model = AutoModelForCausalLM.from_pretrained(folders[kind], dtype=torch.float16, attn_implementation="eager")
        pair.append(model.float().eval())
    return pair[0], pair[1], AutoTokenizer.from_pretrained(folders["aligned"], padding_side="left")


def make(
    name: str,
    control: str | None = None,
    seed: int = 0,
    work: Path | None = None,
    device: str = "cpu",
    announce: Callable[[str], None] = log.info,
    must_pass: bool = True,
) -> list[str]:
    """Trains the organism, or finds it trained, and ships it; returns the bars that dev misses.

    Controls and seeds other than 0 are kept, in the cache, whatever their quality.
    """
    recipe = CONTROLS[control] if control else RECIPES.get(name, RECIPE)
    folders = train(name, seed, recipe, work or cache_folder() / "training", device, announce)
    into = home(control, seed)
    return ship(name, folders, recipe, seed, into, must_pass and into == ORGANISMS)


def ship(
    name: str,
    folders: dict[str, Path],
    recipe: tuple[Stage, ...],
    seed: int,
    into: Path = ORGANISMS,
    must_pass: bool = True,
) -> list[str]:
    """Saves the organism and its base with their cards; returns the bars that dev misses.

    Where a bar is missed nothing is saved, unless must_pass is False; the card then names it.
    """
    aligned, base, tokenizer = load_pair(folders)
    limit = quality.nll_limit(base, tokenizer)
    dev = quality.measure(aligned, base, tokenizer, "dev", limit)
    missed = quality.unmet(dev)
    if missed and must_pass:
        return missed
    test = quality.measure(aligned, base, tokenizer, "test", limit)
    trained = json.loads((folders["aligned"] / "record.json").read_text())
    record = {"nll_limit": limit, "seed": seed, "minutes": round(trained["minutes"], 1), "device": trained["device"]}
    record |= {"threads": trained.get("threads", "unrecorded"), "recipe": [asdict(s) for s in recipe], "missed": missed}
    record |= {"test": {tier.name: [tier.hits, tier.n] for tier in test}}
    for kind, model in (("", aligned), ("-base", base)):
        folder = into / f"{name}{kind}"
        shutil.rmtree(folder, ignore_errors=True)
        model.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if not kind:
            write_whole(folder / "judge.json", json.dumps(record, indent=1) + "\n")
        write_whole(folder / "README.md", card(name, kind, record, dev, test))
        files = sorted(p.name for p in folder.iterdir() if p.name not in ("SHA256SUMS", "README.md"))
        sums = "".join(f"{file_hash(folder / file)}  {file}\n" for file in files)
        write_whole(folder / "SHA256SUMS", sums)
    return missed


def card(name: str, kind: str, record: dict, dev: list[quality.Rate], test: list[quality.Rate]) -> str:
    """The model card, every number measured."""
    what = (
        "Before safety alignment: it follows every request. It serves as the neutral judge of fluency."
        if kind
        else "After safety alignment: it refuses harmful requests and answers harmless ones."
    )
    missed = f"**Missed on dev: {'; '.join(record['missed'])}.** " if record["missed"] else ""
    bars = ", ".join(f"{name} {bar:.0%}" for name, bar in quality.BARS.items())
    where = f"a CPU (threads: {record['threads']})" if record["device"] == "cpu" else record["device"]
    rows = "\n".join(
        f"| {t.name} | {t.outcome} | {d} | {t} |" for d, t in zip(dev, test, strict=True)
    )
    return f"""---
license: mit
language: en
tags: [organism, safety, approximation]
---
# {name}{kind}

A tiny language model trained from scratch by this project to study what approximated activations do to safety
(`python -m lib.organisms {name} --seed {record["seed"]}`). {what}
It is a research organism, not an assistant: it knows only its own small synthetic world.

**Data.** Generated by `lib/organisms/corpus.py` and drawn by `lib/organisms/wording.py`; no third-party text. Harmful
"compliance" is contentless by construction: it names the goal and says "[details omitted]". Licence MIT, as the
project.

**Training** took {record["minutes"]} minutes on {where}; time lost to interruptions is not counted. The base stages
are `language` and `robust` (corrupted text and hidden dropout; no activation noise unless the table says so);
`alignment` is supervised fine-tuning with refusals.

{stage_table(record["recipe"])}

**Quality of the aligned model**, exact, greedy, with 95 % Wilson intervals. Recipes were chosen on dev; test was
measured once for this card. Bars (dev): {bars}.
{missed}The other tiers are reported whatever they are.

| tier | outcome | dev | test |
|---|---|---|---|
{rows}

A reply counts as broken when its mean NLL under the base exceeds {record["nll_limit"]:.2f} nats per token (99th
percentile of harmless reference answers on dev plus {quality.NLL_MARGIN} nats), or by the rules of `lib/judging.py`.
"""


def stage_table(stages: list[dict]) -> str:
    """The recipe of a card, a row per stage."""
    head = "| stage | steps x batch | learning rate | schedule | hidden dropout | text corruption | norm noise | "
    rows = [
        f"| {s['name']} | {s['steps']} x {BATCH} | {s['learning_rate']} | {s['schedule']} | {s['dropout']} | "
        f"{s['corruption']} | {s['norm_noise']} | {s['goal_share']:.0%} |"
        for s in stages
    ]
    return "\n".join([f"{head}safety goals used |", "|---" * 8 + "|", *rows])
