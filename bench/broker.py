"""`mindstream bench broker`: what Mosquitto's durable settings cost, and what a `kill -9` loses with each.

Three settings take turns, round by round, on the same disk: saving every 1,800 s (Mosquitto's default, the baseline),
with an autosave_interval of 1 (what we configure; 2.0 then saves every two seconds), and after every change. The client
is a socket and a few packets of MQTT 3.1.1, pipelined, so that the broker is what is measured; a subscriber is a
process of its own.

Throughput is counted in PUBACKs, once with a subscriber that reads along, once with one that is away, so that all
waits at the broker and each save writes all of it. For the losses a session that is away is sent a steady stream; the
broker is killed right after the last PUBACK, or two seconds later, and what then arrives is compared with what was
acknowledged. Each save writes all that the broker holds, and it answers nobody meanwhile: how long that takes with
many messages waiting is measured too.
"""

from __future__ import annotations

import os
import signal
import socket
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.report import Figures, Progress, file_system, machine, silent, versions
from broker.base import MAX_INFLIGHT
from broker.child import spawn
from broker.configuration import AUTOSAVE_INTERVAL_S
from broker.mosquitto import MosquittoBroker, find_mosquitto
from protocol.errors import BrokerError

PAYLOAD_BYTES = 200
STREAM_PER_S = 500
STREAM_S = 4.0
LATER_S = 2.0
WAITING = 100_000
PATIENCE_S = 30.0
SETTINGS = {
    "default": "autosave_interval 1800",
    "autosave_1": f"autosave_interval {AUTOSAVE_INTERVAL_S}",
    "on_changes": "autosave_interval 1\nautosave_on_changes true",
}
BASELINE = "default: Mosquitto with autosave_interval 1800, all else equal, taking turns with the other settings"
_TOPIC = b"mindstream/v1/bench/memory/log"
_CHECKOUT = Path(__file__).resolve().parent.parent


class _Mosquitto(MosquittoBroker):
    """Mosquitto as devices run it, but for when it saves."""

    def __init__(self, setting: str, data_folder: Path) -> None:
        super().__init__(data_folder=data_folder)
        self._saving = SETTINGS[setting]

    def _command(self, port: int) -> list[str]:
        command = super()._command(port)
        config = Path(command[-1])
        ours = f"autosave_interval {AUTOSAVE_INTERVAL_S}\n"
        text = config.read_text()
        if ours not in text:
            raise BrokerError("changing when Mosquitto saves: its configuration has no line for it")
        config.write_text(text.replace(ours, f"{self._saving}\n"))
        return command


def run(*, quick: bool = False, progress: Progress = silent) -> Figures:
    """Measure. Raises BrokerError where Mosquitto is not installed or does not answer."""
    if find_mosquitto() is None:
        raise BrokerError("measuring Mosquitto: it is not installed", hint="apt-get install mosquitto")
    rounds, seconds = (1, 0.5) if quick else (6, 3.0)
    figures: Figures = {}
    for reader, name in ((True, "read"), (False, "away")):
        rates: dict[str, list[float]] = {setting: [] for setting in SETTINGS}
        for number in range(rounds):
            # Each goes first in turn: what one has written may still be on its way to the disk when the next begins.
            for setting in _rotated(number):
                rates[setting].append(_throughput(setting, seconds, reader=reader))
            progress(f"messages a second, {name}, round {number + 1}: {_shown(rates)}")
        for setting, found in rates.items():
            figures[f"messages_per_s_{name}_{setting}"] = statistics.median(found)
            if setting != "default":
                # Round by round: what the machine does beside weighs on both.
                ratios = [one / base for one, base in zip(found, rates["default"], strict=True)]
                figures[f"throughput_ratio_{name}_{setting}"] = statistics.median(ratios)
    stream_s = 0.5 if quick else STREAM_S
    acknowledged = round(stream_s * STREAM_PER_S)
    for setting in SETTINGS:
        for later_s, name in ((0.0, "at_once"), (LATER_S, "2s_later")):
            lost = _lost(setting, acknowledged, later_s)
            figures[f"lost_{name}_{setting}"] = lost
            progress(f"kill -9 {later_s:g} s after the last of {acknowledged:,} PUBACKs, {setting}: {lost:,} lost")
    waiting = 5_000 if quick else WAITING
    figures["waiting"] = waiting
    figures["save_ms"], figures["save_bytes"] = _save(waiting)
    progress(f"one save of {waiting:,} waiting messages holds the broker up for {figures['save_ms']:,.0f} ms")
    figures |= {
        "acknowledged": acknowledged,
        "stream_per_s": STREAM_PER_S,
        "payload_bytes": PAYLOAD_BYTES,
        "disk": file_system(Path(tempfile.gettempdir())),
        "machine": machine(),
        "versions": f"{versions()} mosquitto {_version()}",
        "baseline": BASELINE,
    }
    return figures


