"""FLOPs of a step by hand and by XLA's count, cases by the memory plan, and the GPU benchmark."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from lowered import shapes_of_a_step

from jax_lowrank import models, train
from jax_lowrank.adapt import METHODS
from jax_lowrank.models import attention
from jax_lowrank.models.llama import LlamaConfig

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "experiments" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import flops  # noqa: E402
import gpu  # noqa: E402

sys.path.remove(str(BENCHMARKS))


def test_flops_of_a_7b_step_by_hand():
    # A layer: four 4096 x 4096, three 4096 x 11008; then the table of 32000.
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096
    adapters = 32 * 16 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert adapters == 39_976_960  # as PEFT counts them
    mixed = 2 * 4 * 1024**2 // 2 * 4096 * 32 * 2  # q·k and weights·v, 2 rows, half of the square
    config, tokens = LlamaConfig.llama2_7b(), 2 * 1024
    full = flops.of_llama("full", config, 2, 1024, 16)
    assert full == 6 * weights * tokens + 3 * mixed / 2
    lora = flops.of_llama("lora", config, 2, 1024, 16)
    assert lora == 4 * weights * tokens + 6 * adapters * tokens + 3 * mixed / 2
    # Fewer heads of keys; the table counts once though it is tied, and the embedding not at all.
    config = LlamaConfig.llama32_1b()
    weights = 16 * 2048 * (2 * 2048 + 2 * 512 + 3 * 8192) + 128256 * 2048
    assert flops.of_llama("full", config, 1, 2, 16) == 12 * weights + 3 * 16 * 4 * 2048 * 4 / 2


def test_peaks():
    names = ("NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB")
    assert [flops.peak(name) / 1e12 for name in names] == [989, 989, 756, 312]
    assert [flops.peak(name) / 1e12 for name in ("NVIDIA L4", "NVIDIA L40S")] == [121, 362]
    assert math.isnan(flops.peak("AMD EPYC 7B13")) and flops.peak("AMD EPYC", 1.5) == 1.5e12


@pytest.mark.parametrize("method", ["lora", "full"])
def test_flops_are_those_that_xla_counts(method, monkeypatch):
    """Within 5 %: XLA counts what the formula leaves out as well (softmax, norms, activations,
    Adam), which is much where a model is small; of a loop it counts one turn: one layer, one step.
    """
    monkeypatch.setattr(attention, "_chosen", "xla")  # the whole square
    config = LlamaConfig(256, 1, 128, 4, 2, 32, 384, 64)
    rows, length, rank = 4, 64, 8
    model = models.abstract(config.to_hf(models.Head()))
    options = {"rank": rank, "alpha": 16.0} if method == "lora" else {}
    chosen = METHODS[method](**options)
    shapes = shapes_of_a_step(model, chosen, rows, length, remat="none")
    counted = train.run_steps.lower(**shapes).compile().cost_analysis()["flops"]
    half = flops.attention(1, 128, rows, length, causal=True)
    ours = flops.of_llama(method, config, rows, length, rank) + 3 * half
    assert counted == pytest.approx(ours, rel=0.05)


def options_of(**given):
    return SimpleNamespace(**{"rows": None, "remat": None, **given})


def test_a_case_recomputes_no_more_than_it_must(monkeypatch):
    sizes = {"none": 10, "dots": 6, "full": 3}
    monkeypatch.setattr(gpu, "planned", lambda *args: 50 + sizes[args[-1]] * args[2])

    def choose(room, **given):
        options = SimpleNamespace(**{"rows": None, "remat": None, **given})
        found = gpu.choose(gpu.TINY, "lora", 256, 64, options, room)
        return found["rows"], found["remat"], found["planned_bytes"], found["fits"]

    assert choose(90) == (4, "none", 90, True)
    assert choose(89) == (4, "dots", 74, True)
    assert choose(62) == (4, "full", 62, True)
    assert choose(61) == (2, "full", 56, True)
    assert choose(52) == (1, "full", 53, False)
    assert choose(61, rows=4) == (4, "full", 62, False)
    assert choose(61, rows=4, remat="dots") == (4, "dots", 74, True)  # as told


def test_the_table_says_what_was_not_measured():
    row = {"seconds": [0.5, 0.5], "peak_bytes": 3e9}
    slow = {"seconds": [1.0, 1.0], "peak_bytes": 6e9, "checkpointing": False}
    case = {"rows": 8, "remat": "none", "length": 1024, "fits": True, "peer": None, "date": "d"}
    case |= {"flops": 2.47e14, "planned_bytes": 5e9}
    error = {"error": "Traceback\ntorch.OutOfMemoryError: CUDA out of memory. Tried"}
    cases = {
        "7B lora 1024": {**case, "rows_of": {gpu.OURS: [row, row], "PEFT": [slow, slow]}},
        "7B lora 2048": {**case, "rows_of": {gpu.OURS: [row], "PEFT": [error]}},
        "7B full 1024": {**case, "fits": False, "planned_bytes": 110e9, "remat": "full"},
    }
    device = {"device": "NVIDIA H200", "versions": {"jax": "1"}}
    result = {"device": device, "peak_tflops": None}
    named = {name: {**case, "name": name} for name, case in cases.items()}
    said = gpu.table({**result, "cases": named}).splitlines()
    assert "peak 989 TFLOP/s" in said[0]
    assert said[4] == "| 7B lora | 8 x 1024 | jax_lowrank, remat none | 16,384 | 49.9% |  | 3.0 |"
    assert said[5].endswith("8,192 | 25.0% | 2.00 × (2.00 to 2.00) | 6.0 |")
    assert "| PEFT: out of memory |" in said[7]
    assert "does not fit: needs 110 GB" in said[8]
    device["device"] = "Processor"
    said = gpu.table({**result, "cases": named})
    assert "no peak known for Processor; give --peak" in said and "| ? |" in said


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_a_cpu(tmp_path, environment):
    out, no_torch = tmp_path / "gpu.json", tmp_path / "python"
    no_torch.write_text("#!/bin/sh\necho 'ModuleNotFoundError: no torch' >&2; exit 1\n")
    no_torch.chmod(0o755)
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--cases", "tiny", "--out", str(out)]
    command += ["--torch-python", str(no_torch), "--rounds", "1", "--turns", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "PEFT was not measured: ModuleNotFoundError: no torch" in done.stdout
    result = json.loads(out.read_text())
    assert list(result["cases"]) == ["tiny lora 64", "tiny full 64"]
    for case in result["cases"].values():
        (row,) = case["rows_of"][gpu.OURS]
        assert row["seconds"][0] > 0 and len(row["losses"]) == 12 and row["peak_bytes"] > 0
        assert row["losses"][0] == pytest.approx(math.log(512), rel=0.05)
        assert not row["cudnn_attention"]
    again = subprocess.run([*command[:2], "--table", str(out)], capture_output=True, text=True)
    assert again.stdout.strip() in done.stdout
    assert re.search(
        r"\| tiny lora \| 2 x 64 \| jax_lowrank, remat none \| [\d,]+ \| \?", done.stdout
    )
