"""The bus: typed messages over MQTT, on paho-mqtt.

paho's network thread decodes what comes and puts it into a bounded inbox; one handler thread calls the
handlers; a message is acknowledged when its handler has returned, or when the Deferred that it returned is
set. Answers to asks are resolved by the network thread at once, and it calls the handlers of ``hear_at_once``
itself. Nothing is dropped without a counter.

A handler must not ask: its own answer could wait behind messages that wait for the handler. Return a Deferred
and ask from a worker.

The connection and its life stand in ``edge.connection``, the window in ``edge.publishing``, asking in
``edge.asking``, what becomes of a received message in ``edge.dispatch``.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import lru_cache
from typing import Any

import msgspec
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode

from edge.asking import Asker
from edge.asks import PendingAsks
from edge.connection import Connection, Listener
from edge.counters import Counters, Events
from edge.dispatch import Deferred, Dispatcher
from edge.hearings import Hearing
from edge.journal import CommandJournal
from edge.mqtt_client import Packed
from edge.mqtt_version import AUTO
from edge.publishing import PUBLISH_WINDOW, Packet, Publisher, check_size, topic_of
from edge.wire_properties import RequestProperties
from protocol import codec, topics
from protocol.codec import Received
from protocol.errors import BusError, MindstreamError, NotAuthorized, NotConnected, to_wire
from protocol.ids import check_name
from protocol.messages import Event, row_of
from protocol.topics import Topic

log = logging.getLogger(__name__)

QUICK_ACK_BELOW = 4
"""With fewer messages under way than this, latency counts more than the system call."""


@lru_cache(maxsize=16)
def _under(topic: Topic, root: str) -> Topic:
    return dataclasses.replace(topic, root=root) if root and root != topic.root else topic


class Bus:
    """One connection of one named client of one node.

    Args:
        url: ``mqtt://host:port`` or ``mqtts://host:port``.
        node: the node in whose branch this client speaks.
        client: its name there, a service or a program; with the node it makes the client id.
        username, password: for the broker; empty for none.
        ca_file: CA certificates for ``mqtts``; empty for the system's.
        protocol: MQTT version: ``5``, ``3.1.1``, or ``auto``: 5, and 3.1.1 where the broker has no 5.
        queue_messages: bound of the inbox, and the receive maximum granted to the broker.
        durable_session: the broker keeps messages for this client while it is away. Not on 3.1.1, where nothing
            would tell how old an ask has become meanwhile.
        will: a retained state message that the broker publishes when the client vanishes, with the names
            of its topic.
    """

    def __init__(
        self,
        *,
        url: str,
        node: str,
        client: str,
        username: str = "",
        password: str = "",
        ca_file: str = "",
        protocol: str = AUTO,
        queue_messages: int = 1000,
        durable_session: bool = False,
        will: tuple[msgspec.Struct, dict[str, str]] | None = None,
    ) -> None:
        self.url = url
        self.node = check_name(node, "node")
        self.client = check_name(client, "client")
        self.username = username
        self.source = f"{node}/{client}"
        self.counters = Counters()
        self.events = Events(self._say_event, self.counters)
        self._asks = PendingAsks()
        self._started = False
        self._stopping = False
        self._connection = Connection(
            url=url,
            source=self.source,
            client_id=f"mindstream-{node}-{client}",
            username=username,
            password=password,
            ca_file=ca_file,
            receive_maximum=queue_messages,
            durable=durable_session,
            protocol=protocol,
            counters=self.counters,
            events=self.events,
            listener=Listener(
                on_packet=self._receive,
                on_acknowledged=self._acknowledged,
                on_refused=self._refused,
                on_up=self._on_up,
                on_subscribing=self._asks.resend,
                on_down=lambda: self._dispatch.ledger.new_connection(),
                filters=self._filters,
            ),
        )
        self._publisher = Publisher(self._connection, self._must_not_wait, self.counters)
        self._asker = Asker(node, client, self._asks, self._connection, self._publisher)
        self._dispatch = Dispatcher(
            node,
            self,
            lambda packet_id: self._connection.client.ack(packet_id, 1),
            self._connection.client.corked,
            self._asks.resolve,
            self.counters,
            self.events,
            queue_messages,
        )
        if will is not None:
            message, names = will
            row = row_of(message)
            self._connection.client.will_set(
                self._topic(row.topic, names),
                codec.encode(message, source=self.source, row=row),
                qos=1,
                retain=row.topic.retain,
            )

    # --- life ---------------------------------------------------------------------------------------------

    def start(self, timeout_s: float | None = 30.0) -> None:
        """Connect and subscribe. Raises NotConnected as wait_subscribed() does; None connects in the background.

        The connection heals by itself from then on, with backoff.
        """
        if not self._started:
            self._started = True
            self._connection.start()
            self._dispatch.thread.start()
        if timeout_s is not None:
            self.wait_subscribed(timeout_s)

    def stop(self, *, goodbye: Sequence[tuple[msgspec.Struct, dict[str, str]]] = (), timeout_s: float = 5.0) -> None:
        """Say ``goodbye``, wait for what is under way, disconnect. What is not acknowledged comes again."""
        if self._stopping or not self._started:
            return
        self.events.flush(everything=True)
        self._stopping = self._connection.stopping = True
        self._dispatch.inbox.close()
        if self._dispatch.thread is not threading.current_thread():
            self._dispatch.thread.join(timeout_s)
        if self._connection.connected.is_set():
            for message, names in goodbye:
                self.say(message, timeout_s=timeout_s, **names)
            self.flush(timeout_s)
        self._asks.fail_all(NotConnected(f"{self.source} is stopping"))
        self._connection.stop()

    def __enter__(self) -> Bus:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def connected(self) -> bool:
        """Connected and subscribed at this moment."""
        return self._connection.subscribed.is_set()

    @property
    def reachable(self) -> bool:
        """A connection stands, whether or not the broker has granted every subscription: something can be said."""
        return self._connection.connected.is_set()

    @property
    def connections(self) -> int:
        """Connections made so far: when it grows, the broker may have forgotten what was retained."""
        return self._connection.count

    @property
    def refusal(self) -> str:
        """Why there is no connection, or not every subscription; empty when all is well, or nothing was tried yet."""
        return self._connection.fault.text if self._connection.fault is not None else ""

    @property
    def protocol(self) -> str:
        """The MQTT version spoken, or about to be tried: ``5`` or ``3.1.1``."""
        return self._connection.version

    def stalled_s(self) -> float:
        """How long the handler thread has been at one message, or the network thread has not turned, in seconds.

        0.0 while both are idle or go on. For a watchdog: a service whose handlers are slow by design allows for that.
        """
        if not self._started or self._stopping:
            return 0.0
        if self._dispatch.inbox.holds_back:
            return self._dispatch.stalled_s()  # the network thread waits for the handlers, as it should
        return max(self._dispatch.stalled_s(), self._connection.stalled_s())

    def keep_asks_in(self, journal: CommandJournal) -> None:
        """Write durable asks and dead letters into ``journal``, and carry out what an earlier process left there.

        Called once every hearing is there, before start(). Raises StorageError.
        """
        self._dispatch.journal = journal
        recovery = journal.unfinished()
        left = sum(not self._dispatch.again(each.topic, each.payload, each.ttl_ms) for each in recovery.commands)
        for name, count in (("expired", recovery.expired), ("dead_letters", recovery.dead), ("left_for_later", left)):
            if count:
                self.counters.add(name, count)
                log.warning("%s: %d commands of before the restart are %s", self.source, count, name.replace("_", " "))

    @property
    def queued(self) -> int:
        """Messages received and not yet handled."""
        return len(self._dispatch.inbox)

    # --- saying -------------------------------------------------------------------------------------------

    def say(self, message: msgspec.Struct, *, timeout_s: float = 30.0, root: str = "", **names: str) -> None:
        """Publish ``message`` on its topic in this node's branch; ``names`` fill the topic's other levels.

        ``root`` stands in place of the topic's own, for the one whose root is the reader's to choose.

        Returns when the client library has it; waits while the window is full, except in a handler, which must
        not: there it goes to a backlog. Raises MessageTooLarge, WrongTopic, or Overloaded when no room came in
        ``timeout_s``.
        """
        row = row_of(message)
        topic = self._topic(_under(row.topic, root), names)
        payload = codec.encode(message, source=self.source, row=row)
        check_size(topic, payload)
        self._publisher.send(Packet(topic, payload, row.topic.retain), timeout_s=timeout_s)

    def forget(self, struct: type[msgspec.Struct], *, timeout_s: float = 30.0, root: str = "", **names: str) -> None:
        """Let the broker forget what it keeps on a retained topic of this node. Raises what say() raises."""
        topic = self._topic(_under(row_of(struct).topic, root), names)
        self._publisher.send(Packet(topic, b"", True), timeout_s=timeout_s)

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Wait until the broker has acknowledged all that was said; False when it has not in time."""
        return self._publisher.flush(timeout_s)

    def ask(self, target: str, message: msgspec.Struct, *, ttl_ms: int) -> Any:
        """Ask ``target`` node and wait for its answer, at most ``ttl_ms``.

        The ask is sent again (same id: it is carried out once) when the connection comes back. Raises
        AskExpired, NotAuthorized (the broker's ACL), or the error that the other side answered with.
        """
        if self._connection.on_network_thread():
            raise BusError(
                f"asking {target} from the network thread of {self.source}: it would wait for itself",
                hint="ask from a worker thread, or use ask_later",
            )
        return self.ask_later(target, message, ttl_ms=ttl_ms).result()

    def ask_later(self, target: str, message: msgspec.Struct, *, ttl_ms: int, id: str = "") -> Future[Any]:
        """Like ask(), as a future. ``id`` (a UUIDv7) repeats an earlier ask instead of making a new one."""
        if threading.current_thread() is self._dispatch.thread:
            raise BusError(
                f"asking {target} from a handler of {self.source}: its answer could never be taken",
                hint="return a Deferred and ask from a worker thread",
            )
        return self._asker.ask(target, message, ttl_ms, id)

    def send_reply(self, asker: str, client: str, payload: bytes) -> None:
        """Publish the encoded answer to an ask of ``client`` on node ``asker``."""
        topic = self._topic(topics.REPLY, {"asker": asker, "client": client})
        check_size(topic, payload)
        self._publisher.send(Packet(topic, payload, False), timeout_s=10.0)

    def _say_event(self, event: Event) -> None:
        log.log(_LEVELS[event.severity], event.text)
        if self._connection.connected.is_set() and not self._stopping:
            try:
                self.say(event, timeout_s=0.0, service=self.client)
            except MindstreamError as error:
                self.counters.add("dropped.event")
                log.warning("an event could not be said: %s", error)

    def _topic(self, topic: Topic, names: dict[str, str]) -> str:
        return topic_of(topic, (("node", self.node), *names.items()))

    def _must_not_wait(self) -> bool:
        """Whether this thread is one that the broker may be waiting for.

        rumqttd sends no PUBACK to a client that owes it a hundred of its own: a handler that waited for the window
        before its messages are acknowledged would wait for itself. What it sends is bounded by what it received.
        """
        return self._connection.on_network_thread() or threading.current_thread() is self._dispatch.thread

    # --- hearing ------------------------------------------------------------------------------------------

    def hear(
        self, struct: type[msgspec.Struct], handler: Callable[..., Any], *, batch: int = 1, **names: str
    ) -> Callable[[], None]:
        """Call ``handler`` for each message of ``struct``'s type; subscribe if connected already.

        Returns a function that ends the hearing.

        Args:
            handler: takes one Received, or a list of up to ``batch`` when batch is above 1. For an ask it
                returns the answer: a struct, an error of the tree, or a Deferred; for a batch a list of them.
            names: fix levels of the topic; any name otherwise. Asks to this node only, always.
        """
        return self._hear(self._dispatch.hearings.hear(struct, handler, batch, names))

    def hear_at_once(
        self, struct: type[msgspec.Struct], handler: Callable[[Received], None], **names: str
    ) -> Callable[[], None]:
        """Like hear(), on the network thread, without the way through the inbox and its thread.

        For a handler that only hands over to somewhere else, and neither waits nor asks. What it raises is counted
        and logged, and the message is gone. Not for asks.
        """
        return self._hear(self._dispatch.hearings.hear(struct, handler, 1, names, at_once=True))

    def _hear(self, hearing: Hearing) -> Callable[[], None]:
        if self._started:
            self._connection.subscribe([hearing.filter])

        def stop_hearing() -> None:
            self._dispatch.hearings.unhear(hearing)
            if hearing.filter not in self._dispatch.hearings.filters():
                self._connection.unsubscribe(hearing.filter)

        return stop_hearing

    def wait_subscribed(self, timeout_s: float) -> None:
        """Wait until the broker has granted every subscription.

        Raises NotConnected: after ``timeout_s``, or at once when waiting cannot help (a wrong password, no TLS).
        """
        self._connection.wait_subscribed(timeout_s)

    def watch(self, filter: str, callback: Callable[[str, bytes], None]) -> None:
        """Call ``callback(topic, payload)`` with the raw bytes of all that matches an MQTT filter."""
        self._dispatch.hearings.watch(filter, callback)
        if self._started:
            self._connection.subscribe([filter])

    def _filters(self) -> list[str]:
        return sorted(self._dispatch.hearings.filters() | {topics.REPLY.filter(asker=self.node, client=self.client)})

    # --- on the network thread ----------------------------------------------------------------------------

    def _on_up(self, granted: int) -> None:
        self._dispatch.ledger.new_connection()
        self._publisher.new_connection(granted)

    def _refused(self, topic: str, properties: Packed | None, code: int) -> None:
        """The broker has refused a message of ours; on 3.1.1 it would not say so."""
        try:
            self._say_refused(topic, properties, code)
        finally:
            self._acknowledged()

    def _say_refused(self, topic: str, properties: Packed | None, code: int) -> None:
        self.counters.add("refused.publish")
        reason = str(ReasonCode(PacketTypes.PUBACK, identifier=code))
        error = NotAuthorized(
            f"publishing on {topic}: the broker refused it: {reason} ({code})",
            hint=f"its ACL must let {self.username or 'a client without a name'} write that; `mindstream broker user` "
            f"lets a name write {topics.ROOT}/NAME/# alone, and this client speaks for {self.node}",
            topic=topic,
            field="broker.username",
            reason=reason,
        )
        if isinstance(properties, RequestProperties):
            self._asks.fail(properties.correlation.decode(), error)
        if topic == self._topic(topics.EVENT, {"service": self.client}):
            log.error("%s: %s", self.source, error)  # an event that said so would be refused as well
        else:
            self.events.report("publish-refused", "error", f"{self.source}: {error}", error=to_wire(error))

    def _acknowledged(self) -> None:
        self._publisher.free(1)
        if self._publisher.in_flight < QUICK_ACK_BELOW:
            self._connection.quick_ack()

    def _receive(
        self, name: str, payload: bytes, packet_id: int, expiry_s: int | None, redelivered: bool, retained: bool
    ) -> None:
        self._dispatch.receive(name, payload, packet_id, expiry_s, redelivered, retained)
        # What was taken at once has been acknowledged at once: a PUBACK carries the TCP ACK as well.
        if 0 < len(self._dispatch.inbox) < QUICK_ACK_BELOW:
            self._connection.quick_ack()


_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

__all__ = ["PUBLISH_WINDOW", "Bus", "Deferred", "Received"]
