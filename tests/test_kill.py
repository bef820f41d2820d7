"""Real processes, killed at random: what they leave, and what the next one makes of it."""

import json
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny_text
from held import began_at, newest, same_arrays
from test_study import CONFIG, outputs
from test_study_packs import assert_same, write_config

from jax_lowrank import results
from jax_lowrank.study import packs

SEEDS = {"save": range(6), "finalise": range(7, 13), "delete": range(13, 19), "run": range(19, 26)}


def killed(folder, forks, stage, seed):
    """Run tests/killed.py and kill it in a stage, or a moment after training began; the session,
    and the change of the disk that it was about to make."""
    rng, file = random.Random(seed), folder.with_suffix(".held")
    held = {} if stage == "run" else {"HELD": f"{stage} {rng.randint(1, 40)} {file}"}
    session = forks.start("killed", folder, ARRAYS=f"{folder}.arrays", **held)
    if stage == "run":
        session.until(lambda: began_at(session) is not None or session.poll() is not None)
        time.sleep(rng.uniform(0, 1.5))
    else:
        session.until(lambda: file.exists() or session.poll() is not None)
    where = file.read_text() if file.exists() else "at any time"
    session.send_signal(signal.SIGKILL)
    assert session.wait() in (0, -signal.SIGKILL), session.said()
    file.unlink(missing_ok=True)
    return session, where


@pytest.mark.slow
def test_a_run_killed_at_random_points_ends_with_the_same_bits(tmp_path, forks):
    whole = forks.start("killed", tmp_path / "whole", ARRAYS=str(tmp_path / "arrays"))
    assert whole.wait() == 0 and json.loads(whole.printed()) == [], whole.said()
    plans = [(seed, stage) for stage, seeds in SEEDS.items() for seed in seeds]
    random.Random(0).shuffle(plans)
    kills, resumed, chain = [], 0, 0
    while True:
        folder = tmp_path / f"chain-{chain}"
        before = newest(folder)
        if plans:
            seed, stage = plans.pop()
            session, where = killed(folder, forks, stage, seed)
        else:
            session = forks.start("killed", folder, ARRAYS=f"{folder}.arrays")
            session.wait()
        # At most the work since the newest whole checkpoint is lost, and no such checkpoint.
        assert began_at(session) == before <= newest(folder)
        resumed += before > 0
        if session.returncode:
            kills.append((stage, seed, where))
            continue
        assert same_arrays(f"{folder}.npz", tmp_path / "whole.npz")
        steps = json.loads(session.printed())
        assert steps == sorted(steps) and steps[-1:] == [before] * (before > 0)
        chain += 1
        if not plans:
            break
    print(f"{len(kills)} kills, {resumed} sessions went on, {chain} runs: {kills}")
    assert len(kills) >= 20 and {stage for stage, *_ in kills} == set(SEEDS)
    assert resumed >= 15


@pytest.mark.slow
def test_four_workers_and_random_kills_do_every_run_once(tmp_path, forks):
    eager = CONFIG.replace("max_length=24", "max_length=24, checkpoint_seconds=0.0")
    (tmp_path / "tiny.py").write_text(eager)

    def worker(out):
        return forks.start("jax_lowrank.cli", "study", tmp_path / "tiny.py", "--out", out)

    rng, out = random.Random(7), tmp_path / "many"
    one = worker(tmp_path / "one")
    assert one.wait() == 0, one.said()
    workers = [worker(out) for _ in range(4)]
    started, num_killed, deadline = [*workers], 0, time.monotonic() + 300
    while any(each.poll() is None for each in workers):
        assert time.monotonic() < deadline
        time.sleep(rng.uniform(0.5, 2))
        victim = rng.randrange(4)
        if num_killed < 4 and workers[victim].poll() is None:
            workers[victim].send_signal(signal.SIGKILL)
            workers[victim].wait()
            num_killed += 1
            workers[victim] = worker(out)
            started.append(workers[victim])
    logs = [each.said() for each in started]
    assert [each.returncode for each in workers] == [0] * 4, "\n".join(logs)
    assert num_killed >= 3
    expected, found = outputs(tmp_path / "one"), outputs(out)
    assert found.keys() == expected.keys() and len(found) == 5
    for name, run in expected.items():
        assert found[name].completions == run.completions
        for key, array in run.arrays.items():
            assert found[name].arrays[key].tobytes() == array.tobytes(), key
    lines = [line for log in logs for line in log.splitlines() if "lr " in line and "seed" in line]
    over = [line for line in lines if "harm" in line or ": validation loss" in line]
    assert len(over) == len({line.split(":")[0] for line in over}), over
    assert len(json.loads((out / "runs.json").read_text())) == 8
    assert not any((out / "checkpoints").iterdir()) and not list(out.rglob(".partial-*"))
    assert len(results.read_study(out).runs) == 8


