"""Statistics against textbook values, definitions written out here, and their own error rates under simulation."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import optimize, stats

from lib import statistics as st


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [(0, 520, 0, 0.0073), (5, 520, 0.0041, 0.0223), (26, 520, 0.034, 0.072), (52, 520, 0.077, 0.129),
     (0, 100, 0, 0.037), (5, 100, 0.022, 0.112), (81, 263, 0.2553, 0.3662)],
)  # fmt: skip
def test_wilson_matches_published_intervals(k, n, low, high):
    assert st.wilson(k, n) == pytest.approx((low, high), abs=6e-4)


def test_wilson_is_its_formula_and_stays_within_the_unit_interval():
    z, (k, n) = stats.norm.ppf(0.95), (7, 31)
    p = k / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    assert st.wilson(k, n, 0.9) == pytest.approx((centre - half, centre + half))
    assert st.wilson(0, 100)[0] == 0 and st.wilson(100, 100)[1] == 1


@pytest.mark.parametrize(("k", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_names_impossible_counts(k, n):
    with pytest.raises(ValueError, match=f"k = {k}, n = {n}"):
        st.wilson(k, n)


@pytest.mark.parametrize(
    ("b", "c", "p"), [(5, 0, 0.063), (6, 0, 0.031), (8, 1, 0.039), (9, 2, 0.065), (20, 8, 0.036), (0, 0, 1), (3, 3, 1)]
)
def test_mcnemar_matches_published_values(b, c, p):
    assert st.mcnemar_exact(b, c) == pytest.approx(p, abs=6e-4)
    assert st.mcnemar_exact(c, b) == st.mcnemar_exact(b, c)


@pytest.mark.parametrize(
    ("cells", "low", "high"),  # Newcombe 1998, table of paired examples, method 10
    [((36, 12, 2, 0), 0.0569, 0.3404), ((20, 12, 2, 16), 0.0562, 0.3292)],
)
def test_newcombe_paired_interval(cells, low, high):
    assert st.newcombe(*cells) == pytest.approx((low, high), abs=2e-3)


def test_newcombe_covers_the_true_difference():
    rng = np.random.default_rng(0)
    probabilities = [0.05, 0.12, 0.04, 0.79]
    tables = rng.multinomial(150, probabilities, size=1500)
    covered = [low <= 0.08 <= high for low, high in (st.newcombe(*map(int, t)) for t in tables)]
    assert 0.93 < np.mean(covered) < 0.98


def test_paired_difference_counts_and_signs():
    before, after = [0, 0, 0, 1, 1, 0, 1, 0], [1, 1, 0, 0, 1, 1, 1, 0]
    change = st.paired_difference(before, after)
    assert (change.n, change.b, change.c, change.difference) == (8, 3, 1, 0.25)
    assert change.low < 0.25 < change.high and change.p_value == st.mcnemar_exact(3, 1)
    mirrored = st.paired_difference(after, before)
    assert (mirrored.low, mirrored.high) == pytest.approx((-change.high, -change.low))


def test_paired_difference_refuses_missing_and_unequal():
    with pytest.raises(ValueError, match="0 or 1"):
        st.paired_difference([0, np.nan], [1, 1])
    with pytest.raises(ValueError, match="equally long"):
        st.paired_difference([0, 1], [1])


def test_means_over_draws_are_compared_prompt_by_prompt():
    """With one draw the randomisation test is McNemar's; a scale common to all prompts changes no p."""
    before, after = np.zeros(60), np.zeros(60)
    after[:11], before[11:13] = 1, 1
    change, low, high, p = st.paired_means(before, after)
    known = st.paired_difference(before, after)
    assert change == pytest.approx(known.difference) and p == pytest.approx(known.p_value, abs=0.01)
    assert (low, high) == pytest.approx((known.low, known.high), abs=0.03)
    third = st.paired_means(before / 3, after / 3)
    assert third[0] == pytest.approx(change / 3) and third[3] == pytest.approx(p, abs=0.01)
    assert st.paired_means(before, before) == (0, 0, 0, 1)
    for bad in ([], [[0.0]], [0.0, 1.0]):
        with pytest.raises(ValueError, match="equally long"):
            st.paired_means(bad, [0.5] if bad else [])


def test_bootstrap_agrees_with_the_normal_interval_and_is_reproducible():
    values = np.random.default_rng(1).normal(2.0, 1.0, 400)
    low, high = st.bootstrap(values, seed=3)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
    assert st.bootstrap(values, seed=3) == (low, high) != st.bootstrap(values, seed=4)
    assert st.bootstrap([2.0]) == (2.0, 2.0)
    low, high = st.bootstrap([0.0] * 9 + [1.0])
    assert 0 <= low < 0.1 < high  # percentiles of means stay within the values
    with pytest.raises(ValueError):
        st.bootstrap([])


def test_multiplicity_textbook_values():
    assert st.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert st.holm([]) == []
    assert st.holm([0.01, math.nan, 0.04]) == pytest.approx([0.02, math.nan, 0.04], nan_ok=True)
    assert st.holm([math.nan]) == pytest.approx([math.nan], nan_ok=True)


