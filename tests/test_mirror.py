"""A copy in a store: whole or absent, named when damaged, and enough to go on from."""

import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny_text
from fsspec.implementations.memory import MemoryFileSystem
from test_study import CONFIG, outputs, run

from jax_lowrank.checkpoint import CheckpointError, Checkpoints
from jax_lowrank.mirror import Mirror, MirrorError


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path):
    """An empty store; MemoryFileSystem is one for all of its instances."""
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    return f"{request.param}://{tmp_path}/store"


@pytest.fixture
def here(tmp_path):
    """A results folder with a run of three files, one of them in a folder of its own."""
    run = tmp_path / "here" / "runs" / "abc"
    (run / "more").mkdir(parents=True)
    for name in ("record.json", "outputs.npz", "more/texts.json"):
        (run / name).write_text(f"this is {name}")
    return tmp_path / "here"


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_is_pushed_comes_back(url, here, tmp_path):
    Mirror(url, here).push("runs/abc")
    there, notes = tmp_path / "there", []
    other = Mirror(url, there, notes.append)
    assert other.units("runs") == other.groups("runs") == ["abc"]
    other.fetch("runs/abc")
    other.fetch("runs/nothing")
    assert contents(there) == contents(here) and len(contents(there)) == 3
    assert not notes and [p.name for p in (there / "runs").iterdir()] == ["abc"]


def test_without_an_address_nothing_happens(here):
    none = Mirror(None, here / "none")
    none.fetch("runs/abc")
    none.push("runs/abc")
    none.keep("runs", ["abc"])
    assert none.units("runs") == none.groups("runs") == [] and none.json_of("study.json") is None
    assert not (here / "none").exists()


def test_a_push_that_fails_is_said_and_leaves_nothing_whole(url, here, tmp_path, monkeypatch):
    first = Mirror(url, here)
    (here / "runs" / "old").mkdir()
    (here / "runs" / "old" / "record.json").write_text("old")
    first.push("runs/old")
    put, done = type(first.fs).put_file, []

    def full(self, local, remote, **options):
        if len(done) == 2:
            raise PermissionError("quota exceeded")
        done.append(remote)
        return put(self, local, remote, **options)

    monkeypatch.setattr(type(first.fs), "put_file", full)
    with pytest.raises(MirrorError, match=r"store: runs/abc could not be written: quota exceeded"):
        first.push("runs/abc")
    monkeypatch.undo()
    assert len(done) == 2 and first.groups("runs") == ["abc", "old"]  # two of three files
    notes = []
    other = Mirror(url, tmp_path / "there", notes.append)
    other.fetch_all("runs")
    other.fetch("runs/abc")
    assert [str(p) for p in contents(tmp_path / "there")] == ["runs/old/record.json"] and not notes
    first.push("runs/abc")
    other.fetch("runs/abc")
    assert contents(tmp_path / "there") == contents(here)


