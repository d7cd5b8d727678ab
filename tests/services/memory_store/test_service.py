"""The memory store as a process: full disks, read-only folders, damaged files, wrong clocks, private memories."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from broker.base import Broker
from broker.embedded import EmbeddedBroker
from edge.bus import Bus
from protocol.clock import pack, time_ms_of
from protocol.entries import GENESIS, MemoryContent, Origin, SignedEntry, entry_hash, read_header, seal
from protocol.errors import NotFound, StorageError
from protocol.identity import Identity
from protocol.ids import uuid7
from protocol.messages import (
    MemoryEntries,
    MemoryPut,
    MemoryRecall,
    MemoryRecalled,
    MemoryRepair,
    MemoryStored,
    MemoryVector,
    MemoryVectorAsk,
)
from tests.support.nodes import CHECKOUT, MEMORY_SERVICES, Node, Watcher, two_nodes, wait_for
from tests.support.waiting import DEADLINE_S, TTL_MS

SERVICE = "memory_store"

DAY_MS = 24 * 3600 * 1000


def recall_texts(bus: Bus, node: str, query: str) -> list[str]:
    found: MemoryRecalled = bus.ask(node, MemoryRecall(query, limit=10), ttl_ms=TTL_MS)
    return [hit.text for hit in found.hits]


@contextmanager
def running(node: Node, watcher: Watcher) -> Iterator[Node]:
    """``node`` started, and stopped at the end."""
    node.start()
    try:
        watcher.wait_ready(node.name, (SERVICE,))
        yield node
    finally:
        if node.process is not None and node.process.poll() is None:
            node.stop()


@contextmanager
def watching(broker: Broker) -> Iterator[Watcher]:
    watcher = Watcher(broker.url)
    try:
        yield watcher
    finally:
        watcher.bus.stop()


def test_what_is_put_on_one_node_is_recalled_on_the_other(broker: Broker, tmp_path: Path) -> None:
    with watching(broker) as watcher, two_nodes(tmp_path, broker.url) as nodes:
        for node in nodes:
            watcher.wait_ready(node.name, MEMORY_SERVICES)
        stored: MemoryStored = watcher.bus.ask("tomato", MemoryPut("The ladder is in the shed"), ttl_ms=TTL_MS)
        assert (stored.node, stored.seq, stored.already) == ("tomato", 1, False)
        wait_for(lambda: recall_texts(watcher.bus, "sprout", "where is the ladder"), "it was not recalled on sprout")
        found: MemoryRecalled = watcher.bus.ask("sprout", MemoryRecall("ladder"), ttl_ms=TTL_MS)
        assert [(hit.id, hit.node, hit.text) for hit in found.hits] == [
            (stored.id, "tomato", "The ladder is in the shed")
        ]
        # The other way round as well, and the same id put again is the same memory.
        watcher.bus.ask("sprout", MemoryPut("The hammer is on the roof"), ttl_ms=TTL_MS)
        again: MemoryStored = watcher.bus.ask(
            "tomato", MemoryPut("The ladder is in the shed", id=stored.id), ttl_ms=TTL_MS
        )
        assert (again.seq, again.already) == (1, True)
        wait_for(lambda: recall_texts(watcher.bus, "tomato", "hammer"), "it was not recalled on tomato")
        assert len({watcher.details(node.name, SERVICE)["log_id"] for node in nodes}) == 2


def test_a_private_memory_never_leaves_its_node(broker: Broker, tmp_path: Path) -> None:
    said: list[bytes] = []
    with watching(broker) as watcher, two_nodes(tmp_path, broker.url) as (tomato, sprout):
        for node in (tomato, sprout):
            watcher.wait_ready(node.name, MEMORY_SERVICES)
        with Bus(url=broker.url, node="tomato", client="owner") as owner:
            private: MemoryStored = owner.ask(
                "tomato", MemoryPut("my secret is quince", scope="private"), ttl_ms=TTL_MS
            )
            watcher.bus.watch("#", lambda _topic, payload: said.append(payload))
            watcher.bus.wait_subscribed(DEADLINE_S)
            watcher.bus.ask("tomato", MemoryPut("quince jam is for everyone"), ttl_ms=TTL_MS)
            wait_for(lambda: len(sprout.memories()) == 1, "the public one did not arrive")
            assert [text for _, text in sprout.memories()] == ["quince jam is for everyone"]
            assert not any(b"my secret" in payload for payload in said)
            vector: MemoryVector = watcher.bus.ask("tomato", MemoryVectorAsk(), ttl_ms=TTL_MS)
            assert {origin.scope for origin in vector.origins} == {"everyone"}
            with pytest.raises(NotFound):
                watcher.bus.ask("tomato", MemoryRepair("tomato", "private", private.log_id, 1, 1), ttl_ms=TTL_MS)
            # Its own node finds it; another that asks does not.
            assert "my secret is quince" in recall_texts(owner, "tomato", "quince")
            assert recall_texts(watcher.bus, "tomato", "quince") == ["quince jam is for everyone"]


def entries_of(identity: Identity, count: int, hlc_ms: int) -> list[SignedEntry]:
    """A log of ``identity``, stamped from ``hlc_ms`` on."""
    origin = Origin(identity.node, "everyone", uuid7())
    entries: list[SignedEntry] = []
    for number in range(count):
        content = MemoryContent(
            text=f"pear {number}", time_us=hlc_ms * 1000, role="note", conversation="", source=f"{identity.node}/cli"
        )
        prev = entry_hash(entries[-1].header) if entries else GENESIS
        stamp = pack(hlc_ms + number, 0)
        entries.append(
            seal(identity, content, origin=origin, seq=number + 1, prev=prev, hlc=stamp, id=uuid7(), clock_synced=False)
        )
    return entries


def test_a_node_whose_clock_is_a_day_ahead_is_heard_and_moves_no_other_clock(broker: Broker, tmp_path: Path) -> None:
    pear = Identity.generate("pear")
    node = Node(tmp_path, "tomato", broker.url, (SERVICE,))
    node.peers.trust("pear", pear.fingerprint)
    with watching(broker) as watcher, running(node, watcher):
        ahead_ms = time.time_ns() // 1_000_000 + DAY_MS
        with Bus(url=broker.url, node="pear", client=SERVICE) as bus:
            bus.say(MemoryEntries(entries=entries_of(pear, 3, ahead_ms)))
            bus.flush()
        wait_for(lambda: len(node.memories()) == 3, "its entries were not stored")

        def skew_ms() -> int:
            found: int = watcher.details("tomato", SERVICE).get("skew_ms", {}).get("pear", 0)
            return found

        wait_for(lambda: skew_ms() > 0, "the skew is not shown")
        assert abs(skew_ms() - DAY_MS) < 600_000
        stored: MemoryStored = watcher.bus.ask("tomato", MemoryPut("after the pear"), ttl_ms=TTL_MS)
        own: MemoryEntries = watcher.bus.ask(
            "tomato", MemoryRepair("tomato", "everyone", stored.log_id, stored.seq, stored.seq), ttl_ms=TTL_MS
        )
        stamp_ms = time_ms_of(read_header(own.entries[0]).hlc)
        assert abs(stamp_ms - time.time_ns() // 1_000_000) < 600_000


# --- the disk -------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, size_mib: int) -> Iterator[Callable[[str], None]]:
    """A file system of its own on ``folder``; gives a function that mounts it anew with options."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "mindstream-test", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting a small file system is not allowed here: {mounted.stderr.strip()}")

    def remount(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)

    try:
        yield remount
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_on_a_full_disk_puts_are_refused_with_the_file_named_and_go_on_when_there_is_room(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, 40), EmbeddedBroker() as broker, watching(broker) as watcher:
        node = Node(disk, "tomato", broker.url, (SERVICE,))
        with running(node, watcher):
            pid = watcher.pid("tomato", SERVICE)
            kept = {watcher.bus.ask("tomato", MemoryPut("before"), ttl_ms=TTL_MS).id}
            filler = disk / "filler"
            with filler.open("wb") as file:
                while True:
                    try:
                        file.write(b"\0" * 65_536)
                        file.flush()
                    except OSError:
                        break
            refused: list[StorageError] = []

            def put(number: int) -> None:
                try:
                    stored = watcher.bus.ask("tomato", MemoryPut(f"{number} " + "word " * 10_000), ttl_ms=TTL_MS)
                    kept.add(stored.id)
                except StorageError as error:
                    refused.append(error)

            # Some may still find room in what the database has allocated.
            for number in range(200):
                put(number)
                if len(refused) == 3:
                    break
            assert len(refused) == 3, "the disk never became full"
            for error in refused:
                assert "memory.db" in error.message
                assert "disk full" in error.message
                assert "free some space" in error.hint
                assert str(node.data_dir / SERVICE) in error.hint
            assert recall_texts(watcher.bus, "tomato", "before") == ["before"], "reading needs no room"
            filler.unlink()
            after = watcher.bus.ask("tomato", MemoryPut("after"), ttl_ms=TTL_MS)
            kept.add(after.id)
            assert watcher.pid("tomato", SERVICE) == pid, "the service was started again"
            assert {identifier for identifier, _ in node.memories()} == kept
        assert node.process is not None
        assert node.process.returncode == 0


