"""The pool's entries: the KV of one block of a prompt, sealed with the site's group key, for any node that reads the
same prefix.

An entry holds each layer's own rows of 256 positions as they were when the block's last position had just been read,
and of recurrent layers the state at that point. So a prompt of n blocks is put together from the full parts of n
entries, the sliding parts of as many of the last ones as the window reaches over, and the last one's states.

An entry is called by its block's prefix address, keyed with the group key; its chunks open in that place only. It is
signed by its creator. A node that has read the same prefix itself says in a signed statement of the kind ``witnessed``
whether it agrees: ``details`` has ``agrees``, ``how`` (``exact``: the raw content is equal; ``close``: within
``tolerance``) and the ``error`` that was found.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from protocol.errors import UNREADABLE, MalformedMessage, SnapshotRefused, TrustError
from protocol.group_key import NAME_BYTES
from protocol.identity import DIGEST_BYTES, DOMAIN_POOL_ENTRY, DOMAIN_STATEMENT, Identity, Keyring, digest
from protocol.layout import DTYPE_BYTES, MAX_SNAPSHOT_BYTES, ChunkRef, CodecRef, Part, StateLayout, malformed
from protocol.manifest import ModelDigests, NumericsFingerprint, is_canonical, read_signed
from protocol.provenance import GENESIS, MAX_STATEMENT_BYTES, SignedStatement, Statement
from protocol.sealing import MAX_PLAIN_BYTES

ENTRY_VERSION = 1
MAX_ENTRY_BYTES = 64 * 1024
MAX_WITNESSES = 32
"""Statements that go with an entry."""
NO_PARENT = bytes(NAME_BYTES)
"""What the entry of a prompt's first block names as the one before it."""
PART_KINDS = ("full", "sliding", "recurrent")

PartKind = Literal["full", "sliding", "recurrent"]


class PoolPart(msgspec.Struct):
    """A part of an entry, in sealed chunks."""

    encoded_bytes: int
    """Before sealing, cut as a snapshot's."""
    digests: bytes
    """BLAKE3 of every chunk's sealed bytes, 32 bytes each, one after another."""
    content: bytes
    """Keyed digest of the raw bytes before they were encoded, 32 bytes: equal where two nodes computed the same."""

    def chunks(self) -> Iterator[ChunkRef]:
        """Every chunk, in order."""
        return Part(self.encoded_bytes, self.digests).chunks()


class PoolEntry(msgspec.Struct, omit_defaults=True):
    """One block of 256 positions. Its encoded bytes are what is signed, stored and forwarded."""

    version: int
    """1. Others are refused."""
    model: str
    """The model's name, for people; ``digests`` decide."""
    digests: ModelDigests
    creator: str
    """Node that read the block, whose key signs this."""
    created_us: int
    """Unix microseconds by the creator's clock."""
    fingerprint: NumericsFingerprint
    kv_dtype: str
    """Of the cached keys and values, such as ``bfloat16``."""
    codec: CodecRef
    """``raw`` or ``lossless``: what the pool has is bit for bit what its creator computed."""
    key_id: bytes
    """Of the group key that it is sealed with, 32 bytes."""
    name: bytes
    """Of the block, 16 bytes: its prefix address, keyed with the group key."""
    parent: bytes
    """Name of the block before; 16 zero bytes in the first."""
    block: int
    """Its number in the prompt, from 0."""
    cost_ms: int
    """What reading it took its creator."""
    full: PoolPart | None = None
    """The layers of full attention."""
    sliding: PoolPart | None = None
    """The sliding layers: the block's last rows, as many as their window holds."""
    recurrent: PoolPart | None = None
    """The states after the block's last position; raw always."""
    states: list[list[StateLayout]] = []
    """The arrays of each layer's recurrent part, as in a snapshot's manifest."""

    def parts(self) -> Iterator[tuple[PartKind, PoolPart]]:
        """Those that it has, in the order of their chunks."""
        for kind, part in (("full", self.full), ("sliding", self.sliding), ("recurrent", self.recurrent)):
            if part is not None:
                yield kind, part  # type: ignore[misc]

    @property
    def chunks(self) -> list[ChunkRef]:
        """Every chunk, in order."""
        return [ref for _, part in self.parts() for ref in part.chunks()]

    @property
    def size_bytes(self) -> int:
        """Of all chunks."""
        return sum(ref.size_bytes for ref in self.chunks)

    @property
    def contents(self) -> tuple[tuple[str, bytes], ...]:
        """What two nodes that have computed the same have in common."""
        return tuple((kind, part.content) for kind, part in self.parts())


