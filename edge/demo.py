"""The tour: two nodes on this machine, and the main job shown and proven on them.

``mindstream demo`` starts an embedded broker and two supervisors, ``tomato`` and ``sprout``, each with a data folder
of its own, trusting each other. A conversation on one is handed to the other, and the tour proves that its next 64
tokens are the ones the first would have said; something is remembered on one and recalled on the other. Then it
stays up with a live status table until Ctrl-C, or ends with ``--once``.
"""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from broker.child import spawn
from broker.embedded import EmbeddedBroker
from edge.bus import Bus
from edge.config import default_data_home, load_config
from edge.files import storage_errors
from edge.keys import Peers, load_or_create_identity
from edge.service_table import SERVICES
from edge.text import details_line
from protocol.codec import Received
from protocol.errors import MindstreamError, ModelError, NotConnected, StorageError
from protocol.ids import uuid7
from protocol.messages import (
    ChatMessage,
    MemoryPut,
    MemoryRecall,
    MemoryRecalled,
    ModelGenerate,
    ModelResume,
    ModelResumed,
    ModelSnapshot,
    NodeState,
    RunDone,
    RunToken,
    ServiceState,
    SnapshotSaved,
)

NODES = ("tomato", "sprout")
PROOF_TOKENS = 64
READY_TIMEOUT_S = 180.0
"""Converting the model takes a minute on a slow machine, once."""
ASK_TTL_MS = 120_000
TURNS = (("What is the capital of France?", 64), ("Tell me a story about a robot in Paris.", 48))
"""What is said to tomato, and how many tokens it may answer: the second answer is cut in mid-sentence."""
MEMORY = "The spare key is under the blue flower pot by the back door."
QUESTION = "where is the spare key"

STOP_TIMEOUT_S = 20.0


