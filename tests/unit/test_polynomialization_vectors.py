"""Iron, BOLT, BumbleBee and NEXUS against published coefficients, printed digits and unit-in-the-last-place figures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import erf

from lib.approximations import bolt, bumblebee, fixed_point, iron, nexus, remez
from tests.unit.references import even_fit, gelu_tanh, nexus_exact_sign, silu


def column(function, points):
    return function(torch.tensor(points, dtype=torch.float64)).tolist()


GELU_POINTS = (-4, -3, -2.5, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2.5, 3)
GELU_COLUMNS = {
    "iron": (iron.gelu, (-0.000488, -0.003418, -0.015137, -0.100342, -0.158936, -0.154297, 0, 0.345459, 0.841064,
             1.399658, 2.484863, 2.996582)),
    "bolt": (lambda x: bolt.gelu(x, "real"), (0, 0, -0.014920, -0.101829, -0.157982, -0.153744, 0.001621, 0.346256,
             0.842018, 1.398171, 2.485080, 3)),
    "bolt 4 bits": (lambda x: bolt.gelu(x, **bolt.PUBLISHED_ACTIVATION), (0, 0, -0.0625, -0.125, -0.1875, -0.1875, 0,
                    0.3125, 0.8125, 1.375, 2.4375, 3)),
    "nexus": (lambda x: nexus_exact_sign(x, nexus.GELU, 3.5), (0, -0.003824, -0.014941, -0.100221, -0.158893,
              -0.154407, 0.000226, 0.345593, 0.841107, 1.399779, 2.485059, 2.996176)),
}  # fmt: skip


@pytest.mark.parametrize("name", GELU_COLUMNS)
def test_gelu_digits(name):
    function, expected = GELU_COLUMNS[name]
    assert column(function, GELU_POINTS) == pytest.approx(expected, abs=5.1e-7)


def test_bumblebee_gelu_digits():
    # At -3 the rule "x < -3: 0" leaves the polynomial, P(3) - 3/2 = -0.00927; a printed 0 there is the closed rule.
    expected = (0, -0.009268, -0.014920, -0.101829, -0.157982, -0.153744, 0.001621, 0.346256, 0.842018, 1.398171,
                2.485080, 3)  # fmt: skip
    assert column(lambda x: bumblebee.gelu(x, "real"), GELU_POINTS) == pytest.approx(expected, abs=5.1e-7)


SILU_POINTS = (-8, -5, -3, -1, 0, 1, 3, 5, 8)
SILU_COLUMNS = {
    "iron": (iron.silu, (0, -0.031738, -0.141357, -0.268555, 0, 0.730957, 2.857910, 4.965820, 7.996094)),
    "bolt": (lambda x: bolt.silu(x, "real"), (0, -0.032100, -0.145953, -0.259886, -0.010278, 0.740114, 2.854047,
             4.967900, 8)),
    "bumblebee": (lambda x: bumblebee.silu(x, "real"), (0.007203, -0.027153, -0.145589, -0.265205, 0, 0.734795,
                  2.854411, 4.972847, 8)),
    "nexus": (lambda x: nexus_exact_sign(x, nexus.SILU, 7.0), (0, -0.030718, -0.138786, -0.272279, 0.005392, 0.727721,
              2.861214, 4.969282, 8)),
}  # fmt: skip


@pytest.mark.parametrize("name", SILU_COLUMNS)
def test_silu_digits(name):
    function, expected = SILU_COLUMNS[name]
    assert column(function, SILU_POINTS) == pytest.approx(expected, abs=5.1e-7)


EXP_POINTS = (-5, -3, -2, -1, -0.5, 0)
EXP_COLUMNS = {
    "iron": (iron.exp, (0.006592, 0.049561, 0.135254, 0.367676, 0.606445, 1)),
    "bolt real": (lambda x: bolt.exp(x, "real"), (0.006755, 0.049888, 0.134985, 0.368175, 0.604848, 1.000273)),
    "bolt": (bolt.exp, (0.006592, 0.049805, 0.134766, 0.367920, 0.604736, 1)),
    "bumblebee": (lambda x: bumblebee.exp(x, "real"), (0.004354, 0.042849, 0.126789, 0.362055, 0.604141, 1)),
    "nexus": (nexus.exp, (0.006095, 0.048040, 0.133215, 0.366438, 0.605937, 1)),
}
RSQRT_POINTS = (0.01, 0.25, 1, 3, 10, 100, 500)
RSQRT_COLUMNS = {
    "iron": (iron.rsqrt, (10.117188, 2, 1, 0.577148, 0.316162, 0.099854, 0.044678)),
    "bumblebee": (
        lambda v: bumblebee.rsqrt(v, "real"),
        (9.999479, 1.999852, 0.999926, 0.577356, 0.316217, 0.100005, 0.044720),
    ),
    "nexus": (nexus.rsqrt, (1.461635, 1.284431, 0.932799, 0.576367, 0.316228, 0.1, 0.044721)),
}


@pytest.mark.parametrize("name", EXP_COLUMNS)
def test_exp_digits(name):
    function, expected = EXP_COLUMNS[name]
    assert column(function, EXP_POINTS) == pytest.approx(expected, abs=5.1e-7)


@pytest.mark.parametrize("name", RSQRT_COLUMNS)
def test_rsqrt_digits(name):
    function, expected = RSQRT_COLUMNS[name]
    assert column(function, RSQRT_POINTS) == pytest.approx(expected, abs=5.1e-7)


def test_remez_gives_the_coefficients_of_bolt():
    scaled, level = remez.minimax(lambda y: y / 2 * erf(y / math.sqrt(2)), 2.7, 4)
    assert scaled / 2.7 ** np.arange(5) == pytest.approx(bolt.PUBLISHED_GELU, abs=1e-8)
    assert level == pytest.approx(bolt.PUBLISHED_GELU[0], abs=1e-8)


def test_remez_gives_the_silu_refit():
    scaled, level = remez.minimax(lambda y: y / 2 * np.tanh(y / 2), 6.5, 4)
    assert scaled / 6.5 ** np.arange(5) == pytest.approx(bolt.SILU, abs=1e-8)
    assert level == pytest.approx(1.028e-2, rel=1e-3)


def test_motzkin_form_expands_to_the_polynomial():
    y = torch.linspace(0, 2.7, 1001, dtype=torch.float64)
    g0, g1, g2, g3, g4 = bolt.PUBLISHED_MOTZKIN
    z = (g0 * y + g1) * y + g2
    plain = sum(c * y**i for i, c in enumerate(bolt.PUBLISHED_GELU))
    assert torch.allclose((z + g0 * y + g3) * z + g4, plain, atol=1e-12)


@pytest.mark.parametrize(("even", "cut_off", "function", "agreement"), [
    (nexus.GELU, 3.5, gelu_tanh, 2e-9), (nexus.SILU, 7.0, silu, 1e-11),
])  # fmt: skip
def test_least_squares_gives_the_even_polynomials(even, cut_off, function, agreement):
    assert even_fit(function, cut_off) == pytest.approx(even, rel=agreement)


def test_sigmoid_quartic_of_bumblebee_is_near_least_squares():
    y = np.linspace(0, 8, 2001)
    s = 1 / (1 + np.exp(-y))
    quartic = np.polyval(bumblebee.SIGMOID[::-1], y)
    assert np.abs(quartic - s).max() == pytest.approx(6.50e-3, rel=0.01)
    best = np.sqrt(np.mean((np.polyval(np.polyfit(y, s, 4), y) - s) ** 2))
    assert best < np.sqrt(np.mean((quartic - s) ** 2)) < best + 4e-4


def test_sirnn_units_in_the_last_place():
    """16-bit values with 12 fraction bits, exhaustively: exp 2, sigmoid 3, tanh 4, rsqrt 4 (from 1/8 on)."""
    s, ring = 12, 2.0**-12
    x = torch.arange(-(2**15), 2**15)
    real = x * ring
    largest = {
        "exp": _table_error(fixed_point.lookup(iron._exp_table, s, x.abs()), (-real.double().abs()).exp()),
        "sigmoid": _table_error(
            fixed_point.lookup(iron._sigmoid_table, s, x + len(iron._exp_table(s)) - 1), real.double().sigmoid()
        ),
        "tanh": _table_error(fixed_point.lookup(iron._tanh_table, s, x.abs()) * x.sign(), real.double().tanh()),
    }
    v = torch.arange(2**9, 2**15)
    largest["rsqrt"] = _table_error(fixed_point.rsqrt_integers(v, s, 16), (v * ring).double().rsqrt())
    assert {name: int(error) for name, error in largest.items()} == {"exp": 2, "sigmoid": 3, "tanh": 4, "rsqrt": 4}


def _table_error(integers, exact):
    """Largest distance in units between the result and the exact value floored to a unit."""
    return (integers - (exact * 2**12).floor()).abs().max()


def test_iron_gelu_units_in_the_last_place():
    x = torch.arange(-16 * 4096, 16 * 4096 + 1, dtype=torch.float64) / 4096
    error = ((iron.gelu(x) - gelu_tanh(x)) * 4096).abs()
    assert error.max().item() == pytest.approx(9, abs=0.05)
    assert error.mean().item() == pytest.approx(4.5, rel=0.02)


def test_the_tests_of_nexus():
    x = torch.linspace(-5, 5, 32768, dtype=torch.float64)
    error = (nexus.gelu(x) - gelu_tanh(x)).abs()
    assert (error.mean().item(), error.max().item()) == pytest.approx((1.237e-4, 4.121e-4), rel=1e-3)
    x = torch.linspace(-10, 10, 768, dtype=torch.float64)
    assert torch.allclose(nexus.normalise(x), x * x.square().mean().rsqrt(), atol=1e-14)
    x = torch.linspace(-10, 0, 128, dtype=torch.float64)
    p = nexus.softmax(x, torch.ones(128, dtype=torch.bool), published=True)
    error = (p - x.softmax(-1)).abs()
    assert (error.mean().item(), error.max().item()) == pytest.approx((8.71e-5, 2.83e-4), rel=2e-3)
    assert p.sum().item() == pytest.approx(0.98885, abs=5e-6)


def test_the_tests_of_bumblebee():
    x = torch.linspace(-7, 7, 100_001, dtype=torch.float64)
    assert (bumblebee.gelu(x) - gelu_tanh(x)).abs().max().item() == pytest.approx(9.0e-3, rel=0.04)
    x = torch.linspace(-16, 16, 100_001, dtype=torch.float64)
    assert (bumblebee.silu(x) - silu(x)).abs().max().item() == pytest.approx(1.2e-2, rel=0.02)
    x = torch.linspace(-12, 0, 100_001, dtype=torch.float64)
    assert (bumblebee.exp(x) - x.exp()).abs().max().item() == pytest.approx(8.6e-3, rel=0.01)


def test_reciprocals():
    normalised = torch.arange(2**12, 2**13)
    table = fixed_point.reciprocal_normalised(normalised, 12, 12) * 2.0**-12
    assert (table - 2.0**12 / normalised).abs().max().item() == pytest.approx(5.2e-4, rel=0.03)
    b = torch.linspace(1, 32, 100_001, dtype=torch.float64)
    assert (iron.reciprocal(b) * b - 1).abs().max().item() == pytest.approx(8.1e-3, rel=0.02)
    half = torch.linspace(0.5, 1, 100_001, dtype=torch.float64)
    assert (bumblebee.reciprocal(half, "real") * half - 1).abs().max().item() == pytest.approx(5.42e-5, rel=1e-3)
    sums = torch.tensor([1, 5, 10, 20.0], dtype=torch.float64)
    error = 1 - nexus.reciprocal(sums) * sums
    assert torch.allclose(error, (1 - 0.01 * sums) ** 32, rtol=1e-9)
