"""The pool's entries on disk: found by name, read in parts, and thrown out by what keeping them is worth.

One file an entry: ``MSPOOL01``, the length of the header (uint32, little-endian), the header (msgpack of
SignedPoolEntry), then the sealed chunks in order. Its name has what must be known without reading it:
``NAME.PARENT.ID.COST.CREATOR``, three in hex, the cost of reading in milliseconds, the node that read it. It is a hint
and no more: what is read is checked against the signed entry. Beside them lie statements of witnesses, ``ID.NODE``.

**What goes first.** GreedyDual-Size-Frequency (Cherkasova, "Improving WWW Proxies Performance with
Greedy-Dual-Size-Frequency Caching Policy", HP Labs 1998): an entry is worth ``clock + uses × cost / size``, seconds of
reading saved for each byte, where the clock is the worth of what went last, so that what is not used any more ages. A
block is of no use without the one before it, so only an entry goes that no other here continues; what was set aside,
and what has lost the one before it, goes first of all.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import msgspec

from edge.pool_files import Data, PoolFiles
from protocol.errors import UNREADABLE, BlobError, StorageError, TrustError
from protocol.group_key import NAME_BYTES
from protocol.ids import NAME_PATTERN
from protocol.manifest import verify_chunk
from protocol.pool import MAX_ENTRY_BYTES, MAX_WITNESSES, NO_PARENT, PoolEntry, SignedPoolEntry, entry_id
from protocol.provenance import MAX_STATEMENT_BYTES, SignedStatement

log = logging.getLogger(__name__)

ENTRIES, WITNESSES = "entries", "witnesses"
MAGIC = b"MSPOOL01"
_LENGTH_BYTES = 4
_HEADER_AT = len(MAGIC) + _LENGTH_BYTES
_GUESS_BYTES = 4096
"""Most headers are shorter: read at once."""
MAX_HEADER_BYTES = MAX_ENTRY_BYTES + 1024
LEAST_FREE_BYTES = 256 * 2**20
"""The pool leaves so much of a disk to others."""
MAX_STATEMENTS = 65_536


@dataclass
class Held:
    """An entry that is here, as far as its file's name says."""

    name: bytes
    parent: bytes
    identifier: str
    cost_ms: int
    creator: str
    size_bytes: int
    file: str
    uses: int = 1
    clock: float = 0.0
    """Of the time when it was used last."""

    @property
    def worth(self) -> float:
        """Of keeping it."""
        return self.clock + self.uses * self.cost_ms / max(1, self.size_bytes)


