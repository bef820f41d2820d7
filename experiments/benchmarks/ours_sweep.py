"""Our side of the sweep benchmark: one setting per process, one JSON object on the last line.

    python experiments/benchmarks/ours_sweep.py --shape minilm --rows 4 --length 64 --cells 8

--cells 0 is the single run that the sweep replaces: the train step as `fit` calls it. With --steps
it trains that many steps and reports the seconds from the start of the process, imports included.
"""

from __future__ import annotations

import time

BEGAN = time.time()

import argparse  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import sys  # noqa: E402
from statistics import median  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402
from ours import peak_mb  # noqa: E402

from jax_lowrank import models, provenance, sweep, train  # noqa: E402
from jax_lowrank.adapt import METHODS  # noqa: E402
from jax_lowrank.adapt.method import bind, count  # noqa: E402
from jax_lowrank.data import Batch  # noqa: E402
from jax_lowrank.sweep import cells, step  # noqa: E402

SHAPES = {
    "small": {"vocab_size": 2048, "num_layers": 2, "width": 128, "num_heads": 4, "mlp_width": 512},
    "minilm": {
        "vocab_size": 8192,
        "num_layers": 6,
        "width": 384,
        "num_heads": 6,
        "mlp_width": 1536,
    },
}
RANKS, DECAY, CLIP = (8, 4, 2), 0.1, 1.0  # the first cell is the peer's
STEPS_PER_CALL = 8
TURN_SECONDS = 1.0  # at least


def cell_of(model, number: int, name: str) -> sweep.Cell:
    """Cell `number`: ranks and learning rates take turns, the seed is its own."""
    options = {"rank": RANKS[number % len(RANKS)], "alpha": 16.0} if name == "lora" else {}
    method = METHODS[name](**options)
    parts = method.split(jax.random.key(number), model)
    schedule = train.make_schedule((1 + number % 4) * 1e-3, 10**6, 0.0, "constant")
    return sweep.Cell(method, *parts, schedule, jax.random.key(number), DECAY, CLIP)


def batches(options, rng) -> Batch:
    """STEPS_PER_CALL batches of random tokens."""
    shape = (STEPS_PER_CALL, options.rows, options.length)
    weights = np.ones(shape, np.float32)
    weights[:, :, 0] = 0
    vocab = SHAPES[options.shape]["vocab_size"]
    return Batch(rng.integers(0, vocab, shape).astype(np.int32), weights)


def single(options, model):
    """call() -> losses of one compiled call of the single run; how many scalars it trains."""
    cell, rng = cell_of(model, 0, options.method), np.random.default_rng(0)
    optimizer = train.make_optimizer(cell.trainable, cell.method, weight_decay=DECAY, clip=CLIP)
    apply = bind(cell.graphdef)
    state = (cell.trainable, optimizer.init(cell.trainable))
    num_trained = count(cell.trainable)

    def call():
        nonlocal state
        *state, losses, _ = train.run_steps(
            apply=apply,
            loss=train.causal_lm_loss,
            optimizer=optimizer,
            accumulate=1,
            trainable=state[0],
            opt_state=state[1],
            frozen=cell.frozen,
            batches=batches(options, rng),
            rates=np.full(STEPS_PER_CALL, 1e-3, np.float32),
            count=STEPS_PER_CALL,
            key=cell.key,
        )
        return np.asarray(losses)

    return call, num_trained, step.Plan(1, 1)


def swept(options, model):
    """The same for a sweep of `options.cells`; and how many are computed at once."""
    rng = np.random.default_rng(0)
    made = [cell_of(model, k, options.method) for k in range(options.cells)]
    plan = step.plan(len(made), options.rows * options.length, step.num_lanes())
    program = sweep.make_program(made[0], train.causal_lm_loss)
    stacked = cells.stack(program, made, plan.lanes * plan.size)
    trainable, own, shared = stacked.states
    state = (trainable, step.init(program, trainable, stacked.settings))
    total = len(stacked.settings.clip)
    rates = np.full((total, STEPS_PER_CALL), 1e-3, np.float32)
    num_trained = count(made[0].trainable)

    def call():
        nonlocal state
        made_of = batches(options, rng)

        def run(state, beside):
            (trainable, opt), (own, settings, rates) = state, beside
            return step.run_cells(
                program=program,
                size=plan.size,
                paired=True,
                trainable=trainable,
                opt=opt,
                own=own,
                shared=shared,
                settings=settings,
                batches=made_of,
                rates=rates,
                count=STEPS_PER_CALL,
                first=0,
            )

        beside = (own, stacked.settings, rates)
        *state, losses, _ = step.run_lanes(plan.lanes, run, tuple(state), beside)
        return np.asarray(losses)[: len(made)]

    return call, num_trained, plan


def measure(call, options) -> dict:
    """Seconds of an adapter-step in every turn, each of whole calls for at least TURN_SECONDS."""
    warm = []
    for _ in range(3):
        began = time.perf_counter()
        call()
        warm.append(time.perf_counter() - began)
    calls, turns = math.ceil(TURN_SECONDS / warm[-1]), []
    for _ in range(options.turns):
        if options.paced:
            print("ready", flush=True)
            sys.stdin.readline()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        steps = calls * STEPS_PER_CALL * max(options.cells, 1)
        turns.append((time.perf_counter() - began) / steps)
    return {"seconds": turns, "seconds_median": median(turns), "first_call_seconds": warm[0]}


def whole(call, options) -> dict:
    """Seconds since the process began until `options.steps` steps are done, and of the import."""
    done = 0
    while done < options.steps:
        losses, done = call(), done + STEPS_PER_CALL
    assert np.isfinite(losses).all()
    return {"whole_seconds": time.time() - BEGAN, "steps": done}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--method", choices=("lora", "full"), default="lora")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--cells", type=int, default=0)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--paced", action="store_true")
    options = parser.parse_args()
    config = models.gpt2.GPT2Config(max_positions=128, **SHAPES[options.shape])
    model = models.create("gpt2", config, jax.random.key(0))
    call, num_trained, plan = (swept if options.cells else single)(options, model)
    result = {"framework": "jax_lowrank", **vars(options)}
    result |= {"trainable_parameters": num_trained, "plan": plan}
    result |= whole(call, options) if options.steps else measure(call, options)
    result |= {"peak_mb": peak_mb(), "environment": dict(provenance.environment())}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
