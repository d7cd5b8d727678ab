"""The embedded broker: rumqttd from the ``iotcore`` wheel, MQTT 5, on loopback, in a child process.

For trials, tests and a node that stands alone; devices run Mosquitto. What a client must know of it:

- It keeps nothing through its own death, has no ACLs, and serves MQTT 5 only on its port.
- It refuses client ids with spaces and a keep-alive of 0.
- It sends up to 100 unacknowledged messages whatever Receive Maximum a client names; and while a client holds that
  many, it sends this client nothing else: no PUBACK, no SUBACK, no answer to a ping. A client that holds them for
  longer than its keep-alive loses the connection, and a handler that waits for the bus before it acknowledges may
  wait for itself.
- It lets the oldest of a session's waiting messages go when a topic filter's log is full.

``python -m broker.embedded --port N`` is the child, and can be run by hand.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path

from broker.base import CONNECT_TIMEOUT_MS, MAX_CONNECTIONS, MAX_INFLIGHT, MAX_PACKET_BYTES, MIB, Broker

SEGMENT_BYTES = 8 * MIB
"""rumqttd keeps a log in memory for every topic filter, read or not, in segments of this size…"""
SEGMENTS = 8
"""…and drops the oldest segment beyond this count: at most 64 MiB a filter, where its default takes a gigabyte.
A session that is away longer than that loses messages; the memory log repairs itself by asking (`memory/have`)."""
OUTGOING_PACKETS = 200
"""Packets handed to one connection in one turn, so that a fast topic does not starve the others."""

CONFIG = """\
id = 0

[router]
id = 0
max_connections = {max_connections}
max_outgoing_packet_count = {outgoing_packets}
max_segment_size = {segment_bytes}
max_segment_count = {segments}

[v5.1]
name = "mindstream"
listen = "{host}:{port}"
next_connection_delay_ms = 0

[v5.1.connections]
connection_timeout_ms = {connect_timeout_ms}
max_payload_size = {max_packet_bytes}
max_inflight_count = {max_inflight}
"""


class EmbeddedBroker(Broker):
    """rumqttd in a child process; see ``Broker`` for the arguments.

    A start after ``kill -9`` takes the same port at once; sessions, retained and waiting messages are gone then.
    """

    kind = "embedded"

    def _command(self, port: int) -> list[str]:
        return [sys.executable, "-m", "broker.embedded", "--host", self.host, "--port", str(port)]

    def _working_folder(self) -> Path:
        # `-m` finds this room from its parent folder, in a checkout and in site-packages alike.
        return Path(__file__).resolve().parent.parent


def render_config(host: str, port: int) -> str:
    """The rumqttd configuration (TOML)."""
    return CONFIG.format(
        host=host,
        port=port,
        max_connections=MAX_CONNECTIONS,
        outgoing_packets=OUTGOING_PACKETS,
        segment_bytes=SEGMENT_BYTES,
        segments=SEGMENTS,
        connect_timeout_ms=CONNECT_TIMEOUT_MS,
        max_packet_bytes=MAX_PACKET_BYTES,
        max_inflight=MAX_INFLIGHT,
    )


def main(arguments: list[str] | None = None) -> None:
    """The child process: run the broker until a signal ends it."""
    parser = argparse.ArgumentParser(prog="python -m broker.embedded", description="MQTT 5 broker on loopback.")
    parser.add_argument("--port", type=int, required=True, help="TCP port")
    parser.add_argument("--host", default="127.0.0.1", help="loopback address (default 127.0.0.1)")
    options = parser.parse_args(arguments)
    broker = EmbeddedBroker(options.port, host=options.host)

    # rumqttd wraps its routing in spans of level ERROR: every packet would be a log record.
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("rumqttd").setLevel(logging.CRITICAL)
    from iotcore.iotcore import IotCoreBroker

    # The wheel takes its configuration from a file named *.toml only, and reads it while it is made.
    with tempfile.TemporaryDirectory(prefix="mindstream-broker-") as folder:
        config_path = Path(folder) / "rumqttd.toml"
        config_path.write_text(render_config(broker.host, options.port))
        native = IotCoreBroker(config_path=str(config_path))
    native.check_ports()
    native.run_forever()


if __name__ == "__main__":
    main()
