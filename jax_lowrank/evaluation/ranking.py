"""How well scores rank positives above negatives, inside groups and across them.

The three AUCs of Borkan et al. (2019) for each group: inside it; its negatives against the other
rows' positives (BPSN, low where its negatives score too high); its positives against the other
rows' negatives (BNSP, low where its positives score too low). Ties count one half. Limits are
DeLong's (1988) on the logit scale, rows independent. 1 is ideal, 0.5 is chance.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from scipy.special import expit, logit, ndtri

from jax_lowrank.evaluation.intervals import checked_level, divide, membership


class Auc(NamedTuple):
    """AUCs with limits and DeLong's standard error, and the rows behind them; NaN with a reason."""

    auc: np.ndarray
    low: np.ndarray
    high: np.ndarray
    error: np.ndarray
    positives: np.ndarray
    negatives: np.ndarray
    reason: np.ndarray


class BiasAucs(NamedTuple):
    """overall (...) of all rows; the three by group, (..., G)."""

    overall: Auc
    subgroup: Auc
    bpsn: Auc
    bnsp: Auc


def bias_aucs(
    scores, labels, groups, *, weights=None, minimum: int = 10, level: float = 0.95
) -> BiasAucs:
    """AUCs of scores (..., N), higher = more positive, labels (N,) of 0 and 1, groups (N, G).

    An AUC with fewer than `minimum` positives or negatives is NaN with a reason. Only the order of
    the scores counts: logits and probabilities give the same. ValueError for NaN scores.
    """
    groups, labels = membership(groups), np.asarray(labels)
    scores, tail = np.asarray(scores), (1 + checked_level(level)) / 2
    if scores.shape[-1:] != labels.shape or labels.shape != groups.shape[:1]:
        shapes = f"{scores.shape}, {labels.shape} and {groups.shape}"
        raise ValueError(f"scores, labels, groups must be (..., N), (N,), (N, G), not {shapes}")
    if not np.isin(labels, (0, 1)).all() or np.isnan(scores).any():
        raise ValueError("labels must be 0 or 1 and scores must not be NaN")
    weights = np.ones(labels.size) if weights is None else np.asarray(weights, np.float64)
    labels = labels.astype(int)
    numbers = np.stack([np.bincount(labels[column], minlength=2) for column in groups.T])
    everyone = np.bincount(labels, minlength=2)
    with ThreadPoolExecutor() as pool:  # numpy lets go of the interpreter in its long loops
        runs = list(
            pool.map(
                lambda run: _run(run, labels, groups, weights), scores.reshape(-1, labels.size)
            )
        )
    found = np.reshape(runs, (*scores.shape[:-1], -1, 3, 2))
    others = everyone - numbers
    sizes = {
        "subgroup": (numbers[:, 1], numbers[:, 0]),
        "bpsn": (others[:, 1], numbers[:, 0]),
        "bnsp": (numbers[:, 1], others[:, 0]),
    }
    parts = {
        name: _finished(found[..., :-1, i, :], *sizes[name], minimum, tail)
        for i, name in enumerate(sizes)
    }
    overall = _finished(found[..., -1, 0, :], everyone[1], everyone[0], minimum, tail)
    return BiasAucs(overall, **parts)


def power_mean(values, power: float = -5.0, defined_only: bool = False) -> np.ndarray:
    """(mean x^power)^(1/power) over the last axis; -5 leans to the worst group.

    NaN where a group's value is, unless defined_only leaves such groups out; 0 where one is 0.
    """
    values = np.asarray(values, np.float64)
    kept = ~np.isnan(values) if defined_only else np.ones(values.shape, bool)
    with np.errstate(divide="ignore"):
        powers = np.where(kept, values, 1.0) ** power
    return divide(np.where(kept, powers, 0.0).sum(-1), kept.sum(-1)) ** (1 / power)


def bias_score(found: BiasAucs, power: float = -5.0, defined_only: bool = False) -> np.ndarray:
    """A quarter each of the overall AUC and the power means of the three by group, (...).

    The final metric of the Jigsaw unintended-bias competition (2019).
    """
    parts = (found.subgroup, found.bpsn, found.bnsp)
    means = [power_mean(part.auc, power, defined_only) for part in parts]
    return (found.overall.auc + sum(means)) / 4


def _run(scores, labels, groups, weights) -> list:
    """AUC and error of (subgroup, bpsn, bnsp) of every group; in the last place of all rows.

    What lies between two scores of a group is one step for it, so that a group costs its own rows.
    """
    values, rank = np.unique(scores, return_inverse=True)

    def histogram(at, rows, size) -> np.ndarray:
        """Weights and squared weights (2, 2, size) by label of rows at these places."""
        place = at + size * labels[rows]
        sums = [np.bincount(place, weights[rows] ** power, 2 * size) for power in (1, 2)]
        return np.reshape(sums, (2, 2, size))

    every = histogram(rank, slice(None), values.size)
    below = np.concatenate([np.zeros((2, 2, 1)), every.cumsum(-1)], axis=-1)
    found = []
    for column in groups.T:
        rows = np.flatnonzero(column)
        own, at = np.unique(rank[rows], return_inverse=True)
        ends = np.concatenate([[0], np.stack([own, own + 1], 1).ravel(), [values.size]])
        inside = np.zeros((2, 2, ends.size - 1))
        inside[..., 1::2] = histogram(at, rows, own.size)[..., : (ends.size - 1) // 2]
        rest = np.maximum(np.diff(below[..., ends]) - inside, 0.0)
        pairs = ((inside, inside), (rest, inside), (inside, rest))
        found.append([_auc(one[:, 1], two[:, 0]) for one, two in pairs])
    return [*found, [_auc(every[:, 1], every[:, 0])] * 3]


def _auc(positives: np.ndarray, negatives: np.ndarray) -> tuple[float, float]:
    """AUC and its standard error from weights and squared weights (2, U) at each distinct score."""
    (high, high_squares), (low, low_squares) = positives, negatives
    total_high, total_low = high.sum(), low.sum()
    if total_high <= 0 or total_low <= 0:
        return np.nan, np.nan
    beaten = (np.cumsum(low) - low / 2) / total_low  # share of negatives below each score
    beating = 1 - (np.cumsum(high) - high / 2) / total_high
    auc = high @ beaten / total_high
    variance = 0.0
    for place, total, squares in (
        (beaten, total_high, high_squares),
        (beating, total_low, low_squares),
    ):
        effective = max(total**2 / squares.sum(), 1 + 1e-9)
        variance += squares @ (place - auc) ** 2 / total**2 * effective / (effective - 1)
    return auc, np.sqrt(variance)


def _finished(found, positives, negatives, minimum: int, tail: float) -> Auc:
    counts = np.minimum(positives, negatives)
    auc = np.where(counts >= max(minimum, 1), found[..., 0], np.nan)
    error = np.where(counts >= max(minimum, 2), found[..., 1], np.nan)
    inside = (auc > 0) & (auc < 1) & (error > 0)
    middle = np.where(inside, auc, 0.5)
    half = ndtri(tail) * error / (middle * (1 - middle))
    ends = [np.where(inside, expit(logit(middle) + sign * half), np.nan) for sign in (-1, 1)]
    reasons = [
        f"{p} positives and {n} negatives, fewer than {minimum}" if min(p, n) < minimum else ""
        for p, n in zip(np.ravel(positives), np.ravel(negatives))
    ]
    reason = np.array(reasons, dtype=object).reshape(np.shape(positives))
    return Auc(auc, *ends, error, positives, negatives, reason)
