"""The bounded queue between the network thread and the handler thread, and acknowledgements in order.

MQTT 5 section 4.6 wants PUBACKs in the order in which the messages came, and a broker may stop a client that
does otherwise. Handlers finish when they finish (a deferred one much later), so every message takes a ticket,
and tickets are acknowledged from the oldest on, as far as they are done. A ticket of an older connection is
never acknowledged: its packet id means another message now.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Ticket:
    """The acknowledgement owed for one received message."""

    __slots__ = ("connection", "done", "packet_id")

    def __init__(self, packet_id: int, connection: int) -> None:
        self.packet_id = packet_id
        """MQTT packet identifier; 0 for QoS 0, which owes nothing."""
        self.connection = connection
        """Which connection it came by, counted from 1."""
        self.done = False


class AckLedger:
    """Tickets in order of arrival. Thread-safe.

    Args:
        send: sends one PUBACK for a packet id.
    """

    def __init__(self, send: Callable[[int], object]) -> None:
        self._send = send
        self._owed: deque[Ticket] = deque()
        self._lock = threading.Lock()
        self._connection = 0
        self.discarded = 0
        """Acknowledgements not sent because their connection is gone; the broker delivers those again."""

    def new_connection(self) -> None:
        """Forget what is owed to the connection before: called when it broke, and when the next one stands."""
        with self._lock:
            self.discarded += len(self._owed)
            self._owed.clear()
            self._connection += 1

    def take(self, packet_id: int) -> Ticket:
        """The ticket of a message that has just come by the present connection."""
        ticket = Ticket(packet_id, self._connection)
        if packet_id:
            with self._lock:
                self._owed.append(ticket)
        return ticket

    def settle(self, ticket: Ticket) -> None:
        """The message is dealt with: acknowledge it, and all before it that are."""
        ticket.done = True
        if not ticket.packet_id:
            return
        with self._lock:
            if ticket.connection != self._connection:
                return
            owed = self._owed
            while owed and owed[0].done:
                self._send(owed.popleft().packet_id)

    @property
    def owed(self) -> int:
        """Messages received and not yet acknowledged."""
        return len(self._owed)


class Inbox(Generic[T]):
    """A bounded queue that is emptied in runs, so that a busy handler pays for one lock, not for one a message.

    One thread offers and waits, one takes. What was taken still counts until it is ``done``.

    Args:
        limit: how many items may wait. What comes above it is refused, and the caller counts it.
        limit_bytes: how many bytes they may hold together; a single larger item is taken when nothing waits.
    """

    def __init__(self, limit: int, limit_bytes: int = 64 * 1024 * 1024) -> None:
        self.limit = limit
        self.limit_bytes = limit_bytes
        self._items: deque[tuple[T, int]] = deque()
        self._bytes = 0
        self._in_hand = 0
        lock = threading.Lock()
        self._ready = threading.Condition(lock)
        self._room = threading.Condition(lock)
        self._taker_waits = False
        self._offerer_waits = False
        self._closed = False

    def offer(self, item: T, size_bytes: int = 0, *, wait: bool) -> bool:
        """Put ``item`` at the end; False when the queue is closed, or full and the caller would not ``wait``.

        Waiting holds the network thread back, and through TCP the broker: that is the last line of flow control,
        for a broker that sends more than the receive maximum it was granted.
        """
        with self._ready:
            while wait and not self._closed and self._full(size_bytes):
                self._offerer_waits = True
                self._room.wait(0.05)  # done() takes no lock, so it may miss that we wait
                self._offerer_waits = False
            if self._closed or self._full(size_bytes):
                return False
            self._items.append((item, size_bytes))
            self._bytes += size_bytes
            if self._taker_waits:
                self._ready.notify()
            return True

    def _full(self, size_bytes: int) -> bool:
        return len(self) >= self.limit or (bool(self._items) and self._bytes + size_bytes > self.limit_bytes)

    def take(self, at_most: int, timeout_s: float) -> list[T]:
        """Up to ``at_most`` items, oldest first; empty when none came in time or the queue is closed."""
        with self._ready:
            if not self._items and not self._closed:
                self._taker_waits = True
                self._ready.wait(timeout_s)
                self._taker_waits = False
            items = self._items
            taken = []
            for _ in range(min(at_most, len(items))):
                item, size_bytes = items.popleft()
                self._bytes -= size_bytes
                taken.append(item)
            self._in_hand += len(taken)
            return taken

    def done(self, count: int) -> None:
        """``count`` of those taken are handled; called by the taking thread alone."""
        self._in_hand -= count
        if self._offerer_waits:
            with self._room:
                self._room.notify()

    def close(self) -> None:
        """Refuse further items and wake both sides; what waits can still be taken."""
        with self._ready:
            self._closed = True
            self._ready.notify_all()
            self._room.notify_all()

    @property
    def holds_back(self) -> bool:
        """Whether the offering thread waits for room."""
        return self._offerer_waits

    @property
    def closed(self) -> bool:
        """Closed and empty: nothing will come any more."""
        return self._closed and not self._items

    def __len__(self) -> int:
        """Items that wait or are in the handler's hands."""
        return len(self._items) + self._in_hand
