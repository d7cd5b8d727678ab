"""SQLite, opened one way: the only place that sets pragmas, runs migrations and names what the disk refused.

A ``Database`` is one file with one writer connection and one reader. A transaction that has left its ``with``
block is on the disk (WAL, synchronous=FULL); one that raised is gone, whole, and the database goes on. All of
SQLite comes through apsw: a second SQLite library in the process would break the locks of the first.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw

from protocol.errors import StorageError

BUSY_TIMEOUT_MS = 5_000
WAL_LIMIT_BYTES = 16 * 1024 * 1024
"""A WAL that once grew beyond this is cut back to it at the next checkpoint."""

DISK_FULL = "disk full"
READ_ONLY = "read-only"
CANNOT_OPEN = "cannot open"
CORRUPT = "damaged"
BUSY = "busy"
NEWER = "newer schema"
FOREIGN = "not this database"
IO_ERROR = "i/o error"
REFUSED = "refused"

HEALS = frozenset({DISK_FULL, READ_ONLY, CANNOT_OPEN, BUSY, IO_ERROR})
"""Reasons that may pass without anyone touching the file: worth waiting for, with backoff."""

_PRAGMAS = f"""
PRAGMA synchronous = FULL;       -- NORMAL would lose acknowledged commits with the power (in WAL mode)
PRAGMA foreign_keys = ON;
PRAGMA secure_delete = ON;       -- not FAST: that leaves the pages of an erased long text on the freelist
PRAGMA temp_store = MEMORY;      -- a sort must not leave erased text in /tmp, nor need /tmp writable
PRAGMA trusted_schema = OFF;     -- a database file from elsewhere runs no functions of ours
PRAGMA cell_size_check = ON;
PRAGMA journal_size_limit = {WAL_LIMIT_BYTES};
"""


@dataclass(frozen=True)
class Schema:
    """What a database file holds.

    ``migrations[n]`` is SQL that leads from version n to n + 1; released ones never change, and new ones are
    added at the end. ``application_id`` stands in the file's header, so that one kind of file is never
    opened as another.
    """

    name: str
    application_id: int
    migrations: tuple[str, ...]


class Database:
    """One open database file. Thread-safe; see ``open_database``."""

    def __init__(
        self, path: Path, schema: Schema, writer: apsw.Connection, reader: apsw.Connection, commit_delay_ms: float
    ) -> None:
        self.path = path
        self.schema = schema
        self._writer = writer
        self._reader = reader
        self._commit_delay_s = commit_delay_ms / 1000
        self._write_lock = threading.RLock()
        self._read_lock = threading.RLock()

    @contextmanager
    def transaction(self, doing: str = "writing") -> Iterator[apsw.Connection]:
        """One write transaction (BEGIN IMMEDIATE); on the disk when the block has ended without raising.

        Args:
            doing: what it is for, as the error message will say it: "writing 3 memories".

        Raises StorageError, its ``reason`` one of this module's constants; everything is rolled back, and the
        database can be used again as soon as the cause is gone.
        """
        with self._write_lock, _explained(self.path, doing, self._writer):
            connection = self._writer
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                if self._commit_delay_s:
                    time.sleep(self._commit_delay_s)
                connection.execute("COMMIT")
            except BaseException:
                # SQLite itself rolls back after some failures, such as a full disk.
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    @contextmanager
    def read(self, doing: str = "reading") -> Iterator[apsw.Connection]:
        """A read transaction: all its statements see one committed state. Writers are not held up.

        Raises StorageError.
        """
        with self._read_lock, _explained(self.path, doing, self._reader):
            connection = self._reader
            connection.execute("BEGIN")
            try:
                yield connection
            finally:
                if connection.in_transaction:
                    connection.execute("COMMIT")

    def data_version(self) -> int:
        """A number that stays the same for as long as nothing was committed, by this process or another."""
        with self._read_lock, _explained(self.path, "reading", self._reader):
            return int(fetch_value(self._reader, "PRAGMA data_version"))

    def checkpoint(self) -> None:
        """Move the WAL into the file and truncate it, so that erased content is in neither. Raises StorageError."""
        with self._write_lock, _explained(self.path, "truncating the WAL of", self._writer):
            busy = fetch_value(self._writer, "PRAGMA wal_checkpoint(TRUNCATE)")
            if busy:
                raise apsw.BusyError("a reader is using the WAL")

    def size_bytes(self) -> int:
        """Bytes on the disk, the WAL included."""
        files = (self.path, Path(f"{self.path}-wal"))
        return sum(file.stat().st_size for file in files if file.exists())

    def close(self) -> None:
        """Close both connections; the WAL is moved into the file. Harmless when closed already."""
        with self._write_lock, self._read_lock, _explained(self.path, "closing", self._writer):
            self._reader.close()
            self._writer.close()


def fetch_all(connection: apsw.Connection, sql: str, parameters: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """All rows of a statement."""
    return list(connection.execute(sql, parameters))


def fetch_one(connection: apsw.Connection, sql: str, parameters: tuple[Any, ...] = ()) -> tuple[Any, ...] | None:
    """The first row, or None."""
    return connection.execute(sql, parameters).fetchone()


def fetch_value(connection: apsw.Connection, sql: str, parameters: tuple[Any, ...] = ()) -> Any:
    """The first column of the first row, or None."""
    row = fetch_one(connection, sql, parameters)
    return None if row is None else row[0]


def open_database(
    path: Path,
    *,
    schema: Schema,
    vfs: str | None = None,
    commit_delay_ms: float = 0,
    busy_timeout_ms: int = BUSY_TIMEOUT_MS,
) -> Database:
    """Open or make a database and bring it to the schema's newest version, one transaction a migration.

    Args:
        path: the file; its folder is made when it is missing.
        schema: what the file holds.
        vfs: name of a registered SQLite VFS; the default one otherwise.
        commit_delay_ms: for measuring: every commit takes this much longer, as on an SD card.
        busy_timeout_ms: how long to wait for another process's write.

    Raises StorageError; ``error.reason in HEALS`` says whether waiting can help.
    """
    doing = f"opening the {schema.name}"
    with _explained(path, doing, None):
        _make_folder(path.parent)
        flags = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE
        writer = apsw.Connection(str(path), flags=flags, vfs=vfs)
    try:
        with _explained(path, doing, writer):
            writer.set_busy_timeout(busy_timeout_ms)
            _check_owner(writer, path, schema)
            _switch_to_wal(writer, busy_timeout_ms)
            _run(writer, _PRAGMAS)
            _migrate(writer, path, schema)
            reader = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE, vfs=vfs)
            reader.set_busy_timeout(busy_timeout_ms)
            _run(reader, _PRAGMAS + "PRAGMA query_only = ON")
    except BaseException:
        writer.close()
        raise
    return Database(path, schema, writer, reader, commit_delay_ms)


def _run(connection: apsw.Connection, script: str) -> None:
    """Run all statements of a script: execute() alone stops at the first that has a row to give."""
    connection.execute(script).fetchall()


def _make_folder(folder: Path) -> None:
    """Make ``folder``, and make sure that power loss cannot take it away again under a synced file."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        descriptor = os.open(made.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _check_owner(connection: apsw.Connection, path: Path, schema: Schema) -> None:
    found = fetch_value(connection, "PRAGMA application_id")
    version = fetch_value(connection, "PRAGMA user_version")
    empty = fetch_value(connection, "SELECT count(*) FROM sqlite_schema") == 0
    if found != schema.application_id and not (empty and found == 0):
        raise StorageError(
            f"opening the {schema.name} in {path}: the file is another program's or another service's database",
            hint="check the data folder in mindstream.toml; the file was left as it is",
            field="path",
            reason=FOREIGN,
        )
    if version > len(schema.migrations):
        raise StorageError(
            f"opening the {schema.name} in {path}: it has version {version}, "
            f"and this Mindstream knows versions up to {len(schema.migrations)}",
            hint="a newer Mindstream wrote it: update this one; the file was left as it is",
            field="path",
            reason=NEWER,
        )


