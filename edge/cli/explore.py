"""The command snapshot explore: a conversation moved token by token, on a terminal or from a pipe."""

from __future__ import annotations

import math
import re
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from edge.cli.context import EXIT_FAILED, JsonOption, NodeOption, connected, expect_service, load, print_error

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edge.bus import Bus
    from protocol.messages import ModelStepped

STEP_TTL_MS = 120_000
COMMANDS = """\
Enter        take the token marked *, the sampler's own
2            take the second of those shown
n 10         follow the sampler ten tokens on
b, b 3       take back the last command, the last three
s, s LABEL   save it as it stands, as a checkpoint of that name
r ID         go to a snapshot
p SPEC       prune it: last:512, window:4,1000, heavy:0.5, anchors:0.5
k 20         show the twenty likeliest from now on
?            these lines
q            end
Any other line is appended as it stands; one that begins with a space is never a command."""


def explore(
    start: Annotated[
        str,
        typer.Argument(
            metavar="[ID|CONVERSATION]",
            help="A snapshot, or a conversation of the node, of which a copy is moved. Without it: a text that is read "
            "first.",
        ),
    ] = "",
    top: Annotated[int, typer.Option(help="How many of the likeliest tokens are shown.", min=1, max=100)] = 10,
    temperature: Annotated[float, typer.Option(help="Of a text: 0 takes the likeliest.", min=0, max=100)] = 0.0,
    seed: Annotated[int, typer.Option(help="Of a text: the same seed draws the same.", min=0)] = 0,
    node: NodeOption = "",
    json: JsonOption = False,
) -> None:
    """Go through a conversation token by token: see what could come, take it, go back, save, prune.

    Nothing of it is kept but what is saved. `?` lists the commands.
    """
    from protocol.errors import MindstreamError, NotConnected

    config = load()
    target = node or config.node.name
    with connected(config) as bus:
        expect_service(bus, target, "model_runner")
        walk = _Walk(bus, target, top, json, local=target == config.node.name)
        lines = _lines()
        failed = False
        try:
            if start:
                walk.begin(start)
            else:
                print("begin with a text:", file=sys.stderr)
                walk.begin_text(next(lines, ""), temperature, seed)
            for line in lines:
                if line == "q":
                    break
                try:
                    walk.do(line)
                    failed = False
                except NotConnected:
                    raise
                except (MindstreamError, typer.BadParameter) as error:
                    failed = True
                    print_error(error) if isinstance(error, MindstreamError) else print(error, file=sys.stderr)
        finally:
            walk.end()
        if failed and not sys.stdin.isatty():
            # A script wants to know that its last command did not do.
            raise typer.Exit(EXIT_FAILED)


