"""From logits to probabilities, and what one row's probabilities are worth.

Row values (..., N) go to `groups.group_means` for groups, counts and limits. Host numpy, float64.
"""

from typing import NamedTuple

import numpy as np
from scipy.fft import dct, idct
from scipy.optimize import brentq
from scipy.special import log_softmax, logsumexp

from jax_lowrank.evaluation.intervals import checked_weights, membership

GRID = 1024  # cells of [0, 1] on which the smooth calibration error is computed
LOG_TEMPERATURE = 7.0  # temperatures are sought within exp(+-7)


class Temperature(NamedTuple):
    """Divide logits by `temperature`; nll: nats a row of the n rows it was fitted on."""

    temperature: float
    nll_before: float
    nll_after: float
    n: int
    reason: str


def softmax(logits) -> np.ndarray:
    """Probabilities (..., C) of logits, in float64: float32 loses the tails."""
    return np.exp(log_softmax(np.asarray(logits, np.float64), axis=-1))


def top_label(probabilities, labels) -> tuple[np.ndarray, np.ndarray]:
    """Largest probability and whether its class (the first of ties) is the label, both (..., N)."""
    probabilities = np.asarray(probabilities)
    return probabilities.max(-1), (probabilities.argmax(-1) == np.asarray(labels)).astype(int)


def brier(p, y) -> np.ndarray:
    """(p - y)^2 (..., N) of P(y = 1), p (..., N), and events y (N,) of 0 and 1; 0 is ideal."""
    return (np.asarray(p, np.float64) - np.asarray(y)) ** 2


def brier_of_classes(probabilities, labels) -> np.ndarray:
    """Sum over classes of squared errors (..., N), in [0, 2], of probabilities (..., N, C).

    As Brier (1950) has it: with two classes, twice `brier`.
    """
    p, labels = np.asarray(probabilities, np.float64), np.asarray(labels)
    return ((p - (labels[..., None] == np.arange(p.shape[-1]))) ** 2).sum(-1)


def nll(logits, labels) -> np.ndarray:
    """-log p(label) in nats (..., N) of logits (..., N, C) and labels (N,); 0 is ideal."""
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    index = np.broadcast_to(labels, logits.shape[:-1])[..., None]
    return logsumexp(logits, axis=-1) - np.take_along_axis(logits, index, -1)[..., 0]


def fit_temperature(logits, labels) -> Temperature:
    """The temperature that makes labels (N,) most likely under softmax(logits (N, C) / T).

    Fit it on validation rows, never on those it is judged on. The likelihood has one maximum; where
    it lies outside exp(-7) .. exp(7) the end is taken, with a reason. Guo et al. (2017).
    """
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not labels.size:
        raise ValueError(f"need logits (N, C) and labels (N,), not {logits.shape}, {labels.shape}")
    right = np.take_along_axis(logits, labels[:, None], 1)[:, 0]

    def slope(log_temperature: float) -> float:
        """Of the mean NLL by 1/T: expected minus observed logit, falling in T."""
        p = softmax(logits * np.exp(-log_temperature))
        return float(((p * logits).sum(1) - right).mean())

    reason = ""
    if slope(-LOG_TEMPERATURE) <= 0:
        found, reason = -LOG_TEMPERATURE, "the rows are told apart perfectly: no smallest T"
    elif slope(LOG_TEMPERATURE) >= 0:
        found, reason = LOG_TEMPERATURE, "the logits say nothing of the labels: no largest T"
    else:
        found = brentq(slope, -LOG_TEMPERATURE, LOG_TEMPERATURE, xtol=1e-10)
    temperature = float(np.exp(found))
    before, after = (float(nll(logits / t, labels).mean()) for t in (1.0, temperature))
    return Temperature(temperature, before, after, labels.size, reason)


def smooth_calibration_error(p, y, groups, weights=None) -> np.ndarray:
    """Smooth ECE (..., G) of p (..., N) and y (..., N) or (N,): no bins to choose; 0 is ideal.

    The residuals y - p, smoothed over p with a Gaussian reflected at 0 and 1, integrated in
    absolute value; its width is the one that equals the result. Blasiok and Nakkiran (2023). On a
    grid of 1024 cells; the reflected Gaussian is diagonal in the cosine basis. About half of the
    binned error's noise; NaN for a group without rows. What chance alone gives has no closed form
    and, drawn with every group's width sought anew, would cost more than all else: read
    `calibration.perfect` of the binned error for it.
    """
    groups, p = membership(groups), np.asarray(p, np.float64)
    y = np.broadcast_to(np.asarray(y, np.float64), p.shape)
    weights = np.ones(len(groups)) if weights is None else checked_weights(weights, len(groups))
    row, column = np.nonzero(groups)
    size = groups.shape[1] * GRID
    densities = []
    for chance, event in zip(p.reshape(-1, len(groups)), y.reshape(-1, len(groups))):
        place = np.clip(chance * GRID - 0.5, 0, GRID - 1)
        left = np.minimum(place.astype(int), GRID - 2)
        share, residual = (place - left)[row], (weights * (event - chance))[row]
        at = column * GRID + left[row]
        sums = np.bincount(at, residual * (1 - share), size)
        densities.append(sums + np.bincount(at + 1, residual * share, size))
    total = weights @ groups
    density = np.reshape(densities, (-1, groups.shape[1], GRID))
    waves = dct(density / np.maximum(total, 1e-300)[:, None], axis=-1)
    decay = np.pi**2 / 2 * np.arange(GRID) ** 2

    def smoothed(width: np.ndarray) -> np.ndarray:
        return np.abs(idct(waves * np.exp(-decay * width[..., None] ** 2), axis=-1)).sum(-1)

    low, high = np.zeros(waves.shape[:2]), np.ones(waves.shape[:2])
    for _ in range(20):
        middle = (low + high) / 2
        wider = smoothed(middle) > middle
        low, high = np.where(wider, middle, low), np.where(wider, high, middle)
    found = np.where(total > 0, (low + high) / 2, np.nan)
    return found.reshape(*p.shape[:-1], groups.shape[1])
