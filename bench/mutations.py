"""Snapshots changed by chance, as a reader gets them: whether each is refused, and how much memory that takes.

Bytes are flipped, cut, inserted and swapped in the signed manifest (with its wraps and provenance) and in the chunks;
chunks come in another order or not at all; and parts of other genuine snapshots are put in the place of its own. Then
what ill will can do beside chance: a trusted node signs claims that do not add up (sizes, layers, blocks, bitmaps of
what was pruned, a codec that the chunks were not made with, 10 TB), a stranger signs, or one in the name of another; a
snapshot comes that was wrapped for somebody else, or that is genuine and of another model, adapter or numerics.
"""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from protocol.errors import UNREADABLE, MindstreamError
from protocol.identity import DOMAIN_MANIFEST, Identity, Keyring, digest
from protocol.manifest import PrivatePart, SignedManifest, SnapshotManifest, snapshot_id, verify_chunk
from protocol.provenance import add_statement
from protocol.sealing import SignedWrap
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
    fits: Callable[[SnapshotManifest, PrivatePart], None] = lambda _manifest, _private: None
    """Whether the engine can take its KV in; raises where not, and then its tokens are read again."""

    def take(self, sent: Sent) -> SnapshotManifest:
        """As the model runner takes it, up to where it would make room for the KV. Raises what refuses it."""
        signed = msgspec.msgpack.decode(sent.wire, type=SignedManifest)
        opened = open_snapshot(signed, sent.identifier, self.identity, self.keyring)
        manifest = opened.manifest
        self.fits(manifest, opened.private)
        for index, ref in enumerate(manifest.chunks):
            verify_chunk(ref, sent.chunks[index] if index < len(sent.chunks) else b"", index=index)
        addresses = opened.private.address_list()
        number = 0
        for place, part in manifest.parts():
            for index, _ in enumerate(part.chunks()):
                opened.key.open(place.role(addresses, manifest.codec, index), sent.chunks[number])
                number += 1
        return manifest

    def tokens(self, sent: Sent) -> bytes:
        """Its token ids, which need no chunk. Raises what refuses them."""
        signed = msgspec.msgpack.decode(sent.wire, type=SignedManifest)
        return open_snapshot(signed, sent.identifier, self.identity, self.keyring).private.tokens


@dataclass(frozen=True)
class Outcome:
    """Of one mutation."""

    refused: bool
    peak_bytes: int
    """Allocated at one time while it was read."""
    tokens: bytes | None = None
    """The token ids that it can be read again from, where it was only its KV that was refused."""


