"""`mindstream bench bus`: what our typed bus costs over raw paho, and how many durable puts a node takes.

On the embedded broker and on Mosquitto. Publisher and subscriber are processes of their own; the typed one and the
raw one take turns, round by round, over the same broker with the same bytes, QoS, in-flight window and socket
options, and medians are compared. Raw paho is given a window of our own making (a semaphore): its built-in one scans
all that waits at every PUBACK, and would be too weak a baseline.

Puts are asked by eight clients, each with a connection of its own and one put under way, in two processes, and
answered by the real memory store in a process of its own, after its commit.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

from bench.report import Figures, Progress, file_system, machine, silent, versions
from bench.worker import PATIENCE_S, Countdown, answer, commands, worker
from broker.base import Broker
from broker.embedded import EmbeddedBroker
from broker.mosquitto import MosquittoBroker, find_mosquitto
from edge.bus import PUBLISH_WINDOW, Bus
from protocol import codec
from protocol.errors import BusError
from protocol.messages import Event, MemoryPut, MemoryStored

PAYLOAD_BYTES = 200
PUT_CLIENTS = 8
PUT_PROCESSES = 2
COMMIT_DELAY_MS = 5.0
BASELINE = (
    "raw paho-mqtt, MQTT 5, QoS 1, the same 200-byte payloads without properties, the same in-flight window, "
    "TCP_NODELAY and TCP_QUICKACK, taking turns with the typed bus"
)
_HIGHER_IS_BETTER = {
    "typed_throughput_ratio": True,
    "typed_latency_p99_ratio": False,
    "rpc_p50_ms": False,
    "durable_puts_per_s": True,
    "durable_puts_per_s_5ms_commit": True,
}


def run(*, quick: bool = False, progress: Progress = silent) -> Figures:
    """Measure on each broker; a key without a suffix is the worse of the two.

    ``quick`` shows that it works; its figures are no measurement.
    """
    figures: Figures = {}
    brokers: dict[str, Callable[[], Broker]] = {"embedded": EmbeddedBroker}
    if find_mosquitto() is not None:
        brokers["mosquitto"] = MosquittoBroker
    else:
        progress("Mosquitto is not installed: its figures are null")
    for name in ("embedded", "mosquitto"):
        found: Figures = {}
        if name in brokers:
            found = _measure(brokers[name], quick, functools.partial(_say, progress, name))
        figures |= {f"{key}_{name}": found.get(key) for key in _keys()}
    for key, higher in _HIGHER_IS_BETTER.items():
        both = [value for name in brokers if isinstance(value := figures[f"{key}_{name}"], float)]
        figures[key] = (min(both) if higher else max(both)) if both else None
    figures |= {
        "payload_bytes": PAYLOAD_BYTES,
        "put_clients": PUT_CLIENTS,
        "disk": file_system(_scratch()),
        "machine": machine(),
        "versions": versions("paho-mqtt", "msgspec", "apsw", "iotcore"),
        "baseline": BASELINE,
    }
    return figures


def _say(progress: Progress, broker: str, line: str) -> None:
    progress(f"{broker}: {line}")


def _keys() -> tuple[str, ...]:
    return (
        *_HIGHER_IS_BETTER,
        "typed_messages_per_s",
        "raw_messages_per_s",
        "typed_latency_p99_ms",
        "raw_latency_p99_ms",
    )


def _measure(make: Callable[[], Broker], quick: bool, progress: Progress) -> Figures:
    with make() as broker:
        progress("throughput")
        figures = _throughput(broker.url, rounds=1 if quick else 7, messages=500 if quick else 8_000)
        progress("latency and asks")
        figures |= _latency(broker.url, rounds=2 if quick else 10, messages=50 if quick else 300)
    for key, delay_ms in (("durable_puts_per_s", 0.0), ("durable_puts_per_s_5ms_commit", COMMIT_DELAY_MS)):
        progress(f"durable puts, {delay_ms:g} ms more a commit")
        with make() as broker:
            figures[key] = _durable_puts(broker.url, delay_ms, rounds=1 if quick else 5, seconds=1.0 if quick else 4.0)
    return figures


def _throughput(url: str, *, rounds: int, messages: int) -> Figures:
    """Messages a second from the first publish to the last handler call, medians of the rounds."""
    rates: dict[str, list[float]] = {"typed": [], "raw": []}
    with _worker("subscribe", url) as subscriber, _worker("publish", url) as publisher:
        subscriber.read()
        publisher.read()
        for each in range(rounds + 1):
            for kind in ("typed", "raw"):
                subscriber.write(f"{kind} {messages}")
                subscriber.read()
                publisher.write(f"{kind} {messages}")
                began_s, ended_s = float(publisher.read()), float(subscriber.read())
                if each or rounds == 1:  # the first round warms up
                    rates[kind].append(messages / (ended_s - began_s))
    typed, raw = statistics.median(rates["typed"]), statistics.median(rates["raw"])
    return {"typed_messages_per_s": typed, "raw_messages_per_s": raw, "typed_throughput_ratio": typed / raw}


def _latency(url: str, *, rounds: int, messages: int) -> Figures:
    """One message at a time, there and noticed by the handler, in milliseconds; asks, there and back."""
    found: dict[str, list[float]] = {"typed": [], "raw": [], "ask": []}
    with _worker("answer", url) as responder, _worker("latency", url) as worker:
        responder.read()
        worker.read()
        for _ in range(rounds):
            for kind, times in found.items():
                worker.write(f"{kind} {messages}")
                times += [float(value) for value in worker.read().split()]
    p99 = {kind: statistics.quantiles(times, n=100)[98] for kind, times in found.items()}
    return {
        "typed_latency_p99_ms": p99["typed"],
        "raw_latency_p99_ms": p99["raw"],
        "typed_latency_p99_ratio": p99["typed"] / p99["raw"],
        "rpc_p50_ms": statistics.median(found["ask"]),
    }


def _durable_puts(url: str, commit_delay_ms: float, *, rounds: int, seconds: float) -> float:
    """Puts answered in a second, all clients together; the median of the rounds."""
    with tempfile.TemporaryDirectory(dir=_scratch(), prefix="puts-") as folder, contextlib.ExitStack() as stack:
        store = stack.enter_context(_worker("store", url, folder, str(commit_delay_ms)))
        store.read()
        clients = [
            stack.enter_context(_worker("put", url, f"p{number}", str(PUT_CLIENTS // PUT_PROCESSES)))
            for number in range(PUT_PROCESSES)
        ]
        for client in clients:
            client.read()
        rates = []
        for each_s in (0.5, *[seconds] * rounds):  # the first warms up
            for client in clients:
                client.write(str(each_s))
            rates.append(sum([float(client.read()) for client in clients]))
        return statistics.median(rates[1:])


def _scratch() -> Path:
    """A folder on a disk: /tmp may be memory."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mindstream" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# --- worker processes ------------------------------------------------------------------------------------------

