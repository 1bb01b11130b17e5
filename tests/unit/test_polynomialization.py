"""What holds for every polynomialization system: settings, masks, limits, wraps, doses, types."""

from __future__ import annotations

from functools import partial
from inspect import signature

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lib.approximations import bolt, bumblebee, fixed_point, iron, nexus
from lib.approximations.bolt import Bolt
from lib.approximations.bumblebee import BumbleBee
from lib.approximations.iron import Iron
from lib.approximations.nexus import Nexus

FIXED = (iron, bolt, bumblebee)
TECHNIQUES = (Iron, Bolt, BumbleBee, Nexus)


class Measured:
    """Statistics of two layers with gates up to 12 and small norms; layers have the two usual norms."""

    n_layers = 2

    def channel_max(self, layer, site):
        return torch.tensor([3.0, 12.0])

    def mean_square(self, layer, site):
        ranges = {"norm_attn": (1e-3, 2e-3), "norm_mlp": (4e-3, 1e-2), "norm_final": (50.0, 90.0)}
        return ranges[site]


def operation(technique, name, layer=0, site="norm_attn"):
    state = technique.fit(Measured()) if technique.needs_calibration else None
    return technique.operation(name, layer, state, site)


@pytest.fixture
def causal():
    """Scores [2, 3, 9, 9] with masked entries as the smallest finite number, one padded column and one empty row."""
    generator = torch.Generator().manual_seed(0)
    visible = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    visible[0, :, :, 0] = False
    scores = torch.randn(2, 3, 9, 9, generator=generator)
    return scores.masked_fill(~visible, torch.finfo(torch.float32).min), visible


@pytest.mark.parametrize("cls", TECHNIQUES)
def test_parts_are_a_set(cls):
    assert cls().operations == ("activation", "softmax", "norm")
    assert cls(parts=["norm", "activation"]) == cls(parts=("activation", "norm"))
    assert cls(parts="softmax").operations == ("softmax",)
    hash(cls(parts=["norm"]))
    for bad in ((), ("softmax", "mlp")):
        with pytest.raises(ValueError, match="softmax"):
            cls(parts=bad)
    with pytest.raises(ValueError, match="softmax"):
        cls(parts=("softmax",)).operation("norm", 0, None)


@pytest.mark.parametrize(("cls", "wrong", "valid"), [
    (Iron, {"arithmetic": "float"}, "real, fixed"), (Nexus, {"arithmetic": "fixed"}, "choose one of real"),
    (Iron, {"fraction_bits": 1}, "2, 3"), (Bolt, {"fraction_bits": 17}, "2, 3"), (Bolt, {"degree": 0}, "1, 2"),
    (BumbleBee, {"fraction_bits": 21}, "2, 3"), (Nexus, {"range_margin": 0.5}, "at least 1"),
    (Bolt, {"published": True, "fraction_bits": 8}, "choose one of 12"), (Iron, {"published": "no"}, "False, True"),
    (Nexus, {"range_margin": float("inf")}, "at least 1"),
])  # fmt: skip
def test_wrong_settings_name_the_valid_ones(cls, wrong, valid):
    with pytest.raises(ValueError, match=valid):
        cls(**wrong)


@pytest.mark.parametrize("system", FIXED)
@pytest.mark.parametrize("name", ["gelu", "silu", "exp", "softmax", "reciprocal", "rsqrt", "normalise"])
def test_functions_are_documented_and_refuse_another_arithmetic(system, name):
    function, x = getattr(system, name), torch.ones(3)
    assert function.__name__ == name and function.__doc__ and "arithmetic" in signature(function).parameters
    with pytest.raises(ValueError, match=r"^arithmetic='float' is not valid; choose one of real, fixed"):
        function(x, *[x > 0] * (name == "softmax"), arithmetic="float")


