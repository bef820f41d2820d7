"""Full fine-tuning: every parameter is trained, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jax_lowrank.adapt.method import Method


def make() -> Method:
    """Train all parameters. Master weights are float32 whatever the base was stored in."""
    return Method(split=_split, merge=_merge, transform=lambda optimizer: optimizer, scale=None)


def _split(key: jax.Array, model):
    del key
    graphdef, trainable, frozen = nnx.split(nnx.merge(model.graphdef, model.params), nnx.Param, ...)
    # A copy: the train step donates its trainable arrays, and the base must outlive it.
    return graphdef, jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), trainable), frozen


def _merge(graphdef, trainable, frozen):
    del graphdef, frozen
    return trainable