def _lines() -> Iterator[str]:
    """What is typed, or comes by a pipe, line by line; Ctrl-C and Ctrl-D end it."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    import readline  # noqa: F401 - gives input() its history and line editing

    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


class _Walk:
    """One conversation in the model runner, and where it has been."""

    def __init__(self, bus: Bus, target: str, top: int, json: bool, *, local: bool) -> None:
        from protocol.ids import uuid7

        self._bus = bus
        self._target = target
        self._top = top
        self._json = json
        self._local = local
        self._name = f"explore-{uuid7()}"
        self._begun = False
        self._tokens: list[int] = []
        """Its length before each command that can be taken back."""
        self._now: ModelStepped | None = None

    def begin(self, start: str) -> None:
        """From a snapshot, or a copy of a conversation."""
        from protocol.errors import NotFound

        if self._local and ("@" in start or re.fullmatch("[0-9a-fA-F]{4,64}", start)):
            from edge.cli.held import held

            try:
                found = held().find(start)
            except NotFound:
                if "@" in start:
                    raise
            else:
                self._resume(found)
                return
        elif re.fullmatch("[0-9a-f]{64}", start):
            self._resume(start)
            return
        self._step(source=start)

    def begin_text(self, text: str, temperature: float, seed: int) -> None:
        """From a text of its own. Raises typer.BadParameter where there is none."""
        if not text:
            raise typer.BadParameter("no text came to begin with")
        self._step(text=text, temperature=temperature, seed=seed)

    def do(self, line: str) -> None:
        """One command."""
        assert self._now is not None
        word, _, rest = line.partition(" ")
        if line == "?":
            print(COMMANDS)
        elif not line:
            self._take(self._now.sampled)
        elif line.isdecimal():
            if not 1 <= int(line) <= len(self._now.choices):
                raise typer.BadParameter(f"{line} is none of the {len(self._now.choices)} that are shown")
            self._take(self._now.choices[int(line) - 1].token)
        elif word in ("b", "n", "k") and (rest.isdecimal() or (word == "b" and not rest)):
            self._counted(word, int(rest or 1))
        elif word == "s":
            self._save(rest)
        elif word == "r" and rest:
            self._resume(rest if not self._local else self._found(rest))
        elif word == "p" and rest:
            self._prune(rest)
        else:
            self._tokens.append(self._now.tokens)
            self._step(text=line)

    def _counted(self, word: str, count: int) -> None:
        assert self._now is not None
        if word == "k":
            self._top = max(1, min(100, count))
            self._step()
        elif word == "n":
            before = self._now.tokens
            for left in reversed(range(count)):
                if self._now.sampled < 0 or self._now.ended:
                    break
                self._step(take=[self._now.sampled], quiet=left > 0)
            self._tokens.append(before)
        else:
            if count > len(self._tokens):
                raise typer.BadParameter(f"no more than {len(self._tokens)} commands can be taken back")
            aim = self._tokens[-count]
            self._step(back=self._now.tokens - aim)
            del self._tokens[-count:]

    def _take(self, token: int) -> None:
        assert self._now is not None
        if token < 0:
            raise typer.BadParameter("the context is full: go back, or end")
        before = self._now.tokens
        self._step(take=[token])
        self._tokens.append(before)

    def _found(self, named: str) -> str:
        from edge.cli.held import held

        return held().find(named)

    def _save(self, label: str) -> None:
        from edge.cli.snapshot_asks import told
        from edge.text import printable
        from protocol.messages import ModelSnapshot

        saved = told(self._bus, self._target, ModelSnapshot(self._name, label), "saving")
        said = f"saved {saved.snapshot[:12]}, {saved.tokens:,} tokens, {saved.size_bytes / 1e6:,.2f} MB"
        print(printable(f"{said}: mindstream snapshot resume {saved.snapshot[:12]} --as NAME"), file=sys.stderr)
        if self._json:
            _print_line(saved)

    def _resume(self, identifier: str, note: str = "") -> None:
        from edge.cli.snapshot_asks import ANY_KL, told
        from protocol.messages import ModelResume

        ask = ModelResume(identifier, self._target, self._name, way="chunks", lossy=True, keep=False)
        # Whoever looks at a snapshot wants to see what it has become: any certificate will do.
        ask.most_kl, ask.least_top1 = ANY_KL, 0.0
        resumed = told(self._bus, self._target, ask, "resuming")
        why = f" ({resumed.reason})" if resumed.reason else ""
        print(f"{note or identifier[:12]}: {resumed.tokens:,} tokens, {resumed.how}{why}", file=sys.stderr)
        self._tokens.clear()
        self._step()

    def _prune(self, spec: str) -> None:
        from edge.cli.snapshot_asks import told
        from protocol.messages import ModelSnapshot, SnapshotWishes

        wishes = SnapshotWishes(codec="raw", prune=spec)
        saved = told(self._bus, self._target, ModelSnapshot(self._name, f"pruned {spec}", wishes), "pruning")
        self._resume(saved.snapshot, f"pruned to {saved.kept_tokens:,} positions, {saved.snapshot[:12]}")

    def _step(self, *, quiet: bool = False, **asked: object) -> None:
        from protocol.messages import ModelStep

        ask = ModelStep(self._name, top=self._top, **asked)  # type: ignore[arg-type]
        self._now = self._bus.ask(self._target, ask, ttl_ms=STEP_TTL_MS)
        self._begun = True
        if not quiet:
            self._show(self._now)

    def _show(self, now: ModelStepped) -> None:
        from edge.text import printable

        if self._json:
            _print_line(now)
            return
        print(printable(f"…{now.text[-200:]}" if len(now.text) > 200 else now.text))
        ended = ", ended" if now.ended else ""
        note = f", {now.note}" if now.note else ""
        print(printable(f"  {now.tokens:,} tokens, entropy {now.entropy:.3f} nats{ended}{note}"))
        for number, each in enumerate(now.choices, 1):
            mark = "*" if each.token == now.sampled else " "
            print(printable(f" {mark}{number:>3}  {math.exp(each.logprob):.4f}  {each.text!r}"))
        if now.sampled >= 0 and all(each.token != now.sampled for each in now.choices):
            print(f" *     the sampler takes token {now.sampled}, which is not among these")
        sys.stdout.flush()

    def end(self) -> None:
        """Let it go in the runner, whatever came before."""
        from protocol.errors import MindstreamError
        from protocol.messages import ModelStep

        if self._begun:
            try:
                self._bus.ask(self._target, ModelStep(self._name, end=True), ttl_ms=10_000)
            except MindstreamError as error:
                print_error(error)


def _print_line(said: object) -> None:
    """One JSON object a line, for scripts that read as they write."""
    import msgspec

    print(msgspec.json.encode(said).decode(), flush=True)
