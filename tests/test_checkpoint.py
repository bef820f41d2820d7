"""A continued run is the run that was never interrupted; damaged checkpoints are named."""

import functools
import gc
import json
import os
import shutil
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from test_train import corpus, lora_with_dropout
from tiny import apply_of, same_bytes

from jax_lowrank import checkpoint, signals, train
from jax_lowrank.checkpoint import CheckpointError, Checkpoints, Interrupted

NAME = "f" * 16


class Eager(Checkpoints):
    """Saves as often as it may, whatever the disk is busy with."""

    def due(self):
        """After the save before."""
        self._join()
        return super().due()


def opened(folder, notes=None, **options):
    """Checkpoints that are due at every compiled call."""
    note = notes.append if notes is not None else lambda line: None
    return Eager(folder, NAME, **{"seconds": 0.0, "note": note, **options})


def numbers(step):
    """A small state, and what belongs to it."""
    state = {"a": jnp.arange(40.0) * step, "b": {"c": np.full((3, 2), step, np.int32)}}
    return state, {"step": step, "loss": step / 3, "lines": [{"loss": 0.1}]}


def filled(folder, *steps, **options):
    """A folder with checkpoints of these steps."""
    with opened(folder, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, *numbers(step))
            checkpoints.wait()
    return checkpoints


def restored(folder, fingerprint=NAME):
    """(step that is used or None, notes) of a new session; it restores what was saved."""
    notes = []
    saved = Checkpoints(folder, fingerprint, note=notes.append).restore(numbers(0)[0])
    if saved is None:
        return None, notes
    state, facts = numbers(saved.facts["step"])
    assert saved.facts == facts and same_bytes(saved.state, state)
    assert isinstance(saved.state["a"], jax.Array) and not saved.state["a"].committed
    assert type(saved.state["b"]["c"]) is np.ndarray
    return facts["step"], notes


