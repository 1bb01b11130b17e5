"""The axioms of patching, on random-weight models of every family."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import pytest
import torch
from torch.nn import functional as F

from lib.anatomy import FINAL, NORM_SITES, UnknownAnatomy, anatomy, norm_parts
from lib.approximations import make
from lib.approximations.plan import Plan
from lib.approximations.technique import Technique
from lib.patching import approximated, first_non_finite, observed
from tests.families import CONFIGS, left_padded_batch, random_model

DTYPES = (torch.float32, torch.bfloat16)
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
ALL_SITES = ("attn_in.q", "attn_in.k", "attn_in.v", "attn_out", "mlp_in.gate", "mlp_in.up", "mlp_mid", "act", "gate")
ALL_SITES += ("q", "k", "v", "norm", "norm_final", "attn_probs", "q_rotary", "k_rotary", "v_heads", "block_out")


class Scale(Technique):
    """Scales every other channel of a site by a factor (no norm undoes that); factor 1 is the identity."""

    name: ClassVar[str] = "scale"
    category: ClassVar[str] = "test"

    def __init__(self, factor: float, sites: tuple[str, ...]) -> None:
        object.__setattr__(self, "factor", factor)
        object.__setattr__(self, "_sites", sites)

    @property
    def sites(self):
        return self._sites

    def transform(self, site, layer, state):
        def scale(x, step):
            even = torch.arange(x.shape[-1]) % 2 == 0
            return x if self.factor == 1 else torch.where(even, x * self.factor, x)

        return scale


class ExactOperations(Technique):
    """Replaces every operation by itself."""

    name: ClassVar[str] = "exact-operations"
    category: ClassVar[str] = "test"

    @property
    def operations(self):
        return ("activation", "softmax", "norm")

    def operation(self, operation, layer, state, site=""):
        if operation == "activation":
            return lambda x, kind: ACTIVATIONS[kind](x)
        if operation == "norm":
            return lambda x, eps: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        return lambda scores, visible: F.softmax(scores.masked_fill(~visible, torch.finfo(scores.dtype).min), dim=-1)


def sites_of(family: str) -> tuple[str, ...]:
    return (*ALL_SITES, "router") if family == "mixtral" else ALL_SITES


def logits(model):
    with torch.no_grad():
        batch = left_padded_batch()
        return model(**batch).logits[batch["attention_mask"].bool()]


@pytest.fixture(params=CONFIGS)
def family(request):
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
def test_identity_is_bit_identical_and_counts_every_site(family, dtype):
    model = random_model(family, dtype)
    before = logits(model)
    sites = sites_of(family)
    with approximated(model, Scale(1.0, sites)) as hits:
        patched = logits(model)
    assert torch.equal(before, patched)
    assert hits.silent() == []
    body = anatomy(model)
    expected = {(b.index, s) for b in body.blocks for s in sites if s not in ("norm", "norm_final")}
    expected |= {(b.index, s) for b in body.blocks for s in NORM_SITES if s in b.norms} | {(FINAL, "norm_final")}
    assert set(hits.counts) == expected
    if family != "mixtral":  # experts count once per expert that a token reached
        assert set(hits.counts.values()) == {1} and hits.forwards == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_operations_are_bit_identical(family, dtype):
    model = random_model(family, dtype)
    before = logits(model)
    with approximated(model, ExactOperations()) as hits:
        patched = logits(model)
    assert torch.equal(before, patched)
    assert hits.silent() == []


def test_each_site_changes_the_logits_and_is_restored(family):
    model = random_model(family)
    before, implementation = logits(model), model.config._attn_implementation
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for site in sites_of(family):
        with approximated(model, Scale(1.3, (site,))):
            changed = logits(model)
        assert not torch.allclose(before, changed, atol=1e-5), site
    assert torch.equal(before, logits(model))
    assert model.config._attn_implementation == implementation
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())
    assert not any(hasattr(m, "approximation") for m in model.modules())


def test_who_looks_within_a_patch_sees_what_it_made_and_changes_nothing(family):
    """Also where one linear layer holds several projections, and at keys and values on their way to the cache."""
    model, sites = random_model(family), sites_of(family)
    looked = [site for site in sites if site != "norm"]

    def seen_within(scale):
        found = {}
        with approximated(model, scale), observed(model, looked, lambda layer, site, x, _: found.setdefault(site, x)):
            logits(model)
        return found

    with approximated(model, Scale(1.3, sites)):
        alone = logits(model)
    with approximated(model, Scale(1.3, sites)), observed(model, looked, lambda *_: None) as hits:
        assert torch.equal(alone, logits(model)) and not hits.silent()
    for site in looked:
        if site in ("norm_final", "attn_probs"):
            continue
        exact, scaled = (seen_within(Scale(factor, (site,)))[site] for factor in (1.0, 1.3))
        even = torch.arange(exact.shape[-1]) % 2 == 0
        assert torch.equal(scaled, torch.where(even, exact * 1.3, exact)), site


def test_restored_after_an_exception(family):
    model = random_model(family)
    before = logits(model)
    with pytest.raises(RuntimeError), approximated(model, Scale(2.0, sites_of(family))):
        raise RuntimeError("interrupted")
    assert torch.equal(before, logits(model))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_causality_under_attention_patches(family):
    model, batch = random_model(family), left_padded_batch()
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][:, -1] = 5
    for technique in (ExactOperations(), Scale(0.9, ("attn_probs", "q_rotary"))):
        with approximated(model, technique), torch.no_grad():
            first, second = model(**batch).logits, model(**changed).logits
        earlier = batch["attention_mask"][:, :-1].bool()
        torch.testing.assert_close(first[:, :-1][earlier], second[:, :-1][earlier], rtol=0, atol=2e-6)
        assert not torch.allclose(first[:, -1], second[:, -1], atol=1e-3)


def test_only_the_chosen_layers(family):
    model = random_model(family)
    with approximated(model, Scale(1.1, ("attn_out", "norm_final")), layers=[0]) as hits:
        logits(model)
    assert set(hits.counts) == {(0, "attn_out")}
    for layer in (0, 1):
        with approximated(model, ExactOperations(), layers=[layer]) as hits:
            logits(model)
        assert ((FINAL, "norm_final") in hits.counts) == (layer == 1)  # treated with the last block


def test_observing_changes_nothing_and_sees_every_layer(family):
    model, seen = random_model(family), []
    before = logits(model)
    with observed(model, ("block_out", "attn_out"), lambda layer, site, x, step: seen.append((layer, site))):
        assert torch.equal(before, logits(model))
    assert seen == [(0, "attn_out"), (0, "block_out"), (1, "attn_out"), (1, "block_out")]


@pytest.mark.parametrize("layers", [[2], [-1], []])
@pytest.mark.parametrize("technique", [Scale(1.0, ("attn_out",)), Plan(((make("gaussian"), (0,)),)), Plan()])
def test_layers_outside_the_model_are_named(technique, layers):
    with (
        pytest.raises(ValueError, match="layers 0 to 1"),
        approximated(random_model("llama"), technique, layers=layers),
    ):
        pass


def test_the_name_of_a_technique_is_no_technique():
    patch = approximated(random_model("llama"), "teal")
    with pytest.raises(TypeError, match="'teal' is no technique; make one with"), patch:
        pass


def test_layers_of_which_a_plan_has_none_are_named():
    model = random_model("llama")
    with (
        pytest.raises(ValueError, match="plan changes nothing in layers 1"),
        approximated(model, Plan(((make("gaussian"), (0,)),)), layers=[1]),
    ):
        pass
    with approximated(model, Plan(), layers=[1]) as hits:
        logits(model)
    assert not hits.counts


def test_a_site_that_matches_nothing_raises():
    model = random_model("llama")
    for site in ("norm_q", "act.q", "block_out.q", "attn_in.up", "up", "banana"):
        patch = approximated(model, Scale(1.0, (site,)))
        with pytest.raises(ValueError, match=f"site '{site}' matches nothing"), patch:
            pass


def test_a_technique_that_touches_nothing_raises():
    patch = approximated(random_model("llama"), Scale(1.3, ("norm_final",)), layers=[0])
    with pytest.raises(ValueError, match="scale changes nothing in layers 0"), patch:
        pass


class Scaled(torch.nn.Module):
    """An RMSNorm with a scale of its own."""

    def __init__(self, scale):
        super().__init__()
        self.weight, self.eps, self.scale = torch.nn.Parameter(torch.full((4,), 0.5)), 1e-6, scale

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.scale(self.weight)


def test_a_norm_with_an_unknown_scale_is_not_replaced():
    weight, offset, eps = norm_parts(Scaled(lambda weight: weight))
    assert offset == 0 and eps == 1e-6 and weight.tolist() == [0.5] * 4
    with pytest.raises(UnknownAnatomy, match="Scaled scales in a way that is not known"):
        norm_parts(Scaled(lambda weight: 1 + weight))


def test_a_shared_expert_is_named_not_skipped():
    model = random_model("mixtral")
    model.model.layers[1].mlp.shared_expert = torch.nn.Linear(2, 2)
    with pytest.raises(UnknownAnatomy, match=r"block 1 .* a shared expert is not supported"):
        anatomy(model)


def test_the_decoder_is_found_behind_an_image_encoder():
    model = random_model("llama")
    whole = torch.nn.Module()
    whole.vision, whole.language, whole.config = torch.nn.Module(), model, model.config
    whole.vision.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    assert anatomy(whole).decoder is model.model


def test_first_non_finite_names_layer_and_site():
    model = random_model("llama")
    forward = partial(model, **left_padded_batch())
    assert first_non_finite(model, forward) is None
    with approximated(model, Scale(float("inf"), ("act",)), layers=[1]):
        assert first_non_finite(model, forward) == (1, "act")
    with approximated(model, Scale(float("nan"), ("norm_final",))):
        assert first_non_finite(model, forward) == (-1, "norm_final")
