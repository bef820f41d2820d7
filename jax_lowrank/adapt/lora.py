"""LoRA (Hu et al. 2021) and its options: W + s·A·B beside frozen weights.

s = α/r, or α/√r with rslora (Kalajdzievski 2023). Initialisations that start from W: PiSSA (Meng et
al. 2024), OLoRA (Büyükakyüz 2024). DoRA (Liu et al. 2024) trains the norm of every output unit as
well. LoRA+ (Hayou et al. 2024) trains B faster than A.
"""

from __future__ import annotations

import difflib
import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jax_lowrank.adapt.method import Method, State, dotted, map_paths, split_where

LAYER_CHOICES = ("first", "last", "random")
LAYER_LIST = r"\d+(,\d+)*"
TRAINED = ("a", "b", "magnitude")  # of an adapter; what it started from stays frozen
VECTORS = ("bias", "scale", "magnitude")


def effective_scale(rank: int, alpha: float, rslora: bool) -> float:
    """The factor on A @ B."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def make(
    *,
    rank: int,
    alpha: float,
    rslora: bool = False,
    dropout: float = 0.0,
    targets: str = "all-linear",
    layers: str = "first",
    layer_fraction: float = 1.0,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    init: str = "kaiming",
    dora: bool = False,
    plus_ratio: float = 1.0,
) -> Method:
    """LoRA; the factors are float32 whatever the base is stored in.

    The base stays as it is for every `init`: `merge` minus the base is ΔW (see `method.change`).

    Args:
      rank: r, from 1 to the smaller dimension of every adapted matrix.
      alpha: α; the effective scale is α/r, or α/√r with `rslora`.
      dropout: probability of dropping an input of the adapter in training, in [0, 1). It falls on
        ΔW; PEFT's, with an `init` from the base, on the part of the base in the factors too.
      targets: a preset (`all-linear`, `attention`, `qv`) or a regular expression that must match a
        whole path such as `blocks.attn.q`. Presets name layers of the blocks only; a pattern may
        also name a linear layer outside them. The task's head is never adapted: it is trained.
      layers, layer_fraction: adapt the `first`, `last` or a `random` fraction of the layers, or
        those of a list such as `0,3,5`.
      rank_pattern, alpha_pattern: regular expressions for whole paths -> their own r or α; the
        first that matches counts.
      init: a row of INITS.
      dora: train the norms of the output units too.
      plus_ratio: the learning rate of B, as a multiple of that of A; as in PEFT's LoRA+ optimizer
        vectors (biases, norms, DoRA's magnitudes) are trained at the rate of B.

    Raises ValueError here or at `split` for values outside these rules and for a pattern that
    matches nothing.
    """
    ranks, alphas = dict(rank_pattern or {}), dict(alpha_pattern or {})
    _check_range(rank, alpha, ranks, alphas, dropout, layer_fraction, plus_ratio)
    if not re.fullmatch(LAYER_LIST, layers):
        _check_choice("layers", layers, LAYER_CHOICES)
    _check_choice("init", init, INITS)
    same = {"dropout": dropout, "from_base": init in FROM_BASE, "dora": dora}

    def split(key, model):
        net = nnx.merge(model.graphdef, model.params)
        pattern = model.presets.get(targets, targets)
        linears = find_targets(net, pattern, model.presets, model.head_paths)
        paths = [path for path, _ in linears]
        for name, patterns in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
            _check_patterns(name, patterns, paths)
        for index, (path, linear) in enumerate(linears):
            attach(key, path, linear, index)
        head = set(model.head_paths)
        return split_where(net, lambda path: is_factor(path) or dotted(path) in head)

    def attach(key, path, linear, index):
        *stack, in_dim, out_dim = linear.kernel[...].shape
        r = first_match(ranks, path, rank)
        if r > min(in_dim, out_dim):
            raise ValueError(
                f"LoRA rank {r} is above the smaller dimension of {path} ({in_dim} x {out_dim});"
                f" use at most {min(in_dim, out_dim)}"
            )
        scale = effective_scale(r, first_match(alphas, path, alpha), rslora)
        chosen = choose_layers(stack[0], layers, layer_fraction, key) if stack else ()
        key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        a, b = INITS[init](key, linear, chosen, r, scale)
        linear.attach(a, b, scale=scale, layers=chosen, index=index, **same)

    return Method(
        split=split,
        merge=_merge,
        transform=lambda optimizer: optimizer,
        scale=effective_scale(rank, alpha, rslora),
        rates=None if plus_ratio == 1 else lambda trainable: plus_rates(trainable, plus_ratio),
    )


# ------------------------------------------------------------------------------------- options


def _check_range(rank, alpha, ranks, alphas, dropout, layer_fraction, plus_ratio) -> None:
    for value in (rank, *ranks.values()):
        if value < 1:
            raise ValueError(f"LoRA rank {value} is below 1; use 1 or more, or method 'full'")
    for value in (alpha, *alphas.values()):
        if value <= 0:
            raise ValueError(f"LoRA alpha {value} is not positive; 16 is a common start")
    if not 0 <= dropout < 1:
        raise ValueError(f"LoRA dropout {dropout} is outside [0, 1)")
    if not 0 < layer_fraction <= 1:
        raise ValueError(f"layer_fraction {layer_fraction} is outside (0, 1]")
    if plus_ratio < 1:
        raise ValueError(f"LoRA+ plus_ratio {plus_ratio} is below 1; use 1 (off) or 16")


def _check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(value, choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name} {value!r} is not one of {tuple(choices)}{hint}")


def _check_patterns(name: str, patterns: Iterable[str], paths: list[str]) -> None:
    for pattern in patterns:
        if not any(matches(pattern, path) for path in paths):
            raise ValueError(f"{name} {pattern!r} matches no adapted layer; those are {paths}")


def matches(pattern: str, path: str) -> bool:
    """Whether a regular expression matches a whole path. ValueError when it is not one."""
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from error


def first_match(patterns: Mapping[str, float], path: str, default):
    """The value of the first pattern that matches the whole path."""
    return next((value for p, value in patterns.items() if matches(p, path)), default)


def find_targets(
    net: nnx.Module, pattern: str, presets, head_paths: Iterable[str] = ()
) -> list[tuple[str, nnx.Module]]:
    """(path, module) of every linear layer whose whole path matches the pattern, but the head's."""
    linears = {
        dotted(path): module
        for path, module in nnx.iter_modules(net)
        if hasattr(module, "attach") and dotted((*path, "kernel")) not in head_paths
    }
    found = [(path, linears[path]) for path in sorted(linears) if matches(pattern, path)]
    if not found:
        raise ValueError(
            f"target {pattern!r} matches no layer; use a preset ({', '.join(presets)}) or a pattern"
            f" for one of {sorted(linears)}"
        )
    return found


def choose_layers(num_layers: int, which: str, fraction: float, key: jax.Array) -> tuple[int, ...]:
    """The adapted layers, ascending: those listed, or the whole number nearest to the fraction."""
    if re.fullmatch(LAYER_LIST, which):
        listed = tuple(sorted({int(layer) for layer in which.split(",")}))
        if listed[-1] >= num_layers:
            raise ValueError(f"layers {which!r}: the model's layers are 0 to {num_layers - 1}")
        return listed
    count = max(1, round(fraction * num_layers))
    if which == "random":
        picked = jax.random.permutation(key, num_layers)[:count]
        return tuple(sorted(int(layer) for layer in picked))
    return tuple(range(count)) if which == "first" else tuple(range(num_layers - count, num_layers))


# ----------------------------------------------------------------------------- initial factors
# Each: (key, linear, layers, rank, scale) -> a (*n, in, r), b (*n, r, out), float32.


def kaiming(key, linear, layers, rank, scale):
    """A ~ U(±1/√in) (Kaiming with a = √5, PEFT's default), B = 0."""
    del scale
    shape_a, b = _shapes(linear, layers, rank)
    bound = 1 / math.sqrt(shape_a[-2])
    return jax.random.uniform(key, shape_a, jnp.float32, -bound, bound), b


def gaussian(key, linear, layers, rank, scale):
    """A ~ N(0, 1/r²), B = 0: PEFT's init_lora_weights="gaussian"."""
    del scale
    shape_a, b = _shapes(linear, layers, rank)
    return jax.random.normal(key, shape_a, jnp.float32) / rank, b


def pissa(key, linear, layers, rank, scale):
    """A = U_r·√(Σ_r/s), B = √(Σ_r/s)·V_rᵀ: s·A·B is the best rank-r part of W = U·Σ·Vᵀ."""
    del key
    u, s, vt = jnp.linalg.svd(linear.weights(layers), full_matrices=False)
    root = jnp.sqrt(s[..., :rank] / scale)
    return u[..., :rank] * root[..., None, :], root[..., None] * vt[..., :rank, :]


def olora(key, linear, layers, rank, scale):
    """Wᵀ = Q·R; A = R_rᵀ, B = Q_rᵀ. As PEFT, s is not divided out: s·A·B is the part taken off."""
    del key, scale
    q, r = jnp.linalg.qr(linear.weights(layers).swapaxes(-1, -2))
    return r[..., :rank, :].swapaxes(-1, -2), q[..., :rank].swapaxes(-1, -2)


INITS: dict[str, Callable] = {
    "kaiming": kaiming,
    "gaussian": gaussian,
    "pissa": pissa,
    "olora": olora,
}
FROM_BASE = ("pissa", "olora")


def _shapes(linear, layers, rank):
    *_, in_dim, out_dim = linear.kernel[...].shape
    stack = (len(layers),) if layers else ()
    return (*stack, in_dim, rank), jnp.zeros((*stack, rank, out_dim), jnp.float32)


# ------------------------------------------------------------------------ what is trained, how


def is_factor(path: tuple) -> bool:
    """Whether an array of an adapter is trained."""
    return "adapter" in path and path[-1] in TRAINED


def plus_rates(trainable: State, ratio: float) -> State:
    """LoRA+: `ratio` for B and for vectors, 1 for the rest, as PEFT's optimizer groups them."""

    def rate(path):
        fast = path[-2:] == ("adapter", "b") or path[-1] in VECTORS
        return float(ratio) if fast else 1.0

    return map_paths(rate, trainable)


def _merge(graphdef, trainable, frozen):
    net = nnx.merge(graphdef, trainable, frozen)
    for _, module in nnx.iter_modules(net):
        if hasattr(module, "fold"):
            module.fold()
    return nnx.split(net)[1]


# ---------------------------------------------------------------------------------- looking in


class Factors(NamedTuple):
    """One adapted layer as plain LoRA on the original base: ΔW = scale · a @ b.

    a (*n, in, R), b (*n, R, out) for the n `layers` of a stack (() outside one); R is r, or 2r
    where the initialisation came from the base. With DoRA the output units of W + ΔW have the norms
    `magnitude` (*n, out); else it is None.
    """

    a: jax.Array
    b: jax.Array
    scale: float
    layers: tuple[int, ...]
    magnitude: jax.Array | None


def factors(graphdef, trainable: State, frozen: State) -> dict[str, Factors]:
    """Path -> factors of every adapted layer; for export, and for spectra without forming ΔW."""
    found = {}
    for path, adapter in _adapters(graphdef, trainable, frozen).items():
        magnitude = None if adapter.magnitude is None else adapter.magnitude[...]
        found[path] = Factors(*adapter.factors(), adapter.scale, adapter.layers, magnitude)
    return found


def scales(graphdef, trainable: State, frozen: State) -> dict[str, float]:
    """Path -> effective scale of every adapted layer, for a run's record. No array is read."""
    return {path: a.scale for path, a in _adapters(graphdef, trainable, frozen).items()}


def _adapters(graphdef, trainable, frozen):
    modules = nnx.iter_modules(nnx.merge(graphdef, trainable, frozen))
    found = {dotted(path): getattr(module, "adapter", None) for path, module in modules}
    return {path: adapter for path, adapter in found.items() if adapter is not None}
