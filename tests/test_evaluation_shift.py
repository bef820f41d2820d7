"""evaluation/shift.py against float64 closed forms, transformations and limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, rel_entr, softmax

from jax_lowrank.evaluation import shift

INF = np.inf
GROUPS = np.array([[1, 0, 1, 0], [1, 1, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0]], bool)
kl, js = jax.jit(shift.kl), jax.jit(shift.js)


def logits(seed: int, scale: float = 3.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).normal(size=(4, 11))).astype(np.float32)


def true_kl(a, b):
    a, b = (softmax(np.asarray(x, np.float64), -1) for x in (a, b))
    return rel_entr(a, b).sum(-1)


def test_divergences_equal_scipy_in_float64():
    a, b = logits(0), logits(1)
    np.testing.assert_allclose(kl(a, b), true_kl(a, b), rtol=3e-6)
    p, q = softmax(a.astype(float), -1), softmax(b.astype(float), -1)
    wanted = (rel_entr(p, (p + q) / 2) + rel_entr(q, (p + q) / 2)).sum(-1) / 2
    np.testing.assert_allclose(js(a, b), wanted, rtol=3e-6)
    assert kl(a, b).dtype == jnp.float32


def test_logits_and_log_probabilities_give_the_same():
    a, b = logits(0), logits(1)
    np.testing.assert_allclose(kl(log_softmax(a, -1), log_softmax(b, -1)), kl(a, b), rtol=1e-5)


@pytest.mark.parametrize("step", [1e-1, 1e-2, 1e-3, 1e-4])
def test_nearly_equal_posteriors_do_not_cancel(step):
    a = logits(0)
    b = a + np.float32(step) * logits(2, 1.0)
    np.testing.assert_allclose(kl(a, b), true_kl(a, b), rtol=2e-2 if step < 1e-3 else 2e-3)
    assert (kl(a, a) == 0).all() and (js(a, a) == 0).all()


def test_zero_probabilities():
    half = np.array([[np.log(0.5), np.log(0.5), -INF]], np.float32)
    other = half[:, [2, 1, 0]]
    even = np.log(np.full((1, 3), 1 / 3, np.float32))
    assert kl(half, half) == 0 and js(half, half) == 0
    assert kl(half, even) == pytest.approx(np.log(1.5), rel=1e-6)
    assert kl(even, half) == INF
    assert js(half, other) == pytest.approx(0.5 * np.log(2), rel=1e-6)
    apart = np.array([[0.0, -INF]], np.float32), np.array([[-INF, 0.0]], np.float32)
    assert js(*apart) == pytest.approx(np.log(2), rel=1e-6)
    assert kl(*apart) == INF


def test_extreme_logits_stay_finite():
    a, b = (
        np.array([[200.0, 0.0, -200.0]], np.float32),
        np.array([[-200.0, 0.0, 200.0]], np.float32),
    )
    assert kl(a, b) == pytest.approx(400.0) and js(a, b) == pytest.approx(np.log(2), rel=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-30, 30, width=32), min_size=22, max_size=22))
def test_divergences_are_bounded_and_js_symmetric(values):
    a, b = np.array(values, np.float32).reshape(2, 1, 11)
    assert kl(a, b) >= 0
    assert -1e-7 <= js(a, b) <= np.log(2) + 1e-6
    assert js(a, b) == pytest.approx(float(js(b, a)[0]), abs=1e-6)


def test_kernels_compose_with_vmap():
    a, b = np.stack([logits(0), logits(2)]), np.stack([logits(1), logits(3)])
    np.testing.assert_allclose(
        jax.vmap(shift.kl)(a, b), [kl(*pair) for pair in zip(a, b)], rtol=1e-6
    )
    mass = jax.vmap(lambda row: shift.token_mass(row, [1, 2]))(a)
    np.testing.assert_allclose(mass, shift.token_mass(a, [1, 2]), rtol=1e-6)


def test_shift_by_group_with_counts():
    full, method, base = logits(0), logits(1), logits(2)
    found = shift.posterior_shift(full, method, base, GROUPS)
    rows = true_kl(full, method)
    np.testing.assert_allclose(found.kl_full_method.rows, rows, rtol=3e-6)
    assert found.kl_full_method.overall == pytest.approx(rows.mean(), rel=1e-6)
    wanted = [rows[:2].mean(), rows[1:].mean(), rows[0], np.nan]
    np.testing.assert_allclose(found.kl_full_method.by_group, wanted, rtol=3e-6)
    np.testing.assert_array_equal(found.n_by_group, [2, 3, 1, 0])
    assert found.kl_method_base.overall == pytest.approx(true_kl(method, base).mean(), rel=1e-6)
    assert found.js_full_method.overall == pytest.approx(float(js(full, method).mean()), rel=1e-6)
    ratio = rows.mean() / true_kl(full, base).mean()
    assert found.retention == pytest.approx(ratio, rel=1e-5)
    ratio = rows[1:].mean() / true_kl(full, base)[1:].mean()
    assert found.retention_by_group[1] == pytest.approx(ratio, rel=1e-5)
    assert found.reason_by_group == ("", "", "", "no rows") and found.n == 4
    assert found.kl_full_base.reason_by_group[3] == "no rows"


def test_retention_is_1_at_the_base_0_at_full_and_undefined_without_a_shift():
    full, base = logits(0), logits(1)
    assert shift.posterior_shift(full, base, base, GROUPS).retention == 1
    assert shift.posterior_shift(full, full, base, GROUPS).retention == 0
    still = shift.posterior_shift(full, base, full, GROUPS)
    assert np.isnan(still.retention) and "did not move" in still.reason
    cut = base.copy()
    cut[0, 0] = -INF
    endless = shift.posterior_shift(full, base, cut, GROUPS)
    assert endless.kl_full_base.overall == INF
    assert np.isnan(endless.retention) and "infinite" in endless.reason
    assert endless.reason_by_group[:2] == (endless.reason, "")


def test_broken_posteriors_are_an_error():
    full = logits(0)
    with pytest.raises(ValueError, match="NaN"):
        shift.posterior_shift(full, full * np.nan, full, GROUPS)
    with pytest.raises(ValueError, match=r"\(N, V\)"):
        shift.posterior_shift(full, full[:2], full, GROUPS)
    with pytest.raises(ValueError, match="rows for 4"):
        shift.posterior_shift(full, full, full, GROUPS[:3])


def test_token_mass_is_a_sum_of_probabilities():
    probabilities = softmax(logits(0).astype(float), -1)
    found = jax.jit(lambda x: shift.token_mass(x, [7, 2, 2]))(logits(0))
    np.testing.assert_allclose(found, probabilities[:, [2, 7]].sum(-1), rtol=1e-6)
    np.testing.assert_allclose(shift.token_mass(logits(0), range(11)), 1.0, rtol=1e-6)
    assert shift.token_mass(jnp.array([0.0, -INF]), [1]) == 0
    for ids in ([], [11], [-1], [0.5]):
        with pytest.raises(ValueError, match="token_ids"):
            shift.token_mass(logits(0), ids)


def test_lens_by_layer_averages_groups():
    mass = np.arange(12.0).reshape(4, 3) / 12
    found = shift.lens_by_layer(jnp.asarray(mass), GROUPS)
    np.testing.assert_allclose(found.overall, mass.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.by_group[1], mass[1:].mean(0), rtol=1e-6)
    assert found.by_group.shape == (4, 3) and np.isnan(found.by_group[3]).all()
    assert found.n == 4 and found.reason_by_group == ("", "", "", "no rows")
    with pytest.raises(ValueError, match="NaN"):
        shift.lens_by_layer(mass * np.nan, GROUPS)
    none = shift.lens_by_layer(mass[:0], GROUPS[:0])
    assert np.isnan(none.overall).all() and none.reason == "no rows"