def test_a_read_only_folder_is_named_with_what_to_do(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, 40) as remount:
        node = Node(disk, "tomato", "mqtt://127.0.0.1:1", (SERVICE,))
        remount("ro")
        ended = subprocess.run(
            [sys.executable, "-m", "edge.service", SERVICE, "--config", str(node.config)],
            cwd=CHECKOUT,
            capture_output=True,
            text=True,
            timeout=2 * DEADLINE_S,
        )
        assert ended.returncode == 1
        assert "Traceback" not in ended.stderr
        assert str(node.data_dir) in ended.stderr
        assert "ead-only file system" in ended.stderr
        assert "node.data_dir" in ended.stderr or "writable" in ended.stderr


def test_a_file_that_is_no_database_stops_the_store_with_its_reason_and_is_left_as_it_is(tmp_path: Path) -> None:
    limits = "[supervisor]\nrestart_limit = 1\nbackoff_first_s = 0.05\n"
    with EmbeddedBroker() as broker, watching(broker) as watcher:
        node = Node(tmp_path, "tomato", broker.url, MEMORY_SERVICES, limits)
        path = node.data_dir / SERVICE / "memory.db"
        path.parent.mkdir(parents=True)
        rubbish = b"this is not a database at all. " * 1_000
        path.write_bytes(rubbish)
        node.start()
        try:
            wait_for(lambda: watcher.state("tomato", SERVICE) == "failed", "the store was not given up")
            reason = watcher.services["tomato", SERVICE].reason
            assert str(path) in reason
            assert "keep a copy of the file" in reason
            watcher.wait_ready("tomato", ("sync_bridge",))
            assert path.read_bytes() == rubbish
        finally:
            assert node.stop() == 0


