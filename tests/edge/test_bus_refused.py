"""A broker that refuses: each refusal is said at once, names what to change, is not repeated hot, and heals."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from broker.certificates import make_ca, make_server
from broker.child import spawn
from broker.configuration import Listener, Setup
from broker.embedded import EmbeddedBroker
from broker.mosquitto import INSTALL_HINT, MosquittoBroker, find_mosquitto
from edge.bus import Bus
from edge.cli.context import EXIT_UNREACHABLE
from edge.config import load_config
from edge.connection import PATIENT_MIN_S
from edge.doctor import _configured_broker
from edge.keys import Peers, load_or_create_identity
from edge.service import Context, Service, hears
from protocol.errors import ConfigError, NotAuthorized, NotConnected
from protocol.messages import Event, MemoryPut, RunToken
from tests.edge.bus_support import DEADLINE_S, Answers, wait_for
from tests.support.mosquittos import ME, PASSWORD, Mosquitto, NamedClient
from tests.support.ports import free_port
from tests.support.waiting import TTL_MS

OpenBus = Callable[..., Bus]


@pytest.fixture(autouse=True)
def needs_mosquitto() -> None:
    if find_mosquitto() is None:
        pytest.skip(f"Mosquitto is not installed: {INSTALL_HINT}")


@pytest.fixture
def guarded(tmp_path: Path) -> Mosquitto:
    """Mosquitto with the names sprout and tomato, each writing its own branch; not started."""
    setup = Setup("device", tmp_path / "etc", tmp_path / "data", ME, (Listener(free_port()),))
    return Mosquitto(setup, "sprout", "tomato")


@pytest.fixture
def make_bus() -> Iterator[OpenBus]:
    """``make_bus(port, node, **options)``, stopped at the end."""
    with ExitStack() as stack:

        def make(port: int, node: str = "sprout", *, scheme: str = "mqtt", **options: Any) -> Bus:
            options = {"client": "memory_store", **options}
            bus = Bus(url=f"{scheme}://127.0.0.1:{port}", node=node, **options)
            stack.callback(bus.stop, timeout_s=2.0)
            return bus

        yield make


def refused(bus: Bus) -> NotConnected:
    """The error of a start that would wait for longer than the test may take."""
    with pytest.raises(NotConnected) as caught:
        bus.start(timeout_s=600.0)
    assert not bus.connected
    assert bus.url in str(caught.value)
    return caught.value


# --- name and password ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["auto", "3.1.1"])
def test_a_wrong_password_is_said_at_once_and_not_tried_hot(
    guarded: Mosquitto, make_bus: OpenBus, protocol: str
) -> None:
    with guarded:
        bus = make_bus(guarded.port, username="sprout", password="not the password", protocol=protocol)
        began_s = time.monotonic()
        error = refused(bus)
        assert error.reason == "not authorized"
        assert error.field == "broker.password_file"
        assert "'sprout'" in error.message
        assert "broker.username and broker.password_file" in error.hint
        assert "not the password" not in str(error), "it is never shown"
        assert bus.protocol == ("5" if protocol == "auto" else protocol), "it is no reason for another version"
        time.sleep(1.5)  # no try in the first two seconds, however fast the machine; more of them on one that stalls
        tries = bus.counters["refused.connection"]
        assert tries <= 1 + (time.monotonic() - began_s) // PATIENT_MIN_S


def test_a_password_that_is_set_right_at_the_broker_heals_the_connection(guarded: Mosquitto, make_bus: OpenBus) -> None:
    with guarded:
        bus = make_bus(guarded.port, username="sprout", password="another long password")
        refused(bus)
        guarded.folder.add("sprout", "another long password", replace=True)
        guarded.reload()
        wait_for(lambda: bus.connected, "it tries again")
        assert bus.refusal == ""


def test_a_connection_without_a_name_is_told_to_set_one(guarded: Mosquitto, make_bus: OpenBus) -> None:
    with guarded:
        error = refused(make_bus(guarded.port))
        assert error.field == "broker.username"
        assert "set broker.username and broker.password_file" in error.hint


def test_doctor_and_status_say_which_key_to_look_at(guarded: Mosquitto, tmp_path: Path) -> None:
    with guarded:
        password = tmp_path / "password"
        password.write_text("wrong but long enough")
        password.chmod(0o600)
        file = tmp_path / "mindstream.toml"
        file.write_text(
            f'[broker]\nurl = "mqtt://127.0.0.1:{guarded.port}"\nusername = "sprout"\npassword_file = "{password}"\n'
        )
        check = _configured_broker(load_config(file, environ={}))
        assert check.verdict == "failed"
        assert "broker.password_file" in check.next_step
        status = subprocess.run(
            [sys.executable, "-c", "from edge.cli import main; main()", "--config", str(file), "status"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert status.returncode == EXIT_UNREACHABLE
        assert "broker.password_file" in status.stderr
        assert "wrong but" not in status.stderr + status.stdout
        password.write_text(PASSWORD)
        assert _configured_broker(load_config(file, environ={})).verdict == "ok"


def test_two_of_one_name_are_told_so_and_do_not_fight_hot(
    mosquitto_broker: MosquittoBroker, make_bus: OpenBus, caplog: pytest.LogCaptureFixture
) -> None:
    both = [make_bus(mosquitto_broker.port) for _ in range(2)]
    for bus in both:
        bus.start(timeout_s=None)
    wait_for(lambda: any(bus.counters["event.connection-unstable"] for bus in both), "one of them says so")
    assert "the broker ends each connection of mindstream-sprout-memory_store" in caplog.text
    assert "does another node have this node's name" in caplog.text
    told = next(bus for bus in both if bus.counters["event.connection-unstable"])
    assert told._connection.client._reconnect_min_delay == PATIENT_MIN_S


# --- rights ---------------------------------------------------------------------------------------------------


def test_a_refused_ask_fails_at_once_and_names_its_topic(guarded: Mosquitto, make_bus: OpenBus) -> None:
    with guarded:
        responder = make_bus(guarded.port, username="sprout", password=PASSWORD)
        responder.hear(MemoryPut, Answers())
        responder.start()
        asker = make_bus(guarded.port, "tomato", username="sprout", password=PASSWORD)
        asker.start()
        with pytest.raises(NotAuthorized, match="mindstream/v1/tomato/ask/sprout/memory_store/put") as caught:
            asker.ask("sprout", MemoryPut(text="a"), ttl_ms=600_000)
        assert "let sprout write that" in caught.value.hint
        assert "speaks for tomato" in caught.value.hint
        assert caught.value.field == "broker.username"
        assert asker.counters["refused.publish"] >= 1
        rightly = make_bus(guarded.port, "tomato", client="right", username="tomato", password=PASSWORD)
        rightly.start()
        assert rightly.ask("sprout", MemoryPut(text="a"), ttl_ms=TTL_MS).seq == 1


def test_a_refused_message_is_an_event_that_names_its_topic(guarded: Mosquitto, make_bus: OpenBus) -> None:
    acl = guarded.folder.config_path.with_name("acl")
    acl.write_text("user sprout\ntopic write mindstream/v1/sprout/event/#\nuser tomato\ntopic read #\n")
    with guarded, NamedClient(guarded.port, "tomato") as listener:
        listener.subscribe("mindstream/v1/sprout/event/#")
        bus = make_bus(guarded.port, username="sprout", password=PASSWORD)
        bus.start()
        bus.say(RunToken(index=0, token=1, text="", logprob=0.0, entropy=0.0), run="r")
        assert bus.flush(DEADLINE_S), "a refusal ends a publish as well"
        wait_for(lambda: listener.payloads, "the event")
        assert b"publish-refused" in listener.payloads[0]
        assert b"mindstream/v1/sprout/model/run/r/token" in listener.payloads[0]
        assert bus.counters["refused.publish"] == 1


def test_an_event_that_is_refused_makes_no_other_event(
    guarded: Mosquitto, make_bus: OpenBus, caplog: pytest.LogCaptureFixture
) -> None:
    acl = guarded.folder.config_path.with_name("acl")
    acl.write_text("user sprout\ntopic read #\n")
    with guarded:
        bus = make_bus(guarded.port, username="sprout", password=PASSWORD)
        bus.start()
        bus.events.report("anything", "warning", "something happened")
        assert bus.flush(DEADLINE_S)
        assert bus.counters["refused.publish"] == 1
        assert bus.counters["event.publish-refused"] == 0
        assert "mindstream/v1/sprout/event/memory_store" in caplog.text


@dataclass
class Subscribing:
    """Mosquitto with its dynamic security plugin, which refuses subscriptions (its ACL files never do)."""

    port: int
    process: subprocess.Popen[bytes]

    def allow(self) -> None:
        """Let sprout subscribe to events; while connections stand."""
        command = {"command": "removeRoleACL", "rolename": "sprout", "acltype": "subscribePattern", "topic": EVENTS}
        with NamedClient(self.port, "admin") as admin:
            admin.publish("$CONTROL/dynamic-security/v1", json.dumps({"commands": [command]}).encode())


EVENTS = "mindstream/v1/+/event/#"


def _client(name: str) -> dict[str, Any]:
    salt = b"0123456789ab"
    digest = hashlib.pbkdf2_hmac("sha512", PASSWORD.encode(), salt, 101, 64)
    texts = {"password": base64.b64encode(digest).decode(), "salt": base64.b64encode(salt).decode()}
    return {"username": name, **texts, "iterations": 101, "roles": [{"rolename": name}]}


@pytest.fixture
def subscribing(tmp_path: Path) -> Iterator[Subscribing]:
    plugin = next(Path("/usr/lib").glob("*/mosquitto_dynamic_security.so"), None)
    if plugin is None:
        pytest.skip("Mosquitto's dynamic security plugin is not installed")
    denied = {"acltype": "subscribePattern", "topic": EVENTS, "priority": 0, "allow": False}
    admin = {"acltype": "publishClientSend", "topic": "$CONTROL/#", "priority": 0, "allow": True}
    rights = ("publishClientSend", "publishClientReceive", "subscribe", "unsubscribe")
    security = tmp_path / "security.json"
    security.write_text(
        json.dumps(
            {
                "defaultACLAccess": dict.fromkeys(rights, True),
                "clients": [_client("sprout"), _client("admin")],
                "roles": [{"rolename": "sprout", "acls": [denied]}, {"rolename": "admin", "acls": [admin]}],
            }
        )
    )
    port = free_port()
    config = tmp_path / "mosquitto.conf"
    config.write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous false\nuser {ME}\n"
        f"plugin {plugin}\nplugin_opt_config_file {security}\n"
    )
    process = spawn([str(find_mosquitto()), "-c", str(config)])
    try:
        wait_for(lambda: _accepts(port), "it listens")
        yield Subscribing(port, process)
    finally:
        process.terminate()
        process.wait(DEADLINE_S)


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_refused_subscription_is_named_and_asked_for_again(
    subscribing: Subscribing, make_bus: OpenBus, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    monkeypatch.setattr("edge.connection.SUBSCRIBE_AGAIN_S", 0.3)
    heard: list[str] = []
    bus = make_bus(subscribing.port, username="sprout", password=PASSWORD, protocol=protocol)
    bus.hear(MemoryPut, Answers())
    bus.hear(Event, lambda message: heard.append(message.data.text))
    error = refused(bus)
    assert "mindstream/v1/+/event/+" in error.message
    assert error.reason == "subscription refused"
    assert bus.counters["event.subscription-refused"] == 1
    wait_for(lambda: bus.counters["refused.subscription"] >= 3, "it is asked for again")
    assert bus.counters["event.subscription-refused"] == 1, "and said once"
    assert bus.counters["disconnected"] == 0
    subscribing.allow()
    wait_for(lambda: bus.connected, "it is granted")
    assert bus.refusal == ""
    bus.say(Event("n", "info", "hello"), service="memory_store")
    wait_for(lambda: heard, "the subscription works")


class Listening(Service):
    name = "memory_store"

    @hears(Event)
    def hear(self, message: Any) -> None:
        """Nothing to do."""


def test_a_service_says_that_it_is_degraded_when_it_may_not_subscribe(
    subscribing: Subscribing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.connection.SUBSCRIBE_AGAIN_S", 0.3)
    password = tmp_path / "password"
    password.write_text(PASSWORD)
    password.chmod(0o600)
    file = tmp_path / "mindstream.toml"
    url = f"mqtt://127.0.0.1:{subscribing.port}"
    file.write_text(
        f'[node]\nname = "sprout"\n[broker]\nurl = "{url}"\nusername = "sprout"\npassword_file = "{password}"\n'
    )
    identity = load_or_create_identity(tmp_path, "sprout")
    config = load_config(file, environ={})
    service = Listening(Context(config, identity, Peers(tmp_path, identity), tmp_path / "service", url))
    life = threading.Thread(target=service.run)
    with NamedClient(subscribing.port, "admin") as watcher:
        watcher.subscribe("mindstream/v1/sprout/service/memory_store/state")
        life.start()
        try:

            def last() -> dict[str, Any]:
                return dict(json.loads(watcher.payloads[-1])) if watcher.payloads else {}

            wait_for(lambda: last().get("state") == "degraded", "it says so")
            assert "refused a subscription: mindstream/v1/+/event/+" in last()["reason"]
            subscribing.allow()
            wait_for(lambda: last().get("state") == "ready", "and that it is well")
        finally:
            service.stop()
            life.join(DEADLINE_S)


# --- TLS and other ports --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder: ca.pem, other.pem, server.pem and server.key for 127.0.0.1, elsewhere.pem and .key for hub.example."""
    folder = tmp_path_factory.mktemp("ca")
    authority = make_ca()
    (folder / "ca.pem").write_bytes(authority.certificate)
    (folder / "other.pem").write_bytes(make_ca("another").certificate)
    for name, host in (("server", "127.0.0.1"), ("elsewhere", "hub.example")):
        issued = make_server(authority, [host])
        (folder / f"{name}.pem").write_bytes(issued.certificate)
        (folder / f"{name}.key").write_bytes(issued.key)
    return folder


