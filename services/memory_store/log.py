"""The replicated memory log of one node: puts, the outbox, and what it holds and can give to others.

What ``put_many`` has returned is on the disk, signed and chained. The log is its own outbox: what lies above an
origin's published position is still to be sent. It knows nothing of a bus.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import apsw
import msgspec
from blake3 import blake3

from edge.clock_sync import ClockSync
from edge.db import Database, fetch_one, fetch_value
from protocol.clock import HybridLogicalClock
from protocol.entries import (
    SCOPE_EVERYONE,
    SCOPE_PRIVATE,
    MemoryContent,
    Origin,
    SignedEntry,
    entry_hash,
    read_header,
    seal,
)
from protocol.errors import MalformedMessage, MindstreamError, NotFound
from protocol.identity import Identity, Keyring, digest
from protocol.ids import UUID7_PATTERN, uuid7
from protocol.messages import (
    MemoryEntries,
    MemoryHave,
    MemoryPut,
    MemoryStored,
    MemoryVector,
    OriginHave,
)
from services.memory_store.chain import (
    ENTRY_COLUMNS,
    MEMORY_LOG_SCHEMA,
    SEQ_BITS,
    OriginRow,
    append,
    find_or_make_origin,
    find_origin,
    origin_rows,
    save_origin,
)
from services.memory_store.merge import Gap, Merge, Merger, find_gaps

MAX_RANGE_ENTRIES = 5_000
MAX_RANGE_BYTES = 960 * 1024
"""Of the entries in one answer or publication: below the topics' limit, with room for the envelope."""
_ENTRY_OVERHEAD_BYTES = 64
"""Field names and lengths of one entry on the wire, rounded up."""


class Put(Protocol):
    """One memory to be stored: a received message, or whatever else has these."""

    @property
    def id(self) -> str:
        """The memory's id when ``data`` names none: a repeated ask has the same."""

    @property
    def source(self) -> str:
        """``node/service`` or ``node/client`` that put it."""

    @property
    def data(self) -> MemoryPut:
        """The memory."""


def machine_fingerprint() -> bytes:
    """A digest that is another on another machine: of the machine-id (which is not to be shown to anyone) and,
    where the board tells it, the serial number, since cards are cloned with the machine-id on them. Empty when
    neither can be read."""
    parts = []
    for path in ("/etc/machine-id", "/proc/device-tree/serial-number"):
        try:
            parts.append(Path(path).read_bytes().strip(b"\0\n "))
        except OSError:
            continue
    return digest(b"mindstream/v1/machine\0", *parts) if any(parts) else b""


def _unix_ms() -> int:
    return time.time_ns() // 1_000_000


