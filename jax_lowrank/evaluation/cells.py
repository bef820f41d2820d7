"""Bootstrap of tables by group for many runs at once, from counts of equal rows.

Rows that agree in group membership, label, weight and every run's prediction are one cell. A
resample draws how often each cell occurs and adds up, so that its cost follows the number of
cells, not of rows, and all runs see the same resample: any difference between runs is paired.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import sparse

from jax_lowrank.evaluation.intervals import CHUNK, cluster_index, threaded


class Cells(NamedTuple):
    """K cells of `counts` (K,) units each; a unit is a row, or a cluster of rows.

    sums: (D, K) sparse, what one unit of a cell adds to D totals. shape: (R, G + 1, C), the tables
    that `tables` makes of the totals; the last group is all rows.
    """

    sums: sparse.csc_array
    counts: np.ndarray
    shape: tuple[int, int, int]


def make(labels, predictions, groups, *, num_classes: int, weights=None, clusters=None) -> Cells:
    """Cells of labels (N,), predictions (R, N) int, groups (N, G) bool, checked by the caller.

    clusters (N,): rows that are drawn together, e.g. those of one template; None: each row alone.
    """
    num_runs, num_rows = predictions.shape
    everyone = np.column_stack([groups, np.ones(num_rows, bool)])
    if clusters is None:
        first, counts = _equal_rows(labels, predictions, everyone, num_classes, weights)
        labels, predictions, everyone = labels[first], predictions[:, first], everyone[first]
        weights = None if weights is None else weights[first]
        unit = np.arange(first.size)
    else:
        unit = cluster_index(clusters, num_rows)
        counts = np.ones(unit.max(initial=-1) + 1, np.int64)
    weights = np.ones(unit.size) if weights is None else weights
    row, column = np.nonzero(everyone)
    slots = everyone.shape[1]
    # Labels are the runs' common margin; what is not predicted as class 0 says the rest.
    places = [column * num_classes + labels[row]]
    units, values = [unit[row]], [weights[row]]
    start = slots * num_classes
    for run in range(num_runs):
        other = predictions[run, row] > 0
        label, predicted = labels[row][other], predictions[run, row][other] - 1
        table = (column[other] * num_classes + label) * (num_classes - 1) + predicted
        places.append(start + table)
        units.append(unit[row][other])
        values.append(weights[row][other])
        start += slots * num_classes * (num_classes - 1)
    entries = (np.concatenate(values), (np.concatenate(places), np.concatenate(units)))
    sums = sparse.csc_array(entries, shape=(start, counts.size))
    return Cells(sums, counts, (num_runs, slots, num_classes))


def tables(cells: Cells, totals: np.ndarray) -> np.ndarray:
    """Tables (R, G + 1, C, C, B) of totals (D, B): replicates last, which is fast to add along."""
    num_runs, slots, num_classes = cells.shape
    size, ends = totals.shape[1], slots * num_classes
    margin = totals[:ends].reshape(1, slots, num_classes, 1, size)
    rest = totals[ends:].reshape(num_runs, slots, num_classes, num_classes - 1, size)
    first = margin - rest.sum(3, keepdims=True)
    return np.concatenate([np.maximum(first, 0.0), rest], axis=3)


def resample(
    cells: Cells, statistics: Callable[[np.ndarray], np.ndarray], num_resamples: int, seed: int = 0
) -> np.ndarray:
    """Statistics (B, ...) of B resampled tables.

    statistics: takes tables (b, R, G + 1, C, C) and returns (b, ...); it is called on chunks of the
    resamples. As many units are drawn, with replacement, as there are.
    """

    def draw(rng, size: int) -> np.ndarray:
        return tables(cells, cells.sums @ _draw(rng, cells.counts, size))

    return _in_chunks(cells, draw, statistics, num_resamples, seed)


def swap(
    cells: Cells, statistics: Callable[[np.ndarray], np.ndarray], num_swaps: int, seed: int = 0
) -> np.ndarray:
    """Statistics (B, ...) when units exchange the first half of the runs with the second.

    Runs are two methods under the same seeds, method by method. A unit swaps in all seeds at once,
    with probability 1/2: the null that the methods are interchangeable on every unit.
    """
    half = cells.shape[0] // 2

    def draw(rng, size: int) -> np.ndarray:
        swapped = rng.binomial(cells.counts[:, None], 0.5, (cells.counts.size, size))
        moved = tables(cells, cells.sums @ swapped.astype(np.float64))
        kept = tables(cells, cells.sums @ (cells.counts[:, None] - swapped).astype(np.float64))
        return kept + np.concatenate([moved[half:], moved[:half]])

    return _in_chunks(cells, draw, statistics, num_swaps, seed)


def _in_chunks(cells: Cells, draw, statistics, number: int, seed: int) -> np.ndarray:
    """Statistics of `number` tables drawn with their replicates last, chunks side by side."""
    per_replicate = max(cells.sums.shape[0] * cells.shape[2], cells.counts.size, 1)
    step = max(1, min(number, CHUNK // per_replicate))
    sizes = [min(step, number - start) for start in range(0, number, step)]

    def work(rng, size: int) -> np.ndarray:
        return statistics(np.moveaxis(draw(rng, size), -1, 0))

    return np.concatenate(threaded(work, np.random.default_rng(seed).spawn(len(sizes)), sizes))


def percentiles(replicates: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper limits (...) at `level` of replicates (B, ...), NaN ones left out.

    Linear between order statistics, as numpy's quantile; NaN where no replicate is defined.
    """
    ordered = np.sort(replicates, axis=0)  # NaN last
    last = (~np.isnan(ordered)).sum(0) - 1

    def at(share: float) -> np.ndarray:
        place = np.maximum(last, 0) * share
        below = np.floor(place).astype(int)
        above = np.minimum(below + 1, np.maximum(last, 0))
        one, two = (np.take_along_axis(ordered, i[None], 0)[0] for i in (below, above))
        return one + (two - one) * (place - below)

    tail = (1 - level) / 2
    return at(tail), at(1 - tail)


def _equal_rows(labels, predictions, everyone, num_classes, weights) -> tuple[np.ndarray, ...]:
    """A first row of each cell, and how many rows it has."""
    small = np.uint8 if num_classes <= 256 else np.int32
    parts: Sequence[np.ndarray] = [
        np.packbits(everyone, axis=1),
        labels.astype(small)[:, None].view(np.uint8),
        np.ascontiguousarray(predictions.T.astype(small)).view(np.uint8),
    ]
    if weights is not None:
        parts = [*parts, weights[:, None].view(np.uint8)]
    keys = np.ascontiguousarray(np.concatenate(parts, axis=1))
    keys = keys.view(np.dtype((np.void, keys.shape[1]))).ravel()
    return np.unique(keys, return_index=True, return_counts=True)[1:]


def _draw(rng, counts: np.ndarray, size: int) -> np.ndarray:
    """How often each cell is drawn, (K, size) float64; columns sum to the number of units."""
    total = int(counts.sum())
    if counts.size * 16 < total:
        return rng.multinomial(total, counts / total, size).T.astype(np.float64)
    cell = np.repeat(np.arange(counts.size), counts)
    weights = np.empty((size, counts.size))
    for row in range(size):
        picks = cell[rng.integers(0, total, total, np.int32)]
        weights[row] = np.bincount(picks, minlength=counts.size)
    return np.ascontiguousarray(weights.T)
