"""Who sees whom: packed rows, pads, windows, both directions; every family and every kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo
from lowered import shapes_of_a_step
from tiny import NAMES, assert_close, model_of, oracle_of

from jax_lowrank import models, train
from jax_lowrank.adapt import METHODS
from jax_lowrank.adapt.method import dtypes
from jax_lowrank.models import attention, splash


@functools.partial(jax.jit, static_argnames="graphdef")
def packed_pass(graphdef, params, tokens, mask, segments):
    """Logits and nll of packed rows; the mask is for the logits."""
    net = nnx.merge(graphdef, params)
    return net(tokens, mask, segments=segments), net.nll(tokens, segments=segments)


@pytest.mark.parametrize("name", NAMES)
def test_packed_texts_are_each_as_alone(name):
    model, oracle = model_of(name), oracle_of(name)
    texts, cut = oracle["tokens"], 10
    # Rows of 34: all of one text and the first 10 tokens of the next; then the other way round.
    one = np.concatenate([texts[:2], texts[1:, :cut]], axis=1)
    other = np.concatenate([texts[1:, :cut], texts[:2]], axis=1)
    size = texts.shape[1]
    segments = np.repeat([[7] * size + [2] * cut, [2] * cut + [7] * size], 2, axis=0)
    tokens, everything = np.concatenate([one, other]), np.ones((4, size + cut), bool)
    logits, nll = packed_pass(
        model.graphdef, model.params, tokens, everything, segments.astype(np.int32)
    )
    assert_close(logits[:2, :size], oracle["logits"][:2])
    assert_close(logits[:2, size:], oracle["logits"][1:, :cut])
    assert_close(logits[2:, :cut], oracle["logits"][1:, :cut])
    assert_close(logits[2:, cut:], oracle["logits"][:2])
    # A text's first token has no likelihood: what comes before it is another text.
    np.testing.assert_array_equal(nll[:2, size], 0)
    np.testing.assert_array_equal(nll[2:, cut], 0)
    assert_close(nll[:2, :size], nll[2:, cut:])
    assert_close(nll[:2, size:], nll[2:, :cut])
    assert (np.delete(nll, [0, size], axis=1)[:2] > 0).all()


# Derivatives are slow to compile; the outputs of every family are held just above.
@pytest.mark.parametrize("name", ["gpt2", "mistral_window", "opt_350m"])
def test_packed_texts_do_not_see_each_other(name):
    model = model_of(name)
    tokens = jnp.arange(20, dtype=jnp.int32)[None]  # distinct: a row of the table each
    segments = jnp.asarray([[0] * 9 + [1] * 11], jnp.int32)

    def first_text(table, segments):
        net = nnx.merge(model.graphdef, model.params)
        head = net.output_table
        net.embed.table = nnx.Param(table)
        x, _, _ = net.hidden(tokens, segments=segments)
        rows = net.final(x)[0] @ head.T
        # Both ways: how much each text's outputs move with the other's inputs.
        return jnp.square(rows[:9]).sum(), jnp.square(rows[9:]).sum()

    jacobian = jax.jit(jax.jacrev(first_text))
    table = models.by_path(model.params)["embed.table"]
    first, second = (np.abs(g[:20]).max(-1) for g in jacobian(table, segments))
    assert (first[9:] == 0).all() and (first[:9] > 0).all()
    assert (second[:9] == 0).all() and (second[9:] > 0).all()
    _, joined = (np.abs(g[:20]).max(-1) for g in jacobian(table, jnp.zeros_like(segments)))
    assert (joined[:9] > 0).any()  # in one text they do


def test_context_of_packed_rows_with_pads():
    tokens = jnp.zeros((1, 8), jnp.int32)
    mask = jnp.asarray([[0, 1, 1, 1, 0, 1, 1, 0]], bool)
    segments = jnp.asarray([[3, 3, 3, 3, 5, 5, 5, 5]], jnp.int32)
    context, cache = attention.make_context(tokens, mask, None, 2, None, segments)
    assert cache is None
    assert context.positions.tolist() == [[0, 0, 1, 2, 0, 0, 1, 1]]
    seen = [list(np.flatnonzero(row)) for row in np.asarray(context.allowed[0, 0])]
    assert seen == [[], [1], [1, 2], [2, 3], [], [5], [5, 6], [6]]
    # Numbers may come back: a run of them is a text.
    again = jnp.asarray([[3, 3, 3, 3, 5, 5, 3, 3]], jnp.int32)
    context, _ = attention.make_context(tokens, None, None, None, None, again)
    assert context.positions.tolist() == [[0, 1, 2, 3, 0, 1, 0, 1]]
    assert list(np.flatnonzero(context.allowed[0, 0, 7])) == [6, 7]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("pads", ["none", "left", "right"])
@pytest.mark.parametrize("packed", [False, True])
def test_both_directions(window, pads, packed):
    tokens = jnp.zeros((1, 9), jnp.int32)
    real = {"none": [1] * 9, "left": [0] * 2 + [1] * 7, "right": [1] * 7 + [0] * 2}[pads]
    number = np.array([0] * 4 + [1] * 5) if packed else np.zeros(9)
    context, _ = attention.make_context(
        tokens,
        None if pads == "none" else jnp.asarray([real], bool),
        None,
        window,
        None,
        jnp.asarray(number[None], jnp.int32) if packed else None,
        causal=False,
    )
    t, u = np.arange(9)[:, None], np.arange(9)[None]
    seen = np.asarray(real, bool)[None] & (number[:, None] == number[None])
    expected = seen & (abs(t - u) < (window or 9))
    allowed = np.broadcast_to(context.allowed[0, 0], (9, 9))
    np.testing.assert_array_equal(allowed, expected)


def test_a_cache_holds_one_causal_text_a_row():
    model = model_of("gpt2")
    net = nnx.merge(model.graphdef, model.params)
    tokens, cache = jnp.zeros((1, 4), jnp.int32), net.new_cache(1, 8)
    for options in ({"segments": tokens}, {"causal": False}):
        with pytest.raises(ValueError, match="no segments, causal=True"):
            attention.make_context(tokens, None, cache, None, None, **options)


CASES = {
    "causal": {},
    "window": {"window": 5},
    "segments": {"segments": True},
    "window and segments": {"window": 5, "segments": True},
    "left pads": {"pads": "left"},
    "right pads, window": {"pads": "right", "window": 5},
    "pads and segments": {"pads": "right", "segments": True},
    "both directions": {"causal": False},
    "both directions, pads": {"causal": False, "pads": "left"},
    "both directions, window and segments": {"causal": False, "window": 5, "segments": True},
}


def rows(length, *, window=None, segments=False, pads="none", causal=True):
    """A context of two rows, and which of their tokens are real."""
    place = np.arange(length)[None].repeat(2, axis=0)
    real = {"none": place >= 0, "left": place >= 7, "right": place < length - 7}[pads]
    numbers = jnp.asarray(place >= [[length // 3], [length // 2]], jnp.int32)
    context, _ = attention.make_context(
        jnp.zeros((2, length), jnp.int32),
        None if pads == "none" else jnp.asarray(real),
        None,
        window,
        None,
        numbers if segments else None,
        causal,
    )
    return context, real


def outcome(context, real, heads):
    """Output and gradients by q, k and v of the real tokens, 4 heads of 8 over `heads` of them."""
    keys, length = jax.random.split(jax.random.key(3), 4), real.shape[1]
    q, g = (jax.random.normal(key, (2, length, 4, 8)) for key in keys[:2])
    k, v = (jax.random.normal(key, (2, length, heads, 8)) for key in keys[2:])
    counted = jnp.asarray(real, jnp.float32)[:, :, None, None]

    @jax.jit
    def run(q, k, v):
        out, pull = jax.vjp(lambda *x: attention.attend(*x, context, None, 0)[0], q, k, v)
        return out * counted, *pull(g * counted)

    return run(q, k, v)


@pytest.mark.parametrize(
    ("case", "heads", "length"),
    [
        ("causal", 2, 40),
        ("both directions, window and segments", 4, 40),
        # More than one block of the splash kernel, some of which it leaves out.
        ("window and segments", 2, 300),
        ("left pads", 1, 300),
        *(pytest.param(case, 2, 40, marks=pytest.mark.slow) for case in CASES),
    ],
)
def test_kernels_are_equal(case, heads, length, monkeypatch):
    context, real = rows(length, **CASES[case])
    results = {}
    for kernel in ("auto", "xla", "splash"):
        monkeypatch.setattr(attention, "_chosen", kernel)
        results[kernel] = outcome(context, real, heads)
    for kernel in ("xla", "splash"):
        for ours, other in zip(results["auto"], results[kernel], strict=True):
            assert float(jnp.abs(ours).max()) > 0.1
            np.testing.assert_allclose(other, ours, atol=1e-5)


@pytest.fixture
def counted(monkeypatch):
    """Names of the kernels that are traced from now on; `auto` is restored in the end."""
    names = []
    library, by_hand, kernel = attention._library, attention._by_hand, splash.mix

    def recorded(name, function):
        def wrapped(*args):
            names.append(name if name else args[0])
            return function(*args)

        return wrapped

    monkeypatch.setattr(attention, "_library", recorded("", library))
    monkeypatch.setattr(attention, "_by_hand", recorded("hand", by_hand))
    monkeypatch.setattr(splash, "mix", recorded("splash", kernel))
    yield names
    attention.use("auto")


def test_one_switch_for_a_whole_model(counted):
    model, tokens = model_of("mistral_window"), oracle_of("mistral_window")["tokens"]
    logits = {}
    for kernel in ("auto", "xla", "splash"):
        attention.use(kernel)  # the function is the same: what was compiled must not be found
        logits[kernel] = packed_pass(
            model.graphdef, model.params, tokens, None, jnp.zeros_like(tokens)
        )[0]
    assert set(counted[:2]) == {"hand"} and set(counted) == {"hand", "xla", "splash"}
    assert_close(logits["auto"], oracle_of("mistral_window")["logits"])
    for kernel in ("xla", "splash"):
        np.testing.assert_allclose(logits[kernel], logits["auto"], atol=1e-5)
    # Steps with a cache are XLA's when splash attention is chosen.
    del counted[:]
    net = nnx.merge(model.graphdef, model.params)
    jax.eval_shape(lambda: net.step(tokens, None, net.new_cache(3, 30))[0])
    assert set(counted) == {"xla"}


def test_what_auto_takes_where(monkeypatch):
    q, allowed = jnp.zeros((1, 4, 2, 8), jnp.bfloat16), jnp.ones((1, 1, 4, 4), bool)
    plain = attention.Rule(True, None, None)
    chosen = {}
    for backend in ("cpu", "gpu", "tpu"):
        monkeypatch.setattr(jax, "default_backend", lambda name=backend: name)
        chosen[backend] = [
            attention._kernel(q, q, *args)
            for args in ((None, None), (allowed, None), (allowed, plain))
        ]
    # There is no cuDNN here, and JAX says so.
    assert chosen == {
        "cpu": ["hand"] * 3,
        "gpu": ["xla"] * 3,
        "tpu": ["splash", "xla", "splash"],
    }
    monkeypatch.setattr(attention, "_cudnn_refusal", lambda *args: None)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert attention._kernel(q, q, allowed, plain) == "cudnn"


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_step_for_a_gpu_has_cudnns_attention(method, monkeypatch):
    """Lowered here for a GPU with cuDNN; what is trained in float32 is multiplied in the base's
    bfloat16, which is what cuDNN takes. No array of the scores' size is left."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    config, rows, length = models.llama.LlamaConfig(256, 2, 64, 4, 2, 16, 128, 88), 3, 88
    model = models.abstract(config.to_hf(models.Head()), jnp.bfloat16)
    chosen = METHODS[method](**({"rank": 4, "alpha": 8.0} if method == "lora" else {}))
    shapes = shapes_of_a_step(model, chosen, rows, length, steps=2)
    assert dtypes(shapes["trainable"]) == ("float32",)
    text = train.run_steps.trace(**shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax(" in text and "__cudnn$fmhaSoftmaxBackward(" in text
    assert f"x{length}x{length}x" not in text


def test_kernels_that_cannot_be():
    with pytest.raises(ValueError, match=r"'flash' is not one of auto, xla, cudnn, splash"):
        attention.use("flash")
    q = jnp.zeros((1, 4, 2, 8), jnp.bfloat16)
    attention.use("cudnn")
    try:
        with pytest.raises(ValueError, match=r"'cudnn' cannot be used: cuDNN is not detected"):
            attention.mix(q, q, q, None)
    finally:
        attention.use("auto")
