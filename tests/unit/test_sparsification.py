"""TEAL and CATS: thresholds of three real models, the greedy search, prompt treatment and properties."""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lib.approximations import cats, make, teal
from lib.approximations.cats import Cats
from lib.approximations.teal import PAPER_THRESHOLDS, Teal, Trace
from lib.approximations.technique import Step, Technique
from tests.unit.tiny_block import SHAPES, TinyBlock, TinyStatistics, applied

MIRROR = os.environ.get("APPROX_DATA_MIRROR")
needs_mirror = pytest.mark.skipif(not MIRROR, reason="APPROX_DATA_MIRROR is not set")
REAL_MODELS = ("llama-3-8b", "llama-2-7b", "mistral-7b")
TABLES = ("llama-3-8b_A", "llama-3-8b_B", "llama-2-7b", "mistral-7b")
WEIGHTS = {name: rows * columns / 32**2 for name, (rows, columns) in SHAPES.items()}


def real_folder() -> Path:
    return Path(str(MIRROR)) / "teal_histograms"


@cache
def official() -> dict:
    return json.loads((real_folder() / "official_thresholds.json").read_text())


@cache
def real_histograms(model: str) -> dict[str, list[tuple[Tensor, Tensor, Tensor]]]:
    """site -> (centers, counts, edges) of each layer, edges rebuilt from four values."""
    data = np.load(real_folder() / f"{model}.npz")
    found = {}
    for index, site in enumerate(data["sites"]):
        layers = []
        for counts, (low, start, stop, high) in zip(data["counts"][:, index], data["edges4"][:, index], strict=True):
            inner = torch.linspace(float(start), float(stop), 9999)
            edges = torch.cat([torch.tensor([low]), inner, torch.tensor([high])])
            layers.append(((edges[:-1] + edges[1:]) / 2, torch.from_numpy(counts.astype(np.int64)), edges))
        found[str(site)] = layers
    return found


def share_within(histogram: tuple[Tensor, Tensor, Tensor], t: float) -> float:
    """Share of |x| <= t, values spread evenly within bins."""
    _, counts, edges = histogram
    below = np.concatenate([[0], counts.double().cumsum(0)])
    upper, lower = np.interp([t, -t], edges.double(), below)
    return (upper - lower) / below[-1]


def close_to_official(found: Tensor, expected: float, edges: Tensor) -> bool:
    gap = abs(float(found) - expected)
    return gap <= 2e-4 * abs(expected) or gap <= 0.02 * float(edges[2] - edges[1])


def prefill(*lengths: int) -> Step:
    """A left-padded prompt batch with these numbers of real tokens."""
    longest = max(lengths)
    return Step(torch.tensor([[i >= longest - n for i in range(longest)] for n in lengths]), prefill=True)


# --- thresholds of real models ---------------------------------------------------------------------------------------


@needs_mirror
@pytest.mark.parametrize("model", REAL_MODELS)
@pytest.mark.parametrize("sparsity", ["0.10", "0.25", "0.40", "0.50", "0.65", "0.90"])
def test_uniform_thresholds_equal_the_official_ones(model: str, sparsity: str) -> None:
    for site, expected in official()[model]["uniform_thresholds"][sparsity].items():
        assert len(expected) == 32
        for (centers, counts, edges), value in zip(real_histograms(model)[site], expected, strict=True):
            assert close_to_official(teal.threshold(centers, counts, float(sparsity)), value, edges)


@needs_mirror
@pytest.mark.parametrize("model", REAL_MODELS)
@pytest.mark.parametrize("sparsity", ["0.25", "0.50", "0.70", "0.90"])
def test_cats_thresholds_equal_the_quantiles_of_real_activations(model: str, sparsity: str) -> None:
    expected = official()[model]["cats_thresholds_abs_silu_gate"][sparsity]
    for histogram, value in zip(real_histograms(model)["mlp_gate"], expected, strict=True):
        found = cats.threshold(*histogram[:2], float(sparsity))
        assert close_to_official(found, value, histogram[2])
        assert share_within(histogram, float(found)) == pytest.approx(float(sparsity), abs=1e-4)


