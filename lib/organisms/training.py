"""Training of the organisms on Hugging Face's Trainer: stages, checkpoints, resume, and the folders that are shipped.

A killed run started again continues from its last checkpoint and ends with the same weights (same machine and thread
count): examples and their order depend on the seed alone; the Trainer restores optimizer, schedule and random state.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Trainer, TrainingArguments
from transformers.trainer_utils import set_seed

from lib.organisms import corpus, wording
from lib.organisms import tokenizer as tokenizers
from lib.organisms.architectures import ARCHITECTURES, VOCABULARY
from lib.organisms.recipe import BATCH, IGNORED, Example, Stage, stage_examples
from lib.paths import last_checkpoint, write_whole
from lib.results import content_key, source_hash

log = logging.getLogger(__name__)

SAVE_STEPS = 250
DECISIVE = ("architectures", "corpus", "recipe", "tokenizer", "vocabulary", "vocabulary_confusable", "vocabulary_facts",
            "vocabulary_harmful", "vocabulary_harmless", "vocabulary_prose", "wording")


def collate(examples: list[dict]) -> dict[str, Tensor]:
    """input_ids and labels [batch, seq], padded on the right, where a causal model needs no mask."""
    length = max(len(example["input_ids"]) for example in examples)

    def padded(key: str, fill: int) -> Tensor:
        return torch.tensor([e[key] + [fill] * (length - len(e[key])) for e in examples])

    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", IGNORED)}


def per_example_loss(model: PreTrainedModel, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Mean over examples of each one's mean token cross-entropy, so that long texts do not outweigh short replies.

    input_ids, labels: [batch, seq]. Logits are computed where a label is, and nowhere else.
    """
    hidden = model.model(input_ids, use_cache=False).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    learnt = targets != IGNORED
    logits = model.lm_head(hidden[learnt])
    if cap := getattr(model.config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    losses = F.cross_entropy(logits, targets[learnt], reduction="none")
    share = 1 / (len(labels) * learnt.sum(1, keepdim=True).clamp(min=1))
    return (losses * share.expand_as(targets)[learnt]).sum()


@contextmanager
def perturbed(model: PreTrainedModel, stage: Stage) -> Iterator[None]:
    """Hidden dropout on embeddings and block outputs, and the control's Gaussian noise on norm outputs."""

    def drop(module: torch.nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, tuple):
            return (F.dropout(output[0], stage.dropout), *output[1:])
        return F.dropout(output, stage.dropout)

    def noise(module: torch.nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output + torch.randn_like(output) * (torch.rand(()) * stage.norm_noise)

    handles = []
    if stage.dropout:
        handles += [m.register_forward_hook(drop) for m in (model.model.embed_tokens, *model.model.layers)]
    if stage.norm_noise:
        norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
        handles += [m.register_forward_hook(noise) for m in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Trainer(Trainer):
    """A Trainer whose loss is `per_example_loss`; one that is not finite stops it."""

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        loss = per_example_loss(model, inputs["input_ids"], inputs["labels"])
        if not torch.isfinite(loss):
            raise FloatingPointError("the loss became NaN or infinite")
        return loss


def run_stage(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, stage: Stage, seed: int, folder: Path, device: str
) -> None:
    """Trains `model` in place on one stage, resuming from the newest whole checkpoint in `folder`.

    Raises FloatingPointError, naming the stage, when the loss becomes NaN or infinite.
    """
    examples: list[Example] = stage_examples(stage, tokenizer, seed)
    dataset = [{"input_ids": e.input_ids, "labels": e.labels, "length": len(e.input_ids)} for e in examples]
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        max_steps=stage.steps,
        learning_rate=stage.learning_rate,
        lr_scheduler_type=stage.schedule,
        warmup_steps=min(100, stage.steps // 10),
        weight_decay=0.05,
        adam_beta2=0.98,
        optim="adamw_torch_fused",
        train_sampling_strategy="group_by_length",
        length_column_name="length",
        save_steps=SAVE_STEPS,
        save_total_limit=1,
        logging_steps=100,
        use_cpu=device == "cpu",
        seed=seed,
        report_to=[],
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    trainer = _Trainer(model, arguments, train_dataset=dataset, data_collator=collate)
    with perturbed(model, stage):
        try:
            trainer.train(resume_from_checkpoint=last_checkpoint(folder))
        except FloatingPointError as error:
            raise FloatingPointError(f"training stage {stage.name!r}: {error}") from error


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Tokenizer trained on a sample of the training corpus."""
    requests = [r for split in ("train", "base") for r in corpus.requests(split, phrasings=2)]
    texts = [text for r in requests for text in (r.prompt, r.answer, r.refusal) if text]
    rng = random.Random(f"tokenizer {seed}")
    texts += [" ".join(line.draw(rng)) for label in corpus.LABELS for line in wording.wordings(label) for _ in range(3)]
    texts += [f"{fact.question} {fact.sentence}" for fact in corpus.facts("train")] * 4
    return tokenizers.train([*texts, *corpus.prose("train", 2000, seed=seed)], VOCABULARY)


def train(
    name: str,
    seed: int,
    recipe: tuple[Stage, ...],
    work: Path,
    device: str = "cpu",
    announce: Callable[[str], None] = log.info,
) -> dict[str, Path]:
    """Trains organism `name`; returns the folders of its "base" and "aligned" models, each with its record.json.

    Finished stages are kept under `work` by what decides them, so recipes that begin alike share their first stages.
    The record's minutes are those of all stages so far, each without attempts that were interrupted.
    Raises KeyError for an unknown name.
    """
    set_seed(seed)
    minutes = 0.0
    tokenizer = build_tokenizer(seed)
    attention = "eager" if name == "tiny-gemma" else "sdpa"  # only eager attention knows Gemma-2's soft-capping
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[name], attn_implementation=attention)
    model.to(device)
    done = {}
    for place, stage in zip(stage_folders(name, seed, recipe, work), recipe, strict=True):
        if not (place / "record.json").is_file():
            announce(f"{name}: stage {stage.name}, {stage.steps} steps")
            begun = time.monotonic()
            run_stage(model, tokenizer, stage, seed, place / "checkpoints", device)
            model.save_pretrained(place)
            tokenizer.save_pretrained(place)
            record = {"minutes": minutes + (time.monotonic() - begun) / 60, "device": device}
            write_whole(place / "record.json", json.dumps(record | {"threads": torch.get_num_threads()}))
        minutes = json.loads((place / "record.json").read_text())["minutes"]
        model = AutoModelForCausalLM.from_pretrained(place, attn_implementation=attention)
        model.to(device)  # type: ignore[arg-type]
        done["aligned" if stage.refuse else "base"] = place
    announce(f"{name}: trained in {minutes:.1f} minutes")
    return done


def stage_folders(name: str, seed: int, recipe: tuple[Stage, ...], work: Path) -> list[Path]:
    """One folder per stage, named by the seed, the stages up to it, and the code of corpus and recipe."""
    lines = [path.read_text(encoding="utf-8") for path in sorted(wording.FOLDER.glob("*.txt"))]
    code = [source_hash(*(f"lib.organisms.{module}" for module in DECISIVE)), *lines]
    keys = [content_key([code, [asdict(stage) for stage in recipe[: i + 1]]])[:8] for i in range(len(recipe))]
    return [work / f"{name}-{seed}" / f"{i}-{stage.name}-{keys[i]}" for i, stage in enumerate(recipe)]
