"""Taking in entries of other nodes: verified, in the order of their chains, each once.

Entries may come twice, in any order and with gaps. What is beyond a gap is kept aside until the gap is filled;
what contradicts the chain that is held (a fork) is never stored. Clocks decide nothing here.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import apsw

from edge.db import Database, fetch_all, fetch_one, fetch_value
from protocol.clock import HybridLogicalClock, time_ms_of
from protocol.entries import (
    KIND_PUT,
    MAX_SEQ,
    SCOPE_PRIVATE,
    EntryHeader,
    MemoryContent,
    Origin,
    SignedEntry,
    entry_hash,
    read_content,
    read_header,
    verify,
)
from protocol.errors import ForkDetected, MalformedMessage, MindstreamError, Overloaded, TrustError, to_wire
from protocol.identity import Identity, Keyring
from protocol.messages import Event, MemoryMerged
from services.memory_store.chain import (
    ENTRY_COLUMNS,
    SEQ_BITS,
    OriginRow,
    append,
    find_or_make_origin,
    find_origin,
    save_origin,
)

MAX_EARLY_ENTRIES = 5_000
"""Of one origin, kept aside beyond a gap; those furthest from the gap go first, and are repaired later."""
MAX_EARLY_BYTES = 32 * 1024 * 1024
MAX_TIME_US = 2**63 - 1
"""Above it a memory's time is no time that a database holds."""


class Merge(NamedTuple):
    """What became of the entries."""

    merged: MemoryMerged
    events: list[Event]
    """What is to be said about it: forks, unknown peers, and whatever else was refused, once a node and kind."""
    own_log_broken: bool = False
    """A peer holds entries of this node's present log that this node does not: it was set back."""


class Gap(NamedTuple):
    """A range of an origin's entries that is missing, while later ones are there."""

    origin: Origin
    first_seq: int
    last_seq: int


class _Proven(NamedTuple):
    header: EntryHeader
    entry: SignedEntry


class _Tally:
    """Counts of one merge, and the first refusal of each kind and node with how many there were."""

    def __init__(self) -> None:
        self.merged = MemoryMerged()
        self.refused: dict[tuple[str, str], tuple[MindstreamError, int]] = {}

    def refuse(self, node: str, error: MindstreamError, count: int = 1) -> None:
        self.merged.refused += count
        first, before = self.refused.get((error.code, node), (error, 0))
        self.refused[error.code, node] = (first, before + count)

    def events(self) -> list[Event]:
        return [
            Event(
                name=error.code.replace("_", "-"),
                severity="error" if isinstance(error, ForkDetected) else "warning",
                text=str(error),
                count=count,
                error=to_wire(error),
            )
            for error, count in self.refused.values()
        ]


