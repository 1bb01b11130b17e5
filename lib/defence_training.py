"""QuadA's training step on TRL's DPOTrainer: an approximated policy, a clean reference, and a cosine regulariser.

    L = -log sigmoid(beta [log pi~(y+|x)/pi(y+|x) - log pi~(y-|x)/pi(y-|x)]) - weight * mean_(i<j) cos(h~_i, h~_j)

pi is the clean original, pi~ the trained policy with an approximation in its first tau layers, y+ and y- the chosen and
the rejected reply; h~ is the approximated residual state after the first block at the last token of a harmful prompt
(arXiv:2502.00840, section on the defence; its code has none of this). Objective "sft" is -log pi~(y+|x) per token in
place of the first term, "both" is their sum.

The approximation's error counts as a constant: x -> x + stop_gradient(approximated(x) - x). That is exact for noise,
and gives rounding and thresholds, which have no useful gradient, a straight-through one. Reference log-probabilities
are computed once, before anything is patched, so the reference is clean for LoRA too, whose policy shares its modules.
No gradient checkpointing: the second forward pass would run without the approximation, or with another draw of it.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import set_seed
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from lib.anatomy import anatomy
from lib.approximations import State, Step, Technique
from lib.approximations.technique import Transform
from lib.errors import ChoiceError, check
from lib.generation import end_tokens
from lib.patching import approximated
from lib.paths import last_checkpoint, write_whole
from lib.prompts import render, turn_end

OBJECTIVES = {"dpo": ["sigmoid"], "sft": ["sft"], "both": ["sigmoid", "sft"]}
SAVE_STEPS = 50


@dataclass(frozen=True)
class Pair:
    """One preference: `chosen` is a refusal for a harmful prompt and an answer for a harmless one, `rejected` not.

    goal: what the prompt asks for, by which splits are kept apart."""

    prompt: str
    chosen: str
    rejected: str
    harmful: bool
    goal: str


@dataclass(frozen=True)
class Recipe:
    """How a defence is trained.

    perturbation: the technique in the policy's first layers, None for none; tau: their number, 0 for none.
    objective: "dpo", "sft" or "both". beta: of DPO. weight: of the regulariser (lambda). rank: of LoRA; 0 trains all
    weights. batch: pairs per step. ChoiceError for another objective, and for no steps,
    a negative rank and a learning rate of 0 or below.
    """

    perturbation: Technique | None
    tau: int
    objective: str = "dpo"
    beta: float = 0.1
    weight: float = 0.1
    steps: int = 200
    learning_rate: float = 5e-5
    batch: int = 8
    rank: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ChoiceError(f"unknown objective {self.objective!r}; choose one of {', '.join(OBJECTIVES)}")
        check(steps=self.steps, rank=self.rank, learning_rate=self.learning_rate)
        if (self.perturbation is None) != (self.tau == 0):
            raise ValueError(f"tau {self.tau} with perturbation {self.perturbation}: give both, or neither")

    def described(self) -> dict[str, Any]:
        """Everything that decides the weights, for keys and records."""
        technique = self.perturbation
        return asdict(self) | {"perturbation": technique and [technique.name, technique.settings]}


@dataclass(frozen=True)
class StraightThrough(Technique):
    """The error of another technique's transforms, added as a constant. ValueError for one that replaces operations."""

    inner: Technique
    name: ClassVar[str] = "straight-through"
    category: ClassVar[str] = "noise"

    def __post_init__(self) -> None:
        if self.inner.operations:
            editors = "gaussian, laplace, teal, cats, smoothquant"
            raise ValueError(f"{self.inner.name} replaces functions: train against one that edits, of {editors}")

    @property
    def sites(self) -> tuple[str, ...]:
        return self.inner.sites

    def transform(self, site: str, layer: int, state: State | None) -> Transform:
        edit = self.inner.transform(site, layer, state)

        def apply(x: Tensor, step: Step) -> Tensor:
            return x + (edit(x.detach(), step) - x).detach()

        return apply


def mean_cosine(states: Tensor) -> Tensor:
    """Mean cosine similarity over the pairs of rows of states [n, channels]; 0 for fewer than two rows."""
    n = len(states)
    if n < 2:
        return states.new_zeros(())
    unit = F.normalize(states.float(), dim=-1)
    return (unit.sum(0).square().sum() - n) / (n * (n - 1))


