"""The command decode: payloads from a file or a pipe, in words. For shells, beside ``mosquitto_sub``."""

from __future__ import annotations

import json as json_text
import os
import sys
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Optional

import typer

from edge.cli.context import EXIT_FAILED, print_error
from protocol.errors import MalformedMessage, MindstreamError

READ_BYTES = 64 * 1024
LINE_BYTES = 2 * 1024 * 1024 + 128 * 1024
"""A payload of the largest packet in hexadecimal, behind the longest topic."""


def decode(
    file: Annotated[
        Optional[Path],  # noqa: UP045 - typer reads the annotation at run time, on Python 3.10 too
        typer.Argument(help="File to read. Default: standard input.", exists=True, dir_okay=False),
    ] = None,
    topic: Annotated[
        str, typer.Option("--topic", help="Topic of the payloads: each is checked against the tables.")
    ] = "",
    lines: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--lines/--raw", help="What comes in. Default: found out from its first byte."),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Binary values whole, in hexadecimal, as they stand on the wire.")
    ] = False,
) -> None:
    """Print payloads as JSON lines: topic (where it is known), bytes, message.

    Takes payloads one after another (`mosquitto_sub -N`), or lines of a topic and a payload in hexadecimal
    (`mosquitto_sub -F '%t %x'`), or lines of JSON. What has a topic of Mindstream is checked against the tables. What
    cannot be read is said on stderr, and the exit code is 1: a bad line is left out, a bad payload in a row of them
    ends it, for nobody knows where the next begins.
    """
    from edge.cli.watch import readable

    bad = False
    try:
        with file.open("rb") if file else open(0, "rb", closefd=False) as stream:
            # The first byte of an envelope is that of a msgpack map, which no text begins with.
            lines = stream.peek(1)[:1] < b"\x80" if lines is None else lines
            for where, piece in _lines(stream) if lines else _payloads(stream):
                try:
                    name, payload = _taken_apart(piece, where) if lines else ("", piece)
                    name = name or topic
                    _check(name, payload, asked_for=bool(topic))
                except MindstreamError as error:
                    bad = True
                    print_error(error)
                    continue
                message: dict[str, object] = {"topic": name} if name else {}
                message |= {"bytes": len(payload), "message": readable(payload, full=full)}
                print(json_text.dumps(message), flush=True)
    except MalformedMessage as error:
        bad = True
        print_error(error)
    except KeyboardInterrupt:
        pass  # the usual end of a stream
    except BrokenPipeError:
        # Whoever reads has seen enough. Python would complain once more when it closes standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if bad:
        raise typer.Exit(EXIT_FAILED)


def _payloads(stream: BufferedReader) -> Iterator[tuple[str, bytes]]:
    """msgpack maps, one after another as they come, and where each began. Raises MalformedMessage at the first
    byte that is of none."""
    import msgpack

    from protocol.topics import MAX_PACKET_BYTES

    # It only finds where a value ends: nothing is built from what it reads.
    unpacker = msgpack.Unpacker(max_buffer_size=MAX_PACKET_BYTES + READ_BYTES)
    held, begin = b"", 0
    while chunk := stream.read1(READ_BYTES):
        held += chunk
        unpacker.feed(chunk)
        while held:
            if not (0x80 <= held[0] <= 0x8F or held[0] in (0xDE, 0xDF)):
                raise MalformedMessage(
                    f"reading payloads: at byte {begin:,} stands 0x{held[0]:02x}, which begins no msgpack map",
                    hint="`mosquitto_sub -F '%t %x'` keeps payloads of several kinds apart",
                    reason="foreign",
                )
            try:
                unpacker.skip()
            except msgpack.OutOfData:
                if len(held) > MAX_PACKET_BYTES:
                    raise MalformedMessage(
                        f"reading payloads: the one at byte {begin:,} is above {MAX_PACKET_BYTES:,} bytes",
                        hint="no packet of Mindstream is; is this its stream?",
                        reason="too large",
                    ) from None
                break
            except (ValueError, msgpack.UnpackException) as error:
                raise MalformedMessage(
                    f"reading payloads: at byte {begin:,}: no msgpack: {error.__class__.__name__} {error}".rstrip(),
                    reason="foreign",
                ) from None
            length = unpacker.tell() - begin
            yield f"byte {begin:,}", held[:length]
            held, begin = held[length:], begin + length
    if held:
        raise MalformedMessage(
            f"reading payloads: the input ends within the one that began at byte {begin:,}, after {len(held):,} bytes",
            hint="it was cut, or it is none",
            reason="truncated",
        )


def _lines(stream: BufferedReader) -> Iterator[tuple[str, bytes]]:
    """Lines and their numbers. Raises MalformedMessage for one that is too long to be a packet's."""
    number = 0
    while line := stream.readline(LINE_BYTES):
        number += 1
        if len(line) >= LINE_BYTES:
            raise MalformedMessage(
                f"reading line {number:,}: it is above {LINE_BYTES:,} bytes",
                hint="are these lines?",
                reason="too large",
            )
        if line := line.rstrip(b"\r\n"):
            yield f"line {number:,}", line


def _taken_apart(line: bytes, where: str) -> tuple[str, bytes]:
    """Topic and payload of one line; the topic is empty for JSON. Raises MalformedMessage."""
    topic, space, digits = line.rpartition(b" ")
    try:
        if line.startswith(b"{"):
            json_text.loads(line)
            return "", line
        if not space:
            raise ValueError
        return topic.decode(), bytes.fromhex(digits.decode("ascii"))
    except ValueError:
        raise MalformedMessage(
            f"reading {where}: {line[:60]!r} is neither a topic and a payload in hexadecimal, nor JSON",
            hint="`mosquitto_sub -F '%t %x'` prints such lines",
            reason="foreign",
        ) from None


def _check(topic: str, payload: bytes, *, asked_for: bool) -> None:
    """Raises the error of the tree that a node would have: topics of others are none of its business."""
    if not topic or not (asked_for or topic.startswith("mindstream/")):
        return
    from protocol import codec, topics

    parsed = topics.parse(topic)
    if payload or not parsed.topic.retain:  # an empty one takes back what was retained
        codec.decode(parsed, payload)
