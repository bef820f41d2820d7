"""Calibration by group: how far stated probabilities are from observed shares.

Everything comes from bins, counted once: arrays (..., G, B, 2) over groups, bins and label. A row
is a probability p and an event y that it speaks of: P(y = 1) and the label where there are two
classes, the largest probability and whether it was right (`probabilities.top_label`), or one class
against the others. Bins are closed on the right, (a, b], and 0 belongs to the first. Host numpy,
float64. An error of 0 is ideal but not what a calibrated model shows: the smaller the group, the
larger the error by chance alone (0.13 with 100 rows in 15 bins), so read it beside `perfect`.
"""

from typing import NamedTuple

import numpy as np
from scipy.special import bdtrik, gammaln, xlog1py, xlogy

from jax_lowrank.evaluation import intervals
from jax_lowrank.evaluation.intervals import (
    checked_level,
    checked_weights,
    divide,
    is_binary,
    membership,
)

DRAWS = 200  # of each bin's noise behind `limits`
STEPS = 12  # bisections there
BLOCK = 20  # draws that are computed at once
STREAM = 50  # draws of `perfect` from one generator
MOST_ERRORS = 6.0  # standard errors by which a bin's true deviation may pass the observed one


class Bins(NamedTuple):
    """Sums over the rows of each bin, by label 0 and 1 on the last axis: (..., G, B, 2).

    rows: numbers of rows. weight, probability: sums of w and w p. variance (..., G, B): sum of
    w^2 p (1 - p), what chance alone adds to the sum of w y.
    """

    rows: np.ndarray
    weight: np.ndarray
    probability: np.ndarray
    variance: np.ndarray


class Perfect(NamedTuple):
    """The error that perfectly calibrated probabilities show at this group's size, (..., G).

    p: share of draws with an error at least as large as the observed one, in (0, 1].
    """

    mean: np.ndarray
    p: np.ndarray


class Limits(NamedTuple):
    """Limits of the error without its noise, and its median-unbiased estimate, (..., G)."""

    estimate: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Reliability(NamedTuple):
    """The reliability curve (..., G, B): NaN in bins without rows.

    probability, observed: weighted means of p and y. low, high: where the observed share of a
    calibrated bin lies with probability `level` (Broecker and Smith 2007).
    """

    rows: np.ndarray
    probability: np.ndarray
    observed: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Decomposition(NamedTuple):
    """Brier score = reliability - resolution + uncertainty + within, each (..., G).

    Murphy (1973); `within` is what the bins hide (0 when p is constant in each). reliability: 0 is
    ideal; resolution: as large as uncertainty is ideal.
    """

    reliability: np.ndarray
    resolution: np.ndarray
    uncertainty: np.ndarray
    within: np.ndarray


def bins(
    p, y, groups, *, num_bins: int = 15, scheme: str = "width", weights=None, compat=None
) -> Bins:
    """Bins of p (..., N) in [0, 1] and y (..., N) or (N,) of 0 and 1; groups (N, G) bool.

    scheme: 'width', bins of equal width; 'mass', of equal weight of the group's rows (the k-th ends
    at the first row with which k/B of it is reached), ties together. weights (N,) >= 0; 2 is a row
    twice. An all-true column of groups gives all rows. compat (equal width only): 'netcal' closes
    bins on the left and the last on both sides; 'torchmetrics' gives p = 1 a bin of its own.
    ValueError for NaN and for p outside [0, 1]: logits are not guessed.
    """
    groups, p = membership(groups), checked_probabilities(p)
    y = np.asarray(y)
    if p.shape[-1:] != groups.shape[:1]:
        raise ValueError(f"p {p.shape} must end in the rows of groups {groups.shape}")
    if not is_binary(y):
        raise ValueError("y must be 0 or 1: whether the event that p speaks of happened")
    if num_bins < 1 or scheme not in ("width", "mass"):
        raise ValueError(f"need num_bins >= 1 and scheme 'width' or 'mass', not {num_bins, scheme}")
    weights = np.ones(len(groups)) if weights is None else checked_weights(weights, len(groups))
    size = num_bins + (compat == "torchmetrics")
    column, row = np.nonzero(groups.T)  # group by group
    shape = (groups.shape[1], size, 2)

    def sums_of(chance: np.ndarray, event: np.ndarray) -> list[np.ndarray]:
        if scheme == "width":
            index = equal_width(chance, num_bins, compat)[row]
        else:
            index = _equal_mass(chance[row], weights[row], groups.sum(0), num_bins)
        place = (column * size + index) * 2 + event[row].astype(int)
        p_row, w_row = chance.astype(np.float64)[row], weights[row]
        sums = (None, w_row, w_row * p_row, w_row**2 * p_row * (1 - p_row))
        return [np.bincount(place, s, np.prod(shape)).reshape(shape) for s in sums]

    events = np.broadcast_to(y, p.shape).reshape(-1, len(groups))
    runs = intervals.threaded(sums_of, p.reshape(-1, len(groups)), events)
    rows, weight, total, variance = (
        np.stack(part).reshape(*p.shape[:-1], *shape) for part in zip(*runs)
    )
    return Bins(rows.astype(np.int64), weight, total, variance.sum(-1))


