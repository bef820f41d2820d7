"""The compiled step of a sweep. K cells, B rows a batch and cell, S tokens."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_lowrank import train
from jax_lowrank.adapt.method import State
from jax_lowrank.sweep.cells import Program, Settings

# Tokens of a pack. On a CPU more do not fit into the cache, and gain nothing: one cell of 256
# tokens has products that are large enough. An accelerator needs more of them to be busy.
PACK_TOKENS = {"cpu": 256}
PACK_TOKENS_ELSEWHERE = 16384


def optimizer_of(program: Program, trainable: State, settings: Settings):
    """The optimizer of one cell, whose settings are data."""
    method = program.method._replace(rates=lambda _: settings.factors)
    return train.make_optimizer(
        trainable, method, weight_decay=settings.weight_decay, clip=settings.clip
    )


class Plan(NamedTuple):
    """How cells share a machine: in equal `lanes` that run at the same time, one a processor core,
    and in each of them `size` cells at once, pack after pack."""

    lanes: int
    size: int


def plan(num_cells: int, tokens: int, most_lanes: int) -> Plan:
    """For cells of so many tokens a step.

    A step of one cell leaves cores idle between its products; steps of two cells fill each other's
    gaps (0.64 to 0.86 of the time at 256 to 2,048 tokens on 2 cores).
    """
    lanes = min(num_cells, most_lanes)
    return Plan(lanes, pack_size(math.ceil(num_cells / lanes), tokens, pack_limit()))


def num_lanes() -> int:
    """The cores that this process may use, on a CPU; 1 elsewhere."""
    if jax.default_backend() != "cpu":
        return 1
    found = getattr(os, "sched_getaffinity", None)
    return len(found(0)) if found else os.cpu_count() or 1


def pack_size(num_cells: int, tokens: int, limit: int) -> int:
    """How many cells are computed at once: as many as have `limit` tokens together, at least one,
    and the cells shared out evenly."""
    packs = math.ceil(num_cells / max(1, limit // tokens))
    return math.ceil(num_cells / packs)


def pack_limit() -> int:
    """Tokens of a pack on this machine."""
    return PACK_TOKENS.get(jax.default_backend(), PACK_TOKENS_ELSEWHERE)


def tokens_of(batches) -> int:
    """Tokens of one cell and step, pads included: the mean over an epoch."""
    rows = batches.batch(0).tokens.shape[-2]
    steps = range(batches.steps_per_epoch)
    return math.ceil(rows * np.mean([batches.width(t) for t in steps]))


@functools.partial(
    jax.jit, static_argnames=("program", "size", "paired"), donate_argnames=("trainable", "opt")
)
def run_cells(
    *, program, size, paired, trainable, opt, own, shared, settings, batches, rates, count, first
):
    """`train.run_steps` of every cell, `size` of them at once.

    trainable, opt, own, settings: leading K, a multiple of `size`. batches: (steps, B, S) that all
    cells see, when `paired`; else (K, steps, B, S). rates (K, steps). Returns trainable, opt, and
    per-step loss and gradient norm (K, steps).
    """

    def one(trainable, opt, own, settings, rates, batches):
        return train.run_steps.__wrapped__(
            apply=program.apply,
            loss=program.loss,
            optimizer=optimizer_of(program, trainable, settings),
            accumulate=program.accumulate,
            trainable=trainable,
            opt_state=opt,
            frozen=(own, shared),
            batches=batches,
            rates=rates,
            count=count,
            key=settings.key,
            first=first,
        )

    def pack(*cells_and_batches):
        if size > 1:
            return jax.vmap(one, (0,) * 5 + (None if paired else 0,))(*cells_and_batches)
        *cells, mine = cells_and_batches
        cells, mine = (jax.tree.map(lambda x: x[0], t) for t in (cells, () if paired else mine))
        return jax.tree.map(lambda x: x[None], one(*cells, batches if paired else mine))

    def turn(number, carry):
        def mine(tree):
            return jax.tree.map(
                lambda x: jax.lax.dynamic_slice_in_dim(x, number * size, size), tree
            )

        cells = mine((carry[0], carry[1], own, settings, rates))
        out = pack(*cells, batches if paired else mine(batches))
        return jax.tree.map(
            lambda whole, part: jax.lax.dynamic_update_slice_in_dim(
                whole, part, number * size, axis=0
            ),
            carry,
            out,
        )

    if size == len(rates):  # on a mesh, nothing is to be cut out of what is shared out
        return pack(trainable, opt, own, settings, rates, batches)
    empty = jnp.zeros(rates.shape, jnp.float32)
    return jax.lax.fori_loop(0, len(rates) // size, turn, (trainable, opt, empty, empty))


def run_lanes(lanes: int, run: Callable, state, beside):
    """run(state, beside), whose leaves have a leading K: `lanes` calls with an equal share of the
    cells each, at the same time; their results joined. `state` is given up.
    """
    if lanes == 1:
        return run(state, beside)
    parts = _cut(state, beside, lanes)
    for whole in jax.tree.leaves(state):
        whole.delete()
    found = [run(*parts[0])]  # compiles, the first time
    # JAX runs the calls of one thread one after another.
    with ThreadPoolExecutor(lanes - 1) as pool:
        found += pool.map(lambda part: run(*part), parts[1:])
    return _join(found)


@functools.partial(jax.jit, static_argnames="lanes")
def _cut(state, beside, lanes: int):
    def part(number: int):
        return jax.tree.map(lambda x: jnp.split(x, lanes)[number], (state, beside))

    return [part(number) for number in range(lanes)]


@jax.jit
def _join(parts):
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)


@functools.partial(jax.jit, static_argnames="program")
def init(program: Program, trainable: State, settings: Settings):
    """Optimizer states of all cells, leading K."""
    return jax.vmap(lambda t, s: optimizer_of(program, t, s).init(t))(trainable, settings)
