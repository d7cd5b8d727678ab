"""The commands of the group snapshot that ask a model runner: save, prune, transcode, resume, timeline."""

from __future__ import annotations

import concurrent.futures
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from edge.cli.context import JsonOption, NodeOption, connected, expect_service, load, print_json, print_table

if TYPE_CHECKING:
    from edge.bus import Bus
    from protocol.codec import Received
    from protocol.messages import ModelResume, ModelSnapshot, SnapshotSaved, SnapshotTranscode, SnapshotWishes

TTL_MS = 600_000
"""A big one takes its time: a self-test reads tokens again, a slow link carries what there is."""
CODECS = ("auto", "raw", "lossless", "int8", "rotated4", "transform", "tokens")

IdArgument = Annotated[
    str,
    typer.Argument(
        metavar="ID",
        help="Its id, or as many of its first digits as are its alone; CONVERSATION@LABEL; or CONVERSATION, of which "
        "it is the newest.",
    ),
]
LabelOption = Annotated[str, typer.Option(help="A name for this checkpoint: it is then CONVERSATION@LABEL.")]
CodecOption = Annotated[
    str,
    typer.Option(
        metavar="|".join(CODECS),
        help="auto: the smallest whose self-test is faithful enough; tokens: no KV, token ids alone.",
    ),
]
KlOption = Annotated[
    Optional[float],  # noqa: UP045 - typer reads the annotation at run time, on Python 3.10 too
    typer.Option("--most-kl", min=0, help="Mean divergence that it may have, nats a token.", show_default="0.02"),
]
Top1Option = Annotated[
    Optional[float],  # noqa: UP045 - as above
    typer.Option("--least-top1", min=0, max=1, help="Share of equal likeliest tokens.", show_default="0.94"),
]
BudgetOption = Annotated[
    str,
    typer.Option(
        "--budget", metavar="10x", help="So many times smaller than 16 bits a number, by pruning and codec together."
    ),
]
MOST_RATIO = 1000
ANY_KL = 1e9
"""Whatever its certificate says."""
WAYS = ("chunks", "tokens", "auto")
PRUNERS = "last:512, window:4,1000, heavy:0.5, anchors:0.5"


def save(
    conversation: Annotated[str, typer.Argument(help="The conversation to save; it may be being answered.")],
    label: LabelOption = "",
    codec: CodecOption = "",
    most_kl: KlOption = None,
    least_top1: Top1Option = None,
    prune: Annotated[str, typer.Option(metavar="SPEC", help=f"Keep these positions alone: {PRUNERS}.")] = "",
    budget: BudgetOption = "",
    node: NodeOption = "",
    json: JsonOption = False,
) -> None:
    """Save a conversation as it is now, between two tokens."""
    from protocol.messages import ModelSnapshot

    _check_name(conversation, "CONVERSATION")
    wishes = _wishes(codec, most_kl, least_top1, prune, budget)
    _saved(node, lambda _bus, _target: ModelSnapshot(conversation, label, wishes), f"saving {conversation}", json)


def prune(
    snapshot: IdArgument,
    spec: Annotated[str, typer.Argument(metavar="SPEC", help=f"Which positions are kept: {PRUNERS}.")] = "",
    budget: BudgetOption = "",
    label: LabelOption = "",
    codec: CodecOption = "",
    most_kl: KlOption = None,
    least_top1: Top1Option = None,
    node: NodeOption = "",
    json: JsonOption = False,
) -> None:
    """Make a smaller snapshot of one, with fewer of its positions. The first stays."""
    from protocol.messages import SnapshotTranscode, SnapshotWishes

    if not spec and not budget:
        raise typer.BadParameter("say which positions are kept, or how small it is to be with --budget")

    def asked(bus: Bus, target: str) -> SnapshotTranscode:
        identifier, was = find(bus, target, load().node.name, snapshot)
        # Its own codec, but a budget is met by the one that suits it.
        named = codec or ("auto" if budget else was or "raw")
        wishes = _wishes(named, most_kl, least_top1, spec, budget)
        return SnapshotTranscode(identifier, wishes or SnapshotWishes(), label)

    _saved(node, asked, f"pruning {snapshot[:40]}", json)