def test_nexus_has_no_fixed_point():
    for function in (nexus.gelu, nexus.silu, nexus.exp, nexus.reciprocal, nexus.rsqrt, nexus.normalise):
        with pytest.raises(ValueError, match="choose one of real"):
            function(torch.ones(3), arithmetic="fixed")


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("cls", TECHNIQUES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_operations_keep_type_shape_and_input(cls, published, dtype, causal):
    technique = cls(published=published)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    scores, visible = causal
    scores = scores.clamp(min=-6e4).to(dtype)
    before, scores_before = x.clone(), scores.clone()
    for kind in ("silu", "gelu", "gelu_tanh"):
        result = operation(technique, "activation")(x, kind)
        assert result.dtype == dtype and result.shape == x.shape
        exact = F.silu(x) if kind == "silu" else F.gelu(x)
        assert (result - exact).abs().max() < 0.12
    normal = operation(technique, "norm", layer=-1, site="norm_final")(x, 1e-6)
    assert normal.dtype == dtype and normal.shape == x.shape
    probabilities = operation(technique, "softmax")(scores, visible)
    assert probabilities.dtype == dtype and probabilities.shape == scores.shape
    assert torch.equal(x, before) and torch.equal(scores, scores_before)


@pytest.mark.parametrize(("cls", "arithmetic"), [(c, kind) for c in TECHNIQUES for kind in c.choices["arithmetic"]])
def test_softmax_respects_the_mask(cls, arithmetic, causal):
    scores, visible = causal
    softmax = operation(cls(arithmetic=arithmetic), "softmax")
    result = softmax(scores, visible)
    shown = visible.expand_as(scores)
    assert torch.isfinite(result).all()
    assert (result[~shown] == 0).all()
    assert (result[0, :, 0] == 0).all()  # sees nothing
    assert (result.sum(-1)[shown.any(-1)] - 1).abs().max() < 0.01
    assert (result - scores.softmax(-1))[shown].abs().max() < 0.05
    for junk in (0.0, 1e4, -1e4, -torch.inf, torch.nan):  # what stands at masked places cannot matter
        assert torch.equal(softmax(scores.masked_fill(~visible, junk), visible), result)
    padded = F.pad(scores, (5, 0), value=3.0)  # five more padding keys on the left
    assert torch.equal(softmax(padded, F.pad(visible, (5, 0), value=False))[..., 5:], result)


@pytest.mark.parametrize("cls", TECHNIQUES)
def test_nan_and_inf_are_never_hidden(cls):
    technique, bad = cls(), torch.tensor([1.0, torch.nan, torch.inf, 2.0])
    activated = operation(technique, "activation")(bad, "silu")
    assert activated[1].isnan() and not activated[2].isfinite() and activated[[0, 3]].isfinite().all()
    for value in (torch.nan, torch.inf):
        row = torch.tensor([[0.05, value, 0.02], [0.05, 0.1, 0.02]])
        normal = operation(technique, "norm")(row, 1e-6)
        assert not normal[0].isfinite().all() and normal[1].isfinite().all()
        weights = operation(technique, "softmax")(row, torch.ones(3, dtype=torch.bool))
        assert weights[0].isnan().all() and weights[1].isfinite().all()


@pytest.mark.parametrize("system", FIXED)
def test_limits_of_the_activations(system):
    x = torch.tensor([-100.0, -20.0, 20.0, 100.0], dtype=torch.float64)
    for function in (system.silu, system.gelu):
        for arithmetic in ("real", "fixed"):
            assert torch.allclose(function(x, arithmetic), x.clamp(min=0), atol=0.03)


@pytest.mark.parametrize("system", (*FIXED, nexus))
@given(values=st.lists(st.floats(-9, 9), min_size=1, max_size=20))
@settings(max_examples=25, deadline=None)
def test_activations_are_near_exact_anywhere(system, values):
    x = torch.tensor(values, dtype=torch.float64)
    assert (system.silu(x) - F.silu(x)).abs().max() < 0.013
    inside = x.clamp(-5, 5)
    assert (system.gelu(inside) - F.gelu(inside)).abs().max() < 0.01


@pytest.mark.parametrize("system", FIXED)
@given(values=st.lists(st.floats(-30, 30), min_size=2, max_size=40), shift=st.floats(-50, 50))
@settings(max_examples=25, deadline=None)
def test_softmax_sums_to_one_and_ignores_a_shift(system, values, shift):
    scores, visible = torch.tensor(values, dtype=torch.float64), torch.ones(len(values), dtype=torch.bool)
    result = system.softmax(scores, visible)
    assert 0.97 < result.sum() < 1.01
    assert (result >= 0).all()
    assert (system.softmax(scores + round(shift), visible) - result).abs().max() < 5e-3


@given(st.lists(st.integers(-(2**40), 2**40), min_size=1), st.lists(st.integers(-(2**40), 2**40), min_size=1))
@settings(deadline=None)
def test_ring_arithmetic_is_modular(left, right):
    n = min(len(left), len(right))
    for bits, shift in ((37, 12), (37, 24), (20, 11), (48, 12)):
        result = fixed_point.multiply(torch.tensor(left[:n]), torch.tensor(right[:n]), shift, bits).tolist()
        half = 2 ** (bits + shift - 1)
        expected = [((a * b + half) % (2 * half) - half) >> shift for a, b in zip(left, right, strict=False)]
        assert result == expected
    wrapped = fixed_point.wrap(torch.tensor(left), 37).tolist()
    assert wrapped == [(a + 2**36) % 2**37 - 2**36 for a in left]


@pytest.mark.parametrize("system", FIXED)
def test_error_falls_with_fraction_bits_to_the_real_valued_form(system):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, generator=generator, dtype=torch.float64) * 2
    rows = torch.randn(64, 32, generator=generator, dtype=torch.float64)
    everything = torch.ones(32, dtype=torch.bool)
    functions = {
        "silu": (partial(system.silu, x), F.silu(x)),
        "softmax": (partial(system.softmax, rows, everything), rows.softmax(-1)),
        "norm": (partial(system.normalise, rows), rows * rows.square().mean(-1, keepdim=True).rsqrt()),
    }
    for name, (function, exact) in functions.items():
        error = [(function(fraction_bits=s) - exact).square().mean().sqrt().item() for s in (2, 4, 8, 12)]
        assert error[0] > error[1] > error[2] >= 0.9 * error[3] > 0, (name, error)
        assert all(map(torch.isfinite, torch.tensor(error)))