@pytest.mark.slow
def test_a_shard_killed_in_the_middle_of_a_pack(tmp_path, forks):
    """Two shards are two processes on one folder; one dies in a pack and is started again."""
    config, out = write_config(tmp_path), tmp_path / "shards"
    config.write_text(config.read_text().replace("epochs=2,", "epochs=2, checkpoint_seconds=0.0,"))

    def worker(kill, folder, *flags):
        return forks.start("killed_pack", kill, "study", config, "--out", folder, *flags)

    whole = worker(0, tmp_path / "whole")
    assert whole.wait() == 0, whole.said()
    one, two = worker(2, out, "--shard", "0/2"), worker(0, out, "--shard", "1/2")
    assert one.wait() == -signal.SIGKILL, one.said()
    assert packs.begun(out), one.said()
    again = worker(0, out, "--shard", "0/2")
    assert (two.wait(), again.wait()) == (0, 0), two.said() + again.said()
    expected, found = (results.read_study(folder).runs for folder in (tmp_path / "whole", out))
    assert len(found) == 16 == len({run.record["fingerprint"] for run in found})
    for run, other in zip(found, expected, strict=True):
        assert_same(run, other)
    assert any(run.record.get("resumed_at") for run in found)
    logs = [each.said() for each in (one, two, again)]
    ends = (": validation loss", ": test accuracy", ": diverged")
    over = [
        line.split(": ")[0]
        for log in logs
        for line in log.splitlines()
        if "lr " in line and any(end in line for end in ends)
    ]
    assert len(over) == len(set(over)) == 15, over
    assert not any((out / "checkpoints").iterdir()) and not list(out.rglob(".partial-*"))
    assert len(json.loads((out / "runs.json").read_text())) == 16


@pytest.fixture(scope="module")
def finetuning(tmp_path_factory, forks):
    """Starts `finetune` on a tiny checkpoint; arguments: where to, and further flags."""
    folder = tmp_path_factory.mktemp("finetuning")
    tiny_text.checkpoint(folder / "model")
    tiny_text.jsonl(folder / "pairs.jsonl", tiny_text.pairs(200))

    def start(out, *flags, **environment):
        line = ["finetune", "--model", folder / "model", "--data", folder / "pairs.jsonl"]
        line += ["--out", out, "--epochs", 60, "--rank", 2]
        line += ["--learning-rate", 0.01, "--max-length", 16, *flags]
        return forks.start("jax_lowrank.cli", *line, **environment)

    return start


@pytest.mark.slow
def test_a_signal_stops_finetune_and_the_same_command_goes_on(tmp_path, finetuning):
    assert finetuning(tmp_path / "whole").wait() == 0
    run = finetuning(tmp_path / "out")
    run.until(lambda: "steps]" in run.said())
    run.send_signal(signal.SIGTERM)
    assert run.wait() == 75, run.said()
    assert "stopped after step" in run.said() and "same command goes on" in run.said()
    assert not (tmp_path / "out").exists() and (tmp_path / "out.checkpoints").is_dir()
    assert finetuning(tmp_path / "out").wait() == 0
    assert not (tmp_path / "out.checkpoints").exists()
    whole, out = ({p.name: p for p in (tmp_path / n).iterdir()} for n in ("whole", "out"))
    assert whole.keys() == out.keys()
    weights = "trainable.safetensors"
    assert whole[weights].read_bytes() == out[weights].read_bytes()
    with np.load(whole["predictions.npz"]) as a, np.load(out["predictions.npz"]) as b:
        assert a.files == b.files
        assert all(a[name].tobytes() == b[name].tobytes() for name in a.files)
    records = [json.loads(found["record.json"].read_text()) for found in (whole, out)]
    assert records[0]["metrics"] == records[1]["metrics"]
    assert records[0]["resumed_at"] == [] and len(records[1]["resumed_at"]) == 1
    logs = [
        [json.loads(line) for line in found["log.jsonl"].read_text().splitlines()]
        for found in (whole, out)
    ]
    for log in logs:
        for line in log:
            line.pop("tokens_per_second", None)
    assert logs[0] == logs[1]


LONG = """
import jax
from jax_lowrank.checkpoint import Checkpoints
with Checkpoints("nowhere", "f") as checkpoints:
    print("begins", flush=True)
    long = jax.jit(lambda x: jax.lax.fori_loop(0, 2**31 - 1, lambda i, y: y * 0.9 + i, x))
    print(float(long(1.0)))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_even_a_compiled_call(environment, number):
    line = [sys.executable, "-c", LONG]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(line, env=environment, **pipes) as process:
        assert process.stdout.readline() == "begins\n"
        time.sleep(0.5)
        process.send_signal(number)
        assert "once more to stop at once" in process.stderr.readline()
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(5) == 128 + number
