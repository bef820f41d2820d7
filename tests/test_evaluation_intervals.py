"""evaluation/intervals.py against statsmodels, scipy, published numbers and simulation."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_lowrank.evaluation import intervals

FROZEN = json.loads((Path(__file__).parent / "fixtures" / "evaluation.json").read_text("utf-8"))


@pytest.mark.parametrize("method", ["wilson", "clopper_pearson"])
def test_rates_equal_statsmodels(method):
    successes, n = np.array(FROZEN["intervals"]["counts"]).T
    limits = []
    for level in (0.95, 0.8):
        found = getattr(intervals, method)(successes, n, level)
        limits += list(zip(found.low, found.high))
        np.testing.assert_allclose(found.estimate, successes / n)
    np.testing.assert_allclose(limits, FROZEN["intervals"][method], atol=1e-12)


def test_newcombe_equals_statsmodels_and_the_paper():
    found = [
        intervals.newcombe(*pair, level=level)[1:3]
        for level in (0.95, 0.8)
        for pair in FROZEN["intervals"]["pairs"]
    ]
    np.testing.assert_allclose(found, FROZEN["intervals"]["newcombe"], atol=1e-12)
    # Newcombe 1998, table II, 56/70 - 48/80, method 10
    np.testing.assert_allclose(
        intervals.newcombe(56, 70, 48, 80)[:3], [0.2, 0.0524, 0.3339], atol=5e-5
    )


@pytest.mark.parametrize("method", [intervals.wilson, intervals.clopper_pearson])
def test_no_trials_is_undefined_and_says_so(method):
    found = method([0, 1], [0, 1])
    assert np.isnan([found.estimate[0], found.low[0], found.high[0]]).all()
    assert found.reason == ("no trials", "")
    assert method(0, 0).reason == "no trials"
    with pytest.raises(ValueError, match="successes <= n"):
        method(3, 2)
    with pytest.raises(ValueError, match="between 0 and 1"):
        method(1, 2, level=95)


def test_newcombe_without_trials_says_so():
    found = intervals.newcombe(1, 2, 0, 0)
    assert np.isnan(found.estimate) and found.reason == "no trials"


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_bootstrap_of_single_items_equals_scipy(method):
    frozen = FROZEN["bootstraps"]
    found = intervals.bootstrap(frozen["values"], method=method, num_resamples=40_000)
    np.testing.assert_allclose([found.low, found.high], frozen[method], atol=0.012)
    assert found.n == found.num_clusters == 40 and found.reason == ""
    slow = intervals.bootstrap(frozen["values"], np.mean, method=method, num_resamples=4000)
    np.testing.assert_allclose([slow.low, slow.high], frozen[method], atol=0.03)


def test_bca_differs_from_percentile_where_values_are_skewed():
    frozen = FROZEN["bootstraps"]
    assert min(np.abs(np.subtract(frozen["bca"], frozen["percentile"]))) > 0.025


def test_copies_of_a_cluster_add_no_information():
    """Ten copies of each value under one name are one value; as items they would narrow."""
    values = np.array(FROZEN["bootstraps"]["values"])
    one = intervals.bootstrap(values, seed=3)
    copies = intervals.bootstrap(np.repeat(values, 10), clusters=np.repeat(range(40), 10), seed=3)
    np.testing.assert_allclose(copies[:3], one[:3])
    assert (copies.n, copies.num_clusters) == (400, 40)
    naive = intervals.bootstrap(np.repeat(values, 10))
    assert naive.high - naive.low < 0.5 * (one.high - one.low)
    named = intervals.bootstrap(
        np.repeat(values, 10), clusters=[f"{i:02}" for i in range(40) for _ in range(10)], seed=3
    )
    assert named == copies


def test_statistic_path_resamples_the_same_clusters():
    values, names = np.arange(12.0), np.repeat(range(4), 3)
    fast = intervals.bootstrap(values, clusters=names, method="bca", num_resamples=20_000)
    slow = intervals.bootstrap(values, np.mean, names, "bca", num_resamples=20_000)
    np.testing.assert_allclose(fast[:3], slow[:3], atol=0.15)


def test_missing_values_are_left_out_and_counted():
    values = np.append(FROZEN["bootstraps"]["values"], [np.nan] * 3)
    found = intervals.bootstrap(values)
    assert (found.n, found.num_missing) == (40, 3)
    assert found.estimate == pytest.approx(np.nanmean(values))


@pytest.mark.parametrize(
    ("values", "clusters", "reason"),
    [
        ([1.0, 2.0], ["a", "a"], "one cluster"),
        ([1.0], None, "one cluster"),
        ([np.nan, np.nan], None, "no values"),
        ([0.0, 0.0, 0.0], None, "do not vary"),
    ],
)
@pytest.mark.parametrize("statistic", [None, np.mean])
def test_no_interval_without_variation(values, clusters, reason, statistic):
    found = intervals.bootstrap(values, statistic, clusters, num_resamples=50)
    assert np.isnan([found.low, found.high]).all() and reason in found.reason


def test_bootstrap_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="percentile"):
        intervals.bootstrap([1.0, 2.0], method="basic")
    with pytest.raises(ValueError, match="several rows"):
        intervals.bootstrap(np.ones((2, 3)), method="bca")
    with pytest.raises(ValueError, match="each of the 2 items"):
        intervals.bootstrap([1.0, 2.0], clusters=[1])
    with pytest.raises(ValueError, match="infinite"):
        intervals.bootstrap([1.0, np.inf])


def test_two_way_variance_is_the_unbiased_one():
    """Only seeds differ, or only items: the replicates' variance is s**2 / n, even for 3 seeds."""
    spread = np.array([[0.0], [1.0], [5.0]])
    for values, axis in ((spread + np.zeros(8), 0), (np.zeros((3, 8)) + np.arange(8.0) ** 2, 1)):
        sums, counts = intervals.cluster_tables(values, None)
        tops, bottoms = intervals.resampled_totals((sums, counts), 40_000, seed=1)
        wanted = values.mean(1 - axis).var(ddof=1) / values.shape[axis]
        assert np.var(tops / bottoms) == pytest.approx(wanted, rel=0.04)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=3, max_size=12), st.randoms())
