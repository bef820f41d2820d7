"""A study's runs: what each of them is called, does, measures and writes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_lowrank import models, provenance, results, sharding, train
from jax_lowrank.adapt import METHODS, lora
from jax_lowrank.adapt.method import Method, count, dtypes
from jax_lowrank.checkpoint import Checkpoints
from jax_lowrank.config import MethodSpec, Run, TrainSpec, fingerprint, plain
from jax_lowrank.processes import once
from jax_lowrank.progress import Progress
from jax_lowrank.study import membership, mirrored
from jax_lowrank.study.packs import Packing, begun, opened, tidy
from jax_lowrank.study.parts import Examples, Prepared
from jax_lowrank.study.schedule import Named, Schedule, needed, slots_of
from jax_lowrank.study.training import (
    Member,
    Program,
    bind_to,
    fit,
    fit_pack,
    guards,
    make_program,
    pack_log,
    progress_log,
)
from jax_lowrank.sweep import OwnBatches
from jax_lowrank.sweep.step import tokens_of
from jax_lowrank.tasks import text
from jax_lowrank.workers import Shard

ALL = Shard()


def execute(
    prepared: Prepared,
    note: Callable[[str], None],
    shard: Shard = ALL,
    curves: Path | None = None,
    *,
    together: bool = True,
) -> int:
    """Run the grid, or this shard of it, skipping what is finished; how many of the study's runs
    are not finished yet, by other shards. curves: where to write TensorBoard's files, if anywhere.
    together: train runs that can share a program in a sweep; False: one by one.
    """
    p = prepared
    describe(p)
    once(lambda: mirrored.begin(p))
    packs = once(lambda: list(begun(p.out)))
    train_rows, held_out = (p.kind.examples(p, split) for split in ("train", "validation"))
    batches = p.kind.batches(p, train_rows, 0)
    first_shadow = Run("shadow", None, None, membership.FIRST_SEED)  # all have as many rows
    batches_of = {"shadow": batches_for(p, first_shadow)} if p.study.membership else {}

    def steps(kind: str, spec: MethodSpec) -> int:
        epochs = training_of(p.study.train, spec).epochs
        return train.num_steps(batches_of.get(kind, batches), epochs)

    slots = slots_of(p.study)
    mine = shard.part(slots)
    if shard.count > 1:
        note(f"shard {shard.index}/{shard.count}: {len(mine)} of {len(slots)} runs")
    base_apply = bind_to(p.model.graphdef, p.mesh)
    trained = [slot for slot in needed(p.study, mine) if slot.kind != "base"]
    total = sum(steps(slot.kind, p.study.methods[slot.method]) for slot in trained)
    with Progress(total) as progress:
        shared = (train_rows, held_out, base_apply, progress)
        cells = {spec.label: Cell(p, spec, *shared, {}, curves) for spec in p.study.methods}
        alone = {spec.label: steps("final", spec) for spec in p.study.methods}

        def beside(runs: Sequence[Run]) -> tuple[float, float]:
            theirs = side_by_side(p, runs, train_rows)
            return np.mean([tokens_of(one) for one in theirs.each]), tokens_of(theirs)

        packing = Packing(p, tokens_of(batches), alone, beside)
        stacked: dict = {}

        def make(named: list[Named]) -> list[dict]:
            (run, _), *others = named
            if run.method is None:
                return [run_base(p, progress.note)]
            if others or (together and packing.resumes(named[0])):
                return train_pack(p, cells, named, stacked)
            return [cells[run.label].run(run)]

        schedule = Schedule(
            p,
            progress,
            run_fingerprint,
            packing if together else lambda named: [[one] for one in named],
            make,
            lambda run: progress.skip(steps(run.kind, run.method)) if run.method else None,
        )
        schedule.work(mine)
    once(lambda: tidy(p.out))
    once(lambda: mirrored.tidy(p, packs))
    records = [schedule.shared(slot) for slot in slots]
    if None not in records:
        once(lambda: results.set_runs(p.out, [record["fingerprint"] for record in records]))
    return records.count(None)


class Begun(NamedTuple):
    """A run before its training."""

    run: Run
    method: Method
    graphdef: Any
    trainable: Any
    frozen: Any
    key: jax.Array
    record: dict
    log: list[dict]
    label: str


class Cell(NamedTuple):
    """All runs of one method: what they share."""

    prepared: Prepared
    spec: MethodSpec
    train_rows: Examples
    held_out: Examples
    base_apply: Callable
    progress: Progress
    programs: dict  # graphdef -> Program: a random choice of layers may differ by seed
    curves: Path | None

    def start(self, run: Run, batches) -> Begun:
        """Make what a run trains, and its record."""
        p = self.prepared
        method = METHODS[self.spec.name](**self.spec.options())
        key = jax.random.key(run.seed)
        model = p.model
        if p.drawn:
            model = models.redraw(model, jax.random.fold_in(key, 1), p.drawn)
        graphdef, trainable, frozen = method.split(key, model)
        trainable, frozen = sharding.put((trainable, frozen), p.mesh)
        if not self.programs:
            line = guards(self.spec.label, method, trainable, frozen, count(p.model.params))
            self.progress.note(line)
        if graphdef not in self.programs:
            self.programs[graphdef] = make_program(p.study.train, method, graphdef, trainable)
        record = new_record(p, run, method, trainable, frozen)
        record["effective_scales"] = lora.scales(graphdef, trainable, frozen)
        record["padding_fraction"] = round(batches.padding_fraction(), 4)
        label = f"{run.label} lr {run.learning_rate:g} seed {run.seed} ({run.kind})"
        return Begun(run, method, graphdef, trainable, frozen, key, record, [], label)

    def run(self, run: Run) -> dict:
        """Do this run, from its newest checkpoint where there is one, and write it; its record."""
        p = self.prepared
        batches = batches_for(p, run, self.train_rows)
        one = self.start(run, batches)
        checkpoints = checkpoints_of(p, one.record["fingerprint"], self.progress.note)
        program = self.programs[one.graphdef]
        try:
            fitted = fit(
                training_of(p.study.train, self.spec),
                program,
                trainable=one.trainable,
                frozen=one.frozen,
                batches=batches,
                peak=run.learning_rate,
                validate=lambda trainable: p.kind.validate(
                    p, *self.evaluated(program, trainable, one.frozen), self.held_out
                ),
                log=progress_log(self.progress, one.label, one.log, self.curves),
                key=one.key,
                loss=p.kind.loss,
                checkpoints=checkpoints,
            )
        except train.DivergedError as error:
            fitted = error
        record = self.end(one, fitted)
        checkpoints.remove()
        return record

    def end(self, one: Begun, fitted: train.Fitted | train.DivergedError) -> dict:
        """Write a run that has been trained, and measured where it is to be; its record."""
        p, record = self.prepared, one.record
        if isinstance(fitted, train.DivergedError):
            self.progress.note(f"{one.label}: diverged, {fitted}")
            record["diverged"] = {"step": fitted.step, "loss": str(fitted.loss)}
            mirrored.write_run(p, record, one.log)
            return record
        record |= {
            "num_steps": fitted.num_steps,
            "best_step": fitted.best_step,
            "validation_loss": fitted.validation_loss,
            "tokens_per_second": round(fitted.tokens_per_second, 1),
            "resumed_at": fitted.resumed_at,
        }
        record["seconds"]["train"] = round(fitted.seconds, 3)
        program = self.programs[one.graphdef]
        self.finish(one.run, record, one.log, program, fitted, one.frozen, one.label)
        return record

    def finish(self, run, record, log, program, fitted, frozen, label) -> None:
        """Measure a run that is to be reported, and write the run."""
        p, tuning = self.prepared, run.kind == "tune"
        # A learning rate is chosen by validation alone: test rows are for the report.
        said, measured, weights = f"validation loss {record['validation_loss']:.4f}", (), {}
        if not tuning or p.kind.measures_tuning:
            began = time.perf_counter()
            trainable = sharding.put(fitted.trainable, p.mesh)
            measured = p.kind.measure(p, run, *self.evaluated(program, trainable, frozen))
            record["seconds"]["evaluate"] = round(time.perf_counter() - began, 3)
        if run.kind == "final":
            said = p.kind.summary(p, record, measured[0])
            weights = models.by_path(fitted.trainable)
        mirrored.write_run(p, record, log, measured, weights)
        self.progress.note(f"{label}: {said}")

    def evaluated(self, program: Program, trainable, frozen) -> tuple[Callable, tuple]:
        """What to measure: merged weights, which compile once for all methods, or, where merging
        would round the adapter away (a base below float32), the adapter beside its base."""
        if dtypes(frozen) in ((), ("float32",)):
            return self.base_apply, (program.merge(trainable, frozen),)
        return program.apply, (trainable, frozen)


def batches_for(p: Prepared, run: Run, train_rows: Examples | None = None):
    """What a run trains on: the training rows in its seed's order, but a shadow rows of its own."""
    if run.kind == "shadow":
        split, rows = membership.rows_of(p.task, p.study.membership, run.seed)
        train_rows = p.kind.examples(p, split).take(rows)
    return p.kind.batches(p, train_rows, run.seed)


