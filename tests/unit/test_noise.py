"""Gaussian and Laplace noise: their distribution, seeds, units and places."""

from typing import Any

import pytest
import torch
from scipy import stats

from lib.approximations import teal
from lib.approximations.noise import Gaussian, Laplace, central_rms
from lib.approximations.technique import Step
from tests.unit.tiny_block import TinyBlock, TinyStatistics

STEP = Step(torch.ones(4, 500, dtype=torch.bool), prefill=True)
ZEROS = torch.zeros(4, 500, 64)


@pytest.mark.parametrize(
    ("technique", "distribution"),
    [(Gaussian(std=0.3), stats.norm(scale=0.3)), (Laplace(scale=0.3, where=("act",)), stats.laplace(scale=0.3))],
)
def test_noise_has_the_stated_distribution(technique: Any, distribution: Any) -> None:
    noise = technique.transform(technique.sites[0], 0, None)(ZEROS, STEP).flatten().numpy()
    assert stats.kstest(noise, distribution.cdf).pvalue > 1e-3
    assert noise.std() == pytest.approx(distribution.std(), rel=0.02)


@pytest.mark.parametrize("kind", [Gaussian, Laplace])
def test_draws_are_fresh_at_every_call_and_repeat_with_the_seed(kind: Any) -> None:
    def two_calls(seed: int, layer: int, site: str) -> tuple[torch.Tensor, torch.Tensor]:
        transform = kind(where=("act", "mlp_mid"), seed=seed).transform(site, layer, None)
        return transform(ZEROS, STEP), transform(ZEROS, STEP)

    first, second = two_calls(0, 0, "act")
    assert not torch.equal(first, second)
    for again, expected in zip(two_calls(0, 0, "act"), (first, second), strict=True):
        assert torch.equal(again, expected)
    for other in (two_calls(1, 0, "act"), two_calls(0, 1, "act"), two_calls(0, 0, "mlp_mid")):
        correlation = torch.corrcoef(torch.stack([first.flatten(), other[0].flatten()]))[0, 1]
        assert abs(correlation) < 0.02


def test_the_second_noise_of_a_pair_has_the_seed_of_the_pair() -> None:
    noises = [Gaussian(where=("mlp_in",), laplace_down=0.1, seed=seed) for seed in (0, 0, 1)]
    first, again, other = (noise.transform("mlp_mid", 0, None)(ZEROS, STEP) for noise in noises)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_laplace_noise_is_finite_whatever_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.zeros(shape))  # whose logarithm is infinite
    assert Laplace().draw(torch.Size([3]), torch.Generator()).isfinite().all()


@pytest.mark.parametrize("kind", [Gaussian, Laplace])
def test_dtype_is_kept_and_the_input_is_not_edited(kind: Any) -> None:
    x = torch.randn(4, 500, 64).bfloat16()
    before = x.clone()
    y = kind(where=("act",)).transform("act", 0, None)(x, STEP)
    assert y.dtype == x.dtype and torch.equal(x, before) and not torch.equal(x, y)


def test_level_zero_is_the_identity() -> None:
    x = torch.randn(4, 500, 64)
    assert torch.equal(Gaussian(std=0.0).transform("norm_attn", 0, None)(x, STEP), x)
    assert torch.equal(Laplace(scale=0.0).transform("mlp_mid", 0, None)(x, STEP), x)


def test_relative_level_is_in_units_of_the_calibrated_activation() -> None:
    statistics = TinyStatistics(TinyBlock(), torch.randn(8, 200, 32, generator=torch.Generator().manual_seed(1)))
    technique = Gaussian(std=0.5, where=("norm", "act", "mlp_mid"), relative=True)
    state = technique.fit(statistics)
    assert set(state) == {"0.norm_attn", "0.norm_mlp", "0.act", "0.mlp_mid"} and technique.needs_calibration
    for site, seen in {"norm_attn": "attn_in", "norm_mlp": "mlp_in", "act": "act", "mlp_mid": "mlp_mid"}.items():
        values = statistics.seen[seen].flatten()
        low, high = values.quantile(0.01), values.quantile(0.99)
        central = values[(values >= low) & (values <= high)].square().mean().sqrt()
        noise = technique.transform(site, 0, state)(ZEROS, STEP)
        assert noise.std() == pytest.approx(0.5 * float(central), rel=0.02)
    with pytest.raises(ValueError, match=r"0\.act"):
        technique.transform("act", 0, None)


def test_relative_level_at_a_norm_without_histogram_follows_each_token() -> None:
    technique = Gaussian(std=0.1, where=("norm_final",), relative=True)
    assert not technique.needs_calibration
    size = torch.tensor([1.0, 10.0])[:, None].expand(2, 20_000)[None]
    noise = technique.transform("norm_final", -1, None)(size, Step(torch.ones(1, 2, dtype=torch.bool), True)) - size
    assert noise.std(-1).flatten().tolist() == pytest.approx([0.1, 1.0], rel=0.03)


def test_central_rms_leaves_massive_activations_out() -> None:
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    values[:20] = 1000.0
    assert float(central_rms(*teal.histogram(values))) == pytest.approx(0.935, rel=0.02)  # N(0, 1) cut at 1 % and 99 %


@pytest.mark.parametrize("others", [0, 10])
def test_central_rms_of_equal_values_is_their_magnitude(others: int) -> None:
    for value in (0.0, -0.5):
        values = torch.cat([torch.full((5000,), value), torch.linspace(-3, 3, others)])
        assert float(central_rms(*teal.histogram(values))) == abs(value)


def test_places_and_settings() -> None:
    assert Gaussian().sites == ("norm", "norm_final") and Laplace().sites == ("mlp_mid",)
    assert not Gaussian().per_token and not Gaussian().needs_calibration
    settings = {"where": ("act",), "relative": False, "seed": 0, "std": 0.1, "laplace_down": 0.0}
    assert Gaussian(std=0.1, where=("act",)).settings == settings
    assert Gaussian(where="act") == Gaussian(where=("act", "act")) == Gaussian(where=("act",))
    with pytest.raises(ValueError, match="gaussian: where='ffn' is not valid; choose one of norm, norm_final, act"):
        Gaussian(where=("ffn",))
    with pytest.raises(ValueError, match="-1"):
        Laplace(scale=-1.0)
