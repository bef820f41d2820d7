"""Shadow models for membership inference: the target's own fine-tuning, on other rows.

N rows of which `taken` (N, K) says which of the K shadows trains on them. Online attacks need rows
that some shadows knew and others did not (Carlini et al. 2022); the published offline protocol has
shadows that knew none of the audited rows (Ding et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_lowrank import sweep, train
from jax_lowrank.adapt.method import Method
from jax_lowrank.data import LabelledBatches
from jax_lowrank.sweep import score
from jax_lowrank.sweep.cells import stack
from jax_lowrank.train import DivergedError


class Recipe(NamedTuple):
    """How the target was trained, and so its shadows."""

    method: Method
    epochs: int
    peak: float
    schedule: str = "cosine"
    warmup_fraction: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    steps_per_call: int = 32


class Shadows(NamedTuple):
    """logits (K, A, C) float32 of the shadows that did not diverge, for the rows asked about; how
    many of the shadows these are, and the others' numbers."""

    logits: np.ndarray
    kept: np.ndarray  # (K,) numbers of the columns of `taken`
    diverged: dict[int, DivergedError]


def halves(num_rows: int, num_shadows: int, seed: int) -> np.ndarray:
    """taken (N, K) bool: every row is in for half of the shadows, every shadow has half the rows.

    Shadows 2j and 2j + 1 have complementary halves; of an odd number of rows, one is in neither.
    ValueError for an odd number of shadows and for fewer than two rows.
    """
    if num_shadows < 2 or num_shadows % 2:
        near = max(2, num_shadows + 1)
        raise ValueError(
            f"{num_shadows} shadows cannot know every row half of the time; use {near}"
        )
    if num_rows < 2:
        raise ValueError(f"{num_rows} row(s) have no halves; give 2 or more")
    rng, taken = np.random.default_rng(seed), np.zeros((num_rows, num_shadows), bool)
    for first in range(0, num_shadows, 2):
        order = rng.permutation(num_rows)
        taken[order[: num_rows // 2], first] = True
        taken[order[num_rows // 2 : num_rows // 2 * 2], first + 1] = True
    return taken


def published(
    audited: np.ndarray, num_shadows: int, seed: int, fraction: float = 0.5
) -> np.ndarray:
    """taken (N, K) bool of the offline protocol: a random part of the rows that are not audited.

    audited: (N,) bool. ValueError where that leaves a shadow without rows.
    """
    others = np.flatnonzero(~audited)
    number = round(fraction * len(others))
    if not 1 <= number <= len(others):
        raise ValueError(
            f"{fraction} of {len(others)} rows that are not audited is no training set"
        )
    rng, taken = np.random.default_rng(seed), np.zeros((len(audited), num_shadows), bool)
    for k in range(num_shadows):
        taken[rng.choice(others, number, replace=False), k] = True
    return taken


def members(ids: Sequence[str], trained: Collection[str]) -> np.ndarray:
    """(N,) bool: which rows the target was trained on, by the ids that its run recorded.

    Never by drawing the split again. ValueError where a recorded row is not among `ids`, because
    an audit of other data would look like one without leaks.
    """
    trained, known = set(trained), set(ids)
    if missing := sorted(trained - known):
        raise ValueError(
            f"{len(missing)} of the target's {len(trained)} training rows are not among the"
            f" {len(ids)} rows given, such as {missing[0]!r}: other data, or another version"
        )
    return np.array([row in trained for row in ids], bool)


def train_shadows(
    recipe: Recipe,
    model: Any,
    batches: LabelledBatches,
    taken: np.ndarray,
    sequences: Sequence[Sequence[int]],
    *,
    seed: int,
    validate: Callable | None = None,
    log: Callable[[int, dict], None] = lambda shadow, line: None,
    size: int | None = None,
) -> Shadows:
    """Train a shadow on every column of `taken`, and ask each about `sequences`.

    batches: over all N rows; their batch size and widths are the shadows'. model: the base with the
    head that training starts from. validate: (program, states) -> losses (K,), which chooses a
    shadow's best state as the target's was chosen; None: the last state is taken.
    """
    cells, each = [], []
    for k, column in enumerate(taken.T):
        key = jax.random.fold_in(jax.random.key(seed), k)
        each.append(batches.subset(np.flatnonzero(column), seed + 1 + k))
        steps = train.num_steps(each[k], recipe.epochs)
        schedule = train.make_schedule(recipe.peak, steps, recipe.warmup_fraction, recipe.schedule)
        parts = recipe.method.split(key, model)
        limits = (recipe.weight_decay, recipe.clip)
        cells.append(sweep.Cell(recipe.method, *parts, schedule, key, *limits))
    program = sweep.make_program(cells[0], train.classification_loss)
    falling = iter(range(0, -recipe.epochs - 2, -1))  # the last state is the best
    found = sweep.fit(
        program=program,
        cells=cells,
        batches=sweep.OwnBatches(each),
        validate=(lambda states: validate(program, states))
        if validate
        else lambda states: [next(falling)] * len(cells),
        log=log,
        steps_per_call=recipe.steps_per_call,
        size=size,
    )
    kept = [k for k, one in enumerate(found) if not isinstance(one, DivergedError)]
    if not kept:
        raise found[0]
    trained = [cells[k]._replace(trainable=found[k].trainable) for k in kept]
    logits = score.classify(
        program,
        stack(program, trained).states,
        sequences,
        batch_size=min(64, len(sequences)),
        pad_id=batches.rows.pad_id,
    )
    bad = {k: one for k, one in enumerate(found) if isinstance(one, DivergedError)}
    return Shadows(logits, np.array(kept), bad)
