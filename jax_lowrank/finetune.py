"""One fine-tuning run: check everything, train, measure before and after, write one directory.

RUN/ holds config.json, record.json, splits.json (row ids), trained_on.json (hashes of the training
rows), log.jsonl, predictions.npz (example by example) and trainable.safetensors.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jax_lowrank import data, masking, models, provenance, results, sharding, train, trainable_file
from jax_lowrank.adapt import lora
from jax_lowrank.adapt.method import count, dtypes
from jax_lowrank.checkpoint import Checkpoints
from jax_lowrank.config import fingerprint, plain, require
from jax_lowrank.config_run import DataSpec, FinetuneSpec
from jax_lowrank.mirror import Mirror
from jax_lowrank.models.head import Head
from jax_lowrank.processes import is_first, once
from jax_lowrank.progress import Progress
from jax_lowrank.starting import Start, note_zero_rows, start
from jax_lowrank.study.mirrored import checkpoints_of
from jax_lowrank.study.parts import Text
from jax_lowrank.study.prepare import load_text, note_uncut
from jax_lowrank.study.training import fit, guards, make_program, progress_log
from jax_lowrank.tasks import encode, text
from jax_lowrank.trained import mean_loss, measure, observe, sentence
from jax_lowrank.workers import claim


class Job(NamedTuple):
    """A run that passed every check, ready to train."""

    spec: FinetuneSpec
    out: Path
    data: text.Data
    encoded: Mapping[str, encode.Encoded]
    text: Text
    start: Start
    weights_hash: str  # of the base model
    fingerprint: str


def prepare(spec: FinetuneSpec, out: str, note: Callable[[str], None]) -> Job:
    """Check everything that can be checked before training; writes nothing.

    out: the run's directory; empty: one under results/, named by data, method and fingerprint.
    Raises ValueError (ConfigError, TaskError, WeightsError, ...) or OSError, in one sentence.
    """
    require(bool(spec.model.path), "no model; give --model DIRECTORY or a hub id")
    require(bool(spec.data.path), "no data; give --data FILE")
    mesh = sharding.make_mesh(*vars(spec.mesh).values())
    sharding.check_rows("train.batch_size", spec.train.batch_size, spec.train.accumulate, mesh)
    sharding.check_remat("train.remat", spec.train.remat)
    examples = read_data(spec.data)
    directory = models.weights.resolve(spec.model.path, spec.model.revision)
    key = jax.random.key(spec.seed)
    note(f"loading {directory}")
    head = head_for(examples.kind, examples.classes)
    spec, started = start(spec, directory, head, key, mesh)
    model, directory = started.base, started.directory
    note_uncut(model, mesh, note)
    words = load_text(directory)
    words = words._replace(vocab_size=model.config.vocab_size)
    check_length(spec.train.max_length, model)
    encoding = partial(
        encode.encode, max_length=spec.train.max_length, mask_prompt=spec.data.mask_prompt
    )
    encoded = {
        name: encoding(examples.kind, split.ids, split.inputs, words)
        for name, split in examples.splits.items()
    }
    note_zero_rows(started, words.tokenizer, encoded["train"], note)
    weights_hash = provenance.hash_files(directory)
    name = run_fingerprint(spec, examples, words, started, weights_hash)
    place = Path(out) if out else Path("results") / default_name(spec, name)
    check_place(place, name)
    return Job(spec, place, examples, encoded, words, started, weights_hash, name)


def read_data(spec: DataSpec) -> text.Data:
    """The splits that a DataSpec describes."""
    return text.make(
        spec.path,
        validation=spec.validation,
        test=spec.test,
        split_column=spec.split_column,
        validation_fraction=spec.validation_fraction,
        max_train=spec.max_train,
        kind=spec.kind,
        columns=text.Columns(**plain(spec.columns)),
        classes=spec.labels,
        seed=spec.seed,
    )


def head_for(kind: str, classes: tuple[str, ...]) -> Head:
    """The head that examples of a kind ask for."""
    if kind == "classification":
        return Head(kind, classes)
    return Head("masked-lm" if kind == "masked-lm" else "causal-lm")


def check_length(max_length: int, model: models.Model) -> None:
    """Raise ConfigError where rows may be longer than the model's positions."""
    limit = model.config.max_positions
    require(
        max_length <= limit,
        f"max_length {max_length} is above the model's {limit} positions; use --max-length {limit}",
    )