def test_error_of_bolt_falls_with_the_degree():
    x = torch.linspace(-6, 6, 2001, dtype=torch.float64)
    error = [(bolt.silu(x, "real", degree=d) - F.silu(x)).abs().max().item() for d in (1, 2, 3, 4, 6, 8)]
    assert error == sorted(error, reverse=True) and error[-1] < error[0] / 50
    fixed = [(bolt.silu(x, degree=d) - bolt.silu(x, "real", degree=d)).abs().max().item() for d in (2, 4, 6)]
    assert max(fixed) < 0.05
    assert torch.equal(Bolt(degree=6).operation("activation", 0, None)(x, "silu"), bolt.silu(x, degree=6))


def test_published_rings_wrap_and_the_default_ring_does_not():
    far = torch.tensor([255.0, 256.0, -260.0], dtype=torch.float64)
    exact = F.gelu(far)
    for published, wraps in ((True, True), (False, False)):
        iron_gelu = Iron(published=published).operation("activation", 0, None)(far, "gelu")
        assert (iron_gelu - exact)[0].abs() < 0.1
        assert bool(((iron_gelu - exact)[1:].abs() > 200).all()) == wraps
        bolt_gelu = Bolt(published=published).operation("activation", 0, None)(far, "gelu")
        assert bool((bolt_gelu - exact)[1].abs() > 200) == wraps
        loud = torch.full((1, 4096), 80.0, dtype=torch.float64)  # sum of squares 2.6e7 > 2^24
        for cls in (Iron, Bolt):
            normal = cls(published=published).operation("norm", 0, None)(loud, 1e-6)
            assert bool((normal - 1).abs().max() > 0.5) == wraps
        flat = torch.zeros(1, 200, dtype=torch.float64)  # sum of exp 200 >= 128
        weights = Bolt(published=published).operation("softmax", 0, None)(flat, torch.ones(200, dtype=torch.bool))
        assert bool((weights.sum() - 1).abs() > 0.5) == wraps


