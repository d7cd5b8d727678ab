"""Answers of model runners: a run is asked for over the bus, its tokens and its end come into a mailbox.

What waits (a subscription, room in the window) is done by a few threads; the tokens themselves need none.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from edge.bus import Bus
from protocol.codec import Received
from protocol.errors import Cancelled, MindstreamError
from protocol.ids import uuid7
from protocol.messages import ModelCancel, ModelGenerate, RunDone, RunToken
from services.gateway.mailbox import Mailbox

log = logging.getLogger(__name__)

SUBSCRIBE_TIMEOUT_S = 5.0
CANCEL_TTL_MS = 5_000
CANCEL_TRIES = 20
CANCEL_AGAIN_S = 0.25
"""A run whose ask is still on its way cannot be cancelled yet."""


class Run:
    """One answer under way.

    Args:
        choice: which of the request's answers it is.
        node: whose model runner gives it.
    """

    def __init__(self, choice: int, node: str, mailbox: Mailbox) -> None:
        self.id = uuid7()
        self.choice = choice
        self.node = node
        self.ended = threading.Event()
        """It has an answer, or an error."""
        self.released = threading.Event()
        """Nobody listens to it any more."""
        self.stop_hearing: list[Callable[[], None]] = []
        """Ends its subscription; taken out by who does it."""
        self._mailbox = mailbox

    def hear(self, message: Received) -> None:
        """One of its tokens."""
        self._mailbox.put((self, message.data))

    def finish(self, answer: Future[RunDone]) -> None:
        """Its end, as it was answered."""
        self.ended.set()
        error = answer.exception()
        self._mailbox.put((self, error if error is not None else answer.result()))


class Runs:
    """All runs that are under way for this gateway's clients.

    Args:
        bus: a connection of its own, whose subscriptions come and go.
    """

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._askers = ThreadPoolExecutor(16, "gateway asks")
        # Of their own: a node that has gone answers no cancellation, and nobody else shall wait for that.
        self._cancellers = ThreadPoolExecutor(8, "gateway cancels")
        self._lock = threading.Lock()
        self._active: set[Run] = set()

    @property
    def active(self) -> int:
        """Runs that have not ended."""
        return len(self._active)

    def start(self, run: Run, ask: ModelGenerate, *, tokens: bool, ttl_ms: int) -> None:
        """Ask for it; what comes of it, its refusal included, comes into the run's mailbox.

        ``tokens``: they are wanted as they come, and not only the end.
        """
        with self._lock:
            self._active.add(run)
        self._askers.submit(self._start, run, ask, tokens, ttl_ms)

    def _start(self, run: Run, ask: ModelGenerate, tokens: bool, ttl_ms: int) -> None:
        answer: Future[RunDone] = Future()
        try:
            if tokens and not run.released.is_set():
                run.stop_hearing.append(self._bus.hear_at_once(RunToken, run.hear, node=run.node, run=run.id))
                self._bus.wait_subscribed(SUBSCRIBE_TIMEOUT_S)
            if run.released.is_set():
                raise Cancelled(f"asking {run.node}: nobody waits for the answer any more", reason="given up")
            answer = self._bus.ask_later(run.node, ask, ttl_ms=ttl_ms)
        except Exception as error:  # noqa: BLE001 - whatever it was, who waits is told
            answer.set_exception(error)
            _stop_hearing(run)
        answer.add_done_callback(lambda done: self._ended(run, done))

    def _ended(self, run: Run, answer: Future[RunDone]) -> None:
        with self._lock:
            self._active.discard(run)
        run.finish(answer)

    def release(self, run: Run) -> None:
        """Nobody listens to it any more: it is cancelled if it has not ended, at once and without waiting here."""
        run.released.set()
        try:
            self._cancellers.submit(self._release, run)
        except RuntimeError:
            pass  # they have been shut down: close() has cancelled what there was

    def _release(self, run: Run) -> None:
        try:
            _stop_hearing(run)
            for _ in range(CANCEL_TRIES):
                if run.ended.is_set():
                    return
                if self._bus.ask(run.node, ModelCancel(run.id), ttl_ms=CANCEL_TTL_MS).found:
                    return
                run.ended.wait(CANCEL_AGAIN_S)
        except MindstreamError as error:
            log.warning("run %s on %s could not be cancelled: %s", run.id, run.node, error)

    def close(self, timeout_s: float = 3.0) -> None:
        """Cancel all, and wait a little until that is done."""
        with self._lock:
            active = list(self._active)
        for run in active:
            self.release(run)
        deadline_s = time.monotonic() + timeout_s
        for run in active:
            run.ended.wait(max(0.0, deadline_s - time.monotonic()))
        self._askers.shutdown(wait=False, cancel_futures=True)
        self._cancellers.shutdown(wait=False, cancel_futures=True)


def _stop_hearing(run: Run) -> None:
    while run.stop_hearing:
        run.stop_hearing.pop()()
