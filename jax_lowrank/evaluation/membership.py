"""Membership inference: can it be told from a model which rows it was trained on?

N audited rows, K shadow models; `inside` (N, K) says which rows a shadow was trained on. A
statistic says how well a model fits a row: its `margin`, or any other. Larger scores mean "member".
Host statistics in numpy, float64. 0.5 is the ideal AUC.

Carlini et al. 2022 (arXiv 2112.03570), Zarifzadeh et al. 2024 (arXiv 2312.03262).
"""

from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import logsumexp, ndtri

from jax_lowrank.evaluation import intervals

VARIANCES = ("row", "global")
LOG_2PI = np.log(2 * np.pi)


class Scores(NamedTuple):
    """score (N,), NaN for a row without the shadows that the attack needs; how many shadows knew
    each row and how many did not (N,); `shared` (N,) bool: its spread is that of all rows, since
    its own shadows give none."""

    score: np.ndarray
    num_inside: np.ndarray
    num_outside: np.ndarray
    shared: np.ndarray


class Roc(NamedTuple):
    """Every point of the exact curve, from (0, 0) to (1, 1): `score >= threshold` is called member.

    Rows of one score enter together, so ties are neither lucky nor unlucky.
    """

    false_positive_rate: np.ndarray
    true_positive_rate: np.ndarray
    threshold: np.ndarray


class AtRate(NamedTuple):
    """The largest true positive rate whose false positive rate is at most `target`.

    low/high: Clopper-Pearson over the members, threshold taken as given. NaN with a reason where
    `target` is below the resolution, one false positive among the non-members.
    """

    target: float
    rate: float
    low: float
    high: float
    false_positives: int
    reason: str


class Attack(NamedTuple):
    """How well scores tell members from non-members; NaN with a reason.

    auc: ties count one half. low/high: Newcombe's (2006) method 5, which also holds at an AUC of 1.
    balanced_accuracy: the best over thresholds, so above 0.5 by chance.
    """

    auc: float
    low: float
    high: float
    balanced_accuracy: float
    at: tuple[AtRate, ...]
    num_members: int
    num_others: int
    num_missing: int
    reason: str


class Gap(NamedTuple):
    """Largest minus smallest of a number over the groups that have one, and what chance gives.

    measure: "auc", "best balanced accuracy" or "tpr at 0.1". null_mean: mean gap when rows of
    membership in groups are permuted among members and among non-members;
    p = (hits + 1) / (permutations + 1). `values` (G,), NaN where undefined.
    """

    measure: str
    gap: float
    null_mean: float
    p: float
    values: np.ndarray
    num_defined: int
    num_permutations: int
    reason: str


def margin(logits, labels) -> np.ndarray:
    """z_y - logsumexp of the other classes' logits: log(p_y / (1 - p_y)), (N,) from (N, C).

    From logits, because probabilities in float32 are 1 from a margin of 17 on. ValueError for
    fewer than two classes and for labels outside them.
    """
    logits, labels = _classes(logits, labels)
    rows = np.arange(labels.size)
    others = logits.copy()
    others[rows, labels] = -np.inf
    return logits[rows, labels] - logsumexp(others, axis=1)


def log_likelihood(logits, labels) -> np.ndarray:
    """log p_y (N,) in nats, from logits (N, C): the score of the loss-threshold attack (Yeom et al.
    2018), and what `rmia` compares."""
    logits, labels = _classes(logits, labels)
    return logits[np.arange(labels.size), labels] - logsumexp(logits, axis=1)


def lira_online(target, shadows, inside, *, variance: str = "row", center: str = "mean") -> Scores:
    """log N(φ; μ_in, σ_in) - log N(φ; μ_out, σ_out), from target (N,) and shadows (N, K).

    variance: of each row, or, with few shadows (< 64), one of all rows' residuals ("global").
    center: "mean", or "median" as the reference code. NaN for a row that no shadow, or every shadow
    was trained on. Carlini et al., Algorithm 1.
    """
    target, shadows, inside = _checked(target, shadows, inside)
    one = _normal(shadows, inside, variance, center)
    two = _normal(shadows, ~inside, variance, center)
    score = _log_density(target, one) - _log_density(target, two)
    return _scores(score, inside, one[2] | two[2])


