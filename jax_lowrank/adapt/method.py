"""The interface of a fine-tuning method: which arrays are trained, and how they join the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
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
    scale: factor on the low-rank product, or None where there is none.
    """

    split: Callable[[jax.Array, Any], tuple[Any, State, State]]
    merge: Callable[[Any, State, State], State]
    transform: Callable[[optax.GradientTransformation], optax.GradientTransformation]
    scale: float | None


def bind(graphdef: nnx.GraphDef, *, remat: bool = False) -> Callable:
    """apply(*states) -> the model whose arrays they are; call it inside a traced function.

    remat: recompute each block in the backward pass instead of keeping what is inside it.
    """

    def apply(*states):
        model = nnx.merge(graphdef, *states)
        model.remat = remat
        return model

    return apply


def decay_mask(trainable: State) -> State:
    """True where weight decay applies: everything but norms and biases."""
    flat = [
        (path, v.replace(path[-1] not in UNDECAYED)) for path, v in nnx.to_flat_state(trainable)
    ]
    return nnx.from_flat_state(flat)


def count(state: State) -> int:
    """Number of scalars in a pytree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(state))


def dtypes(state: State) -> tuple[str, ...]:
    """The dtypes that occur in a pytree of arrays, sorted."""
    return tuple(sorted({str(leaf.dtype) for leaf in jax.tree.leaves(state)}))
