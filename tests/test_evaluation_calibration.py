"""evaluation/calibration.py and probabilities.py against torchmetrics, uncertainty-calibration and
scikit-learn (frozen), published vectors, closed forms and simulation.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_lowrank.evaluation import calibration, group_calibration, groups, probabilities

FIXTURE = Path(__file__).parent / "fixtures" / "groups.json"
FROZEN = json.loads(FIXTURE.read_text("utf-8"))["calibration"]
P, Y = np.array([0.25, 0.25, 0.55, 0.75, 0.75]), np.array([0, 0, 1, 1, 1])  # torchmetrics' docs


def all_rows(n):
    return np.ones((n, 1), bool)


def error(p, y, norm=1, **options):
    found = calibration.bins(p, y, all_rows(len(y)), **options)
    return calibration.calibration_error(found, norm)[0]


def test_published_vectors():
    for norm, wanted in ((1, 0.29), (2, 0.29183), (np.inf, 0.316667)):
        assert error(P, Y, norm, num_bins=2) == pytest.approx(wanted, abs=1e-5)
    assert probabilities.brier(P, Y).mean() == pytest.approx(0.0905)
    logits = np.stack([np.log(1 - P), np.log(P)], 1)
    assert probabilities.nll(logits, Y).mean() == pytest.approx(0.34971305811)


@pytest.mark.parametrize("scheme", ["width", "mass"])
def test_errors_equal_uncertainty_calibration(scheme):
    p, y = np.array(FROZEN["p"]), np.array(FROZEN["y"])
    found = calibration.bins(p, y, all_rows(300), scheme=scheme)
    for norm in (1, 2):
        measured = calibration.calibration_error(found, norm)[0]
        assert measured == pytest.approx(FROZEN[f"{scheme}_{norm}"], abs=1e-12)
    corrected = calibration.corrected_error(found)[0]
    assert corrected == pytest.approx(FROZEN[f"{scheme}_2_corrected"], abs=1e-12)


def test_classes_equal_uncertainty_calibration_and_scikit_learn():
    logits, labels = np.array(FROZEN["logits"]), np.array(FROZEN["labels"])
    p = probabilities.softmax(logits)
    for norm in (1, 2):
        found = calibration.classwise_error(p, labels, all_rows(200), norm=norm, num_bins=10)
        assert found[0] == pytest.approx(FROZEN[f"classwise_{norm}"])
    largest = calibration.classwise_error(p, labels, all_rows(200), norm=np.inf, num_bins=10)
    assert largest[0] == max(error(p[:, k], labels == k, np.inf, num_bins=10) for k in range(3))
    top, right = probabilities.top_label(p, labels)
    assert error(top, right, num_bins=10) == pytest.approx(FROZEN["top_label"])
    assert probabilities.nll(logits, labels).mean() == pytest.approx(FROZEN["nll"])
    assert probabilities.brier(FROZEN["p"], FROZEN["y"]).mean() == pytest.approx(FROZEN["brier"])
    two = np.stack([1 - P, P], 1)
    np.testing.assert_allclose(
        probabilities.brier_of_classes(two, Y), 2 * probabilities.brier(P, Y)
    )


def test_edges_and_the_references_own_numbers():
    """The table of evaluation.md, section 3.20, and torchmetrics in float32."""
    p = np.append(np.arange(1, 11) / 10, 0.0)
    y = np.array([0, 0, 1, 0, 1, 0, 1, 1, 1, 1, 0])
    wanted = {None: 0.28182, "torchmetrics": 0.24545, "netcal": 0.15455}
    for compat, value in wanted.items():
        assert error(p, y, num_bins=10, compat=compat) == pytest.approx(value, abs=1e-5)
        other = error([0.95, 1.0], np.array([1, 0]), num_bins=10, compat=compat)
        assert other == pytest.approx(0.525 if compat == "torchmetrics" else 0.475)
    single = FROZEN["torchmetrics_edges"]
    p, y = np.array(FROZEN["p"], np.float32), np.array(FROZEN["y"])
    assert error(
        np.append(np.arange(1, 11) / 10, 0.0).astype(np.float32),
        np.array([0, 0, 1, 0, 1, 0, 1, 1, 1, 1, 0]),
        num_bins=10,
        compat="torchmetrics",
    ) == pytest.approx(single[0], abs=1e-6)
    for name, norm in (("l1", 1), ("l2", 2), ("max", np.inf)):
        measured = error(p, y, norm, num_bins=10, compat="torchmetrics")
        assert measured == pytest.approx(FROZEN["torchmetrics"][name], abs=1e-6)


def test_bins_are_closed_on_the_right_in_either_precision():
    edges = np.arange(101) / 100
    for p in (edges, edges.astype(np.float32)):
        for num_bins in (1, 4, 10, 25, 100):
            rows = calibration.bins(p, np.zeros(101), all_rows(101), num_bins=num_bins).rows
            width = 100 // num_bins
            assert rows.sum((0, 2)).tolist() == [width + 1] + [width] * (num_bins - 1)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 1)), min_size=1, max_size=30))
def test_one_bin_compares_the_means(pairs):
    p, y = np.array(pairs).T
    assert error(p, y, num_bins=1) == pytest.approx(abs(p.mean() - y.mean()), abs=1e-12)
    assert error(p, y, num_bins=7, scheme="mass") >= error(p, y, num_bins=1) - 1e-12


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 1)), min_size=4, max_size=30))
def test_groups_are_their_rows_and_twice_is_weight_2(pairs):
    p, y = np.array(pairs).T
    members = np.stack([np.arange(p.size) % 2 == 0, np.arange(p.size) > 1], 1)
    found = calibration.bins(p, y, members)
    times = np.arange(p.size) % 3 + 1
    weighted = calibration.bins(p, y, members, weights=times)
    for g in range(2):
        inside = members[:, g]
        assert calibration.calibration_error(found)[g] == error(p[inside], y[inside])
        twice = np.repeat(p[inside], times[inside]), np.repeat(y[inside], times[inside])
        assert calibration.calibration_error(weighted)[g] == pytest.approx(error(*twice))
    smooth = probabilities.smooth_calibration_error(p, y, members)
    for g in range(2):
        inside = members[:, g]
        alone = probabilities.smooth_calibration_error(p[inside], y[inside], all_rows(inside.sum()))
        assert smooth[g] == pytest.approx(alone[0], abs=1e-6)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.1, 0.3, 1.0]) | st.floats(0, 1), st.integers(0, 1)),
        min_size=4,
        max_size=40,
    ),
    st.integers(2, 7),
)
def test_order_names_and_weights_do_not_matter_to_calibration(pairs, num_bins):
    """Rows and groups in another order, ones or tenfold as weights, twice for weight 2."""
    p, y = np.array(pairs).T
    name = np.arange(p.size) // 2 % 3
    members, times = np.eye(3, dtype=bool)[name], np.arange(p.size) % 3 + 1
    order, renamed = np.random.default_rng(p.size).permutation(p.size), [2, 0, 1]

    def errors(p, y, members, weights=None):
        found = [
            calibration.calibration_error(
                calibration.bins(p, y, members, num_bins=num_bins, scheme=scheme, weights=weights),
                norm,
            )
            for scheme in ("width", "mass")
            for norm in (1, 2, np.inf)
        ]
        return np.array([*found, probabilities.smooth_calibration_error(p, y, members, weights)])

    plain, weighted = errors(p, y, members), errors(p, y, members, times)
    same = {
        "rows": errors(p[order], y[order], members[order]),
        "groups": errors(p, y, members[:, renamed])[:, np.argsort(renamed)],
        "integers": errors(p, y, members.astype(int)),
        "ones": errors(p, y, members, np.ones(p.size)),
    }
    for what, found in same.items():
        np.testing.assert_allclose(found, plain, atol=1e-6, err_msg=what)
    twice = errors(*[np.repeat(part, times, axis=0) for part in (p, y, members)])
    for found in (twice, errors(p, y, members, times / 10)):
        np.testing.assert_allclose(found, weighted, atol=1e-6)
    for g in range(3):  # of a partition, a group is its rows alone
        if (name == g).any():
            alone = errors(p[name == g], y[name == g], all_rows((name == g).sum()))
            np.testing.assert_allclose(plain[:, g], alone[:, 0], atol=1e-6)


@pytest.mark.parametrize("weights", [[1, -1], [1, np.nan], [1, np.inf], [1, 1, 1]])
def test_weights_are_checked(weights):
    for scheme in ("width", "mass"):
        with pytest.raises(ValueError, match="weights must be 2 finite numbers >= 0"):
            calibration.bins([0.2, 0.4], [0, 1], all_rows(2), scheme=scheme, weights=weights)
    with pytest.raises(ValueError, match="weights must be 2 finite numbers >= 0"):
        probabilities.smooth_calibration_error([0.2, 0.4], [0, 1], all_rows(2), weights)


def test_a_corrected_error_needs_a_bin_of_two_rows():
    for n in (1, 15):
        p = (np.arange(n) + 0.5) / 15
        assert np.isnan(calibration.corrected_error(calibration.bins(p, np.zeros(n), all_rows(n))))
    two = calibration.bins([0.5, 0.5, 0.9], [0, 1, 1], all_rows(3))
    assert calibration.corrected_error(two) == 0


def test_groups_are_measured_with_a_minimum_and_reasons():
    rng = np.random.default_rng(6)
    p, y = rng.random((2, 60)), rng.integers(0, 2, 60)
    p[:, :12] = (np.arange(12) + 0.5) / 15
    members = np.stack([np.arange(60) < n for n in (60, 12, 9, 0)], 1)
    found = group_calibration.measure(p, y, members)
    bins = calibration.bins(p, y, members)
    np.testing.assert_array_equal(found.error[:, :2], calibration.calibration_error(bins)[:, :2])
    np.testing.assert_array_equal(found.expected[:, :2], calibration.perfect(bins).mean[:, :2])
    assert (found.low <= found.high)[:, :2].all()
    for part in found[:5]:
        assert np.isnan(part[:, 2:]).all()
    wanted = ["", "", "9 rows, fewer than 10", "0 rows, fewer than 10"]
    assert found.reason[1].tolist() == wanted
    wanted[1] = "no bin holds two rows"
    corrected = group_calibration.corrected(p, y, members)
    assert np.isnan(corrected.error[:, 1:]).all() and corrected.reason[1].tolist() == wanted
    np.testing.assert_array_equal(
        corrected.error[:, 0], calibration.corrected_error(bins)[:, 0], strict=True
    )
    nothing = group_calibration.measure(p, y, members, weights=np.arange(60) >= 12)
    assert np.isnan(nothing.error[:, 1]).all() and nothing.reason[0, 1] == "weights of 0 only"
    low = group_calibration.measure(p, y, members, minimum=1)
    assert not np.isnan(low.error[:, :3]).any() and low.reason[0, 3] == "0 rows, fewer than 1"
    with pytest.raises(ValueError, match="minimum must be at least 1"):
        group_calibration.measure(p, y, members, minimum=0)
    pair = group_calibration.compare(p, p[::-1] ** 2, (y, y), members, num_resamples=50)
    assert np.isnan([part[2:] for part in pair[:6]]).all() and pair.reason.tolist()[:2] == ["", ""]
    assert not np.isnan([part[:2] for part in pair[:6]]).any() and "fewer than 10" in pair.reason[2]
    small = group_calibration.compare(p, p**2, (y, y), members[:, 2:3], minimum=1)
    few = group_calibration.compare(p, p**2, (y, y), np.arange(60)[:, None] < 2, minimum=1)
    assert small.error > 0 and few.error > 0  # some resamples hold none of two rows
    with pytest.raises(ValueError, match="must be"):
        group_calibration.compare(p, p[:, :5], (y, y), members)


def test_runs_are_leading_axes_and_empty_groups_undefined():
    rng = np.random.default_rng(0)
    p, y = rng.random((2, 3, 40)), rng.integers(0, 2, 40)
    members = np.column_stack([rng.random((40, 2)) < 0.5, np.zeros(40, bool)])
    for scheme in ("width", "mass"):
        found = calibration.bins(p, y, members, num_bins=5, scheme=scheme)
        errors = calibration.calibration_error(found)
        assert errors.shape == (2, 3, 3) and np.isnan(errors[..., 2]).all()
        inside = members[:, 1]
        assert errors[1, 2, 1] == error(p[1, 2, inside], y[inside], num_bins=5, scheme=scheme)
        parts = [calibration.perfect(found, num_draws=5), calibration.limits(found)]
        for value in (*parts[0], *parts[1], calibration.corrected_error(found)):
            assert value.shape == (2, 3, 3)
            assert np.isnan(value[..., 2]).all() and not np.isnan(value[..., :2]).any()
    smooth = probabilities.smooth_calibration_error(p, y, members)
    assert smooth.shape == (2, 3, 3) and np.isnan(smooth[..., 2]).all()


def test_equal_mass_keeps_ties_together():
    p = np.array([0.1] * 5 + [0.5, 0.9, 0.9])
    found = calibration.bins(p, np.zeros(8), all_rows(8), num_bins=4, scheme="mass")
    assert found.rows.sum((0, 2)).tolist() == [5, 1, 2, 0]


@pytest.mark.parametrize(
    ("p", "y", "message"),
    [
        ([0.2, np.nan], [0, 1], r"in \[0, 1\]; 1 do not, e.g. nan"),
        ([0.2, 1.5], [0, 1], "of logits take probabilities.softmax"),
        ([0.2, 0.5], [0, 2], "y must be 0 or 1"),
        ([0.2, 0.5, 0.1], [0, 1, 1], "must end in the rows"),
    ],
)
def test_wrong_input_is_one_sentence(p, y, message):
    with pytest.raises(ValueError, match=message):
        calibration.bins(p, y, all_rows(2))


def test_options_are_checked():
    for options in ({"num_bins": 0}, {"scheme": "other"}, {"compat": "sklearn"}):
        with pytest.raises(ValueError, match=r"num_bins|compat"):
            calibration.bins(P, Y, all_rows(5), **options)


@pytest.mark.parametrize("n", [1, 20, 300])
def test_the_error_of_perfect_calibration_equals_its_simulation(n):
    rng = np.random.default_rng(n)
    p = rng.beta(0.5, 1.5, n)
    weights = rng.gamma(3.0, 1.0, n)
    for weight, slack in ((None, 0.02), (weights, 0.06)):
        y = (rng.random((4000, n)) < p).astype(int)
        drawn = calibration.bins(np.broadcast_to(p, y.shape), y, all_rows(n), weights=weight)
        errors = calibration.calibration_error(drawn)[:, 0]
        found = calibration.perfect(calibration.Bins(*(part[:1] for part in drawn)), num_draws=500)
        assert found.mean[0, 0] == pytest.approx(errors.mean(), rel=slack + 0.01)
        share = (errors >= errors[0] - 1e-12).mean()
        assert found.p[0, 0] == pytest.approx(share, abs=0.08)


def test_the_closed_form_equals_the_draws():
    rng = np.random.default_rng(1)
    found = calibration.bins(rng.random(200), rng.integers(0, 2, 200), all_rows(200))
    one = calibration.perfect(found, 1, num_draws=1).mean
    two = calibration.perfect(found, 1.0000001, num_draws=4000).mean
    assert one[0] == pytest.approx(two[0], rel=0.01)


def test_p_values_of_calibrated_groups_are_uniform():
    rng, hits = np.random.default_rng(2), []
    for trial in range(150):
        p = rng.random(150)
        y = (rng.random(150) < p).astype(int)
        found = calibration.bins(p, y, all_rows(150))
        hits.append(calibration.perfect(found, num_draws=99, seed=trial).p[0])
    assert 0.01 < np.mean(np.array(hits) <= 0.05) < 0.1
    assert 0.4 < np.mean(hits) < 0.6


@pytest.mark.parametrize(("shift", "n"), [(0.0, 60), (0.0, 2000), (0.1, 300), (0.1, 3000)])
def test_limits_cover_the_error_without_noise(shift, n):
    rng = np.random.default_rng(3)
    p = rng.random((150, n)) * 0.8
    y = (rng.random(p.shape) < p + shift).astype(int)
    found = calibration.bins(p, y, all_rows(n))
    limits = calibration.limits(found)
    true = shift  # every bin is off by it
    covered = np.mean((limits.low[:, 0] <= true + 1e-9) & (true <= limits.high[:, 0] + 1e-9))
    assert 0.9 <= covered <= 1.0
    assert abs(np.median(limits.estimate) - true) < 0.03
    zero = np.mean(limits.low[:, 0] < 1e-9)
    assert zero >= 0.93 if shift == 0 else n < 1000 or zero == 0


def test_the_reliability_curve_and_its_band():
    import scipy.stats

    p, y = np.array(FROZEN["p"]), np.array(FROZEN["y"])
    found = calibration.bins(p, y, all_rows(300), num_bins=5)
    curve = calibration.reliability(found)
    index = np.ceil(p * 5).astype(int).clip(1) - 1
    for b in range(5):
        inside = index == b
        n, mean = inside.sum(), p[inside].mean()
        assert curve.rows[0, b] == n
        np.testing.assert_allclose(curve.probability[0, b], mean)
        np.testing.assert_allclose(curve.observed[0, b], y[inside].mean())
        wanted = scipy.stats.binom.ppf([0.025, 0.975], n, mean) / n
        np.testing.assert_allclose([curve.low[0, b], curve.high[0, b]], wanted)
    empty = calibration.reliability(calibration.bins([0.1, 0.2], [0, 1], all_rows(2), num_bins=2))
    assert np.isnan(empty.observed[0, 1]) and np.isnan(empty.low[0, 1]) and empty.rows[0, 1] == 0


def test_brier_is_the_sum_of_its_parts():
    p, y = np.round(np.array(FROZEN["p"]) * 4) / 4, np.array(FROZEN["y"])
    members = np.stack([np.arange(300) % 2 == 0, np.arange(300) < 100], 1)
    brier = groups.group_means(probabilities.brier(p, y), members).mean
    for num_bins in (4, 2):  # one value of p a bin, several
        found = calibration.bins(p[p > 0], y[p > 0], members[p > 0], num_bins=num_bins)
        inside = groups.group_means(probabilities.brier(p, y)[p > 0], members[p > 0]).mean
        parts = calibration.brier_decomposition(found, inside)
        total = parts.reliability - parts.resolution + parts.uncertainty + parts.within
        np.testing.assert_allclose(total, inside)
        assert (np.abs(parts.within) < 1e-12).all() == (num_bins == 4)
        np.testing.assert_allclose(parts.uncertainty, [y[p > 0][m].var() for m in members[p > 0].T])
    assert brier.shape == (2,)


def reflected_error(p, y, width, points=20001):
    """The integral of the smoothed residuals, by its definition."""
    t = np.linspace(0, 1, points)
    total = np.zeros(points)
    for chance, event in zip(p, y):
        for shift in range(-4, 5, 2):
            for image in (chance + shift, -chance + shift):
                total += (event - chance) * np.exp(-((t - image) ** 2) / 2 / width**2)
    density = total / len(p) / width / np.sqrt(2 * np.pi)
    return np.trapezoid(np.abs(density), t)


def test_smooth_error_is_its_own_width():
    rng = np.random.default_rng(4)
    cases = [(P, Y), (rng.random(40), rng.integers(0, 2, 40)), (np.ones(3), np.zeros(3))]
    for p, y in cases:
        found = probabilities.smooth_calibration_error(p, y, all_rows(len(p)))[0]
        assert reflected_error(p, y, found) == pytest.approx(found, abs=5e-4)
    # relplot 1.0.3 sums over 200 points and stops its search early
    assert probabilities.smooth_calibration_error(P, Y, all_rows(5))[0] == pytest.approx(
        0.198961835, abs=2e-3
    )
    perfect = probabilities.smooth_calibration_error(np.array([0.0, 1.0]), [0, 1], all_rows(2))
    assert perfect[0] < 1e-5


def test_temperature_is_found_and_does_not_change_the_order():
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(4000, 3)) * 2
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(1)  # softmax(logits), exactly
    found = probabilities.fit_temperature(3 * logits, labels)
    assert found.temperature == pytest.approx(3, rel=0.1) and found.reason == ""
    assert found.nll_after < found.nll_before and found.n == 4000
    around = [
        probabilities.nll(3 * logits / (found.temperature * s), labels).mean() for s in (0.99, 1.01)
    ]
    assert min(around) > found.nll_after
    sure = probabilities.fit_temperature([[1.0, 0.0], [0.0, 2.0]], [0, 1])
    assert "perfectly" in sure.reason and sure.temperature == pytest.approx(np.exp(-7))
    nothing = probabilities.fit_temperature([[1.0, 0.0], [0.0, 2.0]], [1, 0])
    assert "say nothing" in nothing.reason and np.isfinite(nothing.nll_after)
    with pytest.raises(ValueError, match="logits"):
        probabilities.fit_temperature(np.zeros((0, 2)), [])


def test_two_methods_errors_are_compared_by_row_and_seed():
    """The difference and its spread are those of a bootstrap of rows, done row by row."""
    rng = np.random.default_rng(0)
    n = 300
    p = np.clip(rng.random((2, n)), 0.02, 0.98)
    y = (rng.random(n) < p.mean(0)).astype(int)
    worse = p**2
    groups = np.column_stack([np.ones(n, bool), rng.random(n) < 0.4])
    found = group_calibration.compare(worse, p, (y, y), groups, num_bins=10, num_resamples=400)

    def gap(rows):
        parts = [
            calibration.calibration_error(
                calibration.bins(x[:, rows], y[rows], groups[rows], num_bins=10)
            )
            for x in (worse, p)
        ]
        return (parts[0] - parts[1]).mean(0)

    np.testing.assert_allclose(found.estimate, gap(np.arange(n)))
    drawn = np.array([gap(rng.integers(0, n, n)) for _ in range(300)])
    one = group_calibration.compare(
        worse[:1], p[:1], (y, y), groups, num_bins=10, num_resamples=400
    )
    assert (found.low < found.estimate).all() and (found.p > 0).all()
    both = [
        calibration.calibration_error(calibration.bins(x, y, groups, num_bins=10))
        for x in (worse, p)
    ]
    between = (both[0] - both[1]).var(0, ddof=1) / 2
    np.testing.assert_allclose(found.error**2, drawn.var(0) + between, rtol=0.25)
    assert (one.freedom > 100).all() and (one.error > 0).all()


def test_a_method_does_not_differ_from_itself():
    p = np.linspace(0.1, 0.9, 40)[None]
    y = (np.arange(40) % 2)[None]
    found = group_calibration.compare(p, p, (y, y), np.ones((40, 1), bool))
    assert found.estimate == 0 and np.isnan(found.p).all()
    assert found.reason == "no resample differs"
