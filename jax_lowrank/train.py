"""The train step and the loop around it.

One compiled call runs several optimizer steps. Its arrays are (trainable, optimizer state, frozen,
batches); learning rates and the number of steps are arguments, so nothing compiles twice.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_lowrank import sharding
from jax_lowrank.adapt.method import Method, State, decay_mask
from jax_lowrank.checkpoint import Checkpoints, Interrupted
from jax_lowrank.data import Batch, Batches

ANYWHERE = sharding.keeper(None)  # one device


class DivergedError(ArithmeticError):
    """The loss became NaN or infinite; carries the step and the loss."""

    def __init__(self, step: int, loss: float):
        super().__init__(f"loss is {loss} at step {step}; lower the learning rate or clip harder")
        self.step, self.loss = step, loss


class Schedule(NamedTuple):
    """Learning rate by step: linear warm-up to the peak, then cosine, linear or constant."""

    peak: float
    num_steps: int
    warmup_steps: int
    shape: str

    def __call__(self, step: np.ndarray) -> np.ndarray:
        """Rates (N,) float32 of steps (N,), which count from 0; the last one is not yet 0."""
        step = np.asarray(step, np.float64)
        rest = max(1, self.num_steps - self.warmup_steps)
        done = np.clip((step - self.warmup_steps) / rest, 0, 1)
        decay = {"cosine": (1 + np.cos(np.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}
        warm = np.minimum(1.0, (step + 1) / max(1, self.warmup_steps))
        return (self.peak * warm * decay[self.shape]).astype(np.float32)


class Fitted(NamedTuple):
    """The trainable state at the best validation, and what training was like."""

    trainable: State  # on the host, see sharding.hold
    best_step: int
    validation_loss: float
    num_steps: int
    seconds: float  # with compilation, validation and earlier sessions
    tokens_per_second: float  # over those seconds
    resumed_at: tuple[int, ...]  # the steps at which it was continued from a checkpoint


def causal_lm_loss(apply: Callable, trainable: State, frozen: State, batch: Batch, key):
    """Summed -log p of each row's weighted tokens (B,), in nats, and the summed weights (B,)."""
    nll = apply(trainable, frozen).nll(batch.tokens, key=key)
    return (nll * batch.weights).sum(1), batch.weights.sum(1)


def classification_loss(apply: Callable, trainable: State, frozen: State, batch, key):
    """Each row's -log p of its class in nats (B,), 0 for rows that only fill up, and weights (B,).

    `batch`: a data.LabelledBatch.
    """
    logits = apply(trainable, frozen).classify(batch.tokens, batch.mask, key=key)
    picked = jnp.take_along_axis(logits, batch.labels[:, None], axis=1)[:, 0]
    nll = jax.nn.logsumexp(logits, axis=1) - picked
    return nll * batch.weights, batch.weights


def masked_lm_loss(apply: Callable, trainable: State, frozen: State, batch, key):
    """Summed -log p of each row's hidden tokens (B,) of a masking.MaskedBatch, and their number."""
    nll = apply(trainable, frozen).nll(*batch[:4], key=key)
    return (nll * batch.weights).sum(1), batch.weights.sum(1)


# kind of head -> loss
LOSSES: dict[str, Callable] = {
    "causal-lm": causal_lm_loss,
    "classification": classification_loss,
    "masked-lm": masked_lm_loss,
}


def make_optimizer(
    trainable: State, method: Method, *, weight_decay: float | jax.Array, clip: float | jax.Array
) -> optax.GradientTransformation:
    """Clip, then Adam (β 0.9, 0.999, ε 1e-8) as the method wants it, then decoupled decay.

    Its updates are to be multiplied by minus the learning rate. Where the method has `rates`, they
    multiply the whole update, decay included, as parameter groups of PyTorch do.
    """
    return optax.chain(
        optax.clip_by_global_norm(clip) if _acts(clip) else optax.identity(),
        method.transform(optax.scale_by_adam()),
        optax.add_decayed_weights(weight_decay, decay_mask(trainable))
        if _acts(weight_decay)
        else optax.identity(),
        scale_by(method.rates(trainable)) if method.rates else optax.identity(),
    )