def _switch_to_wal(connection: apsw.Connection, timeout_ms: int) -> None:
    # The switch needs the file alone, and SQLite does not always ask the busy handler here: two processes
    # that open a new file at once would get in each other's way.
    deadline_s = time.monotonic() + timeout_ms / 1000
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except apsw.BusyError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.01)


def _migrate(connection: apsw.Connection, path: Path, schema: Schema) -> None:
    while fetch_value(connection, "PRAGMA user_version") < len(schema.migrations):
        connection.execute("BEGIN IMMEDIATE")
        try:
            # Another process may have done it while this one waited for the lock.
            _check_owner(connection, path, schema)
            version = fetch_value(connection, "PRAGMA user_version")
            if version < len(schema.migrations):
                _run(connection, schema.migrations[version])
                connection.execute(f"PRAGMA user_version = {version + 1}")
                connection.execute(f"PRAGMA application_id = {schema.application_id}")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


@contextmanager
def _explained(path: Path, doing: str, connection: apsw.Connection | None) -> Iterator[None]:
    """Turns what SQLite and the operating system raise into StorageError."""
    try:
        yield
    except apsw.Error as error:
        raise _storage_error(path, doing, error, _errno_of(connection, error)) from error
    except OSError as error:
        raise _storage_error(path, doing, error, error.errno or 0) from error


