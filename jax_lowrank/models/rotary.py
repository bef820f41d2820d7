"""Rotary positions (Su et al. 2021), and how they are stretched beyond the trained length."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jax_lowrank.models.weights import UnsupportedModelError

Array = jax.Array
ROPE_KINDS = ("default", "linear", "llama3")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained length (Dubey et al. 2024)."""

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


UNSCALED = RopeScaling()


def read_rope(config: Mapping) -> tuple[float, RopeScaling]:
    """theta and scaling from `rope_parameters` (transformers 5) or `rope_theta`/`rope_scaling`."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise UnsupportedModelError(f"rope type {kind!r} is not supported; one of {ROPE_KINDS}")
    fields = {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_positions": "original_max_position_embeddings",
    }
    return theta, RopeScaling(kind, **{k: rope[v] for k, v in fields.items() if v in rope})


def write_rope(theta: float, scaling: RopeScaling) -> dict:
    """The `rope_parameters` that `read_rope` and transformers read back."""
    rope = {"rope_type": scaling.kind, "rope_theta": theta}
    if scaling.kind != "default":
        rope["factor"] = scaling.factor
    if scaling.kind == "llama3":
        rope["low_freq_factor"] = scaling.low_freq_factor
        rope["high_freq_factor"] = scaling.high_freq_factor
        rope["original_max_position_embeddings"] = scaling.original_max_positions
    return rope


def inverse_frequencies(theta: float, scaling: RopeScaling, head_width: int) -> Array:
    """Rotation per position of each pair of head dimensions, (N/2,) float32."""
    s, half = scaling, head_width // 2
    freq = theta ** -(jnp.arange(half, dtype=jnp.float32) / half)
    if s.kind == "linear":
        return freq / s.factor
    if s.kind == "llama3":
        wavelength = 2 * math.pi / freq
        ratio = s.original_max_positions / wavelength
        smooth = (ratio - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        smooth = jnp.clip(smooth, 0, 1)
        return (1 - smooth) * freq / s.factor + smooth * freq
    return freq


def rotate(x: Array, positions: Array, frequencies: Array) -> Array:
    """Rotary embedding (Su et al. 2021) of x (B, S, H, N), pairs (i, i + N/2) as in Llama."""
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
