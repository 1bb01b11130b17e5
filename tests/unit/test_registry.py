"""The registry's facts, and the one line that every model gets which cannot be had."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import httpx
import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    DeepseekV3Config,
    GemmaConfig,
    Glm4Config,
    GraniteSWAConfig,
    HunYuanDenseV1Config,
    LlamaConfig,
    Qwen3NextConfig,
    VaultGemmaConfig,
)
from transformers.models.flex_olmo.modeling_flex_olmo import FlexOlmoRMSNorm
from transformers.models.helium.modeling_helium import HeliumRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo3.modeling_olmo3 import Olmo3RMSNorm
from transformers.models.vaultgemma.modeling_vaultgemma import VaultGemmaRMSNorm

from lib import estimates, models, registry
from lib.anatomy import SCALED_BEFORE_CAST, UnknownAnatomy, anatomy, norm_parts
from lib.approximations import make
from lib.models import ModelError
from lib.patching import approximated
from lib.paths import ROOT, between_markers
from lib.registry import REGISTRY, smoothing_alpha
from tests.families import CONFIGS, GROUPED, SIZE, random_model
from tests.tiny_study import character_tokenizer

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
        (httpx.ConnectError, "is no folder, not in the cache, and the hub cannot be reached"),
        (OfflineModeIsEnabled, "is no folder, not in the cache, and the hub cannot be reached"),
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


def test_checksums_may_be_written_as_sha256sum_does(tmp_path: Path):
    (tmp_path / "a b").write_bytes(b"x")
    expected = registry.file_hash(tmp_path / "a b")
    for listing in (f"{expected}  a b\n", f"{expected} *a b\n\n"):
        (tmp_path / "SHA256SUMS").write_text(listing)
        registry.verify(tmp_path)
    (tmp_path / "SHA256SUMS").write_text(f"{expected}  a b\n{expected}  c\n")
    with pytest.raises(ModelError, match="c is missing; fetch it again"):  # no file of ours, so git cannot restore it
        registry.verify(tmp_path)


@pytest.mark.parametrize("stored", [None, "not JSON"])
def test_a_folder_without_a_readable_tokenizer_gets_one_line(stored: str | None, tmp_path: Path):
    random_model("llama").save_pretrained(tmp_path)
    if stored:
        (tmp_path / "tokenizer.json").write_text(stored)
    with pytest.raises(ModelError, match=r"no tokenizer in .* that can be read \(tokenizer.json\); copy it there"):
        models.load(str(tmp_path), device="cpu")


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "stored quantized (gptq); give the 16-bit"),
        ({"num_hidden_layers": 3}, "weights are not in its files or of another size, first model.layers.2"),
        ({"intermediate_size": 24}, "weights are not in its files or of another size, first model.layers.0"),
        ({"hidden_size": 33}, "(33) is not a multiple of the number of attention heads"),
    ],
)
def test_a_configuration_that_is_not_of_the_weights_gets_one_line(changed: dict, line: str, tmp_path: Path):
    random_model("llama").save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changed))
    with pytest.raises(ModelError, match=re.escape(line)) as caught:
        models.load(str(tmp_path), device="cpu")
    assert "\n" not in str(caught.value)


def test_weights_without_dimensions_have_a_hash():
    module = torch.nn.Module()
    module.scale = torch.nn.Parameter(torch.tensor(2.0))
    assert models.weights_hash(module) != models.weights_hash(torch.nn.Module())


# ------------------------------------------------------------------ what anatomy says of decoders it does not know


def built(config: type, **more: object) -> torch.nn.Module:
    sizes = SIZE | GROUPED | {"layer_types": ["full_attention"] * 2} | more
    return AutoModelForCausalLM.from_config(config(**sizes), attn_implementation="eager")


@pytest.mark.parametrize(
    ("config", "more", "line"),
    [
        (DeepseekV3Config, {}, "block 0 (DeepseekV3DecoderLayer): no linear layer found for q, k, v"),
        (GraniteSWAConfig, {}, "block 0 (GraniteSWAAttention): attention sinks are not supported"),
        (
            Qwen3NextConfig,
            {"layer_types": ["linear_attention"] * 2},
            "block 0 (Qwen3NextDecoderLayer): no 'self_attn'",
        ),
        (LlamaConfig, {"hidden_act": "relu"}, "activation ReLU is not known; known are silu, gelu, gelu_tanh"),
    ],
)
def test_what_anatomy_cannot_place_is_named(config: type, more: dict, line: str):
    with pytest.raises(UnknownAnatomy, match=re.escape(line)) as caught:
        anatomy(built(config, **more))
    assert "\n" not in str(caught.value)


def test_norms_without_a_site_are_named_where_norms_are_asked_for():
    model = built(HunYuanDenseV1Config, head_dim=8)
    line = "block 0 (HunYuanDenseV1DecoderLayer): no site is known for its norms self_attn.query_layernorm, self"
    for technique in (make("gaussian", std=0.1), make("iron", parts=("norm",))):
        with pytest.raises(UnknownAnatomy, match=re.escape(line)), approximated(model, technique):
            pass
    with approximated(model, make("gaussian", std=0.1, where=("act",))):
        pass


def test_an_edit_of_what_attention_reads_leaves_the_mlp_beside_it_alone():
    """In Cohere's parallel blocks both read the output of one norm."""
    model, seen = built(CohereConfig), []
    handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ids = torch.arange(6)[None]
    logits = [model(ids).logits]
    with approximated(model, make("smoothquant", bits=3, smooth=False), layers=[0]) as hits:
        logits.append(model(ids).logits)
    handle.remove()
    assert set(hits.counts) == {(0, site) for site in ("attn_in", "attn_out", "mlp_in", "mlp_mid")}
    assert torch.equal(*seen) and not torch.equal(*logits)


