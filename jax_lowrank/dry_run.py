"""What --dry-run prints: settings, sizes, memory and files of a command that is not carried out."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np

from jax_lowrank import export, finetune, models, results, train, trained
from jax_lowrank.adapt.method import count
from jax_lowrank.config import plain
from jax_lowrank.config_run import EvaluateSpec, GenerateSpec
from jax_lowrank.study.training import make_program


def finetuning(job: finetune.Job) -> str:
    """What a run would do, and in how much memory. Compiles a step to know it."""
    spec, (graphdef, trainable, frozen) = job.spec, job.start.parts
    program, batches = (
        make_program(spec.train, job.start.method, graphdef, trainable),
        finetune.make_batches(job),
    )
    steps = train.num_steps(batches, spec.train.epochs)
    state = jax.eval_shape(program.optimizer.init, trainable)
    widest = max(range(batches.steps_per_epoch), key=batches.width)
    limit = spec.train.steps_per_call
    stacked = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((limit, *x.shape), x.dtype), batches.batch(widest)
    )
    lowered = train.run_steps.lower(
        apply=program.apply,
        loss=train.LOSSES[job.start.base.head.kind],
        optimizer=program.optimizer,
        accumulate=spec.train.accumulate,
        trainable=trainable,
        opt_state=state,
        frozen=frozen,
        batches=stacked,
        rates=jax.ShapeDtypeStruct((limit,), np.float32),
        count=0,
        key=jax.random.key(spec.seed),
        first=0,
    )
    temporary = lowered.compile().memory_analysis().temp_size_in_bytes
    amounts = {
        "frozen": num_bytes(frozen),
        "trainable": num_bytes(trainable),
        "optimizer": num_bytes(state),
        "gradients and activations": temporary,
    }
    return (
        f"{json.dumps(finetune.resolved(job), indent=1)}\n"
        f"{finetune.sizes(job)}\n{finetune.start_line(job)}\n"
        f"steps: {steps:,} ({batches.steps_per_epoch:,} an epoch), at most"
        f" {spec.train.batch_size} x {batches.width(widest)} tokens each\n"
        f"{memory(amounts)}\n"
        f"would write {job.out}: config.json, record.json, splits.json, {results.TRAINED_ON},"
        " log.jsonl, predictions.npz, trainable.safetensors"
        f" ({megabytes(num_bytes(trainable))})"
    )


def generating(model: trained.Trained, prompts: list, spec: GenerateSpec) -> str:
    """What `generate` would do."""
    longest = max(map(len, trained.prompt_tokens(model, prompts, spec)))
    rows = len(prompts) * spec.samples
    at_once, slots = min(spec.batch_size, rows), longest + spec.max_new_tokens

    def cache(*states):
        return model.apply(*states).new_cache(at_once, slots)

    amounts = {
        "parameters": num_bytes(model.states),
        "keys, values and weights by layer": num_bytes(jax.eval_shape(cache, *model.states)),
    }
    return (
        f"{json.dumps(plain(spec), indent=1)}\n{described(model)}\n"
        f"prompts: {len(prompts):,} of at most {longest} tokens; {rows:,} continuations, {at_once}"
        f" at once\n"
        f"{memory(amounts)}\nwould print the continuations and write nothing"
    )


def evaluating(model: trained.Trained, spec: EvaluateSpec, out: str | None) -> str:
    """What `evaluate` would do."""
    kind, examples, encoded = trained.read_rows(model, spec)
    longest, rows = max(map(len, encoded.sequences)), len(examples.ids)
    files = f"{out}: metrics.json, predictions.npz" if out else "nothing; --out DIR keeps files"
    return (
        f"{json.dumps(plain(spec), indent=1)}\n{described(model)}\n"
        f"{kind}: {rows:,} rows, {encoded.num_truncated:,} cut; at most"
        f" {min(spec.batch_size, rows)} x {longest} tokens at once\n"
        f"{memory({'parameters': num_bytes(model.states)})}\nwould write {files}"
    )


def exporting(run: Path, format: str, out: Path | None) -> str:
    """What `export` would write. Everything is checked and made, and nothing written."""
    found, out = export.check(run, format, out)
    loaded = export.load_run(found)
    amounts = {"base": num_bytes(loaded.base.params), "trained": num_bytes(loaded.trainable)}
    if format == "hf":
        size, files = amounts["base"], ["config.json", *export.tokenizer_files(found.base)]
        number = -(-size // models.weights.SHARD_BYTES)
        weights = "model.safetensors" if number == 1 else f"about {number} shards"
        amounts["merged"] = size
    else:
        tensors = export.as_peft(found, loaded).tensors.values()
        weights, size = "adapter_model.safetensors", sum(tensor.nbytes for tensor in tensors)
        files = ["adapter_config.json"]
    settings = {"run": str(found.directory), "format": format, "base": str(found.base)}
    settings |= {"method": {"name": found.method, **plain(found.options)}}
    return (
        f"{json.dumps(settings, indent=1)}\n"
        f"{count(loaded.base.params):,} parameters, {count(loaded.trainable):,} trained\n"
        f"{memory(amounts)}\n"
        f"would write {out}: {weights} ({megabytes(size)}), {', '.join(files)}, README.md"
    )


def described(model: trained.Trained) -> str:
    """Family, head and parameters of a loaded model, in one line."""
    family, head = model.model.family, model.model.head
    return f"model: {family}, {head.kind} head; {count(model.states):,} parameters"


def memory(amounts: dict[str, int]) -> str:
    """Bytes of each part and in all, in one line."""
    parts = ", ".join(f"{name} {megabytes(size)}" for name, size in amounts.items())
    total = f"; {megabytes(sum(amounts.values()))} in all" if len(amounts) > 1 else ""
    return f"memory: {parts}{total}, beside Python's own"


def num_bytes(tree) -> int:
    """Bytes of a pytree's arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def megabytes(size: int) -> str:
    """A number of bytes, for people."""
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"
