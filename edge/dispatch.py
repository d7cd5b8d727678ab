"""From a received packet to its handler, its answer and its acknowledgement.

The network thread reads a packet here and puts it into the inbox; the handler thread takes runs from it, calls
the handler, answers asks and settles the tickets. Asks are carried out once: a repetition is answered from the
reply cache. What cannot be read is counted, said, and answered with an error where there is an asker.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
from paho.mqtt.client import topic_matches_sub

from edge.counters import Counters, Events
from edge.inbox import AckLedger, Inbox, Ticket
from edge.replies import RUNNING, ReplyCache
from protocol import codec, topics
from protocol.codec import Received
from protocol.errors import AskExpired, BusError, Cancelled, MessageTooLarge, MindstreamError, ProtocolError, to_wire
from protocol.messages import MESSAGES, MessageRow, row_of
from protocol.topics import ParsedTopic

log = logging.getLogger(__name__)

ATTEMPTS = 3
"""How often a handler may fail on one message before it is a dead letter."""
RUN_LENGTH = 256
"""Messages that the handler thread takes from the inbox at once."""

LINGER_MAX_S = 0.005
LINGER_STEP_S = 0.0003

Reply = Any
"""A struct, an error of the tree, a Deferred, or None."""


class Deferred(Future[Any]):
    """Returned by a handler that answers and acknowledges later: ``set_result`` or ``set_exception``."""


class Speaker(Protocol):
    """What the dispatcher needs of the bus: to send an encoded answer."""

    source: str

    def send_reply(self, asker: str, client: str, payload: bytes) -> None:
        """Publish an answer in this node's branch. Raises an error of the tree."""


class Journal(Protocol):
    """Where durable asks and dead letters are written down: edge.journal.CommandJournal."""

    def accept(self, received: Received, payload: bytes, ttl_ms: int) -> str | bytes:
        """``new``, ``running``, ``expired``, or the bytes of the answer that it had. Raises StorageError."""

    def finish(self, received: Received, reply: bytes, *, failed: bool = False) -> None:
        """Keep the answer. Raises StorageError."""

    def count_failure(self, key: str) -> int:
        """How often the message of ``key`` has come again, restarts included. Raises StorageError."""

    def forget_failures(self, key: str) -> None:
        """It was handled after all, or given up. Raises StorageError."""

    def dead_letter(self, topic: str, payload: bytes, error: BaseException | str, attempts: int) -> int:
        """Keep a message that cannot be handled. Raises StorageError."""


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
    watchers: list[Callable[[str, bytes], None]] = field(default_factory=list)


def _key(message: Received) -> str:
    """An ask's key: its id is the asker's own, so another node's is another ask."""
    return f"{message.node}/{message.id}"


def _groups(arrivals: list[Arrival]) -> list[list[Arrival]]:
    """Cut a run into calls of handlers, in order. What a batch handler hears comes together, even past messages of
    other hearings in between: a commit for each two puts would be no group commit."""
    groups: list[list[Arrival]] = []
    begun: dict[int, list[Arrival]] = {}
    for arrival in arrivals:
        hearing = arrival.hearing
        if hearing is None or hearing.batch == 1:
            groups.append([arrival])
            continue
        group = begun.get(id(hearing))
        if group is None or len(group) >= hearing.batch:
            group = begun[id(hearing)] = []
            groups.append(group)
        group.append(arrival)
    return groups


def remaining_ms(message: Received) -> int:
    """What is left of an ask's time to live, by this node's monotonic clock since its arrival."""
    return message.ttl_ms - int((time.monotonic() - message.received_s) * 1000)


