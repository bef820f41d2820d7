"""Attention: who sees whom, the key/value cache, and the products.

Shape letters as in layers.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

Array = jax.Array

ROWS = ("rows", None, None)  # dimensions of the residual stream
SAVED = "saved"  # name of the arrays that are stored for the backward pass, see `stack.REMATS`


def saved(x: Array) -> Array:
    """x, marked as one of them."""
    return checkpoint_name(x, SAVED)


class Layout(NamedTuple):
    """What a model knows of the devices it runs on; as it stands, one device.

    pin(x, names): x, kept where the names of its dimensions say: "rows" (of the batch), "heads",
      "data", "fsdp" or None. row_shards: into how many equal parts the rows of a batch are cut.
    """

    pin: Callable[[Array, tuple[str | None, ...]], Array] = lambda x, names: x
    row_shards: int = 1

    def look_up(self, table: Callable[[Array], Array], ids: Array) -> Array:
        """Rows (B, S, D) of an Embedding, whose columns fsdp cuts as it does rows of the batch.

        Every device reads its columns for the rows of all that share them; then rows and columns
        change places. Left to itself, XLA gives every device all rows and columns on the way.
        """
        x = self.pin(table(self.pin(ids, ("data", None))), ("data", None, "fsdp"))
        return self.pin(x, ROWS)


class Rule(NamedTuple):
    """Who sees whom, for a kernel that makes no (S, T) array of it."""

    causal: bool
    window: int | None
    runs: Array | None  # (B, S) int32: equal numbers see each other, pads have -1; None: all equal


class Context(NamedTuple):
    """What attention needs to know about the rows it is given, the same for every layer."""

    positions: Array  # (B, S) int32, position of each token; pads count from the first real token
    allowed: Array | None  # (B or 1, 1, S, T) bool, or None for plain causal attention
    slot: Array | None  # () int32, the first cache slot these tokens are written to
    key: Array | None  # dropout key
    rule: Rule | None = None  # the same as `allowed`, where there is no cache


class Cache(NamedTuple):
    """Keys and values of all layers so far, (L, B, K, T, N) each, and which slots hold a token."""

    keys: Array
    values: Array
    valid: Array  # (B, T) bool
    length: Array  # () int32, slots in use
    layers: tuple | None  # the weights of each layer, where these are quicker than their stack


def make_context(
    tokens: Array,
    mask: Array | None,
    cache: Cache | None,
    window: int | None,
    key: Array | None,
    segments: Array | None = None,
    causal: bool = True,
) -> tuple[Context, Cache | None]:
    """Positions and the attention mask of `tokens` (B, S), whose valid ones are `mask` (B, S).

    A token sees itself and the valid tokens before it, or on both sides when not `causal`, as far
    as they are less than `window` away. In packed rows it sees those of its own run of equal
    numbers in `segments` (B, S) only, and positions start again in each run. Returns the cache
    with the new tokens marked as valid.
    """
    if cache is not None and (segments is not None or not causal):
        raise ValueError("a cache is for causal rows of one text each: no segments, causal=True")
    batch, length = tokens.shape
    if cache is None and mask is None and segments is None:
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (batch, length))
        slots = jnp.arange(length)
        plain = causal and (window is None or window >= length)
        allowed = None if plain else _band(slots, slots, window, causal)[None, None]
        return Context(positions, allowed, None, key, Rule(causal, window, None)), None
    mask = jnp.ones_like(tokens, dtype=bool) if mask is None else mask.astype(bool)
    if cache is None:
        valid, start = mask, jnp.int32(0)
    else:
        start = cache.length
        valid = jax.lax.dynamic_update_slice(cache.valid, mask, (0, start))
        cache = cache._replace(valid=valid, length=start + length)
    queries, slots = start + jnp.arange(length), jnp.arange(valid.shape[1])
    allowed = _band(queries, slots, window, causal)[None, None] & valid[:, None, None, :]
    counts = jnp.cumsum(valid.astype(jnp.int32), axis=1) - 1
    runs = jnp.zeros_like(tokens)
    if segments is not None:
        starts = jnp.pad(
            segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True
        )
        runs = jnp.cumsum(starts.astype(jnp.int32), axis=1)
        allowed &= runs[:, None, :, None] == runs[:, None, None, :]
        before = counts + 1 - valid.astype(jnp.int32)  # valid tokens before this one
        counts -= jax.lax.cummax(jnp.where(starts, before, 0), axis=1)
    positions = jnp.maximum(jax.lax.dynamic_slice_in_dim(counts, start, length, axis=1), 0)
    if cache is not None:
        return Context(positions, allowed, start, key), cache
    rule = Rule(causal, window, jnp.where(mask, runs, -1))
    return Context(positions, allowed, None, key, rule), None


def _band(queries: Array, slots: Array, window: int | None, causal: bool = True) -> Array:
    distance = queries[:, None] - slots[None, :]
    seen = distance >= 0 if causal else jnp.ones_like(distance, dtype=bool)
    return seen if window is None else seen & (jnp.abs(distance) < window)


def attend(q: Array, k: Array, v: Array, context: Context, kv: tuple[Array, Array] | None, layer):
    """Attention of q (B, S, H, N) over k, v (B, S, K, N), or over the cache with k, v written in.

    Returns the mixed values (B, S, H, N) and the updated cache arrays (L, B, K, T, N).
    """
    if kv is not None:
        keys, values = kv
        start = (layer, 0, 0, context.slot, 0)
        new_k, new_v = (x.swapaxes(1, 2)[None].astype(keys.dtype) for x in (k, v))
        keys = jax.lax.dynamic_update_slice(keys, new_k, start)
        values = jax.lax.dynamic_update_slice(values, new_v, start)
        # Stored head by head, as the products read them: turned back here, and again in them,
        # which the compiler takes out.
        k = jax.lax.dynamic_index_in_dim(keys, layer, keepdims=False).swapaxes(1, 2)
        v = jax.lax.dynamic_index_in_dim(values, layer, keepdims=False).swapaxes(1, 2)
        kv = (keys, values)
    return mix(q, k, v, context.allowed, context.rule), kv


KERNELS = ("auto", "xla", "cudnn", "splash")
_chosen = "auto"


def use(kernel: str) -> str:
    """Choose the attention kernel of everything traced from now on; the one before.

    auto: written by hand on CPU; on NVIDIA GPUs cuDNN's where it applies (half precision, supported
      widths); on TPUs splash attention; XLA's for the rest.
    xla, cudnn, splash: that one everywhere, or an error where it does not apply. Splash attention
      leaves steps with a cache to XLA, and is interpreted (for tests) where there is no TPU.
    """
    global _chosen
    if kernel not in KERNELS:
        raise ValueError(f"attention kernel {kernel!r} is not one of {', '.join(KERNELS)}")
    before = _chosen
    if kernel != _chosen:
        _chosen = kernel
        jax.clear_caches()  # or programs compiled with the other kernel would be found
    return before


def mix(q: Array, k: Array, v: Array, allowed: Array | None, rule: Rule | None = None) -> Array:
    """softmax(q k^T / sqrt(N)) v over the allowed keys, or over those not after the query.

    q (B, S, H, N); k, v (B, T, K, N); allowed (B or 1, 1, S, T) bool; rule: the same without an
    array, where it is known. See `use`.
    """
    kernel = _kernel(q, k, allowed, rule)
    if kernel == "hand":
        return _by_hand(q, k, v, allowed)
    q, k, v = map(saved, (q, k, v))  # what else the derivative needs is as quickly made again
    if kernel == "splash":
        from jax_lowrank.models import splash  # experimental in JAX: only who needs it imports it

        return splash.mix(q, k, v, *(rule or Rule(True, None, None)))
    return _library(kernel, q, k, v, allowed)


def _kernel(q: Array, k: Array, allowed: Array | None, rule: Rule | None) -> str:
    """One of KERNELS, or `hand` for `auto` on CPU."""
    backend, ruled = jax.default_backend(), rule is not None or allowed is None
    if _chosen == "cudnn" or (_chosen, backend) == ("auto", "gpu"):
        refusal = _cudnn_refusal(q, k, allowed)
        if refusal is None:
            return "cudnn"
        if _chosen == "cudnn":
            raise ValueError(f"attention kernel 'cudnn' cannot be used: {refusal}")
    if _chosen == "splash" or (_chosen, backend) == ("auto", "tpu"):
        return "splash" if ruled else "xla"
    return "hand" if (_chosen, backend) == ("auto", "cpu") else "xla"


def _library(kernel: str, q: Array, k: Array, v: Array, allowed: Array | None) -> Array:
    return jax.nn.dot_product_attention(
        q, k, v, mask=allowed, is_causal=allowed is None, implementation=kernel
    )


def _cudnn_refusal(q: Array, k: Array, allowed: Array | None) -> str | None:
    """Why cuDNN cannot do this attention and its derivative, in JAX's words; None when it can."""

    def attention(q, k, v, allowed):
        return jax.vjp(lambda *x: _library("cudnn", *x, allowed), q, k, v)[0]

    try:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (q, k, k, allowed))
        jax.eval_shape(attention, *shapes)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return str(error)
    return None


