"""What a test has of a process that it is about to kill: a halt within a stage of a checkpoint,
where its training began, and the arrays that it ended with. Nothing of it is in the package.

A process with HELD="STAGE NUMBER FILE" in its environment makes FILE at the NUMBER-th of its
changes that belong to the stage, before the change is made, and waits until FILE is deleted; with
FULL="NUMBER" these changes of a save fail from the NUMBER-th on. One with ARRAYS="FILE" says at
which step it goes on, and writes FILE-PROCESS.npz when training is over.
"""

import hashlib
import itertools
import json
import os
import re
import sys
import time
from pathlib import Path

import jax
import numpy as np

# A path in a checkpoint; Orbax writes beside its place, and renames that directory at the end.
PLACE = re.compile(r"/\d{8}(\.orbax-checkpoint-tmp)?(/|$)")
DELETES = ("os.remove", "os.rmdir", "shutil.rmtree")


def stage_of(event, path, writes):
    """`save`, `finalise` (the rename, the hashes, the manifest), `delete`, or None for neither."""
    found = PLACE.search(path)
    if found is None:
        return None
    if found[1]:
        save = event == "os.mkdir" or (event == "open" and writes)
        return "save" if save else "finalise" if event == "os.rename" else None
    if event in DELETES:
        return "delete"
    inside = event in ("open", "os.rename") and found[2]  # rmtree opens directories
    signed = os.path.exists(path[: found.start() + 9] + "/manifest.json")
    return "finalise" if inside and not signed else None


def full_path(event, arguments):
    """The path that an event of Python's audit is about; rmtree names files by their directory."""
    path = arguments[0]
    if not isinstance(path, str | os.PathLike):
        return ""
    folder = arguments[-1] if event in DELETES else None
    inside = isinstance(folder, int) and folder >= 0
    return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path) if inside else str(path)


def hold(stage, number, file):
    """Halt at the number-th change of a stage until `file`, which says what it is, is deleted."""
    changes, file = itertools.count(1), Path(file)

    def hook(event, arguments):
        if event not in ("open", "os.mkdir", "os.rename", *DELETES):
            return
        path = full_path(event, arguments)
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if stage_of(event, path, writes) == stage and next(changes) == int(number):
            partial = file.with_suffix(".partial")
            partial.write_text(f"{event} {PLACE.split(path)[-1] or 'itself'}")
            partial.rename(file)
            while file.exists():
                time.sleep(0.002)

    sys.addaudithook(hook)


def fill_disk(number):
    """From the number-th change of a save on, every one of this process fails."""
    changes = itertools.count(1)

    def hook(event, arguments):
        if event in ("open", "os.mkdir"):
            writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            saves = stage_of(event, full_path(event, arguments), writes) == "save"
            if saves and next(changes) >= int(number):
                raise OSError(28, "No space left on device")

    sys.addaudithook(hook)


def keep_arrays(file):
    """Say where training begins, and write the arrays it ends with as this process holds them."""
    from jax_lowrank import checkpoint, train

    class Kept(train.Training):
        def resume(self):
            resumed = super().resume()
            print(f"training from step {self.step}", file=sys.stderr, flush=True)
            return resumed

        def validated(self, loss):
            super().validated(loss)
            if self.step < self.num_steps:
                return
            arrays = {}
            for name, leaf in checkpoint._named(self.arrays()).items():
                for shard in getattr(leaf, "addressable_shards", ()):
                    arrays[f"{name} {shard.index}"] = np.asarray(shard.data)
                if not isinstance(leaf, jax.Array):
                    arrays[name] = leaf
            place = f"{file}-{jax.process_index()}"
            np.savez(f"{place}.partial.npz", **arrays)
            os.replace(f"{place}.partial.npz", f"{place}.npz")

    train.Training = Kept


def began_at(process):
    """The step that training went on from; 0: from the beginning; None: it did not get there."""
    found = re.search(r"^training from step (\d+)$", process.said(), re.MULTILINE)
    return int(found[1]) if found else None


def newest(folder):
    """The step of the newest whole checkpoint below a folder, by its manifest; 0: there is none."""
    return max(map(whole_step, folder.rglob("manifest.json")), default=0)


def whole_step(manifest):
    """The step of a checkpoint, if every file is what the manifest says; else 0."""
    content = json.loads(manifest.read_text())["content"]
    for name, wanted in content["files"].items():
        file = manifest.parent / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != wanted:
            return 0
    return content["step"]


def same_arrays(one, other):
    """Whether two files of arrays hold the same bits; assert that they hold more than 20 arrays."""
    with np.load(one) as a, np.load(other) as b:
        assert a.files == b.files and len(a.files) > 20
        return all(a[name].tobytes() == b[name].tobytes() for name in a.files)
