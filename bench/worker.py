"""Worker processes of a benchmark: a command a line in, an answer a line out, until the end of input."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from protocol.errors import BusError

CHECKOUT = Path(__file__).resolve().parent.parent
PATIENCE_S = 60.0


class Worker:
    """One of them, seen from outside."""

    def __init__(self, role: str, process: subprocess.Popen[bytes]) -> None:
        self.role = role
        self.process = process

    def write(self, line: str) -> None:
        """A command."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())
        self.process.stdin.flush()

    def read(self) -> str:
        """Its answer. Raises BusError when it ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise BusError(
                f"measuring: the worker {self.role} ended with code {self.process.wait()}",
                hint="its error stands above",
                reason="worker ended",
            )
        return line.decode().rstrip("\n")


@contextlib.contextmanager
def worker(module: str, role: str, *arguments: str) -> Iterator[Worker]:
    """``python -m module role arguments…``; ended with this context."""
    command = [sys.executable, "-m", module, role, *arguments]
    with subprocess.Popen(command, cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield Worker(role, process)
        finally:
            assert process.stdin is not None
            process.stdin.close()  # the end of its input ends it, as does the end of this process
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def answer(line: object) -> None:
    """In a worker: one answer."""
    print(line, flush=True)


def commands() -> Iterator[tuple[str, int]]:
    """In a worker: commands of a word and a number."""
    for line in sys.stdin:
        kind, count = line.split()
        yield kind, int(count)


class Countdown:
    """Counts to a target, and notes when it was reached."""

    def __init__(self) -> None:
        self._left = 0
        self._done = threading.Event()
        self._at_s = 0.0

    def expect(self, count: int) -> None:
        """Begin anew: ``count`` calls are the target."""
        self._done.clear()
        self._left = count

    def __call__(self, *_: object) -> None:
        self._left -= 1
        if not self._left:
            self._at_s = time.monotonic()
            self._done.set()

    def wait(self) -> float:
        """``time.monotonic()`` of the last call. Raises BusError when it does not come in PATIENCE_S."""
        if not self._done.wait(PATIENCE_S):
            raise BusError(f"measuring: {self._left} messages did not come in {PATIENCE_S:g} s")
        return self._at_s
