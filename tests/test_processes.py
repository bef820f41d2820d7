"""Several processes that run one command: what they agree on, write once, and survive."""

import json
import random
import re
import signal
import time

import jax
import numpy as np
import pytest
import tiny_text
from held import began_at, newest, same_arrays
from safetensors.numpy import load_file
from test_sharding import free_port
from test_study import CONFIG

from jax_lowrank import processes, results


def together(forks, module, *arguments, only=({}, {}), **environment):
    """Two processes of one program, on a device each. only: what one of them has in addition."""
    names = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    names |= environment
    return [
        forks.start(module, *arguments, JAX_PROCESS_ID=str(n), **names, **own)
        for n, own in enumerate(only)
    ]


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


def finetuning(rows, out, seconds=0):
    """Arguments of a full fine-tuning that saves after every compiled call."""
    line = ["finetune", "--model", rows / "model", "--data", rows / "pairs.jsonl", "--out", out]
    line += ["--method", "full", "--epochs", 20, "--learning-rate", 0.01, "--max-length", 16]
    return [*line, "--train.checkpoint-seconds", seconds, "--train.steps-per-call", 2]


def saved(out):
    """The checkpoints of a run that is not over."""
    return out.with_name(f"{out.name}.checkpoints")


def signed(out):
    """The manifests of those."""
    return set(saved(out).glob("*/*/manifest.json"))


def start(forks, rows, out, only=({}, {}), seconds=0):
    """The fine-tuning in two processes, which write what arrays each of them ends with."""
    return command(forks, *finetuning(rows, out, seconds), only=only, ARRAYS=f"{out}.arrays")


def stored(out):
    """What a run wrote that does not depend on the clock."""
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for line in log:
        line.pop("tokens_per_second", None)
    with np.load(out / "predictions.npz") as arrays:
        rows = {name: arrays[name].tobytes() for name in arrays.files}
    return (out / "trainable.safetensors").read_bytes(), rows, log


def record(out):
    """What a run says of itself."""
    return json.loads((out / "record.json").read_text())


def assert_same(out, whole):
    """Two runs wrote the same, and their processes held the same arrays, the optimizer's too."""
    assert stored(out) == stored(whole)
    for n in (0, 1):
        assert same_arrays(f"{out}.arrays-{n}.npz", f"{whole}.arrays-{n}.npz")
    assert not saved(out).exists()


def over(running):
    """Whether one of these has ended."""
    return any(each.poll() is not None for each in running)


@pytest.fixture(scope="module")
def whole(rows, forks):
    """The fine-tuning that nothing interrupted."""
    out = rows / "whole"
    both = command(forks, *finetuning(rows, out), WATCHED=str(out), ARRAYS=f"{out}.arrays")
    assert ended(both) == [0, 0], both[0].said() + both[1].said()
    signs = [sum("manifest.json" in line for line in changes(each)) for each in both]
    assert signs[0] and not signs[1]
    assert [began_at(each) for each in both] == [0, 0] and record(out)["resumed_at"] == []
    names = [set(np.load(f"{out}.arrays-{n}.npz").files) for n in (0, 1)]
    parts = names[0] ^ names[1]  # what only one of them holds
    for state in ("trainable", "opt_state", "best"):
        assert any(name.startswith(f"{state}.") for name in parts)
    return out


@pytest.mark.slow
def test_the_file_of_what_was_trained_is_made_up_of_the_processes_parts(whole):
    written, numbers = load_file(whole / "trainable.safetensors"), {}
    for n in (0, 1):
        with np.load(f"{whole}.arrays-{n}.npz") as arrays:
            for name in arrays.files:
                state, _, place = name.partition(" ")
                if state.startswith("best."):
                    path = state.removeprefix("best.").removesuffix(".value")
                    index = eval(place or "...", {"slice": slice})
                    np.testing.assert_array_equal(written[path][index], arrays[name])
                    numbers[path, place] = arrays[name].size
    sizes = dict.fromkeys(written, 0)
    for (path, _), size in numbers.items():
        sizes[path] += size
    assert sizes == {path: array.size for path, array in written.items()}


def killed_in(stage, rng, running, file, out):
    """Kill one of two processes, or both, where `file` says that one of them halts, or a moment
    after the next save; then the other one. Who was killed first, and where; nobody where the run
    is over before.
    """
    victims, where, before = rng.choice(([0], [1], [0, 1])), "at any time", signed(out)
    if stage == "run":
        running[0].until(lambda: signed(out) - before or over(running))
        time.sleep(rng.uniform(0, 0.5))
    else:
        running[0].until(lambda: file.exists() or over(running))
        if not file.exists():
            return [], "nowhere"
        where = file.read_text()
    for number in victims:
        running[number].send_signal(signal.SIGKILL)
        running[number].wait()
    file.unlink(missing_ok=True)  # the one that halted goes on, if it lives
    time.sleep(rng.uniform(0, 0.3))
    for each in running:  # as a scheduler does with the others of a job
        each.send_signal(signal.SIGKILL)
    return victims, where


