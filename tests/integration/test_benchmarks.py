"""The benchmarks' own lines run: on a toy model for the GPU's, on two prompts for the sweep's arithmetic."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from types import ModuleType

import pytest

from lib.paths import ROOT


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_gpu_table_is_whole_on_a_toy_model():
    gpu = script("gpu")
    table = gpu.main(["--tiny"])
    cells = {row.split(" | ")[0].strip("| "): row for row in table[2:]}
    assert len(cells) == len(table) - 2 and not any("failed" in row for row in table)
    assert {"copy bandwidth, GB/s", "ours / plain generate", "ours / memory-bandwidth floor"} <= set(cells)
    assert any("prompts x" in name for name in cells) and "perplexity / measured matmul rate" in cells
    assert "100.0%" in cells["equal tokens, ours and plain generate"]
    assert all(f"{name}: patched / exact" in cells for name in (*gpu.LIGHT, *gpu.UNCAPTURED))


def test_the_gpus_model_is_llama_8b():
    from lib.models import weight_bytes

    gpu = script("gpu")
    assert weight_bytes(gpu.LLAMA_8B, gpu.torch.bfloat16) == 2 * 8_030_261_248


def test_a_failed_measurement_is_a_line_of_the_table(capsys):
    gpu = script("gpu")
    bench = gpu.Bench(gpu.random_model(gpu.TOY, "cpu", gpu.torch.float32), gpu.SMALL)
    bench.exact = 1.0

    def fail():
        raise RuntimeError("out of memory\nand much more")

    bench.decoding, bench.text, bench.condition, bench.technique = fail, fail, fail, lambda *_: fail()
    assert sum("failed: out of memory |" in row for row in gpu.lines(bench)) == 3 + len(gpu.LIGHT | gpu.UNCAPTURED)


def test_the_gpu_script_refuses_a_machine_without_one(capsys):
    gpu = script("gpu")
    if gpu.torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "PyTorch sees no GPU" in capsys.readouterr().err


def test_sweep_speed_ups_are_medians_of_ratios_within_rounds():
    sweep = script("sweep")
    first = {way: (10.0 / 2**place, 8.0 / 2**place) for place, way in enumerate(sweep.WAYS)}
    second = {way: (30.0 / 2**place, 8.0 / 2**place) for place, way in enumerate(sweep.WAYS)}
    rows = sweep.table([first, second])
    assert rows[2].endswith("| 20.0 | 8.0 | 1.0 | 1.0 |") and rows[5].endswith("| 2.5 | 1.0 | 8.0 | 8.0 |")
    assert "is 8.0 times as fast" in sweep.verdict(2, [first, second])
    assert sweep.stds(4) == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_the_gpu_script_needs_little_more_than_torch_and_transformers():
    absent = ["tenacity", "pandas", "statsmodels", "sklearn", "matplotlib", "datasets", "peft", "pyarrow"]
    start = f"import runpy, sys; sys.modules.update(dict.fromkeys({absent})); runpy.run_path('benchmarks/gpu.py')"
    subprocess.run([sys.executable, "-c", start], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