def calibration_error(found: Bins, norm: float = 1) -> np.ndarray:
    """(sum_b w_b/W |share_b - p_b|^norm)^(1/norm), (..., G): 1 is the ECE, inf the maximum (MCE).

    NaN for a group without rows.
    """
    weight = found.weight.sum(-1)
    gap = np.abs(divide(_excess(found), weight))
    return _norm(gap, weight, norm)


def classwise_error(probabilities, labels, groups, *, norm: float = 1, **options) -> np.ndarray:
    """Mean over classes of each class's error, (mean_k error_k^norm)^(1/norm): (..., G).

    probabilities (..., N, C), labels (N,) in 0 .. C-1; options: those of `bins`. Kull et al.
    (2019); the marginal calibration error of Kumar et al. (2019).
    """
    probabilities, labels = np.asarray(probabilities), np.asarray(labels)
    errors = [
        calibration_error(bins(probabilities[..., k], labels == k, groups, **options), norm)
        for k in range(probabilities.shape[-1])
    ]
    if np.isinf(norm):
        return np.max(errors, axis=0)
    return np.mean(np.power(errors, norm), axis=0) ** (1 / norm)


def corrected_error(found: Bins) -> np.ndarray:
    """The error with norm 2 less what its bins show by chance, (..., G).

    sqrt(max(0, sum_b n_b/N [(share_b - p_b)^2 - share_b (1 - share_b) / (n_b - 1)])), Kumar et al.
    (2019). Bins of one row are left out, as in their code; NaN where no bin has two. Counts rows,
    not weights.
    """
    rows = found.rows.sum(-1)
    share = divide(found.rows[..., 1], rows)
    noise = divide(share * (1 - share), rows - 1)
    square = divide(_excess(found), found.weight.sum(-1)) ** 2 - noise
    total = rows.sum(-1)
    square = np.where(rows > 1, square * rows, 0.0).sum(-1)
    known = (rows > 1).any(-1)
    return np.where(known, np.sqrt(np.maximum(divide(square, total), 0.0)), np.nan)


def perfect(found: Bins, norm: float = 1, *, num_draws: int = 500, seed: int = 0) -> Perfect:
    """What `calibration_error` is when every y is drawn with its own probability p.

    Bins are drawn as binomial at their mean probability, scaled to the variance of their rows (the
    probabilities in a bin differ little). With norm 1 the mean is exact for that distribution.
    """
    weight, rows = found.weight.sum(-1), found.rows.sum(-1)
    mean = np.clip(divide(found.probability.sum(-1), weight), 0.0, 1.0)
    binomial = rows * mean * (1 - mean)
    scale = np.sqrt(divide(found.variance, binomial))
    scale = np.where(np.isnan(scale), 0.0, scale)
    p = np.nan_to_num(mean)
    observed = calibration_error(found, norm)

    def drawn(rng, number: int) -> np.ndarray:
        """Errors (..., G, number): draws of one bin lie side by side, which is fast."""
        hits = rng.binomial(rows[..., None], p[..., None], (*rows.shape, number))
        noise = np.abs(hits - (rows * p)[..., None]) * scale[..., None]
        weights = np.broadcast_to(weight[..., None], noise.shape)
        return _norm(divide(noise, weights), weights, norm, axis=-2)

    sizes = [min(STREAM, num_draws - start) for start in range(0, num_draws, STREAM)]
    streams = np.random.default_rng(seed).spawn(len(sizes))
    errors = np.concatenate(intervals.threaded(drawn, streams, sizes), -1)
    hits = (errors >= observed[..., None] - 1e-12).sum(-1)
    expected = errors.mean(-1)
    if norm == 1:
        expected = divide((_mean_deviation(rows, p) * scale).sum(-1), weight.sum(-1))
    undefined = np.where(np.isnan(observed), np.nan, 0.0)
    return Perfect(expected + undefined, (hits + 1) / (num_draws + 1) + undefined)


