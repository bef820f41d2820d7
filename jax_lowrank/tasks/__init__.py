"""Tasks: raw data in, checked splits out. Each `make` takes plain keyword arguments and returns a
Task or, of labelled texts, a Classification.
"""

from jax_lowrank.tasks import completions, text_classification, world
from jax_lowrank.tasks.task import Split, Task, TaskError, data_hash
from jax_lowrank.tasks.text_classification import Classification

TASKS = {
    "world": world.make,
    "completions": completions.make,
    "text_classification": text_classification.make,
}

__all__ = ["TASKS", "Classification", "Split", "Task", "TaskError", "data_hash"]
