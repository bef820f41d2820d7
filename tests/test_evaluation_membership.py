"""Membership inference: tf-privacy's vectors, closed forms of the normal model, and invariants."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import mannwhitneyu, norm

from jax_lowrank.evaluation import membership

FIXTURES = Path(__file__).parent / "fixtures"


def normal_world(num_rows=400, num_shadows=32, shift=1.0, seed=0):
    """Rows of different difficulty and spread; members' are higher by `shift` spreads."""
    rng = np.random.default_rng(seed)
    difficulty = rng.normal(0, 5, (num_rows, 1))
    spread = rng.uniform(0.5, 2, (num_rows, 1))
    inside = rng.permuted(np.tile(np.arange(num_shadows) % 2 == 0, (num_rows, 1)), axis=1)
    member = rng.permutation(np.arange(num_rows) % 2 == 0)
    noise = rng.normal(size=(num_rows, num_shadows + 1))
    known = np.concatenate([inside, member[:, None]], axis=1)
    values = difficulty + spread * (noise + shift * known)
    return values[:, -1], values[:, :-1], inside, member


# Vectors of advanced_mia_test.py in tensorflow/privacy: -log N(target; in). The last row has no
# shadow there and takes the columns' means, written out here.
IN = np.array([[-1.0, 1.0], [0.0, 2.0], [0.0, 20.0], [-1 / 3, 23 / 3]])
TARGET = np.array([1.0, 0.0, 0.0, 0.0])


def test_lira_density_equals_tf_privacy():
    outside = np.zeros(IN.shape, bool)
    found = membership.lira_offline(TARGET, IN, outside, form="density")
    np.testing.assert_allclose(found.score, [1.41893853, 1.41893853, 3.72152363, 2.72537178], 1e-7)
    assert not found.shared.any()
    np.testing.assert_array_equal(found.num_outside, 2)


def test_lira_global_variance_equals_tf_privacy():
    found = membership.lira_offline(
        TARGET[:3], IN[:3], np.zeros((3, 2), bool), form="density", variance="global"
    )
    np.testing.assert_allclose(found.score, [2.69682468, 2.69682468, 4.15270703], 1e-7)
    assert found.shared.all()


def test_online_is_zero_where_shadows_that_knew_a_row_look_like_the_others():
    shadows = np.concatenate([IN, IN], axis=1)
    inside = np.repeat([[True, True, False, False]], 4, axis=0)
    np.testing.assert_allclose(membership.lira_online(TARGET, shadows, inside).score, 0, atol=1e-12)


def test_the_mean_over_two_augmentations_equals_tf_privacy():
    """Theirs averages over augmentations; here each is an attack, whose scores are averaged."""
    target, shadows = np.array([[1.0, 0.0]]), np.array([[[-1.0, 0.0], [1.0, 20.0]]])
    outside = np.zeros((1, 2), bool)
    for center in ("mean", "median"):
        each = [
            membership.lira_offline(
                target[:, a], shadows[..., a], outside, form="density", center=center
            ).score
            for a in (0, 1)
        ]
        np.testing.assert_allclose(np.mean(each, axis=0), [2.57023108], 1e-8)


# compute_score_offset: the target's statistic minus the shadows' middle, mean over augmentations.
# (2 rows, 3 augmentations) and (2 rows, 3 shadows, 3 augmentations); the first row has one shadow.
OFFSET_TARGET = np.array([[-0.1, 0.1, 0], [0, 0, 27]])
OFFSET_IN = np.array([[[1, 2, -3], [0, 0, 0], [0, 0, 0]], [[-2, 4, 6], [0, 0, 0], [5, -7, -9.0]]])
ABSENT = np.array([[False, True, True], [False, False, False]])
OFFSETS = {
    ("in", "mean"): (0, 28 / 3),
    ("in", "median"): (0, 9),
    ("out", "mean"): (-10, -4 / 3),
    ("out", "median"): (-10, -1),
}


@pytest.mark.parametrize(("side", "center"), OFFSETS)
def test_the_offset_from_the_shadows_equals_tf_privacy(side, center):
    """The tail attack's score is this offset, in units of the spread of all rows."""
    shadows, offsets = OFFSET_IN if side == "in" else 10 - OFFSET_IN, []
    for target, values in zip(OFFSET_TARGET.T, np.moveaxis(shadows, 2, 0)):
        options = {"variance": "global", "center": center}
        found = membership.lira_offline(target, values, ABSENT, **options)
        residuals = values[1] - getattr(np, center)(values[1])
        offsets.append(found.score * np.sqrt(np.mean(residuals**2)))
    np.testing.assert_allclose(np.mean(offsets, axis=0), OFFSETS[side, center], atol=1e-12)