def test_every_norm_of_a_block_has_its_site():
    inner = ["norm_attn", "norm_attn_post", "norm_mlp", "norm_mlp_post"]
    assert sorted(anatomy(built(Glm4Config, head_dim=8)).blocks[0].norms) == inner
    assert sorted(anatomy(built(VaultGemmaConfig, head_dim=8)).blocks[0].norms) == ["norm_attn", "norm_mlp"]


@pytest.mark.parametrize("kind", [FlexOlmoRMSNorm, HeliumRMSNorm, LlamaRMSNorm, Olmo3RMSNorm, VaultGemmaRMSNorm])
def test_a_norm_is_scaled_and_rounded_in_the_order_of_the_model(kind: type):
    torch.manual_seed(0)
    norm, x = kind(16).bfloat16(), torch.randn(64, 16).bfloat16()
    torch.nn.init.normal_(norm.weight)
    weight, offset, eps = norm_parts(norm)
    normal = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    scaled_first = (normal * (offset + weight.float())).bfloat16()
    rounded_first = weight * normal.bfloat16()
    assert torch.equal(norm(x), scaled_first if kind.__name__ in SCALED_BEFORE_CAST else rounded_first)


def test_the_activation_is_what_the_model_computes():
    """Gemma's configuration may name two activations; the model reads `hidden_act`."""
    config = {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh", "head_dim": 8}
    assert anatomy(built(GemmaConfig, **config)).activation == "gelu"


def test_two_decoders_are_too_many():
    pair = torch.nn.ModuleList([random_model("llama"), random_model("llama")])
    with pytest.raises(UnknownAnatomy, match="several stacks of decoder blocks"):
        anatomy(pair)


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


def test_a_model_has_one_smoothing_strength_however_it_is_spelt():
    for name, entry in REGISTRY.items():
        assert smoothing_alpha(name) == smoothing_alpha(entry.hub) == entry.alpha
    assert smoothing_alpha("tiny-llama") == smoothing_alpha("someone/something") == 0.85
