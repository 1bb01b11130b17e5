"""SmoothQuant and OmniQuant: check vectors, equality with folded weights, training, baselines and properties."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from lib.approximations import omniquant, smoothquant
from lib.approximations.omniquant import OmniQuant, train_block
from lib.approximations.smoothquant import SmoothQuant, smoothing_scales
from lib.approximations.technique import State, Step, Technique
from tests.unit.tiny_block import HEAD, HEADS, HIDDEN, KV_HEADS, TinyBlock, TinyStatistics, applied

TOKENS = torch.tensor([[0.10, -0.35, 1.27, -2.00, 0.05, 0.60], [3.0, 1.0, 1.5, 2.0, 2.5, 1.2]])
STEP = Step(torch.ones(2, 5, dtype=torch.bool), prefill=True)


@cache
def calibrated() -> tuple[TinyBlock, Tensor, TinyStatistics]:
    block, x = TinyBlock(), torch.randn(8, 24, HIDDEN, generator=torch.Generator().manual_seed(1))
    return block, x, TinyStatistics(block, x)


def output_error(technique: Technique, state: State | None) -> float:
    block, x, statistics = calibrated()
    return float((block(x, applied(technique, state)) - statistics.reference).square().mean())


def fitted(technique: Technique) -> dict[str, Tensor] | None:
    return technique.fit(calibrated()[2]) if technique.needs_calibration else None


# --- quantizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "per", "expected"),
    [
        (
            8,
            "token",
            [
                [0.094488, -0.346457, 1.275591, -2.0, 0.047244, 0.598425],
                [3.0, 0.992126, 1.511811, 2.007874, 2.503937, 1.204724],
            ],
        ),
        (
            4,
            "token",
            [[0.0, -0.285714, 1.142857, -2.0, 0.0, 0.571429], [3.0, 0.857143, 1.714286, 2.142857, 2.571429, 1.285714]],
        ),
        (
            4,
            "tensor",
            [
                [0.0, -0.428571, 1.285714, -2.142857, 0.0, 0.428571],
                [3.0, 0.857143, 1.714286, 2.142857, 2.571429, 1.285714],
            ],
        ),
    ],
)
def test_symmetric_rounding_vectors(bits: int, per: str, expected: Any) -> None:
    assert torch.allclose(smoothquant.quantize(TOKENS, bits, per), torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (
            8,
            [
                [0.102588, -0.346235, 1.269529, -2.000471, 0.051294, 0.602706],
                [2.996078, 0.996078, 1.498039, 2.0, 2.501961, 1.2],
            ],
        ),
        (4, [[0.0, -0.436, 1.308, -1.962, 0.0, 0.654], [2.933333, 0.933333, 1.466667, 2.0, 2.533333, 1.2]]),
    ],
)
def test_asymmetric_rounding_vectors(bits: int, expected: Any) -> None:
    assert torch.allclose(omniquant.quantize(TOKENS, bits), torch.tensor(expected), rtol=0, atol=1e-6)


def test_static_rounding_uses_the_given_step_and_saturates() -> None:
    x = torch.tensor([0.26, -0.24, 5.0, -5.0])
    assert smoothquant.quantize(x, 4, "static", 0.1).tolist() == pytest.approx([0.3, -0.2, 0.7, -0.7])
    with pytest.raises(ValueError, match="scale"):
        smoothquant.quantize(x, 4, "static")


@pytest.mark.parametrize("quantize", [smoothquant.quantize, omniquant.quantize])
def test_rounding_error_falls_with_bits_and_16_bits_change_nothing(quantize: Any) -> None:
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    errors = [float((quantize(x, bits) - x).abs().max()) for bits in range(2, 17)]
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0 and errors[-2] > 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(quantize(x.to(dtype), 16), x.to(dtype)) and quantize(x.to(dtype), 8).dtype == dtype
    assert torch.equal(quantize(torch.zeros(2, 3), 4), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="bits=1"):
        quantize(x, 1)


def test_asymmetric_rounding_wins_where_values_lie_on_one_side() -> None:
    x = torch.rand(40, 64, generator=torch.Generator().manual_seed(0)) + 2
    one_sided, symmetric = (q(x, 4).sub(x).square().mean() for q in (omniquant.quantize, smoothquant.quantize))
    assert one_sided < symmetric / 10


def test_gradients_pass_straight_through_rounding() -> None:
    """d x_hat_i / d x_i = 1 for values inside the range; values and their gradient are finite."""
    x = TOKENS.clone().requires_grad_()
    y = omniquant.quantize(x, 4)
    assert torch.equal(y.detach(), omniquant.quantize(TOKENS, 4))
    for i in (0, 1, 4, 5):  # neither minimum nor maximum of the first token
        (gradient,) = torch.autograd.grad(y[0, i], x, retain_graph=True)
        assert gradient[0, i] == pytest.approx(1.0) and (gradient[1] == 0).all()


# --- SmoothQuant -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "expected"), [(0.5, [6.3246, 0.79057, 4.4721]), (0.85, [7.4554, 0.57367, 2.5461])])
def test_smoothing_scale_vectors(alpha: float, expected: Any) -> None:
    scales = smoothing_scales(torch.tensor([8.0, 0.5, 2.0]), torch.tensor([0.2, 0.8, 0.1]), alpha)
    assert scales.tolist() == pytest.approx(expected, rel=1e-4)


def test_smoothing_scales_have_floors() -> None:
    scales = smoothing_scales(torch.tensor([0.0, 4.0]), torch.tensor([1.0, 0.0]), 0.5)
    assert scales.tolist() == pytest.approx([1e-5, 2 / 1e-5**0.5])


def folded(scales: dict[str, Tensor]) -> TinyBlock:
    """The block with the scales absorbed in its norms and weights, as the methods do it; qk before rotation."""
    block = TinyBlock()
    w, heads = block.weights, HEADS // KV_HEADS
    for norm, site, readers in (("attn", "attn_in", "qkv"), ("mlp", "mlp_in", ("gate", "up"))):
        block.norms[norm] = block.norms[norm] / scales[site]
        for name in readers:
            w[name] = w[name] * scales[site]
    if "v" in scales:
        v, qk = scales["v"], torch.cat([scales["qk"], scales["qk"]], -1)
        w["v"] = w["v"] / v.flatten()[:, None]
        w["o"] = w["o"] * v.repeat_interleave(heads, 0).flatten()
        w["q"] = w["q"] / qk.repeat_interleave(heads, 0).flatten()[:, None]
        w["k"] = w["k"] * qk.flatten()[:, None]
    return block


def assert_same_rounding(found: Tensor, expected: Tensor) -> None:
    """The same output, but for values that float32 noise moves over the edge of a rounding cell."""
    error = (expected - calibrated()[2].reference).abs().mean()
    assert torch.isclose(found, expected, rtol=1e-4, atol=1e-4).float().mean() > 0.99
    assert error > 1e-3 and (found - expected).abs().mean() < 0.01 * error


@pytest.mark.parametrize("per", ["token", "tensor", "static"])
@pytest.mark.parametrize("attention", [False, True])
def test_smoothquant_without_touching_weights_equals_folding(per: str, attention: bool) -> None:
    block, x, statistics = calibrated()
    technique = SmoothQuant(bits=6, per=per, attention=attention)
    state = technique.fit(statistics)
    other = folded({site: state[f"0.{site}"] for site in ("attn_in", "mlp_in")})
    assert torch.allclose(other(x), statistics.reference, rtol=1e-4, atol=1e-4)
    plain = SmoothQuant(bits=6, per=per, attention=attention, smooth=False)
    expected = other(x, applied(plain, state if per == "static" else None))
    assert_same_rounding(block(x, applied(technique, state)), expected)


def test_static_steps_cover_the_smoothed_calibration_range() -> None:
    _, _, statistics = calibrated()
    state = SmoothQuant(bits=8, per="static", attention=True).fit(statistics)
    for site in ("attn_in", "attn_out", "mlp_in", "mlp_mid", "q", "k", "v"):
        seen = statistics.seen[site] / (state[f"0.{site}"] if site in ("attn_in", "mlp_in") else 1)
        assert float(127 * state[f"0.{site}.scale"]) == pytest.approx(float(seen.abs().max()), rel=1e-5)


def test_smoothing_beats_plain_rounding_where_channels_are_outliers() -> None:
    for bits in (4, 8):
        smooth, plain = (SmoothQuant(bits=bits, smooth=smooth) for smooth in (True, False))
        assert output_error(smooth, fitted(smooth)) < 0.8 * output_error(plain, None)


# --- OmniQuant -------------------------------------------------------------------------------------------------------


def random_scales() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = {"attn_in": (HIDDEN,), "mlp_in": (HIDDEN,), "v": (KV_HEADS, HEAD), "qk": (KV_HEADS, HEAD // 2)}
    return {name: torch.rand(shape, generator=generator) * 2 + 0.3 for name, shape in shapes.items()}


@pytest.mark.parametrize("bits", [4, 8])
def test_omniquant_without_touching_weights_equals_folding(bits: int) -> None:
    """Also the dense function is the same: the tied scales are exact under rotation and grouped queries."""
    block, x, statistics = calibrated()
    scales = random_scales()
    other = folded(scales)
    assert torch.allclose(other(x), statistics.reference, rtol=1e-4, atol=1e-4)
    expected = other(x, applied(OmniQuant(bits=bits, smooth=False), None))
    state = {f"0.{name}": value for name, value in scales.items()}
    assert_same_rounding(block(x, applied(OmniQuant(bits=bits), state)), expected)


def test_initial_scales_follow_the_method() -> None:
    block, _, statistics = calibrated()
    scales = omniquant.initial_scales(statistics, 0, 0.5)
    for site, projection in (("attn_in", "q"), ("mlp_in", "up")):
        inputs, weights = statistics.channel_max(0, site), block.weights[projection].abs().amax(0)
        assert torch.allclose(scales[site], (inputs / weights).sqrt())
    groups = (KV_HEADS, HEADS // KV_HEADS, HEAD)
    out = statistics.channel_max(0, "attn_out").reshape(groups)
    columns = block.weights["o"].abs().amax(0).reshape(groups)
    assert torch.allclose(scales["v"], (out.amax(1) / columns.amax(1)).sqrt())
    assert torch.equal(scales["qk"], torch.ones(KV_HEADS, HEAD // 2))


@pytest.mark.parametrize("bits", [4, 8])
def test_training_beats_initial_scales_beat_plain_rounding(bits: int) -> None:
    """At 8 bits the initial scales leave a tenth of plain rounding's error, and training may leave it there: which of
    the two is smaller on this toy block differs between processors."""
    errors = {}
    for name, technique in {
        "trained": OmniQuant(bits=bits, epochs=16),
        "initial": OmniQuant(bits=bits, train=False),
        "plain": OmniQuant(bits=bits, smooth=False),
    }.items():
        errors[name] = output_error(technique, fitted(technique))
    assert errors["trained"] < 0.95 * errors["initial" if bits == 4 else "plain"]
    assert errors["initial"] < 0.95 * errors["plain"]


def test_training_starts_from_the_initial_scales_and_leaves_them_alone() -> None:
    _, x, statistics = calibrated()
    initial = omniquant.initial_scales(statistics, 0, 0.5)
    initial["qk"][0, :3] = torch.tensor([0.0, -0.001, 0.002])
    before = {name: value.clone() for name, value in initial.items()}
    trained = OmniQuant(bits=4, epochs=1, learning_rate=1e-9)._trained(statistics, 0, initial, x.split(1))
    assert all(torch.equal(initial[name], value) for name, value in before.items())
    assert trained["qk"][0].tolist() == pytest.approx([0.01, -0.01, 0.01, 1.0], rel=1e-4)
    assert torch.allclose(trained["attn_in"], initial["attn_in"], rtol=1e-4)
    assert not any(value.requires_grad for value in trained.values())


class TwoLayers(TinyStatistics):
    """The same block twice."""

    n_layers = 2

    def dense_inputs(self, layer: int) -> Tensor:
        return self.reference if layer else self.x

    def run_block(
        self, layer: int, inputs: Tensor, technique: Technique | None = None, state: State | None = None
    ) -> Tensor:
        state = {f"0.{name.partition('.')[2]}": value for name, value in (state or {}).items()}  # for `applied`
        return super().run_block(layer, inputs, technique, state)


def test_an_earlier_block_hands_rounded_inputs_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its targets are those of exact inputs; only the loss that is off by default asks for the rounded ones'."""
    calls: list[tuple[Any, dict[str, Any]]] = []

    def spy(run_block: Any, initial: Any, inputs: Any, targets: Any, auxiliary: Any, **options: Any) -> Any:
        calls.append(((inputs, targets, auxiliary), options))
        return initial

    monkeypatch.setattr(omniquant, "train_block", spy)
    statistics = TwoLayers(*calibrated()[:2])
    technique = OmniQuant(bits=4, epochs=7, learning_rate=0.5)
    state = technique.fit(statistics)
    (first, _), ((inputs, targets, auxiliary), options) = calls
    rounded = torch.cat([statistics.run_block(0, x, technique, state) for x in first[0]])
    assert torch.equal(torch.cat(inputs), rounded) and not torch.equal(rounded, statistics.reference)
    assert torch.equal(torch.cat(targets), statistics.run_block(1, statistics.reference)) and auxiliary is None
    assert (options["epochs"], options["learning_rate"]) == (7, 0.5)
    OmniQuant(bits=4, aug_loss=True).fit(statistics)
    inputs, _, auxiliary = calls[-1][0]
    assert torch.equal(auxiliary[0], statistics.run_block(1, inputs[0]))


