"""What tests of the bus share: waiting for conditions, raw MQTT clients, and child processes that can be killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgpack
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

from broker.base import Broker
from broker.child import spawn
from protocol.ids import uuid7
from protocol.messages import MemoryPut, MemoryStored
from tests.support.waiting import DEADLINE_S, TTL_MS, wait_for

ROOT = Path(__file__).resolve().parents[2]
CHILD = Path(__file__).with_name("bus_child.py")
PUT_TOPIC = "mindstream/v1/{node}/ask/sprout/memory_store/put"


def stored(identifier: str = "", *, seq: int = 1) -> MemoryStored:
    return MemoryStored(id=identifier, node="sprout", scope="everyone", log_id="log", seq=seq)


class Answers:
    """A handler of puts that remembers what it carried out."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.held = threading.Event()
        """Set while a put whose text begins with ``hold`` is in the handler's hands."""
        self.release = threading.Event()

    def __call__(self, message: Any) -> MemoryStored:
        put: MemoryPut = message.data
        self.texts.append(put.text)
        if put.text.startswith("hold"):
            self.held.set()
            assert self.release.wait(DEADLINE_S)
        return stored(message.id, seq=len(self.texts))


def envelope(type: str, data: Any, /, *, source: str = "mars/raw", **changes: Any) -> bytes:
    """An envelope as another program would write it, with ``changes``; a field set to ... is left out."""
    fields = {"v": 1, "id": uuid7(), "type": type, "source": source, "time_us": time.time_ns() // 1000, "data": data}
    fields.update(changes)
    packed: bytes = msgpack.packb({name: value for name, value in fields.items() if value is not ...})
    return packed


def put_envelope(text: str, **changes: Any) -> bytes:
    fields = {"reply_to": "raw", "ttl_ms": TTL_MS, **changes}
    return envelope("memory.put", {"text": text}, **fields)


class RawClient:
    """A paho client of another program, on node ``mars``: it keeps the answers that come to it."""

    def __init__(
        self, broker: Broker, client_id: str = "raw", subscribe: str = "mindstream/v1/+/reply/mars/raw"
    ) -> None:
        self.messages: list[tuple[str, bytes]] = []
        self.mqtt = paho.Client(CallbackAPIVersion.VERSION2, client_id=client_id, protocol=paho.MQTTv5)
        self.mqtt.max_inflight_messages_set(0)
        self.mqtt.on_message = lambda _c, _u, message: self.messages.append((message.topic, bytes(message.payload)))
        subscribed = threading.Event()
        self.mqtt.on_subscribe = lambda *_: subscribed.set()
        self.mqtt.on_connect = lambda client, *_: client.subscribe(subscribe, qos=1)
        self.mqtt.connect(broker.host, broker.port)
        self.mqtt.loop_start()
        assert subscribed.wait(DEADLINE_S)

    def publish(self, topic: str, payload: bytes, qos: int = 1) -> None:
        self.mqtt.publish(topic, payload, qos=qos).wait_for_publish(DEADLINE_S)

    def put(self, payload: bytes) -> None:
        self.publish(PUT_TOPIC.format(node="mars"), payload)

    def answers(self) -> list[dict[str, Any]]:
        return [msgpack.unpackb(payload) for _, payload in self.messages]

    def answer_to(self, identifier: str) -> dict[str, Any]:
        def found() -> list[dict[str, Any]]:
            return [answer for answer in self.answers() if answer.get("correlation") == identifier]

        wait_for(found, f"an answer to {identifier}")
        return found()[0]

    def close(self) -> None:
        self.mqtt.disconnect()
        self.mqtt.loop_stop()


class Child:
    """``bus_child.py`` in a process of its own; ``lines`` is what it has said so far."""

    def __init__(self, *arguments: str) -> None:
        self.process = spawn(
            [sys.executable, str(CHILD), *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as out:
            for line in out:
                self.lines.append(line.decode().rstrip("\n"))

    def wait_for(self, line: str, count: int = 1) -> None:
        wait_for(lambda: self.lines.count(line) >= count, f"the child says {line!r} {count} times: {self.lines[-5:]}")

    @property
    def ended(self) -> bool:
        """Whether the process is gone and its last line was read."""
        return self.process.poll() is not None and not self._reader.is_alive()

    def kill(self) -> None:
        """kill -9, and wait for the end."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(DEADLINE_S)
        self._reader.join(DEADLINE_S)


def kill_broker(broker: Broker) -> None:
    """kill -9; ``broker.start()`` brings it back on the same port."""
    pid = broker.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not broker.alive, "the broker is dead")
