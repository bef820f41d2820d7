"""Topology as a seed: the same few steps on several meshes, beside other seeds on one mesh.

Sums are made in another order on another mesh. With one LoRA factor at zero the first Adam steps
are nearly signs of gradients, so that a difference in the last bit can grow (marin issue 4903).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jax_lowrank import provenance, results, sharding, train
from jax_lowrank.adapt import METHODS
from jax_lowrank.config import MeshSpec, MethodSpec, Study, require
from jax_lowrank.study.parts import Prepared
from jax_lowrank.study.prepare import prepare
from jax_lowrank.study.training import make_program


class Trial(NamedTuple):
    """One short training: on which mesh, from which seed, and what came of it."""

    method: str
    mesh: str
    seed: int
    losses: tuple[float, ...]  # nats per token or row, of every step
    validation_loss: float


def meshes(num_devices: int) -> dict[str, tuple[MeshSpec, Callable[[list], list]]]:
    """Name -> mesh and order of devices: each axis alone, a mixture, and the reverse order."""
    same, reverse = list, lambda devices: devices[::-1]
    n = num_devices
    found = {
        "one device": (MeshSpec(1, 1, 1), same),
        f"data {n}": (MeshSpec(n, 1, 1), same),
        f"fsdp {n}": (MeshSpec(1, n, 1), same),
        f"fsdp {n}, devices reversed": (MeshSpec(1, n, 1), reverse),
        f"tensor {n}": (MeshSpec(1, 1, n), same),
    }
    if n % 2 == 0 and n > 2:
        found[f"fsdp {n // 2} x tensor 2"] = (MeshSpec(1, n // 2, 2), same)
        found[f"fsdp {n // 2} x tensor 2, devices reversed"] = (MeshSpec(1, n // 2, 2), reverse)
    if n % 8 == 0:
        found[f"data 2 x fsdp {n // 4} x tensor 2"] = (MeshSpec(2, n // 4, 2), same)
    return found


def run(study: Study, out: Path, steps: int, note: Callable[[str], None]) -> str:
    """Do the audit and write audit.json under `out`; what it found."""
    require(steps > 0, f"--steps {steps} is below 1; 20 is a common number")
    trials = audit(study, out, steps, note)
    path = write(out, trials)
    return f"{table(trials)}\naudit: {path}"


def audit(study: Study, out: Path, steps: int, note: Callable[[str], None]) -> list[Trial]:
    """Train every method for `steps` steps on every mesh, and for every seed on the first of them.

    Raises ConfigError or MeshError where there is one device, or rows do not divide.
    """
    devices = jax.devices()
    require(
        len(devices) > 1,
        "an audit of topologies needs several devices; on CPU"
        " XLA_FLAGS=--xla_force_host_platform_device_count=8 makes 8",
    )
    trials = []
    for number, (name, (spec, order)) in enumerate(meshes(len(devices)).items()):
        p = prepare(dataclasses.replace(study, mesh=spec), out, note, order(devices))
        for method in study.methods:
            for seed in study.seeds[: None if number == 0 else 1]:
                trials.append(trial(p, method, name, seed, steps))
                note(f"{method.label}, {name}, seed {seed}: {trials[-1].validation_loss:.6f}")
    return trials


def trial(p: Prepared, spec: MethodSpec, name: str, seed: int, steps: int) -> Trial:
    """`steps` steps of a method with its first learning rate."""
    method, key = METHODS[spec.name](**spec.options()), jax.random.key(seed)
    graphdef, trainable, frozen = method.split(key, p.model)
    trainable, frozen = sharding.put((trainable, frozen), p.mesh)
    program = make_program(p.study.train, method, graphdef, trainable)
    rows, held_out = (p.kind.examples(p, split) for split in ("train", "validation"))
    last, log = [], []

    def validate(state) -> float:
        last[:] = [p.kind.validate(p, program.apply, (state, frozen), held_out)]
        return last[0]

    train.fit(
        apply=program.apply,
        loss=p.kind.loss,
        optimizer=program.optimizer,
        trainable=trainable,
        frozen=frozen,
        batches=p.kind.batches(p, rows, seed),
        schedule=train.make_schedule(
            spec.learning_rates[0], steps, p.study.train.warmup_fraction, p.study.train.schedule
        ),
        validate=validate,
        log=log.append,
        accumulate=p.study.train.accumulate,
        steps_per_call=1,
        key=key,
    )
    losses = tuple(line["loss"] for line in log if "loss" in line)
    return Trial(spec.label, name, seed, losses, last[0])


def write(out: Path, trials: list[Trial]) -> Path:
    """audit.json: every trial, and the environment."""
    path = out / "audit.json"
    content = {"environment": provenance.environment(), "trials": [t._asdict() for t in trials]}
    results.write_whole(path, json.dumps(content, indent=1))
    return path


def table(trials: list[Trial]) -> str:
    """For every method: the spread over meshes beside that over seeds, after the last step."""
    first = trials[0].mesh
    lines = ["method: largest difference in validation loss (and in the last step's loss)"]
    for method in dict.fromkeys(t.method for t in trials):
        own = [t for t in trials if t.method == method]
        seeds = [t for t in own if t.mesh == first]
        topologies = [t for t in own if t.seed == seeds[0].seed]
        over_meshes, over_seeds = spread(topologies), spread(seeds)
        share = over_meshes[0] / over_seeds[0] if over_seeds[0] else math.nan
        lines.append(
            f"  {method}: {over_meshes[0]:.2e} ({over_meshes[1]:.2e}) over {len(topologies)}"
            f" meshes; {over_seeds[0]:.2e} ({over_seeds[1]:.2e}) over {len(seeds)} seeds;"
            f" meshes / seeds {share:.2g}"
        )
    return "\n".join(lines)


def spread(trials: list[Trial]) -> tuple[float, float]:
    """Largest minus smallest validation loss, and loss of the last step; NaN for one trial."""
    if len(trials) < 2:
        return math.nan, math.nan
    return float(np.ptp([t.validation_loss for t in trials])), float(
        np.ptp([t.losses[-1] for t in trials])
    )
