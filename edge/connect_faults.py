"""Why there is no connection, in words that say what to do: from a socket error, a CONNACK, or a silent end.

TLS spoken to a plain port, and plain MQTT to a TLS port, mostly end without a word. So the port is asked once what it
speaks, by a handshake or a CONNECT without name and password.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
from dataclasses import dataclass
from urllib.parse import urlsplit

CLOSED_AGAIN = "closed again and again"
PROBE_TIMEOUT_S = 2.0
_TLS_RECORDS = (b"\x15\x03", b"\x16\x03")
"""An alert and a handshake (RFC 8446 section 5.1)."""
_CONNACK = 0x20
_HOST_MISMATCH, _IP_MISMATCH = 62, 64
_NOT_YET_VALID, _EXPIRED = 9, 10
"""X509_V_ERR_… of OpenSSL's x509_vfy.h."""


@dataclass(frozen=True)
class Fault:
    """One reason why there is no connection, or no subscription."""

    text: str
    """What happened, of which end."""
    reason: str
    """The same in a few words."""
    hint: str = "is the broker running there? `mindstream doctor` looks"
    field: str = ""
    """The key of mindstream.toml to look at."""
    lasting: bool = False
    """Waiting does not mend it: someone must change something."""


def of_error(error: OSError, url: str, ca_file: str) -> Fault:
    """Why connecting failed before MQTT was spoken."""
    host, port, tls = _parts(url)
    if isinstance(error, ssl.SSLCertVerificationError):
        return _of_certificate(error, host, ca_file)
    if isinstance(error, socket.gaierror):
        return Fault(f"the name {host} does not resolve: {error.strerror}", "unknown host", field="broker.url")
    if isinstance(error, ConnectionRefusedError):
        return Fault(f"nothing listens on {host}:{port}", "connection refused", field="broker.url")
    # Into the TLS handshake a plain port answers nonsense, nothing at all, or closes the connection.
    in_handshake = isinstance(error, (ssl.SSLError, ConnectionResetError, TimeoutError, BrokenPipeError))
    if tls and in_handshake and speaks_mqtt(host, port):
        return Fault(
            f"{host}:{port} speaks MQTT without TLS, and broker.url asks for TLS (mqtts)",
            "no TLS at the broker",
            hint=f"give the broker a TLS listener, or on this machine alone set broker.url to mqtt://{host}:{port}",
            field="broker.url",
            lasting=True,
        )
    if isinstance(error, TimeoutError):
        return Fault(f"{host}:{port} does not answer", "no answer", field="broker.url")
    if isinstance(error, ssl.SSLError):
        return Fault(
            f"the TLS handshake with {host}:{port} failed: {error.reason or error.strerror or error}",
            "TLS handshake failed",
            hint="is it the broker's TLS port? `mindstream doctor` looks",
            field="broker.url",
        )
    return Fault(f"{host}:{port}: {error.strerror or error}", "unreachable", field="broker.url")


def _of_certificate(error: ssl.SSLCertVerificationError, host: str, ca_file: str) -> Fault:
    text = error.verify_message.rstrip(".")
    if error.verify_code in (_HOST_MISMATCH, _IP_MISMATCH):
        return Fault(
            f"the broker's certificate is for another name than {host}: {text}",
            "certificate of another name",
            hint="set broker.url to the name in the certificate, or give the broker one for this name",
            field="broker.url",
            lasting=True,
        )
    if error.verify_code in (_NOT_YET_VALID, _EXPIRED):
        return Fault(
            f"the broker's certificate is not valid now: {text}",
            "certificate not valid now",
            hint="is this node's clock right? else renew the broker's certificate",
            lasting=error.verify_code == _EXPIRED,
        )
    known = f"the CA in {ca_file}" if ca_file else "a CA of this system"
    return Fault(
        f"the broker's certificate is not signed by {known}: {text}",
        "certificate of an unknown CA",
        hint="set broker.ca_file to the certificate of the CA that signed the broker's",
        field="broker.ca_file",
        lasting=True,
    )


