"""Child processes for work with models: each says in lines of JSON how far it is, and its end gives the memory back."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Thread
from typing import IO, NamedTuple, Protocol, TypeVar

import msgspec

from broker.child import spawn
from edge.models import Progress

NOISE_LINES = 40


class Saying(Protocol):
    """A line of the child."""

    doing: str
    """What it does now; empty in a line that is no progress."""


S = TypeVar("S", bound=Saying)


class Ended(NamedTuple):
    """How a child ended."""

    code: int
    noise: list[str]
    """The last lines of its standard error, without spaces around them."""

    @property
    def last_words(self) -> str:
        """The last of these lines that says something; empty for none."""
        return next((line for line in reversed(self.noise) if line), "")


def run_child(
    module: str, arguments: Sequence[str], first: S, say: Progress, environment: Mapping[str, str] | None = None
) -> tuple[S, Ended]:
    """Run ``python -m module``, and hand what it is doing to ``say``.

    Returns the last thing it said, or ``first``, which has the type of its lines. The child is killed when this is
    left by an exception.
    """
    child = spawn(
        [sys.executable, "-m", module, *arguments],
        cwd=Path(__file__).resolve().parents[1],
        env=os.environ | dict(environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stderr is not None
    noise: deque[bytes] = deque(maxlen=NOISE_LINES)
    drain = Thread(target=_drain, args=(child.stderr, noise), daemon=True)
    drain.start()
    last = first
    try:
        for line in child.stdout:
            last = msgspec.json.decode(line, type=type(first))
            if last.doing:
                say(last.doing)
        child.wait()
        drain.join(5.0)
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
        child.stdout.close()
    return last, Ended(child.returncode, [line.decode("utf-8", "replace").strip() for line in noise])


def _drain(stream: IO[bytes], lines: deque[bytes]) -> None:
    with stream:
        lines.extend(stream)
