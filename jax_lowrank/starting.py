"""Where a fine-tuning run starts: a checkpoint, or a PEFT adapter beside its base model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_lowrank import adapters, models, provenance, sharding
from jax_lowrank.adapt import METHODS
from jax_lowrank.adapt.method import Method
from jax_lowrank.config import MethodSpec, require
from jax_lowrank.config_run import FinetuneSpec, default_method
from jax_lowrank.models.head import Head
from jax_lowrank.study.prepare import param_dtype
from jax_lowrank.tasks.encode import Encoded


class Start(NamedTuple):
    """A base model as the method splits it.

    base: with shapes for parameters; the arrays are in `frozen`, or were copied to be trained.
    directory: of the base. adapter_hash: of the adapter that training goes on from, or None.
    """

    base: models.Model
    directory: Path
    method: Method
    graphdef: Any
    trainable: Any
    frozen: Any
    adapter_hash: str | None

    @property
    def mesh(self):
        """The mesh that the arrays lie on; None for one device."""
        return sharding.mesh_of((self.frozen, self.trainable))

    @property
    def parts(self) -> tuple:
        """What `Method.split` gave."""
        return self.graphdef, self.trainable, self.frozen


def start(
    spec: FinetuneSpec, directory: Path, head: Head, key, mesh=None
) -> tuple[FinetuneSpec, Start]:
    """The split model that training begins with.

    directory: of a checkpoint, or of a PEFT adapter that is trained on: then its method is in the
    spec that comes back.
    """
    dtype, fresh = param_dtype(spec.model.dtype), jax.random.fold_in(key, 1)
    if not adapters.is_adapter(directory):
        model = models.load(directory, dtype, head, fresh, sharding.where(mesh))
        method = METHODS[spec.method.name](**spec.method.options())
        graphdef, *parts = method.split(key, model)
        parts = sharding.put(parts, mesh)
        return spec, Start(_shapes(model), directory, method, graphdef, *parts, None)
    lora_spec, found = goes_on(directory, spec.method, head, dtype, fresh, sharding.where(mesh))
    method = METHODS["lora"](**lora_spec.options())
    hashed = provenance.hash_files(directory, "adapter_config.json")
    graphdef, *parts = found.parts
    parts = sharding.put(parts, mesh)
    started = Start(_shapes(found.base), found.directory, method, graphdef, *parts, hashed)
    return replace(spec, method=lora_spec), started


def _shapes(model: models.Model) -> models.Model:
    """The model without its arrays: full fine-tuning would hold them twice."""
    return model._replace(params=jax.eval_shape(lambda params: params, model.params))


def goes_on(
    directory: Path,
    given: MethodSpec,
    head: Head,
    dtype,
    key: jax.Array,
    where: Callable | None,
) -> tuple[MethodSpec, adapters.Adapted]:
    """The PEFT adapter in a directory to train on, and its method with the given learning rate.

    Raises ConfigError where `given` has more options than the learning rate and plus_ratio, which
    an adapter does not bring, and where the adapter is for another head.
    """
    own = {"learning_rates": given.learning_rates, "plus_ratio": given.plus_ratio}
    require(
        given == replace(default_method("lora"), **own),
        f"{directory} is an adapter, which brings rank, alpha, targets and the like; only"
        " --learning-rate and --method.plus-ratio can be set",
    )
    found = adapters.load(directory, dtype=dtype, key=key, where=where)
    theirs = found.base.head
    require(
        theirs.kind == head.kind and len(theirs.labels) == len(head.labels),
        f"{directory} is an adapter for {_in_words(theirs)}, but the data are for"
        f" {_in_words(head)}",
    )
    spec = MethodSpec("lora", **own, **found.options)
    return spec, found._replace(base=found.base._replace(head=head))


def note_zero_rows(started: Start, tokenizer: Any, rows: Encoded, note: Callable) -> None:
    """Say which tokens training asks for although a frozen output table holds zeros for them, as
    some base models do for special tokens: their logit is 0 after any text.
    """
    arrays, shapes = models.by_path(started.frozen), models.by_path(started.base.params)
    table = arrays.get("head.table" if "head.table" in shapes else "embed.table")
    if started.base.head.kind != "causal-lm" or table is None or not table.is_fully_addressable:
        return
    zero = np.asarray(jnp.abs(table).max(-1)) < 1e-8
    counted = rows.counted or [[True] * len(tokens) for tokens in rows.sequences]
    pairs = (pair for both in zip(rows.sequences, counted) for pair in list(zip(*both))[1:])
    asked = sorted({token for token, counts in pairs if counts and zero[token]})
    if asked:
        names = ", ".join(map(str, tokenizer.convert_ids_to_tokens(asked[:5])))
        note(
            f"{len(asked)} of the tokens to be learnt have an output row of zeros ({names}), which"
            " this method keeps: the model can hardly learn to write them; --method full can"
        )


def _in_words(head: Head) -> str:
    return f"{head.kind} with {len(head.labels)} classes" if head.labels else head.kind
