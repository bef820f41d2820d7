"""Our side of gpu.py: one setting per process, one JSON object on the last line.

    python experiments/benchmarks/ours_gpu.py '{"device": true}'

What to measure is a JSON object, see `gpu.work_of`; peer_gpu.py takes the same. With "device" it
only says what the device is.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from ours import peak_mb

from jax_lowrank import memory, models, provenance, train
from jax_lowrank.adapt import METHODS
from jax_lowrank.adapt.method import bind, count
from jax_lowrank.data import Batch

CUDNN = "__cudnn$fmha"  # cuDNN's attention in a lowered program
VERSIONS = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "optax", "numpy")


def device() -> dict:
    """Name and bytes of the first device, and what runs on it."""
    first, found = jax.devices()[0], {}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "platform": first.platform,
        "device": provenance.cpu_name() if first.platform == "cpu" else first.device_kind,
        "runtime": first.client.platform_version.splitlines()[0],
        "bytes": memory.of_this_device(),
        "python": platform.python_version(),
        "versions": found,
        "code": provenance.code_hash(),
    }


def split(work: dict):
    """Graph definition, trainable and frozen arrays of a random model, made on the device."""
    config = models.llama.LlamaConfig.from_hf(work["config"])
    options = {"rank": work["rank"], "alpha": work["alpha"]} if work["method"] == "lora" else {}
    method, found = METHODS[work["method"]](**options), []

    def parts(key):
        model = models.create("llama", config, key, jnp.dtype(work["dtype"]))
        graphdef, trainable, frozen = method.split(key, model)
        found.append(graphdef)
        return trainable, frozen

    trainable, frozen = jax.jit(parts)(jax.random.key(0))
    return method, found[0], trainable, frozen


def measure(work: dict) -> dict:
    """Seconds per optimizer step of every turn, and what the compiled call is."""
    method, graphdef, trainable, frozen = split(work)
    optimizer = train.make_optimizer(trainable, method, weight_decay=0.1, clip=1.0)
    opt_state = optimizer.init(trainable)
    steps, shape = work["steps"], (work["steps"], work["rows"], work["length"])
    rng, weights = np.random.default_rng(0), np.ones(shape, np.float32)
    weights[:, :, 0] = 0
    rates, key = np.full(steps, work["rate"], np.float32), jax.random.key(2)
    num_trainable, parameters = count(trainable), count((trainable, frozen))

    def batches():
        tokens = rng.integers(0, work["config"]["vocab_size"], shape).astype(np.int32)
        return Batch(tokens, weights)

    began = time.perf_counter()
    lowered = train.run_steps.lower(
        apply=bind(graphdef, remat=work["remat"]),
        loss=train.causal_lm_loss,
        optimizer=optimizer,
        accumulate=1,
        trainable=trainable,
        opt_state=opt_state,
        frozen=frozen,
        batches=batches(),
        rates=rates,
        count=steps,
        key=key,
    )
    compiled = lowered.compile()
    compile_seconds = time.perf_counter() - began
    losses = []

    def call(state):
        trainable, opt_state, found, _ = compiled(
            trainable=state[0],
            opt_state=state[1],
            frozen=frozen,
            batches=batches(),
            rates=rates,
            count=steps,
            key=key,
        )
        losses.extend(np.asarray(found).tolist())  # waits for the call
        return trainable, opt_state

    state = (trainable, opt_state)
    del trainable, opt_state
    for _ in range(work["warmup"]):
        state = call(state)
    seconds = []
    for _ in range(work["turns"]):
        began = time.perf_counter()
        state = jax.block_until_ready(call(state))
        seconds.append((time.perf_counter() - began) / steps)
    return {
        "seconds": seconds,
        "compile_seconds": compile_seconds,
        "cudnn_attention": CUDNN in lowered.as_text(),
        "step_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "parameters": parameters,
        "trainable_parameters": num_trainable,
        "losses": losses,
    }


def main() -> None:
    """Measure, print."""
    work = json.loads(sys.argv[1])
    result = {} if "device" in work else measure(work)
    found = jax.devices()[0].memory_stats() or {}
    # Without statistics of a device, the process's own memory.
    peak = found.get("peak_bytes_in_use", round(peak_mb() * 2**20))
    print(json.dumps({**result, "peak_bytes": peak, "environment": device()}))


if __name__ == "__main__":
    main()
