"""Our side of the fine-tuning benchmark: one setting per process, one JSON object on the last line.

    python experiments/benchmarks/ours.py --shape gpt2 --method lora

The same shapes, batches, amount of work and pacing as peer_torch.py; see there.
"""

from __future__ import annotations

import argparse
import gzip
import json
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np

from jax_lowrank import infer, models, provenance, train
from jax_lowrank.adapt import METHODS
from jax_lowrank.adapt.method import bind, count
from jax_lowrank.data import Batch

VOCAB, LENGTH, BATCH = 8192, 128, 16
STEPS_PER_TURN = 4
SHAPES = {
    "gpt2": (
        "gpt2",
        models.gpt2.GPT2Config(
            vocab_size=VOCAB, num_layers=6, width=384, num_heads=6, mlp_width=1536
        ),
    ),
    "llama": (
        "llama",
        models.llama.LlamaConfig(
            vocab_size=VOCAB,
            num_layers=6,
            width=384,
            num_heads=6,
            num_kv_heads=6,
            head_width=64,
            mlp_width=1024,
            max_positions=1024,
            tied=True,
        ),
    ),
    "bert": (
        "bert",
        models.bert.BertConfig(
            vocab_size=VOCAB, num_layers=6, width=384, num_heads=6, mlp_width=1536
        ),
    ),
}
LORA = {"rank": 8, "alpha": 16.0}
METHOD_OPTIONS = {
    "full": ("full", {}),
    "lora": ("lora", LORA),
    "dora": ("lora", {**LORA, "dora": True}),
    "pissa": ("lora", {**LORA, "init": "pissa"}),
    "olora": ("lora", {**LORA, "init": "olora"}),
}


def method_of(name: str):
    """A row of METHOD_OPTIONS as a method."""
    kind, options = METHOD_OPTIONS[name]
    return METHODS[kind](**options)