class PoolStore:
    """Entries in files. On any thread; other processes may put and remove files of it meanwhile.

    Args:
        files: where they are.
        most_bytes: of all entries together.
        on_drop: called with a counter and what happened to an entry that could not be used, or made room.
    """

    def __init__(
        self,
        files: PoolFiles,
        most_bytes: int,
        on_drop: Callable[[str, str], None] = lambda _counter, _text: None,
    ) -> None:
        self.files = files
        self._most_bytes = most_bytes
        self._on_drop = on_drop
        self._lock = threading.RLock()
        self._entries: dict[str, Held] = {}
        self._by_name: dict[bytes, list[Held]] = {}
        self._statements: dict[str, dict[str, SignedStatement]] = {}
        self._known_statements: set[str] = set()
        self._against: Callable[[Held], bool] = lambda _held: False
        self._clock = 0.0
        self.changes = 0
        """Grows whenever an entry comes or goes."""

    def set_aside_by(self, against: Callable[[Held], bool]) -> None:
        """``against`` says of an entry whether it is set aside."""
        self._against = against

    def is_set_aside(self, held: Held) -> bool:
        """Whether an entry is not to be used."""
        return self._against(held)

    def refresh(self) -> None:
        """Look what is there. Raises StorageError."""
        found = self.files.list(ENTRIES)
        with self._lock:
            before = self._entries
            for file, size in found.items():
                held = _held(file, size)
                if held is not None and held.identifier not in before:
                    self._add(held)
            for held in [each for each in before.values() if each.file not in found]:
                self._drop(held)
        for file in self.files.list(WITNESSES).keys() - self._known_statements:
            self._read_statement(file)

    # --- looking --------------------------------------------------------------------------------------------

    @property
    def totals(self) -> tuple[int, int]:
        """Entries here, and their bytes."""
        with self._lock:
            return len(self._entries), sum(held.size_bytes for held in self._entries.values())

    def all(self) -> list[Held]:
        """Every entry, the one worth most first."""
        with self._lock:
            return sorted(self._entries.values(), key=lambda held: held.worth, reverse=True)

    def of_name(self, name: bytes) -> list[Held]:
        """The entries of a block, each by another node or numerics."""
        with self._lock:
            return list(self._by_name.get(name, ()))

    def get(self, identifier: str) -> Held | None:
        """An entry by its id."""
        with self._lock:
            return self._entries.get(identifier)

    def used(self, held: Held) -> None:
        """It has saved a reading."""
        with self._lock:
            held.uses += 1
            held.clock = self._clock

    def signed(self, held: Held) -> SignedPoolEntry:
        """The signed entry, with what witnesses said. Raises BlobError for one that is gone or damaged, and removes
        it; StorageError."""
        return self._header(held)[0]

    def chunks(self, held: Held, entry: PoolEntry, wanted: Sequence[int]) -> list[bytes]:
        """Those chunks of ``entry``, verified. Raises as ``signed``."""
        _, start = self._header(held)
        refs = entry.chunks
        ends = [start]
        for ref in refs:
            ends.append(ends[-1] + ref.size_bytes)
        found = []
        try:
            for first, stop in _runs(wanted):
                data = memoryview(self.files.read(ENTRIES, held.file, ends[first], ends[stop]))
                for index in range(first, stop):
                    chunk = data[ends[index] - ends[first] : ends[index + 1] - ends[first]]
                    verify_chunk(refs[index], chunk, index=index)
                    found.append(bytes(chunk))
        except TrustError as error:
            raise self._damaged(held, error.reason) from None
        except FileNotFoundError:
            raise self._gone(held) from None
        return found

    def _header(self, held: Held) -> tuple[SignedPoolEntry, int]:
        """The entry, and where its chunks begin."""
        try:
            body = self.files.read(ENTRIES, held.file, 0, _GUESS_BYTES)
            length = int.from_bytes(body[len(MAGIC) : _HEADER_AT], "little")
            if body[: len(MAGIC)] != MAGIC or not 0 < length <= MAX_HEADER_BYTES:
                raise self._damaged(held, "it does not begin as an entry")
            stop = _HEADER_AT + length
            if stop > len(body):
                body = self.files.read(ENTRIES, held.file, 0, stop)
        except FileNotFoundError:
            raise self._gone(held) from None
        try:
            signed = msgspec.msgpack.decode(body[_HEADER_AT:stop], type=SignedPoolEntry)
        except UNREADABLE as error:
            raise self._damaged(held, str(error)) from None
        if entry_id(signed) != held.identifier:
            raise self._damaged(held, "its content is not what its name says")
        signed.witnesses = self.statements(held.identifier)
        return signed, stop

    def _gone(self, held: Held) -> BlobError:
        with self._lock:
            self._drop(held)
        return BlobError(f"reading pool entry {held.identifier[:12]}: it is not there any more", reason="gone")

    def _damaged(self, held: Held, reason: str) -> BlobError:
        self.remove(held)
        self._on_drop("pool.damaged", f"pool entry {held.identifier[:12]} was damaged and is removed: {reason}")
        return BlobError(
            f"reading pool entry {held.identifier[:12]}: it is damaged, and removed now: {reason}",
            hint="its block is read again",
            reason="damaged",
        )

    # --- putting and removing -------------------------------------------------------------------------------

    def put(self, signed: SignedPoolEntry, entry: PoolEntry, chunks: Sequence[Data]) -> bool:
        """Keep an entry, others making room; whether it is kept: not where it is worth less than they are.

        Raises StorageError.
        """
        identifier = entry_id(signed)
        header = msgspec.msgpack.encode(SignedPoolEntry(signed.entry, signed.signature))
        size = _HEADER_AT + len(header) + sum(map(len, chunks))
        file = f"{entry.name.hex()}.{entry.parent.hex()}.{identifier}.{entry.cost_ms}.{entry.creator}"
        held = Held(entry.name, entry.parent, identifier, entry.cost_ms, entry.creator, size, file, clock=self._clock)
        if self.get(identifier) is not None:
            return True
        if not self._make_room(held):
            self._on_drop("pool.not_kept", "")
            return False
        parts = [MAGIC, len(header).to_bytes(_LENGTH_BYTES, "little"), header, *chunks]
        try:
            self.files.write(ENTRIES, file, parts)
        except StorageError:
            # A full disk, as a rule: once more, with half of the pool given back.
            with self._lock:
                target = sum(each.size_bytes for each in self._entries.values()) // 2
            if not self._evict(target, held):
                raise
            self.files.write(ENTRIES, file, parts)
        with self._lock:
            self._add(held)
        return True

    def _make_room(self, held: Held) -> bool:
        """Whether there is room for ``held`` now. What is worth less has gone."""
        free = self.files.free_bytes()
        with self._lock:
            used = sum(each.size_bytes for each in self._entries.values())
        most = self._most_bytes
        if free is not None:
            most = min(most, used + free - LEAST_FREE_BYTES)
        if held.size_bytes > most:
            return False
        return self._evict(most - held.size_bytes, held)

    def _evict(self, target_bytes: int, coming: Held) -> bool:
        """Remove what is worth least until all take ``target_bytes`` at most; False when ``coming`` is itself worth
        less than the next that would have to go."""
        while True:
            with self._lock:
                used = sum(each.size_bytes for each in self._entries.values())
                if used <= target_bytes:
                    return True
                parents = {each.parent for each in self._entries.values()} | {coming.parent}
                leaves = [each for each in self._entries.values() if each.name not in parents] or [
                    each for each in self._entries.values() if each.name != coming.parent
                ]
                if not leaves:
                    return False
                going = min(leaves, key=self._rank)
                if self._rank(going) > (2, coming.worth):
                    return False
                self._clock = max(self._clock, going.worth if self._rank(going)[0] == 2 else 0.0)
            self.remove(going)
            self._on_drop("pool.evicted", "")

    def _rank(self, held: Held) -> tuple[int, float]:
        """What goes first has the lowest."""
        if self._against(held):
            return 0, held.worth
        orphan = held.parent != NO_PARENT and held.parent not in self._by_name
        return (1 if orphan else 2), held.worth

    def remove(self, held: Held) -> None:
        """Remove an entry; what witnesses said of it stays, should it come back."""
        with contextlib.suppress(StorageError):
            self.files.remove(ENTRIES, held.file)
        with self._lock:
            self._drop(held)

    def clear(self) -> int:
        """Remove every entry and statement; how many entries there were. Raises StorageError."""
        self.refresh()
        found = self.all()
        for held in found:
            self.remove(held)
        for file in self.files.list(WITNESSES):
            self.files.remove(WITNESSES, file)
        with self._lock:
            self._statements.clear()
            self._known_statements.clear()
        return len(found)

    def _add(self, held: Held) -> None:
        self._entries[held.identifier] = held
        self._by_name.setdefault(held.name, []).append(held)
        self.changes += 1

    def _drop(self, held: Held) -> None:
        if self._entries.pop(held.identifier, None) is None:
            return
        self.changes += 1
        left = [each for each in self._by_name.get(held.name, ()) if each.identifier != held.identifier]
        if left:
            self._by_name[held.name] = left
        else:
            self._by_name.pop(held.name, None)

    # --- witnesses ------------------------------------------------------------------------------------------

    def statements(self, identifier: str) -> list[SignedStatement]:
        """What witnesses said of an entry, whether it is here or not."""
        with self._lock:
            return list(self._statements.get(identifier, {}).values())[:MAX_WITNESSES]

    def said_by(self, identifier: str) -> frozenset[str]:
        """Who has said something of an entry."""
        with self._lock:
            return frozenset(self._statements.get(identifier, ()))

    def keep_statement(self, identifier: str, node: str, signed: SignedStatement, *, instead: bool = False) -> bool:
        """Keep what ``node`` says of an entry, in place of what it said before if ``instead``; whether it was new."""
        with self._lock:
            said = self._statements.get(identifier, {})
            if (node in said and not instead) or said.get(node) == signed:
                return False
            if len(said) >= MAX_WITNESSES or len(self._known_statements) >= MAX_STATEMENTS:
                return False
            self._statements.setdefault(identifier, {})[node] = signed
            self._known_statements.add(f"{identifier}.{node}")
            self.changes += 1
        try:
            self.files.write(WITNESSES, f"{identifier}.{node}", [msgspec.msgpack.encode(signed)])
        except StorageError as error:
            log.warning("a witness's statement is kept in memory alone: %s", error)
        return True

    def _read_statement(self, file: str) -> None:
        identifier, _, node = file.partition(".")
        if len(identifier) != 64 or not NAME_PATTERN.fullmatch(node) or len(self._known_statements) >= MAX_STATEMENTS:
            return
        try:
            body = self.files.read(WITNESSES, file, 0, 2 * MAX_STATEMENT_BYTES)
            signed = msgspec.msgpack.decode(body, type=SignedStatement)
        except FileNotFoundError:
            return
        except UNREADABLE as error:
            log.warning("the statement %s is damaged and removed: %s", file, error)
            self.files.remove(WITNESSES, file)
            return
        with self._lock:
            self._statements.setdefault(identifier, {})[node] = signed
            self._known_statements.add(file)
            self.changes += 1


