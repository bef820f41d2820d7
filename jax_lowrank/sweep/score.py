"""What stacked models predict. K models, N texts, C classes, B rows a batch, S tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np

from jax_lowrank import infer, sharding
from jax_lowrank.sweep.cells import Program, States
from jax_lowrank.sweep.step import pack_limit, pack_size


@functools.partial(jax.jit, static_argnames=("ask", "apply", "size"))
def _of_each(ask, apply, size, states, *rows):
    def one(cell):
        trainable, own = cell
        return ask(apply(trainable, (own, states.shared)), *rows)

    return jax.lax.map(one, (states.trainable, states.own), batch_size=size)


def _class_logits(model, tokens, mask):
    return model.classify(tokens, mask)


def _row_nll(model, tokens, weights):
    return (model.nll(tokens) * weights).sum(1)


def classify(
    program: Program,
    states: States,
    sequences: Sequence[Sequence[int]],
    *,
    batch_size: int,
    pad_id: int,
) -> np.ndarray:
    """Class logits (K, N, C) float32 of each model for each token sequence."""
    blocks = infer.right_padded(sequences, batch_size, pad_id)
    return _ask(_class_logits, program, states, blocks, len(sequences))


def likelihood(
    program: Program,
    states: States,
    sequences: Sequence[Sequence[int]],
    *,
    batch_size: int,
    pad_id: int,
) -> infer.Likelihood:
    """-log p of each token sequence given its first token, nll (K, N), and tokens (N,)."""
    blocks = infer.weighted(sequences, None, batch_size, pad_id)
    nll = _ask(_row_nll, program, states, blocks, len(sequences))
    return infer.Likelihood(nll, infer.num_predicted(sequences, None))


def _ask(ask: Callable, program: Program, states: States, blocks, num_rows: int) -> np.ndarray:
    """(K, N, ...) float32 of what `ask` returns for blocks of rows."""
    num_models = jax.tree.leaves(states.trainable)[0].shape[0]
    found, shared_out = [], sharding.mesh_of(states.trainable) is not None
    for rows, tokens, beside in blocks:
        size = num_models if shared_out else pack_size(num_models, tokens.size, pack_limit())
        found.append((rows, _of_each(ask, program.apply, size, states, tokens, beside)))
    found = jax.device_get(found)
    out = np.zeros((num_models, num_rows, *found[0][1].shape[2:]), np.float32)
    for rows, values in found:
        out[:, rows] = values[:, : len(rows)]
    return out
