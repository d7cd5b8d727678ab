"""Handing over: how long until a conversation goes on on another node, against reading it again there.

Real nodes (model runners in processes of their own, each with the engine that it chooses) on a real broker, the mailbox
off, everything encrypted. Receivers reach the broker over links of several rates: those below loopback's are SIMULATED,
a proxy that shapes what passes (``bench.shaped_link``). Each receiver knows nothing of its link before its first
handoff, and that one counts as well. Reading again is measured in the same run, on the receiving nodes, by the engine
that they chose as the fastest, from the same text.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from bench.report import Figures
from bench.snapshot.frame import Bench
from bench.snapshot.texts import measured_texts
from bench.worker import CHECKOUT, worker
from broker.base import Broker
from broker.child import spawn
from broker.embedded import EmbeddedBroker
from broker.mosquitto import MosquittoBroker, find_mosquitto
from edge.bus import Bus
from edge.keys import Peers, load_or_create_identity
from protocol.codec import Received
from protocol.errors import ModelError, NotConnected
from protocol.ids import uuid7
from protocol.messages import (
    CodecName,
    ModelGenerate,
    ModelResume,
    ModelResumed,
    ModelSnapshot,
    RunDone,
    ServiceState,
    SnapshotSaved,
    SnapshotWishes,
)

HOLDER, NEAR = "holder", "near"
MBIT = 1e6
RATES_BITS = (1 * MBIT, 10 * MBIT, 100 * MBIT, 1000 * MBIT, 10_000 * MBIT)
LENGTHS = (64, 256, 1_024, 64, 256, 1_024, 4_096)
"""Of the prompts that each receiver takes over, in this order."""
LONG, LONG_TOKENS = "long", 4_096
BUS_RUNGS: tuple[CodecName, ...] = ("raw", "int8", "rotated4")
"""Exact, and near-lossless without a basis."""
SLACK, SLACK_S = 1.1, 0.05
START_S = 180.0
TTL_MS = 300_000
LONG_ROUNDS = 3
_TOML = """\
[node]
name = {name}
data_dir = {data}
[broker]
url = {url}
[services]
enabled = ["model_runner"]
[bus]
mailbox_mib = 0
[model]
name = {model}
threads = {threads}
conversations_in_memory = {memory}
parked_mib = 0
"""


def part(bench: Bench) -> Figures:
    """The ``ttft_`` figures, and how handoffs compare with reading again over links of several rates."""
    rates = (10 * MBIT,) if bench.quick else RATES_BITS
    lengths = (40, 80) if bench.quick else LENGTHS
    long_tokens = 160 if bench.quick else LONG_TOKENS
    brokers: type[Broker] = MosquittoBroker if find_mosquitto() is not None else EmbeddedBroker
    with contextlib.ExitStack() as ending:
        folder = Path(ending.enter_context(tempfile.TemporaryDirectory(prefix="mindstream-bench-")))
        broker = ending.enter_context(brokers())
        bus = ending.enter_context(Bus(url=broker.url, node="asker", client="bench"))
        names = [HOLDER, NEAR, *(_name(rate) for rate in rates)]
        _trust_each_other(folder, names)
        run = _Run(bench, folder, bus, broker.url)
        ending.enter_context(run.node(HOLDER, broker.url, memory=3 + len(lengths)))
        run.read_at_holder(lengths, long_tokens)
        with run.node(NEAR, broker.url):
            figures = run.long(long_tokens, 1 if bench.quick else LONG_ROUNDS)
            ratios = run.handoffs("loopback", NEAR, lengths)
        for rate in rates:
            port = int(broker.url.rpartition(":")[2])
            with worker("bench.shaped_link", "link", str(port), str(rate)) as link:
                url = f"mqtt://127.0.0.1:{link.read()}"
                with run.node(_name(rate), url):
                    ratios += run.handoffs(f"{rate / MBIT:g} Mbit/s (simulated)", _name(rate), lengths)
    ordered = sorted(ratios)
    return figures | {
        "handoff_p95_over_recompute": round(ordered[math.ceil(0.95 * len(ordered)) - 1], 3),
        "handoff_median_over_recompute": round(statistics.median(ordered), 3),
        "handoff_worst_over_recompute": round(ordered[-1], 3),
        "handoffs": len(ordered),
        "handoff_links": ", ".join(["loopback", *(f"{rate / MBIT:g} Mbit/s (simulated)" for rate in rates)]),
        "handoff_ways": ", ".join(sorted(run.ways)),
        "handoff_broker": brokers.__name__.removesuffix("Broker").lower(),
    }


def _conversation(number: int, tokens: int) -> tuple[str, int]:
    """Name and length of what a receiver takes over as so many-th: another each time, so that it has nothing of it."""
    return f"p{number}-{tokens}", tokens


def _name(rate: float) -> str:
    return f"far{round(rate / MBIT)}"


def _trust_each_other(folder: Path, names: list[str]) -> None:
    identities = {name: load_or_create_identity(folder / name, name) for name in names}
    for name, other in itertools.permutations(names, 2):
        Peers(folder / name, identities[name]).trust(other, identities[other].fingerprint)


class _Run:
    """Everything that the nodes are asked."""

    def __init__(self, bench: Bench, folder: Path, bus: Bus, url: str) -> None:
        self._bench = bench
        self._folder = folder
        self._bus = bus
        self._url = url
        self._states: dict[str, ServiceState] = {}
        self._changed = threading.Condition()
        self._corpus = bench.chat.encode("\n\n".join(measured_texts().values()), special=False)
        self._fresh = itertools.count(1)
        self._reading_s: dict[int, list[float]] = {}
        self.ways: set[str] = set()
        bus.hear(ServiceState, self._hear)

    def _hear(self, message: Received) -> None:
        if message.topic.names["service"] != "model_runner":
            return
        with self._changed:
            self._states[message.node] = message.data
            self._changed.notify_all()

    @contextlib.contextmanager
    def node(self, name: str, url: str, memory: int = 1) -> Iterator[None]:
        """A node of its own process, ready; ended with this context."""
        options = self._bench.options
        settings = {
            "name": name,
            "data": str(self._folder / name),
            "url": url,
            "model": options.name or str(options.folder),
        }
        said = {key: json.dumps(value) for key, value in settings.items()}
        config = self._folder / f"{name}.toml"
        config.write_text(_TOML.format(**said, threads=options.threads, memory=memory))
        environment = {key: value for key, value in os.environ.items() if not key.startswith("MINDSTREAM_")}
        with (self._folder / f"{name}.log").open("wb") as log:
            process = spawn(
                [sys.executable, "-m", "edge.supervisor", "--config", str(config)],
                stdout=log,
                stderr=log,
                cwd=CHECKOUT,
                env=environment,
            )
        try:
            with self._changed:
                ready = self._changed.wait_for(
                    lambda: self._state(name) in ("ready", "degraded") or process.poll() is not None, START_S
                )
            if not ready or self._state(name) != "ready":
                log_text = (self._folder / f"{name}.log").read_text(errors="replace")[-1500:]
                raise NotConnected(f"measuring: {name} is not ready", hint=log_text, reason="not ready")
            details = self._states[name].details
            self._bench.progress(f"{name} runs {details['engine']} {details.get('precision', '')} {details['dtype']}")
            yield
        finally:
            process.terminate()
            process.wait()

    def _state(self, name: str) -> str:
        found = self._states.get(name)
        return found.state if found else ""

    # --- reading --------------------------------------------------------------------------------------------

    def _prompt(self, tokens: int) -> list[int]:
        """Of the text, begun somewhere else each time: nothing of it is in memory from before."""
        at = 17 * next(self._fresh)
        return self._corpus[at : at + tokens]

    def read_at_holder(self, lengths: tuple[int, ...], long_tokens: int) -> None:
        """A conversation for each handoff, and the long one; each with one token of its answer."""
        for name, tokens in [*map(_conversation, range(len(lengths)), lengths), (LONG, long_tokens)]:
            ask = ModelGenerate(name, prompt_tokens=self._prompt(tokens), max_new_tokens=1, ignore_eos=True, keep=True)
            started_s = time.perf_counter()
            self._bus.ask(HOLDER, ask, ttl_ms=TTL_MS)
            took_s = time.perf_counter() - started_s
            self._bench.progress(f"the holder has read {tokens:,} tokens in {took_s:.2f} s")

    def read_again(self, node: str, tokens: int) -> float:
        """Seconds to read so many tokens on ``node``: to the first token, less what another token takes."""
        ask = ModelGenerate(
            f"r-{uuid7()}", prompt_tokens=self._prompt(tokens), max_new_tokens=4, ignore_eos=True, keep=False
        )
        done: RunDone = self._bus.ask(node, ask, ttl_ms=TTL_MS)
        assert done.usage is not None
        assert done.usage.cached_tokens == done.usage.shared_tokens == 0, "a prompt was in memory already"
        return done.usage.ttft_ms / 1000 - 1 / done.usage.tokens_per_s

    def _first_token(self, node: str, name: str) -> float:
        started_s = time.perf_counter()
        self._bus.ask(node, ModelGenerate(name, max_new_tokens=1, ignore_eos=True, keep=False), ttl_ms=TTL_MS)
        return time.perf_counter() - started_s

    def _resume(self, node: str, ask: ModelResume) -> tuple[float, ModelResumed]:
        started_s = time.perf_counter()
        resumed: ModelResumed = self._bus.ask(node, ask, ttl_ms=TTL_MS)
        return time.perf_counter() - started_s, resumed

    # --- a long one, to its first token ---------------------------------------------------------------------

    def long(self, tokens: int, rounds: int) -> Figures:
        """From this disk, and over the broker, to the first token; against reading and the first token."""
        name = LONG
        kept = {rung: saved for rung in BUS_RUNGS if (saved := self._saved_faithfully(HOLDER, name, rung))}
        rungs = [f"bus_{rung}" for rung in kept]
        times: dict[str, list[float]] = {kind: [] for kind in ("read", "disk", "disk_warm", "bus_handoff", *rungs)}
        said: dict[str, ModelResumed] = {}
        for number in range(rounds):
            times["read"].append(self.read_again(NEAR, tokens))
            handoff = ModelResume("", HOLDER, source=name, way="chunks", lossy=True)
            times["bus_handoff"].append(self._timed("bus_handoff", handoff, name, said))
            for kind, snapshot in zip(rungs, kept.values(), strict=True):
                ask = ModelResume(snapshot, HOLDER, way="chunks", lossy=True)
                times[kind].append(self._timed(kind, ask, name, said))
            own = self._saved(NEAR, name)
            for kind in ("disk", "disk_warm"):
                if kind == "disk":
                    self._forget_pages(NEAR)
                times[kind].append(self._timed(kind, ModelResume(own, NEAR, way="chunks"), name, said))
            line = ", ".join(f"{kind} {values[-1]:.2f} s" for kind, values in times.items())
            self._bench.progress(f"{tokens:,} tokens to the first, round {number + 1}: {line}")
        medians = {kind: statistics.median(values) for kind, values in times.items()}
        quickest = min(rungs, key=lambda kind: medians[kind])
        found = said[quickest].fidelity
        return {
            "ttft_tokens": tokens,
            "ttft_read_s": round(medians["read"], 3),
            "ttft_speedup_4k_disk": round(medians["read"] / medians["disk"], 1),
            "ttft_disk_rung": said["disk"].way,
            "ttft_disk_s": round(medians["disk"], 3),
            "ttft_disk_warm_s": round(medians["disk_warm"], 3),
            "ttft_speedup_4k_bus": round(medians["read"] / medians[quickest], 1),
            "ttft_bus_rung": said[quickest].way,
            "ttft_bus_s": round(medians[quickest], 3),
            "ttft_bus_mb": round(said[quickest].size_bytes / 1e6, 2),
            "ttft_bus_mean_kl": found.mean_kl if found else 0.0,
            "ttft_bus_top1": found.top1 if found else 1.0,
            **{
                f"ttft_speedup_4k_{kind}": round(medians["read"] / medians[kind], 1) for kind in ("bus_handoff", *rungs)
            },
            "ttft_bus_handoff_rung": said["bus_handoff"].way,
            "ttft_bus_handoff_s": round(medians["bus_handoff"], 3),
        }

    def _timed(self, kind: str, ask: ModelResume, name: str, said: dict[str, ModelResumed]) -> float:
        if kind.startswith("bus"):
            self._forget_chunks(NEAR)
        took_s, resumed = self._resume(NEAR, ask)
        assert resumed.how != "recomputed", f"{kind}: {resumed.reason}"
        said[kind] = resumed
        phases = resumed.phases
        self._bench.progress(f"  {kind}: {resumed.way}, {took_s:.2f} s, {phases}")
        return took_s + self._first_token(NEAR, name)

    def _saved(self, node: str, name: str, rung: CodecName = "raw") -> str:
        saved: SnapshotSaved = self._bus.ask(node, ModelSnapshot(name, wishes=SnapshotWishes(rung)), ttl_ms=TTL_MS)
        return saved.snapshot

    def _saved_faithfully(self, node: str, name: str, rung: CodecName) -> str:
        """A snapshot by this rung; none where its self-test on this text says that it is not near-lossless."""
        try:
            return self._saved(node, name, rung)
        except ModelError as error:
            self._bench.progress(f"  {error}: left out")
            return ""

    def _forget_chunks(self, node: str) -> None:
        """Take away what the node has stored: every byte is to cross the broker again."""
        for path in (self._folder / node / "model_runner" / "snapshots").rglob("*"):
            if path.is_file() and not path.name.startswith("."):
                path.unlink(missing_ok=True)

    def _forget_pages(self, node: str) -> None:
        """Let the kernel drop what it holds of the node's snapshots, so that they are read from the disk."""
        for path in (self._folder / node / "model_runner" / "snapshots").rglob("*"):
            # One that is being synced may be moved just now.
            with contextlib.suppress(FileNotFoundError, IsADirectoryError), path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    # --- handoffs over links --------------------------------------------------------------------------------

    def handoffs(self, link: str, node: str, lengths: tuple[int, ...]) -> list[float]:
        """Of each handoff its time over 1.1 times reading again and 50 ms."""
        ratios = []
        for name, tokens in map(_conversation, range(len(lengths)), lengths):
            before_s = self._reading(node, tokens)
            took_s, resumed = self._resume(node, ModelResume("", HOLDER, source=name))
            # Before and after it, as what else the machine does changes.
            reading_s = (before_s + self._reading(node, tokens)) / 2
            ratios.append(took_s / (SLACK * reading_s + SLACK_S))
            self.ways.add(resumed.way)
            self._bench.progress(
                f"{link}, {tokens:,} tokens: {took_s:.2f} s by {resumed.way}, read again {reading_s:.2f} s, "
                f"{ratios[-1]:.2f} of what is allowed" + (f"; {resumed.reason}" if resumed.reason else "")
            )
        return ratios

    def _reading(self, node: str, tokens: int) -> float:
        """Seconds to read so many: measured each time, but of the longest three times at most."""
        known = self._reading_s.setdefault(tokens, [])
        if tokens < LONG_TOKENS or len(known) < LONG_ROUNDS:
            known.append(self.read_again(node, tokens))
            return known[-1]
        return statistics.median(known)
