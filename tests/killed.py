"""A training run in a process of its own, for a test to kill.

Argument: FOLDER, of its checkpoints. At the end FOLDER.npz holds the outputs of every example, and
every array of the last checkpoint; on stdout stand the steps at which it was continued.
"""

import json
from pathlib import Path

import numpy as np
from test_checkpoint import final_bytes, outputs, session
from test_train import corpus, lora_with_dropout
from tiny import apply_of


def main(arguments):
    """One session, to its end or to its death."""
    folder = Path(arguments[0])
    result, _ = session(folder, steps=STEPS)
    graphdef, _, frozen, _ = lora_with_dropout()
    batches = [corpus().batch(t) for t in range(5)]
    rows = [outputs(apply_of(graphdef), result.trainable, frozen, batch) for batch in batches]
    arrays = {str(n): np.frombuffer(x, np.uint8) for n, x in enumerate(final_bytes(folder))}
    np.savez(f"{folder}.npz", rows=np.stack(rows), best=result.best_step, **arrays)
    print(json.dumps(result.resumed_at))


STEPS = 120
