"""A training run in a process of its own, which kills itself at a point that a test chooses.

Arguments: FOLDER STAGE NUMBER SECONDS. At the NUMBER-th save, finalise or delete a SIGKILL comes
after SECONDS, from another thread. With stage `run` it comes so long after the training began; with
`none` never. At the end FOLDER.npz holds the outputs of every example, and every array of the last
checkpoint.
"""

import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
from test_checkpoint import final_hashes, outputs, session
from test_train import corpus, lora_with_dropout
from tiny import apply_of

from jax_lowrank import checkpoint


def kill_in(seconds):
    """Send the signal from another thread, while this one works on."""

    def kill():
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()


def dying(function, number, seconds, *, half=None):
    """`function`, whose number-th call is killed; `half` does a part of it first and then waits."""
    calls = []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            kill_in(seconds)
            if half is not None:
                half(*args)
        return function(*args, **kwargs)

    return wrapped


def slow_delete(path):
    """Delete file by file, slowly enough to be killed in the middle."""
    for file in sorted(path.rglob("*")) if path.is_dir() else ():
        if file.is_file():
            file.unlink()
            time.sleep(0.002)


def main(arguments):
    """One session, to its end or to its death."""
    folder, stage, number, seconds = arguments
    folder, number, seconds = Path(folder), int(number), float(seconds)
    if stage == "save":
        checkpoint.ocp.save_async = dying(checkpoint.ocp.save_async, number, seconds)
    elif stage == "finalise":
        checkpoint._write_manifest = dying(checkpoint._write_manifest, number, seconds)
    elif stage == "delete":
        checkpoint.shutil.rmtree = dying(shutil.rmtree, number, seconds, half=slow_delete)
    elif stage == "run":
        kill_in(seconds)
    notes = []
    result, _ = session(folder, steps=STEPS, notes=notes)
    graphdef, _, frozen, _ = lora_with_dropout()
    batches = [corpus().batch(t) for t in range(5)]
    rows = [outputs(apply_of(graphdef), result.trainable, frozen, batch) for batch in batches]
    arrays = {str(n): np.frombuffer(x, np.uint8) for n, x in enumerate(final_hashes(folder))}
    np.savez(f"{folder}.npz", rows=np.stack(rows), best=result.best_step, **arrays)


STEPS = 120
