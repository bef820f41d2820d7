"""Training as a study does it: one program per method, settings from a TrainSpec."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jax_lowrank import data, infer, sharding, train
from jax_lowrank.adapt.method import Method, bind, count, dtypes
from jax_lowrank.checkpoint import Checkpoints
from jax_lowrank.config import TrainSpec
from jax_lowrank.models.attention import Layout
from jax_lowrank.progress import Progress
from jax_lowrank.tracking import tensorboard


class Program(NamedTuple):
    """What one method compiles to, shared by all of its runs."""

    apply: Callable
    merge: Callable
    optimizer: Any


def train_batches(sequences, spec: TrainSpec, seed: int, pad_id: int, mesh) -> data.Batches:
    """The batches of a training split; of each, the rows that this process's devices take."""
    own = sharding.own_rows(spec.batch_size, mesh)
    return data.make_batches(
        sequences, batch_size=spec.batch_size, seed=seed, pad_id=pad_id, own=own
    )


def bind_to(graphdef, mesh, *, remat: str = "dots") -> Callable:
    """`bind` for states on a mesh."""
    layout = None if mesh is None else Layout(sharding.pin(mesh), sharding.row_shards(mesh))
    return bind(graphdef, remat=remat, layout=layout)


def fit(
    spec: TrainSpec,
    program: Program,
    *,
    trainable,
    frozen,
    batches: data.Batches,
    peak: float,
    validate: Callable,
    log: Callable,
    key,
    loss: Callable = train.causal_lm_loss,
    checkpoints: Checkpoints | None = None,
) -> train.Fitted:
    """`train.fit` with the settings of a TrainSpec."""
    steps = train.num_steps(batches, spec.epochs)
    return train.fit(
        apply=program.apply,
        loss=loss,
        optimizer=program.optimizer,
        trainable=trainable,
        frozen=frozen,
        batches=batches,
        schedule=train.make_schedule(peak, steps, spec.warmup_fraction, spec.schedule),
        validate=validate,
        log=log,
        accumulate=spec.accumulate,
        steps_per_call=spec.steps_per_call,
        key=key,
        checkpoints=checkpoints,
    )


def guards(label: str, method: Method, trainable, frozen, total: int) -> str:
    """What must be right before training starts: counts, scale and dtypes in one line."""
    scale = "" if method.scale is None else f" at scale {method.scale:g}"
    kept = f"frozen {', '.join(dtypes(frozen))}" if dtypes(frozen) else "nothing frozen"
    return (
        f"{label}: trains {count(trainable):,} of {total:,} parameters{scale};"
        f" trainable {', '.join(dtypes(trainable))}, {kept}"
    )


def make_program(spec: TrainSpec, method, graphdef, trainable) -> Program:
    """Compiled parts for one graph: made once, or every run would compile again.

    The mesh is the one that `trainable` lies on.
    """
    mesh = sharding.mesh_of(trainable)
    optimizer = train.make_optimizer(
        trainable, method, weight_decay=spec.weight_decay, clip=spec.clip
    )

    def merge(trainable, frozen):
        return sharding.keeper(mesh)(method.merge(graphdef, trainable, frozen))

    apply = bind_to(graphdef, mesh, remat=spec.remat)
    return Program(apply, jax.jit(merge), optimizer)


def mean_nll(apply, states, sequences, *, batch_size: int, pad_id: int) -> float:
    """Nats per token over sequences."""
    scored = infer.likelihood(
        apply, states, sequences, batch_size=min(batch_size, len(sequences)), pad_id=pad_id
    )
    return float(scored.nll.sum() / scored.tokens.sum())


def progress_log(
    progress: Progress, label: str, keep: list[dict] | None = None, curves: Path | None = None
) -> Callable:
    """A `log` for fit: advances the progress, keeps the lines when a list is given, and writes them
    for TensorBoard below `curves`."""
    seen, track = 0, tensorboard(curves, label) if curves else None

    def log(line: dict) -> None:
        nonlocal seen
        resumed = line.get("resumed", False)
        if track:
            track(line)
        if keep is not None:
            keep.append({name: value for name, value in line.items() if name != "resumed"})
        if "loss" in line and resumed:
            progress.skip(line["step"] - seen)
            seen = line["step"]
        elif "loss" in line:
            progress.advance(
                line["step"] - seen,
                f"{label}  step {line['step']}/{line['num_steps']}  loss {line['loss']:.3f}"
                f"  {line['tokens_per_second']:,.0f} tokens/s",
            )
            seen = line["step"]

    return log
