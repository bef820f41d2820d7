"""Many fine-tuning runs over one frozen base in one compiled step, each as if it were alone.

The runs are the `cells` of a sweep. What they train is stacked on a leading cell axis, adapters
filled up to one rank (see adapt/padded.py); the base is there once, and the products with it are
one for all the cells of a pack. Cells may differ in rank, scale, adapted layers, initial values,
learning rates, weight decay, clipping, LoRA+ ratio, dropout key and length. K cells, B rows a batch
and cell, S tokens.
"""

from jax_lowrank.sweep.cells import Cell, OwnBatches, Program, States, SweepError, make_program
from jax_lowrank.sweep.loop import fit

__all__ = ["Cell", "OwnBatches", "Program", "States", "SweepError", "fit", "make_program"]
