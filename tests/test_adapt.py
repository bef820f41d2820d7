"""One conformance suite over every row of METHODS, with its options, on two families."""

import functools
import inspect
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import apply_of, assert_close, logits_of, model_of, oracle_of

from jax_lowrank import models, train
from jax_lowrank.adapt import METHODS, lora
from jax_lowrank.adapt.method import count, dtypes
from jax_lowrank.data import Batch

LORA = {"rank": 4, "alpha": 8.0}
ALL = {
    "gpt2": ("qkv", "out", "up", "down"),
    "llama_tied": (*"qkv", "out", "gate", "up", "down"),
}
ATTENTION = {"gpt2": ("qkv", "out"), "llama_tied": (*"qkv", "out")}
QV = {"gpt2": ("qkv",), "llama_tied": ("q", "v")}
SOME = {"gpt2": ("out", "down"), "llama_tied": ("out", "down")}
PATTERN = r"blocks\.(attn\.out|mlp\.down)"
RANKS = {r".*\.(up|gate)": 6, r"blocks\.mlp\..*": 2}  # the first that matches counts
ALPHAS = {r".*\.out": 3.0}
LAST = {"layers": "last", "layer_fraction": 0.5}


class Case(NamedTuple):
    """A row of METHODS with options, and what it adapts of the 2 layers."""

    row: str
    options: dict[str, Any] = {}  # noqa: RUF012
    layers: int = 2
    modules: Any = ALL
    head: tuple[str, ...] = ()  # head_paths of the model: here the final norm


NORM = ("norm.scale", "norm.bias")
CASES = {
    "full": Case("full"),
    "bitfit": Case("bitfit", head=NORM),
    "head": Case("head", head=NORM),
    "lora": Case("lora", LORA),
    "rslora": Case("lora", {**LORA, "rslora": True}),
    "dropout": Case("lora", {**LORA, "dropout": 0.3}),
    "first": Case("lora", {**LORA, "layer_fraction": 0.5, "layers": "first"}, 1),
    "last": Case("lora", {**LORA, **LAST}, 1),
    "random": Case("lora", {**LORA, "layer_fraction": 0.5, "layers": "random"}, 1),
    "qv": Case("lora", {**LORA, "targets": "qv"}, 2, QV),
    "attention": Case("lora", {**LORA, "targets": "attention"}, 2, ATTENTION),
    "pattern": Case("lora", {"rank": 1, "alpha": 1.0, "targets": PATTERN}, 2, SOME),
    "ranks": Case(
        "lora",
        {
            **LORA,
            "rank_pattern": RANKS,
            "alpha_pattern": ALPHAS,
            "init": "gaussian",
            "plus_ratio": 4.0,
        },
    ),
    "pissa": Case("lora", {**LORA, "init": "pissa"}, head=NORM),
    "olora": Case("lora", {**LORA, "init": "olora", "rslora": True, **LAST}, 1),
    "dora": Case("lora", {**LORA, "dora": True, "dropout": 0.3, **LAST}, 1),
}
FAMILIES = ("gpt2", "llama_tied")
# The second family differs in its modules, which these options meet; all options on both would only
# compile more.
PAIRS = [(case, "gpt2") for case in CASES]
PAIRS += [(case, "llama_tied") for case in ("full", "lora", "random", "qv", "attention", "ranks")]
every_case = pytest.mark.parametrize(("case", "family"), PAIRS)
both_families = pytest.mark.parametrize("family", FAMILIES)


def test_every_method_and_option_is_in_the_suite():
    assert {case.row for case in CASES.values()} == set(METHODS)
    assert {name for case in CASES.values() for name in case.options} == set(
        inspect.signature(METHODS["lora"]).parameters
    )
    inits = {case.options.get("init", "kaiming") for case in CASES.values()}
    assert inits == set(lora.INITS)


class Made(NamedTuple):
    model: Any
    method: Any
    graphdef: Any
    trainable: Any
    frozen: Any


@functools.cache
def made(case, family):
    """A case's method on a family, split with key 3."""
    row, options, _, _, head = CASES[case]
    method = METHODS[row](**options)
    model = model_of(family)._replace(head_paths=head)
    return Made(model, method, *method.split(jax.random.key(3), model))


def perturbed(trainable, scale=0.1):
    """The trainable state with noise on every array, drawn on the host."""
    rng = np.random.default_rng(5)
    return jax.tree.map(
        lambda x: np.asarray(x) + np.float32(scale * rng.standard_normal(x.shape)), trainable
    )


def batches_of(family, steps=3):
    """The oracle's tokens as `steps` batches of 3 rows with ragged ends."""
    tokens = np.stack([np.roll(oracle_of(family)["tokens"], t, axis=1) for t in range(steps)])
    weights = np.ones(tokens.shape, np.float32)
    weights[:, :, 0], weights[:, 1, 15:], weights[:, 2, 9:] = 0, 0, 0
    return Batch(tokens, weights)


def optimizer_of(m):
    return train.make_optimizer(m.trainable, m.method, weight_decay=0.01, clip=1.0)


def copied(tree):
    """A copy that a donating function may destroy."""
    return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


