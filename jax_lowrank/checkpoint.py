"""Checkpoints of one run: written in the background, verified on disk, continued from bit by bit.

DIRECTORY/STEP/ is one checkpoint. state/ is Orbax's; manifest.json comes last and makes it whole:
it carries the run's fingerprint, what is not an array, and the SHA-256 of every file. A directory
without a manifest, or with one that does not fit, is refused by name and never loaded.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from jax_lowrank.processes import anywhere, is_first, once, raise_together
from jax_lowrank.signals import caught

MANIFEST = "manifest.json"
READ_BYTES = 1 << 25  # of arrays that are in memory twice while a save is read back


class CheckpointError(OSError):
    """A checkpoint could not be written, or is not one of this run; the message names it."""


class Interrupted(KeyboardInterrupt):
    """A signal asked training to stop. What was done is on disk; the same command goes on."""


class Saved(NamedTuple):
    """What a checkpoint holds: a tree like the one that was asked for, and plain values."""

    state: Any
    facts: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run in `directory`; the newest `keep` good ones stay.

    seconds: between two saves; what is lost when the process is killed. note: gets a line for
    everything that is refused. Inside `with`, SIGTERM and SIGINT make the next `due` set `asked`:
    the training loop saves and raises Interrupted. A second signal ends the process at once. A save
    that fails in the background raises CheckpointError at the next `due`, or when the block is
    left.

    Several processes ask, save and restore together, and get the same answers; the first one
    verifies, signs and deletes. It calls `copy` with the names of the good ones after every save,
    in the background, and with none when they are removed; what that raises is raised as above.
    """

    def __init__(
        self,
        directory: Path,
        fingerprint: str,
        *,
        seconds: float = 60.0,
        note: Callable[[str], None] = lambda line: None,
        keep: int = 2,
        copy: Callable[[list[str]], None] = lambda names: None,
    ):
        self.directory, self.fingerprint = Path(directory).absolute(), fingerprint
        self.seconds, self.note, self.keep, self.copy = seconds, note, keep, copy
        self.asked = self._signalled = False
        self._newest = -1  # the step of the newest good one
        self._writer: threading.Thread | None = None
        self._error: Exception | None = None
        self._last = time.monotonic()

    def __enter__(self) -> Checkpoints:
        self._last = time.monotonic()
        self._signals = contextlib.ExitStack()
        self._signals.enter_context(caught(self._ask))
        return self

    def __exit__(self, kind, error, trace) -> None:
        with self._signals:
            self._join()
            if kind is not None and self._error is not None:  # beside what ended the block
                self.note(str(self._error))
        if kind is None:
            self.check()
            (self.asked,) = anywhere(self._signalled)
            if self.asked:  # too late for the loop to see
                raise Interrupted("stopped at the end of training")

    def _ask(self) -> None:
        self._signalled = True

    # ---------------------------------------------------------------------------------- saving

    def due(self) -> bool:
        """Whether to save now: the time is over, or a signal asked for it.

        Raises CheckpointError where the last save failed.
        """
        busy = self._writer is not None and self._writer.is_alive()
        self.check()  # after `busy`: a writer that has ended has said what failed
        now = not busy and time.monotonic() - self._last >= self.seconds
        now, self.asked = anywhere(now, self._signalled)
        return now or self.asked

    def check(self) -> None:
        """Raise what went wrong in the background, once."""
        error, self._error = self._error, None
        raise_together(error)

    def save(self, step: int, state: Any, facts: Mapping[str, Any]) -> None:
        """Begin to save a tree of arrays and JSON; both may be changed afterwards, and donated."""
        self.wait()
        if step == self._newest:
            return
        path = self.directory / f"{step:08d}"
        host = {name: _kept(leaf) for name, leaf in _named(state).items()}
        try:
            once(lambda: self._make_room(path))
            with _orbax():
                response = ocp.save_async(path, host)
        except Exception as error:
            raise self._failed(path, error) from error
        content = {
            "fingerprint": self.fingerprint,
            "step": step,
            "facts": copy.deepcopy(dict(facts)),
        }
        arguments = (path, response, host, content | {"environment": environment(state)})
        self._writer = threading.Thread(target=self._finish, args=arguments)
        self._writer.start()

    def _make_room(self, path: Path) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        _delete(path)  # one that was refused

    def _finish(self, path: Path, response, host: dict, content: dict) -> None:
        """In the background: wait for Orbax, read back what it wrote, and only then sign it."""
        try:
            response.result()
            if not any(isinstance(leaf, jax.Array) for leaf in host.values()):
                _compare(path, host)
            if is_first():
                content["files"] = _hashes(path)
                _write_manifest(path, content)
                self._read(path)
                kept = self._sweep(path)
            self._newest, self._last = content["step"], time.monotonic()
        except Exception as error:
            self._error = self._failed(path, error)
            return
        try:
            if is_first():
                self.copy([one.name for one in kept])
        except Exception as error:
            self._error = CheckpointError(f"checkpoint {path} was saved, but: {error}")

    def _failed(self, path: Path, error: Exception) -> CheckpointError:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        return CheckpointError(f"checkpoint {path} could not be saved: {reason}")

    def _sweep(self, newest: Path) -> list[Path]:
        """Delete all but the newest good ones, which it returns. `newest` has just been verified,
        and stays."""
        signed = [path for path in self._found() if (path / MANIFEST).is_file()]
        older = [path for path in signed if path != newest and path.name < newest.name]
        keep = [newest, *older[: self.keep - 1]]
        for path in self._found():
            if path not in keep:
                _delete(path)
        return keep

    def wait(self) -> None:
        """Until the save that is under way is verified; raises CheckpointError where it failed."""
        self._join()
        self.check()

    def _join(self) -> None:
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def remove(self) -> None:
        """Delete all of them: the run is finished."""
        self._join()
        once(self._delete_all)

    def _delete_all(self) -> None:
        for path in self._found():
            _delete(path)
        shutil.rmtree(self.directory, ignore_errors=True)
        self.copy([])

    # ------------------------------------------------------------------------------- restoring

    def restore(self, like: Any) -> Saved | None:
        """The newest good checkpoint as a tree like `like`, or None where there is none.

        Arrays get the shapes, dtypes and shardings of those in `like`; NumPy arrays stay on the
        host, read-only. What is damaged or of another run is named in a note and passed over.
        """
        for path in map(Path, once(lambda: list(map(str, self._found())))):
            try:
                content = once(lambda path=path: self._read(path))
                state = _load_together(path, like)
            except Exception as error:  # whatever is wrong with one, an older one may be good
                reason = " ".join(str(error).split())[:300]
                self.note(f"checkpoint {path} is not used: {reason}")
                continue
            self._newest = content["step"]
            if content["environment"] != environment(like):
                was, now = (_phrase(e) for e in (content["environment"], environment(like)))
                self.note(f"saved on {was}, continued on {now}: equal, but not to the last bit")
            return Saved(state, content["facts"])
        return None

    def _found(self) -> list[Path]:
        """All that lies in the directory, newest first; read from disk every time."""
        return sorted(self.directory.glob("*"), reverse=True)

    def _read(self, path: Path) -> dict:
        """The manifest of a whole checkpoint of this run; CheckpointError says what it is else."""
        if not (path / MANIFEST).is_file():
            raise CheckpointError("its save was not finished")
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            content = manifest["content"]
        except (ValueError, KeyError, TypeError):
            raise CheckpointError(f"{MANIFEST} is damaged") from None
        if manifest.get("sha256") != _digest(content):
            raise CheckpointError(f"{MANIFEST} is damaged")
        if content["fingerprint"] != self.fingerprint:
            raise CheckpointError(f"it is of run {content['fingerprint']}, not {self.fingerprint}")
        for name, wanted in content["files"].items():
            file = path / name
            if not file.is_file():
                raise CheckpointError(f"{name} is missing")
            if _hash(file) != wanted:
                raise CheckpointError(f"{name} is damaged")
        return content


