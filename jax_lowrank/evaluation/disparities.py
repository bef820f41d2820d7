"""One number for how far groups are apart: differences, ratios, odds, the worst group.

Rates come as arrays (..., G), NaN where a group has too few rows; such groups take no part, and
`num_defined` says how many do. Leading axes (runs, replicates of a bootstrap) are kept. A largest
minus smallest rate is above 0 even when all groups are alike, the more the smaller they are: read
it beside `permuted_gap`, and use `gap_limits`, not the percentiles of its bootstrap.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jax_lowrank.evaluation.intervals import checked_level, divide, membership

EXACT_PATTERNS = 64  # patterns of membership up to which a permutation is drawn exactly


class GapNull(NamedTuple):
    """What a gap is when groups do not matter: arrays (...) over the leading axes of the outcome.

    gap: the observed one; p: in (0, 1], the share of permutations with a gap as large; num_defined:
    groups with enough rows; method: 'permutation' or 'normal approximation'.
    """

    gap: np.ndarray
    null_mean: np.ndarray
    p: np.ndarray
    num_defined: int
    method: str
    reason: str


class Limits(NamedTuple):
    """Limits of a gap, (...); NaN with a reason."""

    low: float
    high: float
    reason: str


def num_defined(rates) -> np.ndarray:
    """How many groups have a rate, (...)."""
    return (~np.isnan(np.asarray(rates, np.float64))).sum(-1)


def difference(rates, overall=None, compat: str | None = None) -> np.ndarray:
    """Largest minus smallest rate (...); with `overall` (...) the largest |rate - overall|.

    0 = alike. Of selection rates it is the demographic parity difference, of true positive rates
    the equal opportunity difference. Fewer than two groups: NaN, with compat='fairlearn' 0.
    """
    rates = np.asarray(rates, np.float64)
    if overall is None:
        found = _largest(rates) - _smallest(rates)
    else:
        found = _largest(np.abs(rates - np.asarray(overall, np.float64)[..., None]))
    return _of_two(found, rates, compat)


def ratio(rates, overall=None, compat: str | None = None) -> np.ndarray:
    """Smallest over largest rate; with `overall` the smallest of rate / overall and its inverse.

    In [0, 1], 1 = alike; 0 / 0 is NaN. Otherwise as `difference`.
    """
    rates = np.asarray(rates, np.float64)
    if overall is None:
        found = divide(_smallest(rates), _largest(rates))
    else:
        overall = np.broadcast_to(np.asarray(overall, np.float64)[..., None], rates.shape)
        found = _smallest(divide(np.minimum(rates, overall), np.maximum(rates, overall)))
    return _of_two(found, rates, compat)


def worst(rates) -> np.ndarray:
    """The smallest rate among groups that have one, (...)."""
    return _smallest(np.asarray(rates, np.float64))


def equalized_odds_difference(tpr, fpr, agg: str = "worst_case", overall=None, compat=None):
    """The larger ('worst_case') or the mean ('mean') of the differences of TPR and FPR, (...).

    overall: a pair (TPR, FPR) of all rows for the difference to them. NaN if either is.
    """
    tops = overall or (None, None)
    parts = [difference(rate, top, compat) for rate, top in zip((tpr, fpr), tops)]
    return combine(parts, agg, np.maximum)


def equalized_odds_ratio(tpr, fpr, agg: str = "worst_case", overall=None, compat=None):
    """The smaller or the mean of the ratios of TPR and FPR; as `equalized_odds_difference`."""
    tops = overall or (None, None)
    parts = [ratio(rate, top, compat) for rate, top in zip((tpr, fpr), tops)]
    return combine(parts, agg, np.minimum)


def combine(parts: Sequence[np.ndarray], agg: str, extreme: Callable) -> np.ndarray:
    """`extreme` of two parts for 'worst_case', their mean for 'mean'."""
    if agg == "worst_case":
        return extreme(*parts)
    if agg == "mean":
        return (parts[0] + parts[1]) / 2
    raise ValueError(f"agg must be 'worst_case' or 'mean', not {agg!r}")


def average_odds_difference(tpr, fpr, other_tpr, other_fpr) -> np.ndarray:
    """Half of (FPR - other FPR) + (TPR - other TPR), element by element, signed.

    The two can cancel: 0 does not say that the odds are equal. `average_odds_error` cannot.
    """
    return (np.subtract(fpr, other_fpr) + np.subtract(tpr, other_tpr)) / 2


def average_odds_error(tpr, fpr, other_tpr, other_fpr) -> np.ndarray:
    """Half of |FPR - other FPR| + |TPR - other TPR|, element by element; 0 = equal odds."""
    return (np.abs(np.subtract(fpr, other_fpr)) + np.abs(np.subtract(tpr, other_tpr))) / 2


def gap_limits(
    rates: Sequence[np.ndarray],
    replicates: Sequence[np.ndarray],
    kind: str = "difference",
    agg: str = "worst_case",
    overall=None,
    level: float = 0.95,
) -> Limits:
    """Limits of a difference, ratio or worst rate from a bootstrap of the rates themselves.

    rates: one or two arrays (G,); replicates: (B, G) each. overall: per rate its value and its
    replicates (B,), for gaps to the overall rate. All differences between two groups (or between a
    group and the overall rate) get limits that hold together: estimate ± c standard errors, c the
    `level` quantile of the largest standardised deviation. The largest lower and the largest upper
    limit then enclose the gap with at least that probability, also where percentiles do not: at 0,
    which the limits can reach. Ratios do so on the logarithmic scale, and have no limits where a
    resample has a rate of 0. A rate of 0 or 1 does not vary between resamples, so limits that rest
    on it are narrow.
    """
    if kind not in ("difference", "ratio", "worst"):
        raise ValueError(f"kind must be 'difference', 'ratio' or 'worst', not {kind!r}")
    checked_level(level)
    families = []
    for i, (rate, draws) in enumerate(zip(rates, replicates)):
        kept = ~np.isnan(rate)
        if kept.sum() < (1 if kind == "worst" else 2):
            return Limits(np.nan, np.nan, f"{kept.sum()} of {kept.size} groups have enough rows")
        pair = (rate[kept], draws[:, kept])
        if kind == "ratio":
            if (pair[0] <= 0).any() or (pair[1] <= 0).any():
                return Limits(
                    np.nan, np.nan, "a rate of 0, here or in a resample, has no logarithm"
                )
            pair = tuple(np.log(part) for part in pair)
        top = None if overall is None else overall[i]
        families.append(_family(*pair, top, kind))
    return _joined(families, kind, agg, level)


def permuted_gap(
    outcome, groups, where=None, *, minimum: int = 1, num_permutations: int = 4000, seed: int = 0
) -> GapNull:
    """Gap of group means of outcome (..., N) bool against its value when groups do not matter.

    where: (N,) bool, the rows that count (positives for the true positive rate); None: all. Groups
    with fewer than `minimum` of them, and rows in no group left, take no part. Rows of membership
    are permuted; exactly, from counts, up to 64 different rows of membership, else group means are
    drawn from the normal distribution with the permutation's mean and covariance. No clusters and
    no weights: see `comparisons.gap_permutation`. p = (hits + 1) / (permutations + 1).
    """
    groups = membership(groups)
    outcome = np.asarray(outcome, bool)
    if where is not None:
        groups, outcome = groups[where], outcome[..., where]
    sizes = groups.sum(0)
    kept = sizes >= max(minimum, 1)
    groups, sizes = groups[:, kept], sizes[kept]
    rows = groups.any(1)
    groups, runs = groups[rows], outcome[..., rows].reshape(-1, int(rows.sum()))
    shape = outcome.shape[:-1]
    if kept.sum() < 2:
        blank = np.full(shape, np.nan)
        reason = f"{kept.sum()} of {kept.size} groups have enough rows: a gap needs two"
        return GapNull(blank, blank, blank, int(kept.sum()), "", reason)
    gaps = np.ptp(runs @ groups.astype(np.float64) / sizes, axis=1)
    patterns, numbers = np.unique(groups, axis=0, return_counts=True)
    rng, totals = np.random.default_rng(seed), runs.sum(1)
    exact = len(patterns) <= EXACT_PATTERNS
    draw = _permutations(patterns, numbers, sizes) if exact else _normal(groups, sizes)
    means, hits = np.empty(len(runs)), np.empty(len(runs))
    for run, total in enumerate(totals):
        null = draw(rng, int(total), num_permutations)
        means[run], hits[run] = null.mean(), (null >= gaps[run] - 1e-9).sum()
    p = (hits + 1) / (num_permutations + 1)
    method = "permutation" if exact else "normal approximation"
    found = (part.reshape(shape) for part in (gaps, means, p))
    return GapNull(*found, int(kept.sum()), method, "")


def _largest(rates: np.ndarray) -> np.ndarray:
    found = np.max(rates, axis=-1, where=~np.isnan(rates), initial=-np.inf)
    return np.where(np.isinf(found), np.nan, found)


def _smallest(rates: np.ndarray) -> np.ndarray:
    found = np.min(rates, axis=-1, where=~np.isnan(rates), initial=np.inf)
    return np.where(np.isinf(found), np.nan, found)


def _of_two(found, rates, compat) -> np.ndarray:
    if compat not in (None, "fairlearn"):
        raise ValueError(f"compat must be None or 'fairlearn', not {compat!r}")
    if compat:
        return found
    return np.where(num_defined(rates) < 2, np.nan, found)


def _family(rates, replicates, overall, kind) -> tuple[np.ndarray, np.ndarray]:
    """What must be enclosed together: values (F,) and their replicates (B, F)."""
    if kind == "worst":
        return rates, replicates
    if overall is not None:
        value, draws = (np.asarray(part, np.float64) for part in overall)
        if kind == "ratio":
            value, draws = np.log(value), np.log(draws)
        return rates - value, replicates - draws[:, None]
    one, two = np.triu_indices(rates.size, 1)
    return rates[one] - rates[two], replicates[:, one] - replicates[:, two]


def _joined(families, kind: str, agg: str, level: float) -> Limits:
    values = np.concatenate([value for value, _ in families])
    draws = np.concatenate([draw for _, draw in families], axis=1)
    draws = draws[~np.isnan(draws).any(1)]  # a resample can leave a small group without rows
    if len(draws) < 2:
        return Limits(np.nan, np.nan, "no resample holds rows of every group")
    error = draws.std(0)
    away = np.abs(draws - values)
    deviation = np.max(np.divide(away, error, out=np.zeros_like(away), where=error > 0), axis=1)
    half = np.quantile(deviation, level) * error
    cuts = np.cumsum([value.size for value, _ in families])[:-1]
    parts = zip(np.split(values, cuts), np.split(half, cuts))
    ends = [_ends(value, width, kind) for value, width in parts]
    if len(ends) == 1:
        low, high = ends[0]
    else:
        extreme = np.minimum if kind == "ratio" else np.maximum
        low, high = (combine(pair, agg, extreme) for pair in zip(*ends))
    return Limits(float(low), float(high), "")


def _ends(values: np.ndarray, half: np.ndarray, kind: str) -> tuple[float, float]:
    if kind == "worst":
        return max(0.0, (values - half).min()), min(1.0, (values + half).min())
    low, high = max(0.0, (np.abs(values) - half).max()), (np.abs(values) + half).max()
    if kind == "ratio":
        return np.exp(-high), np.exp(-low)
    return low, min(1.0, high)


def _permutations(patterns, numbers, sizes) -> Callable:
    def draw(rng, total, size):
        hits = rng.multivariate_hypergeometric(numbers, total, size, method="marginals")
        return np.ptp(hits @ patterns.astype(np.float64) / sizes, axis=1)

    return draw


def _normal(groups, sizes) -> Callable:
    n = len(groups)
    members = groups.astype(np.float64)
    covariance = (members.T @ members) / np.outer(sizes, sizes) - 1 / n
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(np.maximum(values, 0))
    kept: dict[int, np.ndarray] = {}  # the draws differ between runs by their scale alone

    def draw(rng, total, size):
        if size not in kept:
            kept[size] = np.ptp(rng.standard_normal((size, len(root))) @ root.T, axis=1)
        rate = total / n
        return kept[size] * np.sqrt(rate * (1 - rate) * n / (n - 1))

    return draw
