"""kill -9 at random moments: what was acknowledged is there exactly once, and the log goes on."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from edge.db import fetch_all, open_database
from protocol.entries import GENESIS, Origin, entry_hash, verify
from protocol.identity import Identity, Keyring
from services.memory_store.chain import MEMORY_LOG_SCHEMA
from services.memory_store.log import MemoryLog
from tests.support.waiting import DEADLINE_S

SEED = bytes(range(32))

PUT_FOR_EVER = """
import sys
from pathlib import Path
from types import SimpleNamespace
from edge.db import open_database
from protocol.identity import Identity, Keyring
from protocol.ids import uuid7
from protocol.messages import MemoryPut, MemoryStored
from services.memory_store.log import MEMORY_LOG_SCHEMA, MemoryLog
identity = Identity("tomato", bytes(range(32)))
log = MemoryLog(open_database(Path(sys.argv[1]), schema=MEMORY_LOG_SCHEMA), identity, Keyring, machine=b"m")
batch = int(sys.argv[2])
while True:
    puts = [SimpleNamespace(id=uuid7(), source="tomato/x", data=MemoryPut(text="word " * 20)) for _ in range(batch)]
    for stored in log.put_many(puts):
        assert isinstance(stored, MemoryStored) and not stored.already
        sys.stdout.write(stored.id + "\\n")
    sys.stdout.flush()
"""


@pytest.mark.parametrize("seed", [1, 2])
def test_every_acknowledged_put_survives_kill_9_exactly_once(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    path = tmp_path / "memory.db"
    acknowledged: list[str] = []
    for _ in range(4):
        child = subprocess.Popen(
            [sys.executable, "-c", PUT_FOR_EVER, str(path), str(chance.choice([1, 7, 64]))],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None
        for _ in range(chance.randint(1, 150)):
            acknowledged.append(child.stdout.readline().strip())
        child.kill()
        # What it had said before it died counts too; a line cut short by the kill was not said.
        acknowledged += [line.strip() for line in child.stdout if line.endswith("\n")]
        child.wait(DEADLINE_S)
        child.stdout.close()

    database = open_database(path, schema=MEMORY_LOG_SCHEMA)
    with database.read() as connection:
        found = [identifier for (identifier,) in fetch_all(connection, "SELECT id FROM memories")]
    assert len(found) == len(set(found))
    assert set(acknowledged) <= set(found)
    assert len(acknowledged) == len(set(acknowledged)) > 4

    identity = Identity("tomato", SEED)
    keyring = Keyring({"tomato": identity.fingerprint})
    log = MemoryLog(database, identity, lambda: keyring, machine=b"m")
    (frontier,) = log.vector().origins
    prev, seq = GENESIS, 0
    while seq < frontier.seq:
        for entry in log.range(Origin("tomato", "everyone", log.log_id), seq + 1, frontier.seq).entries:
            header = verify(entry, keyring)
            assert (header.seq, header.prev) == (seq + 1, prev)
            prev, seq = entry_hash(entry.header), header.seq
    assert prev == frontier.hash
    assert seq == len(found)
    database.close()
