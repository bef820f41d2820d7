"""Comparisons and their p-values: paired effects, gaps between groups, many tests at once.

Host statistics in numpy, float64. Seeds are axis 0, items (prompts) the last axis; `clusters` as in
`intervals`. p-values are two-sided, in (0, 1].
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr, stdtr, stdtrit

from jax_lowrank.evaluation import intervals

EXACT_CLUSTERS = 14  # 2**13 sign patterns up to a global sign: as cheap as a Monte-Carlo run


class Difference(NamedTuple):
    """A paired effect: `n` items in `num_clusters` clusters under `num_seeds` seeds.

    `p` speaks of these seeds only, `p_new_seeds` of seeds like them (see `paired_difference`).
    `num_missing` (seed, item) pairs were left out. `reason` says why a number is NaN, `note` what a
    reader must know about numbers that are defined. `error` and `freedom` are for `equivalence`.
    """

    estimate: float
    low: float
    high: float
    p: float
    p_new_seeds: float
    n: int
    num_clusters: int
    num_seeds: int
    num_missing: int
    reason: str
    note: str
    error: float = np.nan
    freedom: float = np.nan


class Equivalence(NamedTuple):
    """Two one-sided tests: `p` < 0.05 says that the effect lies within +-margin, at level 5 %.

    p is the larger of p_low (effect <= -margin) and p_high (effect >= margin).
    """

    p: float
    p_low: float
    p_high: float
    margin: float
    reason: str


class Gap(NamedTuple):
    """Largest minus smallest group mean of `n` rows, against its value when groups do not matter.

    `rates` and `counts` are (G,), of odds (2, G) for positives and negatives; a group without rows
    has a NaN rate and takes no part.
    """

    gap: float
    null_mean: float
    p: float
    rates: np.ndarray
    counts: np.ndarray
    num_defined: int
    n: int
    num_clusters: int
    num_missing: int
    num_permutations: int
    reason: str


def paired_difference(
    a,
    b,
    clusters: Sequence | None = None,
    level: float = 0.95,
    num_resamples: int = 4000,
    seed: int = 0,
    method: str = "percentile",
) -> Difference:
    """Mean of a - b over the same S seeds and N items: a (S, N), b (S, N) or (1, N); 0 = no effect.

    Average over samples of a prompt first. Pairs with a NaN on either side are left out, counted.

    Interval: seeds *and* clusters are drawn with replacement, one fewer than there are, so that the
    replicates' variance matches the unbiased one (Rao and Wu, JASA 83, 1988; both ways at once is
    slightly wide: Owen, Ann. Appl. Stat. 1, 2007). It covers new prompts and new seeds.
    'percentile' takes quantiles, which with few seeds cannot pass the extreme seeds and cover too
    rarely when seeds differ much (83 % instead of 95 % with seeds as below); 't' is the estimate ±
    the replicates' standard deviation times a t quantile with Satterthwaite's degrees of freedom
    (95 % there). With S = 1 nothing covers the seed: `note` says so.

    p: two-sided sign flips of whole clusters, exact up to 14 clusters, else (hits + 1) /
    (draws + 1). Its null is that each cluster's difference is symmetric around 0 *for these seeds*:
    a difference that only these seeds have is rejected too (61 % of the time at level 5 % with 3
    seeds that differ twice as much as templates do, in a simulation). p_new_seeds is the p-value of
    the 't' interval, which counts the seeds' variance; NaN with one seed. ValueError on shapes that
    do not match or infinite values.
    """
    a, b = (np.atleast_2d(np.asarray(x, np.float64)) for x in (a, b))
    if a.shape != b.shape and b.shape != (1, a.shape[1]):
        raise ValueError(f"a and b must be paired (S, N) arrays, not {a.shape} and {b.shape}")
    return _effect(a - b, clusters, level, num_resamples, seed, method)


def versus_rest(values, inside, level: float = 0.95) -> Difference:
    """Mean of values (S, N) among the rows `inside` (N,) minus that of all others; 0 = alike.

    Rows are independent (the rows' means over seeds, variances apart: Welch), seeds add their own
    variance where there are several; Student's t with Satterthwaite's degrees of freedom. p is that
    of the interval, for these seeds or, with several, for new ones (p_new_seeds).
    """
    values, inside = np.atleast_2d(np.asarray(values, np.float64)), np.asarray(inside, bool)
    tail = (1 + intervals.checked_level(level)) / 2
    sides = [values[:, inside], values[:, ~inside]]
    seeds, sizes = len(values), [side.shape[1] for side in sides]
    facts = (values.shape[1], values.shape[1], seeds, 0)
    if min(sizes) < 2:
        reason = f"{sizes[0]} rows inside, {sizes[1]} outside: each side needs two"
        return Difference(*[np.nan] * 5, *facts, reason, "")
    by_seed = sides[0].mean(1) - sides[1].mean(1)
    parts = [(side.mean(0).var(ddof=1) / n, n - 1) for side, n in zip(sides, sizes)]
    if seeds > 1:
        parts.append((by_seed.var(ddof=1) / seeds, seeds - 1))
    variance = sum(part for part, _ in parts)
    if not variance > 0:
        reason = "no row differs from the others: no interval can be read off them"
        return Difference(float(by_seed.mean()), *[np.nan] * 4, *facts, reason, "")
    freedom = float(variance**2 / sum(part**2 / f for part, f in parts))
    estimate, error = float(by_seed.mean()), float(np.sqrt(variance))
    half = float(stdtrit(freedom, tail)) * error
    p = 2 * float(stdtr(freedom, -abs(estimate) / error))
    new = p if seeds > 1 else np.nan
    ends = (estimate - half, estimate + half)
    return Difference(estimate, *ends, p, new, *facts, "", "", error, freedom)


def slope(
    values,
    x,
    clusters: Sequence | None = None,
    level: float = 0.95,
    num_resamples: int = 4000,
    seed: int = 0,
    method: str = "percentile",
) -> Difference:
    """Least-squares slope of the mean of values (S, R, N) against x (R,), per unit of x; 0 = flat.

    The slope of a mean is the mean of the slopes, so every (seed, item) gives one slope and the
    rest is `paired_difference` on them: the same interval, and sign flips of whole clusters' slopes
    for p (null: each cluster's slope is symmetric around 0 for these seeds). A (seed, item) with a
    NaN at any x is left out. Fewer than two distinct x give NaN with a reason.
    """
    values, x = np.asarray(values, np.float64), np.asarray(x, np.float64)
    if values.ndim != 3 or x.shape != values.shape[1:2]:
        raise ValueError(f"values must be (S, R, N) and x (R,), not {values.shape} and {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError(f"x must be finite, not {x}")
    if np.unique(x).size < 2:
        seeds, _, items = values.shape
        reason = "a slope needs two distinct x"
        units = np.unique(intervals.cluster_index(clusters, items)).size
        return Difference(*[np.nan] * 5, items, units, seeds, 0, reason, "")
    weights = (x - x.mean()) / np.sum((x - x.mean()) ** 2)
    slopes = np.einsum("r,srn->sn", weights, values)
    return _effect(slopes, clusters, level, num_resamples, seed, method)


def gap_permutation(
    outcome,
    groups,
    clusters: Sequence | None = None,
    num_permutations: int = 4000,
    seed: int = 0,
) -> Gap:
    """Largest minus smallest group mean of outcome (N,) over groups (N, G) bool; 0 = equal means.

    outcome (S, N), under S seeds: the mean of the seeds' gaps, which the same permutation moves.
    An observed gap is above 0 even when all groups are alike, so read it against `null_mean`, the
    mean gap when rows of membership are permuted, and `p` = (hits + 1) / (permutations + 1). With
    `clusters` (templates crossed with groups) rows are permuted within their cluster only, so what
    the template explains stays in place; one row should be one prompt (average its completions).
    Rows in no group or with a NaN outcome are left out (the latter counted). Fewer than two groups
    with rows, or no cluster that holds rows of different membership: NaN with a reason.
    """
    outcome, groups = _by_seed(outcome, groups)
    index = np.zeros(len(groups), int)
    if clusters is not None:
        index = intervals.cluster_index(clusters, len(groups))
    unknown = np.isnan(outcome).any(0)
    kept = ~unknown & groups.any(1)
    missing = int((unknown & groups.any(1)).sum())
    order = np.flatnonzero(kept)[np.argsort(index[kept], kind="stable")]
    values, members, index = outcome[:, order], groups[order].astype(np.float64), index[order]
    counts = members.sum(0)
    defined = counts > 0
    rates = intervals.divide(values.mean(0) @ members, counts)
    facts = (rates, counts.astype(int), int(defined.sum()), order.size, np.unique(index).size)
    if defined.sum() < 2:
        reason = f"{defined.sum()} of {defined.size} groups have rows: a gap needs two"
        return Gap(np.nan, np.nan, np.nan, *facts, missing, num_permutations, reason)
    weights = members[:, defined] / counts[defined]
    gap = float(np.ptp(values @ weights, axis=1).mean())
    changes = np.any(members[1:] != members[:-1], axis=1) & (index[1:] == index[:-1])
    if not changes.any():
        reason = "no cluster holds rows of different groups: nothing to permute"
        return Gap(gap, np.nan, np.nan, *facts, missing, num_permutations, reason)
    rng = np.random.default_rng(seed)
    null = _permuted_gaps(values, weights, index, num_permutations, rng).mean(0)
    hits = np.sum(null >= gap - 1e-9 * max(1.0, np.abs(rates[defined]).max()))
    p = float((hits + 1) / (num_permutations + 1))
    return Gap(gap, float(null.mean()), p, *facts, missing, num_permutations, "")


def odds_gap_permutation(
    predicted, groups, positive, minimum: int = 1, num_permutations: int = 4000, seed: int = 0
) -> Gap:
    """Equalized odds difference of predicted (S, N) or (N,) bool against chance; 0 = equal odds.

    The larger of the gaps of true and false positive rates, mean over S seeds; positive: (N,) bool.
    Rows of membership are permuted within positives and within negatives. Groups with fewer than
    `minimum` of either have no part in that rate. Otherwise as `gap_permutation`.
    """
    predicted, groups = _by_seed(predicted, groups)
    positive, rng = np.asarray(positive, bool), np.random.default_rng(seed)
    gaps, nulls, rates, counts = [], [], [], []
    for where in (positive & groups.any(1), ~positive & groups.any(1)):
        values, members = predicted[:, where], groups[where].astype(np.float64)
        counts.append(members.sum(0))
        enough = counts[-1] >= max(minimum, 1)
        rates.append(
            np.where(enough, intervals.divide(values.mean(0) @ members, counts[-1]), np.nan)
        )
        if enough.sum() < 2:
            continue
        weights, index = members[:, enough] / counts[-1][enough], np.zeros(len(members), int)
        gaps.append(np.ptp(values @ weights, axis=1))
        nulls.append(_permuted_gaps(values, weights, index, num_permutations, rng))
    defined = int((~np.isnan(rates)).sum(1).min())
    size = int(groups.any(1).sum())
    facts = (np.array(rates), np.array(counts, int), defined, size, size, 0, num_permutations)
    if defined < 2:
        reason = f"{defined} of {groups.shape[1]} groups have enough rows: a gap needs two"
        return Gap(np.nan, np.nan, np.nan, *facts, reason)
    gap, null = float(np.maximum(*gaps).mean()), np.maximum(*nulls).mean(0)
    p = (np.sum(null >= gap - 1e-9) + 1) / (num_permutations + 1)
    return Gap(gap, float(null.mean()), float(p), *facts, "")


def equivalence(estimate: float, error: float, margin: float, freedom=np.inf) -> Equivalence:
    """Is the effect smaller than `margin` in size? Not 'is there no effect', which no test shows.

    error: standard error of the estimate; freedom: of Student's t, inf for the normal: both are
    fields of a `Difference`. margin > 0, fixed before looking, in the unit of the estimate. p < a
    says the same as a 1 - 2a interval within the margin. Schuirmann (1987).
    """
    if not margin > 0:
        raise ValueError(f"margin must be above 0, in the unit of the effect, not {margin}")
    if np.isnan(estimate) or not error > 0:
        return Equivalence(np.nan, np.nan, np.nan, margin, "the effect has no standard error")
    lower, upper = ((sign * estimate + margin) / error for sign in (1, -1))
    normal = np.isinf(freedom)
    p_low, p_high = (float(ndtr(-t) if normal else stdtr(freedom, -t)) for t in (lower, upper))
    return Equivalence(max(p_low, p_high), p_low, p_high, margin, "")


def holm(p) -> np.ndarray:
    """Holm's adjusted p-values: family-wise error; NaN stays NaN and is not a test.

    p of any shape (say groups, metrics, methods) is one family of tests. For a few primary claims.
    Holm, Scand. J. Statist. 6 (1979).
    """
    return _adjusted(p, lambda ranked, m: np.maximum.accumulate(ranked * (m - np.arange(m))))


def benjamini_hochberg(p) -> np.ndarray:
    """Benjamini-Hochberg adjusted p-values: false discovery rate; NaN stays and is no test.

    p of any shape is one family. For exploratory grids. Benjamini and Hochberg, J. R. Stat. Soc. B
    57 (1995).
    """

    def step_up(ranked, m):
        return np.minimum.accumulate((ranked * m / np.arange(1, m + 1))[::-1])[::-1]

    return _adjusted(p, step_up)


def _by_seed(outcome, groups) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes (S, N) as floats and groups (N, G) as bool."""
    outcome = np.atleast_2d(np.asarray(outcome, np.float64))
    groups = intervals.membership(groups)
    if outcome.ndim != 2 or outcome.shape[1:] != groups.shape[:1]:
        raise ValueError(f"outcome {outcome.shape} must name each row of groups {groups.shape}")
    return outcome, groups


def _permuted_gaps(values, weights, index, num_permutations, rng) -> np.ndarray:
    """Gaps (S, B) of values (S, N) shuffled within clusters, all seeds alike.

    `index` is sorted, weights (N, G) average.
    """
    gaps = np.empty((len(values), num_permutations))
    step = max(1, intervals.CHUNK // values.size)
    for start in range(0, num_permutations, step):
        size = min(step, num_permutations - start)
        order = np.argsort(index + rng.random((size, values.shape[1])), axis=1)
        gaps[:, start : start + size] = np.ptp(values[:, order] @ weights, axis=2)
    return gaps


def _adjusted(p, rule) -> np.ndarray:
    shape, p = np.shape(p), np.ravel(np.asarray(p, np.float64))
    if np.any((p < 0) | (p > 1)):
        raise ValueError(f"p must be values in [0, 1] or NaN, not {p}")
    tests = np.flatnonzero(~np.isnan(p))
    order = tests[np.argsort(p[tests], kind="stable")]
    adjusted = np.full(p.shape, np.nan)
    adjusted[order] = np.minimum(rule(p[order], order.size), 1.0)
    return adjusted.reshape(shape)


def _effect(values, clusters, level, num_resamples, seed, method) -> Difference:
    if method not in ("percentile", "t"):
        raise ValueError(f"method must be 'percentile' or 't', not {method!r}")
    tail = (1 - intervals.checked_level(level)) / 2
    sums, counts = intervals.cluster_tables(values, clusters)
    num_seeds, num_clusters = sums.shape
    missing = np.isnan(values)
    facts = (int((~missing).any(0).sum()), num_clusters, num_seeds, int(missing.sum()))
    estimate, note = intervals.pooled_mean(sums, counts), _note(num_seeds, num_clusters, method)
    if num_clusters < 2:
        return Difference(estimate, *[np.nan] * 4, *facts, intervals.too_few(num_clusters), note)
    p = _sign_flip_p(sums.sum(0), num_resamples, seed)
    replicates = intervals.divide(*intervals.resampled_totals((sums, counts), num_resamples, seed))
    if intervals.is_constant(replicates):
        reason = "every pair differs by the same amount: no interval can be read off them"
        return Difference(estimate, np.nan, np.nan, p, np.nan, *facts, reason, note)
    error, freedom = np.nanstd(replicates), _satterthwaite(sums, counts, estimate)
    if method == "percentile":
        low, high = np.nanquantile(replicates, [tail, 1 - tail])
    else:
        half = stdtrit(freedom, 1 - tail) * error
        low, high = estimate - half, estimate + half
    two_sided = 2 * float(stdtr(freedom, -abs(estimate) / error))
    p_new_seeds = two_sided if num_seeds > 1 else np.nan
    spread = (float(error), freedom)
    return Difference(estimate, float(low), float(high), p, p_new_seeds, *facts, "", note, *spread)


def _note(num_seeds: int, num_clusters: int, method: str) -> str:
    seeds = intervals.seed_note(num_seeds) if method == "percentile" or num_seeds == 1 else ""
    few = 1 < num_clusters < 6
    clusters = f"{num_clusters} clusters: p cannot go below {2.0 ** (1 - num_clusters):g}"
    return "; ".join(note for note in (seeds, clusters if few else "") if note)


def _satterthwaite(sums: np.ndarray, counts: np.ndarray, estimate: float) -> float:
    """Degrees of freedom of the sum of the seeds' and the clusters' variance of the mean."""
    parts = []
    for axis in (1, 0) if sums.shape[0] > 1 else (0,):
        residuals = (sums - estimate * counts).sum(axis)
        units = residuals.size
        parts.append((units / (units - 1) * np.sum(residuals**2), units - 1))
    total = sum(variance for variance, _ in parts)
    return float(total**2 / sum(variance**2 / freedom for variance, freedom in parts))


def _sign_flip_p(totals: np.ndarray, num_resamples: int, seed: int) -> float:
    """Two-sided p of |sum of totals| when each total's sign is a fair coin."""
    size = totals.size
    bar = abs(totals.sum()) - 1e-12 * np.abs(totals).sum()  # a tie is a hit despite rounding
    if size <= EXACT_CLUSTERS:
        bits = np.arange(2 ** (size - 1))[:, None] >> np.arange(size) & 1  # last sign stays +
        return float(np.mean(np.abs((1 - 2 * bits) @ totals) >= bar))
    rng, hits, step = np.random.default_rng(seed), 0, max(1, intervals.CHUNK // size)
    for start in range(0, num_resamples, step):
        shape = (min(step, num_resamples - start), size)
        hits += np.sum(np.abs((1 - 2 * rng.integers(0, 2, shape)) @ totals) >= bar)
    return float((hits + 1) / (num_resamples + 1))