class Collator(DataCollatorForPreference):
    """TRL's, with a bool tensor `harmful` [pairs]."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        harmful = torch.tensor([example["harmful"] for example in examples])
        return super().torch_call(examples) | {"harmful": harmful}


class QuadaTrainer(DPOTrainer):
    """DPOTrainer whose policy runs approximated; only documented methods and the tokenisation are overridden."""

    def __init__(self, recipe: Recipe, state: State | None, **options: Any) -> None:
        self.recipe, self.approximation_state = recipe, state
        super().__init__(**options)

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset  # tokenised by `tokenised`, as prompts are for evaluation

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        return super().compute_ref_log_probs(model, {k: v for k, v in inputs.items() if k != "harmful"})

    def compute_loss(self, model: Any, inputs: dict[str, Any], *options: Any, **named: Any) -> Tensor:
        harmful = inputs.pop("harmful").to(inputs["input_ids"].device)
        found: list[Tensor] = []  # residual states [rows, seq, channels] after the first block

        def keep(module: Any, args: Any, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)

        first_block = anatomy(self._network()).blocks[0].module
        with self._approximated(inputs["input_ids"]), first_block.register_forward_hook(keep):
            loss = super().compute_loss(model, inputs, *options, **named)
        n = len(harmful)  # pairs; the first n rows hold the chosen replies
        last = inputs["completion_mask"][:n].argmax(1) - 1  # token of each prompt
        states = found[0][torch.arange(n), last]
        likeness = mean_cosine(states[harmful])
        self._metrics["train"]["likeness"].append(likeness.item())
        loss = loss - self.recipe.weight * likeness
        if not torch.isfinite(loss):
            step = self.state.global_step + 1
            raise FloatingPointError(f"defence: the loss is NaN or infinite at step {step}: lower the learning rate")
        return loss

    def _approximated(self, ids: Tensor) -> AbstractContextManager[Any]:
        """The first tau layers approximated; noise is drawn anew for every batch, and the same again after a resume."""
        technique = self.recipe.perturbation
        if technique is None:
            return nullcontext()
        if "seed" in technique.settings:
            drawn = zlib.crc32(ids.cpu().numpy().tobytes(), self.state.global_step + 1000003 * self.recipe.seed)
            technique = replace(technique, seed=drawn)  # type: ignore[call-arg]
        layers = range(self.recipe.tau)
        return approximated(self._network(), StraightThrough(technique), self.approximation_state, layers)

    def _network(self) -> Any:
        network: Any = self.accelerator.unwrap_model(self.model)
        return network.get_base_model() if self.recipe.rank else network


class Bar(TrainerCallback):
    """A progress bar over the steps that are left."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="defence", leave=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(1)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()


def tokenised(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], protocol: str, ends: Sequence[int] = ()
) -> Dataset:
    """prompt_ids, chosen_ids, rejected_ids and harmful of each pair; prompts and ends as they are in evaluation.

    ends: the model's end tokens."""
    texts, special = render(tokenizer, [pair.prompt for pair in pairs], protocol)

    def ids(text: str, special: bool = False) -> list[int]:
        return tokenizer(text, add_special_tokens=special)["input_ids"]

    end = turn_end(tokenizer, ends)
    return Dataset.from_list(
        [
            {"prompt_ids": ids(text, special), "chosen_ids": ids(pair.chosen) + end,
             "rejected_ids": ids(pair.rejected) + end, "harmful": pair.harmful}
            for text, pair in zip(texts, pairs, strict=True)
        ]
    )  # fmt: skip


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    recipe: Recipe,
    folder: Path,
    state: State | None = None,
    protocol: str = "chat",
) -> Path:
    """Trains a copy of `model` and saves it, with `defence.json`, in `folder`, which `lib.models.load` opens.

    What is trained is float32, for bfloat16 would round small steps away; it is saved in the model's own dtype. A
    killed training started again goes on from its last whole checkpoint and ends with the same weights.
    FloatingPointError when the loss is not finite.
    """
    checkpoints = folder / "checkpoints"
    set_seed(recipe.seed)
    trainer = _trainer(deepcopy(model), tokenizer, pairs, recipe, checkpoints, state, protocol)
    trainer.train(resume_from_checkpoint=last_checkpoint(checkpoints))
    trained: Any = trainer.accelerator.unwrap_model(trainer.model)
    trained = trained.merge_and_unload() if recipe.rank else trained
    trained.to(model.dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.rmtree(checkpoints, ignore_errors=True)
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    record = {"recipe": recipe.described(), "pairs": len(pairs), "log": log}
    write_whole(folder / "defence.json", json.dumps(record, indent=1, default=str))
    return folder


def _trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    recipe: Recipe,
    folder: Path,
    state: State | None,
    protocol: str,
) -> QuadaTrainer:
    """The trainer of `model` itself, whose weights become float32, unless LoRA's, which are, are the ones trained."""
    arguments = _arguments(recipe, folder, model)  # of the dtype that the model has now
    lora = LoraConfig(r=recipe.rank, lora_alpha=2 * recipe.rank, target_modules="all-linear") if recipe.rank else None
    trainer = QuadaTrainer(
        recipe,
        state,
        model=model if recipe.rank else model.float(),
        args=arguments,
        data_collator=Collator(tokenizer.pad_token_id),
        train_dataset=tokenised(tokenizer, pairs, protocol, end_tokens(model)),
        processing_class=tokenizer,
        peft_config=lora,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Bar())
    return trainer


def _arguments(recipe: Recipe, folder: Path, model: PreTrainedModel) -> DPOConfig:
    return DPOConfig(
        output_dir=str(folder),
        loss_type=OBJECTIVES[recipe.objective],
        beta=recipe.beta,
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, recipe.steps // 20),
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=2 * recipe.batch,
        max_length=None,
        gradient_checkpointing=False,
        bf16=not recipe.rank and model.dtype == torch.bfloat16,  # of the forward passes
        use_cpu=model.device.type == "cpu",
        save_steps=SAVE_STEPS,
        save_total_limit=1,
        logging_steps=max(1, recipe.steps // 15),
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        seed=recipe.seed,
        report_to=[],
    )
