"""What every command shares: the global options, the configuration, the bus, output, and exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from edge.bus import Bus
    from edge.config import Config
    from protocol.codec import Received
    from protocol.errors import MindstreamError

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_UNREACHABLE, EXIT_NOT_FOUND, EXIT_NOT_READY = 0, 1, 2, 3, 4, 5
EXIT_INTERRUPTED = 130
EXIT_CODES = {
    EXIT_OK: "it was done",
    EXIT_FAILED: "it failed, or a check did",
    EXIT_USAGE: "the command line or the configuration is wrong",
    EXIT_UNREACHABLE: "no broker, node or service answered in time",
    EXIT_NOT_FOUND: "what was named is not there: a conversation, a model, a peer",
    EXIT_NOT_READY: "`mindstream status`: the node is not ready, or a service of it is failed, lost or silent",
    EXIT_INTERRUPTED: "interrupted by Ctrl-C",
}
"""For docs/cli.md; scripts rely on them."""

REFUSED_TIMEOUT_S = 3.0
"""A broker that is just being started has this long to listen."""
CONNECT_TIMEOUT_S = 10.0
"""One that listens has this long to answer: it may have much to do."""
RETAINED_TIMEOUT_S = 3.0
"""A retained message comes with the subscription, at once: after this long there is none."""

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
NodeOption = Annotated[str, typer.Option("--node", help="Node to ask. Default: this one.", metavar="NODE")]


@dataclass
class Settings:
    """The global options."""

    config_path: Path | None = None
    debug: bool = False


settings = Settings()


def exit_code(error: MindstreamError) -> int:
    """The exit code for an error of the tree."""
    from protocol import errors

    codes = {
        EXIT_USAGE: (errors.ConfigError, errors.ProtocolError),
        EXIT_UNREACHABLE: (errors.NotConnected, errors.AskExpired),
        EXIT_NOT_FOUND: (errors.NotFound, errors.ConversationUnknown, errors.ModelUnavailable),
    }
    return next((code for code, kinds in codes.items() if isinstance(error, kinds)), EXIT_FAILED)


def print_error(error: MindstreamError) -> None:
    """One line, and one with what to do next, on stderr."""
    from edge.text import printable

    where = f"{error.remote}: " if error.remote else ""
    print(printable(f"error: {where}{error.message}"), file=sys.stderr)
    if error.hint:
        print(printable(f"hint: {error.hint}"), file=sys.stderr)


def load() -> Config:
    """The configuration that the global options name. Raises ConfigError."""
    from edge.config import load_config

    return load_config(settings.config_path)


def broker_url(config: Config) -> str:
    """Where this node's services speak. Raises NotConnected when no broker is configured and no node runs."""
    if config.broker.url:
        return config.broker.url
    from edge.node_lock import running_in
    from protocol.errors import NotConnected

    running = running_in(config.node.folder())
    if running is None:
        raise NotConnected(
            f"looking for the broker of node {config.node.name}: broker.url is empty and no node runs in"
            f" {config.node.folder()}",
            hint="start it with `mindstream up`, or name another configuration with --config",
            field="broker.url",
            reason="not running",
        )
    return running.broker_url


@contextmanager
def connected(config: Config, *, wait: bool = True) -> Iterator[Bus]:
    """A bus connection of this node under the client name ``cli-PID``. Raises NotConnected.

    With ``wait`` false it is not started, so that hearings can be added first: ``connect`` it then.
    """
    import logging

    from edge.bus import Bus

    logging.basicConfig(level=logging.DEBUG if settings.debug else logging.ERROR, format="%(levelname)s %(message)s")
    bus = Bus(
        url=broker_url(config),
        node=config.node.name,
        client=f"cli-{os.getpid()}",
        username=config.broker.username,
        password=config.broker.password(),
        ca_file=config.broker.ca_file,
        protocol=config.broker.protocol,
        queue_messages=config.bus.queue_messages,
    )
    try:
        if wait:
            connect(bus)
        yield bus
    finally:
        bus.stop()


def connect(bus: Bus) -> None:
    """Connect. Raises NotConnected, soon when nothing listens there."""
    from protocol.errors import NotConnected

    try:
        bus.start(REFUSED_TIMEOUT_S)
    except NotConnected as error:
        if error.reason != "no answer in time":
            raise
        bus.wait_subscribed(CONNECT_TIMEOUT_S)


def expect_service(bus: Bus, node: str, service: str) -> None:
    """Raises NotConnected when ``service`` of ``node`` is not on this broker, instead of a wait for an answer.

    By its retained state: it says ``lost`` or ``disconnected`` when it has gone, and nothing when it never was.
    """
    import threading

    from protocol.errors import NotConnected
    from protocol.messages import ServiceState

    heard = threading.Event()
    states: list[ServiceState] = []

    def hear(message: Received) -> None:
        states.append(message.data)
        heard.set()

    stop_hearing = bus.hear(ServiceState, hear, node=node, service=service)
    try:
        bus.wait_subscribed(CONNECT_TIMEOUT_S)
        heard.wait(RETAINED_TIMEOUT_S)
    finally:
        stop_hearing()
    state = states[-1] if states else None
    if state is not None and state.state in ("init", "ready", "degraded"):
        if state.state == "init":
            print(f"{node}/{service} is not ready yet: {state.reason or 'starting'}", file=sys.stderr)
        return
    said = f"it is {state.state}" + (f": {state.reason}" if state.reason else "") if state else "nobody has heard of it"
    raise NotConnected(
        f"looking for {service} of node {node} at {bus.url}: {said}",
        hint=f"`mindstream status` lists who is there; services.enabled on {node} must name {service}",
        reason="not there",
    )


def print_json(data: Any) -> None:
    """``data`` (structs, builtins) as indented JSON on stdout."""
    import msgspec

    # str for what JSON has not: paths.
    print(msgspec.json.format(msgspec.json.encode(data, enc_hook=str), indent=2).decode())


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str = "", empty: str = "") -> None:
    """A table on stdout, or the line ``empty`` when there is no row."""
    from rich.console import Console

    # Into a pipe or a file there is no width to keep to.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    if not rows and empty:
        console.print(empty, markup=False)
        return
    console.print(make_table(columns, rows, title=title))


def make_table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str = "") -> Any:
    """A rich table; cells are plain text, whatever they hold."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from edge.text import printable

    table = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for column in columns:
        # Folded, never cut: half a fingerprint or path is worth nothing.
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(str(cell)), style=_STYLES.get(str(cell), "")) for cell in row))
    return table


_STYLES = {
    "ready": "green",
    "ok": "green",
    "init": "yellow",
    "warning": "yellow",
    "degraded": "yellow",
    "failed": "bold red",
    "lost": "red",
    "late": "yellow",
    "silent": "red",
    "sleeping": "blue",
    "disconnected": "dim",
}
