"""Measuring a pair of variants of a model in a child process, whose memory is given back at its end.

The child (services/model_runner/pairing.py, started by its module's name) loads one variant after the other; this
process need have neither torch nor the memory for two models.
"""

from __future__ import annotations

import msgspec

from edge.config import ModelConfig
from edge.model_child import run_child
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
    last, ended = run_child(PAIR_MODULE, [msgspec.json.encode(ask).decode()], PairSaid(), say)
    if not last.done:
        why = last.refused or ended.last_words
        raise ModelError(
            f"measuring {ask.source} on {ask.target}: {why or f'it ended with code {ended.code}'}",
            hint="`mindstream models pair` says more",
            reason="measuring failed",
        )