def _acts(setting: float | jax.Array) -> bool:
    """Whether a setting has an effect; one that is data (see sweep.py) may have."""
    return isinstance(setting, jax.Array) or bool(setting)


def scale_by(factors: State) -> optax.GradientTransformation:
    """Multiply every update by its own factor."""
    return optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, factors))


@functools.partial(
    jax.jit,
    static_argnames=("apply", "loss", "optimizer", "accumulate", "keep"),
    donate_argnames=("trainable", "opt_state"),
)
def run_steps(
    *,
    apply,
    loss,
    optimizer,
    accumulate,
    trainable,
    opt_state,
    frozen,
    batches,
    rates,
    count,
    key,
    first=0,
    keep=ANYWHERE,
):
    """`count` optimizer steps on batches[:count] (K, B, S) at rates (K,).

    The gradient is that of the token-weighted mean over the whole step's rows, whatever
    `accumulate` is. `first` is the number of the first step: with the key it decides the dropout.
    `keep` says where the arrays of a state stay (see sharding.keeper).
    Returns trainable, opt_state and per-step loss and gradient norm (K,).
    """

    def summed(trainable, micro, key):
        total, weight = loss(apply, trainable, frozen, micro, key)
        return total.sum(), weight.sum()

    value_and_grad = jax.value_and_grad(summed, has_aux=True)

    def gradient(trainable, batch, key):
        if accumulate == 1:
            (total, weight), grads = value_and_grad(trainable, batch, key)
        else:
            # Micro-batch m takes every accumulate-th row from m on: rows stay on their devices.
            micros = jax.tree.map(
                lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch
            )

            def add(carry, numbered):
                micro, number = numbered
                out = value_and_grad(trainable, micro, jax.random.fold_in(key, number))
                return jax.tree.map(jnp.add, carry, out), None

            zeros = ((0.0, 0.0), jax.tree.map(jnp.zeros_like, trainable))
            ((total, weight), grads), _ = jax.lax.scan(add, zeros, (micros, jnp.arange(accumulate)))
        weight = jnp.maximum(weight, 1.0)
        return total / weight, jax.tree.map(lambda g: g / weight, grads)

    def body(i, carry):
        trainable, opt_state, losses, norms = carry
        batch = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), batches)
        value, grads = gradient(trainable, batch, jax.random.fold_in(key, first + i))
        with jax.numpy_dtype_promotion("standard"):  # optax needs it, also where strict is set
            updates, opt_state = optimizer.update(keep(grads), opt_state, trainable)
        opt_state = keep(opt_state)
        trainable = keep(jax.tree.map(lambda p, u: p - rates[i] * u, trainable, updates))
        norm = optax.tree.norm(grads)
        return trainable, opt_state, losses.at[i].set(value), norms.at[i].set(norm)

    empty = jnp.zeros(rates.shape, jnp.float32)
    return jax.lax.fori_loop(0, count, body, (trainable, opt_state, empty, empty))


def chunks(batches: Batches, start: int, stop: int, limit: int) -> Iterator[tuple[int, Batch]]:
    """(first step, stacked batches) of runs of equally wide batches, at most `limit` long."""
    step = start
    while step < stop:
        end = step + 1
        while end < min(stop, step + limit) and batches.width(end) == batches.width(step):
            end += 1
        rows = [batches.batch(t) for t in range(step, end)]
        yield step, type(rows[0])(*(np.stack(part) for part in zip(*rows)))
        step = end


