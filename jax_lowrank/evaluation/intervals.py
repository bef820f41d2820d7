"""Intervals: binomial rates, the bootstrap by cluster, and ratios of means.

Host statistics in numpy, float64. Seeds are axis 0 and items (prompts) the last axis; `clusters`
names the cluster of each item, e.g. its template (items of one template are not independent); None
makes each item its own cluster. Rates are in [0, 1]; limits are two-sided at `level`.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from scipy.special import betaincinv, ndtr, ndtri

CHUNK = 4_000_000  # numbers held at once while resampling, 32 MB


class Interval(NamedTuple):
    """An estimate and its limits from `n` values in `num_clusters` clusters; NaN with a reason.

    `num_missing` values were NaN and left out. Fields are scalars, or arrays (and a tuple of
    reasons) when the inputs were arrays.
    """

    estimate: float | np.ndarray
    low: float | np.ndarray
    high: float | np.ndarray
    n: int | np.ndarray
    num_clusters: int | np.ndarray
    num_missing: int
    reason: str | tuple[str, ...]


class RateDifference(NamedTuple):
    """successes1 / n1 - successes2 / n2 of two independent samples, with limits."""

    estimate: float
    low: float
    high: float
    n1: int
    n2: int
    reason: str


class Ratio(NamedTuple):
    """A ratio of two means over the same (seed, item) pairs, and its denominator's interval."""

    estimate: float
    low: float
    high: float
    numerator: float
    denominator: float
    denominator_low: float
    denominator_high: float
    n: int
    num_clusters: int
    num_seeds: int
    num_missing: int
    reason: str
    note: str


def wilson(successes, n, level: float = 0.95) -> Interval:
    """Wilson score interval of a binomial rate; scalars or 1-D arrays of counts.

    Assumes independent trials (use `bootstrap` with clusters for several completions of a prompt).
    n = 0 gives NaN with a reason. ValueError unless 0 <= successes <= n and 0 < level < 1.
    Wilson, J. Am. Stat. Assoc. 22 (1927).
    """
    successes, n, rate = _counts(successes, n)
    z = ndtri(0.5 + checked_level(level) / 2)
    size = np.where(n > 0, n, np.nan)
    middle = (rate + z**2 / (2 * size)) / (1 + z**2 / size)
    half = z / (1 + z**2 / size) * np.sqrt(rate * (1 - rate) / size + z**2 / (4 * size**2))
    low = np.where(successes == 0, middle * 0, middle - half)  # exact ends; NaN stays NaN
    high = np.where(successes == n, middle * 0 + 1, middle + half)
    return _rate_interval(rate, low, high, n)


def clopper_pearson(successes, n, level: float = 0.95) -> Interval:
    """Exact interval of a binomial rate (covers at least `level`); arguments as in `wilson`.

    Clopper and Pearson, Biometrika 26 (1934).
    """
    successes, n, rate = _counts(successes, n)
    tail = (1 - checked_level(level)) / 2
    inner_low, inner_high = np.maximum(successes, 1), np.minimum(successes, n - 1)
    low = betaincinv(inner_low, np.maximum(n - inner_low + 1, 1), tail)
    high = betaincinv(np.maximum(inner_high + 1, 1), np.maximum(n - inner_high, 1), 1 - tail)
    low = np.where(successes == 0, 0.0, low)
    high = np.where(successes == n, 1.0, high)
    empty = np.where(n > 0, 0.0, np.nan)
    return _rate_interval(rate, low + empty, high + empty, n)


def newcombe(successes1, n1, successes2, n2, level: float = 0.95) -> RateDifference:
    """Interval of the difference p1 - p2 of two *independent* samples, in [-1, 1].

    Method 10 of Newcombe, Statistics in Medicine 17 (1998): Wilson limits combined. For the same
    prompts under two models use `comparisons.paired_difference`.
    """
    one, two = wilson(successes1, n1, level), wilson(successes2, n2, level)
    gap = one.estimate - two.estimate
    low = gap - np.hypot(one.estimate - one.low, two.high - two.estimate)
    high = gap + np.hypot(one.high - one.estimate, two.estimate - two.low)
    return RateDifference(
        float(gap), float(low), float(high), one.n, two.n, one.reason or two.reason
    )