@needs_mirror
def test_realised_sparsity_of_real_activations() -> None:
    """Within 2 points of the target at 50 % everywhere, except in the first two attention inputs."""
    for model in REAL_MODELS:
        for site in ("attn_in", "attn_out", "mlp_in", "mlp_mid"):
            shares = [share_within(h, float(teal.threshold(*h[:2], 0.5))) for h in real_histograms(model)[site]]
            expected = official()[model]["realised_sparsity_of_uniform_thresholds"]["0.50"][site]
            assert shares == pytest.approx(expected, abs=1e-4)
            assert shares[2:] == pytest.approx([0.5] * 30, abs=0.02)


@needs_mirror
def test_one_global_threshold_is_not_teal() -> None:
    """The studied paper's pair removes far more than its nominal share in the first layers of Llama-3-8B."""
    expected = {0.1: (12.1, 19.3), 0.25: (31.6, 32.9), 0.5: (59.7, 53.6), 0.9: (91.6, 84.9)}
    for sparsity, means in expected.items():
        for site, mean in zip(("mlp_in", "mlp_mid"), means, strict=True):
            t = teal.paper_threshold(sparsity, site)
            shares = [100 * share_within(h, t) for h in real_histograms("llama-3-8b")[site]]
            assert np.mean(shares) == pytest.approx(mean, abs=0.2)
            assert shares[0] > 100 * sparsity + 5 and shares[0] > shares[-1]


# --- greedy search ---------------------------------------------------------------------------------------------------


@cache
def real_traces(table: str) -> list[Trace]:
    """The traces of the recorded searches, without errors."""
    data, traces = np.load(real_folder() / f"greedy_{table}.npz"), []
    columns = [[str(name) for name in data["projections"]].index(name) for name in teal.SITES]
    step = torch.tensor(data["step"][columns])
    for order in torch.tensor(data["order"]):
        sparsities = (order[:, None] == torch.tensor(columns)).cumsum(0) * step
        traces.append({"sparsities": sparsities, "effective": sparsities @ (1 / step) / (1 / step).sum()})
    return traces


@needs_mirror
@pytest.mark.parametrize("table", TABLES)
def test_replayed_greedy_searches_reach_the_official_allocations(table: str) -> None:
    model = table.removesuffix("_A").removesuffix("_B")
    traces, stored = real_traces(table), np.load(real_folder() / f"greedy_{table}.npz")["effective"]
    for trace, effective in zip(traces, stored, strict=True):
        assert trace["effective"].numpy() == pytest.approx(effective, abs=1e-6)
    ties = 0
    for sparsity, expected in official()[model]["greedy"][table].items():
        for layer, trace in enumerate(traces):
            found = teal.allocate(trace, float(sparsity))
            if tie_broken_downwards(trace, float(sparsity), expected["effective"][layer]):
                ties += 1
                continue
            assert found == pytest.approx({name: expected[name][layer] for name in found}, abs=1e-6)
            for name in [name for name, share in found.items() if share > 0]:
                centers, counts, edges = real_histograms(model)[teal.SITES[name].partition(".")[0]][layer]
                value = expected["thresholds"][name][layer]
                assert close_to_official(teal.threshold(centers, counts, found[name]), value, edges)
    assert ties <= 2


def tie_broken_downwards(trace: Trace, target: float, official_effective: float) -> bool:
    """Two rows are equally near and the official table, by rounding errors, took the lower one."""
    effective = trace["effective"]
    lower, upper = effective[effective <= target][-1], effective[effective >= target][0]
    equally_near = abs(float(upper + lower) / 2 - target) < 1e-6 and upper > lower
    return bool(equally_near) and official_effective == pytest.approx(float(lower), abs=1e-6)