def transcode(
    snapshot: IdArgument,
    codec: CodecOption,
    most_kl: KlOption = None,
    least_top1: Top1Option = None,
    label: LabelOption = "",
    node: NodeOption = "",
    json: JsonOption = False,
) -> None:
    """Make another snapshot of one, encoded otherwise. The first stays."""
    from protocol.messages import SnapshotTranscode, SnapshotWishes

    wishes = _wishes(codec, most_kl, least_top1, "", "") or SnapshotWishes()

    def asked(bus: Bus, target: str) -> SnapshotTranscode:
        identifier, _ = find(bus, target, load().node.name, snapshot)
        return SnapshotTranscode(identifier, wishes, label)

    _saved(node, asked, f"transcoding {snapshot[:40]}", json)


def resume(
    snapshot: IdArgument,
    name: Annotated[str, typer.Option("--as", help="Its name from now on: another than it has is a branch.")] = "",
    source: Annotated[str, typer.Option("--from", metavar="NODE", help="Node that holds it. Default: this.")] = "",
    way: Annotated[
        str,
        typer.Option(
            metavar="|".join(WAYS),
            help="chunks: its KV wherever it can be used; tokens: read again; auto: what is predicted to be quicker.",
        ),
    ] = "chunks",
    lossy: Annotated[
        bool, typer.Option("--lossy", help="KV will do that is not exact; else its tokens are read again.")
    ] = False,
    most_kl: KlOption = None,
    least_top1: Top1Option = None,
    node: NodeOption = "",
    json: JsonOption = False,
) -> None:
    """Go on with a saved conversation, or branch from it."""
    from protocol.messages import ModelResume

    if way not in WAYS:
        raise typer.BadParameter(f"{way!r} is none of {', '.join(WAYS)}", param_hint="--way")
    if name:
        _check_name(name, "--as")
    config = load()
    target = node or config.node.name
    holder = source or target
    ask = ModelResume("", holder, name, way=way, lossy=lossy, explain=json)  # type: ignore[arg-type]
    if most_kl is not None:
        ask.most_kl = most_kl
    if least_top1 is not None:
        ask.least_top1 = least_top1
    with connected(config) as bus:
        for each in {target, holder}:
            expect_service(bus, each, "model_runner")
        ask.snapshot, _ = find(bus, holder, config.node.name, snapshot)
        found = told(bus, target, ask, f"resuming {snapshot[:40]}")
    if json:
        print_json(found)
        return
    from edge.text import printable

    why = f" ({found.reason})" if found.reason else ""
    said = [f"{found.tokens:,} tokens, {found.how}{why}"]
    if found.fidelity is not None:
        from edge.cli.held import said_fidelity

        wanted = found.fidelity
        said.append(said_fidelity(wanted.tested_tokens, wanted.mean_kl, wanted.top1, wanted.measured))
    if found.logits:
        said.append(f"its first step against the saved logits: {found.logits}")
    said.append(
        (f"fetched {found.size_bytes / 1e6:,.1f} MB in {found.transfer_ms:.0f} ms, " if holder != target else "")
        + f"restored in {found.restore_ms:.0f} ms"
    )
    there = f" --node {target}" if node else ""
    print(printable(f"{found.conversation} on {target}: " + "; ".join(said)))
    print(printable(f"go on: mindstream chat{there} -c {found.conversation}"))


