"""Entries of the replicated memory log: what an origin signs, and how anyone checks it.

An origin is (node, scope, log_id). Its entries are numbered without gaps from 1 and chained by hash. The
signature covers the header's **bytes**, which are stored and forwarded as they came, with kinds and fields
that this node does not know. The content is covered by a salted digest in the header: text and salt can be
erased and the chain still verifies.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from protocol.errors import UNREADABLE, BadSignature, MalformedMessage
from protocol.identity import DIGEST_BYTES, DOMAIN_ENTRY, Identity, Keyring, digest
from protocol.ids import NAME_PATTERN, UUID7_PATTERN

KIND_PUT = "memory.put"
SCOPE_EVERYONE = "everyone"
SCOPE_PRIVATE = "private"
GENESIS = bytes(DIGEST_BYTES)
"""The ``prev`` of an origin's first entry."""
SALT_BYTES = 16
MAX_HEADER_BYTES = 16 * 1024
MAX_CONTENT_BYTES = 256 * 1024
MAX_SEQ = 2**40 - 1
MAX_HLC = 2**63 - 1
"""What a signed 64-bit integer holds; the year 6429."""


class Origin(NamedTuple):
    """Who numbers a sequence of entries. A restored backup or a cloned card gets a new ``log_id``."""

    node: str
    scope: str
    log_id: str


class EntryHeader(msgspec.Struct, omit_defaults=True):
    """The signed part of an entry."""

    kind: str
    """What the entry does; ``memory.put`` adds a memory. Unknown kinds are stored and forwarded."""
    id: str
    """UUIDv7 of the memory: the same put sent twice has the same id and is stored once."""
    node: str
    """Node whose key signs this entry."""
    scope: str
    """``everyone``, ``private`` (never leaves the node), or a group's name."""
    log_id: str
    """UUIDv7 of the origin's log; with node and scope it names the origin."""
    seq: int
    """Number of the entry in its origin, from 1, without gaps."""
    prev: bytes
    """BLAKE3 of the header bytes of entry ``seq - 1``; 32 zero bytes for the first."""
    hlc: int
    """Hybrid logical clock stamp: 48 bits of Unix milliseconds, 16 bits of counter."""
    clock_synced: bool
    """Whether the operating system said that the origin's clock was synchronised."""
    content_digest: bytes
    """BLAKE3 of salt and content."""


class MemoryContent(msgspec.Struct, omit_defaults=True):
    """The content of a ``memory.put`` entry."""

    text: str
    """What is remembered, verbatim."""
    time_us: int
    """When it was said or seen, Unix microseconds, by the origin's clock."""
    role: str = "note"
    """Who said it: ``user``, ``model``, ``sensor`` or ``note``."""
    conversation: str = ""
    """The conversation that it belongs to."""
    source: str = ""
    """The program that put it: ``node/service`` or ``node/client``."""


class SignedEntry(msgspec.Struct, omit_defaults=True):
    """An entry as it is stored and as it crosses the bus."""

    header: bytes
    """msgpack of EntryHeader: the signed bytes."""
    signature: bytes
    """Ed25519 over the domain ``mindstream/v1/entry\\0`` and ``header``."""
    salt: bytes | None = None
    """16 random bytes, gone once the content is erased."""
    content: bytes | None = None
    """msgpack of the content, gone once it is erased."""


_encoder = msgspec.msgpack.Encoder()
_header_decoder = msgspec.msgpack.Decoder(EntryHeader)
_content_decoder = msgspec.msgpack.Decoder(MemoryContent)


def entry_hash(header: bytes) -> bytes:
    """The hash that the next entry's ``prev`` carries: BLAKE3 of the header bytes."""
    return digest(header)


