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
from protocol.errors import AskExpired, ErrorInfo, MindstreamError, from_wire

RESEND_FIRST_S = 2.0
"""After this long without an answer an ask is sent again; then after twice as long, and so on."""


@dataclass
class _Ask:
    what: str
    deadline_s: float
    send: Callable[[int], None]
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

    def open(self, identifier: str, what: str, ttl_ms: int, send: Callable[[int], None]) -> Future[Any]:
        """Note an ask; its future resolves with the answer, its error, or AskExpired.

        Args:
            identifier: the ask's id, which the answer carries as its correlation.
            what: what is asked of whom, for messages.
            ttl_ms: time to live from now.
            send: sends it again with the given time to live in ms.
        """
        now_s = time.monotonic()
        ask = _Ask(what, now_s + ttl_ms / 1000, send, now_s + RESEND_FIRST_S)
        with self._changed:
            self._asks[identifier] = ask
            self._schedule(identifier, ask)
            if self._timer is None:
                self._timer = threading.Thread(target=self._run, name="ask timer", daemon=True)
                self._timer.start()
        return ask.future

    def resolve(self, answer: Received) -> bool:
        """Give an answer to the one who asked; False when nobody waits for it any more."""
        with self._changed:
            ask = self._asks.pop(answer.correlation, None)
        if ask is None:
            return False
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
            try:
                ask.send(max(1, int((ask.deadline_s - now_s) * 1000)))
            except MindstreamError:
                pass  # no room now: the next resend or the deadline decides


def _settle(future: Future[Any], *, result: Any = None, error: Exception | None = None) -> None:
    """Resolve a future that its owner may have cancelled meanwhile."""
    try:
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)
    except InvalidStateError:
        pass
