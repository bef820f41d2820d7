"""What does an adapter's step cost in a sweep, against single runs here and in PEFT?

    python experiments/benchmarks/sweep.py --torch-python .venv-bench/bin/python

One process a setting; the processes of a case take turns, so that a machine whose speed drifts
slows all of them. PEFT eager as installed, and compiled with huge pages and MKL's fast path (its
strongest form), see peer_env.py. Writes results/sweep-<processor>.json beside this file, case by
case, and prints the table; cases that are not measured again stay in it. `--table FILE` prints the
table of a file. About 35 minutes on 2 otherwise idle cores.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from statistics import median

import peer_env
from finetune import in_turns, run_alone

HERE = Path(__file__).parent
# name -> shape, rows, tokens a row, most cells, PEFT's steps in a turn
CASES = {
    "small, 1 x 32": ("small", 1, 32, 32, 200),
    "small, 4 x 64": ("small", 4, 64, 32, 100),
    "MiniLM-size, 1 x 32": ("minilm", 1, 32, 32, 40),
    "MiniLM-size, 4 x 64": ("minilm", 4, 64, 16, 12),
    "MiniLM-size, 16 x 128": ("minilm", 16, 128, 4, 3),
}
COUNTS = (1, 2, 4, 8, 16, 32)
ALONE = "single run"
WHOLE = ("small", 4, 64), ("minilm", 1, 32)  # start-up included: 16 adapters, 50 steps each


def ours(arguments: dict) -> tuple[list[str], dict]:
    """Command and environment of ours_sweep.py."""
    flags = [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    environment = {**os.environ, "GLIBC_TUNABLES": peer_env.HUGE_PAGES}
    return [sys.executable, str(HERE / "ours_sweep.py"), *flags], environment


class Peer:
    """Commands of peer_sweep.py: its options come first, then the sizes."""

    def __init__(self, options, folder: Path):
        self.python, self.threads, self.folder = options.torch_python, options.threads, folder
        amd = "AMD" in peer_env.cpu_vendor()
        self.unlock = peer_env.build_unlock(folder) if amd else None

    def environment(self, best: bool) -> dict:
        """As installed, or the strongest."""
        folder = self.folder / str(best)
        unlock = self.unlock if best else None
        return peer_env.peer_environment(self.threads, unlock, best, folder)

    def script(self, turns: int, sizes: list, best: bool) -> str:
        """Python that runs peer_sweep.py with our pacing flags put before its sizes."""
        compiled = "--compile" if best else "--no-compile"
        fixed = ["--task", "train", "--shape", "gpt2", "--method", "lora", compiled]
        fixed += ["--turns", str(turns), "--paced"]
        argv = [str(HERE / "peer_sweep.py"), *fixed, "--", *map(str, sizes)]
        return (
            f"import sys, runpy; sys.path.insert(0, {str(HERE)!r}); sys.argv = {argv!r};"
            " runpy.run_path(sys.argv[0], run_name='__main__')"
        )


def settings_of(case: str, options, peer: Peer) -> dict[str, tuple[list[str], dict]]:
    """Name -> (command, environment) of a case's settings."""
    shape, rows, length, most, steps = CASES[case]
    sizes = {"shape": shape, "rows": rows, "length": length}
    out = {ALONE: ours(sizes)}
    out |= {f"K = {k}": ours({**sizes, "cells": k}) for k in COUNTS if k <= min(most, options.most)}
    for name, best in (("PEFT, eager, stock", False), ("PEFT, compiled, unlocked", True)):
        script = peer.script(options.turns, [shape, rows, length, steps], best)
        out[name] = ([options.torch_python, "-c", script], peer.environment(best))
    return out


def start_up(peer: Peer) -> list[dict]:
    """50 steps of 16 adapters, from nothing: the sweep; PEFT in one process, and in one each."""
    found = []
    for shape, rows, length in WHOLE:
        sizes = {"shape": shape, "rows": rows, "length": length}
        mine = run_alone(*ours({**sizes, "cells": 16, "steps": 50}))
        command = [peer.python, str(HERE / "peer_sweep.py"), "--"]
        command += [shape, str(rows), str(length), "50", "16"]
        theirs = {
            name: run_alone(command, peer.environment(best))
            for name, best in (("stock", False), ("unlocked", True))
        }
        found.append({**sizes, "sweep": mine, **theirs})
    return found


