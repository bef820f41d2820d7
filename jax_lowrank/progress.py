"""Progress of long work: a live line on a terminal, a line every few seconds in a log file."""

from __future__ import annotations

import os
import sys
import time
from typing import TextIO

from jax_lowrank.processes import is_first


class Progress:
    """Counts optimizer steps of a whole study and says how long the rest will take.

    Use as a context manager. On a terminal one line is redrawn; elsewhere a line is written at most
    every `interval` seconds, so that a log stays readable.
    """

    def __init__(self, total: int, *, stream: TextIO | None = None, interval: float = 10.0):
        self.total, self.done = total, 0
        self.started: tuple[float, int] | None = None  # when first steps were done; how many
        # Of several processes the first one speaks.
        self.stream = stream or (sys.stderr if is_first() else open(os.devnull, "w"))  # noqa: SIM115
        self.interval, self.last = interval, -interval
        self.bar = None

    def __enter__(self) -> Progress:
        if self.stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            self.bar = Bar(
                BarColumn(bar_width=20),
                TextColumn("{task.percentage:>3.0f}%  {task.description}"),
                console=Console(file=self.stream),
            )
            self.bar.start()
            self.task = self.bar.add_task("", total=self.total)
        return self

    def __exit__(self, *exception) -> None:
        if self.bar is not None:
            self.bar.stop()

    def skip(self, steps: int) -> None:
        """Steps that an earlier session did: they count as done, not towards the speed."""
        self.done += steps
        if self.started:
            self.started = self.started[0], self.started[1] + steps
        self._draw("")

    def advance(self, steps: int, text: str) -> None:
        """Steps that were just done, and what to say of them."""
        self.done += steps
        self.started = self.started or (time.monotonic(), self.done)
        self._draw(text)

    def note(self, text: str) -> None:
        """A line that stays, such as the result of a run."""
        if self.bar is not None:
            self.bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=self.stream, flush=True)

    def eta(self) -> str:
        """Time left as h:mm:ss at the speed since the first steps, which mostly compile;
        ? until there is such a speed."""
        began, before = self.started or (0.0, self.done)
        if self.done == before:
            return "?"
        speed = (time.monotonic() - began) / (self.done - before)
        return clock(speed * max(0, self.total - self.done))

    def _draw(self, text: str) -> None:
        line = f"{text}  ETA {self.eta()}"
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, description=line)
        elif text and time.monotonic() - self.last >= self.interval:
            self.last = time.monotonic()
            print(f"[{self.done}/{self.total} steps] {line}", file=self.stream, flush=True)


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
