"""Commands about conversations: chat, handoff."""

from __future__ import annotations

import concurrent.futures
import sys
import threading
import time
from typing import TYPE_CHECKING, Annotated

import typer

from edge.cli.context import (
    EXIT_INTERRUPTED,
    JsonOption,
    NodeOption,
    connected,
    expect_service,
    load,
    print_error,
    print_json,
)

if TYPE_CHECKING:
    from edge.bus import Bus
    from protocol.codec import Received
    from protocol.messages import ModelGenerate, RunDone

RUN_TTL_MS = 600_000
"""A run is answered at its end: a long answer of a slow model takes minutes."""


def chat(
    text: Annotated[str, typer.Argument(help="What to say; without it a conversation line by line.")] = "",
    node: NodeOption = "",
    conversation: Annotated[str, typer.Option("--conversation", "-c", help="Its name. Default: a new one.")] = "",
    system: Annotated[str, typer.Option(help="System prompt of a new conversation.")] = "",
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 512,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token always.", min=0)] = 0.7,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest that make up this share.")] = 0.95,
    seed: Annotated[int, typer.Option(help="The same seed gives the same answer.", min=0)] = 0,
    json: JsonOption = False,
) -> None:
    """Talk with the model of a node.

    Its words appear as they come. Ctrl-C stops an answer, Ctrl-D ends the talk.
    """
    from protocol.ids import uuid7
    from protocol.messages import ChatMessage, ModelGenerate

    config = load()
    target = node or config.node.name
    name = conversation or f"chat-{uuid7()}"
    first = [ChatMessage("system", system)] if system else []
    interactive = not text and sys.stdin.isatty()
    if not text and not interactive:
        text = sys.stdin.read()

    def turn(bus: Bus, said: str) -> RunDone:
        ask = ModelGenerate(
            name,
            [*first, ChatMessage("user", said)],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
        first.clear()
        return _run(bus, target, ask, show=not json)

    with connected(config) as bus:
        expect_service(bus, target, "model_runner")
        if interactive:
            print(f"conversation {name} on {target}", file=sys.stderr)
            _talk(bus, turn)
            return
        done = turn(bus, text)
        if json:
            print_json(done)
        elif not conversation:
            print(f"conversation {name} on {target}", file=sys.stderr)
        if done.finish_reason == "cancelled":
            raise typer.Exit(EXIT_INTERRUPTED)


def _talk(bus: Bus, turn: object) -> None:
    """Line by line until Ctrl-D; an error ends a turn, not the talk."""
    import readline  # noqa: F401 - gives input() its history and line editing

    from protocol.errors import MindstreamError, NotConnected

    assert callable(turn)
    while True:
        try:
            said = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            # It stops an answer; one that has just ended by itself must not end the talk.
            print("\n(Ctrl-D ends)", file=sys.stderr)
            continue
        if not said.strip():
            continue
        try:
            turn(bus, said)
        except NotConnected:
            raise
        except MindstreamError as error:
            print_error(error)


class _Shown:
    """The answer on the terminal: tokens as they come, and at the end what is missing of the whole text."""

    def __init__(self, show: bool) -> None:
        self._show = show
        self._text = ""
        self._open = True
        self._lock = threading.Lock()

    def token(self, message: Received) -> None:
        with self._lock:
            if self._open:
                self._write(message.data.text)

    def finish(self, done: RunDone) -> None:
        with self._lock:
            self._open = False
            # Tokens may be dropped on a bad line; the end of the run has the whole text.
            if done.text.startswith(self._text):
                self._write(done.text[len(self._text) :])
            elif self._show and self._text.rstrip() != done.text.rstrip():
                sys.stdout.write("\n[some of it was lost on the way; the whole answer:]\n")
                self._write(done.text)
            if self._show:
                print(" [stopped]" if done.finish_reason == "cancelled" else "", flush=True)

    def _write(self, text: str) -> None:
        from edge.text import printable

        self._text += text
        if self._show and text:
            sys.stdout.write(printable(text))
            sys.stdout.flush()


def _run(bus: Bus, target: str, ask: ModelGenerate, *, show: bool) -> RunDone:
    """One answer, shown as it comes; Ctrl-C cancels it and waits for its end, a second one gives up."""
    from protocol.ids import uuid7
    from protocol.messages import ModelCancel, RunToken

    ask.run = uuid7()
    shown = _Shown(show)
    stop_hearing = bus.hear(RunToken, shown.token, node=target, run=ask.run)
    bus.wait_subscribed(5.0)
    try:
        answer = bus.ask_later(target, ask, ttl_ms=RUN_TTL_MS)
        cancelled = False
        while True:
            try:
                # With a timeout, so that Ctrl-C is heard.
                done: RunDone = answer.result(timeout=0.2)
                break
            except concurrent.futures.TimeoutError:
                # AskExpired is the future's own error; this one is only our patience.
                continue
            except KeyboardInterrupt:
                if cancelled:
                    raise
                cancelled = True
                bus.ask_later(target, ModelCancel(ask.run), ttl_ms=10_000)
        shown.finish(done)
        return done
    finally:
        stop_hearing()


def handoff(
    conversation: Annotated[str, typer.Argument(help="The conversation to hand over.")],
    source: Annotated[str, typer.Option("--from", help="Node that has it.", metavar="NODE")],
    target: Annotated[str, typer.Option("--to", help="Node that shall go on with it.", metavar="NODE")],
    name: Annotated[str, typer.Option("--as", help="Its name there. Default: the same.")] = "",
    timeout_s: Annotated[float, typer.Option(help="Longest time for each of the two steps.", min=1, max=600)] = 120,
    json: JsonOption = False,
) -> None:
    """Move a conversation to another node, exactly.

    It is saved on the one node, KV cache and all, and the other goes on with the very next step.
    """
    from protocol.messages import ModelResume, ModelResumed, ModelSnapshot, SnapshotSaved

    ttl_ms = int(timeout_s * 1000)
    started_s = time.monotonic()
    with connected(load()) as bus:
        for node in (source, target):
            expect_service(bus, node, "model_runner")
        saved: SnapshotSaved = bus.ask(source, ModelSnapshot(conversation), ttl_ms=ttl_ms)
        resumed: ModelResumed = bus.ask(target, ModelResume(saved.snapshot, source, name), ttl_ms=ttl_ms)
    total_ms = (time.monotonic() - started_s) * 1000
    if json:
        print_json({"saved": saved, "resumed": resumed, "total_ms": total_ms})
        return
    why = f" ({resumed.reason})" if resumed.reason else ""
    print(
        f"{source}: saved {saved.tokens} tokens, {saved.size_bytes / 1e6:.1f} MB, in {saved.took_ms:.0f} ms\n"
        f"{target}: {resumed.how}{why}; fetched in {resumed.transfer_ms:.0f} ms, restored in"
        f" {resumed.restore_ms:.0f} ms\n"
        f"{resumed.conversation} goes on at {target} after {total_ms:.0f} ms:"
        f" mindstream chat --node {target} -c {resumed.conversation}"
    )
