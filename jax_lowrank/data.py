"""Token sequences in, batches out: batch t is a pure function of (seed, t).

Sequences are put into buckets by length so that little of a batch is padding. Every batch has
`batch_size` rows and one of a few widths (each width compiles once). A bucket's last batch is
filled with rows of the next shorter bucket, so only the last batch of the shortest bucket can be
short of rows; it is filled up with rows of weight 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

MAX_WIDTHS = 16


class Tokens(NamedTuple):
    """Token ids of texts, and how many texts were cut to max_length."""

    sequences: list[list[int]]
    num_truncated: int


class Batch(NamedTuple):
    """tokens (B, S) int32, padded on the right; weights (B, S) float32 in {0, 1}.

    weights[b, t] is the weight of the loss of predicting tokens[b, t] from tokens[b, :t]: 0 at t =
    0 and at padding.
    """

    tokens: np.ndarray
    weights: np.ndarray


class LabelledBatch(NamedTuple):
    """tokens (B, S) int32, padded on the right; mask (B, S) bool, True at tokens; labels (B,)
    int32; weights (B,) float32, 0 for a row that only fills up.
    """

    tokens: np.ndarray
    mask: np.ndarray
    labels: np.ndarray
    weights: np.ndarray


def tokenize(
    tokenizer: Any,
    texts: Sequence[str],
    *,
    max_length: int,
    vocab_size: int,
    add_bos: bool = True,
    add_eos: bool = True,
) -> Tokens:
    """Texts to token ids, at most max_length a text, special tokens included; the end is cut off.

    tokenizer: called as tokenizer(list, add_special_tokens=False)["input_ids"], with bos_token_id
    and eos_token_id. vocab_size: rows of the model's embedding. Raises ValueError for an id outside
    it and for a special token that is asked for and that the tokenizer lacks.
    """
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")
    before = [_special(tokenizer, "bos_token_id")] if add_bos else []
    after = [_special(tokenizer, "eos_token_id")] if add_eos else []
    # an empty list makes some tokenizers fail, and there is nothing to ask them
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if len(texts) else []
    sequences = [before + list(ids) + after for ids in encoded]
    for text, sequence in zip(texts, sequences, strict=True):
        outside = [token for token in sequence if not 0 <= token < vocab_size]
        if outside:
            raise ValueError(
                f"token id {outside[0]} is outside the model's vocabulary of {vocab_size} (text "
                f"{text[:40]!r}): "
                "tokenizer and model do not belong together"
            )
    num_truncated = sum(len(sequence) > max_length for sequence in sequences)
    return Tokens([sequence[:max_length] for sequence in sequences], num_truncated)


def _special(tokenizer: Any, name: str) -> int:
    token = getattr(tokenizer, name, None)
    if token is None:
        flag = "add_bos" if name.startswith("bos") else "add_eos"
        raise ValueError(f"the tokenizer has no {name}; use {flag}=False")
    return int(token)


def pad_left(
    sequences: Sequence[Sequence[int]], pad_id: int, width: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Sequences to (tokens (B, S) int32, mask (B, S) bool), padded on the left, for generation.

    S is `width`, or the longest length. The mask is True at tokens. Raises ValueError where a
    sequence is longer.
    """
    longest = max((len(sequence) for sequence in sequences), default=0)
    width = longest if width is None else width
    if longest > width:
        raise ValueError(
            f"a sequence of {longest} tokens does not fit into width {width}; use {longest} or more"
        )
    tokens = np.full((len(sequences), width), pad_id, np.int32)
    mask = np.zeros((len(sequences), width), bool)
    for row, sequence in enumerate(sequences):
        start = width - len(sequence)
        tokens[row, start:] = sequence
        mask[row, start:] = True
    return tokens, mask


class _Plan(NamedTuple):
    rows: np.ndarray  # (steps, B) int32, -1 where a row only fills up
    widths: np.ndarray  # (steps,) int32


