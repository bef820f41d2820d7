"""Splash attention, JAX's TPU kernel: no (S, T) array of scores or mask exists.

Shape letters as in layers.py. Away from a TPU the kernel is interpreted: correct and very slow.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernels,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)

Array = jax.Array
LANES = 128  # sequences are filled up to a multiple of this
BLOCKS = (512, 256, LANES)


def mix(
    q: Array, k: Array, v: Array, causal: bool, window: int | None, runs: Array | None
) -> Array:
    """softmax(q k^T / sqrt(N)) v of q (B, S, H, N) over k, v (B, S, K, N).

    A token sees those with its own number in `runs` (B, S), less than `window` away, on both sides
    or, when `causal`, not after it.
    """
    batch, length, heads, width = q.shape
    filling = -length % LANES
    if filling or runs is not None:
        runs = jnp.zeros((batch, length), jnp.int32) if runs is None else runs
        # Real tokens have 0 or more and pads -1; what is filled in sees itself alone.
        runs = jnp.pad(runs, ((0, 0), (0, filling)), constant_values=-2)
        runs = kernels.SegmentIds(runs, runs)
    q = q * jnp.asarray(width**-0.5, q.dtype)
    q, k, v = (jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, filling), (0, 0))) for x in (q, k, v))
    interpret = jax.default_backend() != "tpu"
    kernel = _kernel(heads, length + filling, causal, window, interpret)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        out = jax.vmap(kernel)(q, k, v, runs)
    return out.swapaxes(1, 2)[:, :length]


@functools.cache
def _kernel(heads: int, length: int, causal: bool, window: int | None, interpret: bool):
    """The kernel of one shape; what it knows of the mask is made once, outside of any trace."""
    shape = (length, length)
    if window is not None:
        mask = masks.LocalMask(shape, (window - 1, 0 if causal else window - 1), 0)
    else:
        mask = masks.CausalMask(shape) if causal else masks.FullMask(shape)
    block = next(size for size in BLOCKS if length % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes = kernels.BlockSizes(**{f"block_{name}": block for name in names})
    with jax.ensure_compile_time_eval():
        return kernels.make_splash_mha(
            masks.MultiHeadMask([mask] * heads),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