def test_the_default_rings_wrap_where_their_documentation_says():
    def error(technique, x, operation="norm"):
        row = torch.full((1, 1024), x, dtype=torch.float64)
        function = technique.operation(operation, 0, None)
        return (function(row, "gelu") - row if operation == "activation" else function(row, 1e-6) - 1).abs().max()

    assert error(BumbleBee(), 11_500.0) < 0.1 and error(BumbleBee(), 11_600.0) > 1e6
    for cls in (Iron, Bolt):
        assert error(cls(), (2**34.9 / 1024) ** 0.5) < 2 and error(cls(), (2**35.1 / 1024) ** 0.5) > 1e5
    assert error(Iron(), 3240.0, "activation") < 1 and error(Iron(), 3260.0, "activation") > 3000


def test_the_wide_ring_holds_the_same_integers():
    x = torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 3
    for function in (iron.gelu, iron.silu, bolt.gelu, bolt.silu, iron.normalise):
        assert torch.equal(function(x, ring_bits=48), function(x, ring_bits=37))
    visible = torch.ones(64, dtype=torch.bool)
    for function in (iron.softmax, bolt.softmax):
        assert torch.equal(function(x, visible, ring_bits=48), function(x, visible, ring_bits=37))


def test_nexus_sign_is_the_composed_polynomial_and_float32_keeps_its_digits():
    z = torch.linspace(0, 1, 2001, dtype=torch.float64)
    composed = z
    for coefficients in (nexus.SIGN_G, nexus.SIGN_G, nexus.SIGN_F, nexus.SIGN_F):
        composed = sum(c * composed ** (2 * i + 1) for i, c in enumerate(coefficients))
    torch.testing.assert_close(1 - nexus.shortfall(z.clone()), composed, rtol=0, atol=1e-12)
    x = torch.linspace(-40, 40, 20001, dtype=torch.float64)
    for function in (nexus.gelu, nexus.silu):
        narrow = function(x.float(), largest=40.0, adapted=True)
        assert (narrow - function(x.float().double(), largest=40.0, adapted=True)).abs().max() < 1e-5


def test_published_nexus_explodes_beyond_its_ranges():
    assert nexus.shortfall(torch.tensor(1.02, dtype=torch.float64)).item() < -1e138
    technique = Nexus(published=True)
    assert not technique.needs_calibration
    beyond = technique.operation("activation", 0, None)(torch.tensor([4.0, 5.5, 20.0]), "gelu")
    assert beyond[0].isfinite() and not beyond[1:].isfinite().any()
    loud = torch.full((1, 64), 40.0)
    assert not (technique.operation("norm", 0, None)(loud, 1e-6) - 1).abs().max() < 0.5
    assert nexus.exp(torch.tensor([-300.0], dtype=torch.float64)).item() == pytest.approx(3e16, rel=0.2)


def test_calibrated_nexus_serves_its_ranges():
    technique = Nexus()
    state = technique.fit(Measured())
    norms = {f"{layer}.{site}.factor" for layer in (0, 1) for site in ("norm_attn", "norm_mlp")}
    assert set(state) == {"0.gate_range", "1.gate_range", "-1.norm_final.factor", *norms}
    assert state["0.norm_attn.factor"] > 2 * state["0.norm_mlp.factor"]
    assert state["0.gate_range"].item() == 4 * 12
    assert [Nexus(parts=part).needs_calibration for part in ("activation", "softmax", "norm")] == [True, False, True]
    with pytest.raises(ValueError, match="calibrate"):
        technique.operation("norm", 0, None, "norm_attn")
    x = torch.linspace(-48, 48, 4001)
    assert (technique.operation("activation", 1, state)(x, "silu") - F.silu(x)).abs().max() < 0.01
    quiet = torch.randn(8, 512, generator=torch.Generator().manual_seed(0)) * 0.05
    exact = quiet * quiet.square().mean(-1, keepdim=True).rsqrt()
    assert torch.allclose(technique.operation("norm", 0, state, "norm_mlp")(quiet, 1e-6), exact, atol=1e-4)


@pytest.mark.parametrize("largest", [10.0, 64.0, 200.0, 1000.0])
def test_adapted_nexus_holds_over_wide_ranges(largest):
    x = torch.linspace(-largest, largest, 20_001, dtype=torch.float64)
    assert (nexus.silu(x, largest=largest, adapted=True) - F.silu(x)).abs().max() < 0.013
    assert (nexus.gelu(x, largest=largest, adapted=True) - F.gelu(x)).abs().max() < 0.007


