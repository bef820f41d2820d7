"""What stacked models predict. K models, N texts, C classes."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import numpy as np

from jax_lowrank import infer
from jax_lowrank.sweep.cells import Program, States
from jax_lowrank.sweep.step import pack_limit, pack_size


@functools.partial(jax.jit, static_argnames=("apply", "size"))
def _class_logits(apply, size, states, tokens, mask):
    def one(cell):
        trainable, own = cell
        return apply(trainable, (own, states.shared)).classify(tokens, mask)

    return jax.lax.map(one, (states.trainable, states.own), batch_size=size)


def classify(
    program: Program,
    states: States,
    sequences: Sequence[Sequence[int]],
    *,
    batch_size: int,
    pad_id: int,
) -> np.ndarray:
    """Class logits (K, N, C) float32 of each model for each token sequence."""
    num_models = jax.tree.leaves(states.trainable)[0].shape[0]
    blocks = []
    for rows, tokens, mask in infer.right_padded(sequences, batch_size, pad_id):
        size = pack_size(num_models, tokens.size, pack_limit())
        blocks.append((rows, _class_logits(program.apply, size, states, tokens, mask)))
    blocks = jax.device_get(blocks)
    logits = np.zeros((num_models, len(sequences), blocks[0][1].shape[2]), np.float32)
    for rows, values in blocks:
        logits[:, rows] = values[:, : len(rows)]
    return logits
