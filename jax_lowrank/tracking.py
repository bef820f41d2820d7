"""Training curves for TensorBoard, written while a run trains."""

from __future__ import annotations

import importlib.util
import re
import time
import weakref
from collections.abc import Callable
from pathlib import Path

POSITIONS = ("step", "num_steps")


def require_tensorboard() -> None:
    """Raise ValueError where the writer of event files is not installed."""
    if importlib.util.find_spec("tensorboardX") is None:
        raise ValueError("--track needs tensorboardX; pip install 'jax_lowrank[track]'")


def tensorboard(directory: Path, label: str) -> Callable[[dict], None]:
    """A `log` for train.fit that writes every number of a line at its step.

    The curves of a run lie in directory/LABEL; a resumed run adds to them.
    """
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.summary import scalar

    name = re.sub(r"[^\w.=+-]+", "_", label).strip("_")
    (directory / name).mkdir(parents=True, exist_ok=True)
    # Not SummaryWriter: it starts a thread a run, and loses what is not written yet at the end.
    writer = EventsWriter(str(directory / name / "events"))

    def log(line: dict) -> None:
        if line.get("resumed"):  # written when it happened
            return
        for key, value in line.items():
            if key not in POSITIONS:
                summary = scalar(key, value)
                writer.write_event(Event(wall_time=time.time(), step=line["step"], summary=summary))
        writer.flush()

    weakref.finalize(log, writer.close)
    return log
