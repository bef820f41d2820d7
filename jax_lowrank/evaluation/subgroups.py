"""Everything that group tables say about many runs at once, with limits, and runs compared.

Puts `groups`, `disparities` and `cells` together. Predictions are (R, N), one row a run (methods,
ranks, seeds), on the same N rows; all runs are resampled together.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit

from jax_lowrank.evaluation import cells, disparities, groups
from jax_lowrank.evaluation.comparisons import Equivalence, equivalence
from jax_lowrank.evaluation.groups import GroupRates, Rates
from jax_lowrank.evaluation.intervals import (
    checked_level,
    divide,
    membership,
    rows_and_seeds,
    threaded,
    wilson,
)


class GapKind(NamedTuple):
    """A gap is a `kind` (difference, ratio, worst) of one rate, or of two put together by `agg`."""

    kind: str
    rates: tuple[str, ...]
    agg: str = "worst_case"


GAPS = {
    "demographic_parity_difference": GapKind("difference", ("selection",)),
    "demographic_parity_ratio": GapKind("ratio", ("selection",)),
    "equalized_odds_difference": GapKind("difference", ("tpr", "fpr")),
    "equalized_odds_difference_mean": GapKind("difference", ("tpr", "fpr"), "mean"),
    "equalized_odds_ratio": GapKind("ratio", ("tpr", "fpr")),
    "equalized_odds_ratio_mean": GapKind("ratio", ("tpr", "fpr"), "mean"),
    "equal_opportunity_difference": GapKind("difference", ("tpr",)),
    "equal_opportunity_ratio": GapKind("ratio", ("tpr",)),
    "accuracy_difference": GapKind("difference", ("accuracy",)),
    "f1_difference": GapKind("difference", ("f1",)),
    "worst_accuracy": GapKind("worst", ("accuracy",)),
    "worst_f1": GapKind("worst", ("f1",)),
}
NULL_OF = {  # gap -> name in `Measured.nulls`
    "demographic_parity_difference": "selection",
    "equal_opportunity_difference": "tpr",
    "equalized_odds_difference": "odds",
    "equalized_odds_difference_mean": "odds_mean",
    "accuracy_difference": "accuracy",
}


class Measured(NamedTuple):
    """Rates and gaps of R runs.

    rates: estimates (`groups.group_rates`), arrays (R, G) and (R,). low, high: limits of
    rates.by_group. versus_rest: rates of the group minus those of all other rows, with limits.
    gaps, gap_low, gap_high: (R, K) in the order of gap_names; gap_reason, an array of strings, says
    why one is NaN. nulls (see NULL_OF): the difference between groups against its value when
    groups do not matter; none with weights or clusters. limits: 'wilson' or 'bootstrap', behind low
    and high (F1 always bootstrap).
    """

    rates: GroupRates
    low: Rates
    high: Rates
    versus_rest: Rates
    versus_rest_low: Rates
    versus_rest_high: Rates
    gap_names: tuple[str, ...]
    gaps: np.ndarray
    gap_low: np.ndarray
    gap_high: np.ndarray
    gap_reason: np.ndarray
    nulls: dict[str, disparities.GapNull]
    limits: str


class GapDifference(NamedTuple):
    """Gap of method a minus gap of method b, mean over S seeds: arrays (K,) in order of names.

    p: methods interchangeable row by row, for these seeds. p_new_seeds: of the interval, which
    counts the seeds' variance; NaN with one seed. equivalent: per gap, None without a margin.
    """

    names: tuple[str, ...]
    estimate: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray
    p_new_seeds: np.ndarray
    error: np.ndarray
    freedom: np.ndarray
    equivalent: tuple[Equivalence | None, ...]
    reason: tuple[str, ...]


class GapLevels(NamedTuple):
    """Gaps of one method, mean over S seeds, with limits: (K,) in the order of names; (S, K)."""

    names: tuple[str, ...]
    estimate: np.ndarray
    low: np.ndarray
    high: np.ndarray
    by_seed: np.ndarray


def gaps(by_group: Rates, overall: Rates | None = None, names=tuple(GAPS)) -> np.ndarray:
    """Gaps (..., K) of rates (..., G); with `overall` (...) those to the rate of all rows."""
    found = []
    for name in names:
        kind, rates, agg = GAPS[name]
        values = [getattr(by_group, rate) for rate in rates]
        if kind == "worst":
            found.append(disparities.worst(values[0]))
            continue
        measure = getattr(disparities, kind)
        tops = [None if overall is None else getattr(overall, rate) for rate in rates]
        parts = [measure(value, top) for value, top in zip(values, tops)]
        extreme = np.minimum if kind == "ratio" else np.maximum
        found.append(parts[0] if len(parts) == 1 else disparities.combine(parts, agg, extreme))
    return np.stack(found, -1)


def measure(
    labels,
    predictions,
    members,
    *,
    num_classes: int = 2,
    positive: int = 1,
    weights=None,
    clusters=None,
    minimum: int = 10,
    to_overall: bool = False,
    level: float = 0.95,
    num_resamples: int = 1000,
    num_permutations: int = 1000,
    seed: int = 0,
) -> Measured:
    """Rates and gaps with limits of labels (N,), predictions (R, N) or (N,), members (N, G) bool.

    minimum: rows that a rate of a group needs (`groups.SUPPORT`); a group with fewer has NaN, a
    reason, and no part in gaps. to_overall: gaps to the rate of all rows. clusters (N,): rows that
    are drawn together. Rates have Wilson limits where rows are independent and not weighted;
    differences and F1 have percentiles of the bootstrap; gaps have `disparities.gap_limits`.
    """
    checked_level(level)
    members, predictions = membership(members), np.atleast_2d(np.asarray(predictions))
    rows = (labels, predictions, members, num_classes, weights, clusters)
    counts, rates, made = _counted(*rows, positive, minimum)
    drawn = cells.resample(made, lambda t: _replicates(t, positive), num_resamples, seed)
    inside, rest, overall = drawn[..., 0, :-1], drawn[..., 1, :-1], drawn[..., 0, -1]
    undefined = np.isnan(np.stack(rates.by_group, 1))
    limits = [_masked(end, undefined) for end in cells.percentiles(inside, level)]
    independent = weights is None and clusters is None
    if independent:
        _put_wilson(limits, counts, rates, positive, level)
    differences = [one - two for one, two in zip(rates.by_group, rates.rest)]
    rest_limits = cells.percentiles(inside - rest, level)
    none = np.isnan(np.stack(differences, 1))
    found = _gap_limits(rates, inside, overall, to_overall, level)
    nulls = _nulls(labels, predictions, members, positive, minimum, num_permutations, seed)
    return Measured(
        rates,
        *(Rates(*np.moveaxis(end, 1, 0)) for end in limits),
        Rates(*differences),
        *(Rates(*np.moveaxis(_masked(end, none), 1, 0)) for end in rest_limits),
        tuple(GAPS),
        gaps(rates.by_group, rates.overall if to_overall else None),
        *found,
        nulls if independent and num_permutations else {},
        "wilson" if independent else "bootstrap",
    )


def compare(
    labels,
    a,
    b,
    members,
    *,
    num_classes: int = 2,
    positive: int = 1,
    weights=None,
    clusters=None,
    minimum: int = 10,
    margin: float | None = None,
    level: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> GapDifference:
    """Gap of a minus gap of b: predictions (S, N) of two methods under the same S seeds.

    Paired: both methods see the same resampled rows and seeds. error: standard deviation of the
    resamples; with S > 1 the seeds' variance is added, and the limits are Student's with
    Satterthwaite's degrees of freedom. p: rows (or clusters) swap the two methods' predictions, in
    all seeds at once, with probability 1/2. margin: of the equivalence test, in units of a gap.
    The groups that count are those with at least `minimum` rows in both methods and every seed.
    """
    a, b = (np.atleast_2d(np.asarray(x)) for x in (a, b))
    if a.shape != b.shape:
        raise ValueError(f"a and b must be paired (S, N) arrays, not {a.shape} and {b.shape}")
    tail, members = (1 + checked_level(level)) / 2, membership(members)
    rows = (labels, np.concatenate([a, b]), members, num_classes, weights, clusters)
    counts, rates, made = _counted(*rows, positive, minimum)
    every = _gaps_of(rates, positive)

    def gap_pairs(tables: np.ndarray) -> np.ndarray:
        """Differences (b, S, K) of tables (b, 2S, G + 1, C, C)."""
        found = every(tables)
        return found[:, : len(a)] - found[:, len(a) :]

    by_seed = gap_pairs(counts_with_all(counts)[None])[0]
    drawn = cells.resample(made, gap_pairs, num_resamples, seed)
    swapped = cells.swap(made, gap_pairs, num_resamples, seed)
    return _gap_difference(by_seed, drawn, swapped, made.counts.sum(), tail, margin)


def levels(
    labels,
    predictions,
    members,
    *,
    num_classes: int = 2,
    positive: int = 1,
    minimum: int = 10,
    level: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> GapLevels:
    """Gaps of one method, mean over its seeds: predictions (S, N); errors and limits as `compare`.

    A gap is biased upwards, and so is this mean: read it beside `Measured.nulls`. Groups need
    `minimum` rows in every seed.
    """
    tail, members = (1 + checked_level(level)) / 2, membership(members)
    predictions = np.atleast_2d(np.asarray(predictions))
    rows = (labels, predictions, members, num_classes, None, None)
    counts, rates, made = _counted(*rows, positive, minimum)
    every = _gaps_of(rates, positive)
    by_seed = every(counts_with_all(counts)[None])[0]
    drawn = cells.resample(made, every, num_resamples, seed)
    error, freedom = rows_and_seeds(by_seed, _variance(drawn.mean(1)), made.counts.sum())
    half = stdtrit(freedom, tail) * error
    estimate = by_seed.mean(0)
    return GapLevels(tuple(GAPS), estimate, estimate - half, estimate + half, by_seed)


def _counted(labels, predictions, members, num_classes, weights, clusters, positive, minimum):
    """Tables of runs, their rates, and the cells to resample."""
    counts = groups.count(labels, predictions, members, num_classes=num_classes, weights=weights)
    rates = groups.group_rates(counts, positive=positive, minimum=minimum)
    made = cells.make(
        np.asarray(labels).astype(np.int64),
        predictions.astype(np.int64),
        members,
        num_classes=num_classes,
        weights=None if weights is None else np.asarray(weights, np.float64),
        clusters=clusters,
    )
    return counts, rates, made


def _gaps_of(rates: GroupRates, positive: int) -> Callable[[np.ndarray], np.ndarray]:
    """Tables (b, R, G + 1, C, C) -> gaps (b, R, K) over the groups with rates in every run."""
    undefined = np.isnan(np.stack(rates.by_group)).any(1)  # (M, G)

    def every(tables: np.ndarray) -> np.ndarray:
        found = groups.rates(tables[..., :-1, :, :], positive)
        return gaps(Rates(*[np.where(gone, np.nan, rate) for rate, gone in zip(found, undefined)]))

    return every


def counts_with_all(counts: groups.Counts) -> np.ndarray:
    """Tables (R, G + 1, C, C), the last group all rows, as `cells.resample` gives them."""
    return np.concatenate([counts.by_group, counts.overall[..., None, :, :]], axis=-3)


def _replicates(tables: np.ndarray, positive: int) -> np.ndarray:
    """Rates (b, R, M, 2, G + 1) of tables and of the rows outside each group."""
    rest = np.maximum(tables[:, :, -1:] - tables, 0.0)
    parts = [np.stack(groups.rates(part, positive), 2) for part in (tables, rest)]
    return np.stack(parts, 3)


def _masked(values: np.ndarray, undefined: np.ndarray) -> np.ndarray:
    return np.where(undefined, np.nan, values)


def _put_wilson(limits, counts, rates: GroupRates, positive: int, level: float) -> None:
    """Wilson limits in place of the percentiles of the rates that are shares of rows."""
    for place, name in enumerate(Rates._fields):
        if name.endswith("f1"):
            continue
        rate, behind = getattr(rates.by_group, name), getattr(rates.support, name)
        hits = np.rint(np.nan_to_num(rate) * behind).astype(int)
        found = wilson(hits.ravel(), behind.ravel(), level)
        for end, values in zip(limits, (found.low, found.high)):
            end[:, place] = _masked(values.reshape(rate.shape), np.isnan(rate))


def _gap_limits(rates: GroupRates, inside, overall, to_overall: bool, level: float):
    def of(run: int) -> list[disparities.Limits]:
        bands, found = {}, []
        for kind, names, agg in GAPS.values():
            for name in names:
                if (kind, name) not in bands:
                    i = Rates._fields.index(name)
                    top = (rates.overall[i][run], overall[:, run, i]) if to_overall else None
                    parts = (rates.by_group[i][run], inside[:, run, i], top)
                    bands[kind, name] = disparities.band(*parts, kind)
            chosen = [bands[kind, name] for name in names]
            found.append(disparities.joined_limits(chosen, kind, agg, level))
        return found

    runs = threaded(of, range(inside.shape[1]))
    low, high = (
        np.array([[getattr(one, end) for one in run] for run in runs]) for end in ("low", "high")
    )
    reason = np.array([[one.reason for one in run] for run in runs], dtype=object)
    return low, high, reason


def _nulls(labels, predictions, members, positive, minimum, num_permutations, seed) -> dict:
    if not num_permutations:
        return {}
    labels, options = np.asarray(labels), {"minimum": minimum, "seed": seed}
    options["num_permutations"] = num_permutations
    predicted, right = predictions == positive, predictions == labels
    odds = disparities.permuted_odds(predicted, members, labels == positive, **options)
    return {
        "selection": disparities.permuted_gap(predicted, members, **options),
        "accuracy": disparities.permuted_gap(right, members, **options),
        **odds._asdict(),
    }


def _variance(draws: np.ndarray) -> np.ndarray:
    """Over the draws (B, K) that are defined; NaN without any."""
    known = ~np.isnan(draws)
    mean = divide(np.where(known, draws, 0.0).sum(0), known.sum(0))
    return divide(np.where(known, (draws - mean) ** 2, 0.0).sum(0), known.sum(0))


def _gap_difference(by_seed, drawn, swapped, num_units, tail, margin) -> GapDifference:
    """From differences (S, K), their resamples (B, S, K) and their swaps (B, S, K)."""
    seeds, estimate = len(by_seed), by_seed.mean(0)
    error, freedom = rows_and_seeds(by_seed, _variance(drawn.mean(1)), num_units)
    with np.errstate(invalid="ignore", divide="ignore"):
        two_sided = 2 * stdtr(freedom, -np.abs(estimate) / error)
    half = stdtrit(freedom, tail) * error
    hits = (np.abs(swapped.mean(1)) >= np.abs(estimate) - 1e-12).sum(0)
    p = np.where(np.isnan(estimate), np.nan, (hits + 1) / (len(swapped) + 1))
    reason = tuple(
        "fewer than two groups have enough rows, or a ratio is 0 / 0"
        if np.isnan(e)
        else "no resample differs"
        if not s > 0
        else ""
        for e, s in zip(estimate, error)
    )
    tests = [
        None if margin is None else equivalence(e, s, margin, f)
        for e, s, f in zip(estimate, error, freedom)
    ]
    p_new = two_sided if seeds > 1 else np.full_like(estimate, np.nan)
    ends = (estimate - half, estimate + half)
    return GapDifference(
        tuple(GAPS), estimate, *ends, p, p_new, error, freedom, tuple(tests), reason
    )
