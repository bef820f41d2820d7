"""Head-only training (a linear probe): the task's head is trained, the body is frozen."""

from __future__ import annotations

import jax
from flax import nnx

from jax_lowrank.adapt.method import Method, dotted, join, split_where


def make() -> Method:
    """Train `model.head_paths` alone, in float32."""
    return Method(split=_split, merge=join, transform=lambda optimizer: optimizer, scale=None)


def _split(key: jax.Array, model):
    del key
    if not model.head_paths:
        raise ValueError(
            "method 'head' has nothing to train: the model has no head of its own task; use a"
            " classification head, or method 'lora'"
        )
    net = nnx.merge(model.graphdef, model.params)
    return split_where(net, lambda path: dotted(path) in model.head_paths)
