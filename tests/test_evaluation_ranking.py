"""evaluation/ranking.py against scikit-learn (frozen), the Jigsaw vector and DeLong's formula."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr

from jax_lowrank.evaluation import ranking

FROZEN = json.loads((Path(__file__).parent / "fixtures" / "groups.json").read_text("utf-8"))["aucs"]
SCORE, LABEL, WEIGHT = (np.array(FROZEN[name]) for name in ("score", "label", "weight"))
MEMBER = np.array(FROZEN["member"], bool)


def test_the_jigsaw_vector():
    """evaluation.md, section 5.3."""
    scores = [0.1, 0.2, 0.3, 0.21, 0.31, 0.55, 0.5, 0.8, 0.9, 0.4, 0.6, 0.71]
    inside = np.tile([0, 0, 0, 1, 1, 1], 2).astype(bool)
    members = np.stack([inside, ~inside], 1)
    found = ranking.bias_aucs(scores, np.repeat([0, 1], 6), members, minimum=1)
    assert found.subgroup.auc[0] == pytest.approx(8 / 9)
    assert found.bpsn.auc[0] == pytest.approx(8 / 9) and found.bnsp.auc[0] == 1
    assert found.overall.auc == pytest.approx(17 / 18)
    assert ranking.bias_score(found) == pytest.approx(0.93719926625)


@pytest.mark.parametrize("name", ["subgroup", "bpsn", "bnsp"])
def test_aucs_with_ties_equal_scikit_learn(name):
    found = ranking.bias_aucs(SCORE, LABEL, MEMBER, minimum=1)
    np.testing.assert_allclose(getattr(found, name).auc, FROZEN[name])
    assert found.overall.auc == pytest.approx(FROZEN["overall"])


def test_weights_equal_scikit_learn_and_twice_is_weight_2():
    found = ranking.bias_aucs(SCORE, LABEL, MEMBER, weights=WEIGHT, minimum=1)
    np.testing.assert_allclose(found.subgroup.auc, FROZEN["weighted"])
    times = np.arange(60) % 3 + 1
    repeated = [np.repeat(values, times, axis=0) for values in (SCORE, LABEL, MEMBER)]
    one = ranking.bias_aucs(SCORE, LABEL, MEMBER, weights=times)
    two = ranking.bias_aucs(*repeated)
    for name in ("subgroup", "bpsn", "bnsp"):
        np.testing.assert_allclose(getattr(one, name).auc, getattr(two, name).auc)


def delong(score, label):
    """Variance of the AUC from its placements, pair by pair."""
    high, low = score[label == 1], score[label == 0]
    wins = (high[:, None] > low) + (high[:, None] == low) / 2
    places = wins.mean(1), wins.mean(0)
    return sum(place.var(ddof=1) / place.size for place in places)


def test_the_error_is_delongs():
    found = ranking.bias_aucs(SCORE, LABEL, MEMBER, minimum=1)
    assert found.overall.error**2 == pytest.approx(delong(SCORE, LABEL))
    for g in range(2):
        inside = MEMBER[:, g]
        squared = found.subgroup.error[g] ** 2
        assert squared == pytest.approx(delong(SCORE[inside], LABEL[inside]))
        kept = np.where(inside, LABEL == 0, LABEL == 1)
        assert found.bpsn.error[g] ** 2 == pytest.approx(delong(SCORE[kept], LABEL[kept]))
    assert (found.subgroup.low < found.subgroup.auc).all()
    assert (found.subgroup.auc < found.subgroup.high).all() and found.overall.high < 1


def test_limits_cover():
    rng, true = np.random.default_rng(0), 0.7602499  # of normals one standard deviation apart
    label = np.repeat([0, 1], [60, 30])
    scores = rng.normal(label, 1, (400, 90))
    found = ranking.bias_aucs(scores, label, np.ones((90, 1), bool)).overall
    assert 0.92 <= np.mean((found.low <= true) & (true <= found.high)) <= 0.98


def test_too_few_and_perfect_order_are_undefined_with_a_reason():
    members = np.stack([LABEL == 0, np.ones(60, bool)], 1)
    found = ranking.bias_aucs(np.stack([SCORE, LABEL]), LABEL, members, minimum=5)
    assert np.isnan(found.subgroup.auc[:, 0]).all() and not np.isnan(found.subgroup.auc[:, 1]).any()
    assert found.subgroup.reason[0].startswith("0 positives and") and found.subgroup.reason[1] == ""
    assert found.subgroup.auc[1, 1] == 1 and np.isnan(found.subgroup.low[1, 1])
    assert np.isnan(found.bpsn.auc[:, 1]).all()  # nothing lies outside the group
    assert np.isnan(ranking.bias_score(found)).all()
    alone = ranking.power_mean(found.subgroup.auc, defined_only=True)
    np.testing.assert_allclose(alone, found.subgroup.auc[:, 1])
    for scores in ([np.nan] * 60, SCORE[:-1]):
        with pytest.raises(ValueError, match=r"NaN|must be"):
            ranking.bias_aucs(scores, LABEL, members)


def test_power_mean():
    assert ranking.power_mean([0.5, 1.0]) == pytest.approx(((0.5**-5 + 1) / 2) ** -0.2)
    assert ranking.power_mean([0.0, 1.0]) == 0 and np.isnan(ranking.power_mean([np.nan, 1.0]))
    assert ranking.power_mean([0.2, 0.4], power=1) == pytest.approx(0.3)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 1)), min_size=4, max_size=30))
def test_only_the_order_counts_and_signs_mirror(pairs):
    score, label = np.array(pairs).T
    members = np.stack([np.arange(score.size) % 2 == 0, np.arange(score.size) > 1], 1)
    one = ranking.bias_aucs(score, label, members, minimum=1)
    two = ranking.bias_aucs(np.exp(score * 0.3), label, members, minimum=1)
    mirrored = ranking.bias_aucs(-score, label, members, minimum=1)
    for name in ("subgroup", "bpsn", "bnsp"):
        left, right = getattr(one, name).auc, getattr(two, name).auc
        np.testing.assert_allclose(left, right)
        np.testing.assert_allclose(getattr(mirrored, name).auc, 1 - left)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 1)), min_size=4, max_size=30))
def test_order_names_and_repeats_do_not_matter_to_aucs(pairs):
    score, label = np.array(pairs).T
    name = np.arange(score.size) // 2 % 3
    members, times = np.eye(3, dtype=bool)[name], np.arange(score.size) % 3 + 1
    order, renamed = np.random.default_rng(score.size).permutation(score.size), [2, 0, 1]

    def aucs(score, label, members, weights=None):
        found = ranking.bias_aucs(score, label, members, weights=weights, minimum=1)
        parts = [getattr(found, name).auc for name in ("subgroup", "bpsn", "bnsp")]
        return np.array([*parts, np.full(3, found.overall.auc)])

    plain, weighted = aucs(score, label, members), aucs(score, label, members, times)
    np.testing.assert_allclose(aucs(score[order], label[order], members[order]), plain)
    found = aucs(score, label, members[:, renamed])[:, np.argsort(renamed)]
    np.testing.assert_allclose(found, plain)
    np.testing.assert_allclose(aucs(score, label, members.astype(int)), plain)
    np.testing.assert_allclose(aucs(score, label, members, np.ones(score.size)), plain)
    np.testing.assert_allclose(aucs(score, label, members, times / 10), weighted, atol=1e-12)
    twice = [np.repeat(part, times, axis=0) for part in (score, label, members)]
    np.testing.assert_allclose(aucs(*twice), weighted, atol=1e-12)
    for g in range(3):  # of a partition, a group is its rows alone
        inside = name == g
        high, low = score[inside & (label == 1)], score[inside & (label == 0)]
        wins = (high[:, None] > low) + (high[:, None] == low) / 2
        wanted = wins.mean() if wins.size else np.nan
        np.testing.assert_allclose(plain[0, g], wanted)


@pytest.mark.parametrize("weight", [-1, np.nan, np.inf])
def test_weights_are_checked(weight):
    weights = np.append(np.ones(59), weight)
    with pytest.raises(ValueError, match="weights must be 60 finite numbers >= 0"):
        ranking.bias_aucs(SCORE, LABEL, MEMBER, weights=weights)


def test_compared_aucs_are_paired():
    rng = np.random.default_rng(0)
    positive = rng.random(300) < 0.4
    shared = rng.normal(size=300) + positive
    a = np.round(shared + rng.normal(0, 0.3, (3, 300)), 1)  # with ties
    b = shared + rng.normal(0, 0.3, (3, 300))
    everyone = np.ones((300, 1), bool)
    one, two = (ranking.bias_aucs(rows, positive, everyone).overall for rows in (a, b))
    found = ranking.compare(a, b, positive)
    assert found.estimate == pytest.approx((one.auc - two.auc).mean(), abs=1e-12)
    assert found.low < found.estimate < found.high and found.reason == ""
    assert found.error < 0.6 * one.error.mean()  # rows in common are taken out
    # Against scores that say nothing, the error is that of the one AUC.
    alone = ranking.compare(a[0], np.zeros(300), positive)
    assert alone.estimate == pytest.approx(one.auc[0] - 0.5)
    assert alone.error == pytest.approx(one.error[0])
    assert 0 < alone.p < 1e-8 and np.isnan(alone.p_new_seeds)
    # Seeds that differ add their variance.
    worse = np.stack([b[0], b[1], -b[2]])
    by_seed = one.auc - np.array([two.auc[0], two.auc[1], 1 - two.auc[2]])
    mixed = ranking.compare(a, worse, positive)
    assert mixed.error > by_seed.std(ddof=1) / np.sqrt(3) > 0.1
    assert mixed.p < 0.05 < mixed.p_new_seeds and mixed.low < 0 < mixed.high


def test_an_auc_difference_covers_its_truth():
    rng, positive, hits = np.random.default_rng(1), np.arange(120) < 60, 0
    truth = ndtr(1 / np.sqrt(2)) - ndtr(0.5 / np.sqrt(2))
    for _ in range(300):
        noise = rng.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], 120).T
        found = ranking.compare(noise[0] + positive, noise[1] + 0.5 * positive, positive)
        hits += found.low < truth < found.high
    assert 0.91 < hits / 300 < 0.98


def test_an_auc_difference_without_an_interval_says_why():
    positive = np.arange(6) < 3
    scores = np.arange(6.0)
    found = ranking.compare(scores, 2 * scores, positive)
    assert found.estimate == 0 and np.isnan(found.low) and "alike" in found.reason
    found = ranking.compare(scores, np.where(positive, np.nan, scores), positive)
    assert np.isnan(found.estimate) and found.reason.startswith("0 positives and 3 negatives")
    with pytest.raises(ValueError, match="must be"):
        ranking.compare(scores, scores[:5], positive)