class Mutator:
    """Makes mutations of one genuine snapshot.

    Args:
        others: genuine snapshots too, of which parts are put into it. They must differ from it in every chunk but those
            that they have at the same place.
        signer: its creator, whom the reader trusts: what it signs anew does not add up.
        for_others: wraps of its key that are not for the reader.
        foreign: whole snapshots that are genuine, and of which the reader's engine cannot use the KV.
    """

    def __init__(
        self,
        genuine: Sent,
        others: Sequence[Sent],
        reader: Reader,
        signer: Identity,
        for_others: Sequence[SignedWrap],
        foreign: Sequence[Sent] = (),
    ) -> None:
        self._genuine = genuine
        self._others = others
        self._reader = reader
        self._signer = signer
        self._for_others = list(for_others)
        self._foreign = foreign
        self._kinds = [kind for kind in _KINDS if foreign or kind is not Mutator.of_another]
        if len(genuine.chunks) < 2:
            # Of token ids alone there are no chunks.
            self._kinds = [each for each in self._kinds if each not in (Mutator.chunk, Mutator.order, Mutator.missing)]

    def outcome(self, seed: int) -> Outcome:
        """Of mutation ``seed``: the same always. ``tracemalloc`` must be running."""
        mutated = self.mutation(seed)
        found = measured(lambda: self._reader.take(mutated))
        try:
            return replace(found, tokens=self._reader.tokens(mutated))
        except _REFUSALS:
            return found

    def mutation(self, seed: int) -> Sent:
        """Another one than the genuine."""
        chance = random.Random(seed)
        while True:
            mutated = chance.choice(self._kinds)(self, chance)
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
        if whole < 0.5 and self._genuine.chunks and other.chunks:
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

    def claimed(self, chance: random.Random) -> Sent:
        """A claim that does not add up, signed by its creator."""
        body = msgspec.msgpack.decode(self._decoded().manifest)
        changed = chance.choice(_CLAIMS)
        if not changed(body, chance):
            body["total_bytes"] += 1 + chance.randrange(2**20)
        return self._signed(msgspec.msgpack.encode(body, order="sorted"), self._signer)

    def stranger(self, chance: random.Random) -> Sent:
        """Signed by a node that is not trusted, in its own name or in the creator's."""
        other = Identity(chance.choice(("stranger", self._signer.node)), chance.randbytes(32))
        body = msgspec.msgpack.decode(self._decoded().manifest)
        body["creator"] = other.node
        return self._signed(msgspec.msgpack.encode(body, order="sorted"), other)

    def asker(self, chance: random.Random) -> Sent:
        """Its key wrapped for others, or for nobody."""
        signed = self._decoded()
        signed.wraps = chance.choice(([], self._for_others))
        return replace(self._genuine, wire=msgspec.msgpack.encode(signed))

    def of_another(self, chance: random.Random) -> Sent:
        """Genuine, and asked for; of another model, adapter, numerics or codec."""
        return chance.choice(self._foreign)

    def _decoded(self) -> SignedManifest:
        return msgspec.msgpack.decode(self._genuine.wire, type=SignedManifest)

    def _signed(self, body: bytes, signer: Identity) -> Sent:
        """What ``signer`` says, asked for by its own id."""
        signed = self._decoded()
        signed.manifest, signed.signature = body, signer.sign(DOMAIN_MANIFEST, body)
        signed.provenance = add_statement(signer, [], digest(body), "created")
        return replace(self._genuine, identifier=snapshot_id(signed), wire=msgspec.msgpack.encode(signed))


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
    Mutator.claimed,
    Mutator.claimed,
    Mutator.stranger,
    Mutator.asker,
    Mutator.of_another,
]


class SignedBytes:
    """Other signed bytes than a snapshot's: of a pool's entry, of a basis, of a variant's certificate.

    Args:
        wire: msgpack of the struct with the bytes and their signature.
        read: raises what refuses them.
    """

    def __init__(self, wire: bytes, read: Callable[[bytes], object]) -> None:
        read(wire)  # it is for their changes that they are refused
        self._wire = wire
        self._read = read

    def outcome(self, seed: int) -> Outcome:
        """As ``Mutator.outcome``."""
        chance = random.Random(seed)
        mutated = self._wire
        while mutated == self._wire:
            mutated = chance.choice(_CHANGES)(self._wire, chance)
        return measured(lambda: self._read(mutated))


def measured(take: Callable[[], object]) -> Outcome:
    """Whether ``take`` refuses, and what it allocated. ``tracemalloc`` must be running."""
    tracemalloc.clear_traces()
    tracemalloc.reset_peak()
    try:
        take()
        refused = False
    except _REFUSALS:
        refused = True
    return Outcome(refused, tracemalloc.get_traced_memory()[1])


# --- claims that do not add up -----------------------------------------------------------------------------------

Claim = Callable[[dict[str, Any], random.Random], bool]
"""Changes a manifest's map; False where it has nothing of the kind."""


def _other(value: int, chance: random.Random) -> int:
    """A little more or less, or much more."""
    return chance.choice((value + 1, max(0, value - 1), value * 2 + 1, value + 2**20, 2**31, 2**40 + value))


def _a_count(body: dict[str, Any], chance: random.Random) -> bool:
    field = chance.choice(("version", "cached_tokens", "total_bytes"))
    before = body[field]
    while body[field] == before:
        body[field] = _other(before, chance)
    return True


def _a_layer(body: dict[str, Any], chance: random.Random) -> bool:
    layer = chance.choice(body["layers"])
    field = chance.choice(("kv_heads", "head_dim", "tokens", "seen_tokens", "kind"))
    if field == "kind":
        layer["kind"] = chance.choice([each for each in ("full", "sliding", "x") if each != layer["kind"]])
    else:
        before = layer[field]
        while layer[field] == before:
            layer[field] = _other(before, chance)
    # What a codec makes of a block may be smaller than it: a claim of another width is refused where the codec, or the
    # engine, looks. Here it must not add up by itself.
    if field in ("kv_heads", "head_dim"):
        layer[field] = 2**16 + 1 + chance.randrange(2**20)
    return True