def limits(found: Bins, norm: float = 1, *, level: float = 0.95, seed: int = 0) -> Limits:
    """Limits of the calibration error that the bins would show without chance.

    A bin's true deviation is taken to be its observed one, moved towards 0 (no further) or away
    from it by t standard errors. The limits are the errors at the two t, the same for all bins,
    between which the observed error is no extreme draw; the estimate is the error at the t that
    makes it the median. So low is 0 where perfect calibration is not refuted, which percentiles of
    a bootstrap do not allow: resampling adds noise to an error that cannot be negative. At level
    95 % they held 92 to 99 % of the true errors in simulations (least where few bins are far off).
    """
    tail = (1 - checked_level(level)) / 2
    weight, rows = found.weight.sum(-1), found.rows.sum(-1)
    mean = np.nan_to_num(divide(found.probability.sum(-1), weight))
    excess = np.nan_to_num(divide(_excess(found), weight))
    effective = divide(mean * (1 - mean) * weight**2, found.variance)  # rows, if none is weighted
    effective = np.maximum(np.where(np.isnan(effective), rows, effective), 1.0)
    unit = np.sqrt(np.maximum(mean * (1 - mean), 1e-6) / effective)
    observed = calibration_error(found, norm)
    rng, ones = np.random.default_rng(seed), (1,) * observed.ndim
    noise = rng.standard_normal((DRAWS, rows.shape[-1], *ones))
    blocks = np.split(noise, DRAWS // BLOCK)

    def first(values: np.ndarray) -> np.ndarray:
        """Bins first, where sums over them are fast."""
        return np.ascontiguousarray(np.moveaxis(values, -1, 0))

    part = first(divide(weight, np.broadcast_to(weight.sum(-1, keepdims=True), weight.shape)))

    def spread(gap: np.ndarray) -> np.ndarray:
        gap = np.abs(gap)
        if np.isinf(norm):
            return np.where(part > 0, gap, 0 * part).max(1)
        return (part * (gap if norm == 1 else gap**norm)).sum(1) ** (1 / norm)

    def chance(t: np.ndarray) -> np.ndarray:
        size = np.maximum(np.abs(excess) + t[..., None] * unit, 0.0)
        return np.clip(mean + np.sign(excess) * size, 0.0, 1.0)

    def quantile(t: np.ndarray, share: float) -> np.ndarray:
        true = chance(t)
        shift, error = first(true - mean), first(np.sqrt(true * (1 - true) / effective))
        drawn = np.concatenate([spread(shift + error * z) for z in blocks])
        return np.quantile(drawn, share, axis=0)

    def error_at(share: float) -> np.ndarray:
        low, high = -(np.abs(excess) / unit).max(-1), np.full(observed.shape, MOST_ERRORS)
        for _ in range(STEPS):
            middle = (low + high) / 2
            above = quantile(middle, share) > observed
            low, high = np.where(above, low, middle), np.where(above, middle, high)
        return _norm(np.abs(chance(low) - mean), weight, norm)

    return Limits(*intervals.threaded(error_at, (0.5, 1 - tail, tail)))


def reliability(found: Bins, level: float = 0.95) -> Reliability:
    """Mean probability, observed share and consistency band of every bin."""
    tail = (1 - checked_level(level)) / 2
    rows, weight = found.rows.sum(-1), found.weight.sum(-1)
    mean = divide(found.probability.sum(-1), weight)
    inside = np.clip(mean, 1e-12, 1 - 1e-12)
    size = np.maximum(rows, 1).astype(np.float64)
    ends = [
        np.clip(np.ceil(bdtrik(share, size, inside)), 0, size) / size for share in (tail, 1 - tail)
    ]
    low, high = (np.where(rows > 0, end, np.nan) for end in ends)
    return Reliability(rows, mean, divide(found.weight[..., 1], weight), low, high)


def brier_decomposition(found: Bins, brier) -> Decomposition:
    """Murphy's parts of the groups' mean Brier scores (..., G), from `groups.group_means`."""
    weight = found.weight.sum(-1)
    share = divide(found.weight[..., 1], weight)
    mean = divide(found.probability.sum(-1), weight)
    base = divide(found.weight[..., 1].sum(-1), weight.sum(-1))
    part = divide(weight, np.broadcast_to(weight.sum(-1, keepdims=True), weight.shape))
    off = np.where(weight > 0, part * (mean - share) ** 2, 0 * part).sum(-1)
    resolved = np.where(weight > 0, part * (share - base[..., None]) ** 2, 0 * part).sum(-1)
    uncertain = base * (1 - base)
    return Decomposition(off, resolved, uncertain, brier - (off - resolved + uncertain))


def checked_probabilities(p) -> np.ndarray:
    """p as floats; ValueError for NaN and for values outside [0, 1]."""
    p = np.asarray(p)
    p = p if p.dtype == np.float32 else p.astype(np.float64)
    outside = p[~((p >= 0) & (p <= 1))]
    if outside.size:
        raise ValueError(
            f"probabilities must lie in [0, 1]; {outside.size} do not, e.g. {outside[0]}: of logits"
            " take probabilities.softmax first"
        )
    return p


def equal_width(p: np.ndarray, num_bins: int, compat: str | None = None) -> np.ndarray:
    """Bin 0 .. num_bins - 1 of every p; see `bins`."""
    if compat is None:
        edges = (np.arange(1, num_bins) / num_bins).astype(p.dtype)  # as p rounds them
        return np.searchsorted(edges, p, side="left")
    if compat == "netcal":
        index = np.searchsorted(np.linspace(0, 1, num_bins + 1)[1:], p, side="right")
        return np.minimum(index, num_bins - 1)
    if compat == "torchmetrics":  # torch.linspace counts its steps from the nearer end
        steps = np.arange(num_bins + 1, dtype=p.dtype) * p.dtype.type(1 / num_bins)
        half = (num_bins + 1) // 2
        edges = np.concatenate([steps[:half], p.dtype.type(1) - steps[: num_bins + 1 - half][::-1]])
        return np.searchsorted(edges[1:], p, side="right")
    raise ValueError(f"compat must be None, 'netcal' or 'torchmetrics', not {compat!r}")


def _equal_mass(p: np.ndarray, weights, sizes: np.ndarray, num_bins: int) -> np.ndarray:
    """Bin (M,) of p (M,), the rows of one group after the other, of these sizes."""
    index, parts = np.empty(p.size, int), np.arange(1, num_bins) / num_bins
    for stop, size in zip(np.cumsum(sizes), sizes):
        rows = slice(stop - size, stop)
        order = np.argsort(p[rows])
        reached = np.cumsum(weights[rows][order])
        ends = np.searchsorted(reached, parts * reached[-1:].sum() * (1 - 1e-12))
        cuts = np.unique(p[rows][order][ends]) if size else p[rows]
        index[rows] = np.searchsorted(cuts, p[rows], side="left")
    return index


def _excess(found: Bins) -> np.ndarray:
    """Sum of w (y - p) in each bin."""
    return found.weight[..., 1] - found.probability.sum(-1)


def _norm(gap: np.ndarray, weight: np.ndarray, norm: float, axis: int = -1) -> np.ndarray:
    """Over the bins, which lie along `axis`."""
    gap = np.where(weight > 0, gap, 0.0)
    total = weight.sum(axis)
    if np.isinf(norm):
        return np.where(total > 0, gap.max(axis), np.nan)
    if norm == 1:
        return divide((weight * gap).sum(axis), total)
    return divide((weight * gap**norm).sum(axis), total) ** (1 / norm)


def _mean_deviation(n: np.ndarray, p: np.ndarray) -> np.ndarray:
    """E|X - np| of X binomial (de Moivre; Diaconis and Zabell, Statist. Sci. 6, 1991)."""
    k = np.minimum(np.floor(n * p) + 1, np.maximum(n, 1))
    size = np.maximum(n, 1)
    choose = gammaln(size + 1) - gammaln(k + 1) - gammaln(size - k + 1)
    found = 2 * k * np.exp(choose + xlogy(k, p) + xlog1py(size - k + 1, -p))
    return np.where(n > 0, found, 0.0)
