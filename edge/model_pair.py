"""Measuring a pair of variants of a model in a child process, whose memory is given back at its end.

The child (services/model_runner/pairing.py, started by its module's name) loads one variant after the other; this
process need have neither torch nor the memory for two models.
"""

from __future__ import annotations

import subprocess
import sys
from collections import deque
from pathlib import Path
from threading import Thread
from typing import IO

import msgspec

from broker.child import spawn
from edge.config import ModelConfig
from edge.models import Progress
from protocol.errors import ModelError

PAIR_MODULE = "services.model_runner.pairing"


class PairAsk(msgspec.Struct):
    """What the child is to measure."""

    node: str
    data_dir: str
    """The node's."""
    model: ModelConfig
    source: str
    target: str


class PairSaid(msgspec.Struct, omit_defaults=True):
    """A line of the child."""

    doing: str = ""
    refused: str = ""
    done: bool = False


def make_in_child(ask: PairAsk, say: Progress = lambda _line: None) -> None:
    """Measure in a process of its own, which signs and keeps the certificate. Raises ModelError with what it said."""
    child = spawn(
        [sys.executable, "-m", PAIR_MODULE, msgspec.json.encode(ask).decode()],
        cwd=Path(__file__).resolve().parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stderr is not None
    noise: deque[bytes] = deque(maxlen=20)
    drain = Thread(target=_drain, args=(child.stderr, noise), daemon=True)
    drain.start()
    last = PairSaid()
    try:
        for line in child.stdout:
            last = msgspec.json.decode(line, type=PairSaid)
            if last.doing:
                say(last.doing)
        child.wait()
        drain.join(5.0)
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
        child.stdout.close()
    if not last.done:
        why = last.refused or next((line.decode("utf-8", "replace").strip() for line in reversed(noise)), "")
        raise ModelError(
            f"measuring {ask.source} on {ask.target}: {why or f'it ended with code {child.returncode}'}",
            hint="`mindstream models pair` says more",
            reason="measuring failed",
        )


def _drain(stream: IO[bytes], lines: deque[bytes]) -> None:
    with stream:
        lines.extend(stream)