# ---------------------------------------------------------------------------- conformance suite


@every_case
def test_output_is_unchanged_at_init(case, family):
    m, tokens = made(case, family), oracle_of(family)["tokens"]
    base = logits_of(m.model.graphdef, (m.model.params,), tokens)
    # Compiled, XLA may order the sums otherwise: the last bit may differ.
    output = logits_of(m.graphdef, (m.trainable, m.frozen), tokens)
    assert_close(output, base, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case].row == "lora"])
def test_output_change_at_init_is_exactly_zero(case):
    m, rng = made(case, "gpt2"), np.random.default_rng(0)
    base = dict(nnx.iter_modules(nnx.merge(m.model.graphdef, m.model.params)))
    adapted = 0
    for path, linear in nnx.iter_modules(nnx.merge(m.graphdef, m.trainable, m.frozen)):
        if getattr(linear, "adapter", None) is None:
            continue
        kernel = linear.kernel[...]
        linear.adapter.expand(kernel)
        for layer in range(len(kernel)):
            x, plain = jnp.float32(rng.standard_normal((5, kernel.shape[1]))), base[path]
            ours, theirs = (layer_of(module, layer) for module in (linear, plain))
            # Operation by operation. DoRA divides a norm by itself, summed in another order.
            rounding = 1e-6 if CASES[case].options.get("dora") else 0
            np.testing.assert_allclose(ours(x, jax.random.key(1)), theirs(x), rounding, rounding)
        adapted += 1
    assert adapted == len(CASES[case].modules["gpt2"])


def layer_of(module, layer):
    """One layer of a stacked module."""
    graphdef, state = nnx.split(module)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x[layer], state))


@every_case
def test_merged_equals_unmerged(case, family):
    m, tokens = made(case, family), oracle_of(family)["tokens"]
    trainable = perturbed(m.trainable)
    unmerged = logits_of(m.graphdef, (trainable, m.frozen), tokens)
    params = jax.jit(m.method.merge, static_argnums=0)(m.graphdef, trainable, m.frozen)
    merged = logits_of(m.model.graphdef, (params,), tokens)
    assert_close(merged, unmerged)
    base = logits_of(m.model.graphdef, (m.model.params,), tokens)
    assert float(jnp.abs(unmerged - base).max()) > 0.1
    # Merging is pure: the states it was given still give what they gave.
    again = logits_of(m.graphdef, (trainable, m.frozen), tokens)
    np.testing.assert_array_equal(again, unmerged)


# Every option has a step of its own here or in test_adapt_options.py; the others choose layers and
# modules, which the tests above and below tell apart without compiling a step.
TRAINED = ("full", "bitfit", "head", "lora", "dropout", "random", "ranks", "pissa", "dora")
STEPS = [
    pair if pair[0] in TRAINED else pytest.param(*pair, marks=pytest.mark.slow) for pair in PAIRS
]


@pytest.mark.parametrize(("case", "family"), STEPS)
def test_training_moves_only_what_is_trained_and_compiles_once(case, family):
    m = made(case, family)
    held = (m.frozen, m.model.params)
    before = [np.asarray(x).copy() for x in jax.tree.leaves(held)]
    start = [np.asarray(x).copy() for x in jax.tree.leaves(m.trainable)]
    # Not a copy: the step destroys what `split` gave, which must not be the base model's own.
    optimizer, trainable = optimizer_of(m), m.method.split(jax.random.key(3), m.model)[1]
    opt_state, compiled, losses = optimizer.init(trainable), train.run_steps._cache_size(), []
    for rate, steps in ((1e-2, 3), (3e-3, 2), (1e-3, 1)):
        trainable, opt_state, loss, _ = train.run_steps(
            apply=apply_of(m.graphdef),
            loss=train.causal_lm_loss,
            optimizer=optimizer,
            accumulate=1,
            trainable=trainable,
            opt_state=opt_state,
            frozen=m.frozen,
            batches=batches_of(family),
            rates=np.full(3, rate, np.float32),
            count=steps,
            key=jax.random.key(steps),
            first=steps,
        )
        losses += loss[:steps].tolist()
    assert train.run_steps._cache_size() == compiled + 1
    after = [np.asarray(x) for x in jax.tree.leaves(held)]
    assert all(a.tobytes() == b.tobytes() for a, b in zip(after, before, strict=True))
    moved = [np.asarray(x) for x in jax.tree.leaves(trainable)]
    assert all((a != b).any() for a, b in zip(moved, start, strict=True))
    assert np.isfinite(losses).all() and losses[-1] < losses[0]


# Sizes of the linear layers (in, out), from the configurations in README.md of the fixtures.
LINEAR = {
    "gpt2": {"qkv": (32, 96), "out": (32, 32), "up": (32, 128), "down": (128, 32)},
    "llama_tied": {
        "q": (24, 32),
        "k": (24, 16),
        "v": (24, 16),
        "out": (32, 24),
        "gate": (24, 40),
        "up": (24, 40),
        "down": (40, 24),
    },
}
WHOLE = {
    # tokens, positions, final norm; per layer two norms, kernels, biases
    "gpt2": 97 * 32 + 64 * 32 + 64 + 2 * (4 * 32 + 12 * 32**2 + 9 * 32),
    # tokens (tied), final norm; per layer two norms and the kernels
    "llama_tied": 61 * 24 + 24 + 2 * (2 * 24 + 24 * (32 + 16 + 16 + 32) + 3 * 24 * 40),
}