def run_fingerprint(spec: FinetuneSpec, examples: text.Data, words: Text, start, weights_hash: str):
    """Names a run: everything that its stored outputs depend on, and nothing else."""
    model = start.base
    tokenizer = (words.tokenizer.backend_tokenizer.to_str(), words.tokenizer.chat_template)
    return fingerprint(
        (spec.method.name, spec.method.options(), spec.method.learning_rates),
        (spec.train, spec.seed, spec.level, spec.data.mask_prompt),
        (text.data_hash(examples), weights_hash, start.adapter_hash, tokenizer),
        (model.head, dtypes(model.params), provenance.code_hash()),
    )


def default_name(spec: FinetuneSpec, name: str) -> str:
    """DATA-METHOD-FINGERPRINT."""
    stem = Path(spec.data.path).name.split(".")[0] or "data"
    return f"{stem}-{spec.method.name}-{name[:8]}"


def check_place(place: Path, name: str) -> None:
    """Raise ResultsError unless the run, or nothing, is there, and files can be made there."""
    record = provenance.read_json(place / "record.json")
    if record is not None and record.get("fingerprint") != name:
        raise results.ResultsError(
            f"{place} holds a run of other settings, data or code ({record.get('fingerprint')}, not"
            f" {name}); choose another --out"
        )
    if record is None and place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise results.ResultsError(f"{place} is there and holds no run; choose another --out")
    above = next(p for p in (place.absolute(), *place.absolute().parents) if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise results.ResultsError(f"cannot write to {place}: {above} is not a writable directory")


def saves(out: Path) -> Path:
    """Where the checkpoints of a run lie until it is over."""
    return out.absolute().with_name(f"{out.name}.checkpoints")


def finished(job: Job) -> dict | None:
    """The record, when this very run was done before."""
    return once(lambda: provenance.read_json(job.out / "record.json"))


def start_line(job: Job) -> str:
    """What must be right before training starts."""
    begun, spec = job.start, job.spec.method
    parts = (begun.method, begun.trainable, begun.frozen)
    line = guards(spec.label, *parts, count(begun.base.params))
    return f"{line}; learning rate {spec.learning_rates[0]:g}"


def sizes(job: Job) -> str:
    """Rows of each split, in one line."""
    parts = []
    for name, encoded in job.encoded.items():
        cut = f", {encoded.num_truncated:,} cut" if encoded.num_truncated else ""
        seen = job.data.repeated.get(name, 0)
        seen = f", {seen:,} also trained on" if seen else ""
        parts.append(f"{name} {len(encoded.sequences):,} rows{cut}{seen}")
    return f"{job.data.kind}: " + "; ".join(parts)


def make_batches(job: Job):
    """The batches of the training rows."""
    encoded, spec = job.encoded["train"], job.spec
    make = partial(
        data.make_batches,
        encoded.sequences,
        batch_size=spec.train.batch_size,
        seed=spec.seed,
        pad_id=job.text.pad_id,
        own=sharding.own_rows(spec.train.batch_size, job.start.mesh),
        max_width=spec.train.max_length,
    )
    if job.data.kind == "classification":
        return data.LabelledBatches(make(least=1), job.data.splits["train"].labels)
    if job.data.kind == "masked-lm":
        rows = make(least=1, counted=encoded.counted)
        return masking.MaskedBatches(rows, encode.masker_of(job.text.tokenizer))
    return make(counted=encoded.counted)


def execute(job: Job, note: Callable, mirror: Mirror, curves: Path | None = None) -> dict:
    """Do the run, from its newest checkpoint where there is one, and write its directory, whole or
    not at all; its record. mirror: of the folder that it lies in. curves: for TensorBoard.

    Raises ResultsError while another process does the same run.
    """
    place = saves(job.out)
    with claim(place / "claim") as mine:
        if not mine:
            raise results.ResultsError(f"another process is doing this run: {job.out}")
        once(lambda: results.clear_partial(job.out.absolute()))
        once(lambda: mirror.fetch(job.out.name))
        check_place(job.out, job.fingerprint)
        group, seconds = f"{place.name}/{job.fingerprint}", job.spec.train.checkpoint_seconds
        checkpoints = checkpoints_of(mirror, group, job.fingerprint, seconds, note)
        try:
            if (record := finished(job)) is None:  # nor by another just before
                record = train_and_write(job, checkpoints, note, curves)
            once(lambda: mirror.push(job.out.name))
            checkpoints.remove()
            return record
        except train.DivergedError:  # and would again
            checkpoints.remove()
            raise
        finally:
            if is_first() and not any(place.glob("*/*")):
                shutil.rmtree(place, ignore_errors=True)


def train_and_write(
    job: Job, checkpoints: Checkpoints, note: Callable[[str], None], curves: Path | None
) -> dict:
    """Train and measure, and write the run's directory; its record."""
    spec, (graphdef, trainable, frozen) = job.spec, job.start.parts
    note(sizes(job))
    note(start_line(job))
    began = time.perf_counter()
    program = make_program(spec.train, job.start.method, graphdef, trainable)
    batches = make_batches(job)
    held_out = [name for name in job.encoded if name != "train"]

    def outputs(trainable, name):
        labels = job.data.splits[name].labels
        model = (program.apply, (trainable, frozen))
        return observe(
            job.data.kind, *model, job.encoded[name], labels, spec.eval_batch_size, job.text.pad_id
        )

    before = {name: outputs(trainable, name) for name in held_out}
    best = {}

    def validate(state) -> float:
        found = before["validation"] if state is trainable else outputs(state, "validation")
        loss = mean_loss(found)
        if not best or loss < best["loss"]:  # the state that is kept
            best.update(loss=loss, outputs=found)
        return loss

    log, num_trainable = [], count(trainable)
    with Progress(train.num_steps(batches, spec.train.epochs)) as progress:
        fitted = fit(
            spec.train,
            program,
            trainable=trainable,
            frozen=frozen,
            batches=batches,
            peak=spec.method.learning_rates[0],
            validate=validate,
            log=progress_log(progress, spec.method.label, log, curves),
            key=jax.random.key(spec.seed),
            loss=train.LOSSES[job.start.base.head.kind],
            checkpoints=checkpoints,
        )
    kept = sharding.put(fitted.trainable, job.start.mesh)
    if fitted.resumed_at:  # the best state may be of an earlier session
        best["outputs"] = outputs(kept, "validation")
    after = {
        name: best["outputs"] if name == "validation" else outputs(kept, name) for name in held_out
    }
    record = new_record(job, before, after, fitted, num_trainable)
    record["padding_fraction"] = round(batches.padding_fraction(), 4)
    record["seconds"] = {
        "train": round(fitted.seconds, 3),
        "all": round(time.perf_counter() - began, 3),
    }
    write(job, record, log, after, models.by_path(fitted.trainable))
    return record


def new_record(job: Job, before: dict, after: dict, fitted: train.Fitted, trained: int) -> dict:
    """What a run's record says."""
    spec, model = job.spec, job.start.base
    majority = None
    if job.data.kind == "classification":
        majority = model.head.labels[np.bincount(job.data.splits["train"].labels).argmax()]
    return {
        "fingerprint": job.fingerprint,
        "model": {
            "path": spec.model.path,
            "weights_hash": job.weights_hash,
            "family": model.family,
            "head": model.head.kind,
            "labels": list(model.head.labels),
            "adapter_hash": job.start.adapter_hash,
        },
        "kind": job.data.kind,
        "method": {"name": spec.method.name, **plain(spec.method.options())},
        "label": spec.method.label,
        "learning_rate": spec.method.learning_rates[0],
        "seed": spec.seed,
        "effective_scale": job.start.method.scale,
        "effective_scales": lora.scales(*job.start.parts),
        "trainable_parameters": trained,
        "total_parameters": count(model.params),
        "dtypes": {"trainable": dtypes(fitted.trainable), "frozen": dtypes(job.start.frozen)},
        "data_hash": text.data_hash(job.data),
        "splits": {
            name: {
                "rows": len(encoded.sequences),
                "tokens": sum(map(len, encoded.sequences)),
                "truncated": encoded.num_truncated,
                "also_trained_on": job.data.repeated.get(name, 0),
                "hash": text.split_hash(job.data.splits[name].ids),
            }
            for name, encoded in job.encoded.items()
        },
        "majority_class": majority,
        "num_steps": fitted.num_steps,
        "best_step": fitted.best_step,
        "validation_loss": fitted.validation_loss,
        "resumed_at": fitted.resumed_at,
        "tokens_per_second": round(fitted.tokens_per_second, 1),
        "metrics": [
            {"split": split, "when": when, **metric}
            for split in after
            for when, arrays in (("before", before[split]), ("after", after[split]))
            for metric in measure(arrays, spec.level, model.head, majority)
        ],
        "peak_memory_mb": provenance.peak_memory_mb(),
        "environment": provenance.environment() | sharding.describe(job.start.mesh),
    }


def resolved(job: Job) -> dict:
    """The run's configuration as plain JSON, complete enough to rebuild the model from it."""
    spec, model = job.spec, job.start.base
    local = Path(spec.model.path).expanduser().is_dir()
    path = str(job.start.directory.resolve()) if local else spec.model.path
    config = {
        "model": {
            "path": path,
            "revision": spec.model.revision,
            "dtype": dtypes(model.params)[0],
            "head": {"kind": model.head.kind, "labels": list(model.head.labels)},
        },
        "method": {"name": spec.method.name, **plain(spec.method.options())},
        "seed": spec.seed,
    }
    config["learning_rate"] = spec.method.learning_rates[0]
    config["data"] = {**plain(spec.data), "kind": job.data.kind, "labels": list(job.data.classes)}
    rest = {
        name: plain(getattr(spec, name)) for name in ("train", "eval_batch_size", "level", "mesh")
    }
    rest["train"].pop("learning_rate")
    return config | rest


def write(job: Job, record: dict, log: list[dict], outputs: dict, weights: Mapping) -> None:
    """The run's directory."""
    predictions = {
        f"{name}/{key}": array
        for name, arrays in outputs.items()
        for key, array in {"ids": np.array(job.data.splits[name].ids), **arrays}.items()
    }

    def fill(partial: Path) -> None:
        (partial / "config.json").write_text(json.dumps(resolved(job), indent=1))
        (partial / "record.json").write_text(json.dumps(record, indent=1))
        splits = {name: list(split.ids) for name, split in job.data.splits.items()}
        (partial / "splits.json").write_text(json.dumps(splits))
        results.write_trained_on(partial, text.hashes(job.data.splits["train"].inputs))
        (partial / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
        np.savez_compressed(partial / "predictions.npz", **predictions)

    begun = trainable_file.begin(job.out, weights)
    once(lambda: results.write_directory(job.out, fill, begun))


def summary(record: dict) -> list[str]:
    """What a finished run says on the terminal."""
    groups: dict[str, list[dict]] = {}
    for metric in record["metrics"]:
        groups.setdefault(f"{metric['split']} {metric['when']}", []).append(metric)
    return [f"{name}: {sentence(metrics)}" for name, metrics in groups.items()]