def fit(
    *,
    apply: Callable,
    loss: Callable,
    optimizer: optax.GradientTransformation,
    trainable: State,
    frozen: State,
    batches: Batches,
    schedule: Schedule,
    validate: Callable[[State], float],
    log: Callable[[dict], None],
    accumulate: int = 1,
    steps_per_call: int = 32,
    key: jax.Array,
    checkpoints: Checkpoints | None = None,
) -> Fitted:
    """Train to the schedule's end, validating before the first step and after every epoch.

    The state with the lowest validation loss is returned. `trainable` is donated. `log` receives
    one dict per compiled call and per validation.

    checkpoints: to continue from, and to write at the ends of compiled calls. A continued run is
    the run that was never interrupted, bit for bit; only its times differ. Its earlier log lines
    come first, marked `resumed`.

    Raises DivergedError at the first step whose loss, or validation loss after it, is not finite,
    and, with checkpoints, Interrupted after a signal and CheckpointError for a save that failed.
    """
    mesh = sharding.mesh_of(trainable)
    compiled = functools.partial(
        run_steps,
        apply=apply,
        loss=loss,
        optimizer=optimizer,
        accumulate=accumulate,
        frozen=frozen,
        keep=sharding.keeper(mesh),
    )
    epoch, end = batches.steps_per_epoch, schedule.num_steps
    opt_state = sharding.put(optimizer.init(trainable), mesh)
    run = Training(trainable, opt_state, key, log, end, checkpoints)
    with checkpoints or contextlib.nullcontext():
        if not run.resume():
            run.validated(validate(trainable))
        while run.step < end:
            stop = min((run.step // epoch + 1) * epoch, end)
            # Groups are cut greedily, so that those after a group's end do not depend on its start.
            for step, stacked in chunks(batches, run.step, stop, steps_per_call):
                run.advance(compiled, step, stacked, schedule, steps_per_call)
                if run.step < stop:
                    run.save_if_due()
            run.report()
            run.validated(validate(run.trainable))
            run.save_if_due()
    seconds = time.perf_counter() - run.began
    return Fitted(
        run.best, run.best_step, run.best_loss, end, seconds, run.tokens / seconds, run.resumed_at
    )


class Training:
    """Where a run of `fit` is: what a checkpoint holds, and the call whose numbers are awaited."""

    def __init__(
        self,
        trainable: State,
        opt_state: Any,
        key: jax.Array,
        log: Callable[[dict], None],
        num_steps: int,
        checkpoints: Checkpoints | None,
    ):
        self.trainable, self.opt_state, self.key = trainable, opt_state, key
        self.log, self.num_steps, self.checkpoints = log, num_steps, checkpoints
        self.step, self.tokens, self.lines, self.resumed_at = 0, 0, [], ()
        self.best, self.best_step, self.best_loss = sharding.hold(trainable), 0, math.inf
        self.pending: tuple[Any, ...] | None = None
        self.began = time.perf_counter()
        self.mark = (self.began, 0)  # when speed was last told, and of how many tokens

    def arrays(self) -> dict[str, Any]:
        """Every array that the rest of the run depends on."""
        key = np.asarray(jax.random.key_data(self.key))
        state = {"trainable": self.trainable, "opt_state": self.opt_state, "best": self.best}
        return {**state, "key": key}

    def resume(self) -> bool:
        """Go on where the newest good checkpoint is; whether there was one."""
        saved = self.checkpoints.restore(self.arrays()) if self.checkpoints else None
        if saved is None:
            return False
        for leaf in jax.tree.leaves((self.trainable, self.opt_state)):
            leaf.delete()  # others still hold what this run will not need
        self.trainable, self.opt_state, self.best, key = (
            saved.state[name] for name in ("trainable", "opt_state", "best", "key")
        )
        self.key = jax.random.wrap_key_data(jnp.asarray(key), impl=jax.random.key_impl(self.key))
        facts = saved.facts
        self.step, self.tokens, self.lines = facts["step"], facts["tokens"], facts["lines"]
        self.best_step, self.best_loss = facts["best_step"], facts["best_loss"]
        self.resumed_at = (*facts["resumed_at"], self.step)
        self.mark, self.began = (self.began, self.tokens), self.began - facts["seconds"]
        for line in self.lines:
            self.log({**line, "resumed": True})
        return True

    def save_if_due(self) -> None:
        """Save when it is time to, or when a signal asked for it; then raise Interrupted."""
        if self.checkpoints is None or not self.checkpoints.due():
            return
        self.report()  # what is not finite is never saved
        names = ("step", "tokens", "lines", "best_step", "best_loss", "resumed_at")
        seconds = time.perf_counter() - self.began
        facts = {name: getattr(self, name) for name in names} | {"seconds": seconds}
        self.checkpoints.save(self.step, self.arrays(), facts)
        if self.checkpoints.asked:
            self.checkpoints.wait()
            raise Interrupted(f"stopped after step {self.step} of {self.num_steps}")

    def advance(
        self, compiled: Callable, step: int, stacked: Batch, schedule: Schedule, length: int
    ) -> None:
        """Start one compiled call; while it runs, read the numbers of the call before."""
        count = len(stacked.tokens)
        rates = schedule(np.arange(step, step + count))
        placed = sharding.put_own_rows(fill(stacked, length), self.trainable, axis=1)
        trainable, opt_state, losses, norms = compiled(
            trainable=self.trainable,
            opt_state=self.opt_state,
            batches=placed,
            rates=fill(rates, length),
            count=count,
            key=self.key,
            first=step,
        )
        self.trainable, self.opt_state = sharding.settle((trainable, opt_state))
        self.step = step + count
        self.tokens += count * math.prod(placed.tokens.shape[1:])
        self.report()
        self.pending = (step, count, losses, norms, float(rates[-1]), self.tokens)

    def report(self) -> None:
        """Wait for the pending call, and log it. Raises DivergedError where its loss is bad."""
        if self.pending is None:
            return
        (step, count, losses, norms, rate, tokens), self.pending = self.pending, None
        losses, norms = (x[:count] for x in sharding.fetch((losses, norms)))  # waits for the call
        (since, told), self.mark = self.mark, (time.perf_counter(), tokens)
        speed = (tokens - told) / (self.mark[0] - since)
        bad = np.flatnonzero(~np.isfinite(losses))
        if bad.size:
            raise DivergedError(step + int(bad[0]) + 1, float(losses[bad[0]]))
        self.tell(
            {
                "step": step + count,
                "num_steps": self.num_steps,
                "loss": float(losses.mean()),
                "gradient_norm": float(norms[count - 1]),
                "learning_rate": rate,
                "tokens_per_second": round(speed, 1),
            }
        )

    def validated(self, loss: float) -> None:
        """Log a validation, and keep the state when it is the best so far."""
        if self.step and not math.isfinite(loss):
            raise DivergedError(self.step, loss)
        self.mark = (time.perf_counter(), self.mark[1])
        self.tell({"step": self.step, "validation_loss": loss})
        if loss < self.best_loss:
            self.best, self.best_step = sharding.hold(self.trainable), self.step
            self.best_loss = loss

    def tell(self, line: dict) -> None:
        """Log a line, and keep it for checkpoints."""
        self.lines.append(line)
        self.log(line)


def fill(tree, length: int):
    """Pad the leading axis to `length`, so that every call has one shape."""
    return jax.tree.map(
        lambda x: np.concatenate([x, np.zeros((length - len(x), *x.shape[1:]), x.dtype)]), tree
    )


def num_steps(batches: Batches, epochs: int) -> int:
    """Optimizer steps of that many epochs."""
    return batches.steps_per_epoch * epochs


def make_schedule(peak: float, steps: int, warmup_fraction: float, shape: str) -> Schedule:
    """The schedule over `steps`, of which the fraction, rounded up, warms up."""
    return Schedule(peak, steps, math.ceil(warmup_fraction * steps), shape)