@cache
def searched() -> tuple[TinyStatistics, Trace]:
    """The greedy search on a random block, with masks on the second half of each window as in the released code."""
    x = torch.randn(4, 64, 32, generator=torch.Generator().manual_seed(1))
    statistics = TinyStatistics(TinyBlock(), x)
    return statistics, teal.greedy_allocation(lambda s: block_error(statistics, x, s), WEIGHTS, step=0.05)


def block_error(statistics: TinyStatistics, x: Tensor, sparsities: dict[str, float]) -> float:
    state = teal.layer_thresholds(statistics, 0, sparsities)
    output = statistics.block(x, applied(Teal(prompt="last_half"), state, prefill(64, 64, 64, 64)))
    return float(teal.activation_error(output, statistics.reference))


def test_greedy_search_raises_effective_sparsity_by_equal_steps() -> None:
    _, trace = searched()
    effective, sparsities = trace["effective"], trace["sparsities"]
    steps = torch.diff(effective, prepend=torch.zeros(1))
    assert steps.tolist() == pytest.approx([0.05 / sum(WEIGHTS.values())] * len(steps), rel=1e-9)
    assert 0.9 <= effective[-1] < 0.9 + 2 * float(steps[0])
    assert trace["errors"].shape == effective.shape and sparsities.shape == (len(effective), len(WEIGHTS))
    assert (torch.diff(sparsities, dim=0, prepend=torch.zeros(1, 7)) > 0).sum(1).tolist() == [1] * len(effective)
    assert sparsities.max() < 1 + 0.05 / min(WEIGHTS.values())


def test_greedy_search_beats_uniform_sparsity() -> None:
    statistics, trace = searched()
    x = torch.randn(4, 64, 32, generator=torch.Generator().manual_seed(1))
    rows = [i for i, s in enumerate(trace["effective"]) if 0.1 <= s <= 0.65]
    uniform = [block_error(statistics, x, dict.fromkeys(WEIGHTS, float(trace["effective"][i]))) for i in rows]
    greedy = trace["errors"][rows].numpy()
    assert len(rows) > 50 and np.mean(greedy <= np.array(uniform)) > 0.95
    assert np.mean(greedy / np.array(uniform)) < 0.97
    first = dict(zip(WEIGHTS, trace["sparsities"][rows[0]].tolist(), strict=True))
    assert greedy[0] == pytest.approx(block_error(statistics, x, first))


def test_greedy_search_picks_the_least_error_first() -> None:
    """With the error sum c_p s_p^2 the optimum has c_p s_p equal for all p, and the search walks to it."""
    cost = {"cheap": 1.0, "dear": 4.0}
    trace = teal.greedy_allocation(lambda s: sum(cost[n] * s[n] ** 2 for n in s), {"cheap": 1.0, "dear": 1.0}, 0.1, 0.5)
    assert trace["sparsities"][:3].flatten().tolist() == pytest.approx([0.1, 0.0, 0.2, 0.0, 0.2, 0.1])
    assert trace["effective"][-1] == pytest.approx(0.5)
    assert trace["sparsities"][-1].tolist() == pytest.approx([0.8, 0.2])


def test_greedy_allocation_reaches_the_technique() -> None:
    statistics, trace = searched()
    state = Teal(sparsity=0.5, allocation="greedy").fit(statistics)
    assert all(torch.equal(statistics.stored["greedy0"][name], value) for name, value in trace.items())
    expected = teal.layer_thresholds(statistics, 0, teal.allocate(trace, 0.5))
    assert state == expected and set(state) == {f"0.{site}" for site in teal.SITES.values()}
    assert state != Teal(sparsity=0.5).fit(statistics)


