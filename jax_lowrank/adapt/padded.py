"""Split models in a form that those of several ranks, layers and scales share, and back.

Adapters are filled up with zeros that stay zero (see `models.layers.Adapter.pad`). What has no
adapters has that form already.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from jax_lowrank.adapt.method import State, dotted


class Padded(NamedTuple):
    """A split model whose frozen arrays are apart: its `own` (scales, what factors started from),
    and those of the base, which are `shared` with the models split from the same one.

    layers: dotted path of an adapter -> the layers of its stack that it is for, where those are not
      the rows of its arrays anyway.
    """

    graphdef: Any
    trainable: State
    own: State
    shared: State
    layers: dict[str, tuple[int, ...]]


def largest_rank(trainable: State) -> int:
    """Of the adapters in a state; 0 where there is none."""
    flat = nnx.to_flat_state(trainable)
    return max((v.shape[-1] for path, v in flat if path[-2:] == ("adapter", "a")), default=0)


def pad(graphdef, trainable: State, frozen: State, rank: int) -> Padded:
    """What `Method.split` gave, with every adapter at `rank`, which is none of theirs or above."""
    net = nnx.merge(graphdef, trainable, frozen)
    layers = {}
    for path, module in nnx.iter_modules(net):
        adapter = getattr(module, "adapter", None)
        if adapter is not None:
            before = adapter.layers
            adapter.pad(rank, module.kernel[...])
            if adapter.layers != before:
                layers[dotted((*path, "adapter"))] = before
    trained = {path for path, _ in nnx.to_flat_state(trainable)}
    parts = nnx.split(
        net, lambda path, _: path in trained, lambda path, _: "adapter" in path, lambda *_: True
    )
    return Padded(*parts, layers)


def cut(trainable: State, layers: dict[str, tuple[int, ...]], like: State) -> State:
    """A padded trainable state in the form of `like`, which is the one that was padded or its
    shapes."""
    wanted = dict(nnx.to_flat_state(like))

    def own_part(path, variable):
        array, adapter = np.asarray(variable.get_value()), dotted(path[:-1])
        if adapter in layers:
            array = array[np.array(layers[adapter])]
        # safetensors would write a view's memory as it lies
        return np.ascontiguousarray(array[tuple(map(slice, wanted[path].get_value().shape))])

    flat = nnx.to_flat_state(trainable)
    return nnx.from_flat_state([(path, v.replace(own_part(path, v))) for path, v in flat])