def bootstrap(
    values,
    statistic: Callable[[np.ndarray], float] | None = None,
    clusters: Sequence | None = None,
    method: str = "percentile",
    num_resamples: int = 4000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of a statistic (the mean by default) of values (N,) or (S, N).

    Whole clusters are drawn with replacement. With S > 1 rows, seeds are drawn as well (the mean
    only, percentile only), as in
    `comparisons.paired_difference`. 'percentile' takes quantiles of the
    replicates; 'bca' corrects them for bias and skewness with a jackknife over clusters (Efron, J.
    Am. Stat. Assoc. 82, 1987). A `statistic` takes a 1-D array and is called once per replicate.
    NaN values are left out and counted. Fewer than two clusters, or no variation between resamples,
    give NaN limits with a reason: a bootstrap sees no variance there. Not for max-min gaps, which
    are biased upwards: see `comparisons.gap_permutation`.
    """
    if method not in ("percentile", "bca"):
        raise ValueError(f"method must be 'percentile' or 'bca', not {method!r}")
    data = np.atleast_2d(np.asarray(values, np.float64))
    if data.shape[0] > 1 and (statistic is not None or method == "bca"):
        raise ValueError("several rows (seeds) allow only the mean with method='percentile'")
    tail = (1 - checked_level(level)) / 2
    sums, counts = cluster_tables(data, clusters)
    num_clusters = sums.shape[1]
    facts = (int(counts.sum()), num_clusters, int(np.isnan(data).sum()))
    if statistic is None:
        estimate, jackknife = pooled_mean(sums, counts), _mean_without_each(sums, counts)
    else:
        estimate, jackknife = _statistic_and_jackknife(data[0], clusters, statistic)
    if num_clusters < 2:
        return Interval(estimate, np.nan, np.nan, *facts, too_few(num_clusters))
    if statistic is None:
        replicates = divide(*resampled_totals((sums, counts), num_resamples, seed))
    else:
        replicates = _statistic_replicates(data[0], clusters, statistic, num_resamples, seed)
    tails = np.array([tail, 1 - tail])
    if method == "bca":
        tails = _bca_tails(tails, replicates, estimate, jackknife)
    if is_constant(replicates) or not np.isfinite(tails).all():
        reason = "the resamples do not vary around the estimate: no interval can be read off them"
        return Interval(estimate, np.nan, np.nan, *facts, reason)
    low, high = np.nanquantile(replicates, tails)
    return Interval(estimate, float(low), float(high), *facts, "")


def ratio(
    numerator,
    denominator,
    clusters: Sequence | None = None,
    level: float = 0.95,
    num_resamples: int = 4000,
    seed: int = 0,
) -> Ratio:
    """mean(numerator) / mean(denominator), both (S, N) or (1, N), over the same (seed, item) pairs.

    Seeds and clusters are drawn once for both means, as in
    `comparisons.paired_difference`; percentile limits.
    When the denominator's own interval holds 0 the ratio has no stable value: it is NaN with a
    reason, and the two means are still given. The ratio of means is not the mean of ratios.
    """
    tail = (1 - checked_level(level)) / 2
    top, bottom = (np.atleast_2d(np.asarray(v, np.float64)) for v in (numerator, denominator))
    top, bottom = np.broadcast_arrays(top, bottom)
    missing = np.isnan(top) | np.isnan(bottom)
    top, bottom = np.where(missing, np.nan, top), np.where(missing, np.nan, bottom)
    tops, counts = cluster_tables(top, clusters)
    bottoms, _ = cluster_tables(bottom, clusters)
    num_seeds, num_clusters = tops.shape
    facts = (int((~missing).any(0).sum()), num_clusters, num_seeds, int(missing.sum()))
    means = pooled_mean(tops, counts), pooled_mean(bottoms, counts)
    blank, note = (np.nan,) * 3, seed_note(num_seeds)
    if num_clusters < 2:
        return Ratio(*blank, *means, np.nan, np.nan, *facts, too_few(num_clusters), note)
    drawn = resampled_totals((tops, bottoms, counts), num_resamples, seed)
    low, high = (float(q) for q in np.nanquantile(divide(drawn[1], drawn[2]), [tail, 1 - tail]))
    if low <= 0 <= high:
        reason = f"the denominator {means[1]:.3g} [{low:.3g}, {high:.3g}] cannot be told from 0"
        return Ratio(*blank, *means, low, high, *facts, reason, note)
    limits = np.nanquantile(divide(drawn[0], drawn[1]), [tail, 1 - tail])
    estimate = means[0] / means[1]
    return Ratio(estimate, *map(float, limits), *means, low, high, *facts, "", note)


def cluster_index(clusters: Sequence | None, num_items: int) -> np.ndarray:
    """Cluster number 0 .. C-1 of each of `num_items` items; None makes every item its own."""
    if clusters is None:
        return np.arange(num_items)
    labels = np.asarray(clusters)
    if labels.shape != (num_items,):
        raise ValueError(f"clusters must name each of the {num_items} items, not {labels.shape}")
    return np.unique(labels, return_inverse=True)[1]


def membership(groups) -> np.ndarray:
    """Checks an (N, G) membership matrix and returns it as bool; columns may overlap."""
    groups = np.asarray(groups)
    if groups.ndim != 2 or not is_binary(groups):
        shown = f"shape {groups.shape}, dtype {groups.dtype}"
        raise ValueError(f"groups must be an (N, G) boolean membership matrix, not {shown}")
    return groups.astype(bool)


def checked_weights(weights, num_rows: int) -> np.ndarray:
    """Sample weights (N,) as float64; ValueError unless they are finite and not negative."""
    weights = np.asarray(weights, np.float64)
    if weights.shape != (num_rows,) or not (np.isfinite(weights) & (weights >= 0)).all():
        raise ValueError(f"weights must be {num_rows} finite numbers >= 0, not {weights}")
    return weights


def too_few_rows(counts: np.ndarray, minimum: int, what: str = "rows") -> np.ndarray:
    """Like counts, strings: why fewer rows than `minimum` give no number, '' where they suffice."""
    found = [f"{n} {what}, fewer than {minimum}" if n < minimum else "" for n in counts.ravel()]
    return np.array(found, dtype=object).reshape(counts.shape)


def is_binary(values: np.ndarray) -> bool:
    """Whether every value is 0 or 1 (or a bool)."""
    return values.dtype == bool or bool(((values == 0) | (values == 1)).all())


def threaded(work: Callable, *items: Iterable) -> list:
    """work of each of `items`, in order; numpy lets go of the interpreter in its long loops.

    What comes out must not depend on the order of execution: give each call its own generator.
    """
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        return list(pool.map(work, *items))


def rows_and_seeds(
    by_seed: np.ndarray, rows: np.ndarray, num_rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """Standard error (K,) of a mean over seeds (S, K), and Satterthwaite's degrees of freedom.

    rows (K,): the variance that other rows would give; with two seeds or more, that between seeds
    is added.
    """
    seeds = len(by_seed)
    between = by_seed.var(0, ddof=1) / seeds if seeds > 1 else np.zeros_like(rows)
    parts = rows**2 / max(num_rows - 1, 1) + between**2 / max(seeds - 1, 1)
    return np.sqrt(rows + between), divide((rows + between) ** 2, parts)


def seed_note(num_seeds: int) -> str:
    """What a reader must know about a percentile interval over this many seeds."""
    if num_seeds == 1:
        return "one seed: the interval holds no variance between seeds"
    if 1 < num_seeds < 6:
        return f"{num_seeds} seeds: percentile limits are narrow when seeds differ much"
    return ""


def _counts(successes, n) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    successes, n = np.broadcast_arrays(np.asarray(successes), np.asarray(n))
    if n.ndim > 1 or np.any(successes < 0) or np.any(successes > n):
        raise ValueError(f"need counts with 0 <= successes <= n, not {successes} of {n}")
    return successes, n, np.where(n > 0, successes, np.nan) / np.maximum(n, 1)


def _rate_interval(rate, low, high, n) -> Interval:
    reasons = tuple("" if count > 0 else "no trials" for count in np.atleast_1d(n))
    if n.ndim == 0:
        return Interval(float(rate), float(low), float(high), int(n), int(n), 0, reasons[0])
    return Interval(rate, low, high, n, n, 0, reasons)


def checked_level(level: float) -> float:
    """The level itself; ValueError unless it lies in (0, 1)."""
    if not 0 < level < 1:
        raise ValueError(f"level must lie strictly between 0 and 1 (e.g. 0.95), not {level}")
    return level


def too_few(num_clusters: int) -> str:
    """Why this many clusters give no interval."""
    return "no values" if num_clusters == 0 else "one cluster: nothing to resample"


def is_constant(replicates: np.ndarray) -> bool:
    """Whether all replicates are the same number, up to rounding."""
    return bool(np.ptp(replicates) <= 1e-12 * max(1.0, np.abs(replicates).max()))


def divide(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """top / bottom, NaN where bottom is 0."""
    return np.divide(top, bottom, out=np.full(np.shape(top), np.nan), where=bottom != 0)


def pooled_mean(sums: np.ndarray, counts: np.ndarray) -> float:
    """Sum of sums over sum of counts, NaN without any."""
    return float(divide(sums.sum(), counts.sum()))


def _mean_without_each(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return divide(sums.sum() - sums.sum(0), counts.sum() - counts.sum(0))


def cluster_tables(data: np.ndarray, clusters) -> tuple[np.ndarray, np.ndarray]:
    """Sums and counts (S, C) of the values that are not NaN; empty rows and columns are dropped."""
    if np.isinf(data).any():
        raise ValueError("values must be finite, or NaN where there is none; some are infinite")
    index = cluster_index(clusters, data.shape[1])
    kept = ~np.isnan(data)
    shape = (data.shape[0], index.max(initial=-1) + 1)
    sums, counts = np.zeros(shape), np.zeros(shape)
    for row in range(shape[0]):
        sums[row] = np.bincount(index, np.where(kept[row], data[row], 0.0), shape[1])
        counts[row] = np.bincount(index, kept[row], shape[1])
    filled = np.ix_(counts.any(1), counts.any(0))
    return sums[filled], counts[filled]


def resampled_totals(tables: Sequence[np.ndarray], num_resamples: int, seed: int) -> np.ndarray:
    """Totals (T, B) of tables (S, C) each, under the same draws of seeds and of clusters.

    One row: Efron's draw of C clusters. Several: S - 1 seeds and C - 1 clusters (Rao and Wu 1988).
    """
    rng = np.random.default_rng(seed)
    num_seeds, num_clusters = tables[0].shape
    draws = num_clusters if num_seeds == 1 else num_clusters - 1
    totals = np.empty((len(tables), num_resamples))
    step = max(1, CHUNK // num_clusters)
    for start in range(0, num_resamples, step):
        size = min(step, num_resamples - start)
        rows = _weights(rng, num_seeds, max(num_seeds - 1, 1), size)
        columns = _weights(rng, num_clusters, draws, size)
        for place, table in enumerate(tables):
            totals[place, start : start + size] = np.einsum("bc,bc->b", rows @ table, columns)
    return totals


def _weights(rng, units: int, draws: int, size: int) -> np.ndarray:
    """How often each of `units` is drawn, (size, units); rows sum to `draws`."""
    picks = rng.integers(0, units, (size, draws)) + units * np.arange(size)[:, None]
    return np.bincount(picks.ravel(), minlength=size * units).reshape(size, units).astype(float)


def _parts(row: np.ndarray, clusters) -> list[np.ndarray]:
    index = cluster_index(clusters, row.size)
    parts = [row[(index == c) & ~np.isnan(row)] for c in range(index.max(initial=-1) + 1)]
    return [part for part in parts if part.size]


def _statistic_and_jackknife(row, clusters, statistic) -> tuple[float, np.ndarray]:
    parts = _parts(row, clusters)
    if not parts:
        return np.nan, np.array([])
    rest = [parts[:c] + parts[c + 1 :] for c in range(len(parts))] if len(parts) > 1 else []
    jackknife = np.array([statistic(np.concatenate(part)) for part in rest])
    return float(statistic(np.concatenate(parts))), jackknife


def _statistic_replicates(row, clusters, statistic, num_resamples, seed) -> np.ndarray:
    parts = _parts(row, clusters)
    picks = np.random.default_rng(seed).integers(0, len(parts), (num_resamples, len(parts)))
    return np.array([statistic(np.concatenate([parts[c] for c in pick])) for pick in picks])


def _bca_tails(tails, replicates, estimate, jackknife) -> np.ndarray:
    """The percentiles BCa reads instead of `tails` (Efron 1987, eq. 2.3 and 6.6)."""
    below = (np.mean(replicates < estimate) + np.mean(replicates <= estimate)) / 2
    away = jackknife.mean() - jackknife
    spread = np.sum(away**2) ** 1.5
    if not 0 < below < 1 or spread == 0:
        return np.full_like(tails, np.nan)
    acceleration = np.sum(away**3) / (6 * spread)
    shift = ndtri(below) + ndtri(tails)
    return ndtr(ndtri(below) + shift / (1 - acceleration * shift))
