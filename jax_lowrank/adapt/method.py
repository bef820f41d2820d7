"""The interface of a fine-tuning method: which arrays are trained, and how they join the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

State = Any  # a pytree of arrays
UNDECAYED = ("scale", "bias")  # norms and biases


class Method(NamedTuple):
    """A fine-tuning method as pure functions.

    split(key, model) -> (graphdef, trainable, frozen): two disjoint pytrees. `model` carries
      graphdef, params and presets (see `models.Model`). The output is unchanged by the split.
    merge(graphdef, trainable, frozen) -> plain parameters of the original model.
    transform(optimizer) -> the optimizer that the method wants around the given one.
    scale: factor on the low-rank product where no pattern says otherwise, or None where there is
      none; `lora.scales` has that of every layer.
    rates(trainable) -> the factor on the learning rate of every array, decay included; None: 1.

    Every method trains the parameters in `model.head_paths` as well: they are the task's own.
    """

    split: Callable[[jax.Array, Any], tuple[Any, State, State]]
    merge: Callable[[Any, State, State], State]
    transform: Callable[[optax.GradientTransformation], optax.GradientTransformation]
    scale: float | None
    rates: Callable[[State], State] | None = None


def split_where(
    net: nnx.Module, is_trained: Callable[[tuple], bool]
) -> tuple[nnx.GraphDef, State, State]:
    """(graphdef, trainable, frozen) of a module; `is_trained` is asked with the path of an array.

    What is trained is a float32 copy: the train step destroys it, and the base must outlive it.
    """
    graphdef, trainable, frozen = nnx.split(net, lambda path, _: is_trained(path), ...)
    return graphdef, jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), trainable), frozen


def join(graphdef: nnx.GraphDef, trainable: State, frozen: State) -> State:
    """Plain parameters where the method has none of its own: `Method.merge` of such methods."""
    return nnx.split(nnx.merge(graphdef, trainable, frozen))[1]


def change(method: Method, graphdef, trainable: State, frozen: State, params: State) -> State:
    """ΔW: merged minus original parameters, in float32, whatever the method does inside.

    params: those of the model that was split. Nothing is rounded to the base's dtype on the way.
    """
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), frozen)
    merged = method.merge(graphdef, trainable, exact)
    return jax.tree.map(lambda new, old: new - old.astype(jnp.float32), merged, params)


def dotted(path: tuple) -> str:
    """('blocks', 'attn', 'q') -> blocks.attn.q."""
    return ".".join(map(str, path))


def bind(graphdef: nnx.GraphDef, *, remat: str = "dots", layout: Any = None) -> Callable:
    """apply(*states) -> the model whose arrays they are; call it inside a traced function.

    remat: what the backward pass keeps of every layer, a row of models.stack.REMATS.
    layout: a models.attention.Layout where the states lie on several devices.
    """

    def apply(*states):
        model = nnx.merge(graphdef, *states)
        model.remat = remat
        if layout is not None:
            model.layout = layout
        return model

    return apply


def map_paths(function: Callable[[tuple], Any], state: State) -> State:
    """A state of the same structure with function(path) in the place of every array."""
    flat = [(path, v.replace(function(path))) for path, v in nnx.to_flat_state(state)]
    return nnx.from_flat_state(flat)


def decay_mask(trainable: State) -> State:
    """True where weight decay applies: everything but norms and biases."""
    return map_paths(lambda path: path[-1] not in UNDECAYED, trainable)


def count(state: State) -> int:
    """Number of scalars in a pytree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(state))


def dtypes(state: State) -> tuple[str, ...]:
    """The dtypes that occur in a pytree of arrays, sorted."""
    return tuple(sorted({str(leaf.dtype) for leaf in jax.tree.leaves(state)}))