@pytest.fixture
def start_tls(tmp_path: Path, ca: Path) -> Iterator[Callable[[str], int]]:
    """``start_tls(name)``: Mosquitto with the certificate ``name``; its port."""
    with ExitStack() as stack:

        def start(name: str = "server") -> int:
            listener = Listener(free_port(), certificate=ca / f"{name}.pem", key=ca / f"{name}.key")
            setup = Setup("hub", tmp_path / "etc", tmp_path / "data", ME, (listener,))
            stack.enter_context(Mosquitto(setup, "sprout"))
            return listener.port

        yield start


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_tls_with_the_right_ca_works(start_tls: Callable[..., int], make_bus: OpenBus, ca: Path, protocol: str) -> None:
    options = {"username": "sprout", "password": PASSWORD, "ca_file": str(ca / "ca.pem"), "protocol": protocol}
    bus = make_bus(start_tls(), scheme="mqtts", **options)
    bus.hear(MemoryPut, Answers())
    bus.start()
    assert bus.protocol == protocol
    asker = make_bus(bus._connection._port, scheme="mqtts", client="asker", **options)
    asker.start()
    assert asker.ask("sprout", MemoryPut(text="a"), ttl_ms=TTL_MS).seq == 1


@pytest.mark.parametrize("protocol", ["auto", "5", "3.1.1"])
def test_no_tls_where_the_broker_expects_it(start_tls: Callable[..., int], make_bus: OpenBus, protocol: str) -> None:
    port = start_tls()
    error = refused(make_bus(port, username="sprout", password=PASSWORD, protocol=protocol))
    assert error.reason == "TLS at the broker"
    assert f"127.0.0.1:{port} speaks TLS, and broker.url asks for none" in error.message
    assert f"mqtts://127.0.0.1:{port}" in error.hint
    assert error.field == "broker.url"


