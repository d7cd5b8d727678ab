"""A service replayed against a recording must say what it said: ``assert_replay_matches``.

One real service process, on a private broker, hears what was recorded and nothing else; what it says is compared with
a golden file of JSON lines. The recording is its own schedule: an ask to the service, and an ask that the service
itself makes, are waited for where they stand in it, so nothing depends on time. docs/recordings.md says how to add a
service, and what is replaced before comparing, and why.
"""

from __future__ import annotations

import difflib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from blake3 import blake3

from broker.child import spawn
from broker.embedded import EmbeddedBroker
from edge.files import write_atomically
from edge.keys import Peers, load_or_create_identity
from edge.mqtt_wire import WireClient
from edge.recording import Message, Recording
from edge.replay import is_retained
from protocol import topics
from protocol.entries import SignedEntry, verify
from protocol.errors import UNREADABLE, MindstreamError, WrongTopic
from protocol.identity import Identity, Keyring
from protocol.topics import ParsedTopic
from tests.support.waiting import DEADLINE_S

CHECKOUT = Path(__file__).resolve().parents[2]
FOLDER = CHECKOUT / "tests" / "golden" / "recordings"
NODE = "tomato"
"""The node whose service is replayed."""
PEERS = ("sprout",)
"""Nodes that it trusts."""
PATIENCE_S = 60.0
"""How long it may take to start and to end."""
GATE_S = 60.0
"""How long it may take for what the recording waits for."""
SAY_S = 60.0
"""How long, after the whole recording, for what it has still to say."""
TTL_STEP_MS = 10_000
"""A time to live is compared rounded up to this: an ask is sent with what is left of it."""
QUIET_S = 3.0
"""For a new golden file: the service has said everything when it has been quiet this long."""

_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_TIME, _DURATION = re.compile(r".+_us|hlc"), re.compile(r"took_.+")
_PACKED = ("header", "content")
"""Binary fields that hold msgpack."""
_CUT = {topics.MEMORY_LOG.name: "entries"}
"""Topics whose messages carry as many of these as there happened to be: each is a line of its own."""


def golden_identity(node: str) -> Identity:
    """The key of a node of golden recordings: made from its name, so that no file has to hold it."""
    return Identity(node, blake3(f"mindstream golden recordings: {node}".encode()).digest())


def prepare_node(folder: Path, node: str, broker_url: str) -> Path:
    """A data folder with that key and trust in the others, and nothing else; its configuration file."""
    data_dir = folder / node
    keys = data_dir / "keys"
    keys.mkdir(mode=0o700, parents=True)
    write_atomically(keys / "node.key", golden_identity(node).seed)
    identity = load_or_create_identity(data_dir, node)
    for peer in {NODE, *PEERS} - {node}:
        Peers(data_dir, identity).trust(peer, golden_identity(peer).fingerprint)
    config = folder / f"{node}.toml"
    config.write_text(f'[node]\nname = "{node}"\ndata_dir = "{data_dir}"\n[broker]\nurl = "{broker_url}"\n')
    return config


def start_service(config: Path, service: str, before: str = "") -> subprocess.Popen[bytes]:
    """The service as a process. ``before`` is Python that runs in it first: for tests of this harness."""
    program = f"{before}\nimport sys\nfrom edge.service import main\nsys.exit(main(sys.argv[1:]))"
    with config.with_suffix(f".{service}.log").open("ab") as log:
        return spawn(
            [sys.executable, "-c", program, service, "--config", str(config)], cwd=CHECKOUT, stdout=log, stderr=log
        )