def peak_mb() -> float:
    """Largest resident size of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def masked_lm_loss(apply, trainable, frozen, batch, key):
    """As the peer's: -log p of every token, the labels being the tokens themselves."""
    logits = apply(trainable, frozen)(batch.tokens, key=key)
    picked = jnp.take_along_axis(logits, batch.tokens[..., None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(logits, axis=-1) - picked
    return nll.sum(1), jnp.full(nll.shape[0], float(nll.shape[1]))


def prepared(options):
    """call(state) -> state and losses: one compiled call of STEPS_PER_TURN steps; first state; and
    seconds that the method took to split the model, compilation included."""
    family, config = SHAPES[options.shape]
    head = models.Head("masked-lm" if options.shape == "bert" else "causal-lm")
    model = models.create(family, config, jax.random.key(0), head=head)
    method = method_of(options.method)
    began = time.perf_counter()
    graphdef, trainable, frozen = method.split(jax.random.key(1), model)
    jax.block_until_ready((trainable, frozen))
    split_seconds = time.perf_counter() - began
    optimizer = train.make_optimizer(trainable, method, weight_decay=0.1, clip=1.0)
    per_call, rng = STEPS_PER_TURN, np.random.default_rng(0)
    weights = np.ones((per_call, BATCH, LENGTH), np.float32)
    weights[:, :, 0] = 0
    apply = bind(graphdef)

    def call(state):
        trainable, opt_state, losses, _ = train.run_steps(
            apply=apply,
            loss=masked_lm_loss if options.shape == "bert" else train.causal_lm_loss,
            optimizer=optimizer,
            accumulate=options.accumulate,
            trainable=state[0],
            opt_state=state[1],
            frozen=frozen,
            batches=Batch(rng.integers(0, VOCAB, weights.shape).astype(np.int32), weights),
            rates=np.full(per_call, 1e-3, np.float32),
            count=per_call,
            key=jax.random.key(2),
        )
        return (trainable, opt_state), np.asarray(losses).tolist()

    return call, (trainable, optimizer.init(trainable)), split_seconds


def measure(work, options, steps: int) -> dict:
    """Seconds per step of every turn, a call of `work` that makes `steps`; the first is apart."""
    warm = []
    for _ in range(2):
        began = time.perf_counter()
        work()
        warm.append(time.perf_counter() - began)
    turns = []
    for _ in range(options.turns):
        if options.paced:
            print("ready", flush=True)
            sys.stdin.readline()
        began = time.perf_counter()
        work()
        turns.append((time.perf_counter() - began) / steps)
    return {
        "seconds": turns,
        "seconds_min": min(turns),
        "seconds_median": median(turns),
        "first_call_seconds": warm[0],
    }


def training(options) -> dict:
    """Seconds per optimizer step, measured over whole compiled calls."""
    call, state, split_seconds = prepared(options)
    num_trainable, losses = count(state[0]), []

    def work():
        nonlocal state
        state, step_losses = call(state)
        losses.extend(step_losses)

    return {
        **measure(work, options, STEPS_PER_TURN),
        "tokens": BATCH * LENGTH,
        "trainable_parameters": num_trainable,
        "split_seconds": split_seconds,
        "losses": losses,
    }


# Kinds of work by how XLA names its operations on CPU; the first that matches counts.
KINDS = (
    ("matrix products", ("ynn_fusion", "dot", "onednn", "convolution")),
    ("containers", ("while", "call", "conditional")),
    (
        "moving and slicing",
        ("copy", "transpose", "dynamic", "bitcast_dynamic", "broadcast", "wrapped_broadcast"),
    ),
)


def profile(options) -> dict:
    """Thread-milliseconds per step by kind of operation, from XLA's own trace of one call."""
    call, state, _ = prepared(options)
    state, _ = call(state)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            call(state)
        (path,) = Path(folder).rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    totals, largest = Counter(), Counter()
    for event in events:
        name = event.get("args", {}).get("hlo_op")
        if event.get("ph") == "X" and name:
            kind = next((k for k, words in KINDS if name.startswith(words)), "elementwise and sums")
            totals[kind] += event["dur"] / 1e3 / STEPS_PER_TURN
            largest[name] += event["dur"] / 1e3 / STEPS_PER_TURN
    del totals["containers"]
    whole = sum(totals.values())
    shares = {kind: value / whole for kind, value in totals.most_common()}
    return {"share_of_thread_time": shares, "largest_ms_per_step": dict(largest.most_common(12))}


def generating(options) -> dict:
    """Seconds of one call that samples: prompt 16, 32 new tokens, nothing filtered."""
    family, config = SHAPES[options.shape]
    model = models.create(family, config, jax.random.key(0))
    method = method_of(options.method)
    graphdef, trainable, frozen = method.split(jax.random.key(1), model)
    apply = bind(graphdef)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (options.batch, 16)).astype(np.int32)
    turn = iter(range(10**6))

    def work():
        infer.generate(
            apply,
            (trainable, frozen),
            tokens,
            np.ones_like(tokens, bool),
            jax.random.split(jax.random.key(next(turn)), options.batch),
            max_new_tokens=32,
            sampling=infer.Sampling(1.0),
            eos_id=None,
            pad_id=0,
        ).block_until_ready()

    return {**measure(work, options, 1), "tokens": options.batch * 32}


def matmul(options) -> dict:
    """Best GFLOP/s of one f32 product: this machine's peak as XLA reaches it."""
    product, rates = jax.jit(jnp.matmul), {}
    for m, k, n in ((2048, 384, 1536), (2048, 2048, 2048)):
        a, b = (jax.random.normal(jax.random.key(0), s) for s in ((m, k), (k, n)))
        product(a, b).block_until_ready()
        times = []
        for _ in range(options.turns):
            began = time.perf_counter()
            product(a, b).block_until_ready()
            times.append(time.perf_counter() - began)
        rates[f"{m}x{k}x{n}"] = 2 * m * k * n / min(times) / 1e9
    return {"gflops": rates}


TASKS = {"train": training, "generate": generating, "matmul": matmul, "profile": profile}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=TASKS, default="train")
    parser.add_argument("--shape", choices=SHAPES, default="gpt2")
    parser.add_argument("--method", choices=METHOD_OPTIONS, default="lora")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--paced", action="store_true")
    parser.add_argument("--accumulate", type=int, default=1, help="parts of a batch, in turn")
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    result = {"framework": "jax_lowrank", **vars(options), **TASKS[options.task](options)}
    result |= {"peak_mb": peak_mb(), "environment": dict(provenance.environment())}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
