"""evaluation/cells.py, the limits and tests of gaps in disparities.py, and subgroups.py."""

import json
from pathlib import Path

import numpy as np
import pytest

from jax_lowrank.evaluation import (
    calibration,
    cells,
    comparisons,
    disparities,
    groups,
    intervals,
    subgroups,
)

FROZEN = json.loads((Path(__file__).parent / "fixtures" / "groups.json").read_text("utf-8"))


def data(seed=0, n=400, runs=2, num_classes=2):
    """Labels, predictions and overlapping groups."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, num_classes, n)
    noise = rng.integers(0, num_classes, (runs, n))
    predicted = np.where(rng.random((runs, n)) < 0.6, label, noise)
    return label, predicted, rng.random((n, 3)) < [0.5, 0.3, 0.2]


def identity(tables):
    return tables


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_cells_hold_the_tables(num_classes, weighted):
    label, predicted, members = data(num_classes=num_classes)
    weights = np.random.default_rng(1).integers(1, 4, 400) / 2 if weighted else None
    made = cells.make(label, predicted, members, num_classes=num_classes, weights=weights)
    assert made.counts.sum() == 400
    totals = made.sums @ made.counts[:, None].astype(float)
    counts = groups.count(label, predicted, members, num_classes=num_classes, weights=weights)
    np.testing.assert_allclose(
        cells.tables(made, totals)[..., 0], subgroups.counts_with_all(counts), atol=1e-9
    )
    clustered = cells.make(
        label, predicted, members, num_classes=num_classes, clusters=np.arange(400) % 7
    )
    totals = clustered.sums @ np.ones((7, 1))
    counts = groups.count(label, predicted, members, num_classes=num_classes)
    np.testing.assert_allclose(
        cells.tables(clustered, totals)[..., 0], subgroups.counts_with_all(counts), atol=1e-9
    )


@pytest.mark.parametrize("many_cells", [False, True])
def test_the_resampled_tables_are_a_bootstrap_of_rows(many_cells):
    """Means and covariances of the entries are those of n draws with replacement."""
    n = 300 if many_cells else 800
    label, predicted, members = data(n=n, runs=1)
    made = cells.make(label, predicted, members, num_classes=2)
    assert (made.counts.size * 16 < n) == (not many_cells)
    drawn = cells.resample(made, identity, 20_000, seed=1)[:, 0]
    codes = 2 * label + predicted[0]
    rows = np.zeros((n, members.shape[1] + 1, 4))
    for g, inside in enumerate([*members.T, np.ones(n, bool)]):
        rows[inside, g, codes[inside]] = 1
    flat, rows = drawn.reshape(20_000, -1), rows.reshape(n, -1)
    np.testing.assert_allclose(flat.mean(0), rows.sum(0), atol=0.6)
    np.testing.assert_allclose(np.cov(flat.T), n * np.cov(rows.T, ddof=0), atol=0.015 * n)
    np.testing.assert_allclose(drawn[:, -1].sum((1, 2)), n)


def test_clusters_are_drawn_whole():
    label, predicted, members = data(n=60, runs=1)
    copies = [np.tile(values, 5) for values in (label, predicted)]
    many = np.tile(members, (5, 1))
    once = cells.resample(cells.make(label, predicted, members, num_classes=2), identity, 3000)
    made = cells.make(copies[0], copies[1], many, num_classes=2, clusters=np.tile(np.arange(60), 5))
    five = cells.resample(made, identity, 3000)
    np.testing.assert_allclose(five.std(0), 5 * once.std(0), rtol=0.12, atol=0.3)


def test_all_runs_see_the_same_resample():
    label, predicted, members = data(runs=1)
    twice = np.concatenate([predicted, predicted])
    made = cells.make(label, twice, members, num_classes=2)
    drawn = cells.resample(made, identity, 50)
    np.testing.assert_array_equal(drawn[:, 0], drawn[:, 1])


def test_percentiles_equal_numpys_and_leave_out_what_is_missing():
    values = np.random.default_rng(0).normal(size=(101, 4))
    values[:30, 1], values[:, 2] = np.nan, np.nan
    low, high = cells.percentiles(values, 0.9)
    for column in (0, 1, 3):
        wanted = np.nanquantile(values[:, column], [0.05, 0.95])
        np.testing.assert_allclose([low[column], high[column]], wanted)
    assert np.isnan(low[2]) and np.isnan(high[2])


def gap_coverage(true_rates, sizes, kind, trials=150):
    """Share of trials whose limits hold the true gap, and of those whose lower end is 0."""
    rng, covered, at_zero, percentile = np.random.default_rng(0), 0, 0, 0
    true_rates, sizes = np.array(true_rates), np.array(sizes)
    true = {
        "difference": np.ptp(true_rates),
        "ratio": true_rates.min() / true_rates.max(),
        "worst": true_rates.min(),
    }[kind]
    for _ in range(trials):
        rate = rng.binomial(sizes, true_rates) / sizes
        draws = rng.binomial(sizes, rate, (400, sizes.size)) / sizes
        low, high, reason = disparities.gap_limits([rate], [draws], kind)
        assert reason == ""
        covered += low <= true + 1e-12 and true - 1e-12 <= high
        at_zero += low == 0
        percentile += np.quantile(np.ptp(draws, axis=1), 0.025) <= true
    return covered / trials, at_zero / trials, percentile / trials


@pytest.mark.parametrize("kind", ["difference", "ratio", "worst"])
def test_limits_of_gaps_cover_where_percentiles_do_not(kind):
    """8 groups of 125 rows, no gap: evaluation.md, section 1, item 4."""
    covered, at_zero, percentile = gap_coverage([0.4] * 8, [125] * 8, kind)
    assert covered >= 0.9
    if kind == "difference":
        assert at_zero >= 0.9 and percentile < 0.05
    covered, _, _ = gap_coverage([0.3, 0.4, 0.35, 0.5, 0.45], [200, 150, 300, 120, 200], kind)
    assert covered >= 0.9


def test_limits_of_two_rates_together_and_to_the_overall_rate():
    rng = np.random.default_rng(1)
    rates = [np.array([0.2, 0.4, 0.3]), np.array([0.5, 0.55, 0.6])]
    draws = [rate + rng.normal(0, 0.02, (500, 3)) for rate in rates]
    tpr, fpr = (disparities.gap_limits([r], [d]) for r, d in zip(rates, draws))
    worst = disparities.gap_limits(rates, draws)
    mean = disparities.gap_limits(rates, draws, agg="mean")
    assert worst.low < 0.2 < worst.high and worst.high > tpr.high - 0.02
    assert mean.low < 0.15 < mean.high < worst.high and fpr.low < 0.1 < fpr.high
    top = (np.float64(0.3), np.full(500, 0.3))
    overall = disparities.gap_limits(rates[:1], draws[:1], overall=[top])
    assert overall.low < 0.1 < overall.high < tpr.high
    assert "1 of 2 groups" in disparities.gap_limits([np.array([0.1, np.nan])], [draws[0]]).reason
    none = disparities.gap_limits([np.array([0.0, 0.1])], [np.abs(draws[0][:, :2])], "ratio")
    assert np.isnan(none.low) and "logarithm" in none.reason
    with pytest.raises(ValueError, match="kind"):
        disparities.gap_limits(rates, draws, "gap")


def test_the_permuted_gap_equals_the_permutation_of_rows():
    rng = np.random.default_rng(2)
    members = rng.random((90, 3)) < [0.5, 0.3, 0.1]
    outcome = rng.random(90) < 0.3 + 0.2 * members[:, 0]
    found = disparities.permuted_gap(outcome, members, num_permutations=8000)
    slow = comparisons.gap_permutation(outcome.astype(float), members, num_permutations=8000)
    assert found.method == "permutation" and found.gap == pytest.approx(slow.gap)
    assert found.null_mean == pytest.approx(slow.null_mean, rel=0.03)
    assert found.p == pytest.approx(slow.p, abs=0.025)
    runs = disparities.permuted_gap(np.stack([outcome, ~outcome]), members, num_permutations=50)
    assert runs.p.shape == (2,) and runs.gap[0] == pytest.approx(runs.gap[1])


def test_many_patterns_take_the_normal_approximation_and_agree(monkeypatch):
    rng = np.random.default_rng(3)
    members = rng.random((1500, 5)) < 0.3
    outcome = rng.random(1500) < 0.3
    exact = disparities.permuted_gap(outcome, members)
    monkeypatch.setattr(disparities, "EXACT_PATTERNS", 3)
    found = disparities.permuted_gap(outcome, members)
    assert (exact.method, found.method) == ("permutation", "normal approximation")
    assert found.gap == exact.gap
    assert found.null_mean == pytest.approx(exact.null_mean, rel=0.04)
    assert found.p == pytest.approx(exact.p, abs=0.04)


def test_a_test_of_gaps_needs_two_groups_with_enough_rows():
    members = np.stack([np.arange(20) < 15, np.arange(20) >= 15], 1)
    found = disparities.permuted_gap(np.arange(20) % 2 == 0, members, minimum=6)
    assert np.isnan(found.p) and found.reason.startswith("1 of 2 groups")
    where = np.arange(20) % 4 == 0
    inside = disparities.permuted_gap(np.arange(20) % 8 == 0, members, where)
    assert inside.gap == pytest.approx(abs(2 / 4 - 1 / 1))


def test_measure_says_everything_of_every_run():
    label, predicted, members = data(n=600)
    members = np.column_stack([members, np.arange(600) < 3])
    found = subgroups.measure(label, predicted, members, num_resamples=200, num_permutations=100)
    plain = groups.group_rates(groups.count(label, predicted, members))
    np.testing.assert_allclose(found.rates.by_group.tpr, plain.by_group.tpr)
    names = dict(zip(found.gap_names, found.gaps[1]))
    assert names["demographic_parity_difference"] == disparities.difference(
        plain.by_group.selection[1]
    )
    for rates, low, high in (
        (found.rates.by_group, found.low, found.high),
        (found.versus_rest, found.versus_rest_low, found.versus_rest_high),
    ):
        for rate, bottom, top in zip(rates, low, high):
            assert np.isnan(bottom[:, 3]).all() and np.isnan(rate[:, 3]).all()
            assert (bottom[:, :3] < rate[:, :3]).all() and (rate[:, :3] < top[:, :3]).all()
    assert "3 rows" in found.rates.reason.selection[0, 3]
    assert (found.gap_low <= found.gaps).all() and (found.gaps <= found.gap_high).all()
    assert (found.gap_reason == "").all() and found.limits == "wilson"
    for name, null in subgroups.NULL_OF.items():
        place = found.gap_names.index(name)
        np.testing.assert_allclose(found.nulls[null].gap, found.gaps[:, place])
        assert found.nulls[null].num_defined == 3 and (found.nulls[null].null_mean > 0).all()


def test_wilson_and_the_bootstrap_agree_on_large_groups():
    label, predicted, members = data(n=4000)
    one = subgroups.measure(label, predicted, members, num_resamples=600)
    two = subgroups.measure(
        label, predicted, members, num_resamples=600, clusters=np.arange(4000), to_overall=True
    )
    assert two.limits == "bootstrap" and two.nulls == {}
    for left, right in zip((*one.low, *one.high), (*two.low, *two.high)):
        np.testing.assert_allclose(left, right, atol=0.012)
    rates = two.rates
    wanted = disparities.difference(rates.by_group.selection, rates.overall.selection)
    np.testing.assert_array_equal(two.gaps[:, 0], wanted)


def test_equal_methods_do_not_differ_and_unlike_ones_do():
    label, predicted, members = data(n=800, runs=3)
    same = subgroups.compare(label, predicted, predicted, members, num_resamples=200, margin=0.1)
    assert (same.estimate == 0).all() and (same.p == 1).all()
    biased = np.where(members[:, 0], 1, predicted)  # selects all of group 0
    found = subgroups.compare(label, biased, predicted, members, num_resamples=400, margin=0.05)
    place = found.names.index("demographic_parity_difference")
    both = [
        groups.group_rates(groups.count(label, x, members)).by_group for x in (biased, predicted)
    ]
    gaps = [subgroups.gaps(rates)[:, place].mean() for rates in both]
    assert found.estimate[place] == pytest.approx(gaps[0] - gaps[1])
    assert 0 < found.low[place] < found.estimate[place] < found.high[place]
    assert found.p[place] < 0.01 and found.p_new_seeds[place] < 0.05
    assert found.equivalent[place].p > 0.9 and found.equivalent[place].margin == 0.05
    one = subgroups.compare(label, biased[:1], predicted[:1], members, num_resamples=100)
    assert np.isnan(one.p_new_seeds).all() and one.equivalent[0] is None


def test_compare_needs_pairs_and_says_what_is_undefined():
    label, predicted, members = data(n=200, runs=2)
    with pytest.raises(ValueError, match="paired"):
        subgroups.compare(label, predicted, predicted[:1], members)
    few = np.column_stack([members[:, 0], np.arange(200) < 2])
    found = subgroups.compare(label, predicted, predicted, few, num_resamples=50)
    place = found.names.index("accuracy_difference")
    assert np.isnan(found.estimate[place]) and np.isnan(found.p[place])
    assert "fewer than two groups" in found.reason[place]


@pytest.mark.parametrize("seeds", [1, 4])
def test_paired_gap_differences_keep_their_level(seeds):
    """Two methods that differ by noise only: about 5 % are called different."""
    rejected, covered, trials = 0, 0, 60
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        label = rng.integers(0, 2, 300)
        members = np.eye(4, dtype=bool)[rng.integers(0, 4, 300)]
        base = rng.random(300) < 0.3 + 0.4 * label
        runs = np.where(rng.random((2 * seeds, 300)) < 0.2, 1 - base, base)
        found = subgroups.compare(
            label, runs[:seeds], runs[seeds:], members, num_resamples=200, seed=trial
        )
        place = found.names.index("demographic_parity_difference")
        rejected += found.p[place] < 0.05
        covered += found.low[place] <= 0 <= found.high[place]
    assert rejected / trials <= 0.13 and covered / trials >= 0.9


def test_levels_are_the_mean_gaps_with_the_errors_of_a_comparison():
    label, predicted, members = data(n=600, runs=3)
    found = subgroups.levels(label, predicted, members, num_resamples=400)
    every = subgroups.measure(label, predicted, members, num_resamples=10)
    np.testing.assert_allclose(found.by_seed, every.gaps)
    np.testing.assert_allclose(found.estimate, every.gaps.mean(0))
    # A method that is always right has no gaps: to compare with it is to measure a level.
    right = np.broadcast_to(label, predicted.shape)
    paired = subgroups.compare(label, predicted, right, members, num_resamples=400)
    k = found.names.index("equalized_odds_difference")
    np.testing.assert_allclose(found.estimate[k], paired.estimate[k])
    width, paired_width = (each.high[k] - each.low[k] for each in (found, paired))
    assert width == pytest.approx(paired_width, rel=0.15)


def test_seeds_that_differ_widen_the_limits_of_a_level():
    label, predicted, members = data(n=600, runs=1)
    mixed = np.where(np.arange(600) % 2, predicted[0], label)
    same = np.stack([mixed, mixed, mixed])
    apart = np.stack([label, mixed, predicted[0]])
    narrow, wide = (
        subgroups.levels(label, each, members, num_resamples=200) for each in (same, apart)
    )
    k = narrow.names.index("worst_accuracy")
    assert wide.high[k] - wide.low[k] > 3 * (narrow.high[k] - narrow.low[k])


def test_equivalence_equals_statsmodels():
    frozen = FROZEN["equivalence"]
    d = np.array(frozen["a"]) - np.array(frozen["b"])
    found = comparisons.equivalence(d.mean(), d.std(ddof=1) / np.sqrt(d.size), 0.12, d.size - 1)
    assert found.p == pytest.approx(frozen["p"])
    assert (found.p_low, found.p_high) == pytest.approx((frozen["p_low"], frozen["p_high"]))
    normal = comparisons.equivalence(0.0, 1.0, 1.959963984540054)
    assert normal.p == pytest.approx(0.025)
    assert np.isnan(comparisons.equivalence(np.nan, 1.0, 1.0).p)
    assert "no standard error" in comparisons.equivalence(0.1, 0.0, 1.0).reason
    with pytest.raises(ValueError, match="above 0"):
        comparisons.equivalence(0.0, 1.0, -1.0)


def test_a_paired_difference_can_be_tested_for_equivalence():
    frozen = FROZEN["equivalence"]
    found = comparisons.paired_difference(frozen["a"], frozen["b"], num_resamples=20_000)
    d = np.array(frozen["a"]) - np.array(frozen["b"])
    assert found.error == pytest.approx(d.std() / np.sqrt(d.size), rel=0.03)
    assert found.freedom == pytest.approx(d.size - 1)
    inside = comparisons.equivalence(found.estimate, found.error, 0.12, found.freedom)
    assert inside.p == pytest.approx(frozen["p"], abs=0.02)


@pytest.mark.parametrize("kept", [0, 1])
def test_a_gap_of_groups_that_are_too_small_says_so(kept):
    groups = np.zeros((20, 2), bool)
    groups[:12, 0], groups[12:15, 1] = True, True
    outcome = np.arange(40).reshape(2, 20) % 3 == 0
    null = disparities.permuted_gap(outcome, groups, minimum=13 - kept)
    assert np.isnan([null.gap, null.null_mean, null.p]).all() and null.gap.shape == (2,)
    assert null.reason == f"{kept} of 2 groups have enough rows: a gap needs two"


def test_limits_do_not_depend_on_the_number_of_cores(monkeypatch):
    rng = np.random.default_rng(3)
    labels, predictions = rng.integers(0, 2, 4000), rng.integers(0, 2, (3, 4000))
    members = rng.random((4000, 5)) < 0.2
    monkeypatch.setattr(cells, "CHUNK", 20_000)  # many of them
    found = []
    for cores in (1, 3):
        monkeypatch.setattr(intervals.os, "cpu_count", lambda cores=cores: cores)
        made = subgroups.measure(labels, predictions, members, num_resamples=3000)
        bins = calibration.bins(np.full(4000, 0.4), labels, members)
        found.append((*made.low, made.gap_low, *calibration.perfect(bins)))
    for one, three in zip(*found):
        np.testing.assert_array_equal(one, three)
