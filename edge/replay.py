"""Replay: publishes a recording again, in its order and its time, and says what it left out and why.

On a live broker nothing of the past may pass for a command of now: asks and replies are left out unless wished for,
and so is what a node that is there now retains (its presence, its digests). It knows recordings and a bare MQTT
connection; what the messages mean it reads from their topics alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import msgspec
from paho.mqtt.client import topic_matches_sub

from edge.mqtt_wire import WireClient
from edge.recording import Damage, Gap, Message, Recording
from edge.stopping import StopFlag
from protocol import topics
from protocol.errors import UNREADABLE, BusError, NotAuthorized, WrongTopic
from protocol.messages import NodeState

AHEAD_S = 0.0005
"""What is due within this goes out now: a shorter sleep costs more than it orders."""
LIVE_WAIT_S = 0.5
"""Retained states come with the subscription, at once; after this long without one there is no more."""
FLUSH_S = 10.0
_THERE = ("init", "ready", "sleeping", "degraded")
_NOT_AUTHORIZED = 0x87


@dataclass(frozen=True)
class Selection:
    """What of a recording is replayed.

    Args:
        only: MQTT filters; empty is everything.
        from_us, to_us: Unix microseconds by the recorder's clock, both included.
        asks: asks and replies too.
        live_nodes: nodes whose retained messages are left out, because they are there now and say their own.
    """

    only: Sequence[str] = ()
    from_us: int | None = None
    to_us: int | None = None
    asks: bool = True
    live_nodes: frozenset[str] = frozenset()


@dataclass
class Report:
    """What a replay did."""

    published: int = 0
    payload_bytes: int = 0
    left_out_asks: int = 0
    """Asks and replies, not published."""
    left_out_retained: int = 0
    """Retained messages of nodes that are there now, not published."""
    gaps: int = 0
    missing: int = 0
    """Messages known not to have been recorded."""
    damage: list[str] = field(default_factory=list)
    unacknowledged: int = 0
    """Published, but the broker had not acknowledged them at the end."""
    cleared: int = 0
    """Retained messages taken back at the end."""
    took_s: float = 0.0
    behind_s: float = 0.0
    """How late the last message went out, against the wished speed."""
    stopped: bool = False
    """Ended before its end, by wish."""


@lru_cache(maxsize=4096)
def is_ask_or_reply(topic: str) -> bool:
    """Whether a command, a question or an answer is said there, also in a shape that the topic table has not."""
    levels = topic.split("/")
    return len(levels) > 3 and "/".join(levels[:2]) == topics.ROOT and levels[3] in ("ask", "reply")


@lru_cache(maxsize=4096)
def is_retained(topic: str) -> bool:
    """Whether the topic table retains it. rumqttd does not tell a subscriber that a live message is to be retained."""
    try:
        return topics.parse(topic).topic.retain
    except WrongTopic:
        return False


@lru_cache(maxsize=4096)
def speaker_of(topic: str) -> str:
    """The node in whose branch a topic is; empty outside the root."""
    levels = topic.split("/", 3)
    return levels[2] if len(levels) > 2 and "/".join(levels[:2]) == topics.ROOT else ""


def nodes_there_now(client: WireClient) -> frozenset[str]:
    """Nodes that say by their retained state that they are there. ``client`` is connected, and used for nothing else.

    Raises NotConnected.
    """
    found: dict[str, str] = {}
    client.subscribe(topics.STATE.filter())
    quiet_at_s = time.monotonic() + LIVE_WAIT_S
    while time.monotonic() < quiet_at_s:
        for _, _, topic, payload, _, _ in client.read(0.05):
            quiet_at_s = time.monotonic() + LIVE_WAIT_S
            try:
                state = msgspec.json.decode(payload, type=NodeState).state if payload else ""
            except UNREADABLE:
                continue
            found[speaker_of(topic)] = state
    return frozenset(node for node, state in found.items() if state in _THERE)


class Replay:
    """One replay over one connection.

    Args:
        client: connected; ours alone.
        paths: files, in their order.
        speed: 2 is twice as fast as it was; ``math.inf`` is without waiting.
    """

    def __init__(self, client: WireClient, paths: Sequence[Path], selection: Selection, speed: float = 1.0) -> None:
        self._client = client
        self._paths = paths
        self._selection = selection
        self._speed = speed
        self._stop = StopFlag()
        self._retained: dict[str, None] = {}
        self._progress: Callable[[Report], None] = lambda _report: None
        self._told_s, self._every_s = 0.0, 0.1
        self.report = Report()
        self.position_us = 0
        """Time of the message published last, since the first one, in microseconds of the recording."""

    def stop(self) -> None:
        """End ``run`` soon; safe in a signal handler."""
        self._stop.set()

    def wait(self, seconds: float) -> None:
        """Wait before the first message, with the connection alive, or until ``stop``."""
        until_s = time.monotonic() + seconds
        while (left_s := until_s - time.monotonic()) > 0 and not self._stop.wait(min(left_s, 0.5)):
            self._client.push()

    def run(
        self,
        *,
        clear_retained: bool = False,
        progress: Callable[[Report], None] = lambda _report: None,
        every_s: float = 0.1,
    ) -> Report:
        """Publish everything; returns when the broker has acknowledged it, or after ``stop``.

        Args:
            clear_retained: take back, at the end, what was retained on the broker by this replay.

        Raises NotConnected when the connection breaks (what is replayed up to there stands in ``report``),
        NotAuthorized or BusError when the broker refuses a message.
        """
        began_s = self._told_s = time.monotonic()
        self._progress, self._every_s = progress, every_s
        first_us: int | None = None
        try:
            for elapsed_us, message in self._messages():
                first_us = elapsed_us if first_us is None else first_us
                self.position_us = elapsed_us - first_us
                if not self._wait_until(began_s + self.position_us / 1_000_000 / self._speed):
                    self.report.stopped = True
                    break
                self._publish(message)
            self._finish(clear_retained)
        finally:
            self.report.took_s = time.monotonic() - began_s
            if self._speed < math.inf:
                self.report.behind_s = max(0.0, self.report.took_s - self.position_us / 1_000_000 / self._speed)
            progress(self.report)
        return self.report

    def _messages(self) -> Iterator[tuple[int, Message]]:
        """What is to be published, with a time in microseconds that never runs backwards between files."""
        recording, offset_us, last_us, last_wall_us = "", 0, 0, 0
        for path in self._paths:
            with Recording(path) as source:
                begun = False
                for item in source.items(self._selection.from_us, self._selection.to_us, self._wanted):
                    if not isinstance(item, Message):
                        self._note(item)
                        continue
                    if not begun:
                        begun = True
                        identifier = source.info.recording if source.info else ""
                        if last_wall_us and (identifier != recording or not identifier):
                            # Another recording: its clock began anew, only wall clocks know the time in between.
                            offset_us = last_us + max(0, item.time_us - last_wall_us) - item.elapsed_us
                        recording = identifier
                    last_us, last_wall_us = max(last_us, offset_us + item.elapsed_us), item.time_us
                    yield last_us, item

    def _wanted(self, topic: str) -> bool:
        return not self._selection.only or any(_matches(each, topic) for each in self._selection.only)

    def _note(self, item: Gap | Damage) -> None:
        if isinstance(item, Gap):
            self.report.gaps += 1
            self.report.missing += item.messages or 0
        else:
            self.report.damage.append(str(item))
            self.report.missing += item.messages or 0

    def _wait_until(self, due_s: float) -> bool:
        """False when it was stopped meanwhile."""
        while True:
            now_s = time.monotonic()
            left_s = due_s - now_s
            if left_s > AHEAD_S or now_s - self._told_s >= self._every_s:
                self._client.push()
                self._check_refusals()
            if now_s - self._told_s >= self._every_s:
                self._told_s = now_s
                self._progress(self.report)
            if left_s <= AHEAD_S:
                return not self._stop.is_set()
            if self._stop.wait(min(left_s, self._every_s)):
                return False

    def _publish(self, message: Message) -> None:
        topic = message.topic
        if not self._selection.asks and is_ask_or_reply(topic):
            self.report.left_out_asks += 1
            return
        retain = message.retain or is_retained(topic)
        if retain and speaker_of(topic) in self._selection.live_nodes:
            self.report.left_out_retained += 1
            return
        if retain:
            if message.payload:
                self._retained[topic] = None
            else:
                self._retained.pop(topic, None)
        self._client.publish(topic, message.payload, qos=min(message.qos, 1), retain=retain, expiry_s=message.expiry_s)
        self.report.published += 1
        self.report.payload_bytes += len(message.payload)

    def _finish(self, clear_retained: bool) -> None:
        if clear_retained:
            for topic in self._retained:
                self._client.publish(topic, b"", qos=1, retain=True)
                self.report.cleared += 1
        self._client.flush(FLUSH_S)
        self.report.unacknowledged = self._client.in_flight
        self._check_refusals()

    def _check_refusals(self) -> None:
        if not self._client.refusals:
            return
        reason, count = next(iter(self._client.refusals.items()))
        if reason == _NOT_AUTHORIZED:
            raise NotAuthorized(
                f"replaying onto {self._client.url}: the broker refused {count:,} messages: Not authorized ({reason})",
                hint="its ACL lets a name write its own branch only: replay under a name that may write the recorded"
                " branches, or use --private",
                field="broker.username",
                reason="Not authorized",
            )
        raise BusError(
            f"replaying onto {self._client.url}: the broker refused {count:,} messages, reason {reason}",
            hint="the broker's log says why",
            reason="refused",
        )


@lru_cache(maxsize=16_384)
def _matches(filter: str, topic: str) -> bool:
    return bool(topic_matches_sub(filter, topic))
