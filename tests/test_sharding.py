"""Sharding: the same numbers on every mesh, memory really shared, clear errors."""

import json
import math
import os
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import numpy as np
import pytest
from sharded import MESHES, trained
from tiny import folder_of

from jax_lowrank import config, models, sharding

HERE = Path(__file__).parent
# Compiling is nearly all of the time here. The older way of fusing takes a third of it, and gives
# the same numbers but for rounding. An XLA that does not know a flag ends the process.
QUICK = "--xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""
EIGHT = {
    "XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {QUICK}",
    "JAX_PLATFORMS": "cpu",
}
DECODERS = ("gpt2", "opt", "llama_bias", "mistral_window", "qwen2")
ENCODERS = ("bert", "roberta", "distilbert")
# Every family and every method on every mesh. A decoder's `head` is a classifier; an encoder is
# trained to classify, or as a masked LM. Families that share a file share its layers and rules: one
# of them adapts every linear layer, the others queries and values (`qv`).
EVERY_MESH = (
    *("gpt2:full", "gpt2:lora", "gpt2:head", "gpt2:bitfit"),
    *("opt:full", "opt:lora", "opt:head", "opt:bitfit"),
    *("llama_bias:full", "llama_bias:lora", "llama_bias:head", "llama_bias:bitfit"),
    *("mistral_window:full", "mistral_window:qv", "mistral_window:head"),  # it has no bias
    *("qwen2:full", "qwen2:qv", "qwen2:head", "qwen2:bitfit"),
    *("bert_masked-lm:full", "bert_classification:lora"),
    *("bert_classification:head", "bert_masked-lm:bitfit"),
    *("roberta_classification:full", "roberta_masked-lm:qv"),
    *("roberta_classification:head", "roberta_masked-lm:bitfit"),
    *("distilbert_masked-lm:full", "distilbert_classification:qv"),
    *("distilbert_classification:head", "distilbert_classification:bitfit"),
    "gpt2:dropout",
)
# What concerns no single axis: a start taken from the weights with trained norms, and half of the
# precision.
MIXED = (
    *("llama_bias:dora:float32", "gpt2:lora:bfloat16"),
    *("llama_bias:qv:bfloat16", "roberta_masked-lm:qv:bfloat16"),
)
CASES = (*EVERY_MESH, *(f"{case}:one+mixed" for case in MIXED))
# Losses are sums in another order: as far apart as their dtype makes them.
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}
OWN_TOLERANCE = {"opt:lora": 1e-4, "opt:bitfit": 1e-4}  # ReLU has a kink; 2.2e-5 was seen


