"""One number for how far groups are apart: differences, ratios, odds, the worst group.

Rates come as arrays (..., G), NaN where a group has too few rows; such groups take no part, and
`num_defined` says how many do. Leading axes (runs, replicates of a bootstrap) are kept. A largest
minus smallest rate is above 0 even when all groups are alike, the more the smaller they are: read
it beside `permuted_gap`, and use `gap_limits`, not the percentiles of its bootstrap.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import sparse

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


class OddsNulls(NamedTuple):
    """Of TPR, of FPR, and of both: the larger gap (equalized odds difference) and their mean."""

    tpr: GapNull
    fpr: GapNull
    odds: GapNull
    odds_mean: GapNull


class Limits(NamedTuple):
    """Limits of a gap, (...); NaN with a reason."""

    low: float
    high: float
    reason: str


class Band(NamedTuple):
    """Values (F,) that limits must enclose together, their standard errors, and each resample's
    largest deviation from them in standard errors, (B,).
    """

    values: np.ndarray
    error: np.ndarray
    deviation: np.ndarray
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
    tops = overall or (None,) * len(rates)
    bands = [band(*parts, kind) for parts in zip(rates, replicates, tops)]
    return joined_limits(bands, kind, agg, level)


def band(rate: np.ndarray, replicates: np.ndarray, overall=None, kind: str = "difference") -> Band:
    """What `gap_limits` needs of one rate; the same for gaps that share it."""
    if kind not in ("difference", "ratio", "worst"):
        raise ValueError(f"kind must be 'difference', 'ratio' or 'worst', not {kind!r}")
    kept, none = ~np.isnan(rate), np.zeros(0)
    if kept.sum() < (1 if kind == "worst" else 2):
        return Band(none, none, none, f"{kept.sum()} of {kept.size} groups have enough rows")
    value, draws = rate[kept], replicates[:, kept]
    if overall is not None and kind != "worst":
        value, draws = np.append(value, overall[0]), np.column_stack([draws, overall[1]])
    if kind == "ratio":
        if (value <= 0).any() or (draws <= 0).any():
            return Band(none, none, none, "a rate of 0, here or in a resample, has no logarithm")
        value, draws = np.log(value), np.log(draws)
    away = (draws - value).T.copy()  # (F, B): sums over resamples are fast
    whole = ~np.isnan(away).any(0)  # a resample can leave a small group without rows
    if whole.sum() < 2:
        return Band(none, none, none, "no resample holds rows of every group")
    if kind == "worst":
        error = away[:, whole].std(1)
        return Band(value, error, _deviation(away, error), "")
    gaps, errors, deviation = [], [], np.zeros(len(draws))
    for i in range(value.size - 1):
        others = slice(-1, None) if overall is not None else slice(i + 1, None)
        apart = away[i] - away[others]
        variance = (apart if whole.all() else apart[:, whole]).var(1)
        error = np.sqrt(np.where(variance > 1e-15, variance, 0.0))
        gaps.append(value[i] - value[others])
        errors.append(error)
        deviation = np.maximum(deviation, _deviation(apart, error))
    return Band(np.concatenate(gaps), np.concatenate(errors), deviation, "")


def joined_limits(
    bands: Sequence[Band], kind: str, agg: str = "worst_case", level: float = 0.95
) -> Limits:
    """Limits of a gap from the bands of its one or two rates."""
    checked_level(level)
    reasons = [part.reason for part in bands if part.reason]
    if reasons:
        return Limits(np.nan, np.nan, reasons[0])
    deviation = np.max([part.deviation for part in bands], axis=0)  # NaN if either is
    critical = np.quantile(deviation[~np.isnan(deviation)], level)
    ends = [_ends(part.values, critical * part.error, kind) for part in bands]
    if len(ends) == 1:
        low, high = ends[0]
    else:
        extreme = np.minimum if kind == "ratio" else np.maximum
        low, high = (combine(pair, agg, extreme) for pair in zip(*ends))
    return Limits(float(low), float(high), "")


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
    rng = np.random.default_rng(seed)
    outcome, groups = np.asarray(outcome, bool), membership(groups)
    where = np.ones(len(groups), bool) if where is None else np.asarray(where, bool)
    found = _drawn(outcome, groups, where, minimum, num_permutations, rng)
    return _null([found], outcome.shape[:-1], np.asarray)


def permuted_odds(
    predicted, groups, positive, *, minimum: int = 1, num_permutations: int = 4000, seed: int = 0
) -> OddsNulls:
    """Gaps of predicted (..., N) bool when groups matter neither to TPR nor to FPR.

    positive: (N,) bool. Rows of membership are permuted among the positives and among the
    negatives; every permutation's two gaps are put together. Otherwise as `permuted_gap`.
    """
    predicted, groups = np.asarray(predicted, bool), membership(groups)
    streams = np.random.default_rng(seed).spawn(2)
    positive = np.asarray(positive, bool)
    one, two = (
        _drawn(predicted, groups, where, minimum, num_permutations, rng)
        for where, rng in zip((positive, ~positive), streams)
    )
    joins = [
        lambda *parts, agg=agg: combine(parts, agg, np.maximum) for agg in ("worst_case", "mean")
    ]
    chosen = [([one], np.asarray), ([two], np.asarray), *[([one, two], join) for join in joins]]
    return OddsNulls(*[_null(parts, predicted.shape[:-1], join) for parts, join in chosen])


class _Drawn(NamedTuple):
    """Gaps (R,) and their values under permutation (R, B), of one rate."""

    gaps: np.ndarray
    null: np.ndarray
    num_defined: int
    method: str
    reason: str


def _null(parts: Sequence[_Drawn], shape: tuple[int, ...], join: Callable) -> GapNull:
    """The gap that `join` makes of those of one or two rates."""
    num_defined = min(part.num_defined for part in parts)
    reasons = [part.reason for part in parts if part.reason]
    if reasons:
        blank = np.full(shape, np.nan)
        return GapNull(blank, blank, blank, num_defined, "", reasons[0])
    gaps, null = join(*[part.gaps for part in parts]), join(*[part.null for part in parts])
    p = ((null >= gaps[:, None] - 1e-9).sum(1) + 1) / (null.shape[1] + 1)
    found = (part.reshape(shape) for part in (gaps, null.mean(1), p))
    return GapNull(*found, num_defined, min(part.method for part in parts), "")


def _drawn(outcome, groups, where, minimum: int, num_permutations: int, rng) -> _Drawn:
    groups, outcome = groups[where], outcome[..., where]
    sizes = groups.sum(0)
    kept = sizes >= max(minimum, 1)
    groups, sizes = groups[:, kept], sizes[kept]
    if kept.sum() < 2:
        reason = f"{kept.sum()} of {kept.size} groups have enough rows: a gap needs two"
        return _Drawn(np.empty(0), np.empty((0, 0)), int(kept.sum()), "", reason)
    rows = groups.any(1)
    groups, runs = groups[rows], outcome[..., rows].reshape(-1, int(rows.sum()))
    members = sparse.csr_array(groups.astype(np.float64))
    gaps = np.ptp((members.T @ runs.T).T / sizes, axis=1)
    patterns, numbers = _patterns(groups)
    exact = len(patterns) <= EXACT_PATTERNS
    draw = _permutations(patterns, numbers, sizes) if exact else _normal(members, sizes)
    null = np.stack([draw(rng, int(total), num_permutations) for total in runs.sum(1)])
    method = "permutation" if exact else "normal approximation"
    return _Drawn(gaps, null, int(kept.sum()), method, "")


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


def _deviation(away: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Largest standardised deviation (B,) of each resample; away (F, B) is overwritten."""
    away *= np.divide(1.0, error, out=np.zeros_like(error), where=error > 0)[:, None]
    return np.abs(away, out=away).max(0)


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


def _patterns(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different rows of membership, and how many rows have each."""
    keys = np.packbits(groups, axis=1)
    keys = keys.view(np.dtype((np.void, keys.shape[1]))).ravel()
    _, first, numbers = np.unique(keys, return_index=True, return_counts=True)
    return groups[first], numbers


def _normal(members: sparse.csr_array, sizes) -> Callable:
    n = members.shape[0]
    covariance = (members.T @ members).toarray() / np.outer(sizes, sizes) - 1 / n
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(np.maximum(values, 0))
    kept: dict[int, np.ndarray] = {}  # the draws differ between runs by their scale alone

    def draw(rng, total, size):
        if size not in kept:
            kept[size] = np.ptp(rng.standard_normal((size, len(root))) @ root.T, axis=1)
        rate = total / n
        return kept[size] * np.sqrt(rate * (1 - rate) * n / (n - 1))

    return draw