def assert_replay_matches(
    service: str,
    folder: Path,
    *,
    recording: Path | None = None,
    golden: Path | None = None,
    update: bool = False,
    before: str = "",
) -> None:
    """Replay ``recording`` to ``service`` and compare what it says with ``golden``; fail with a difference.

    Args:
        folder: an empty one, for its data.
        recording, golden: default: those of that name in tests/golden/recordings.
        update: write ``golden`` instead of comparing (`pytest --update-golden`).
        before: Python that runs in the service's process first.
    """
    recording = recording or FOLDER / f"{service}.msrec"
    golden = golden or FOLDER / f"{service}.jsonl"
    wanted = None if update else golden.read_text().splitlines()
    with EmbeddedBroker() as broker:
        config = prepare_node(folder, NODE, broker.url)
        run = _Run(broker.url, service, _messages(recording))
        process = start_service(config, service, before)
        try:
            said = run.replay(process, wanted)
        finally:
            process.terminate()
            process.wait(DEADLINE_S)
            run.close()
    if update:
        golden.write_text("".join(f"{line}\n" for line in said))
        return
    assert wanted is not None
    if said != wanted:
        difference = "\n".join(
            difflib.unified_diff(wanted, said, f"golden: {golden.name}", f"said by {service}", lineterm="", n=2)
        )
        missed = f"\nnever said, though the recording waits for it: {', '.join(run.missed)}" if run.missed else ""
        log = config.with_suffix(f".{service}.log").read_text(errors="replace")[-2000:]
        raise AssertionError(
            f"{service} says other things than it did:\n{difference}{missed}\n"
            f"if that is meant, run pytest with --update-golden\n{log and f'its log ends: {log}'}"
        )


def _messages(path: Path) -> list[Message]:
    with Recording(path) as source:
        items = list(source.items())
    assert all(isinstance(item, Message) for item in items), f"{path} has gaps or damage"
    return [item for item in items if isinstance(item, Message)]


class _Seen:
    """A message, taken apart as far as it can be."""

    def __init__(self, topic: str, payload: bytes) -> None:
        self.raw_topic = topic
        self.payload = payload
        self.topic: ParsedTopic | None = None
        try:
            self.topic = topics.parse(topic)
        except WrongTopic:
            pass
        self.envelope: dict[str, Any] = {}
        decode: Callable[[bytes], Any] = msgspec.msgpack.decode
        if self.topic is not None and self.topic.topic.format == "json":
            decode = msgspec.json.decode
        try:
            found = decode(payload)
            self.envelope = found if isinstance(found, dict) else {}
        except UNREADABLE:
            pass

    def by(self, service: str) -> bool:
        """Whether that service of NODE says it."""
        if self.topic is None or self.topic.node != NODE:
            return False
        if self.topic.topic is topics.SERVICE_STATE:
            return self.topic.names["service"] == service
        source = str(self.envelope.get("source", ""))
        return source == f"{NODE}/{service}" or source.startswith(f"{NODE}/{service}-")

    @property
    def is_ask(self) -> bool:
        return self.topic is not None and self.topic.topic is topics.ASK

    def asks(self, service: str) -> bool:
        """Whether it asks that service of NODE."""
        names = self.topic.names if self.topic is not None and self.is_ask else {}
        return (names.get("target"), names.get("service")) == (NODE, service)

    @property
    def is_reply(self) -> bool:
        return self.topic is not None and self.topic.topic is topics.REPLY

    @property
    def id(self) -> str:
        return str(self.envelope.get("id", ""))

    @property
    def correlation(self) -> str:
        return str(self.envelope.get("correlation", ""))

    def asks_the_same_as(self, other: _Seen) -> bool:
        return self.raw_topic == other.raw_topic and self.envelope.get("data") == other.envelope.get("data")