@dataclass(frozen=True, eq=False)
class Batches:
    """Endless batches over fixed sequences; made by make_batches. One epoch shows every sequence
    exactly once.
    """

    tokens: np.ndarray  # (total,) int32, all sequences one after another
    starts: np.ndarray  # (N + 1,) int64
    buckets: np.ndarray  # (N,) int32: index into widths
    widths: tuple[int, ...]  # ascending
    batch_size: int
    seed: int
    pad_id: int
    counted: np.ndarray | None = None  # (total,) bool: whose prediction has weight; None: all
    own: np.ndarray | None = None  # which rows of a batch are made here; None: all `batch_size`
    _memo: dict[int, _Plan] = field(
        default_factory=dict, repr=False
    )  # the newest epoch's plan, to save time only

    @property
    def steps_per_epoch(self) -> int:
        """ceil(N / batch_size)."""
        return -(-len(self.buckets) // self.batch_size)

    def batch(self, t: int) -> Batch:
        """Batch number t >= 0: (B, S) with S = width(t). The same for the same (sequences, seed,
        t), in any order.
        """
        rows = self.rows(t)
        tokens = np.full((len(rows), self.width(t)), self.pad_id, np.int32)
        weights = np.zeros(tokens.shape, np.float32)
        for place, row in enumerate(rows):
            if row >= 0:
                sequence = self.tokens[self.starts[row] : self.starts[row + 1]]
                tokens[place, : len(sequence)] = sequence
                weights[place, 1 : len(sequence)] = 1.0
                if self.counted is not None:
                    counted = self.counted[self.starts[row] : self.starts[row + 1]]
                    weights[place, 1 : len(sequence)] = counted[1:]
        return Batch(tokens, weights)

    def rows(self, t: int) -> np.ndarray:
        """(B,) int32: which sequences batch t shows; -1 for a row that only fills up."""
        epoch, step = self._place(t)
        rows = self._plan(epoch).rows[step]
        return rows if self.own is None else rows[self.own]

    def width(self, t: int) -> int:
        """S of batch t, one of `widths`."""
        epoch, step = self._place(t)
        return int(self._plan(epoch).widths[step])

    def padding_fraction(self) -> float:
        """Share of an epoch's cells that hold no token, rows that only fill up included; in [0, 1),
        0 is ideal.
        """
        counts = np.bincount(self.buckets, minlength=len(self.widths))
        return 1.0 - len(self.tokens) / _num_cells(counts, self.widths, self.batch_size)

    def _place(self, t: int) -> tuple[int, int]:
        if t < 0:
            raise ValueError(f"batches are numbered from 0, got {t}")
        return divmod(int(t), self.steps_per_epoch)

    def _plan(self, epoch: int) -> _Plan:
        plan = self._memo.get(epoch)
        if plan is None:
            plan = self._make_plan(epoch)
            self._memo.clear()
            self._memo[epoch] = plan
        return plan

    def _make_plan(self, epoch: int) -> _Plan:
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.buckets))
        # widest bucket first, so that cutting the line into batches fills a bucket's last batch
        # from the next shorter
        order = order[np.argsort(-self.buckets[order], kind="stable")]
        rows = np.full(self.steps_per_epoch * self.batch_size, -1, np.int32)
        rows[: len(order)] = order
        rows = rows.reshape(self.steps_per_epoch, self.batch_size)
        widths = np.asarray(self.widths, np.int32)[self.buckets[rows[:, 0]]]
        steps = rng.permutation(self.steps_per_epoch)
        return _Plan(rows[steps], widths[steps])


