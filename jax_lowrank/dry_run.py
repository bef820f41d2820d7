"""What a run would do, in how many steps and how much memory, without doing it."""

from __future__ import annotations

import json

import jax
import numpy as np

from jax_lowrank import finetune, train
from jax_lowrank.study.training import make_program


def describe(job: finetune.Job) -> str:
    """What a run would do, and in how much memory: for --dry-run. Compiles a step to know it."""
    spec, (graphdef, trainable, frozen) = job.spec, job.parts
    program, batches = (
        make_program(spec.train, job.method, graphdef, trainable),
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
        loss=finetune.loss_for(job.data.kind),
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
    parts = ", ".join(f"{name} {megabytes(size)}" for name, size in amounts.items())
    return (
        f"{json.dumps(finetune.resolved(job), indent=1)}\n"
        f"{finetune.sizes(job)}\n{finetune.start_line(job)}\n"
        f"steps: {steps:,} ({batches.steps_per_epoch:,} an epoch), at most"
        f" {spec.train.batch_size} x {batches.width(widest)} tokens each\n"
        f"memory: {parts}; {megabytes(sum(amounts.values()))} in all, beside Python's own\n"
        f"would write {job.out}: {', '.join(finetune.FILES)}, trainable.safetensors"
        f" ({megabytes(num_bytes(trainable))})"
    )


def num_bytes(tree) -> int:
    """Bytes of a pytree's arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def megabytes(size: int) -> str:
    """A number of bytes, for people."""
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"
