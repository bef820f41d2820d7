"""What a model does: likelihoods, next-token distributions by layer, sampled text.

`apply(*states)` is a model (see `adapt.method.bind`). Every function compiles once per shape. Where
the states lie on several devices the rows are cut over them, and batches filled up to divide.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_lowrank import masking, sharding
from jax_lowrank.data import pad_left


class Sampling(NamedTuple):
    """How a token is drawn: temperature 0 is greedy; top_k 0 and top_p 1 keep all tokens."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


class Likelihood(NamedTuple):
    """Per text: summed -log p in nats (N,) float32, and tokens predicted (N,) int32."""

    nll: np.ndarray
    tokens: np.ndarray


class NextToken(NamedTuple):
    """Per prompt, float32: log-probabilities (N, V), mass of a token set by layer (N, L+1)."""

    log_posterior: np.ndarray
    lens_mass: np.ndarray


@functools.partial(jax.jit, static_argnames="apply")
def _row_nll(apply, states, tokens, weights):
    return (apply(*states).nll(tokens) * weights).sum(1)


def likelihood(
    apply: Callable,
    states,
    sequences: Sequence[Sequence[int]],
    *,
    batch_size: int,
    pad_id: int,
    counted: Sequence[Sequence[bool]] | None = None,
) -> Likelihood:
    """-log p of each token sequence given its first token, in float32.

    counted: for each token whether it enters the sum; None: all. The first token never does.
    """
    nll, tokens = np.zeros(len(sequences), np.float32), num_predicted(sequences, counted)
    batch_size = sharding.up_to_shards(batch_size, sharding.mesh_of(states))
    blocks = [
        (rows, _row_nll(apply, states, *sharding.put_rows(both, states)))
        for rows, *both in weighted(sequences, counted, batch_size, pad_id)
    ]
    for rows, values in sharding.fetch(blocks):
        nll[rows] = values[: len(rows)]
    return Likelihood(nll, tokens)


def weighted(sequences, counted, batch_size, pad_id):
    """(rows, tokens (B, S), weights (B, S) float32) of all sequences; see `likelihood`."""
    for rows, tokens, _ in right_padded(sequences, batch_size, pad_id):
        weights = np.zeros(tokens.shape, np.float32)
        for place, row in enumerate(rows):
            length = len(sequences[row])
            weights[place, 1:length] = 1 if counted is None else counted[row][1:]
        yield rows, tokens, weights


def num_predicted(sequences, counted) -> np.ndarray:
    """How many tokens of each sequence (N,) int32 enter the sum of `likelihood`."""
    counted = [[True] * len(s) for s in sequences] if counted is None else counted
    return np.array([sum(map(bool, c[1:])) for c in counted], np.int32)


@functools.partial(jax.jit, static_argnames="apply")
def _hidden_nll(apply, states, batch):
    return (apply(*states).nll(*batch[:4]) * batch.weights).sum(1)


def masked_likelihood(
    apply: Callable, states, texts: Sequence[masking.Hidden], *, batch_size: int, pad_id: int
) -> Likelihood:
    """-log p of the hidden tokens of each text, given what is left of it, in float32."""
    nll = np.zeros(len(texts), np.float32)
    batch_size = sharding.up_to_shards(batch_size, sharding.mesh_of(states))
    blocks = []
    for rows, *both in right_padded([text.tokens for text in texts], batch_size, pad_id):
        spots = masking.spots([texts[row] for row in rows], *both[0].shape)
        batch = sharding.put_rows(masking.MaskedBatch(*both, *spots), states)
        blocks.append((rows, _hidden_nll(apply, states, batch)))
    for rows, values in sharding.fetch(blocks):
        nll[rows] = values[: len(rows)]
    return Likelihood(nll, np.array([len(text.places) for text in texts], np.int32))


def right_padded(sequences, batch_size, pad_id):
    """(rows, tokens (B, S), mask (B, S)) of all sequences, the short ones together.

    S is one of 32, 48, 64, 96, 128, ... or the greatest length: few programs compile. A last block
    is filled up with rows of one pad; their mask holds one token, because a row without any is
    undefined.
    """
    lengths = np.array([len(s) for s in sequences])
    order, longest = np.argsort(lengths, kind="stable"), int(lengths.max())
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        width = min(longest, _width(int(lengths[rows].max())))
        tokens = np.full((batch_size, width), pad_id, np.int32)
        mask = np.zeros(tokens.shape, bool)
        mask[:, 0] = True
        for place, row in enumerate(rows):
            tokens[place, : lengths[row]] = sequences[row]
            mask[place, : lengths[row]] = True
        yield rows, tokens, mask


def _width(length: int) -> int:
    """The next of 32, 48, 64, 96, 128, ..."""
    power = max(32, 1 << (length - 1).bit_length())
    return power * 3 // 4 if power > 32 and length <= power * 3 // 4 else power


@functools.partial(jax.jit, static_argnames="apply")
def _class_logits(apply, states, tokens, mask):
    return apply(*states).classify(tokens, mask)


def classify(
    apply: Callable, states, sequences: Sequence[Sequence[int]], *, batch_size: int, pad_id: int
) -> np.ndarray:
    """Class logits (N, C) float32 of each token sequence."""
    batch_size = sharding.up_to_shards(batch_size, sharding.mesh_of(states))
    blocks = [
        (rows, _class_logits(apply, states, *sharding.put_rows(both, states)))
        for rows, *both in right_padded(sequences, batch_size, pad_id)
    ]
    blocks = sharding.fetch(blocks)
    logits = np.zeros((len(sequences), blocks[0][1].shape[1]), np.float32)
    for rows, values in blocks:
        logits[rows] = values[: len(rows)]
    return logits


