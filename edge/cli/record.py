"""The commands record, recordings and replay: the bus on disk, and back."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge.cli.context import EXIT_FAILED, EXIT_INTERRUPTED, JsonOption, broker_url, print_json, print_table, settings

if TYPE_CHECKING:
    from edge.config import Config
    from edge.mqtt_wire import WireClient
    from edge.recording_summary import Summary
    from edge.replay import Report

BrokerOption = Annotated[
    str, typer.Option("--broker", metavar="URL", help="The broker. Default: the one of this node.", show_default=False)
]
FileArgument = Annotated[
    Path,
    typer.Argument(metavar="FILE", help="The recording; of a rotated one the name without a number means all parts."),
]
TIME_HELP = "2026-11-21T10:15:00 (local time, or with Z or +01:00), or a time since its start such as 90s or 5min."


def record(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to, such as garden.msrec; a new file.")],
    filter: Annotated[
        list[str],
        typer.Option("--filter", help="MQTT filter, below mindstream/v1 unless it begins with that; can be repeated."),
    ] = ["#"],  # noqa: B006 - typer copies it
    rotate: Annotated[
        str,
        typer.Option(
            help="Begin a new part (FILE with a number) at this size or time: 64MB, 10min, or 64MB|10min.",
            show_default=False,
        ),
    ] = "",
    keep: Annotated[int, typer.Option(help="With --rotate: keep so many parts, remove older ones; 0 all.", min=0)] = 0,
    seconds: Annotated[float, typer.Option(help="End after this time; 0 never.", min=0)] = 0,
    count: Annotated[int, typer.Option(help="End after so many messages; 0 never.", min=0)] = 0,
    when_full: Annotated[
        str, typer.Option(help="When the disk takes no more: end, or wait for room and count what is missed.")
    ] = "end",
    broker: BrokerOption = "",
    json: JsonOption = False,
) -> None:
    """Record what passes over the bus. Ctrl-C ends it; docs/recordings.md has the format."""
    from edge.recorder import SESSION_EXPIRY_S, Recorder
    from edge.recording_writer import Totals, parse_rotation

    if when_full not in ("end", "wait"):
        raise typer.BadParameter(f"{when_full!r} is neither end nor wait", param_hint="--when-full")
    rotation = parse_rotation(rotate, keep)
    if keep and not rotate:
        raise typer.BadParameter("it needs --rotate", param_hint="--keep")
    config = _config(broker)
    client = _client(config, broker_url(config), "record", SESSION_EXPIRY_S)
    recorder = Recorder(
        client,
        file,
        [_below_root(each) for each in filter],
        node=config.node.name,
        rotation=rotation,
        wait_when_full=when_full == "wait",
        count=count,
        seconds=seconds,
    )
    terminal = sys.stderr.isatty() and not json

    def progress(totals: Totals) -> None:
        if terminal:
            print(f"\r{_totals_line(totals)}\x1b[K", end="", file=sys.stderr, flush=True)

    try:
        with _stopped_by_signals(recorder.stop):
            print(f"recording {client.url} to {recorder.sink.current}; Ctrl-C ends it", file=sys.stderr, flush=True)
            recorder.run(progress=progress)
    finally:
        if terminal:
            print("\r\x1b[K", end="", file=sys.stderr)
        totals = recorder.totals
        if json:
            print_json({"file": str(file), **vars(totals)})
        else:
            print(_totals_line(totals))


def recordings(file: FileArgument, json: JsonOption = False) -> None:
    """Show what a recording holds: time, messages by topic and type, gaps, damage. Exits 1 when it is damaged."""
    from edge.recording import parts_of
    from edge.recording_summary import summarize

    summary = summarize(parts_of(file))
    if json:
        print_json(summary)
    else:
        _show(summary)
    if any(each.damage for each in summary.files):
        raise typer.Exit(EXIT_FAILED)


def replay(
    file: FileArgument,
    speed: Annotated[str, typer.Option(help="How much faster than it was: 1, 10, 0.5, or max: without waiting.")] = "1",
    only: Annotated[
        list[str],
        typer.Option("--only", metavar="FILTER", help="Only topics that match this MQTT filter; can be repeated."),
    ] = [],  # noqa: B006 - typer copies it
    from_: Annotated[str, typer.Option("--from", metavar="T", help=f"Begin there: {TIME_HELP}")] = "",
    to: Annotated[str, typer.Option("--to", metavar="T", help="End there.")] = "",
    broker: BrokerOption = "",
    private: Annotated[
        bool, typer.Option("--private", help="Start a broker for it, print its URL, and replay there.")
    ] = False,
    delay: Annotated[
        float, typer.Option(help="Wait so many seconds before the first message, so that others can subscribe.", min=0)
    ] = 0,
    hold: Annotated[
        bool, typer.Option("--hold", help="With --private: keep the broker up after the end, until Ctrl-C.")
    ] = False,
    with_asks: Annotated[
        bool,
        typer.Option(
            "--with-asks", help="On a live broker: asks and replies too. Commands are then carried out again."
        ),
    ] = False,
    over_live: Annotated[
        bool,
        typer.Option(
            "--over-live", help="Also retained messages of nodes that are there now: their presence, digests."
        ),
    ] = False,
    clear_retained: Annotated[
        bool, typer.Option("--clear-retained", help="At the end, take back what this replay retained on the broker.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Publish a recording again, in its order and its time, onto a live broker or a private one. Ctrl-C ends it."""
    import contextlib

    from edge.recording import parts_of
    from edge.replay import Replay, Selection, nodes_there_now

    if private and broker:
        raise typer.BadParameter("give --broker or --private, not both", param_hint="--private")
    factor = _speed(speed)
    paths = parts_of(file)
    from_us, to_us = _bounds(paths, from_, to)
    config = _config(broker)
    with contextlib.ExitStack() as stack:
        live = frozenset[str]()
        if private:
            from broker.embedded import EmbeddedBroker

            url = stack.enter_context(EmbeddedBroker()).url
            print(f"private broker at {url}", file=sys.stderr, flush=True)
        else:
            url = broker_url(config)
            if not over_live:
                client = _client(config, url, "replay-look")
                client.connect()
                live = nodes_there_now(client)
                client.close()
        client = _client(config, url, "replay", own=not private)
        client.connect()
        stack.callback(client.drop)
        selection = Selection([_below_root(each) for each in only], from_us, to_us, private or with_asks, live)
        run = Replay(client, paths, selection, factor)
        with _stopped_by_signals(run.stop), _progress_bar(paths, json) as progress:
            run.wait(delay)
            report = run.run(clear_retained=clear_retained, progress=progress)
        client.close()
        if json:
            print_json({"url": client.url, "live_nodes": sorted(live), **vars(report)})
        else:
            _show_report(report, live)
        if private and hold and not report.stopped:
            from edge.stopping import StopFlag

            done = StopFlag()
            with _stopped_by_signals(done.set):
                print(f"the broker at {url} stays; Ctrl-C ends it", file=sys.stderr, flush=True)
                while not done.wait(1.0):
                    pass
    if report.stopped:
        raise typer.Exit(EXIT_INTERRUPTED)
    if report.damage or report.unacknowledged:
        raise typer.Exit(EXIT_FAILED)