def test_scales_move_by_the_loss_alone_and_not_to_zero() -> None:
    ones, zeros = [torch.ones(1, 2, 3)], [torch.zeros(1, 2, 3)]
    idle = train_block(lambda scales, x: x + 0 * scales["qk"].sum(), {"qk": torch.full((3,), 2.0)}, ones, zeros)
    assert idle["qk"].tolist() == [2.0] * 3  # no decay
    start = {"qk": torch.full((3,), 0.05)}
    towards = train_block(lambda scales, x: x * scales["qk"], start, ones, zeros, epochs=300, learning_rate=0.01)
    assert (towards["qk"].abs() >= omniquant.SMALLEST_SCALE).all()


def test_aug_loss_adds_the_second_target() -> None:
    seen = []

    def run_block(scales: dict[str, Tensor], hidden: Tensor) -> Tensor:
        seen.append(scales["attn_in"].detach().clone())
        return hidden * scales["attn_in"]

    ones = [torch.ones(1, 4, 3)]
    start = {"attn_in": torch.full((3,), 2.0)}
    alone = train_block(run_block, start, ones, [ones[0] * 1.0], epochs=400, learning_rate=0.02)
    both = train_block(run_block, start, ones, [ones[0] * 1.0], [ones[0] * 3.0], epochs=400, learning_rate=0.02)
    assert alone["attn_in"].tolist() == pytest.approx([1.0] * 3, abs=0.05)
    assert both["attn_in"].tolist() == pytest.approx([2.0] * 3, abs=0.05)
    assert len(seen) == 800