@pytest.mark.parametrize("kind", ["mosquitto", "embedded"])
def test_tls_where_the_broker_has_none(make_bus: OpenBus, kind: str, tmp_path: Path) -> None:
    with MosquittoBroker(data_folder=tmp_path) if kind == "mosquitto" else EmbeddedBroker() as broker:
        error = refused(make_bus(broker.port, scheme="mqtts"))
        assert error.reason == "no TLS at the broker"
        assert f"127.0.0.1:{broker.port} speaks MQTT without TLS, and broker.url asks for TLS" in error.message
        assert error.field == "broker.url"


@pytest.mark.parametrize("named", [True, False])
def test_a_certificate_of_an_unknown_ca(
    start_tls: Callable[..., int], make_bus: OpenBus, ca: Path, named: bool
) -> None:
    ca_file = str(ca / "other.pem") if named else ""
    error = refused(make_bus(start_tls(), scheme="mqtts", ca_file=ca_file))
    assert error.reason == "certificate of an unknown CA"
    assert (ca_file or "a CA of this system") in error.message
    assert error.field == "broker.ca_file"


def test_a_certificate_for_another_name(start_tls: Callable[..., int], make_bus: OpenBus, ca: Path) -> None:
    error = refused(make_bus(start_tls("elsewhere"), scheme="mqtts", ca_file=str(ca / "ca.pem")))
    assert error.reason == "certificate of another name"
    assert "127.0.0.1" in error.message
    assert error.field == "broker.url"


