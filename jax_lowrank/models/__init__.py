"""Model families: a table, and how to make, read and write a model of any of them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jax_lowrank.models import bert, gpt2, llama, opt, weights
from jax_lowrank.models.head import Head, check_labels, stored_head
from jax_lowrank.models.weights import UnsupportedModelError


class Family(NamedTuple):
    """One model family: its configuration class and its module (build, rows, HEADS, PRESETS)."""

    config: type
    module: ModuleType


# model_type in config.json -> family
FAMILIES = {
    **dict.fromkeys(("bert", "roberta", "distilbert"), Family(bert.BertConfig, bert)),
    "gpt2": Family(gpt2.GPT2Config, gpt2),
    "llama": Family(llama.LlamaConfig, llama),
    "mistral": Family(llama.LlamaConfig, llama),
    "qwen2": Family(llama.LlamaConfig, llama),
    "opt": Family(opt.OPTConfig, opt),
}


class Answers(NamedTuple):
    """Next tokens that stand for the classes (C,), and what is taken off their logits (C,)."""

    tokens: tuple[int, ...]
    offsets: tuple[float, ...]


class Model(NamedTuple):
    """A model split once: what is static, what is an array, and how its family names things.

    head_paths: the parameters that are the task's head; every fine-tuning method trains them.
    answers: of a language model that classifies by them; see `answering`.
    """

    family: str
    config: Any
    graphdef: nnx.GraphDef
    params: nnx.State
    presets: Mapping[str, str]
    head: Head
    head_paths: tuple[str, ...]
    answers: Answers | None = None


def family_of(model_type: str) -> Family:
    """The row of FAMILIES. Raises UnsupportedModelError listing the supported types."""
    if model_type not in FAMILIES:
        near = difflib.get_close_matches(model_type, FAMILIES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UnsupportedModelError(
            f"model_type {model_type!r} is not supported; supported are {list(FAMILIES)}{hint}"
        )
    return FAMILIES[model_type]


def create(
    family: str, config: Any, key: jax.Array, dtype=jnp.float32, head: Head | None = None
) -> Model:
    """A model with random weights, and the first head of its family unless one is given."""
    module = family_of(family).module
    head = (head or Head(next(iter(module.HEADS)))).check(module.HEADS, family)
    graphdef, params = nnx.split(module.build(key, config, head, dtype))
    paths = head_paths(by_path(params))
    return Model(family, config, graphdef, params, module.PRESETS, head, paths)


def load(
    directory: Path,
    dtype=jnp.float32,
    head: Head | None = None,
    key: jax.Array | None = None,
    where: Callable | None = None,
) -> Model:
    """The model in a Hugging Face directory, read tensor by tensor; see `weights.load`.

    Args:
      directory: a local checkpoint.
      dtype: of the parameters.
      head: None for the checkpoint's own, or the first of the family for a base model.
      key: where `head` is not the checkpoint's, makes what it lacks; such parameters are drawn as
        `create` draws them and are among the result's `head_paths`.
      where: (path, shape) -> sharding, for parameters on several devices (see `sharding.where`).
    """
    raw = weights.read_config(directory)
    if "model_type" not in raw:
        raise UnsupportedModelError(f"{directory}/config.json names no model_type")
    family = family_of(raw["model_type"])
    module, config = family.module, family.config.from_hf(raw)
    stored = stored_head(raw, module.HEADS)
    head = head or stored or Head(next(iter(module.HEADS)))
    check_labels(head.check(module.HEADS, raw["model_type"]), stored)

    def build(key):
        return module.build(key, config, head, dtype)

    graphdef, state = nnx.split(nnx.eval_shape(build, jax.random.key(0)))
    rows, own = module.rows(config, head), stored is not None and stored.kind == head.kind
    arrays = weights.load(
        directory,
        rows,
        by_path(state),
        dtype,
        heads=module.HEAD_TENSORS,
        may_lack=key is not None and not own,
        where=where,
    )
    lacking = [path for path in by_path(state) if path not in arrays]
    if lacking:
        # Compiled, the parameters that were read are not made.
        shapes = by_path(state)
        shardings = where and [where(path, shapes[path].shape) for path in lacking]
        draw = jax.jit(
            lambda key: [by_path(nnx.state(build(key)))[path] for path in lacking],
            out_shardings=shardings,
        )
        arrays.update(zip(lacking, draw(key)))
    return Model(
        raw["model_type"],
        config,
        graphdef,
        with_arrays(state, arrays),
        module.PRESETS,
        head,
        head_paths(arrays, lacking),
    )


def head_of(directory: Path) -> Head | None:
    """The head that a Hugging Face directory's checkpoint has; None for a base model without."""
    raw = weights.read_config(directory)
    return stored_head(raw, family_of(raw.get("model_type", "")).module.HEADS)