class Merger:
    """Merges into one log's database. Thread-safe.

    Args:
        db: the log's.
        identity: this node's.
        keyring: gives the keys of the peers that are trusted now.
        clock: takes note of the stamps that come, within its bound.
        now_ms: the wall clock, Unix milliseconds.
    """

    def __init__(
        self,
        db: Database,
        identity: Identity,
        keyring: Callable[[], Keyring],
        clock: HybridLogicalClock,
        now_ms: Callable[[], int],
    ) -> None:
        self._db = db
        self._node = identity.node
        self._own_keyring = Keyring({identity.node: identity.fingerprint})
        self._keyring = keyring
        self._clock = clock
        self._now_ms = now_ms
        self._skews: dict[str, int] = {}
        self._counters: Counter[str] = Counter()
        self._lock = threading.Lock()

    def skews(self) -> dict[str, int]:
        """Node to the furthest that a stamp of it was ahead of this node's clock, ms."""
        with self._lock:
            return dict(self._skews)

    def counters(self) -> dict[str, int]:
        """``stored``, ``already``, ``unreadable_content`` and ``refused.CODE``, since start."""
        with self._lock:
            return dict(sorted(self._counters.items()))

    def merge(
        self, entries: Sequence[SignedEntry], *, own_log_id: str, save: Callable[[apsw.Connection], None]
    ) -> Merge:
        """Take entries in.

        Args:
            entries: of any origins, in any order.
            own_log_id: of the log that this node writes now.
            save: called at the end of the transaction.

        Raises StorageError: nothing of it is stored.
        """
        tally = _Tally()
        by_origin = self._prove(self._new_ones(entries, tally), tally)
        broken = False
        if by_origin:
            with self._db.transaction(f"merging {len(entries)} entries into") as connection:
                for origin in sorted(by_origin):
                    try:
                        row = find_or_make_origin(connection, origin)
                    except Overloaded as error:
                        tally.refuse(origin.node, error, len(by_origin[origin]))
                        continue
                    before = row.seq
                    forked = self._extend(connection, row, by_origin[origin], tally)
                    if origin.node == self._node:
                        if row.seq > before:
                            row.published = row.seq  # it came from others: all up to it has been published
                        broken |= origin.log_id == own_log_id and (forked or row.seq > before)
                    save_origin(connection, row)
                save(connection)
        self._count(tally)
        return Merge(tally.merged, tally.events(), broken)

    # --- outside of the transaction: what takes time ----------------------------------------------------------

    def _new_ones(self, entries: Sequence[SignedEntry], tally: _Tally) -> list[SignedEntry]:
        """Those that are not here yet, byte for byte: a repeated entry costs no signature check."""
        new: list[SignedEntry] = []
        origins: dict[Origin, OriginRow | None] = {}
        with self._db.read("looking up entries in") as connection:
            for entry in entries:
                try:
                    header = read_header(entry)
                    _check_scope(header, self._node)
                except MindstreamError as error:
                    tally.refuse("", error)
                    continue
                origin = Origin(header.node, header.scope, header.log_id)
                if origin not in origins:
                    origins[origin] = find_origin(connection, origin)
                row = origins[origin]
                if row is None:
                    new.append(entry)
                elif _held(connection, "entries", row.position(header.seq)) == entry.header:
                    tally.merged.already += 1
                elif _held(connection, "early", row.position(header.seq)) == entry.header:
                    tally.merged.waiting += 1
                else:
                    new.append(entry)
        return new

    def _prove(self, entries: Sequence[SignedEntry], tally: _Tally) -> dict[Origin, list[_Proven]]:
        """Entries whose signature and content digest hold, by origin, in the order of their numbers."""
        keyring = self._keyring()
        by_origin: dict[Origin, list[_Proven]] = defaultdict(list)
        for entry in entries:
            node = read_header(entry).node
            try:
                header = verify(entry, self._own_keyring if node == self._node else keyring)
            except MindstreamError as error:
                tally.refuse(node, error)
                continue
            by_origin[Origin(header.node, header.scope, header.log_id)].append(_Proven(header, entry))
        for proven in by_origin.values():
            proven.sort(key=lambda each: each.header.seq)
        return by_origin

    # --- inside of the transaction ----------------------------------------------------------------------------

    def _extend(self, connection: apsw.Connection, row: OriginRow, proven: list[_Proven], tally: _Tally) -> bool:
        """Append what goes on, keep aside what is early; whether something contradicted the chain held."""
        forked = False
        early: set[int] = set()
        for header, entry in proven:
            if header.seq <= row.seq:
                if _held(connection, "entries", row.position(header.seq)) == entry.header:
                    tally.merged.already += 1
                else:
                    forked = True
                    tally.refuse(header.node, _fork(row, header))
            elif header.seq > row.seq + 1:
                connection.execute(
                    f"INSERT OR IGNORE INTO early (position, {ENTRY_COLUMNS}) VALUES (?, ?, ?, ?, ?)",
                    (row.position(header.seq), entry.header, entry.signature, entry.salt, entry.content),
                )
                early.add(header.seq)
                self._note_clock(header)
            elif header.prev != row.hash:
                forked = True
                tally.refuse(header.node, _fork(row, header))
            else:
                self._append(connection, row, header, entry, tally)
                forked |= self._drain(connection, row, tally)
        self._bound_early(connection, row, {seq for seq in early if seq > row.seq}, tally)
        return forked

    def _append(
        self, connection: apsw.Connection, row: OriginRow, header: EntryHeader, entry: SignedEntry, tally: _Tally
    ) -> None:
        append(connection, row, header, entry, entry_hash(entry.header), self._content(header, entry))
        tally.merged.stored += 1
        self._note_clock(header)

    def _drain(self, connection: apsw.Connection, row: OriginRow, tally: _Tally) -> bool:
        """Append what was kept aside and goes on now; whether one of them contradicted the chain."""
        while True:
            found = fetch_one(
                connection, f"SELECT {ENTRY_COLUMNS} FROM early WHERE position = ?", (row.position(row.seq + 1),)
            )
            if found is None:
                return False
            entry = SignedEntry(*found)
            header = read_header(entry)
            connection.execute("DELETE FROM early WHERE position = ?", (row.position(header.seq),))
            if header.prev != row.hash:
                tally.refuse(header.node, _fork(row, header))
                return True
            self._append(connection, row, header, entry, tally)

    def _bound_early(self, connection: apsw.Connection, row: OriginRow, early: set[int], tally: _Tally) -> None:
        """Drop what is too much to keep aside, the furthest from the gap first."""
        if not early:
            return
        connection.execute(
            "DELETE FROM early WHERE position IN (SELECT position FROM ("
            " SELECT position, row_number() OVER nearest AS place,"
            "  sum(length(header) + coalesce(length(content), 0)) OVER nearest AS total"
            " FROM early WHERE position BETWEEN ?1 AND ?2 WINDOW nearest AS (ORDER BY position))"
            " WHERE place > ?3 OR total > ?4)",
            (row.position(0), row.position(MAX_SEQ), MAX_EARLY_ENTRIES, MAX_EARLY_BYTES),
        )
        dropped = connection.changes()
        tally.merged.waiting += max(0, len(early) - dropped)
        if dropped:
            tally.refuse(
                row.origin.node,
                Overloaded(
                    f"keeping entries of {row.origin.node!r} aside until entry {row.seq + 1} comes: too many",
                    hint="they are asked for again once the gap is filled",
                    field="seq",
                    reason="too many early entries",
                ),
                dropped,
            )

    def _content(self, header: EntryHeader, entry: SignedEntry) -> MemoryContent | None:
        """The memory in an entry; None when it is erased, or when its origin signed something unreadable: the
        chain goes on with it all the same."""
        if header.kind != KIND_PUT:
            return None
        try:
            content = read_content(entry)
        except MalformedMessage:
            content = None
        if entry.content is not None and (content is None or not 0 <= content.time_us <= MAX_TIME_US):
            with self._lock:
                self._counters["unreadable_content"] += 1
            return None
        return content

    def _note_clock(self, header: EntryHeader) -> None:
        """Learn from an entry's stamp. One beyond the bound moves nothing, but is shown."""
        self._clock.merge(header.hlc)
        ahead_ms = time_ms_of(header.hlc) - self._now_ms()
        with self._lock:
            self._skews[header.node] = max(self._skews.get(header.node, 0), ahead_ms)

    def _count(self, tally: _Tally) -> None:
        with self._lock:
            self._counters["stored"] += tally.merged.stored
            self._counters["already"] += tally.merged.already
            for error, count in tally.refused.values():
                self._counters[f"refused.{error.code}"] += count


