"""How far posteriors moved: KL and Jensen-Shannon in nats, KL retention, LogitLens masses.

The kernels (`kl`, `js`, `token_mass`) are jnp, in f32, jit- and vmap-able. They take logits or
log-probabilities: rows are normalised here, so either gives the same numbers. The summaries take
concrete arrays and groups (N, G) bool, and average on the host in float64.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_lowrank.evaluation import intervals


class GroupMeans(NamedTuple):
    """Mean over all `n` rows and over each group's `n_by_group` rows; `rows` (N,) is what is meant.

    `by_group` is (G,); a group without rows is NaN with a reason.
    """

    overall: float
    by_group: np.ndarray
    n: int
    n_by_group: np.ndarray
    rows: np.ndarray
    reason: str
    reason_by_group: tuple[str, ...]


class PosteriorShift(NamedTuple):
    """Divergences between full fine-tuning, a method and the base, and the method's KL retention.

    retention = mean KL(full||method) / mean KL(full||base): 1 = nothing of the shift was learnt, 0
    = the method's posteriors are full fine-tuning's. It can exceed 1.
    """

    kl_full_method: GroupMeans
    kl_method_base: GroupMeans
    kl_full_base: GroupMeans
    js_full_method: GroupMeans
    retention: float
    retention_by_group: np.ndarray
    n: int
    n_by_group: np.ndarray
    reason: str
    reason_by_group: tuple[str, ...]


class LensByLayer(NamedTuple):
    """Mean probability mass at each of L + 1 layers: all rows (L+1,) and by group (G, L+1)."""

    overall: np.ndarray
    by_group: np.ndarray
    n: int
    n_by_group: np.ndarray
    reason: str
    reason_by_group: tuple[str, ...]


def kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """KL(p || q) of the last axis, (..., V) -> (...), f32 nats, >= 0; 0 when p = q.

    0 log 0 is 0; +inf where q is 0 and p is not. Summed as q - p + p log(p/q), whose terms are all
    >= 0, so that posteriors which hardly differ do not cancel to noise of either sign.
    """
    log_p, log_q = _normalised(log_p), _normalised(log_q)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    gap = jnp.where(p > 0, log_p, 0.0) - jnp.where(p > 0, log_q, 0.0)
    small = jnp.abs(gap) < 0.05
    near = jnp.where(small, gap, 0.0)
    series = p * near**2 * (0.5 - near / 6 + near**2 / 24)  # exp(-x) - 1 + x, to 2e-6 of itself
    far = q - p + p * jnp.where(small, 0.0, gap)
    return jnp.sum(jnp.where(small & (p > 0), series, far), axis=-1)


def js(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """Jensen-Shannon divergence of the last axis, (..., V) -> (...), f32 nats in [0, ln 2].

    0 when p = q, ln 2 when they share no token; symmetric. Lin, IEEE Trans. Inf. Theory 37 (1991).
    """
    log_p, log_q = _normalised(log_p), _normalised(log_q)
    middle = jnp.logaddexp(log_p, log_q) - jnp.log(2.0)
    return 0.5 * kl(log_p, middle) + 0.5 * kl(log_q, middle)


def posterior_shift(log_full, log_method, log_base, groups) -> PosteriorShift:
    """Next-token posteriors (N, V) of three models on the same N prompts, compared.

    KL of token posteriors as in arXiv 2405.18572. Retention is NaN with a reason where the rows'
    KL(full||base) is 0 or not finite. ValueError on shapes that disagree or NaN posteriors (a
    broken model, not a missing row).
    """
    arrays = {"full": log_full, "method": log_method, "base": log_base}
    shapes = {name: np.shape(a) for name, a in arrays.items()}
    if len(set(shapes.values())) > 1 or len(np.shape(log_full)) != 2:
        raise ValueError(f"posteriors must all be (N, V), not {shapes}")
    pairs = ((kl, log_full, log_method), (kl, log_method, log_base), (kl, log_full, log_base))
    rows = [np.asarray(_by_row(f, a, b)) for f, a, b in (*pairs, (js, log_full, log_method))]
    if any(np.isnan(row).any() for row in rows):
        raise ValueError("posteriors hold NaN or +inf: the model that made them is broken")
    groups = _groups_of(groups, rows[0].shape[0])
    means = [_group_means(row, groups) for row in rows]
    tops, bottoms = (np.append(m.by_group, m.overall) for m in (means[0], means[2]))
    reasons = tuple(map(_ratio_reason, tops, bottoms))
    ratios = np.array([t / b if not r else np.nan for t, b, r in zip(tops, bottoms, reasons)])
    counts = (means[0].n, means[0].n_by_group)
    return PosteriorShift(
        *means, float(ratios[-1]), ratios[:-1], *counts, reasons[-1], reasons[:-1]
    )


def token_mass(log_probs: jax.Array, token_ids: Sequence[int]) -> jax.Array:
    """Probability of a set of tokens, (..., V) -> (...), f32 in [0, 1].

    `token_ids` is a concrete set (repeats count once). ValueError when empty or outside 0 .. V-1.
    """
    ids, size = np.unique(np.asarray(token_ids)), log_probs.shape[-1]
    if ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"token_ids must name at least one token by number, not {token_ids}")
    if ids[0] < 0 or ids[-1] >= size:
        raise ValueError(f"token_ids must lie in 0 .. {size - 1}, not {ids[0]} .. {ids[-1]}")
    return jnp.exp(jax.nn.logsumexp(_normalised(log_probs)[..., ids], axis=-1))


def lens_by_layer(mass, groups) -> LensByLayer:
    """Mean of LogitLens masses (N, L+1) by layer, overall and by group; NaN masses are an error."""
    mass = np.asarray(mass, np.float64)
    if mass.ndim != 2 or np.isnan(mass).any():
        raise ValueError(f"mass must be an (N, L+1) array without NaN, not {mass.shape}")
    groups = _groups_of(groups, mass.shape[0])
    counts = groups.sum(0)
    by_group = intervals.divide(groups.T @ mass, np.broadcast_to(counts[:, None], (counts.size, 1)))
    overall = mass.mean(0) if mass.shape[0] else np.full(mass.shape[1], np.nan)
    reasons = tuple(map(_empty_reason, counts))
    return LensByLayer(
        overall, by_group, mass.shape[0], counts, _empty_reason(mass.shape[0]), reasons
    )


def _normalised(log_probs: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(jnp.asarray(log_probs, jnp.float32), axis=-1)


_by_row = jax.jit(lambda divergence, a, b: divergence(a, b), static_argnums=0)


def _groups_of(groups, num_rows: int) -> np.ndarray:
    groups = intervals.membership(groups)
    if groups.shape[0] != num_rows:
        raise ValueError(f"groups has {groups.shape[0]} rows for {num_rows} posteriors")
    return groups


def _group_means(rows: np.ndarray, groups: np.ndarray) -> GroupMeans:
    counts = groups.sum(0)
    by_group = np.array([rows[g].mean(dtype=np.float64) if g.any() else np.nan for g in groups.T])
    overall = float(rows.mean(dtype=np.float64)) if rows.size else np.nan
    reasons = tuple(map(_empty_reason, counts))
    return GroupMeans(overall, by_group, rows.size, counts, rows, _empty_reason(rows.size), reasons)


def _empty_reason(count: int) -> str:
    return "" if count else "no rows"


def _ratio_reason(top: float, bottom: float) -> str:
    if np.isnan(top):
        return "no rows"
    if bottom == 0:
        return "full fine-tuning did not move the posteriors: KL(full||base) is 0"
    if not np.isfinite([top, bottom]).all():
        return "a divergence is infinite: a token has probability 0 in one model only"
    return ""