def side_by_side(p: Prepared, runs: Sequence[Run], train_rows: Examples):
    """The batches of runs of one form: those of one seed share them, of several each has its own.

    Runs of one seed are given the same ones, which are made once.
    """
    made = {run.seed: run for run in runs}
    made = {seed: batches_for(p, run, train_rows) for seed, run in made.items()}
    return OwnBatches([made[run.seed] for run in runs]) if len(made) > 1 else made[runs[0].seed]


def checkpoints_of(p: Prepared, name: str, note: Callable[[str], None]) -> Checkpoints:
    """Those of a run or a pack."""
    seconds = p.study.train.checkpoint_seconds
    return mirrored.checkpoints_of(p.mirror, f"checkpoints/{name}", name, seconds, note)


def train_pack(
    p: Prepared, cells: dict[str, Cell], named: list[Named], programs: dict
) -> list[dict]:
    """Train runs of one form together, then measure and write one after the other; their records.

    A member of a pack that was begun before is trained even where another has written it since.
    programs: of packs, by graphdef; it grows.
    """
    specs = {label: cell.spec for label, cell in cells.items()}
    with opened(p.out, named, specs) as (pack, members):
        own = [cells[one.run.label] for one in members]
        held_out, progress = own[0].held_out, own[0].progress
        batches = side_by_side(p, [one.run for one in members], own[0].train_rows)
        seen = batches.each if isinstance(batches, OwnBatches) else [batches] * len(members)
        each = [cell.start(one.run, theirs) for cell, one, theirs in zip(own, members, seen)]
        trained = fit_pack(
            p.study.train,
            [
                Member(
                    (one.method, one.graphdef, one.trainable, one.frozen),
                    one.run.learning_rate,
                    training_of(p.study.train, one.run.method).epochs,
                    one.key,
                )
                for one in each
            ],
            programs,
            batches=batches,
            validate=lambda *stacked: p.kind.validate_all(p, *stacked, held_out),
            log=pack_log(
                progress, [one.label for one in each], [one.log for one in each], own[0].curves
            ),
            loss=p.kind.loss,
            mesh=p.mesh,
            checkpoints=checkpoints_of(p, pack, progress.note),
        )
        wanted, records = {one.name for one in named}, {}
        for cell, one, fitted in zip(own, each, trained, strict=True):
            if one.record["fingerprint"] in wanted:
                records[one.record["fingerprint"]] = cell.end(one, fitted)
    once(lambda: p.mirror.keep(f"checkpoints/{pack}"))
    return [records[one.name] for one in named]