def _rotated(by: int) -> list[str]:
    names = list(SETTINGS)
    return names[by % len(names) :] + names[: by % len(names)]


def _shown(rates: dict[str, list[float]]) -> str:
    return ", ".join(f"{setting} {found[-1]:,.0f}" for setting, found in rates.items())


def _throughput(setting: str, seconds: float, *, reader: bool) -> float:
    """QoS 1 messages a second, by their PUBACKs."""
    with tempfile.TemporaryDirectory(prefix="mindstream-bench-") as folder, _Mosquitto(setting, Path(folder)) as broker:
        Client(broker.port, "reader").subscribe().close()
        process = None
        if reader:
            process = spawn([sys.executable, "-m", "bench.broker", str(broker.port)], cwd=_CHECKOUT)
        try:
            writer = Client(broker.port, "writer")
            writer.publish_for(min(0.3, seconds))  # the reader is there, buffers are warm
            started_s = time.perf_counter()
            count = writer.publish_for(seconds)
            took_s = time.perf_counter() - started_s
            writer.close()
        finally:
            if process is not None:
                process.kill()
                process.wait()
        return count / took_s


def _lost(setting: str, messages: int, later_s: float) -> int:
    """How many of ``messages`` acknowledged ones a session that was away does not get after a kill of the broker."""
    with tempfile.TemporaryDirectory(prefix="mindstream-bench-") as folder, _Mosquitto(setting, Path(folder)) as broker:
        Client(broker.port, "reader").subscribe().close()
        writer = Client(broker.port, "writer")
        for number in range(messages):
            writer.publish(number)
            writer.take_pubacks(wait_for=1)
            time.sleep(max(0.0, writer.started_s + number / STREAM_PER_S - time.perf_counter()))
        time.sleep(later_s)
        pid = broker.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        deadline_s = time.monotonic() + PATIENCE_S
        while broker.alive and time.monotonic() < deadline_s:
            time.sleep(0.005)
        broker.start()
        reader = Client(broker.port, "reader")
        if not reader.session_present:
            reader.close()
            return messages
        # The last of those that wait is followed by one that is sent now: when it comes, all have come.
        after = Client(broker.port, "after")
        after.publish(messages)
        after.take_pubacks(wait_for=1)
        got: set[int] = set()
        for number in reader.messages():
            if number == messages:
                break
            got.add(number)
        after.close()
        reader.close()
        return messages - len(got)


def _save(waiting: int) -> tuple[float, int]:
    """Milliseconds for which a save holds the broker up with ``waiting`` messages in a queue, and bytes written."""
    times_ms = []
    with (
        tempfile.TemporaryDirectory(prefix="mindstream-bench-") as folder,
        _Mosquitto("default", Path(folder)) as broker,
    ):
        Client(broker.port, "reader").subscribe().close()
        writer = Client(broker.port, "writer")
        for number in range(waiting):
            writer.publish(number)
            if number % MAX_INFLIGHT == MAX_INFLIGHT - 1:
                writer.take_pubacks(wait_for=MAX_INFLIGHT)
        assert broker.pid is not None
        database = Path(folder) / "mosquitto.db"
        for _ in range(5):
            written_ns = database.stat().st_mtime_ns if database.exists() else 0
            os.kill(broker.pid, signal.SIGUSR1)
            # One message at a time: the one that is answered late was sent while the broker saved.
            longest_s, deadline_s = 0.0, time.perf_counter() + PATIENCE_S
            while time.perf_counter() < deadline_s:
                started_s = time.perf_counter()
                writer.publish(0)
                writer.take_pubacks(wait_for=1)
                longest_s = max(longest_s, time.perf_counter() - started_s)
                if database.exists() and database.stat().st_mtime_ns > written_ns:
                    break
            times_ms.append(longest_s * 1000)
        writer.close()
        return statistics.median(times_ms), database.stat().st_size


