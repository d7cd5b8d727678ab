"""Commands about memories: remember, recall."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from edge.cli.context import JsonOption, NodeOption, connected, expect_service, load, print_json, print_table


def remember(
    text: Annotated[str, typer.Argument(help="What to remember; - reads it from standard input.")],
    node: NodeOption = "",
    role: Annotated[str, typer.Option(help="Who said it: user, model, sensor or note.")] = "note",
    conversation: Annotated[str, typer.Option(help="Conversation that it belongs to.")] = "",
    private: Annotated[bool, typer.Option("--private", help="Never let it leave the node.")] = False,
    json: JsonOption = False,
) -> None:
    """Remember a text. Returns once it is committed to the node's disk."""
    from protocol.messages import MemoryPut, MemoryStored

    config = load()
    target = node or config.node.name
    put = MemoryPut(
        text=sys.stdin.read() if text == "-" else text,
        role=role,
        conversation=conversation,
        scope="private" if private else "everyone",
    )
    with connected(config) as bus:
        expect_service(bus, target, "memory_store")
        stored: MemoryStored = bus.ask(target, put, ttl_ms=config.bus.ask_ttl_ms)
    if json:
        print_json(stored)
    else:
        print(f"remembered on {stored.node} as number {stored.seq} ({stored.id})")


def recall(
    query: Annotated[str, typer.Argument(help="Words to look for.")],
    node: NodeOption = "",
    limit: Annotated[int, typer.Option(help="How many at most.", min=1, max=200)] = 10,
    json: JsonOption = False,
) -> None:
    """Find memories, best first.

    A node finds its own, and those of the nodes that it is in step with.
    """
    from protocol.messages import MemoryRecall, MemoryRecalled

    config = load()
    target = node or config.node.name
    with connected(config) as bus:
        expect_service(bus, target, "memory_store")
        found: MemoryRecalled = bus.ask(target, MemoryRecall(query, limit=limit), ttl_ms=config.bus.ask_ttl_ms)
    if json:
        print_json(found)
        return
    rows = [
        [f"{hit.score:.2f}", hit.node, time.strftime("%Y-%m-%d %H:%M", time.localtime(hit.time_us / 1e6)), hit.text]
        for hit in found.hits
    ]
    print_table(("score", "node", "when", "text"), rows, empty="nothing found")
    if found.truncated:
        print(f"{found.truncated} more were left out: the answer would have been too large", file=sys.stderr)