class MemoryLog:
    """The log in one database. Thread-safe; a second process on the same file is kept out of harm's way, since
    every transaction reads the frontiers that it builds on.

    Args:
        db: opened with the schema ``MEMORY_LOG_SCHEMA``.
        identity: this node's; signs what is put here.
        keyring: gives the keys of the peers that are trusted now.
        clock: a clock that other parts of the service share; by default one that goes on from the log's last stamp.
        clock_synced: whether this machine's clock is synchronised.
        now_ms: the wall clock, Unix milliseconds; injected by tests.
        machine: ``machine_fingerprint()``; injected by tests.

    Raises StorageError.
    """

    def __init__(
        self,
        db: Database,
        identity: Identity,
        keyring: Callable[[], Keyring],
        *,
        clock: HybridLogicalClock | None = None,
        clock_synced: Callable[[], bool] | None = None,
        now_ms: Callable[[], int] = _unix_ms,
        machine: bytes | None = None,
    ) -> None:
        self.db = db
        self._identity = identity
        self._clock_synced = clock_synced or ClockSync()
        self._now_ms = now_ms
        self._published: dict[int, int] = {}
        """Origin number to published position, as far as it is not on the disk yet."""
        self._have: tuple[int, MemoryHave] | None = None
        self.log_id, self.log_id_reason = self._open_log_id(machine_fingerprint() if machine is None else machine)
        with db.read("reading the last clock stamp of") as connection:
            last = fetch_value(connection, "SELECT value FROM facts WHERE name = 'last_hlc'") or 0
        self.clock = clock or HybridLogicalClock(now_ms, last=last)
        self._merger = Merger(db, identity, keyring, self.clock, now_ms)

    def _open_log_id(self, machine: bytes) -> tuple[str, str]:
        """This data folder's log id, and why it was minted just now, if it was."""
        with self.db.transaction("opening the log id in") as connection:
            known = fetch_value(connection, "SELECT value FROM facts WHERE name = 'log_id'")
            was = fetch_value(connection, "SELECT value FROM facts WHERE name = 'machine'")
            if known is not None and (not machine or not was or was == machine):
                if machine and not was:
                    _set_fact(connection, "machine", machine)
                return str(known), ""
            if machine:
                _set_fact(connection, "machine", machine)
            reason = "new" if known is None else "the data folder came from another machine"
            return _mint_log_id(connection), reason

    # --- puts -----------------------------------------------------------------------------------------------

    def put_many(self, puts: Sequence[Put]) -> list[MemoryStored | MindstreamError]:
        """Store memories, all in one commit; what is returned as stored is on the disk.

        A put that cannot be stored has its error in its place and does not hold up the others. One whose id is
        stored already, or comes twice in ``puts``, is answered with what was stored first.

        Raises StorageError when the commit failed: nothing of it is stored.
        """
        results: list[MemoryStored | MindstreamError] = []
        rows: dict[str, OriginRow] = {}
        with self.db.transaction(f"storing {len(puts)} memories in") as connection:
            for put in puts:
                try:
                    results.append(self._put(connection, rows, put))
                except MindstreamError as error:
                    results.append(error)
            for row in rows.values():
                save_origin(connection, row)
            self._save_state(connection)
        return results

    def _put(self, connection: apsw.Connection, rows: dict[str, OriginRow], put: Put) -> MemoryStored:
        message = put.data
        identifier = message.id or put.id
        _check_put(identifier, message.scope)
        known = _find_put(connection, identifier, message.text)
        if known is not None:
            return known
        row = rows.get(message.scope)
        if row is None:
            origin = Origin(self._identity.node, message.scope, self.log_id)
            row = rows[message.scope] = find_or_make_origin(connection, origin)
        content = MemoryContent(
            text=message.text,
            time_us=message.time_us or self._now_ms() * 1000,
            role=message.role,
            conversation=message.conversation,
            source=put.source,
        )
        entry = seal(
            self._identity,
            content,
            origin=row.origin,
            seq=row.seq + 1,
            prev=row.hash,
            hlc=self.clock.tick(),
            id=identifier,
            clock_synced=self._clock_synced(),
        )
        append(connection, row, read_header(entry), entry, entry_hash(entry.header), content, new_id=True)
        return MemoryStored(id=identifier, node=row.origin.node, scope=message.scope, log_id=self.log_id, seq=row.seq)

    def _save_state(self, connection: apsw.Connection) -> None:
        """What goes to the disk along with the next commit, since it need not go alone."""
        _set_fact(connection, "last_hlc", self.clock.last)
        for number, seq in self._published.items():
            connection.execute("UPDATE origins SET published = max(published, ?) WHERE number = ?", (seq, number))

    # --- merging --------------------------------------------------------------------------------------------

    def merge(self, entries: Sequence[SignedEntry]) -> Merge:
        """Take in entries of other nodes, in any order; stored ones are on the disk when this returns.

        Raises StorageError: nothing of it is stored. See services/memory_store/merge.py.
        """
        merged = self._merger.merge(entries, own_log_id=self.log_id, save=self._save_state)
        if merged.own_log_broken:
            with self.db.transaction("beginning a new log in") as connection:
                log_id = _mint_log_id(connection)
            self.log_id, self.log_id_reason = log_id, "a peer holds entries of this log that this node has lost"
        return merged

    def skews(self) -> dict[str, int]:
        """Node to the furthest that one of its stamps was ahead of this node's clock since start, in
        milliseconds. Stamps behind it are no sign of a wrong clock: entries may come late."""
        return self._merger.skews()

    def gaps(self) -> list[Gap]:
        """The ranges that are missing before entries kept aside."""
        with self.db.read("looking for gaps in") as connection:
            return find_gaps(connection)

    # --- the outbox -----------------------------------------------------------------------------------------

    def unpublished(self, max_bytes: int = MAX_RANGE_BYTES) -> MemoryEntries:
        """The next own entries that are still to be published, in order, of one origin; none: all are out."""
        with self.db.read("reading the outbox of") as connection:
            waiting = [
                (row, max(row.published, self._published.get(row.number, 0)))
                for row in origin_rows(connection)
                if row.origin.node == self._identity.node and row.origin.scope == SCOPE_EVERYONE
            ]
            waiting = [(row, published) for row, published in waiting if row.seq > published]
            if not waiting:
                return MemoryEntries(entries=[])
            row, published = waiting[0]
            batch = _read_range(connection, row, published + 1, row.seq, max_bytes)
            batch.more = batch.more or len(waiting) > 1
            return batch

    def mark_published(self, batch: MemoryEntries) -> None:
        """``batch``, which ``unpublished`` gave, is out. Written to the disk with the next commit, or by
        ``flush``: after a crash some entries may be published again, which their receivers notice."""
        if not batch.entries:
            return
        last = read_header(batch.entries[-1])
        with self.db.read("reading the outbox of") as connection:
            row = find_origin(connection, Origin(last.node, last.scope, last.log_id))
        if row is not None:
            self._published[row.number] = max(last.seq, self._published.get(row.number, 0))

    def flush(self) -> None:
        """Write the published positions to the disk; at the end of the service. Raises StorageError."""
        with self.db.transaction("writing the published positions to") as connection:
            self._save_state(connection)

    # --- what this node holds -------------------------------------------------------------------------------

    def vector(self) -> MemoryVector:
        """How far each origin is held without a gap. Of scopes, only what everyone may know of."""
        with self.db.read("reading the vector of") as connection:
            return _read_vector(connection)

    def digest(self) -> MemoryHave:
        """The vector's digest: BLAKE3, 64 bytes, over the msgpack arrays ``[node, scope, log_id, seq, hash]`` of
        its origins, sorted. Cheap while nothing was committed since."""
        version = self.db.data_version()
        if self._have is None or self._have[0] != version:
            origins = self.vector().origins
            hasher = blake3()
            for each in origins:
                hasher.update(msgspec.msgpack.encode([each.node, each.scope, each.log_id, each.seq, each.hash]))
            have = MemoryHave(digest=hasher.digest(length=64), entries=sum(each.seq for each in origins))
            self._have = (version, have)
        return self._have[1]

    def range(self, origin: Origin, first_seq: int, last_seq: int, max_bytes: int = MAX_RANGE_BYTES) -> MemoryEntries:
        """Entries ``first_seq`` to ``last_seq`` of an origin, as far as they are held and fit; ``more`` when the
        rest is to be asked for. Raises NotFound for an origin that is not held or not for others."""
        with self.db.read("reading a range of") as connection:
            row = find_origin(connection, origin)
            if row is None or origin.scope != SCOPE_EVERYONE:
                raise NotFound(
                    f"reading entries {first_seq} to {last_seq} of {'/'.join(origin)[:200]}: no such origin here",
                    hint="ask a node whose vector has it",
                    field="log_id",
                    reason="unknown origin",
                )
            return _read_range(connection, row, first_seq, min(last_seq, row.seq), max_bytes)

    def stats(self) -> dict[str, Any]:
        """For the status page: ``log_id``; ``entries`` by ``node/scope/log_id``; ``early`` entries kept aside, and
        how many are ``missing`` before them; ``memories``; ``bytes`` on the disk; ``unpublished``; ``skew_ms`` by
        node; ``counters``."""
        with self.db.read("counting") as connection:
            rows = origin_rows(connection)
            early = fetch_value(connection, "SELECT count(*) FROM early")
            memories = fetch_value(connection, "SELECT count(*) FROM memories")
            missing = sum(gap.last_seq - gap.first_seq + 1 for gap in find_gaps(connection)) if early else 0
        return {
            "log_id": self.log_id,
            "log_id_reason": self.log_id_reason,
            "entries": {"/".join(row.origin): row.seq for row in rows if row.seq},
            "early": early,
            "missing": missing,
            "memories": memories,
            "bytes": self.db.size_bytes(),
            "unpublished": sum(
                max(0, row.seq - max(row.published, self._published.get(row.number, 0)))
                for row in rows
                if row.origin.node == self._identity.node and row.origin.scope == SCOPE_EVERYONE
            ),
            "skew_ms": self.skews(),
            "counters": self._merger.counters(),
        }


