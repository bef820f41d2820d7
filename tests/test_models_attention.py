"""Who sees whom: packed rows, pads, windows, both directions; every family and every kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import NAMES, assert_close, model_of, oracle_of

from jax_lowrank import models
from jax_lowrank.models import attention


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


@pytest.mark.parametrize("name", NAMES)
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
