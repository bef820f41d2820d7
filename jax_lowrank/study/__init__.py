"""The composition root: checks a study, runs what is not finished yet, and reports it."""

from jax_lowrank.study.grid import execute
from jax_lowrank.study.prepare import prepare

__all__ = ["execute", "prepare"]
