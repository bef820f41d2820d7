"""Hand-written derivatives against JAX's own derivative of the plain formula, in float32."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_lowrank.models import attention, layers, output


def draws(*shapes):
    keys = jax.random.split(jax.random.key(7), len(shapes))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def assert_same_value_and_gradients(ours, plain, args, cotangent, rtol=2e-5):
    """Values, and the products of one cotangent with both Jacobians."""

    @jax.jit
    def both(args, cotangent):
        (value, pull), (expected, pull_plain) = jax.vjp(ours, *args), jax.vjp(plain, *args)
        return value, expected, pull(cotangent), pull_plain(cotangent)

    value, expected, gradients, expected_gradients = both(args, cotangent)
    np.testing.assert_allclose(value, expected, rtol=rtol, atol=1e-5)
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        assert got.dtype == wanted.dtype and float(jnp.abs(wanted).max()) > 1e-3
        np.testing.assert_allclose(got, wanted, rtol=rtol, atol=1e-5 * float(jnp.abs(wanted).max()))


def test_low_rank():
    x, a, b, g = draws((11, 6), (6, 3), (3, 5), (11, 5))
    assert_same_value_and_gradients(layers.low_rank, lambda x, a, b: (x @ a) @ b, (x, a, b), g)


@pytest.mark.parametrize("shape", [(7, 10), (3, 4, 10)])
def test_layer_norm(shape):
    x, scale, bias, g = draws(shape, (10,), (10,), shape)
    lift = (1,) * (len(shape) - 1)

    def plain(x, scale, bias):
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        normed = (x - mean) / jnp.sqrt(variance + 1e-3)
        return normed * scale.reshape(*lift, -1) + bias.reshape(*lift, -1)

    ours = lambda x, s, b: layers.layer_norm(x, s, b, 1e-3)  # noqa: E731
    assert_same_value_and_gradients(ours, plain, (x, scale, bias), g)


@pytest.mark.parametrize("shape", [(7, 10), (3, 4, 10)])
def test_rms_norm(shape):
    x, scale, g = draws(shape, (10,), shape)

    def plain(x, scale):
        normed = x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-3)
        return normed * scale.reshape(*(1,) * (len(shape) - 1), -1)

    ours = lambda x, s: layers.rms_norm(x, s, 1e-3)  # noqa: E731
    assert_same_value_and_gradients(ours, plain, (x, scale), g)


def plain_nll(hidden, table, targets):
    log_probs = jax.nn.log_softmax(hidden @ table.T)
    return -jnp.take_along_axis(log_probs, targets[:, None], axis=1)[:, 0]


# Fewer rows than a chunk, several whole chunks, and a number that chunks do not divide.
ROWS = (9, 2 * output.NLL_CHUNK, output.NLL_CHUNK + 88)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("trained", [True, False])
def test_token_nll(rows, trained):
    hidden, table, g = draws((rows, 6), (13, 6), (rows,))
    targets = jax.random.randint(jax.random.key(1), (rows,), 0, 13)
    if trained:
        ours = lambda h, e: output.token_nll(h, e, targets)  # noqa: E731
        plain, args = (lambda h, e: plain_nll(h, e, targets)), (hidden, table)
    else:
        ours = lambda h: output.token_nll(h, table, targets)  # noqa: E731
        plain, args = (lambda h: plain_nll(h, table, targets)), (hidden,)
    assert_same_value_and_gradients(ours, plain, args, g)
    if not trained:  # without a derivative
        value, expected = jax.jit(output.token_nll)(hidden, table, targets), plain(hidden)
        np.testing.assert_allclose(value, expected, atol=1e-5)


def test_token_nll_keeps_few_logits_when_the_table_is_frozen():
    rows = 4 * output.NLL_CHUNK
    hidden, table = draws((rows, 6), (13, 6))
    targets = jnp.zeros(rows, jnp.int32)

    def loss(hidden, table):
        return output.token_nll(hidden, table, targets).sum()

    frozen, trained = (
        str(jax.make_jaxpr(jax.grad(loss, argnums))(hidden, table)) for argnums in (0, (0, 1))
    )
    assert f"f32[{rows},13]" not in frozen and f"f32[{rows},13]" in trained


def test_token_nll_of_large_logits_is_finite():
    hidden = jnp.array([[300.0, 0.0], [0.0, -300.0]])
    table = jnp.eye(2)
    value, gradient = jax.value_and_grad(
        lambda h: output.token_nll(h, table, jnp.array([1, 1])).sum()
    )(hidden)
    assert float(value) == 600.0 and np.isfinite(gradient).all()


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "swiglu"])
def test_activations(name):
    x, y, g = draws((9, 5), (9, 5), (9, 5))
    plain = {
        "gelu": lambda x: x * (1 + jax.lax.erf(x / math.sqrt(2))) / 2,
        "gelu_tanh": lambda x: (
            x * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
        ),
        "swiglu": lambda x, y: x / (1 + jnp.exp(-x)) * y,
    }[name]
    args = (x, y) if name == "swiglu" else (x,)
    assert_same_value_and_gradients(getattr(layers, name), plain, args, g)


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_mix(heads, masked):
    q, k, v, g = draws((3, 7, 4, 6), (3, 7, heads, 6), (3, 7, heads, 6), (3, 7, 4, 6))
    causal = jnp.tril(jnp.ones((7, 7), bool))[None, None]
    # A pad in front of row 1 and a window of 3; every query still sees itself.
    seen = jnp.array([[True] * 7, [False] + [True] * 6, [True] * 7])[:, None, None]
    band = causal & ~jnp.tril(jnp.ones((7, 7), bool), -3)[None, None]
    allowed = (band & seen) | jnp.eye(7, dtype=bool)[None, None] if masked else None

    def plain(q, k, v):
        k, v = (jnp.repeat(x, 4 // heads, axis=2) for x in (k, v))
        scores = jnp.einsum("bshn,bthn->bhst", q, k) / math.sqrt(6)
        scores = jnp.where(allowed if masked else causal, scores, -jnp.inf)
        return jnp.einsum("bhst,bthn->bshn", jax.nn.softmax(scores), v)

    ours = lambda q, k, v: attention.mix(q, k, v, allowed)  # noqa: E731
    assert_same_value_and_gradients(ours, plain, (q, k, v), g)


@pytest.mark.parametrize("length", [33, 70, 150])
def test_mix_in_blocks_of_queries(length):
    q, k, v, g = draws(*[(2, length, 2, 4)] * 4)
    causal = jnp.tril(jnp.ones((length, length), bool))[None, None]

    def plain(q, k, v):
        scores = jnp.einsum("bshn,bthn->bhst", q, k) / 2
        weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf))
        return jnp.einsum("bhst,bthn->bshn", weights, v)

    ours = lambda q, k, v: attention.mix(q, k, v, None)  # noqa: E731
    assert_same_value_and_gradients(ours, plain, (q, k, v), g, rtol=1e-4)


def test_attention_mixes_only_what_is_allowed():
    # Values are one-hot by position, so the output is the attention weights themselves.
    q, k = draws((1, 6, 1, 4), (1, 6, 1, 6))
    k = k[..., :4]
    v = jnp.eye(6)[None, :, None, :4]
    mask = jnp.array([[False, True, True, True, True, True]])
    context, _ = attention.make_context(jnp.zeros((1, 6), jnp.int32), mask, None, 3, None)
    assert context.positions.tolist() == [[0, 0, 1, 2, 3, 4]]
    out, _ = attention.attend(q, k, v, context, None, 0)
    weights = np.asarray(out[0, :, 0])
    for t in range(1, 6):
        seen = list(range(max(1, t - 2), t + 1))
        scores = np.array([float(q[0, t, 0] @ k[0, u, 0]) / 2 for u in seen])
        expected = np.exp(scores) / np.exp(scores).sum()
        row = np.zeros(6)
        row[seen] = expected
        np.testing.assert_allclose(weights[t], row[:4], atol=1e-6)
