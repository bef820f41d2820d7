"""How well classes are told: accuracy, macro-F1 and likelihood, beside what the majority gives.

Arrays in: logits (N, C) and labels (N,) in 0..C-1. Rates are in [0, 1], 1 is ideal.
"""

from typing import NamedTuple

import numpy as np
from scipy.special import logsumexp

from jax_lowrank.evaluation.intervals import Interval, bootstrap, wilson


class Classification(NamedTuple):
    """What `measure` finds on N rows."""

    accuracy: Interval  # Wilson
    macro_f1: Interval  # bootstrap over rows
    nll: Interval  # nats a row; bootstrap over rows
    majority_accuracy: Interval  # of always saying one class; Wilson
    f1: np.ndarray  # (C,), NaN for a class that neither occurs nor is predicted
    support: np.ndarray  # (C,) rows of each class


def measure(
    logits, labels, *, majority: int | None = None, level: float = 0.95, num_resamples: int = 1000
) -> Classification:
    """Metrics of predictions argmax(logits).

    majority: the class that the baseline always says, that of the training rows if known; None: the
    most frequent of `labels`. macro_f1 is the mean of F1 = 2TP / (2TP + FP + FN) over the classes
    for which it is defined. Ties go to the first class.
    """
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    if len(labels) == 0:
        raise ValueError("no rows to measure classification on")
    num_classes, n = logits.shape[1], len(labels)
    predicted = logits.argmax(axis=1)
    nll = logsumexp(logits, axis=1) - logits[np.arange(n), labels]
    support = np.bincount(labels, minlength=num_classes)
    majority = int(support.argmax()) if majority is None else majority
    pairs = (labels * num_classes + predicted).astype(np.float64)
    resample = {"level": level, "num_resamples": num_resamples}
    return Classification(
        accuracy=wilson(int((predicted == labels).sum()), n, level),
        macro_f1=bootstrap(
            pairs, lambda p: float(np.nanmean(f1_by_class(p, num_classes))), **resample
        ),
        nll=bootstrap(nll, **resample),
        majority_accuracy=wilson(int(support[majority]), n, level),
        f1=f1_by_class(pairs, num_classes),
        support=support,
    )


def f1_by_class(pairs: np.ndarray, num_classes: int) -> np.ndarray:
    """F1 (C,) of pairs label * C + prediction; NaN where a class has neither."""
    counts = np.bincount(pairs.astype(np.int64), minlength=num_classes**2)
    table = counts.reshape(num_classes, num_classes)
    total = table.sum(axis=0) + table.sum(axis=1)
    return np.where(total > 0, 2 * np.diag(table) / np.maximum(total, 1), np.nan)