def test_margin_and_likelihood_equal_tf_privacy_and_do_not_saturate():
    logits, labels = [[1, 2, -3], [-1, 1, 0]], [1, 2]
    np.testing.assert_allclose(membership.margin(logits, labels), [0.98185009, -1.12692802], 1e-7)
    np.testing.assert_allclose(
        membership.log_likelihood(logits, labels), [-0.31817543, -1.40760596], 1e-7
    )
    big = np.float32([[60, 0, 0]])  # its probability is 1 in float32, and in float64
    assert membership.margin(big, [0])[0] == pytest.approx(60 - np.log(2))


@pytest.mark.parametrize("attack", ["online", "tail"])
def test_lira_reaches_the_auc_of_the_normal_model(attack):
    """Members are one spread up: Λ is monotone in φ, so AUC = Φ(1 / √2) with known normals."""
    target, shadows, inside, member = normal_world(4000, 512)
    run = membership.lira_online if attack == "online" else membership.lira_offline
    found = membership.attack(run(target, shadows, inside).score, member)
    assert found.low < norm.cdf(1 / np.sqrt(2)) < found.high
    assert found.high - found.low < 0.04
    # what difficulty hides from a global threshold
    assert membership.attack(target, member).auc < 0.6


def test_the_density_form_is_the_weaker_attack():
    target, shadows, inside, member = normal_world(4000, 64)
    tail, density = (
        membership.attack(
            membership.lira_offline(target, shadows, inside, form=form).score, member
        ).auc
        for form in ("tail", "density")
    )
    assert tail > density + 0.1


def test_nothing_leaks_nothing_is_found():
    target, shadows, inside, member = normal_world(4000, 32, shift=0.0)
    for scores in (
        membership.lira_online(target, shadows, inside).score,
        membership.lira_offline(target, shadows, inside).score,
        target,
    ):
        found = membership.attack(scores, member, level=0.999)
        assert found.low < 0.5 < found.high


def test_a_memorising_target_is_found_out():
    target, shadows, inside, member = normal_world(200, 32, shift=20.0)
    found = membership.attack(membership.lira_online(target, shadows, inside).score, member)
    assert found.auc > 0.999 and found.balanced_accuracy > 0.99
    assert 0.9 < found.low < found.auc <= found.high <= 1
    assert found.at[1].rate == 1.0 and found.at[1].low > 0.95


def test_a_row_without_its_own_spread_takes_that_of_all_rows():
    target, shadows, inside, _ = normal_world(50, 8)
    inside[0] = True  # no shadow without it
    inside[1] = True
    inside[1, 3] = False  # one
    shadows[2, ~inside[2]] = 1.5  # all alike
    found = membership.lira_offline(target, shadows, inside)
    assert np.isnan(found.score[0]) and not found.shared[0]
    assert found.num_outside[0] == 0 and found.num_outside[1] == 1
    np.testing.assert_array_equal(np.flatnonzero(found.shared), [1, 2])
    assert np.isfinite(found.score[1:]).all()
    outside = [row[~known] for row, known in zip(shadows, inside)]
    pooled = np.concatenate([row - row.mean() for row in outside if row.size > 1])
    expected = (target[1] - shadows[1, 3]) / np.sqrt(np.mean(pooled**2))
    assert found.score[1] == pytest.approx(expected)


def test_median_is_not_moved_by_one_wild_shadow():
    target, shadows, inside, _ = normal_world(50, 9)
    inside[:] = False
    wild = shadows.copy()
    wild[:, 0] = 1e3
    for center in ("median", "mean"):
        found = membership.lira_offline(target, wild, inside, center=center)
        middle = target - found.score * wild.std(1)
        np.testing.assert_allclose(middle, getattr(np, center)(wild, axis=1))