def environment(state: Any) -> dict[str, Any]:
    """What a continued run shares with its beginning where it is to be equal to the last bit."""
    device = jax.devices()[0]
    found = {"jax": jax.__version__, "device": device.device_kind, "count": jax.device_count()}
    for leaf in jax.tree.leaves(state):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, jax.NamedSharding):
            order = [int(each.id) for each in sharding.mesh.devices.flat]
            return found | {"mesh": dict(sharding.mesh.shape), "device_order": order}
    return found


def _phrase(e: dict) -> str:
    axes = " x ".join(f"{axis} {size}" for axis, size in e.get("mesh", {}).items())
    laid = f" as {axes} in the order {e['device_order']}" if axes else ""
    return f"{e['count']} x {e['device']}{laid}, jax {e['jax']}"


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by path, such as trainable.blocks.attn.q.kernel.value, in the tree's order."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    names = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in flat}
    assert len(names) == len(flat), "two leaves share a name"
    return names


def _kept(leaf: Any) -> Any:
    """The array on the host as it is now; one that is spread over processes stays where it is.

    On CPU that is the memory of the jax array itself: while it is in use, XLA copies the array
    instead of donating it. Only what could be written to is copied here.
    """
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return leaf
    host = np.asarray(leaf)
    return host.copy() if host.flags.writeable else host


