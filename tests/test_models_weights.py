"""Checkpoints that are wrong, in pieces or in bfloat16, and what is said about them."""

import json
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import FIXTURES, model_of, oracle_of, same_bytes

from jax_lowrank import models
from jax_lowrank.models import weights
from jax_lowrank.models.gpt2 import GPT2Config
from jax_lowrank.models.weights import UnsupportedModelError, WeightsError


def copy_of(name, folder, change=None, **fields):
    """A copy of a fixture with `change(tensors)` applied and config fields replaced."""
    tensors = load_file(FIXTURES / name / "model.safetensors")
    if change is not None:
        change(tensors)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((FIXTURES / name / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


def test_everything_that_is_wrong_is_said_at_once(tmp_path):
    def change(tensors):
        del tensors["transformer.h.1.ln_1.bias"], tensors["transformer.wpe.weight"]
        tensors["transformer.h.0.attn.c_attn.lora_A"] = np.ones(3, np.float32)
        kernel = tensors["transformer.h.0.mlp.c_fc.weight"]
        tensors["transformer.h.0.mlp.c_fc.weight"] = np.ascontiguousarray(kernel.T)

    with pytest.raises(WeightsError) as caught:
        models.load(copy_of("gpt2", tmp_path, change))
    message = str(caught.value)
    assert "(4 tensors)" in message and str(tmp_path) in message
    for line in (
        "missing: transformer.h.1.ln_1.bias",
        "missing: transformer.wpe.weight",
        "unexpected: transformer.h.0.attn.c_attn.lora_A",
        "mis-shaped: transformer.h.0.mlp.c_fc.weight is (128, 32), the configuration needs (32, 1",
    ):
        assert line in message


def test_shapes_are_those_of_the_config(tmp_path):
    with pytest.raises(WeightsError, match=r"embed_tokens.weight is \(61, 24\).* needs \(70, 24\)"):
        models.load(copy_of("llama_tied", tmp_path, vocab_size=70))


def test_names_without_the_leading_word_and_with_old_buffers(tmp_path):
    # The hub's gpt2 is saved this way.
    def change(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for layer in range(2):
            tensors[f"h.{layer}.attn.bias"] = np.ones((1, 1, 64, 64), np.float32)

    model = models.load(copy_of("gpt2", tmp_path, change))
    assert same_bytes(model.params, model_of("gpt2").params)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_bfloat16_files(tmp_path, dtype):
    def change(tensors):
        for name in tensors:
            tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)

    model = models.load(copy_of("llama_bias", tmp_path, change), dtype)
    exact_ones = models.by_path(model_of("llama_bias").params).values()
    for ours, exact in zip(models.by_path(model.params).values(), exact_ones, strict=True):
        assert ours.dtype == dtype
        rounded = np.asarray(exact).astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(np.asarray(ours).astype(np.float32), rounded)


def test_float32_files_read_as_bfloat16_are_rounded():
    model = models.load(FIXTURES / "gpt2", jnp.bfloat16)
    table = models.by_path(model.params)["embed.table"]
    exact = np.asarray(models.by_path(model_of("gpt2").params)["embed.table"])
    assert table.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(table), exact.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused(tmp_path, file):
    shutil.copy(FIXTURES / "gpt2" / "config.json", tmp_path)
    (tmp_path / file).write_bytes(b"\x80\x04.")
    with pytest.raises(UnsupportedModelError, match=f"{file}.*run code.*model.safetensors"):
        models.load(tmp_path)


def test_no_weights_no_config_no_shard(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        models.load(tmp_path)
    shutil.copy(FIXTURES / "gpt2" / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor its index"):
        models.load(tmp_path)
    shutil.copy(FIXTURES / "llama_tied_sharded" / "model.safetensors.index.json", tmp_path)
    shutil.copy(FIXTURES / "llama_tied_sharded" / "model-00001-of-00003.safetensors", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00003.*model-00003-of-00003"):
        models.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("gpt2", {"model_type": "gpt3"}, r"'gpt3' .*'gpt2', 'llama', 'mistral'.*mean 'gpt2'"),
        ("gpt2", {"model_type": "mamba"}, r"'mamba' is not supported.*'gpt2', 'llama', 'mistral'"),
        ("gpt2", {"activation_function": "swish"}, "activation_function 'swish'.*'gelu_new'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=False"),
        ("opt", {"layer_norm_elementwise_affine": False}, "elementwise_affine=False"),
        ("opt", {"activation_function": "swish"}, "activation_function 'swish'.*'relu'"),
        (
            "qwen2_window",
            {"max_window_layers": 1, "layer_types": None},
            "1 of 2 layers have a sliding window; only all or none",
        ),
        (
            "qwen2_window",
            {"layer_types": ["sliding_attention", "full_attention"]},
            "1 of 2 layers have a sliding window",
        ),
        (
            "mistral_window",
            {"layer_types": ["full_attention", "sliding_attention"]},
            "1 of 2 layers have a sliding window",
        ),
        ("llama_tied", {"hidden_act": "gelu"}, "hidden_act 'gelu'; only 'silu'"),
        (
            "llama_tied",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            "rope type 'yarn' is not supported; one of .*'default', 'linear', 'llama3'",
        ),
        (
            "llama_tied",
            {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope type 'dynamic' is not supported",
        ),
    ],
)
def test_what_the_code_does_not_do_is_refused(tmp_path, name, fields, message):
    with pytest.raises(UnsupportedModelError, match=message):
        models.load(copy_of(name, tmp_path, **fields))


def test_config_without_a_model_type(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match=r"names no model_type"):
        models.load(tmp_path)


@pytest.mark.parametrize(("stored", "loaded"), [("float32", "float32"), ("bfloat16", "float32")])
def test_loading_takes_little_more_memory_than_the_model(tmp_path, monkeypatch, stored, loaded):
    config = GPT2Config(
        vocab_size=3000, num_layers=4, width=256, num_heads=4, mlp_width=1024, max_positions=64
    )
    made = models.create("gpt2", config, jax.random.key(0), jnp.dtype(stored))
    models.save(tmp_path, made, made.params, max_shard_bytes=2_000_000)
    places, empty = [], weights._empty

    def recorded(shape, dtype):
        places.append(empty(shape, dtype))
        return places[-1]

    monkeypatch.setattr(weights, "_empty", recorded)
    tracemalloc.start()
    try:
        arrays = models.by_path(models.load(tmp_path, jnp.dtype(loaded)).params)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    total = sum(array.nbytes for array in arrays.values())
    assert total < peak < 1.1 * total
    # The memory that was filled is the model's: JAX made no copy of it.
    ours = {place.ctypes.data for place in places}
    assert {array.unsafe_buffer_pointer() for array in arrays.values()} == ours


@pytest.mark.parametrize("most", [20_000, 6_000, 1])
def test_shards_out_and_in(tmp_path, most):
    model = model_of("llama_tied")
    # What lay there before must not be read again.
    (tmp_path / "model-00001-of-00099.safetensors").write_bytes(b"old")
    (tmp_path / "model.safetensors").write_bytes(b"old")
    models.save(tmp_path, model, model.params, max_shard_bytes=most)
    assert not (tmp_path / "model.safetensors").exists()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values())) and len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    stored = {file: load_file(tmp_path / file) for file in files}
    sizes = {file: [t.nbytes for t in tensors.values()] for file, tensors in stored.items()}
    assert all(sum(each) <= most or len(each) == 1 for each in sizes.values())
    assert index["metadata"]["total_size"] == sum(map(sum, sizes.values()))
    whole = load_file(FIXTURES / "llama_tied" / "model.safetensors")
    assert index["weight_map"].keys() == whole.keys()
    for name, file in index["weight_map"].items():
        assert stored[file][name].tobytes() == whole[name].tobytes(), name
    assert same_bytes(models.load(tmp_path).params, model.params)
    # In one file again: no index stays behind.
    models.save(tmp_path, model, model.params)
    assert [p.name for p in tmp_path.glob("model*")] == ["model.safetensors"]
    assert same_bytes(models.load(tmp_path).params, model.params)


@pytest.mark.parametrize("name", ["gpt2", "llama_mha"])
def test_transformers_reads_our_shards(tmp_path, name):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model, oracle = model_of(name), oracle_of(name)
    models.save(tmp_path, model, model.params, max_shard_bytes=10_000)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = theirs(torch.tensor(oracle["tokens"]).long()).logits.numpy()
    np.testing.assert_array_equal(logits, oracle["logits"])


def test_resolve(tmp_path):
    assert weights.resolve(str(tmp_path)) == tmp_path
    for path in ("./nowhere", "/no/such/model", "nowhere", "a/b/c"):
        with pytest.raises(FileNotFoundError, match=r"give a directory or a hub id") as caught:
            weights.resolve(path)
        assert repr(path) in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"neither a local directory nor a hub") as caught:
        weights.resolve("nobody/no-such-model")
    assert "\n" not in str(caught.value)