def _errno_of(connection: apsw.Connection | None, error: apsw.Error) -> int:
    """The operating system's error number behind an I/O error; 0 when there is none."""
    if connection is None or not isinstance(error, (apsw.IOError, apsw.CantOpenError, apsw.FullError)):
        return 0
    try:
        return connection.system_errno
    except apsw.ConnectionClosedError:
        return 0


_REASONS: tuple[tuple[type[apsw.Error], str], ...] = (
    (apsw.FullError, DISK_FULL),
    (apsw.ReadOnlyError, READ_ONLY),
    (apsw.PermissionsError, READ_ONLY),
    (apsw.CorruptError, CORRUPT),
    (apsw.NotADBError, CORRUPT),
    (apsw.BusyError, BUSY),
    (apsw.LockedError, BUSY),
    (apsw.CantOpenError, CANNOT_OPEN),
    (apsw.IOError, IO_ERROR),
)
_ERRNO_REASONS = {
    errno.ENOSPC: DISK_FULL,
    errno.EDQUOT: DISK_FULL,
    errno.EFBIG: DISK_FULL,
    errno.EROFS: READ_ONLY,
    errno.EACCES: READ_ONLY,
    errno.EPERM: READ_ONLY,
}
_HINTS = {
    DISK_FULL: "free some space in {folder}; nothing acknowledged is lost, and writing goes on when there is room",
    READ_ONLY: "make {folder} and the files in it writable for this user, or set another data folder",
    CANNOT_OPEN: "check that {folder} is a folder, and on a disk that is mounted",
    CORRUPT: "keep a copy of the file, move it away, and let the peers send its entries again",
    BUSY: "another process holds the file: end a second Mindstream on the same data folder",
    IO_ERROR: "the disk may be failing: look at the kernel's messages (`dmesg`)",
    REFUSED: "this is a mistake in Mindstream: please report it with this message",
}


def _storage_error(path: Path, doing: str, error: Exception, number: int) -> StorageError:
    reason = _ERRNO_REASONS.get(number) or next(
        (name for kind, name in _REASONS if isinstance(error, kind)),
        CANNOT_OPEN if isinstance(error, OSError) else REFUSED,
    )
    if reason == CANNOT_OPEN and path.parent.is_dir() and not os.access(path.parent, os.W_OK):
        reason = READ_ONLY
    text = str(error)
    if number and os.strerror(number) not in text:
        text += f": {os.strerror(number)}"
    return StorageError(
        f"{doing} ({path}): {reason}: {text}",
        hint=_HINTS[reason].format(folder=path.parent),
        field="path",
        reason=reason,
    )