class Client:
    """A socket that speaks the few packets of MQTT 3.1.1 that are needed here, with a session that is kept."""

    def __init__(self, port: int, name: str) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = b""
        self._under_way = 0
        self._packet_id = 0
        client_id = name.encode()
        # Clean session 0, no keep-alive.
        body = b"\x00\x04MQTT\x04\x00\x00\x00" + struct.pack("!H", len(client_id)) + client_id
        self._socket.sendall(b"\x10" + bytes([len(body)]) + body)
        kind, connack = self._read()
        if kind != 0x20 or connack[1] != 0:
            raise BrokerError(f"connecting {name} to Mosquitto on port {port}: it answered {connack.hex()}")
        self.session_present = bool(connack[0])
        self.started_s = time.perf_counter()

    def subscribe(self) -> Client:
        """To the benchmark's topic, at QoS 1."""
        body = b"\x00\x01" + struct.pack("!H", len(_TOPIC)) + _TOPIC + b"\x01"
        self._socket.sendall(b"\x82" + bytes([len(body)]) + body)
        self._read()
        return self

    def publish(self, number: int) -> None:
        """One message at QoS 1, with ``number`` in front."""
        self._packet_id = self._packet_id % 65_535 + 1
        payload = struct.pack("!I", number).ljust(PAYLOAD_BYTES, b".")
        body = struct.pack("!H", len(_TOPIC)) + _TOPIC + struct.pack("!H", self._packet_id) + payload
        self._socket.sendall(b"\x32" + struct.pack("BB", len(body) & 0x7F | 0x80, len(body) >> 7) + body)
        self._under_way += 1

    def publish_for(self, seconds: float) -> int:
        """Publish as fast as PUBACKs come, in a window as large as the broker's; how many were acknowledged."""
        deadline_s = time.perf_counter() + seconds
        count = 0
        while time.perf_counter() < deadline_s:
            while self._under_way < MAX_INFLIGHT:
                self.publish(count)
            count += self.take_pubacks(wait_for=1)
        return count + self.take_pubacks(wait_for=self._under_way)

    def take_pubacks(self, *, wait_for: int) -> int:
        """Read at least ``wait_for`` PUBACKs, and those that are here already; their number."""
        taken = 0
        while taken < wait_for:
            if len(self._buffer) < 4:
                self._receive()
            # Nothing else comes to a client that has not subscribed: four bytes each.
            count, rest = divmod(len(self._buffer), 4)
            self._buffer = self._buffer[len(self._buffer) - rest :]
            taken += count
        self._under_way -= taken
        return taken

    def messages(self) -> Iterator[int]:
        """The numbers of the messages that come, each acknowledged once the next is asked for."""
        while True:
            kind, body = self._read()
            if kind & 0xF0 != 0x30:
                continue
            at = 2 + len(_TOPIC)
            yield struct.unpack_from("!I", body, at + 2)[0]
            self._socket.sendall(b"\x40\x02" + body[at : at + 2])

    def close(self) -> None:
        """Say goodbye; the session stays."""
        self._socket.sendall(b"\xe0\x00")
        self._socket.close()

    def _read(self) -> tuple[int, bytes]:
        while True:
            length, at = 0, 1
            while at < len(self._buffer):
                length |= (self._buffer[at] & 0x7F) << 7 * (at - 1)
                at += 1
                if not self._buffer[at - 1] & 0x80:
                    break
            else:
                self._receive()
                continue
            if len(self._buffer) >= at + length:
                kind, body = self._buffer[0], self._buffer[at : at + length]
                self._buffer = self._buffer[at + length :]
                return kind, body
            self._receive()

    def _receive(self) -> None:
        data = self._socket.recv(65_536)
        if not data:
            raise BrokerError("measuring Mosquitto: it closed the connection", reason="closed")
        self._buffer += data


def _version() -> str:
    import subprocess

    done = subprocess.run([str(find_mosquitto()), "-h"], capture_output=True, text=True, check=False)
    words = done.stdout.split()
    return words[2] if len(words) > 2 else "unknown"


def main() -> None:
    """The reading process: take all that comes, until it is killed."""
    for _ in Client(int(sys.argv[1]), "reader").messages():
        pass


if __name__ == "__main__":
    main()
