"""Who trains on what in an audit by shadow models: the target's own fine-tuning, on other rows.

N rows of which `taken` (N, K) says which of the K shadows trains on them. Online attacks need rows
that some shadows knew and others did not (Carlini et al. 2022); the published offline protocol has
shadows that knew none of the audited rows (Ding et al. 2024).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np


def halves(num_rows: int, num_shadows: int, seed: int) -> np.ndarray:
    """taken (N, K) bool: every row is in for half of the shadows, every shadow has half the rows.

    Shadows 2j and 2j + 1 have complementary halves; of an odd number of rows, one is in neither.
    ValueError for an odd number of shadows and for fewer than two rows.
    """
    if num_shadows < 2 or num_shadows % 2:
        near = max(2, num_shadows + 1)
        raise ValueError(
            f"{num_shadows} shadows cannot know every row half of the time; use {near}"
        )
    if num_rows < 2:
        raise ValueError(f"{num_rows} row(s) have no halves; give 2 or more")
    rng, taken = np.random.default_rng(seed), np.zeros((num_rows, num_shadows), bool)
    for first in range(0, num_shadows, 2):
        order = rng.permutation(num_rows)
        taken[order[: num_rows // 2], first] = True
        taken[order[num_rows // 2 : num_rows // 2 * 2], first + 1] = True
    return taken


def published(labels: np.ndarray, counts: Sequence[int], num_shadows: int, seed: int) -> np.ndarray:
    """taken (N, K) bool of the offline protocol, of N rows that are not audited.

    Each shadow draws as many of each class as `counts` (C,) says: those that its target has seen,
    or it would prefer other classes. ValueError where a class of `labels` (N,) has fewer.
    """
    held = np.bincount(labels, minlength=len(counts))
    if not sum(counts) or (held < counts).any():
        raise ValueError(
            f"{held.tolist()} rows of each class are not audited; {list(map(int, counts))} of them"
            " are no training set"
        )
    rng, taken = np.random.default_rng(seed), np.zeros((len(labels), num_shadows), bool)
    for k in range(num_shadows):
        taken[draw(labels, counts, rng), k] = True
    return taken


def quotas(counts: np.ndarray, total: int) -> np.ndarray:
    """`total` rows shared out over classes as `counts` (C,) are, to within a row; (C,) int."""
    exact = total * counts / counts.sum()
    found = np.floor(exact).astype(int)
    found[np.argsort(found - exact, kind="stable")[: total - found.sum()]] += 1
    return found


def draw(labels: np.ndarray, counts: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """Numbers of random rows, in order: of each class so many (C,), or all where it has fewer."""
    order = rng.permutation(len(labels))
    chosen = [order[labels[order] == place][:number] for place, number in enumerate(counts)]
    return np.sort(np.concatenate(chosen))


def members(ids: Sequence[str], trained: Collection[str]) -> np.ndarray:
    """(N,) bool: which rows the target was trained on, by the ids that its run recorded.

    Never by drawing the split again. ValueError where a recorded row is not among `ids`, because
    an audit of other data would look like one without leaks.
    """
    trained, known = set(trained), set(ids)
    if missing := sorted(trained - known):
        raise ValueError(
            f"{len(missing)} of the target's {len(trained)} training rows are not among the"
            f" {len(ids)} rows given, such as {missing[0]!r}: other data, or another version"
        )
    return np.array([row in trained for row in ids], bool)
