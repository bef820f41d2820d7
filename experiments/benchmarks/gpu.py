"""Tokens/s, model FLOP utilisation and memory on a GPU, against transformers + PEFT.

    python experiments/benchmarks/gpu.py --torch-python .venv-bench/bin/python

Llama-3.2 1B and Llama-2 7B with random weights, LoRA r=16 on all linear layers and full
fine-tuning, bfloat16, rows of 1024 and 2048 tokens. One process a setting, each with the device to
itself, in rounds (every second one backwards); ratios are those of a round. What is recomputed in
the backward pass is the least that the memory plan has room for; the peer checkpoints where ours
recomputes, or where it runs out of memory. A case that does not fit is said so. Writes
results/gpu-<device>.json beside this file after every process; cases that are not measured again
stay in it, and `--table FILE` prints its table. About 4 minutes a case on an H200; `--cases tiny`
takes a minute on a CPU. Utilisation: see flops.py.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import flops
import jax
import peer_env
from finetune import run_alone

from jax_lowrank import memory, models
from jax_lowrank.adapt import METHODS
from jax_lowrank.config import TrainSpec
from jax_lowrank.models import attention
from jax_lowrank.models.llama import LlamaConfig

HERE = Path(__file__).parent
TINY = LlamaConfig(
    vocab_size=512,
    num_layers=2,
    width=128,
    num_heads=4,
    num_kv_heads=2,
    head_width=32,
    mlp_width=384,
    max_positions=64,
)
# case -> sizes, tokens of a step, lengths of a row
CASES = {
    "tiny": (TINY, 128, (64,)),
    "1B": (LlamaConfig.llama32_1b(), 8192, (1024, 2048)),
    "7B": (LlamaConfig.llama2_7b(), 8192, (1024, 2048)),
}
LORA = {"rank": 16, "alpha": 32.0}
REMATS = ("none", "dots", "full")
ROOM = 0.9  # of the device, for what is planned
OURS = "jax_lowrank"
PEERS = {"PEFT, eager": False, "PEFT, compiled": True}
OUT_OF_MEMORY = re.compile(r"out of memory|RESOURCE_EXHAUSTED", re.IGNORECASE)
TARGETS = "Targets: 55 % utilisation for 7B LoRA, 1.3 × PEFT."


def planned(config, method: str, rows: int, length: int, remat: str) -> int:
    """Bytes that a step takes, by `memory.estimate` with a kernel that makes no (S, S) array."""
    model = models.abstract(config.to_hf(models.Head()), "bfloat16")
    method = METHODS[method](**(LORA if method == "lora" else {}))
    one, before = memory.Sizes({"data": 1, "fsdp": 1, "tensor": 1}), attention.use("splash")
    try:
        spec = TrainSpec(remat=remat, steps_per_call=1)
        return memory.estimate(model, method, spec, rows, length, one).total
    finally:
        attention.use(before)


def choose(config, method: str, tokens: int, length: int, options, room: int) -> dict:
    """Rows of a step, what is kept of them, and the bytes planned.

    The first policy that fits with the most rows, halved down to one; "fits" says whether any does.
    Given ones are taken as they are.
    """
    rows = options.rows or max(1, tokens // length)
    remats = (options.remat,) if options.remat else REMATS
    while True:
        for remat in remats:
            found = {"rows": rows, "remat": remat}
            found["planned_bytes"] = planned(config, method, rows, length, remat)
            if found["planned_bytes"] <= room or (options.rows and options.remat):
                return {**found, "fits": True}
        if rows == 1 or options.rows:
            return {**found, "fits": False}
        rows //= 2


def work_of(config, method: str, length: int, chosen: dict, options) -> dict:
    """What ours_gpu.py and peer_gpu.py are given."""
    return {
        "config": config.to_hf(models.Head()),
        "method": method,
        **LORA,
        "rows": chosen["rows"],
        "length": length,
        "dtype": "bfloat16",
        "remat": chosen["remat"],
        "rate": 1e-4,
        "steps": options.steps,
        "warmup": 2,
        "turns": options.turns,
    }


def ours(work: dict, folder: Path) -> dict:
    """The report of ours_gpu.py; compiled programs are kept in `folder`."""
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", **os.environ}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(folder / "jax")
    return run_alone([sys.executable, str(HERE / "ours_gpu.py"), json.dumps(work)], environment)


def peer(work: dict, options, folder: Path) -> dict:
    """The report of peer_gpu.py; with gradient checkpointing where it runs out of memory."""
    environment = peer_env.peer_environment(os.cpu_count(), compile_cache=folder / "torch")
    environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    while True:
        command = [options.torch_python, str(HERE / "peer_gpu.py"), json.dumps(work)]
        try:
            return {"checkpointing": work["checkpointing"], **run_alone(command, environment)}
        except RuntimeError as error:
            if work["checkpointing"] or not OUT_OF_MEMORY.search(str(error)):
                raise
            work = {**work, "checkpointing": True}


def torch_refusal(python: str) -> str | None:
    """Why the peer cannot run; None when it can."""
    done = subprocess.run(
        [python, "-c", "import torch, transformers, peft"],
        env=peer_env.peer_environment(1),
        capture_output=True,
        text=True,
    )
    return done.stderr.strip().rpartition("\n")[2] if done.returncode else None


def measure(case: dict, work: dict, options, folder: Path, save) -> None:
    """Every setting of a case, in rounds; what fails is recorded with what it said."""
    settings = {OURS: lambda: ours(work, folder)}
    for name, compiled in PEERS.items() if case["peer"] is None else ():
        theirs = {**work, "compile": compiled, "checkpointing": work["remat"] != "none"}
        settings[name] = lambda theirs=theirs: peer(theirs, options, folder)
    rows = case["rows_of"] = {name: [] for name in settings}
    for number in range(options.rounds):
        for name in settings if number % 2 == 0 else reversed(settings):
            if any("error" in row for row in rows[name]):
                continue
            try:
                rows[name].append(settings[name]())
            except RuntimeError as error:
                rows[name].append({"error": str(error)[-2000:]})
            save()
            print(f"{case['name']}, round {number + 1}: {name} {brief(rows[name][-1])}", flush=True)


def brief(row: dict) -> str:
    """A row on the log."""
    if "error" in row:
        return f"failed: {reason(row)}"
    return f"{median(row['seconds']) * 1e3:,.1f} ms a step, {row['peak_bytes'] / 1e9:.1f} GB"


def reason(row: dict) -> str:
    """Why a setting has no numbers, in a few words."""
    if OUT_OF_MEMORY.search(row["error"]):
        return "out of memory"
    return row["error"].strip().rpartition("\n")[2][:80]


def run_all(options, path: Path, result: dict) -> None:
    """Measure the cases asked for into `result`, which is written after every process."""
    lacking = torch_refusal(options.torch_python) if options.peer else "--no-peer"
    if lacking:
        print(f"without PEFT ({options.torch_python}): {lacking}", flush=True)

    def save():
        path.write_text(json.dumps(result, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        for size in options.cases:
            config, tokens, lengths = CASES[size]
            for method in options.methods:
                for length in [n for n in options.lengths or lengths if n <= config.max_positions]:
                    chosen = choose(
                        config, method, tokens, length, options, ROOM * result["device"]["bytes"]
                    )
                    name = f"{size} {method} {length}"
                    work = work_of(config, method, length, chosen, options)
                    case = {"name": name, "date": datetime.date.today().isoformat(), **chosen}
                    case |= {"length": length, "method": method, "size": size, "peer": lacking}
                    case["flops"] = flops.of_llama(
                        method, config, chosen["rows"], length, LORA["rank"]
                    )
                    result["cases"][name] = case
                    if chosen["fits"]:
                        measure(case, work, options, Path(folder), save)
                    else:
                        print(f"{name}: needs {chosen['planned_bytes'] / 1e9:.0f} GB", flush=True)
                    save()


def ratios(case: dict, name: str) -> list[float]:
    """How many times as fast ours is as `name`, round by round."""
    pairs = zip(case["rows_of"][OURS], case["rows_of"][name])
    return [
        median(theirs["seconds"]) / median(mine["seconds"])
        for mine, theirs in pairs
        if "seconds" in mine and "seconds" in theirs
    ]


def lines_of(case: dict, peak: float) -> list[str]:
    """Table lines of one case."""
    shape = f"{case['name'].rpartition(' ')[0]} | {case['rows']} x {case['length']}"
    if not case["fits"]:
        need = f"needs {case['planned_bytes'] / 1e9:.0f} GB with {case['remat']} recomputed"
        return [f"| {shape} | does not fit: {need} | | | | |"]
    lines = []
    for name, rows in case["rows_of"].items():
        good = [row for row in rows if "seconds" in row]
        if not good:
            lines.append(f"| {shape} | {name}: {reason(rows[0])} | | | | |")
            continue
        seconds = median(second for row in good for second in row["seconds"])
        kept = f"remat {case['remat']}"
        if name != OURS:
            kept = "checkpointing" if good[0]["checkpointing"] else "no checkpointing"
        used = case["flops"] / seconds / peak
        found = ratios(case, name) if name != OURS else []
        against = f"{median(found):.2f} × ({min(found):.2f} to {max(found):.2f})" if found else ""
        lines.append(
            f"| {shape} | {name}, {kept} | {case['rows'] * case['length'] / seconds:,.0f}"
            f" | {'?' if math.isnan(used) else f'{used:.1%}'} | {against}"
            f" | {max(row['peak_bytes'] for row in good) / 1e9:.1f} |"
        )
    if case["peer"]:
        lines.append(f"| {shape} | PEFT was not measured: {case['peer']} | | | | |")
    return lines


def table(result: dict) -> str:
    """Tokens/s, utilisation, ratios and peak memory of every case."""
    device, given = result["device"]["device"], result["peak_tflops"]
    peak = flops.peak(device, given)
    unknown = f"no peak known for {device}; give --peak TFLOP/s"
    said = unknown if math.isnan(peak) else f"peak {peak / 1e12:.0f} TFLOP/s"
    versions = ", ".join(f"{k} {v}" for k, v in result["device"]["versions"].items())
    dates = sorted({case["date"] for case in result["cases"].values()})
    lines = [
        f"{device}, {' to '.join(dates)}; {versions}; {said}. Utilisation counts what the model"
        " needs (LoRA 4·P·T and 6·A·T, full 6·P·T, half of causal attention), not what is"
        f" recomputed; ratios: median over rounds (smallest to largest). {TARGETS}",
        "",
        "| case | rows | setting | tokens/s | utilisation | jax_lowrank is | peak GB |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    return "\n".join(
        [*lines, *(x for case in result["cases"].values() for x in lines_of(case, peak))]
    )


def main() -> None:
    """Measure and write, or print the table of an earlier run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--cases", nargs="+", default=["1B", "7B"], choices=CASES)
    parser.add_argument("--methods", nargs="+", default=["lora", "full"], choices=["lora", "full"])
    parser.add_argument("--lengths", nargs="+", type=int, help="tokens of a row")
    parser.add_argument("--rows", type=int, help="rows of a step (default: 8192 tokens, or fewer)")
    parser.add_argument("--remat", choices=REMATS, help="default: the least that fits")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3, help="timed calls of a process")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of a call")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--peak", type=float, help="dense bf16 TFLOP/s of the device")
    parser.add_argument("--out", type=Path, help="instead of results/")
    parser.add_argument("--table", type=Path, help="print the table of this result file")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text())))
        return
    jax.config.update("jax_platforms", "cpu")  # here, where memory is planned: not in the others
    with tempfile.TemporaryDirectory() as folder:
        device = ours({"device": True}, Path(folder))["environment"]
    machine = re.sub(r"[^a-z0-9]+", "-", device["device"].lower()).strip("-")
    path = options.out or HERE / "results" / f"gpu-{machine}.json"
    path.parent.mkdir(exist_ok=True)
    result = json.loads(path.read_text()) if path.exists() else {"cases": {}}
    result |= {"device": device, "peak_tflops": options.peak}
    run_all(options, path, result)
    print(f"\n{table(result)}\n\nwritten to {path}")


if __name__ == "__main__":
    main()
