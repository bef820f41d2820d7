"""Calibration of groups with limits, chance values and reasons; and of two methods, compared.

Puts `calibration` together, as `subgroups` does with rates: a group with fewer than `minimum` rows
has NaN and a reason. Host numpy, float64.
"""

from typing import NamedTuple

import numpy as np
from scipy import sparse
from scipy.special import stdtr, stdtrit

from jax_lowrank.evaluation import calibration
from jax_lowrank.evaluation.intervals import (
    checked_level,
    divide,
    is_binary,
    membership,
    rows_and_seeds,
    too_few_rows,
)


class Measured(NamedTuple):
    """Calibration errors (..., G) of groups; rows (G,), reasons like error, '' where defined.

    low, high: `calibration.limits`. expected, p: `calibration.perfect`.
    """

    error: np.ndarray
    low: np.ndarray
    high: np.ndarray
    expected: np.ndarray
    p: np.ndarray
    rows: np.ndarray
    reason: np.ndarray


class Corrected(NamedTuple):
    """Errors (..., G) of norm 2 without what chance adds; rows (G,), reasons like error."""

    error: np.ndarray
    rows: np.ndarray
    reason: np.ndarray


class Difference(NamedTuple):
    """Error of a minus error of b, mean over S seeds, by group (G,); p is that of the limits.

    NaN with a reason; where both methods err alike on every resample only p is.
    """

    estimate: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray
    error: np.ndarray
    freedom: np.ndarray
    reason: np.ndarray


def measure(
    p,
    y,
    groups,
    *,
    num_bins: int = 15,
    scheme: str = "width",
    weights=None,
    norm: float = 1,
    minimum: int = 10,
    level: float = 0.95,
    seed: int = 0,
) -> Measured:
    """Errors of p (..., N) and events y (..., N) or (N,), groups (N, G); options: `bins`."""
    groups = membership(groups)
    found = calibration.bins(p, y, groups, num_bins=num_bins, scheme=scheme, weights=weights)
    limits = calibration.limits(found, norm, level=level, seed=seed)
    perfect = calibration.perfect(found, norm, seed=seed)
    error, rows = calibration.calibration_error(found, norm), groups.sum(0)
    reason = _undefined(error, rows, minimum, "weights of 0 only")
    parts = (error, limits.low, limits.high, *perfect)
    return Measured(*(np.where(reason == "", part, np.nan) for part in parts), rows, reason)


def corrected(p, y, groups, *, num_bins: int = 15, minimum: int = 10) -> Corrected:
    """`calibration.corrected_error` in bins of equal width; arguments as in `measure`."""
    groups = membership(groups)
    error = calibration.corrected_error(calibration.bins(p, y, groups, num_bins=num_bins))
    rows = groups.sum(0)
    reason = _undefined(error, rows, minimum, "no bin holds two rows")
    return Corrected(np.where(reason == "", error, np.nan), rows, reason)


def compare(
    a,
    b,
    y,
    groups,
    *,
    num_bins: int = 15,
    minimum: int = 10,
    level: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Difference:
    """Calibration error (norm 1, equal width) of a minus that of b: p of each (S, N), y (S, N).

    y: a pair of events, of a and of b, (S, N) or (N,) each. Paired: both see the same resampled
    rows and seeds; with S > 1 the variance between seeds is added (Satterthwaite's degrees of
    freedom). Chance adds about as much to both errors, so that less of it is left in the
    difference. Limits cover rows and seeds; with one seed rows only.
    """
    tail, groups = (1 + checked_level(level)) / 2, membership(groups)
    runs = [(np.atleast_2d(p), np.atleast_2d(event)) for p, event in zip((a, b), y)]
    num_seeds, num_rows = runs[0][0].shape
    if runs[1][0].shape != runs[0][0].shape or num_rows != len(groups):
        shapes = f"{runs[0][0].shape}, {runs[1][0].shape} and {groups.shape}"
        raise ValueError(f"a, b, groups must be (S, N), (S, N), (N, G), not {shapes}")
    weights = np.random.default_rng(seed).multinomial(
        num_rows, np.full(num_rows, 1 / num_rows), num_resamples
    )
    weights = np.concatenate([np.ones((1, num_rows)), weights])
    totals = weights @ groups  # (1 + B, G)
    by_method = []
    for p, event in runs:
        event = np.broadcast_to(event, p.shape)
        errors = [_errors(*run, groups, num_bins, weights) for run in zip(p, event)]
        by_method.append(
            divide(np.stack(errors), np.broadcast_to(totals, (num_seeds, *totals.shape)))
        )
    sizes = groups.sum(0)
    reason = _reasons(sizes, minimum)
    gaps = np.where(reason == "", by_method[0] - by_method[1], np.nan)  # (S, 1 + B, G)
    by_seed, rows = gaps[:, 0], _variance(gaps[:, 1:].mean(0))
    estimate, (error, freedom) = by_seed.mean(0), rows_and_seeds(by_seed, rows, num_rows)
    half = stdtrit(freedom, tail) * error
    p = 2 * stdtr(freedom, -np.abs(divide(estimate, error)))
    reason = np.where((reason == "") & ~(error > 0), "no resample differs", reason)
    return Difference(estimate, estimate - half, estimate + half, p, error, freedom, reason)


def _undefined(error: np.ndarray, rows: np.ndarray, minimum: int, why: str) -> np.ndarray:
    """Reasons like error: too few rows, or `why` where it is NaN for all that."""
    few = _reasons(rows, minimum)
    return np.where((few == "") & np.isnan(error), why, few)


def _reasons(rows: np.ndarray, minimum: int) -> np.ndarray:
    if minimum < 1:
        raise ValueError(f"minimum must be at least 1 row, not {minimum}")
    return too_few_rows(rows, minimum)


def _variance(draws: np.ndarray) -> np.ndarray:
    """Over the draws (B, G) that hold rows of the group; NaN without any."""
    known = ~np.isnan(draws)
    mean = divide(np.where(known, draws, 0.0).sum(0), known.sum(0))
    return divide(np.where(known, (draws - mean) ** 2, 0.0).sum(0), known.sum(0))


def _errors(p, y, groups, num_bins: int, weights) -> np.ndarray:
    """Summed |excess| over the bins of every group under weights (B, N): (B, G)."""
    if not is_binary(y):
        raise ValueError("y must be 0 or 1: whether the event that p speaks of happened")
    row, column = np.nonzero(groups)
    index = calibration.equal_width(calibration.checked_probabilities(p), num_bins)
    place = column * num_bins + index[row]
    shape = (len(groups), groups.shape[1] * num_bins)
    excess = sparse.csr_array(((y - p)[row], (row, place)), shape=shape)
    return np.abs(weights @ excess).reshape(len(weights), -1, num_bins).sum(-1)
