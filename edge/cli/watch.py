"""The command watch: what passes over the bus, in words."""

from __future__ import annotations

import json as json_text
import math
import queue
import time
from typing import Annotated, Any

import typer

from edge.cli.context import connect, connected, load

LONGEST_LINE = 400
QUEUE_MESSAGES = 10_000


def watch(
    filter: Annotated[str, typer.Argument(help="MQTT filter, below mindstream/v1 unless it begins with that.")] = "#",
    count: Annotated[int, typer.Option(help="End after so many messages; 0 never.", min=0)] = 0,
    seconds: Annotated[float, typer.Option(help="End after this time; 0 never.", min=0)] = 0,
    full: Annotated[bool, typer.Option("--full", help="Do not shorten long messages.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a message.")] = False,
) -> None:
    """Show live what is said on the bus. Ctrl-C ends it."""
    from edge.text import printable
    from protocol.topics import ROOT

    wanted = filter if filter.startswith(("mindstream/", "$")) else f"{ROOT}/{filter}"
    heard: queue.Queue[tuple[float, str, bytes]] = queue.Queue(QUEUE_MESSAGES)
    missed = 0

    def take(topic: str, payload: bytes) -> None:
        nonlocal missed
        try:
            heard.put_nowait((time.time(), topic, payload))
        except queue.Full:
            missed += 1

    deadline_s = time.monotonic() + seconds if seconds else float("inf")
    shown = told = 0
    with connected(load(), wait=False) as bus:
        bus.watch(wanted, take)
        connect(bus)
        try:
            while time.monotonic() < deadline_s and not (count and shown >= count):
                try:
                    at, topic, payload = heard.get(timeout=0.1)
                except queue.Empty:
                    continue
                if json:
                    line = json_text.dumps(
                        {"time": at, "topic": topic, "bytes": len(payload), "message": readable(payload)}
                    )
                else:
                    line = printable(_line(at, topic.removeprefix(ROOT + "/"), payload, full))
                print(line, flush=True)
                shown += 1
                if missed > told:
                    typer.echo(f"[{missed - told} messages came faster than they could be shown]", err=True)
                    told = missed
        except KeyboardInterrupt:
            return


def _line(at: float, topic: str, payload: bytes, full: bool) -> str:
    message = readable(payload)
    what = ""
    if isinstance(message, dict) and "data" in message and "type" in message:
        what = f" {message['type']}" + (f" ttl {message['ttl_ms']} ms" if message.get("ttl_ms") else "")
        message = message["data"]
    text = json_text.dumps(message, ensure_ascii=False)
    if not full and len(text) > LONGEST_LINE:
        text = f"{text[:LONGEST_LINE]}… ({len(payload):,} bytes)"
    clock = time.strftime("%H:%M:%S", time.localtime(at)) + f".{int(at % 1 * 1000):03d}"
    return f"{clock} {topic}{what} {text}"


def readable(payload: bytes, *, full: bool = False) -> Any:
    """A payload as JSON types, whatever it is: msgpack, JSON, text or bytes.

    Binary values are cut short, and those that hold msgpack in turn (what is signed) are opened; with ``full`` all are
    whole and in hexadecimal.
    """
    import msgspec

    if not payload:
        return None
    for decode in (msgspec.json.decode, msgspec.msgpack.decode):
        try:
            return _plain(decode(payload), full)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            continue
    return _plain(payload, full)


OPENED = {"header", "content", "manifest"}
"""Binary fields that are msgpack: protocol.asyncapi.NESTED, without the time that its import takes."""


def _plain(value: Any, full: bool) -> Any:
    """Bytes as hexadecimal text, and keys as text."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        data = bytes(value)
        return data.hex() if full else f"<{len(data)} bytes {data[:8].hex()}{'…' if len(data) > 8 else ''}>"
    if isinstance(value, dict):
        return {
            str(key): _opened(each) if key in OPENED and not full else _plain(each, full) for key, each in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_plain(each, full) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no word for it
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)


def _opened(value: Any) -> Any:
    import msgspec

    if isinstance(value, bytes):
        try:
            inside = msgspec.msgpack.decode(value)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            inside = None
        if isinstance(inside, dict):
            return _plain(inside, False)
    return _plain(value, False)
