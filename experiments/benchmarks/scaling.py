"""Does a compiled step share its work among devices, and does the host have a part in it?

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python experiments/benchmarks/scaling.py

Trains the demo study's model (full fine-tuning, and LoRA r=8) on the same batches, 32 rows of 48
tokens, on one device and on meshes of all. For every mesh:
`flop_share`: XLA's count of one step's floating-point operations on a device, over that on one
device; 1/8 is ideal. `step`: median seconds of an optimizer step, when one call makes 32 of them.
`call`: what a call costs beside its steps: the time of 32 calls of one step each, less that of one
call of 32, for each call. The calls run while JAX refuses every transfer between host and device,
and compile once.

Virtual devices share the cores of one machine: `step` says there what partitioning costs, not what
more devices would save. Writes results/scaling-<processor>.json beside this file. 6 minutes on 2
cores.
"""

from __future__ import annotations

import datetime
import json
import re
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jax_lowrank import models, provenance, sharding, train
from jax_lowrank.adapt import METHODS
from jax_lowrank.config import TrainSpec
from jax_lowrank.data import Batch
from jax_lowrank.study.training import make_program

HERE = Path(__file__).parent
ROWS, WIDTH, STEPS, REPEATS = 32, 48, 32, 2
DEMO = {"num_layers": 4, "width": 128, "num_heads": 4, "mlp_width": 512, "max_positions": 48}
METHOD_OPTIONS = {"full": {}, "lora": {"rank": 8, "alpha": 16.0}}


def meshes(devices: int) -> dict[str, tuple[int, int, int]]:
    """One device, each axis alone and, from 8 devices on, all three."""
    found = {"one": (1, 1, 1), "data": (devices, 1, 1), "fsdp": (1, devices, 1)}
    found["tensor"] = (1, 1, devices)
    return found | ({"mixed": (2, devices // 4, 2)} if devices % 8 == 0 else {})


class Calls:
    """`train.run_steps` of one method on one mesh, all of its arguments on the devices."""

    def __init__(self, name: str, sizes: tuple[int, int, int]):
        mesh = sharding.make_mesh(*sizes)
        config = models.gpt2.GPT2Config(vocab_size=1500, **DEMO)
        model = models.create("gpt2", config, jax.random.key(0))
        method = METHODS[name](**METHOD_OPTIONS[name])
        graphdef, trainable, frozen = method.split(jax.random.key(0), model)
        self.trainable, frozen = sharding.put((trainable, frozen), mesh)
        program = make_program(TrainSpec(), method, graphdef, self.trainable)
        self.opt_state = sharding.put(program.optimizer.init(self.trainable), mesh)
        tokens = np.random.default_rng(0).integers(0, 1500, (STEPS, ROWS, WIDTH), np.int32)
        batches = Batch(tokens, np.ones(tokens.shape, np.float32))
        whole = None if mesh is None else jax.NamedSharding(mesh, jax.P())
        self.counts = {n: jax.device_put(jnp.int32(n), whole) for n in (0, 1, STEPS)}
        self.arguments = {
            "apply": program.apply,
            "loss": train.causal_lm_loss,
            "optimizer": program.optimizer,
            "accumulate": 1,
            "frozen": frozen,
            "batches": jax.device_put(sharding.put_own_rows(batches, self.trainable, axis=1)),
            "rates": jax.device_put(jnp.full(STEPS, 1e-4, jnp.float32), whole),
            "key": jax.device_put(jax.random.key(0), whole),
            "first": self.counts[0],
            "keep": sharding.keeper(mesh),
        }

    def flops(self) -> float:
        """Of one step on one device, as XLA counts them."""
        state = {"trainable": self.trainable, "opt_state": self.opt_state}
        lowered = train.run_steps.lower(**self.arguments, **state, count=self.counts[STEPS])
        return lowered.compile().cost_analysis()["flops"]

    def seconds(self, calls: int, steps: int) -> float:
        """Of so many calls of so many steps each."""
        began = time.perf_counter()
        for _ in range(calls):
            state = {"trainable": self.trainable, "opt_state": self.opt_state}
            count = self.counts[steps]
            with jax.transfer_guard("disallow"):
                made = train.run_steps(**self.arguments, **state, count=count)
            self.trainable, self.opt_state = sharding.settle(made[:2])
        jax.block_until_ready(self.trainable)
        return time.perf_counter() - began


def measure(name: str, sizes: tuple[int, int, int]) -> dict:
    """One method on one mesh."""
    calls = Calls(name, sizes)
    flops = calls.flops()
    calls.seconds(1, STEPS)  # compiles
    compiled = train.run_steps._cache_size()
    many = statistics.median(calls.seconds(1, STEPS) for _ in range(REPEATS))
    single = statistics.median(calls.seconds(STEPS, 1) for _ in range(REPEATS))
    if train.run_steps._cache_size() != compiled:
        raise SystemExit(f"{name} on {sizes} compiled again")
    step = many / STEPS
    return {
        "method": name,
        "mesh": sizes,
        "flops": flops,
        "step": step,
        "call": single / STEPS - step,
    }


def main() -> None:
    """Every method on every mesh; exits 1 where a step compiles twice or meets the host."""
    if jax.device_count() == 1:
        raise SystemExit("one device has nothing to share; set XLA_FLAGS as the file's head says")
    rows = []
    for name in METHOD_OPTIONS:
        for mesh, sizes in meshes(jax.device_count()).items():
            rows.append(row := measure(name, sizes))
            alone = next(r["flops"] for r in rows if r["method"] == name)
            row["flop_share"] = row["flops"] / alone
            print(
                f"{name} {mesh}: {row['flop_share']:.3f} of the operations,"
                f" {1000 * row['step']:.1f} ms a step, {1000 * row['call']:.2f} ms a call",
                flush=True,
            )
    result = {"date": datetime.date.today().isoformat(), "cases": rows}
    machine = re.sub(r"[^a-z0-9]+", "-", provenance.cpu_name().lower()).strip("-")
    path = HERE / "results" / f"scaling-{machine}.json"
    environment = dict(provenance.environment())
    path.write_text(json.dumps({**result, "environment": environment}, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
