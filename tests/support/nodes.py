"""Real nodes for tests: a data folder, a configuration, a supervisor process, trust among them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apsw
import psutil

from broker.base import Broker
from broker.child import spawn
from edge.bus import Bus
from edge.keys import Peers, load_or_create_identity
from protocol.codec import Received
from protocol.messages import Event, NodeState, ServiceState
from tests.support.waiting import DEADLINE_S, wait_for

CHECKOUT = Path(__file__).resolve().parents[2]
MEMORY_SERVICES = ("memory_store", "sync_bridge")


def runs(pid: int) -> bool:
    """Whether there is such a process, and not only its exit code that its parent has not taken note of yet."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill_broker(broker: Broker) -> None:
    """kill -9; returns when it is dead, so that ``broker.start()`` starts another."""
    assert broker.pid is not None
    os.kill(broker.pid, signal.SIGKILL)
    wait_for(lambda: not broker.alive, "the broker survived kill -9")


class Node:
    """One node of this test."""

    def __init__(self, folder: Path, name: str, broker_url: str, services: Sequence[str], extra_toml: str = "") -> None:
        self.name = name
        self.data_dir = folder / name
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self.config = folder / f"{name}.toml"
        self.config.write_text(
            f'[node]\nname = "{name}"\ndata_dir = "{self.data_dir}"\n'
            f'[broker]\nurl = "{broker_url}"\n'
            f"[services]\nenabled = {list(services)!r}\n{extra_toml}"
        )
        self.identity = load_or_create_identity(self.data_dir, name)
        self.peers = Peers(self.data_dir, self.identity)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start its supervisor."""
        with (self.data_dir / "stderr.log").open("ab") as log:
            self.process = spawn(
                [sys.executable, "-m", "edge.supervisor", "--config", str(self.config)],
                cwd=CHECKOUT,
                stdout=log,
                stderr=log,
            )

    def kill(self) -> None:
        """kill -9 of the supervisor; its services die with it."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM; its exit code."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(DEADLINE_S)

    @property
    def log(self) -> str:
        """What its processes printed."""
        return (self.data_dir / "stderr.log").read_text(errors="replace")

    def service_log(self, service: str) -> str:
        """What one of its services printed."""
        path = self.data_dir / "logs" / f"{service}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def trust(self, *others: Node) -> None:
        """Trust the keys of other nodes."""
        for other in others:
            self.peers.trust(other.name, other.identity.fingerprint)

    def memories(self) -> list[tuple[str, str]]:
        """(id, text) of every memory in its database, as another process sees it."""
        connection = apsw.Connection(str(self.data_dir / "memory_store" / "memory.db"), flags=apsw.SQLITE_OPEN_READONLY)
        # After a kill whoever opens it first puts it in order, and the others wait.
        connection.set_busy_timeout(int(DEADLINE_S * 1000))
        try:
            return list(connection.execute("SELECT id, text FROM memories"))
        finally:
            connection.close()


class Watcher:
    """A client that knows every node's and service's last state, and all events."""

    def __init__(self, broker_url: str, name: str = "watcher") -> None:
        self.nodes: dict[str, NodeState] = {}
        self.services: dict[tuple[str, str], ServiceState] = {}
        self.said: list[tuple[str, str, str]] = []
        """Node, service and state of all that services said, in order."""
        self.events: list[tuple[str, Event]] = []
        """The node that said each, and it."""
        self.bus = Bus(url=broker_url, node="tester", client=name)
        self.bus.hear(NodeState, self._node)
        self.bus.hear(ServiceState, self._service)
        self.bus.hear(Event, self._event)
        self.bus.start(DEADLINE_S)

    def _node(self, message: Received) -> None:
        self.nodes[message.node] = message.data

    def _service(self, message: Received) -> None:
        service = message.topic.names["service"]
        self.services[message.node, service] = message.data
        self.said.append((message.node, service, message.data.state))

    def _event(self, message: Received) -> None:
        self.events.append((message.node, message.data))

    def events_of(self, node: str, name: str) -> list[Event]:
        """The events of one name that ``node`` has said."""
        return [event for speaker, event in self.events if speaker == node and event.name == name]

    def pid(self, node: str, service: str) -> int:
        """The process id that a service said last; 0 when it has said none."""
        found = self.services.get((node, service))
        return found.pid if found else 0

    def details(self, node: str, service: str) -> dict[str, Any]:
        """The details that a service said last; empty when it has said none."""
        found = self.services.get((node, service))
        return found.details if found else {}

    def counters(self, node: str, service: str) -> dict[str, int]:
        """The counters that a service said last; empty when it has said none."""
        found = self.services.get((node, service))
        return found.counters if found else {}

    def reason(self, node: str) -> str | None:
        """The reason that a node said last; None when it has said nothing."""
        found = self.nodes.get(node)
        return found.reason if found else None

    def state(self, node: str, service: str) -> str:
        """The last state that was said."""
        found = self.services.get((node, service))
        return found.state if found else ""

    def node_state(self, node: str) -> str:
        """The last state that a node said, or the broker for it."""
        found = self.nodes.get(node)
        return found.state if found else ""

    def wait_ready(self, node: str, services: Sequence[str], timeout_s: float = DEADLINE_S) -> None:
        """Wait until all ``services`` of ``node`` are ready."""
        for service in services:
            wait_for(lambda s=service: self.state(node, s) == "ready", f"{node}/{service} is not ready", timeout_s)  # type: ignore[misc]

    def wait_node_ready(self, node: str, services: Sequence[str]) -> None:
        """Wait until ``node`` and all ``services`` of it are ready: they say so apart, in any order."""
        self.wait_ready(node, services)
        wait_for(lambda: self.node_state(node) == "ready", f"{node} is not ready")

    def kill_service(self, node: str, service: str) -> None:
        """kill -9 of one service's process."""
        found = self.services.get((node, service))
        if found is not None and found.pid:
            try:
                os.kill(found.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # it was killed just before, and its successor has not spoken yet


@contextmanager
def two_nodes(
    folder: Path, broker_url: str, services: Sequence[str] = MEMORY_SERVICES, extra_toml: str = ""
) -> Iterator[tuple[Node, Node]]:
    """``tomato`` and ``sprout``, trusting each other, started; stopped at the end."""
    nodes = tuple(Node(folder, name, broker_url, services, extra_toml) for name in ("tomato", "sprout"))
    for node in nodes:
        for other in nodes:
            if node is not other:
                node.trust(other)
    try:
        for node in nodes:
            node.start()
        yield nodes[0], nodes[1]
    finally:
        for node in nodes:
            if node.process is not None and node.process.poll() is None:
                node.stop()
