"""Prometheus text on a local port, for every counter of every service of this node.

Presence hears all of them, so one port serves the node. Text format 0.0.4 and OpenMetrics, by prometheus_client.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from wsgiref.simple_server import WSGIServer

import psutil
from prometheus_client import start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from protocol.errors import BusError
from protocol.messages import ServiceState, Speaker
from services.presence.home_assistant import NODE_STATES, SERVICE_STATES
from services.presence.node import speaks_still

MAX_DETAILS = 500
"""Numbers of one service's details that are shown; more would be a memory of their own in the collector's database."""
_UNFIT = re.compile(r"[^a-z0-9_]+")


@dataclass
class Snapshot:
    """What is known at the moment of a scrape."""

    node: str
    version: str
    state: str
    services: Mapping[str, ServiceState]
    speakers: Sequence[Speaker] = ()
    starts: Mapping[str, int] = field(default_factory=dict)
    """How often each service was seen to begin."""


class NodeCollector(Collector):
    """Makes metrics of the snapshot that it is given at each scrape."""

    def __init__(self, look: Callable[[], Snapshot]) -> None:
        self._look = look

    def collect(self) -> Iterator[Metric]:
        """Every metric, as of now."""
        now = self._look()
        info = InfoMetricFamily("mindstream_node", "The node's version.", labels=["node"])
        info.add_metric([now.node], {"version": now.version})
        yield info
        yield _one_hot(
            "mindstream_node_state", "The node's state: 1 for the one that it is in.", now.state, NODE_STATES, now.node
        )
        yield from _services(now)
        yield from _counters(now)
        yield from _details(now)
        yield from _processes(now)
        yield from _peers(now)


def _one_hot(name: str, about: str, current: str, states: Sequence[str], node: str) -> Metric:
    found = GaugeMetricFamily(name, about, labels=["node", "state"])
    for state in states:
        found.add_metric([node, state], float(state == current))
    return found


def _services(now: Snapshot) -> Iterator[Metric]:
    labels = ["node", "service"]
    state = GaugeMetricFamily(
        "mindstream_service_state", "A service's state: 1 for the one that it is in.", labels=[*labels, "state"]
    )
    up = GaugeMetricFamily(
        "mindstream_service_up", "Whether the service is ready or degraded, and not silent.", labels=labels
    )
    queue = GaugeMetricFamily("mindstream_service_queue", "Messages received and not yet handled.", labels=labels)
    silent = GaugeMetricFamily("mindstream_service_last_seen_seconds", "Since the service's last word.", labels=labels)
    starts = CounterMetricFamily("mindstream_service_starts", "Processes of the service that were seen.", labels=labels)
    heard = {speaker.service: speaker for speaker in now.speakers if speaker.node == now.node and speaker.service}
    for name, each in sorted(now.services.items()):
        speaker = heard.get(name)
        alive = speaker is None or speaker.liveness in ("live", "unknown")
        for possible in SERVICE_STATES:
            state.add_metric([now.node, name, possible], float(possible == each.state))
        up.add_metric([now.node, name], float(each.state in ("ready", "degraded") and alive))
        queue.add_metric([now.node, name], each.queue)
        if speaker is not None:
            silent.add_metric([now.node, name], speaker.silent_s)
        starts.add_metric([now.node, name], now.starts.get(name, 0))
    yield from (state, up, queue, silent, starts)


def metric_name(counter: str) -> str:
    """``refused.not_found`` as ``mindstream_refused_not_found``; the text format adds ``_total``."""
    return "mindstream_" + (_UNFIT.sub("_", counter.lower()).strip("_") or "unnamed")


def _counters(now: Snapshot) -> Iterator[Metric]:
    found: dict[str, dict[str, int]] = {}
    meant: dict[str, str] = {}
    for service, state in now.services.items():
        for counter, count in state.counters.items():
            name = metric_name(counter)
            meant.setdefault(name, counter)
            by_service = found.setdefault(name, {})
            by_service[service] = by_service.get(service, 0) + count
    for name, by_service in sorted(found.items()):
        family = CounterMetricFamily(
            name, f"Counter {meant[name]} since the service's start.", labels=["node", "service"]
        )
        for service, count in sorted(by_service.items()):
            family.add_metric([now.node, service], count)
        yield family


def _details(now: Snapshot) -> Iterator[Metric]:
    family = GaugeMetricFamily(
        "mindstream_detail", "Numbers of what a service shows of itself.", labels=["node", "service", "name"]
    )
    for service, state in sorted(now.services.items()):
        for name, value in list(_numbers(state.details))[:MAX_DETAILS]:
            family.add_metric([now.node, service, name], value)
    yield family


def _numbers(details: Mapping[str, Any], path: str = "", depth: int = 4) -> Iterator[tuple[str, float]]:
    for name, value in details.items():
        if isinstance(value, (bool, int, float)):
            yield f"{path}{name}", float(value)
        elif isinstance(value, dict) and depth:
            yield from _numbers(value, f"{path}{name}.", depth - 1)


def _processes(now: Snapshot) -> Iterator[Metric]:
    labels = ["node", "service"]
    memory = GaugeMetricFamily(
        "mindstream_process_resident_memory_bytes", "Memory of the service's process.", labels=labels
    )
    cpu = CounterMetricFamily("mindstream_process_cpu_seconds", "CPU time of the service's process.", labels=labels)
    for service, state in sorted(now.services.items()):
        if state.state == "failed" or not speaks_still(state):
            continue  # what says `failed` is not the service
        try:
            process = psutil.Process(state.pid)
            with process.oneshot():
                resident, times = process.memory_info().rss, process.cpu_times()
        except psutil.Error:
            continue
        memory.add_metric([now.node, service], resident)
        cpu.add_metric([now.node, service], times.user + times.system)
    yield from (memory, cpu)


def _peers(now: Snapshot) -> Iterator[Metric]:
    labels = ["node", "peer"]
    live = GaugeMetricFamily(
        "mindstream_peer_live", "Whether another node speaks as often as it promised.", labels=labels
    )
    silent = GaugeMetricFamily("mindstream_peer_last_seen_seconds", "Since another node's last word.", labels=labels)
    skew = GaugeMetricFamily(
        "mindstream_peer_clock_skew_seconds", "How far another node's clock is ahead of this one's.", labels=labels
    )
    for speaker in now.speakers:
        if speaker.node == now.node or speaker.service:
            continue
        live.add_metric([now.node, speaker.node], float(speaker.liveness == "live"))
        silent.add_metric([now.node, speaker.node], speaker.silent_s)
        if speaker.skew_ms is not None:
            skew.add_metric([now.node, speaker.node], speaker.skew_ms / 1000)
    yield from (live, silent, skew)


class MetricsServer:
    """Serves the metrics on one local port. Raises BusError when the port cannot be had."""

    def __init__(self, host: str, port: int, look: Callable[[], Snapshot]) -> None:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(NodeCollector(look))
        self._server: WSGIServer
        self._thread: threading.Thread
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=registry)
        except OSError as error:
            raise BusError(
                f"serving metrics at {host}:{port}: {error.strerror or error}",
                hint="set metrics.port to a free one, or 0 for none",
                field="metrics.port",
                reason="port not available",
            ) from None
        self.port = int(self._server.server_port)

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5.0)
