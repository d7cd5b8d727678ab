"""Databases: what is committed stays, what the disk refuses is said clearly, and the database goes on after it."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from edge.db import (
    BUSY,
    CANNOT_OPEN,
    CORRUPT,
    DISK_FULL,
    FOREIGN,
    HEALS,
    NEWER,
    READ_ONLY,
    Database,
    Schema,
    fetch_all,
    fetch_value,
    open_database,
)
from protocol.errors import StorageError
from tests.support.waiting import DEADLINE_S

NOTES = Schema("notes", 0x4D537431, ("CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT)",))


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    database = open_database(tmp_path / "notes.db", schema=NOTES)
    yield database
    database.close()


def add(database: Database, text: str) -> None:
    with database.transaction(f"adding {text[:20]!r} to") as connection:
        connection.execute("INSERT INTO notes (text) VALUES (?)", (text,))


def texts(database: Database) -> list[str]:
    with database.read() as connection:
        return [text for (text,) in fetch_all(connection, "SELECT text FROM notes ORDER BY id")]


def test_a_database_is_opened_in_wal_with_full_sync_and_secure_delete(db: Database) -> None:
    with db.transaction() as connection:
        settings = {
            name: fetch_value(connection, f"PRAGMA {name}")
            for name in ("journal_mode", "synchronous", "secure_delete", "foreign_keys", "temp_store", "application_id")
        }
    assert settings == {
        "journal_mode": "wal",
        "synchronous": 2,
        "secure_delete": 1,
        "foreign_keys": 1,
        "temp_store": 2,
        "application_id": NOTES.application_id,
    }


def test_a_committed_transaction_is_seen_by_readers_and_after_reopening(db: Database) -> None:
    add(db, "one")
    assert texts(db) == ["one"]
    db.close()
    again = open_database(db.path, schema=NOTES)
    assert texts(again) == ["one"]
    again.close()


def test_a_transaction_that_raises_leaves_nothing_and_the_database_goes_on(db: Database) -> None:
    def break_off() -> None:
        with db.transaction() as connection:
            connection.execute("INSERT INTO notes (text) VALUES ('lost')")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        break_off()
    add(db, "kept")
    assert texts(db) == ["kept"]


def test_a_reader_sees_one_state_while_a_writer_commits(db: Database) -> None:
    add(db, "one")
    with db.read() as connection:
        before = fetch_value(connection, "SELECT count(*) FROM notes")
        writer = threading.Thread(target=add, args=(db, "two"))
        writer.start()
        writer.join(DEADLINE_S)
        assert not writer.is_alive()
        assert fetch_value(connection, "SELECT count(*) FROM notes") == before
    assert len(texts(db)) == 2


def test_readers_cannot_write(db: Database) -> None:
    with pytest.raises(StorageError), db.read() as connection:
        connection.execute("INSERT INTO notes (text) VALUES ('no')")


def test_writes_of_many_threads_are_all_kept(db: Database) -> None:
    def write(number: int) -> None:
        for each in range(20):
            add(db, f"{number}-{each}")

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(texts(db)) == sorted(f"{number}-{each}" for number in range(8) for each in range(20))


def test_data_version_changes_with_a_commit_and_only_then(db: Database) -> None:
    before = db.data_version()
    texts(db)
    assert db.data_version() == before
    add(db, "one")
    assert db.data_version() != before


def test_migrations_are_applied_once_each_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "notes.db"
    first = open_database(path, schema=NOTES)
    add(first, "kept")
    first.close()
    newer = Schema(
        "notes", NOTES.application_id, (*NOTES.migrations, "ALTER TABLE notes ADD COLUMN tag TEXT DEFAULT 'x'")
    )
    for _ in range(2):
        database = open_database(path, schema=newer)
        with database.read() as connection:
            assert fetch_all(connection, "SELECT text, tag FROM notes") == [("kept", "x")]
        database.close()


def test_a_migration_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "notes.db"
    open_database(path, schema=NOTES).close()
    broken = Schema("notes", NOTES.application_id, (*NOTES.migrations, "DELETE FROM notes; CREATE TABLE notes (id)"))
    with pytest.raises(StorageError):
        open_database(path, schema=broken)
    database = open_database(path, schema=NOTES)
    with database.read() as connection:
        assert fetch_value(connection, "PRAGMA user_version") == 1
    database.close()


def test_a_file_of_a_newer_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.db"
    newer = Schema("notes", NOTES.application_id, (*NOTES.migrations, "CREATE TABLE more (id)"))
    open_database(path, schema=newer).close()
    before = path.read_bytes()
    with pytest.raises(StorageError, match="version 2") as caught:
        open_database(path, schema=NOTES)
    assert caught.value.reason == NEWER
    assert path.read_bytes() == before


def test_another_programs_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    other = apsw.Connection(str(path))
    other.execute("CREATE TABLE theirs (id)")
    other.close()
    with pytest.raises(StorageError) as caught:
        open_database(path, schema=NOTES)
    assert caught.value.reason == FOREIGN


def test_a_file_that_is_no_database_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "notes.db"
    path.write_bytes(b"this is not a database at all, but a text of some length\n" * 100)
    with pytest.raises(StorageError) as caught:
        open_database(path, schema=NOTES)
    assert caught.value.reason == CORRUPT
    assert caught.value.reason not in HEALS
    assert str(path) in caught.value.message
    assert caught.value.hint


def test_a_damaged_page_is_reported_as_damage(tmp_path: Path) -> None:
    path = tmp_path / "notes.db"
    database = open_database(path, schema=NOTES)
    for number in range(200):
        add(database, f"{number} " * 200)
    database.close()
    damaged = bytearray(path.read_bytes())
    damaged[4096 : 4096 * 40] = b"\xa5" * (4096 * 39)
    path.write_bytes(damaged)
    database = open_database(path, schema=NOTES)
    with pytest.raises(StorageError) as caught:
        texts(database)
    assert caught.value.reason == CORRUPT
    database.close()


def test_a_path_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught:
        open_database(tmp_path, schema=NOTES)
    assert caught.value.reason == CANNOT_OPEN


def test_missing_folders_are_made(tmp_path: Path) -> None:
    database = open_database(tmp_path / "a" / "b" / "notes.db", schema=NOTES)
    add(database, "one")
    database.close()


def test_another_process_that_holds_the_file_is_named_busy(tmp_path: Path, db: Database) -> None:
    impatient = open_database(db.path, schema=NOTES, busy_timeout_ms=50)
    with db.transaction(), pytest.raises(StorageError) as caught, impatient.transaction():
        pass
    assert caught.value.reason == BUSY
    add(impatient, "after")
    assert texts(db) == ["after"]
    impatient.close()


OPEN_AND_WRITE = """
import sys
from pathlib import Path
from edge.db import Schema, open_database
schema = Schema("notes", 0x4D537431, ("CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT)",))
sys.stdin.readline()
database = open_database(Path(sys.argv[1]), schema=schema)
for number in range(50):
    with database.transaction() as connection:
        connection.execute("INSERT INTO notes (text) VALUES (?)", (f"{sys.argv[2]}-{number}",))