@functools.partial(jax.jit, static_argnames="apply")
def _next_token(apply, states, tokens, mask, token_set):
    log_probs = apply(*states).lens(tokens, mask)
    return log_probs[:, -1], jnp.exp(log_probs[:, :, token_set]).sum(-1)


def next_token(
    apply: Callable,
    states,
    prompts: Sequence[Sequence[int]],
    token_set: Sequence[int],
    *,
    batch_size: int,
    pad_id: int,
) -> NextToken:
    """The distribution of the token after each prompt, and the LogitLens mass of `token_set`."""
    width, ids = max(map(len, prompts)), np.asarray(token_set, np.int32)
    batch_size = sharding.up_to_shards(batch_size, sharding.mesh_of(states))
    out = []
    for part, padded in _padded(prompts, width, batch_size, pad_id):
        both = _next_token(apply, states, *sharding.put_rows(padded, states), ids)
        out.append(jax.tree.map(lambda x: x[: len(part)], sharding.fetch(both)))  # noqa: B023
    return NextToken(*(np.concatenate(column) for column in zip(*out)))


def _padded(sequences, width, batch_size, pad_id):
    """Blocks of `batch_size` left-padded rows; the last one is filled up with its own first row."""
    for start in range(0, len(sequences), batch_size):
        part = sequences[start : start + batch_size]
        yield part, pad_left([*part, *[part[0]] * (batch_size - len(part))], pad_id, width)


def choose(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """A token per row (B,) from logits (B, V) float32, with one key a row.

    top_k keeps the k likeliest (ties with the k-th stay); top_p then keeps the smallest set of the
    likeliest that holds that probability (Holtzman et al. 2020).
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        floor = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < floor, -jnp.inf, logits)
    if sampling.top_p < 1:
        order = jnp.sort(logits, axis=-1)[:, ::-1]
        probs = jax.nn.softmax(order, axis=-1)
        kept = jnp.cumsum(probs, axis=-1) - probs < sampling.top_p
        floor = jnp.min(jnp.where(kept, order, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < floor, -jnp.inf, logits)
    # Gumbel noise: models that are compared then draw the same token wherever they can. A number a
    # row (the inverse distribution) is quicker, but doubled the paired intervals of the demo.
    return jax.vmap(jax.random.categorical)(keys, logits)


@functools.partial(
    jax.jit, static_argnames=("apply", "max_new_tokens", "sampling", "eos_id", "pad_id")
)
def generate(apply, states, tokens, mask, keys, *, max_new_tokens, sampling, eos_id, pad_id):
    """Continue left-padded prompts (B, S): tokens (B, max_new_tokens) int32, pads after EOS.

    Row b's draws depend on keys[b] alone. eos_id None never stops early.
    """
    model = apply(*states)
    batch, length = tokens.shape
    cache = model.new_cache(batch, length + max_new_tokens)
    logits, cache = model.step(tokens, mask, cache)
    drawn = jnp.full((batch, max_new_tokens), pad_id, jnp.int32)

    def more(state):
        step, _, _, _, done = state
        return (step < max_new_tokens) & ~done.all()

    def turn(state):
        step, logits, cache, drawn, done = state
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        token = jnp.where(done, pad_id, choose(logits, step_keys, sampling)).astype(jnp.int32)
        drawn = drawn.at[:, step].set(token)
        if eos_id is not None:
            done |= token == eos_id
        logits, cache = model.step(token[:, None], None, cache)
        return step + 1, logits, cache, drawn, done

    start = (jnp.int32(0), logits, cache, drawn, jnp.zeros(batch, bool))
    return jax.lax.while_loop(more, turn, start)[3]


def sample(
    apply: Callable,
    states,
    prompts: Sequence[Sequence[int]],
    *,
    num_samples: int,
    max_new_tokens: int,
    sampling: Sampling,
    key: jax.Array,
    batch_size: int,
    eos_id: int | None,
    pad_id: int,
) -> np.ndarray:
    """Continuations (P, K, max_new_tokens) int32 of token prompts, pads after EOS.

    Sample k of prompt p is a function of (key, p, k): the batch size does not change it.
    """
    width = max(map(len, prompts))
    rows = [(p, k) for p in range(len(prompts)) for k in range(num_samples)]
    total, out = len(rows), []
    size = sharding.up_to_shards(min(batch_size, total), sharding.mesh_of(states))
    if size > total:  # fewer rows than devices: some are drawn twice
        rows = [rows[i % total] for i in range(size)]
    keys = np.asarray(jax.random.key_data(_row_keys(key, rows)))
    for start in range(0, len(rows), size):
        # The last block is moved back rather than made smaller: one shape, one compilation.
        first = min(start, len(rows) - size)
        block = [prompts[p] for p, _ in rows[first : first + size]]
        host = (*pad_left(block, pad_id, width), keys[first : first + size])
        tokens, mask, row_keys = sharding.put_rows(host, states)
        drawn = generate(
            apply,
            states,
            tokens,
            mask,
            jax.random.wrap_key_data(row_keys),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            eos_id=eos_id,
            pad_id=pad_id,
        )
        out.append((drawn, start - first))
    drawn = np.concatenate([block[skip:] for block, skip in sharding.fetch(out)])[:total]
    return drawn.reshape(len(prompts), num_samples, max_new_tokens)


def _row_keys(key: jax.Array, rows: Sequence[tuple[int, int]]) -> jax.Array:
    """A key for each (prompt, sample)."""
    return jax.vmap(lambda p, k: jax.random.fold_in(jax.random.fold_in(key, p), k))(
        *np.array(rows, np.int32).T
    )
