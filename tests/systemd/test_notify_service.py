"""Every service as systemd runs it: under a notify socket and a watchdog of its own, on a real Mosquitto."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.mosquitto import MosquittoBroker
from edge.bus import Bus
from edge.service import EXIT_CONFIG
from edge.service_table import SERVICES, missing_packages
from protocol.messages import MemoryPut, MemoryStored
from tests.support.nodes import wait_for
from tests.support.notify_socket import started, write_config
from tests.support.ports import free_port
from tests.support.waiting import DEADLINE_S, TTL_MS

NO_MODEL = '[model]\nname = "/no/such/model"\n'
"""The model runner says ``degraded`` then, and is ready: the tests of the model load one."""
MISBEHAVING = str(Path(__file__).with_name("misbehaving_service.py"))


def service(name: str) -> list[str]:
    return ["-m", "edge.service", name]


class SlowBroker:
    """Accepts a connection and lets its client wait for the answer to SUBSCRIBE until ``grant`` is set.

    No real broker can be held just there. It speaks as much MQTT 5 as that needs.
    """

    def __init__(self) -> None:
        self.subscribing = threading.Event()
        self.grant = threading.Event()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"mqtt://127.0.0.1:{self._server.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        connection, _ = self._server.accept()
        with connection:
            self._packet(connection)
            connection.sendall(b"\x20\x03\x00\x00\x00")  # CONNACK: accepted
            subscribe = self._packet(connection)
            self.subscribing.set()
            self.grant.wait()
            topics = _topic_filters(subscribe)
            connection.sendall(bytes([0x90, 3 + topics]) + subscribe[:2] + b"\0" + b"\1" * topics)  # SUBACK: QoS 1
            while connection.recv(65_536):
                pass

    def _packet(self, connection: socket.socket) -> bytes:
        """The next packet without its fixed header."""
        connection.recv(1, socket.MSG_WAITALL)
        length = shift = 0
        while True:
            byte = connection.recv(1, socket.MSG_WAITALL)[0]
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return connection.recv(length, socket.MSG_WAITALL)

    def close(self) -> None:
        self.grant.set()
        self._server.close()
        self._thread.join(DEADLINE_S)


def _topic_filters(subscribe: bytes) -> int:
    at, count = 3 + subscribe[2], 0
    while at < len(subscribe):
        at += 2 + int.from_bytes(subscribe[at : at + 2], "big") + 1
        count += 1
    return count


@pytest.fixture
def slow_broker() -> Iterator[SlowBroker]:
    broker = SlowBroker()
    yield broker
    broker.close()


@pytest.mark.parametrize("name", [row.name for row in SERVICES if not missing_packages(row)])
def test_a_service_is_ready_when_its_broker_is_and_says_that_it_lives(
    name: str, mosquitto_broker: MosquittoBroker, tmp_path: Path
) -> None:
    mosquitto_broker.stop()
    config = write_config(tmp_path, mosquitto_broker.url, f"{NO_MODEL}[gateway]\nport = {free_port()}\n")
    with started(service(name), config, tmp_path, watchdog_s=1.0) as unit:
        # It waits for its broker, and asks for the time to do so.
        unit.heard.wait("STATUS=waiting for the broker")
        assert unit.heard.lines[0] == "EXTEND_TIMEOUT_USEC=20000000"
        assert "READY=1" not in unit.heard.lines
        mosquitto_broker.start()
        unit.heard.wait("READY=1")
        unit.heard.wait("WATCHDOG=1", 2)
        assert unit.heard.status.startswith("degraded" if name == "model_runner" else "ready")
        assert unit.stop() == 0
        unit.heard.wait("STOPPING=1")
        assert unit.heard.count("READY=1") == 1


def test_a_connection_alone_is_not_ready(slow_broker: SlowBroker, tmp_path: Path) -> None:
    with started(service("memory_store"), write_config(tmp_path, slow_broker.url), tmp_path) as unit:
        assert slow_broker.subscribing.wait(DEADLINE_S)
        # The broker has accepted the connection: a second later, by the service's own clock, it still is not ready.
        extended = sum(line.startswith("EXTEND_TIMEOUT_USEC") for line in unit.heard.lines)
        unit.heard.wait("EXTEND_TIMEOUT_USEC", extended + 1)
        assert "READY=1" not in unit.heard.lines
        slow_broker.grant.set()
        unit.heard.wait("READY=1")


def test_a_service_that_is_stopped_by_a_signal_feeds_no_watchdog(
    mosquitto_broker: MosquittoBroker, tmp_path: Path
) -> None:
    config = write_config(tmp_path, mosquitto_broker.url)
    with started(service("sync_bridge"), config, tmp_path, watchdog_s=1.0) as unit:
        unit.heard.wait("WATCHDOG=1")
        unit.process.send_signal(signal.SIGSTOP)
        state = Path(f"/proc/{unit.process.pid}/stat")
        wait_for(lambda: state.read_text().split()[2] == "T", "it is not stopped")
        unit.heard.catch_up()
        said = unit.heard.count("WATCHDOG=1")
        threading.Event().wait(1.5)  # longer than the watchdog's patience, and nothing to wait for
        assert unit.heard.count("WATCHDOG=1") == said
        unit.process.send_signal(signal.SIGCONT)
        unit.heard.wait("WATCHDOG=1", said + 1)


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("handler", "no progress"),
        ("worker", "'worker' has ended"),
        ("main", ""),
    ],
)
def test_a_stuck_service_feeds_no_watchdog_and_shows_where_it_is(
    how: str, why: str, mosquitto_broker: MosquittoBroker, tmp_path: Path
) -> None:
    config = write_config(tmp_path, mosquitto_broker.url)
    with (
        started([MISBEHAVING, how], config, tmp_path, watchdog_s=1.0) as unit,
        Bus(url=mosquitto_broker.url, node="sprout", client="tester") as bus,
    ):
        unit.heard.wait("WATCHDOG=1", 2)
        assert isinstance(bus.ask("sprout", MemoryPut(text="well"), ttl_ms=TTL_MS), MemoryStored)
        # From now on it misbehaves; its main loop turns on (but for `main`), its process lives.
        bus.ask_later("sprout", MemoryPut(text="misbehave"), ttl_ms=TTL_MS)
        if why:
            unit.heard.wait("STATUS=stuck")
            assert why in unit.heard.status
        else:
            wait_for(lambda: "the main loop hangs" in unit.log, "it does not hang")
        unit.heard.catch_up()
        said = unit.heard.count("WATCHDOG=1")
        threading.Event().wait(1.5)
        assert unit.heard.count("WATCHDOG=1") == said
        # What systemd does then.
        unit.process.send_signal(signal.SIGABRT)
        assert unit.process.wait(DEADLINE_S) == -signal.SIGABRT
        assert "Fatal Python error: Aborted" in unit.log
        assert f"in misbehave_{how}" in unit.log or how == "worker"


def test_killed_it_comes_back_with_what_it_had(mosquitto_broker: MosquittoBroker, tmp_path: Path) -> None:
    config = write_config(tmp_path, mosquitto_broker.url)
    with Bus(url=mosquitto_broker.url, node="sprout", client="tester") as bus:
        with started(service("memory_store"), config, tmp_path) as unit:
            unit.heard.wait("READY=1")
            first: MemoryStored = bus.ask("sprout", MemoryPut(text="before the kill"), ttl_ms=TTL_MS)
            unit.process.kill()
            assert unit.process.wait(DEADLINE_S) == -signal.SIGKILL
            assert "STOPPING=1" not in unit.heard.lines
        with started(service("memory_store"), config, tmp_path) as unit:
            unit.heard.wait("READY=1")
            second: MemoryStored = bus.ask("sprout", MemoryPut(text="after it"), ttl_ms=TTL_MS)
            assert (second.log_id, second.seq) == (first.log_id, first.seq + 1)


def test_a_wrong_configuration_ends_with_the_code_that_systemd_does_not_restart(tmp_path: Path) -> None:
    config = write_config(tmp_path, "mqtt://127.0.0.1:1", "[node.oops]\n")
    with started(service("memory_store"), config, tmp_path) as unit:
        assert unit.process.wait(DEADLINE_S) == EXIT_CONFIG
        assert "READY=1" not in unit.heard.lines


def test_a_stop_while_it_waits_for_its_broker_is_heard(tmp_path: Path) -> None:
    with started(service("memory_store"), write_config(tmp_path, "mqtt://127.0.0.1:1"), tmp_path) as unit:
        unit.heard.wait("STATUS=waiting for the broker")
        assert unit.stop() == 0
        assert "READY=1" not in unit.heard.lines


def test_the_password_comes_from_systemds_credential(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mosquitto_broker: MosquittoBroker
) -> None:
    # An empty one, as SetCredential= makes it where there is no file, is no password.
    (tmp_path / "credentials").mkdir()
    (tmp_path / "credentials" / "broker-password").write_text("\n")
    monkeypatch.setitem(os.environ, "CREDENTIALS_DIRECTORY", str(tmp_path / "credentials"))
    with started(service("sync_bridge"), write_config(tmp_path, mosquitto_broker.url), tmp_path) as unit:
        unit.heard.wait("READY=1")
