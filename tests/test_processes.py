"""Several processes that run one command: what they agree on, write once, and survive."""

import json
import random
import signal
import time

import jax
import numpy as np
import pytest
import tiny_text
from test_sharding import free_port
from test_study import CONFIG

from jax_lowrank import processes, results


def together(forks, module, *arguments, **environment):
    """Two processes of one program, on a device each."""
    names = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    names |= environment
    return [forks.start(module, *arguments, JAX_PROCESS_ID=str(n), **names) for n in (0, 1)]


def command(forks, *arguments, **environment):
    """`jax-lowrank ... --distributed` in two processes."""
    return together(forks, "jax_lowrank.cli", *arguments, "--distributed", **environment)


def changes(process):
    """What Python code of a process changed in the folder WATCHED, apart from what each process
    asks the file system, and from checkpoints, of which each writes its part.
    """
    told = [line for line in process.said().splitlines() if " changes " in line]
    asked = ("/two", "/.writable", "/claims", "/claims/probe")
    return [line for line in told if not line.endswith(asked) and "/checkpoints/" not in line]


def ended(running, seconds=240):
    """Exit codes."""
    return [each.wait(seconds) for each in running]


def test_nobody_to_join(monkeypatch):
    def alone(**options):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", alone)
    with pytest.raises(ValueError, match=r"nothing says where .* set JAX_COORDINATOR_ADDRESS"):
        processes.join(True, {"JAX_COORDINATOR_ADDRESS": "here:1"})
    processes.join(False, {})
    assert processes.is_first() and not processes.several()


@pytest.mark.slow
def test_what_one_process_finds_all_know(forks):
    first, second = both = together(forks, "agreeing")
    assert ended(both) == [0, 0], first.said() + second.said()
    assert (first.printed(), second.printed()) == ("the first one speaks\n", "")
    assert first.said().splitlines()[-2:] == [
        "ValueError no room, says 0",
        "PeerError another process failed; it says why",
    ]
    assert second.said().splitlines()[-2:] == [
        "PeerError no room, says 0",
        "ValueError no room, says 1",
    ]


# Sums in another order, over pretraining and training.
CLOSE = {"rtol": 1e-3, "atol": 1e-3}


def by_place(directory):
    """(kind, method, learning rate, seed) -> run."""
    keys = ("kind", "label", "learning_rate", "seed")
    runs = results.read_study(directory).runs
    return {tuple(run.record[key] for key in keys): run for run in runs}


@pytest.mark.slow
def test_a_study_in_two_processes_is_that_of_one(tmp_path, forks):
    small = CONFIG.replace("(1e-2, 1e-3)", "(1e-2,)").replace("(1, 2)", "(1,)")
    small = small.replace(', MethodSpec("full", (1e-3,))', ",").replace("1280", "640")
    (tmp_path / "tiny.py").write_text(small)
    line = ["study", tmp_path / "tiny.py", "--out"]
    one = forks.start("jax_lowrank.cli", *line, tmp_path / "one")
    assert one.wait() == 0, one.said()
    mesh = ("--mesh.data", "2", "--mesh.fsdp", "1")
    out = str(tmp_path / "two")
    first, second = both = command(forks, *line, out, *mesh, WATCHED=out)
    assert ended(both) == [0, 0], first.said() + second.said()
    assert changes(first) and changes(second) == []
    assert "report: " in first.printed() and second.printed() == ""
    assert "validation loss" in first.said() and "ETA" in first.said()
    assert not any(word in second.said() for word in ("ETA", "loss", "LoRA", "pretrain"))
    expected, found = by_place(tmp_path / "one"), by_place(tmp_path / "two")
    assert found.keys() == expected.keys() and len(found) == 3
    for place, run in expected.items():
        record = found[place].record
        assert record["environment"]["num_processes"] == 2
        assert record["environment"]["mesh"] == {"data": 2, "fsdp": 1, "tensor": 1}
        assert record["best_step"] == run.record["best_step"]
        if place[0] != "base":
            loss = record["validation_loss"]
            np.testing.assert_allclose(loss, run.record["validation_loss"], **CLOSE)
        if run.arrays:
            nll = found[place].arrays["neutral/nll"]
            np.testing.assert_allclose(nll, run.arrays["neutral/nll"], **CLOSE)
    trees = [sorted(p.name for p in (tmp_path / name).iterdir()) for name in ("one", "two")]
    assert trees[0] == trees[1]
    assert len(list((tmp_path / "two" / "runs").iterdir())) == 3  # nothing partial


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A folder with a tiny checkpoint and rows to train it on."""
    folder = tmp_path_factory.mktemp("finetuning")
    tiny_text.checkpoint(folder / "model")
    tiny_text.jsonl(folder / "pairs.jsonl", tiny_text.pairs(64))
    return folder


def finetuning(rows, out):
    """Arguments of a full fine-tuning that saves after every compiled call."""
    line = ["finetune", "--model", rows / "model", "--data", rows / "pairs.jsonl", "--out", out]
    line += ["--method", "full", "--epochs", 20, "--learning-rate", 0.01, "--max-length", 16]
    return [*line, "--train.checkpoint-seconds", 0, "--train.steps-per-call", 2]


def stored(out):
    """What a run wrote that does not depend on the clock."""
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for line in log:
        line.pop("tokens_per_second", None)
    with np.load(out / "predictions.npz") as arrays:
        rows = {name: arrays[name].tobytes() for name in arrays.files}
    return (out / "trainable.safetensors").read_bytes(), rows, log


def signed(out):
    """The whole checkpoints of a run that is not over."""
    return set(out.with_name(f"{out.name}.checkpoints").glob("*/*/manifest.json"))


def over(running):
    """Whether one of these has ended."""
    return any(each.poll() is not None for each in running)


@pytest.mark.slow
def test_two_processes_that_are_killed_end_with_the_same_bits(tmp_path, rows, forks):
    whole = command(forks, *finetuning(rows, tmp_path / "whole"), WATCHED=str(tmp_path / "whole"))
    assert ended(whole) == [0, 0], whole[0].said() + whole[1].said()
    signs = [sum("manifest.json" in line for line in changes(each)) for each in whole]
    assert signs[0] and not signs[1]
    rng, kills, chain = random.Random(3), [], 0
    out = tmp_path / "chain-0"
    while len(kills) < 20:
        victims = rng.choice(([0], [1], [0, 1]))
        before, running = signed(out), command(forks, *finetuning(rows, out))
        running[0].until(lambda: signed(out) - before or over(running))  # noqa: B023
        time.sleep(rng.uniform(0, 0.5))
        for number in victims:
            running[number].send_signal(signal.SIGKILL)
        time.sleep(rng.uniform(0, 0.3))
        for each in running:  # as a scheduler does with the others of a job
            each.send_signal(signal.SIGKILL)
        codes = ended(running)  # JAX may have ended the other one, by SIGABRT
        if any(codes):
            kills.append(victims)
        else:
            assert stored(out) == stored(tmp_path / "whole")
            chain, out = chain + 1, tmp_path / f"chain-{chain + 1}"
    print(f"{len(kills)} kills: {kills}")
    last = command(forks, *finetuning(rows, out))
    assert ended(last) == [0, 0], last[0].said() + last[1].said()
    assert stored(out) == stored(tmp_path / "whole")
    assert not signed(out) and not out.with_name(f"{out.name}.checkpoints").exists()
