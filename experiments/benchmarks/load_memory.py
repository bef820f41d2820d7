"""How much host memory does loading a checkpoint take, beside what the model itself needs?

    python experiments/benchmarks/load_memory.py

Makes random sharded checkpoints of 1 GB in a temporary directory (5 GB of disk, 2 minutes) and
loads each in a process of its own. `peak` is the process's largest resident size, pages of mapped
files included; `ratio` is the growth from before the load (interpreter and JAX) to that peak, over
the bytes of the parameters as loaded. Float32 of a bfloat16 checkpoint is twice its file; the other
rows have the file's type. Writes results/load-memory-<processor>.json beside this file. Linux only.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from jax_lowrank import models, provenance

HERE = Path(__file__).parent
SHARD_BYTES = 200_000_000
LIMIT = 1.3


def config_of(family: str, dtype: str):
    """A model of about 1 GB in `dtype`."""
    if family == "gpt2":
        depth = 18 if dtype == "float32" else 38
        return models.gpt2.GPT2Config(
            vocab_size=20000, num_layers=depth, width=1024, num_heads=16, mlp_width=4096
        )
    return models.llama.LlamaConfig(
        num_layers=17 if dtype == "float32" else 36,
        width=1024,
        num_heads=16,
        num_kv_heads=16,
        head_width=64,
        mlp_width=2816,
        tied=True,
    )


# family, type in the files, type in memory
CASES = (
    ("llama", "float32", "float32"),
    ("llama", "bfloat16", "bfloat16"),
    ("llama", "bfloat16", "float32"),
    ("gpt2", "float32", "float32"),
)


def make(folder: Path, family: str, dtype: str) -> None:
    """Write a random checkpoint."""
    model = models.create(family, config_of(family, dtype), jax.random.key(0), jnp.dtype(dtype))
    models.save(folder, model, model.params, max_shard_bytes=SHARD_BYTES)


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB$", text, re.MULTILINE)[1]) * 1024


def measure(folder: Path, dtype: str) -> dict:
    """Load in this process and say what it took."""
    jnp.zeros(1).block_until_ready()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, start = status("VmRSS"), time.perf_counter()
    model = models.load(folder, jnp.dtype(dtype))
    jax.block_until_ready(model.params)
    seconds, peak = time.perf_counter() - start, status("VmHWM")
    arrays = models.by_path(model.params).values()
    total = sum(array.nbytes for array in arrays)
    return {
        "parameter_bytes": total,
        "largest_parameter_bytes": max(array.nbytes for array in arrays),
        "before_bytes": before,
        "peak_bytes": peak,
        "after_bytes": status("VmRSS"),
        "ratio": (peak - before) / total,
        "ratio_with_interpreter": peak / total,
        "seconds": seconds,
    }


def child(*arguments: str) -> str:
    """Run this file in a process of its own; the last line that it prints."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"load_memory.py {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return done.stdout.strip().rpartition("\n")[2]


def main() -> None:
    """Every case, one process each; exits 1 when one takes more than the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--make", nargs=3, metavar=("DIR", "FAMILY", "DTYPE"))
    parser.add_argument("--measure", nargs=2, metavar=("DIR", "DTYPE"))
    options = parser.parse_args()
    if options.make:
        make(Path(options.make[0]), *options.make[1:])
        return
    if options.measure:
        print(json.dumps(measure(Path(options.measure[0]), options.measure[1])))
        return
    cases = []
    for family, stored, loaded in CASES:
        with tempfile.TemporaryDirectory() as folder:
            child("--make", folder, family, stored)
            files = [path.stat().st_size for path in Path(folder).glob("*.safetensors")]
            row = {"family": family, "stored": stored, "loaded": loaded, "files": len(files)}
            row["checkpoint_bytes"] = sum(files)
            cases.append({**row, **json.loads(child("--measure", folder, loaded))})
        row = cases[-1]
        print(
            f"{family} {stored} as {loaded}: {row['checkpoint_bytes'] / 1e9:.2f} GB in"
            f" {row['files']} files, peak {row['peak_bytes'] / 1e9:.2f} GB, {row['ratio']:.2f} x"
            f" the parameters above the {row['before_bytes'] / 1e9:.2f} GB before"
            f" ({row['ratio_with_interpreter']:.2f} x in all), {row['seconds']:.1f} s",
            flush=True,
        )
    result = {
        "date": datetime.date.today().isoformat(),
        "limit": LIMIT,
        "cases": cases,
        "environment": dict(provenance.environment()),
    }
    machine = re.sub(r"[^a-z0-9]+", "-", provenance.cpu_name().lower()).strip("-")
    path = HERE / "results" / f"load-memory-{machine}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")
    if any(row["ratio"] > LIMIT for row in cases):
        raise SystemExit(f"above {LIMIT} x")


if __name__ == "__main__":
    main()