def test_order_of_rows_changes_only_rounding(values, random):
    names = [i % 3 for i in range(len(values))]
    order = list(range(len(values)))
    random.shuffle(order)
    one = intervals.bootstrap(values, clusters=names, num_resamples=50)
    two = intervals.bootstrap(
        [values[i] for i in order], clusters=[names[i] for i in order], num_resamples=50
    )
    assert one.reason == two.reason and one[3:6] == two[3:6]
    np.testing.assert_allclose(one[:3], two[:3], atol=1e-12)


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_clustered_interval_covers_and_the_naive_one_does_not(method):
    rng, names = np.random.default_rng(0), np.repeat(range(25), 6)
    covered, naive = 0, 0
    for trial in range(200):
        values = rng.normal(size=25)[names] + rng.normal(size=150)
        found = intervals.bootstrap(values, None, names, method, num_resamples=400, seed=trial)
        covered += found.low <= 0 <= found.high
        found = intervals.bootstrap(values, None, None, method, num_resamples=200, seed=trial)
        naive += found.low <= 0 <= found.high
    assert 0.87 <= covered / 200 <= 0.99
    assert naive / 200 < 0.75


def test_ratio_of_means_and_its_denominator():
    rng = np.random.default_rng(0)
    bottom = 2 + 0.1 * rng.normal(size=(4, 30))
    found = intervals.ratio(3 * bottom, bottom)
    np.testing.assert_allclose(found[:3], 3.0)  # joint draws: no noise is left in the ratio
    assert found.denominator_low < 2 < found.denominator_high
    assert (found.n, found.num_clusters, found.num_seeds, found.num_missing) == (30, 30, 4, 0)
    means = intervals.ratio([1.0, 1.0, 4.0], [1.0, 2.0, 3.0])
    assert means.estimate == 1.0 and "one seed" in means.note
    holed = bottom.copy()
    holed[0, :7] = np.nan
    assert intervals.ratio(bottom, holed).num_missing == 7


def test_ratio_is_undefined_over_a_denominator_that_may_be_0():
    found = intervals.ratio([1.0, 2.0, 3.0, 2.0], [-1.0, 1.0, -2.0, 2.1])
    assert np.isnan(found[:3]).all() and "cannot be told from 0" in found.reason
    assert found.numerator == 2.0 and found.denominator == pytest.approx(0.025)
    alone = intervals.ratio([1.0], [2.0])
    assert np.isnan(alone.low) and "one cluster" in alone.reason


def test_membership_is_checked():
    with pytest.raises(ValueError, match="membership"):
        intervals.membership(np.array([0, 1, 2]))
    with pytest.raises(ValueError, match="membership"):
        intervals.membership([[0, 2]])