class SignedPoolEntry(msgspec.Struct, omit_defaults=True):
    """An entry as it is stored and as it crosses the bus."""

    entry: bytes
    """msgpack of PoolEntry: the signed bytes."""
    signature: bytes
    """Ed25519 over the domain ``mindstream/v1/pool-entry\\0`` and ``entry``."""
    witnesses: list[SignedStatement] = []
    """What other nodes say of it, at most 32."""


class Witness(NamedTuple):
    """What a node says of an entry that it has compared with what it read itself."""

    node: str
    entry: str
    """The entry's id."""
    agrees: bool
    how: str
    """``exact`` or ``close``."""
    error: float
    """Relative error, of the worst part; 0 when exact."""


_canonical = msgspec.msgpack.Encoder(order="sorted")
_entry_decoder = msgspec.msgpack.Decoder(PoolEntry)
_statement_decoder = msgspec.msgpack.Decoder(Statement)


def entry_id(signed: SignedPoolEntry) -> str:
    """The entry's id: BLAKE3 of its bytes, 64 hex digits."""
    return digest(signed.entry).hex()


def sign_entry(identity: Identity, entry: PoolEntry) -> SignedPoolEntry:
    """Sign ``entry``. Raises MalformedMessage when it is above its limit."""
    body = _canonical.encode(entry)
    if len(body) > MAX_ENTRY_BYTES:
        raise MalformedMessage(
            f"signing a pool entry of {len(body):,} bytes: above the limit of {MAX_ENTRY_BYTES:,}",
            hint="a block of this model is too large for the pool",
            field="entry",
            reason="too large",
        )
    return SignedPoolEntry(body, identity.sign(DOMAIN_POOL_ENTRY, body))


