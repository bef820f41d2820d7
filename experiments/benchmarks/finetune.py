"""How fast is fine-tuning, and in how much memory, against PyTorch transformers + PEFT?

    python experiments/benchmarks/finetune.py --torch-python .venv-bench/bin/python

`make bench` runs it. The same small models, batches and steps in both, one process a setting, in
turns on an otherwise idle machine (about 25 minutes on 2 cores). Peers: transformers + PEFT, eager
as it is used by default, and compiled with huge pages (which we use too), its strongest form; both
as installed ('stock') and, on AMD processors, with MKL's fast path unlocked. Writes
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

import peer_env

HERE = Path(__file__).parent
OURS = HERE / "ours.py"


def run_ours(*arguments: str) -> dict:
    """One process of ours.py."""
    environment = {**os.environ, "GLIBC_TUNABLES": peer_env.HUGE_PAGES}
    done = subprocess.run(
        [sys.executable, str(OURS), *arguments], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"ours.py {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def peers(threads: int, folder: Path) -> dict[str, tuple[list[str], dict]]:
    """Name -> (extra arguments, environment) of every PyTorch setting on this processor."""
    libraries = {"stock": None}
    if "AMD" in peer_env.cpu_vendor():
        libraries["unlocked"] = peer_env.build_unlock(folder)
    out = {}
    for library, unlock in libraries.items():
        plain = peer_env.peer_environment(threads, unlock)
        out[f"{library}, eager"] = (["--no-compile"], plain)
        fast = peer_env.peer_environment(threads, unlock, True, folder / f"{library}-huge")
        out[f"{library}, compiled, huge pages"] = (["--compile"], fast)
    return out


def measure(options, say) -> dict:
    """Every setting, in turns; `rounds` processes each."""
    out = {"rounds": options.rounds, "cpu": peer_env.cpu_vendor(), "train": [], "generate": []}
    with tempfile.TemporaryDirectory() as folder:
        settings = peers(options.threads, Path(folder))
        first = next(iter(settings.values()))[1]
        out["matmul"] = {
            "jax": run_ours("--task", "matmul"),
            "torch": peer_env.run_peer(options.torch_python, ["--task", "matmul"], first),
        }
        steps = ["--steps", str(options.steps)]
        for shape in options.shapes:
            for method in options.methods:
                cell = ["--shape", shape, "--method", method, *steps]
                for turn in range(options.rounds):
                    for remat in ([], ["--remat"]):
                        row = run_ours(*cell, *remat)
                        name = "jax_lowrank, remat" if remat else "jax_lowrank"
                        out["train"].append({"name": name, "round": turn, **row})
                        say(out["train"][-1])
                    for name, (extra, environment) in settings.items():
                        row = peer_env.run_peer(options.torch_python, [*cell, *extra], environment)
                        out["train"].append({"name": name, "round": turn, **row})
                        say(out["train"][-1])
                out.setdefault("profile", {})[f"{shape} {method}"] = run_ours(
                    "--task", "profile", *cell
                )
        ours = [run_ours("--task", "generate", "--method", m, *steps) for m in ("full", "lora")]
        out["generate"] = {
            "jax_lowrank": ours,
            **{
                name: peer_env.run_peer(
                    options.torch_python, ["--task", "generate", *steps, "--no-compile"], env
                )
                for name, (extra, env) in settings.items()
                if "--no-compile" in extra
            },
        }
    return out


def pooled(rows: list[dict], shape: str, method: str) -> dict[str, dict]:
    """Name -> median step time over all rounds' steps, peak memory, start-up."""
    out = {}
    for name in dict.fromkeys(row["name"] for row in rows):
        chosen = [r for r in rows if (r["name"], r["shape"], r["method"]) == (name, shape, method)]
        if chosen:
            seconds = median(s for r in chosen for s in r["step_seconds"])
            start = chosen[0].get("compile_seconds", chosen[0].get("first_step_seconds"))
            out[name] = {
                "seconds": seconds,
                "tokens_per_second": 2048 / seconds,
                "peak_mb": max(r["peak_mb"] for r in chosen),
                "start_seconds": start,
            }
    return out