def timeline(
    conversation: Annotated[str, typer.Argument(help="The conversation.")],
    node: NodeOption = "",
    json: JsonOption = False,
) -> None:
    """The points that a conversation can return to, the oldest first."""
    from edge.cli.held import local_time
    from protocol.messages import SnapshotTimeline, SnapshotTimelineAsk

    _check_name(conversation, "CONVERSATION")
    config = load()
    target = node or config.node.name
    with connected(config) as bus:
        expect_service(bus, target, "model_runner")
        found: SnapshotTimeline = bus.ask(target, SnapshotTimelineAsk(conversation), ttl_ms=60_000)
    if json:
        print_json(found)
        return
    rows = [
        [
            each.snapshot[:12],
            local_time(each.time_us),
            f"{each.tokens:,}",
            each.label or each.why,
            "" if each.surprise is None else f"{each.surprise:.2f}",
            "" if each.salience is None else f"{each.salience:.2f}",
            each.codec,
            f"{each.size_bytes / 1e6:,.2f}",
            f"{each.own_bytes / 1e6:,.2f}",
            " ".join(each.text.split())[-60:],
        ]
        for each in found.moments
    ]
    columns = ("snapshot", "time", "tokens", "label", "surprise", "salience", "codec", "MB", "own MB", "text")
    print_table(columns, rows, empty=f"{target} holds no snapshot of {conversation}")
    if rows:
        print("return to one: mindstream snapshot resume ID --as NAME")


def find(bus: Bus, holder: str, own: str, named: str) -> tuple[str, str]:
    """The id of what somebody calls a snapshot of ``holder``, and its codec where that is known; ``own`` is this node.

    Raises NotFound, and typer.BadParameter for the first digits of another node's.
    """
    if holder == own:
        from edge.cli.held import held

        here = held()
        identifier = here.find(named)
        manifest = here.manifests().get(identifier)
        return identifier, manifest.codec.name if manifest is not None else ""
    if re.fullmatch("[0-9a-f]{64}", named):
        return named, ""
    from protocol.errors import NotFound
    from protocol.ids import NAME_PATTERN
    from protocol.messages import SnapshotTimelineAsk

    conversation, _, label = named.partition("@")
    if not NAME_PATTERN.fullmatch(conversation):
        raise typer.BadParameter(f"{named[:80]!r} is neither an id of 64 digits nor CONVERSATION@LABEL")
    found = bus.ask(holder, SnapshotTimelineAsk(conversation), ttl_ms=60_000)
    moments = [each for each in found.moments if label in ("", each.label)]
    if not moments:
        raise NotFound(
            f"looking for snapshot {named[:80]}: {holder} has none of that name",
            hint="of another node's snapshots give all 64 digits, or CONVERSATION@LABEL",
            field="snapshot",
        )
    return moments[-1].snapshot, moments[-1].codec


def _check_name(name: str, option: str) -> None:
    """Raises typer.BadParameter for what is no conversation's name."""
    from protocol.ids import NAME_PATTERN

    if not NAME_PATTERN.fullmatch(name):
        raise typer.BadParameter(
            f"{name[:80]!r} is no conversation's name: a-z, 0-9, - and _, at most 63 of them, the first a letter or "
            "digit",
            param_hint=option,
        )


def _wishes(
    codec: str, most_kl: float | None, least_top1: float | None, prune: str, budget: str
) -> SnapshotWishes | None:
    """None where nothing is asked for: it is then encoded as the node's configuration says."""
    from protocol.messages import SnapshotWishes

    if codec and codec not in CODECS:
        raise typer.BadParameter(f"{codec!r} is none of {', '.join(CODECS)}", param_hint="--codec")
    if not any((codec, prune, budget)) and most_kl is None and least_top1 is None:
        return None
    exact = not budget and most_kl is None and least_top1 is None
    wishes = SnapshotWishes(codec=codec or ("raw" if exact else "auto"), prune=prune)  # type: ignore[arg-type]
    if budget:
        ratio = re.fullmatch(r"(\d+(?:\.\d+)?)x?", budget)
        if ratio is None or not 1 <= float(ratio[1]) <= MOST_RATIO:
            raise typer.BadParameter(f"{budget!r} is no ratio from 1x to {MOST_RATIO}x", param_hint="--budget")
        wishes.budget_ratio = float(ratio[1])
        # Smaller is what is asked; how faithful it has to be is only where that is said, too.
        wishes.most_kl, wishes.least_top1 = ANY_KL, 0.0
    if most_kl is not None:
        wishes.most_kl = most_kl
    if least_top1 is not None:
        wishes.least_top1 = least_top1
    return wishes


