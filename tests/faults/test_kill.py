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

PUTS = 600
MANY_PUTS = 2_000
CLIENTS = 8
KILLS_S = 0.3
"""Mean time between what was awaited after a kill and the next kill."""
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


class _Acknowledged:
    """Ids of what was acknowledged, of all clients."""

    def __init__(self, wanted: int) -> None:
        self.ids: set[str] = set()
        self._wanted = wanted
        self._changed = threading.Condition()
        self.stopped = False

    def add(self, identifier: str) -> None:
        with self._changed:
            self.ids.add(identifier)
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self.stopped = True
            self._changed.notify_all()

    def wait_more(self, count: int) -> None:
        """Wait until ``count`` more are acknowledged, or all are."""
        with self._changed:
            enough = min(len(self.ids) + count, self._wanted)
            self._changed.wait_for(lambda: self.stopped or len(self.ids) >= enough)

    def wait_stopped(self, timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self.stopped, timeout_s)


def _kill_at_random(
    seed: int, broker: Broker, nodes: tuple[Node, Node], watcher: Watcher, acknowledged: _Acknowledged
) -> Counter[str]:
    """Kill one process after another until all is done; what is a test's to start again is started again.

    Mostly not before something was acknowledged again: on a slow machine nothing would ever be, else.
    """
    chance = random.Random(seed)
    killed: Counter[str] = Counter()
    while not acknowledged.wait_stopped(chance.expovariate(1 / KILLS_S)):
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
        if chance.random() < 0.7:
            acknowledged.wait_more(chance.randint(1, 40))
    return killed


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_every_acknowledged_put_is_on_both_nodes_exactly_once_whatever_is_killed(
    broker: Broker, tmp_path: Path, seed: int
) -> None:
    _run(broker, tmp_path, seed, MANY_PUTS)


def test_acknowledged_puts_survive_kills(broker: Broker, tmp_path: Path) -> None:
    _run(broker, tmp_path, 7, PUTS)


def _run(broker: Broker, tmp_path: Path, seed: int, puts: int) -> None:
    said = _Acknowledged(puts)
    with two_nodes(tmp_path, broker.url, extra_toml=LIMITS) as nodes:
        watcher = Watcher(broker.url)
        clients = [Bus(url=broker.url, node="tester", client=f"c{n}") for n in range(CLIENTS)]
        try:
            for node in nodes:
                watcher.wait_ready(node.name, MEMORY_SERVICES)
            for client in clients:
                client.start()
            deadline_s = time.monotonic() + 200

            def put_share(number: int) -> None:
                for i in range(puts // CLIENTS):
                    said.add(_put_until_acknowledged(clients[number], f"memory {number} {i}", deadline_s))

            with ThreadPoolExecutor(CLIENTS + 1) as pool:
                killer = pool.submit(_kill_at_random, seed, broker, nodes, watcher, said)
                shares = [pool.submit(put_share, number) for number in range(CLIENTS)]
                try:
                    for share in shares:
                        share.result()
                finally:
                    said.stop()
                killed = killer.result()
            print(f"seed {seed}: killed {dict(killed)}")
            acknowledged = said.ids
            assert len(acknowledged) == puts
            assert killed, "nothing was killed: the test is too short"
            for node in nodes:
                wait_for(
                    lambda node=node: {i for i, _ in node.memories()} >= acknowledged,  # type: ignore[misc]
                    f"{node.name} lacks {len(acknowledged - {i for i, _ in node.memories()})} acknowledged memories",
                )
            for node in nodes:
                found = node.memories()
                assert Counter(i for i, _ in found) == Counter(acknowledged), node.name
                assert len({text for _, text in found}) == puts, node.name
        finally:
            said.stop()
            watcher.bus.stop()
            for client in clients:
                client.stop()