def find_gaps(connection: apsw.Connection) -> list[Gap]:
    """The first missing range of every origin that has entries kept aside."""
    rows = fetch_all(
        connection,
        "SELECT node, scope, log_id, seq, min(position) FROM early JOIN origins ON number = position >> ?"
        " GROUP BY number ORDER BY number",
        (SEQ_BITS,),
    )
    return [
        Gap(Origin(node, scope, log_id), seq + 1, (position & MAX_SEQ) - 1)
        for node, scope, log_id, seq, position in rows
    ]


def _held(connection: apsw.Connection, table: str, position: int) -> bytes | None:
    """The header bytes at a position."""
    held: bytes | None = fetch_value(connection, f"SELECT header FROM {table} WHERE position = ?", (position,))
    return held


def _check_scope(header: EntryHeader, own_node: str) -> None:
    if header.scope == SCOPE_PRIVATE and header.node != own_node:
        raise TrustError(
            f"merging entry {header.seq} of {header.node!r}: its scope is private, it should never have left its node",
            hint="that node's bridge is at fault",
            field="scope",
            reason="private scope",
        )


def _fork(row: OriginRow, header: EntryHeader) -> ForkDetected:
    return ForkDetected(
        f"merging entry {header.seq} of {'/'.join(row.origin)}: its origin signed it, and it contradicts the"
        f" chain that this node holds up to {row.seq}",
        hint="that node's data folder was copied or set back; what is held stays as it is",
        field="seq",
        reason="fork",
    )
