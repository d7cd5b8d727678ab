"""What tests of recordings share: making messages, and running `mindstream record` and `replay` as processes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import msgspec

from edge.mqtt_wire import WireClient
from edge.recording import Damage, Gap, Message, Recording, RecordingInfo
from edge.recording_writer import RecordingWriter
from tests.support.waiting import DEADLINE_S

CHECKOUT = Path(__file__).resolve().parents[2]
START_US = 1_795_000_000_000_000
FILTER = "mindstream/v1/#"
Sent = tuple[str, bytes, int, bool]
"""Topic, payload, QoS, retain."""


def info(**changes: Any) -> RecordingInfo:
    """A header's body."""
    fields: dict[str, Any] = {
        "recording": "01a1fd9f-a6d4-7000-a6a2-cdec65d6d844",
        "part": 1,
        "node": "tomato",
        "broker": "mqtt://127.0.0.1:1883",
        "mindstream": "0.1.0",
        "filters": [FILTER],
        "started_us": START_US,
        "part_started_us": START_US,
    }
    return RecordingInfo(**{**fields, **changes})


def message(number: int, topic: str = "mindstream/v1/tomato/event/test", **changes: Any) -> Message:
    """The ``number``-th message of a stream, one each millisecond."""
    fields: dict[str, Any] = {"payload": b"message %d" % number, "flags": 2, "expiry_s": None, **changes}
    return Message(START_US + number * 1000, number * 1000, topic, **fields)


def write_recording(path: Path, blocks: Sequence[Sequence[Any]], ended: str = "stopped", **header: Any) -> list[Any]:
    """A recording of ``blocks``; all of its items."""
    writer = RecordingWriter(path, info(**header))
    for block in blocks:
        writer.write(block)
    writer.close(ended)
    return [item for block in blocks for item in block]


def read_all(path: Path) -> tuple[list[Message], list[Gap], list[Damage]]:
    """Messages, gaps and damage of a file."""
    with Recording(path) as source:
        items = list(source.items())
    return (
        [item for item in items if isinstance(item, Message)],
        [item for item in items if isinstance(item, Gap)],
        [item for item in items if isinstance(item, Damage)],
    )


@contextmanager
def wire(url: str, name: str, **options: Any) -> Iterator[WireClient]:
    """A connected WireClient."""
    client = WireClient(url, name, **options)
    client.connect()
    try:
        yield client
    finally:
        client.close()


def publish(client: WireClient, messages: Sequence[Sent]) -> None:
    """Publish ``messages`` and wait until the broker has them."""
    for topic, payload, qos, retain in messages:
        client.publish(topic, payload, qos=qos, retain=retain)
    assert client.flush(DEADLINE_S)


def hear(client: WireClient, count: int, timeout_s: float = DEADLINE_S) -> list[Message]:
    """The next ``count`` messages, or fewer when they do not come in time."""
    found: list[Message] = []
    deadline_s = time.monotonic() + timeout_s
    while len(found) < count and time.monotonic() < deadline_s:
        found += [Message(*each) for each in client.read(0.1)]
    return found


class Program:
    """A `mindstream …` process; its standard error is read line by line."""

    def __init__(self, *arguments: object, config: Path | None = None) -> None:
        words = [*(("--config", str(config)) if config else ()), *map(str, arguments)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"from edge.cli import main; main({words!r})"],
            cwd=CHECKOUT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.said: list[str] = []

    def wait_for(self, text: str) -> str:
        """The next line of its standard error that holds ``text``."""
        assert self.process.stderr is not None
        while line := self.process.stderr.readline().decode():
            self.said.append(line)
            if text in line:
                return line
        raise AssertionError(f"{text!r} was not said, but: {''.join(self.said)}")

    def stop(self, number: signal.Signals = signal.SIGINT) -> tuple[int, str, str]:
        """Send a signal; exit code, standard output, and error."""
        self.process.send_signal(number)
        return self.end()

    def end(self, timeout_s: float = 150.0) -> tuple[int, str, str]:
        """Wait for its end."""
        try:
            out, err = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return self.process.returncode, out.decode(), "".join(self.said) + err.decode()

    def kill(self) -> None:
        """kill -9, if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        streams: list[IO[bytes] | None] = [self.process.stdout, self.process.stderr]
        for stream in streams:
            if stream is not None:
                stream.close()


@contextmanager
def recording_process(path: Path, url: str, *options: object) -> Iterator[Program]:
    """`mindstream record`, subscribed."""
    program = Program("record", path, "--broker", url, *options)
    try:
        program.wait_for("recording ")
        yield program
    finally:
        program.kill()


def json_of(text: str) -> dict[str, Any]:
    """What a command printed with --json."""
    found: dict[str, Any] = msgspec.json.decode(text)
    return found
