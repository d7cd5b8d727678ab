"""`mindstream status`: nodes, services, queues, drops, lag, broker and clocks, once or for as long as one looks; and
`mindstream sleep` and `wake`, for whoever suspends this machine."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge.cli.context import (
    EXIT_NOT_READY,
    JsonOption,
    connect,
    connected,
    expect_service,
    load,
    make_table,
    print_json,
)

if TYPE_CHECKING:
    from edge.status import NodeStatus, ServiceStatus, Status

PIPE_WIDTH = 200
"""Into a pipe or a file there is no width to keep to."""
SLEEP_TTL_MS = 5_000
SKEW_SHOWN_MS = 500.0
"""A smaller difference of clocks is the message's own way, or nobody's concern."""


def status(
    watch: Annotated[bool, typer.Option("--watch", help="Stay, and show changes as they come.")] = False,
    json: JsonOption = False,
    node: Annotated[
        str, typer.Option("--node", help="Node whose readiness is the exit code. Default: this one.", metavar="NODE")
    ] = "",
) -> None:
    """Show every node and service on the bus.

    Exits with 5 when the node is not ready, has fallen silent, or a service of it is failed, lost or silent.
    """
    from edge.status import StatusWatch
    from protocol.ids import check_name

    config = load()
    with connected(config, wait=False) as bus:
        states = StatusWatch(bus, config, check_name(node, "node") if node else config.node.name)
        connect(bus)
        states.wait_retained()
        if watch and not json:
            _stay(states)
            return
        found = states.look()
    if json:
        print_json(found)
    else:
        _print(found)
    if not found.ready:
        raise typer.Exit(EXIT_NOT_READY)


def sleep(json: JsonOption = False) -> None:
    """Say that this machine is about to be suspended.

    The node is then known as sleeping, not as lost. It wakes by itself; for a systemd unit see docs/monitoring.md.
    """
    from protocol.messages import NodeSleep

    _tell(NodeSleep(), json)


def wake(json: JsonOption = False) -> None:
    """Say that this machine is awake again. After a real suspend the node notices it by itself."""
    from protocol.messages import NodeWake

    _tell(NodeWake(), json)


def _tell(message: Any, json: bool) -> None:
    config = load()
    with connected(config) as bus:
        expect_service(bus, config.node.name, "presence")
        now = bus.ask(config.node.name, message, ttl_ms=SLEEP_TTL_MS)
    if json:
        print_json(now)
    else:
        print(f"{config.node.name} is {now.state}")


# --- what is shown ------------------------------------------------------------------------------------------


def _stay(states: Any) -> None:
    from rich.live import Live

    try:
        with Live(view(states.look()), refresh_per_second=4) as live:
            while True:
                time.sleep(0.5)
                live.update(view(states.look()))
    except KeyboardInterrupt:
        return


def _print(found: Status) -> None:
    from rich.console import Console

    Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH).print(view(found))


def view(found: Status) -> Any:
    """Everything, for a terminal of 100 columns or more."""
    from rich.console import Group
    from rich.text import Text

    from edge.text import printable

    lines: list[Any] = [Text(printable(_broker_line(found)), style="dim")]
    if not found.nodes:
        lines.append(Text("no node has said anything on this broker"))
        return Group(*lines)
    rows: list[list[object]] = []
    for name, node in found.nodes.items():
        rows.append([name, _state(node), _said(node), "", _lines(_because(node), _of_node(node), node.reason)])
        rows += [
            [
                f"  {service}",
                _state(each),
                _said(each),
                each.queue,
                _lines(_because(each), each.reason or _details(each.details), _troubles(each.counters)),
            ]
            for service, each in node.services.items()
        ]
    table = make_table(("node, service", "state", "said", "queue", "details; what was dropped, refused, failed"), rows)
    for column in table.columns[:-1]:
        column.no_wrap = True  # its words stay whole: the last column has what is left
    lines.append(table)
    if found.amiss:
        lines.append(Text(printable(f"{found.node} is not ready: " + "; ".join(found.amiss)), style="yellow"))
    return Group(*lines)


def _lines(*texts: str) -> str:
    return "\n".join(filter(None, texts))


def _of_node(node: NodeStatus) -> str:
    behind = f"{node.behind:,} memories behind" if node.behind else "no memory behind" if node.behind == 0 else ""
    skewed = node.skew_ms is not None and abs(node.skew_ms) >= SKEW_SHOWN_MS
    clock = f"clock {node.skew_ms / 1000:+,.1f} s" if node.skew_ms is not None and skewed else ""
    return ", ".join(filter(None, [f"version {node.version or '?'}", behind, clock]))


def _broker_line(found: Status) -> str:
    broker = found.broker
    since_s = time.time() - broker.connected_us / 1e6
    since = f", connected for {_span(since_s)}" if broker.connected_us and since_s >= 0 else ""
    unheard = "" if found.judged_by == "presence" else "; presence does not answer: who is late is judged by clocks"
    return f"broker {broker.url} ({broker.kind}, MQTT {broker.protocol}){since}{unheard}"


def _state(each: NodeStatus | ServiceStatus) -> str:
    return each.liveness if each.liveness in ("late", "silent") else each.state or "?"


def _because(each: NodeStatus | ServiceStatus) -> str:
    if each.liveness not in ("late", "silent"):
        return ""
    return f"{each.state} by its last word, silent for {_span(each.silent_s)}"


def _said(each: NodeStatus | ServiceStatus) -> str:
    # A will was written when its client connected: how old it is says nothing.
    return "" if each.state == "lost" or not each.said_us else f"{_span(each.silent_s)} ago"


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def _details(details: dict[str, Any]) -> str:
    from edge.text import details_line

    return details_line(details)


def _troubles(counters: dict[str, int]) -> str:
    """The counters that somebody should know of."""
    from edge.counters import TROUBLES

    return ", ".join(f"{name} {count}" for name, count in counters.items() if count and name.startswith(TROUBLES))