@pytest.mark.parametrize("gamma", [1.0, 1.2])
def test_rmia_is_the_share_of_the_population_that_is_beaten(gamma):
    rng = np.random.default_rng(3)
    target, shadows = np.log(rng.uniform(0.1, 1, 20)), np.log(rng.uniform(0.1, 1, (20, 6)))
    pool, pool_shadows = np.log(rng.uniform(0.1, 1, 30)), np.log(rng.uniform(0.1, 1, (30, 6)))
    inside = rng.random((20, 6)) < 0.5
    inside[0] = True
    target[1], shadows[1], inside[1] = pool[4], pool_shadows[4], False  # as good is not better
    found = membership.rmia(target, shadows, inside, pool, pool_shadows, offset=0.4, gamma=gamma)
    p_out = [np.exp(s[~i]).mean() if (~i).any() else np.nan for s, i in zip(shadows, inside)]
    row = np.exp(target) / ((1.4 * np.array(p_out) + 0.6) / 2)
    z = np.exp(pool) / ((1.4 * np.exp(pool_shadows).mean(1) + 0.6) / 2)
    expected = (row[:, None] / z[None] > gamma).mean(1)
    np.testing.assert_allclose(found.score[1:], expected[1:])
    assert np.isnan(found.score[0])


def test_auc_counts_ties_as_one_half_and_equals_mann_whitney():
    rng = np.random.default_rng(0)
    scores, member = rng.integers(0, 6, 300).astype(float), rng.random(300) < 0.4
    found = membership.attack(scores, member)
    u = mannwhitneyu(scores[member], scores[~member]).statistic
    assert found.auc == pytest.approx(u / member.sum() / (~member).sum(), abs=1e-12)
    assert found.num_members == member.sum() and found.num_others == (~member).sum()


def test_roc_holds_every_threshold_and_rates_at_it():
    curve = membership.roc([3.0, 1.0, 2.0, 2.0, 0.0], np.array([1, 1, 1, 0, 0], bool))
    np.testing.assert_allclose(curve.threshold, [np.inf, 3, 2, 1, 0])
    np.testing.assert_allclose(curve.true_positive_rate, [0, 1 / 3, 2 / 3, 1, 1])
    np.testing.assert_allclose(curve.false_positive_rate, [0, 0, 0.5, 0.5, 1])


def test_rates_below_one_in_n_are_not_resolvable():
    scores = np.arange(200.0)
    member = scores >= 100
    member[99], member[100] = True, False  # one non-member above one member
    tenth, hundredth, thousandth = membership.attack(scores, member).at
    assert tenth.rate == 1.0 and tenth.false_positives == 1
    assert hundredth.rate == 1.0 and hundredth.false_positives == 1
    assert np.isnan(thousandth.rate) and "100 non-members" in thousandth.reason
    assert 0.96 < tenth.low < 1 and tenth.high == 1.0  # Clopper-Pearson: 100 of 100


def test_newcombe_limits_cover_at_both_ends_and_shrink_with_counts():
    # Newcombe 2006, table: at AUC 1 the lower limit is below 1 and grows with the sample
    lows = [membership.auc_limits(1.0, n, n)[0] for n in (10, 100, 1000)]
    assert lows == sorted(lows) and lows[0] < 0.9 and lows[2] > 0.995
    low, high = membership.auc_limits(0.5, 50, 80)
    assert low + high == pytest.approx(1.0, abs=1e-6)  # symmetric at one half


def test_auc_limits_cover():
    rng, inside = np.random.default_rng(1), 0
    truth = norm.cdf(1 / np.sqrt(2))
    for _ in range(400):
        scores = np.concatenate([rng.normal(1, 1, 40), rng.normal(0, 1, 60)])
        found = membership.attack(scores, np.arange(100) < 40)
        inside += found.low <= truth <= found.high
    assert 0.92 <= inside / 400 <= 0.99


@pytest.mark.parametrize("case", ["plain", "ties", "chance"])
def test_the_curve_is_that_of_jax_privacy(case):
    """Their auditor may toss a coin between two thresholds: it reads the curve's upper hull."""
    frozen = json.loads((FIXTURES / "membership.json").read_text())["cases"][case]
    scores = np.array(frozen["inside"] + frozen["outside"])
    member = np.arange(scores.size) < len(frozen["inside"])
    curve, found = membership.roc(scores, member), membership.attack(scores, member)
    x, y = upper_hull(curve.false_positive_rate, curve.true_positive_rate)
    assert np.trapezoid(y, x) == pytest.approx(frozen["auroc"], abs=1e-12)
    np.testing.assert_allclose(np.interp(frozen["rates"], x, y), frozen["at"], atol=1e-12)
    assert found.balanced_accuracy == pytest.approx(frozen["max_accuracy"], abs=1e-12)
    assert found.auc <= frozen["auroc"] + 1e-12 and frozen["auroc"] - found.auc < 0.05
    for at in found.at:
        assert np.isnan(at.rate) or at.rate <= np.interp(at.target, x, y) + 1e-12


