"""The train step and the loop around it.

One compiled call runs several optimizer steps. Its arrays are (trainable, optimizer state, frozen,
batches); learning rates and the number of steps are arguments, so nothing compiles twice.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_lowrank.adapt.method import Method, State, decay_mask
from jax_lowrank.data import Batch, Batches


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
    """The trainable state at the best validation, on the host, and what training was like."""

    trainable: State
    best_step: int
    validation_loss: float
    num_steps: int
    seconds: float
    tokens_per_second: float


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


def make_optimizer(
    trainable: State, method: Method, *, weight_decay: float, clip: float
) -> optax.GradientTransformation:
    """Clip, then Adam (β 0.9, 0.999, ε 1e-8) as the method wants it, then decoupled decay.

    Its updates are to be multiplied by minus the learning rate. Where the method has `rates`, they
    multiply the whole update, decay included, as parameter groups of PyTorch do.
    """
    return optax.chain(
        optax.clip_by_global_norm(clip) if clip else optax.identity(),
        method.transform(optax.scale_by_adam()),
        optax.add_decayed_weights(weight_decay, decay_mask(trainable))
        if weight_decay
        else optax.identity(),
        scale_by(method.rates(trainable)) if method.rates else optax.identity(),
    )


def scale_by(factors: State) -> optax.GradientTransformation:
    """Multiply every update by its own factor."""
    return optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, factors))


@functools.partial(
    jax.jit,
    static_argnames=("apply", "loss", "optimizer", "accumulate"),
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
):
    """`count` optimizer steps on batches[:count] (K, B, S) at rates (K,).

    The gradient is that of the token-weighted mean over the whole step's rows, whatever
    `accumulate` is. `first` is the number of the first step: with the key it decides the dropout.
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
            micros = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)

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
            updates, opt_state = optimizer.update(grads, opt_state, trainable)
        trainable = jax.tree.map(lambda p, u: p - rates[i] * u, trainable, updates)
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
) -> Fitted:
    """Train to the schedule's end, validating before the first step and after every epoch.

    The state with the lowest validation loss is returned. `trainable` is donated. `log` receives
    one dict per compiled call and per validation.

    Raises DivergedError at the first step whose loss, or validation loss after it, is not finite.
    """
    opt_state = optimizer.init(trainable)
    epoch, end = batches.steps_per_epoch, schedule.num_steps
    best = (validate(trainable), 0, jax.device_get(trainable))
    log({"step": 0, "validation_loss": best[0]})
    began, tokens, pending = time.perf_counter(), 0, None
    for first in range(0, end, epoch):
        for step, stacked in chunks(batches, first, min(first + epoch, end), steps_per_call):
            count = len(stacked.tokens)
            rates = schedule(np.arange(step, step + count))
            trainable, opt_state, losses, norms = run_steps(
                apply=apply,
                loss=loss,
                optimizer=optimizer,
                accumulate=accumulate,
                trainable=trainable,
                opt_state=opt_state,
                frozen=frozen,
                batches=_fill(stacked, steps_per_call),
                rates=_fill(rates, steps_per_call),
                count=count,
                key=key,
                first=step,
            )
            tokens += stacked.tokens.size
            # Read the previous call's numbers while this one runs.
            _report(pending, log)
            pending = (step, count, losses, norms, rates, tokens, began, end)
        _report(pending, log)
        pending = None
        step = min(first + epoch, end)
        value = validate(trainable)
        if not math.isfinite(value):
            raise DivergedError(step, value)
        log({"step": step, "validation_loss": value})
        if value < best[0]:
            best = (value, step, jax.device_get(trainable))
    seconds = time.perf_counter() - began
    return Fitted(best[2], best[1], best[0], end, seconds, tokens / seconds)


def _fill(tree, length: int):
    """Pad the leading axis to `length`, so that every call has one shape."""
    return jax.tree.map(
        lambda x: np.concatenate([x, np.zeros((length - len(x), *x.shape[1:]), x.dtype)]), tree
    )


def _report(pending: tuple[Any, ...] | None, log: Callable[[dict], None]) -> None:
    if pending is None:
        return
    step, count, losses, norms, rates, tokens, began, end = pending
    losses = np.asarray(losses)[:count]  # waits until the call is done
    speed = tokens / (time.perf_counter() - began)
    bad = np.flatnonzero(~np.isfinite(losses))
    if bad.size:
        raise DivergedError(step + int(bad[0]) + 1, float(losses[bad[0]]))
    log(
        {
            "step": step + count,
            "num_steps": end,
            "loss": float(losses.mean()),
            "gradient_norm": float(np.asarray(norms)[count - 1]),
            "learning_rate": float(rates[-1]),
            "tokens_per_second": round(speed, 1),
        }
    )


def num_steps(batches: Batches, epochs: int) -> int:
    """Optimizer steps of that many epochs."""
    return batches.steps_per_epoch * epochs


def make_schedule(peak: float, steps: int, warmup_fraction: float, shape: str) -> Schedule:
    """The schedule over `steps`, of which the fraction, rounded up, warms up."""
    return Schedule(peak, steps, math.ceil(warmup_fraction * steps), shape)
