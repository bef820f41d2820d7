"""Several workers on one folder: shards, claims, and a grid in which every run is done once."""

import collections
import fcntl
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from jax_lowrank import cli, results, workers
from jax_lowrank.config import MethodSpec, ModelSpec, Study, TaskSpec, TrainSpec
from jax_lowrank.mirror import Mirror
from jax_lowrank.study import schedule
from jax_lowrank.study.schedule import Schedule, needed, slots_of
from jax_lowrank.train import DivergedError
from jax_lowrank.workers import Shard, claim, shard_of, turn

SLURM = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "3"}


def test_shards():
    assert shard_of(None, {}) == Shard(0, 1) and shard_of("2/3", {}) == Shard(2, 3)
    spread = {"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_STEP": "2"}
    assert shard_of(None, SLURM | spread) == Shard(2, 3)
    assert shard_of("0/2", SLURM) == Shard(0, 2)  # what is said goes first
    job = {"JOB_COMPLETION_INDEX": "1", "JOB_COMPLETIONS": "4"}
    assert shard_of(None, job) == Shard(1, 4)
    assert shard_of(None, {"JOB_COMPLETION_INDEX": "1"}) == Shard(0, 1)
    items = list(range(11))
    assert sorted(item for i in range(4) for item in Shard(i, 4).part(items)) == items


def test_a_study_takes_its_shard_from_the_scheduler(tmp_path, monkeypatch, capsys):
    given = []

    def execute(prepared, note, shard, curves, *, together):
        given.append(shard)
        return 3

    monkeypatch.setattr(cli, "use_fast_memory", lambda: None)
    monkeypatch.setattr(cli, "set_up_jax", lambda: None)
    monkeypatch.setattr("jax_lowrank.study.prepare", lambda *a, **k: None)
    monkeypatch.setattr("jax_lowrank.study.execute", execute)
    line = ["study", str(DEMO), "--out", str(tmp_path)]
    job = {"JOB_COMPLETION_INDEX": "1", "JOB_COMPLETIONS": "4"}
    slurm = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "3"}
    for more, names in (([], {}), ([], job), ([], slurm), (["--shard", "0/2"], slurm)):
        with monkeypatch.context() as patch:
            for name, value in names.items():
                patch.setenv(name, value)
            assert cli.main([*line, *more]) == 0
        assert "3 runs of other shards are not: no report yet" in capsys.readouterr().out
    assert given == [Shard(0, 1), Shard(1, 4), Shard(2, 3), Shard(0, 2)]


DEMO = Path(__file__).parents[1] / "configs" / "demo.py"


@pytest.mark.parametrize("text", ["3", "3/3", "a/b", "-1/2", "1/0"])
def test_wrong_shards(text):
    with pytest.raises(ValueError, match="shard"):
        shard_of(text, {})


HOLD = """
import sys
from pathlib import Path
from jax_lowrank.workers import claim
with claim(Path(sys.argv[1])) as mine:
    print(mine, flush=True)
    input()
"""


