"""What tests/test_processes.py runs in two processes: each says what it gets to know."""

import os
import sys
from pathlib import Path

from jax_lowrank import processes


def main(arguments):
    """What all do alike, and what only one of them finds."""
    processes.join(True, os.environ)
    me = int(os.environ["JAX_PROCESS_ID"])
    print("the first one speaks")
    assert processes.several() and processes.is_first() == (me == 0)
    assert processes.anywhere(me == 0, me == 1, False) == [True, True, False]
    called = []

    def found(size):
        called.append(me)
        return {"who": me, "path": Path("x"), "text": "ä" * size}

    for size in (1, 5000):  # less and more than is sent at once
        value = processes.once(lambda size=size: found(size))
        assert value["who"] == 0 and str(value["path"]) == "x" and value["text"] == "ä" * size
    assert called == ([] if me else [0, 0])

    def fail():
        raise ValueError(f"no room, says {me}")

    error = ValueError("no room, says 1") if me else None
    for attempt in (lambda: processes.once(fail), lambda: processes.raise_together(error)):
        try:
            attempt()
        except (ValueError, processes.PeerError) as problem:
            print(type(problem).__name__, problem, file=sys.stderr)
    processes.raise_together(None)
    if arguments and me == int(arguments[0]):  # one fails alone
        raise SystemExit(2)
    processes.anywhere()
