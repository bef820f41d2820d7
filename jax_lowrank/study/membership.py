"""Shadow models as runs of a study: which rows are audited, and which each shadow trains on.

The audited pool is the training rows and as many test rows, which no reported run trained on.
Online, every shadow trains on a half of the pool, so that each row is in for half of the shadows
(Carlini et al. 2022); as published, shadows train on other test rows alone (arXiv 2405.17512).
"""

from __future__ import annotations

import numpy as np

from jax_lowrank import shadows
from jax_lowrank.config import MembershipSpec, Run, Study, require
from jax_lowrank.tasks import Classification, Task
from jax_lowrank.tasks.grouped import Grouped, joined
from jax_lowrank.tasks.text import split_hash

POOL = "audited"
OTHERS = "shadows' own"
FIRST_SEED = 1_000_000  # of the shadows: none is a reported run's


def is_audited(study: Study, run: Run) -> bool:
    """Whether an audit compares this run: a shadow, or a reported run of a method that has some."""
    audit = study.membership
    if audit is None or run.kind not in ("final", "shadow"):
        return False
    return not audit.methods or run.label in audit.methods


def with_pool(task: Classification, spec: MembershipSpec) -> Classification:
    """The task with the audited rows, members first, and the rows that are left, as splits.

    Raises ConfigError where too few test rows are left for published shadows.
    """
    train, test = task.splits["train"], task.splits["test"]
    order = np.random.default_rng([spec.seed, 5]).permutation(len(test.ids))
    number = min(len(train.ids), len(test.ids))
    if spec.protocol == "published":
        number = min(number, len(test.ids) // 2)
        require(number >= 2, f"{len(test.ids)} test rows are too few to train shadows on as well")
    pool = joined(train, test.take(np.sort(order[:number])))
    splits = {**task.splits, POOL: pool}
    if spec.protocol == "published":
        splits[OTHERS] = test.take(np.sort(order[number:]))
    return task._replace(splits=splits)


def inside(task: Classification, spec: MembershipSpec) -> np.ndarray:
    """(A, K) bool: which audited rows each shadow trains on."""
    size = len(task.splits[POOL].ids)
    if spec.protocol == "published":
        return np.zeros((size, spec.shadows), bool)
    return shadows.halves(size, spec.shadows, spec.seed)


def rows_of(task: Classification, spec: MembershipSpec, seed: int) -> tuple[str, np.ndarray]:
    """The split that the shadow of this seed trains on, and its rows there."""
    k = seed - FIRST_SEED
    if spec.protocol == "online":
        return POOL, np.flatnonzero(inside(task, spec)[:, k])
    rest: Grouped = task.splits[OTHERS]
    taken = shadows.published(np.zeros(len(rest.ids), bool), spec.shadows, spec.seed)
    return OTHERS, np.flatnonzero(taken[:, k])


def split_hashes(task: Task | Classification, spec: MembershipSpec | None, run: Run) -> dict:
    """Of each split the hash of its ids in order, as this run has them: shadows train on others."""
    found = {name: split_hash(split.ids) for name, split in task.splits.items()}
    if run.kind == "shadow":
        split, rows = rows_of(task, spec, run.seed)
        found["train"] = split_hash([task.splits[split].ids[row] for row in rows])
    return found


def known_to(task: Classification, spec: MembershipSpec, run: Run) -> np.ndarray:
    """(A,) bool: the audited rows that a run trained on. Of a reported run, by the recorded ids."""
    if run.kind == "shadow":
        return inside(task, spec)[:, run.seed - FIRST_SEED]
    return shadows.members(task.splits[POOL].ids, task.splits["train"].ids)
