"""`mindstream bench record`: what a recorder costs the stream, and whether a replay is what was recorded.

On the embedded broker and on Mosquitto. A publisher and a subscriber on our typed bus are processes of their own; the
recorder is the command `mindstream record`, a third, recording everything. Rounds with it and without it take turns,
and medians are compared. Then what was recorded is replayed at full speed onto a fresh broker, where another
recorder listens, and both streams are compared message by message. Messages are some 200 bytes of what nodes say:
tokens of a run with their log-probabilities, and events in sentences; no two are the same.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil

from bench.report import Figures, Progress, file_system, machine, silent, versions
from bench.worker import CHECKOUT, PATIENCE_S, Countdown, answer, commands, worker
from broker.base import Broker
from broker.embedded import EmbeddedBroker
from broker.mosquitto import MosquittoBroker, find_mosquitto
from edge.bus import Bus
from edge.mqtt_wire import WireClient
from edge.recording import Gap, Message, Recording
from edge.replay import Replay, Selection
from protocol.errors import BusError
from protocol.messages import Event, RunToken

FILTER = "mindstream/v1/#"
BASELINE = "the same publisher, subscriber and broker without a recorder, taking turns with it"
_HIGHER_IS_BETTER = {
    "record_overhead_ratio": True,
    "replay_order_errors": False,
    "bytes_per_message": False,
    "recorded_messages_lost": False,
    "messages_per_s_recording": True,
    "messages_per_s_alone": True,
    "recorder_cpu_us_per_message": False,
    "stream_cpu_us_per_message_recording": False,
    "stream_cpu_us_per_message_alone": False,
    "replay_messages_per_s": True,
}
_WORDS = re.split(
    r"\s+",
    """the a is was saw heard person dog cat car door window kitchen garden shed key ladder hammer camera
    microphone light rain wind cold warm open closed left right behind under blue green yellow flower pot table
    again twice never often early late morning evening node tomato sprout memory snapshot token stream quiet
    loud moved stopped began waits for with without near far new old spare front back roof floor stairs water
    pump battery sensor value above below normal""",
)


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
    payload_bytes: float | int | str | None = None
    with tempfile.TemporaryDirectory(dir=_scratch(), prefix="record-") as folder:
        for name in ("embedded", "mosquitto"):
            found: Figures = {}
            if name in brokers:
                say = functools.partial(_say, progress, name)
                found = _measure(brokers[name], Path(folder) / name, quick, say)
            figures |= {f"{key}_{name}": found.get(key) for key in _HIGHER_IS_BETTER}
            payload_bytes = found.get("payload_bytes_per_message", payload_bytes)
        disk = file_system(Path(folder))
    for key, higher in _HIGHER_IS_BETTER.items():
        both = [value for name in brokers if isinstance(value := figures[f"{key}_{name}"], (int, float))]
        figures[key] = (min(both) if higher else max(both)) if both else None
    figures |= {
        "payload_bytes_per_message": payload_bytes,
        "disk": disk,
        "machine": machine(),
        "versions": versions("paho-mqtt", "msgspec", "zstandard", "iotcore"),
        "baseline": BASELINE,
    }
    return figures


def _say(progress: Progress, broker: str, line: str) -> None:
    progress(f"{broker}: {line}")


def _scratch() -> Path:
    """A folder on a disk: /tmp may be memory."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mindstream" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _measure(make: Callable[[], Broker], folder: Path, quick: bool, progress: Progress) -> Figures:
    folder.mkdir()
    rounds, messages = (1, 1_000) if quick else (9, 20_000)
    rates: dict[str, list[float]] = {"alone": [], "recording": []}
    cpu_s: dict[str, list[float]] = {"alone": [], "recording": []}
    found: list[_Recorded] = []
    with (
        make() as broker,
        worker(__name__, "subscribe", broker.url) as subscriber,
        worker(__name__, "publish", broker.url) as publisher,
    ):
        subscriber.read()
        publisher.read()

        processes = [psutil.Process(pid) for pid in (broker.pid, subscriber.process.pid, publisher.process.pid)]

        def used_s() -> float:
            return sum(sum(each.cpu_times()[:2]) for each in processes)

        def stream(kind: str) -> None:
            before_s = used_s()
            subscriber.write(f"expect {messages}")
            subscriber.read()
            publisher.write(f"publish {messages}")
            began_s, ended_s = float(publisher.read()), float(subscriber.read())
            rates[kind].append(messages / (ended_s - began_s))
            cpu_s[kind].append(used_s() - before_s)

        stream("alone")  # warms up
        rates["alone"].clear()
        cpu_s["alone"].clear()
        for each in range(rounds):
            for kind in ("alone", "recording") if each % 2 else ("recording", "alone"):
                if kind == "alone":
                    stream(kind)
                    continue
                path = folder / f"{each}.msrec"
                with _recorder(broker.url, path, messages) as recorded:
                    stream(kind)
                    found.append(recorded())
            progress(f"round {each + 1} of {rounds}: {_shown(rates)}")
    with make() as other:
        errors, rate = _replayed(other.url, path, progress)
    alone, recording = statistics.median(rates["alone"]), statistics.median(rates["recording"])
    return {
        "record_overhead_ratio": recording / alone,
        "replay_order_errors": errors,
        "bytes_per_message": statistics.median(each.file_bytes / messages for each in found),
        "recorded_messages_lost": sum(messages - each.messages for each in found),
        "messages_per_s_recording": recording,
        "messages_per_s_alone": alone,
        "recorder_cpu_us_per_message": statistics.median(each.cpu_s * 1e6 / messages for each in found),
        **{
            f"stream_cpu_us_per_message_{kind}": statistics.median(each) * 1e6 / messages
            for kind, each in cpu_s.items()
        },
        "replay_messages_per_s": rate,
        "payload_bytes_per_message": sum(len(payload) for _, payload in _messages(path)) / messages,
    }