def test_a_ca_file_without_certificates_is_a_mistake_of_the_configuration(make_bus: OpenBus, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    with pytest.raises(ConfigError, match=r"ca\.pem") as caught:
        make_bus(1883, scheme="mqtts", ca_file=str(tmp_path / "ca.pem"))
    assert caught.value.field == "broker.ca_file"


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[socket.socket], None]], int]]:
    """``serve(talk)``: a port on which ``talk`` has each connection; closed at the end."""
    with ExitStack() as stack:

        def start(talk: Callable[[socket.socket], None]) -> int:
            server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

            def one(connection: socket.socket) -> None:
                with connection, suppress(OSError):
                    talk(connection)

            def run() -> None:
                with suppress(OSError):
                    while True:
                        threading.Thread(target=one, args=(server.accept()[0],), daemon=True).start()

            threading.Thread(target=run, daemon=True).start()
            stack.callback(server.shutdown, socket.SHUT_RDWR)
            return int(server.getsockname()[1])

        yield start


def test_a_port_that_is_no_broker_is_named(serve: Callable[..., int], make_bus: OpenBus) -> None:
    def http(connection: socket.socket) -> None:
        connection.recv(1000)
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")

    error = refused(make_bus(serve(http)))
    assert error.reason == "not MQTT"
    assert "HTTP/1.1 400" in error.message