def _by_hand(q: Array, k: Array, v: Array, allowed: Array | None) -> Array:
    """For CPU: XLA's own derivative keeps and moves several more arrays of the scores' size."""
    groups = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, groups, axis=2) if groups > 1 else x for x in (k, v))
    if allowed is not None:
        return _mix(q, k, v, allowed, ((0, q.shape[1], k.shape[1]),))
    # Queries in up to four blocks: none is multiplied with the keys after its block.
    length = q.shape[1]
    size = max(32, -(-length // 4))
    ends = ((start, min(start + size, length)) for start in range(0, length, size))
    causal = _band(jnp.arange(length), jnp.arange(length), None)[None, None]
    return _mix(q, k, v, causal, tuple((start, stop, stop) for start, stop in ends))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _mix(q, k, v, allowed, blocks):
    """Attention with as many heads of keys as of queries. blocks: (first query, end, keys)."""
    return _mix_fwd(q, k, v, allowed, blocks)[0]


def _mix_fwd(q, k, v, allowed, blocks):
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    q = saved(q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype))
    k, v = saved(k), saved(v)
    outs, kept = [], []
    for start, stop, keys in blocks:
        scores = jnp.einsum(
            "bhsn,bhtn->bhst",
            q[:, :, start:stop],
            k[:, :, :keys],
            preferred_element_type=jnp.float32,
        )
        scores = jnp.where(allowed[:, :, start:stop, :keys], scores, -1e30)
        weights = jnp.exp(scores - scores.max(-1, keepdims=True))
        weights = (weights / weights.sum(-1, keepdims=True)).astype(q.dtype)
        outs.append(jnp.einsum("bhst,bhtn->bhsn", weights, v[:, :, :keys]))
        kept.append(weights)
    kept = [saved(weights) for weights in kept]
    mixed = saved(jnp.concatenate(outs, axis=2).swapaxes(1, 2))
    return mixed, (q, k, v, kept)


def _mix_bwd(blocks, residuals, g):
    q, k, v, kept = residuals
    # Products that contract over queries are written (n, s) @ (s, t): the fast form on CPU.
    columns, rows = g.transpose(0, 2, 3, 1), q.swapaxes(2, 3)
    dq, dk = [], jnp.zeros((*rows.shape[:3], k.shape[2]), k.dtype)
    dv = jnp.zeros_like(dk)
    for (start, stop, keys), weights in zip(blocks, kept):
        part = columns[..., start:stop]
        dweights = jnp.einsum("bhns,bhtn->bhst", part, v[:, :, :keys])
        weighted = dweights * weights
        dscores = weighted - weights * weighted.sum(-1, keepdims=True)
        dq.append(jnp.einsum("bhst,bhtn->bhsn", dscores, k[:, :, :keys]))
        dk = dk.at[..., :keys].add(jnp.einsum("bhns,bhst->bhnt", rows[..., start:stop], dscores))
        dv = dv.at[..., :keys].add(jnp.einsum("bhns,bhst->bhnt", part, weights))
    dq = jnp.concatenate(dq, axis=2) * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    return dq.swapaxes(1, 2), dk.transpose(0, 3, 1, 2), dv.transpose(0, 3, 1, 2), None


_mix.defvjp(_mix_fwd, _mix_bwd)
