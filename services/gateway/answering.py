"""One request for text, from its first ask to its last byte: an ASGI response.

It takes what the runs bring from a mailbox and writes it, all that came together in one write. A client that goes
ends it, and cancels what it asked for. A client that reads slowly holds up nobody but itself: its tokens wait here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from edge.counters import Counters
from protocol.errors import ConversationUnknown, MindstreamError
from protocol.ids import uuid7
from protocol.messages import ChatMessage, ModelGenerate, RunDone, RunToken, Usage
from services.gateway.errors import SERVER, ApiError, api_error
from services.gateway.histories import Histories, split
from services.gateway.mailbox import Mailbox
from services.gateway.nodes import Runner, Runners
from services.gateway.replies import KEEP_ALIVE, ChatReply, Reply, TextReply, event
from services.gateway.runs import Run, Runs
from services.gateway.wanted import Wanted

log = logging.getLogger(__name__)

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

TICK_S = 5.0
"""So often a stream in which nothing comes is given a comment, and its client and its node are looked after."""
HEADERS_S = 10.0
"""A stream's status is sent with its first token, so that a refusal has one of its own; or after this long."""
LATE_TOKENS_S = 2.0
"""After the answer its last tokens may still be under way; then what is missing is taken from the answer's text."""
NODE_AWAY_S = 60.0
"""A node may be started again and go on with what it was asked; away for longer, it is given up."""

_GONE, _TICK, _LATE = "gone", "tick", "late"


class _Gone(Exception):
    """The client has gone."""


class _Choice:
    """One answer of a request, as far as it has come."""

    def __init__(self) -> None:
        self.run: Run | None = None
        self.done: RunDone | None = None
        self.tokens: list[RunToken] = []
        """In order, without gaps."""
        self.ahead: dict[int, RunToken] = {}
        self.begun = False
        self.said = 0
        """Characters that were sent."""
        self.messages: list[ChatMessage] = []
        self.conversation = ""
        self.again: ModelGenerate | None = None
        """What to ask when the runner has forgotten the conversation."""
        self.complete = False

    def accept(self, token: RunToken) -> list[RunToken]:
        """The tokens that can be said now that this one has come; a run carried out again brings some twice."""
        expected = len(self.tokens)
        if token.index != expected:
            if token.index > expected:
                self.ahead[token.index] = token
            return []
        ready = [token]
        while self.ahead and (following := self.ahead.pop(expected + len(ready), None)) is not None:
            ready.append(following)
        self.tokens += ready
        return ready


