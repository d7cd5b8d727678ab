"""The log's tables, and how an entry is appended to its origin's chain inside a transaction.

``entries`` is the truth, byte for byte as signed; ``memories`` and its full-text index are a view of it, kept
in the same transaction. An entry's ``position`` is its origin's number and its sequence number in one integer,
so that the table's own b-tree holds each origin's entries side by side, in order, without another index.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import apsw

from edge.db import Schema, fetch_all, fetch_one, fetch_value
from protocol.entries import GENESIS, KIND_PUT, MAX_SEQ, EntryHeader, MemoryContent, Origin, SignedEntry
from protocol.errors import Overloaded

SEQ_BITS = 40
assert MAX_SEQ < 1 << SEQ_BITS

MAX_ORIGINS_PER_NODE = 256
"""A node gets a new log_id when it is restored or cloned; more than this is a fault, and would fill the vector."""

MEMORY_LOG_SCHEMA = Schema(
    "memory log",
    0x4D536C67,  # "MSlg"
    (
        """
        CREATE TABLE origins (
            number INTEGER PRIMARY KEY,
            node TEXT NOT NULL,
            scope TEXT NOT NULL,
            log_id TEXT NOT NULL,
            seq INTEGER NOT NULL,           -- the frontier: held without a gap up to here
            hash BLOB NOT NULL,             -- of the entry at the frontier
            published INTEGER NOT NULL,     -- own origins: the last entry that went out on the bus
            UNIQUE (node, scope, log_id)
        );
        CREATE TABLE entries (
            position INTEGER PRIMARY KEY,   -- origin number << 40 | seq
            header BLOB NOT NULL,
            signature BLOB NOT NULL,
            salt BLOB,                      -- NULL with content: erased
            content BLOB
        );
        CREATE TABLE early (                -- verified, but beyond a gap
            position INTEGER PRIMARY KEY,
            header BLOB NOT NULL,
            signature BLOB NOT NULL,
            salt BLOB,
            content BLOB
        );
        CREATE TABLE memories (
            position INTEGER PRIMARY KEY,
            id TEXT NOT NULL UNIQUE,
            hlc INTEGER NOT NULL,
            time_us INTEGER NOT NULL,
            role TEXT NOT NULL,
            conversation TEXT NOT NULL,
            text TEXT                       -- NULL: erased
        );
        CREATE VIRTUAL TABLE memories_fts USING fts5 (
            text, content = 'memories', content_rowid = 'position',
            tokenize = 'porter unicode61 remove_diacritics 2'
        );
        -- Without this, FTS5 keeps the words of a deleted row until a merge happens to drop them.
        INSERT INTO memories_fts (memories_fts, rank) VALUES ('secure-delete', 1);
        CREATE TABLE facts (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
        """,
    ),
)

_ORIGIN_COLUMNS = "number, node, scope, log_id, seq, hash, published"
ENTRY_COLUMNS = "header, signature, salt, content"


@dataclass
class OriginRow:
    """One origin's row, as the transaction sees and changes it."""

    number: int
    origin: Origin
    seq: int
    hash: bytes
    published: int

    def position(self, seq: int) -> int:
        """Where entry ``seq`` of this origin lies in ``entries``, ``early`` and ``memories``."""
        return self.number << SEQ_BITS | seq


def origin_rows(connection: apsw.Connection) -> list[OriginRow]:
    """All origins that are known, those of which no entry is held yet (seq 0) too."""
    rows = fetch_all(connection, f"SELECT {_ORIGIN_COLUMNS} FROM origins ORDER BY node, scope, log_id")
    return [_origin_row(row) for row in rows]


def find_origin(connection: apsw.Connection, origin: Origin) -> OriginRow | None:
    """The origin's row, or None."""
    row = fetch_one(
        connection, f"SELECT {_ORIGIN_COLUMNS} FROM origins WHERE node = ? AND scope = ? AND log_id = ?", tuple(origin)
    )
    return None if row is None else _origin_row(row)


def _origin_row(row: tuple[Any, ...]) -> OriginRow:
    number, node, scope, log_id, seq, hash, published = row
    return OriginRow(number, Origin(node, scope, log_id), seq, hash, published)


def find_or_make_origin(connection: apsw.Connection, origin: Origin) -> OriginRow:
    """The origin's row, made when it is new. Raises Overloaded when its node has too many."""
    found = find_origin(connection, origin)
    if found is not None:
        return found
    held = fetch_value(connection, "SELECT count(*) FROM origins WHERE node = ?", (origin.node,))
    if held >= MAX_ORIGINS_PER_NODE:
        raise Overloaded(
            f"taking up log {origin.log_id} of node {origin.node!r}: {held} logs of it are held already",
            hint="is its data folder copied anew at each start?",
            field="log_id",
            reason="too many origins",
        )
    connection.execute(
        "INSERT INTO origins (node, scope, log_id, seq, hash, published) VALUES (?, ?, ?, 0, ?, 0)", (*origin, GENESIS)
    )
    return OriginRow(connection.last_insert_rowid(), origin, 0, GENESIS, 0)


def save_origin(connection: apsw.Connection, row: OriginRow) -> None:
    """Write the row back."""
    connection.execute(
        "UPDATE origins SET seq = ?, hash = ?, published = ? WHERE number = ?",
        (row.seq, row.hash, row.published, row.number),
    )


def append(
    connection: apsw.Connection,
    row: OriginRow,
    header: EntryHeader,
    entry: SignedEntry,
    hash: bytes,
    content: MemoryContent | None,
    *,
    new_id: bool = False,
) -> None:
    """Put ``entry`` at the end of its origin's chain, and its memory into the view.

    The caller has checked signature, sequence and ``prev``, and saves ``row`` at the end of the transaction.

    Args:
        hash: of ``entry.header``.
        content: of a ``memory.put``; None when it is erased or cannot be read.
        new_id: the caller has seen that no memory has this id.
    """
    position = row.position(header.seq)
    connection.execute(
        f"INSERT INTO entries (position, {ENTRY_COLUMNS}) VALUES (?, ?, ?, ?, ?)",
        (position, entry.header, entry.signature, entry.salt, entry.content),
    )
    row.seq, row.hash = header.seq, hash
    if header.kind == KIND_PUT and (new_id or _make_way(connection, position, header)):
        _show(connection, position, header, content)


def _make_way(connection: apsw.Connection, position: int, header: EntryHeader) -> bool:
    """Whether an entry's memory is to be shown; another of the same id is then taken out of the view. Of several
    the earliest by (hlc, origin) is shown, so that every node shows the same one whatever came first."""
    known = fetch_one(
        connection,
        "SELECT position, hlc, text, node, scope, log_id FROM memories JOIN origins ON number = position >> ?"
        " WHERE id = ?",
        (SEQ_BITS, header.id),
    )
    if known is None:
        return True
    old_position, hlc, text, *origin = known
    if (hlc, *origin, old_position) <= (header.hlc, header.node, header.scope, header.log_id, position):
        return False
    if text is not None:
        connection.execute(
            "INSERT INTO memories_fts (memories_fts, rowid, text) VALUES ('delete', ?, ?)", (old_position, text)
        )
    connection.execute("DELETE FROM memories WHERE position = ?", (old_position,))
    return True


def _show(connection: apsw.Connection, position: int, header: EntryHeader, content: MemoryContent | None) -> None:
    """Add a memory to the view and, unless it is erased, to the full-text index."""
    shown = content or MemoryContent(text="", time_us=0, role="")
    text = None if content is None else content.text
    connection.execute(
        "INSERT INTO memories (position, id, hlc, time_us, role, conversation, text) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (position, header.id, header.hlc, shown.time_us, shown.role, shown.conversation, text),
    )
    if text is not None:
        connection.execute("INSERT INTO memories_fts (rowid, text) VALUES (?, ?)", (position, text))
