"""Hostile snapshots: what was flipped, cut, swapped or replayed a reader refuses, and allocates nothing for it."""

from __future__ import annotations

import tracemalloc

import msgspec
import pytest

from bench.mutations import Mutator, Reader, Sent
from protocol.identity import Identity, Keyring
from protocol.sealing import DataKey, wrap_key
from protocol.sharing import share
from tests.support.snapshots import KEY, SPROUT, TOMATO, Small, small_snapshot

KEYRING = Keyring({each.node: each.fingerprint for each in (TOMATO, SPROUT)})
KEYRING.add_sealing_key("sprout", SPROUT.sealing_key)
READER = Reader(SPROUT, KEYRING)
MOST_BYTES = 256 * 1024
"""Of memory while a mutation is refused: several times the message, and below the 326 kB of its chunks."""


def sent(small: Small) -> Sent:
    """As it comes to sprout."""
    signed = share(small.signed, "sprout", TOMATO, KEYRING).sent
    return Sent(small.identifier, msgspec.msgpack.encode(signed), list(small.chunks))


MARS = Identity("mars", bytes(range(9, 41)))
FOR_MARS = [wrap_key(TOMATO, KEY, "mars", MARS.sealing.public_key)]
GENUINE = sent(small_snapshot())
OTHERS = [sent(small_snapshot(tokens=590)), sent(small_snapshot(key=DataKey(bytes(range(5, 37)))))]
"""One of the same conversation and key, one of another key."""
PRUNED = sent(small_snapshot(pruned=True))


def accepted(count: int, genuine: Sent = GENUINE, others: list[Sent] = OTHERS) -> list[int]:
    """The seeds of ``count`` mutations that were not refused, or for which too much was allocated."""
    mutator = Mutator(genuine, others, READER, TOMATO, FOR_MARS)
    found = []
    tracemalloc.start()
    try:
        for seed in range(count):
            outcome = mutator.outcome(seed)
            if not outcome.refused or outcome.peak_bytes > MOST_BYTES:
                found.append(seed)
    finally:
        tracemalloc.stop()
    return found


def test_the_genuine_ones_are_taken() -> None:
    assert [READER.take(each).cached_tokens for each in (GENUINE, *OTHERS, PRUNED)] == [600, 590, 600, 600]
    assert READER.take(PRUNED).kept_tokens == 472


def test_mutations_are_refused_and_nothing_is_allocated_for_them() -> None:
    assert accepted(500) == []
    assert accepted(300, PRUNED, [GENUINE]) == []


@pytest.mark.slow
def test_twelve_thousand_mutations_are_refused_and_nothing_is_allocated_for_them() -> None:
    assert accepted(12_000) == []
