"""One run, from its ask to its end: what was asked, what has been said, what it cost."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

from protocol.messages import ChatMessage, ModelGenerate, RunDone, RunToken, Usage
from services.model_runner.chat import ChatFormat, TextStream
from services.model_runner.conversations import Conversation
from services.model_runner.generation import GeneratedToken, GenerationState
from services.model_runner.scheduler import Work
from services.model_runner.wire import run_token


@dataclass(eq=False)
class Run:
    """One answer to be given."""

    identifier: str
    command: str
    """``node/id`` of the ask: the same when it is carried out again after a crash."""
    ask: ModelGenerate
    done: Future[RunDone]
    asker: str = ""
    """``node/client``: who asks, for fairness."""
    expires_s: float = float("inf")
    """``time.monotonic()`` at the end of the ask's time to live: nobody waits after."""
    cancelled: threading.Event = field(default_factory=threading.Event)
    asked_s: float = field(default_factory=time.monotonic)

    def not_begun(self) -> RunDone:
        """Its end, when it was cancelled before it began."""
        return RunDone(self.identifier, self.ask.conversation, "", [], "cancelled")


class Pooled(NamedTuple):
    """What of a prompt came from the site's pool."""

    tokens: int
    sources: list[str]
    """The nodes that had read it."""
    how: str
    """``exact`` or ``close``."""


class Answer:
    """A run that has begun. Used by the worker thread alone."""

    def __init__(self, run: Run, work: Work, conversation: Conversation, chat: ChatFormat) -> None:
        self.run = run
        self.work = work
        self.conversation = conversation
        self.state: GenerationState = conversation.state
        self._chat = chat
        self.queued_ms = (time.monotonic() - run.asked_s) * 1000
        self.shared_tokens = 0
        self.pooled: Pooled | None = None
        """What of its prompt came from the pool."""
        self.block_s = 0.0
        """What reading since the last block boundary took."""
        self.dropped_tokens = 0
        self.keys: list[bytes] = []
        """Of the whole chunks of its prompt (``prefixes.chunk_keys``)."""
        self.common_chunks = 0
        """Of those, how many other prompts began with."""
        self.tried_again = False
        """Whether its prompt was read a second time, for want of memory."""
        self._stream, self._before = _said_so_far(chat, run.ask, conversation)
        for token in self.state.answer:  # of an answer that a restart cut
            self._stream.push(token)
        self.prompt_tokens = len(self.state.tokens) - self.state.new_tokens
        self.state.timing.reused_tokens = self.state.cache.length
        self._started_s = time.perf_counter()
        self._batched = 0
        """Sum of the sizes of the batches that its tokens came from."""

    def took(self, generated: GeneratedToken, batch: int, seconds: float) -> RunToken:
        """One more token, from a step of ``batch`` conversations that took ``seconds``; what is to be said of it.
        Sets the state's ``finish_reason`` when a stop text ends the answer."""
        timing = self.state.timing
        timing.decode_s += seconds
        timing.first_token_s = timing.first_token_s or time.perf_counter() - self._started_s
        self._batched += batch
        text = self._stream.push(generated.token)
        if self.state.finish_reason:
            text += self._stream.finish()
        if self._stream.stopped:
            self.state.finish_reason = "stop"
        return run_token(self._chat, generated, text)

    def end(self, energy_j: float | None = None, energy_sensor: str = "") -> RunDone:
        """The run's end, the answer having its ``finish_reason``; it now stands in the conversation's history. What it
        took in joules, where that was measured, and by which sensor, is said with it."""
        conversation, state, timing = self.conversation, self.state, self.state.timing
        if conversation.messages:  # a chat, and no plain text
            if conversation.messages[-1].role == "assistant":
                conversation.messages[-1].content = self._stream.text
            else:
                conversation.messages.append(ChatMessage(role="assistant", content=self._stream.text))
        conversation.last_command = self.run.command
        usage = Usage(
            prompt_tokens=self.prompt_tokens,
            cached_tokens=timing.reused_tokens,
            completion_tokens=state.new_tokens,
            ttft_ms=timing.first_token_s * 1000,
            tokens_per_s=timing.tokens_per_s,
            queued_ms=self.queued_ms,
            shared_tokens=self.shared_tokens,
            dropped_tokens=self.dropped_tokens,
            batch_mean=self._batched / timing.decoded_tokens if timing.decoded_tokens else 0.0,
            energy_j=energy_j,
            energy_sensor=energy_sensor if energy_j is not None else "",
        )
        if self.pooled is not None:
            usage.pooled_tokens, usage.pooled_from, usage.pooled_how = self.pooled
        return RunDone(
            self.run.identifier,
            conversation.name,
            self._stream.text[self._before :],
            state.answer,
            state.finish_reason,
            usage=usage,
        )


def given_before(chat: ChatFormat, run: Run, conversation: Conversation) -> RunDone:
    """The answer that was given and kept just before a crash, which the asker may not have heard of."""
    state = conversation.state
    stream, before = _said_so_far(chat, run.ask, conversation)
    for token in state.answer:
        stream.push(token)
    if state.finish_reason != "cancelled":
        stream.finish()
    return RunDone(run.identifier, conversation.name, stream.text[before:], state.answer, state.finish_reason)


def _said_so_far(chat: ChatFormat, ask: ModelGenerate, conversation: Conversation) -> tuple[TextStream, int]:
    """A stream that stands before this run's first token, and the length of what this turn's earlier runs said."""
    stream = chat.stream(ask.stop)
    state = conversation.state
    for token in state.tokens[conversation.turn_start : len(state.tokens) - state.new_tokens]:
        stream.push(token)
    return stream, len(stream.text)
