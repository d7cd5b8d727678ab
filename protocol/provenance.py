"""Provenance: what happened to a snapshot, as a chain of signed statements that travels beside its manifest.

Each statement names the snapshot that it is of, the digest of the statement before it, and who says it; so none can be
left out of the middle, moved, or put into another snapshot's chain. The last ones can be left out unseen: a chain says
what did happen, not that nothing else did.

A chain begins with ``created``. A snapshot that was made of another (pruned, transcoded) takes the other's chain on:
the statement that makes it names the other in ``from``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from protocol.errors import UNREADABLE, BadSignature, MalformedMessage, SnapshotRefused
from protocol.identity import DIGEST_BYTES, DOMAIN_STATEMENT, Identity, Keyring, digest

MAX_STATEMENTS = 128
MAX_STATEMENT_BYTES = 1024
GENESIS = bytes(DIGEST_BYTES)
"""What the first statement names as the one before it."""

Kind = Literal["created", "pruned", "transcoded", "moved", "witnessed"]
_MAKES: frozenset[str] = frozenset({"created", "pruned", "transcoded"})


class Statement(msgspec.Struct):
    """One step of a snapshot's way."""

    details: dict[str, Any]
    """By kind. ``pruned`` and ``transcoded``: ``from``, the digest of the snapshot that this one was made of, binary;
    ``pruned``, and ``created`` of what was pruned while it was saved: ``kept`` positions of ``of``,
    and ``by`` which pruner; ``moved``: ``from``, the node that held it."""
    kind: Kind
    """``created``, ``pruned``, ``transcoded``, ``moved`` or ``witnessed``."""
    node: str
    """Who says so, and signs it."""
    previous: bytes
    """BLAKE3 of the bytes of the statement before; 32 zero bytes in the first."""
    snapshot: bytes
    """BLAKE3 of the manifest's bytes, 32 bytes."""
    time_us: int
    """Unix microseconds by the node's clock."""


class SignedStatement(msgspec.Struct):
    """A statement as it is stored and as it crosses the bus."""

    statement: bytes
    """msgpack of Statement: the signed bytes."""
    signature: bytes
    """Ed25519 over the domain ``mindstream/v1/statement\\0`` and ``statement``."""


class Proven(NamedTuple):
    """A statement of a chain that holds together."""

    statement: Statement
    trusted: bool
    """Whether its signature was checked: this node trusts who says it. Else whoever it trusts and who comes later in
    the chain has vouched for it: the last one is of a node that is trusted."""


_canonical = msgspec.msgpack.Encoder(order="sorted")
_decoder = msgspec.msgpack.Decoder(Statement)


def add_statement(
    identity: Identity,
    chain: Sequence[SignedStatement],
    snapshot: bytes,
    kind: Kind,
    details: dict[str, Any] | None = None,
    *,
    time_us: int | None = None,
) -> list[SignedStatement]:
    """``chain`` and one statement more. Raises MalformedMessage when it, or the chain, would be too long."""
    previous = digest(chain[-1].statement) if chain else GENESIS
    now_us = time.time_ns() // 1000 if time_us is None else time_us
    body = _canonical.encode(Statement(details or {}, kind, identity.node, previous, snapshot, now_us))
    if len(chain) >= MAX_STATEMENTS or len(body) > MAX_STATEMENT_BYTES:
        raise MalformedMessage(
            f"adding {kind} to a snapshot's provenance: it has {len(chain)} statements, this one {len(body):,} bytes; "
            f"the limits are {MAX_STATEMENTS} and {MAX_STATEMENT_BYTES:,}",
            hint="save the conversation again: that begins a new chain",
            field="provenance",
            reason="too long",
        )
    return [*chain, SignedStatement(body, identity.sign(DOMAIN_STATEMENT, body))]


def read_chain(chain: Sequence[SignedStatement], snapshot: bytes, creator: str, keyring: Keyring) -> list[Proven]:
    """The statements of ``snapshot``'s chain, oldest first, once they hold together.

    Args:
        snapshot: BLAKE3 of the manifest's bytes.
        creator: the node that signed the manifest: the statement that made this snapshot must be its own.

    Raises SnapshotRefused naming the statement, ``provenance[N]``.
    """
    if not 0 < len(chain) <= MAX_STATEMENTS:
        raise _refused("provenance", f"{len(chain)} statements, not 1 to {MAX_STATEMENTS}")
    proven: list[Proven] = []
    previous, held = GENESIS, b""
    maker = ""
    for index, signed in enumerate(chain):
        field = f"provenance[{index}]"
        statement = _read(signed, field)
        makes = statement.kind in _MAKES
        if statement.previous != previous:
            raise _refused(field, "it does not follow the statement before it")
        if (statement.kind == "created") != (index == 0):
            raise _refused(field, "a chain begins with `created`, and has no other")
        if index and statement.details.get("from") != held and makes:
            raise _refused(field, f"{statement.kind} from another snapshot than the one before")
        if index and not makes and statement.snapshot != held:
            raise _refused(field, "it is of another snapshot")
        trusted = statement.node in keyring
        if trusted:
            try:
                keyring.verify(statement.node, DOMAIN_STATEMENT, signed.statement, signed.signature)
            except BadSignature:
                raise _refused(field, f"the signature of {statement.node[:80]} does not match") from None
        proven.append(Proven(statement, trusted))
        if makes:
            held, maker = statement.snapshot, statement.node
        previous = digest(signed.statement)
    if not proven[-1].trusted:
        node = proven[-1].statement.node[:80]
        raise _refused(f"provenance[{len(chain) - 1}]", f"this node does not trust {node}, and nobody vouches for it")
    if held != snapshot:
        raise _refused("provenance", "it is another snapshot's")
    if maker != creator:
        raise _refused("provenance", f"made by {maker[:80]}, and the manifest by {creator[:80]}")
    return proven


def _read(signed: SignedStatement, field: str) -> Statement:
    if len(signed.statement) > MAX_STATEMENT_BYTES:
        raise _refused(field, f"{len(signed.statement):,} bytes, limit {MAX_STATEMENT_BYTES:,}")
    try:
        return _decoder.decode(signed.statement)
    except UNREADABLE as error:
        raise _refused(field, str(error)) from None


def _refused(field: str, reason: str) -> SnapshotRefused:
    return SnapshotRefused(
        f"checking where a snapshot comes from: {field}: {reason}",
        hint="it was changed on the way: fetch it from another holder",
        field=field,
        reason=reason,
    )
