"""Tasks: raw data in, checked splits out. Each `make` takes plain keyword arguments and returns a
Task.
"""

from jax_lowrank.tasks import completions, world
from jax_lowrank.tasks.task import Split, Task, TaskError, data_hash

TASKS = {"world": world.make, "completions": completions.make}

__all__ = ["TASKS", "Split", "Task", "TaskError", "data_hash"]
