"""How much memory a training step takes on each device, known before any weight is read.

The state is counted exactly, array by array, from the rules of sharding.py. What the step needs
beside it is counted in its jaxpr (see liveness.py): gradients, what the layers keep for the
backward pass, and what is made on the way. A test holds it against XLA's own analysis.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_lowrank import liveness, models, sharding, train
from jax_lowrank.adapt import METHODS
from jax_lowrank.adapt.method import Method, bind
from jax_lowrank.config import TrainSpec
from jax_lowrank.config_run import FinetuneSpec
from jax_lowrank.data import Batch, LabelledBatch
from jax_lowrank.masking import MaskedBatch, num_hidden
from jax_lowrank.models import attention
from jax_lowrank.models.head import Head


class Sizes(NamedTuple):
    """A mesh of devices that need not be here; `sharding`'s rules read nothing else of one."""

    shape: Mapping[str, int]


class Memory(NamedTuple):
    """Bytes on each device."""

    frozen: int
    trainable: int
    optimizer: int
    step: int  # gradients and activations, at their peak

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


PLANNED = ("none", "dots", "full")  # `offload` keeps what `dots` keeps, elsewhere


def plan(spec: FinetuneSpec, devices: int) -> str:
    """Memory of a run on each of `devices` accelerators, from the model's config.json alone.

    Attention is counted as an accelerator's kernel does it, without an (S, S) array, and the frozen
    base in bfloat16 unless `model.dtype` says otherwise. Rows are full: batch_size x max_length.
    Raises ValueError or OSError, in one sentence.
    """
    raw = models.weights.read_config(
        models.weights.resolve_config(spec.model.path, spec.model.revision)
    )
    mesh = sharding.sizes_of(*vars(spec.mesh).values(), devices)
    sizes = Sizes(dict(zip(sharding.AXES, mesh)))
    t = spec.train
    sharding.check_rows("train.batch_size", t.batch_size, t.accumulate, sizes)
    dtype = jnp.dtype("bfloat16" if spec.model.dtype == "auto" else spec.model.dtype)
    model = models.abstract(raw, dtype, planned_head(spec.data.kind, raw))
    method = METHODS[spec.method.name](**spec.method.options())
    lines = [
        f"{spec.method.label} of {spec.model.path} on {sharding.shown(mesh)}, {t.batch_size} x"
        f" {t.max_length} tokens in {t.accumulate} part(s), GB on each device:",
        "  remat   frozen  trainable  optimizer  step  all",
    ]
    before = attention.use("splash")
    try:
        for remat in PLANNED:
            train_spec = dataclasses.replace(t, remat=remat)
            found = estimate(model, method, train_spec, t.batch_size, t.max_length, sizes)
            shown = [f"{amount / 1e9:.2f}" for amount in (*found, found.total)]
            widths = (8, 10, 10, 5, 6)
            lines.append(f"  {remat:6}" + " ".join(f"{x:>{w}}" for x, w in zip(shown, widths)))
    finally:
        attention.use(before)
    return "\n".join(lines)


def planned_head(kind: str, raw: Mapping) -> Head | None:
    """The head for data of a kind; None for the checkpoint's own. A classifier has 2 classes here,
    and so has what is put on an encoder's body when nothing is said."""
    heads = models.family_of(raw["model_type"]).module.HEADS
    bare = "embedding" in heads and models.stored_head(raw, heads) is None
    if kind == "classification" or (kind == "auto" and bare):
        return Head("classification", ("0", "1"))
    return Head(kind) if kind == "masked-lm" else None


