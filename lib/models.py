"""Names to (model, tokenizer): the organisms shipped here, the paper's ten LLMs, Gemma, any folder or hub id.

Every model is loaded *exact*: eager attention and eager experts, so that a patched and an exact run differ by the patch
alone (kernels differ by about 1e-6, and Gemma-2 loses its soft-capping under others).
"""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from lib.anatomy import text_config
from lib.registry import ModelError, explain, gigabytes, resolve, revision_of, verify

__all__ = ["ModelError", "best_device", "best_dtype", "load", "resolve", "weights_hash"]

SHOWN = 1.0  # GB of weights from which loading takes long enough for a progress bar
ROOM = 0.9  # share of the free memory that weights may take; the rest is for activations and keys and values


def best_device(device: str = "auto") -> str:
    """cuda or cpu for "auto"; a device by name as it is. ModelError for one that PyTorch lacks."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"device {device!r} was asked for, but PyTorch sees no GPU; use device='cpu' or 'auto'")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ModelError(f"no device {device!r} here; choose one of auto, cpu, cuda, or another of PyTorch's") from None
    return device


def best_dtype(dtype: str, device: str) -> torch.dtype:
    """auto: bf16 on a GPU, fp32 on a CPU, where bf16 is many times slower."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype == "auto":
        return torch.float32 if device.startswith("cpu") else torch.bfloat16
    if dtype not in known:
        raise ModelError(f"unknown dtype {dtype!r}; choose one of auto, {', '.join(known)}")
    return known[dtype]


def weight_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes of the weights of a model with this configuration, counted without making them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    return sum(parameter.numel() for parameter in model.parameters()) * torch.finfo(dtype).bits // 8


def free_bytes(device: str) -> list[int]:
    """Free memory of this machine, or of every GPU that a model on `device` may use."""
    if not device.startswith("cuda"):
        return [psutil.virtual_memory().available]
    gpus = range(torch.cuda.device_count()) if device == "cuda" else [torch.device(device).index]
    return [torch.cuda.mem_get_info(gpu)[0] for gpu in gpus]


def check_memory(name: str, config: Any, device: str, dtype: torch.dtype) -> bool:
    """Whether the weights must be spread over several GPUs; ModelError, before any is fetched, if they fit nowhere.

    Models whose code is not in Transformers are not checked: they are counted by making them.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return device == "cuda" and torch.cuda.device_count() > 1
    need, free = weight_bytes(config, dtype), free_bytes(device)
    if need <= ROOM * free[0]:
        return False
    if need <= ROOM * sum(free):
        return True
    holder, remedy = "this machine has", "use a GPU or a smaller model"
    if device.startswith("cuda"):
        holder, remedy = "the GPUs have" if len(free) > 1 else "the GPU has", "use more GPUs or a smaller model"
    kind = str(dtype).removeprefix("torch.")
    needs = f"{name}: its weights need {need / 1e9:.0f} GB in {kind}"
    raise ModelError(f"{needs} and {holder} {sum(free) / 1e9:.0f} GB free; {remedy}")


def fitting_rows(model: PreTrainedModel, length: int, most: int) -> int:
    """As many sequences of `length` tokens, up to `most`, as fill a quarter of the GPU's free memory with keys and
    values; the rest is for copies of them (heads repeated, attention probabilities)."""
    if model.device.type != "cuda":
        return most
    config, element = text_config(model), torch.finfo(model.dtype).bits // 8
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    row = 2 * config.num_hidden_layers * heads * head * element * length
    unused = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    free = torch.cuda.mem_get_info(model.device)[0] + unused
    return max(1, min(most, int(free / 4 / row)))


def check_loaded(told: dict[str, Any]) -> None:
    """ValueError if some weights are random, because the files lack them or have them in another size.

    told: what Transformers says of the loading (`output_loading_info`)."""
    random = sorted([*told["missing_keys"], *(key for key, *_ in told["mismatched_keys"])])
    if random:
        raise ValueError(f"{len(random)} weights are not in its files or of another size, first {random[0]}")


def check_stored(name: str, config: Any) -> None:
    """ModelError for weights that are stored quantized: every approximation here is one of a 16-bit model."""
    if quantization := getattr(config, "quantization_config", None):
        method = quantization.get("quant_method", "unknown method") if isinstance(quantization, dict) else quantization
        raise ModelError(f"{name}: its weights are stored quantized ({method}); give the 16-bit checkpoint")


def _tokenizer(name: str, where: str, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The model's tokenizer. ModelError for a folder without one that can be read."""
    try:
        return AutoTokenizer.from_pretrained(where, **options)
    except Exception as error:
        if not Path(where).is_dir():
            raise
        raise ModelError(f"{name}: no tokenizer in {where} that can be read (tokenizer.json); copy it there") from error


def load(
    name: str, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model in evaluation mode, exact, and its tokenizer (left padding). ModelError in one line if it cannot be had.
    trust_remote_code: run the repository's own model code; no notebook asks for it."""
    where = resolve(name)
    if Path(where).is_dir():
        verify(Path(where))
    show_bar = (gigabytes(name) or SHOWN) >= SHOWN
    (transformers_logging.enable_progress_bar if show_bar else transformers_logging.disable_progress_bar)()
    device = best_device(device)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision_of(name)}
    try:
        config = AutoConfig.from_pretrained(where, **options)
        check_stored(name, config)
        tokenizer = _tokenizer(name, where, options)
        spread = check_memory(name, config, device, best_dtype(dtype, device))
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            where,
            config=config,
            dtype=best_dtype(dtype, device),
            attn_implementation="eager",
            experts_implementation="eager",
            use_safetensors=True,
            device_map="auto" if spread else None,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
        model, told = loaded
        check_loaded(told)
        if not hasattr(model, "hf_device_map"):
            model.to(device)
    except torch.OutOfMemoryError:
        raise ModelError(f"{name}: too little GPU memory for its weights; use more GPUs or a smaller model") from None
    except (OSError, SafetensorError, StrictDataclassError, ValueError) as error:
        raise ModelError(explain(name, where, error)) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return model.eval(), tokenizer


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over what a tokenizer does: its rules and words, and the special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else str(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{rules} {tokenizer.special_tokens_map}".encode()).hexdigest()


def weights_hash(model: torch.nn.Module) -> str:
    """sha256 over all weights, by name, the configuration and the end tokens: what a stored reply is tied to."""
    config = model.config.to_dict() if isinstance(model, PreTrainedModel) else {}
    decisive = {key: value for key, value in config.items() if key[0] != "_" and key != "transformers_version"}
    generation = getattr(model, "generation_config", None)
    ends = getattr(generation, "eos_token_id", None)
    digest = hashlib.sha256(json.dumps([decisive, ends], sort_keys=True, default=str).encode())
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
