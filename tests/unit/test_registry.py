"""The registry's facts, and the one line that every model gets which cannot be had."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import httpx
import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

from lib import estimates, models, registry
from lib.models import ModelError
from lib.paths import ROOT, between_markers
from lib.registry import REGISTRY
from tests.families import CONFIGS

PAPER = {
    "llama-2-7b": (13.5, 0.045),
    "llama-2-13b": (26.0, 0.043),
    "llama-3.1-8b": (16.1, 0.075),
    "phi-3-mini": (7.6, 0.040),
    "phi-3.5-mini": (7.6, 0.033),
    "mistral-7b": (14.5, 0.20),
    "mixtral-8x7b": (93.4, 0.40),
    "zephyr-7b": (14.5, 0.25),
    "qwen2-7b": (15.2, 0.29),
    "qwen2.5-32b": (65.5, 0.20),
}
"""The paper's ten models -> GB of their weights at 16 bits, std at the peak of their published curve."""

ALPHA = {"mistral-7b": 0.80, "mixtral-8x7b": 0.80, "zephyr-7b": 0.80}
"""SmoothQuant's alpha where it is not 0.85, from the released README; Zephyr is a Mistral."""


def test_the_papers_ten_models_and_gemma():
    assert set(PAPER) | {"gemma-2-2b", "gemma-2-9b", "gemma-3-1b", "gemma-3-270m"} == set(registry.REGISTRY)
    for name, (size, peak) in PAPER.items():
        entry = registry.REGISTRY[name]
        assert entry.gigabytes == size and peak < entry.gaussian_range <= 2.5 * peak
    for name, entry in registry.REGISTRY.items():
        assert re.fullmatch(r"[0-9a-f]{40}", entry.revision) and entry.hub.count("/") == 1
        assert entry.gated == entry.hub.startswith(("meta-llama/", "mistralai/", "google/"))
        assert entry.alpha == ALPHA.get(name, 0.85)
    assert len({entry.revision for entry in registry.REGISTRY.values()}) == len(registry.REGISTRY)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("llama-3.1-8b", 16.1),
        ("meta-llama/Llama-3.3-70B-Instruct", 140),
        ("Qwen/Qwen2.5-0.5B", 1.0),
        ("google/gemma-3-270m", 0.54),
        ("mistralai/Mixtral-8x22B-v0.1", 352),
        ("owner/name-without-a-size", None),
    ],
)
def test_sizes_that_names_tell(name: str, size: float | None):
    assert registry.gigabytes(name) == (size if size is None else pytest.approx(size))


def test_a_folder_weighs_what_it_holds(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(3000))
    assert registry.gigabytes(str(tmp_path)) == 3e-6


def answer(kind: type[Exception]) -> Exception:
    if issubclass(kind, GatedRepoError | RepositoryNotFoundError):
        return kind("401", response=httpx.Response(401, request=httpx.Request("GET", "https://hub")))
    return kind("no route")


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        (GatedRepoError, "is gated; accept its licence on the hub, then run 'hf auth login' or set HF_TOKEN"),
        (RepositoryNotFoundError, "no model 'google/gemma-2-2b-it' on the hub (or it is private and no token is set)"),
        (httpx.ConnectError, "is not in the local cache and the model hub cannot be reached"),
        (OfflineModeIsEnabled, "is not in the local cache and the model hub cannot be reached"),
    ],
)
def test_what_the_hub_refuses_gets_one_line(kind: type[Exception], line: str, monkeypatch: pytest.MonkeyPatch):
    def refuse(self: object, repo: str) -> None:
        raise answer(kind)

    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", refuse)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    with pytest.raises(ModelError) as caught:
        registry.check("gemma-2-2b")
    assert line in str(caught.value) and str(caught.value).startswith("gemma-2-2b: ") and "\n" not in str(caught.value)


def test_a_model_in_the_local_cache_needs_no_hub(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """The cache holds the registered commit, and no branch that points to it."""
    entry = registry.REGISTRY["gemma-2-2b"]
    commit = tmp_path / f"models--{entry.hub.replace('/', '--')}" / "snapshots" / entry.revision
    commit.mkdir(parents=True)
    (commit / "config.json").write_text("{}")
    found = partial(huggingface_hub.try_to_load_from_cache, cache_dir=tmp_path)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", found)
    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", lambda *_: pytest.fail("asked the hub"))
    registry.check("gemma-2-2b")


@pytest.mark.parametrize("device", ["xpu", "gpu", "mps"])
def test_a_device_that_is_not_there_gets_one_line(device):
    with pytest.raises(ModelError, match=f"no device '{device}' here; choose one of auto, cpu, cuda"):
        models.best_device(device)


def huge():
    """The shape of a 70B model; nothing of this size is made."""
    config = CONFIGS["llama"].__class__(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=128256,
    )  # fmt: skip
    return config


def test_weights_are_counted_without_making_them():
    assert models.weight_bytes(huge(), torch.bfloat16) == pytest.approx(141.1e9, rel=0.001)


@pytest.mark.parametrize(
    ("device", "dtype", "free", "line"),
    [
        ("cpu", torch.float32, [32e9], "weights need 282 GB in float32 and this machine has 32 GB free; use a GPU"),
        ("cuda", torch.bfloat16, [80e9], "weights need 141 GB in bfloat16 and the GPU has 80 GB free; use more GPUs"),
        ("cuda", torch.bfloat16, [70e9, 70e9], "in bfloat16 and the GPUs have 140 GB free; use more GPUs"),
    ],
)
def test_too_little_memory_gets_one_line_before_any_weights(device, dtype, free, line, monkeypatch):
    monkeypatch.setattr(models, "free_bytes", lambda device: free)
    with pytest.raises(ModelError, match=re.escape(line)) as caught:
        models.check_memory("llama-70b", huge(), device, dtype)
    assert "\n" not in str(caught.value)


def test_weights_are_spread_only_where_one_gpu_is_too_small(monkeypatch):
    monkeypatch.setattr(models, "free_bytes", lambda device: [80e9, 80e9, 80e9])
    assert models.check_memory("llama-70b", huge(), "cuda", torch.bfloat16)
    assert not models.check_memory("tiny", CONFIGS["llama"], "cuda", torch.bfloat16)


def test_estimates_grow_with_model_and_prompts_and_know_what_they_do_not_know():
    tiny = estimates.need("02", {"model": "tiny-llama"}, gpu=False)
    half = estimates.need("02", {"model": "tiny-llama", "n_prompts": 75}, gpu=False)
    assert tiny.minutes == pytest.approx(estimates.MINUTES["02"], rel=0.01)
    assert half.minutes == pytest.approx(tiny.minutes / 2)
    large = estimates.need("02", {"model": "qwen2.5-32b"}, gpu=True)
    small = estimates.need("02", {"model": "qwen2-7b"}, gpu=True)
    assert 65 < large.gigabytes < 90 and 15 < small.gigabytes < 24
    assert large.minutes > 2 * small.minutes > 10
    assert estimates.need("02", {"model": "qwen2-7b"}, gpu=False).gigabytes > 30
    assert str(estimates.need("02", {"model": "owner/name"}, gpu=True)) == "size unknown"
    assert str(estimates.need("09", {"models": ["tiny-llama"]}, gpu=True)) == "0.5 GB, under 1 min"


def test_the_readme_holds_the_study_plan_of_every_registered_model():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert between_markers(readme, "study plan", "lib.estimates", estimates.study_plan()) == readme
    assert all(f"| `{name}` |" in readme for name in REGISTRY)
