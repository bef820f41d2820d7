"""From the last hidden state to a distribution over tokens, and its likelihood in little memory.

Shape letters as in layers.py: M rows (B*S), D width, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array


def unembed(hidden: Array, table: Array) -> Array:
    """Logits (..., V) in float32 of hidden (..., D) under the output table (V, D)."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    logits = jax.lax.dot_general(
        rows,
        table.astype(rows.dtype),
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    return logits.reshape(*hidden.shape[:-1], table.shape[0])


NLL_CHUNK = 512  # rows whose logits exist at the same time


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def token_nll(hidden: Array, table: Array, targets: Array, shards: int = 1) -> Array:
    """-log softmax(hidden @ table.T)[target] in nats; hidden (M, D), table (V, D), targets (M,).

    Logits exist for a few rows at a time; of rows that lie on devices in `shards` equal parts, for
    as many of every part. When the table is frozen the derivative is taken in the same pass (the
    logits are never computed twice); when it is trained the logits are kept.
    """
    return _chunked(lambda h, t: _nll(unembed(h, table), t)[0], shards, hidden, targets)


def _nll(logits, targets):
    """nll and log-sum-exp, (M,) each."""
    lse = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return lse - picked, lse


def _chunked(function: Callable, shards: int, *rows: Array):
    """`function` over blocks of NLL_CHUNK rows of every shard, joined; one block when they do not
    divide.
    """
    total, size = rows[0].shape[0], NLL_CHUNK * shards
    if total <= size or total % size:
        return function(*rows)

    def cut(x):
        parts = x.reshape(shards, -1, NLL_CHUNK, *x.shape[1:]).swapaxes(0, 1)
        return parts.reshape(-1, size, *x.shape[1:])

    def join(x):
        parts = x.reshape(-1, shards, NLL_CHUNK, *x.shape[2:]).swapaxes(0, 1)
        return parts.reshape(total, *x.shape[2:])

    out = jax.lax.map(lambda block: function(*block), jax.tree.map(cut, rows))
    return jax.tree.map(join, out)


def _residual(logits, lse, targets):
    """softmax(logits) - one_hot(targets), the derivative of the nll by the logits."""
    hit = jnp.arange(logits.shape[-1])[None] == targets[:, None]
    return jnp.exp(logits - lse[:, None]) - hit.astype(logits.dtype)


def _token_nll_fwd(hidden, table, targets, shards):
    h, e, t = hidden.value, table.value, targets.value
    if table.perturbed:
        logits = unembed(h, e)
        nll, lse = _nll(logits, t)
        return nll, (h, e, t, logits, lse, None)

    def block(h, t):
        logits = unembed(h, e)
        nll, lse = _nll(logits, t)
        return nll, (_residual(logits, lse, t).astype(e.dtype) @ e).astype(h.dtype)

    nll, dh = _chunked(block, shards, h, t)
    return nll, (h, e, t, None, None, dh)


def _token_nll_bwd(shards, residuals, g):
    del shards
    h, e, t, logits, lse, dh = residuals
    if dh is not None:
        return dh * g[:, None].astype(dh.dtype), None, None
    dlogits = (_residual(logits, lse, t) * g[:, None]).astype(h.dtype)
    dh = dlogits @ e.astype(h.dtype)
    return dh, (dlogits.T @ h).astype(e.dtype), None


token_nll.defvjp(_token_nll_fwd, _token_nll_bwd, symbolic_zeros=True)
