"""LoRA (Hu et al. 2021): W + s·A·B beside frozen weights, s = α/r, or α/√r (Kalajdzievski 2023)."""

from __future__ import annotations

import math
import re
import zlib

import jax
import jax.numpy as jnp
from flax import nnx

from jax_lowrank.adapt.method import Method

LAYER_CHOICES = ("first", "last", "random")


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
) -> Method:
    """LoRA with A ~ U(±1/√in) (Kaiming, a=√5, as PEFT), B = 0, both float32.

    Args:
      rank: r, from 1 to the smaller dimension of every adapted matrix.
      alpha: α; the effective scale is α/r, or α/√r with `rslora`.
      dropout: probability of dropping an input of the adapter in training, in [0, 1).
      targets: a preset (`all-linear`, `attention`, `qv`) or a regular expression that must match a
        whole path such as `blocks.attn.q`.
      layers, layer_fraction: adapt the `first`, `last` or a `random` fraction of the layers.

    Raises ValueError here or at `split` for values outside these rules and for a pattern that
    matches nothing.
    """
    if rank < 1:
        raise ValueError(f"LoRA rank {rank} is below 1; use 1 or more, or method 'full'")
    if not 0 <= dropout < 1:
        raise ValueError(f"LoRA dropout {dropout} is outside [0, 1)")
    if not 0 < layer_fraction <= 1:
        raise ValueError(f"layer_fraction {layer_fraction} is outside (0, 1]")
    if layers not in LAYER_CHOICES:
        raise ValueError(f"layers {layers!r} is not one of {LAYER_CHOICES}")
    scale = effective_scale(rank, alpha, rslora)

    def split(key, model):
        net = nnx.merge(model.graphdef, model.params)
        linears = find_targets(net, model.presets.get(targets, targets), model.presets)
        for index, (path, linear) in enumerate(linears):
            _attach(key, path, linear, index)
        return nnx.split(net, _is_factor, ...)

    def _attach(key, path, linear, index):
        num_layers, in_dim, out_dim = linear.kernel[...].shape
        if rank > min(in_dim, out_dim):
            raise ValueError(
                f"LoRA rank {rank} is above the smaller dimension of {path} ({in_dim} x {out_dim});"
                f" use at most {min(in_dim, out_dim)}"
            )
        chosen = choose_layers(num_layers, layers, layer_fraction, key)
        key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        bound = 1 / math.sqrt(in_dim)
        shape = (len(chosen), in_dim, rank)
        a = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
        b = jnp.zeros((len(chosen), rank, out_dim), jnp.float32)
        linear.attach(a, b, scale=scale, dropout=dropout, layers=chosen, index=index)

    return Method(split=split, merge=_merge, transform=lambda optimizer: optimizer, scale=scale)


def find_targets(net: nnx.Module, pattern: str, presets) -> list[tuple[str, nnx.Module]]:
    """(path, module) of every stacked linear layer whose whole path matches the pattern."""
    linears = {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_modules(net)
        if hasattr(module, "attach")
    }
    try:
        found = [(p, linears[p]) for p in sorted(linears) if re.fullmatch(pattern, p)]
    except re.error as error:
        raise ValueError(
            f"target pattern {pattern!r} is not a regular expression: {error}"
        ) from error
    if not found:
        raise ValueError(
            f"target {pattern!r} matches no layer; use a preset ({', '.join(presets)}) or a pattern"
            f" for one of {sorted(linears)}"
        )
    return found


def choose_layers(num_layers: int, which: str, fraction: float, key: jax.Array) -> tuple[int, ...]:
    """The adapted layers, ascending: the whole number nearest to the fraction, at least one."""
    count = max(1, round(fraction * num_layers))
    if which == "random":
        picked = jax.random.permutation(key, num_layers)[:count]
        return tuple(sorted(int(layer) for layer in picked))
    return tuple(range(count)) if which == "first" else tuple(range(num_layers - count, num_layers))


def _is_factor(path, value) -> bool:
    del value
    return "adapter" in path


def _merge(graphdef, trainable, frozen):
    net = nnx.merge(graphdef, trainable, frozen)
    for _, module in nnx.iter_modules(net):
        if hasattr(module, "fold"):
            module.fold()
    return nnx.split(net)[1]