def test_training_stops_at_nan_and_names_the_block() -> None:
    with pytest.raises(FloatingPointError, match="nan in layer 3, epoch 0"):
        train_block(
            lambda scales, x: x * scales["qk"] * float("nan"),
            {"qk": torch.ones(3)},
            [torch.ones(1, 2, 3)],
            [torch.ones(1, 2, 3)],
            block="layer 3",
        )


# --- both ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [SmoothQuant, lambda bits: OmniQuant(bits=bits, train=False)])
def test_output_error_falls_with_bits_down_to_the_identity(make: Any) -> None:
    errors = []
    for bits in (2, 3, 4, 6, 8, 12, 16):
        technique = make(bits=bits)
        errors.append(output_error(technique, fitted(technique)))
    assert errors == sorted(errors, reverse=True) and errors[-2] > 0
    block, x, statistics = calibrated()
    assert torch.equal(block(x, applied(make(bits=16), None)), statistics.reference)
    assert not make(bits=16).needs_calibration


@pytest.mark.parametrize(
    ("technique", "alone"),
    [
        (SmoothQuant(bits=4, attention=True), True),
        (SmoothQuant(bits=4, per="static", attention=True), True),
        (SmoothQuant(bits=4, per="tensor", attention=True), False),
        (OmniQuant(bits=4, train=False), True),
    ],
)
def test_a_token_depends_on_the_others_only_per_tensor(technique: Technique, alone: bool) -> None:
    state, statistics = fitted(technique), calibrated()[2]
    assert technique.per_token is alone
    equal = []
    for site in technique.sites:
        x = statistics.seen[site].bfloat16()
        transform = technique.transform(site, 0, state)
        one = (slice(3, 4), slice(None), slice(7, 8)) if x.ndim == 4 else (slice(3, 4), slice(7, 8))
        y = transform(x, STEP)
        assert y.dtype == x.dtype and y.shape == x.shape
        equal.append(torch.equal(y[one], transform(x[one], STEP)))
    assert all(equal) is alone and any(equal) is alone


def test_settings_are_checked() -> None:
    assert SmoothQuant().sites == ("attn_in", "attn_out", "mlp_in", "mlp_mid")
    assert OmniQuant().sites[4:] == ("q_rotary", "k_rotary", "v_heads") and len(OmniQuant(attention=False).sites) == 4
    for make, settings in (
        (SmoothQuant, {"bits": 1}),
        (SmoothQuant, {"alpha": 1.5}),
        (SmoothQuant, {"per": "channel"}),
        (OmniQuant, {"bits": 4.5}),
        (OmniQuant, {"alpha": -1}),
    ):
        with pytest.raises(ValueError, match="is not valid; choose"):
            make(**settings)
    with pytest.raises(ValueError, match="epochs=0"):
        OmniQuant(epochs=0)
    for technique, missing in ((SmoothQuant(), "0.attn_in"), (OmniQuant(), "0.attn_in")):
        with pytest.raises(ValueError, match=f"no calibrated value for {missing}"):
            technique.transform("attn_in", 0, None)