def test_activation_error_is_a_norm_over_the_last_quarter_of_the_tokens() -> None:
    reference = torch.zeros(2, 8, 3)
    output = reference.clone()
    output[:, :6] = 100.0  # outside the last quarter
    output[0, 6:, 0] = torch.tensor([3.0, 4.0])
    assert float(teal.activation_error(output, reference)) == pytest.approx(5 / 6)
    with pytest.raises(ValueError, match="step=0"):
        teal.greedy_allocation(lambda s: 0.0, WEIGHTS, step=0)


# --- histogram, thresholds, operator ---------------------------------------------------------------------------------


def test_histogram_has_wide_outer_bins_and_counts_everything() -> None:
    values = torch.randn(3, 40, 251, generator=torch.Generator().manual_seed(0))
    centers, counts = teal.histogram(values)
    flat = np.sort(values.flatten().numpy())
    n = len(flat)
    inner = np.linspace(flat[n // 100], flat[n - n // 100], 9999)
    edges = np.concatenate([flat[:1], inner, flat[-1:]])
    assert len(centers) == len(counts) == 10_000 and int(counts.sum()) == n
    assert centers.numpy() == pytest.approx((edges[:-1] + edges[1:]) / 2, abs=1e-6)
    assert int(counts[0]) == n // 100 and int(counts[-1]) == n // 100
    expected = np.histogram(flat, edges.astype(np.float32))[0]
    assert np.abs(np.cumsum(expected) - counts.cumsum(0).numpy()).max() <= 1  # an edge may fall on either side
    with pytest.raises(ValueError, match="finite"):
        teal.histogram(torch.tensor([1.0, float("inf")]))


def test_threshold_interpolates_between_centres() -> None:
    centers, counts = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]), torch.tensor([10, 20, 40, 20, 10])
    assert teal.threshold(centers, counts, 0.0) == 0
    assert float(teal.threshold(centers, counts, 0.5)) == pytest.approx(0.25)  # 75 of 100: a quarter into the bin
    assert float(teal.threshold(centers, counts, 0.9)) == pytest.approx(1.5)
    assert teal.threshold(centers, counts, 1.5) == 2.0
    assert teal.threshold(centers, torch.tensor([90, 10, 0, 0, 0]), 0.2) == -2.0
    with pytest.raises(ValueError, match=r"sparsity=-0\.1"):
        teal.threshold(centers, counts, -0.1)