database.close()
"""


def test_processes_that_open_a_new_file_at_once_all_succeed(tmp_path: Path) -> None:
    path = tmp_path / "notes.db"
    children = [
        subprocess.Popen([sys.executable, "-c", OPEN_AND_WRITE, str(path), str(number)], stdin=subprocess.PIPE)
        for number in range(4)
    ]
    for child in children:
        assert child.stdin is not None
        child.stdin.write(b"go\n")
        child.stdin.close()
    assert [child.wait(120) for child in children] == [0] * 4
    database = open_database(path, schema=NOTES)
    assert sorted(texts(database)) == sorted(f"{number}-{each}" for number in range(4) for each in range(50))
    database.close()


def test_erased_text_is_not_left_in_the_files(db: Database) -> None:
    secret = "unlikely-words-" * 1000  # several pages: they go to the freelist
    add(db, secret)
    with db.transaction() as connection:
        connection.execute("DELETE FROM notes")
    db.checkpoint()
    for file in db.path.parent.iterdir():
        assert b"unlikely-words" not in file.read_bytes(), file


def test_a_checkpoint_that_a_reader_holds_up_is_reported(tmp_path: Path) -> None:
    database = open_database(tmp_path / "notes.db", schema=NOTES, busy_timeout_ms=50)
    add(database, "one")
    with database.read() as connection:
        fetch_value(connection, "SELECT count(*) FROM notes")
        with pytest.raises(StorageError) as caught:
            database.checkpoint()
    assert caught.value.reason == BUSY
    database.checkpoint()
    assert not Path(f"{database.path}-wal").stat().st_size
    database.close()


def test_a_commit_delay_makes_every_commit_take_longer(tmp_path: Path) -> None:
    database = open_database(tmp_path / "notes.db", schema=NOTES, commit_delay_ms=30)
    began_s = time.monotonic()
    for _ in range(3):
        add(database, "slow")
    assert time.monotonic() - began_s >= 0.09
    database.close()


def test_a_closed_database_says_so_and_closes_again_quietly(db: Database) -> None:
    db.close()
    db.close()
    with pytest.raises(StorageError):
        add(db, "late")


FILL_THE_DISK = """
import resource, sys
from pathlib import Path
from edge.db import DISK_FULL, Schema, fetch_value, open_database
from protocol.errors import StorageError
schema = Schema("notes", 0x4D537431, ("CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT)",))
database = open_database(Path(sys.argv[1]), schema=schema)
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
kept = 0
try:
    while True:
        with database.transaction("adding a note to") as connection:
            connection.execute("INSERT INTO notes (text) VALUES (?)", ("x" * 20_000,))
        kept += 1