Asked = Callable[["Bus", str], "ModelSnapshot | SnapshotTranscode"]
"""What to ask, once there is a bus and the node that is asked."""


def _saved(node: str, asked: Asked, title: str, json: bool) -> None:
    """Ask for a snapshot and say what came of it."""
    from edge.cli.held import said_fidelity
    from edge.text import printable

    config = load()
    target = node or config.node.name
    with connected(config) as bus:
        expect_service(bus, target, "model_runner")
        ask = asked(bus, target)
        found: SnapshotSaved = told(bus, target, ask, title)
    if json:
        print_json(found)
        return
    for line in found.tried:
        print(printable(f"not {line}"))
    label = f"@{found.label}" if found.label else ""
    kept = f", {found.kept_tokens:,} of them kept" if found.kept_tokens and found.kept_tokens < found.tokens - 1 else ""
    source = getattr(ask, "snapshot", "")
    ratio = f", {found.ratio:.1f} times smaller than 16 bits a number" if found.ratio >= 1.05 else ""
    print(
        printable(
            f"{found.snapshot[:12]}  {found.conversation}{label}: {found.tokens:,} tokens{kept}, {found.codec}, "
            f"{found.size_bytes / 1e6:,.2f} MB{ratio}, in {found.took_ms:.0f} ms"
            + (f", made of {source[:12]}" if source else "")
        )
    )
    if found.fidelity is not None:
        wanted = found.fidelity
        print(said_fidelity(wanted.tested_tokens, wanted.mean_kl, wanted.top1, wanted.measured))


def told(
    bus: Bus, target: str, ask: ModelSnapshot | SnapshotTranscode | ModelResume, title: str, ttl_ms: int = TTL_MS
) -> Any:
    """The answer to a long ask, with a bar meanwhile. Ctrl-C cancels it, and waits until nothing of it is left; a
    second one gives up waiting. Raises typer.Exit then."""
    from edge.cli.context import EXIT_INTERRUPTED
    from edge.cli.progress import phases
    from protocol.errors import Cancelled, MindstreamError
    from protocol.ids import uuid7
    from protocol.messages import ModelCancel, SnapshotProgress

    ask.run = uuid7()
    stopped = ""
    with phases(title) as on_phase:

        def show(message: Received) -> None:
            said: SnapshotProgress = message.data
            on_phase(said.phase, said.done_bytes, said.total_bytes)

        stop_hearing = bus.hear(SnapshotProgress, show, node=target, run=ask.run)
        cancelled = False
        try:
            bus.wait_subscribed(5.0)
            answer = bus.ask_later(target, ask, ttl_ms=ttl_ms)
            while not stopped:
                try:
                    # With a timeout, so that Ctrl-C is heard.
                    return answer.result(timeout=0.2)
                except concurrent.futures.TimeoutError:
                    # AskExpired is the future's own error; this one is only our patience.
                    if answer.done():
                        raise
                except Cancelled:
                    if not cancelled:
                        raise
                    stopped = "stopped, nothing of it is kept"
                except KeyboardInterrupt:
                    try:
                        cancelled = not cancelled and bus.ask(target, ModelCancel(ask.run), ttl_ms=5_000).found
                    except (MindstreamError, KeyboardInterrupt):
                        cancelled = False
                    if not (cancelled or answer.done()):
                        stopped = f"waited for no longer; it may go on at {target}"
        finally:
            stop_hearing()
    print(f"{title}: {stopped}", file=sys.stderr)
    raise typer.Exit(EXIT_INTERRUPTED)
