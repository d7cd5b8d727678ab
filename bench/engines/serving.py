"""What a user of a node sees: a real node (embedded broker, model runner, endpoint), asked over the bus and by HTTP.

Times are taken where tokens arrive, in this process; so the scheduler, sampling and the bus are all in them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.endpoint import stream_chat
from bench.engines.options import Options
from bench.report import Figures, Progress
from broker.child import spawn
from edge.bus import Bus
from edge.config import ModelConfig
from edge.node_lock import running_in
from protocol.codec import Received
from protocol.errors import MindstreamError, NotConnected
from protocol.ids import uuid7
from protocol.messages import ChatMessage, ModelCancel, ModelGenerate, RunToken, ServiceState

NODE = "bench"
START_TIMEOUT_S = 180.0
ANSWER_MS = 600_000
TOKENS_TIMEOUT_S = 300.0
GAP_TOKENS = 24
"""Tokens of each stream before the long prompt comes: their gaps are the usual ones."""
_FOLDERS = "MINDSTREAM_MODELS"
_CHECKOUT = Path(__file__).resolve().parents[2]

KEYS = (
    "batch8_throughput_ratio",
    "batch8_tokens_per_s",
    "one_by_one_tokens_per_s",
    "stall_max_ratio",
    "stall_worst_ratio",
    "stall_max_ms",
    "usual_gap_ms",
    "prompt_ttft_ratio",
    "prompt_ttft_ms",
    "prompt_ttft_idle_ms",
    "http_overhead_ratio",
    "http_tokens_per_s",
    "direct_tokens_per_s",
)


def measure(options: Options, corpus: list[int], progress: Progress) -> Figures:
    """Of the fastest engine that the node chooses (plain keys), and of torch (``torch_``) where that is another."""
    figures: Figures = dict.fromkeys(KEYS)
    figures["serving_engine"] = None
    choices = ["auto"]
    if "engine" in ModelConfig.__struct_fields__ and options.model.built.get("int8-cpu"):
        choices.append("transformers")
    for choice in choices:
        with _node(options, choice) as node:
            progress(f"serving with {node.engine}")
            found: Figures = {**_batch(node, options, corpus, progress), **_stall(node, options, corpus, progress)}
            if choice == "auto":
                figures |= {**found, **_http(node, options, progress), "serving_engine": node.engine}
            else:
                figures |= {f"torch_{key}": value for key, value in found.items()}
    return figures


# --- together, and one after another ----------------------------------------------------------------------------


def _batch(node: Node, options: Options, corpus: list[int], progress: Progress) -> Figures:
    together, alone = [], []
    tokens = options.streams * options.stream_tokens
    prompts = _prompts(corpus, options.stream_prompt_tokens)
    for number in range(options.rounds + 1):
        started = time.perf_counter()
        for run in [node.ask(next(prompts), options.stream_tokens) for _ in range(options.streams)]:
            run.wait()
        took = tokens / (time.perf_counter() - started)
        started = time.perf_counter()
        for _ in range(options.streams):
            node.ask(next(prompts), options.stream_tokens).wait()
        took_alone = tokens / (time.perf_counter() - started)
        if number or options.quick:  # The first round warms up.
            together.append(took)
            alone.append(took_alone)
        progress(f"{options.streams} together {took:.1f} tokens/s, one after another {took_alone:.1f}")
    rate, alone_rate = statistics.median(together), statistics.median(alone)
    return {
        "batch8_throughput_ratio": round(rate / alone_rate, 3),
        "batch8_tokens_per_s": round(rate, 1),
        "one_by_one_tokens_per_s": round(alone_rate, 1),
    }


# --- a long prompt among running streams ------------------------------------------------------------------------


def _stall(node: Node, options: Options, corpus: list[int], progress: Progress) -> Figures:
    ratios, longest_ms, usual_ms, busy_s, idle_s = [], [], [], [], []
    long_prompts = _prompts(corpus, options.long_prompt_tokens, start=5)
    prompts = _prompts(corpus, options.stream_prompt_tokens, start=9)
    for _ in range(options.rounds):
        idle = node.ask(next(long_prompts), 2)
        idle.wait()
        idle_s.append(idle.first_token_s)
        streams = [node.ask(next(prompts), options.stream_tokens + 2_000) for _ in range(options.streams)]
        for stream in streams:
            stream.wait_tokens(GAP_TOKENS)
        asked_at = time.perf_counter()
        usual = statistics.median(gap for stream in streams for gap in stream.gaps(0.0, asked_at)[GAP_TOKENS // 4 :])
        newcomer = node.ask(next(long_prompts), 2)
        newcomer.wait_tokens(1)
        answered_at = newcomer.arrivals[0]
        for stream in streams:  # one more of each, so that the gap in which the first token came is seen whole
            stream.wait_tokens(len(stream.arrivals) + 1)
        longest = max(gap for stream in streams for gap in stream.gaps(asked_at, answered_at))
        for stream in streams:
            stream.cancel()
        for run in [*streams, newcomer]:
            run.wait()
        busy_s.append(newcomer.first_token_s)
        ratios.append(longest / usual)
        longest_ms.append(longest * 1000)
        usual_ms.append(usual * 1000)
        progress(
            f"usual gap {usual_ms[-1]:.1f} ms, longest {longest_ms[-1]:.1f} ms; first token of "
            f"{options.long_prompt_tokens:,} tokens after {busy_s[-1]:.2f} s, idle {idle_s[-1]:.2f} s"
        )
    return {
        "stall_max_ratio": round(statistics.median(ratios), 2),
        "stall_worst_ratio": round(max(ratios), 2),
        "stall_max_ms": round(statistics.median(longest_ms), 1),
        "usual_gap_ms": round(statistics.median(usual_ms), 1),
        "prompt_ttft_ratio": round(statistics.median(busy_s) / statistics.median(idle_s), 3),
        "prompt_ttft_ms": round(statistics.median(busy_s) * 1000, 1),
        "prompt_ttft_idle_ms": round(statistics.median(idle_s) * 1000, 1),
    }


def _prompts(corpus: list[int], tokens: int, start: int = 0) -> Iterator[list[int]]:
    """Prompts that begin differently, so that none can use what was read for another."""
    step = 1_009
    at = start * 131
    while True:
        yield corpus[at : at + tokens]
        at = (at + step) % (len(corpus) - tokens)


# --- HTTP -------------------------------------------------------------------------------------------------------

_TALES = ("a lighthouse", "two rivers", "a lost key", "the first snow", "an old train", "a quiet market", "a storm")


def _http(node: Node, options: Options, progress: Progress) -> Figures:
    if not node.port:
        return {}
    count = options.stream_tokens if options.quick else 128
    rates: dict[str, list[float]] = {"direct": [], "http": []}
    for number in range(options.rounds + 1):
        for kind in ("direct", "http") if number % 2 else ("http", "direct"):
            tale = f"Write a long story about {_TALES[number % len(_TALES)]}, number {number} of the {kind} ones."
            tokens, seconds = (_chat if kind == "http" else _direct)(node, tale, count)
            if number or options.quick:  # The first round warms up.
                rates[kind].append(tokens / seconds)
        progress(", ".join(f"{kind} {each[-1]:.1f} tokens/s" for kind, each in rates.items() if each))
    direct, over_http = statistics.median(rates["direct"]), statistics.median(rates["http"])
    return {
        "http_overhead_ratio": round(over_http / direct, 3),
        "http_tokens_per_s": round(over_http, 1),
        "direct_tokens_per_s": round(direct, 1),
    }


def _direct(node: Node, text: str, count: int) -> tuple[int, float]:
    started = time.perf_counter()
    run = node.ask([], count, messages=[ChatMessage("user", text)], ignore_eos=False)
    tokens = run.wait()
    return tokens, time.perf_counter() - started


def _chat(node: Node, text: str, count: int) -> tuple[int, float]:
    """Tokens and seconds of a streamed chat completion; the stream is read to its end."""
    seconds, tokens = stream_chat(node.port, node.token, node.model, text, count)
    return tokens, seconds


# --- the node ---------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One answer, as it arrives."""

    node: Node
    identifier: str
    asked_at: float
    done: Future[Any]
    arrivals: list[float]

    @property
    def first_token_s(self) -> float:
        """From the ask."""
        return self.arrivals[0] - self.asked_at

    def gaps(self, start: float, end: float) -> list[float]:
        """Seconds between tokens, of those gaps that end after ``start`` and begin before ``end``."""
        at = self.arrivals[:]
        return [after - before for before, after in itertools.pairwise(at) if after > start and before < end]

    def wait(self) -> int:
        """Until its end, and until all its tokens have arrived, which may be later than the end; how many. Raises
        what the runner answered."""
        usage = self.done.result(ANSWER_MS / 1000).usage
        tokens: int = usage.completion_tokens if usage is not None else 0
        self.wait_tokens(tokens)
        return tokens

    def wait_tokens(self, count: int) -> None:
        """Until ``count`` tokens have arrived. Raises what the runner answered instead."""

        def over() -> bool:
            return len(self.arrivals) >= count or (self.done.done() and self.done.exception() is not None)

        with self.node.arrived:
            if not self.node.arrived.wait_for(over, TOKENS_TIMEOUT_S):
                text = f"measuring: {len(self.arrivals)} of {count} tokens in {TOKENS_TIMEOUT_S:g} s"
                raise NotConnected(text, reason="slow")
        if len(self.arrivals) < count:
            self.done.result()

    def cancel(self) -> None:
        """Stop it."""
        self.node.bus.ask(NODE, ModelCancel(self.identifier), ttl_ms=30_000)


