"""LoRA's options against PEFT: logits, optimizer steps, merged weights and ΔW from the base."""

import functools
import math
import runpy
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_adapt import LORA, Made, copied
from tiny import FIXTURES, apply_of, assert_close, logits_of, model_of, oracle_of

from jax_lowrank import models, train
from jax_lowrank.adapt import METHODS, lora
from jax_lowrank.adapt.method import change
from jax_lowrank.data import Batch

LAST = {"layers": "last", "layer_fraction": 0.5}
PATTERNS = {
    "rank_pattern": {r".*\.(up|gate)": 6, r".*mlp\.down": 2},
    "alpha_pattern": {r"blocks\.attn\.out": 3.0, r".*\.down": 5.0},
}
# case of tests/oracles/make_peft_options.py -> our options
CASES = {
    "patterns": {**PATTERNS, "rslora": True},
    "dora": {"dora": True},
    "dora_last": {"dora": True, **LAST},
    "dora_plus": {"dora": True, "plus_ratio": 4.0},
    "plus": {"plus_ratio": 4.0},
    "pissa": {"init": "pissa"},
    "pissa_dora": {"init": "pissa", "dora": True},
    "olora": {"init": "olora"},
}
WATCHED = {
    "layers.0.self_attn.q_proj": ("blocks.attn.q.kernel", 0),
    "layers.1.mlp.down_proj": ("blocks.mlp.down.kernel", 1),
}


@functools.cache
def frozen_oracle():
    with np.load(FIXTURES / "peft_options.npz") as stored:
        return dict(stored)


def drawn(name, shape):
    """The oracle's values of lora_A (r, in) or lora_B (out, r)."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    scale = shape[1] ** -0.5 if "lora_A" in name else 0.05
    return (scale * rng.standard_normal(shape)).astype(np.float32)


@functools.cache
def made(case):
    """The case's split, with PEFT's factors put in where the oracle drew them."""
    model = model_of("llama_tied")
    method = METHODS["lora"](**LORA, **CASES[case])
    graphdef, trainable, frozen = method.split(jax.random.key(0), model)
    if "init" not in CASES[case]:
        trainable = models.with_arrays(trainable, drawn_factors(model, trainable, CASES[case]))
    return Made(model, method, graphdef, trainable, frozen)


def drawn_factors(model, trainable, options):
    names = {
        row.path.removesuffix(".kernel"): row.name.removesuffix(".weight")
        for row in models.FAMILIES["llama"].module.rows(model.config, model.head)
        if row.path.endswith(".kernel")
    }
    layers, arrays = (1,) if "layers" in options else (0, 1), {}
    for path, value in models.by_path(trainable).items():
        module, factor = path.split(".adapter.")
        arrays[path] = value
        if factor in ("a", "b"):
            shape = value.shape[:0:-1]
            name = f"{names[module]}.lora_{factor.upper()}.weight"
            arrays[path] = jnp.stack([drawn(name.format(l=l), shape).T for l in layers])  # noqa: E741
    return arrays


@functools.cache
def trained(case, steps=3):
    """The trainable state after the oracle's steps of AdamW, and the losses."""
    m = made(case)
    optimizer = train.make_optimizer(m.trainable, m.method, weight_decay=0.1, clip=0.0)
    tokens = oracle_of("llama_tied")["tokens"]
    weights = np.ones(tokens.shape, np.float32)
    weights[:, 0] = 0
    trainable, _, losses, _ = train.run_steps(
        apply=apply_of(m.graphdef),
        loss=train.causal_lm_loss,
        optimizer=optimizer,
        accumulate=1,
        trainable=copied(m.trainable),
        opt_state=optimizer.init(m.trainable),
        frozen=m.frozen,
        batches=jax.tree.map(lambda x: np.stack([x] * steps), Batch(tokens, weights)),
        rates=np.full(steps, 1e-2, np.float32),
        count=steps,
        key=jax.random.key(0),
    )
    return trainable, losses


