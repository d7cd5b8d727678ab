"""The command chat."""

from __future__ import annotations

import concurrent.futures
import sys
import threading
from pathlib import Path
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
    from protocol.messages import ModelGenerate, RunDone, RunToken

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
    min_p: Annotated[
        float, typer.Option(help="Only tokens at least this likely against the likeliest; 0 is off.", min=0, max=1)
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: what was said becomes less likely by this factor.", min=0.01, max=100)
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same answer.", min=0)] = 0,
    json_schema: Annotated[
        Path | None,
        typer.Option(help="File with a JSON Schema: the answer is JSON that it accepts.", metavar="FILE"),
    ] = None,
    logprobs: Annotated[
        int, typer.Option(help="Show each token's log-probability, and so many of the likeliest.", min=0, max=20)
    ] = 0,
    salience: Annotated[
        float,
        typer.Option(help="How much depends on it: snapshots that are pruned keep it for longer.", min=0, max=1),
    ] = 0.0,
    stats: Annotated[bool, typer.Option("--stats", help="Print what each answer took, joules included.")] = False,
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
    schema = _schema(json_schema) if json_schema else ""
    interactive = not text and sys.stdin.isatty()
    if not text and not interactive:
        text = sys.stdin.read()

    said_tokens: list[RunToken] = []

    def turn(bus: Bus, said: str) -> RunDone:
        ask = ModelGenerate(
            name,
            [*first, ChatMessage("user", said)],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            json_schema=schema,
            top_logprobs=logprobs,
            salience=salience,
        )
        first.clear()
        said_tokens.clear()
        done = _run(bus, target, ask, show=not json, tokens=said_tokens if logprobs else None)
        if logprobs and not json:
            _print_logprobs(said_tokens)
        if schema and done.finish_reason != "stop":
            print("the answer was cut: the JSON is not whole", file=sys.stderr)
        if stats:
            print(_stats(done), file=sys.stderr)
        return done

    with connected(config) as bus:
        expect_service(bus, target, "model_runner")
        if interactive:
            print(f"conversation {name} on {target}", file=sys.stderr)
            _talk(bus, turn)
            return
        done = turn(bus, text)
        if json and logprobs:
            import msgspec

            print_json({**msgspec.to_builtins(done), "said": said_tokens})
        elif json:
            print_json(done)
        elif not conversation:
            print(f"conversation {name} on {target}", file=sys.stderr)
        if done.finish_reason == "cancelled":
            raise typer.Exit(EXIT_INTERRUPTED)


def _schema(path: Path) -> str:
    """The text of a schema file. Raises typer.BadParameter."""
    import json

    try:
        text = path.read_text(encoding="utf-8")
        json.loads(text)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{path}: {error}", param_hint="--json-schema") from error
    return text


def _print_logprobs(tokens: list[RunToken]) -> None:
    """A line for each token: its text, its log-probability and entropy in nats, and its likeliest rivals."""
    from edge.text import printable

    for token in tokens:
        rivals = "  ".join(f"{printable(repr(each.text))} {each.logprob:.2f}" for each in token.top)
        print(f"{printable(repr(token.text)):<20} {token.logprob:8.3f} {token.entropy:7.3f}   {rivals}")


def _stats(done: RunDone) -> str:
    """What an answer took, in a line."""
    usage = done.usage
    if usage is None:
        return "what it took is not known: it was answered before"
    read = usage.prompt_tokens - usage.cached_tokens
    energy = "energy not measured"
    if usage.energy_j is not None:
        per_joule = f", {usage.completion_tokens / usage.energy_j:.2f} tokens/J" if usage.energy_j else ""
        energy = f"{usage.energy_j:.1f} J{per_joule} ({usage.energy_sensor})"
    return (
        f"{usage.completion_tokens} tokens, {usage.tokens_per_s:.1f} tokens/s; {read} of {usage.prompt_tokens} prompt "
        f"tokens read, first token after {usage.ttft_ms:.0f} ms, {usage.queued_ms:.0f} ms queued; {energy}"
    )


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

    def __init__(self, show: bool, tokens: list[RunToken] | None) -> None:
        self._show = show
        self._tokens = tokens
        self._text = ""
        self._open = True
        self._lock = threading.Lock()

    def token(self, message: Received) -> None:
        with self._lock:
            if self._open:
                self._write(message.data.text)
                if self._tokens is not None:
                    self._tokens.append(message.data)

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


def _run(bus: Bus, target: str, ask: ModelGenerate, *, show: bool, tokens: list[RunToken] | None = None) -> RunDone:
    """One answer, shown as it comes, its tokens put into ``tokens``; Ctrl-C cancels it and waits for its end, a second
    one gives up."""
    from protocol.ids import uuid7
    from protocol.messages import ModelCancel, RunToken

    ask.run = uuid7()
    shown = _Shown(show, tokens)
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