@dataclass(frozen=True)
class _Recorded:
    messages: int
    file_bytes: int
    cpu_s: float


def _shown(rates: dict[str, list[float]]) -> str:
    return ", ".join(f"{kind} {each[-1]:,.0f}/s" for kind, each in rates.items() if each)


@contextlib.contextmanager
def _recorder(url: str, path: Path, messages: int) -> Iterator[Callable[[], _Recorded]]:
    """`mindstream record` on ``url``, subscribed; a call waits until it has ended with ``messages``."""
    program = "from edge.cli import main; main()"
    command = [sys.executable, "-c", program, "record", str(path), "--broker", url, "--json", "--count", str(messages)]
    with subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            if not process.stderr.readline().startswith(b"recording"):
                raise BusError("measuring: the recorder did not start", hint=process.stderr.read().decode()[-2000:])
            before_s = sum(psutil.Process(process.pid).cpu_times()[:2])

            def finish() -> _Recorded:
                assert process.stdout is not None
                totals = msgspec.json.decode(process.stdout.read(), type=dict[str, Any])
                # What it used until its end; its start is taken off. Popen.wait does not tell.
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
                cpu_s = usage.ru_utime + usage.ru_stime - before_s
                return _Recorded(totals["recorded"], path.stat().st_size, cpu_s)

            yield finish
        finally:
            if process.returncode is None:
                process.terminate()
                process.wait(20)


def _replayed(url: str, path: Path, progress: Progress) -> tuple[int, float]:
    """Replay ``path`` onto ``url`` at full speed: messages not at their place in what arrives, messages a second."""
    wanted = _messages(path)
    listener = WireClient(url, "bench-listener")
    listener.connect()
    listener.subscribe(FILTER)
    client = WireClient(url, "bench-replay")
    client.connect()
    replay = Replay(client, [path], Selection(), math.inf)
    thread = threading.Thread(target=replay.run)
    began_s = time.monotonic()
    thread.start()
    found: list[tuple[str, bytes]] = []
    heard_s = time.monotonic()
    while len(found) < len(wanted) and time.monotonic() - heard_s < 10:
        if arrivals := listener.read(0.2):
            heard_s = time.monotonic()
            found += [(each[2], each[3]) for each in arrivals]
    took_s = heard_s - began_s
    thread.join()
    for each in (client, listener):
        each.close()
    errors = _out_of_order(wanted, found)
    progress(f"replayed {len(found):,} of {len(wanted):,} messages, {errors} out of order")
    return errors, len(found) / took_s


def _messages(path: Path) -> list[tuple[str, bytes]]:
    with Recording(path) as source:
        items = list(source.items())
    if any(isinstance(item, Gap) or not isinstance(item, Message) for item in items):
        raise BusError(f"measuring: {path} has gaps or damage", reason="incomplete")
    return [(item.topic, item.payload) for item in items if isinstance(item, Message)]


def _out_of_order(wanted: Sequence[tuple[str, bytes]], found: Sequence[tuple[str, bytes]]) -> int:
    """Places of the whole stream that hold another message than was recorded there, missing ones included."""
    wrong = sum(a != b for a, b in zip(wanted, found, strict=False)) + abs(len(wanted) - len(found))
    # The publisher numbers what it says: so the recording itself is held against what was published, too.
    numbers = [int(mark.group(1)) for _, payload in wanted if (mark := re.search(rb"#(\d{8}) ", payload))]
    return wrong + sum(number != place for place, number in enumerate(numbers))


# --- worker processes -------------------------------------------------------------------------------------------


def _stream(count: int, seed: int) -> list[tuple[msgspec.Struct, dict[str, Any]]]:
    """``count`` messages with the names of their topics; about 200 bytes each in their envelopes."""
    chance = random.Random(seed)
    found: list[tuple[msgspec.Struct, dict[str, Any]]] = []
    run = f"{chance.getrandbits(48):012x}"
    for number in range(count):
        if number % 2:
            text = f"#{number:08d} " + " ".join(chance.choices(_WORDS, k=5))
            logprob, entropy = -chance.expovariate(0.5), chance.expovariate(0.5)
            found.append((RunToken(number, chance.randrange(49_152), text, logprob, entropy), {"run": run}))
        else:
            text = f"#{number:08d} " + " ".join(chance.choices(_WORDS, k=9))
            found.append((Event("note", "info", text), {"service": "bench"}))
    return found


def _subscribe(url: str) -> None:
    counter = Countdown()
    with Bus(url=url, node="bench", client="subscriber") as bus:
        bus.hear(Event, counter, service="bench")
        bus.hear(RunToken, counter)
        bus.wait_subscribed(PATIENCE_S)
        answer("ready")
        for _, count in commands():
            counter.expect(count)
            answer("armed")
            answer(counter.wait())


def _publish(url: str) -> None:
    with Bus(url=url, node="bench", client="publisher") as bus:
        answer("ready")
        for seed, (_, count) in enumerate(commands()):
            stream = _stream(count, seed)
            began_s = time.monotonic()
            for message, names in stream:
                bus.say(message, **names)
            answer(began_s)


_ROLES: dict[str, Callable[..., None]] = {"subscribe": _subscribe, "publish": _publish}

if __name__ == "__main__":
    _ROLES[sys.argv[1]](*sys.argv[2:])
