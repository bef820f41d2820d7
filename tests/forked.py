"""Programs that start at once: a parent that has imported what they need forks them.

    python tests/forked.py      forks what its standard input asks for, one JSON object a line

Nearly all that a program does before a test kills it is importing.
"""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import held


class Forks:
    """The parent; `start` a program, which ends with it at the latest."""

    def __init__(self, environment, logs):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        line = [sys.executable, __file__]
        self.parent = subprocess.Popen(line, env=environment, **pipes)
        self.logs, self.number = Path(logs), 0
        self.logs.mkdir(parents=True, exist_ok=True)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.parent.stdin.close()
        self.parent.wait(60)
        self.parent.stdout.close()

    def ask(self, **request):
        """The parent's answer."""
        print(json.dumps(request), file=self.parent.stdin, flush=True)
        return json.loads(self.parent.stdout.readline())

    def start(self, module, *arguments, **environment):
        """A process that calls `main` of a module with a list of arguments, as texts."""
        self.number += 1
        log = self.logs / str(self.number)
        for suffix in (".out", ".err"):
            log.with_suffix(suffix).touch()
        texts = [str(argument) for argument in arguments]
        pid = self.ask(start=module, arguments=texts, environment=environment, log=str(log))
        return Forked(self, pid, log)


class Forked:
    """A started program, much as subprocess.Popen has one."""

    def __init__(self, forks, pid, log):
        self.forks, self.pid, self.log, self.returncode = forks, pid, log, None

    def poll(self):
        """The exit code, minus the signal that killed it, or None."""
        if self.returncode is None:
            self.returncode = self.forks.ask(poll=self.pid)
        return self.returncode

    def wait(self, seconds=300):
        """Until it has ended; the exit code."""
        self.until(lambda: self.poll() is not None, seconds)
        return self.returncode

    def until(self, true, seconds=300):
        """Until something is so."""
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)

    def send_signal(self, number):
        """To the process, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def said(self):
        """Its stderr so far."""
        return self.log.with_suffix(".err").read_text()

    def printed(self):
        """Its stdout so far, without what XLA's own library for collectives says there."""
        lines = self.log.with_suffix(".out").read_text().splitlines(keepends=True)
        return "".join(line for line in lines if not line.startswith("[Gloo]"))


def tell_writes(folder):
    """Have every change that Python code of this process makes below a folder told on stderr."""

    def hook(event, arguments):
        path = next((str(x) for x in arguments if isinstance(x, str | os.PathLike)), "")
        changes = event in ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree")
        if event == "open" and isinstance(arguments[2], int):
            changes = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if changes and path.startswith(folder):
            print(f"{event} changes {path}", file=sys.stderr, flush=True)

    sys.addaudithook(hook)


def begin(request):
    """What a child does first."""
    os.environ.update(request["environment"])
    for number, suffix in ((1, ".out"), (2, ".err")):
        descriptor = os.open(request["log"] + suffix, os.O_WRONLY)
        os.dup2(descriptor, number)
        os.close(descriptor)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    if "WATCHED" in os.environ:
        tell_writes(os.environ["WATCHED"])
    if "ARRAYS" in os.environ:
        held.keep_arrays(os.environ["ARRAYS"])
    if "FULL" in os.environ:
        held.fill_disk(os.environ["FULL"])
    if "HELD" in os.environ:
        held.hold(*os.environ["HELD"].split())
    return importlib.import_module(request["start"]).main(request["arguments"])


def serve():
    """Fork and look after children until there is nothing more to read."""
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer = os.fork()
            if not answer:
                sys.exit(begin(request))
        else:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    for name in ("killed", "jax_lowrank.cli", "jax_lowrank.finetune", "jax_lowrank.report.page"):
        importlib.import_module(name)
    from transformers import AutoTokenizer  # noqa: F401  (imported where it is used)

    serve()
