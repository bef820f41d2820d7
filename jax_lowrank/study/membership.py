"""Shadow models as runs of a study: which rows are audited, and which each shadow trains on.

The audited pool is the training rows and as many test rows, which no reported run trained on, with
the same shares of classes: else a model that prefers one would seem to remember. Online, every
shadow trains on a half of the pool, so that each row is in for half of the shadows (Carlini et al.
2022). As published, shadows train on other test rows alone (arXiv 2405.17512): on as many as their
targets, with the targets' shares of classes. The paper's had half as many (0.4 of its rows against
0.8); a model that saw other numbers of rows fits unseen ones otherwise, members or not.
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
    number = min(len(train.ids), len(test.ids))
    if spec.protocol == "published":
        number = min(number, len(test.ids) // 2)
        require(number >= 2, f"{len(test.ids)} test rows are too few to train shadows on as well")
    rng = np.random.default_rng([spec.seed, 5])
    chosen = shadows.draw(test.labels, shadows.quotas(classes_of(task, "train"), number), rng)
    task = task._replace(splits={**task.splits, POOL: joined(train, test.take(chosen))})
    if spec.protocol == "published":
        rest = np.setdiff1d(np.arange(len(test.ids)), chosen)
        task = task._replace(splits={**task.splits, OTHERS: test.take(rest)})
        check_room(task, spec)
    return task


def classes_of(task: Classification, split: str) -> np.ndarray:
    """(C,) how many rows of a split have each class."""
    return np.bincount(task.splits[split].labels, minlength=len(task.classes))


def own_classes(task: Classification, spec: MembershipSpec) -> np.ndarray:
    """(C,) how many rows of each class a published shadow trains on."""
    trained = classes_of(task, "train")
    return shadows.quotas(trained, spec.rows or int(trained.sum()))


def check_room(task: Classification, spec: MembershipSpec) -> None:
    """Raise ConfigError where a class has fewer rows left than a published shadow trains on."""
    wanted, held = own_classes(task, spec), classes_of(task, OTHERS)
    if (wanted <= held).all():
        return
    trained = classes_of(task, "train")
    sizes = range(int(wanted.sum()), 0, -1)
    near = next((n for n in sizes if (shadows.quotas(trained, n) <= held).all()), 0)
    short = np.flatnonzero(wanted > held)[0]
    use = f"set membership.rows to {near} at most" if near else "there is no smaller number"
    require(
        False,
        f"a published shadow trains on {wanted.sum()} rows, {wanted[short]} of them"
        f" {task.classes[short]!r}, and {held[short]} test rows of that class are not audited;"
        f" {use}, or leave more test rows",
    )


def inside(task: Classification, spec: MembershipSpec) -> np.ndarray:
    """(A, K) bool: which audited rows each shadow trains on."""
    size = len(task.splits[POOL].ids)
    if spec.protocol == "published":
        return np.zeros((size, spec.num_shadows), bool)
    return shadows.halves(size, spec.num_shadows, spec.seed)


def rows_of(task: Classification, spec: MembershipSpec, seed: int) -> tuple[str, np.ndarray]:
    """The split that the shadow of this seed trains on, and its rows there."""
    k = seed - FIRST_SEED
    if spec.protocol == "online":
        return POOL, np.flatnonzero(inside(task, spec)[:, k])
    rest: Grouped = task.splits[OTHERS]
    counts = own_classes(task, spec)
    taken = shadows.published(rest.labels, counts, spec.num_shadows, spec.seed)
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


def described(task: Task | Classification, study: Study, run: Run) -> dict | None:
    """What the record of an audited run says: the protocol, how many rows it trained on, and how
    many of the audited ones it knew (members) and did not."""
    if not is_audited(study, run):
        return None
    known = known_to(task, study.membership, run)
    rows = len(task.splits["train"].ids)
    if run.kind == "shadow":
        rows = len(rows_of(task, study.membership, run.seed)[1])
    return {
        "protocol": study.membership.protocol,
        "trained_on": rows,
        "members": int(known.sum()),
        "others": int((~known).sum()),
    }
