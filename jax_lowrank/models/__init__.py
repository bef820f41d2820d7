"""Model families: a table, and how to make, read and write a model of any of them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jax_lowrank.models import gpt2, llama, weights
from jax_lowrank.models.weights import UnsupportedModelError


class Family(NamedTuple):
    """One model family: its configuration class and its module (build, rows, PRESETS)."""

    config: type
    module: ModuleType


# model_type in config.json -> family
FAMILIES = {
    "gpt2": Family(gpt2.GPT2Config, gpt2),
    "llama": Family(llama.LlamaConfig, llama),
    "mistral": Family(llama.LlamaConfig, llama),
}


class Model(NamedTuple):
    """A model split once: what is static, what is an array, and how its family names things."""

    family: str
    config: Any
    graphdef: nnx.GraphDef
    params: nnx.State
    presets: Mapping[str, str]


def family_of(model_type: str) -> Family:
    """The row of FAMILIES. Raises UnsupportedModelError listing the supported types."""
    if model_type not in FAMILIES:
        near = difflib.get_close_matches(model_type, FAMILIES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UnsupportedModelError(
            f"model_type {model_type!r} is not supported; supported are {list(FAMILIES)}{hint}"
        )
    return FAMILIES[model_type]


def create(family: str, config: Any, key: jax.Array, dtype=jnp.float32) -> Model:
    """A model with random weights."""
    module = family_of(family).module
    graphdef, params = nnx.split(module.build(key, config, dtype))
    return Model(family, config, graphdef, params, module.PRESETS)


def load(directory: Path, dtype=jnp.float32) -> Model:
    """The model in a Hugging Face directory, read tensor by tensor; see `weights.load`."""
    raw = weights.read_config(directory)
    if "model_type" not in raw:
        raise UnsupportedModelError(f"{directory}/config.json names no model_type")
    family = family_of(raw["model_type"])
    config = family.config.from_hf(raw)
    abstract = nnx.eval_shape(lambda: family.module.build(jax.random.key(0), config, dtype))
    graphdef, state = nnx.split(abstract)
    arrays = weights.load(directory, family.module.rows(config), by_path(state), dtype)
    return Model(
        raw["model_type"], config, graphdef, with_arrays(state, arrays), family.module.PRESETS
    )


def save(
    directory: Path,
    model: Model,
    params: nnx.State,
    max_shard_bytes: int = weights.SHARD_BYTES,
) -> None:
    """Write `params` (those of `model` or fine-tuned from them) as a Hugging Face directory."""
    rows = FAMILIES[model.family].module.rows(model.config)
    weights.save(directory, by_path(params), rows, model.config.to_hf(), max_shard_bytes)


def by_path(state: nnx.State) -> dict[str, Any]:
    """Dotted path -> array of a state."""
    return {
        ".".join(map(str, path)): variable.get_value()
        for path, variable in nnx.to_flat_state(state)
    }


def with_arrays(state: nnx.State, arrays: Mapping[str, jax.Array]) -> nnx.State:
    """`state` with the arrays that `by_path` would name put in."""
    return nnx.from_flat_state(
        [
            (path, variable.replace(arrays[".".join(map(str, path))]))
            for path, variable in nnx.to_flat_state(state)
        ]
    )
