"""The process that a command runs in: its memory, its JAX, and the others of one program.

Several processes run the same program on the devices of all. What is decided, claimed, written or
said is so by the first one (`once`, `is_first`); the others wait and get to know.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
PATIENCE = 30  # seconds that a process which ends waits for the others; then they are ended


class PeerError(OSError):
    """Another process of the program failed; the message is that process's, where it is known."""


def use_fast_memory() -> None:
    """Start again with huge pages for malloc (Linux): 1.1 to 1.2 times faster steps on CPU.

    glibc reads the setting when a process starts. The same variable stops this from looping.
    """
    tunable = "glibc.malloc.hugetlb=1"
    known = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform == "linux" and "glibc.malloc.hugetlb" not in known:
        os.environ["GLIBC_TUNABLES"] = f"{known}:{tunable}" if known else tunable
        os.execv(sys.executable, [sys.executable, "-m", "jax_lowrank", *sys.argv[1:]])


def set_up_jax() -> None:
    """Keep compiled programs between sessions, and transformers' notices out of the output."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import jax

    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    jax.config.update("jax_compilation_cache_dir", str(home / "jax_lowrank"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def join(distributed: bool, environment: Mapping[str, str]) -> None:
    """If so, meet the other processes: where the variables NAMES say, or else where JAX finds them:
    on TPUs, under Slurm, Open MPI and (with its extra `k8s`) Kubernetes.

    Raises ValueError when neither is the case.
    """
    if not distributed:
        return
    import jax

    # It would take over SIGTERM.
    jax.config.update("jax_enable_preemption_service", False)
    given = [environment[name] for name in NAMES if name in environment]
    if len(given) == len(NAMES):
        known = (given[0], int(given[1]), int(given[2]))
        jax.distributed.initialize(*known, shutdown_timeout_seconds=PATIENCE)
    else:
        try:
            jax.distributed.initialize(shutdown_timeout_seconds=PATIENCE)
        except ValueError as error:
            raise ValueError(
                f"--distributed, but nothing says where the other processes are ({error}); set"
                f" {', '.join(NAMES)}"
            ) from error
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)


def several() -> bool:
    """Whether this is one of several processes."""
    import jax

    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that decides, writes and speaks."""
    import jax

    return not several() or jax.process_index() == 0


def once(function: Callable[[], Any]) -> Any:
    """What a function gives, in every process: when all are here, the first one alone calls it.

    The value must be what JSON can hold; a path comes as text. An error is raised in all: the
    others raise PeerError with its message.
    """
    if not several():
        return function()
    anywhere()
    error, said = None, {}
    if is_first():
        try:
            said = {"value": function()}
        except Exception as problem:
            error, said = problem, {"error": str(problem)}
    said = json.loads(_from_first(json.dumps(said, default=str)))
    if error is not None:
        raise error
    if "error" in said:
        raise PeerError(said["error"])
    return said["value"]


def anywhere(*flags: bool) -> list[bool]:
    """Of each flag, whether it is set in any of the processes; all of them must ask alike."""
    if not several():
        return [bool(flag) for flag in flags]
    import numpy as np
    from jax.experimental import multihost_utils

    asked = np.array([False, *flags])
    return multihost_utils.process_allgather(asked).any(0).tolist()[1:]


def raise_together(error: Exception | None) -> None:
    """Raise the error; where only another process has one, PeerError."""
    (failed,) = anywhere(error is not None)
    if error is not None:
        raise error
    if failed:
        raise PeerError("another process failed; it says why")


def _from_first(text: str) -> str:
    """The first process's text."""
    import numpy as np
    from jax.experimental import multihost_utils

    data = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    block = np.zeros(-(-size // 4096) * 4096, np.uint8)  # few sizes: each is compiled
    if is_first():
        block[:size] = data
    return multihost_utils.broadcast_one_to_all(block)[:size].tobytes().decode()