class Answering:
    """An ASGI response that answers ``wanted``.

    Args:
        runners, runs, histories, counters: the gateway's.
        found: runners that may answer, the best first.
        ttl_ms: how long it may take.
    """

    def __init__(
        self,
        wanted: Wanted,
        found: Sequence[Runner],
        *,
        runners: Runners,
        runs: Runs,
        histories: Histories,
        counters: Counters,
        ttl_ms: int,
    ) -> None:
        self._wanted = wanted
        self._found = found
        self._runners = runners
        self._runs = runs
        self._histories = histories
        self._counters = counters
        self._ttl_ms = ttl_ms
        self._model = found[0].model
        form = ChatReply if wanted.chat else TextReply
        self._reply: Reply = form(uuid7(), wanted.model, logprobs=wanted.logprobs, include_usage=wanted.include_usage)
        self._choices = [_Choice() for _ in range(len(wanted.prompts) * wanted.n)]
        self._headers_sent = False

    async def __call__(self, _scope: Any, receive: Receive, send: Send) -> None:
        """Answer. Raises ApiError as long as no header was sent."""
        loop = asyncio.get_running_loop()
        self._mailbox = Mailbox(loop)
        gone = loop.create_task(_until_gone(receive))
        gone.add_done_callback(lambda _: self._mailbox.put((None, _GONE)))
        started_s = loop.time()

        ticking = loop.create_task(self._tick())
        try:
            for index, choice in enumerate(self._choices):
                self._begin(index, choice)
            while not all(choice.complete for choice in self._choices):
                out = bytearray()
                for run, item in await self._mailbox.take():
                    out += self._handle(run, item, loop)
                if not self._wanted.stream:
                    continue
                if not out and not self._headers_sent and loop.time() - started_s > HEADERS_S:
                    out += KEEP_ALIVE
                if out:
                    await self._write(send, bytes(out))
            await self._end(send)
        except _Gone:
            self._counters.add("clients_gone")
        except ApiError as error:
            if not self._headers_sent:
                raise
            self._counters.add("failed.stream")
            await self._write(send, event(error.body()))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            ticking.cancel()
            gone.cancel()
            for choice in self._choices:
                if choice.run is not None:
                    if not choice.run.ended.is_set():
                        self._counters.add("runs_cancelled")
                    self._runs.release(choice.run)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._mailbox.put((None, _TICK))

    # --- asking ---------------------------------------------------------------------------------------------

    def _begin(self, index: int, choice: _Choice) -> None:
        """Ask for one answer: by what is new where a conversation holds the rest, else by all of it."""
        wanted = self._wanted
        prompt = wanted.prompts[index // wanted.n]
        settings = {**wanted.settings, "seed": wanted.seeds[index]}
        node, model = self._found[0].node, self._model
        if not wanted.chat:
            given = {"prompt": prompt} if isinstance(prompt, str) else {"prompt_tokens": prompt}
            self._start(index, choice, node, ModelGenerate(_name(), keep=False, **given, **settings))
            return
        messages: list[ChatMessage] = prompt  # type: ignore[assignment]
        if wanted.conversation:
            choice.conversation = wanted.conversation
            self._start(index, choice, node, ModelGenerate(wanted.conversation, messages, **settings))
            return
        choice.messages, choice.conversation = messages, _name()
        whole = ModelGenerate(choice.conversation, messages, keep=False, **settings)
        new = split(messages)
        nodes = [runner.node for runner in self._found if runner.model == model]
        if new and (held := self._histories.take(nodes, model, messages[:new])) is not None:
            node, conversation = held
            self._counters.add("histories_held")
            choice.again = whole
            choice.conversation = conversation
            only = ModelGenerate(conversation, messages[new:], keep=False, held_messages=new, **settings)
            self._start(index, choice, node, only)
            return
        self._start(index, choice, node, whole)

    def _start(self, index: int, choice: _Choice, node: str, ask: ModelGenerate) -> None:
        run = Run(index, node, self._mailbox)
        ask.run = run.id
        choice.run = run
        tokens = self._wanted.stream or self._wanted.logprobs
        self._runs.start(run, ask, tokens=tokens, ttl_ms=self._ttl_ms)

    # --- what comes -----------------------------------------------------------------------------------------

    def _handle(self, run: Run | None, item: Any, loop: asyncio.AbstractEventLoop) -> bytes:
        """What is to be written for one item of the mailbox."""
        if run is None:
            return self._signal(item)
        choice = self._choices[run.choice]
        if run is not choice.run or choice.complete:
            return b""
        if isinstance(item, RunToken):
            return self._tokens(run.choice, choice, choice.accept(item)) + self._perhaps_complete(run.choice, choice)
        if item is _LATE:
            return self._complete(run.choice, choice)
        if isinstance(item, RunDone):
            if item.finish_reason == "cancelled":
                raise ApiError(503, "the run was cancelled", type=SERVER, code="cancelled")
            choice.done = item
            if not (self._wanted.stream or self._wanted.logprobs):
                return self._complete(run.choice, choice)
            if not (out := self._perhaps_complete(run.choice, choice)) and not choice.complete:
                loop.call_later(LATE_TOKENS_S, self._mailbox.put, (run, _LATE))
            return out
        return self._failed(run, choice, item)

    def _signal(self, signal: str) -> bytes:
        if signal == _GONE:
            raise _Gone
        for choice in self._choices:
            if choice.run is None or choice.complete:
                continue
            away_s = self._runners.away_s(choice.run.node)
            if away_s > NODE_AWAY_S:
                raise ApiError(
                    502, f"{choice.run.node} has been away for {away_s:.0f} s", type=SERVER, code="node_away"
                )
        return KEEP_ALIVE if self._headers_sent else b""

    def _failed(self, run: Run, choice: _Choice, error: BaseException) -> bytes:
        if isinstance(error, ConversationUnknown) and choice.again is not None and not choice.tokens:
            # It had to make room: all of it is read again, where it was.
            self._counters.add("histories_forgotten")
            ask, choice.again = choice.again, None
            choice.conversation = ask.conversation
            self._runs.release(run)
            self._start(run.choice, choice, run.node, ask)
            return b""
        if isinstance(error, MindstreamError):
            raise api_error(error)
        log.error("run %s failed", run.id, exc_info=error)
        raise ApiError(500, "the gateway failed; its log has the details", type=SERVER, code="internal_error")

    def _tokens(self, index: int, choice: _Choice, tokens: Sequence[RunToken]) -> bytes:
        if not self._wanted.stream:
            return b""
        out = b""
        for token in tokens:
            if token.text or self._wanted.logprobs:
                out += self._first(index, choice) + self._reply.token(index, token.text, token)
                choice.said += len(token.text)
        return out

    def _first(self, index: int, choice: _Choice) -> bytes:
        begun, choice.begun = choice.begun, True
        return b"" if begun else self._reply.first(index)

    def _perhaps_complete(self, index: int, choice: _Choice) -> bytes:
        if choice.done is None or len(choice.tokens) < len(choice.done.tokens):
            return b""
        return self._complete(index, choice)

    def _complete(self, index: int, choice: _Choice) -> bytes:
        """The end of one answer: what its tokens did not bring, and why it ended."""
        done = choice.done
        assert done is not None
        assert choice.run is not None
        choice.complete = True
        if choice.messages and done.finish_reason in ("stop", "length"):
            answered = [*choice.messages, ChatMessage("assistant", done.text)]
            self._histories.note(choice.run.node, self._model, answered, choice.conversation)
        if not self._wanted.stream:
            return b""
        out = self._first(index, choice)
        if missing := done.text[choice.said :]:
            self._counters.add("lost.token")
            out += self._reply.token(index, missing, None)
        return out + self._reply.last(index, done.finish_reason)

    # --- what goes ------------------------------------------------------------------------------------------

    async def _write(self, send: Send, body: bytes) -> None:
        if not self._headers_sent:
            self._headers_sent = True
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
            headers.append((b"x-accel-buffering", b"no"))
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": True})

    async def _end(self, send: Send) -> None:
        nodes = [choice.run.node for choice in self._choices if choice.run is not None]
        answers = [(choice.done, choice.tokens) for choice in self._choices if choice.done is not None]
        if self._wanted.stream:
            found: list[Usage] = [done.usage for done, _ in answers if done.usage is not None]
            await send({"type": "http.response.body", "body": self._reply.end(nodes, found), "more_body": False})
            return
        body = self._reply.complete(answers, nodes)
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _name() -> str:
    """For a conversation that nobody named."""
    return f"gateway-{uuid7()}"