except StorageError as error:
    assert error.reason == DISK_FULL, error
    assert "adding a note" in error.message and sys.argv[1] in error.message and error.hint, error
with database.read() as connection:
    assert fetch_value(connection, "SELECT count(*) FROM notes") == kept
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
with database.transaction() as connection:
    connection.execute("INSERT INTO notes (text) VALUES ('room again')")
database.close()
print(kept)
"""


def test_a_limit_on_file_sizes_is_a_full_disk_and_writing_goes_on_when_it_is_lifted(tmp_path: Path) -> None:
    path = tmp_path / "notes.db"
    child = subprocess.run(
        [sys.executable, "-c", FILL_THE_DISK, str(path)],
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
    )
    assert child.returncode == 0, child.stderr
    database = open_database(path, schema=NOTES)
    assert len(texts(database)) == int(child.stdout) + 1
    database.close()
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True
        ).returncode
    )
    if not mounted:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_loses_nothing_committed_and_heals_when_there_is_room(small_disk: Path) -> None:
    database = open_database(small_disk / "notes.db", schema=NOTES)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(600_000))
    kept = 0

    def fill() -> None:
        nonlocal kept
        while kept < 1000:
            add(database, "x" * 10_000)
            kept += 1

    with pytest.raises(StorageError) as caught:
        fill()
    assert caught.value.reason == DISK_FULL
    assert caught.value.reason in HEALS
    assert str(small_disk) in caught.value.hint
    assert len(texts(database)) == kept
    ballast.unlink()
    add(database, "room again")
    assert texts(database)[-1] == "room again"
    assert len(texts(database)) == kept + 1
    database.close()


def test_a_read_only_disk_is_named(small_disk: Path) -> None:
    database = open_database(small_disk / "notes.db", schema=NOTES)
    database.close()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for name in ("notes.db", "new.db"):
        with pytest.raises(StorageError) as caught:
            open_database(small_disk / name, schema=NOTES)
        assert caught.value.reason == READ_ONLY
        assert str(small_disk) in caught.value.hint


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes through a read-only folder; the tmpfs test covers root")
def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o555)
    with pytest.raises(StorageError) as caught:
        open_database(folder / "notes.db", schema=NOTES)
    assert caught.value.reason == READ_ONLY