class Node:
    """A node under measurement."""

    def __init__(self, bus: Bus, port: int, token: str) -> None:
        self.bus = bus
        self.port = port
        self.token = token
        self.engine = ""
        self.model = ""
        self.arrived = threading.Condition()
        self._arrivals: dict[str, list[float]] = defaultdict(list)
        bus.hear(RunToken, self._hear, node=NODE)

    def ask(
        self, prompt: list[int], count: int, *, messages: list[ChatMessage] | None = None, ignore_eos: bool = True
    ) -> Run:
        """Ask for ``count`` tokens; answered as they come."""
        run = uuid7()
        ask = ModelGenerate(
            f"c-{run}",
            messages or [],
            prompt_tokens=prompt,
            run=run,
            max_new_tokens=count,
            ignore_eos=ignore_eos,
            keep=False,
        )
        arrivals = self._arrivals[run]
        asked_at = time.perf_counter()
        done = self.bus.ask_later(NODE, ask, ttl_ms=ANSWER_MS)
        done.add_done_callback(lambda _: self._notify())
        return Run(self, run, asked_at, done, arrivals)

    def _hear(self, message: Received) -> None:
        at = time.perf_counter()
        with self.arrived:
            self._arrivals[message.topic.names["run"]].append(at)
            self.arrived.notify_all()

    def _notify(self) -> None:
        with self.arrived:
            self.arrived.notify_all()


