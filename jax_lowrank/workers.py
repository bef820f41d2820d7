"""Several workers on one study: which runs are whose, and who holds one.

A claim is a lock of the operating system on a file: it ends with the process, however that dies,
and needs no clock. It holds between machines where the file system has such locks: NFS from version
4, Lustre mounted with `flock`, and others. Where it has none, a claim is given to everyone: then
only one worker at a time is safe, and `has_locks` says so.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from jax_lowrank.processes import once

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Shard(NamedTuple):
    """Part `index` (from 0) of `count` of a study's runs."""

    index: int = 0
    count: int = 1

    def part(self, items: list) -> list:
        """Every count-th item from `index` on."""
        return items[self.index :: self.count]


def shard_of(text: str | None, environment: Mapping[str, str]) -> Shard:
    """The shard that `i/n` says; without it, the one that a scheduler's variables say, or all.

    Slurm: SLURM_ARRAY_TASK_ID with _COUNT, and _MIN and _STEP where the array does not count from
    0 by 1. Kubernetes: JOB_COMPLETION_INDEX with JOB_COMPLETIONS, which the manifest must set.
    Raises ValueError.
    """
    if text is None:
        slurm = environment.get("SLURM_ARRAY_TASK_ID"), environment.get("SLURM_ARRAY_TASK_COUNT")
        job = environment.get("JOB_COMPLETION_INDEX"), environment.get("JOB_COMPLETIONS")
        if all(slurm):
            least = int(environment.get("SLURM_ARRAY_TASK_MIN", "0"))
            step = int(environment.get("SLURM_ARRAY_TASK_STEP", "1"))
            text = f"{(int(slurm[0]) - least) // step}/{slurm[1]}"
        elif all(job):
            text = "/".join(job)
        else:
            return Shard()
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match:
        raise ValueError(f"shard {text!r} is not of the form i/n; use 0/4 for the first of four")
    index, count = map(int, match.groups())
    if index >= count:
        raise ValueError(
            f"shard {text}: shards of {count} are 0/{count} to {max(0, count - 1)}/{count}"
        )
    return Shard(index, count)


@contextlib.contextmanager
def claim(file: Path) -> Iterator[bool]:
    """Whether this program alone holds `file` now, until the block is left.

    Of several processes of a program the first one holds it.
    """
    with contextlib.ExitStack() as held:
        yield once(lambda: held.enter_context(_lock(file)))


@contextlib.contextmanager
def _lock(file: Path) -> Iterator[bool]:
    """`claim` of this process."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield True


def has_locks(folder: Path) -> bool:
    """Whether the file system of `folder`, which is made, can keep two workers apart."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "probe").open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in NO_LOCKS
    return True


@contextlib.contextmanager
def turn(file: Path, waiting: Callable[[], None], interval: float = 1.0) -> Iterator[None]:
    """Hold `file`, once the worker that has it now is done or dead; `waiting` is called once."""
    told = False
    while True:
        with claim(file) as mine:
            if mine:
                yield
                return
        if not told:
            waiting()
            told = True
        time.sleep(interval)