def training_of(spec: TrainSpec, method: MethodSpec | None) -> TrainSpec:
    """The settings with the method's own number of epochs."""
    return dataclasses.replace(spec, epochs=method.epochs) if method and method.epochs else spec


def run_fingerprint(p: Prepared, run: Run) -> str:
    """Names a run: everything that its stored outputs depend on, and nothing else.

    Not in it: paths (the hashes of what they hold are), the other learning rates of the grid.
    """
    method = (run.method.name, run.method.options()) if run.method else "base"
    hashes = (p.kind.data_hash(p.task), p.weights_hash, str(dtypes(p.model.params)))
    tokenizer = p.text.tokenizer.backend_tokenizer.to_str()
    spec = training_of(p.study.train, run.method)
    parts = (run.kind, method, run.learning_rate, run.seed, spec, tokenizer)
    is_measured = run.kind != "tune" or p.kind.measures_tuning
    measured = p.kind.measured(p, run) if is_measured else ()
    return fingerprint(parts, measured, hashes, provenance.code_hash())


def new_record(p: Prepared, run: Run, method: Method | None, trainable, frozen) -> dict:
    """A run's record before its training: what is trained, at which scale, in which precision."""
    return {
        "fingerprint": run_fingerprint(p, run),
        "kind": run.kind,
        "label": run.label,
        "method": plain(run.method),
        "rank": run.method.rank if run.method and run.method.name == "lora" else None,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "splits": membership.split_hashes(p.task, p.study.membership, run),
        "audit": membership.described(p.task, p.study, run),
        "num_steps": None,
        "best_step": None,
        "validation_loss": None,
        "trainable_parameters": count(trainable),
        "total_parameters": count(p.model.params),
        "effective_scale": method.scale if method else None,
        "dtypes": {"trainable": dtypes(trainable), "frozen": dtypes(frozen)},
        "diverged": None,
        "seconds": {},
        "environment": provenance.environment() | sharding.describe(p.mesh),
    }


