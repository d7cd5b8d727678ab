"""The sync bridge as a process: absence, distrust, and an origin that was copied."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from broker.base import Broker
from broker.embedded import EmbeddedBroker
from protocol.messages import MemoryPut, MemoryStored
from tests.support.nodes import MEMORY_SERVICES, Node, Watcher, kill_broker, two_nodes, wait_for
from tests.support.waiting import TTL_MS

PUTS = 500


@pytest.fixture
def watcher(broker: Broker) -> Iterator[Watcher]:
    found = Watcher(broker.url)
    yield found
    found.bus.stop()


def put_many(watcher: Watcher, node: str, count: int, prefix: str = "memory") -> set[str]:
    """Ids of ``count`` memories that ``node`` has acknowledged."""

    def put(number: int) -> str:
        stored: MemoryStored = watcher.bus.ask(node, MemoryPut(f"{prefix} {number}"), ttl_ms=TTL_MS)
        return stored.id

    with ThreadPoolExecutor(8) as pool:
        return set(pool.map(put, range(count)))


def held(node: Node) -> set[str]:
    return {identifier for identifier, _ in node.memories()}


def peers_seen_by(watcher: Watcher, node: str) -> dict[str, Any]:
    """What the bridge of ``node`` shows of the others."""
    state = watcher.services.get((node, "sync_bridge"))
    return dict(state.details.get("peers", {})) if state else {}


@contextmanager
def untrusting(folder: Path, broker: Broker) -> Iterator[tuple[Node, Node]]:
    """``tomato`` and ``sprout``; sprout does not know tomato's key."""
    nodes = tuple(Node(folder, name, broker.url, MEMORY_SERVICES) for name in ("tomato", "sprout"))
    nodes[0].trust(nodes[1])
    try:
        for node in nodes:
            node.start()
        yield nodes[0], nodes[1]
    finally:
        for node in nodes:
            if node.process is not None and node.process.poll() is None:
                node.stop()


def test_a_node_that_was_away_for_500_memories_catches_up_from_a_broker_that_remembers_nothing(
    broker: Broker, watcher: Watcher, tmp_path: Path
) -> None:
    with two_nodes(tmp_path, broker.url) as (tomato, sprout):
        for node in (tomato, sprout):
            watcher.wait_ready(node.name, MEMORY_SERVICES)
        first = put_many(watcher, "tomato", 1)
        wait_for(lambda: held(sprout) == first, "sprout never had the first one")
        assert sprout.stop() == 0
        acknowledged = first | put_many(watcher, "tomato", PUTS)

        def all_said() -> bool:
            store = watcher.details("tomato", "memory_store")
            return store.get("memories") == PUTS + 1 and store.get("unpublished") == 0

        wait_for(all_said, "tomato's store does not say that all is published")
        kill_broker(broker)
        for file in tmp_path.glob("mosquitto/*.db"):
            file.unlink()  # what a Mosquitto keeps for its clients: it shall have nothing for sprout
        broker.start()
        sprout.start()
        wait_for(lambda: held(sprout) >= acknowledged, "sprout did not catch up")
        assert len(sprout.memories()) == len(acknowledged) == PUTS + 1
        wait_for(
            lambda: peers_seen_by(watcher, "sprout").get("tomato", {}).get("fetched", 0) == PUTS,
            "sprout's bridge does not show that it fetched them",
        )
        wait_for(
            lambda: all(
                peers_seen_by(watcher, node).get(other, {}).get("in_step")
                for node, other in (("tomato", "sprout"), ("sprout", "tomato"))
            ),
            "they are not shown as in step",
        )


def test_entries_of_a_node_that_is_not_trusted_are_refused_and_said_and_come_once_it_is(
    broker: Broker, watcher: Watcher, tmp_path: Path
) -> None:
    with untrusting(tmp_path, broker) as (tomato, sprout):
        for node in (tomato, sprout):
            watcher.wait_ready(node.name, MEMORY_SERVICES)
        acknowledged = put_many(watcher, "tomato", 20)
        wait_for(lambda: watcher.events_of("sprout", "unknown-peer"), "the refusal was not said")
        event = watcher.events_of("sprout", "unknown-peer")[0]
        assert "tomato" in event.text
        assert "mindstream keys trust" in event.text
        wait_for(
            lambda: peers_seen_by(watcher, "sprout").get("tomato", {}).get("waiting_for"),
            "the bridge does not show what it waits for",
        )
        assert held(sprout) == set()
        pids = {service: watcher.pid("sprout", service) for service in MEMORY_SERVICES}
        sprout.trust(tomato)
        wait_for(lambda: held(sprout) == acknowledged, "trust had no effect")
        assert pids == {service: watcher.pid("sprout", service) for service in MEMORY_SERVICES}
        wait_for(lambda: peers_seen_by(watcher, "sprout")["tomato"]["in_step"], "they are not shown as in step")
        assert "waiting_for" not in peers_seen_by(watcher, "sprout")["tomato"]


def test_a_copied_data_folder_is_a_fork_that_is_said_and_takes_nothing_away(tmp_path: Path) -> None:
    with EmbeddedBroker() as broker:
        watcher = Watcher(broker.url)
        tomato, sprout = (Node(tmp_path, name, broker.url, MEMORY_SERVICES) for name in ("tomato", "sprout"))
        tomato.trust(sprout)
        sprout.trust(tomato)
        started: list[Node] = []

        def start(node: Node) -> None:
            node.start()
            started.append(node)
            watcher.wait_ready(node.name, MEMORY_SERVICES)

        try:
            start(tomato)
            start(sprout)
            common = put_many(watcher, "tomato", 3, "common")
            tomato.stop()
            shutil.copytree(tomato.data_dir, tmp_path / "copy")
            tomato.start()
            original = put_many(watcher, "tomato", 3, "original")
            wait_for(lambda: held(sprout) >= common | original, "sprout never had the original's")
            tomato.stop()
            sprout_before = held(sprout)
            # A node of the same name, key and log goes on from the copy: other entries under the same numbers, and
            # more of them, so that it seems to lack nothing. Sprout is away meanwhile.
            sprout.stop()
            shutil.rmtree(tomato.data_dir)
            shutil.move(tmp_path / "copy", tomato.data_dir)
            tomato.start()
            copied = put_many(watcher, "tomato", 4, "copied")
            sprout.start()
            wait_for(lambda: watcher.events_of("sprout", "fork"), "sprout did not say that there is a fork")
            event = watcher.events_of("sprout", "fork")[0]
            assert event.severity == "error"
            assert "tomato" in event.text
            assert "copied or set back" in event.text
            assert held(sprout) >= sprout_before, "what is held stays"
            # The copy learns that its log is not its own any more and begins another, which both can hold.
            wait_for(lambda: watcher.events_of("tomato", "fork"), "tomato did not say that there is a fork")
            after = put_many(watcher, "tomato", 2, "after")
            wait_for(lambda: held(sprout) >= sprout_before | after, "what came after the fork did not arrive")
            assert held(tomato) >= copied | after
        finally:
            for node in started:
                if node.process is not None and node.process.poll() is None:
                    node.stop()
            watcher.bus.stop()
