"""Signals that ask a command to stop: noted at once, acted on where it is safe."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def caught(ask: Callable[[], None]):
    """The first SIGTERM or SIGINT calls `ask`; the second ends the process with 128 + its number.

    A thread listens: Python's own handlers wait until a compiled call returns. Elsewhere than in
    the main thread, signals are left alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def listen() -> None:
        asked = False
        while (byte := os.read(reader, 1)) != b"\0":
            if byte[0] not in SIGNALS:
                continue
            if asked:
                os._exit(128 + byte[0])
            asked = True
            os.write(2, b"stopping: saving a checkpoint; once more to stop at once\n")
            ask()

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    # Their handler asks as well: an event loop may have taken over the pipe for a moment.
    previous = {number: signal.signal(number, lambda *_: ask()) for number in SIGNALS}
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in previous.items():
            signal.signal(number, handler)
        os.write(writer, b"\0")
        listener.join()
        os.close(reader)
        os.close(writer)
