"""TLS on a real Mosquitto, met by the bus: the right CA, a wrong one, and the wrong kind of port."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509

from broker.certificates import Issued, make_ca, make_server
from broker.configuration import Listener
from edge.bus import Bus
from protocol.errors import BrokerError
from protocol.messages import Event
from tests.broker.conftest import Certificates, device_setup
from tests.support.mosquittos import PASSWORD, Mosquitto, wait_for
from tests.support.ports import free_port
from tests.support.waiting import DEADLINE_S


@pytest.fixture
def broker(tmp_path: Path, certificates: Certificates, needs_mosquitto: None) -> Iterator[Mosquitto]:
    tls = Listener(free_port(), "127.0.0.1", certificates.server, certificates.key)
    with Mosquitto(device_setup(tmp_path, Listener(free_port()), tls), "sprout", "tomato") as running:
        yield running


def bus(url: str, ca_file: Path | None = None, password: str = PASSWORD, node: str = "sprout") -> Bus:
    return Bus(
        url=url, node=node, client="test", username=node, password=password, ca_file=str(ca_file) if ca_file else ""
    )


def refusal(made: Bus) -> str:
    """What the bus says of a connection that it does not get."""
    try:
        made.start(None)
        wait_for(lambda: made.refusal or made.connected, "the broker or TLS says no")
        assert not made.connected
        return made.refusal
    finally:
        made.stop()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_buses_speak_over_tls_under_their_names(host: str, broker: Mosquitto, certificates: Certificates) -> None:
    url = f"mqtts://{host}:{broker.setup.listeners[1].port}"
    heard: list[str] = []
    with bus(url, certificates.ca, node="tomato") as tomato, bus(url, certificates.ca) as sprout:
        tomato.hear(Event, lambda message: heard.append(message.data.text), node="sprout")
        tomato.wait_subscribed(DEADLINE_S)
        sprout.say(Event(name="test", severity="info", text="over TLS"), service="test")
        wait_for(lambda: heard == ["over TLS"], "the event arrives")


def test_a_wrong_ca_is_refused_and_the_refusal_says_so(broker: Mosquitto, certificates: Certificates) -> None:
    url = f"mqtts://127.0.0.1:{broker.setup.listeners[1].port}"
    assert "certificate is not signed by" in refusal(bus(url, certificates.other_ca))


def test_a_certificate_for_another_host_is_refused(broker: Mosquitto, certificates: Certificates) -> None:
    # Every address of 127/8 leads here; the certificate names 127.0.0.1 alone.
    listener = Listener(free_port(), "127.0.0.2", certificates.server, certificates.key)
    with Mosquitto(device_setup(broker.setup.folder / "second", listener), "sprout"):
        assert "is for another name" in refusal(bus(f"mqtts://127.0.0.2:{listener.port}", certificates.ca))


def test_tls_on_a_plain_port_and_plain_on_a_tls_port_are_refused_and_harm_nobody(
    broker: Mosquitto, certificates: Certificates
) -> None:
    plain, tls = (each.port for each in broker.setup.listeners)
    assert "without TLS" in refusal(bus(f"mqtts://127.0.0.1:{plain}", certificates.ca))
    assert "speaks TLS" in refusal(bus(f"mqtt://127.0.0.1:{tls}"))
    with bus(f"mqtts://127.0.0.1:{tls}", certificates.ca), bus(f"mqtt://127.0.0.1:{plain}", node="tomato"):
        pass  # both are served as before


def test_a_wrong_password_is_named_as_the_reason(broker: Mosquitto, certificates: Certificates) -> None:
    url = f"mqtts://127.0.0.1:{broker.setup.listeners[1].port}"
    said = refusal(bus(url, certificates.ca, password="not the password"))
    assert "not authori" in said.lower() or "password" in said.lower()
    assert "not the password" not in said


def test_a_certificate_names_all_its_hosts_and_verifies_strictly(tmp_path: Path) -> None:
    ca = make_ca()
    server = make_server(ca, ["hub.local", "192.168.1.5", "fe80::1"])
    leaf = x509.load_pem_x509_certificate(server.certificate)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["hub.local"]
    assert [str(each) for each in names.get_values_for_type(x509.IPAddress)] == ["192.168.1.5", "fe80::1"]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # What Python 3.13 asks of a chain by default.
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(cadata=ca.certificate.decode())
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    (tmp_path / "pem").write_bytes(server.certificate + server.key)
    server_context.load_cert_chain(tmp_path / "pem")
    handshake(context, server_context, "hub.local")
    with pytest.raises(ssl.SSLCertVerificationError, match=r"hostname|Hostname"):
        handshake(context, server_context, "other.local")


def handshake(client_context: ssl.SSLContext, server_context: ssl.SSLContext, host: str) -> None:
    """Both sides in memory."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(to_client, to_server, server_hostname=host)
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    for side in (client, server, client, server):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue


@pytest.mark.parametrize("hosts", [[], ["näh.local"]])
def test_a_certificate_for_no_host_or_one_that_is_not_ascii_is_refused(hosts: list[str]) -> None:
    with pytest.raises(BrokerError, match="certificate"):
        make_server(make_ca(), hosts)


def test_the_key_of_another_ca_is_refused() -> None:
    mixed = Issued(make_ca().certificate, make_ca().key)
    with pytest.raises(BrokerError, match="not that of the certificate"):
        make_server(mixed, ["hub.local"])
