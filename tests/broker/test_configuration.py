"""Rendered configurations: what is refused, and what a real Mosquitto makes of the rest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from broker.base import MAX_PACKET_BYTES
from broker.check import OK, check, worst
from broker.configuration import Bridge, Listener, Setup, render
from protocol.errors import BrokerError
from tests.broker.conftest import Certificates, device_setup
from tests.support.mosquittos import ME, PASSWORD, Mosquitto, NamedClient, wait_for
from tests.support.ports import free_port

CA = Path("/ca.pem")
PEM = {"certificate": Path("/server.pem"), "key": Path("/server.key")}


def setup(*listeners: Listener, **changes: object) -> Setup:
    return Setup("device", Path("/etc/x"), Path("/var/x"), "mosquitto", listeners or (Listener(1883),), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::", "192.168.1.5", "hub.local"])
@pytest.mark.parametrize("websockets", [False, True])
def test_a_listener_beyond_loopback_needs_tls(host: str, websockets: bool) -> None:
    with pytest.raises(BrokerError, match="without TLS"):
        Listener(1883, host, websockets=websockets)
    Listener(8883, host, **PEM, websockets=websockets)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.1.2.3"])
def test_loopback_may_be_plain(host: str) -> None:
    Listener(1883, host)


def test_nobody_is_let_in_without_a_name_where_others_can_connect() -> None:
    setup(anonymous=True)
    with pytest.raises(BrokerError, match="open to the network"):
        setup(Listener(1883), Listener(8883, "", **PEM), anonymous=True)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: Listener(0), "port 0"),
        (lambda: Listener(70_000), "port 70000"),
        (lambda: Listener(8883, certificate=CA), "go together"),
        (lambda: setup(Listener(1883), Listener(1883, websockets=True)), "one port"),
        (lambda: replace(setup(), listeners=()), "nobody could connect"),
        (lambda: setup(autosave_interval_s=0), "autosave_interval_s"),
        (lambda: Bridge("hub", "hub.local", ("sprout",), "sprout", PASSWORD), "without TLS"),
        (lambda: Bridge("hub", "hub.local", (), "sprout", PASSWORD, ca_file=CA), "carries no"),
        (lambda: Bridge("hub", "hub.local", ("a/b",), "sprout", PASSWORD, ca_file=CA), "as a name"),
    ],
)
def test_what_cannot_work_is_refused(make: object, problem: str) -> None:
    with pytest.raises(BrokerError, match=problem):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("value", ["secret\nallow_anonymous true", "secret\r", " secret", "secret\x00"])
def test_no_value_adds_a_line_and_no_password_is_repeated(value: str) -> None:
    bridge = Bridge("hub", "hub.local", ("sprout",), "sprout", value, ca_file=CA)
    with pytest.raises(BrokerError, match="cannot stand") as caught:
        render(setup(bridges=(bridge,)))
    assert "secret" not in str(caught.value)
    assert "secret" not in repr(bridge)


def test_a_device_with_all_it_can_have_serves_each_of_its_listeners(
    tmp_path: Path, certificates: Certificates, needs_mosquitto: None
) -> None:
    pem = (certificates.server, certificates.key)
    made = device_setup(
        tmp_path,
        Listener(free_port()),
        Listener(free_port(), "127.0.0.1", *pem),
        Listener(free_port(), websockets=True),
        Listener(free_port(), "127.0.0.1", *pem, websockets=True),
        max_queued_bytes=50_000_000,
    )
    with Mosquitto(made, "sprout") as broker:
        assert worst(check(broker.folder.config_path)) == OK
        plain, tls, websockets, secure_websockets = (each.port for each in made.listeners)
        payload = b"x" * 1024 * 1024  # the largest of the topic table
        assert len(payload) < MAX_PACKET_BYTES
        with NamedClient(plain, "sprout") as reader:
            reader.subscribe("mindstream/v1/#")
            for number, (port, options) in enumerate(
                [
                    (plain, {}),
                    (tls, {"ca_file": certificates.ca}),
                    (websockets, {"websockets": True}),
                    (secure_websockets, {"websockets": True, "ca_file": certificates.ca}),
                ]
            ):
                with NamedClient(port, "sprout", **options) as client:  # type: ignore[arg-type]
                    assert client.publish(f"mindstream/v1/sprout/event/{number}", payload) < 0x80
                wait_for(lambda wanted=number + 1: len(reader.messages) == wanted, "it comes over each of them")
        assert {len(each) for each in reader.payloads} == {len(payload)}
        assert "error" not in broker.log.lower()


def test_a_hub_binds_tls_everywhere_and_plain_on_loopback_only(
    tmp_path: Path, certificates: Certificates, needs_mosquitto: None
) -> None:
    listeners = (
        Listener(free_port()),
        Listener(free_port(), "", certificates.server, certificates.key),
    )
    with Mosquitto(Setup("hub", tmp_path / "etc", tmp_path / "data", ME, listeners)) as hub:
        assert hub.process is not None
        bound = {
            (connection.laddr.port, connection.laddr.ip)
            for connection in psutil.Process(hub.process.pid).net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
    assert {ip for port, ip in bound if port == listeners[0].port} == {"127.0.0.1"}
    assert "0.0.0.0" in {ip for port, ip in bound if port == listeners[1].port}


def test_without_names_everything_on_loopback_is_allowed(tmp_path: Path, needs_mosquitto: None) -> None:
    with Mosquitto(device_setup(tmp_path, anonymous=True)) as broker, NamedClient(broker.port) as client:
        client.subscribe("#")
        assert client.publish("mindstream/v1/whoever/state", b"said") < 0x80
        wait_for(lambda: client.payloads == [b"said"], "it comes back")


def test_what_waits_for_a_name_that_is_away_outlives_a_kill(tmp_path: Path, needs_mosquitto: None) -> None:
    payloads = [str(number).encode() for number in range(3_000)]
    with Mosquitto(device_setup(tmp_path), "sprout", "tomato") as broker:
        with NamedClient(broker.port, "tomato", client_id="away", session_s=600) as away:
            away.subscribe("mindstream/v1/+/memory/#")
        with NamedClient(broker.port, "sprout") as sprout:
            sprout.publish("mindstream/v1/sprout/state", b"ready", retain=True)
            sprout.publish_all("mindstream/v1/sprout/memory/log", payloads)
        broker.save()
        broker.kill()
        broker.start()
        with NamedClient(broker.port, "tomato", client_id="away", session_s=600) as away:
            wait_for(lambda: len(away.payloads) >= len(payloads), "what waited")
            assert away.payloads == payloads
            away.subscribe("mindstream/v1/sprout/state")
            wait_for(lambda: away.payloads[-1:] == [b"ready"], "what was retained")
