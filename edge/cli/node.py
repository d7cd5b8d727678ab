"""Commands about a node as a whole: up, status, demo, doctor, version."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge.cli.context import (
    CONNECT_TIMEOUT_S,
    EXIT_FAILED,
    JsonOption,
    connected,
    load,
    make_table,
    print_json,
    print_table,
    settings,
)
from edge.text import details_line

if TYPE_CHECKING:
    from edge.bus import Bus
    from protocol.codec import Received

RETAINED_QUIET_S = 0.25
"""Retained messages come one after another, at once: after this long without one there are no more."""
RETAINED_LONGEST_S = 3.0


def up() -> None:
    """Run this node until Ctrl-C.

    It starts the node's services, and an embedded broker when broker.url is empty, and keeps them running.
    """
    from edge.config import find_config, load_config
    from edge.logs import set_up_logging
    from edge.supervisor import supervise

    path = settings.config_path or find_config()
    config = load_config(path)
    set_up_logging(config, "supervisor", prefix=True)
    supervise(config, path)


class _States:
    """What nodes and services said last of themselves."""

    def __init__(self, bus: Bus) -> None:
        from protocol.messages import NodeState, ServiceState

        self.nodes: dict[str, Any] = {}
        self.services: dict[str, dict[str, Any]] = {}
        self.heard_s = time.monotonic()
        bus.hear(NodeState, self._hear_node)
        bus.hear(ServiceState, self._hear_service)

    def _hear_node(self, message: Received) -> None:
        self.nodes[message.node] = message.data
        self.heard_s = time.monotonic()

    def _hear_service(self, message: Received) -> None:
        self.services.setdefault(message.node, {})[message.topic.names["service"]] = message.data
        self.heard_s = time.monotonic()

    def wait_retained(self) -> None:
        """Wait until the retained states have come."""
        deadline_s = time.monotonic() + RETAINED_LONGEST_S
        self.heard_s = time.monotonic()
        while time.monotonic() < min(deadline_s, self.heard_s + RETAINED_QUIET_S):
            time.sleep(0.01)

    def as_json(self) -> dict[str, Any]:
        return {
            name: {"state": self.nodes.get(name), "services": dict(sorted(self.services.get(name, {}).items()))}
            for name in sorted({*self.nodes, *self.services})
        }

    def rows(self) -> list[list[object]]:
        rows: list[list[object]] = []
        for name in sorted({*self.nodes, *self.services}):
            node = self.nodes.get(name)
            if node is not None:
                rows.append([name, "", node.state, _age(node.time_us), "", "", f"version {node.version or '?'}"])
            for service, state in sorted(self.services.get(name, {}).items()):
                rows.append(
                    [
                        name,
                        service,
                        state.state,
                        _age(state.time_us),
                        state.queue,
                        _troubles(state.counters),
                        state.reason or details_line(state.details),
                    ]
                )
        return rows


_COLUMNS = ("node", "service", "state", "said", "queue", "dropped, refused, failed", "details")


def status(
    watch: Annotated[bool, typer.Option("--watch", help="Stay, and show changes as they come.")] = False,
    json: JsonOption = False,
) -> None:
    """Show every node and service on the bus."""
    with connected(load(), wait=False) as bus:
        states = _States(bus)
        bus.start(CONNECT_TIMEOUT_S)
        states.wait_retained()
        if json:
            print_json(states.as_json())
        elif watch:
            _watch_states(states)
        else:
            print_table(_COLUMNS, states.rows(), empty="no node has said anything on this broker")


def _watch_states(states: _States) -> None:
    from rich.live import Live

    try:
        with Live(make_table(_COLUMNS, states.rows()), refresh_per_second=4) as live:
            while True:
                time.sleep(0.5)
                live.update(make_table(_COLUMNS, states.rows()))
    except KeyboardInterrupt:
        return


def _age(time_us: int) -> str:
    """How long ago it was said, by this machine's clock."""
    age_s = time.time() - time_us / 1e6
    if age_s < -2:
        return f"in {-age_s:.0f} s?"
    return f"{max(0.0, age_s):.0f} s ago" if age_s < 120 else f"{age_s / 60:.0f} min ago"


def _troubles(counters: dict[str, int]) -> str:
    """The counters that somebody should know of."""
    kinds = ("dropped", "refused", "failed", "lost", "expired", "dead")
    return ", ".join(f"{name} {count}" for name, count in counters.items() if count and name.startswith(kinds))


def demo(
    once: Annotated[bool, typer.Option("--once", help="End after the tour instead of staying up.")] = False,
) -> None:
    """Tour the main job on two nodes of this machine.

    Then both stay up, with a live view, until Ctrl-C.
    """
    from edge.demo import main

    raise typer.Exit(main(once=once))


def doctor(json: JsonOption = False) -> None:
    """Check this node, and say what to type next.

    Looks at packages, configuration, data folder, broker, keys, model and clock.
    """
    from edge.doctor import examine

    checks = examine(settings.config_path)
    if json:
        print_json(checks)
    else:
        for check in checks:
            print(f"{check.verdict:8} {check.name:14} {check.found}")
            if check.next_step:
                print(f"{'':23} next: {check.next_step}")
    if any(check.verdict == "failed" for check in checks):
        raise typer.Exit(EXIT_FAILED)


def version(json: JsonOption = False) -> None:
    """Print versions."""
    import platform

    from edge.text import mindstream_version
    from protocol.codec import VERSION
    from protocol.topics import ROOT

    found = {
        "mindstream": mindstream_version(),
        "envelope": VERSION,
        "topics": ROOT,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    if json:
        print_json(found)
    else:
        for name, value in found.items():
            print(f"{name} {value}")