def open_entry(signed: SignedPoolEntry, keyring: Keyring) -> PoolEntry:
    """The entry, once signature, version and arithmetic hold; nothing is allocated from it before.

    Raises MalformedMessage, UnknownPeer or BadSignature.
    """
    what = "a pool entry"
    if len(signed.entry) > MAX_ENTRY_BYTES:
        raise malformed("entry", f"{len(signed.entry):,} bytes, limit {MAX_ENTRY_BYTES:,}", what)
    entry = read_signed(what, DOMAIN_POOL_ENTRY, signed.entry, signed.signature, _entry_decoder, keyring)
    if entry.version != ENTRY_VERSION:
        raise malformed("version", f"{entry.version}, this node reads {ENTRY_VERSION}", what)
    if not is_canonical(signed.entry):
        raise malformed("entry", "it is not canonical msgpack", what)
    if len(entry.key_id) != DIGEST_BYTES:
        raise malformed("key_id", f"{len(entry.key_id)} bytes, a digest has {DIGEST_BYTES}", what)
    for field, value in (("name", entry.name), ("parent", entry.parent)):
        if len(value) != NAME_BYTES:
            raise malformed(field, f"{len(value)} bytes, a name has {NAME_BYTES}", what)
    if (entry.parent == NO_PARENT) != (entry.block == 0) or not 0 <= entry.block < 2**23:
        raise malformed("block", f"{entry.block}, and the parent is not of that", what)
    if entry.kv_dtype not in DTYPE_BYTES:
        raise malformed("kv_dtype", f"{entry.kv_dtype[:80]!r} is none of {', '.join(DTYPE_BYTES)}", what)
    if not 0 <= entry.cost_ms < 2**31:
        raise malformed("cost_ms", f"{entry.cost_ms}", what)
    total_bytes = 0
    for kind, part in entry.parts():
        total_bytes += part.encoded_bytes
        count = -(-part.encoded_bytes // MAX_PLAIN_BYTES)
        if part.encoded_bytes <= 0 or len(part.digests) != count * DIGEST_BYTES or len(part.content) != DIGEST_BYTES:
            raise malformed(kind, f"{part.encoded_bytes:,} bytes in {len(part.digests)} bytes of digests", what)
    if not 0 < total_bytes <= MAX_SNAPSHOT_BYTES:
        raise malformed("parts", f"{total_bytes:,} bytes", what)
    return entry


def witness(
    identity: Identity,
    entry: str,
    agrees: bool,
    how: str,
    error: float = 0.0,
    tolerance: float = 0.0,
    *,
    time_us: int | None = None,
) -> SignedStatement:
    """The statement of ``identity``, which has read the prefix of the entry with that id itself."""
    details: dict[str, Any] = {"agrees": agrees, "error": error, "how": how, "tolerance": tolerance}
    now_us = time.time_ns() // 1000 if time_us is None else time_us
    body = _canonical.encode(Statement(details, "witnessed", identity.node, GENESIS, bytes.fromhex(entry), now_us))
    return SignedStatement(body, identity.sign(DOMAIN_STATEMENT, body))


def read_witness(signed: SignedStatement, keyring: Keyring) -> Witness:
    """What a statement says, once its signature holds. Raises SnapshotRefused, UnknownPeer or BadSignature."""
    if len(signed.statement) > MAX_STATEMENT_BYTES:
        raise _refused(f"{len(signed.statement):,} bytes, limit {MAX_STATEMENT_BYTES:,}")
    try:
        said = _statement_decoder.decode(signed.statement)
    except UNREADABLE as error:
        raise _refused(str(error)) from None
    keyring.verify(said.node, DOMAIN_STATEMENT, signed.statement, signed.signature)
    agrees, how, error_ = said.details.get("agrees"), said.details.get("how"), said.details.get("error")
    if said.kind != "witnessed" or len(said.snapshot) != DIGEST_BYTES or not isinstance(agrees, bool):
        raise _refused("it is no witness's statement of a pool entry")
    if how not in ("exact", "close") or not isinstance(error_, float | int):
        raise _refused("it does not say how it was compared")
    return Witness(said.node, said.snapshot.hex(), agrees, how, float(error_))


def read_witnesses(statements: Iterable[SignedStatement], keyring: Keyring) -> list[Witness]:
    """Those of nodes that are trusted, one a node: who disagreed once does not agree later."""
    found: dict[tuple[str, str], Witness] = {}
    for signed in statements:
        try:
            said = read_witness(signed, keyring)
        except (SnapshotRefused, TrustError):
            continue
        before = found.get((said.entry, said.node))
        if before is None or before.agrees:
            found[said.entry, said.node] = said
    return list(found.values())


def set_aside(creator: str, witnesses: Sequence[Witness]) -> bool:
    """Whether an entry is not to be used: some who have read its prefix themselves disagree, and no fewer than stand
    by it, its creator counted once. So one word against one is enough, and one against many is not."""
    against = {each.node for each in witnesses if not each.agrees and each.node != creator}
    stand_by = {each.node for each in witnesses if each.agrees} | {creator}
    return 0 < len(against) >= len(stand_by)


def judge(creator: str, own: str, witnesses: Sequence[Witness], trust: str, quorum: int) -> tuple[bool, str]:
    """Whether an entry of ``creator`` may be used by node ``own``, and why not.

    Args:
        witnesses: of trusted nodes, all of this entry.
        trust: ``creator``: the creator's key is enough; ``quorum``: so many witnesses must agree, its creator not
            counted.
    """
    if set_aside(creator, witnesses):
        against = sorted(each.node for each in witnesses if not each.agrees)
        return False, f"set aside: {', '.join(against[:4])} read otherwise"
    if trust == "creator" or creator == own:
        return True, ""
    agreeing = {each.node for each in witnesses if each.agrees and each.node != creator}
    if own in agreeing or len(agreeing) >= quorum:
        return True, ""
    return False, f"{len(agreeing)} of {quorum} witnesses agree"


def _refused(reason: str) -> SnapshotRefused:
    return SnapshotRefused(
        f"reading what a witness says of a pool entry: {reason}",
        hint="the peer runs another version, or it was changed on the way",
        field="statement",
        reason=reason,
    )
