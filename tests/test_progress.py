"""What long work says of itself in a log file."""

import io

import pytest

from jax_lowrank import progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds since a start, set by the test."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_eta_leaves_out_compilation_and_earlier_sessions(clock):
    stream = io.StringIO()
    with progress.Progress(100, stream=stream, interval=0.0) as said:
        said.skip(20)
        clock[0] += 60  # compiles
        said.advance(1, "run")
        clock[0] += 10
        said.advance(19, "run")
        clock[0] += 10
        said.skip(20)
        said.advance(21, "run")
    assert stream.getvalue().splitlines() == [
        "[21/100 steps] run  ETA ?",
        "[40/100 steps] run  ETA 0:32",  # 10 s / 19 steps * 60
        "[81/100 steps] run  ETA 0:10",  # 20 s / 40 steps * 19 = 9.5
    ]


def test_a_log_has_a_line_per_interval(clock):
    stream = io.StringIO()
    with progress.Progress(4, stream=stream, interval=10.0) as said:
        for _ in range(4):
            said.advance(1, "run")
            clock[0] += 5
        said.note("done")
    lines = stream.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["[1/4", "[3/4", "done"]