def lira_offline(
    target, shadows, inside, *, form: str = "tail", variance: str = "row", center: str = "mean"
) -> Scores:
    """How unusual the target's statistic is for a model that never saw the row; shadows that did
    are not used.

    form: "tail", the paper's one-sided Pr[Z <= φ], Z ~ N(μ_out, σ_out), returned as its normal
    quantile (φ - μ_out) / σ_out, which ranks alike and does not saturate; "density", the two-sided
    -log N(φ; μ_out, σ_out) of the reference code. They are different attacks: name which.
    """
    if form not in ("tail", "density"):
        raise ValueError(f"form must be 'tail' (the paper) or 'density' (its code), not {form!r}")
    target, shadows, inside = _checked(target, shadows, inside)
    mean, spread, shared = _normal(shadows, ~inside, variance, center)
    if form == "tail":
        score = (target - mean) / spread
    else:
        score = -_log_density(target, (mean, spread, shared))
    return _scores(score, inside, shared)


def rmia(
    target, shadows, inside, population, population_shadows, *, offset: float = 0.3, gamma=1.0
) -> Scores:
    """Share of population rows z that the target's p_x / p̄_x beats by more than gamma, in [0, 1].

    target (N,), shadows (N, K): log p_y in nats; population (Z,), population_shadows (Z, K): the
    same of rows that no model was trained on. Offline: p̄ = ((1 + offset) p_out + 1 - offset) / 2
    with p_out the mean over shadows that did not see the row; `offset` is to be chosen on a shadow,
    never on the target. Zarifzadeh et al., eq. 10 and Appendix B.2.2.
    """
    target, shadows, inside = _checked(target, shadows, inside)
    outside = np.zeros(np.shape(population_shadows), bool)
    population, population_shadows, outside = _checked(population, population_shadows, outside)

    def ratio(value, others, known):
        kept = ~known
        mean = intervals.divide(np.where(kept, np.exp(others), 0).sum(1), kept.sum(1))
        return value - np.log(((1 + offset) * mean + 1 - offset) / 2)

    rows = ratio(target, shadows, inside)
    pool = np.sort(ratio(population, population_shadows, outside))
    beaten = np.searchsorted(pool, rows - np.log(gamma), side="left") / pool.size
    score = np.where(np.isnan(rows), np.nan, beaten)
    return _scores(score, inside, np.zeros(target.size, bool))


def roc(scores, member) -> Roc:
    """The exact curve of scores (N,) against member (N,) bool; NaN scores are refused."""
    scores, member = _pair(scores, member)
    if np.isnan(scores).any():
        raise ValueError(f"{np.isnan(scores).sum()} of {scores.size} scores are NaN")
    values, place = np.unique(-scores, return_inverse=True)
    counts = np.stack([np.bincount(place[member == m], minlength=values.size) for m in (0, 1)])
    sums = np.concatenate([np.zeros((2, 1)), np.cumsum(counts, axis=1)], axis=1)
    rates = intervals.divide(sums, np.broadcast_to(sums[:, -1:], sums.shape))
    return Roc(rates[0], rates[1], np.concatenate([[np.inf], -values]))


def attack(
    scores, member, *, targets=(0.1, 0.01, 0.001), level: float = 0.95, minimum: int = 10
) -> Attack:
    """AUC, best balanced accuracy, and true positive rates at low false positive rates.

    Rows whose score is NaN are left out and counted. Fewer than `minimum` members or non-members:
    NaN with a reason.
    """
    scores, member = _pair(scores, member)
    kept = ~np.isnan(scores)
    missing = int((~kept).sum())
    scores, member = scores[kept], member[kept]
    ones, zeros = int(member.sum()), int((~member).sum())
    if min(ones, zeros) < max(minimum, 1):
        reason = f"{ones} members and {zeros} others, fewer than {minimum}"
        at = tuple(AtRate(t, np.nan, np.nan, np.nan, 0, reason) for t in targets)
        return Attack(np.nan, np.nan, np.nan, np.nan, at, ones, zeros, missing, reason)
    curve = roc(scores, member)
    auc = float(np.trapezoid(curve.true_positive_rate, curve.false_positive_rate))
    low, high = auc_limits(auc, ones, zeros, level)
    accuracy = float(np.max(1 + curve.true_positive_rate - curve.false_positive_rate) / 2)
    at = tuple(_at(curve, target, ones, zeros, level) for target in targets)
    return Attack(auc, low, high, accuracy, at, ones, zeros, missing, "")


def by_group(scores, member, groups, **options) -> tuple[Attack, ...]:
    """`attack` inside each group; groups (N, G) bool. Compare gaps with `auc_gap` before reading
    anything into them: with 200 members a group, AUCs differ by 0.08 where nothing leaks."""
    scores, member = _pair(scores, member)
    columns = intervals.membership(groups).T
    return tuple(attack(scores[column], member[column], **options) for column in columns)


