"""How fast is fine-tuning, and in how much memory, against PyTorch transformers + PEFT?

    python experiments/benchmarks/finetune.py --torch-python .venv-bench/bin/python

`make bench` runs it. The same small models, batches and steps in both, one process a setting; the
processes of a cell take turns of 4 steps, so that a machine whose speed drifts slows all of them
(25 minutes on 2 otherwise idle cores, an hour on AMD). Peers: transformers + PEFT, eager as it is
used by default, and compiled with huge pages (which we use too), its strongest form; both as
installed ('stock') and, on AMD processors, with MKL's fast path unlocked. Writes
results/finetune-<processor>.json beside this file and prints the table; `--table FILE` prints the
table of an earlier run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import flops
import peer_env

HERE = Path(__file__).parent
OURS, PEER = HERE / "ours.py", HERE / "peer_torch.py"


class Worker:
    """A process that measures one setting, a turn at a time."""

    def __init__(self, name: str, command: list[str], environment: dict):
        self.name = name
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the process)
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )

    def wait(self) -> str:
        """The next line that it prints; blocks until then."""
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise RuntimeError(f"{self.name} failed:\n{self.errors.read()[-2000:]}")
        return line

    def turn(self) -> None:
        """Let it measure one turn."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def result(self) -> dict:
        """What it reports at the end."""
        return {"name": self.name, **json.loads(self.wait())}


def run_alone(command: list[str], environment: dict) -> dict:
    """The report of a process that measures by itself."""
    worker = Worker(command[1], command, environment)
    worker.process.stdin.close()
    *_, last = worker.process.stdout.read().splitlines() or [""]
    if worker.process.wait():
        worker.wait()  # raises with what it said
    return json.loads(last)


def in_turns(settings: dict[str, tuple[list[str], dict]], turns: int) -> list[dict]:
    """Reports of all settings, which worked alternately: what the machine does to one of them, it
    does to its neighbours as well, so that ratios within a round hold where speeds drift."""
    workers = []
    for name, (command, environment) in settings.items():
        command = [*command, "--paced", "--turns", str(turns)]
        workers.append(Worker(name, command, environment))
        workers[-1].wait()  # ready: compiled, and now idle
    for turn in range(turns):
        # Every second round backwards: no setting always follows the same one.
        for worker in workers if turn % 2 == 0 else reversed(workers):
            worker.turn()
            if turn + 1 < turns:
                worker.wait()  # ready again
            else:
                worker.last = worker.result()
                worker.process.wait()  # a compiled peer takes seconds of processor time to end
    return [worker.last for worker in workers]


def settings_of(options, folder: Path) -> dict[str, tuple[list[str], dict]]:
    """Name -> (command, environment) of every training setting on this processor."""
    ours = ([sys.executable, str(OURS)], {**os.environ, "GLIBC_TUNABLES": peer_env.HUGE_PAGES})
    out = {
        "jax_lowrank": ours,
        "jax_lowrank, accumulate=4": ([*ours[0], "--accumulate", "4"], ours[1]),
    }
    peer = [options.torch_python, str(PEER)]
    libraries = {"stock": None}
    if "AMD" in peer_env.cpu_vendor():
        libraries["unlocked"] = peer_env.build_unlock(folder)
    for library, unlock in libraries.items():
        plain = peer_env.peer_environment(options.threads, unlock, False, folder / library)
        huge = peer_env.peer_environment(options.threads, unlock, True, folder / library)
        out[f"{library}, eager"] = ([*peer, "--no-compile"], plain)
        out[f"{library}, compiled, huge pages"] = ([*peer, "--compile"], huge)
    return out


def measure(options, say) -> dict:
    """Every cell: its settings in turns."""
    out = {"turns": options.turns, "cpu": peer_env.cpu_vendor(), "train": [], "generate": []}
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(options, Path(folder))
        ours, peer = settings["jax_lowrank"], settings["stock, eager"]
        out["matmul"] = {
            name: run_alone([*command, "--task", "matmul"], environment)
            for name, (command, environment) in (("jax", ours), ("torch", peer))
        }
        for shape in options.shapes:
            for method in options.methods:
                cell = ["--shape", shape, "--method", method]
                rows = in_turns(
                    {name: ([*c, *cell], env) for name, (c, env) in settings.items()},
                    options.turns,
                )
                out["train"] += rows
                say(rows)
                command, environment = ours
                profile = run_alone([*command, *cell, "--task", "profile"], environment)
                out.setdefault("profile", {})[f"{shape} {method}"] = profile
        for method in options.methods:
            cell = ["--task", "generate", "--method", method]
            sampling = {"jax_lowrank": ([*ours[0], *cell], ours[1])}
            for name, (command, environment) in settings.items():
                if name.endswith("eager"):
                    for cache in ("dynamic", "static"):
                        arguments = [*command, *cell, "--cache", cache]
                        sampling[f"{name}, {cache} cache"] = (arguments, environment)
            rows = in_turns(sampling, options.turns)
            out["generate"] += rows
            say(rows)
    return out


