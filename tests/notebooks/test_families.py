"""Every notebook's short version on toy models of every family, loaded from a folder like any model.

Three layers with the family's true anatomy, random weights trained for a moment, a tokenizer trained here, and a chat
template in the family's form. What is tested is that everything runs, not what it finds. The normal suite runs each
notebook on one family; all pairs: `pytest -m families tests/notebooks/test_families.py`, 10 to 40 s each.
"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import nbformat
import papermill
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lib.organisms import corpus
from lib.paths import ROOT
from tests.families import CONFIGS

SMALL = {"fast": True, "n_prompts": 6, "max_new_tokens": 6, "batch_size": "8"}
LAYERS = 3  # notebook 05 compares thirds
STEPS = 60  # of training: noise can only harm a model that predicts better than chance (notebooks 04 and 05)
NOTEBOOKS = sorted((ROOT / "notebooks").glob("0[1-8]*.ipynb"))
CHOSEN = {
    "01": "phi3",
    "02": "gemma2",
    "03": "qwen3",
    "04": "mistral",
    "05": "gemma3",
    "06": "mixtral",
    "07": "llama",
    "08": "qwen2",
}
"""Notebook -> its family in the normal suite."""
SLOW = {"07", "08"}  # minutes each: with -m families only

TURN = "{% for m in messages %}"
REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
FOLDS = (
    "{% set first = messages[0]['content'] ~ '\n\n' if messages[0]['role'] == 'system' else '' %}"
    "{% set messages = messages[1:] if messages[0]['role'] == 'system' else messages %}"
)
GEMMA = (
    f"{TURN}<start_of_turn>{{{{ 'model' if m['role'] == 'assistant' else m['role'] }}}}\n"
    "{% if loop.first %}{{ first }}{% endif %}{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
INST = (
    f"{TURN}{{% if m['role'] == 'user' %}}[INST] {{{{ m['content'] }}}} [/INST]"
    "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
LLAMA3 = (
    f"{TURN}<|start_header_id|>{{{{ m['role'] }}}}<|end_header_id|>\n\n{{{{ m['content'] | trim }}}}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    f"{TURN}<|im_start|>{{{{ m['role'] }}}}\n{{{{ m['content'] }}}}<|im_end|>\n{{% endfor %}}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PHI = (
    f"{TURN}<|{{{{ m['role'] }}}}|>\n{{{{ m['content'] }}}}<|end|>\n{{% endfor %}}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
OLMO = (
    f"{TURN}<|{{{{ m['role'] }}}}|>\n{{{{ m['content'] }}}}{{{{ '</s>' if m['role'] == 'assistant' }}}}\n{{% endfor %}}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TEMPLATES = {
    "llama": "<s>" + LLAMA3,
    "mistral": "<s>" + INST,
    "mixtral": "<s>" + REFUSES + INST,
    "gemma": "<s>" + REFUSES + GEMMA,
    "gemma2": "<s>" + REFUSES + GEMMA,
    "gemma3": "<s>" + FOLDS + GEMMA,
    "qwen2": CHATML,
    "qwen3": CHATML,
    "phi3": PHI,
    "olmo2": "<s>" + OLMO,
}
MARKS = [
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"),
    *("<|user|>", "<|system|>", "<|assistant|>", "<|end|>", "<start_of_turn>", "<end_of_turn>"),
]


@cache
def trained_tokenizer() -> Tokenizer:
    """640 tokens of byte-level BPE, every family's special marks among them."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", *MARKS]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=640, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(corpus.prose("train", 40), trainer)
    return inner


def build(family: str, folder: Path) -> Path:
    """A folder with the family's configuration, tokenizer and chat template, and a model that has begun to learn prose
    and to refuse whatever it is asked: 07 and 08 keep what safety there is."""
    marks = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained_tokenizer(), additional_special_tokens=MARKS, **marks)
    tokenizer.chat_template = TEMPLATES[family]
    config = copy.deepcopy(CONFIGS[family])
    config.vocab_size, config.max_position_embeddings, config.num_hidden_layers = len(tokenizer), 256, LAYERS
    if getattr(config, "layer_types", None):
        config.layer_types = (config.layer_types * LAYERS)[:LAYERS]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    train(model, torch.tensor(tokenizer("\n".join(corpus.prose("train", 40)), verbose=False)["input_ids"]))
    asked = [request.prompt for request in corpus.requests("train", label="harmful")[:200]]
    turns = [[{"role": "user", "content": a}, {"role": "assistant", "content": "I cannot help."}] for a in asked]
    refusals = [token for turn in turns for token in tokenizer.apply_chat_template(turn)["input_ids"]]
    train(model, torch.tensor(refusals), 4 * STEPS)
    model.save_pretrained(folder / family)
    tokenizer.save_pretrained(folder / family)
    return folder / family


def train(model: torch.nn.Module, ids: torch.Tensor, steps: int = STEPS) -> None:
    """Next-token prediction on windows of 32 tokens."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    windows = ids[: len(ids) // 32 * 32].view(-1, 32)
    for step in range(steps):
        batch = windows[torch.arange(16 * step, 16 * step + 16) % len(windows)]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Results, figures and models of all pairs."""
    root = tmp_path_factory.mktemp("families")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RESULTS", "CACHE", "FIGURES"):
            patch.setenv(f"APPROX_{name}", str(root / name.lower()))
        yield root


def pairs() -> list:
    marked = []
    for path in NOTEBOOKS:
        for family in CONFIGS:
            number = path.name[:2]
            usual = CHOSEN[number] == family and number not in SLOW
            marks = pytest.mark.notebooks if usual else pytest.mark.families
            marked.append(pytest.param(path, family, marks=marks, id=f"{number}-{family}"))
    return marked


@pytest.mark.parametrize(("path", "family"), pairs())
def test_runs_on(path: Path, family: str, folder: Path) -> None:
    model = folder / "models" / family
    if not model.is_dir():
        build(family, folder / "models")
    known = papermill.inspect_notebook(str(path))
    settings = {name: value for name, value in SMALL.items() if name in known}
    output = folder / f"{path.stem}-{family}.ipynb"
    papermill.execute_notebook(
        str(path), str(output), {**settings, "model": str(model)}, progress_bar=False, cwd=str(folder)
    )
    code = [cell for cell in nbformat.read(output, as_version=4).cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert not any(out.output_type == "error" for cell in code for out in cell.outputs)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_has_a_template_of_its_form(family: str, tmp_path: Path) -> None:
    from lib import models as loading
    from lib.prompts import QUADA_SYSTEM, render

    model, tokenizer = loading.load(str(build(family, tmp_path)), "cpu")
    (text,), special = render(tokenizer, ["Name a colour."])
    assert "Name a colour." in text and not special
    (text,), _ = render(tokenizer, ["Name a colour."], "quada")
    assert text.count(QUADA_SYSTEM) == 1 and text.index(QUADA_SYSTEM) < text.index("Name a colour.")
    assert model.config._attn_implementation == "eager"