def run_base(p: Prepared, note: Callable) -> dict:
    """Measure the base model itself; its record."""
    run = Run("base", None, None, None)
    record = new_record(p, run, None, (), p.model.params)
    began = time.perf_counter()
    base_apply = bind_to(p.model.graphdef, p.mesh)
    arrays, completions = p.kind.measure(p, run, base_apply, (p.model.params,))
    record["seconds"]["evaluate"] = round(time.perf_counter() - began, 3)
    mirrored.write_run(p, record, [], (arrays, completions))
    note(f"base: {p.kind.summary(p, record, arrays)}")
    return record


def describe(p: Prepared) -> None:
    """Write study.json, prompts.json and trained_on.json; refuse a directory of another study."""
    task, model = p.task, p.model
    description = {
        "name": p.study.name,
        "question": p.study.question,
        "config": plain(p.study),
        "group_names": list(task.group_names),
        "kind": p.kind.name,
        "data_hash": p.kind.data_hash(task),
        "task_notes": dict(task.notes),
        "model": {
            "family": model.family,
            "sizes": plain(model.config),
            "num_parameters": count(model.params),
            "weights_hash": p.weights_hash,
            "source": p.source,
            "pretrain": p.pretrained,
        },
        **p.kind.describe(p),
    }
    # Runs are added when the grid grows; other data, weights or scores make another study.
    parts = ("name", "data_hash", "scorer")
    identity = fingerprint(*(description[part] for part in parts if part in description))
    identity = fingerprint(identity, p.weights_hash)
    rows = p.kind.rows(p)
    once(lambda: results.open_study(p.out, {"fingerprint": identity, **description}, rows))
    once(lambda: results.write_trained_on(p.out, text.hashes(task.splits["train"].texts)))