def flip(fs, path):
    data = bytearray(fs.cat_file(path))
    data[len(data) // 2] ^= 1
    fs.pipe_file(path, bytes(data))


def cut(fs, path):
    fs.pipe_file(path, fs.cat_file(path)[:-1])


def lead_out(fs, path):
    fs.pipe_file(path, b'{"abc/../../../../stolen": "00"}')


DAMAGES = {
    "a flipped bit": ("runs/abc/outputs.npz", flip, "abc/outputs.npz is damaged"),
    "a cut file": ("runs/abc/more/texts.json", cut, "abc/more/texts.json is damaged"),
    "a lost file": (
        "runs/abc/record.json",
        lambda fs, path: fs.rm(path),
        "abc/record.json is missing",
    ),
    "a cut list": ("complete/runs/abc.json", cut, "its list of files is damaged"),
    "another list": ("complete/runs/abc.json", lead_out, "its list of files is damaged"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_what_is_damaged_is_named_and_written_again(case, url, here, tmp_path):
    path, damage, expected = DAMAGES[case]
    first = Mirror(url, here)
    first.push("runs/abc")
    damage(first.fs, f"{first.root}/{path}")
    notes, there = [], tmp_path / "there"
    other = Mirror(url, there, notes.append)
    other.fetch("runs/abc")
    other.fetch("runs/abc")
    assert len(notes) == 1 and f"runs/abc is not used: {expected}" in notes[0]
    assert not list(there.rglob("runs/*"))
    shutil.copytree(here / "runs" / "abc", there / "runs" / "abc")  # done again
    other.push("runs/abc")
    third = Mirror(url, tmp_path / "third", notes.append)
    third.fetch("runs/abc")
    assert contents(tmp_path / "third") == contents(here) and len(notes) == 1


def test_an_unchanged_unit_is_not_written_twice_and_another_only_on_demand(url, here, monkeypatch):
    first = Mirror(url, here)
    first.push("runs/abc")
    before = first.fs.cat_file(f"{first.root}/complete/runs/abc.json")
    (here / "runs" / "abc" / "record.json").write_text("made elsewhere as well")
    first.push("runs/abc")
    assert first.fs.cat_file(f"{first.root}/complete/runs/abc.json") == before
    first.push("runs/abc", replace=True)
    written = first.fs.cat_file(f"{first.root}/runs/abc/record.json")
    assert written == b"made elsewhere as well"
    monkeypatch.setattr(type(first.fs), "put_file", None)
    first.push("runs/abc", replace=True)


def test_a_group_holds_what_it_is_told_to(url, here):
    first, group = Mirror(url, here), here / "checkpoints" / "pack-1"
    (here / "checkpoints").mkdir()
    (here / "checkpoints" / "pack-1.json").write_text("{}")
    for step in ("1", "2", "3"):
        (group / step).mkdir(parents=True)
        (group / step / "manifest.json").write_text(step)
    first.keep("checkpoints/pack-1", ["2", "1"])
    first.fs.pipe_file(f"{first.root}/checkpoints/pack-1/0/half", b"pushed by one that was killed")
    assert first.groups("checkpoints/pack-1") == ["0", "1", "2"]
    first.keep("checkpoints/pack-1", ["3", "2"])
    assert first.groups("checkpoints/pack-1") == first.units("checkpoints/pack-1") == ["2", "3"]
    assert first.units("checkpoints") == ["pack-1.json"]
    first.keep("checkpoints/pack-1")
    assert first.units("checkpoints") == first.units("checkpoints/pack-1") == []
    assert not first.fs.exists(f"{first.root}/checkpoints/pack-1.json")


@pytest.mark.parametrize(
    "address, expected",
    [
        ("bucket/folder", "is not an address; give one such as gs://bucket/folder"),
        ("gs://", "is not an address"),
        ("sg://bucket/x", "Protocol not known: sg; gs://, s3:// and file:// are known"),
    ],
)
def test_an_address_that_cannot_be_used(address, expected, tmp_path):
    with pytest.raises(ValueError, match=expected):
        Mirror(address, tmp_path)


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ValueError, match=r"mirror gs://b/x needs gcsfs: pip install gcsfs"):
        Mirror("gs://b/x", tmp_path)


def test_a_checkpoint_whose_copy_fails_is_on_disk_and_the_error_surfaces(tmp_path):
    def fails(names):
        if names:
            raise MirrorError("mirror s3://b: quota exceeded")

    state = {"a": np.arange(4.0)}
    with Checkpoints(tmp_path / "c", "f", copy=fails) as checkpoints:
        checkpoints.save(1, state, {})
        with pytest.raises(CheckpointError, match=r"00000001 was saved, but: mirror s3.* quota"):
            checkpoints.wait()
    restored = Checkpoints(tmp_path / "c", "f").restore(state)
    assert restored.state["a"].tolist() == [0, 1, 2, 3]


PUSHING = """
import sys
from pathlib import Path
from jax_lowrank.mirror import Mirror
mirror = Mirror(sys.argv[1], Path(sys.argv[2]))
print("begins", flush=True)
for n in range(40):
    mirror.keep("checkpoints/c", [f"{n:02d}", f"{n - 1:02d}"] if n else ["00"])
    mirror.push(f"runs/{n:02d}")
"""


def test_what_a_killed_process_pushed_is_whole_or_absent(tmp_path):
    here, url = tmp_path / "here", f"file://{tmp_path}/store"
    rng = random.Random(3)
    for n in range(40):
        for group in ("runs", "checkpoints/c"):
            (here / group / f"{n:02d}").mkdir(parents=True)
            for name in "abc":
                data = rng.randbytes(rng.choice((10, 3_000_000)))
                (here / group / f"{n:02d}" / name).write_bytes(data)
    said, kills = [], 0
    line = [sys.executable, "-c", PUSHING, url, str(here)]
    for attempt in range(6):
        with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "begins\n"
            time.sleep(rng.uniform(0, 0.15))
            process.kill()
        kills += process.returncode == -signal.SIGKILL
        there = tmp_path / f"there-{attempt}"
        other = Mirror(url, there, said.append)
        for group in ("runs", "checkpoints/c"):
            other.fetch_all(group)
        found = contents(there)
        assert all((here / path).read_bytes() == data for path, data in found.items())
        assert len(found) % 3 == 0
        shutil.rmtree(there, ignore_errors=True)  # nothing was whole yet, perhaps
    assert kills >= 4
    torn = "its list of files is damaged"  # killed while that was written: named, and absent
    assert all(torn in one for one in said), said
    subprocess.run(line, check=True, capture_output=True)
    last = Mirror(url, tmp_path / "last", said.append)
    assert len(last.units("runs")) == 40 and last.units("checkpoints/c") == ["38", "39"]
    assert last.groups("checkpoints/c") == ["38", "39"]


SMALL = CONFIG.replace("(1, 2)", "(1,)").replace(', MethodSpec("full", (1e-3,))', ",")
SMALL = SMALL.replace("1280", "256").replace('"num_train": 64', '"num_train": 32')


def same(one, other):
    """Assert that two folders hold the same outputs, to the last bit."""
    assert one.keys() == other.keys() and one
    for name, run_result in one.items():
        assert other[name].completions == run_result.completions
        for key, array in run_result.arrays.items():
            assert other[name].arrays[key].tobytes() == array.tobytes(), key


@pytest.mark.slow
def test_a_study_goes_on_from_its_mirror_alone(tmp_path, monkeypatch, capsys):
    MemoryFileSystem.store.clear()
    config, out, url = tmp_path / "tiny.py", tmp_path / "out", "memory://bucket/tiny"
    config.write_text(SMALL)
    line = ["study", config, "--out", out, "--mirror", url]
    put = MemoryFileSystem.put_file

    def full(self, local, remote, **options):
        if remote.endswith("trainable.safetensors"):
            raise OSError("quota exceeded")
        return put(self, local, remote, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", full)
    code, said = run(line, monkeypatch, capsys)
    assert code == 1 and f"mirror {url}: runs/" in said and "could not be written: quota" in said
    here, store = outputs(out), Mirror(url, out)
    assert len(store.units("runs")) == 3 and len(here) == 2  # tuning runs have none
    monkeypatch.setattr(MemoryFileSystem, "put_file", put)
    (base,) = [name for name, found in here.items() if found.record["kind"] == "base"]
    flip(store.fs, f"{store.root}/runs/{base}/outputs.npz")

    shutil.rmtree(out)
    code, said = run(line, monkeypatch, capsys)
    assert code == 0 and f"runs/{base} is not used: {base}/outputs.npz is damaged" in said
    # The damaged and the half-pushed run are done again, the others are not.
    assert said.count(" is not used") == said.count("\nbase: harm") == 1
    assert "base model: found" in said
    assert "(tune): validation" not in said and said.count("(final): harm") == 1
    same(outputs(out), here)
    assert store.units("runs") == sorted(p.name for p in (out / "runs").iterdir())
    held = ["base", "complete", "prompts.json", "report", "runs", "runs.json", "study.json"]
    assert set(store.groups("")) - {"checkpoints"} == set(held)
    assert store.groups("checkpoints") == []
    other = Mirror(url, tmp_path / "other")
    for unit in (*(f"runs/{name}" for name in here), "report", "prompts.json"):
        other.fetch(unit)
    same(outputs(tmp_path / "other"), here)
    page = "report/index.html"
    assert (tmp_path / "other" / page).read_text() == (out / page).read_text()

    store.fs.pipe_file("/bucket/others/study.json", b'{"name": "other", "fingerprint": "f"}')
    line[-1] = "memory://bucket/others"
    code, said = run(line, monkeypatch, capsys)
    assert code == 2 and "memory://bucket/others belongs to another study: other (f), not" in said
    assert Mirror(line[-1], out).units("runs") == []


def test_a_finetuned_run_comes_back_too(tmp_path, monkeypatch, capsys):
    MemoryFileSystem.store.clear()
    tiny_text.checkpoint(tmp_path / "model")
    tiny_text.jsonl(tmp_path / "pairs.jsonl", tiny_text.pairs(24))
    out, url = tmp_path / "results" / "chat", "memory://bucket/runs"
    line = ["finetune", "--model", tmp_path / "model", "--data", tmp_path / "pairs.jsonl"]
    line += ["--rank", "2", "--max-length", "16", "--out", out, "--mirror", url]
    code, said = run(line, monkeypatch, capsys)
    assert code == 0 and f"run: {out}" in said, said
    files, store = contents(out), Mirror(url, out.parent)
    assert store.units("") == ["chat"] and set(store.groups("")) <= {"chat", "complete"}
    shutil.rmtree(out)
    assert run(line, monkeypatch, capsys)[0] == 0
    assert contents(out) == files
    shutil.rmtree(out)
    code, said = run([*line, "--seed", "7"], monkeypatch, capsys)
    assert code == 2 and "holds a run of other settings, data or code" in said


@pytest.mark.slow
def test_a_study_that_is_killed_and_loses_its_folder_ends_with_the_same_bits(tmp_path, forks):
    long = SMALL.replace("max_length=24", "max_length=24, epochs=3, checkpoint_seconds=0.0")
    long = long.replace("epochs=1, ", "steps_per_call=2, ")
    (tmp_path / "tiny.py").write_text(long)
    line = ["jax_lowrank.cli", "study", tmp_path / "tiny.py", "--out"]
    whole = forks.start(*line, tmp_path / "whole")
    assert whole.wait(900) == 0, whole.said()
    rng, out, store = random.Random(5), tmp_path / "out", tmp_path / "store"
    kills, said, saved = 0, "", 0

    def copied():
        return set((store / "complete").rglob("*.json"))

    while True:
        before, session = copied(), forks.start(*line, out, "--mirror", f"file://{store}")
        saved += any("checkpoints" in path.parts for path in before)
        session.until(lambda: session.poll() is not None or copied() - before, 900)  # noqa: B023
        time.sleep(rng.uniform(0, 0.5))
        if kills == 6 or session.poll() is not None:
            break
        session.send_signal(signal.SIGKILL)
        session.wait(900)
        kills, said = kills + 1, said + session.said()
        shutil.rmtree(out)
    assert session.wait(900) == 0, session.said()
    said += session.said()
    print(f"{kills} kills")
    torn = "its list of files is damaged"  # killed while it was written: absent, and said so
    assert kills >= 4 and saved >= 2 and "damaged" not in said.replace(torn, "")
    same(outputs(out), outputs(tmp_path / "whole"))
    assert store.joinpath("report", "index.html").is_file()
    assert not any(p.is_file() for p in (store / "checkpoints").rglob("*"))
    assert not list((store / "complete" / "checkpoints").rglob("*.json"))
