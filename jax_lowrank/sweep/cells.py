"""The cells of a sweep in one form, side by side, and what they see. K cells, S tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_lowrank.adapt import padded
from jax_lowrank.adapt.method import Method, State, bind
from jax_lowrank.train import Schedule


class SweepError(ValueError):
    """Cells that cannot share a program; the message says why."""


class Cell(NamedTuple):
    """One run: what `Method.split` gave, and how it is trained."""

    method: Method
    graphdef: Any
    trainable: State
    frozen: State
    schedule: Schedule  # its num_steps are this cell's
    key: jax.Array  # for dropout
    weight_decay: float = 0.0
    clip: float = 0.0  # largest global gradient norm; 0: off


class Settings(NamedTuple):
    """What differs from cell to cell beside the states; (K,) each, and a state of factors (K,)."""

    key: jax.Array
    weight_decay: jax.Array
    clip: jax.Array
    factors: State


class States(NamedTuple):
    """The arrays of stacked models: those of the cells, leading K, and those of the base."""

    trainable: State
    own: State
    shared: State


class Stacked(NamedTuple):
    """Cells in one form. Leaves of settings have a leading K; layers and likes, for `padded.cut`,
    are one a cell."""

    states: States
    settings: Settings
    layers: tuple[dict, ...]
    likes: tuple[State, ...]


class Program(NamedTuple):
    """What is compiled in; sweeps of one form that are given the same program compile once."""

    graphdef: Any
    apply: Callable  # (trainable, (own, shared)) -> model
    loss: Callable
    method: Method
    accumulate: int


def make_program(
    cell: Cell, loss: Callable, *, accumulate: int = 1, remat: str = "dots"
) -> Program:
    """The program of all cells of this one's form; see `stack` for what that is."""
    graphdef = _padded(cell).graphdef
    joined = bind(graphdef, remat=remat)

    def apply(trainable, frozen):
        return joined(trainable, *frozen)

    # A LoRA+ ratio is data here, not the method's own.
    return Program(graphdef, apply, loss, cell.method._replace(rates=None), accumulate)


def stack(program: Program, cells: Sequence[Cell], multiple: int = 1) -> Stacked:
    """The cells side by side; copies of the last one fill up to a multiple.

    Raises SweepError for cells of another form than the program's: other methods, targets, dropout
    rates, starts from the base, layers under DoRA; and for cells of several bases.
    """
    rank = max(padded.largest_rank(cell.trainable) for cell in cells)
    parts = [_padded(cell, rank) for cell in cells]
    base = jax.tree.leaves(parts[0].shared)
    for number, part in enumerate(parts):
        if part.graphdef != program.graphdef:
            raise SweepError(
                f"cell {number} does not fit the program: its cells have one method, targets,"
                " dropout and kind of init, and under DoRA the same layers"
            )
        if any(a is not b for a, b in zip(jax.tree.leaves(part.shared), base)):
            raise SweepError(f"cell {number} has another base than cell 0; load it once for all")
    parts += [parts[-1]] * (-len(parts) % multiple)
    filled = [*cells, *[cells[-1]] * (len(parts) - len(cells))]
    factors = [
        cell.method.rates(part.trainable)
        if cell.method.rates
        else jax.tree.map(lambda _: 1.0, part.trainable)
        for cell, part in zip(filled, parts)
    ]
    settings = Settings(
        jnp.stack([cell.key for cell in filled]),
        jnp.array([cell.weight_decay for cell in filled], jnp.float32),
        jnp.array([cell.clip or np.inf for cell in filled], jnp.float32),
        jax.tree.map(lambda *x: jnp.array(x, jnp.float32), *factors),
    )
    states = States(
        _side_by_side([part.trainable for part in parts]),
        _side_by_side([part.own for part in parts]),
        parts[0].shared,
    )
    return Stacked(
        states,
        settings,
        tuple(part.layers for part in parts[: len(cells)]),
        tuple(_shapes(cell.trainable) for cell in cells),
    )


def share_out(tree, mesh: Mesh | None):
    """Arrays of cells, leading K, cut over the devices of a mesh, whatever its axes are."""
    if mesh is None:
        return tree
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))


def spread(stacked: Stacked, mesh: Mesh | None) -> Stacked:
    """The cells shared out to the devices of a mesh, each of which gets a copy of the base."""
    if mesh is None:
        return stacked
    trainable, own, shared = stacked.states
    base = jax.device_put(shared, NamedSharding(mesh, PartitionSpec()))
    states = States(share_out(trainable, mesh), share_out(own, mesh), base)
    return stacked._replace(states=states, settings=share_out(stacked.settings, mesh))


def _padded(cell: Cell, rank: int | None = None) -> padded.Padded:
    rank = padded.largest_rank(cell.trainable) if rank is None else rank
    return padded.pad(cell.graphdef, cell.trainable, cell.frozen, rank)


def _shapes(tree: State) -> State:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _side_by_side(trees: Sequence[State]) -> State:
    return jax.tree.map(lambda *x: jnp.asarray(np.stack([np.asarray(a) for a in x])), *trees)


class OwnBatches:
    """Each cell its own batches: batch t has a leading K, and is as wide as the widest of them.

    Raises SweepError where epochs have different numbers of steps.
    """

    def __init__(self, each: Sequence):
        self.each = tuple(each)
        steps = sorted({batches.steps_per_epoch for batches in each})
        if len(steps) > 1:
            raise SweepError(f"cells have epochs of {steps[0]} and of {steps[-1]} steps")
        self.steps_per_epoch = steps[0]

    def width(self, t: int) -> int:
        """S of batch t."""
        return max(batches.width(t) for batches in self.each)

    def batch(self, t: int):
        """Batch number t >= 0, of the same kind as the cells' own; what is filled up is 0."""
        width = self.width(t)
        rows = [batches.batch(t) for batches in self.each]

        def widened(x):
            return np.pad(x, ((0, 0), (0, width - x.shape[1]))) if x.ndim == 2 else x

        return type(rows[0])(*(np.stack([widened(x) for x in part]) for part in zip(*rows)))
