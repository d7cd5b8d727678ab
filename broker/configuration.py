"""A whole mosquitto.conf for a device (one node, loopback, with or without TLS) or a hub (many nodes, over TLS).

Valid on Mosquitto 2.0.11 (Debian 12) and later, 2.1 included: no option stands here that one of them does not know.
docs/brokers.md says what each choice is for and what changes in 2.1. Text in, text out; broker/check.py reads it back.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from broker.access import check_user_name, read_filters, retained_filters, write_filters
from broker.base import MAX_CONNECTIONS, MAX_INFLIGHT, MAX_PACKET_BYTES
from protocol.errors import BrokerError

AUTOSAVE_INTERVAL_S = 1
"""The default of 30 minutes loses all that waits at a kill. Saving on every change (``autosave_on_changes``) costs
nearly all of the throughput; this costs little: `mindstream bench broker` measures it. Mosquitto 2.0 waits until more
than this has passed by its clock of whole seconds: it saves every two seconds."""
UNLIMITED_MESSAGES = 1_000_000_000
"""Not 0: it means unlimited by the manual, but makes 2.0.16 drop every message and 2.0.17 to 2.0.21 (Ubuntu 24.04,
Debian 13) cut off clients with "Quota exceeded" (Mosquitto's issues 2879 and 3244)."""
ECHO_PREFIX = "mindstream/echo/"
"""Where a bridge puts the retained messages of its own nodes that come back to it. Nobody may read there."""
CONFIG_NAME, ACL_NAME, PASSWORDS_NAME = "mosquitto.conf", "acl", "passwords"


@dataclass(frozen=True)
class Listener:
    """Where clients connect. Raises BrokerError for one beyond loopback without TLS."""

    port: int
    host: str = "127.0.0.1"
    """Address to bind; empty for all of this machine's."""
    certificate: Path | None = None
    """PEM file with the server's certificate and those that lead to its CA."""
    key: Path | None = None
    """PEM file with its private key."""
    websockets: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.port < 65_536:
            raise _wrong(f"port {self.port} is none", "use 1 to 65535", "port")
        if (self.certificate is None) != (self.key is None):
            raise _wrong("a certificate and its key go together", "--certificate FILE --key FILE", "certificate")
        if self.certificate is None and not is_loopback(self.host):
            raise _wrong(
                f"port {self.port} on {self.host or 'every address'} would be open to the network without TLS",
                "give it --certificate and --key (`mindstream broker certificate` makes them), or 127.0.0.1",
                "certificate",
            )


@dataclass(frozen=True)
class Bridge:
    """A connection of this broker to another, which carries some nodes' branches there and what is for them back."""

    name: str
    host: str
    branches: tuple[str, ...]
    """Nodes whose branches it carries."""
    username: str
    """At the other broker. A bridge for one node takes the node's own name: it needs no other right."""
    password: str = field(repr=False)
    port: int = 8883
    ca_file: Path | None = None
    """CA certificates that the other broker's must lead to; None for no TLS, which only loopback may do without."""
    restart_first_s: int = 1
    restart_max_s: int = 30

    def __post_init__(self) -> None:
        for name in (self.name, self.username, *self.branches):
            check_user_name(name)
        if not self.branches:
            raise _wrong(f"bridge {self.name} carries no node's branch", "name one", "branches")
        if self.ca_file is None and not is_loopback(self.host):
            raise _wrong(
                f"bridge {self.name} would reach {self.host} without TLS", "name the other broker's CA", "ca_file"
            )


@dataclass(frozen=True)
class Setup:
    """All that a configuration says. ``render`` writes it; ``device`` and ``hub`` make the usual ones."""

    kind: str
    """``device`` or ``hub``: for the reader of the file."""
    folder: Path
    """Where mosquitto.conf, the password file and the ACL file lie."""
    data_folder: Path
    """Where Mosquitto keeps sessions, retained and waiting messages."""
    user: str
    """The user that Mosquitto becomes when it is started as root."""
    listeners: tuple[Listener, ...]
    bridges: tuple[Bridge, ...] = ()
    anonymous: bool = False
    """Let in whoever can connect, without names, passwords and ACL: loopback only."""
    autosave_interval_s: int = AUTOSAVE_INTERVAL_S
    max_queued_bytes: int = 0
    """For one client that is away; 0 is no limit. Beyond a limit Mosquitto drops the newest, and only counts it."""

    def __post_init__(self) -> None:
        if not self.listeners:
            raise _wrong("nobody could connect", "give it a listener", "listeners")
        open_ones = [each for each in self.listeners if not is_loopback(each.host)]
        if self.anonymous and open_ones:
            raise _wrong(
                f"port {open_ones[0].port} is open to the network, and whoever connects would be let in",
                "leave out --anonymous: names and passwords hold for all listeners of a broker",
                "anonymous",
            )
        ports = [each.port for each in self.listeners]
        if len(set(ports)) < len(ports):
            raise _wrong("two listeners have one port", "give each its own", "port")
        if self.autosave_interval_s < 1 or self.max_queued_bytes < 0:
            raise _wrong("autosave_interval_s must be at least 1 and max_queued_bytes at least 0", "", "durability")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def render(setup: Setup) -> str:
    """The text of mosquitto.conf. It holds the passwords of bridges: mode 0600. Raises BrokerError."""
    parts = [_general(setup), _access(setup), *map(_listener, setup.listeners)]
    parts += [_bridge(each) for each in setup.bridges]
    return "\n".join(parts)


_GENERAL = """\
# Mosquitto for a Mindstream {kind}. Made by `mindstream broker render`; docs/brokers.md explains it.

user {user}
log_dest stderr
log_type error
log_type warning
log_type notice
connection_messages false
set_tcp_nodelay true

# What waits for clients that are away, sessions and retained messages are on the disk within {saved_s} s.
persistence true
persistence_location {data_folder}/
autosave_interval {autosave}
autosave_on_changes false

# Nothing is dropped in silence: without these lines it is from the 1,001st message for a client that is away.
# {unlimited:,} stands for no limit, because some releases of 2.0 misread 0.
max_queued_messages {unlimited}
{queued_bytes}max_inflight_messages {max_inflight}
# Above every limit of the topic table. 2.0 takes 256 MB without this line, 2.1 only 2,000,000 bytes.
max_packet_size {max_packet_bytes}
"""


def _general(setup: Setup) -> str:
    limit = setup.max_queued_bytes
    return _GENERAL.format(
        kind=setup.kind,
        user=_value(setup.user, "user"),
        data_folder=_value(setup.data_folder, "data folder").rstrip("/"),
        autosave=setup.autosave_interval_s,
        saved_s=setup.autosave_interval_s + 1,
        unlimited=UNLIMITED_MESSAGES,
        queued_bytes=(
            f"# A limit that was asked for: beyond {limit:,} bytes for one client the newest messages are dropped.\n"
            if limit
            else ""
        )
        + f"max_queued_bytes {limit}\n",
        max_inflight=MAX_INFLIGHT,
        max_packet_bytes=MAX_PACKET_BYTES,
    )


def _access(setup: Setup) -> str:
    if setup.anonymous:
        return "# Whoever can connect to this machine's loopback may do everything.\nallow_anonymous true\n"
    return (
        "# Names, passwords and rights are the same on every listener. Deprecated in 2.1, where they still work.\n"
        "allow_anonymous false\n"
        f"password_file {_value(setup.folder / PASSWORDS_NAME, 'password file')}\n"
        f"acl_file {_value(setup.folder / ACL_NAME, 'ACL file')}\n"
    )


def _listener(listener: Listener) -> str:
    lines = [f"listener {listener.port} {_value(listener.host, 'host')}".rstrip(), f"max_connections {MAX_CONNECTIONS}"]
    if listener.websockets:
        lines.append("protocol websockets")
    if listener.certificate is not None and listener.key is not None:
        lines += [
            f"certfile {_value(listener.certificate, 'certificate')}",
            f"keyfile {_value(listener.key, 'key')}",
            "tls_version tlsv1.2",
        ]
    return "\n".join(lines) + "\n"


def _bridge(bridge: Bridge) -> str:
    lines = [
        f"# To {bridge.host}. With MQTT 3.1.1, the default, it would strip every property (expiry, response topic).",
        f"connection {bridge.name}",
        f"address {_value(bridge.host, 'host')}:{bridge.port}",
        "bridge_protocol_version mqttv50",
        f"remote_clientid mindstream-bridge-{bridge.username}-{bridge.name}",
        f"remote_username {bridge.username}",
        f"remote_password {_value(bridge.password, 'password')}",
        "# What waits for the other side stays, also through a restart of this broker.",
        "cleansession false",
        "keepalive_interval 15",
        f"restart_timeout {bridge.restart_first_s} {bridge.restart_max_s}",
        "# Whether it is connected: retained on this broker, $SYS/broker/connection/…/state.",
        "notifications true",
        "notifications_local_only true",
        "bridge_attempt_unsubscribe false",
        f"bridge_max_packet_size {MAX_PACKET_BYTES}",
    ]
    if bridge.ca_file is not None:
        lines += [f"bridge_cafile {_value(bridge.ca_file, 'CA file')}", "bridge_tls_version tlsv1.2"]
    lines.append("# Out goes what these nodes say.")
    for branch in bridge.branches:
        lines += [f"topic {each} out 1" for each in write_filters(branch)]
    lines.append(
        "# At each reconnect their own retained messages come back, older than those here: they are put aside."
    )
    for branch in bridge.branches:
        lines += [f'topic {each} in 1 {ECHO_PREFIX} ""' for each in retained_filters(branch)]
    lines.append("# In comes what all others say, and of asks and replies those for these nodes.")
    inward = dict.fromkeys(each for branch in bridge.branches for each in read_filters(branch, bridged=True))
    lines += [f'topic {each} in 1 "" ""' for each in inward]
    return "\n".join(lines) + "\n"


def _value(value: object, what: str) -> str:
    """A value for one line. Raises BrokerError when it would not stay one, or would be cut."""
    text = str(value)
    if any(ord(each) < 32 for each in text) or text != text.strip():
        raise _wrong(f"the {what} cannot stand in mosquitto.conf", "no line ends, and no spaces at its ends", what)
    return text


def _wrong(problem: str, hint: str, field: str) -> BrokerError:
    return BrokerError(f"making a configuration for Mosquitto: {problem}", hint=hint, field=field, reason=problem)