def test_memories_that_were_committed_and_not_said_are_said_after_a_restart(tmp_path: Path) -> None:
    with EmbeddedBroker() as broker, watching(broker) as watcher:
        node = Node(tmp_path, "tomato", broker.url, (SERVICE,))
        heard: list[str] = []
        watcher.bus.hear(MemoryEntries, lambda message: heard.extend(entry_ids(message.data)), node="tomato")
        watcher.bus.wait_subscribed(DEADLINE_S)
        with running(node, watcher), ThreadPoolExecutor(8) as pool:
            puts = [MemoryPut(f"memory {number}", id=uuid7()) for number in range(200)]

            def put(each: MemoryPut) -> str:
                stored: MemoryStored = watcher.bus.ask("tomato", each, ttl_ms=TTL_MS)
                return stored.id

            acknowledged = [pool.submit(put, each) for each in puts]
            wait_for(lambda: sum(each.done() for each in acknowledged) > 50, "nothing was acknowledged")
            os.kill(watcher.pid("tomato", SERVICE), signal.SIGKILL)
            identifiers = {each.result() for each in acknowledged}
            wait_for(lambda: set(heard) >= identifiers, "some were never said")


def entry_ids(entries: MemoryEntries) -> list[str]:
    return [read_header(entry).id for entry in entries.entries]