def auc_limits(auc: float, num_members: int, num_others: int, level: float = 0.95):
    """Limits of an AUC from its counts: θ with |auc - θ| = z·se(θ), Newcombe 2006, method 5."""
    z, size = ndtri(0.5 + intervals.checked_level(level) / 2), (num_members + num_others) / 2

    def excess(theta, sign):
        spread = 1 + (size - 1) * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return sign * (auc - theta) - z * np.sqrt(
            theta * (1 - theta) * spread / (num_members * num_others)
        )

    inner = min(max(auc, 1e-12), 1 - 1e-12)  # at 0 and 1 the equation also holds trivially
    low = brentq(excess, 0, inner, args=(1,)) if auc > 0 else 0.0
    high = brentq(excess, inner, 1, args=(-1,)) if auc < 1 else 1.0
    return float(low), float(high)


def gaps(
    scores,
    member,
    groups,
    *,
    targets=(0.1, 0.01, 0.001),
    minimum: int = 10,
    num_permutations: int = 1000,
    seed: int = 0,
) -> tuple[Gap, ...]:
    """Do some groups leak more than others? Of AUC, balanced accuracy and rates at `targets`, as in
    `attack`. A gap is above 0 even where none does, so that it means nothing without its null
    (Kulynych et al. 2019, arXiv 1906.00389)."""
    scores, member = _pair(scores, member)
    groups = intervals.membership(groups)
    if groups.shape[0] != scores.size:
        raise ValueError(f"groups must have a row for each of {scores.size} scores")
    kept = ~np.isnan(scores) & groups.any(1)
    order = np.flatnonzero(kept)[np.argsort(-scores[kept], kind="stable")]
    scores, member, groups = scores[order], member[order], groups[order]
    ends = np.flatnonzero(np.append(scores[1:] != scores[:-1], True)[: scores.size])
    ones, zeros = groups[member].sum(0), groups[~member].sum(0)
    enough = np.minimum(ones, zeros) >= max(minimum, 1)
    defined = np.stack([enough, enough, *(enough & (t * zeros >= 1) for t in targets)])

    def measured(groups) -> np.ndarray:
        return np.where(defined, _of_groups(member, groups, ends, targets), np.nan)

    found, null = measured(groups), np.full((num_permutations, len(defined)), np.nan)
    compared = defined.sum(1) > 1
    rng, shuffled = np.random.default_rng(seed), groups.copy()
    parts = (np.flatnonzero(member), np.flatnonzero(~member))
    for draw in range(num_permutations if compared.any() else 0):
        for rows in parts:
            shuffled[rows] = groups[rng.permutation(rows)]
        null[draw, compared] = _spread(measured(shuffled)[compared])
    names = ("auc", "best balanced accuracy", *(f"tpr at {t:g}" for t in targets))
    can = f"groups have {minimum} members and others"
    cans = (can, can, *(f"{can} and resolve a rate of {t:g}" for t in targets))
    return tuple(map(_gap, names, found, null.T, cans))


def _gap(measure: str, values: np.ndarray, null: np.ndarray, can: str) -> Gap:
    number = int((~np.isnan(values)).sum())
    if number < 2:
        reason = f"{number} of {values.size} {can}"
        return Gap(measure, np.nan, np.nan, np.nan, values, number, null.size, reason)
    gap = float(_spread(values))
    p = float((np.sum(null >= gap - 1e-12) + 1) / (null.size + 1))
    return Gap(measure, gap, float(null.mean()), p, values, number, null.size, "")


def _spread(values) -> np.ndarray:
    """Largest minus smallest along the last axis."""
    return np.nanmax(values, axis=-1) - np.nanmin(values, axis=-1)


def _of_groups(member, groups, ends, targets) -> np.ndarray:
    """AUC, best balanced accuracy and rates at `targets` (M, G) of rows sorted by falling score;
    ends (E,): the last row of each score."""
    inside = np.ascontiguousarray(groups.T)
    hits, false = (  # (G, 1 + E): members, and others, of at least this score
        np.concatenate([np.zeros((len(inside), 1)), np.cumsum(inside & called, 1)[:, ends]], 1)
        for called in (member, ~member)
    )
    ones, zeros = hits[:, -1:], false[:, -1:]
    area = np.einsum("ge,ge->g", false[:, 1:] - false[:, :-1], hits[:, 1:] + hits[:, :-1]) / 2
    best = (hits * zeros - false * ones).max(1)
    pairs = (ones * zeros)[:, 0]
    auc, gain = intervals.divide(area, pairs), intervals.divide(best, pairs)
    rates = (
        intervals.divide((hits * (false <= (t + 1e-12) * zeros)).max(1), ones[:, 0])
        for t in targets
    )
    return np.stack([auc, (1 + gain) / 2, *rates])


