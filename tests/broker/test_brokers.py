"""What both brokers promise: readiness, loopback, ports, restart, and an end with their parent."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import paho.mqtt.client as mqtt
import psutil
import pytest

from broker.base import MAX_INFLIGHT, MAX_PACKET_BYTES, Broker, answers_connect
from broker.embedded import EmbeddedBroker
from broker.mosquitto import MosquittoBroker, find_mosquitto
from protocol.errors import BrokerError
from tests.support.nodes import runs
from tests.support.waiting import DEADLINE_S, wait_for

ROOT = Path(__file__).resolve().parents[2]


class Client:
    """A paho client that counts what it gets."""

    def __init__(self, broker: Broker, client_id: str, topics: str = "", **options: object) -> None:
        self.received: list[bytes] = []
        self.drops = 0
        self.subscribed = threading.Event()
        self.mqtt = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id=client_id, protocol=mqtt.MQTTv5, **options)
        self.mqtt.on_message = lambda _c, _u, message: self.received.append(message.payload)
        self.mqtt.on_subscribe = lambda *_: self.subscribed.set()
        self.mqtt.on_disconnect = lambda *_: setattr(self, "drops", self.drops + 1)
        self.mqtt.connect(broker.host, broker.port)
        self.mqtt.loop_start()
        wait_for(self.mqtt.is_connected, f"{client_id} connects")
        if topics:
            self.mqtt.subscribe(topics, qos=1)
            assert self.subscribed.wait(DEADLINE_S)

    def close(self) -> None:
        self.mqtt.disconnect()
        self.mqtt.loop_stop()


def made(kind: str, tmp_path: Path, port: int | None = None) -> Broker:
    if kind == "embedded":
        return EmbeddedBroker(port)
    if find_mosquitto() is None:
        pytest.skip("Mosquitto is not installed")
    return MosquittoBroker(port, data_folder=tmp_path / "mosquitto")


def test_a_started_broker_carries_messages_at_once(broker: Broker) -> None:
    client = Client(broker, "one", "a/#")
    client.mqtt.publish("a/b", b"hello", qos=1).wait_for_publish(DEADLINE_S)
    wait_for(lambda: client.received == [b"hello"], "the message comes back")
    client.close()


def test_it_takes_a_payload_of_one_mebibyte(broker: Broker) -> None:
    client = Client(broker, "big", "a/#")
    client.mqtt.publish("a/b", b"x" * 1024 * 1024, qos=1).wait_for_publish(DEADLINE_S)
    wait_for(lambda: [len(p) for p in client.received] == [1024 * 1024], "the payload comes back")
    client.close()


def test_it_listens_on_loopback_only(broker: Broker) -> None:
    assert broker.pid is not None
    addresses = {
        connection.laddr.ip
        for connection in psutil.Process(broker.pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert addresses == {"127.0.0.1"}


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "example.org", "::", ""])
@pytest.mark.parametrize("kind", [EmbeddedBroker, MosquittoBroker])
def test_another_address_than_loopback_is_refused(kind: type[Broker], host: str) -> None:
    with pytest.raises(BrokerError, match="only loopback"):
        kind(host=host)


def test_a_killed_broker_starts_again_on_the_same_port_at_once(broker: Broker) -> None:
    client = Client(broker, "stays", "a/#")
    url, pid = broker.url, broker.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not broker.alive, "the broker is gone")
    broker.start()
    assert broker.url == url
    assert broker.pid != pid
    wait_for(lambda: answers_connect(broker.host, broker.port), "it answers")
    client.close()


def test_start_of_a_running_broker_changes_nothing(broker: Broker) -> None:
    pid = broker.pid
    broker.start()
    assert broker.pid == pid


def test_stop_ends_the_process_and_can_be_repeated(broker: Broker) -> None:
    pid = broker.pid
    assert pid is not None
    broker.stop()
    broker.stop()
    assert not broker.alive
    assert not psutil.pid_exists(pid)
    assert not answers_connect(broker.host, broker.port)


@pytest.mark.parametrize("kind", ["embedded", "mosquitto"])
def test_a_busy_port_is_named_with_what_to_do(kind: str, tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        broker = made(kind, tmp_path, port)
        with pytest.raises(BrokerError, match=f"127.0.0.1:{port}") as caught:
            broker.start()
    assert str(port) in caught.value.hint
    assert caught.value.reason == "port not available"
    assert not broker.alive


@pytest.mark.parametrize("kind", ["embedded", "mosquitto"])
def test_it_dies_with_a_parent_that_is_killed(kind: str, tmp_path: Path) -> None:
    # Started from a thread that ends at once: the broker must outlive that thread and not the process.
    made(kind, tmp_path)
    code = (
        "import sys, threading, time\n"
        "from pathlib import Path\n"
        "from broker.embedded import EmbeddedBroker\n"
        "from broker.mosquitto import MosquittoBroker\n"
        f"folder = Path({str(tmp_path)!r})\n"
        f"broker = EmbeddedBroker() if {kind!r} == 'embedded' else MosquittoBroker(data_folder=folder)\n"
        "starter = threading.Thread(target=broker.start)\n"
        "starter.start(); starter.join()\n"
        "assert broker.alive\n"
        "print(broker.pid, broker.port, flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert parent.stdout is not None
        pid, port = (int(word) for word in parent.stdout.readline().split())
        wait_for(lambda: answers_connect("127.0.0.1", port), "it answers")
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    wait_for(lambda: not runs(pid), "the broker follows its parent")


@pytest.mark.parametrize("connected", [False, True], ids=["before_connect", "after_connect"])
def test_a_sender_of_100_megabytes_is_cut_off_and_nobody_else(broker: Broker, connected: bool) -> None:
    bystander = Client(broker, "bystander", "a/#")
    assert broker.pid is not None
    memory_before = psutil.Process(broker.pid).memory_info().rss
    packet_bytes = 100 * 1024 * 1024
    sent = 0
    with socket.create_connection((broker.host, broker.port), timeout=DEADLINE_S) as foreign:
        if connected:
            foreign.sendall(b"\x10\x14\x00\x04MQTT\x05\x02\x00\x0a\x00\x00\x07foreign")
            assert foreign.recv(1) == b"\x20"
        length = b"\x80\x80\x80\x32"  # 100 MiB as a remaining length
        foreign.sendall((b"\x30" if connected else b"\x10") + length + b"\x00\x01a\x00")
        try:
            while sent < packet_bytes:
                sent += foreign.send(b"x" * 65536)
        except (ConnectionResetError, BrokenPipeError):
            pass
    assert sent < packet_bytes // 4, f"{sent:,} bytes were taken"
    bystander.mqtt.publish("a/b", b"still here", qos=1).wait_for_publish(DEADLINE_S)
    wait_for(lambda: bystander.received == [b"still here"], "the bystander is served")
    assert bystander.drops == 0
    assert psutil.Process(broker.pid).memory_info().rss - memory_before < 32 * 1024 * 1024
    bystander.close()


def test_a_packet_just_above_the_limit_costs_its_sender_the_connection(broker: Broker) -> None:
    bystander = Client(broker, "bystander", "a/#")
    sender = Client(broker, "sender")
    sender.mqtt.reconnect_delay_set(60, 60)
    sender.mqtt.publish("a/b", b"x" * MAX_PACKET_BYTES, qos=0)
    wait_for(lambda: sender.drops > 0, "the sender is cut off")
    assert bystander.drops == 0
    assert bystander.received == []
    sender.close()
    bystander.close()


def test_the_embedded_broker_holds_back_what_is_beyond_the_inflight_limit(embedded_broker: EmbeddedBroker) -> None:
    reader = Client(embedded_broker, "reader", "a/#", manual_ack=True)
    unacknowledged: list[mqtt.MQTTMessage] = []

    def keep(_client: mqtt.Client, _userdata: object, message: mqtt.MQTTMessage) -> None:
        unacknowledged.append(message)
        reader.received.append(message.payload)

    reader.mqtt.on_message = keep
    writer = Client(embedded_broker, "writer")
    for number in range(3 * MAX_INFLIGHT):
        writer.mqtt.publish("a/b", number.to_bytes(2, "big"), qos=1)
    wait_for(lambda: len(reader.received) == MAX_INFLIGHT, "the window fills")
    for message in unacknowledged[:10]:
        reader.mqtt.ack(message.mid, message.qos)
    wait_for(lambda: len(reader.received) == MAX_INFLIGHT + 10, "as many come as were acknowledged")
    writer.close()
    reader.close()


def test_a_failed_start_tells_the_programs_last_words(tmp_path: Path) -> None:
    script = tmp_path / "mosquitto"
    script.write_text("#!/bin/sh\necho 'no such feature' >&2\nexit 3\n")
    script.chmod(0o755)
    broker = MosquittoBroker(data_folder=tmp_path / "data", binary=script)
    with pytest.raises(BrokerError, match=r"code 3; its last words: no such feature"):
        broker.start()


def test_a_missing_mosquitto_names_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("broker.mosquitto.find_mosquitto", lambda: None)
    with pytest.raises(BrokerError, match="not installed") as caught:
        MosquittoBroker(data_folder=tmp_path).start()
    assert "apt-get install" in caught.value.hint


def test_mosquitto_keeps_what_waits_for_a_session_through_a_kill(mosquitto_broker: MosquittoBroker) -> None:
    properties = mqtt.Properties(mqtt.PacketTypes.CONNECT)
    properties.SessionExpiryInterval = 3600

    def connect(client: mqtt.Client) -> None:
        client.connect(mosquitto_broker.host, mosquitto_broker.port, clean_start=False, properties=properties)
        client.loop_start()
        wait_for(client.is_connected, "the client connects")

    away = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id="away", protocol=mqtt.MQTTv5)
    subscribed = threading.Event()
    away.on_subscribe = lambda *_: subscribed.set()
    connect(away)
    away.subscribe("a/#", qos=1)
    assert subscribed.wait(DEADLINE_S)
    away.disconnect()
    away.loop_stop()

    writer = Client(mosquitto_broker, "writer")
    for number in range(1500):  # more than the 1,000 that an unconfigured Mosquitto would keep
        info = writer.mqtt.publish("a/b", str(number).encode(), qos=1)
    info.wait_for_publish(DEADLINE_S)
    wait_for(lambda: not writer.mqtt.want_write(), "all is written")
    writer.close()
    assert mosquitto_broker.data_folder is not None
    database = mosquitto_broker.data_folder / "mosquitto.db"
    written_at = time.time()
    wait_for(lambda: database.exists() and database.stat().st_mtime > written_at + 1, "the state is saved")
    assert mosquitto_broker.pid is not None
    os.kill(mosquitto_broker.pid, signal.SIGKILL)
    wait_for(lambda: not mosquitto_broker.alive, "Mosquitto is gone")

    mosquitto_broker.start()
    received: list[int] = []
    away.on_message = lambda _c, _u, message: received.append(int(message.payload))
    connect(away)
    wait_for(lambda: len(received) >= 1500, "what waited arrives")
    assert sorted(set(received)) == list(range(1500))
    away.disconnect()
    away.loop_stop()
