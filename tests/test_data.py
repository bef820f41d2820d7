"""Batches: purity, each row once an epoch, little padding, weights; tokenize and pad_left."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_lowrank import data

PAD = 0


def sequences_of(lengths):
    """Row r is r + 1 repeated, so a token tells its row and a pad (0) is none of them."""
    return [[row + 1] * length for row, length in enumerate(lengths)]


def epoch_of(batches, epoch=0):
    first = epoch * batches.steps_per_epoch
    return [batches.batch(first + step) for step in range(batches.steps_per_epoch)]


lengths_st = st.lists(st.integers(2, 200), min_size=1, max_size=120)


@settings(max_examples=60, deadline=None)
@given(lengths_st, st.integers(1, 17), st.integers(0, 3), st.integers(0, 2))
def test_every_row_once_an_epoch_whole_and_weighted(lengths, batch_size, seed, epoch):
    batches = data.make_batches(sequences_of(lengths), batch_size=batch_size, seed=seed, pad_id=PAD)
    assert batches.steps_per_epoch == -(-len(lengths) // batch_size)
    seen = []
    for step, batch in enumerate(epoch_of(batches, epoch)):
        t = epoch * batches.steps_per_epoch + step
        assert batch.tokens.shape == batch.weights.shape == (batch_size, batches.width(t))
        assert (batch.tokens.dtype, batch.weights.dtype) == (np.int32, np.float32)
        for tokens, weights, row in zip(batch.tokens, batch.weights, batches.rows(t), strict=True):
            length = 0 if row < 0 else lengths[row]
            expected = np.zeros(len(tokens), np.int32)
            expected[:length] = row + 1
            np.testing.assert_array_equal(tokens, expected)
            positions = np.arange(len(tokens))
            np.testing.assert_array_equal(weights, (positions > 0) & (positions < length))
            seen += [row] if row >= 0 else []
    assert sorted(seen) == list(range(len(lengths)))


@settings(max_examples=30, deadline=None)
@given(lengths_st, st.integers(1, 9), st.permutations(range(12)))
def test_batch_is_a_pure_function_of_seed_and_number(lengths, batch_size, order):
    sequences = sequences_of(lengths)
    in_turn = data.make_batches(sequences, batch_size=batch_size, seed=5, pad_id=PAD)
    expected = [in_turn.batch(t) for t in range(12)]
    other = data.make_batches(sequences, batch_size=batch_size, seed=5, pad_id=PAD)
    for t in order:
        assert other.width(t) == expected[t].tokens.shape[1]
        np.testing.assert_array_equal(other.batch(t).tokens, expected[t].tokens)


def test_epochs_and_seeds_differ():
    sequences = sequences_of([10] * 64)
    batches = data.make_batches(sequences, batch_size=64, seed=0, pad_id=PAD)
    other = data.make_batches(sequences, batch_size=64, seed=1, pad_id=PAD)
    assert (batches.rows(0) != batches.rows(1)).any()
    assert (batches.rows(0) != other.rows(0)).any()


def skewed(kind, rng, number):
    if kind == "log-normal":
        return np.clip(np.exp(rng.normal(3, 1, number)), 2, 512).astype(int)
    if kind == "two humps":
        return np.where(
            rng.random(number) < 0.9, rng.integers(4, 12, number), rng.integers(250, 300, number)
        )
    if kind == "one long":
        return np.concatenate([rng.integers(2, 40, number - 1), [512]])
    if kind == "log-uniform":
        return np.exp(rng.uniform(np.log(2), np.log(512), number)).astype(int)
    return rng.integers(2, 512, number)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["log-normal", "two humps", "one long", "log-uniform", "uniform"]),
    st.integers(0, 1_000),
    st.sampled_from([1, 8, 32]),
)
def test_padding_stays_under_the_bound(kind, seed, batch_size):
    lengths = skewed(kind, np.random.default_rng(seed), 4000)
    batches = data.make_batches(sequences_of(lengths), batch_size=batch_size, seed=0, pad_id=PAD)
    assert 0 <= batches.padding_fraction() <= 0.2
    assert len(batches.widths) <= data.MAX_WIDTHS
    cells = sum(batch_size * batches.width(t) for t in range(batches.steps_per_epoch))
    assert batches.padding_fraction() == pytest.approx(1 - lengths.sum() / cells, abs=1e-12)


def test_widths_are_few_and_multiples_of_eight_where_that_holds_the_bound():
    rng = np.random.default_rng(0)
    sequences = sequences_of(rng.integers(60, 65, 640))
    assert data.make_batches(sequences, batch_size=32, seed=0, pad_id=PAD).widths == (64,)
    # all of length 9: 16 would waste 44 %
    assert (
        data.make_batches(sequences_of([9] * 64), batch_size=32, seed=0, pad_id=PAD).widths[-1] < 12
    )
    capped = data.make_batches(
        sequences_of([77] * 64), batch_size=32, seed=0, pad_id=PAD, max_width=77
    )
    assert capped.widths == (77,)


def test_widths_are_the_best_partition():
    """The dynamic programme against all partitions of a small case."""
    from itertools import combinations

    candidates, counts = np.array([3, 5, 8, 13, 21, 34]), np.array([9, 1, 4, 2, 7, 1])
    for number, ends in enumerate(data._partitions(candidates, counts, 6), 1):

        def cells(chosen):
            return sum(
                count * min(width for width in candidates[list(chosen)] if width >= length)
                for length, count in zip(candidates, counts, strict=True)
            )

        every = [(*inner, 5) for inner in combinations(range(5), number - 1)]
        assert len(ends) == number
        assert cells(ends) == min(cells(chosen) for chosen in every)


def test_only_one_batch_is_short_of_rows_and_it_is_the_narrowest():
    batches = data.make_batches(sequences_of([4] * 31 + [100]), batch_size=16, seed=0, pad_id=PAD)
    assert batches.steps_per_epoch == 2
    batches = data.make_batches(
        sequences_of([4] * 50 + [100] * 20), batch_size=16, seed=0, pad_id=PAD
    )
    short = [t for t in range(batches.steps_per_epoch) if (batches.rows(t) < 0).any()]
    assert [batches.width(t) for t in short] == [batches.widths[0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequences": []}, "no sequences"),
        ({"sequences": [[1, 2], [3]]}, "sequence 1 has 1 token"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_waste": 1.0}, "max_waste must lie between 0 and 1, got 1.0"),
        ({"max_width": 3}, "4 tokens, more than max_width 3"),
    ],
)
def test_bad_numbers_are_named(change, message):
    arguments = {"sequences": [[1, 2, 3, 4]], "batch_size": 2, "seed": 0, "pad_id": PAD} | change
    with pytest.raises(ValueError, match=message):
        data.make_batches(arguments.pop("sequences"), **arguments)


def test_negative_batch_number():
    batches = data.make_batches([[1, 2]], batch_size=1, seed=0, pad_id=PAD)
    with pytest.raises(ValueError, match="numbered from 0, got -1"):
        batches.batch(-1)


class Letters:
    """A tokenizer of lower-case letters: a is 3."""

    bos_token_id = 1
    eos_token_id = 2

    def __call__(self, texts, add_special_tokens):
        assert texts and not add_special_tokens
        return {"input_ids": [[ord(letter) - ord("a") + 3 for letter in text] for text in texts]}


def test_tokenize_adds_and_counts_what_it_cuts():
    tokens = data.tokenize(Letters(), ["ab", "abcd"], max_length=4, vocab_size=10)
    assert tokens == ([[1, 3, 4, 2], [1, 3, 4, 5]], 1)
    plain = data.tokenize(
        Letters(), ["ab", ""], max_length=4, vocab_size=10, add_bos=False, add_eos=False
    )
    assert plain == ([[3, 4], []], 0)
    assert data.tokenize(Letters(), [], max_length=4, vocab_size=10) == ([], 0)


def test_tokenize_names_a_mismatch():
    with pytest.raises(ValueError, match=r"id 28 is outside the model's vocabulary of 28 .*'az'"):
        data.tokenize(Letters(), ["ab", "az"], max_length=9, vocab_size=28)
    no_bos = Letters()
    no_bos.bos_token_id = None
    with pytest.raises(ValueError, match="no bos_token_id; use add_bos=False"):
        data.tokenize(no_bos, ["a"], max_length=9, vocab_size=28)
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        data.tokenize(Letters(), ["a"], max_length=0, vocab_size=28)


def test_pad_left():
    tokens, mask = data.pad_left([[5, 6, 7], [8]], pad_id=9)
    np.testing.assert_array_equal(tokens, [[5, 6, 7], [9, 9, 8]])
    np.testing.assert_array_equal(mask, [[1, 1, 1], [0, 0, 1]])
    assert (tokens.dtype, mask.dtype) == (np.int32, bool)
    wide, _ = data.pad_left([[5, 6, 7], []], pad_id=9, width=4)
    np.testing.assert_array_equal(wide, [[9, 5, 6, 7], [9, 9, 9, 9]])
    with pytest.raises(ValueError, match="3 tokens does not fit into width 2; use 3 or more"):
        data.pad_left([[5, 6, 7]], pad_id=9, width=2)
