"""Who hears what, and the reading of a packet: its topic, its envelope, and the hearing that it is for.

What cannot be read is counted, said, and answered with an error where there is an asker.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
from paho.mqtt.client import topic_matches_sub

from edge.answers import Answers
from edge.counters import Counters, Events
from edge.inbox import Ticket
from protocol import codec, topics
from protocol.codec import Received
from protocol.errors import BusError, ProtocolError, to_wire
from protocol.messages import MessageRow, row_of
from protocol.topics import ParsedTopic

Watcher = Callable[[str, bytes], None]
"""Takes topic and payload as they came."""


@dataclass
class Hearing:
    """A handler and the messages it hears."""

    row: MessageRow
    handler: Callable[..., Any]
    batch: int
    names: dict[str, str]
    """Levels of the topic that are fixed."""
    filter: str
    """MQTT filter to subscribe to."""
    at_once: bool = False
    """Its handler is called on the network thread: it must not wait, and what it fails on is gone."""
    speakers: deque[set[str]] = field(default_factory=lambda: deque(maxlen=2))
    """Who spoke in the last two calls of a batch handler: those of one wait while the other is carried out."""
    call_s: float = 0.0
    """How long the last call of a batch handler took."""


@dataclass
class Arrival:
    """A message in the inbox, or in a handler's hands."""

    ticket: Ticket
    topic: str
    payload: bytes
    hearing: Hearing | None
    message: Received | None
    attempts: int = 0
    journaled: bool = False
    """A durable ask that is in the journal already."""
    redelivered: bool = False
    """The broker sent it before: whoever had it may have died of it."""
    watchers: list[Watcher] = field(default_factory=list)


class Hearings:
    """Every hearing and watcher of one bus connection.

    Args:
        node: this node's name: asks to it alone are heard.
        source: ``node/client``, for messages.
        resolve: takes an answer to an ask of ours; False when nobody waits for it.
        answers: tells an asker what could not be read.
    """

    def __init__(
        self,
        node: str,
        source: str,
        resolve: Callable[[Received], bool],
        answers: Answers,
        counters: Counters,
        events: Events,
    ) -> None:
        self._node = node
        self._source = source
        self._resolve = resolve
        self._answers = answers
        self._counters = counters
        self._events = events
        # Read by the network thread while others add and remove: every change makes new ones.
        self._hearings: dict[str, tuple[Hearing, ...]] = {}
        self._heard_topics = frozenset({topics.REPLY.name})
        self._watchers: tuple[tuple[str, Watcher], ...] = ()
        self._changing = threading.Lock()

    def hear(
        self,
        struct: type[msgspec.Struct],
        handler: Callable[..., Any],
        batch: int,
        names: dict[str, str],
        *,
        at_once: bool = False,
    ) -> Hearing:
        """Add a hearing. Raises BusError when one for the same messages is there: only one could answer."""
        row = row_of(struct)
        if row.ask is not None:
            if at_once:
                raise BusError(
                    f"hearing {row.type} on {self._source}: an ask is answered by way of the inbox",
                    hint="use hear()",
                    type=row.type,
                )
            names = {"target": self._node, "service": row.ask.service, "verb": row.ask.verb, **names}
        hearing = Hearing(row, handler, batch, names, row.topic.filter(**names), at_once)
        with self._changing:
            others = self._hearings.get(row.type, ())
            if any(other.filter == hearing.filter for other in others):
                raise BusError(
                    f"hearing {row.type} on {self._source}: {hearing.filter} has a handler already",
                    hint="end the other hearing first, or let one handler serve both",
                    type=row.type,
                )
            self._hearings = {**self._hearings, row.type: (*others, hearing)}
            self._heard_topics |= {row.topic.name}
        return hearing

    def unhear(self, hearing: Hearing) -> None:
        """Remove a hearing; what it has in the inbox is still handled."""
        with self._changing:
            left = tuple(each for each in self._hearings[hearing.row.type] if each is not hearing)
            self._hearings = {**self._hearings, hearing.row.type: left}

    def watch(self, filter: str, callback: Watcher) -> None:
        """Add a raw watcher."""
        with self._changing:
            self._watchers = (*self._watchers, (filter, callback))

    def filters(self) -> set[str]:
        """Every MQTT filter that hearings and watchers need."""
        heard = {hearing.filter for hearings in self._hearings.values() for hearing in hearings}
        return heard | {filter for filter, _ in self._watchers}

    def watchers_of(self, name: str) -> list[Watcher]:
        """Whose filter the topic ``name`` matches."""
        return [callback for filter, callback in self._watchers if topic_matches_sub(filter, name)]

    def read(
        self, name: str, payload: bytes, received_s: float, expiry_s: int | None, *, watched: bool
    ) -> tuple[Hearing | None, Received | None]:
        """The hearing that a packet is for and its message; None for what nobody here handles.

        An answer is given to its asker at once. ``watched``: a watcher sees it, so a foreign topic is no mistake.
        """
        try:
            topic = topics.parse(name)
        except ProtocolError as error:
            if not watched:
                self._refuse(error, None, b"")
            return None, None
        if topic.topic.name not in self._heard_topics or (topic.topic.retain and not payload):
            return None, None  # for a watcher alone, or a retained message being cleared
        try:
            message = codec.decode(topic, payload, received_s=received_s)
        except ProtocolError as error:
            self._refuse(error, topic, payload)
            return None, None
        if topic.topic is topics.REPLY:
            if not self._resolve(message):
                self._counters.add("late_replies")
            return None, None
        for hearing in self._hearings.get(message.type, ()):
            if all(value == "+" or topic.names[level] == value for level, value in hearing.names.items()):
                if expiry_s is not None and message.row.ask is not None:
                    message.ttl_ms = min(message.ttl_ms, max(1, expiry_s * 1000))
                return hearing, message
        return None, None

    def _refuse(self, error: ProtocolError, topic: ParsedTopic | None, payload: bytes) -> None:
        """Count and say what could not be read, and tell an asker."""
        self._counters.add(f"refused.{error.code}")
        self._events.report("refused-message", "warning", f"{self._source}: {error}", error=to_wire(error))
        if topic is not None and topic.topic is topics.ASK and (envelope := codec.peek(payload)) is not None:
            self._answers.refuse(topic.node, envelope.reply_to, envelope.id, error, topic=topic.raw, type=envelope.type)