def of_connack(code: int, text: str, url: str, client_id: str, username: str, version: str) -> Fault:
    """Why the broker refused the CONNECT.

    Args:
        code: MQTT 5 reason code (section 3.2.2.2); one of 3.1.1 translated to it.
        text: the code's name.
        version: which MQTT version was spoken.
    """
    host, port, _ = _parts(url)
    refused = f"the broker at {host}:{port} refused the connection: {text} ({code})"
    if code in (0x86, 0x87, 0x8C):
        who = f"the name {username!r} or its password" if username else "a connection without a name"
        return Fault(
            f"{refused}: it does not take {who}",
            "not authorized",
            hint="broker.username and broker.password_file must be what the broker has"
            if username
            else "set broker.username and broker.password_file",
            field="broker.password_file" if username else "broker.username",
            lasting=True,
        )
    if code == 0x84:
        return Fault(
            f"{refused}: it does not speak MQTT {version}",
            "unsupported MQTT version",
            hint='set broker.protocol to "auto"',
            field="broker.protocol",
            lasting=True,
        )
    if code == 0x85:
        return Fault(
            f"{refused}: it does not take the client id {client_id}",
            "client id refused",
            hint="the broker's log says why",
            lasting=True,
        )
    if code == 0x8A:
        return Fault(f"{refused}", "banned", hint="the broker's log says why", lasting=True)
    return Fault(refused, text, hint="the broker's log says why")


def of_silence(url: str, began: bytes, *, timed_out: bool = False) -> Fault:
    """Why the broker may have left a CONNECT without an answer.

    Args:
        began: the first bytes that came, if any did.
        timed_out: it was we who closed the connection.
    """
    host, port, tls = _parts(url)
    if not tls and (began.startswith(_TLS_RECORDS) or (not began and speaks_tls(host, port))):
        return Fault(
            f"{host}:{port} speaks TLS, and broker.url asks for none (mqtt)",
            "TLS at the broker",
            hint=f"set broker.url to mqtts://{host}:{port}",
            field="broker.url",
            lasting=True,
        )
    if began:
        return Fault(
            f"{host}:{port} does not speak MQTT: it answered {began!r}",
            "not MQTT",
            hint="does broker.url name the broker's port?",
            field="broker.url",
            lasting=True,
        )
    if timed_out:
        return Fault(
            f"{host}:{port} takes connections and does not answer a CONNECT",
            "no answer",
            hint="is it the broker's port, and is the broker overloaded?",
            field="broker.url",
        )
    wants = "its log says why; it may want a client certificate, which is not supported" if tls else "its log says why"
    return Fault(f"{host}:{port} closes the connection over the first packet", "closed by the broker", hint=wants)


def of_losses(client_id: str, *, taken_over: bool) -> Fault:
    """The broker accepts connections and soon ends them, again and again.

    Args:
        taken_over: it said that another has connected under this id (MQTT 5 reason 0x8E; Mosquitto 2.0 does not say).
    """
    return Fault(
        f"another client has connected as {client_id}"
        if taken_over
        else f"the broker ends each connection of {client_id} soon after it has accepted it",
        CLOSED_AGAIN,
        hint="does another node have this node's name, or does this one run twice? the broker's log says why",
        field="node.name",
        lasting=True,
    )


def of_subscriptions(refused: dict[str, str], username: str) -> Fault:
    """Why the broker refused a subscription; ``refused`` is filter to reason."""
    which = ", ".join(f"{filter} ({reason})" for filter, reason in sorted(refused.items()))
    return Fault(
        f"the broker refused a subscription: {which}",
        "subscription refused",
        hint=f"its ACL must let {username or 'this client'} read there; it is tried again every now and then",
        field="broker.username",
        lasting=True,
    )


def speaks_tls(host: str, port: int) -> bool:
    """Whether a TLS server answers there, whatever its certificate; nothing is sent to it but the handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with (
            socket.create_connection((host, port), timeout=PROBE_TIMEOUT_S) as connection,
            context.wrap_socket(connection, server_hostname=host),
        ):
            return True
    except ssl.SSLError as error:
        return error.reason in ("TLSV13_ALERT_CERTIFICATE_REQUIRED", "SSLV3_ALERT_HANDSHAKE_FAILURE")
    except OSError:
        return False


def speaks_mqtt(host: str, port: int) -> bool:
    """Whether an MQTT broker answers there without TLS, be it with a refusal; no name or password is sent."""
    client_id = f"mindstream-probe-{os.getpid()}".encode()
    for level, properties in ((5, b"\x00"), (4, b"")):
        # Clean start, keep-alive 10 s. A broker that does not know the level may close without an answer.
        body = b"\x00\x04MQTT" + bytes([level]) + b"\x02\x00\x0a" + properties
        body += len(client_id).to_bytes(2, "big") + client_id
        with (
            contextlib.suppress(OSError),
            socket.create_connection((host, port), timeout=PROBE_TIMEOUT_S) as connection,
        ):
            connection.sendall(bytes([0x10, len(body)]) + body)
            if connection.recv(1) == bytes([_CONNACK]):
                connection.sendall(b"\xe0\x00")
                return True
    return False


def _parts(url: str) -> tuple[str, int, bool]:
    parts = urlsplit(url)
    tls = parts.scheme == "mqtts"
    return parts.hostname or "", parts.port or (8883 if tls else 1883), tls
