"""The first step of a resumed conversation, against the next token's logits that its snapshot holds.

They are those that reading the pending token gave where it was saved. KV that is exact must give them again bit for
bit, under equal numerics; of KV that is not, their divergence is what its codec costs at this very place.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from services.model_runner import distributions
from services.model_runner.engine import Engine, Logits
from services.model_runner.snapshot import Unpacked


class FirstStep(NamedTuple):
    """What a comparison found."""

    logits: str
    """``equal``: bit for bit; ``close``: another distribution, the same likeliest token; ``other``: another one."""
    kl: float
    """Kullback-Leibler divergence from the snapshot's distribution to this one, nats."""


def check(engine: Engine, resumed: Unpacked) -> FirstStep | None:
    """Look at the next step, on the engine's thread; the state stays before it. One step is computed.

    None where there is nothing to compare: no logits in the snapshot, or tokens that are to be read again. Raises as
    ``Engine.peek``.
    """
    if resumed.logits is None or resumed.how == "recomputed":
        return None
    return compare(resumed.logits, engine.peek(resumed.state.cache, resumed.state.tokens[-1]))


def compare(expected: Logits, found: Logits) -> FirstStep:
    """Two rows of logits, float32 of shape (vocab_size,)."""
    if np.array_equal(expected.view(np.uint32), found.view(np.uint32)):
        return FirstStep("equal", 0.0)
    one, other = (distributions.log_probabilities(row[None]) for row in (expected, found))
    kl, top1 = distributions.compare(one, other)
    return FirstStep("close" if top1 else "other", kl)