def _pipe(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65_536):
            sink.sendall(data)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("open_after", [None, 2], ids=["for ever", "while it starts"])
def test_a_broker_that_closes_over_version_5_is_spoken_to_in_3_1_1_once_that_is_sure(
    mosquitto_broker: MosquittoBroker, serve: Callable[..., int], make_bus: OpenBus, open_after: int | None
) -> None:
    """In front of Mosquitto stands one that closes without a word over a CONNECT of version 5: always, or at first."""
    versions: list[int] = []

    def talk(connection: socket.socket) -> None:
        packet = connection.recv(65_536)
        if packet[:1] != b"\x10":
            return  # a TLS handshake: whoever asks what this port speaks
        versions.append(packet[packet.index(b"MQTT") + 4])
        if versions[-1] == 5 and (open_after is None or len(versions) <= open_after):
            return
        with closing(socket.create_connection((mosquitto_broker.host, mosquitto_broker.port))) as beyond:
            beyond.sendall(packet)
            threading.Thread(target=_pipe, args=(beyond, connection), daemon=True).start()
            _pipe(connection, beyond)

    port = serve(talk)
    bus = make_bus(port)
    bus.hear(MemoryPut, Answers())
    bus.start(timeout_s=DEADLINE_S)
    assert versions == ([5, 5, 4, 5, 4] if open_after is None else [5, 5, 4, 5])
    assert bus.protocol == ("3.1.1" if open_after is None else "5")
    assert bus.connections == 1
    asker = make_bus(port, client="asker")
    asker.start(timeout_s=DEADLINE_S)
    assert asker.ask("sprout", MemoryPut(text="a"), ttl_ms=TTL_MS).seq == 1
