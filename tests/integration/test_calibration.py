"""Calibration against a direct measurement with plain hooks; its cache; the searches that run on real blocks."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lib import calibration
from lib.anatomy import anatomy
from lib.approximations import make, omniquant, teal
from lib.approximations.plan import Plan
from lib.calibration import Calibration
from lib.errors import ChoiceError
from lib.models import weights_hash
from lib.patching import approximated
from tests.families import random_model
from tests.integration.test_techniques import Words, random_texts

FAMILIES = ("llama", "gemma2", "qwen3", "phi3", "mixtral")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("APPROX_CACHE", str(tmp_path))
    return tmp_path


def token_windows(model):
    return calibration.windows(Words(), random_texts(), calibration.window_length(model))


def directly_measured(model, ids, layer):
    """Tensors of one layer from a whole forward pass, by plain hooks and linear algebra on their inputs."""
    block, norm_inputs, found = anatomy(model).blocks[layer], {}, {}
    read_by = {"attn_in": "norm_attn", "mlp_in": "norm_mlp"}
    handles = [
        norm.register_forward_pre_hook(lambda _, args, site=site: norm_inputs.update({site: args[0]}))
        for site, norm in block.norms.items()
    ]
    handles += [
        block.norms[norm].register_forward_hook(lambda _, args, out, site=site: found.update({site: out}))
        for site, norm in read_by.items()
    ]
    reader = block.projections["o"].module
    handles.append(reader.register_forward_pre_hook(lambda _, args: found.update(attn_out=args[0])))
    try:
        with torch.no_grad():
            model(input_ids=ids)
    finally:
        for handle in handles:
            handle.remove()
    for name in ("q", "k", "v"):
        found[name] = F.linear(found["attn_in"], block.projections[name].weight)
        if block.projections[name].module.bias is not None:
            found[name] = found[name] + block.projections[name].module.bias
    if block.experts is None:
        found["gate"] = F.linear(found["mlp_in"], block.projections["gate"].weight)
        found["act"] = block.activation(found["gate"])
        found["mlp_mid"] = found["act"] * F.linear(found["mlp_in"], block.projections["up"].weight)
    return found, norm_inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_the_whole_model(family):
    model = random_model(family)
    ids = token_windows(model)
    measured = Calibration(model, ids)
    assert (measured.n_layers, tuple(measured.ids.shape)) == (2, (32, 64))
    for layer in range(2):
        sites, norm_inputs = directly_measured(model, ids, layer)
        for site, x in sites.items():
            if site in calibration.CHANNEL_SITES:
                peak = x.abs().flatten(0, -2).amax(0)
                torch.testing.assert_close(measured.channel_max(layer, site), peak, rtol=1e-4, atol=1e-5)
            if site in calibration.HISTOGRAM_SITES:
                centers, counts = measured.histogram(layer, site)
                readers = 2 if family == "mixtral" and site == "mlp_in" else 1  # two experts read each token
                assert int(counts.sum()) == readers * x.numel()
                median = teal.threshold(centers, counts, 0.5)
                assert float((x <= median).float().mean()) == pytest.approx(0.75, abs=0.005)
        for site, x in norm_inputs.items():
            squares = x.square().mean(-1)
            low, high = measured.mean_square(layer, site)
            assert (low, high) == pytest.approx((float(squares.min()), float(squares.max())), rel=1e-4)
        weight = anatomy(model).blocks[layer].projections["k"].weight
        assert torch.equal(measured.weight_max(layer, "k"), weight.detach().abs().amax(0))


def test_every_expert_is_measured():
    """With all experts chosen by some token, the maxima at expert sites bound those of any single expert."""
    model = random_model("mixtral")
    measured = Calibration(model, token_windows(model))
    experts = anatomy(model).blocks[0].experts
    sites, _ = directly_measured(model, token_windows(model), 0)
    assert torch.equal(measured.channel_max(0, "mlp_in"), sites["mlp_in"].abs().flatten(0, 1).amax(0))
    counts = measured.histogram(0, "act")[1]
    assert int(counts.sum()) == 2048 * 2 * experts.down_proj.shape[-1]  # two experts per token
    gates = experts.gate_up_proj[:, : experts.gate_up_proj.shape[1] // 2]
    assert torch.equal(measured.weight_max(0, "gate"), gates.detach().abs().amax((0, 1)))


def test_a_router_shares_the_smoothing_of_what_it_reads():
    """Its weights count for the scales of a mixture's mlp_in; a model without experts has no router."""
    model = random_model("mixtral")
    technique, measured = make("smoothquant"), Calibration(model, token_windows(model))
    before = technique.fit(measured)["0.mlp_in"]
    with torch.no_grad():
        anatomy(model).blocks[0].router.weight[0, 0] = 100
    after = technique.fit(measured)["0.mlp_in"]
    expected = measured.channel_max(0, "mlp_in")[0] ** 0.85 / 100**0.15
    assert float(after[0]) == pytest.approx(float(expected)) and torch.equal(after[1:], before[1:])
    dense = random_model("llama")
    with pytest.raises(KeyError):
        Calibration(dense, token_windows(dense)).weight_max(0, "router")


