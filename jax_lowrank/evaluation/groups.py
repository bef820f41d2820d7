"""Rates by group: rows are counted once, and every rate comes from the counts.

Groups are an (N, G) boolean membership matrix whose columns may overlap; a partition is the special
case. A table is (..., C, C), [label, prediction], with any leading axes (runs, groups, replicates
of a bootstrap), and the functions of tables keep those axes. A rate speaks of one class against
the others, `positive`. Host numpy, float64; rates are in [0, 1].
"""

from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

from jax_lowrank.evaluation.intervals import (
    checked_level,
    checked_weights,
    divide,
    membership,
    too_few_rows,
)


class Counts(NamedTuple):
    """Tables of every group and of all rows: sums of sample weights, and numbers of rows.

    by_group, rows: (..., G, C, C); overall, overall_rows: (..., C, C).
    """

    by_group: np.ndarray
    overall: np.ndarray
    rows: np.ndarray
    overall_rows: np.ndarray


class Rates(NamedTuple):
    """One array a rate. Ideal: 0 for fpr and false_omission, 1 for tpr, ppv, accuracy and both F1.

    selection: predicted positive. tpr, fpr: predicted positive among positives and negatives. ppv:
    positive among predicted positives. false_omission: positive among predicted negatives. f1: 2TP
    / (2TP + FP + FN); macro_f1: its mean over the classes that occur or are predicted.
    """

    selection: np.ndarray
    tpr: np.ndarray
    fpr: np.ndarray
    ppv: np.ndarray
    false_omission: np.ndarray
    accuracy: np.ndarray
    f1: np.ndarray
    macro_f1: np.ndarray


# What a rate is a share of: so many rows must be there before it is given.
SUPPORT = Rates(
    "rows",
    "positives",
    "negatives",
    "predicted positives",
    "predicted negatives",
    "rows",
    "positives",
    "rows",
)


class GroupRates(NamedTuple):
    """Rates of the groups, of all rows but the group's, and of all rows.

    by_group, rest: (..., G); overall: (...). support: numbers of rows behind by_group. reason:
    arrays of strings like by_group, '' where the rate is defined. Rates of `rest` and `overall`
    obey the same minimum.
    """

    by_group: Rates
    rest: Rates
    overall: Rates
    support: Rates
    reason: Rates