# --- what they share --------------------------------------------------------------------------------------------


def _config(broker: str) -> Config:
    """The configuration, with ``broker`` in place of its broker, under the same checks: no TLS, no other machine."""
    from edge.config import load_config

    override = {"MINDSTREAM_BROKER__URL": broker} if broker else {}
    return load_config(settings.config_path, {**os.environ, **override})


def _client(config: Config, url: str, name: str, session_expiry_s: int = 0, *, own: bool = True) -> WireClient:
    """A connection of this node; a private broker (``own`` false) gets no password."""
    import logging

    from edge.mqtt_wire import WireClient

    logging.basicConfig(level=logging.DEBUG if settings.debug else logging.WARNING, format="%(levelname)s %(message)s")
    return WireClient(
        url,
        f"mindstream-{config.node.name}-{name}-{os.getpid()}",
        username=config.broker.username if own else "",
        password=config.broker.password() if own else "",
        ca_file=config.broker.ca_file,
        session_expiry_s=session_expiry_s,
        protocol=config.broker.protocol,
    )


def _below_root(filter: str) -> str:
    from protocol.topics import ROOT

    return filter if filter.startswith(("mindstream/", "$")) else f"{ROOT}/{filter}"


@contextmanager
def _stopped_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    """SIGINT and SIGTERM call ``stop``; the second one ends the program as it would otherwise."""
    import signal

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, _frame: object) -> None:
        signal.signal(number, before[signal.Signals(number)])
        stop()

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _totals_line(totals: Any) -> str:
    lost = f", {totals.lost:,} LOST" if totals.lost else ""
    breaks = f", {totals.reconnects:,} reconnects" if totals.reconnects else ""
    files = f" in {totals.files} files" if totals.files > 1 else ""
    return f"{totals.recorded:,} messages, {totals.written_bytes:,} bytes{files}{lost}{breaks}"


