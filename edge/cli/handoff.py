"""The command handoff."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from edge.cli.context import JsonOption, connected, expect_service, load, print_json, print_table

if TYPE_CHECKING:
    from protocol.messages import HandoffOption, HandoffPhases, ModelResumed

Way = Literal["auto", "chunks", "tokens"]
WAYS: dict[str, Way] = {"auto": "auto", "chunks": "chunks", "tokens": "tokens"}
PHASES = ("ask", "save", "transfer", "decode", "prefill")


def handoff(
    conversation: Annotated[str, typer.Argument(help="The conversation to hand over.")],
    source: Annotated[str, typer.Option("--from", help="Node that has it.", metavar="NODE")],
    target: Annotated[str, typer.Option("--to", help="Node that shall go on with it.", metavar="NODE")],
    name: Annotated[str, typer.Option("--as", help="Its name there. Default: the same.")] = "",
    way: Annotated[
        str,
        typer.Option(
            metavar="WAY",
            help="auto: what is predicted to be quicker; chunks: its KV cache, exactly; tokens: they are read again.",
        ),
    ] = "auto",
    lossy: Annotated[
        bool, typer.Option("--lossy", help="Let its KV cache be compressed with loss, where that is quicker.")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print each way, its predicted time and why not, and what happened.")
    ] = False,
    timeout_s: Annotated[float, typer.Option(help="Longest time for all of it.", min=1, max=600)] = 120,
    json: JsonOption = False,
) -> None:
    """Move a conversation to another node.

    Its KV cache goes there, exactly, and the other node goes on with the very next step; or its tokens are read again
    there, where that is predicted to be quicker. The nodes decide by what they have measured.
    """
    from edge.cli.snapshot_asks import told
    from protocol.messages import ModelResume

    chosen = _way(way)
    started_s = time.monotonic()
    with connected(load()) as bus:
        for node in (source, target):
            expect_service(bus, node, "model_runner")
        ask = ModelResume("", source, name, conversation, way=chosen, lossy=lossy, explain=explain or json)
        resumed: ModelResumed = told(
            bus, target, ask, f"handing {conversation[:40]} over to {target}", int(timeout_s * 1000)
        )
    total_ms = (time.monotonic() - started_s) * 1000
    if json:
        print_json({"resumed": resumed, "total_ms": total_ms})
        return
    if explain:
        _explain(resumed)
    why = f" ({resumed.reason})" if resumed.reason else ""
    print(
        f"{target}: {resumed.how}{why}; {resumed.tokens} tokens by {resumed.way}, {resumed.size_bytes / 1e6:.1f} MB, "
        f"in {resumed.transfer_ms + resumed.restore_ms:.0f} ms\n"
        f"{resumed.conversation} goes on at {target} after {total_ms:.0f} ms:"
        f" mindstream chat --node {target} -c {resumed.conversation}"
    )


def _way(given: str) -> Way:
    if given not in WAYS:
        raise typer.BadParameter(f"{given!r} is none of {', '.join(WAYS)}", param_hint="--way")
    return WAYS[given]


def _explain(resumed: ModelResumed) -> None:
    columns = ("way", "MB", "predicted ms", *(f"{phase} ms" for phase in PHASES), "why not")
    rows: list[list[object]] = [
        [
            option.way,
            f"{option.size_bytes / 1e6:,.2f}",
            "not known" if option.predicted_ms is None else f"{option.predicted_ms:,.0f}",
            *_cells(option.phases),
            option.reason or "taken",
        ]
        for option in resumed.options
    ]
    happened = sum(_values(resumed.phases))
    rows.append(
        [
            f"happened: {resumed.way}",
            f"{resumed.size_bytes / 1e6:,.2f}",
            f"{happened:,.0f}",
            *_cells(resumed.phases),
            resumed.reason if _other(resumed.options, resumed.way) else "",
        ]
    )
    print_table(columns, rows)


def _other(options: list[HandoffOption], way: str) -> bool:
    """Whether something else came of it than was decided."""
    return bool(options) and options[0].way != way


def _values(phases: HandoffPhases | None) -> list[float]:
    return [0.0 if phases is None else getattr(phases, f"{phase}_ms") for phase in PHASES]


def _cells(phases: HandoffPhases | None) -> list[str]:
    return [f"{value:,.0f}" if value else "" for value in _values(phases)]