@pytest.mark.parametrize(("sparsity", "expected"), [(0.1, 9.2 / 480), (0.5, 46 / 480)])
def test_cats_threshold_below_every_edge(sparsity: float, expected: float) -> None:
    """The bin from -0.1 to 0.15 holds 60 of 92 values, 480 t of them within t of 0."""
    edges = torch.tensor([-3.0, -1.0, -0.1, 0.15, 1.0, 3.0])
    centers, counts = (edges[:-1] + edges[1:]) / 2, torch.tensor([1, 10, 60, 20, 1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cats, "bin_edges", lambda _: edges.double())
        assert float(cats.threshold(centers, counts, sparsity)) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("sparsity", [0.1, 0.25, 0.5, 0.9])
def test_realised_sparsity_on_new_values(sparsity: float) -> None:
    generator = torch.Generator().manual_seed(0)
    t = teal.threshold(*teal.histogram(torch.randn(200_000, generator=generator)), sparsity)
    kept = teal.sparsify(torch.randn(200_000, generator=generator), t)
    assert float((kept == 0).float().mean()) == pytest.approx(sparsity, abs=0.01)
    silu = torch.nn.functional.silu(torch.randn(200_000, generator=generator))
    cut = cats.threshold(*teal.histogram(silu), sparsity)
    assert float((teal.sparsify(silu, cut) == 0).float().mean()) == pytest.approx(sparsity, abs=0.002)


def test_sparsify_keeps_strictly_larger_values_and_nan() -> None:
    x = torch.tensor([0.5, -0.5, 0.5001, -0.6, 0.1, float("nan")])
    y = teal.sparsify(x, 0.5)
    assert y[:5].tolist() == pytest.approx([0, 0, 0.5001, -0.6, 0]) and y[5].isnan()
    assert x[0] == 0.5
    half = torch.tensor([0.1001, 0.1]).bfloat16()  # both 0.10009765625: larger than a float32 threshold of 0.1
    assert torch.equal(teal.sparsify(half, torch.tensor(0.1)), half)


def test_paper_thresholds_are_the_printed_ones_and_follow_its_distributions_between() -> None:
    """The printed values are the quantiles of N(0, 0.35^2) and Laplace(0, 0.024), cut or rounded at the last digit."""
    quantiles = {0.1: (0.0440, 0.00253), 0.25: (0.1115, 0.00690), 0.5: (0.2361, 0.01664), 0.9: (0.5757, 0.05526)}
    for sparsity, closed in quantiles.items():
        for i, site in enumerate(("mlp_in", "mlp_mid")):
            assert teal.paper_threshold(sparsity, site) == PAPER_THRESHOLDS[sparsity][i]
            assert teal.paper_threshold(sparsity + 1e-9, site) == pytest.approx(closed[i], rel=2e-3)
    levels = [teal.paper_threshold(s, "mlp_in") for s in (0.0, 0.05, 0.2, 0.4, 0.6, 0.7, 0.8, 0.95)]
    assert levels[0] == 0 and levels == sorted(levels)


# --- techniques ------------------------------------------------------------------------------------------------------


@cache
def calibrated() -> tuple[TinyBlock, Tensor, TinyStatistics]:
    block, x = TinyBlock(), torch.randn(3, 50, 32, generator=torch.Generator().manual_seed(2))
    return block, x, TinyStatistics(block, x)


@pytest.mark.parametrize("technique", [Teal, Cats])
def test_zero_sparsity_is_the_identity_and_error_grows_with_sparsity(technique: Any) -> None:
    block, x, statistics = calibrated()
    dense, errors = block(x), []
    for sparsity in (0.0, 0.1, 0.25, 0.5, 0.75, 0.9):
        made = technique(sparsity=sparsity)
        errors.append(float((block(x, applied(made, made.fit(statistics))) - dense).square().mean()))
    assert errors[0] == 0 and errors == sorted(errors) and errors[1] > 0
    made = technique(sparsity=0.0)
    assert torch.equal(block(x, applied(made, made.fit(statistics))), dense)


def test_greedy_zero_sparsity_is_the_identity() -> None:
    block, x, statistics = calibrated()
    made = Teal(sparsity=0.0, allocation="greedy")
    assert torch.equal(block(x, applied(made, made.fit(statistics))), block(x))


def test_prompt_treatment_respects_each_rows_length_under_left_padding() -> None:
    x = torch.full((3, 7, 5), 0.01)
    state = {"0.mlp_mid": torch.tensor(0.5)}
    step = prefill(7, 4, 1)

    def zeroed(prompt: str, step: Step, values: Tensor) -> list[list[int]]:
        y = Teal(prompt=prompt).transform("mlp_mid", 0, state)(values, step)
        return [(row == 0).all(-1).nonzero().flatten().tolist() for row in y]

    assert zeroed("last_half", step, x) == [[4, 5, 6], [5, 6], []]
    assert zeroed("decode", step, x) == [[], [], []]
    assert zeroed("all", step, x) == [list(range(7))] * 3
    decode = Step(torch.ones(3, 1, dtype=torch.bool), prefill=False)
    for prompt in ("last_half", "decode", "all"):
        assert zeroed(prompt, decode, x[:, :1]) == [[0]] * 3


def test_prompt_treatment_inside_a_mixture() -> None:
    """An expert that sees some tokens of the flattened batch treats the same ones as a dense layer would."""
    tokens = torch.tensor([11, 2, 3, 8, 9, 5])
    assert prefill(6, 3).at(tokens).second_half.tolist() == [[True, False, True, False, False, True]]


def test_decode_only_leaves_the_prompt_untouched_bit_for_bit() -> None:
    block, x, statistics = calibrated()
    made = Teal(sparsity=0.9, prompt="decode")
    state = made.fit(statistics)
    assert torch.equal(block(x, applied(made, state, prefill(50, 50, 50))), block(x))
    decode = Step(torch.ones(3, 50, dtype=torch.bool), prefill=False)
    assert not torch.equal(block(x, applied(made, state, decode)), block(x))


@pytest.mark.parametrize("technique", [Teal(prompt="all"), Cats(), Teal(thresholds="paper", prompt="all")])
def test_a_token_does_not_depend_on_the_others(technique: Technique) -> None:
    _, _, statistics = calibrated()
    state = technique.fit(statistics) if technique.needs_calibration else None
    assert technique.per_token
    for site in technique.sites:
        x = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(3)).mul(0.1)
        transform = technique.transform(site, 0, state)
        alone = transform(x[1:, 4:5], prefill(1))
        assert torch.equal(transform(x, prefill(6, 6))[1:, 4:5], alone)


