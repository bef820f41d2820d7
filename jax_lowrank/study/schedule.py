"""The order of a study's runs, and sharing them with other workers on the same folder."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from typing import NamedTuple

from jax_lowrank import results, train
from jax_lowrank.config import MethodSpec, Run, Study
from jax_lowrank.processes import once
from jax_lowrank.progress import Progress
from jax_lowrank.study.parts import Prepared
from jax_lowrank.workers import claim

POLL = 1.0  # seconds between two looks at what other workers do


class Slot(NamedTuple):
    """A place in the grid: a run whose learning rate may not be chosen yet."""

    kind: str  # base, tune or final
    method: int = -1
    rate: float | None = None
    seed: int | None = None


def slots_of(study: Study) -> list[Slot]:
    """Base first; then, by method, the runs that choose a learning rate and the reported ones."""
    slots = [Slot("base")]
    for method in range(len(study.methods)):
        slots += tuning_of(study, method)
        slots += [Slot("final", method, None, seed) for seed in study.seeds]
    return slots


def tuning_of(study: Study, method: int) -> list[Slot]:
    """The runs that choose a method's learning rate."""
    rates = study.methods[method].learning_rates
    return [Slot("tune", method, rate, study.tune_seed) for rate in rates]


def needed(study: Study, slots: list[Slot]) -> set[Slot]:
    """These, and the runs that they depend on."""
    methods = {slot.method for slot in slots if slot.kind == "final"}
    return set(slots).union(*(tuning_of(study, method) for method in methods))


def choose_rate(spec: MethodSpec, tuning: list[dict]) -> float:
    """The learning rate whose run has the lowest validation loss; diverged runs do not count."""
    losses = [r["validation_loss"] for r in tuning]
    usable = [(x, r) for x, r in zip(losses, spec.learning_rates) if x is not None]
    if not usable:
        raise train.DivergedError(tuning[0]["diverged"]["step"], math.nan)
    return min(usable)[1]


class Schedule:
    """Does the runs of a study that nobody else does.

    name: Run -> its fingerprint. make: does a run and writes it; its record. A run is done under a
    claim, so that no two workers do it; the claim of a worker that dies is free again at once.
    """

    def __init__(
        self,
        prepared: Prepared,
        progress: Progress,
        name: Callable[[Prepared, Run], str],
        make: Callable[[Run], dict],
        skipped: Callable[[Run], None],
    ):
        self.prepared, self.study, self.progress = prepared, prepared.study, progress
        self.name, self.make, self.skipped = name, make, skipped
        self.records: dict[Slot, dict] = {}
        self.runs: dict[Slot, tuple[Run, str]] = {}

    def work(self, slots: list[Slot]) -> None:
        """Until all of these are finished, here or by others.

        What they depend on is done here as well, unless another worker is at it.
        """
        waiting = False
        while left := [slot for slot in slots if slot not in self.records]:
            before = len(self.records)
            for slot in left:
                self.record(slot, work=True)
            if all(slot in self.records for slot in slots):
                return
            if len(self.records) == before:
                if not waiting:
                    self.progress.note(f"waiting for other workers: {len(left)} runs")
                waiting = True
                time.sleep(POLL)

    def record(self, slot: Slot, *, work: bool) -> dict | None:
        """A slot's record: from disk, or, with `work`, made now. None: not finished, and another
        worker is at it, or at what it depends on.
        """
        if slot in self.records:
            return self.records[slot]
        rate = slot.rate
        if slot.kind == "final":
            tuning = [self.record(t, work=work) for t in tuning_of(self.study, slot.method)]
            if None in tuning:
                return None
            rate = choose_rate(self.study.methods[slot.method], tuning)
        record = self._find_or_make(slot, rate, work)
        if record is not None:
            self.records[slot] = record
        return record

    def _find_or_make(self, slot: Slot, rate: float | None, work: bool) -> dict | None:
        out = self.prepared.out
        if slot not in self.runs:
            spec = self.study.methods[slot.method] if slot.method >= 0 else None
            run = Run(slot.kind, spec, rate, slot.seed)
            self.runs[slot] = run, self.name(self.prepared, run)
        run, name = self.runs[slot]
        if not work:
            return once(lambda: results.finished(out, name))
        with claim(out / "claims" / name) as mine:
            record = once(lambda: results.finished(out, name))  # perhaps by another, just before
            if record is None and mine:
                once(lambda: results.clear_partial(out / "runs" / name))
                return self.make(run)
            if mine:  # else who made them is deleting them
                once(lambda: shutil.rmtree(out / "checkpoints" / name, ignore_errors=True))
        if record is not None:
            self.skipped(run)
        return record
