"""Rounds: the scheduler's decisions carried out on one engine, for many conversations.

All of it runs on the worker's thread. Between two rounds the state of every conversation is whole. A failure is its
run's own: the others go on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from protocol.errors import MindstreamError, to_wire
from protocol.messages import RunDone, RunToken, Usage
from services.model_runner.answers import Answer, Run, given_before
from services.model_runner.chat import ChatFormat
from services.model_runner.conversations import Conversations
from services.model_runner.engine import Engine, chunk_ends
from services.model_runner.generation import accept, context_full
from services.model_runner.scheduler import Scheduler, Work
from services.model_runner.turns import prepare

log = logging.getLogger(__name__)


@dataclass
class Loaded:
    """A model that is ready."""

    engine: Engine
    chat: ChatFormat
    conversations: Conversations
    max_context_tokens: int
    device_reason: str
    """Why the engine runs where it does."""
    max_batch: int = 0
    """Answers that are decoded together; 0: as many as the engine takes, 1: each alone, bit for bit the same."""


@dataclass
class Totals:
    """What has been done since the start."""

    steps: int = 0
    tokens: int = 0
    chunks: int = 0
    shared_tokens: int = 0

    @property
    def batch_mean(self) -> float:
        """Conversations decoded together, on average over steps."""
        return self.tokens / self.steps if self.steps else 0.0


class Rounds:
    """The runs of one model.

    Args:
        loaded: the model.
        scheduler: decides; shared with the worker, under ``lock``.
        runs: what each work of the scheduler is.
        say_token: called with a run's id and each of its tokens.
    """

    def __init__(
        self,
        loaded: Loaded,
        scheduler: Scheduler,
        runs: dict[Work, Run],
        lock: threading.Condition,
        say_token: Callable[[str, RunToken], None],
    ) -> None:
        self._loaded = loaded
        self._engine = loaded.engine
        self._scheduler = scheduler
        self._runs = runs
        self._lock = lock
        self._say_token = say_token
        self._answers: dict[Work, Answer] = {}
        self.totals = Totals()
        self.last_usage: Usage | None = None
        scheduler.max_batch = min(loaded.max_batch or loaded.engine.max_batch, loaded.engine.max_batch)

    @property
    def answering(self) -> list[str]:
        """Conversations whose run has begun."""
        return [work.conversation for work in tuple(self._answers)]

    # --- beginning ------------------------------------------------------------------------------------------

    def begin_waiting(self) -> None:
        """Begin every run for which there is room."""
        with self._lock:
            if not self._scheduler.changed:
                return
            self._scheduler.changed = False
        while True:
            with self._lock:
                work = self._scheduler.next_to_begin(lambda _: True)
                if work is None:
                    return
                self._scheduler.move(work, "away")
                run = self._runs[work]
            try:
                done = self._begin(work, run)
            except Exception as error:  # noqa: BLE001 - it is this run's outcome, and its asker is told
                self._fail(work, run, error)
                continue
            if done is not None:
                self._end(work, run, done)

    def _begin(self, work: Work, run: Run) -> RunDone | None:
        if run.cancelled.is_set():
            return run.not_begun()
        loaded, conversations = self._loaded, self._loaded.conversations
        found = conversations.find(work.conversation)
        if found is not None and found.last_command == run.command:
            return given_before(loaded.chat, run, found)
        turn = prepare(loaded.engine, loaded.chat, run.ask, found, loaded.max_context_tokens)
        conversations.in_use.add(work.conversation)
        conversation = turn.apply(loaded.engine, loaded.max_context_tokens)
        conversations.hold(conversation)
        answer = Answer(run, work, conversation, loaded.chat)
        answer.dropped_tokens = turn.dropped_tokens
        self._answers[work] = answer
        self._go_on(answer)
        return None

    def _go_on(self, answer: Answer) -> None:
        """To reading its prompt, or to decoding when that is read."""
        state = answer.state
        answer.work.left_tokens = len(state.tokens) - 1 - state.cache.length
        with self._lock:
            self._scheduler.move(answer.work, "reading" if answer.work.left_tokens else "decoding")

    # --- a round --------------------------------------------------------------------------------------------

    def round(self) -> None:
        """A chunk of one prompt, and a step of the running answers."""
        for answer in [answer for answer in self._answers.values() if answer.run.cancelled.is_set()]:
            answer.state.finish_reason = "cancelled"
            self._finish(answer)
        with self._lock:
            read, step = self._scheduler.next_round()
        if read is not None:
            answer = self._answers[read]
            try:
                self._read(answer)
            except Exception as error:  # noqa: BLE001 - it is this run's outcome, and its asker is told
                self._fail(read, answer.run, error)
        if step:
            # The chunk may have taken its time: who was cancelled meanwhile gets one token more.
            self._step([self._answers[work] for work in step])

    def _read(self, answer: Answer) -> None:
        state = answer.state
        started = time.perf_counter()
        start = state.cache.length
        end = chunk_ends(start, len(state.tokens) - 1, self._engine.chunk_tokens)[0]
        self._engine.prefill(state.cache, state.tokens[start:end])
        seconds = time.perf_counter() - started
        state.timing.prefilled_tokens += end - start
        state.timing.prefill_s += seconds
        self.totals.chunks += 1
        with self._lock:
            self._scheduler.charge([answer.work], seconds)
        if state.prefilled:
            self._go_on(answer)
        else:
            answer.work.left_tokens = len(state.tokens) - 1 - end

    def _step(self, answers: list[Answer]) -> None:
        ready = []
        for answer in answers:
            if context_full(self._engine, answer.state):
                answer.state.finish_reason = "length"
                self._finish(answer)
            else:
                ready.append(answer)
        if not ready:
            return
        started = time.perf_counter()
        try:
            if len(ready) == 1:  # the step that is promised to be the same, bit for bit
                rows = [self._engine.step(ready[0].state.cache, ready[0].state.tokens[-1])]
            else:
                rows = self._engine.step_batch([(each.state.cache, each.state.tokens[-1]) for each in ready])
        except Exception as error:  # noqa: BLE001 - it is these runs' outcome, and their askers are told
            for answer in ready:
                self._fail(answer.work, answer.run, error)
            return
        seconds = time.perf_counter() - started
        self.totals.steps += 1
        self.totals.tokens += len(ready)
        with self._lock:
            self._scheduler.charge([answer.work for answer in ready], seconds)
        for answer, row in zip(ready, rows, strict=True):
            try:
                generated = accept(self._engine, answer.state, row)
                self._say_token(answer.run.identifier, answer.took(generated, len(ready), seconds))
            except Exception as error:  # noqa: BLE001 - it is this run's outcome, and its asker is told
                self._fail(answer.work, answer.run, error)
                continue
            if answer.state.finish_reason:
                self._finish(answer)

    # --- ending ---------------------------------------------------------------------------------------------

    def _finish(self, answer: Answer) -> None:
        """The answer has a finish reason: keep it, then say so."""
        conversation = answer.conversation
        try:
            done = answer.end()
            if conversation.keep:
                self._loaded.conversations.save(conversation)
        except Exception as error:  # noqa: BLE001 - it is this run's outcome, and its asker is told
            self._fail(answer.work, answer.run, error)
            return
        self.last_usage = done.usage
        if not conversation.keep and done.finish_reason == "cancelled":
            self._loaded.conversations.forget(conversation.name)
        self._end(answer.work, answer.run, done)

    def _fail(self, work: Work, run: Run, error: Exception) -> None:
        """Half an answer is in memory: back to what was kept, so that the same turn can be asked again."""
        if not isinstance(error, MindstreamError):
            log.error("run %s failed", run.identifier, exc_info=error)
        if work in self._answers:
            self._loaded.conversations.forget(work.conversation)
        self._end(work, run, RunDone(run.identifier, work.conversation, "", [], "error", error=to_wire(error)))

    def _end(self, work: Work, run: Run, done: RunDone) -> None:
        self._answers.pop(work, None)
        self._loaded.conversations.in_use.discard(work.conversation)
        with self._lock:
            self._scheduler.remove(work)
            del self._runs[work]
        run.done.set_result(done)