def test_a_state_is_read_back_unless_weights_texts_or_settings_change(monkeypatch):
    model, texts, runs = random_model("llama"), random_texts(), []
    measure = Calibration._measured
    monkeypatch.setattr(Calibration, "_measured", lambda self: runs.append(1) or measure(self))
    first = calibration.calibrate(make("teal"), model, Words(), texts)
    again = calibration.calibrate(make("teal"), model, Words(), texts)
    assert runs == [1] and all(torch.equal(first[key], again[key]) for key in first)
    sparser = calibration.calibrate(make("teal", sparsity=0.7), model, Words(), texts)
    assert runs == [1] and sparser["0.mlp_mid"] > first["0.mlp_mid"]
    calibration.calibrate(make("teal"), model, Words(), [texts[0] + " 5" * 64])
    assert runs == [1, 1]
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    calibration.calibrate(make("teal"), model, Words(), texts)
    assert runs == [1, 1, 1]


def test_damaged_cache_files_are_computed_again(cache, caplog):
    model, technique = random_model("llama"), make("cats")
    state = calibration.calibrate(technique, model, Words(), random_texts())
    first = {key: value.clone() for key, value in state.items()}  # the state may be mapped to the file
    files = sorted(cache.rglob("*.safetensors"))
    assert len(files) == 2  # the state and the statistics
    for file in files:
        file.write_bytes(file.read_bytes()[:-7])
    again = calibration.calibrate(technique, model, Words(), random_texts())
    assert all(torch.equal(first[key], again[key]) for key in first)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 2 and all("damaged" in line and "\n" not in line for line in warnings)


def test_too_little_text_says_how_much_is_needed_in_one_plain_line():
    with pytest.raises(ChoiceError, match=r"has 3 tokens.*at least 2048"):
        calibration.calibrate(make("teal"), random_model("llama"), Words(), ["5 6 7"])


