"""A stack of layers: one block over arrays with a leading L, and what its backward pass keeps.

Shape letters as in layers.py.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jax_lowrank.models.attention import ROWS, SAVED, Cache, Context, Layout
from jax_lowrank.models.layers import Array, Linear

# What a layer keeps for its backward pass beside its input; the rest is computed again. Less is
# kept from row to row, and more computed. Every policy gives the same numbers.
REMATS: dict[str, Callable | None] = {
    # everything
    "none": jax.checkpoint_policies.everything_saveable,
    # what the matrix products gave: norms and activations come again as fast as they are fetched
    "dots": jax.checkpoint_policies.save_only_these_names(SAVED),
    # the same, in the host's memory meanwhile (GPU and TPU)
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[SAVED],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    # nothing
    "full": None,
}


def split_stack(blocks: nnx.Module):
    """Graph definition and stacked arrays of `blocks`; an adapter on some layers gets them all."""
    linears = [module for _, module in nnx.iter_graph(blocks) if isinstance(module, Linear)]
    for linear in linears:
        if linear.adapter is not None:
            linear.adapter.expand(linear.kernel[...])
    return nnx.split(blocks)


def unstack(blocks: nnx.Module) -> tuple:
    """The arrays of every layer of the stack on their own."""
    state = split_stack(blocks)[1]
    num_layers = jax.tree.leaves(state)[0].shape[0]
    return tuple(jax.tree.map(lambda x: x[i], state) for i in range(num_layers))  # noqa: B023


def scan_layers(
    blocks: nnx.Module,
    x: Array,
    context: Context,
    cache: Cache | None,
    *,
    remat: str,
    layout: Layout,
):
    """Run the stacked `blocks` over x (B, S, D); `remat` is a row of REMATS.

    Returns x after the last block, x before every block (L, B, S, D) (dead code unless used; None
    where the cache holds the layers), and the cache.
    """
    graphdef, state = split_stack(blocks)

    def step(carry, layer_input):
        x, kv = carry
        layer_state, layer = layer_input
        block = nnx.merge(graphdef, layer_state)
        key = None if context.key is None else jax.random.fold_in(context.key, layer)
        y, kv = block(x, context._replace(key=key), kv, layer)
        return (layout.pin(y, ROWS), kv), x

    x, kv = layout.pin(x, ROWS), None if cache is None else (cache.keys, cache.values)
    if cache is not None and cache.layers is not None:
        carry, before = (x, kv), None
        for layer, layer_state in enumerate(cache.layers):
            carry, _ = step(carry, (layer_state, jnp.int32(layer)))
        x, kv = carry
    else:
        step = jax.checkpoint(step, prevent_cse=False, policy=REMATS[remat])
        layers = jnp.arange(jax.tree.leaves(state)[0].shape[0], dtype=jnp.int32)
        (x, kv), before = jax.lax.scan(step, (x, kv), (state, layers))
    if cache is not None:
        cache = cache._replace(keys=kv[0], values=kv[1])
    return x, before, cache