def seal(
    identity: Identity,
    content: MemoryContent,
    *,
    origin: Origin,
    seq: int,
    prev: bytes,
    hlc: int,
    id: str,
    clock_synced: bool,
    kind: str = KIND_PUT,
) -> SignedEntry:
    """A new signed entry of ``origin``. Raises MalformedMessage when the content is above its limit."""
    body = _encoder.encode(content)
    if len(body) > MAX_CONTENT_BYTES:
        raise MalformedMessage(
            f"sealing a memory of {len(body):,} bytes: above the limit of {MAX_CONTENT_BYTES:,}",
            hint="split the text",
            field="text",
            reason="too large",
        )
    salt = os.urandom(SALT_BYTES)
    header = _encoder.encode(
        EntryHeader(
            kind=kind,
            id=id,
            node=origin.node,
            scope=origin.scope,
            log_id=origin.log_id,
            seq=seq,
            prev=prev,
            hlc=hlc,
            clock_synced=clock_synced,
            content_digest=digest(salt, body),
        )
    )
    return SignedEntry(header=header, signature=identity.sign(DOMAIN_ENTRY, header), salt=salt, content=body)


def read_header(entry: SignedEntry) -> EntryHeader:
    """The header, decoded but not trusted. Raises MalformedMessage."""
    if len(entry.header) > MAX_HEADER_BYTES or len(entry.content or b"") > MAX_CONTENT_BYTES:
        raise MalformedMessage(
            "reading a log entry: header or content above its limit", field="header", reason="too large"
        )
    try:
        header = _header_decoder.decode(entry.header)
    except UNREADABLE as error:
        raise MalformedMessage(f"reading a log entry's header: {error}", field="header", reason=str(error)) from None
    for field, what in _out_of_range(header):
        raise MalformedMessage(
            f"reading a log entry of {header.node[:63]!r}: {field} {what}", field=field, reason="out of range"
        )
    return header


def _out_of_range(header: EntryHeader) -> Iterator[tuple[str, str]]:
    """Fields that no honest node writes, and that databases, vectors and topics could not carry on."""
    for field in ("node", "scope"):
        if not NAME_PATTERN.fullmatch(getattr(header, field)):
            yield field, "is not a name"
    if not UUID7_PATTERN.fullmatch(header.log_id):
        yield "log_id", "is not a UUIDv7"
    if not UUID7_PATTERN.fullmatch(header.id):
        yield "id", "is not a UUIDv7"
    if not 1 <= header.seq <= MAX_SEQ:
        yield "seq", f"{header.seq} is not 1 to {MAX_SEQ}"
    if not 0 <= header.hlc <= MAX_HLC:
        yield "hlc", f"{header.hlc} is not 0 to {MAX_HLC}"
    for field in ("prev", "content_digest"):
        if len(getattr(header, field)) != DIGEST_BYTES:
            yield field, f"is not of {DIGEST_BYTES} bytes"


def verify(entry: SignedEntry, keyring: Keyring) -> EntryHeader:
    """The header, once its signature and its content's digest hold.

    Raises MalformedMessage, UnknownPeer or BadSignature. Chain and sequence are the log's to check.
    """
    header = read_header(entry)
    keyring.verify(header.node, DOMAIN_ENTRY, entry.header, entry.signature)
    # A salt of another length would move the border between salt and content under the same digest.
    if entry.salt is not None and len(entry.salt) != SALT_BYTES:
        raise BadSignature(
            f"checking entry {header.seq} of {header.node!r}: its salt has {len(entry.salt):,} bytes, not {SALT_BYTES}",
            hint="the entry was changed on the way",
            field="salt",
            reason="digest mismatch",
        )
    if entry.content is not None and (entry.salt is None or digest(entry.salt, entry.content) != header.content_digest):
        raise BadSignature(
            f"checking entry {header.seq} of {header.node!r}: the content does not match its signed digest",
            hint="the content was changed on the way",
            field="content",
            reason="digest mismatch",
        )
    return header


def read_content(entry: SignedEntry) -> MemoryContent | None:
    """The memory in a ``memory.put`` entry; None once erased. Raises MalformedMessage."""
    if entry.content is None:
        return None
    try:
        return _content_decoder.decode(entry.content)
    except UNREADABLE as error:
        raise MalformedMessage(f"reading a log entry's content: {error}", field="content", reason=str(error)) from None