_worker = functools.partial(worker, "bench.bus")


def _event(number: int) -> Event:
    """An event whose envelope has PAYLOAD_BYTES bytes."""
    bare = len(codec.encode(Event("bench", "info", f"{number:08d}"), source="bench/typed00"))
    return Event("bench", "info", f"{number:08d}" + "x" * (PAYLOAD_BYTES - bare))


def _no_delay(_client: paho.Client, _data: Any, sock: Any) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class _Raw:
    """A paho client with our socket options and our window, and nothing else of ours."""

    def __init__(
        self, url: str, client_id: str, subscribe: str = "", on_message: Callable[..., None] | None = None
    ) -> None:
        self._window = threading.BoundedSemaphore(PUBLISH_WINDOW)
        self._ready = threading.Event()
        host, _, port = url.removeprefix("mqtt://").partition(":")
        self._paho = paho.Client(CallbackAPIVersion.VERSION2, client_id=client_id, protocol=paho.MQTTv5)
        self._paho.max_inflight_messages_set(0)
        self._paho.on_socket_open = _no_delay
        self._paho.on_connect = self._on_connect
        self._paho.on_subscribe = lambda *_: self._ready.set()
        self._paho.on_publish = self._on_publish
        self._on_message = on_message
        self._paho.on_message = self._on_raw_message
        self._subscribe = subscribe
        self._under_way = 0
        self._quick = False
        self._paho.connect(host, int(port))
        self._paho.loop_start()
        if not self._ready.wait(PATIENCE_S):
            raise BusError(f"measuring: raw paho has no connection to {url}")

    def _on_connect(self, _client: Any, _data: Any, _flags: Any, _reason: Any, properties: Any) -> None:
        # The broker's limit is kept, as our bus keeps it.
        granted = min(PUBLISH_WINDOW, getattr(properties, "ReceiveMaximum", 65_535))
        self._window = threading.BoundedSemaphore(granted)
        if self._subscribe:
            self._paho.subscribe(self._subscribe, qos=1)
        else:
            self._ready.set()

    def _on_publish(self, *_: object) -> None:
        self._window.release()
        if self._quick:
            self._quick_ack()

    def _on_raw_message(self, _client: Any, _data: Any, message: Any) -> None:
        if self._on_message is not None:
            self._on_message(message)
        if self._quick:
            self._quick_ack()

    def quick(self) -> None:
        """Send TCP ACKs at once from now on: for one message at a time."""
        self._quick = True

    def _quick_ack(self) -> None:
        sock: Any = self._paho.socket()
        if sock is not None and hasattr(socket, "TCP_QUICKACK"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    def publish(self, topic: str, payload: bytes) -> None:
        self._window.acquire()
        self._paho.publish(topic, payload, qos=1)

    def stop(self) -> None:
        self._paho.disconnect()
        self._paho.loop_stop()


TYPED_CLIENT, RAW_CLIENT = "typed00", "raw0000"
_TOPIC = "mindstream/v1/bench/event/{}"


def _subscribe(url: str) -> None:
    typed, raw = Countdown(), Countdown()
    bus = Bus(url=url, node="bench", client="subscriber")
    bus.hear(Event, typed, service=TYPED_CLIENT)
    bus.start()
    client = _Raw(url, "raw-subscriber", _TOPIC.format(RAW_CLIENT), raw)
    answer("ready")
    for kind, count in commands():
        counter = typed if kind == "typed" else raw
        counter.expect(count)
        answer("armed")
        answer(counter.wait())
    client.stop()
    bus.stop()


def _publish(url: str) -> None:
    bus = Bus(url=url, node="bench", client=TYPED_CLIENT)
    bus.start()
    client = _Raw(url, "raw-publisher")
    topic = _TOPIC.format(RAW_CLIENT)
    answer("ready")
    for kind, count in commands():
        message = _event(0)
        payload = codec.encode(message, source=bus.source)
        began_s = time.monotonic()
        if kind == "typed":
            for _ in range(count):
                bus.say(message, service=TYPED_CLIENT)
        else:
            for _ in range(count):
                client.publish(topic, payload)
        answer(began_s)
    client.stop()
    bus.stop()


def _latencies(url: str) -> None:
    typed, raw = Countdown(), Countdown()
    listener = Bus(url=url, node="bench", client="listener")
    listener.hear(Event, typed, service=TYPED_CLIENT)
    listener.start()
    bus = Bus(url=url, node="bench", client=TYPED_CLIENT)
    bus.start()
    raw_listener = _Raw(url, "raw-listener", _TOPIC.format(RAW_CLIENT), raw)
    client = _Raw(url, "raw-speaker")
    raw_listener.quick()
    client.quick()
    message = _event(0)
    payload = codec.encode(message, source=bus.source)
    topic = _TOPIC.format(RAW_CLIENT)
    put = MemoryPut(text="x" * 100)

    def once(kind: str) -> float:
        began_s = time.monotonic()
        if kind == "ask":
            bus.ask("answers", put, ttl_ms=10_000)
            return time.monotonic() - began_s
        counter = typed if kind == "typed" else raw
        counter.expect(1)
        if kind == "typed":
            bus.say(message, service=TYPED_CLIENT)
        else:
            client.publish(topic, payload)
        return counter.wait() - began_s

    answer("ready")
    for kind, count in commands():
        answer(" ".join(f"{once(kind) * 1000:.4f}" for _ in range(count)))
    for each in (raw_listener, client, bus, listener):
        each.stop()


def _respond(url: str) -> None:
    def put(message: Any) -> MemoryStored:
        return MemoryStored(id=message.id, node="answers", scope="everyone", log_id="none", seq=1)

    with Bus(url=url, node="answers", client="memory_store") as bus:
        bus.hear(MemoryPut, put)
        bus.wait_subscribed(PATIENCE_S)
        answer("ready")
        sys.stdin.read()


def _store(url: str, folder: str, commit_delay_ms: str) -> None:
    """The real memory store, its commits longer by ``commit_delay_ms``."""
    from edge.config import Config
    from edge.keys import Peers, load_or_create_identity
    from edge.service import Context
    from services.memory_store import service as module

    module.open_database = functools.partial(module.open_database, commit_delay_ms=float(commit_delay_ms))  # type: ignore[attr-defined]
    data_dir = Path(folder)
    identity = load_or_create_identity(data_dir, "bench")
    store = module.MemoryStore(
        Context(
            config=Config(),
            identity=identity,
            peers=Peers(data_dir, identity),
            data_dir=data_dir / "memory_store",
            broker_url=url,
        )
    )

    def announce() -> None:
        store.bus.wait_subscribed(PATIENCE_S)
        answer("ready")
        sys.stdin.read()
        store.stop()

    threading.Thread(target=announce, daemon=True).start()
    store.run()


def _put(url: str, name: str, clients: str) -> None:
    buses = [Bus(url=url, node="bench", client=f"{name}-{number}") for number in range(int(clients))]
    for bus in buses:
        bus.start()
    counts = [0] * len(buses)

    def put(number: int, until_s: float) -> None:
        while time.monotonic() < until_s:
            buses[number].ask("bench", MemoryPut(text=f"{name} {number} {counts[number]} " + "x" * 80), ttl_ms=30_000)
            counts[number] += 1

    answer("ready")
    for line in sys.stdin:
        counts[:] = [0] * len(buses)
        began_s = time.monotonic()
        threads = [threading.Thread(target=put, args=(n, began_s + float(line))) for n in range(len(buses))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        answer(sum(counts) / (time.monotonic() - began_s))
    for bus in buses:
        bus.stop()


_ROLES: dict[str, Callable[..., None]] = {
    "subscribe": _subscribe,
    "publish": _publish,
    "latency": _latencies,
    "answer": _respond,
    "store": _store,
    "put": _put,
}

if __name__ == "__main__":
    _ROLES[sys.argv[1]](*sys.argv[2:])