def _held(file: str, size: int) -> Held | None:
    """What a file's name says; None when it is no entry's."""
    parts = file.split(".")
    if len(parts) != 5 or not NAME_PATTERN.fullmatch(parts[4]):
        return None
    try:
        name, parent, identifier, cost_ms = bytes.fromhex(parts[0]), bytes.fromhex(parts[1]), parts[2], int(parts[3])
    except ValueError:
        return None
    if len(name) != NAME_BYTES or len(parent) != NAME_BYTES or len(identifier) != 64 or not 0 <= cost_ms < 2**31:
        return None
    return Held(name, parent, identifier, cost_ms, parts[4], size, file)


def _runs(indexes: Iterable[int]) -> list[tuple[int, int]]:
    """Neighbours of a rising sequence, as (first, end)."""
    runs: list[tuple[int, int]] = []
    for index in indexes:
        if runs and runs[-1][1] == index:
            runs[-1] = runs[-1][0], index + 1
        else:
            runs.append((index, index + 1))
    return runs


def chunk_indexes(entry: PoolEntry, kinds: Iterable[str]) -> list[int]:
    """Which of an entry's chunks are of parts of these kinds."""
    wanted, at = frozenset(kinds), 0
    found: list[int] = []
    for kind, part in entry.parts():
        count = len(list(part.chunks()))
        if kind in wanted:
            found.extend(range(at, at + count))
        at += count
    return found
