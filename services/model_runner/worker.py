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

from protocol.errors import Cancelled, MindstreamError, ModelUnavailable, to_wire
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
    device_reason: str
    """Why the engine runs where it does."""


@dataclass
class Run:
    """One answer to be given."""

    identifier: str
    command: str
    """``node/id`` of the ask: the same when it is carried out again after a crash."""
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
            waiting = [done for _, done in self._jobs]
            self._jobs.clear()
            self._wake.notify_all()
        for done in waiting:
            done.set_exception(_stopped())
        if self._thread.is_alive():
            self._thread.join(10.0)

    @property
    def died(self) -> bool:
        """Whether its thread was started and has ended without being asked to."""
        return self._thread.ident is not None and not self._thread.is_alive() and not self._stopping

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
            self._check_available()
            self._runs.append(run)
            self._wake.notify_all()

    def cancel(self, identifier: str) -> bool:
        """Stop a run, begun or not; whether there was one."""
        with self._wake:
            current = self._current
            if current is not None and current.identifier == identifier:
                current.cancelled.set()
                return True
            queued = next((run for run in self._runs if run.identifier == identifier), None)
            if queued is None:
                return False
            self._runs.remove(queued)
        queued.done.set_result(_not_begun(queued))
        return True

    def between_tokens(self, job: Callable[[Loaded], T]) -> Future[T]:
        """Do ``job`` on the worker thread as soon as the state is whole. Raises ModelUnavailable, or Cancelled at
        the end of the service; the future too."""
        done: Future[T] = Future()
        with self._wake:
            self._check_available()
            if self._stopping:
                raise _stopped()
            self._jobs.append((job, done))
            self._wake.notify_all()
        return done

    def _check_available(self) -> None:
        if self.unavailable is not None:
            # Without its traceback, which would grow with each asker that it is raised for.
            raise self.unavailable.with_traceback(None)

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
            if done is not None:
                run.done.set_result(done)

    def _load_with_backoff(self) -> Loaded | None:
        wait_s = self.RETRY_FIRST_S
        while not self._stopping:
            try:
                self.loaded = self._load()
                self.unavailable = None
                return self.loaded
            except Exception as raised:
                error = raised if isinstance(raised, MindstreamError) else _broken_model(raised)
                if error is raised:
                    log.error("%s", error)
                else:
                    log.exception("%s", error)
                with self._wake:
                    self.unavailable = error
                    waiting = [run.done for run in self._runs] + [done for _, done in self._jobs]
                    self._runs.clear()
                    self._jobs.clear()
                for future in waiting:
                    future.set_exception(error.with_traceback(None))
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

    def _answer(self, loaded: Loaded, run: Run) -> RunDone | None:
        try:
            return self._generate(loaded, run)
        except Exception as error:
            if not isinstance(error, MindstreamError):
                log.exception("run %s failed", run.identifier)
            return RunDone(run.identifier, run.ask.conversation, "", [], "error", error=to_wire(error))

    def _generate(self, loaded: Loaded, run: Run) -> RunDone | None:
        """Answer one run; None when the end of the process cut it short: nothing of it is kept then."""
        if run.cancelled.is_set():
            return _not_begun(run)
        conversations, name = loaded.conversations, run.ask.conversation
        found = conversations.find(name)
        if found is not None and found.last_command == run.command:
            return self._answer_again(loaded, run, found)
        conversation = self._prepare(loaded, run.ask, found)
        conversations.in_use = name
        try:
            done = self._say_answer(loaded, run, conversation)
            if done is not None:
                conversations.save(conversation)
            return done
        except Exception:
            # Half an answer is in memory: go back to what was kept, so that the same turn can be asked again.
            conversations.forget(name)
            raise
        finally:
            conversations.in_use = ""

    def _say_answer(self, loaded: Loaded, run: Run, conversation: Conversation) -> RunDone | None:
        state = conversation.state
        stream = loaded.chat.stream(run.ask.stop)
        for said in state.tokens[conversation.turn_start :]:
            stream.push(said)
        before = len(stream.text)
        prompt_tokens = len(state.tokens)
        for token in generate(loaded.engine, state, should_stop=lambda: self._stopping or run.cancelled.is_set()):
            text = stream.push(token.token)
            if state.finish_reason:
                text += stream.finish()
            self._say_token(run.identifier, RunToken(token.index, token.token, text, token.logprob, token.entropy))
            if stream.stopped:
                state.finish_reason = "stop"
                break
            if self._jobs:
                self._do_jobs(loaded)
        if state.finish_reason == "cancelled" and not run.cancelled.is_set():
            return None
        if conversation.messages and conversation.messages[-1].role == "assistant":
            conversation.messages[-1].content = stream.text
        else:
            conversation.messages.append(ChatMessage(role="assistant", content=stream.text))
        conversation.last_command = run.command
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

    def _answer_again(self, loaded: Loaded, run: Run, conversation: Conversation) -> RunDone:
        """The answer that was given and kept just before a crash, which the asker may not have heard of."""
        state = conversation.state
        stream = loaded.chat.stream(run.ask.stop)
        begin_at = len(state.tokens) - state.new_tokens
        for said in state.tokens[conversation.turn_start : begin_at]:
            stream.push(said)
        before = len(stream.text)
        for said in state.answer:
            stream.push(said)
        if state.finish_reason != "cancelled":
            stream.finish()
        return RunDone(run.identifier, conversation.name, stream.text[before:], state.answer, state.finish_reason)

    def _prepare(self, loaded: Loaded, ask: ModelGenerate, found: Conversation | None) -> Conversation:
        """The conversation with this turn's tokens appended, ready to be answered."""
        settings = GenerationSettings(ask.max_new_tokens, tuple(ask.stop), ask.ignore_eos)
        if not ask.messages:
            conversation = loaded.conversations.get(ask.conversation)
            extend(loaded.engine, conversation.state, [], settings=settings)
            return conversation
        sampling = SamplingSettings(temperature=ask.temperature, top_k=ask.top_k, top_p=ask.top_p, seed=ask.seed)
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


def _not_begun(run: Run) -> RunDone:
    """The end of a run that was cancelled before it began."""
    return RunDone(run.identifier, run.ask.conversation, "", [], "cancelled")


def _stopped() -> Cancelled:
    return Cancelled(
        "waiting for the model: the model runner is stopping", hint="ask again when it is back", reason="stopping"
    )


def _broken_model(error: Exception) -> ModelUnavailable:
    """For what a library raised that nobody foresaw: the service goes on, says so, and tries again."""
    return ModelUnavailable(
        f"loading the model: unexpected {type(error).__name__}: {error}",
        hint="install the model again; the log of the model runner has the details",
        reason=type(error).__name__,
    )