def test_a_claim_ends_with_its_process(tmp_path):
    file = tmp_path / "claims" / "x"
    line = [sys.executable, "-c", HOLD, str(file)]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "True\n"
        with claim(file) as mine, claim(tmp_path / "y") as free:
            assert not mine and free
        told = []
        killer = threading.Timer(0.2, other.kill)
        killer.start()
        with turn(file, lambda: told.append(1), interval=0.01), claim(file) as again:
            assert told == [1] and not again
        other.wait()
    with claim(file) as mine:
        assert mine


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    assert workers.has_locks(tmp_path)

    def refuse(handle, how):
        raise OSError(workers.NO_LOCKS[0], "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert not workers.has_locks(tmp_path)
    with claim(tmp_path / "x") as mine:
        assert mine


def grid():
    """Two methods with two rates and three seeds each."""
    return Study(
        name="grid",
        question="?",
        model=ModelSpec(path="nowhere"),
        task=TaskSpec(),
        methods=tuple(MethodSpec("lora", (1e-2, 1e-3), rank=rank) for rank in (1, 2)),
        train=TrainSpec(),
    )


def worker(out, made, fails=(), most=2):
    """A Schedule whose runs take a moment and are counted; packs of at most so many."""
    study = grid()

    def name(prepared, run):
        rate = f"{run.learning_rate:g}" if run.method else ""
        return f"{run.kind}-{run.label}-{rate}-{run.seed}".replace(" ", "_")

    def make(named):
        records = []
        for run, fingerprint in named:
            made[fingerprint] += 1
            time.sleep(random.Random(fingerprint).uniform(0, 0.03))
            bad = run.kind == "tune" and run.learning_rate in fails
            loss = None if bad else run.learning_rate
            record = {"fingerprint": fingerprint, "validation_loss": loss, "diverged": {"step": 3}}
            results.write_run(out, record, [])
            records.append(record)
        return records

    def packs(named):
        return [named[i : i + most] for i in range(0, len(named), most)]

    progress = SimpleNamespace(note=lambda line: None)
    prepared = SimpleNamespace(out=out, study=study, mirror=Mirror(None, out))
    return Schedule(prepared, progress, name, packs, make, lambda run: None), slots_of(study)


def run_threads(functions):
    """All at once, to the end."""
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.fixture
def quick(monkeypatch):
    """Look at the others often."""
    monkeypatch.setattr(schedule, "POLL", 0.005)


def test_workers_share_a_grid(tmp_path, quick):
    made = collections.Counter()
    team = [worker(tmp_path, made) for _ in range(4)]
    run_threads([lambda s=s, slots=slots: s.work(slots) for s, slots in team])
    assert len(made) == 11 and set(made.values()) == {1}
    assert sum("final" in name and "0.001" in name for name in made) == 6  # the lower loss
    for each, slots in team:
        assert [each.record(slot) for slot in slots] == [team[0][0].records[slot] for slot in slots]


def test_shards_cover_the_grid_and_wait_for_nobody_who_is_not_there(tmp_path, quick):
    made = collections.Counter()
    first, slots = worker(tmp_path, made)
    mine = Shard(0, 3).part(slots)
    first.work(mine)  # alone: also does what its runs need
    assert sum(made.values()) == len(needed(grid(), mine)) < len(slots)
    assert [first.record(slot) for slot in slots].count(None) == len(slots) - len(
        needed(grid(), mine)
    )
    rest = [(worker(tmp_path, made)[0], Shard(i, 3).part(slots)) for i in (1, 2)]
    run_threads([lambda s=s, part=part: s.work(part) for s, part in rest])
    assert len(made) == 11 and set(made.values()) == {1}


def test_a_run_that_another_worker_has_is_waited_for(tmp_path, quick):
    made = collections.Counter()
    one, slots = worker(tmp_path, made)
    with claim(tmp_path / "claims" / "tune-LoRA_r=1-0.01-0") as mine:
        assert mine
        thread = threading.Thread(target=one.work, args=(slots,))
        thread.start()
        while sum(made.values()) < 11 - 1 - 3:  # all but that one, and what depends on it
            time.sleep(0.01)
        time.sleep(0.1)
        assert thread.is_alive() and not any("final-LoRA_r=1" in name for name in made)
    thread.join()
    assert len(made) == 11 and set(made.values()) == {1}


def test_only_who_has_a_run_deletes_its_checkpoints(tmp_path):
    made = collections.Counter()
    slot = worker(tmp_path, made)[1][0]
    worker(tmp_path, made)[0].work([slot])
    left = tmp_path / "checkpoints" / "base-base--None"
    left.mkdir(parents=True)
    with claim(tmp_path / "claims" / left.name):  # by a worker that is deleting them
        worker(tmp_path, made)[0].work([slot])
        assert left.exists()
    worker(tmp_path, made)[0].work([slot])  # it was killed before
    assert not left.exists() and made.total() == 1


def test_rates_that_all_diverge(tmp_path):
    one, slots = worker(tmp_path, collections.Counter(), fails=(1e-2, 1e-3))
    with pytest.raises(DivergedError):
        one.work(slots)