@pytest.mark.parametrize("length", [16, 64])
def test_no_text_is_tokenised_beyond_the_windows(length):
    """Of 16 tokens 64 windows are fewer than stable thresholds need."""
    asked = []

    def tokenizer(text, **_):
        asked.append(text)
        return Words()(text)

    texts = [" ".join(str((7 * i + j) % 90) for j in range(100)) for i in range(200)]
    found = calibration.windows(tokenizer, texts, length)
    whole = torch.tensor(Words()(" ".join(texts))["input_ids"])
    assert torch.equal(found, whole[: 64 * length].view(64, length))
    assert len(asked) == -(-max(2048, 64 * length) // 100)


def test_weights_whose_hash_is_known_are_not_hashed_again(monkeypatch):
    model, texts = random_model("llama"), random_texts()
    plan = Plan(((make("teal"), (0,)), (make("cats"), (1,))))
    known = weights_hash(model)
    state = calibration.calibrate(plan, model, Words(), texts)
    monkeypatch.setattr("lib.calibration.weights_hash", lambda _: pytest.fail("hashed again"))
    again = calibration.calibrate(plan, model, Words(), texts, known)
    assert set(state) == {f"0.{site}" for site in teal.SITES.values()} | {"1.act"}
    assert all(torch.equal(state[key], again[key]) for key in state)


def test_what_needs_no_calibration_needs_no_text():
    assert make("gaussian").calibrate(random_model("llama"), Words(), []) is None


def test_greedy_allocation_in_a_mixture_is_one_plain_line():
    model = random_model("mixtral")
    with pytest.raises(ChoiceError, match="choose uniform"):
        calibration.calibrate(make("teal", allocation="greedy"), model, Words(), random_texts())


def test_windows_that_fill_no_whole_number_of_passes_are_all_measured(cache, monkeypatch):
    model = random_model("mistral")
    whole = Calibration(model, token_windows(model))
    monkeypatch.setenv("APPROX_CACHE", str(cache / "other"))
    monkeypatch.setattr(calibration, "TOKENS_PER_PASS", 5 * 64)  # 32 windows: six passes of five and one of two
    parts = Calibration(model, token_windows(model))
    assert parts.batch == 5
    for name, value in whole._tensors.items():
        torch.testing.assert_close(parts._tensors[name], value, rtol=1e-4, atol=1e-4)


def test_the_greedy_trace_of_a_real_block(cache):
    model = random_model("mistral")
    measured = Calibration(model, token_windows(model))
    trace = teal.greedy_search(measured, 0)
    effective, errors = trace["effective"], trace["errors"]
    projections = anatomy(model).blocks[0].projections
    weights = torch.tensor([projections[name].weight.numel() for name in teal.SITES], dtype=torch.float64)
    weights = weights / weights[0]
    torch.testing.assert_close(effective, trace["sparsities"] @ weights / weights.sum())
    steps = torch.diff(effective, prepend=effective.new_zeros(1))
    assert torch.allclose(steps, 0.05 / weights.sum(), atol=1e-12)
    assert 0.9 <= effective[-1] < 0.91 + steps[0]
    assert (errors[1:] > 0.97 * errors[:-1].cummax(0).values).all() and errors[-1] > 5 * errors[10]
    inputs = measured.dense_inputs(0)[: max(1, teal.SEARCH_TOKENS // measured.ids.shape[1])]
    reference = measured.run_block(0, inputs)

    @torch.no_grad()
    def error(sparsities):
        state = teal.layer_thresholds(measured, 0, sparsities)
        with approximated(model, make("teal"), state, layers=[0]):
            return float(teal.activation_error(measured.run_block(0, inputs), reference))

    better = []
    for row in range(len(errors) // 10, len(errors), 10):
        recorded = error(dict(zip(teal.SITES, trace["sparsities"][row].tolist(), strict=True)))
        assert float(errors[row]) == pytest.approx(recorded, rel=1e-5)
        if 0.1 <= effective[row] <= 0.65:
            better.append(errors[row] <= error(dict.fromkeys(teal.SITES, float(effective[row]))))
    assert len(better) >= 5 and sum(better) >= len(better) - 1


def test_what_a_technique_keeps_is_read_back_and_computed_again_where_damaged(cache):
    measured, runs = Calibration(random_model("llama"), token_windows(random_model("llama"))), []

    def compute():
        runs.append(1)
        return {"numbers": torch.arange(4.0)}

    for _ in range(2):
        assert measured.kept("search", compute)["numbers"].tolist() == [0, 1, 2, 3]
    assert runs == [1]
    (file,) = cache.rglob("*.search.safetensors")
    file.write_bytes(file.read_bytes()[:-7])
    assert measured.kept("search", compute)["numbers"].tolist() == [0, 1, 2, 3] and runs == [1, 1]


def block_errors(model, measured, techniques):
    """Mean squared error of block 0's output on the training windows, for each technique."""
    inputs = measured.dense_inputs(0)[: omniquant.TRAINING_WINDOWS]
    reference, errors = measured.run_block(0, inputs), []
    for technique in techniques:
        state = technique.fit(measured) if technique.needs_calibration else None
        with approximated(model, technique, state, layers=[0]):
            errors.append(F.mse_loss(measured.run_block(0, inputs), reference).item())
    return errors


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_training_beats_the_initial_scales_and_those_plain_rounding(family):
    """At 4 bits, on a block with outlier channels, as real models have them; only smoothed sites are rounded."""
    model = random_model(family)
    with torch.no_grad():
        for norm in (anatomy(model).blocks[0].norms[site] for site in ("norm_attn", "norm_mlp")):
            norm.weight[[3, 17]] = torch.tensor([4.0, 6.0])
    measured = Calibration(model, token_windows(model))
    settings = {"bits": 4, "attention": False}
    ladder = [make("omniquant", **settings, epochs=8, learning_rate=1e-2), make("omniquant", **settings, train=False)]
    trained, initial, plain = block_errors(model, measured, [*ladder, make("omniquant", **settings, smooth=False)])
    assert trained < 0.97 * initial and initial < 0.97 * plain


def test_a_diverging_training_names_the_block_and_leaves_the_model_alone():
    model = random_model("llama")
    model.model.norm.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    measured = Calibration(model, token_windows(model))
    measured._tensors["0.mlp_in.max"][0] = torch.nan
    with pytest.raises(FloatingPointError, match="block 0"):
        make("omniquant", bits=4, epochs=1).fit(measured)
    for technique in (make("omniquant", bits=4, epochs=1), make("nexus"), make("smoothquant", per="static")):
        calibration.calibrate(technique, model, Words(), random_texts())
    assert gradients == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(hasattr(m, "approximation") for m in model.modules())