QUICK = ("patterns", "dora_last", "dora_plus", "pissa", "olora")  # each option once


@pytest.mark.parametrize(
    "case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_logits_steps_and_weights_equal_those_of_peft(case):
    m = made(case)
    peft = {k.removeprefix(case + "_"): v for k, v in frozen_oracle().items()}
    tokens = oracle_of("llama_tied")["tokens"][:1, :8]
    assert_close(logits_of(m.graphdef, (m.trainable, m.frozen), tokens), peft["logits"])
    trainable, losses = trained(case)
    np.testing.assert_allclose(losses, peft["losses"][:3], rtol=1e-5)
    merged = jax.jit(m.method.merge, static_argnums=0)(m.graphdef, trainable, m.frozen)
    # Adam divides by the root of small squares: a last bit there is 1e-5 of a step here.
    assert_close(logits_of(m.model.graphdef, (merged,), tokens), peft["merged_logits"], 5e-4, 1e-4)
    changes = models.by_path(change(m.method, m.graphdef, trainable, m.frozen, m.model.params))
    for theirs, (path, layer) in WATCHED.items():
        wanted = peft[f"change_{theirs}"]
        assert wanted.any() != (case == "dora_last" and layer == 0)
        assert_close(changes[path][layer].T[:8], wanted, atol=1e-4)


def test_frozen_numbers_are_those_of_the_libraries_today():
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    script = Path(__file__).parent / "oracles" / "make_peft_options.py"
    fresh = runpy.run_path(str(script))["make"]()
    assert fresh.keys() == frozen_oracle().keys()
    for key, value in frozen_oracle().items():
        assert_close(fresh[key], value, atol=1e-5)


def test_dropout_of_dora_is_that_of_peft(monkeypatch):
    peft = frozen_oracle()
    m = made("dora")
    path = ("blocks", "attn", "q")
    net = nnx.merge(m.graphdef, m.trainable, m.frozen)
    graphdef, state = nnx.split(dict(nnx.iter_modules(net))[path])
    linear = nnx.merge(graphdef, jax.tree.map(lambda x: x[0], state))
    linear.adapter.dropout = 0.25
    monkeypatch.setattr(jax.random, "bernoulli", lambda *_: jnp.asarray(peft["dropout_keep"]))
    x = jnp.asarray(peft["dropout_x"])
    assert_close(linear(x, jax.random.key(0)), peft["dropout_y"], atol=1e-5)
    assert float(jnp.abs(linear(x) - peft["dropout_y"]).max()) > 0.1


def test_gaussian_factors_have_the_deviation_of_peft():
    method = METHODS["lora"](rank=8, alpha=8.0, init="gaussian", rank_pattern={".*down": 2})
    _, trainable, _ = method.split(jax.random.key(0), model_of("gpt2"))
    for path, value in models.by_path(trainable).items():
        if path.endswith(".b"):
            assert not np.asarray(value).any()
            continue
        rank = 2 if "down" in path else 8
        assert value.shape[-1] == rank
        assert float(value.std()) == pytest.approx(1 / rank, rel=0.15)
        assert float(jnp.abs(value).max()) > 2 / rank  # not uniform


def test_pissa_starts_from_the_best_low_rank_part():
    m = made("pissa")
    for path, f in lora.factors(m.graphdef, m.trainable, m.frozen).items():
        arrays = models.by_path(m.trainable)
        a, b = arrays[f"{path}.adapter.a"], arrays[f"{path}.adapter.b"]
        kernel = np.asarray(models.by_path(m.model.params)[f"{path}.kernel"])
        spectra = np.linalg.svd(kernel, compute_uv=False)
        rest = np.linalg.norm(kernel - f.scale * np.asarray(a @ b), axis=(1, 2))
        np.testing.assert_allclose(rest, np.sqrt(np.square(spectra[:, 4:]).sum(1)), rtol=1e-4)
        # Both factors carry the same share: their columns and rows have the same norms.
        np.testing.assert_allclose(
            jnp.linalg.norm(a, axis=1), jnp.linalg.norm(b, axis=2), rtol=1e-4
        )


def test_olora_starts_from_orthonormal_rows():
    m = made("olora")
    for path, value in models.by_path(m.trainable).items():
        if path.endswith(".b"):
            eye = np.broadcast_to(np.eye(4), (2, 4, 4))
            assert_close(value @ value.swapaxes(1, 2), eye, atol=1e-5)


@pytest.mark.parametrize("case", ["patterns", "pissa"])
def test_change_from_the_base_is_the_product_of_the_factors(case):
    m = made(case)
    trainable, _ = trained(case)
    params = m.model.params
    changes = models.by_path(change(m.method, m.graphdef, trainable, m.frozen, params))
    found = lora.factors(m.graphdef, trainable, m.frozen)
    for path, f in found.items():
        assert_close(f.scale * (f.a @ f.b), changes.pop(f"{path}.kernel"), atol=1e-5)
        rank = {"up": 6, "gate": 6, "down": 2}.get(path.split(".")[-1], 4)
        assert f.a.shape[-1] == (rank if case == "patterns" else 8)
        assert f.layers == (0, 1) and f.magnitude is None
    assert not any(value.any() for value in changes.values())


def test_change_is_not_rounded_to_the_base(case="pissa"):
    model = models.load(FIXTURES / "llama_tied", jnp.bfloat16)
    method = METHODS["lora"](**LORA, init=case)
    graphdef, trainable, frozen = method.split(jax.random.key(0), model)
    delta = change(method, graphdef, trainable, frozen, model.params)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(delta))
    nudged = jax.tree.map(lambda x: x + 1e-5, trainable)
    delta = models.by_path(change(method, graphdef, nudged, frozen, model.params))
    for path, f in lora.factors(graphdef, nudged, frozen).items():
        wanted = f.scale * (f.a @ f.b)
        assert float(jnp.abs(wanted).max()) < 1e-3  # far below what bfloat16 keeps of the kernel
        assert_close(delta[f"{path}.kernel"], wanted, atol=1e-6)


