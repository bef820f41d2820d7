"""The loop around the step of a sweep, as `train.fit` is for a single run."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_lowrank import train
from jax_lowrank.adapt import padded
from jax_lowrank.checkpoint import Checkpoints, Interrupted
from jax_lowrank.sweep import step as compiled
from jax_lowrank.sweep.cells import (
    Cell,
    OwnBatches,
    Program,
    States,
    share_out,
    spread,
    stack,
)
from jax_lowrank.sweep.step import Plan
from jax_lowrank.train import DivergedError, Fitted


def fit(
    *,
    program: Program,
    cells: Sequence[Cell],
    batches,
    validate: Callable[[States], Sequence[float]],
    log: Callable[[int, dict], None],
    steps_per_call: int = 32,
    plan: Plan | None = None,
    mesh: Mesh | None = None,
    checkpoints: Checkpoints | None = None,
) -> list[Fitted | DivergedError]:
    """`train.fit` of every cell, in the order of `cells`: what it returns, or what it would raise.

    batches: one for all cells, or OwnBatches. validate: losses of the stacked models (K,), those of
    surplus ones included or not. log: gets a cell's number and its line. plan: how many cells are
    computed at once; None: see `step.plan`. mesh: devices of one process that share the
    cells, all at once, each with the whole base; None: one device. checkpoints: of the whole sweep,
    as `train.fit` has them of a run. Seconds and speeds of a cell count its share of the sweep's
    time.

    Raises what `stack` raises and, with checkpoints, what `train.fit` raises of them.
    """
    if mesh is not None:
        plan = Plan(1, math.ceil(len(cells) / mesh.size) * mesh.size)
    elif plan is None:
        tokens = compiled.tokens_of(batches)
        plan = compiled.plan(len(cells), tokens, compiled.num_lanes())
    stacked = spread(stack(program, cells, plan.lanes * plan.size), mesh)
    run = Sweep(program, cells, stacked, batches, validate, log, plan, mesh)
    epoch = batches.steps_per_epoch
    with checkpoints or contextlib.nullcontext():
        if not run.resume(checkpoints):
            run.validated()
        while living := run.living(run.step):
            stop = min((run.step // epoch + 1) * epoch, *(run.ends[k] for k in living))
            for step, chunk in train.chunks(batches, run.step, stop, steps_per_call):
                run.advance(step, chunk, steps_per_call)
                if run.step < stop:
                    run.save_if_due(checkpoints)
            run.report()
            run.validated()
            run.save_if_due(checkpoints)
    return run.outcomes()


class Best(NamedTuple):
    """The best validation of a cell so far."""

    step: int
    loss: float


class Sweep:
    """Where a sweep is, and the call whose numbers are awaited."""

    def __init__(self, program, cells, stacked, batches, validate, log, plan, mesh):
        self.program, self.cells, self.batches = program, cells, batches
        self.validate, self.log, self.plan, self.mesh = validate, log, plan, mesh
        self.layers, self.likes = stacked.layers, stacked.likes
        self.trainable, self.own, self.shared = stacked.states
        self.settings = stacked.settings
        self.opt = share_out(compiled.init(program, self.trainable, self.settings), mesh)
        self.ends = [cell.schedule.num_steps for cell in cells]
        self.paired = not isinstance(batches, OwnBatches)
        self.step, self.tokens, self.pending = 0, [0] * len(cells), None
        self.errors: dict[int, DivergedError] = {}
        self.lines: list[list[dict]] = [[] for _ in cells]
        self.resumed_at: tuple[int, ...] = ()
        self.found = [Best(0, math.inf)] * len(cells)
        self.best = jax.tree.map(np.array, self.trainable)
        self.began = time.perf_counter()

    def arrays(self) -> dict[str, Any]:
        """Every array that the rest of the sweep depends on and that the cells do not give.

        On one device those of surplus cells are left out: with other lanes there are others.
        """
        state = {"trainable": self.trainable, "opt_state": self.opt, "best": self.best}
        if self.mesh is not None:
            return state
        return jax.tree.map(lambda x: x[: len(self.cells)], state)

    def resume(self, checkpoints: Checkpoints | None) -> bool:
        """Go on where the newest good checkpoint is; whether there was one."""
        saved = checkpoints.restore(self.arrays()) if checkpoints else None
        if saved is None:
            return False
        total = len(self.settings.clip)
        state = jax.tree.map(lambda x: _filled(x, total), saved.state)
        self.trainable, self.opt = state["trainable"], state["opt_state"]
        self.best = jax.tree.map(np.array, state["best"])
        facts = saved.facts
        self.step, self.tokens, self.lines = facts["step"], facts["tokens"], facts["lines"]
        self.found = [Best(*pair) for pair in facts["found"]]
        self.errors = {k: DivergedError(step, loss) for k, step, loss in facts["errors"]}
        self.resumed_at = (*facts["resumed_at"], self.step)
        self.began -= facts["seconds"]
        for k, lines in enumerate(self.lines):
            for line in lines:
                self.log(k, {**line, "resumed": True})
        return True

    def save_if_due(self, checkpoints: Checkpoints | None) -> None:
        """Save when it is time to, or when a signal asked for it; then raise Interrupted."""
        if checkpoints is None or not checkpoints.due():
            return
        self.report()
        names = ("step", "tokens", "lines", "found", "resumed_at")
        facts = {name: getattr(self, name) for name in names}
        facts["errors"] = [(k, error.step, error.loss) for k, error in self.errors.items()]
        facts["seconds"] = time.perf_counter() - self.began
        checkpoints.save(self.step, self.arrays(), facts)
        if checkpoints.asked:
            checkpoints.wait()
            raise Interrupted(f"stopped after step {self.step} of {max(self.ends)}")

    def tell(self, k: int, line: dict) -> None:
        """Log a line of a cell, and keep it for checkpoints."""
        self.lines[k].append(line)
        self.log(k, line)

    def living(self, step: int) -> list[int]:
        """The cells that train at a step, as far as is known."""
        return [k for k, end in enumerate(self.ends) if end > step and k not in self.errors]

    def advance(self, step: int, chunk, length: int) -> None:
        """Start one compiled call; while it runs, read the numbers of the call before."""
        count = len(chunk.tokens)
        steps = np.arange(step, step + count)
        total = len(self.settings.clip)
        rates = np.zeros((total, length), np.float32)  # 0 after a cell's end, which moves nothing
        for k, cell in enumerate(self.cells):
            rates[k, :count] = np.where(steps < self.ends[k], cell.schedule(steps), 0)
        chunk = train.fill(chunk, length)
        if not self.paired:
            surplus = total - len(self.cells)
            chunk = jax.tree.map(lambda x: _cells_first(x, surplus), chunk)

        def run(state, beside):
            (trainable, opt), (own, settings, rates, mine) = state, beside
            return compiled.run_cells(
                program=self.program,
                size=self.plan.size,
                paired=self.paired,
                trainable=trainable,
                opt=opt,
                own=own,
                shared=self.shared,
                settings=settings,
                batches=chunk if self.paired else mine,
                rates=rates,
                count=count,
                first=step,
            )

        beside = (self.own, self.settings, rates, () if self.paired else chunk)
        trainable, opt, losses, norms = compiled.run_lanes(
            self.plan.lanes, run, (self.trainable, self.opt), beside
        )
        self.trainable, self.opt = share_out((trainable, opt), self.mesh)  # as the next call's
        self.step = step + count
        living = self.living(step)
        for k in living:
            self.tokens[k] += count * math.prod(chunk.tokens.shape[-2:])
        self.report()
        self.pending = (step, count, living, losses, norms, rates[:, count - 1])

    def report(self) -> None:
        """Wait for the pending call; log its lines and note what diverged."""
        if self.pending is None:
            return
        (step, count, living, losses, norms, rates), self.pending = self.pending, None
        losses, norms = np.asarray(losses)[:, :count], np.asarray(norms)
        share = (time.perf_counter() - self.began) / len(self.cells)
        for k in living:
            if k in self.errors:
                continue
            bad = np.flatnonzero(~np.isfinite(losses[k]))
            if bad.size:
                self.errors[k] = DivergedError(step + int(bad[0]) + 1, float(losses[k, bad[0]]))
                continue
            self.tell(
                k,
                {
                    "step": step + count,
                    "num_steps": self.ends[k],
                    "loss": float(losses[k].mean()),
                    "gradient_norm": float(norms[k, count - 1]),
                    "learning_rate": float(rates[k]),
                    "tokens_per_second": round(self.tokens[k] / share, 1),
                },
            )

    def validated(self) -> None:
        """Log the validation of the cells that are due, and keep the states that are the best."""
        epoch = self.batches.steps_per_epoch
        due = [
            k
            for k, end in enumerate(self.ends)
            if k not in self.errors
            and (self.step == end or (self.step < end and self.step % epoch == 0))
        ]
        losses = self.validate(States(self.trainable, self.own, self.shared))
        better = []
        for k in due:
            loss = float(losses[k])
            if self.step and not math.isfinite(loss):
                self.errors[k] = DivergedError(self.step, loss)
                continue
            self.tell(k, {"step": self.step, "validation_loss": loss})
            if loss < self.found[k].loss:
                self.found[k] = Best(self.step, loss)
                better.append(k)
        if better and self.step:
            for kept, new in zip(jax.tree.leaves(self.best), jax.tree.leaves(self.trainable)):
                kept[better] = np.asarray(new)[better]

    def outcomes(self) -> list[Fitted | DivergedError]:
        """What became of every cell."""
        seconds = time.perf_counter() - self.began
        out = []
        for k, end in enumerate(self.ends):
            if k in self.errors:
                out.append(self.errors[k])
                continue
            state = jax.tree.map(lambda x: x[k], self.best)  # noqa: B023
            state = padded.cut(state, self.layers[k], self.likes[k])
            share = seconds * end / sum(self.ends)
            speed = self.tokens[k] / share
            out.append(Fitted(state, *self.found[k], end, share, speed, self.resumed_at))
        return out


def _filled(x, total: int):
    """(K, ...) -> (total, ...), the last cell again for the surplus ones."""
    if len(x) == total:
        return x
    return (np if isinstance(x, np.ndarray) else jnp).concatenate([x, *[x[-1:]] * (total - len(x))])


def _cells_first(x: np.ndarray, surplus: int) -> np.ndarray:
    """(steps, K, ...) -> (K + surplus, steps, ...), the last cell again for the surplus ones."""
    x = np.moveaxis(x, 1, 0)
    return np.concatenate([x, *[x[-1:]] * surplus])