def ratio(rows: list[dict], name: str, other: str) -> tuple[float, float, float]:
    """What an adapter-step costs in `name`, as a multiple of `other`: median, smallest, largest
    over the turns."""
    one, two = (next(r for r in rows if r["name"] == n)["seconds"] for n in (name, other))
    ratios = [a / b for a, b in zip(one, two)]
    return median(ratios), min(ratios), max(ratios)


def table(result: dict) -> str:
    """Milliseconds of an adapter-step, and what it costs of a single run's and of PEFT's."""
    dates = sorted({case["date"] for case in result["cases"].values()})
    turns = sorted({case["turns"] for case in result["cases"].values()})
    lines = [
        f"{result['cpu']}, {' to '.join(dates)}; {' to '.join(map(str, turns))} turns, median"
        " (smallest to largest ratio of a turn); LoRA ranks 8, 4 and 2 in turn, f32.",
        "",
        "| case | | ms an adapter-step | of a single run | of PEFT, eager | of PEFT, compiled |"
        " peak MB |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for case, measured in result["cases"].items():
        rows = measured["rows"]
        others = [ALONE, *[row["name"] for row in rows if row["name"].startswith("PEFT")]]
        for row in rows:
            shares = []
            for other in others:
                middle, low, high = ratio(rows, row["name"], other)
                same = row["name"] == other
                shares.append("" if same else f"{middle:.2f} ({low:.2f} to {high:.2f})")
            shares += [""] * (3 - len(shares))
            lanes, size = row.get("plan", (1, 1))
            packs = f", {lanes} x {size} at once" if row.get("cells") else ""
            lines.append(
                f"| {case} | {row['name']}{packs} | {row['seconds_median'] * 1e3:.2f} |"
                f" {' | '.join(shares)} | {row['peak_mb']:,.0f} |"
            )
    if "start_up" in result:
        lines += ["", "From the start of the process, 16 adapters of 50 steps:", ""]
    for row in result.get("start_up", []):
        mine = row["sweep"]["whole_seconds"]
        parts = [f"{row['shape']}, {row['rows']} x {row['length']}: sweep {mine:.1f} s"]
        for name in ("stock", "unlocked"):
            one, each = row[name]["whole_seconds"], 16 * row[name]["first_seconds"]
            parts.append(
                f"PEFT {name}, eager: {one:.1f} s in one process ({one / mine:.1f} x),"
                f" {each:.1f} s in 16 ({each / mine:.1f} x)"
            )
        lines.append("- " + "; ".join(parts))
    return "\n".join(lines)


def main() -> None:
    """Measure and write, or print the table of an earlier run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES)
    parser.add_argument("--most", type=int, default=32, help="no more cells than these")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--start-up", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, help="instead of results/")
    parser.add_argument("--table", type=Path, help="print the table of this result file")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text())))
        return
    cpu = peer_env.cpu_vendor()
    machine = re.sub(r"[^a-z0-9]+", "-", cpu.lower()).strip("-")
    path = options.out or HERE / "results" / f"sweep-{machine}.json"
    path.parent.mkdir(exist_ok=True)
    result = json.loads(path.read_text()) if path.exists() else {"cpu": cpu, "cases": {}}
    today = datetime.date.today().isoformat()
    with tempfile.TemporaryDirectory() as folder:
        peer = Peer(options, Path(folder))
        for case in options.cases:
            rows = in_turns(settings_of(case, options, peer), options.turns)
            result["cases"][case] = {"date": today, "turns": options.turns, "rows": rows}
            path.write_text(json.dumps(result, indent=1) + "\n")
            print(case, "done", flush=True)
        if options.start_up:
            result["start_up"] = start_up(peer)
            path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{table(result)}\n\nwritten to {path}")


if __name__ == "__main__":
    main()