def upper_hull(x, y):
    """The vertices of the least concave function above a curve."""
    kept = []
    for point in zip(x, y):
        while len(kept) > 1 and cross(*kept[-2:], point) >= 0:
            kept.pop()
        kept.append(point)
    return np.array(kept).T


def cross(one, two, three):
    """Above 0 where the turn from one over two to three is to the left."""
    return (two[0] - one[0]) * (three[1] - one[1]) - (two[1] - one[1]) * (three[0] - one[0])


def test_too_few_members_is_nan_with_a_reason_and_nan_scores_are_counted():
    scores, member = np.arange(30.0), np.arange(30) < 5
    found = membership.attack(scores, member)
    assert np.isnan(found.auc) and "5 members and 25 others" in found.reason
    scores[7] = np.nan
    assert membership.attack(scores, np.arange(30) % 2 == 0).num_missing == 1


def test_group_gaps_are_read_against_their_permutations():
    rng = np.random.default_rng(5)
    groups = np.eye(8, dtype=bool)[rng.integers(0, 8, 1600)]
    member = rng.random(1600) < 0.5
    scores = rng.normal(size=1600)
    calm = membership.gaps(scores, member, groups, num_permutations=200)
    names = ["auc", "best balanced accuracy", "tpr at 0.1", "tpr at 0.01", "tpr at 0.001"]
    assert [each.measure for each in calm] == names
    for each in calm[:3]:
        assert each.p > 0.05 and each.null_mean > 0.05 and each.num_defined == 8
    found = membership.by_group(scores, member, groups)
    for each, values in zip(
        calm[:4], zip(*((a.auc, a.balanced_accuracy, *(t.rate for t in a.at)) for a in found))
    ):
        np.testing.assert_allclose(each.values, values, atol=1e-12)
    assert (
        np.isnan(calm[4].gap) and "0 of 8 groups have 10 members and others and" in calm[4].reason
    )
    leaky = scores + 1.5 * (member & groups[:, 3])
    loud = membership.gaps(leaky, member, groups, num_permutations=200)
    assert all(each.p < 0.01 and each.gap > 0.2 for each in loud[:3]), loud
    assert loud[0].gap > 0.3


def test_group_gaps_count_ties_as_one_half_and_name_small_groups():
    rng = np.random.default_rng(6)
    groups = rng.random((400, 3)) < 0.5
    groups[:, 2] = np.arange(400) < 4
    member, scores = rng.random(400) < 0.5, rng.integers(0, 4, 400).astype(float)
    scores[9] = np.nan
    found = membership.gaps(scores, member, groups, num_permutations=50)
    attacks = membership.by_group(scores, member, groups)
    assert not {a.num_others for a in attacks[:2]} & {100}  # so that 1 % is told by both or none
    for number, read in enumerate((lambda a: a.auc, lambda a: a.balanced_accuracy)):
        expected = [read(each) for each in attacks]
        np.testing.assert_allclose(found[number].values, expected, atol=1e-12)
        assert np.isnan(found[number].values[2]) and found[number].num_defined == 2
    np.testing.assert_allclose(found[2].values, [each.at[0].rate for each in attacks], atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: membership.margin([[1.0]], [0]), "C > 1"),
        (lambda: membership.margin([[1.0, 2.0]], [2]), "0 .. 1"),
        (lambda: membership.lira_online([0.0], [[0.0, 1.0]], [[0, 1]]), "boolean"),
        (lambda: membership.lira_offline([0.0], [[np.inf]], [[False]]), "finite"),
        (lambda: membership.roc([np.nan, 1.0], np.array([True, False])), "NaN"),
        (lambda: membership.attack([1.0, 0.0], [1, 0]), "bool"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
    one = (np.zeros(2), np.zeros((2, 3)), np.zeros((2, 3), bool))
    for options in ({"form": "cdf"}, {"variance": "fixed"}, {"center": "mode"}):
        with pytest.raises(ValueError, match=next(iter(options.values()))):
            membership.lira_offline(*one, **options)