def make_batches(
    sequences: Sequence[Sequence[int]],
    *,
    batch_size: int,
    seed: int,
    pad_id: int,
    max_waste: float = 0.2,
    max_width: int = 0,
    counted: Sequence[Sequence[bool]] | None = None,
    least: int = 2,
    own: np.ndarray | None = None,
) -> Batches:
    """Batches of `batch_size` rows over token sequences of at least `least` tokens.

    counted: for each token whether predicting it has weight; None: all.
    max_waste: bound on padding_fraction(), in (0, 1). The fewest widths that keep it are taken,
    multiples of 8 first. Few rows of very unlike lengths can make the bound unreachable with full
    batches; then the widths with the least padding found are taken and padding_fraction() tells.
    own: which of a batch's rows are made here, where several hosts share it; None: all.
    max_width: no width above it (the model's positions); 0: no cap. Raises ValueError for no
    sequences, a sequence with nothing to predict or longer than max_width, and bad numbers.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not 0 < max_waste < 1:
        raise ValueError(f"max_waste must lie between 0 and 1, got {max_waste}")
    if len(sequences) == 0:
        raise ValueError("no sequences to make batches from")
    lengths = np.fromiter((len(sequence) for sequence in sequences), np.int64, len(sequences))
    if lengths.min() < least:
        row = int(lengths.argmin())
        raise ValueError(
            f"sequence {row} has {lengths[row]} token(s): nothing to predict; at least {least} are"
            " needed"
        )
    if max_width and lengths.max() > max_width:
        raise ValueError(
            f"a sequence has {lengths.max()} tokens, more than max_width {max_width}; truncate "
            "it first"
        )
    widths = _choose_widths(lengths, batch_size, max_waste, max_width)
    return Batches(
        tokens=np.concatenate([np.asarray(sequence, np.int32) for sequence in sequences]),
        starts=np.concatenate([[0], np.cumsum(lengths)]),
        buckets=np.searchsorted(widths, lengths).astype(np.int32),
        widths=widths,
        batch_size=batch_size,
        seed=seed,
        pad_id=pad_id,
        counted=None if counted is None else np.concatenate([np.asarray(c, bool) for c in counted]),
        own=own,
    )


@dataclass(frozen=True, eq=False)
class LabelledBatches:
    """Batches of rows with a class each, in the order and widths of `rows`."""

    rows: Batches
    labels: np.ndarray  # (N,) int32

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

    def batch(self, t: int) -> LabelledBatch:
        """Batch number t >= 0; whatever the pad id is, `mask` says where the tokens are."""
        rows = self.rows.rows(t)
        tokens = self.rows.batch(t).tokens
        lengths = np.where(rows >= 0, np.diff(self.rows.starts)[rows], 1)
        mask = np.arange(tokens.shape[1])[None] < lengths[:, None]
        labels = np.where(rows >= 0, self.labels[rows], 0).astype(np.int32)
        return LabelledBatch(tokens, mask, labels, (rows >= 0).astype(np.float32))


def _choose_widths(
    lengths: np.ndarray, batch_size: int, max_waste: float, max_width: int
) -> tuple[int, ...]:
    """The fewest widths that keep the bound, coarse multiples first; else the best seen."""
    best, least = (), np.inf
    for multiple in (8, 4, 2, 1):
        rounded = -(-np.unique(lengths) // multiple) * multiple
        candidates = np.unique(np.minimum(rounded, max_width or rounded.max()))
        counts = np.bincount(np.searchsorted(candidates, lengths), minlength=len(candidates))
        for ends in _partitions(candidates, counts, MAX_WIDTHS):
            widths = tuple(int(candidates[end]) for end in ends)
            bucket_counts = np.diff(np.concatenate([[0], np.cumsum(counts)[list(ends)]]))
            waste = 1.0 - lengths.sum() / _num_cells(bucket_counts, widths, batch_size)
            if waste <= max_waste:
                return widths
            if waste < least:
                best, least = widths, waste
    return best


def _partitions(candidates: np.ndarray, counts: np.ndarray, most: int):
    """For K = 1, 2, ...: the K candidates (by index, the last always in) with the least padding row
    by row.
    """
    num = len(candidates)
    totals = np.concatenate([[0], np.cumsum(counts)])
    # cost[i, j]: cells of the rows of candidates i..j when all have width candidates[j]
    cost = (totals[None, 1:] - totals[:-1, None]) * candidates[None, :]
    cost = np.where(
        np.arange(num)[:, None] <= np.arange(num)[None, :], cost, np.iinfo(np.int64).max // 4
    )
    best, choices = cost[0], []
    yield (num - 1,)
    for _ in range(1, min(most, num)):
        through = np.concatenate([[np.iinfo(np.int64).max // 4], best[:-1]])[:, None] + cost
        choices.append(through.argmin(axis=0))
        best = through.min(axis=0)
        ends, end = [num - 1], num - 1
        for choice in reversed(choices):
            end = int(choice[end]) - 1
            if end < 0:
                break
            ends.append(end)
        yield tuple(reversed(ends))


def _num_cells(bucket_counts: np.ndarray, widths: tuple[int, ...], batch_size: int) -> int:
    """Cells of one epoch: the line of rows, widest bucket first, is cut into batches as wide as
    their first row.
    """
    ends = np.cumsum(np.asarray(bucket_counts)[::-1])
    batches_begun = -(-ends // batch_size)  # batches whose first row lies before the bucket's end
    num_batches = np.diff(np.concatenate([[0], batches_begun]))
    return int((num_batches * np.asarray(widths)[::-1]).sum()) * batch_size