def test_trend_is_cochran_armitage():
    """Malformations by their mothers' drinks a day (Agresti, Categorical Data Analysis): chi2 6.57, p 0.010."""
    k, n, t = [48, 38, 5, 1, 1], [17114, 14502, 793, 127, 38], [0.0, 0.5, 1.5, 4.0, 7.0]
    z, p_value = st.trend_test(k, n, t)
    assert z**2 == pytest.approx(6.57, abs=0.005) and p_value == pytest.approx(0.010, abs=5e-4)
    assert st.trend_test(k, n, [-dose for dose in t])[0] == pytest.approx(-z)
    assert st.trend_test([0, 0], [5, 5], [1, 2]) == (0.0, 1.0)
    with pytest.raises(ValueError, match="totals"):
        st.trend_test([6, 1], [5, 5], [0, 1])


def test_minimum_detectable_change_has_the_power_it_promises():
    n, discordance = 400, 0.2
    d = st.minimum_detectable_change(n, discordance)
    rng = np.random.default_rng(0)
    b, c, _ = rng.multinomial(n, [(discordance + d) / 2, (discordance - d) / 2, 1 - discordance], size=20000).T
    power = np.mean(np.abs(b - c) / np.sqrt(b + c) > stats.norm.ppf(0.975))
    assert power == pytest.approx(0.8, abs=0.02)
    assert st.minimum_detectable_change(1600, discordance) < d / 1.9
    assert st.minimum_detectable_change(3, 0.1) == 1.0


@pytest.mark.parametrize("discordance", [1e-3, 0.02, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("n", [1, 3, 4, 8, 20, 150, 1200, 10**6])
def test_the_detectable_change_solves_its_equation(n, discordance):
    z_alpha, z_power = stats.norm.ppf([0.975, 0.8])

    def excess(d):
        return d * math.sqrt(n) - z_alpha * math.sqrt(discordance) - z_power * math.sqrt(max(discordance - d**2, 0.0))

    solvable = excess(discordance) >= 0
    expected = optimize.brentq(excess, 0.0, discordance) if solvable else 1.0
    assert st.minimum_detectable_change(n, discordance) == pytest.approx(expected, abs=1e-9)


def _change(b, c, n):
    return st.paired_difference([0] * (n - c) + [1] * c, [1] * b + [0] * (n - b))


def _decision(asr, over_refusal, broken, **options):
    return st.decision({"asr": asr, "over-refusal": over_refusal, "broken": broken}, **options)


def test_decision_is_three_way():
    still, worse, unsure = _change(2, 2, 520), _change(80, 0, 520), _change(8, 2, 100)
    assert _decision(still, still, still).decision == "re-validated"
    assert _decision(worse, still, still) == st.Decision("not re-validated", ("asr",), None)
    assert _decision(still, still, worse).unmet == ("broken",)
    undecided = _decision(unsure, still, still)
    assert undecided.decision == "undecided" and undecided.unmet == ("asr",) and undecided.n_needed > 100
    assert _decision(still, None, still) == st.Decision("undecided", ("over-refusal",), None)
    assert _decision(worse, still, still, tolerance=0.5).decision == "re-validated"
    assert _decision(still, still, worse, tolerance=0.5).decision == "re-validated"  # it bounds all three
    onset = _change(5, 0, 100)
    assert _decision(onset, still, still) == st.Decision("undecided", ("asr",), None)  # no size decides 0.05 from 0.05


def test_a_limit_that_is_the_tolerance_itself_decides_nothing():
    still = _change(0, 0, 520)
    limits = replace(still, high=0.05), replace(still, difference=0.06, low=0.05, high=0.07)
    assert [_decision(change, still, still).decision for change in limits] == ["undecided"] * 2


def test_the_size_that_decides_is_one_of_harmful_prompts_whatever_criterion_asks_for_it():
    still, unsure = _change(0, 0, 520), _change(16, 4, 200)
    alone = _decision(unsure, still, still).n_needed
    assert _decision(_change(0, 0, 100), still, unsure).n_needed == math.ceil(alone / 2)


def test_one_criterion_beyond_its_tolerance_decides_without_the_others():
    worse, near, still = _change(16, 0, 200), _change(9, 0, 200), _change(0, 0, 520)  # 8 % and 4.5 % more
    alone = _decision(worse, still, still).n_needed
    assert alone < 300 < 10_000 < _decision(near, still, still).n_needed
    assert _decision(worse, near, near).n_needed == _decision(worse, near, None).n_needed == alone
    later = _change(11, 0, 200)  # 5.5 % more takes longer to be shown
    assert _decision(worse, later, still).n_needed == alone < _decision(later, still, still).n_needed
    more = math.ceil(1.1 * alone / 200)
    assert _decision(_change(16 * more, 0, 200 * more), near, near).decision == "not re-validated"


def test_no_change_in_few_prompts_does_not_validate():
    few = _change(0, 0, 20)
    result = _decision(few, few, few)
    assert few.high > 0.05 and result.decision == "undecided"
    assert _decision(*[_change(0, 0, result.n_needed)] * 3).decision == "re-validated"


@pytest.mark.parametrize(("b", "c", "n"), [(3, 1, 100), (12, 2, 100), (30, 10, 300)])
def test_the_named_sample_size_decides_at_the_same_rates(b, c, n):
    first = _change(b, c, n)
    assert _decision(first, first, first).decision == "undecided"
    times = math.ceil(1.1 * _decision(first, first, first).n_needed / n)
    more = _change(b * times, c * times, n * times)
    assert _decision(more, more, more).decision != "undecided"
