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


def published(
    audited: np.ndarray, num_shadows: int, seed: int, fraction: float = 0.5
) -> np.ndarray:
    """taken (N, K) bool of the offline protocol: a random part of the rows that are not audited.

    audited: (N,) bool. ValueError where that leaves a shadow without rows.
    """
    others = np.flatnonzero(~audited)
    number = round(fraction * len(others))
    if not 1 <= number <= len(others):
        raise ValueError(
            f"{fraction} of {len(others)} rows that are not audited is no training set"
        )
    rng, taken = np.random.default_rng(seed), np.zeros((len(audited), num_shadows), bool)
    for k in range(num_shadows):
        taken[rng.choice(others, number, replace=False), k] = True
    return taken


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
