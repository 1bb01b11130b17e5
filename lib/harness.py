"""Standard benchmarks (MMLU and others) on a patched in-memory model, through lm-evaluation-harness.

Optional: `pip install -r requirements-extra.txt`. Stock tasks download their data; a local task needs its YAML folder.

    with approximated(model, technique, state):
        accuracy = evaluate(model, tokenizer, ["mmlu"], num_fewshot=5)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib.errors import ChoiceError, PlainError
from lib.generation import non_finite
from lib.patching import engaged


class HarnessMissing(PlainError, ImportError):
    """lm-evaluation-harness is not installed; the message says how to get it."""


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    task_folder: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """{task: {metric: value, with its standard error}} of the model as it is now, patched or not.

    num_fewshot: None takes the task's own. limit: documents per task. task_folder: own tasks as YAML files, used
    instead of the stock ones. One document at a time where a token's result depends on its row: the harness pads on the
    right and passes no mask. Raises HarnessMissing, ChoiceError for a task the harness does not know, and
    NonFiniteError for logits of which the harness would make an accuracy nonetheless.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise HarnessMissing("lm-evaluation-harness is missing: pip install -r requirements-extra.txt") from error
    own = None if task_folder is None else str(task_folder)
    manager = TaskManager(include_path=own, include_defaults=own is None)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ChoiceError(f"unknown task {', '.join(unknown)}; see 'lm_eval ls tasks'")
    techniques = [technique for technique, _ in engaged(model) if technique]
    if any(technique.whole_prompt or not technique.per_token for technique in techniques):
        batch_size = 1
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, device=str(model.device), batch_size=batch_size)
    with finite_logits(model):
        found = simple_evaluate(wrapped, tasks=list(tasks), num_fewshot=num_fewshot, limit=limit, task_manager=manager)
    return found["results"]


@contextmanager
def finite_logits(model: PreTrainedModel) -> Iterator[None]:
    """Within it, logits that are NaN or infinite raise NonFiniteError, which names where they come from."""

    def check(module: PreTrainedModel, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if not torch.isfinite(output.logits).all():
            handle.remove()
            raise non_finite(model, {}, lambda: model(*args, **kwargs))

    handle = model.register_forward_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
