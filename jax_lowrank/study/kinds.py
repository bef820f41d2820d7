"""Kinds of tasks: a table from a task's type to what a study does for it."""

from __future__ import annotations

from jax_lowrank import tasks
from jax_lowrank.study.classification import CLASSIFICATION
from jax_lowrank.study.completions import COMPLETIONS
from jax_lowrank.study.parts import Kind

KINDS = {tasks.Task: COMPLETIONS, tasks.Classification: CLASSIFICATION}


def kind_of(task: tasks.Task | tasks.Classification) -> Kind:
    """The kind of a task."""
    return KINDS[type(task)]