def _at(curve: Roc, target: float, ones: int, zeros: int, level: float) -> AtRate:
    if target * zeros < 1:
        reason = f"not resolvable: {zeros} non-members resolve rates of {1 / zeros:.2g} and above"
        return AtRate(target, np.nan, np.nan, np.nan, 0, reason)
    best = curve.true_positive_rate[curve.false_positive_rate <= target + 1e-12][-1]
    place = np.searchsorted(curve.true_positive_rate, best)  # the fewest false positives with it
    hits = round(curve.true_positive_rate[place] * ones)
    limits = intervals.clopper_pearson(hits, ones, level)
    false = round(curve.false_positive_rate[place] * zeros)
    return AtRate(target, limits.estimate, limits.low, limits.high, false, "")


def _normal(shadows, kept, variance: str, center: str):
    """Centre and spread (N,) of the shadows kept (N, K), and where the spread is that of all rows:
    everywhere with "global", else where a row's own shadows have none."""
    if variance not in VARIANCES:
        raise ValueError(f"variance must be one of {VARIANCES}, not {variance!r}")
    if center not in ("mean", "median"):
        raise ValueError(f"center must be 'mean' or 'median', not {center!r}")
    values, counts = np.where(kept, shadows, np.nan), kept.sum(1)
    middle = np.full(len(values), np.nan)
    some = counts > 0
    middle[some] = getattr(np, f"nan{center}")(values[some], axis=1)
    residuals = values - middle[:, None]
    # A row with one shadow has a residual of 0, which says nothing of the spread.
    pooled = residuals[counts > 1]
    shared_spread = np.sqrt(np.nanmean(pooled**2)) if pooled.size else np.nan
    squares = np.nansum((values - _row_mean(values, counts)) ** 2, axis=1)
    spread = np.sqrt(intervals.divide(squares, counts.astype(float)))
    shared = np.full(len(values), variance == "global") | ~(spread > 0)
    return middle, np.where(shared, shared_spread if shared_spread > 0 else np.nan, spread), shared


def _row_mean(values, counts) -> np.ndarray:
    return intervals.divide(np.nansum(values, axis=1), counts.astype(float))[:, None]


def _log_density(x, normal) -> np.ndarray:
    mean, spread, _ = normal
    return -0.5 * (LOG_2PI + ((x - mean) / spread) ** 2) - np.log(spread)


def _scores(score, inside, shared) -> Scores:
    known = inside.sum(1)
    return Scores(score, known, inside.shape[1] - known, shared & ~np.isnan(score))


def _checked(target, shadows, inside):
    target, shadows = (np.asarray(x, np.float64) for x in (target, shadows))
    inside = np.asarray(inside)
    shapes = f"target {target.shape}, shadows {shadows.shape}, inside {inside.shape}"
    if target.ndim != 1 or shadows.shape[:1] != target.shape or shadows.ndim != 2:
        raise ValueError(f"statistics must be (N,) and (N, K), not {shapes}")
    if inside.shape != shadows.shape or inside.dtype != bool:
        raise ValueError(f"inside must be a boolean (N, K), not {shapes} of {inside.dtype}")
    if not (np.isfinite(target).all() and np.isfinite(shadows).all()):
        raise ValueError("statistics must be finite; a diverged shadow has to be left out")
    return target, shadows, inside


def _pair(scores, member):
    scores, member = np.asarray(scores, np.float64), np.asarray(member)
    if scores.ndim != 1 or member.shape != scores.shape or member.dtype != bool:
        raise ValueError(
            f"scores and member must be (N,) and (N,) bool, not {scores.shape} and {member.shape}"
            f" of {member.dtype}"
        )
    return scores, member


def _classes(logits, labels):
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    if logits.ndim != 2 or logits.shape[1] < 2 or labels.shape != logits.shape[:1]:
        shapes = f"{logits.shape} and {labels.shape}"
        raise ValueError(f"logits and labels must be (N, C) with C > 1 and (N,), not {shapes}")
    if labels.size and (labels.min() < 0 or labels.max() >= logits.shape[1]):
        raise ValueError(f"labels must lie in 0 .. {logits.shape[1] - 1}")
    return logits, labels
