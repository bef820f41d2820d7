"""Rows chosen so that classes and groups have given shares: imbalance imposed by dropping rows."""

from collections.abc import Mapping

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from jax_lowrank.tasks.grouped import Grouped
from jax_lowrank.tasks.task import TaskError

ROUNDS = 5_000  # of the fit; most need a dozen, shares at the edge of what can be reached all
CLOSE = 1e-9


def unbalanced(
    rows: Grouped, chosen: np.ndarray, ratio: Mapping[str, float], seed: int, most: int = 0
) -> tuple[np.ndarray, dict[str, int]]:
    """Of these row numbers those that stay, in order, and how many of them each name has.

    ratio: class or group -> its share of the rows that stay, in (0, 1). A row's chance to stay
    depends on which of the names it has, by a factor for each (raking, Deming & Stephan 1940), so
    that what goes together stays together: the odds ratios between the names do not change. As many
    rows stay as these odds allow, and all of the kind that is dropped least; at most `most` (0: no
    limit). Shares are met to within a row. TaskError for an unknown name, and for a share that
    dropping rows cannot reach, with those it can.
    """
    chosen = np.asarray(chosen)
    inside = np.stack([_inside(rows, name)[chosen] for name in ratio], axis=1)
    cells, which = np.unique(inside, axis=0, return_inverse=True)
    which = which.ravel()
    sizes = np.bincount(which, minlength=len(cells))
    shares = np.array(list(ratio.values()), np.float64)
    _check(cells.astype(float), list(ratio), shares)
    weights = _raked(cells, sizes, shares)
    total = (sizes / np.maximum(weights, CLOSE)).min()
    counts = _rounded(cells, sizes, shares, min(total, most or total) * weights)
    order = np.random.default_rng([seed, 2]).permutation(len(chosen))
    stays = [order[which[order] == cell][:count] for cell, count in enumerate(counts)]
    stays = np.sort(np.concatenate(stays))
    return chosen[stays], dict(zip(ratio, inside[stays].sum(0).tolist()))


def _inside(rows: Grouped, name: str) -> np.ndarray:
    """(N,) bool: which rows are of a class or group."""
    if name in rows.classes:
        return rows.labels == rows.classes.index(name)
    if name in rows.group_names:
        return rows.groups[:, rows.group_names.index(name)]
    raise TaskError(
        f"ratio: {name!r} is neither a class ({', '.join(rows.classes)}) nor a group"
        f" ({', '.join(rows.group_names)})"
    )


def _check(cells: np.ndarray, names: list[str], shares: np.ndarray) -> None:
    """Raise TaskError at the first share that cannot be had together with those before it."""
    for j, (name, share) in enumerate(zip(names, shares)):
        if not 0 < share < 1:
            raise TaskError(f"ratio: the share of {name!r} must lie in (0, 1), not {share:g}")
        # Shares of the cells: at least 0, 1 together, and right for the names before this one.
        known = np.vstack([np.ones(len(cells)), cells[:, :j].T])
        wanted = np.concatenate([[1.0], shares[:j]])
        ends = [
            linprog(sign * cells[:, j], A_eq=known, b_eq=wanted, bounds=(0, None)).fun
            for sign in (1, -1)
        ]
        low, high = ends[0] + 0.0, 0.0 - ends[1]
        if not low - CLOSE <= share <= high + CLOSE:
            before = ", ".join(f"{n} {s:g}" for n, s in zip(names[:j], shares))
            raise TaskError(
                f"ratio: the share of {name!r} cannot be {share:g}; by dropping rows"
                + (f" beside {before}" if before else "")
                + (f" only {low:g}" if high - low < CLOSE else f" {low:g} to {high:g}")
                + " can be reached"
            )


def _raked(cells: np.ndarray, sizes: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """The cells' shares of the rows that stay: in turn each name's rows, and the others, scaled."""
    weights = sizes / sizes.sum()
    for _ in range(ROUNDS):
        for member, share in zip(cells.T, shares):
            held = weights[member].sum()
            weights = np.where(member, weights * share / held, weights * (1 - share) / (1 - held))
            weights = weights / weights.sum()
        if np.abs(weights @ cells - shares).max() < CLOSE:
            break
    return weights


def _rounded(
    cells: np.ndarray, sizes: np.ndarray, shares: np.ndarray, wanted: np.ndarray
) -> np.ndarray:
    """Each of `wanted` rounded up or down, so that the shares are missed by as few rows as can be.

    Of equally good ways the one nearest to `wanted`.
    """
    number, names = cells.shape
    low = np.floor(np.round(wanted, 6))  # what is whole but for its last bits stays whole
    high = np.minimum(np.ceil(np.round(wanted, 6)), sizes)
    # Variables: the counts, then by how many rows each share is missed.
    missed = cells.T - shares[:, None]
    total = np.concatenate([np.ones(number), np.zeros(names)])
    found = milp(
        np.concatenate([(low - wanted + 0.5) / (10 * number), np.ones(names)]),
        integrality=total,
        bounds=Bounds(
            np.concatenate([low, np.zeros(names)]),
            np.concatenate([high, np.full(names, np.inf)]),
        ),
        constraints=[
            LinearConstraint(np.hstack([missed, -np.eye(names)]), ub=0.0),
            LinearConstraint(np.hstack([-missed, -np.eye(names)]), ub=0.0),
            LinearConstraint(total, *[np.clip(round(wanted.sum()), low.sum(), high.sum())] * 2),
        ],
    )
    return np.round(found.x[:number]).astype(int)
