"""LoRA: initial factors, dropout, layers, PEFT's numbers, and options that break a rule."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_adapt import (
    CASES,
    FAMILIES,
    LINEAR,
    LORA,
    Made,
    batches_of,
    both_families,
    copied,
    made,
    optimizer_of,
    perturbed,
)
from tiny import FIXTURES, apply_of, assert_close, logits_of, model_of, oracle_of, same_bytes

from jax_lowrank import models, train
from jax_lowrank.adapt import METHODS, lora
from jax_lowrank.adapt.method import count, decay_mask, dtypes
from jax_lowrank.models.layers import Adapter


@both_families
def test_initial_factors(family):
    m = made("lora", family)
    for path, value in models.by_path(m.trainable).items():
        value = np.asarray(value)
        if path.endswith(".b"):
            assert not value.any()
            continue
        bound = 1 / math.sqrt(LINEAR[family][path.split(".")[2]][0])
        assert np.abs(value).max() <= bound and np.abs(value).max() > 0.9 * bound
        assert value.std() == pytest.approx(bound / math.sqrt(3), rel=0.15)
        assert not np.array_equal(value[0], value[1])
    everything = np.concatenate(
        [np.asarray(v).ravel() for p, v in models.by_path(m.trainable).items() if p.endswith(".a")]
    )
    assert len(np.unique(everything)) > 0.99 * len(everything)  # no two modules share their draws
    other = m.method.split(jax.random.key(4), m.model)[1]
    assert not same_bytes(other, m.trainable)
    assert same_bytes(m.method.split(jax.random.key(3), m.model)[1], m.trainable)


def test_dropout_is_off_without_a_key():
    m, plain = made("dropout", "gpt2"), made("lora", "gpt2")
    tokens, trainable = oracle_of("gpt2")["tokens"], perturbed(m.trainable)
    off = logits_of(m.graphdef, (trainable, m.frozen), tokens)
    same = logits_of(plain.graphdef, (trainable, plain.frozen), tokens)
    np.testing.assert_array_equal(off, same)
    one, again, other = (
        logits_of(m.graphdef, (trainable, m.frozen), tokens, key=jax.random.key(k))
        for k in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, again)
    assert float(jnp.abs(one - off).max()) > 0.05 and float(jnp.abs(one - other).max()) > 0.05


def test_dropout_preserves_the_expectation():
    rng, rate, draws = np.random.default_rng(0), 0.3, 4000
    x, a, b = (jnp.float32(rng.standard_normal(s)) for s in ((5, 8), (8, 4), (4, 6)))
    options = {"scale": 2.0, "layers": (0,), "index": 3}
    plain = Adapter(a, b, dropout=0.0, **options)(x, None, None, None)
    adapter = Adapter(a, b, dropout=rate, **options)
    keys = jax.random.split(jax.random.key(0), draws)
    outs = np.asarray(jax.jit(jax.vmap(lambda key: adapter(x, None, None, key)))(keys))
    error = outs.std(0) / math.sqrt(draws)
    assert (error > 0).all() and (np.abs(outs.mean(0) - plain) < 5 * error).all()
    # Var = s² Σ_i (x_i w_io)² p/(1-p) for independent inputs dropped with probability p.
    expected = np.sqrt(4 * rate / (1 - rate) * np.square(x) @ np.square(a @ b))
    np.testing.assert_allclose(outs.std(0), expected, rtol=0.1)


def test_dropout_masks_differ_between_modules_and_layers():
    x, eye, key = jnp.ones((40, 30)), jnp.eye(30), jax.random.key(0)

    def mask(index, key):
        options = {"scale": 1.0, "dropout": 0.5, "layers": (0,), "index": index}
        return np.asarray(Adapter(eye, eye, **options)(x, None, None, key)) > 0

    one, other, deeper = mask(0, key), mask(1, key), mask(0, jax.random.fold_in(key, 1))
    for difference in (one != other, one != deeper):
        assert 0.4 < difference.mean() < 0.6


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rslora", [False, True])
def test_logits_equal_those_of_peft(family, rslora):
    with np.load(FIXTURES / f"peft_{family}.npz") as stored:
        peft = dict(stored)
    config = json.loads(str(peft["adapter_config"]))
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    m = made("rslora" if rslora else "lora", family)
    assert m.method.scale == pytest.approx(8 / math.sqrt(4) if rslora else 8 / 4)
    names = {
        row.path.removesuffix(".kernel"): row.name.removesuffix(".weight")
        for row in models.FAMILIES[m.model.family].module.rows(m.model.config, m.model.head)
        if row.path.endswith(".kernel")
    }
    arrays, used = {}, 0
    for path, value in models.by_path(m.trainable).items():
        module, factor = path.split(".adapter.")
        keys = [
            f"base_model.model.{names[module].format(l=l)}.lora_{factor.upper()}.weight"
            for l in range(2)  # noqa: E741
        ]
        arrays[path] = jnp.asarray(np.stack([peft[key].T for key in keys]))
        assert arrays[path].shape == value.shape
        used += len(keys)
    assert used == sum(".lora_" in key for key in peft)
    trainable = models.with_arrays(m.trainable, arrays)
    logits = logits_of(m.graphdef, (trainable, m.frozen), peft["tokens"])
    assert_close(logits, peft["rslora_logits" if rslora else "logits"])
    if not rslora:
        params = m.method.merge(m.graphdef, trainable, m.frozen)
        merged = logits_of(m.model.graphdef, (params,), peft["tokens"])
        assert_close(merged, peft["merged_logits"])


@pytest.mark.parametrize(
    ("num_layers", "which", "fraction", "expected"),
    [
        (12, "first", 1.0, tuple(range(12))),
        (12, "first", 0.25, (0, 1, 2)),
        (12, "last", 0.25, (9, 10, 11)),
        (12, "last", 0.01, (11,)),
        (3, "first", 0.5, (0, 1)),
        (6, "5,0,3", 1.0, (0, 3, 5)),
    ],
)
def test_choice_of_layers(num_layers, which, fraction, expected):
    assert lora.choose_layers(num_layers, which, fraction, jax.random.key(0)) == expected


def test_listed_layers_must_exist():
    with pytest.raises(ValueError, match=r"layers '0,6': the model's layers are 0 to 5"):
        lora.choose_layers(6, "0,6", 1.0, jax.random.key(0))


def test_random_layers_are_distinct_ascending_and_follow_the_key():
    picks = [lora.choose_layers(8, "random", 0.5, jax.random.key(k)) for k in range(30)]
    assert all(len(set(p)) == 4 and list(p) == sorted(p) for p in picks)
    assert len(set(picks)) > 10 and set().union(*picks) == set(range(8))


def test_only_chosen_layers_change():
    for case, layer in (("first", 0), ("last", 1)):
        m = made(case, "gpt2")
        merged = m.method.merge(m.graphdef, perturbed(m.trainable), m.frozen)
        base = models.by_path(m.model.params)
        for path, value in models.by_path(merged).items():
            changed = [bool((value[l] != base[path][l]).any()) for l in range(2)]  # noqa: E741
            if path.startswith("blocks.") and path.endswith("kernel"):
                assert changed == [layer == 0, layer == 1], (case, path)
            else:
                assert not (value != base[path]).any()


def test_decay_spares_norms_and_biases():
    mask = models.by_path(decay_mask(made("full", "gpt2").trainable))
    assert {path for path, decayed in mask.items() if not decayed} == {
        path for path in mask if path.endswith(("scale", "bias"))
    }
    assert mask["embed.table"] and mask["position.table"] and mask["blocks.attn.qkv.kernel"]
    assert all(models.by_path(decay_mask(made("lora", "gpt2").trainable)).values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"rank 0 is below 1.*use 1 or more, or method 'full'"),
        ({"rank": -3}, r"rank -3 is below 1"),
        ({"dropout": 1.0}, r"dropout 1.0 is outside \[0, 1\)"),
        ({"dropout": -0.1}, r"dropout -0.1 is outside"),
        ({"layer_fraction": 0.0}, r"layer_fraction 0.0 is outside \(0, 1\]"),
        ({"layer_fraction": 1.5}, r"layer_fraction 1.5 is outside"),
        ({"layers": "0,"}, r"layers '0,' is not one of .*'first', 'last', 'random'"),
        ({"layers": "middle"}, r"layers 'middle' is not one of .*'first', 'last', 'random'"),
    ],
)
def test_options_outside_their_rules(options, message):
    with pytest.raises(ValueError, match=message):
        METHODS["lora"](**{**LORA, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"rank": 33},
            r"rank 33 is above the smaller dimension of blocks.attn.out \(32 x 32\).* 32",
        ),
        ({"targets": "query"}, r"'query' matches no layer.*all-linear, attention, qv.*attn.qkv"),
        ({"targets": r"attn\.qkv"}, r"matches no layer"),  # a whole path, not a part of it
        ({"targets": "blocks.(attn"}, r"pattern 'blocks.\(attn' is not a regular expression"),
    ],
)
def test_options_that_do_not_fit_the_model(options, message):
    method = METHODS["lora"](**{**LORA, **options})
    with pytest.raises(ValueError, match=message):
        method.split(jax.random.key(0), model_of("gpt2"))


def test_the_largest_rank_fits():
    method = METHODS["lora"](rank=32, alpha=1.0)
    assert count(method.split(jax.random.key(0), model_of("gpt2"))[1]) > 0


@pytest.mark.parametrize("case", ["full", "lora"])
def test_a_bfloat16_base_is_trained_in_float32(case):
    row, options, *_ = CASES[case]
    model = models.load(FIXTURES / "gpt2", jnp.bfloat16)
    method = METHODS[row](**options)
    m = Made(model, method, *method.split(jax.random.key(0), model))
    assert dtypes(m.trainable) == ("float32",)
    assert dtypes(m.frozen) == (() if row == "full" else ("bfloat16",))
    optimizer, trainable = optimizer_of(m), copied(m.trainable)
    trainable, opt_state, losses, _ = train.run_steps(
        apply=apply_of(m.graphdef),
        loss=train.causal_lm_loss,
        optimizer=optimizer,
        accumulate=1,
        trainable=trainable,
        opt_state=optimizer.init(trainable),
        frozen=m.frozen,
        batches=batches_of("gpt2"),
        rates=np.full(3, 1e-2, np.float32),
        count=3,
        key=jax.random.key(0),
    )
    assert dtypes(trainable) == ("float32",) and losses.dtype == jnp.float32
    assert set(dtypes(opt_state)) == {"float32", "int32"}
    assert np.isfinite(losses).all() and float(losses[2]) < float(losses[0])
    merged = method.merge(m.graphdef, trainable, m.frozen)
    tokens = oracle_of("gpt2")["tokens"]
    unmerged = logits_of(m.graphdef, (trainable, m.frozen), tokens)
    gap = jnp.abs(logits_of(model.graphdef, (merged,), tokens) - unmerged).max()
    assert float(gap) < 0.2  # bfloat16 holds 8 bits; logits are of order 4
    # Activations are the base's with every method, the cache's too.
    net = apply_of(m.graphdef)(trainable, m.frozen)
    (x, _, _), cache = net.hidden(tokens), net.new_cache(len(tokens), 40)
    assert x.dtype == cache.keys.dtype == jnp.bfloat16
    stepped = net.step(tokens, None, cache)[0]
    assert float(jnp.abs(stepped - unmerged[:, -1]).max()) < 0.2