@dataclass
class Tour:
    """What the tour found, step by step."""

    console: Console
    timings_ms: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Time one step and print its line."""
        started_s = time.monotonic()
        yield
        self.timings_ms[what] = took_ms = (time.monotonic() - started_s) * 1000
        self.console.print(f"  [green]✓[/green] {what} [dim]{took_ms:,.0f} ms[/dim]")


class Flow:
    """Prints a model's words as they come, wrapped at the console's width and indented below the speaker."""

    INDENT = " " * 8

    def __init__(self, console: Console) -> None:
        self._console = console
        self._column = len(self.INDENT)
        self._word = ""

    def show(self, piece: str) -> None:
        """Print what is whole of ``piece``; a word waits for its end, because it may not fit the line."""
        for part in re.split(r"(\s)", piece):
            if part.isspace():
                self._flush()
                if part == "\n":
                    self._print("\n" + self.INDENT)
                    self._column = len(self.INDENT)
                elif self._column > len(self.INDENT):
                    self._print(" ")
                    self._column += 1
            else:
                self._word += part

    def end(self) -> None:
        """Print what waits, and end the line."""
        self._flush()
        self._print("\n")

    def _flush(self) -> None:
        if self._column + len(self._word) > self._console.width - 1:
            self._print("\n" + self.INDENT)
            self._column = len(self.INDENT)
        self._print(self._word)
        self._column += len(self._word)
        self._word = ""

    def _print(self, text: str) -> None:
        self._console.print(text, end="", markup=False, highlight=False, soft_wrap=True)


class Nodes:
    """Two nodes of this machine: configuration, trust, and a supervisor process each."""

    def __init__(self, folder: Path, broker_url: str) -> None:
        self._configs: dict[str, Path] = {}
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        with storage_errors(f"making the demo's folder {folder}"):
            for name in NODES:
                data_dir = folder / name
                data_dir.mkdir(parents=True, exist_ok=True)
                self._configs[name] = folder / f"{name}.toml"
                self._configs[name].write_text(
                    f'[node]\nname = "{name}"\ndata_dir = "{data_dir}"\n\n[broker]\nurl = "{broker_url}"\n'
                )
        identities = {name: load_or_create_identity(folder / name, name) for name in NODES}
        for name in NODES:
            for other in NODES:
                if other != name:
                    Peers(folder / name, identities[name]).trust(other, identities[other].fingerprint, replace=True)

    def services(self) -> list[str]:
        """Names of the services that each of them runs; some are off until they are switched on."""
        config = load_config(self._configs[NODES[0]])
        return [row.name for row in SERVICES if config.switched_on(row)]

    def start(self) -> None:
        """Start both supervisors."""
        for name, config in self._configs.items():
            command = [sys.executable, "-m", "edge.supervisor", "--config", str(config)]
            with (config.parent / f"{name}.log").open("ab") as log:
                self._children[name] = spawn(command, stdout=log, stderr=log)

    def check_alive(self) -> None:
        """Raises ModelError when a supervisor has ended, with the end of its log."""
        for name, child in self._children.items():
            if child.poll() is not None:
                log = self._configs[name].parent / f"{name}.log"
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
                raise NotConnected(f"node {name} ended with code {child.poll()}:\n{tail}", hint=f"its log is {log}")

    def stop(self) -> None:
        """Stop both, and wait for them."""
        for child in self._children.values():
            child.terminate()
        for child in self._children.values():
            try:
                child.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


class Watch:
    """The retained states of the two nodes and their services, as they change."""

    def __init__(self, bus: Bus, expected: Sequence[str]) -> None:
        self._expected = expected
        self.nodes: dict[str, NodeState] = {}
        self.services: dict[tuple[str, str], ServiceState] = {}
        bus.hear(NodeState, self._node)
        bus.hear(ServiceState, self._service)

    def _node(self, message: Received) -> None:
        self.nodes[message.node] = message.data

    def _service(self, message: Received) -> None:
        self.services[message.node, message.topic.names["service"]] = message.data

    def unready(self) -> list[str]:
        """What is not ready yet, each with its reason."""
        found = []
        for node in NODES:
            for service in self._expected:
                state = self.services.get((node, service))
                if state is None or state.state != "ready":
                    found.append(f"{node}/{service}" + (f": {state.reason}" if state and state.reason else ""))
        return found

    def failed(self) -> str:
        """Why the tour cannot go on, or nothing."""
        for (node, service), state in self.services.items():
            if state.state in ("degraded", "failed"):
                return f"{node}/{service} is {state.state}: {state.reason}"
        return ""

    def table(self) -> Table:
        """The live status table."""
        table = Table("node", "service", "state", "queue", "handled", "details", title="two nodes, one broker")
        for (node, service), state in sorted(self.services.items()):
            colour = {"ready": "green", "init": "yellow"}.get(state.state, "red")
            table.add_row(
                node,
                service,
                f"[{colour}]{state.state}[/{colour}]",
                str(state.queue),
                str(state.counters.get("handled", 0)),
                (state.reason or details_line(state.details))[:70],
            )
        return table


def main(*, once: bool, folder: Path | None = None, console: Console | None = None) -> int:
    """Run the tour; the exit code: 0, or 1 with the reason printed."""
    console = console or Console()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with contextlib.ExitStack() as cleanup:
            _tour(console, folder or default_data_home() / "demo", cleanup, once=once)
    except KeyboardInterrupt:
        console.print("stopped: every process has ended")
        return 0 if not once else 130
    except MindstreamError as error:
        console.print(f"[red]error:[/red] {error}", highlight=False)
        return 1
    return 0


def _tour(console: Console, folder: Path, cleanup: contextlib.ExitStack, *, once: bool) -> None:
    tour = Tour(console)
    console.print(f"[bold]Mindstream[/bold]: two nodes on this machine, in {folder}")
    with tour.step("an embedded broker, on loopback only"):
        broker = EmbeddedBroker()
        cleanup.callback(broker.stop)
        broker.start()
    nodes = Nodes(folder, broker.url)
    cleanup.callback(nodes.stop)
    with tour.step("tomato and sprout: supervisors, services, the model loaded on both"):
        nodes.start()
        bus = Bus(url=broker.url, node="demo", client="tour")
        cleanup.callback(bus.stop)
        watch = Watch(bus, nodes.services())
        bus.start()
        _wait_ready(console, nodes, watch)
    conversation = f"tour-{uuid7()}"
    _talk(tour, bus, conversation)
    _handoff(tour, bus, conversation)
    _remember(tour, bus)
    if once:
        return
    _stay(console, nodes, watch, broker)


def _wait_ready(console: Console, nodes: Nodes, watch: Watch) -> None:
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    with console.status("starting") as status:
        while unready := watch.unready():
            nodes.check_alive()
            if reason := watch.failed():
                raise ModelError(f"starting the tour: {reason}")
            if time.monotonic() > deadline_s:
                raise NotConnected(
                    f"starting the tour: after {READY_TIMEOUT_S:.0f} s these are not ready: {'; '.join(unready)}",
                    hint="the nodes' logs stand beside their folders",
                )
            status.update(f"waiting for {unready[0]}")
            time.sleep(0.05)


def _say(bus: Bus, node: str, ask: ModelGenerate, show: Callable[[str], None]) -> RunDone:
    """One run, its text shown as it comes."""
    run = uuid7()
    shown: list[str] = []

    def token(message: Received) -> None:
        shown.append(message.data.text)
        show(message.data.text)

    stop_hearing = bus.hear(RunToken, token, node=node, run=run)
    bus.wait_subscribed(30.0)
    try:
        ask.run = run
        done: RunDone = bus.ask(node, ask, ttl_ms=ASK_TTL_MS)
    finally:
        stop_hearing()
    deadline_s = time.monotonic() + 1.0
    while bus.queued and time.monotonic() < deadline_s:
        time.sleep(0.005)  # the answer overtakes tokens that wait for the handler thread
    show(done.text[len("".join(shown)) :])
    return done


def _talk(tour: Tour, bus: Bus, conversation: str) -> None:
    console = tour.console
    for text, limit in TURNS:
        console.print(f"\n[cyan]you[/cyan]     {text}")
        console.print("[red]tomato[/red]  ", end="")
        flow = Flow(console)
        started_s = time.monotonic()
        ask = ModelGenerate(conversation, [ChatMessage("user", text)], max_new_tokens=limit, temperature=0.2, seed=7)
        done = _say(bus, "tomato", ask, flow.show)
        flow.end()
        took_ms = (time.monotonic() - started_s) * 1000
        tour.timings_ms[f"tomato: {text}"] = took_ms
        usage = done.usage
        assert usage is not None
        console.print(
            f"  [green]✓[/green] {usage.completion_tokens} tokens [dim]{took_ms:,.0f} ms; first after "
            f"{usage.ttft_ms:,.0f} ms, {usage.cached_tokens} of {usage.prompt_tokens} prompt tokens were cached, "
            f"{usage.tokens_per_s:.0f} tokens/s[/dim]"
        )


def _handoff(tour: Tour, bus: Bus, conversation: str) -> None:
    """Hand the conversation over in the middle of its story, and prove that nothing changed."""
    console = tour.console
    console.print("\n[bold]handoff[/bold] tomato → sprout, in the middle of the story")
    with tour.step("tomato saves it: signed manifest, chunks"):
        saved: SnapshotSaved = bus.ask("tomato", ModelSnapshot(conversation), ttl_ms=ASK_TTL_MS)
    with tour.step(f"sprout fetches and restores it ({saved.size_bytes / 1e6:.1f} MB, {saved.tokens} tokens)"):
        resumed: ModelResumed = bus.ask(
            "sprout", ModelResume(saved.snapshot, "tomato", way="chunks"), ttl_ms=ASK_TTL_MS
        )
    if resumed.how != "exact":
        raise ModelError(f"handing {conversation} over: it was {resumed.how}, not exact: {resumed.reason}")
    go_on = ModelGenerate(conversation, max_new_tokens=PROOF_TOKENS, ignore_eos=True)
    console.print("[green]sprout[/green]  …", end="")
    flow = Flow(console)
    with tour.step(f"sprout goes on for {PROOF_TOKENS} tokens"):
        there = _say(bus, "sprout", go_on, flow.show)
        flow.end()
    with tour.step(f"tomato, asked to go on by itself, says its own next {PROOF_TOKENS}"):
        here = _say(bus, "tomato", go_on, lambda _: None)
    equal = sum(a == b for a, b in zip(there.tokens, here.tokens, strict=False))
    if there.tokens != here.tokens or len(here.tokens) != PROOF_TOKENS:
        raise ModelError(
            f"proving the handoff of {conversation}: {equal} of {PROOF_TOKENS} tokens are equal, all should be",
            hint="this is a defect of Mindstream: please report it with the output of `mindstream doctor --json`",
        )
    console.print(f"  [green]✓[/green] [bold]{equal} of {PROOF_TOKENS} tokens are the same[/bold]")


def _remember(tour: Tour, bus: Bus) -> None:
    console = tour.console
    console.print("\n[bold]memory[/bold] told to tomato, asked of sprout")
    with tour.step(f"tomato remembers: “{MEMORY}” (committed to disk)"):
        stored = bus.ask("tomato", MemoryPut(MEMORY, role="user"), ttl_ms=ASK_TTL_MS)
    with tour.step(f"sprout recalls it, asked “{QUESTION}”"):
        deadline_s = time.monotonic() + 60.0
        while True:
            found: MemoryRecalled = bus.ask("sprout", MemoryRecall(QUESTION, limit=3), ttl_ms=ASK_TTL_MS)
            if any(hit.id == stored.id for hit in found.hits):
                break
            if time.monotonic() > deadline_s:
                raise StorageError("recalling on sprout what tomato remembered: it did not arrive in 60 s")
            time.sleep(0.01)


def _stay(console: Console, nodes: Nodes, watch: Watch, broker: EmbeddedBroker) -> None:
    from rich.live import Live

    console.print(f"\nBoth nodes stay up; the broker is at {broker.url}. Ctrl-C ends everything.")
    with Live(watch.table(), console=console, refresh_per_second=2, transient=False) as live:
        while True:
            nodes.check_alive()
            live.update(watch.table())
            time.sleep(0.5)
