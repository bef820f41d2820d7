"""Which runs of a study are trained together, each as if it were alone (see jax_lowrank/sweep).

checkpoints/PACK.json says whose checkpoints lie in checkpoints/PACK: a pack that was interrupted
goes on with the same members, whatever has been done of them in between.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax

from jax_lowrank import memory, results
from jax_lowrank.adapt import METHODS, lora
from jax_lowrank.adapt.method import count, dtypes
from jax_lowrank.config import MethodSpec, Run, fingerprint
from jax_lowrank.processes import several
from jax_lowrank.study.parts import Prepared
from jax_lowrank.study.schedule import Named
from jax_lowrank.sweep.step import num_lanes, pack_limit, plan
from jax_lowrank.workers import claim

MOST = 16  # members: an adapter-step gets hardly cheaper, and other workers want their share
SHARE = 0.5  # of the memory, for a pack
COMPILING = 5e11  # floating-point operations of a CPU in the time that a program takes to compile
WIDER = 1.5  # work of a step with the largest adapter of a pack, of that with one's own; at most
# A step costs as much as its tokens and this share of a full pack's: on 2 CPU cores at 32 tokens,
# packs of 4 and 8 were seen at 0.63 and 0.57 of a single run. On accelerators it is a guess.
FIXED = 1 / 8
# What a step takes alone of its share of several at the same time (`step.Plan`): on 2 CPU cores
# 1.05 to 1.5 were seen, the more the smaller the model.
GAPS = 1.15


def form(run: Run) -> tuple | None:
    """Runs of one form can share a program, and of one seed every batch; None: this shares none.

    Rank, alpha, layers, initial values, learning rate, LoRA+ ratio and epochs are a member's own.
    Shadows have another number of rows, and so of steps.
    """
    spec, others = run.method, run.kind == "shadow"
    if spec is None or (spec.name == "full" and jax.default_backend() == "cpu"):
        return None  # full: nothing is shared, and small products side by side are slow on a CPU
    if spec.name != "lora":
        return (spec.name, others)
    # Of layers that are not adapted a magnitude would learn: under DoRA they must be the same ones.
    drawn = run.seed if spec.layers == "random" else None
    layers = (spec.layers, spec.layer_fraction, drawn) if spec.dora else ()
    from_base = spec.init in lora.FROM_BASE
    return (spec.name, others, spec.targets, spec.dropout, from_base, spec.dora, layers)


class Packing:
    """Sorts the runs of a study into packs.

    tokens: of an optimizer step of one run, pads included. steps: label -> steps of a run.
    beside(runs): of several seeds, tokens of a step of each, mean over them, alone and together.
    """

    def __init__(
        self,
        prepared: Prepared,
        tokens: int,
        steps: Mapping[str, int],
        beside: Callable[[Sequence[Run]], tuple[float, float]],
    ):
        self.p, self.tokens, self.steps, self.beside = prepared, tokens, steps, beside
        self.specs = {spec.label: spec for spec in prepared.study.methods}
        self.devices = 1 if prepared.mesh is None else prepared.mesh.size
        self.lanes = num_lanes() if self.devices == 1 else 1
        # Wider products gain nothing for runs of so many tokens, only cores without a run do.
        self.busy = self.devices * pack_limit() < 2 * tokens
        self.sizes: dict[str, int] = {}  # label -> parameters that are trained
        self.rooms: dict[str, int] = {}  # label -> runs that memory has room for

    def __call__(self, named: Sequence[Named]) -> list[list[Named]]:
        """Runs that are to be done now in packs, those first that were begun together."""
        if not self.possible():
            return [[one] for one in named]
        found, rest = [], list(named)
        for members in begun(self.p.out).values():
            part = [one for one in rest if one.name in members]
            rest = [one for one in rest if one.name not in members]
            found += [part] if part else []
        groups: dict = {}
        for one in rest:
            groups.setdefault(form(one.run) or one.name, []).append(one)
        for whole in groups.values():
            for group in [whole] if self.mixes(whole) else by_seed(whole):
                for pack in self.cut(group) if len(group) > 1 else [group]:
                    # Of several devices, those without a member would have nothing to do.
                    found += [pack] if len(pack) >= self.devices else [[one] for one in pack]
        return found

    def possible(self) -> bool:
        """Whether runs of this study are trained together at all.

        Not in several processes. Not on several devices that one run keeps busy by its rows: each
        would have to hold the whole base. Below float32, where together changes more than a
        result's last digits, only when the study asks for it.
        """
        wanted = self.p.study.train.sweep_size
        return (
            not several()
            and not (self.devices > 1 and self.busy)
            and wanted != 1
            and (wanted > 1 or dtypes(self.p.model.params) == ("float32",))
        )

    def resumes(self, one: Named) -> bool:
        """Whether a run was begun in a pack."""
        return self.possible() and any(one.name in pack for pack in begun(self.p.out).values())

    def mixes(self, group: list[Named]) -> bool:
        """Whether runs of several seeds are quicker together, each with batches of its own.

        A step is then as wide as the widest batch of any. Dropout draws by place in the batch, so
        that in a wider one a run would not be what it is alone.
        """
        seeds = Counter(one.run.seed for one in group)
        if len(seeds) == 1 or (self.busy and self.lanes == 1) or group[0].run.method.dropout:
            return False
        some = [part[0].run for part in by_seed(group)][:MOST]
        alone, together = self.beside(some)
        apart = self.step_cost(alone, max(seeds.values()))
        saved = apart - self.step_cost(together, len(group))
        base = count(self.p.model.params)
        work = sum(
            self.steps[one.run.label] * (4 * base + 6 * self.size(one.run.label)) for one in group
        )
        return saved * work > COMPILING  # another program is compiled for it

    def step_cost(self, tokens: float, num_runs: int) -> float:
        """What a run's step costs beside others, in tokens."""
        members = math.ceil(min(num_runs, max(MOST, self.devices)) / self.devices)
        lanes, size = plan(members, math.ceil(tokens), self.lanes)
        gaps = GAPS if lanes < self.lanes else 1
        return gaps * tokens + FIXED * pack_limit() / (lanes * size)

    def cut(self, group: list[Named]) -> list[list[Named]]:
        """Packs of runs of one form. All adapters of a pack are filled up to its largest."""
        by_label: dict[str, list[Named]] = {}
        for one in group:
            by_label.setdefault(one.run.label, []).append(one)
        labels = sorted(by_label, key=self.size, reverse=True)
        found = []
        while labels:
            joining = itertools.takewhile(lambda label: self.joins(label, labels[0]), labels)  # noqa: B023
            near = list(joining)
            # A run of each method in turn: packs of the same methods compile once.
            turns = itertools.zip_longest(*(by_label[label] for label in near))
            runs = [one for turn in turns for one in turn if one is not None]
            parts = math.ceil(len(runs) / self.most(labels[0], len(near)))
            even = math.ceil(len(runs) / parts)
            found += [runs[i : i + even] for i in range(0, len(runs), even)]
            labels = labels[len(near) :]
        return found

    def joins(self, label: str, largest: str) -> bool:
        """Whether to train a method in the program of a larger one, which is filled up with 0."""
        base, own, most = count(self.p.model.params), self.size(label), self.size(largest)
        if not self.busy:
            return 4 * base + 6 * most <= WIDER * (4 * base + 6 * own)
        runs = len(self.specs[label].learning_rates) + len(self.p.study.seeds)
        more = 6 * (most - own) * self.tokens * self.steps[label]
        return runs * more <= COMPILING

    def size(self, label: str) -> int:
        """How many parameters a method trains."""
        if label not in self.sizes:
            _, trainable, _ = memory.split(method_of(self.specs[label]), self.p.model)
            self.sizes[label] = count(trainable)
        return self.sizes[label]

    def most(self, label: str, num_methods: int) -> int:
        """How many members a pack may have, whose largest method is `label`."""
        most = max(MOST, self.devices)
        enough = min(most, max(num_methods, self.lanes)) if self.busy else most
        wanted = self.p.study.train.sweep_size or enough
        return 1 if wanted == 1 else max(1, min(wanted, self.room(label) * self.devices))

    def room(self, label: str) -> int:
        """How many runs of a method the memory of each device has room for."""
        if label not in self.rooms:
            t, method = self.p.study.train, method_of(self.specs[label])
            alone = memory.Sizes({"data": 1, "fsdp": 1, "tensor": 1})
            each = memory.estimate(self.p.model, method, t, t.batch_size, t.max_length, alone)
            free = SHARE * memory.of_this_device() - each.frozen
            # With its best state so far; XLA copies most of the others while packs take turns.
            kept = 2 * (each.trainable + each.optimizer)
            at_once = self.lanes * max(1, pack_limit() // self.tokens)
            few = free // (kept + each.step)
            many = (free - at_once * each.step) // kept
            # Several devices compute all of their members at once, one does in turns.
            self.rooms[label] = int(many if self.devices == 1 and few >= at_once else few)
        return self.rooms[label]


def by_seed(group: Sequence[Named]) -> list[list[Named]]:
    """Runs that see the same batches together."""
    found: dict = {}
    for one in group:
        found.setdefault(one.run.seed, []).append(one)
    return list(found.values())


def method_of(spec: MethodSpec):
    """The method that a spec names, with its options."""
    return METHODS[spec.name](**spec.options())


def begun(out: Path) -> dict[str, dict[str, list]]:
    """Packs with checkpoints: name -> fingerprint of a member -> its kind, label, rate and seed."""
    files = sorted((out / "checkpoints").glob("pack-*.json"))
    found = {}
    for file in files:
        with contextlib.suppress(FileNotFoundError):  # another worker has finished it
            found[file.stem] = json.loads(file.read_text(encoding="utf-8"))
    return found


@contextlib.contextmanager
def opened(
    out: Path, named: Sequence[Named], specs: Mapping[str, MethodSpec]
) -> Iterator[tuple[str, list[Named]]]:
    """The pack that runs were begun in, with all of its members, or a new one of them; its name.

    It is no longer there when the block is left without an error.
    """
    with contextlib.ExitStack() as held:
        for pack, members in begun(out).items():
            known = all(member[1] in specs for member in members.values())
            whole = known and {one.name for one in named} <= members.keys()
            if whole and held.enter_context(claim(out / "claims" / pack)):
                break
        else:
            pack = f"pack-{fingerprint([one.name for one in named])}"
            members = {
                one.name: [one.run.kind, one.run.label, one.run.learning_rate, one.run.seed]
                for one in named
            }
            held.enter_context(claim(out / "claims" / pack))
            (out / "checkpoints").mkdir(exist_ok=True)
            results.write_whole(out / "checkpoints" / f"{pack}.json", json.dumps(members))
        yield (
            pack,
            [
                Named(Run(kind, specs[label], rate, seed), name)
                for name, (kind, label, rate, seed) in members.items()
            ],
        )
        delete(out, pack)


def tidy(out: Path) -> None:
    """Delete the checkpoints of packs that were killed when all of their members were written."""
    for pack, members in begun(out).items():
        if all(results.finished(out, name) for name in members):
            with claim(out / "claims" / pack) as mine:
                if mine:
                    delete(out, pack)


def delete(out: Path, pack: str) -> None:
    """The checkpoints of a pack first: what names them is what finds them."""
    shutil.rmtree(out / "checkpoints" / pack, ignore_errors=True)
    (out / "checkpoints" / f"{pack}.json").unlink(missing_ok=True)
