"""The worker: one thread that owns the engine and all conversations, and does one thing at a time.

Runs are answered in the order in which they came. Between two tokens of a run the state is whole, so jobs that
must not wait for its end (saving, resuming) are done there. This module knows nothing of the bus: it is given
functions to call.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from protocol.errors import Cancelled, MindstreamError, to_wire
from protocol.messages import ChatMessage, ModelGenerate, RunDone, RunToken, Usage
from services.model_runner.chat import ChatFormat
from services.model_runner.conversations import Conversation, Conversations
from services.model_runner.engine import Engine
from services.model_runner.generation import GenerationSettings, begin, extend, generate
from services.model_runner.sampling import SamplingSettings

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class Loaded:
    """A model that is ready."""

    engine: Engine
    chat: ChatFormat
    conversations: Conversations
    max_context_tokens: int


@dataclass
class Run:
    """One answer to be given."""

    identifier: str
    ask: ModelGenerate
    done: Future[RunDone]
    cancelled: threading.Event = field(default_factory=threading.Event)


class Worker:
    """Loads the model, then answers runs.

    Args:
        load: loads the model; may raise ModelUnavailable, and is then tried again with backoff.
        say_token: called with a run's id and each of its tokens.
    """

    RETRY_FIRST_S, RETRY_MAX_S = 5.0, 300.0

    def __init__(self, load: Callable[[], Loaded], say_token: Callable[[str, RunToken], None]) -> None:
        self._load = load
        self._say_token = say_token
        self._wake = threading.Condition()
        self._runs: deque[Run] = deque()
        self._jobs: deque[tuple[Callable[[Loaded], Any], Future[Any]]] = deque()
        self._current: Run | None = None
        self._stopping = False
        self.loaded: Loaded | None = None
        self.unavailable: MindstreamError | None = None
        """Why there is no model; None while it is being loaded, and once it is."""
        self.last_usage: Usage | None = None
        self._thread = threading.Thread(target=self._main, name="model worker", daemon=True)

    def start(self) -> None:
        """Begin to load the model."""
        self._thread.start()

    def stop(self) -> None:
        """Stop after the current token; what was not begun is left to the journal."""
        with self._wake:
            self._stopping = True
            if self._current is not None:
                self._current.cancelled.set()
            self._wake.notify_all()
        self._thread.join(10.0)

    @property
    def queued(self) -> int:
        """Runs waiting, the one under way not counted."""
        return len(self._runs)

    @property
    def running(self) -> str:
        """The conversation that is being answered now, or nothing."""
        current = self._current
        return current.ask.conversation if current else ""

    def submit(self, run: Run) -> None:
        """Queue a run; its future resolves with its end. Raises ModelUnavailable when there is no model."""
        with self._wake:
            if self.unavailable is not None:
                raise self.unavailable
            self._runs.append(run)
            self._wake.notify_all()

    def cancel(self, identifier: str) -> bool:
        """Stop a run, begun or not; whether there was one."""
        with self._wake:
            for run in [*self._runs, self._current]:
                if run is not None and run.identifier == identifier:
                    run.cancelled.set()
                    return True
        return False

    def between_tokens(self, job: Callable[[Loaded], T]) -> Future[T]:
        """Do ``job`` on the worker thread as soon as the state is whole. Raises ModelUnavailable."""
        done: Future[T] = Future()
        with self._wake:
            if self.unavailable is not None:
                raise self.unavailable
            self._jobs.append((job, done))
            self._wake.notify_all()
        return done

    def _ending(self) -> bool:
        return self._stopping

    # --- on the worker thread -------------------------------------------------------------------------------

    def _main(self) -> None:
        loaded = self._load_with_backoff()
        while loaded is not None and not self._stopping:
            with self._wake:
                while not (self._runs or self._jobs or self._stopping):
                    self._wake.wait()
                run = self._runs.popleft() if self._runs and not self._jobs else None
                self._current = run
            if run is None:
                self._do_jobs(loaded)
                continue
            done = self._answer(loaded, run)
            with self._wake:
                self._current = None
            # A run cut short by the end of the process stays in the journal: it is begun again.
            if done.finish_reason != "cancelled" or not self._ending():
                run.done.set_result(done)

    def _load_with_backoff(self) -> Loaded | None:
        wait_s = self.RETRY_FIRST_S
        while not self._stopping:
            try:
                self.loaded = self._load()
                self.unavailable = None
                return self.loaded
            except MindstreamError as error:
                log.error("%s", error)
                with self._wake:
                    self.unavailable = error
                    waiting = [run.done for run in self._runs] + [done for _, done in self._jobs]
                    self._runs.clear()
                    self._jobs.clear()
                for future in waiting:
                    future.set_exception(error)
                with self._wake:
                    self._wake.wait_for(lambda: self._stopping, wait_s)
                wait_s = min(self.RETRY_MAX_S, wait_s * 2)
        return None

    def _do_jobs(self, loaded: Loaded) -> None:
        while True:
            with self._wake:
                if not self._jobs:
                    return
                job, done = self._jobs.popleft()
            try:
                done.set_result(job(loaded))
            except Exception as error:  # noqa: BLE001 - it is the job's outcome, and the asker is told
                done.set_exception(error)

    def _answer(self, loaded: Loaded, run: Run) -> RunDone:
        try:
            return self._generate(loaded, run)
        except Exception as error:
            if not isinstance(error, MindstreamError):
                log.exception("run %s failed", run.identifier)
            return RunDone(run.identifier, run.ask.conversation, "", [], "error", error=to_wire(error))

    def _generate(self, loaded: Loaded, run: Run) -> RunDone:
        if run.cancelled.is_set():
            raise Cancelled(f"answering in {run.ask.conversation}: it was cancelled before it began")
        conversation = self._prepare(loaded, run.ask)
        state = conversation.state
        stream = loaded.chat.stream(run.ask.stop)
        for said in state.tokens[conversation.turn_start :]:
            stream.push(said)
        before = len(stream.text)
        prompt_tokens = len(state.tokens)
        for token in generate(loaded.engine, state, should_stop=run.cancelled.is_set):
            text = stream.push(token.token)
            if state.finish_reason:
                text += stream.finish()
            self._say_token(run.identifier, RunToken(token.index, token.token, text, token.logprob, token.entropy))
            if stream.stopped:
                state.finish_reason = "stop"
                break
            if self._jobs:
                self._do_jobs(loaded)
        if conversation.messages and conversation.messages[-1].role == "assistant":
            conversation.messages[-1].content = stream.text
        else:
            conversation.messages.append(ChatMessage(role="assistant", content=stream.text))
        loaded.conversations.save(conversation)
        timing = state.timing
        self.last_usage = Usage(
            prompt_tokens=prompt_tokens,
            cached_tokens=timing.reused_tokens,
            completion_tokens=state.new_tokens,
            ttft_ms=timing.first_token_s * 1000,
            tokens_per_s=timing.tokens_per_s,
        )
        return RunDone(
            run.identifier,
            conversation.name,
            stream.text[before:],
            state.answer,
            state.finish_reason,
            usage=self.last_usage,
        )

    def _prepare(self, loaded: Loaded, ask: ModelGenerate) -> Conversation:
        """The conversation with this turn's tokens appended, ready to be answered."""
        settings = GenerationSettings(ask.max_new_tokens, tuple(ask.stop), ask.ignore_eos)
        if not ask.messages:
            conversation = loaded.conversations.get(ask.conversation)
            extend(loaded.engine, conversation.state, [], settings=settings)
            return conversation
        sampling = SamplingSettings(temperature=ask.temperature, top_k=ask.top_k, top_p=ask.top_p, seed=ask.seed)
        found = loaded.conversations.find(ask.conversation)
        messages = [*(found.messages if found else []), *ask.messages]
        rendered = [{"role": message.role, "content": message.content} for message in messages]
        if found is not None:
            turn = loaded.chat.next_turn(found.state.tokens, rendered)
            if turn.extends:
                extend(loaded.engine, found.state, turn.tokens, sampling=sampling, settings=settings)
                found.messages, found.turn_start = messages, len(found.state.tokens)
                return found
        tokens = loaded.chat.prompt(rendered)
        state = begin(
            loaded.engine, tokens, sampling=sampling, settings=settings, capacity_tokens=loaded.max_context_tokens
        )
        return loaded.conversations.hold(Conversation(ask.conversation, state, messages, len(tokens)))