def start(out, *arguments, flags=EIGHT, script="sharded.py"):
    """A script of tests/ in a process of its own."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or "",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    environment = {**os.environ, **flags, **cache, "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, str(HERE / script), str(out), *arguments]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process):
    _, said = process.communicate(timeout=1800)
    assert process.returncode == 0, said[-3000:]
    # XLA says so where it gives a device all of an array because it finds no other way.
    assert "Involuntary full rematerialization" not in said


def check(case, runs):
    """One case: every mesh gives the numbers of one device and holds less of the state."""
    fixture, method, dtype = [*case.split(":"), "float32"][:3]
    tolerance = OWN_TOLERANCE.get(f"{fixture}:{method}", TOLERANCE[dtype])
    one = runs["one"]
    assert np.ptp(one["losses"]) > 0.01  # it is trained
    for name, run in runs.items():
        np.testing.assert_allclose(run["losses"], one["losses"], rtol=tolerance, err_msg=name)
        for path, value in run["merged"].items():
            if path.endswith("attn.k.bias"):  # softmax cancels it: Adam walks on rounding alone
                continue
            far = 0.05 if dtype == "bfloat16" else 100 * tolerance
            wanted = one["merged"][path]
            assert value == pytest.approx(wanted, rel=far, abs=1e-6), (name, path)
        assert run["compilations"] == 1, (name, run["moved"])
        assert run["all_optimizer_bytes"] == one["all_optimizer_bytes"]
        # Every weight was read once, on fsdp in eighths.
        read, whole = run["weights_read"], one["weights_read"]
        assert {path: sum(parts) for path, parts in read.items()} == {
            path: sum(parts) for path, parts in whole.items()
        }
        if name == "fsdp":
            assert max(map(max, read.values())) == max(map(max, whole.values())) / 8
    for kind in ("optimizer", "parameter"):
        total = one[f"all_{kind}_bytes"]
        share = {name: run[f"{kind}_bytes"] / total for name, run in runs.items()}
        assert share.pop("one") == share.pop("data", 1) == 1
        # What is not cut: norms, biases and, where the vocabulary does not divide, its table; of an
        # adapter, the factor that lies along the other dimension. fsdp cuts no bias, tensor no head
        # of a few classes.
        if kind == "parameter" or method == "full":
            most = {"fsdp": 0.3, "tensor": 0.7, "mixed": 0.55}
        elif method == "head":
            most = {"fsdp": 0.2, "tensor": 1.01, "mixed": 0.55}
        elif method == "bitfit":  # an encoder's heads have biases, or layers, of their own
            most = {
                "fsdp": 1.01,
                "tensor": 0.8 if fixture.startswith(ENCODERS) else 0.6,
                "mixed": 0.85,
            }
        elif method == "qv":  # a head may hold as much as the adapters
            most = dict.fromkeys(share, 0.85)
        else:  # gpt2: one wide q, k and v: wide B, thin A
            most = dict.fromkeys(share, 0.8 if fixture == "gpt2" else 0.75)
        assert all(share[name] < most[name] for name in share), (kind, share)


@pytest.mark.slow
def test_families_and_methods_on_every_mesh(tmp_path):
    alike = sorted(CASES, key=lambda case: case.split(":")[1])  # by method: as long in both halves
    running = [start(tmp_path / f"{half}.json", *alike[half::2]) for half in (0, 1)]
    found = {}
    for number, process in enumerate(running):
        finish(process)
        found |= json.loads((tmp_path / f"{number}.json").read_text())
    assert set(found) == set(CASES)
    for case, runs in found.items():
        check(case, runs)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    case, address = "gpt2:lora", f"127.0.0.1:{free_port()}"
    alone = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    running = [
        start(tmp_path / f"{n}.json", case, address, "2", str(n), flags=alone) for n in (0, 1)
    ]
    one = trained("gpt2", "lora", MESHES["one"])
    for process in running:
        finish(process)
    stored = [json.loads((tmp_path / f"{n}.json").read_text()) for n in (0, 1)]
    both = [each[case] for each in stored]
    for name in ("fsdp", "data"):
        for run in (both[0][name], both[1][name]):
            np.testing.assert_allclose(run["losses"], one["losses"], rtol=TOLERANCE["float32"])
            assert run["losses"] == both[0][name]["losses"]
            assert run["bytes_read"] == one["bytes_read"] / 2
            assert run["compilations"] == 1
        for path, value in both[0][name]["merged"].items():
            assert value == pytest.approx(one["merged"][path], rel=2e-3, abs=1e-6), path
    assert both[0]["fsdp"]["parameter_bytes"] < 0.6 * one["all_parameter_bytes"]
    for process in both:
        check_reading(process["fsdp"]["weights_read"], folder_of("gpt2"), 2)
        check_reading(process["data"]["weights_read"], folder_of("gpt2"), 1)
    for adapter in (each["adapter"] for each in stored):
        check_reading(adapter["weights_read"], folder_of("gpt2"), 2)
        assert adapter["parameter_bytes"] < 0.6 * adapter["all_parameter_bytes"]


def check_reading(read, folder, shards):
    """One process read what lies on its device and no more: of every matrix one part in `shards`,
    of norms and biases, which no axis cuts, all; and everything once.
    """
    for name, tensor in models.weights._tensors(folder).items():
        cut = shards if len(tensor.shape) == 2 else 1
        assert read[name] == [math.prod(tensor.shape) / cut], name


def test_weights_are_read_part_by_part():
    # The names of one parameter each: stacked and turned, stacked and not, neither.
    folder = folder_of("llama_bias")
    model = models.load(folder)
    whole = models.by_path(model.params)
    rows = {row.path: row for row in models.llama.rows(model.config, model.head)}
    stored = models.weights._tensors(folder)
    for path in ("blocks.mlp.up.kernel", "blocks.attn.q.bias", "blocks.norm1.scale", "embed.table"):
        array = np.asarray(whole[path])
        part = tuple(slice(n // 4, n // 2 + 1) for n in array.shape)
        read = models.weights._read_part(rows[path], array.shape, part, stored, np.dtype("float32"))
        np.testing.assert_array_equal(read, array[part])
        assert read.size < array.size


# ------------------------------------------------------------------------------------------ rules


@pytest.mark.parametrize("name", [*DECODERS, *(f"{family}_masked-lm" for family in ENCODERS)])
def test_every_parameter_has_a_rule(name):
    model = models.load(folder_of(name))
    for path, array in models.by_path(model.params).items():
        axes = sharding.axes_of(path)
        assert len(axes) <= array.ndim, path
        if array.size > 1000:
            assert any(axes), path


def test_adapters_and_optimizer_state_follow_their_kernel():
    assert sharding.axes_of("blocks.attn.q.adapter.a") == ("fsdp", None)
    assert sharding.axes_of("blocks.attn.q.adapter.b") == (None, "tensor")
    assert sharding.axes_of("blocks.mlp.down.adapter.a0") == ("tensor", None)
    assert sharding.axes_of("blocks.mlp.down.adapter.b0") == (None, "fsdp")
    assert sharding.axes_of("blocks.mlp.up.adapter.magnitude") == ("tensor",)
    assert sharding.axes_of("1.0.mu.blocks.mlp.up.kernel") == ("fsdp", "tensor")
    with pytest.raises(sharding.MeshError, match=r"no rule says where 'blocks.moe.experts' lives"):
        sharding.axes_of("blocks.moe.experts")


class Eight(NamedTuple):
    """What the functions that only count read of a mesh."""

    shape: dict


MESH = Eight({"data": 2, "fsdp": 2, "tensor": 2})


def test_a_record_says_mesh_and_device_order():
    def laid(*order):
        devices = np.array([SimpleNamespace(id=n) for n in order]).reshape(1, 2, 2)
        return SimpleNamespace(shape={"data": 1, "fsdp": 2, "tensor": 2}, devices=devices)

    found = sharding.describe(laid(0, 1, 3, 2))
    assert found == {"mesh": {"data": 1, "fsdp": 2, "tensor": 2}, "device_order": [0, 1, 3, 2]}
    assert found != sharding.describe(laid(0, 1, 2, 3))
    assert sharding.describe(None) == {
        "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
        "device_order": [jax.devices()[0].id],
    }


def test_rows_that_do_not_divide_are_refused_with_the_nearest_that_do():
    sharding.check_rows("train.batch_size", 8, 2, MESH)
    with pytest.raises(sharding.MeshError, match=r"batch_size 9 .* 4 devices .*; use 8 or 12"):
        sharding.check_rows("train.batch_size", 9, 1, MESH)
    with pytest.raises(sharding.MeshError, match=r"3 cannot be split .*; use 4"):
        sharding.check_rows("train.batch_size", 3, 1, MESH)
    with pytest.raises(sharding.MeshError, match="in 3 micro-batches; use 12 or 24"):
        sharding.check_rows("train.batch_size", 20, 3, MESH)
    sharding.check_rows("train.batch_size", 7, 1, None)
    assert sharding.up_to_shards(9, MESH) == 12
    assert sharding.up_to_shards(9, None) == 9


def test_offloading_is_refused_where_the_host_has_no_pinned_memory(monkeypatch):
    sharding.check_remat("train.remat", "offload")  # CPU has it
    bare = SimpleNamespace(
        platform="bare", addressable_memories=lambda: [SimpleNamespace(kind="device")]
    )
    monkeypatch.setattr(jax, "local_devices", lambda: [bare])
    sharding.check_remat("train.remat", "dots")
    with pytest.raises(sharding.MeshError, match=r"^train.remat 'offload' .* bare .*; use 'full'"):
        sharding.check_remat("train.remat", "offload")


def test_dimensions_that_do_not_divide_are_whole_and_said():
    shapes = {"embed.table": (61, 24), "blocks.attn.q.kernel": (2, 24, 24), "norm.scale": (24,)}
    assert sharding.uncut(shapes, MESH) == ["embed.table: 61 does not divide by tensor 2"]
    assert tuple(sharding.spec_of("embed.table", (61, 24), MESH)) == (None, "fsdp")
    spec = sharding.spec_of("blocks.attn.q.kernel", (2, 24, 24), MESH)
    assert tuple(spec) == (None, "fsdp", "tensor")
    assert sharding.uncut(shapes, None) == []


def test_a_mesh_says_what_is_wrong_with_it():
    devices = list(range(8))
    with pytest.raises(sharding.MeshError, match=r"does not divide 8 devices.*\[1, 2, 4, 8\]"):
        sharding.make_mesh(3, -1, 1, devices)
    with pytest.raises(sharding.MeshError, match="is for 16 devices, there are 8"):
        sharding.make_mesh(2, 8, 1, devices)
    assert sharding.make_mesh(1, -1, 1, devices[:1]) is None
    assert sharding.make_mesh(1, 1, 1, devices) is None
    with pytest.raises(config.ConfigError, match=r"mesh.fsdp 0 is neither -1 nor at least 1"):
        config.MeshSpec(fsdp=0)
    with pytest.raises(config.ConfigError, match="data and fsdp are -1; only one"):
        config.MeshSpec(data=-1)