def test_scales_follow_the_patterns():
    m = made("patterns")
    scales = lora.scales(m.graphdef, m.trainable, m.frozen)
    root = math.sqrt
    assert scales == pytest.approx(
        {
            **{f"blocks.attn.{name}": 8 / root(4) for name in "qkv"},
            "blocks.attn.out": 3 / root(4),
            **{f"blocks.mlp.{name}": 8 / root(6) for name in ("up", "gate")},
            "blocks.mlp.down": 5 / root(2),
        }
    )
    # A record is written after training, which destroyed what `split` gave.
    gone = copied(m.trainable)
    jax.tree.map(lambda x: x.delete(), gone)
    assert lora.scales(m.graphdef, gone, m.frozen) == scales
    full = METHODS["full"]()
    assert lora.scales(*full.split(jax.random.key(0), m.model)) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "pisa"}, r"init 'pisa' is not one of .*did you mean 'pissa'"),
        ({"plus_ratio": 0.5}, r"plus_ratio 0.5 is below 1"),
        ({"alpha": 0.0}, r"alpha 0.0 is not positive"),
        ({"alpha_pattern": {"x": -1.0}}, r"alpha -1.0 is not positive"),
        ({"rank_pattern": {"x": 0}}, r"rank 0 is below 1"),
        ({"rank_pattern": {"attn": 2}}, r"rank_pattern 'attn' matches no adapted.*blocks.attn.q"),
        ({"alpha_pattern": {"blocks.(": 2}}, r"'blocks.\(' is not a regular expression"),
        ({"targets": "qv", "rank_pattern": {".*up": 2}}, r"'.*up' matches no adapted layer"),
        ({"rank_pattern": {".*up": 25}}, r"rank 25 is above .*blocks.mlp.up \(24 x 40\).* 24"),
    ],
)
def test_options_that_break_a_rule(options, message):
    with pytest.raises(ValueError, match=message):
        METHODS["lora"](**{**LORA, **options}).split(jax.random.key(0), model_of("llama_tied"))