def test_cats_zeroes_the_input_of_down_wherever_it_zeroes_the_activation() -> None:
    block, x, statistics = calibrated()
    made = Cats(sparsity=0.6)
    seen: dict[str, Tensor] = {}
    put = applied(made, made.fit(statistics))
    block(x, lambda site, t: seen.setdefault(site, put(site, t)))
    removed = seen["act"] == 0
    assert float(removed.float().mean()) == pytest.approx(0.6, abs=0.01)
    assert (seen["mlp_mid"][removed] == 0).all()


@pytest.mark.parametrize("value", [0.0, -0.5])
@pytest.mark.parametrize("others", [0, 10])
def test_cats_threshold_of_equal_values_is_their_magnitude(value: float, others: int) -> None:
    """A dead layer, or one whose values nearly all are one number, has no inner bin to spread counts in."""
    values = torch.cat([torch.full((5000,), value), torch.linspace(-3, 3, others)])
    assert float(cats.threshold(*teal.histogram(values), 0.5)) == abs(value)


def test_settings_are_checked() -> None:
    assert Teal().sites == ("attn_in.q", "attn_in.k", "attn_in.v", "attn_out", "mlp_in.gate", "mlp_in.up", "mlp_mid")
    assert Teal(thresholds="paper").sites == ("mlp_in.gate", "mlp_in.up", "mlp_mid")
    for settings in ({"sparsity": 1.0}, {"allocation": "best"}, {"prompt": "first"}, {"thresholds": "mine"}):
        with pytest.raises(ValueError, match=r"teal: .* is not valid"):
            Teal(**settings)
    for name, wrong in (("teal", {"sparsity": "0.5"}), (["teal"], {})):
        with pytest.raises(ValueError, match=r"are not valid settings|unknown technique"):
            make(name, **wrong)
    with pytest.raises(ValueError, match="paper"):
        Teal(allocation="greedy", thresholds="paper")
    Teal(allocation="greedy", sparsity=0.9)
    with pytest.raises(ValueError, match=r"greedy sparsity=0\.95 .* at most 0\.9"):
        Teal(allocation="greedy", sparsity=0.95)
    with pytest.raises(ValueError, match=r"cats: sparsity=-0\.5"):
        Cats(sparsity=-0.5)
    for technique, site in ((Teal(), "mlp_mid"), (Cats(), "act")):
        with pytest.raises(ValueError, match=f"no calibrated value for 0.{site}"):
            technique.transform(site, 0, None)


def test_what_a_technique_lacks_is_told():
    with pytest.raises(ValueError, match="teal replaces no operation"):
        make("teal").operation("norm", 0, None)
    with pytest.raises(ValueError, match="iron transforms no site"):
        make("iron").transform("mlp_in", 0, None)
    with pytest.raises(ValueError, match="iron needs no calibration"):
        make("iron").fit(None)