def flops_per_step(shape: str, method: str) -> float:
    """Multiply-adds times two of all matrix products of one step: 6 a token and weight for full
    fine-tuning, 4 for LoRA (no gradient of frozen weights), attention and adapters included."""
    layers, width, vocab, length, tokens = 6, 384, 8192, 128, 2048
    mlp = 2 * 1536 if shape == "gpt2" else 3 * 1024
    weights = layers * (4 * width * width + mlp * width) + vocab * width
    per_pass = 2 * tokens * weights
    attention = layers * 2 * 2 * tokens * length * width
    if method == "full":
        return 3 * (per_pass + attention)
    linears = {"gpt2": ((384, 1152), (384, 384), (384, 1536), (1536, 384))}.get(
        shape, (*[(384, 384)] * 4, *[(384, 1024)] * 2, (1024, 384))
    )
    adapters = layers * 2 * tokens * 8 * sum(a + b for a, b in linears)
    return 2 * per_pass + 3 * (attention + adapters)


def table(result: dict) -> str:
    """The README's table: tokens/s, ratios, memory, and the share of the matrix-product peak."""
    peak = max(result["matmul"]["jax"]["gflops"].values())
    peak = max(peak, *(row["gflops"] for row in result["matmul"]["torch"]["rows"]))
    lines = [
        f"{result['cpu']}, {result['date']}; {result['rounds']} rounds; f32 matrix-product peak"
        f" {peak:.0f} GFLOP/s",
        "",
        "| shape, method | setting | tokens/s | jax_lowrank is | peak MB | of peak | start s |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    cells = dict.fromkeys((row["shape"], row["method"]) for row in result["train"])
    for shape, method in cells:
        rows = pooled(result["train"], shape, method)
        mine = rows["jax_lowrank"]["tokens_per_second"]
        for name, row in rows.items():
            rate = flops_per_step(shape, method) / row["seconds"] / 1e9
            ratio = f"{mine / row['tokens_per_second']:.2f} ×" if "jax" not in name else ""
            lines.append(
                f"| {shape}, {method} | {name} | {row['tokens_per_second']:,.0f} | {ratio}"
                f" | {row['peak_mb']:,.0f} | {rate / peak:.0%} | {row['start_seconds']:.1f} |"
            )
    lines += [
        "",
        "| sampling (32 rows, 16 + 32 tokens) | tokens/s | jax_lowrank is |",
        "|---|--:|--:|",
    ]
    ours = {r["method"]: r["tokens_per_second"] for r in result["generate"]["jax_lowrank"]}
    for adapter, kind in ((False, "full"), (True, "lora")):
        label = "with adapter" if adapter else "plain"
        lines.append(f"| jax_lowrank, {label} | {ours[kind]:,.0f} | |")
        for name, peer in result["generate"].items():
            for row in peer["rows"] if name != "jax_lowrank" else ():
                if row["lora"] == adapter:
                    speed = row["tokens_per_second"]
                    lines.append(
                        f"| {name.split(',')[0]} PyTorch, {label}, {row['cache']} cache"
                        f" | {speed:,.0f} | {ours[kind] / speed:.2f} × |"
                    )
    return "\n".join(lines)


def main() -> None:
    """Measure and write, or print the table of an earlier run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--shapes", nargs="+", default=["gpt2", "llama"])
    parser.add_argument("--methods", nargs="+", default=["lora", "full"])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--table", type=Path, help="print the table of this result file")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text())))
        return

    def say(row):
        speed = f"{row['tokens_per_second']:,.0f} tokens/s, {row['peak_mb']:,.0f} MB"
        print(f"{row['shape']} {row['method']} {row['name']}: {speed}", flush=True)

    result = {"date": datetime.date.today().isoformat(), **measure(options, say)}
    machine = re.sub(r"[^a-z0-9]+", "-", result["cpu"].lower()).strip("-")
    path = HERE / "results" / f"finetune-{machine}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{table(result)}\n\nwritten to {path}")


if __name__ == "__main__":
    main()