# Biases: per layer of two norms and of four linear layers, and of the final norm.
BIASES = 2 * (2 * 32 + 9 * 32) + 32


def closed_form(case, family):
    """Trained and frozen scalars of a case."""
    row, options, num_layers, modules, head = CASES[case]
    own = 2 * 32 if head else 0
    if row == "full":
        return WHOLE[family], 0
    if row in ("bitfit", "head"):
        trained = own if row == "head" else BIASES + own // 2  # the norm's bias is a bias already
        return trained, WHOLE[family] - trained
    ranks = {"up": 6, "gate": 6, "down": 2} if case == "ranks" else {}
    sizes = {name: LINEAR[family][name] for name in modules[family]}
    rank = {name: ranks.get(name, options["rank"]) for name in sizes}
    factors = num_layers * sum(rank[name] * sum(size) for name, size in sizes.items())
    norms = num_layers * sum(out for _, out in sizes.values()) if options.get("dora") else 0
    start = factors if options.get("init") in lora.FROM_BASE else 0
    return factors + norms + own, WHOLE[family] - own + start


@every_case
def test_sizes_equal_the_closed_form(case, family):
    m = made(case, family)
    trained, frozen = closed_form(case, family)
    assert (count(m.trainable), count(m.frozen)) == (trained, frozen)
    # Adam: two moments per trained scalar and the number of steps; nothing for frozen ones.
    assert count(optimizer_of(m).init(m.trainable)) == 2 * trained + 1
    assert dtypes(m.trainable) == ("float32",)


@every_case
def test_trainable_and_frozen_are_two_trees(case, family):
    m = made(case, family)
    trainable, frozen = models.by_path(m.trainable), models.by_path(m.frozen)
    assert not trainable.keys() & frozen.keys()
    assert trainable.keys() >= set(m.model.head_paths)
    base, added = models.by_path(m.model.params), ".adapter."
    assert {p for p in trainable.keys() | frozen.keys() if added not in p} == base.keys()
    assert all(p.endswith((".a0", ".b0")) for p in frozen if added in p)
    assert not any(p.endswith((".a0", ".b0")) for p in trainable)
    # The frozen part is the base itself: it is not held twice.
    for path, value in frozen.items():
        assert added in path or value.unsafe_buffer_pointer() == base[path].unsafe_buffer_pointer()


def coin_flips(rng, rows):
    """Texts in which a token has two successors, each with probability 1/2: ln 2 nats a token."""
    tokens = rng.integers(0, 8, (rows, 9)).astype(np.int32)
    for t in range(1, tokens.shape[1]):
        tokens[:, t] = (3 * tokens[:, t - 1] + rng.integers(0, 2, rows)) % 8
    weights = np.ones(tokens.shape, np.float32)
    weights[:, 0] = 0
    return Batch(tokens, weights)


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ("lora", {"rank": 8, "alpha": 16.0}),
        pytest.param("full", {}, marks=pytest.mark.slow),
    ],
)
def test_loss_falls_to_the_known_optimum(row, options):
    config = models.gpt2.GPT2Config(8, 1, 32, 2, 64, 16, tied=False)
    model = models.create("gpt2", config, jax.random.key(0))
    # A frozen head with large rows, else no low-rank change could make a prediction sharp.
    arrays = models.by_path(model.params)
    arrays["head.table"] = arrays["head.table"] * 25
    model = model._replace(params=models.with_arrays(model.params, arrays))
    method, rng, steps = METHODS[row](**options), np.random.default_rng(0), 200
    m = Made(model, method, *method.split(jax.random.key(0), model))
    corpus = [coin_flips(rng, 32) for _ in range(steps)]
    optimizer = optimizer_of(m)
    trainable, _, losses, _ = train.run_steps(
        apply=apply_of(m.graphdef),
        loss=train.causal_lm_loss,
        optimizer=optimizer,
        accumulate=1,
        trainable=copied(m.trainable),
        opt_state=optimizer.init(m.trainable),
        frozen=m.frozen,
        batches=Batch(*(np.stack(part) for part in zip(*corpus, strict=True))),
        rates=train.Schedule(1e-2, steps, 10, "linear")(np.arange(steps)),
        count=steps,
        key=jax.random.key(0),
    )
    tokens = coin_flips(rng, 256).tokens
    params = method.merge(m.graphdef, trainable, m.frozen)
    logits = logits_of(model.graphdef, (params,), tokens)[:, :-1]
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    nll = -np.take_along_axis(log_probs, tokens[:, 1:, None], -1).mean()
    assert float(losses[0]) > 2
    # The optimum costs exactly ln 2 on any text; chance can make a fit look better by a little.
    assert math.log(2) - 0.01 < nll < math.log(2) + 0.03
