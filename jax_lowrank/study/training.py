"""Training as a study does it: one program per method, settings from a TrainSpec."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jax_lowrank import data, infer, sharding, sweep, train
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


class Member(NamedTuple):
    """A run of a pack."""

    parts: tuple  # method, graphdef, trainable, frozen
    peak: float
    epochs: int
    key: jax.Array


def fit_pack(
    spec: TrainSpec,
    members: Sequence[Member],
    programs: dict,
    *,
    batches: data.Batches,
    validate: Callable,
    log: Callable,
    loss: Callable,
    mesh: Mesh | None,
    checkpoints: Checkpoints,
) -> list[train.Fitted | train.DivergedError]:
    """`sweep.fit` with the settings of a TrainSpec. programs: graphdef -> Program; it grows.

    validate: (program, states) -> losses (K,).
    """
    cells = [
        sweep.Cell(
            *one.parts,
            train.make_schedule(
                one.peak,
                train.num_steps(batches, one.epochs),
                spec.warmup_fraction,
                spec.schedule,
            ),
            one.key,
            spec.weight_decay,
            spec.clip,
        )
        for one in members
    ]
    made = sweep.make_program(cells[0], loss, accumulate=spec.accumulate, remat=spec.remat)
    program = programs.setdefault(made.graphdef, made)
    return sweep.fit(
        program=program,
        cells=cells,
        batches=batches,
        validate=lambda states: validate(program, states),
        log=log,
        steps_per_call=spec.steps_per_call,
        mesh=mesh,
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


def pack_log(
    progress: Progress, labels: Sequence[str], keep: Sequence[list[dict]], curves: Path | None
) -> Callable:
    """`progress_log` of runs that are trained together; it gets a run's number and a line of its.

    Steps that all of them did in one call count at once: one after the other, in no time, they
    would make the time left too short.
    """
    each = [Tally() for _ in labels]
    alone = [progress_log(tally, *one, curves) for tally, *one in zip(each, labels, keep)]
    newest = 0

    def tell() -> None:
        done, known = sum(one.done for one in each), sum(one.known for one in each)
        if known:
            progress.skip(known)
        if done:
            text = next(one.text for one in each if one.done)
            progress.advance(done, f"{len(labels)} runs together, of them {text}")
        for one in each:
            one.done = one.known = 0

    def log(number: int, line: dict) -> None:
        nonlocal newest
        if line["step"] != newest or "loss" not in line:
            tell()
            newest = line["step"]
        alone[number](line)

    return log


class Tally:
    """Steps that a run did since they were last told, in this session and in earlier ones; stands
    in for a Progress."""

    def __init__(self):
        self.done, self.known, self.text = 0, 0, ""

    def advance(self, steps: int, text: str) -> None:
        """Steps that were just done."""
        self.done, self.text = self.done + steps, text

    def skip(self, steps: int) -> None:
        """Steps that an earlier session did."""
        self.known += steps