@pytest.mark.slow
def test_two_processes_that_are_killed_end_with_the_same_bits(tmp_path, rows, whole, forks):
    rng, file = random.Random(3), tmp_path / "held"
    plans = rng.sample(("save", "finalise", "delete", "run") * 7, 25)
    kills, resumed, chain, at = [], 0, 0, 0
    while True:
        out, stage = tmp_path / f"chain-{chain}", plans.pop() if plans else "none"
        before, only = newest(saved(out)), [{}, {}]
        if stage not in ("run", "none"):  # the first one alone finalises and deletes
            holder = rng.randrange(2) if stage == "save" else 0
            only[holder] = {"HELD": f"{stage} {rng.randint(1, 30)} {file}"}
        running = start(forks, rows, out, only)
        if stage != "none":
            victims, where = killed_in(stage, rng, running, file, out)
        codes = ended(running)  # JAX may have ended the other one, by SIGABRT
        steps = [step for step in map(began_at, running) if step is not None]
        assert set(steps) <= {before}, (steps, before)  # at most the work since a save is lost
        resumed, at = resumed + any(steps), max([*steps, at])
        if -signal.SIGKILL in codes:
            assert newest(saved(out)) >= before or (out / "record.json").exists()
            kills.append((stage, victims, where))
            continue
        assert codes == [0, 0], running[0].said() + running[1].said()
        assert_same(out, whole)
        assert record(out)["resumed_at"][-1:] == [at] * (at > 0)
        chain, at = chain + 1, 0
        if not plans:
            break
    print(f"{len(kills)} kills, {resumed} sessions went on, {chain} runs: {kills}")
    stages = [stage for stage, *_ in kills]
    assert len(kills) >= 20 and len(set(stages)) == 4 and resumed >= 15
    assert all(stages.count(stage) >= 3 for stage in stages)


@pytest.mark.slow
def test_a_signal_to_one_of_two_stops_both_and_they_go_on(tmp_path, rows, whole, forks):
    out, stops = tmp_path / "out", []
    for number in (1, 0):
        both = start(forks, rows, out, seconds=3600)  # only the signal saves
        both[number].until(lambda: began_at(both[number]) is not None)  # noqa: B023
        both[number].send_signal(signal.SIGTERM)
        assert ended(both) == [75, 75], both[0].said() + both[1].said()
        stopped = [re.search(r"stopped after step (\d+) of", each.said()) for each in both]
        assert int(stopped[0][1]) == int(stopped[1][1]) == newest(saved(out))
        assert not out.exists() and began_at(both[0]) == (stops or [0])[-1]
        stops.append(newest(saved(out)))
    both = start(forks, rows, out, seconds=3600)
    assert ended(both) == [0, 0], both[0].said() + both[1].said()
    assert_same(out, whole)
    assert record(out)["resumed_at"] == stops == sorted(set(stops))


@pytest.mark.slow
def test_a_second_signal_to_one_of_two_ends_it_at_once(tmp_path, rows, whole, forks):
    out, file = tmp_path / "out", tmp_path / "held"
    both = first, second = start(forks, rows, out, ({"HELD": f"finalise 20 {file}"}, {}))
    first.until(file.exists)  # no save ends while it halts
    second.send_signal(signal.SIGINT)
    second.until(lambda: "once more to stop at once" in second.said())
    assert second.poll() is None
    second.send_signal(signal.SIGINT)
    assert second.wait(5) == 128 + signal.SIGINT
    file.unlink()
    began = time.monotonic()
    assert first.wait(150) not in (0, 75)  # JAX ends it, by SIGABRT
    print(f"the other one ends {time.monotonic() - began:.0f} s later, with {first.returncode}")
    step = newest(saved(out))
    both = start(forks, rows, out)
    assert ended(both) == [0, 0], both[0].said() + both[1].said()
    assert began_at(both[0]) == step > 0
    assert_same(out, whole)


@pytest.mark.slow
def test_a_disk_that_is_full_for_one_of_two_stops_both(tmp_path, rows, whole, forks):
    out = tmp_path / "out"
    first, second = start(forks, rows, out, ({}, {"FULL": "3"}))
    codes = ended((first, second), 120)  # the first one waits for its part, until JAX ends both
    assert not {0, 75}.intersection(codes), codes
    assert "could not be saved: [Errno 28] No space left on device" in second.said()
    step = newest(saved(out))
    both = start(forks, rows, out)
    assert ended(both) == [0, 0], both[0].said() + both[1].said()
    assert began_at(both[0]) == step > 0
    assert_same(out, whole)