def ratio(rows: list[dict], name: str) -> tuple[float, float, float]:
    """How many times as fast jax_lowrank is as `name`: median over the turns' ratios, smallest,
    largest."""
    mine, theirs = (next(r for r in rows if r["name"] == n) for n in ("jax_lowrank", name))
    ratios = [b / a for a, b in zip(mine["seconds"], theirs["seconds"])]
    return median(ratios), min(ratios), max(ratios)


def flops_per_step(shape: str, method: str) -> float:
    """FLOPs of all matrix products of one step, see `flops.step`."""
    layers, width, vocab, length, tokens = 6, 384, 8192, 128, 2048
    mlp = 3 * 1024 if shape == "llama" else 2 * 1536
    weights = layers * (4 * width * width + mlp * width) + vocab * width
    weights += width * width if shape == "bert" else 0  # the head's own layer
    # Not half: the product is written in up to four blocks, and BERT's sees both sides.
    mixed = flops.attention(layers, width, tokens // length, length, causal=False)
    linears = {
        "gpt2": ((384, 1152), (384, 384), (384, 1536), (1536, 384)),
        "llama": (*[(384, 384)] * 4, *[(384, 1024)] * 2, (1024, 384)),
        "bert": (*[(384, 384)] * 4, (384, 1536), (1536, 384)),
    }[shape]
    adapters = layers * 8 * sum(a + b for a, b in linears) if method == "lora" else 0
    return flops.step(method, tokens, weights, adapters=adapters, attention=mixed)


HEADER = [
    "| task | against | tokens/s | theirs | jax_lowrank is | peak MB | theirs | jax_lowrank uses |",
    "|---|---|--:|--:|--:|--:|--:|--:|",
]


def lines_of(rows: list[dict], peak: float | None = None) -> list[str]:
    """Table lines of one cell, one a setting that jax_lowrank is compared with (itself with
    the batch in four parts among them); with `peak` in GFLOP/s, tokens/s with their share of it."""
    first = rows[0]
    task = f"{first['shape']}, {first['method']}"
    if first["task"] == "generate":
        task = f"sampling, {'with adapter' if first['method'] == 'lora' else 'plain'}"
        peak = None
    needed = flops_per_step(first["shape"], first["method"])

    def speed(row):
        share = f" ({needed / row['seconds_median'] / 1e9 / peak:.0%})" if peak else ""
        return f"{row['tokens'] / row['seconds_median']:,.0f}{share}"

    lines = []
    for row in rows[1:]:
        middle, low, high = ratio(rows, row["name"])
        lines.append(
            f"| {task} | {row['name']} | {speed(first)} | {speed(row)}"
            f" | {middle:.2f} × ({low:.2f} to {high:.2f}) | {first['peak_mb']:,.0f}"
            f" | {row['peak_mb']:,.0f} | {first['peak_mb'] / row['peak_mb']:.2f} × |"
        )
    return lines


def table(result: dict) -> str:
    """The README's table: tokens/s with the share of the matrix-product peak, ratios, memory."""
    peak = max(result["matmul"]["jax"]["gflops"].values())
    peak = max(peak, *(row["gflops"] for row in result["matmul"]["torch"]["rows"]))
    lines = [
        f"{result['cpu']}, {result['date']}; {result['turns']} turns; tokens/s with the share of"
        f" the f32 matrix-product peak ({peak:.0f} GFLOP/s); ratios: median over turns (smallest to"
        " largest).",
        "",
        *HEADER,
    ]
    for task in ("train", "generate"):
        for cell in dict.fromkeys((row["shape"], row["method"]) for row in result[task]):
            rows = [r for r in result[task] if (r["shape"], r["method"]) == cell]
            lines += lines_of(rows, peak)
    return "\n".join(lines)


def main() -> None:
    """Measure and write, or print the table of an earlier run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--shapes", nargs="+", default=["gpt2", "llama", "bert"])
    parser.add_argument("--methods", nargs="+", default=["lora", "full"])
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--table", type=Path, help="print the table of this result file")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text())))
        return

    print("\n".join(HEADER), flush=True)

    def say(rows):
        print("\n".join(lines_of(rows)), flush=True)

    result = {"date": datetime.date.today().isoformat(), **measure(options, say)}
    machine = re.sub(r"[^a-z0-9]+", "-", result["cpu"].lower()).strip("-")
    path = HERE / "results" / f"finetune-{machine}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{table(result)}\n\nwritten to {path}")


if __name__ == "__main__":
    main()
