"""How well scores rank positives above negatives, inside groups and across them.

The three AUCs of Borkan et al. (2019) for each group: inside it; its negatives against the other
rows' positives (BPSN, low where its negatives score too high); its positives against the other
rows' negatives (BNSP, low where its positives score too low). Ties count one half. Limits are
DeLong's (1988) on the logit scale, rows independent. 1 is ideal, 0.5 is chance.
"""

from typing import NamedTuple

import numpy as np
from scipy.special import expit, logit, ndtri, stdtr, stdtrit

from jax_lowrank.evaluation.intervals import (
    checked_level,
    checked_weights,
    divide,
    is_binary,
    membership,
    rows_and_seeds,
    threaded,
)


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


class Difference(NamedTuple):
    """AUC of a minus AUC of b, limits, standard error, degrees of freedom; NaN with a reason.

    p: for these seeds, from the rows alone. p_new_seeds: of the interval; NaN with one seed.
    """

    estimate: float
    low: float
    high: float
    p: float
    p_new_seeds: float
    error: float
    freedom: float
    reason: str


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
    if not is_binary(labels) or np.isnan(scores).any():
        raise ValueError("labels must be 0 or 1 and scores must not be NaN")
    weights = np.ones(labels.size) if weights is None else checked_weights(weights, labels.size)
    labels = labels.astype(int)
    numbers = np.stack([np.bincount(labels[column], minlength=2) for column in groups.T])
    everyone = np.bincount(labels, minlength=2)
    column, row = np.nonzero(groups.T)
    parts = (labels, weights, row, column, groups.shape[1])
    runs = threaded(lambda run: _run(run, *parts), scores.reshape(-1, labels.size))
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


def compare(a, b, positive, *, level: float = 0.95) -> Difference:
    """AUC of scores a minus that of scores b, (S, N) under S seeds or (N,), on the same rows.

    positive: (N,) bool. Rows: the covariance of DeLong, DeLong and Clarke-Pearson (1988), in which
    both see the same rows; seeds: with two or more, the variance between them. Rows that are NaN
    under any seed take no part.
    """
    tail, positive = (1 + checked_level(level)) / 2, np.asarray(positive)
    a, b = (np.atleast_2d(np.asarray(scores, np.float64)) for scores in (a, b))
    if a.shape != b.shape or positive.shape != a.shape[1:] or positive.dtype != bool:
        shapes = f"{a.shape}, {b.shape} and {positive.shape} of {positive.dtype}"
        raise ValueError(f"a, b, positive must be (S, N), (S, N), (N,) bool, not {shapes}")
    kept = ~np.isnan(np.concatenate([a, b])).any(0)
    a, b, positive = a[:, kept], b[:, kept], positive[kept]
    numbers = (int(positive.sum()), int((~positive).sum()))
    if min(numbers) < 2:
        reason = f"{numbers[0]} positives and {numbers[1]} negatives, fewer than 2"
        return Difference(*[np.nan] * 7, reason)
    places = [np.array([_places(row, positive) for row in rows]) for rows in (a, b)]
    apart = places[0] - places[1]
    by_seed, mean = apart[:, positive].mean(1), apart.mean(0)
    rows = sum(mean[part].var(ddof=1) / part.sum() for part in (positive, ~positive))
    found = rows_and_seeds(by_seed[:, None], np.array([rows]), positive.size)
    estimate, error, freedom = float(by_seed.mean()), *(float(part[0]) for part in found)
    if not rows > 0:
        reason = "both order the rows alike"
        return Difference(estimate, *[np.nan] * 4, error, freedom, reason)
    half = float(stdtrit(freedom, tail)) * error
    p = 2 * float(stdtr(positive.size - 1, -abs(estimate) / np.sqrt(rows)))
    p_new = 2 * float(stdtr(freedom, -abs(estimate) / error)) if len(by_seed) > 1 else np.nan
    ends = (estimate - half, estimate + half)
    return Difference(estimate, *ends, p, p_new, error, freedom, "")


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


