"""A broker that loses what it holds for a client: said once, and what was missed is repaired."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from broker.mosquitto import INSTALL_HINT, MosquittoBroker, find_mosquitto
from protocol.messages import MemoryPut, ServiceState
from tests.support.nodes import MEMORY_SERVICES, Node, Watcher, kill_broker, two_nodes, wait_for
from tests.support.waiting import TTL_MS

QUEUE = 10


@pytest.fixture(autouse=True)
def needs_mosquitto() -> None:
    if find_mosquitto() is None:
        pytest.skip(f"Mosquitto is not installed: {INSTALL_HINT}")


class SmallQueue(MosquittoBroker):
    """Mosquitto that keeps few messages for a client that is away, as its default keeps a thousand."""

    def _command(self, port: int) -> list[str]:
        command = super()._command(port)
        config = Path(command[-1])
        limit = f"max_queued_messages {QUEUE}\nlog_type notice"
        text, found = re.subn(r"^max_queued_messages .*$", limit, config.read_text(), flags=re.MULTILINE)
        assert found == 1
        config.write_text(text)
        return command


def put(watcher: Watcher, count: int, prefix: str) -> set[str]:
    """Ids of ``count`` memories that tomato has acknowledged, one after the other: each is said by itself."""
    return {watcher.bus.ask("tomato", MemoryPut(f"{prefix} {n}"), ttl_ms=TTL_MS).id for n in range(count)}


def wait_equal(node: Node, acknowledged: set[str]) -> None:
    def held() -> set[str]:
        return {identifier for identifier, _ in node.memories()}

    wait_for(lambda: held() >= acknowledged, f"{node.name} lacks memories")
    assert len(node.memories()) == len(acknowledged), "each is there once"


def test_a_service_whose_session_was_lost_says_so_once_and_gets_what_it_missed(tmp_path: Path) -> None:
    folder = tmp_path / "mosquitto"
    with MosquittoBroker(data_folder=folder) as broker, two_nodes(tmp_path, broker.url) as (tomato, sprout):
        watcher = Watcher(broker.url)
        try:
            for node in (tomato, sprout):
                watcher.wait_ready(node.name, MEMORY_SERVICES)
            acknowledged = put(watcher, 10, "before")
            wait_equal(sprout, acknowledged)
            store = watcher.pid("sprout", "memory_store")
            os.kill(store, signal.SIGSTOP)
            try:
                acknowledged |= put(watcher, 30, "while it hears nothing")
                kill_broker(broker)
                (folder / "mosquitto.db").unlink(missing_ok=True)
                broker.start()
            finally:
                os.kill(store, signal.SIGCONT)
            wait_equal(sprout, acknowledged)

            def said() -> ServiceState | None:
                state = watcher.services.get(("sprout", "memory_store"))
                return state if state and state.state == "ready" and "sessions_lost" in state.counters else None

            wait_for(said, "sprout's store says that its session was lost")
            state = said()
            assert state is not None
            assert state.pid == store, "it lived on"
            assert state.counters["sessions_lost"] == state.counters["event.session-lost"] == 1
        finally:
            watcher.bus.stop()


def test_what_a_full_queue_at_the_broker_dropped_is_fetched(tmp_path: Path) -> None:
    log = tmp_path / "mosquitto.log"
    broker = SmallQueue(data_folder=tmp_path / "mosquitto", log_path=log)
    with broker, two_nodes(tmp_path, broker.url) as (tomato, sprout):
        watcher = Watcher(broker.url)
        try:
            for node in (tomato, sprout):
                watcher.wait_ready(node.name, MEMORY_SERVICES)
            assert sprout.stop() == 0
            acknowledged = put(watcher, 4 * QUEUE, "while it is away")
            wait_for(
                lambda: "being dropped for client mindstream-sprout-memory_store" in log.read_text(),
                "the broker drops what is above its limit",
            )
            sprout.start()
            wait_equal(sprout, acknowledged)
        finally:
            watcher.bus.stop()
