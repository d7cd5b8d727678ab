"""Mosquittos on rendered configurations, and MQTT clients with names, passwords, TLS and properties."""

from __future__ import annotations

import getpass
import os
import signal
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from broker.child import spawn
from broker.configuration import Listener, Setup
from broker.mosquitto import find_mosquitto
from edge.broker_setup import BrokerFolder
from tests.support.waiting import DEADLINE_S, wait_for

PASSWORD = "correct horse battery"
NOT_AUTHORISED = 0x87
ME = getpass.getuser()


class Mosquitto:
    """Mosquitto on the configuration of ``setup``, with users; a context manager. It keeps its data when killed."""

    def __init__(self, setup: Setup, *users: str) -> None:
        self.setup = setup
        self.folder = BrokerFolder(setup.folder)
        self.folder.write(setup)
        for name in users:
            self.folder.add(name, PASSWORD)
        self.log_path = setup.folder / "log"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def port(self) -> int:
        return self.setup.listeners[0].port

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def start(self) -> None:
        with self.log_path.open("ab") as log:
            self.process = spawn(
                [str(find_mosquitto()), "-c", str(self.folder.config_path)],
                death_signal=signal.SIGTERM,
                stdout=log,
                stderr=log,
            )
        for listener in self.setup.listeners:
            wait_for(lambda each=listener: self._accepts(each), f"port {listener.port} listens: {self.log[-2000:]}")

    def _accepts(self, listener: Listener) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"Mosquitto ended: {self.log[-2000:]}"
        with socket.socket() as probe:
            return probe.connect_ex((listener.host or "127.0.0.1", listener.port)) == 0

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(DEADLINE_S)

    def reload(self) -> None:
        assert self.process is not None
        # It warns of the same rules each time it reads them, and answers nobody until it has read all.
        seen = self.log.count("Warning: ACL pattern")
        os.kill(self.process.pid, signal.SIGHUP)
        wait_for(lambda: self.log.count("Warning: ACL pattern") > seen, "the rights are read again")

    def save(self) -> None:
        """Have it write to the disk what it holds now, and wait for that."""
        assert self.process is not None
        database = self.setup.data_folder / "mosquitto.db"

        def saved_ns() -> int:
            return database.stat().st_mtime_ns if database.exists() else 0

        # Whichever save comes next: it does nothing else meanwhile, so all that was acknowledged before is in it.
        before_ns = saved_ns()
        self.process.send_signal(signal.SIGUSR1)
        wait_for(lambda: saved_ns() > before_ns, "the state is saved")

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(DEADLINE_S)

    def __enter__(self) -> Mosquitto:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Refused(Exception):
    """The broker's CONNACK said no; ``code`` is its reason."""

    def __init__(self, code: int) -> None:
        super().__init__(f"CONNACK {code:#x}")
        self.code = code


class NamedClient:
    """An MQTT 5 client with a name; keeps what comes to it, and the reason of every PUBACK."""

    def __init__(
        self,
        port: int,
        name: str = "",
        *,
        password: str = PASSWORD,
        client_id: str = "",
        session_s: int = 0,
        ca_file: Path | None = None,
        websockets: bool = False,
        host: str = "127.0.0.1",
    ) -> None:
        self.messages: list[paho.MQTTMessage] = []
        self.reasons: dict[int, int] = {}
        self._subscribed = threading.Event()
        self._connack: list[int] = []
        self.mqtt = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id or f"test-{name}-{os.urandom(3).hex()}",
            protocol=paho.MQTTv5,
            transport="websockets" if websockets else "tcp",
        )
        self.mqtt.reconnect_delay_set(0.1, 0.5)  # type: ignore[arg-type]
        self.mqtt.max_inflight_messages_set(0)
        if name:
            self.mqtt.username_pw_set(name, password)
        if ca_file is not None:
            self.mqtt.tls_set(ca_certs=str(ca_file))
        self.mqtt.on_message = lambda _c, _u, message: self.messages.append(message)
        self.mqtt.on_subscribe = lambda *_: self._subscribed.set()
        self.mqtt.on_publish = lambda _c, _u, mid, reason, _p: self.reasons.__setitem__(mid, reason.value)
        self.mqtt.on_connect = lambda _c, _u, _f, reason, _p: self._connack.append(reason.value)
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = session_s
        self.mqtt.connect(host, port, clean_start=session_s == 0, properties=properties)
        self.mqtt.loop_start()
        try:
            wait_for(lambda: self._connack, f"{name or 'a client'} has an answer to its CONNECT")
            if self._connack[0]:
                raise Refused(self._connack[0])
        except BaseException:
            self.close()
            raise

    @property
    def payloads(self) -> list[bytes]:
        return [message.payload for message in self.messages]

    def subscribe(self, *filters: str, no_local: bool = False) -> None:
        self._subscribed.clear()
        self.mqtt.subscribe(
            [(each, SubscribeOptions(qos=1, noLocal=no_local, retainAsPublished=True)) for each in filters]
        )
        assert self._subscribed.wait(DEADLINE_S)

    def publish(self, topic: str, payload: bytes = b"x", *, retain: bool = False, **properties: Any) -> int:
        """Publish at QoS 1; the PUBACK's reason code."""
        info = self.mqtt.publish(topic, payload, qos=1, retain=retain, properties=publish_properties(**properties))
        wait_for(lambda: info.mid in self.reasons, f"a PUBACK for {topic}")
        return self.reasons.pop(info.mid)

    def publish_all(self, topic: str, payloads: list[bytes]) -> None:
        """Publish at QoS 1, as fast as they go, and wait for every PUBACK."""
        infos = [self.mqtt.publish(topic, payload, qos=1) for payload in payloads]
        wait_for(lambda: all(info.mid in self.reasons for info in infos), "every PUBACK")
        assert all(self.reasons.pop(info.mid) < 0x80 for info in infos)

    def close(self) -> None:
        self.mqtt.disconnect()
        self.mqtt.loop_stop()

    def __enter__(self) -> NamedClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def publish_properties(**values: Any) -> Properties | None:
    if not values:
        return None
    properties = Properties(PacketTypes.PUBLISH)
    for name, value in values.items():
        setattr(properties, name, value)
    return properties