def _speed(text: str) -> float:
    import math

    if text == "max":
        return math.inf
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 0 < factor < math.inf:
        raise typer.BadParameter(f"{text!r} is neither a number above 0 nor max", param_hint="--speed")
    return factor


def _bounds(paths: list[Path], from_: str, to: str) -> tuple[int | None, int | None]:
    from edge.recording import Recording

    with Recording(paths[0]) as first:
        spans = first.index.spans
        start_us = first.info.started_us if first.info else (spans[0].first_us if spans else 0)
    return _time_us(from_, start_us, "--from"), _time_us(to, start_us, "--to")


def _time_us(text: str, start_us: int, option: str) -> int | None:
    import re
    from datetime import datetime

    if not text:
        return None
    if found := re.fullmatch(r"\+?(\d+(?:\.\d+)?)(s|min|h)", text):
        return start_us + int(float(found.group(1)) * {"s": 1, "min": 60, "h": 3600}[found.group(2)] * 1_000_000)
    try:
        # Python 3.10 reads no Z; a time without a zone is this machine's.
        return int(datetime.fromisoformat(re.sub("Z$", "+00:00", text)).astimezone().timestamp() * 1_000_000)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no time: {TIME_HELP}", param_hint=option) from None


@contextmanager
def _progress_bar(paths: list[Path], json: bool) -> Iterator[Callable[[Report], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from edge.recording import Recording

    console = Console(stderr=True)
    if json or not console.is_terminal:
        yield lambda _report: None
        return
    total = 0
    for path in paths:
        with Recording(path) as source:
            total += source.index.messages
    columns = (TextColumn("replaying"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("replaying", total=total)

        def show(report: Report) -> None:
            bar.update(task, completed=report.published + report.left_out_asks + report.left_out_retained)

        yield show


def _show_report(report: Report, live: frozenset[str]) -> None:
    ended = "stopped after " if report.stopped else ""
    print(f"{ended}{report.published:,} messages published in {report.took_s:.1f} s")
    if report.left_out_asks:
        print(f"{report.left_out_asks:,} asks and replies left out: on a live broker they need --with-asks")
    if report.left_out_retained:
        print(f"{report.left_out_retained:,} retained messages left out: {', '.join(sorted(live))} there now")
    if report.gaps:
        print(f"{report.gaps:,} gaps in the recording, {report.missing:,} messages known to be missing")
    for line in report.damage:
        print(f"damaged: {line}")
    if report.cleared:
        print(f"{report.cleared:,} retained messages taken back")
    if report.unacknowledged:
        print(f"{report.unacknowledged:,} messages the broker has not acknowledged")


def _show(summary: Summary) -> None:
    import time

    from edge.text import printable

    def clock(time_us: int) -> str:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_us / 1_000_000))

    each = f", {summary.bytes_per_message:.1f} a message" if summary.bytes_per_message else ""
    print(printable(f"recorded on {summary.node or '?'} at {summary.broker or '?'} by mindstream {summary.mindstream}"))
    if summary.messages:
        print(f"{clock(summary.first_us)} to {clock(summary.last_us)}, {summary.duration_s:,.1f} s")
    print(f"{summary.messages:,} messages, {summary.payload_bytes:,} bytes; {summary.file_bytes:,} on the disk{each}")
    rows = [[row.node, row.topic, row.type, f"{row.messages:,}", f"{row.payload_bytes:,}"] for row in summary.rows]
    print_table(("node", "topic", "type", "messages", "bytes"), rows, empty="no messages")
    for gap in summary.gaps:
        missing = "an unknown number of" if gap.messages is None else f"{gap.messages:,}"
        seconds = (gap.last_us - gap.first_us) / 1_000_000
        print(printable(f"gap: {clock(gap.first_us)}, {seconds:.1f} s, {missing} messages, {gap.gap}: {gap.text}"))
    for file in summary.files:
        if not file.closed:
            print(f"{file.path}: never closed: it is being written, or its recorder was killed")
        elif file.ended not in ("stopped", "rotated"):
            print(printable(f"{file.path}: ended because of {file.ended}"))
        for damage in file.damage:
            print(f"{file.path}: {damage}")