class Massive(Measured):
    """A norm whose input has mean squares from 11 to 2600: the first token of a prompt is massive."""

    def mean_square(self, layer, site):
        return 11.0, 2600.0


@pytest.mark.parametrize(("margin", "excess", "served"), [
    (2, 1.9, True), (2, 2.3, False), (4, 2.3, True), (4, 3.9, True), (4, 4.6, False),
])  # fmt: skip
def test_a_mean_square_within_the_margin_is_served_and_one_beyond_is_not(margin, excess, served):
    technique = Nexus(range_margin=margin)
    normalise = technique.operation("norm", 0, technique.fit(Massive()), "norm_mlp")
    rows = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
    unit = rows * rows.square().mean(-1, keepdim=True).rsqrt()
    error = (normalise(unit * (excess * 2600) ** 0.5, 1e-6) - unit).abs().max()
    assert bool(error < 1e-3) == served


def test_the_iterations_of_a_nexus_softmax_reach_its_tolerance():
    d, k = nexus.softmax_constants(torch.tensor([2, 9, 128, 4096]))
    assert ((1 - d) ** (2.0 ** (k + 1)) <= nexus.TOLERANCE).all()


@pytest.mark.parametrize("system", (*FIXED, nexus))
def test_a_norm_of_zeros_is_zero(system):
    assert system.normalise(torch.zeros(2, 8), arithmetic="real").eq(0).all()


def test_a_norm_that_only_saw_zeros_is_calibrated():
    assert 0 < nexus.norm_factor(0.0, 0.0) < float("inf")


def test_a_real_inverse_root_in_float64_has_the_error_of_its_polynomial_only():
    v = torch.logspace(-100, 100, 1001, dtype=torch.float64)
    error = (bumblebee.rsqrt(v, "real") * v.sqrt() - 1).abs()
    assert error.isfinite().all() and error.max() < 8.3e-5
    scaled = bumblebee.rsqrt(v * 2.0**-20, "real") * 2.0**-10
    assert torch.allclose(scaled, bumblebee.rsqrt(v, "real"), rtol=1e-15, atol=0)


