"""A study in a process of its own, which kills itself in the middle of a pack.

Arguments: NUMBER and those of the command. After a pack's NUMBER-th checkpoint is on disk comes a
SIGKILL; 0: never. Runs of several seeds are packed however few their steps are.
"""

import os
import signal

from jax_lowrank import cli
from jax_lowrank.checkpoint import Checkpoints
from jax_lowrank.study import packs


def main(arguments):
    """The command, to its end or to its death."""
    number, *command = arguments
    packs.COMPILING, left, save = 0, int(number), Checkpoints.save

    def dying(self, *state):
        nonlocal left
        save(self, *state)
        self.wait()
        left -= self.directory.name.startswith("pack-")
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    if left:
        Checkpoints.save = dying
    return cli.main(command)
