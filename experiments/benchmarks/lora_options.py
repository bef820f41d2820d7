"""What do LoRA's options cost: DoRA, PiSSA and OLoRA against plain LoRA?

    python experiments/benchmarks/lora_options.py

Steps take turns as in finetune.py: one process a setting, 4 steps a turn. `split` is the time from
a loaded model to one that can be trained, compilation included: there PiSSA and OLoRA decompose
every adapted weight. Memory is each process's largest resident size. Writes
results/lora-options-<processor>.json beside this file. About 10 minutes on 2 otherwise idle cores,
4 GB of memory.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import sys
from pathlib import Path

import finetune
import peer_env

HERE = Path(__file__).parent
OPTIONS = ("lora", "dora", "pissa", "olora")


def main() -> None:
    """Measure, write, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["gpt2", "bert"])
    parser.add_argument("--turns", type=int, default=8)
    given = parser.parse_args()
    environment = {**os.environ, "GLIBC_TUNABLES": peer_env.HUGE_PAGES}
    rows = []
    print("| task | option | step, of plain LoRA's | split s | peak MB |\n|---|---|--:|--:|--:|")
    for shape in given.shapes:
        command = [sys.executable, str(finetune.OURS), "--shape", shape, "--method"]
        settings = {name: ([*command, name], environment) for name in OPTIONS}
        found = finetune.in_turns(settings, given.turns)
        rows += found
        for row in found:
            # `ratio` says how many times as fast the first is; here: how many times as long.
            pair = [{**found[0], "name": "jax_lowrank"}, {**row, "name": "other"}]
            middle, low, high = finetune.ratio(pair, "other")
            print(
                f"| {shape} | {row['name']} | {middle:.2f} × ({low:.2f} to {high:.2f})"
                f" | {row['split_seconds']:.2f} | {row['peak_mb']:,.0f} |",
                flush=True,
            )
    result = {"date": datetime.date.today().isoformat(), "turns": given.turns, "rows": rows}
    cpu = rows[0]["environment"]["device"]
    machine = re.sub(r"[^a-z0-9]+", "-", cpu.lower()).strip("-")
    path = HERE / "results" / f"lora-options-{machine}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