def _run(scores, labels, weights, row, column, num_groups: int) -> np.ndarray:
    """AUC and error (G + 1, 3, 2) of (subgroup, bpsn, bnsp) of every group; last, of all rows.

    row, column: the places of a membership matrix, column by column. What lies between two scores
    of a group is one step for it, so that a group costs its own rows; the steps of all groups lie
    one after the other.
    """
    values, rank = np.unique(scores, return_inverse=True)
    every = _histogram(rank, values.size, labels, weights)
    below = np.concatenate([np.zeros((2, 2, 1)), every.cumsum(-1)], axis=-1)
    keys, own = np.unique(column * values.size + rank[row], return_inverse=True)
    group, score = np.divmod(keys, values.size)
    # A group's steps: up to its lowest score, that score, up to its next one, ..., above its last.
    place = 2 * np.arange(keys.size) + group + 1
    size = 2 * keys.size + num_groups
    start, stop = np.zeros(size, int), np.full(size, values.size)
    start[place], stop[place] = score, score + 1
    start[place + 1], stop[place - 1] = score + 1, score
    inside = np.zeros((2, 2, size))
    inside[..., place] = _histogram(own, keys.size, labels[row], weights[row])
    rest = np.maximum(below[..., stop] - below[..., start] - inside, 0.0)
    lengths = 2 * np.bincount(group, minlength=num_groups) + 1
    pairs = ((inside, inside), (rest, inside), (inside, rest))
    found = np.stack([_aucs(one[:, 1], two[:, 0], lengths) for one, two in pairs], 1)
    overall = _aucs(every[:, 1], every[:, 0], np.array([values.size]))
    return np.concatenate([found, np.repeat(overall[:, None], 3, 1)])


def _places(scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Of each positive the share of negatives below it, of each negative that of positives above it
    (N,); ties count one half. The mean over either is the AUC."""
    found = np.empty(scores.size)
    for part in (positive, ~positive):
        ordered = np.sort(scores[~part])
        ends = [np.searchsorted(ordered, scores[part], side) for side in ("left", "right")]
        found[part] = sum(ends) / (2 * ordered.size)
    return np.where(positive, found, 1 - found)


def _histogram(at: np.ndarray, size: int, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weights and squared weights (2, 2, size) by label of rows at these places."""
    place = at + size * labels
    sums = [np.bincount(place, weights**power, 2 * size) for power in (1, 2)]
    return np.reshape(sums, (2, 2, size))


def _aucs(positives: np.ndarray, negatives: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """AUCs and their standard errors (G, 2) from weights and squared weights (2, U) by score.

    G parts lie one after the other in U, of these lengths, each in the order of its scores.
    """
    (high, high_squares), (low, low_squares) = positives, negatives
    first = np.cumsum(lengths) - lengths

    def total(parts: np.ndarray) -> np.ndarray:
        return np.add.reduceat(parts, first)

    def placed(parts: np.ndarray, whole: np.ndarray) -> np.ndarray:
        """Share of a part's weight below each score, ties half."""
        before = np.cumsum(parts) - parts / 2
        return (before - np.repeat(before[first] - parts[first] / 2, lengths)) / np.repeat(
            whole, lengths
        )

    total_high, total_low = total(high), total(low)
    defined = (total_high > 0) & (total_low > 0)
    total_high, total_low = (np.where(defined, part, 1.0) for part in (total_high, total_low))
    beaten, beating = placed(low, total_low), 1 - placed(high, total_high)
    auc = total(high * beaten) / total_high
    middle, variance = np.repeat(auc, lengths), np.zeros(lengths.size)
    for place, whole, squares in (
        (beaten, total_high, high_squares),
        (beating, total_low, low_squares),
    ):
        effective = np.maximum(divide(whole**2, total(squares)), 1 + 1e-9)
        spread = total(squares * (place - middle) ** 2) / whole**2
        variance += spread * effective / (effective - 1)
    return np.where(defined[:, None], np.stack([auc, np.sqrt(variance)], 1), np.nan)


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