class GroupMeans(NamedTuple):
    """Means (..., G) of a value of every row, with Student limits and the rows behind them (G,)."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    rows: np.ndarray
    reason: np.ndarray


def count(labels, predictions, groups, *, num_classes: int = 2, weights=None) -> Counts:
    """Tables from labels (N,), predictions (..., N), groups (N, G) and weights (N,) >= 0.

    Labels and predictions are classes 0 .. C-1. ValueError for probabilities (choose a threshold
    first), classes out of range and shapes that disagree.
    """
    groups = membership(groups)
    labels = checked_classes(labels, num_classes, "labels")
    predictions = checked_classes(predictions, num_classes, "predictions")
    if labels.shape != groups.shape[:1] or predictions.shape[-1:] != labels.shape:
        shapes = f"{labels.shape}, {predictions.shape} and {groups.shape}"
        raise ValueError(
            f"labels, predictions, groups must be (N,), (..., N), (N, G), not {shapes}"
        )
    everyone = np.column_stack([groups, np.ones(labels.size, bool)])
    tables = _tables(labels, predictions, everyone, num_classes, None)
    rows = tables.astype(np.int64)
    if weights is not None:
        weights = checked_weights(weights, labels.size)
        tables = _tables(labels, predictions, everyone, num_classes, weights)
    tables, rows = np.moveaxis(tables, -3, 0), np.moveaxis(rows, -3, 0)
    by_group, rows_by_group = (np.moveaxis(part[:-1], 0, -3) for part in (tables, rows))
    return Counts(by_group, tables[-1], rows_by_group, rows[-1])


def rates(table, positive: int = 1, compat: str | None = None) -> Rates:
    """Rates of tables (..., C, C), each (...). A share of nothing is NaN.

    compat='fairlearn' makes it 0, as scikit-learn does inside fairlearn (and torchmetrics too): a
    group without positives then has a true positive rate of 0.
    """
    if compat not in (None, "fairlearn"):
        raise ValueError(f"compat must be None or 'fairlearn', not {compat!r}")
    table = np.asarray(table, np.float64)
    parts = _parts(table, positive)
    diagonal = np.diagonal(table, axis1=-2, axis2=-1)
    every_f1 = divide(2 * diagonal, table.sum(-1) + table.sum(-2))
    found = [divide(top, bottom) for top, bottom in parts]
    known = ~np.isnan(every_f1)
    found.append(divide(np.where(known, every_f1, 0.0).sum(-1), known.sum(-1)))
    if compat:
        found = [np.where(np.isnan(rate), 0.0, rate) for rate in found]
    return Rates(*found)


def support(rows, positive: int = 1) -> Rates:
    """How many rows each rate of `rates` is a share of; see SUPPORT."""
    rows = np.asarray(rows)
    bottoms = [bottom for _, bottom in _parts(rows, positive)]
    bottoms[6] = rows[..., positive, :].sum(-1)  # F1 without positives says nothing
    return Rates(*bottoms, rows.sum((-1, -2)))


def group_rates(counts: Counts, *, positive: int = 1, minimum: int = 10) -> GroupRates:
    """Rates of groups, rest and all, NaN with a reason where fewer than `minimum` rows are behind.

    minimum: at least 1; see SUPPORT for which rows count. A group without rows stays in its place.
    """
    if minimum < 1:
        raise ValueError(f"minimum must be at least 1 row, not {minimum}")
    behind = support(counts.rows, positive)
    rest_rows = counts.overall_rows[..., None, :, :] - counts.rows
    rest = counts.overall[..., None, :, :] - counts.by_group

    def enough(table, rows) -> Rates:
        pairs = zip(rates(table, positive), support(rows, positive))
        return Rates(*[np.where(n >= minimum, rate, np.nan) for rate, n in pairs])

    by_group = enough(counts.by_group, counts.rows)
    reasons = []
    for rate, n, what in zip(by_group, behind, SUPPORT):
        why = too_few_rows(n, minimum, what)
        # weights of 0 can leave a share of nothing among enough rows
        reasons.append(np.where(np.isnan(rate) & (why == ""), "weights of 0 only", why))
    overall = enough(counts.overall, counts.overall_rows)
    return GroupRates(by_group, enough(rest, rest_rows), overall, behind, Rates(*reasons))


def group_means(
    values, groups, weights=None, *, minimum: int = 10, level: float = 0.95
) -> GroupMeans:
    """Mean by group of values (..., N), such as margins, Brier scores or losses; groups (N, G).

    Limits: Student's t with the group's rows minus 1 degrees of freedom, rows independent; with
    weights the linearised error of a ratio of sums. Fewer than max(minimum, 2) rows: NaN with a
    reason. NaN values propagate. An all-true column gives the mean of all rows.
    """
    values, groups = np.asarray(values, np.float64), membership(groups)
    if values.shape[-1:] != groups.shape[:1]:
        raise ValueError(f"values {values.shape} must end in the rows of groups {groups.shape}")
    tail = (1 + checked_level(level)) / 2
    weights = np.ones(len(groups)) if weights is None else checked_weights(weights, len(groups))
    rows = groups.sum(0)
    means, errors = (np.full((*values.shape[:-1], rows.size), np.nan) for _ in range(2))
    for g in range(rows.size):
        inside, weight = values[..., groups[:, g]], weights[groups[:, g]]
        if rows[g] >= max(minimum, 2) and weight.sum() > 0:
            means[..., g] = inside @ weight / weight.sum()
            spread = ((inside - means[..., g, None]) * weight) ** 2
            correction = rows[g] / (rows[g] - 1)
            errors[..., g] = np.sqrt(correction * spread.sum(-1)) / weight.sum()
    half = stdtrit(np.maximum(rows - 1, 1), tail) * errors
    reason = too_few_rows(rows, max(minimum, 2))
    return GroupMeans(means, means - half, means + half, rows, reason)


def margins(scores) -> np.ndarray:
    """Largest minus second largest of scores (..., C), logits or probabilities: 0 = undecided."""
    top = np.partition(np.asarray(scores, np.float64), -2, axis=-1)
    return top[..., -1] - top[..., -2]


def generalized_entropy(table, alpha: float = 2.0, positive: int = 1) -> np.ndarray:
    """Inequality (...) of benefits b = prediction - label + 1 (0, 1 or 2) over the rows of tables.

    mean((b/m)^alpha - 1) / (alpha (alpha - 1)) with m the mean of b: 0 = all rows benefit alike.
    alpha = 1 is the Theil index, mean(b/m log(b/m)); alpha = 0, -mean(log(b/m)), is infinite with a
    false negative. Speicher et al. (KDD 2018).
    """
    return _entropy(*_benefits(np.asarray(table, np.float64), positive), alpha)


def between_group_entropy(tables, groups, alpha: float = 2.0, positive: int = 1) -> np.ndarray:
    """`generalized_entropy` with each row's benefit replaced by its group's mean: tables (..., G).

    The groups must be a partition: ValueError where a row is in none or in several.
    """
    inside = membership(groups).sum(1)
    if (inside != 1).any():
        raise ValueError(
            f"between-group entropy needs every row in one group; {(inside != 1).sum()} rows are in"
            " none or several: build the groups of all combinations first"
        )
    shares, benefits = _benefits(np.asarray(tables, np.float64), positive)
    weight = shares.sum(-1)
    means = divide((shares * benefits).sum(-1), weight)
    return _entropy(weight, np.where(weight > 0, means, 0.0), alpha)


def checked_classes(values, num_classes: int, name: str) -> np.ndarray:
    """Classes as integers; ValueError for floats and for numbers outside 0 .. num_classes - 1."""
    values = np.asarray(values)
    if values.dtype.kind not in "biu":
        raise ValueError(
            f"{name} must be class numbers 0 .. {num_classes - 1}, not {values.dtype}; of"
            " probabilities p take p >= 0.5 or an argmax first"
        )
    values = values.astype(np.int64)
    if values.size and (values.min() < 0 or values.max() >= num_classes):
        raise ValueError(
            f"{name} must lie in 0 .. {num_classes - 1}; found {values.min()} .. {values.max()}"
        )
    return values


def _tables(labels, predictions, groups, num_classes, weights) -> np.ndarray:
    row, column = np.nonzero(groups)
    num_groups, size = groups.shape[1], num_classes**2
    place = column * size + labels[row] * num_classes
    weight = None if weights is None else weights[row]
    flat = predictions.reshape(-1, labels.size)
    tables = np.empty((len(flat), num_groups * size))
    for run, predicted in enumerate(flat):
        tables[run] = np.bincount(place + predicted[row], weight, num_groups * size)
    return tables.reshape(*predictions.shape[:-1], num_groups, num_classes, num_classes)


def _parts(table: np.ndarray, positive: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Numerators and denominators of the rates in order, macro_f1 left out."""
    if not 0 <= positive < table.shape[-1]:
        raise ValueError(f"positive must be a class 0 .. {table.shape[-1] - 1}, not {positive}")
    labelled, predicted = table[..., positive, :].sum(-1), table[..., :, positive].sum(-1)
    hit, total = table[..., positive, positive], table.sum((-1, -2))
    return [
        (predicted, total),
        (hit, labelled),
        (predicted - hit, total - labelled),
        (hit, predicted),
        (labelled - hit, total - predicted),
        (np.trace(table, axis1=-2, axis2=-1), total),
        (2 * hit, labelled + predicted),
    ]


def _benefits(table: np.ndarray, positive: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights (..., 3) of the benefits 0, 1, 2, and these."""
    false_negatives = table[..., positive, :].sum(-1) - table[..., positive, positive]
    false_positives = table[..., :, positive].sum(-1) - table[..., positive, positive]
    right = table.sum((-1, -2)) - false_negatives - false_positives
    return np.stack([false_negatives, right, false_positives], -1), np.arange(3.0)


def _entropy(weights: np.ndarray, benefits: np.ndarray, alpha: float) -> np.ndarray:
    total = weights.sum(-1, keepdims=True)
    share = divide(weights, np.broadcast_to(total, weights.shape))
    relative = divide(benefits + 0 * share, (share * benefits).sum(-1, keepdims=True) + 0 * share)
    with np.errstate(divide="ignore", invalid="ignore"):
        if alpha == 1:
            terms = np.where(relative == 0, 0.0, relative * np.log(relative))
        elif alpha == 0:
            terms = -np.log(relative)
        else:
            terms = (relative**alpha - 1) / (alpha * (alpha - 1))
        return np.where(share == 0, 0.0, share * terms).sum(-1)
