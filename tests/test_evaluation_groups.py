"""evaluation/groups.py and disparities.py against fairlearn, scikit-learn and AIF360, frozen by
tests/oracles/make_groups.py, published vectors and invariances.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_lowrank.evaluation import disparities, groups, subgroups
from jax_lowrank.evaluation.groups import Rates

FROZEN = json.loads((Path(__file__).parent / "fixtures" / "groups.json").read_text("utf-8"))
LABEL = [0, 1, 1, 1, 0, 1, 0, 0, 1, 1, 0, 1]  # evaluation.md, section 5.2
PREDICTED = [0, 1, 0, 1, 1, 1, 0, 1, 1, 0, 0, 0]
THIRDS = np.repeat(np.eye(3, dtype=bool), 4, axis=0)


def arrays(data):
    label, predicted, group = (np.array(data[k]) for k in ("label", "predicted", "group"))
    return label, predicted, np.eye(4, dtype=bool)[group], np.array(data["weight"])


def measured(label, predicted, members, weights=None, minimum=1):
    counts = groups.count(label, predicted, members, weights=weights)
    return groups.group_rates(counts, minimum=minimum)


def same(one, two):
    for left, right in zip(one, two, strict=True):
        np.testing.assert_allclose(left, right, atol=1e-12)


def test_the_published_example():
    found = measured(LABEL, PREDICTED, THIRDS)
    same(found.by_group[:3], ([0.5, 0.75, 0.25], [2 / 3, 1, 1 / 3], [0, 2 / 3, 0]))
    np.testing.assert_allclose(found.by_group.accuracy, [0.75, 0.5, 0.5])
    between = subgroups.gaps(found.by_group)
    overall = subgroups.gaps(found.by_group, found.overall)
    wanted = {
        "demographic_parity_difference": (0.5, 0.25),
        "demographic_parity_ratio": (1 / 3, 0.5),
        "equalized_odds_difference": (2 / 3, 3 / 7),
        "equalized_odds_difference_mean": (2 / 3, None),
        "equalized_odds_ratio": (0.0, None),
        "equal_opportunity_difference": (2 / 3, None),
        "equal_opportunity_ratio": (1 / 3, 4 / 7),
        "worst_accuracy": (0.5, 0.5),
    }
    for name, values in wanted.items():
        place = list(subgroups.GAPS).index(name)
        for value, gaps in zip(values, (between, overall)):
            assert value is None or gaps[place] == pytest.approx(value), name


@pytest.mark.parametrize("kind", ["plain", "weighted"])
def test_rates_and_gaps_equal_fairlearn(kind):
    label, predicted, members, weights = arrays(FROZEN["rows"])
    found = measured(label, predicted, members, weights if kind == "weighted" else None)
    frozen = FROZEN["fairlearn"][kind]
    for rate, values in frozen["by_group"].items():
        np.testing.assert_allclose(getattr(found.by_group, rate), values, atol=1e-12, err_msg=rate)
        assert getattr(found.overall, rate) == pytest.approx(frozen["overall"][rate])
    between = dict(zip(subgroups.GAPS, subgroups.gaps(found.by_group)))
    overall = dict(zip(subgroups.GAPS, subgroups.gaps(found.by_group, found.overall)))
    for name, value in frozen["gaps"].items():
        if name.endswith("_to_overall"):
            assert overall[name.removesuffix("_to_overall")] == pytest.approx(value), name
        else:
            assert between[name.removesuffix("_between_groups")] == pytest.approx(value), name


def test_odds_and_entropies_equal_aif360():
    label, predicted, members, _ = arrays(FROZEN["rows"])
    pair = np.stack([members[:, 0], ~members[:, 0]], 1)  # privileged, the others
    counts, frozen = groups.count(label, predicted, pair), FROZEN["aif360"]
    found = measured(label, predicted, pair).by_group
    odds = (found.tpr[1], found.fpr[1], found.tpr[0], found.fpr[0])
    signed, size = disparities.average_odds_difference(*odds), disparities.average_odds_error(*odds)
    assert signed == pytest.approx(frozen["average_odds_difference"])
    assert signed == pytest.approx(frozen["sklearn_average_odds_difference"])
    assert size == pytest.approx(frozen["average_abs_odds_difference"])
    assert size == pytest.approx(frozen["sklearn_average_odds_error"])
    parity = found.selection[1] - found.selection[0]
    assert parity == pytest.approx(frozen["statistical_parity_difference"])
    assert found.selection[1] / found.selection[0] == pytest.approx(frozen["disparate_impact"])
    for alpha, value in frozen["generalized_entropy"].items():
        assert groups.generalized_entropy(counts.overall, float(alpha)) == pytest.approx(value)
    assert groups.generalized_entropy(counts.overall, 1) == pytest.approx(frozen["theil"])
    for alpha, value in frozen["between"].items():
        between = groups.between_group_entropy(counts.by_group, pair, float(alpha))
        assert between == pytest.approx(value)


def test_entropy_by_its_formula_and_its_ends():
    label, predicted = np.array([1, 1, 0, 0, 1]), np.array([1, 0, 1, 0, 1])
    counts = groups.count(label, predicted, np.ones((5, 1), bool))
    benefit = predicted - label + 1
    mean = benefit.mean()
    assert groups.generalized_entropy(counts.overall) == pytest.approx(
        ((benefit / mean) ** 2 - 1).mean() / 2
    )
    assert np.isinf(groups.generalized_entropy(counts.overall, alpha=0))
    alike = groups.count(label, label, np.ones((5, 1), bool))
    for alpha in (0, 1, 2):
        assert groups.generalized_entropy(alike.overall, alpha) == 0
    with pytest.raises(ValueError, match="5 rows are in none or several"):
        groups.between_group_entropy(counts.by_group, np.zeros((5, 1), bool))


def test_a_group_without_positives_is_undefined_and_says_so():
    frozen = FROZEN["undefined"]
    found = measured(frozen["label"], frozen["predicted"], THIRDS)
    assert np.isnan(found.by_group.tpr[2]) and found.support.tpr.tolist() == [3, 1, 0]
    assert found.reason.tpr.tolist() == ["", "", "0 positives, fewer than 1"]
    assert disparities.num_defined(found.by_group.tpr) == 2
    odds = (found.by_group.tpr, found.by_group.fpr)
    assert disparities.equalized_odds_difference(*odds) == pytest.approx(2 / 3)
    table = groups.count(frozen["label"], frozen["predicted"], THIRDS).by_group
    theirs = groups.rates(table, compat="fairlearn")
    np.testing.assert_allclose(theirs.tpr, frozen["tpr"])
    assert disparities.equalized_odds_difference(
        theirs.tpr, theirs.fpr, compat="fairlearn"
    ) == pytest.approx(frozen["equalized_odds_difference"])
    assert frozen["equalized_odds_difference"] == 1.0  # it is a jump from 2/3
    torch = frozen["torchmetrics"]
    assert disparities.ratio(theirs.selection) == pytest.approx(torch["DP"])
    assert disparities.ratio(theirs.tpr) == pytest.approx(torch["EO"])


def test_one_group_has_no_gap():
    assert np.isnan(disparities.difference([0.3])) and np.isnan(disparities.ratio([0.3, np.nan]))
    assert disparities.difference([0.3], compat="fairlearn") == 0
    assert np.isnan(disparities.difference([np.nan, np.nan])) and np.isnan(disparities.worst([]))
    assert np.isnan(disparities.ratio([0.0, 0.0])) and disparities.difference([0.0, 0.0]) == 0
    for wrong in ("aif", "torch"):
        with pytest.raises(ValueError, match="compat"):
            disparities.difference([0.1], compat=wrong)
        with pytest.raises(ValueError, match="compat"):
            groups.rates(np.ones((2, 2)), compat=wrong)
    with pytest.raises(ValueError, match="worst_case"):
        disparities.equalized_odds_difference([0.1, 0.2], [0.1, 0.2], agg="max")


def test_average_odds_can_cancel_and_its_error_cannot():
    odds = ([0.9], [0.3], [0.8], [0.4])
    assert disparities.average_odds_difference(*odds) == pytest.approx(0)
    assert disparities.average_odds_error(*odds) == pytest.approx(0.1)


def test_a_minimum_hides_small_groups_with_their_counts():
    found = measured(LABEL, PREDICTED, THIRDS, minimum=3)
    assert found.reason.tpr.tolist() == ["", "1 positives, fewer than 3", ""]
    assert np.isnan(found.by_group.tpr[1]) and not np.isnan(found.by_group.selection).any()
    assert found.reason.fpr[0] == "1 negatives, fewer than 3"
    empty = np.column_stack([THIRDS, np.zeros(12, bool)])
    assert measured(LABEL, PREDICTED, empty).reason.accuracy[3] == "0 rows, fewer than 1"
    with pytest.raises(ValueError, match="at least 1"):
        measured(LABEL, PREDICTED, THIRDS, minimum=0)
    weights = np.r_[np.zeros(4), np.ones(8)]
    found = measured(LABEL, PREDICTED, THIRDS, weights)
    assert found.reason.selection[0] == "weights of 0 only" and found.reason.selection[1] == ""


def test_many_classes_one_against_the_others():
    rng = np.random.default_rng(0)
    label, predicted = rng.integers(0, 4, (2, 200))
    members = rng.random((200, 3)) < 0.5
    counts = groups.count(label, predicted, members, num_classes=4)
    every = []
    for positive in range(4):
        found = groups.group_rates(counts, positive=positive, minimum=1)
        two = measured((label == positive).astype(int), (predicted == positive) * 1, members)
        same(found.by_group[:5], two.by_group[:5])
        np.testing.assert_allclose(found.by_group.f1, two.by_group.f1)
        every.append(found.by_group.f1)
    np.testing.assert_allclose(found.by_group.macro_f1, np.mean(every, axis=0))
    right = [(label == predicted)[m].mean() for m in members.T]
    np.testing.assert_allclose(found.by_group.accuracy, right)


def test_leading_axes_are_runs():
    rng = np.random.default_rng(1)
    label, predicted = rng.integers(0, 2, 50), rng.integers(0, 2, (3, 2, 50))
    members = rng.random((50, 4)) < 0.6
    found = measured(label, predicted, members)
    assert found.by_group.tpr.shape == (3, 2, 4) and found.overall.tpr.shape == (3, 2)
    assert subgroups.gaps(found.by_group).shape == (3, 2, len(subgroups.GAPS))
    same(
        (part[2, 1] for part in found.by_group), measured(label, predicted[2, 1], members).by_group
    )


def test_the_rest_is_all_rows_outside_the_group():
    rng = np.random.default_rng(2)
    label, predicted = rng.integers(0, 2, (2, 60))
    members = rng.random((60, 3)) < 0.5
    same(measured(label, predicted, members).rest, measured(label, predicted, ~members).by_group)


@pytest.mark.parametrize(
    ("label", "predicted", "message"),
    [
        (LABEL, np.array(PREDICTED) * 0.7, "class numbers 0 .. 1, not float64; of probabilities"),
        (LABEL, np.array(PREDICTED) * 2, "must lie in 0 .. 1; found 0 .. 2"),
        (LABEL, PREDICTED[:-1], r"must be \(N,\), \(..., N\), \(N, G\)"),
    ],
)
def test_wrong_input_is_one_sentence(label, predicted, message):
    with pytest.raises(ValueError, match=message):
        groups.count(label, predicted, THIRDS)


def test_wrong_weights_and_classes():
    for weights in ([1.0], [-1.0] * 12, [np.nan] * 12):
        with pytest.raises(ValueError, match="12 finite numbers >= 0"):
            groups.count(LABEL, PREDICTED, THIRDS, weights=weights)
    with pytest.raises(ValueError, match=r"a class 0 .. 1, not 2"):
        groups.rates(np.ones((2, 2)), positive=2)


binary = st.lists(st.integers(0, 7), min_size=6, max_size=25)  # label, prediction, membership


def unpacked(codes):
    codes = np.array(codes)
    return codes % 2, codes // 2 % 2, np.stack([codes // 4 == 0, codes % 3 > 0, codes > 2], 1)


@settings(max_examples=40, deadline=None)
@given(binary, st.randoms())
def test_the_order_of_rows_and_the_groups_names_do_not_matter(codes, random):
    label, predicted, members = unpacked(codes)
    order, names = list(range(len(codes))), [2, 0, 1]
    random.shuffle(order)
    one = measured(label, predicted, members)
    two = measured(label[order], predicted[order], members[order])
    same(one.by_group, two.by_group)
    renamed = measured(label, predicted, members[:, names]).by_group
    same((rate[names] for rate in one.by_group), renamed)
    same(subgroups.gaps(one.by_group), subgroups.gaps(renamed))


@settings(max_examples=40, deadline=None)
@given(binary, st.lists(st.integers(1, 3), min_size=25, max_size=25))
def test_a_row_twice_is_weight_2(codes, times):
    label, predicted, members = unpacked(codes)
    times = np.array(times[: len(codes)])
    weighted = measured(label, predicted, members, times)
    repeated = [np.repeat(values, times, axis=0) for values in (label, predicted, members)]
    same(weighted.by_group, measured(*repeated).by_group)
    once = measured(label, predicted, members, np.full(len(codes), 2.5)).by_group
    same(once, measured(label, predicted, members).by_group)


@settings(max_examples=40, deadline=None)
@given(binary)
def test_a_partition_is_its_membership_matrix(codes):
    label, predicted, _ = unpacked(codes)
    group = np.array(codes) % 3
    found = measured(label, predicted, np.eye(3, dtype=bool)[group])
    for g in set(group):
        inside = group == g
        alone = measured(label[inside], predicted[inside], np.ones((inside.sum(), 1), bool))
        same((rate[g] for rate in found.by_group), (rate[0] for rate in alone.by_group))


def test_identical_groups_have_no_gap():
    label, predicted = np.array(LABEL), np.array(PREDICTED)
    twice = np.concatenate([label, label]), np.concatenate([predicted, predicted])
    found = measured(*twice, np.repeat(np.eye(2, dtype=bool), 12, axis=0)).by_group
    gaps = dict(zip(subgroups.GAPS, subgroups.gaps(found)))
    assert all(gaps[name] == 0 for name in gaps if "difference" in name)
    assert all(gaps[name] == pytest.approx(1) for name in gaps if "ratio" in name)


def test_means_of_row_values_with_student_limits():
    import scipy.stats

    rng = np.random.default_rng(3)
    values, members = rng.normal(size=(2, 40)), rng.random((40, 3)) < [0.5, 0.4, 0.02]
    found = groups.group_means(values, members, minimum=5)
    for g in (0, 1):
        inside = values[1, members[:, g]]
        limits = scipy.stats.ttest_1samp(inside, 0).confidence_interval()
        np.testing.assert_allclose(found.mean[1, g], inside.mean())
        np.testing.assert_allclose([found.low[1, g], found.high[1, g]], limits)
    assert np.isnan(found.mean[:, 2]).all() and "fewer than 5" in found.reason[2]
    twice = groups.group_means(values, members, np.full(40, 2.0), minimum=5)
    same(twice[:3], found[:3])
    np.testing.assert_allclose(groups.margins([[0.2, 0.5, 0.3], [1.0, 1.0, 0.0]]), [0.2, 0.0])


def test_rates_are_a_share_of_what_support_says():
    assert Rates._fields == groups.SUPPORT._fields
    found = measured(LABEL, PREDICTED, THIRDS)
    np.testing.assert_array_equal(found.support.selection, [4, 4, 4])
    np.testing.assert_array_equal(found.support.ppv, [2, 3, 1])
    np.testing.assert_array_equal(found.support.false_omission, [2, 1, 3])
