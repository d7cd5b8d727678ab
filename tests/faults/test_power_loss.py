"""Power loss at random moments: what was acknowledged is there. A control shows that the harness can fail."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from edge.db import fetch_all, fetch_value, open_database
from protocol.entries import GENESIS, Origin, entry_hash, verify
from protocol.errors import StorageError
from protocol.identity import Identity, Keyring
from protocol.ids import uuid7
from protocol.messages import MemoryPut, MemoryStored
from services.memory_store.chain import MEMORY_LOG_SCHEMA
from services.memory_store.log import MemoryLog
from tests.faults.power_vfs import PowerVFS, Survives, nothing_unsynced, some_unsynced

IDENTITY = Identity("tomato", bytes(range(32)))
KEYRING = Keyring({"tomato": IDENTITY.fingerprint})
FILE = "memory.db"


class Cut:
    """What a power cut at one moment left, and what had been acknowledged by then."""

    def __init__(self, files: dict[str, bytes], acknowledged: list[str], what: str) -> None:
        self.files = files
        self.acknowledged = acknowledged
        self.what = what


def run_puts(folder: Path, seed: int, pragma: str = "") -> list[Cut]:
    """Put memories on a watched disk, in batches of chance, and cut the power at moments of chance.

    Args:
        pragma: changed on the writer before the first put; for the control.
    """
    chance = random.Random(seed)
    vfs = PowerVFS(f"power-{folder.name}-{seed}")
    acknowledged: list[str] = []
    cuts: list[Cut] = []

    def cut_now_and_then() -> None:
        if chance.random() < 0.03:
            what = f"seed {seed}, cut {len(cuts)}"
            survives = nothing_unsynced if chance.random() < 0.4 else some_unsynced(chance)
            cuts.append(Cut(vfs.survivors(survives), list(acknowledged), what))

    vfs.before_change = cut_now_and_then
    database = open_database(folder / "watched" / FILE, schema=MEMORY_LOG_SCHEMA, vfs=vfs.name)
    log = MemoryLog(database, IDENTITY, lambda: KEYRING, machine=b"m")
    with database.transaction() as connection:
        # Small, so that the WAL begins anew and is written over often.
        fetch_all(connection, "PRAGMA wal_autocheckpoint = 30")
    if pragma:
        fetch_all(database._writer, pragma)
    for _ in range(40):
        puts = [
            SimpleNamespace(id=uuid7(), source="tomato/x", data=MemoryPut(text="word " * chance.choice([1, 20, 3000])))
            for _ in range(chance.randint(1, 6))
        ]
        for stored in log.put_many(puts):
            assert isinstance(stored, MemoryStored)
            acknowledged.append(stored.id)
        # The moment after the acknowledgement, before the disk is touched again, is the hardest.
        cut_now_and_then()
        if chance.random() < 0.1:
            database.checkpoint()
    vfs.before_change = lambda: None
    database.close()
    vfs.unregister()
    return cuts


def lost_after(cut: Cut, folder: Path) -> set[str]:
    """Acknowledged memories that are gone after a cut. Asserts all else: it opens, is sound, and goes on."""
    folder.mkdir()
    for name, content in cut.files.items():
        (folder / name).write_bytes(content)
    database = open_database(folder / FILE, schema=MEMORY_LOG_SCHEMA)
    try:
        with database.read() as connection:
            assert fetch_value(connection, "PRAGMA integrity_check") == "ok", cut.what
            found = {identifier for (identifier,) in fetch_all(connection, "SELECT id FROM memories")}
        log = MemoryLog(database, IDENTITY, lambda: KEYRING, machine=b"m")
        prev = GENESIS
        for frontier in log.vector().origins:
            entries = log.range(Origin("tomato", "everyone", frontier.log_id), 1, frontier.seq, 10**9).entries
            assert len(entries) == frontier.seq == len(found), cut.what
            for entry in entries:
                assert verify(entry, KEYRING).prev == prev, cut.what
                prev = entry_hash(entry.header)
            assert prev == frontier.hash, cut.what
        put = SimpleNamespace(id=uuid7(), source="tomato/x", data=MemoryPut(text="after the cut"))
        assert isinstance(log.put_many([put])[0], MemoryStored), cut.what
        return set(cut.acknowledged) - found
    finally:
        database.close()


@pytest.mark.parametrize("seed", range(3))
def test_acknowledged_memories_survive_power_loss_at_any_moment(tmp_path: Path, seed: int) -> None:
    cuts = run_puts(tmp_path, seed)
    assert len(cuts) > 10
    assert sum(1 for cut in cuts if cut.acknowledged) > 5
    for number, cut in enumerate(cuts):
        assert lost_after(cut, tmp_path / str(number)) == set(), cut.what


@pytest.mark.parametrize("survives", [nothing_unsynced, some_unsynced(random.Random(1))], ids=["nothing", "some"])
def test_power_loss_while_the_file_is_made_leaves_one_that_opens(tmp_path: Path, survives: Survives) -> None:
    cuts = cuts_while_opening(tmp_path, survives)
    assert len(cuts) > 10
    for number, cut in enumerate(cuts):
        assert lost_after(cut, tmp_path / f"cut {number}") == set()


def cuts_while_opening(folder: Path, survives: Survives) -> list[Cut]:
    """A cut at every change that making a new database file takes."""
    vfs = PowerVFS(f"power-{folder.name}")
    cuts: list[Cut] = []

    def cut() -> None:
        cuts.append(Cut(vfs.survivors(survives), [], f"change {len(cuts)}"))

    vfs.before_change = cut
    open_database(folder / "watched" / FILE, schema=MEMORY_LOG_SCHEMA, vfs=vfs.name).close()
    vfs.before_change = lambda: None
    vfs.unregister()
    return cuts


@pytest.mark.parametrize("pragma", ["PRAGMA synchronous = NORMAL", "PRAGMA synchronous = OFF"])
def test_control_without_full_sync_the_same_harness_loses_acknowledged_memories(tmp_path: Path, pragma: str) -> None:
    lost: set[str] = set()
    damaged = 0
    for number, cut in enumerate(run_puts(tmp_path, seed=0, pragma=pragma)):
        try:
            lost |= lost_after(cut, tmp_path / str(number))
        except (StorageError, AssertionError):
            # Without any sync the file may not even be sound; with NORMAL it always is.
            damaged += 1
    assert lost
    assert not damaged or "OFF" in pragma
