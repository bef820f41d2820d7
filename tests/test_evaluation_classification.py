"""Classification metrics and perplexity from arrays, against hand calculations."""

import numpy as np
import pytest

from jax_lowrank.evaluation import classification, perplexity
from jax_lowrank.evaluation.intervals import wilson


def logits_of(predicted, num_classes):
    return np.eye(num_classes)[predicted] * 5.0


def test_by_hand():
    labels = np.array([0, 0, 0, 1, 1, 2])
    predicted = np.array([0, 0, 1, 1, 0, 2])
    found = classification.measure(logits_of(predicted, 4), labels, majority=1)
    assert found.accuracy == wilson(4, 6) and found.majority_accuracy == wilson(2, 6)
    # class 0: TP 2 FP 1 FN 1; class 1: TP 1 FP 1 FN 1; class 2: all right; class 3 never there
    np.testing.assert_allclose(found.f1, [4 / 6, 2 / 4, 1, np.nan])
    assert found.macro_f1.estimate == pytest.approx((4 / 6 + 1 / 2 + 1) / 3)
    assert found.macro_f1.low < found.macro_f1.estimate < found.macro_f1.high
    assert found.support.tolist() == [3, 2, 1, 0]
    right = np.log(np.exp(5) + 3) - 5
    assert found.nll.estimate == pytest.approx((4 * right + 2 * (right + 5)) / 6)


def test_the_majority_is_that_of_the_rows_unless_given_and_never_said_scores_zero():
    labels = np.array([1, 1, 0])
    found = classification.measure(np.tile([0.0, 1.0], (3, 1)), labels)
    assert found.majority_accuracy.estimate == found.accuracy.estimate == pytest.approx(2 / 3)
    assert found.f1[0] == 0  # class 0 occurs and is never predicted: recall 0, not undefined


def test_order_of_rows_does_not_matter_and_copies_narrow_the_interval():
    rng = np.random.default_rng(0)
    labels, logits = rng.integers(0, 3, 60), rng.normal(size=(60, 3))
    one = classification.measure(logits, labels)
    order = rng.permutation(60)
    other = classification.measure(logits[order], labels[order])
    assert other.accuracy == one.accuracy
    assert other.macro_f1.estimate == pytest.approx(one.macro_f1.estimate)
    many = classification.measure(np.tile(logits, (4, 1)), np.tile(labels, 4))
    assert many.macro_f1.estimate == pytest.approx(one.macro_f1.estimate)
    assert many.macro_f1.high - many.macro_f1.low < one.macro_f1.high - one.macro_f1.low


def test_no_rows_is_an_error():
    with pytest.raises(ValueError, match="no rows"):
        classification.measure(np.zeros((0, 2)), np.zeros(0, int))


def test_perplexity_counts_tokens_alike_and_varies_by_example():
    nll, tokens = np.array([2.0, 6.0, 4.0]), np.array([1, 3, 4])
    found = perplexity.measure(nll, tokens)
    assert found.nats_per_token.estimate == pytest.approx(12 / 8) and found.num_tokens == 8
    assert found.perplexity.estimate == pytest.approx(np.exp(1.5))
    assert found.perplexity.low < found.perplexity.estimate < found.perplexity.high
    assert found.perplexity.n == 3
    uniform = perplexity.measure(np.log(7) * np.array([3, 5]), np.array([3, 5]))
    assert uniform.perplexity.estimate == pytest.approx(7)


def test_one_example_has_an_estimate_and_no_interval():
    found = perplexity.measure(np.array([3.0]), np.array([2]))
    assert found.perplexity.estimate == pytest.approx(np.exp(1.5))
    assert np.isnan(found.perplexity.low) and found.perplexity.reason