class Dispatcher:
    """Hearings, inbox, handler thread and answers of one bus connection.

    Args:
        node: this node's name, for asks that only its own services may make.
        speaker: sends answers.
        send_ack: sends one PUBACK.
        resolve: takes an answer to an ask of ours; False when nobody waits for it.
        limit: bound of the inbox.
    """

    def __init__(
        self,
        node: str,
        speaker: Speaker,
        send_ack: Callable[[int], object],
        resolve: Callable[[Received], bool],
        counters: Counters,
        events: Events,
        limit: int,
    ) -> None:
        self._node = node
        self._speaker = speaker
        self._resolve = resolve
        self._counters = counters
        self._events = events
        self.journal: Journal | None = None
        self.ledger = AckLedger(send_ack)
        self.inbox: Inbox[Arrival] = Inbox(limit)
        # Read by the network thread while others add and remove: every change makes new ones.
        self._hearings: dict[str, tuple[Hearing, ...]] = {}
        self._heard_topics = frozenset({topics.REPLY.name})
        self._watchers: tuple[tuple[str, Callable[[str, bytes], None]], ...] = ()
        self._changing = threading.Lock()
        self._replies = ReplyCache(counters)
        self.thread = threading.Thread(target=self._run, name=f"{speaker.source} handlers", daemon=True)

    # --- who hears what -----------------------------------------------------------------------------------

    def hear(
        self, struct: type[msgspec.Struct], handler: Callable[..., Any], batch: int, names: dict[str, str]
    ) -> Hearing:
        """Add a hearing. Raises BusError when one for the same messages is there: only one could answer."""
        row = row_of(struct)
        if row.ask is not None:
            names = {"target": self._node, "service": row.ask.service, "verb": row.ask.verb, **names}
        hearing = Hearing(row, handler, batch, names, row.topic.filter(**names))
        with self._changing:
            others = self._hearings.get(row.type, ())
            if any(other.filter == hearing.filter for other in others):
                raise BusError(
                    f"hearing {row.type} on {self._speaker.source}: {hearing.filter} has a handler already",
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

    def watch(self, filter: str, callback: Callable[[str, bytes], None]) -> None:
        """Add a raw watcher."""
        with self._changing:
            self._watchers = (*self._watchers, (filter, callback))

    def again(self, name: str, payload: bytes, ttl_ms: int) -> bool:
        """Put a durable ask of an earlier process into the inbox; False when nobody here hears it any more."""
        received_s = time.monotonic()
        hearing, message = self._read(name, payload, received_s, None, watched=False)
        if hearing is None or message is None:
            return False
        message.ttl_ms = ttl_ms
        arrival = Arrival(self.ledger.take(0), name, payload, hearing, message, journaled=True)
        return self.inbox.offer(arrival, len(payload), wait=False)

    def filters(self) -> set[str]:
        """Every MQTT filter that hearings and watchers need."""
        heard = {hearing.filter for hearings in self._hearings.values() for hearing in hearings}
        return heard | {filter for filter, _ in self._watchers}

    # --- on the network thread ----------------------------------------------------------------------------

    def receive(
        self, name: str, payload: bytes, packet_id: int, expiry_s: int | None, redelivered: bool = False
    ) -> None:
        """Read one packet and put it where it belongs.

        Args:
            name: its topic; empty when that was not UTF-8.
            packet_id: its MQTT packet id; 0 for QoS 0.
            expiry_s: what the broker left of its message expiry, MQTT 5 only.
            redelivered: the broker says that it was sent before.
        """
        received_s = time.monotonic()
        ticket = self.ledger.take(packet_id)
        watchers = [callback for filter, callback in self._watchers if topic_matches_sub(filter, name)]
        hearing: Hearing | None = None
        message: Received | None = None
        try:
            hearing, message = self._read(name, payload, received_s, expiry_s, watched=bool(watchers))
        except Exception:
            # Nothing that comes may end the network thread, nor hold up the acknowledgements behind it.
            self._counters.add("failed.receive")
            log.exception("%s could not take a message on %s", self._speaker.source, name[:200])
        if hearing is None and not watchers:
            self.ledger.settle(ticket)
            return
        arrival = Arrival(ticket, name, payload, hearing, message, redelivered=redelivered, watchers=watchers)
        if not self.inbox.offer(arrival, len(payload), wait=packet_id > 0) and not packet_id:
            self._counters.add("dropped.queue_full")
        # A refused QoS 1 message (the inbox is closing) stays unacknowledged: it comes again.

    def _read(
        self, name: str, payload: bytes, received_s: float, expiry_s: int | None, *, watched: bool
    ) -> tuple[Hearing | None, Received | None]:
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
        self._events.report("refused-message", "warning", f"{self._speaker.source}: {error}", error=to_wire(error))
        if topic is not None and topic.topic is topics.ASK and (envelope := codec.peek(payload)) is not None:
            self._reply(topic.node, envelope.reply_to, envelope.id, error, topic=topic.raw, type=envelope.type)

    # --- on the handler thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        while not self.inbox.closed:
            arrivals = self.inbox.take(RUN_LENGTH, timeout_s=0.5)
            self._events.flush()
            if self._linger(arrivals):
                arrivals += self.inbox.take(RUN_LENGTH, timeout_s=0.0)
            for group in _groups(arrivals):
                began_s = time.monotonic()
                self._handle(group)
                if (hearing := group[0].hearing) is not None and hearing.batch > 1:
                    hearing.speakers.append({each.message.source for each in group if each.message is not None})
                    hearing.call_s = time.monotonic() - began_s
                self.inbox.done(len(group))

    def _linger(self, arrivals: list[Arrival]) -> bool:
        """Wait a little before a batch handler is called, when more is to be expected: whether it was worth it.

        Clients that were just answered are about to ask again; without this, each half of them waits for the
        other half's commit. Never longer than half of what the last call took, and never for a client alone.
        """
        hearing = next((each.hearing for each in arrivals if each.hearing and each.hearing.batch > 1), None)
        if hearing is None:
            return False
        expected = min(len(set().union(*hearing.speakers)), hearing.batch)
        until_s = time.monotonic() + min(hearing.call_s / 2, LINGER_MAX_S)
        while len(self.inbox) < expected and time.monotonic() < until_s and not self.inbox.closed:
            time.sleep(LINGER_STEP_S)
        return len(self.inbox) > len(arrivals)

    def _handle(self, arrivals: list[Arrival]) -> None:
        """Call watchers and the handler for a run of messages of one hearing, and settle each."""
        for arrival in arrivals:
            self._show(arrival)
        hearing = arrivals[0].hearing
        if hearing is None:
            for arrival in arrivals:
                self.ledger.settle(arrival.ticket)
            return
        if any(arrival.redelivered for arrival in arrivals):
            arrivals = [arrival for arrival in arrivals if not self._kills(arrival)]
        if hearing.row.ask is None:
            if arrivals:
                self._call(hearing, arrivals)
        elif live := [arrival for arrival in arrivals if self._may_answer(arrival)]:
            self._call(hearing, live)

    def _show(self, arrival: Arrival) -> None:
        for watcher in arrival.watchers:
            try:
                watcher(arrival.topic, arrival.payload)
            except Exception:
                self._counters.add("failed.watcher")
                log.exception("a watcher of %s failed on %s", self._speaker.source, arrival.topic)
        arrival.watchers = []

    def _call(self, hearing: Hearing, arrivals: list[Arrival]) -> None:
        try:
            results: Sequence[Reply]
            if hearing.batch > 1:
                results = hearing.handler([arrival.message for arrival in arrivals]) or [None] * len(arrivals)
                if len(results) != len(arrivals):
                    raise ValueError(f"{len(results)} answers to {len(arrivals)} messages")
            else:
                results = [hearing.handler(arrivals[0].message)]
        except MindstreamError as error:
            results = [error] * len(arrivals)
        except Exception as error:  # noqa: BLE001 - a handler may break in any way; _failed logs, counts and says it
            self._failed(hearing, arrivals, error)
            return
        self._counters.add("handled", len(arrivals))
        for arrival, result in zip(arrivals, results, strict=True):
            self._finish(arrival, result)

    def _may_answer(self, arrival: Arrival) -> bool:
        """Whether an ask is to be carried out: in time, allowed, and not done or under way already."""
        message = arrival.message
        assert message is not None
        ask = message.row.ask
        assert ask is not None
        if not 0 < message.ttl_ms <= ask.ttl_max_ms:
            error: MindstreamError = ProtocolError(
                f"reading {message.type}: its time to live is {message.ttl_ms} ms, it must be 1 to {ask.ttl_max_ms}",
                field="ttl_ms",
                reason="missing or out of range",
            )
        elif remaining_ms(message) <= 0:
            error = AskExpired(
                f"carrying out {message.type}: its time to live ran out before it could be",
                hint="ask again, with a longer time to live",
                field="ttl_ms",
                reason="expired",
            )
        elif ask.own_node_only and message.node != self._node:
            error = ProtocolError(
                f"carrying out {message.type}: only {self._node}'s own services may ask it, {message.node} did",
                field="node",
                reason="not allowed",
            )
        else:
            return self._is_new(arrival, message)
        self._counters.add(f"refused.{error.code}")
        self._answer(arrival, message, error)
        self._handled(arrival)
        return False

    def _is_new(self, arrival: Arrival, message: Received) -> bool:
        """Whether an ask comes for the first time; a repetition gets the answer that was given, or waits for it."""
        known = self._replies.begin(_key(message), message.ttl_ms)
        if known is None and message.row.ask is not None and message.row.ask.durable and self.journal is not None:
            if not arrival.journaled:
                try:
                    verdict = self.journal.accept(message, arrival.payload, remaining_ms(message))
                except MindstreamError as error:
                    self._finish(arrival, error)
                    return False
                if isinstance(verdict, bytes):
                    self._send(message.node, message.reply_to, verdict, message.type)
                if verdict != "new":
                    known = RUNNING
                arrival.journaled = True
            # It is on the disk: the broker may forget it while it is being carried out.
            self._handled(arrival)
        if known is None:
            return True
        self._counters.add("duplicates")
        if known is not RUNNING:
            self._answer(arrival, message, known)
        self._handled(arrival)
        return False

    def _finish(self, arrival: Arrival, result: Reply) -> None:
        """Answer and acknowledge, now or when the Deferred is set."""
        message = arrival.message
        assert message is not None
        if isinstance(result, Deferred):
            result.add_done_callback(lambda future: self._finish_deferred(arrival, future))
            return
        if isinstance(result, MindstreamError):
            self._counters.add(f"refused.{result.code}")
        if message.row.ask is not None:
            size_bytes = self._answer(arrival, message, result)
            self._replies.finish(_key(message), result, size_bytes)
        elif isinstance(result, MindstreamError):
            self._events.report(
                "refused-message", "warning", f"{self._speaker.source}: {result}", error=to_wire(result)
            )
        self._handled(arrival)

    def _finish_deferred(self, arrival: Arrival, future: Future[Any]) -> None:
        error = Cancelled("it was given up") if future.cancelled() else future.exception()
        if error is None:
            self._finish(arrival, future.result())
        else:
            if not isinstance(error, MindstreamError):
                log.error("a deferred answer of %s failed", self._speaker.source, exc_info=error)
                self._counters.add("failed.handler")
                error = self._unexpected(arrival, error)
            self._finish(arrival, error)

    def _unexpected(self, arrival: Arrival, error: BaseException) -> MindstreamError:
        assert arrival.message is not None
        return MindstreamError(
            f"carrying out {arrival.message.type}: {to_wire(error).message}",
            hint=f"the log of {self._speaker.source} has the details",
        )

    def _failed(self, hearing: Hearing, arrivals: list[Arrival], error: Exception) -> None:
        """A handler broke. Of many, each is tried alone; an asker is told; others are tried again, then kept apart."""
        if len(arrivals) > 1:
            for arrival in arrivals:
                self._call(hearing, [arrival])
            return
        arrival = arrivals[0]
        message = arrival.message
        assert message is not None
        arrival.attempts += 1
        self._counters.add("failed.handler")
        log.exception("%s failed on %s (attempt %d)", self._speaker.source, message.type, arrival.attempts)
        if message.row.ask is not None:
            self._finish(arrival, self._unexpected(arrival, error))
        elif arrival.attempts < ATTEMPTS:
            self._call(hearing, arrivals)
        else:
            self._bury(arrival, message, error)

    def _kills(self, arrival: Arrival) -> bool:
        """Whether a message has come again too often: each time before, the process that had it died. It is given up.

        Counted on the disk before it is handled. A durable ask is counted by the journal's own recovery. Needs a
        broker that marks what it sends again (DUP): Mosquitto does, rumqttd does not.
        """
        message = arrival.message
        if not arrival.redelivered or message is None or not message.id or self.journal is None:
            arrival.redelivered = False
            return False
        if message.row.ask is not None and message.row.ask.durable:
            arrival.redelivered = False
            return False
        try:
            arrival.attempts = self.journal.count_failure(_key(message))
        except MindstreamError as error:
            log.error("counting how often %s came: %s", message.type, error)
            return False
        if arrival.attempts <= ATTEMPTS:
            arrival.attempts = 0  # what fails in this process is counted anew
            return False
        died = MindstreamError(
            f"handling {message.type}: the service ended each of the {arrival.attempts} times it came",
            hint=f"the log of {self._speaker.source} has the details",
        )
        if message.row.ask is not None:
            self._answer(arrival, message, died)
        self._bury(arrival, message, died)
        return True

    def _handled(self, arrival: Arrival) -> None:
        """Acknowledge; a message that came again did not kill this process, and is counted no more."""
        if arrival.redelivered and arrival.message is not None and self.journal is not None:
            try:
                self.journal.forget_failures(_key(arrival.message))
            except MindstreamError as error:
                log.error("forgetting how often %s came: %s", arrival.message.type, error)
        self.ledger.settle(arrival.ticket)

    def _bury(self, arrival: Arrival, message: Received, error: Exception) -> None:
        """Keep a message that nobody can handle apart, say so, and acknowledge it."""
        self._counters.add("dead_letters")
        if self.journal is not None:
            try:
                self.journal.dead_letter(arrival.topic, arrival.payload, error, arrival.attempts)
            except MindstreamError as storage_error:
                log.error("keeping a dead letter of %s: %s", arrival.topic, storage_error)
        self._events.report(
            "dead-letter",
            "error",
            f"{self._speaker.source}: {message.type} from {message.source} failed {arrival.attempts} times: {error}",
            error=to_wire(error, topic=arrival.topic, type=message.type),
        )
        self._handled(arrival)

    def _answer(self, arrival: Arrival, message: Received, result: Reply) -> int:
        """Answer one ask, a durable one's answer being kept first; the answer's size in bytes."""
        payload = self._encode(result, message.id, arrival.topic, message.type)
        if arrival.journaled and self.journal is not None:
            try:
                self.journal.finish(message, payload, failed=isinstance(result, MindstreamError))
            except MindstreamError as error:
                # It will be carried out again after a restart; better than no answer now.
                self._counters.add("dropped.journal")
                log.error("keeping the answer to %s: %s", message.type, error)
        self._send(message.node, message.reply_to, payload, message.type)
        return len(payload)

    def _reply(
        self, asker: str, client: str, correlation: str, error: MindstreamError, *, topic: str, type: str
    ) -> None:
        self._send(asker, client, self._encode(error, correlation, topic, type), type)

    def _encode(self, result: Reply, correlation: str, topic: str, type: str) -> bytes:
        if not isinstance(result, MindstreamError):
            ask = MESSAGES[type].ask
            assert ask is not None
            row = MESSAGES[ask.reply]
            try:
                if not isinstance(result, row.struct):
                    raise TypeError(f"the handler answered with {result.__class__.__name__}, not {row.struct.__name__}")
                return codec.encode(result, source=self._speaker.source, row=row, correlation=correlation)
            except MessageTooLarge as error:
                result = error
            except (TypeError, ValueError, OverflowError, RecursionError) as error:
                # A handler's mistake must neither end the handler thread nor leave the asker waiting.
                self._counters.add("failed.handler")
                log.exception("%s cannot answer %s", self._speaker.source, type)
                result = error
        info = to_wire(result, topic=topic, type=type)
        return codec.encode(info, source=self._speaker.source, row=MESSAGES["error"], correlation=correlation)

    def _send(self, asker: str, client: str, payload: bytes, type: str) -> None:
        """Send one answer. One that cannot be sent is counted: the asker asks again."""
        try:
            self._speaker.send_reply(asker, client, payload)
        except MindstreamError as error:
            self._counters.add("dropped.reply")
            self._events.report("reply-dropped", "warning", f"answering {type} of {asker}/{client[:63]}: {error}")