def test_methods_with_nothing_to_train():
    llama = model_of("llama_tied")
    with pytest.raises(ValueError, match=r"'head' has nothing to train.*classification head"):
        METHODS["head"]().split(jax.random.key(0), llama)
    with pytest.raises(ValueError, match=r"no bias terms.*use 'lora'"):
        METHODS["bitfit"]().split(jax.random.key(0), llama)


def test_bitfit_trains_biases_of_layers_and_norms_and_no_more():
    _, trainable, _ = METHODS["bitfit"]().split(jax.random.key(0), model_of("gpt2"))
    parts = ("norm1", "norm2", "attn.qkv", "attn.out", "mlp.up", "mlp.down")
    wanted = {"norm.bias"} | {f"blocks.{part}.bias" for part in parts}
    assert models.by_path(trainable).keys() == wanted


@functools.cache
def classifier():
    """A decoder with a classification head, whose linear layer is not one of a stack."""
    config = model_of("gpt2").config
    head = models.Head("classification", ("no", "yes", "maybe"))
    return models.create("gpt2", config, jax.random.key(1), head=head)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_the_head(name):
    model = classifier()
    options = {**LORA, "targets": ".*"} if name == "lora" else {}
    _, trainable, frozen = METHODS[name](**options).split(jax.random.key(0), model)
    head = models.by_path(trainable)["classifier.out.kernel"]
    base = models.by_path(model.params)["classifier.out.kernel"]
    np.testing.assert_array_equal(head, base)
    assert head.unsafe_buffer_pointer() != base.unsafe_buffer_pointer()  # the step donates it
    # Whatever the pattern says, the head is trained and not adapted.
    assert not any(path.startswith("classifier") for path in models.by_path(frozen))
    assert not any(path.startswith("classifier.out.adapter") for path in models.by_path(trainable))
    if name == "head":
        assert models.by_path(trainable).keys() == {"classifier.out.kernel"}
    with pytest.raises(ValueError, match="matches no layer"):
        METHODS["lora"](**LORA, targets="classifier.*").split(jax.random.key(0), model)


@pytest.mark.parametrize("options", [{"init": "pissa"}, {"dora": True}, {"layer_fraction": 0.5}])
def test_a_pattern_may_name_a_layer_outside_the_blocks(options):
    model = classifier()._replace(head_paths=())  # as a pooler that came from a checkpoint
    settings = {"rank": 2, "alpha": 4.0, "targets": r"classifier\.out", **options}
    method = METHODS["lora"](**settings)
    graphdef, trainable, frozen = method.split(jax.random.key(0), model)
    assert models.by_path(trainable)["classifier.out.adapter.a"].shape == (32, 2)
    rng = np.random.default_rng(0)
    noisy = jax.tree.map(lambda x: x + 0.1 * jnp.float32(rng.standard_normal(x.shape)), trainable)
    merged = method.merge(graphdef, noisy, frozen)
    x = jnp.float32(rng.standard_normal((4, 32)))

    def classify(graphdef, *states):
        return nnx.merge(graphdef, *states).classifier(x)

    base = classify(model.graphdef, model.params)
    assert_close(classify(graphdef, trainable, frozen), base, atol=1e-6)
    unmerged = classify(graphdef, noisy, frozen)
    assert_close(classify(model.graphdef, merged), unmerged, atol=1e-5)
    assert float(jnp.abs(unmerged - base).max()) > 0.01
    presets = METHODS["lora"](**LORA).split(jax.random.key(0), model)[1]
    assert all(path.startswith("blocks.") for path in models.by_path(presets))
