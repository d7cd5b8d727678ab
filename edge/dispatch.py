"""From a received packet to its handler and its acknowledgement.

The network thread puts what it has read into the inbox; the handler thread takes runs from it, calls the handler,
has asks answered and settles the tickets. A message that no handler can take ends as a dead letter.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any

from edge.answers import Answers, Journal, Reply, Speaker, key_of
from edge.counters import Counters, Events
from edge.hearings import Arrival, Hearing, Hearings
from edge.inbox import AckLedger, Inbox
from protocol.codec import Received
from protocol.errors import Cancelled, MindstreamError, to_wire

log = logging.getLogger(__name__)

ATTEMPTS = 3
"""How often a handler may fail on one message before it is a dead letter."""
RUN_LENGTH = 256
"""Messages that the handler thread takes from the inbox at once."""

LINGER_MAX_S = 0.005
LINGER_STEP_S = 0.0003


class Deferred(Future[Any]):
    """Returned by a handler that answers and acknowledges later: ``set_result`` or ``set_exception``."""


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


class Dispatcher:
    """Hearings, inbox, handler thread and answers of one bus connection.

    Args:
        node: this node's name, for asks that only its own services may make.
        speaker: sends answers.
        send_ack: sends one PUBACK.
        together: what is sent within it may be written at once.
        resolve: takes an answer to an ask of ours; False when nobody waits for it.
        limit: bound of the inbox.
    """

    def __init__(
        self,
        node: str,
        speaker: Speaker,
        send_ack: Callable[[int], object],
        together: Callable[[], AbstractContextManager[None]],
        resolve: Callable[[Received], bool],
        counters: Counters,
        events: Events,
        limit: int,
    ) -> None:
        self._source = speaker.source
        self._together = together
        self._counters = counters
        self._events = events
        self._answers = Answers(node, speaker, self._handled, counters, events)
        self.hearings = Hearings(node, speaker.source, resolve, self._answers, counters, events)
        self.ledger = AckLedger(send_ack)
        self.inbox: Inbox[Arrival] = Inbox(limit)
        self._busy_since_s = 0.0
        """When the handler thread took the message that it is at; 0.0 while it waits for one."""
        self.thread = threading.Thread(target=self._run, name=f"{speaker.source} handlers", daemon=True)

    @property
    def journal(self) -> Journal | None:
        """Where durable asks and dead letters are kept, if anywhere."""
        return self._answers.journal

    @journal.setter
    def journal(self, journal: Journal) -> None:
        self._answers.journal = journal

    def stalled_s(self) -> float:
        """How long the handler thread has been at one call of a handler, in seconds; 0.0 when it is at none.

        Infinite when the thread has died.
        """
        since_s = self._busy_since_s
        if not self.thread.is_alive():
            return math.inf
        return time.monotonic() - since_s if since_s else 0.0

    def again(self, name: str, payload: bytes, ttl_ms: int) -> bool:
        """Put a durable ask of an earlier process into the inbox; False when nobody here hears it any more."""
        received_s = time.monotonic()
        hearing, message = self.hearings.read(name, payload, received_s, None, watched=False)
        if hearing is None or message is None:
            return False
        message.ttl_ms = ttl_ms
        arrival = Arrival(self.ledger.take(0), name, payload, hearing, message, journaled=True)
        return self.inbox.offer(arrival, len(payload), wait=False)

    # --- on the network thread ----------------------------------------------------------------------------

    def receive(
        self,
        name: str,
        payload: bytes,
        packet_id: int,
        expiry_s: int | None,
        redelivered: bool = False,
        retained: bool = False,
    ) -> None:
        """Read one packet and put it where it belongs.

        Args:
            name: its topic; empty when that was not UTF-8.
            packet_id: its MQTT packet id; 0 for QoS 0.
            expiry_s: what the broker left of its message expiry, MQTT 5 only.
            redelivered: the broker says that it was sent before.
            retained: the broker had kept it.
        """
        received_s = time.monotonic()
        ticket = self.ledger.take(packet_id)
        watchers = self.hearings.watchers_of(name)
        hearing: Hearing | None = None
        message: Received | None = None
        try:
            hearing, message = self.hearings.read(name, payload, received_s, expiry_s, watched=bool(watchers))
        except Exception:
            # Nothing that comes may end the network thread, nor hold up the acknowledgements behind it.
            self._counters.add("failed.receive")
            log.exception("%s could not take a message on %s", self._source, name[:200])
        if hearing is None and not watchers:
            self.ledger.settle(ticket)
            return
        if message is not None:
            message.retained = retained
            if hearing is not None and hearing.at_once and not watchers:
                self._call_at_once(hearing, message)
                self.ledger.settle(ticket)
                return
        arrival = Arrival(ticket, name, payload, hearing, message, redelivered=redelivered, watchers=watchers)
        if not self.inbox.offer(arrival, len(payload), wait=packet_id > 0) and not packet_id:
            self._counters.add("dropped.queue_full")
        # A refused QoS 1 message (the inbox is closing) stays unacknowledged: it comes again.

    def _call_at_once(self, hearing: Hearing, message: Received) -> None:
        try:
            hearing.handler(message)
            self._counters.add("handled")
        except Exception:
            self._counters.add("failed.handler")
            log.exception("a handler of %s failed on %s", self._source, message.type)

    # --- on the handler thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        while not self.inbox.closed:
            arrivals = self.inbox.take(RUN_LENGTH, timeout_s=0.5)
            self._events.flush()
            if self._linger(arrivals):
                arrivals += self.inbox.take(RUN_LENGTH, timeout_s=0.0)
            for group in _groups(arrivals):
                self._busy_since_s = began_s = time.monotonic()
                self._handle(group)
                self._busy_since_s = 0.0
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
        elif live := [arrival for arrival in arrivals if self._answers.may_answer(arrival)]:
            self._call(hearing, live)

    def _show(self, arrival: Arrival) -> None:
        for watcher in arrival.watchers:
            try:
                watcher(arrival.topic, arrival.payload)
            except Exception:
                self._counters.add("failed.watcher")
                log.exception("a watcher of %s failed on %s", self._source, arrival.topic)
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
        if len(results) == 1:
            self._finish(arrivals[0], results[0])
            return
        with self._together():
            for arrival, result in zip(arrivals, results, strict=True):
                self._finish(arrival, result)

    def _finish(self, arrival: Arrival, result: Reply) -> None:
        """Answer and acknowledge, now or when the Deferred is set."""
        message = arrival.message
        assert message is not None
        if isinstance(result, Deferred):
            result.add_done_callback(lambda future: self._finish_deferred(arrival, future))
            return
        if message.row.ask is not None:
            self._answers.finish(arrival, message, result)
            return
        if isinstance(result, MindstreamError):
            self._counters.add(f"refused.{result.code}")
            self._events.report("refused-message", "warning", f"{self._source}: {result}", error=to_wire(result))
        self._handled(arrival)

    def _finish_deferred(self, arrival: Arrival, future: Future[Any]) -> None:
        error = Cancelled("it was given up") if future.cancelled() else future.exception()
        if error is None:
            self._finish(arrival, future.result())
        else:
            if not isinstance(error, MindstreamError):
                log.error("a deferred answer of %s failed", self._source, exc_info=error)
                self._counters.add("failed.handler")
                error = self._unexpected(arrival, error)
            self._finish(arrival, error)

    def _unexpected(self, arrival: Arrival, error: BaseException) -> MindstreamError:
        assert arrival.message is not None
        return MindstreamError(
            f"carrying out {arrival.message.type}: {to_wire(error).message}",
            hint=f"the log of {self._source} has the details",
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
        where = {"topic": arrival.topic, "type": message.type}
        log.exception("%s failed on %s (attempt %d)", self._source, message.type, arrival.attempts, extra=where)
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
            arrival.attempts = self.journal.count_failure(key_of(message))
        except MindstreamError as error:
            log.error("counting how often %s came: %s", message.type, error)
            return False
        if arrival.attempts <= ATTEMPTS:
            arrival.attempts = 0  # what fails in this process is counted anew
            return False
        died = MindstreamError(
            f"handling {message.type}: the service ended each of the {arrival.attempts} times it came",
            hint=f"the log of {self._source} has the details",
        )
        if message.row.ask is not None:
            self._answers.answer(arrival, message, died)
        self._bury(arrival, message, died)
        return True

    def _handled(self, arrival: Arrival) -> None:
        """Acknowledge; a message that came again did not kill this process, and is counted no more."""
        if arrival.redelivered and arrival.message is not None and self.journal is not None:
            try:
                self.journal.forget_failures(key_of(arrival.message))
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
            f"{self._source}: {message.type} from {message.source} failed {arrival.attempts} times: {error}",
            error=to_wire(error, topic=arrival.topic, type=message.type),
        )
        self._handled(arrival)