def estimate(
    model: models.Model, method: Method, spec: TrainSpec, rows: int, width: int, sizes: Sizes
) -> Memory:
    """Memory of an optimizer step on `rows` x `width` tokens with a model of `models.abstract`."""
    graphdef, trainable, frozen = split(method, model)
    optimizer = train.make_optimizer(
        trainable, method, weight_decay=spec.weight_decay, clip=spec.clip
    )
    opt_state = jax.eval_shape(optimizer.init, trainable)
    loss = train.LOSSES[model.head.kind]
    local = rows // sharding.row_shards(sizes)
    apply = bind(graphdef, remat=spec.remat)

    def step(trainable, opt_state, frozen, batches, rates, key):
        return train.run_steps.__wrapped__(
            apply=apply,
            loss=loss,
            optimizer=optimizer,
            accumulate=spec.accumulate,
            trainable=trainable,
            opt_state=opt_state,
            frozen=frozen,
            batches=batches,
            rates=rates,
            count=len(rates),
            key=key,
        )

    batches = batch_shapes(spec.steps_per_call, local, width, model.head.kind)
    jaxpr = jax.make_jaxpr(step)(
        *(trainable, opt_state, frozen, batches),
        jax.ShapeDtypeStruct((spec.steps_per_call,), jnp.float32),
        jax.random.key(0),
    )
    donated = range(len(jax.tree.leaves((trainable, opt_state))))
    size = size_on_device((trainable, frozen), model.config, sizes)
    state = Memory(*(device_bytes(tree, sizes) for tree in (frozen, trainable, opt_state)), 0)
    # XLA copies Adam's two moments into the loop over steps; gradients take the place of one.
    return state._replace(step=liveness.peak(jaxpr, size, donated) + state.trainable)


def of_this_device() -> int:
    """Bytes of the first device's memory: an accelerator's, or the machine's."""
    known = jax.local_devices()[0].memory_stats() or {}
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return known.get("bytes_limit", host)


def split(method: Method, model: models.Model) -> tuple[Any, Any, Any]:
    """`method.split` of an abstract model: graph definition, and shapes."""
    found = []

    def parts(key, params):
        graphdef, trainable, frozen = method.split(key, model._replace(params=params))
        found.append(graphdef)
        return trainable, frozen

    trees = jax.eval_shape(parts, jax.random.key(0), model.params)
    return (found[0], *trees)


def batch_shapes(steps: int, rows: int, width: int, kind: str) -> NamedTuple:
    """The batches of one compiled call."""

    def shape(dtype, *dims):
        return jax.ShapeDtypeStruct((steps, rows, *dims), dtype)

    tokens = shape(jnp.int32, width)
    if kind == "classification":
        return LabelledBatch(tokens, shape(jnp.bool_, width), shape(jnp.int32), shape(jnp.float32))
    if kind == "masked-lm":
        spots = (shape(dtype, num_hidden(width)) for dtype in (jnp.int32, jnp.int32, jnp.float32))
        return MaskedBatch(tokens, shape(jnp.bool_, width), *spots)
    return Batch(tokens, shape(jnp.float32, width))


def device_bytes(tree, sizes: Sizes) -> int:
    """Bytes of a state on each device."""
    return sum(
        num_bytes(leaf) // shards for leaf, shards in zip(jax.tree.leaves(tree), cuts(tree, sizes))
    )


def cuts(tree, sizes: Sizes) -> list[int]:
    """Into how many parts each array of a state is cut."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [
        math.prod(
            sizes.shape[axis]
            for axis in sharding.spec_of(sharding.path_of(keys), leaf.shape, sizes)
            if axis
        )
        for keys, leaf in leaves
    ]


def num_bytes(leaf) -> int:
    """Bytes of one array, or of its shape."""
    return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize


def size_on_device(state, config, sizes: Sizes) -> Callable[[Any], int]:
    """aval -> bytes of it on each device, when rows are already those of one device.

    What has the shape of a parameter is cut as it is; what has the width of a layer's inside, or
    its heads, is cut by `tensor`.
    """
    known = {leaf.shape: shards for leaf, shards in zip(jax.tree.leaves(state), cuts(state, sizes))}
    tensor, heads = sizes.shape["tensor"], getattr(config, "num_heads", 1)
    inside = {config.mlp_width, heads, getattr(config, "num_kv_heads", heads), 3 * config.width}
    inside = {dim for dim in inside if dim % tensor == 0}

    def size(aval) -> int:
        shape = getattr(aval, "shape", ())
        whole = math.prod(shape) * getattr(aval.dtype, "itemsize", 8)
        if shape in known:
            return whole // known[shape]
        return whole // tensor if inside.intersection(shape) else whole

    return size
