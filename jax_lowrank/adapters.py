"""PEFT adapters beside their base models: read to run or to train on, and written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_lowrank import models
from jax_lowrank.adapt import METHODS, lora, peft_format
from jax_lowrank.adapt.method import Method
from jax_lowrank.models.head import Head, stored_labels
from jax_lowrank.models.weights import Row


class Adapted(NamedTuple):
    """A base model and an adapter beside it, as the method `lora` with `options` splits them.

    directory: of the base model.
    """

    base: models.Model
    directory: Path
    method: Method
    options: dict[str, Any]
    graphdef: Any
    trainable: Any
    frozen: Any

    @property
    def parts(self) -> tuple:
        """What `Method.split` gave."""
        return self.graphdef, self.trainable, self.frozen


def load(
    directory: Path,
    base: str | None = None,
    dtype=jnp.float32,
    key: jax.Array | None = None,
    where: Callable | None = None,
) -> Adapted:
    """The PEFT adapter in a directory beside its base model, ready to run or to train on.

    Args:
      directory: with adapter_config.json and adapter_model.safetensors.
      base: the base model; None for the one that the adapter names.
      dtype: of the base.
      key: for what the base lacks and the adapter does not bring either.
      where: of the base's parameters on several devices, as in `models.load`; what is trained comes
        as it is made, for `sharding.put`.
    """
    files = peft_format.read(directory)
    base = base or files.config.get("base_model_name_or_path")
    if not base:
        raise peft_format.PeftError(f"{directory} names no base model; give one")
    place = models.weights.resolve(base, files.config.get("revision") or "main")
    key = jax.random.key(0) if key is None else key
    model = models.load(place, dtype, head_of(files, place), key, where)
    options, arrays = peft_format.from_peft(
        files, rows_of(model), shapes_of(model), model.head_paths
    )
    method = METHODS["lora"](**options)
    graphdef, trainable, frozen = method.split(key, model)
    arrays = {path: jnp.asarray(value) for path, value in arrays.items()}
    trainable = models.with_arrays(trainable, {**models.by_path(trainable), **arrays})
    return Adapted(model, place, method, options, graphdef, trainable, frozen)


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds a PEFT adapter."""
    return (directory / "adapter_config.json").is_file()


def to_files(
    model: models.Model,
    graphdef,
    trainable,
    frozen,
    options: Mapping[str, Any],
    name: str,
    revision: str | None = None,
) -> peft_format.PeftFiles:
    """A LoRA model as PEFT's two files; PEFT finds the base model at `name`, on the hub at that
    revision."""
    arrays = models.by_path(trainable)
    return peft_format.to_peft(
        lora.factors(graphdef, trainable, frozen),
        {path: arrays[path] for path in model.head_paths},
        options,
        rows_of(model),
        shapes_of(model),
        kind=model.head.kind,
        base=name,
        revision=revision,
        architecture=model.config.to_hf(model.head)["architectures"][0],
    )


def rows_of(model: models.Model) -> Sequence[Row]:
    """The model's names in its own class: that of a body alone has no name for the body."""
    rows = models.FAMILIES[model.family].module.rows(model.config, model.head)
    if model.head.kind != "embedding":
        return rows
    body = rows[0].name.split(".")[0] + "."
    return [row._replace(name=row.name.removeprefix(body)) for row in rows]


def shapes_of(model: models.Model) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter."""
    return {path: value.shape for path, value in models.by_path(model.params).items()}


def head_of(files: peft_format.PeftFiles, base: Path) -> Head | None:
    """The head that an adapter is for; None where the base model's own is meant."""
    task, config = files.config.get("task_type"), models.weights.read_config(base)
    module = models.family_of(config["model_type"]).module
    if task == "FEATURE_EXTRACTION" and "embedding" in module.HEADS:
        return Head("embedding")
    if task != "SEQ_CLS":
        return None
    rows = module.rows(
        models.family_of(config["model_type"]).config.from_hf(config),
        Head("classification", ("0", "1")),
    )
    name = next(row.name for row in rows if row.path == "classifier.out.kernel")
    tensor = files.tensors.get(peft_format.PREFIX + name)
    labels = stored_labels(config)
    if tensor is not None and len(labels) != tensor.shape[0]:
        labels = tuple(f"LABEL_{i}" for i in range(tensor.shape[0]))
    return Head("classification", labels)
