"""What tests/test_sweep.py runs in a process of its own: cells shared out to 8 virtual devices.

    python tests/swept.py OUT.json                             (8 virtual CPU devices by XLA_FLAGS)

Six cells, two of them in other seeds, against the single runs of the first three on one device; and
the same stopped in the middle and gone on with, against itself.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import conftest  # noqa: F401  (strict JAX, as in every test)
import jax
from test_sweep import MIXED, alone, cell_of, corpus, differences, falling, program
from tiny import model_of, same_bytes

from jax_lowrank import sharding, sweep, train
from jax_lowrank.checkpoint import Checkpoints, Interrupted
from jax_lowrank.sweep import score, step

STEPS = 12


def main() -> None:
    """Train, compare, write."""
    wants = [want._replace(seed=want.seed + 10 * i) for i in (0, 1) for want in MIXED]
    cells = [cell_of(want, model_of("gpt2")) for want in wants]
    cells = [c._replace(schedule=c.schedule._replace(num_steps=STEPS)) for c in cells]
    lines, held, scores, fall = [[] for _ in cells], [], [], falling()
    loss, mesh = train.causal_lm_loss, sharding.make_mesh(2, 2, 2)

    def validate(states):
        held.append({name: parts(getattr(states, name)) for name in states._fields})
        asked = score.likelihood(program(loss), states, [[5, 9, 2, 7]], batch_size=1, pad_id=0)
        scores.append(asked.nll[:, 0].tolist())
        return [fall(states)] * 8

    found = sweep.fit(
        program=program(loss),
        cells=cells,
        batches=corpus(),
        validate=validate,
        log=lambda k, line: lines[k].append(line),
        steps_per_call=1,
        mesh=mesh,
    )
    singles = [alone(cell, loss, corpus()) for cell in cells[:3]]
    apart = [differences(*each) for each in zip(singles, found, lines)]
    out = {"apart": apart, "held": held, "scores": scores, "compiled": step.run_cells._cache_size()}
    again, told = stopped(cells, mesh)
    pairs = list(zip(again, found, strict=True))
    out["resumed_at"] = [one.resumed_at for one in again]
    out["same"] = [same_bytes(one.trainable, other.trainable) for one, other in pairs]
    out["lines"] = [
        [[line.get(name) for line in each] for name in ("step", "loss", "gradient_norm")]
        for one in zip(told, lines)
        for each in one
    ]
    out["compiled_again"] = step.run_cells._cache_size()
    Path(sys.argv[1]).write_text(json.dumps(out))


class Asked(Checkpoints):
    """Stops a sweep at the fifth step, once."""

    left = 5

    def due(self):
        """Whether it is there."""
        self.left -= 1
        self.asked = self.left == 0
        return self.asked


def stopped(cells, mesh):
    """The sweep, stopped after five steps, and the session that goes on: outcomes and lines."""
    lines, sessions = [[] for _ in cells], 0
    with TemporaryDirectory() as folder:
        while True:
            checkpoints = (Asked if sessions == 0 else Checkpoints)(Path(folder) / "pack", "f")
            for each in lines:
                each.clear()
            fall = falling()
            try:
                return sweep.fit(
                    program=program(train.causal_lm_loss),
                    cells=cells,
                    batches=corpus(),
                    validate=lambda states: [fall(states)] * 8,  # noqa: B023
                    log=lambda k, line: lines[k].append(line),
                    steps_per_call=1,
                    mesh=mesh,
                    checkpoints=checkpoints,
                ), lines
            except Interrupted:
                sessions += 1


def parts(tree) -> list[list[int]]:
    """Of every array: its first dimension, that on a device, and the number of devices."""
    return [
        [x.shape[0], x.addressable_shards[0].data.shape[0], len(x.sharding.device_set)]
        for x in jax.tree.leaves(tree)
    ]


if __name__ == "__main__":
    main()