def _layers_and_blocks(body: dict[str, Any], chance: random.Random) -> bool:
    which = chance.choice(("layers", "blocks"))
    if which == "layers":
        body["layers"] = []
        return bool(body["total_bytes"])
    if not body["blocks"]:
        return False
    blocks = body["blocks"]
    at = chance.randrange(len(blocks))
    chance.choice((lambda: blocks.pop(at), lambda: blocks.insert(at, blocks[at]), lambda: blocks.reverse()))()
    return len(blocks) != 1 and blocks != blocks[::-1]


def _a_block(body: dict[str, Any], chance: random.Random) -> bool:
    if not body["blocks"]:
        return False
    block = chance.choice(body["blocks"])
    block["tokens"] = _other(block["tokens"], chance) + 257 * chance.randrange(2)
    return block["tokens"] != 256 or len(body["blocks"]) == 1


def _kept(body: dict[str, Any], chance: random.Random) -> bool:
    if not body["blocks"]:
        return False
    block = chance.choice(body["blocks"])
    size = -(-block["tokens"] // 8)
    before = block.get("kept", b"")
    while block.get("kept", b"") == before:
        block["kept"] = chance.randbytes(chance.choice((size, size, 1, size + 1, 2 * size)))
    return True


def _a_part(body: dict[str, Any], chance: random.Random) -> bool:
    parts = [block[kind] for block in body["blocks"] for kind in ("full", "sliding") if kind in block]
    if not parts:
        return False
    part = chance.choice(parts)
    if chance.random() < 0.5:
        part["encoded_bytes"] = _other(part["encoded_bytes"], chance)
    else:
        part["digests"] = part["digests"] + chance.randbytes(32)
    return True


def _a_digest(body: dict[str, Any], chance: random.Random) -> bool:
    digests = body["digests"]
    field = chance.choice(("weights", "tokenizer", "config", "adapters", "key_id", "parent"))
    if field == "adapters":
        digests["adapters"] = [*digests.get("adapters", []), chance.randbytes(32)]
    elif field == "key_id":
        body["key_id"] = chance.randbytes(32)
    elif field == "parent":
        body["parent"] = chance.randbytes(31)
    else:
        digests[field] = chance.randbytes(32)
    return True


def _the_codec(body: dict[str, Any], chance: random.Random) -> bool:
    """Chunks say which codec they were made with: they open in no other's place."""
    codec = body["codec"]
    if chance.random() < 0.5:
        codec["version"] += 1 + chance.randrange(1000)
    else:
        codec["name"] = chance.choice([each for each in ("raw", "int8", "rotated4", "zip") if each != codec["name"]])
    return bool(body["total_bytes"])


def _sealed(body: dict[str, Any], chance: random.Random) -> bool:
    body["sealed"] = _flip(body["sealed"], chance)
    return True


def _dtype(body: dict[str, Any], chance: random.Random) -> bool:
    body["kv_dtype"] = chance.choice(("float8", "", "x" * 10_000))
    return True


def _ten_terabytes(body: dict[str, Any], chance: random.Random) -> bool:
    """In as many ways as there are sizes."""
    huge = 10 * 2**40
    for layer in body["layers"]:
        layer["kv_heads"], layer["head_dim"] = 2**16, 2**16
    for block in body["blocks"]:
        for kind in ("full", "sliding"):
            if kind in block and chance.random() < 0.5:
                block[kind]["encoded_bytes"] = huge
    body["total_bytes"] = huge
    return True


_CLAIMS: list[Claim] = [
    _a_count,
    _a_layer,
    _layers_and_blocks,
    _a_block,
    _kept,
    _a_part,
    _a_digest,
    _the_codec,
    _sealed,
    _dtype,
    _ten_terabytes,
]

# --- changes of bytes --------------------------------------------------------------------------------------------


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