def test_the_newest_two_stay_and_the_newest_is_used(tmp_path):
    filled(tmp_path, 5, 10, 15)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000010", "00000015"]
    assert restored(tmp_path) == (15, [])
    filled(tmp_path, 20, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["00000020"]
    assert restored(tmp_path / "nothing") == (None, [])


def largest(path):
    """The file with most of the arrays in it."""
    return max((f for f in path.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def flip(file, at=0.5):
    """Change one bit."""
    data = bytearray(file.read_bytes())
    data[int(len(data) * at)] ^= 1
    file.write_bytes(data)


def flip_a_bit_of_an_array(path):
    data = [f for f in path.rglob("*") if f.parent.name == "d"]
    flip(max(data, key=lambda f: f.stat().st_size))


def flip_a_bit_of_the_manifest(path):
    text = (path / "manifest.json").read_text()
    assert '"step": 20' in text
    (path / "manifest.json").write_text(text.replace('"step": 20', '"step": 21'))


def truncate(path):
    file = largest(path / "state")
    os.truncate(file, file.stat().st_size - 1)


def truncate_the_manifest(path):
    os.truncate(path / "manifest.json", 60)


def lose_a_file(path):
    largest(path / "state").unlink()


def lose_the_manifest(path):
    (path / "manifest.json").unlink()


def come_from_another_run(path):
    raw = json.loads((path / "manifest.json").read_text())["content"]
    checkpoint._write_manifest(path, {**raw, "fingerprint": "0" * 16})


DAMAGE = {
    flip_a_bit_of_an_array: "is damaged",
    flip_a_bit_of_the_manifest: "manifest.json is damaged",
    truncate: "is damaged",
    truncate_the_manifest: "manifest.json is damaged",
    lose_a_file: "is missing",
    lose_the_manifest: "its save was not finished",
    come_from_another_run: f"it is of run {'0' * 16}, not {NAME}",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with two good checkpoints, to copy."""
    folder = tmp_path_factory.mktemp("whole")
    filled(folder, 10, 20)
    return folder


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_what_is_damaged_is_named_and_the_one_before_is_used(damage, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    damage(folder / "00000020")
    step, (note,) = restored(folder)
    assert step == 10 and DAMAGE[damage] in note and "00000020 is not used" in note
    # The next save replaces it, and keeps the good one.
    notes = []
    with opened(folder, notes) as checkpoints:
        checkpoints.restore(numbers(0)[0])
        checkpoints.save(20, *numbers(20))
    assert restored(folder) == (20, [])
    lose_the_manifest(folder / "00000020")
    assert restored(folder)[0] == 10


def test_every_file_of_a_checkpoint_is_watched(whole, tmp_path):
    files = [f.relative_to(whole) for f in (whole / "00000020").rglob("*") if f.is_file()]
    assert len(files) > 5
    for number, file in enumerate(files):
        folder = shutil.copytree(whole, tmp_path / str(number))
        if (folder / file).stat().st_size:
            flip(folder / file, at=number / len(files))
        else:
            (folder / file).unlink()
        assert restored(folder)[0] == 10, file


def test_another_shape_is_refused(whole):
    notes = []
    like = {"a": jnp.zeros(41), "b": {"c": np.zeros((3, 2), np.int32)}}
    assert Checkpoints(whole, NAME, note=notes.append).restore(like) is None
    assert len(notes) == 2


def test_shardings_and_dtypes_are_those_of_the_target(tmp_path):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    state = {"x": jax.device_put(jnp.arange(8, dtype=jnp.bfloat16), sharding)}
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
    saved = opened(tmp_path).restore(jax.tree.map(jnp.zeros_like, state))
    assert saved.state["x"].sharding == sharding and same_bytes(saved.state, state)


def test_what_is_held_for_a_save_stays_as_it_was():
    """Only what can be written to is copied; a donated array is not lost."""
    array, jax_array = np.arange(5.0), jnp.arange(5.0)
    held = [checkpoint._kept(x) for x in (array, jax_array)]
    array[:] = 7
    jax.jit(lambda x: 0 * x, donate_argnums=0)(jax_array).block_until_ready()
    assert [x.tolist() for x in held] == [[0, 1, 2, 3, 4]] * 2
    array.flags.writeable = False
    assert checkpoint._kept(array) is array
    other = jnp.arange(3)
    assert np.shares_memory(checkpoint._kept(other), np.asarray(other))


def test_a_save_is_read_back_in_parts(tmp_path, monkeypatch):
    asked, load = [], checkpoint.ocp.load
    monkeypatch.setattr(checkpoint, "READ_BYTES", 100)

    def counted(path, like):
        asked.append({name: leaf.nbytes for name, leaf in like.items()})
        return load(path, like)

    monkeypatch.setattr(checkpoint.ocp, "load", counted)
    state = {name: np.full(size, size, np.uint8) for name, size in SIZES.items()}
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
    assert asked == [{"a": 40, "b": 60}, {"c": 200}, {"d": 1, "e": 99}]
    monkeypatch.undo()
    saved = opened(tmp_path).restore(state)
    assert same_bytes(saved.state, state)
    assert not any(leaf.flags.writeable for leaf in saved.state.values())


SIZES = {"a": 40, "b": 60, "c": 200, "d": 1, "e": 99}


def test_bits_are_compared_not_values():
    nans = np.array([np.nan, 1.0], np.float32)
    assert checkpoint._same_bits(nans, nans.copy())
    assert not checkpoint._same_bits(np.array([0.0]), np.array([-0.0]))
    assert not checkpoint._same_bits(nans, nans.astype(np.float64))
    assert not checkpoint._same_bits(nans, nans[:, None])
    half = np.asarray(jnp.ones((), jnp.bfloat16))
    assert checkpoint._same_bits(half, half.copy()) and not checkpoint._same_bits(half, -half)


def test_other_hardware_is_said(whole, monkeypatch):
    now = checkpoint.environment(numbers(0)[0])
    monkeypatch.setattr(checkpoint, "environment", lambda state: {**now, "device": "abacus"})
    step, (note,) = restored(whole)
    assert step == 20 and "abacus" in note and "not to the last bit" in note


def test_another_mesh_or_order_is_said(tmp_path):
    def on(**axes):
        mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * 2)
        whole = jax.NamedSharding(mesh, jax.P())
        return jax.tree.map(lambda x: jax.device_put(x, whole), numbers(10)[0])

    with opened(tmp_path) as checkpoints:
        checkpoints.save(10, on(data=1, fsdp=1), {})
    for state, said in (
        (on(data=1, fsdp=1), []),
        (on(fsdp=1, tensor=1), ["data 1 x fsdp 1 in the order [0], ", "fsdp 1 x tensor 1 in"]),
        (numbers(10)[0], ["data 1 x fsdp 1", "cpu, jax"]),
    ):
        notes = []
        assert Checkpoints(tmp_path, NAME, note=notes.append).restore(state).facts == {}
        assert len(notes) == bool(said)
        assert all(part in notes[0] for part in said)


# ------------------------------------------------------------------------------- saves that fail


# Orbax's own threads and event loop die of it as well, and pytest sees that.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_named_and_nothing_older_is_lost(whole, tmp_path):
    """The limit on a file's size makes the real write fail, in TensorStore's threads."""
    import resource

    folder = shutil.copytree(whole, tmp_path / "run")
    state, facts = numbers(30)
    state["a"] = jax.random.normal(jax.random.key(0), 100_000)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    checkpoints = opened(folder)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
        with checkpoints:
            with pytest.raises(CheckpointError, match="00000030 could not be saved"):
                checkpoints.save(30, state, facts)
                checkpoints.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert restored(folder)[0] == 20
    del checkpoints
    gc.collect()  # what is left of them complains here, not in the next test


def test_a_failure_in_the_background_comes_out_at_the_next_step_or_the_end(
    whole, tmp_path, monkeypatch
):
    folder = shutil.copytree(whole, tmp_path / "run")

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_manifest", full)
    with pytest.raises(CheckpointError, match="No space left"), opened(folder) as checkpoints:
        checkpoints.save(30, *numbers(30))
    with opened(folder) as checkpoints:
        checkpoints.save(30, *numbers(30))
        with pytest.raises(CheckpointError, match="No space left"):
            checkpoints.due()
        assert checkpoints.due()  # said once
    monkeypatch.undo()
    step, (note,) = restored(folder)
    assert step == 20 and "00000030 is not used: its save was not finished" in note


def test_what_reads_back_differently_is_never_signed(whole, tmp_path, monkeypatch):
    folder = shutil.copytree(whole, tmp_path / "run")
    load = checkpoint.ocp.load
    monkeypatch.setattr(checkpoint.ocp, "load", lambda *a: {**load(*a), "a": np.zeros(40)})
    with pytest.raises(CheckpointError, match="a reads back differently"), opened(folder) as c:
        c.save(30, *numbers(30))
    monkeypatch.undo()
    assert restored(folder)[0] == 20


# ----------------------------------------------------------------------------------- the training


@functools.partial(jax.jit, static_argnums=0)
def outputs(apply, state, frozen, batch):
    """Loss of each row (B,)."""
    return train.causal_lm_loss(apply, state, frozen, batch, None)[0]


class StoppedError(Exception):
    """The end of a session, at any point."""


def session(folder, *, stop_after=None, seconds=0.0, notes=None, steps=10):
    """`fit` on the corpus; ends with StoppedError after so many log lines. (result, lines)."""
    graphdef, trainable, frozen, optimizer = lora_with_dropout()
    apply, lines = apply_of(graphdef), []

    def log(line):
        lines.append({k: v for k, v in line.items() if k not in ("tokens_per_second", "resumed")})
        if stop_after is not None and len(lines) >= stop_after and not line.get("resumed"):
            raise StoppedError

    def validate(state):
        """Worse after the first epoch, so that the best state is not the last."""
        loss = float(outputs(apply, state, frozen, corpus().batch(0)).sum())
        return loss + 1000 * (bool(lines) and lines[-1]["step"] > 5)

    result = train.fit(
        apply=apply,
        loss=train.causal_lm_loss,
        optimizer=optimizer,
        trainable=jax.tree.map(lambda x: jnp.array(x, copy=True), trainable),
        frozen=frozen,
        batches=corpus(),
        schedule=train.make_schedule(1e-1, steps, 0.1, "linear"),
        validate=validate,
        log=log,
        steps_per_call=3,  # as in test_train: compiled once
        key=jax.random.key(1),
        checkpoints=opened(folder, notes, seconds=seconds) if folder else None,
    )
    return result, lines


def final_arrays(folder):
    """Those of the newest checkpoint: trainable, optimizer state, best, key."""
    _, trainable, _, optimizer = lora_with_dropout()
    key = jax.random.key(1)
    run = train.Training(trainable, optimizer.init(trainable), key, None, 0, None)
    return Checkpoints(folder, NAME).restore(run.arrays()).state


def final_bytes(folder):
    """The bytes of each."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(final_arrays(folder))]


def test_a_continued_run_is_the_run_that_was_never_interrupted(tmp_path):
    result, lines = session(tmp_path / "whole")
    plain, plain_lines = session(None)
    assert same_bytes(plain.trainable, result.trainable) and plain_lines == lines
    assert (result.best_step, result.resumed_at) == (plain.best_step, ())
    expected = final_bytes(tmp_path / "whole")
    # Stopped within an epoch, and on both sides of a validation.
    losses = [(line["step"], "validation_loss" in line) for line in lines]
    validated = losses.index((5, True)) + 1
    resumed_at = set()
    for number in (3, validated, validated + 1, len(lines) - 1):
        folder = tmp_path / str(number)
        with pytest.raises(StoppedError):
            session(folder, stop_after=number)
        again, again_lines = session(folder)
        assert again_lines == lines
        assert same_bytes(again.trainable, result.trainable)
        assert again[1:4] == result[1:4]
        assert final_bytes(folder) == expected
        resumed_at.update(again.resumed_at)
    assert 5 in resumed_at and len(resumed_at) >= 3


def test_a_run_in_many_sessions(tmp_path, monkeypatch):
    result, lines = session(None)
    for number in range(2, len(lines), 2):
        with pytest.raises(StoppedError):
            session(tmp_path, stop_after=number)
    first, resume = [], train.Training.resume

    def watched(self):
        first.extend(jax.tree.leaves((self.trainable, self.opt_state)))
        return resume(self)

    monkeypatch.setattr(train.Training, "resume", watched)
    again, again_lines = session(tmp_path)
    assert first and all(leaf.is_deleted() for leaf in first)  # no second state in memory
    assert len(again.resumed_at) >= 3 and again.resumed_at == tuple(sorted(again.resumed_at))
    assert again_lines == lines and same_bytes(again.trainable, result.trainable)
    assert again.seconds > 0


def test_a_checkpoint_holds_no_frozen_weights(tmp_path):
    session(tmp_path, steps=3)
    listed = json.loads((max(tmp_path.iterdir()) / "state" / "_METADATA").read_text())
    names = {entry["key_metadata"][0]["key"] for entry in listed["tree_metadata"].values()}
    assert names == set(checkpoint._named(final_arrays(tmp_path)))
    assert {name.split(".")[0] for name in names} == {"trainable", "opt_state", "best", "key"}
    kernels = [name for name in names if "kernel" in name or "table" in name]
    assert not kernels and "trainable.blocks.attn.qkv.adapter.a" in " ".join(names)
    frozen = jax.tree_util.tree_leaves_with_path(lora_with_dropout()[2])
    assert any("kernel" in jax.tree_util.keystr(path) for path, _ in frozen)


def test_a_save_goes_on_beside_the_training(tmp_path, monkeypatch):
    disk, hashes = threading.Event(), checkpoint._hashes
    monkeypatch.setattr(checkpoint, "_hashes", lambda path: disk.wait(60) and hashes(path))
    with Checkpoints(tmp_path, NAME, seconds=0.0) as checkpoints:
        assert checkpoints.due()
        checkpoints.save(1, *numbers(1))
        assert not checkpoints.due() and restored(tmp_path)[0] is None  # neither waited for it
        disk.set()
        checkpoints.wait()
        assert checkpoints.due() and restored(tmp_path) == (1, [])


def test_nothing_is_saved_before_it_is_time(tmp_path):
    session(tmp_path / "run", seconds=3600)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(number, tmp_path, capfd):
    send = threading.Timer(0, os.kill, (os.getpid(), number))
    handlers = [signal.getsignal(n) for n in signals.SIGNALS]
    checkpoints = opened(tmp_path, seconds=3600)
    with pytest.raises(Interrupted), checkpoints:
        send.start()
        while not checkpoints.due():
            pass
        assert checkpoints.asked
        checkpoints.save(1, *numbers(1))
    assert [signal.getsignal(n) for n in signals.SIGNALS] == handlers
    assert "once more to stop at once" in capfd.readouterr().err
    assert restored(tmp_path)[0] == 1


def test_training_stops_at_a_signal_and_goes_on(tmp_path, monkeypatch):
    result, lines = session(None)
    steps = []

    def asked_later(self):
        steps.append(1)
        self.asked = len(steps) == 4
        return self.asked

    monkeypatch.setattr(Checkpoints, "due", asked_later)
    with pytest.raises(Interrupted, match="stopped after step"):
        session(tmp_path)
    monkeypatch.undo()
    again, again_lines = session(tmp_path)
    assert len(again.resumed_at) == 1 and again_lines == lines
    assert same_bytes(again.trainable, result.trainable)