def _orbax() -> ocp.Context:
    """Orbax's settings: it writes what `_kept` holds, uncopied, and loads what it is asked for."""
    context = ocp.Context()
    context.memory.deepcopy_host_arrays = False
    context.array.saving.use_compression = False  # 8 % smaller, for a copy and 4 times the time
    context.pytree.loading.partial_load = True
    return context


def _abstract(leaf: Any) -> Any:
    """What Orbax restores a leaf like this one from: where it shall lie, shape and dtype.

    An array that was never put anywhere comes back over the host: were it committed to its device,
    the train step would compile a second time.
    """
    if isinstance(leaf, jax.Array) and leaf.committed:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return np.empty(leaf.shape, leaf.dtype)


def _load(path: Path, like: Any) -> Any:
    named = _named(like)
    loaded = ocp.load(path, {name: _abstract(leaf) for name, leaf in named.items()})
    for name, leaf in named.items():
        if (loaded[name].shape, loaded[name].dtype) != (leaf.shape, leaf.dtype):
            raise CheckpointError(f"{name} has another shape or dtype")
        if not isinstance(leaf, jax.Array):
            loaded[name].flags.writeable = False
        elif not isinstance(loaded[name], jax.Array):
            loaded[name] = jnp.array(loaded[name], copy=True)
    return jax.tree.unflatten(jax.tree.structure(like), [loaded[name] for name in named])


def _load_together(path: Path, like: Any) -> Any:
    """`_load` that fails in every process where it fails in one."""
    try:
        state, error = _load(path, like), None
    except Exception as problem:
        state, error = None, problem
    raise_together(error)
    return state


def _compare(path: Path, host: dict[str, np.ndarray]) -> None:
    """Raise CheckpointError unless the disk holds the very bits of `host`."""
    for names in _groups(host):
        with _orbax():
            loaded = ocp.load(path, {name: np.empty_like(host[name]) for name in names})
        for name in names:
            if not _same_bits(np.asarray(loaded[name]), host[name]):
                raise CheckpointError(f"{name} reads back differently")


def _groups(host: dict[str, np.ndarray]) -> list[list[str]]:
    """The names in groups of READ_BYTES or less; a larger array is a group of its own."""
    groups, size = [], READ_BYTES + 1
    for name, leaf in host.items():
        size += leaf.nbytes
        if size > READ_BYTES:
            groups, size = [*groups, []], leaf.nbytes
        groups[-1].append(name)
    return groups


def _same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether shape, dtype and bits agree; NaNs as well."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    bits = f"u{one.itemsize}"
    return np.array_equal(one.view(bits), other.view(bits))


def _hashes(path: Path) -> dict[str, str]:
    """SHA-256 of every file below `path`, by relative name."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {file.relative_to(path).as_posix(): _hash(file) for file in files}


def _hash(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _digest(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write_manifest(path: Path, content: dict) -> None:
    """Appears whole, after everything that it vouches for."""
    partial = path / f".{MANIFEST}"
    with partial.open("w", encoding="utf-8") as handle:
        json.dump({"sha256": _digest(content), "content": content}, handle)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(partial, path / MANIFEST)


def _delete(path: Path) -> None:
    """The manifest first: what is deleted half is not a checkpoint any more."""
    if path.is_dir():
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