class _Run:
    """One replay to one service."""

    def __init__(self, url: str, service: str, messages: Sequence[Message]) -> None:
        self.missed: list[str] = []
        self._service = service
        self._recorded = [(message, _Seen(message.topic, message.payload)) for message in messages]
        self._ids: dict[str, str] = {}
        self._replies = replies = {seen.correlation: seen for _, seen in self._recorded if seen.is_reply}
        asked = [seen for _, seen in self._recorded if seen.is_ask and seen.by(service)]
        self._answers: list[tuple[_Seen, _Seen | None]] = [(ask, replies.get(ask.id)) for ask in asked]
        self._used = [False] * len(asked)
        self._asks = {
            seen.id: number
            for number, seen in enumerate((s for _, s in self._recorded if s.is_ask and not s.by(service)), start=1)
        }
        self._said: list[_Seen] = []
        self._ear, self._mouth = WireClient(url, "golden-ear"), WireClient(url, "golden-mouth")
        self._ear.connect()
        self._mouth.connect()
        self._ear.subscribe(f"{topics.ROOT}/#")

    def close(self) -> None:
        self._ear.close()
        self._mouth.close()

    def replay(self, process: subprocess.Popen[bytes], wanted: list[str] | None) -> list[str]:
        """Everything the service said, as lines. ``wanted`` ends the waiting early once it is all there."""
        assert self._wait(lambda: self._state() == "ready", PATIENCE_S), f"{self._service} is not ready"
        for message, seen in self._recorded:
            if seen.by(self._service):
                if seen.is_ask:
                    self._gate(lambda s=seen: self._times_asked(s) >= self._times_asked(s, recorded=True), seen)  # type: ignore[misc]
                continue
            if seen.is_reply and any(reply is seen for _, reply in self._answers):
                continue  # it goes out when the service asks
            self._publish(message)
            if seen.asks(self._service):
                self._gate(lambda s=seen: self._answer_to(s) is not None, seen)  # type: ignore[misc]
                self._learn_ids(seen)
        if wanted is None:
            self._wait_quiet()
        else:
            count = -1

            def all_said() -> bool:
                nonlocal count
                if len(self._said) == count:
                    return False
                count = len(self._said)
                return self._lines() == wanted

            self._wait(all_said, QUIET_S if self.missed else SAY_S)
        # Its goodbye is the last it says: nothing of it is still under way then.
        process.terminate()
        assert self._wait(lambda: self._state() == "disconnected", PATIENCE_S), f"{self._service} did not end in order"
        return self._lines()

    # --- taking part --------------------------------------------------------------------------------------------

    def _listen(self) -> bool:
        heard = self._ear.read(0.05)
        for _, _, topic, payload, _, _ in heard:
            seen = _Seen(topic, payload)
            if seen.by(self._service) and payload:
                self._said.append(seen)
                if seen.is_ask:
                    self._answer(seen)
        return bool(heard)

    def _publish(self, message: Message) -> None:
        payload = message.payload
        for then, now in self._ids.items():
            payload = payload.replace(then.encode(), now.encode())
        retain = message.retain or is_retained(message.topic)
        self._mouth.publish(message.topic, payload, qos=1, retain=retain, expiry_s=message.expiry_s)
        assert self._mouth.flush(PATIENCE_S)

    def _answer_to(self, ask: _Seen) -> _Seen | None:
        return next((each for each in self._said if each.is_reply and each.correlation == ask.id), None)

    def _learn_ids(self, ask: _Seen) -> None:
        """Ids that the service chose (of its log) stand in later messages: those are sent with the ids of now."""
        then, now = self._replies.get(ask.id), self._answer_to(ask)
        if then is not None and now is not None:
            self._ids.update(_pairs(then.envelope.get("data"), now.envelope.get("data")))

    def _wait(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline_s:
                return False
            self._listen()
        return True

    def _wait_quiet(self) -> None:
        quiet_at_s = time.monotonic() + QUIET_S
        while time.monotonic() < quiet_at_s:
            if self._listen():
                quiet_at_s = time.monotonic() + QUIET_S

    def _gate(self, condition: Callable[[], bool], seen: _Seen) -> None:
        """Wait for what the recording has here; once something was missed, no longer for long."""
        if not self._wait(condition, 0.5 if self.missed else GATE_S):
            self.missed.append(f"{seen.envelope.get('type')} on {seen.raw_topic}")

    def _state(self) -> str:
        states = [seen.envelope.get("state", "") for seen in self._said if _is_state(seen)]
        return str(states[-1]) if states else ""

    def _times_asked(self, ask: _Seen, *, recorded: bool = False) -> int:
        """How often the service has asked this; or had, up to there, in the recording."""
        if not recorded:
            return sum(each.is_ask and each.asks_the_same_as(ask) for each in self._said)
        asks = [each for each, _ in self._answers]
        place = next(number for number, each in enumerate(asks) if each is ask)
        return sum(each.asks_the_same_as(ask) for each in asks[: place + 1])

    def _answer(self, ask: _Seen) -> None:
        """What was answered to the same ask then; the last answer, when it asks more often than it did."""
        places = [n for n, (each, _) in enumerate(self._answers) if each.asks_the_same_as(ask)]
        place = next((n for n in places if not self._used[n]), places[-1] if places else None)
        if place is None:
            return
        self._used[place] = True
        reply = self._answers[place][1]
        if reply is not None:
            payload = msgspec.msgpack.encode({**reply.envelope, "correlation": ask.id})
            self._mouth.publish(reply.raw_topic, payload, qos=1, retain=False)
            assert self._mouth.flush(PATIENCE_S)

    # --- what it said, made comparable --------------------------------------------------------------------------

    def _lines(self) -> list[str]:
        """One JSON object a line: by topic, answers by their asks, and what differs between runs replaced."""
        last = {seen.raw_topic: seen for seen in self._said}
        kept: list[tuple[tuple[str, int], dict[str, Any]]] = []
        for seen in self._said:
            if _is_state(seen) or seen.topic is None:
                continue
            if seen.topic.topic.retain and last[seen.raw_topic] is not seen:
                continue
            key = (seen.raw_topic, self._asks.get(seen.correlation, 0))
            kept += [(key, line) for line in _cut(seen)]
        kept.sort(key=lambda each: each[0])
        names = {identifier: f"ask-{number}" for identifier, number in self._asks.items()}
        plain = _Plain(names)
        return [json.dumps(plain(line), ensure_ascii=False, sort_keys=True) for _, line in kept]


def _is_state(seen: _Seen) -> bool:
    return seen.topic is not None and seen.topic.topic is topics.SERVICE_STATE


def _cut(seen: _Seen) -> Iterable[dict[str, Any]]:
    assert seen.topic is not None
    # Its id is new each time, and nobody refers to it but the answer.
    line = {"topic": seen.topic.raw.removeprefix(f"{topics.ROOT}/")}
    line |= {key: value for key, value in seen.envelope.items() if key not in ("id", "v")}
    name = _CUT.get(seen.topic.topic.name)
    if name is None:
        return [line]
    return [{**line, "data": {name: [each]}} for each in line["data"][name]]  # type: ignore[index]


def _pairs(then: Any, now: Any) -> Iterable[tuple[str, str]]:
    """Ids at the same place of two answers, where they differ."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in then.keys() & now.keys():
            yield from _pairs(then[key], now[key])
    elif isinstance(then, list) and isinstance(now, list):
        for each_then, each_now in zip(then, now, strict=False):
            yield from _pairs(each_then, each_now)
    elif isinstance(then, str) and isinstance(now, str) and then != now and _ID.fullmatch(then) and _ID.fullmatch(now):
        yield then, now


class _Plain:
    """Makes JSON of what was said, without what differs between runs; equal ids and bytes keep equal names."""

    def __init__(self, names: dict[str, str]) -> None:
        self._names = dict(names)
        self._ids = 0
        self._binaries: dict[bytes, int] = {}

    def __call__(self, value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            # Sorted, so that names are given in the order of the line.
            found = {str(name): self(each, str(name)) for name, each in sorted(value.items())}
            if {"header", "signature"} <= value.keys():
                found["signature"] = "<valid>" if _signed(value) else "<NOT VALID>"
            return found
        if isinstance(value, list):
            return [self(each, key) for each in value]
        if isinstance(value, bytes):
            return self._binary(value, key)
        if isinstance(value, str):
            return _ID.sub(self._name, value)
        if isinstance(value, bool) or value is None:
            return value
        if _TIME.fullmatch(key):
            return "<time>" if value else 0
        if _DURATION.fullmatch(key):
            return "<duration>"
        if key == "ttl_ms":
            return -(-value // TTL_STEP_MS) * TTL_STEP_MS
        if key == "pid":
            return "<pid>"
        return round(value, 4) if isinstance(value, float) else value

    def _name(self, found: re.Match[str]) -> str:
        identifier = found[0]
        if identifier not in self._names:
            self._ids += 1
            self._names[identifier] = f"id-{self._ids}"
        return self._names[identifier]

    def _binary(self, value: bytes, key: str) -> Any:
        if key in _PACKED:
            try:
                return self(msgspec.msgpack.decode(value))
            except UNREADABLE:
                pass
        if not any(value):
            return f"<{len(value)} zero bytes>"
        number = self._binaries.setdefault(value, len(self._binaries) + 1)
        return f"<{len(value)} bytes, {number}>"


_KEYRING = Keyring({node: golden_identity(node).fingerprint for node in (NODE, *PEERS)})


def _signed(entry: dict[str, Any]) -> bool:
    try:
        verify(msgspec.convert(entry, SignedEntry), _KEYRING)
    except MindstreamError:
        return False
    return True