def _mint_log_id(connection: apsw.Connection) -> str:
    log_id = uuid7()
    _set_fact(connection, "log_id", log_id)
    return log_id


def _set_fact(connection: apsw.Connection, name: str, value: str | int | bytes) -> None:
    connection.execute(
        "INSERT INTO facts (name, value) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
        (name, value),
    )


def _check_put(identifier: str, scope: str) -> None:
    if not UUID7_PATTERN.fullmatch(identifier):
        raise MalformedMessage(
            f"storing a memory: its id {identifier[:60]!r} is not a UUIDv7",
            hint="leave the id empty, or use a UUIDv7 in lower case",
            field="id",
            reason="not a UUIDv7",
        )
    if scope not in (SCOPE_EVERYONE, SCOPE_PRIVATE):
        raise MalformedMessage(
            f"storing a memory: this node knows no scope {scope[:63]!r}",
            hint=f"use {SCOPE_EVERYONE!r} or {SCOPE_PRIVATE!r}",
            field="scope",
            reason="unknown scope",
        )


def _find_put(connection: apsw.Connection, identifier: str, text: str) -> MemoryStored | None:
    """What is stored under this id. Raises MalformedMessage when that is another text."""
    known = fetch_one(
        connection,
        "SELECT node, scope, log_id, position, text FROM memories JOIN origins ON number = position >> ? WHERE id = ?",
        (SEQ_BITS, identifier),
    )
    if known is None:
        return None
    node, scope, log_id, position, stored_text = known
    if stored_text is not None and stored_text != text:
        raise MalformedMessage(
            f"storing a memory under id {identifier}: another text is stored under it, by {node}",
            hint="a repeated put has the same text; a new memory needs a new id",
            field="id",
            reason="id in use",
        )
    seq = position & ((1 << SEQ_BITS) - 1)
    return MemoryStored(id=identifier, node=node, scope=scope, log_id=log_id, seq=seq, already=True)


