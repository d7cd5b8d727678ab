"""Snapshots changed by chance, as a reader gets them: whether each is refused, and how much memory that takes.

Bytes are flipped, cut, inserted and swapped in the signed manifest (with its wraps and provenance) and in the chunks;
chunks come in another order or not at all; and parts of other genuine snapshots are put in the place of its own.
"""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import msgspec

from protocol.errors import UNREADABLE, MindstreamError
from protocol.identity import Identity, Keyring
from protocol.manifest import SignedManifest, SnapshotManifest, verify_chunk
from protocol.sharing import open_snapshot

_REFUSALS: tuple[type[Exception], ...] = (MindstreamError, *UNREADABLE)


@dataclass(frozen=True)
class Sent:
    """A snapshot as it comes to a reader."""

    identifier: str
    """That was asked for."""
    wire: bytes
    """msgpack of the signed manifest."""
    chunks: list[bytes]


@dataclass(frozen=True)
class Reader:
    """Who takes a snapshot."""

    identity: Identity
    keyring: Keyring

    def take(self, sent: Sent) -> SnapshotManifest:
        """As the model runner takes it, up to where it would make room for the KV. Raises what refuses it."""
        signed = msgspec.msgpack.decode(sent.wire, type=SignedManifest)
        manifest = open_snapshot(signed, sent.identifier, self.identity, self.keyring).manifest
        for index, ref in enumerate(manifest.chunks):
            verify_chunk(ref, sent.chunks[index] if index < len(sent.chunks) else b"", index=index)
        return manifest


@dataclass(frozen=True)
class Outcome:
    """Of one mutation."""

    refused: bool
    peak_bytes: int
    """Allocated at one time while it was read."""


class Mutator:
    """Makes mutations of one genuine snapshot.

    Args:
        others: genuine snapshots too, of which parts are put into it. They must differ from it in every chunk but those
            that they have at the same place.
    """

    def __init__(self, genuine: Sent, others: Sequence[Sent], reader: Reader) -> None:
        self._genuine = genuine
        self._others = others
        self._reader = reader

    def outcome(self, seed: int) -> Outcome:
        """Of mutation ``seed``: the same always. ``tracemalloc`` must be running."""
        mutated = self.mutation(seed)
        tracemalloc.clear_traces()
        tracemalloc.reset_peak()
        try:
            self._reader.take(mutated)
            refused = False
        except _REFUSALS:
            refused = True
        return Outcome(refused, tracemalloc.get_traced_memory()[1])

    def mutation(self, seed: int) -> Sent:
        """Another one than the genuine."""
        chance = random.Random(seed)
        while True:
            mutated = chance.choice(_KINDS)(self, chance)
            if mutated != self._genuine:  # stretches that are alike may have changed places
                return mutated

    def wire(self, chance: random.Random) -> Sent:
        """In the signed manifest, or beside it."""
        return replace(self._genuine, wire=chance.choice(_CHANGES)(self._genuine.wire, chance))

    def chunk(self, chance: random.Random) -> Sent:
        """In one chunk."""
        chunks = list(self._genuine.chunks)
        index = chance.randrange(len(chunks))
        chunks[index] = chance.choice(_CHANGES)(chunks[index], chance)
        return replace(self._genuine, chunks=chunks)

    def order(self, chance: random.Random) -> Sent:
        """Two chunks change places."""
        chunks = list(self._genuine.chunks)
        first, second = chance.sample(range(len(chunks)), 2)
        chunks[first], chunks[second] = chunks[second], chunks[first]
        return replace(self._genuine, chunks=chunks)

    def missing(self, chance: random.Random) -> Sent:
        """Chunks at the end."""
        return replace(self._genuine, chunks=self._genuine.chunks[: chance.randrange(len(self._genuine.chunks))])

    def replayed(self, chance: random.Random) -> Sent:
        """Parts of another, each genuine where it comes from."""
        other = chance.choice(self._others)
        whole = chance.random()
        if whole < 0.2:
            return replace(self._genuine, wire=other.wire)
        if whole < 0.5:
            chunks = list(self._genuine.chunks)
            index = chance.randrange(min(len(chunks), len(other.chunks)))
            chunks[index] = other.chunks[index]
            return replace(self._genuine, chunks=chunks)
        mine, theirs = (msgspec.msgpack.decode(each.wire, type=SignedManifest) for each in (self._genuine, other))
        # Wraps of one key are as good as each other's: that is no mutation.
        fields = ["manifest", "signature", "provenance"]
        if _key_id(mine) != _key_id(theirs):
            fields.append("wraps")
        field = chance.choice(fields)
        setattr(mine, field, getattr(theirs, field))
        return replace(self._genuine, wire=msgspec.msgpack.encode(mine))


def _key_id(signed: SignedManifest) -> bytes:
    return msgspec.msgpack.decode(signed.manifest, type=SnapshotManifest).key_id


_KINDS: list[Callable[[Mutator, random.Random], Sent]] = [
    Mutator.wire,
    Mutator.wire,
    Mutator.wire,
    Mutator.chunk,
    Mutator.order,
    Mutator.missing,
    Mutator.replayed,
]


def _flip(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 9))):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def _swap(data: bytes, chance: random.Random) -> bytes:
    """Two stretches of equal length change places."""
    length = chance.randrange(1, 64)
    first = chance.randrange(len(data) - 2 * length)
    second = chance.randrange(first + length, len(data) - length)
    changed = bytearray(data)
    changed[first : first + length] = data[second : second + length]
    changed[second : second + length] = data[first : first + length]
    return bytes(changed)


def _insert(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data))
    return data[:at] + chance.randbytes(chance.randrange(1, 40)) + data[at:]


_CHANGES: list[Callable[[bytes, random.Random], bytes]] = [_flip, _flip, _flip, _cut, _swap, _insert]
