"""Reading again: a conversation's tokens through the model, chunk by chunk, between the tokens of whoever else is
answered. It can be stopped when something quicker has come."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

from protocol.errors import Cancelled
from services.model_runner import snapshot
from services.model_runner.engine import chunk_ends
from services.model_runner.prefixes import chunk_keys
from services.model_runner.rounds import Loaded
from services.model_runner.worker import Worker


class Reading:
    """One state whose tokens are being read again, from now on.

    Args:
        found: of ``snapshot.read_tokens``.
        threads: one of them waits for each chunk.
    """

    def __init__(self, worker: Worker, found: snapshot.Read, threads: ThreadPoolExecutor) -> None:
        self._worker = worker
        self._found = found
        self._stopped = threading.Event()
        self._keys: list[bytes] = []
        self.began_s = time.monotonic()
        self.took_s = 0.0
        """Until it was done."""
        self.tokens = 0
        """That are in the cache so far."""
        self.whole_chunks: list[bytes] = []
        """As ``Conversation.whole_chunks``: what was read, or taken from another conversation here, in whole chunks."""
        self.outcome: Future[snapshot.Unpacked] = threads.submit(self._run)
        """The state; its cache is its taker's. Else ModelError, ModelUnavailable or Cancelled."""

    def let_go(self) -> None:
        """Its result is not wanted: it ends after the present chunk."""
        self._stopped.set()
        self.outcome.add_done_callback(_close)

    def _run(self) -> snapshot.Unpacked:
        resumed = self._worker.between_tokens(self._begin).result()
        try:
            while not self._stopped.is_set():
                if self._worker.between_tokens(lambda loaded: self._chunk(loaded, resumed)).result():
                    self.took_s = time.monotonic() - self.began_s
                    return resumed
        except BaseException:
            resumed.state.cache.close()
            raise
        resumed.state.cache.close()
        raise Cancelled("reading tokens again: something else was quicker", reason="not wanted")

    def _begin(self, loaded: Loaded) -> snapshot.Unpacked:
        resumed = snapshot.restore(loaded.engine, self._found)
        state, rounds = resumed.state, self._worker.rounds
        keys = chunk_keys(state.tokens[:-1], loaded.engine.chunk_tokens)
        forked = rounds.room.prefixes.fork(keys, 0, state.cache.capacity_tokens) if rounds is not None else None
        if forked is not None:
            state.cache.close()
            state.cache, chunks = forked
            self.whole_chunks = keys[:chunks]
        self._keys = keys
        self.tokens = state.cache.length
        return resumed

    def _chunk(self, loaded: Loaded, resumed: snapshot.Unpacked) -> bool:
        """One chunk; whether that was the last."""
        state, engine = resumed.state, loaded.engine
        start, stop = state.cache.length, len(state.tokens) - 1
        if start < stop:
            end = chunk_ends(start, stop, engine.chunk_tokens)[0]
            started_s = time.perf_counter()
            engine.prefill(state.cache, state.tokens[start:end])
            loaded.on_chunk(start, end, time.perf_counter() - started_s)
            if end % engine.chunk_tokens == 0 and start == len(self.whole_chunks) * engine.chunk_tokens:
                self.whole_chunks.append(self._keys[len(self.whole_chunks)])
            self.tokens = state.cache.length
        return state.prefilled


def _close(reading: Future[snapshot.Unpacked]) -> None:
    if not reading.cancelled() and reading.exception() is None:
        reading.result().state.cache.close()
