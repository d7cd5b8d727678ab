"""`mindstream bench endpoint`: what the OpenAI-compatible endpoint costs against asking over the bus.

One node (supervisor, model runner, gateway) on an embedded broker answers the same question, greedily, through the
endpoint's stream and over the bus with its tokens heard, in turn. Each way is timed from the question to the last
token, in the same client process; medians are compared.
"""

from __future__ import annotations

import contextlib
import http.client
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from bench.report import Figures, Progress, machine, silent, versions
from broker.child import spawn
from broker.embedded import EmbeddedBroker
from edge.bus import Bus
from edge.config import load_config
from edge.gateway_token import read_token, token_file
from protocol.codec import Received
from protocol.errors import MindstreamError, ModelUnavailable
from protocol.ids import uuid7
from protocol.messages import ChatMessage, ModelGenerate, RunDone, RunToken, ServiceState

NODE = "bench"
QUESTION = "Tell me a long story about a robot in Paris."
START_S = 120.0
TTL_MS = 120_000


def run(*, quick: bool = False, progress: Progress = silent, model: str = "") -> Figures:
    """Measure. ``model`` is a name or folder; empty: the configured default. Raises ModelUnavailable."""
    rounds, tokens = (3, 48) if quick else (11, 192)
    with tempfile.TemporaryDirectory(prefix="mindstream-bench-") as folder, EmbeddedBroker() as broker:
        config = Path(folder) / "mindstream.toml"
        port = broker_port()
        config.write_text(
            f'[node]\nname = "{NODE}"\ndata_dir = "{folder}/data"\n[broker]\nurl = "{broker.url}"\n'
            f'[services]\nenabled = ["model_runner", "gateway"]\n[gateway]\nport = {port}\n'
            + (f'[model]\nname = "{model}"\n' if model else "")
        )
        with (Path(folder) / "log").open("wb") as log, Bus(url=broker.url, node="bencher", client="bench") as bus:
            arguments = [sys.executable, "-m", "edge.supervisor", "--config", str(config)]
            node = spawn(arguments, stdout=log, stderr=log)
            try:
                name = _wait_ready(bus, node)
                token = read_token(token_file(load_config(config, {})))
                return _measure(bus, port, token, name, rounds, tokens, progress)
            finally:
                node.terminate()
                node.wait(30)


def broker_port() -> int:
    """A free port of loopback."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _wait_ready(bus: Bus, node: subprocess.Popen[bytes]) -> str:
    """Until model and endpoint are ready; the model's name."""
    states: dict[str, ServiceState] = {}
    bus.hear(ServiceState, lambda message: states.update({message.topic.names["service"]: message.data}), node=NODE)
    deadline_s = time.monotonic() + START_S
    while not all(name in states and states[name].state == "ready" for name in ("model_runner", "gateway")):
        if time.monotonic() > deadline_s or node.poll() is not None:
            raise ModelUnavailable(
                f"starting a node to measure: { ({name: state.reason for name, state in states.items()}) }",
                hint="mindstream doctor",
                reason="not ready",
            )
        time.sleep(0.1)
    return Path(str(states["model_runner"].details["model"])).name


def _measure(bus: Bus, port: int, token: str, name: str, rounds: int, tokens: int, progress: Progress) -> Figures:
    ways: dict[str, Callable[[], tuple[float, int]]] = {
        "direct": lambda: _direct(bus, tokens),
        "endpoint": lambda: stream_chat(port, token, name, QUESTION, tokens),
    }
    for way in ways.values():
        way()
    rates: dict[str, list[float]] = {each: [] for each in ways}
    for number in range(rounds):
        # Each is first as often as the other.
        for each in sorted(ways, reverse=bool(number % 2)):
            took_s, count = ways[each]()
            rates[each].append(count / took_s)
        progress(", ".join(f"{each} {values[-1]:.1f} tokens/s" for each, values in rates.items()))
    direct, endpoint = (statistics.median(rates[each]) for each in ("direct", "endpoint"))
    return {
        "http_overhead_ratio": round(endpoint / direct, 4),
        "http_overhead_ratio_pairs": round(
            statistics.median(b / a for a, b in zip(rates["direct"], rates["endpoint"], strict=True)), 4
        ),
        "endpoint_tokens_per_s": round(endpoint, 1),
        "direct_tokens_per_s": round(direct, 1),
        "tokens": tokens,
        "rounds": rounds,
        "model": name,
        "baseline": "the same question over the bus, its tokens heard by the asker",
        "machine": machine(),
        "versions": versions("paho-mqtt", "starlette", "uvicorn"),
    }


def _direct(bus: Bus, tokens: int) -> tuple[float, int]:
    """Seconds and tokens of one answer over the bus."""
    run = uuid7()
    heard: list[int] = []
    changed = threading.Condition()

    def hear(message: Received) -> None:
        with changed:
            heard.append(message.data.index)
            changed.notify()

    began_s = time.perf_counter()
    stop_hearing = bus.hear(RunToken, hear, node=NODE, run=run)
    bus.wait_subscribed(10.0)
    ask = ModelGenerate(f"direct-{run}", [ChatMessage("user", QUESTION)], run=run, max_new_tokens=tokens, keep=False)
    done: RunDone = bus.ask(NODE, ask, ttl_ms=TTL_MS)
    with changed:
        changed.wait_for(lambda: len(heard) >= len(done.tokens), 10.0)
    took_s = time.perf_counter() - began_s
    stop_hearing()
    return took_s, len(done.tokens)


def stream_chat(port: int, token: str, model: str, text: str, tokens: int) -> tuple[float, int]:
    """Seconds and tokens of one streamed chat completion, from the question to the end of the stream.

    What comes is read as it comes and looked into afterwards: on two cores this program's work would count against the
    endpoint's. Raises MindstreamError when it refuses.
    """
    body = msgspec.json.encode(
        {
            "model": model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    began_s = time.perf_counter()
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=TTL_MS / 1000)) as connection:
        connection.request("POST", "/v1/chat/completions", body, headers)
        reply = connection.getresponse()
        found = bytearray()
        while some := reply.read1():
            found += some
        took_s = time.perf_counter() - began_s
    events = [event[6:] for event in bytes(found).split(b"\n\n") if event.startswith(b"data: {")]
    if reply.status != 200 or not events or "usage" not in (last := msgspec.json.decode(events[-1])):
        raise MindstreamError(f"asking the endpoint: {reply.status} {bytes(found)[-500:]!r}")
    return took_s, int(last["usage"]["completion_tokens"])