def _read_vector(connection: apsw.Connection) -> MemoryVector:
    return MemoryVector(
        origins=[
            OriginHave(
                node=row.origin.node, scope=row.origin.scope, log_id=row.origin.log_id, seq=row.seq, hash=row.hash
            )
            for row in origin_rows(connection)
            if row.seq and row.origin.scope == SCOPE_EVERYONE
        ]
    )


def _read_range(
    connection: apsw.Connection, row: OriginRow, first_seq: int, last_seq: int, max_bytes: int
) -> MemoryEntries:
    """Entries of one origin, at least one if there is one, then as many as fit."""
    if first_seq > row.seq:
        return MemoryEntries(entries=[])
    rows: Iterable[tuple[Any, ...]] = connection.execute(
        f"SELECT {ENTRY_COLUMNS} FROM entries WHERE position BETWEEN ? AND ? ORDER BY position LIMIT ?",
        (row.position(first_seq), row.position(last_seq), MAX_RANGE_ENTRIES + 1),
    )
    entries: list[SignedEntry] = []
    size_bytes = 0
    for header, signature, salt, content in rows:
        size_bytes += _ENTRY_OVERHEAD_BYTES + len(header) + len(signature) + len(salt or b"") + len(content or b"")
        if entries and (size_bytes > max_bytes or len(entries) == MAX_RANGE_ENTRIES):
            return MemoryEntries(entries=entries, more=True)
        entries.append(SignedEntry(header=header, signature=signature, salt=salt, content=content))
    return MemoryEntries(entries=entries)


__all__ = ["MEMORY_LOG_SCHEMA", "Gap", "MemoryLog", "Merge", "Put", "machine_fingerprint"]