@pytest.mark.parametrize(("fraction_bits", "value"), [(12, 12000.0), (12, 16000.0), (16, 3000.0), (12, 90.0)])
def test_the_mean_square_of_few_channels_is_the_rings_own(fraction_bits, value):
    """Against integers of any size: the product by 1/n needs more bits than int64 has."""
    encoded, channels = round(value * 2**fraction_bits), 64
    total = channels * ((encoded * encoded) >> fraction_bits)
    half, modulus = 2**47, 2**48
    wrapped = (total + half) % modulus - half
    expected = (wrapped * (2**24 // channels)) >> 24
    assert int(fixed_point.mean_of(torch.tensor(wrapped), channels)) == expected
    mean = torch.tensor([expected]).clamp(min=0)
    root = fixed_point.rsqrt_integers(mean, fraction_bits, 48)
    ours = iron.normalise(torch.full((1, channels), value), fraction_bits=fraction_bits, ring_bits=48)
    result = fixed_point.multiply(torch.tensor([encoded]), root, fraction_bits, 48)
    assert float(ours[0, 0]) == int(result) / 2**fraction_bits


def test_the_public_constant_of_a_mean_has_24_bits():
    assert int(fixed_point.mean_of(torch.tensor(3072 * 5000), 3072)) == 4999  # with 18 bits 4980


def test_bumblebee_rounds_the_public_constant_of_its_mean():
    ones = torch.ones(1, 2304, dtype=torch.float64)
    mean = 2304 * 114 / 2**18  # 113.8 units of 2^-18
    assert bumblebee.normalise(ones).mean().item() == pytest.approx(mean**-0.5, abs=3e-4)


@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_bumblebee_adds_epsilon_to_the_mean_square(eps):
    quiet = torch.full((1, 64), 2.0**-8, dtype=torch.float64)
    assert torch.allclose(bumblebee.normalise(quiet, eps), quiet / (2.0**-16 + eps) ** 0.5, rtol=0.1)


def test_a_published_norm_of_bolt_keeps_five_fraction_bits():
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    published = Bolt(published=True).operation("norm", 0, None)(x, 1e-6)
    assert torch.equal(published * 32, (published * 32).round())


def test_a_divisor_of_less_than_a_unit_is_read_as_a_unit():
    unit, none = iron.reciprocal(torch.tensor([2.0**-12, 0.0], dtype=torch.float64))
    assert unit == none


@pytest.mark.parametrize(("fraction_bits", "largest"), [(14, 1e-3), (15, 1e-5), (16, 1e-5)])
def test_an_inverse_root_of_more_than_14_bits_takes_a_second_newton_step(fraction_bits, largest):
    v = torch.logspace(-1, 1, 2001, dtype=torch.float64)
    real, fixed = (fixed_point.rsqrt(v, arithmetic, fraction_bits) * v.sqrt() - 1 for arithmetic in ("real", "fixed"))
    assert real.abs().max() < largest and fixed.abs().max() < 3e-4


def test_scores_across_the_edge_of_the_ring_differ_by_little():
    """The difference to the largest is taken in the ring: on either side of its edge two scores are still near."""
    scores = torch.tensor([[2.0**24 + 1, 2.0**24 - 1]], dtype=torch.float64)
    visible = torch.ones(1, 2, dtype=torch.bool)
    inside = iron.softmax(scores - 2.0**24, visible, ring_bits=37)
    assert torch.equal(iron.softmax(scores, visible, ring_bits=37), inside)


@pytest.mark.parametrize(("system", "name", "tolerance"), [
    (iron, "silu", 2e-7), (iron, "gelu", 6e-7), (nexus, "silu", 1e-5), (nexus, "gelu", 3e-6),
])  # fmt: skip
@pytest.mark.parametrize("largest", [5.0, 50.0, 1000.0])
def test_activations_in_float32_are_those_in_float64(system, name, tolerance, largest):
    settings = {"arithmetic": "real"} if system is iron else {"largest": largest, "adapted": largest > 5}
    function = partial(getattr(system, name), **settings)
    x = torch.linspace(-largest, largest, 100_001)
    wide = function(x.double())
    error = (function(x) - wide).abs() / x.double().abs().clamp(min=1)
    assert error.max() < tolerance
    assert torch.equal(function(x.bfloat16()), function(x.bfloat16().float()).bfloat16())


@pytest.mark.parametrize("system", (*FIXED, nexus))
@pytest.mark.parametrize("name", ["gelu", "silu", "exp", "reciprocal", "rsqrt", "normalise"])
def test_memory_order_changes_nothing(system, name):
    function, x = getattr(system, name), torch.rand(3, 5, 64, generator=torch.Generator().manual_seed(0)).mT + 0.1
    for arithmetic in ("real", "fixed")[: 1 if system is nexus else 2]:
        assert torch.equal(function(x, arithmetic=arithmetic), function(x.contiguous(), arithmetic=arithmetic))


def test_blocks_change_nothing():
    x = torch.randn(3, 2**15, generator=torch.Generator().manual_seed(0))
    for cls in TECHNIQUES:
        whole = operation(cls(), "activation")(x, "silu")
        assert torch.equal(whole, torch.stack([operation(cls(), "activation")(row, "silu") for row in x]))


@pytest.mark.parametrize("system", (*FIXED, nexus))
def test_every_system_has_the_functions_of_the_contract(system):
    x = torch.tensor([1.0, 4.0], dtype=torch.float64)
    assert (system.reciprocal(8 * x) * 8 * x - 1).abs().max() < 0.08
    assert (system.rsqrt(8 * x) * (8 * x).sqrt() - 1).abs().max() < 0.01


def test_rows_of_zeros_stay_zero():
    for cls in (Iron, Bolt, BumbleBee):
        for arithmetic in ("real", "fixed"):
            normal = cls(arithmetic=arithmetic).operation("norm", 0, None)(torch.zeros(2, 8), 1e-6)
            assert torch.equal(normal, torch.zeros(2, 8))