@contextlib.contextmanager
def _node(options: Options, choice: str) -> Iterator[Node]:
    """A node that serves the model, ready; ended with this context."""
    with tempfile.TemporaryDirectory(prefix="mindstream-bench-") as scratch:
        folder = Path(scratch)
        gateway = (_CHECKOUT / "services" / "gateway").is_dir() and choice == "auto"
        port = _free_port() if gateway else 0
        config = folder / "mindstream.toml"
        config.write_text(_toml(options, folder, choice, port))
        log_path = folder / "log"
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("MINDSTREAM_") or name == _FOLDERS
        }
        with log_path.open("wb") as log:
            process = spawn(
                [sys.executable, "-m", "edge.supervisor", "--config", str(config)],
                stdout=log,
                stderr=log,
                cwd=_CHECKOUT,
                env=environment,
            )
        try:
            with _connected(process, folder / "data") as (bus, wait_ready):
                token_file = folder / "data" / "gateway" / "token"
                node = Node(bus, port, "")
                state = wait_ready("model_runner")
                if gateway:
                    wait_ready("gateway")
                    node.token = token_file.read_text().strip()
                node.model = Path(str(state.details["model"])).name
                node.engine = f"{state.details['engine']} {state.details['dtype']}"
                yield node
        except MindstreamError as error:
            logs = [log_path, *(folder / "data" / "logs").glob("*.log")]
            error.hint = "\n".join(path.read_text(errors="replace")[-1500:] for path in logs)
            raise
        finally:
            process.terminate()
            process.wait()


def _toml(options: Options, folder: Path, choice: str, port: int) -> str:
    services = ["model_runner", *(["gateway"] if port else [])]
    lines = [
        "[node]",
        f'name = "{NODE}"',
        f"data_dir = {json.dumps(str(folder / 'data'))}",
        "[broker]",
        "port = 0",
        "[services]",
        f"enabled = {json.dumps(services)}",
        "[model]",
        f"name = {json.dumps(options.model.name)}",
        f"threads = {options.threads}",
        f"conversations_in_memory = {max(16, 2 * options.streams)}",
    ]
    if "engine" in ModelConfig.__struct_fields__:
        lines.append(f'engine = "{choice}"')
    if port:
        lines += ["[gateway]", f"port = {port}"]
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def _connected(process: subprocess.Popen[bytes], data_dir: Path) -> Iterator[tuple[Bus, Callable[[str], ServiceState]]]:
    """A client of the node's broker, and what waits for one of its services to be ready."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while (running := running_in(data_dir)) is None:
        if process.poll() is not None or time.monotonic() > deadline_s:
            raise NotConnected("measuring: the node did not start", reason="not started")
        time.sleep(0.01)
    states: dict[str, ServiceState] = {}
    changed = threading.Condition()

    def hear(message: Received) -> None:
        with changed:
            states[message.topic.names["service"]] = message.data
            changed.notify_all()

    def wait_ready(service: str) -> ServiceState:
        def state() -> str:
            found = states.get(service)
            return found.state if found else ""

        with changed:
            changed.wait_for(lambda: state() in ("ready", "degraded", "failed"), deadline_s - time.monotonic())
            if state() != "ready":
                reason = states[service].reason if service in states else "it said nothing"
                raise NotConnected(f"measuring: {service} is {state() or 'not there'}: {reason}", reason="not ready")
            return states[service]

    with Bus(url=running.broker_url, node="asker", client="bench") as bus:
        bus.hear(ServiceState, hear, node=NODE)
        yield bus, wait_ready


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