def redraw(model: Model, key: jax.Array, paths: Sequence[str]) -> Model:
    """The model with the parameters at `paths` drawn anew, as `create` draws them."""
    module, arrays = family_of(model.family).module, by_path(model.params)

    def draw(key):
        fresh = by_path(nnx.state(module.build(key, model.config, model.head, jnp.float32)))
        return [fresh[path].astype(arrays[path].dtype) for path in paths]

    shardings = [arrays[path].sharding for path in paths]
    drawn = jax.jit(draw, out_shardings=shardings)(key)
    return model._replace(params=with_arrays(model.params, arrays | dict(zip(paths, drawn))))


def answering(model: Model, answers: Sequence[int], offsets: Sequence[float]) -> Model:
    """A causal language model that classifies by the logits of the classes' answer tokens.

    answers: token ids (C,), distinct. offsets (C,): taken off the logits, such as the words' log
    probabilities where there is nothing to answer (contextual calibration, Zhao et al. 2021).
    Raises ValueError for a model with another head.
    """
    if model.head.kind != "causal-lm":
        raise ValueError(f"a {model.head.kind} head predicts no next token to answer with")
    net, found = nnx.merge(model.graphdef, model.params), Answers(tuple(answers), tuple(offsets))
    net.answers, net.offsets = found
    return model._replace(graphdef=nnx.split(net)[0], answers=found)


def abstract(raw: Mapping, dtype=jnp.float32, head: Head | None = None) -> Model:
    """The model that a config.json describes, with shapes in the place of arrays."""
    family = family_of(raw["model_type"])
    module, config = family.module, family.config.from_hf(raw)
    stored = stored_head(raw, module.HEADS)
    head = head or stored or Head(next(iter(module.HEADS)))
    head.check(module.HEADS, raw["model_type"])
    make = nnx.eval_shape(lambda key: module.build(key, config, head, dtype), jax.random.key(0))
    graphdef, params = nnx.split(make)
    paths = head_paths(by_path(params))
    return Model(raw["model_type"], config, graphdef, params, module.PRESETS, head, paths)


def head_paths(arrays: Mapping, fresh: Sequence[str] = ()) -> tuple[str, ...]:
    """Paths of what every method trains: the classifier, and head parameters made anew."""
    return tuple(p for p in sorted(arrays) if p.startswith("classifier.") or p in fresh)


def save(
    directory: Path,
    model: Model,
    params: nnx.State,
    max_shard_bytes: int = weights.SHARD_BYTES,
    *,
    tokens: Mapping[str, int | None] | None = None,
) -> None:
    """Write `params` (those of `model` or fine-tuned from them) as a Hugging Face directory.

    tokens: ids that config.json is to name, such as eos_token_id; transformers takes GPT-2's own
    for those of a model that names none.
    """
    rows = FAMILIES[model.family].module.rows(model.config, model.head)
    if model.head.kind == "embedding":
        rows = weights.without_prefix(rows)
    config = model.config.to_hf(model.head) | dict(tokens or {})
    weights.save(directory, by_path(params), rows, config, max_shard_bytes)


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
