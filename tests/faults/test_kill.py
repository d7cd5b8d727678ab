"""kill -9 of the broker, a service, a supervisor, at random moments: what was acknowledged is on every node, once."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from broker.base import Broker
from edge.bus import Bus
from protocol.errors import MindstreamError
from protocol.ids import uuid7
from protocol.messages import MemoryPut, MemoryStored
from tests.support.nodes import MEMORY_SERVICES, Node, Watcher, kill_broker, two_nodes, wait_for

PUTS = 2_000
CLIENTS = 8
KILLS_S = 0.7
"""Mean time between kills."""
LIMITS = "[supervisor]\nrestart_limit = 1000\nbackoff_max_s = 1.0\n"


def _put_until_acknowledged(bus: Bus, text: str, deadline_s: float) -> str:
    """One memory, asked with the same id again and again until its answer comes."""
    identifier = uuid7()
    while True:
        try:
            stored: MemoryStored = bus.ask("tomato", MemoryPut(text, id=identifier), ttl_ms=5_000)
            return stored.id
        except MindstreamError:
            assert time.monotonic() < deadline_s, f"{text} was not acknowledged in time"


def _kill_at_random(
    seed: int, broker: Broker, nodes: tuple[Node, Node], watcher: Watcher, done: threading.Event
) -> Counter[str]:
    """Kill one process after another until ``done``; what is a test's to start again is started again."""
    chance = random.Random(seed)
    killed: Counter[str] = Counter()
    while not done.wait(chance.expovariate(1 / KILLS_S)):
        victim = chance.choice(["broker", "memory_store", "sync_bridge", "supervisor"])
        node = chance.choice(nodes)
        killed[victim] += 1
        if victim == "broker":
            kill_broker(broker)
            time.sleep(chance.uniform(0, 0.3))
            broker.start()
        elif victim == "supervisor":
            node.kill()
            node.start()
        else:
            watcher.kill_service(node.name, victim)
    return killed


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_every_acknowledged_put_is_on_both_nodes_exactly_once_whatever_is_killed(
    broker: Broker, tmp_path: Path, seed: int
) -> None:
    _run(broker, tmp_path, seed, PUTS)


@pytest.mark.timeout(180)
def test_acknowledged_puts_survive_kills(broker: Broker, tmp_path: Path) -> None:
    _run(broker, tmp_path, 7, PUTS)


def _run(broker: Broker, tmp_path: Path, seed: int, puts: int) -> None:
    done = threading.Event()
    with two_nodes(tmp_path, broker.url, extra_toml=LIMITS) as nodes:
        watcher = Watcher(broker.url)
        clients = [Bus(url=broker.url, node="tester", client=f"c{n}") for n in range(CLIENTS)]
        try:
            for node in nodes:
                watcher.wait_ready(node.name, MEMORY_SERVICES)
            for client in clients:
                client.start()
            deadline_s = time.monotonic() + 120

            def put_share(number: int) -> list[str]:
                return [
                    _put_until_acknowledged(clients[number], f"memory {number} {i}", deadline_s)
                    for i in range(puts // CLIENTS)
                ]

            with ThreadPoolExecutor(CLIENTS + 1) as pool:
                killer = pool.submit(_kill_at_random, seed, broker, nodes, watcher, done)
                shares = [pool.submit(put_share, number) for number in range(CLIENTS)]
                try:
                    acknowledged = {identifier for share in shares for identifier in share.result()}
                finally:
                    done.set()
                killed = killer.result()
            print(f"seed {seed}: killed {dict(killed)}")
            assert len(acknowledged) == puts
            assert killed, "nothing was killed: the test is too short"
            for node in nodes:
                wait_for(
                    lambda node=node: {i for i, _ in node.memories()} >= acknowledged,  # type: ignore[misc]
                    f"{node.name} lacks {len(acknowledged - {i for i, _ in node.memories()})} acknowledged memories",
                    60,
                )
            for node in nodes:
                found = node.memories()
                assert Counter(i for i, _ in found) == Counter(acknowledged), node.name
                assert len({text for _, text in found}) == puts, node.name
        finally:
            done.set()
            watcher.bus.stop()
            for client in clients:
                client.stop()
