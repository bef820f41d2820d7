"""The order of a study's runs, and sharing them with other workers on the same folder."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from jax_lowrank import results, train
from jax_lowrank.config import MethodSpec, Run, Study
from jax_lowrank.processes import once
from jax_lowrank.progress import Progress
from jax_lowrank.study.membership import FIRST_SEED
from jax_lowrank.study.parts import Prepared
from jax_lowrank.workers import claim, turn

CHOSEN = ("final", "shadow")  # trained at the learning rate that was chosen
POLL = 1.0  # seconds between two looks at what other workers do


class Slot(NamedTuple):
    """A place in the grid: a run whose learning rate may not be chosen yet."""

    kind: str  # base, tune, final or shadow
    method: int = -1
    rate: float | None = None
    seed: int | None = None


def slots_of(study: Study) -> list[Slot]:
    """Base first; by method, the runs that choose a learning rate and those reported; shadows."""
    slots, audit = [Slot("base")], study.membership
    for method in range(len(study.methods)):
        slots += tuning_of(study, method)
        slots += [Slot("final", method, None, seed) for seed in study.seeds]
    for method, spec in enumerate(study.methods):
        if audit and (not audit.methods or spec.label in audit.methods):
            seeds = range(FIRST_SEED, FIRST_SEED + audit.num_shadows)
            slots += [Slot("shadow", method, None, seed) for seed in seeds]
    return slots


def tuning_of(study: Study, method: int) -> list[Slot]:
    """The runs that choose a method's learning rate."""
    rates = study.methods[method].learning_rates
    return [Slot("tune", method, rate, study.tune_seed) for rate in rates]


def needed(study: Study, slots: list[Slot]) -> set[Slot]:
    """These, and the runs that they depend on."""
    methods = {slot.method for slot in slots if slot.kind in CHOSEN}
    return set(slots).union(*(tuning_of(study, method) for method in methods))


def choose_rate(spec: MethodSpec, tuning: list[dict]) -> float:
    """The learning rate whose run has the lowest validation loss; diverged runs do not count."""
    losses = [r["validation_loss"] for r in tuning]
    usable = [(x, r) for x, r in zip(losses, spec.learning_rates) if x is not None]
    if not usable:
        raise train.DivergedError(tuning[0]["diverged"]["step"], math.nan)
    return min(usable)[1]


class Named(NamedTuple):
    """A run, and its fingerprint."""

    run: Run
    name: str


class Schedule:
    """Does the runs of a study that nobody else does.

    name: Run -> its fingerprint. packs: sorts runs, all of which are to be done now, into those
    that are done together. make: does such runs and writes them; their records. A run is done under
    a claim, so that no two workers do it; the claim of a worker that dies is free again at once.
    """

    def __init__(
        self,
        prepared: Prepared,
        progress: Progress,
        name: Callable[[Prepared, Run], str],
        packs: Callable[[list[Named]], list[list[Named]]],
        make: Callable[[list[Named]], list[dict]],
        skipped: Callable[[Run], None],
    ):
        self.prepared, self.study, self.progress = prepared, prepared.study, progress
        self.name, self.packs, self.make, self.skipped = name, packs, make, skipped
        self.records: dict[Slot, dict] = {}
        self.runs: dict[Slot, Named] = {}

    def work(self, slots: list[Slot]) -> None:
        """Until all of these are finished, here or by others.

        What they depend on is done here as well, unless another worker is at it. Raises
        DivergedError, after all else is done, where every learning rate of a method diverged.
        """
        before = [slot for slot in slots_of(self.study) if slot in needed(self.study, slots)]
        waiting = False
        while left := [slot for slot in slots if slot not in self.records]:
            if self.attempt(left) or self.attempt(before):
                continue
            for slot in left:
                self.named(slot)  # one that never will have a rate says so here
            if not waiting:
                self.progress.note(f"waiting for other workers: {len(left)} runs")
            waiting = True
            time.sleep(POLL)

    def attempt(self, slots: list[Slot]) -> bool:
        """Find or make what is ready of these and not done; whether there is anything new."""
        known = len(self.records)
        ready = {}
        for slot in slots:
            with contextlib.suppress(train.DivergedError):
                if slot not in self.records and (named := self.named(slot)) is not None:
                    ready[named.name] = slot
        for pack in self.packs([self.runs[slot] for slot in ready.values()]):
            self.do([ready[named.name] for named in pack])
        return len(self.records) > known

    def record(self, slot: Slot) -> dict | None:
        """A slot's record; None while it is not finished."""
        if slot not in self.records and (named := self.named(slot)) is not None:
            record = once(lambda: results.finished(self.prepared.out, named.name))
            if record is not None:
                self.records[slot] = record
                self.skipped(named.run)
        return self.records.get(slot)

    def shared(self, slot: Slot) -> dict | None:
        """`record`, also of a run that another machine has put into the mirror."""
        if slot not in self.records and (named := self.named(slot)) is not None:
            once(lambda: self.prepared.mirror.fetch(f"runs/{named.name}"))
        return self.record(slot)

    def named(self, slot: Slot) -> Named | None:
        """The run of a slot; None while its learning rate is not chosen. Raises DivergedError where
        none can be."""
        if slot not in self.runs:
            spec = self.study.methods[slot.method] if slot.method >= 0 else None
            rate = slot.rate
            if slot.kind in CHOSEN:
                tuning = [self.record(t) for t in tuning_of(self.study, slot.method)]
                if None in tuning:
                    return None
                rate = choose_rate(spec, tuning)
            run = Run(slot.kind, spec, rate, slot.seed)
            self.runs[slot] = Named(run, self.name(self.prepared, run))
        return self.runs[slot]

    def do(self, slots: list[Slot]) -> None:
        """Make, together, those of these runs that are not finished and that nobody else is at."""
        out, mine = self.prepared.out, []
        with contextlib.ExitStack() as held:
            # One worker at a time, or two that come together would have every other run of a pack.
            with turn(out / "claims" / "choice", lambda: None, POLL / 20):
                for slot in slots:
                    if self.claimed(slot, held):
                        mine.append(slot)
            if mine:
                made = self.make([self.runs[slot] for slot in mine])
                self.records |= dict(zip(mine, made, strict=True))

    def claimed(self, slot: Slot, held: contextlib.ExitStack) -> bool:
        """Whether a run is to be done here: unfinished, and claimed until `held` is closed."""
        out, (run, name) = self.prepared.out, self.runs[slot]
        mine = held.enter_context(claim(out / "claims" / name))
        if mine:  # perhaps by another machine
            once(lambda: self.prepared.mirror.fetch(f"runs/{name}"))
        record = once(lambda: results.finished(out, name))  # perhaps by another, just before
        if record is None:
            if mine:
                once(lambda: results.clear_partial(out / "runs" / name))
            return mine
        if slot not in self.records:
            self.records[slot] = record
            self.skipped(run)
        if mine:  # else who made them is deleting them
            once(lambda: delete_checkpoints(out, name))
        return False


def delete_checkpoints(out: Path, name: str) -> None:
    """Those of a finished run."""
    shutil.rmtree(out / "checkpoints" / name, ignore_errors=True)
