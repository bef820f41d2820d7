"""evaluation/comparisons.py against enumeration, scipy, statsmodels and simulation."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jax_lowrank.evaluation import comparisons, disparities

FROZEN = json.loads((Path(__file__).parent / "fixtures" / "evaluation.json").read_text("utf-8"))


def made(seeds, clusters, size, seed_spread, rng):
    """Differences with a true mean of 0: seed + cluster + noise."""
    names = np.repeat(np.arange(clusters), size)
    noise = 0.5 * rng.normal(size=clusters)[names] + rng.normal(size=(seeds, names.size))
    return noise + seed_spread * rng.normal(size=(seeds, 1)), names


def test_difference_is_the_mean_with_its_counts():
    rng = np.random.default_rng(0)
    a, b = rng.random((3, 20)), rng.random((3, 20))
    a[0, 4] = b[1, 5] = a[2, 5] = b[2, 5] = np.nan
    a[:, 7] = np.nan
    found = comparisons.paired_difference(a, b, np.arange(20) % 7)
    assert found.estimate == pytest.approx(np.nanmean(a - b))
    assert (found.n, found.num_clusters, found.num_seeds, found.num_missing) == (19, 7, 3, 6)
    assert found.low < found.estimate < found.high and found.reason == ""


def test_one_base_row_serves_every_seed():
    rng = np.random.default_rng(0)
    a, b = rng.random((3, 20)), rng.random((1, 20))
    assert comparisons.paired_difference(a, b) == comparisons.paired_difference(
        a, np.repeat(b, 3, axis=0)
    )
    with pytest.raises(ValueError, match="paired"):
        comparisons.paired_difference(a, rng.random((2, 20)))
    with pytest.raises(ValueError, match="'t'"):
        comparisons.paired_difference(a, b, method="bca")


def test_pairing_removes_what_prompts_share():
    rng = np.random.default_rng(0)
    prompt = 10 * rng.normal(size=40)
    a = prompt + 0.1 * rng.normal(size=(3, 40)) + 0.2
    b = prompt + 0.1 * rng.normal(size=(3, 40))
    found = comparisons.paired_difference(a, b)
    assert 0.1 < found.low < found.high < 0.3


def test_sign_flips_equal_scipys_exact_test():
    d = np.array([[0.3, -0.1, 0.25, 0.6, 0.02]])
    found = comparisons.paired_difference(d, 0 * d)
    assert found.p == pytest.approx(FROZEN["gaps"]["p_signs"])
    assert "p cannot go below 0.0625" in found.note
    flipped = comparisons.paired_difference(0 * d, d)
    assert flipped.p == found.p and flipped.estimate == -found.estimate


def test_drawn_sign_flips_agree_with_exact_ones(monkeypatch):
    d, names = made(2, 12, 3, 0, np.random.default_rng(0))
    exact = comparisons.paired_difference(d + 0.15, 0 * d, names).p
    monkeypatch.setattr(comparisons, "EXACT_CLUSTERS", 5)
    drawn = comparisons.paired_difference(d + 0.15, 0 * d, names, num_resamples=20_000).p
    assert drawn == pytest.approx(exact, abs=0.015) and 0.01 < exact < 0.9


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_what_each_interval_and_p_covers(spread):
    """The t interval and p_new_seeds hold whatever the seeds do; p only when seeds are alike."""
    rng, trials = np.random.default_rng(0), 200
    covered, rejected, rejected_new = {"t": 0, "percentile": 0}, 0, 0
    for trial in range(trials):
        d, names = made(3, 15, 4, spread, rng)
        for method in covered:
            found = comparisons.paired_difference(
                d, 0 * d, names, method=method, num_resamples=300, seed=trial
            )
            covered[method] += found.low <= 0 <= found.high
        rejected += found.p <= 0.05
        rejected_new += found.p_new_seeds <= 0.05
    assert covered["t"] / trials >= 0.91
    assert rejected_new / trials <= 0.09
    if spread:
        assert covered["percentile"] / trials < 0.9 and rejected / trials > 0.3
    else:
        assert covered["percentile"] / trials >= 0.9 and rejected / trials <= 0.1


def test_one_seed_says_that_it_covers_no_seeds():
    found = comparisons.paired_difference([[1.0, 2.0, 4.0]], [[0.0, 0.0, 0.0]])
    assert "one seed" in found.note and np.isnan(found.p_new_seeds)
    several = comparisons.paired_difference(np.eye(3), np.zeros((1, 3)))
    assert several.note.startswith("3 seeds: percentile limits are narrow")


def test_degrees_of_freedom_by_hand():
    """Unit variances of the mean 1/3 (3 seeds, df 2) and 5/12 (4 items, df 3): Satterthwaite."""
    sums = np.array([[-1.0], [0.0], [1.0]]) + np.array([-1.5, -0.5, 0.5, 1.5])
    wanted = (1 / 3 + 5 / 12) ** 2 / ((1 / 3) ** 2 / 2 + (5 / 12) ** 2 / 3)
    found = comparisons._satterthwaite(sums, np.ones((3, 4)), 0.0)
    assert found == pytest.approx(wanted)
    assert comparisons._satterthwaite(sums[:1], np.ones((1, 4)), -1.0) == pytest.approx(3)


def test_no_effect_and_no_variation():
    same = comparisons.paired_difference(np.ones((2, 9)), np.ones((2, 9)))
    assert same.estimate == 0 and same.p == 1
    assert np.isnan([same.low, same.high]).all() and "same amount" in same.reason
    alone = comparisons.paired_difference([[1.0, 2.0]], [[0.0, 0.0]], clusters=[3, 3])
    assert alone.estimate == 1.5 and np.isnan(alone.p) and "one cluster" in alone.reason
    none = comparisons.paired_difference([[np.nan]], [[0.0]])
    assert np.isnan(none.estimate) and none.reason == "no values"


def test_a_group_against_the_rest_is_welchs_test():
    rng = np.random.default_rng(3)
    values, inside = rng.normal(size=60), np.arange(60) < 15
    values[inside] += 0.5
    found = comparisons.versus_rest(values, inside)
    theirs = stats.ttest_ind(values[inside], values[~inside], equal_var=False)
    assert found.p == pytest.approx(theirs.pvalue) and np.isnan(found.p_new_seeds)
    limits = theirs.confidence_interval()
    assert (found.low, found.high) == pytest.approx((limits.low, limits.high))


def test_seeds_that_differ_widen_a_group_against_the_rest():
    rng = np.random.default_rng(4)
    rows, inside = rng.normal(size=200), np.arange(200) < 80
    same = np.stack([rows, rows, rows])
    apart = same + np.outer([-0.4, 0.0, 0.4], inside)
    narrow, wide = (comparisons.versus_rest(each, inside) for each in (same, apart))
    assert narrow.estimate == pytest.approx(wide.estimate)
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)
    assert wide.p_new_seeds == wide.p and wide.num_seeds == 3
    few = comparisons.versus_rest(same, np.arange(200) < 1)
    assert np.isnan(few.estimate) and "each side needs two" in few.reason
    constant = comparisons.versus_rest(np.ones((2, 9)), np.arange(9) < 4)
    assert constant.estimate == 0 and np.isnan(constant.p) and constant.reason


def test_slope_equals_least_squares_of_the_mean():
    rng, x = np.random.default_rng(0), np.array([0.0, 1.0, 2.0, 5.0])
    values = rng.random((3, 4, 10))
    found = comparisons.slope(values, x, np.arange(10) % 6)
    assert found.estimate == pytest.approx(np.polyfit(x, values.mean((0, 2)), 1)[0])
    line = comparisons.slope(2 * x[:, None] * np.array([1.0, 2.0, 3.0]) + np.zeros((2, 1, 1)), x)
    assert line.estimate == pytest.approx(4.0) and line.p == pytest.approx(0.25)
    values[0, 1, 3] = np.nan
    assert comparisons.slope(values, x).num_missing == 1


def test_slope_needs_two_x():
    found = comparisons.slope(np.zeros((2, 3, 4)), [1.0, 1.0, 1.0], [0, 0, 1, 1])
    assert np.isnan(found.estimate) and "two distinct x" in found.reason
    assert (found.n, found.num_clusters, found.num_seeds) == (4, 2, 2)
    with pytest.raises(ValueError, match=r"\(S, R, N\)"):
        comparisons.slope(np.zeros((2, 3, 4)), [1.0, 2.0])


def test_gap_equals_scipys_exact_test():
    frozen = FROZEN["gaps"]
    outcome = np.array(frozen["one"] + frozen["two"])
    groups = np.arange(7)[:, None] < 4
    found = comparisons.gap_permutation(
        outcome, np.hstack([groups, ~groups]), num_permutations=40_000
    )
    assert found.p == pytest.approx(frozen["p"], abs=0.01)
    assert found.null_mean == pytest.approx(frozen["null"], abs=0.005)
    np.testing.assert_array_equal(found.counts, [4, 3])
    np.testing.assert_allclose(found.rates, [np.mean(frozen["one"]), np.mean(frozen["two"])])


def test_gap_keeps_its_level_and_finds_a_gap():
    rng, groups, names = (
        np.random.default_rng(0),
        np.eye(4, dtype=bool)[np.arange(80) % 4],
        np.arange(80) // 8,
    )
    quiet, loud = [], []
    for trial in range(150):
        outcome = rng.normal(size=80) + 3 * rng.normal(size=10)[names]
        options = {"clusters": names, "num_permutations": 99, "seed": trial}
        quiet.append(comparisons.gap_permutation(outcome, groups, **options).p)
        outcome = outcome + 1.2 * groups[:, 0]
        loud.append(comparisons.gap_permutation(outcome, groups, **options).p)
    assert 0.01 <= np.mean(np.array(quiet) <= 0.05) <= 0.1
    assert np.mean(np.array(loud) <= 0.05) > 0.8


def test_gap_takes_out_what_templates_explain():
    rng, names = np.random.default_rng(0), np.repeat(range(20), 2)
    groups = np.eye(2, dtype=bool)[np.arange(40) % 2]
    outcome = 5 * rng.normal(size=20)[names] + 0.5 * groups[:, 0] + 0.2 * rng.normal(size=40)
    assert comparisons.gap_permutation(outcome, groups, names).p < 0.001
    assert comparisons.gap_permutation(outcome, groups).p > 0.3


def test_gap_counts_what_it_leaves_out():
    outcome = np.array([0.0, 1.0, np.nan, 1.0, 0.0, 9.0])
    groups = np.array([[1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0]], bool)
    found = comparisons.gap_permutation(outcome, groups)
    assert (found.gap, found.num_defined, found.n, found.num_missing) == (1.0, 2, 4, 1)
    assert np.isnan(found.rates[2])
    one = comparisons.gap_permutation(outcome, groups[:, [0, 2]])
    assert np.isnan(one.gap) and "1 of 2 groups" in one.reason
    apart = comparisons.gap_permutation([0.0, 1.0], np.eye(2, dtype=bool), clusters=["a", "b"])
    assert apart.gap == 1.0 and np.isnan(apart.p) and "nothing to permute" in apart.reason


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(4)), st.lists(st.floats(0, 1), min_size=12, max_size=12))
def test_gap_does_not_know_the_groups_names(order, outcome):
    groups = np.arange(12)[:, None] % np.array([2, 3, 4, 5]) == 0  # overlapping
    one = comparisons.gap_permutation(outcome, groups, num_permutations=20)
    two = comparisons.gap_permutation(outcome, groups[:, order], num_permutations=20)
    assert (one.gap, one.p) == pytest.approx((two.gap, two.p))
    np.testing.assert_allclose(one.rates[list(order)], two.rates)


@pytest.mark.parametrize("name", ["holm", "benjamini_hochberg"])
def test_adjusted_p_equals_statsmodels(name):
    adjust, frozen = getattr(comparisons, name), FROZEN["adjusted"]
    np.testing.assert_allclose(adjust(frozen["p"]), frozen[name], atol=1e-15)
    holed = adjust([*frozen["p"][:3], np.nan, *frozen["p"][3:]])
    np.testing.assert_allclose(np.delete(holed, 3), frozen[name], atol=1e-15)
    assert np.isnan(holed[3]) and np.isnan(adjust([np.nan])).all() and adjust([]).size == 0
    square = np.reshape(frozen["p"], (2, -1))  # groups by metrics: one family
    np.testing.assert_allclose(adjust(square).ravel(), frozen[name], atol=1e-15)
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        adjust([1.5])


def test_a_gap_of_seeds_is_their_mean_under_the_same_permutations():
    rng = np.random.default_rng(4)
    groups = np.eye(3, dtype=bool)[rng.integers(0, 3, 60)]
    outcome = rng.random((4, 60)) < 0.4
    found = comparisons.gap_permutation(outcome, groups, num_permutations=300)
    alone = [comparisons.gap_permutation(run, groups, num_permutations=300) for run in outcome]
    assert found.gap == pytest.approx(np.mean([one.gap for one in alone]))
    assert found.null_mean == pytest.approx(np.mean([one.null_mean for one in alone]))
    same = comparisons.gap_permutation(outcome[[0, 0]], groups, num_permutations=300)
    assert same[:3] == pytest.approx(alone[0][:3])


def test_the_odds_gap_is_permuted_within_labels():
    """Against a permutation of rows, label by label, written out."""
    rng = np.random.default_rng(5)
    groups = np.column_stack([np.eye(3, dtype=bool)[rng.integers(0, 3, 120)], np.arange(120) < 3])
    positive = rng.random(120) < 0.4
    predicted = rng.random((2, 120)) < 0.2 + 0.5 * positive + 0.2 * groups[:, 0]

    def odds(groups):
        parts = []
        for where in (positive, ~positive):
            rates = [predicted[:, where & inside].mean(1) for inside in groups[:, :3].T]
            parts.append(np.ptp(rates, axis=0))
        return np.maximum(*parts).mean()

    def permuted():
        order = np.arange(120)
        for where in (positive, ~positive):
            order[where] = rng.permutation(order[where])
        return odds(groups[order])

    null = np.array([permuted() for _ in range(1500)])
    options = {"minimum": 4, "num_permutations": 1500}
    found = comparisons.odds_gap_permutation(predicted, groups, positive, **options)
    assert found.gap == pytest.approx(odds(groups)) and found.num_defined == 3
    assert found.null_mean == pytest.approx(null.mean(), rel=0.03)
    assert found.p == pytest.approx((null >= found.gap - 1e-9).mean(), abs=0.03)
    assert found.rates.shape == (2, 4) and np.isnan(found.rates[:, 3]).all()
    run = comparisons.odds_gap_permutation(predicted[0], groups, positive, **options)
    every = disparities.permuted_odds(predicted, groups[:, :3], positive)
    fast = every.odds
    assert fast.gap[0] == pytest.approx(run.gap) and fast.num_defined == 3
    assert fast.null_mean[0] == pytest.approx(run.null_mean, rel=0.03)
    assert fast.p[0] == pytest.approx(run.p, abs=0.03)
    np.testing.assert_allclose(every.odds_mean.gap, (every.tpr.gap + every.fpr.gap) / 2)
    parts = every.tpr.null_mean, every.fpr.null_mean
    np.testing.assert_allclose(every.odds_mean.null_mean, sum(parts) / 2)
    assert (fast.null_mean > np.maximum(*parts)).all()
    one = disparities.permuted_gap(predicted, groups[:, :3], ~positive)
    np.testing.assert_allclose(every.fpr.null_mean, one.null_mean, rtol=0.03)
    few = comparisons.odds_gap_permutation(predicted, groups, np.arange(120) < 1, minimum=4)
    assert np.isnan(few.gap) and few.reason == "0 of 4 groups have enough rows: a gap needs two"
    few = disparities.permuted_odds(predicted, groups[:, :3], np.arange(120) < 1).odds
    assert np.isnan(few.p).all() and few.reason.endswith("a gap needs two")


def test_the_odds_gap_keeps_its_level():
    rng, p = np.random.default_rng(6), []
    for trial in range(200):
        groups = np.eye(4, dtype=bool)[rng.integers(0, 4, 100)]
        positive = rng.random(100) < 0.2 + 0.2 * groups[:, 0]  # shares of positives differ
        predicted = rng.random(100) < 0.2 + 0.5 * positive
        options = {"num_permutations": 99, "seed": trial}
        p.append(disparities.permuted_odds(predicted, groups, positive, **options).odds.p)
    assert 0.01 <= np.mean(np.array(p) <= 0.05) <= 0.1 and 0.4 < np.mean(p) < 0.62
