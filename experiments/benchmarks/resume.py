"""What does a checkpoint cost, and how much of a minute is that?

    python experiments/benchmarks/resume.py

Saves the state of the demo study's training (full fine-tuning, and LoRA r=8) again and again, and
nothing else. `blocking` is how long training stands still; `whole` adds the writing, reading back
and hashing in the background, which on a CPU take the processor from training. `percent` is `whole`
over the minute between two saves: more than what is really lost. The target is 2 %. Steps between
two saves cost nothing: what `due` takes is there as well. Writes results/resume-<processor>.json
beside this file. Under a minute on 2 cores.
"""

from __future__ import annotations

import datetime
import json
import re
import statistics
import tempfile
import time
from pathlib import Path

import jax

from jax_lowrank import models, provenance, train
from jax_lowrank.adapt import METHODS
from jax_lowrank.adapt.method import count
from jax_lowrank.checkpoint import Checkpoints

HERE = Path(__file__).parent
SAVES, TARGET = 20, 2.0
DEMO = {"num_layers": 4, "width": 128, "num_heads": 4, "mlp_width": 512, "max_positions": 48}
CASES = {"full": {}, "lora": {"rank": 8, "alpha": 16.0}}


def measure(name: str, options: dict) -> dict:
    """Seconds of each save of one method's state."""
    config = models.gpt2.GPT2Config(vocab_size=1500, **DEMO)
    model = models.create("gpt2", config, jax.random.key(0))
    method = METHODS[name](**options)
    _, trainable, _ = method.split(jax.random.key(0), model)
    optimizer = train.make_optimizer(trainable, method, weight_decay=0.0, clip=1.0)
    key = jax.random.key(0)
    run = train.Training(trainable, optimizer.init(trainable), key, None, SAVES, None)
    arrays = run.arrays()
    lines = [{"step": n, "num_steps": 1000, "loss": 1 / (n + 3)} for n in range(500)]
    blocking, whole, due = [], [], []
    with tempfile.TemporaryDirectory() as folder, Checkpoints(folder, "benchmark") as checkpoints:
        for step in range(SAVES + 1):
            began = time.perf_counter()
            checkpoints.due()
            due.append(time.perf_counter() - began)
            checkpoints.save(step, arrays, {"lines": lines})
            blocking.append(time.perf_counter() - began)
            checkpoints.wait()
            whole.append(time.perf_counter() - began)
        files = list(Path(folder).rglob("*"))
        stored = sum(file.stat().st_size for file in files if file.is_file()) / 2  # two stay
    typical = {
        key: statistics.median(values[1:])  # the first one also imports and allocates
        for key, values in (("due", due), ("blocking", blocking), ("whole", whole))
    }
    return {
        "method": name,
        "trainable_parameters": count(trainable),
        "array_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(arrays)),
        "stored_bytes": stored,
        "seconds": typical,
        "all_seconds": {"blocking": blocking, "whole": whole},
        "percent": 100 * typical["whole"] / 60,
    }


def main() -> None:
    """Every case; exits 1 when one is above the target."""
    cases = []
    for name, options in CASES.items():
        cases.append(row := measure(name, options))
        milliseconds = {key: 1000 * value for key, value in row["seconds"].items()}
        print(
            f"{name}: {row['trainable_parameters']:,} parameters,"
            f" {row['array_bytes'] / 1e6:.1f} MB; blocking {milliseconds['blocking']:.0f} ms,"
            f" whole {milliseconds['whole']:.0f} ms: {row['percent']:.2f} % at one a minute",
            flush=True,
        )
    environment = dict(provenance.environment())
    result = {"date": datetime.date.today().isoformat(), "target_percent": TARGET, "cases": cases}
    machine = re.sub(r"[^a-z0-9]+", "-", provenance.cpu_name().lower()).strip("-")
    path = HERE / "results" / f"resume-{machine}.json"
    path.write_text(json.dumps({**result, "environment": environment}, indent=1) + "\n")
    print(f"written to {path}")
    if any(row["percent"] > TARGET for row in cases):
        raise SystemExit(f"above {TARGET} %")


if __name__ == "__main__":
    main()
