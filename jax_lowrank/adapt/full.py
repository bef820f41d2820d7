"""Full fine-tuning: every parameter is trained, in float32."""

from __future__ import annotations

import jax
from flax import nnx

from jax_lowrank.adapt.method import Method, join, split_where


def make() -> Method:
    """Train all parameters. Master weights are float32 whatever the base was stored in; activations
    keep the dtype of the base, as with every method."""
    return Method(split=_split, merge=join, transform=lambda optimizer: optimizer, scale=None)


def _split(key: jax.Array, model):
    del key
    return split_where(nnx.merge(model.graphdef, model.params), lambda path: True)
