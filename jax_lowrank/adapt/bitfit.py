"""BitFit (Ben Zaken, Ravfogel and Goldberg 2022): bias terms and the task's head are trained."""

from __future__ import annotations

import jax
from flax import nnx

from jax_lowrank.adapt.method import Method, dotted, join, split_where


def make() -> Method:
    """Train every bias (of linear layers and of norms, as the paper) and the head, in float32."""
    return Method(split=_split, merge=join, transform=lambda optimizer: optimizer, scale=None)


def _split(key: jax.Array, model):
    del key
    net = nnx.merge(model.graphdef, model.params)
    if not any(path[-1] == "bias" for path, _ in nnx.to_flat_state(model.params)):
        raise ValueError("the model has no bias terms, so bitfit has none to train; use 'lora'")
    return split_where(net, lambda path: path[-1] == "bias" or dotted(path) in model.head_paths)
