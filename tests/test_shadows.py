"""Shadow models: who trains on what, and attacks on targets whose membership is known."""

import functools
import itertools

import jax
import numpy as np
import pytest
from tiny import model_of

from jax_lowrank import models, shadows, sweep, train
from jax_lowrank.adapt import METHODS
from jax_lowrank.data import LabelledBatches, make_batches
from jax_lowrank.evaluation import membership
from jax_lowrank.models.head import Head
from jax_lowrank.sweep import score
from jax_lowrank.sweep.cells import stack


def test_halves_are_balanced_in_both_directions():
    taken = shadows.halves(40, 8, seed=1)
    assert (taken.sum(0) == 20).all() and (taken.sum(1) == 4).all()
    assert not np.array_equal(taken[:, 0], taken[:, 2])
    odd = shadows.halves(41, 8, seed=1)  # a row is left out of each of four pairs
    assert (odd.sum(0) == 20).all() and odd.sum(1).max() == 4 and (4 - odd.sum(1)).sum() == 4
    pairs = odd.reshape(41, 4, 2).sum(2)
    assert pairs.max() == 1 and ((pairs == 0).sum(0) == 1).all()
    with pytest.raises(ValueError, match=r"7 shadows .*; use 8"):
        shadows.halves(40, 7, seed=1)


def test_published_shadows_have_their_targets_size_and_classes():
    labels = np.repeat([0, 1, 2], [20, 30, 10])
    taken = shadows.published(labels, (8, 15, 2), 16, seed=0)
    for column in taken.T:
        np.testing.assert_array_equal(np.bincount(labels[column]), (8, 15, 2))
    assert len({column.tobytes() for column in taken.T}) == 16
    np.testing.assert_array_equal(shadows.published(labels, (8, 15, 2), 4, seed=0), taken[:, :4])
    for counts in ((8, 31, 2), (0, 0, 0)):
        with pytest.raises(ValueError, match=r"\[20, 30, 10\] rows .* no training set"):
            shadows.published(labels, counts, 2, seed=0)


def test_rows_are_shared_out_over_classes_in_proportion():
    counts = np.array([65, 25, 10])
    np.testing.assert_array_equal(shadows.quotas(counts, 100), counts)
    for total in range(101):
        found = shadows.quotas(counts, total)
        assert found.sum() == total and np.abs(found - total * counts / 100).max() < 1


def test_a_draw_by_class_has_what_there_is():
    labels = np.array([0, 1, 0, 1, 0, 1, 0, 2])
    rows = shadows.draw(labels, (2, 3, 4), np.random.default_rng(0))
    assert np.bincount(labels[rows]).tolist() == [2, 3, 1] and (np.diff(rows) > 0).all()


def test_membership_comes_from_the_recorded_ids():
    ids = ["a", "b", "c", "d"]
    np.testing.assert_array_equal(shadows.members(ids, {"b", "d"}), [False, True, False, True])
    with pytest.raises(ValueError, match="1 of the target's 2 training rows are not among"):
        shadows.members(ids, ["a", "gone"])


AUDITED, SHADOWS, CLASSES = 80, 8, 20


@functools.cache
def classifier():
    """The tiny GPT-2 with a fresh head of 20 classes: a guess is seldom right."""
    head = Head("classification", tuple(map(str, range(CLASSES))))
    return models.create("gpt2", model_of("gpt2").config, jax.random.key(7), head=head)


def trained(sequences, labels, taken):
    """Class logits (K, N, C) of K models, full fine-tuning, each of the rows `taken` (N, K) says,
    side by side in a sweep."""
    method, cells, each = METHODS["full"](), [], []
    for k, column in enumerate(taken.T):
        rows = np.flatnonzero(column)
        batches = make_batches(
            [sequences[row] for row in rows], batch_size=10, seed=1 + k, pad_id=0, least=1
        )
        each.append(LabelledBatches(batches, labels[rows]))
        key = jax.random.key(k)
        steps = train.num_steps(each[k], 60)
        schedule = train.make_schedule(3e-3, steps, 0.05, "cosine")
        cells.append(sweep.Cell(method, *method.split(key, classifier()), schedule, key, 0.0, 1.0))
    program, falling = sweep.make_program(cells[0], train.classification_loss), itertools.count()
    found = sweep.fit(
        program=program,
        cells=cells,
        batches=sweep.OwnBatches(each),
        validate=lambda states: [-next(falling)] * len(cells),  # the last state is the best
        log=lambda k, line: None,
        steps_per_call=40,
    )
    cells = [cell._replace(trainable=one.trainable) for cell, one in zip(cells, found)]
    states = stack(program, cells).states
    return score.classify(program, states, sequences, batch_size=64, pad_id=0)


@functools.cache
def audit():
    """Margins of shadows 0 to 7 on halves of the audited rows, and of two targets trained with
    them, on a half of these rows and on other rows; and who was trained on what. Labels are random,
    so that a model can only learn them by heart."""
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 97, n).tolist() for n in rng.integers(6, 9, AUDITED + 40)]
    labels = rng.integers(0, CLASSES, AUDITED + 40).astype(np.int32)
    taken = np.zeros((AUDITED + 40, SHADOWS + 2), bool)
    taken[:AUDITED, :SHADOWS] = shadows.halves(AUDITED, SHADOWS, seed=0)
    taken[:AUDITED, SHADOWS] = shadows.halves(AUDITED, 2, seed=9)[:, 0]
    taken[AUDITED:, SHADOWS + 1] = True
    logits = trained(sequences, labels, taken)[:, :AUDITED]
    margins = np.stack([membership.margin(one, labels[:AUDITED]) for one in logits], 1)
    return margins, taken[:AUDITED]


def attacked(target, member, **options):
    margins, taken = audit()
    score = membership.lira_online(
        margins[:, target], margins[:, :SHADOWS], taken[:, :SHADOWS], variance="global", **options
    )
    assert (score.num_inside == 4).all() and (score.num_outside == 4).all()
    return membership.attack(score.score, member)


@pytest.mark.slow
def test_a_target_that_learns_by_heart_is_told_from_its_shadows():
    _, taken = audit()
    found = attacked(SHADOWS, taken[:, SHADOWS])
    assert found.auc > 0.95, found
    assert found.num_members == found.num_others == 40


@pytest.mark.slow
def test_a_target_without_the_audited_rows_gives_chance():
    _, taken = audit()
    found = attacked(SHADOWS + 1, taken[:, SHADOWS])
    assert found.low < 0.5 < found.high, found


@pytest.mark.slow
def test_shuffled_membership_gives_chance():
    _, taken = audit()
    member = np.random.default_rng(1).permutation(taken[:, SHADOWS])
    found = attacked(SHADOWS, member)
    assert found.low < 0.5 < found.high, found
