"""Hostile snapshots: what was flipped, cut, swapped or replayed a reader refuses, and allocates nothing for it."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, replace

import msgspec
import pytest

from protocol.errors import MindstreamError
from protocol.identity import Keyring
from protocol.manifest import SignedManifest, SnapshotManifest, verify_chunk
from protocol.sealing import DataKey
from protocol.sharing import open_snapshot, share
from tests.support.snapshots import SPROUT, TOMATO, Small, small_snapshot

KEYRING = Keyring({each.node: each.fingerprint for each in (TOMATO, SPROUT)})
KEYRING.add_sealing_key("sprout", SPROUT.sealing_key)
MOST_BYTES = 256 * 1024
"""Of memory while a mutation is refused: several times the message, and far below the 326 kB of its chunks."""


@dataclass
class Sent:
    """A snapshot as it comes to sprout."""

    identifier: str
    wire: bytes
    """msgpack of the signed manifest."""
    chunks: list[bytes]


def sent(small: Small) -> Sent:
    signed = share(small.signed, "sprout", TOMATO, KEYRING)
    return Sent(small.identifier, msgspec.msgpack.encode(signed), list(small.chunks))


def take(what: Sent) -> SnapshotManifest:
    """As the model runner takes it, up to where it would make room for the KV. Raises what refuses it."""
    signed = msgspec.msgpack.decode(what.wire, type=SignedManifest)
    manifest = open_snapshot(signed, what.identifier, SPROUT, KEYRING).manifest
    for index, ref in enumerate(manifest.chunks):
        verify_chunk(ref, what.chunks[index] if index < len(what.chunks) else b"", index=index)
    return manifest


GENUINE = sent(small_snapshot())
OTHER = sent(small_snapshot(tokens=520))
"""Another snapshot of the same conversation and key: what could be replayed."""
ANOTHER_KEY = sent(small_snapshot(key=DataKey(bytes(range(5, 37)))))


def _flip(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 9))):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def _splice(data: bytes, chance: random.Random) -> bytes:
    """Two stretches of equal length change places."""
    length = chance.randrange(1, 64)
    first = chance.randrange(len(data) - 2 * length)
    second = chance.randrange(first + length, len(data) - length)
    middle = data[first + length : second]
    return (
        data[:first] + data[second : second + length] + middle + data[first : first + length] + data[second + length :]
    )


def _longer(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data))
    return data[:at] + chance.randbytes(chance.randrange(1, 40)) + data[at:]


CHANGES: list[Callable[[bytes, random.Random], bytes]] = [_flip, _flip, _flip, _cut, _splice, _longer]


def _wire(chance: random.Random) -> Sent:
    return replace(GENUINE, wire=chance.choice(CHANGES)(GENUINE.wire, chance))


def _chunk(chance: random.Random) -> Sent:
    chunks = list(GENUINE.chunks)
    index = chance.randrange(len(chunks))
    chunks[index] = chance.choice(CHANGES)(chunks[index], chance)
    return replace(GENUINE, chunks=chunks)


def _order(chance: random.Random) -> Sent:
    chunks = list(GENUINE.chunks)
    first, second = chance.sample(range(len(chunks)), 2)
    chunks[first], chunks[second] = chunks[second], chunks[first]
    return replace(GENUINE, chunks=chunks)


def _missing(chance: random.Random) -> Sent:
    return replace(GENUINE, chunks=GENUINE.chunks[: chance.randrange(len(GENUINE.chunks))])


def _replayed(chance: random.Random) -> Sent:
    """Parts of other snapshots, each genuine where it comes from."""
    other = chance.choice((OTHER, ANOTHER_KEY))
    if chance.random() < 0.3:
        return replace(GENUINE, wire=other.wire)
    if chance.random() < 0.3:
        chunks = list(GENUINE.chunks)
        # The same place in a snapshot of another key, or the last block of another length.
        index = chance.randrange(len(chunks)) if other is ANOTHER_KEY else len(chunks) - 1
        chunks[index] = other.chunks[index]
        return replace(GENUINE, chunks=chunks)
    mine = msgspec.msgpack.decode(GENUINE.wire, type=SignedManifest)
    theirs = msgspec.msgpack.decode(other.wire, type=SignedManifest)
    fields = ["manifest", "signature", "provenance"] + ["wraps"] * (other is ANOTHER_KEY)
    field = chance.choice(fields)
    setattr(mine, field, getattr(theirs, field))
    return replace(GENUINE, wire=msgspec.msgpack.encode(mine))


KINDS = [_wire, _wire, _wire, _chunk, _order, _missing, _replayed]


def refused(seed: int) -> bool:
    """Whether mutation ``seed`` is refused with an error of the tree, and without room for what it claims."""
    chance = random.Random(seed)
    mutated = chance.choice(KINDS)(chance)
    if mutated == GENUINE:
        return True  # stretches that were alike changed places
    tracemalloc.clear_traces()
    before_bytes = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    try:
        take(mutated)
    except (MindstreamError, msgspec.MsgspecError, UnicodeDecodeError):
        return tracemalloc.get_traced_memory()[1] - before_bytes < MOST_BYTES
    return False


def mutations(count: int) -> list[int]:
    """The seeds of ``count`` mutations that were not refused, or for which too much was allocated."""
    tracemalloc.start()
    try:
        return [seed for seed in range(count) if not refused(seed)]
    finally:
        tracemalloc.stop()


def test_the_genuine_one_is_taken() -> None:
    assert take(GENUINE).cached_tokens == 600
    assert take(OTHER).cached_tokens == 520
    assert take(ANOTHER_KEY).cached_tokens == 600


def test_mutations_are_refused_and_nothing_is_allocated_for_them() -> None:
    assert mutations(500) == []


@pytest.mark.slow
def test_ten_thousand_mutations_are_refused_and_nothing_is_allocated_for_them() -> None:
    assert mutations(12_000) == []
