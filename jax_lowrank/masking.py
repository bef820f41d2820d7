"""Masked language modelling: which tokens of a text are hidden, and behind what.

As BERT's own preparation (Devlin et al. 2019): of a text's n tokens that are not special, max(1,
round(0.15 n)) are to be predicted. Of these 80 % become the mask token, 10 % any token, and 10 %
stay. Shape letters: B rows, S width, K places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

SHARE, MASKED, RANDOM = 0.15, 0.8, 0.1


class Hidden(NamedTuple):
    """A text with hidden tokens: tokens (n,) int32, places (k,) ascending, targets (k,) there."""

    tokens: np.ndarray
    places: np.ndarray
    targets: np.ndarray


class MaskedBatch(NamedTuple):
    """tokens (B, S) int32, padded on the right; mask (B, S) bool, True at tokens; places (B, K)
    int32 and targets (B, K) int32 of what was hidden; weights (B, K) float32, 0 beyond it.
    """

    tokens: np.ndarray
    mask: np.ndarray
    places: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


class Masker(NamedTuple):
    """The token that hides others, and how many there are to draw from."""

    mask_id: int
    num_tokens: int

    def hide(self, tokens: Sequence[int], usable: Sequence[bool], seed: Sequence[int]) -> Hidden:
        """A draw that depends on the arguments alone. usable: what may be hidden; one at least."""
        rng = np.random.default_rng(list(seed))
        tokens, (usable,) = np.array(tokens, np.int32), np.nonzero(usable)
        places = np.sort(rng.permutation(usable)[: num_hidden(len(usable))])
        targets, draws = tokens[places], rng.random(len(places))
        others = rng.integers(0, self.num_tokens, len(places))
        shown = np.where(draws < MASKED + RANDOM, others, targets)
        tokens[places] = np.where(draws < MASKED, self.mask_id, shown)
        return Hidden(tokens, places, targets)


def num_hidden(number: int) -> int:
    """How many of so many tokens are hidden."""
    return max(1, round(SHARE * number))


def spots(rows: Sequence[Hidden], size: int, width: int) -> tuple[np.ndarray, ...]:
    """Places, targets and weights (B, K) of `size` rows, those beyond `rows` empty. K is what a
    text as long as the width has, so that few programs compile.
    """
    places, targets = np.zeros((2, size, num_hidden(width)), np.int32)
    weights = np.zeros(places.shape, np.float32)
    for row, hidden in enumerate(rows):
        many = len(hidden.places)
        places[row, :many], targets[row, :many] = hidden.places, hidden.targets
        weights[row, :many] = 1.0
    return places, targets, weights


@dataclass(frozen=True, eq=False)
class MaskedBatches:
    """Batches of texts with hidden tokens, in the order and widths of `rows` (a data.Batches, whose
    `counted` says what may be hidden). Every step draws anew, as a function of (seed, t, text).
    """

    rows: Any
    masker: Masker

    @property
    def steps_per_epoch(self) -> int:
        """ceil(N / batch_size)."""
        return self.rows.steps_per_epoch

    def width(self, t: int) -> int:
        """S of batch t."""
        return self.rows.width(t)

    def padding_fraction(self) -> float:
        """Share of an epoch's cells that hold no token."""
        return self.rows.padding_fraction()

    def batch(self, t: int) -> MaskedBatch:
        """Batch number t >= 0."""
        r, numbers = self.rows, self.rows.rows(t)
        tokens = np.full((len(numbers), self.width(t)), r.pad_id, np.int32)
        mask = np.zeros(tokens.shape, bool)
        mask[:, 0] = True  # a row that only fills up is not without any token
        hidden = []
        for place, number in enumerate(numbers[numbers >= 0]):  # what fills up comes last
            part = slice(*r.starts[number : number + 2])
            found = self.masker.hide(r.tokens[part], r.counted[part], (r.seed, t, number))
            tokens[place, : len(found.tokens)] = found.tokens
            mask[place, : len(found.tokens)] = True
            hidden.append(found)
        return MaskedBatch(tokens, mask, *spots(hidden, *tokens.shape))
