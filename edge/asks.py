"""Asks under way: each has an id, a deadline, and a future that is always resolved.

An ask is sent again, with the same id and what is left of its time to live, when the connection comes back and
now and then in between: the broker may have died with it. The other side carries an id out once.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

from protocol.codec import Received
from protocol.errors import AskExpired, ErrorInfo, MindstreamError, NotConnected, Overloaded, from_wire

RESEND_FIRST_S = 2.0
"""After this long without an answer an ask is sent again; then after twice as long, and so on."""
NO_ROOM_S = 0.05
"""After this long an ask that could not be sent again for want of room is tried once more."""
MAX_OPEN = 20_000
"""Asks under way at one time; the next is refused."""


@dataclass
class _Ask:
    what: str
    node: str
    """Who may answer."""
    reply_type: str
    deadline_s: float
    send: Callable[[], bool]
    resend_at_s: float
    resend_after_s: float = RESEND_FIRST_S
    future: Future[Any] = field(default_factory=Future)


class PendingAsks:
    """All asks of one bus connection. Thread-safe; one timer thread, started with the first ask."""

    def __init__(self) -> None:
        self._asks: dict[str, _Ask] = {}
        self._due: list[tuple[float, int, str]] = []
        self._order = itertools.count()
        self._changed = threading.Condition()
        self._timer: threading.Thread | None = None
        self._closed = False

    def open(
        self, identifier: str, what: str, *, node: str, reply_type: str, deadline_s: float, send: Callable[[], bool]
    ) -> Future[Any]:
        """Note an ask; its future resolves with the answer, its error, or AskExpired.

        One that is under way already under this id is not asked twice: its future is returned.

        Args:
            identifier: the ask's id, which the answer carries as its correlation.
            what: what is asked of whom, for messages.
            node: who is asked: an answer from another branch is none.
            reply_type: message type of the answer; ``error`` is one always.
            deadline_s: ``time.monotonic()`` at the end of its time to live.
            send: sends it again without waiting; False when there was no room.

        Raises NotConnected after ``fail_all``, and Overloaded when too many are under way.
        """
        ask = _Ask(what, node, reply_type, deadline_s, send, time.monotonic() + RESEND_FIRST_S)
        with self._changed:
            if self._closed:
                raise NotConnected(f"{what}: this connection has been stopped", reason="stopped")
            if known := self._asks.get(identifier):
                return known.future
            if len(self._asks) >= MAX_OPEN:
                raise Overloaded(
                    f"{what}: {MAX_OPEN:,} asks are under way already", hint="wait for answers", reason="too many asks"
                )
            self._asks[identifier] = ask
            self._schedule(identifier, ask)
            if self._timer is None:
                self._timer = threading.Thread(target=self._run, name="ask timer", daemon=True)
                self._timer.start()
        return ask.future

    def resolve(self, answer: Received) -> bool:
        """Give an answer to the one who asked; False when nobody waits for it any more, or not from this node."""
        with self._changed:
            ask = self._asks.get(answer.correlation)
            if ask is None or answer.node != ask.node or answer.type not in (ask.reply_type, "error"):
                return False
            del self._asks[answer.correlation]
        if isinstance(answer.data, ErrorInfo):
            _settle(ask.future, error=from_wire(answer.data, remote=answer.source))
        else:
            _settle(ask.future, result=answer.data)
        return True

    def fail(self, identifier: str, error: MindstreamError) -> None:
        """End one ask with ``error``."""
        with self._changed:
            ask = self._asks.pop(identifier, None)
        if ask is not None:
            _settle(ask.future, error=error)

    def fail_all(self, error: MindstreamError) -> None:
        """End every ask with ``error`` and stop the timer."""
        with self._changed:
            asks, self._asks = list(self._asks.values()), {}
            self._closed = True
            self._changed.notify()
        for ask in asks:
            _settle(ask.future, error=error)

    def resend(self) -> None:
        """Send every open ask again soon: the connection is new, and the broker may be too."""
        now_s = time.monotonic()
        with self._changed:
            for identifier, ask in self._asks.items():
                ask.resend_at_s = now_s
                self._schedule(identifier, ask)

    def _schedule(self, identifier: str, ask: _Ask) -> None:
        heapq.heappush(self._due, (min(ask.deadline_s, ask.resend_at_s), next(self._order), identifier))
        if self._due[0][2] == identifier:
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    return
                now_s = time.monotonic()
                # Those that are answered: the thread would wake for each.
                while self._due and self._due[0][2] not in self._asks:
                    heapq.heappop(self._due)
                if not self._due or self._due[0][0] > now_s:
                    self._changed.wait(self._due[0][0] - now_s if self._due else None)
                    continue
                identifier = heapq.heappop(self._due)[2]
                ask = self._asks.get(identifier)
                if ask is None or min(ask.deadline_s, ask.resend_at_s) > now_s:
                    continue
                expired = ask.deadline_s <= now_s
                if expired:
                    del self._asks[identifier]
                else:
                    # Before it is sent: a new connection may meanwhile want it sent at once.
                    ask.resend_at_s = now_s + ask.resend_after_s
                    ask.resend_after_s *= 2
                    self._schedule(identifier, ask)
            if expired:
                _settle(
                    ask.future,
                    error=AskExpired(
                        f"{ask.what}: no answer in the time to live",
                        hint="is that service running there? `mindstream status` shows it",
                        reason="expired",
                    ),
                )
                continue
            if not ask.send():
                with self._changed:
                    ask.resend_at_s = min(ask.resend_at_s, now_s + NO_ROOM_S)
                    self._schedule(identifier, ask)


def _settle(future: Future[Any], *, result: Any = None, error: Exception | None = None) -> None:
    """Resolve a future that its owner may have cancelled meanwhile."""
    try:
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)
    except InvalidStateError:
        pass
