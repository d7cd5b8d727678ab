"""What `mindstream status` knows: every node and service on the broker, who of them is alive, and who lags behind.

Nodes and services say it all themselves, retained. Whether they are alive this node's presence service says, which
hears them all the time; where it does not answer, their own clocks must do.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec

from edge.bus import Bus
from edge.config import Config
from edge.liveness import EVERY_S, GONE, LATE_AFTER, SILENT_AFTER, Liveness
from protocol.codec import Received
from protocol.entries import SCOPE_PRIVATE
from protocol.errors import MindstreamError
from protocol.messages import NodeState, PresenceHeard, PresenceHeardAsk, ServiceState, Speaker
from protocol.topics import SERVICE_STATE, STATE

RETAINED_QUIET_S = 0.25
"""Retained messages come one after another, at once: after this long without one there are no more."""
RETAINED_LONGEST_S = 3.0
_NAP_S = 0.01
PRESENCE_TTL_MS = 1_500
PRESENCE_EVERY_S = 2.0
"""How often presence is asked again while status stays."""
SERVING = frozenset({"init", "ready", "degraded"})


class ServiceStatus(msgspec.Struct):
    """A service of a node."""

    state: str
    """What it said last, as in `service.state`."""
    liveness: str
    """``live``, ``late``, ``silent``, ``gone`` or ``unknown``, as in `presence.heard`."""
    silent_s: float
    """Since its last word, in seconds."""
    reason: str
    """What it lacks, when not ready."""
    pid: int
    queue: int
    """Messages received and not yet handled."""
    counters: dict[str, int]
    """Events since its start, by name."""
    details: dict[str, Any]
    """What it wants shown."""
    said_us: int
    """When it said so, by its own clock, Unix microseconds."""


class NodeStatus(msgspec.Struct):
    """A node, and its services by name."""

    state: str
    """What it said last, as in `node.state`; empty when only services of it have spoken."""
    liveness: str
    """As a service's."""
    silent_s: float
    """Since its last word, in seconds."""
    skew_ms: float | None
    """How far its clock is ahead of this node's; null: not known."""
    behind: int | None
    """Memories that some node on this broker holds and this one does not, by what they say of themselves; null: it
    has no memory store that has spoken."""
    behind_by_origin: dict[str, int]
    """The same for each origin (``node/scope/log_id``) of which it lacks any."""
    reason: str
    """Which of its services are not ready, and why."""
    version: str
    fingerprint: str
    """Its public key."""
    pid: int
    """Process id of its presence service."""
    said_us: int
    """When it said so, by its own clock, Unix microseconds."""
    services: dict[str, ServiceStatus]


class BrokerStatus(msgspec.Struct):
    """The broker, as this node sees it."""

    url: str
    kind: str
    """``embedded`` (this node's own) or ``external``."""
    protocol: str
    """MQTT version: ``5`` or ``3.1.1``."""
    connected_us: int
    """Since when this node's presence service is connected, Unix microseconds; 0: not known."""


class Status(msgspec.Struct):
    """All that is known on this broker."""

    node: str
    """Whose readiness is the exit code."""
    ready: bool
    """That node is ready, it is alive, and none of its services is failed, lost or silent. A degraded one may be."""
    amiss: list[str]
    """Why it is not."""
    judged_by: str
    """Who says who is alive: ``presence`` or, where that does not answer, ``clocks``."""
    broker: BrokerStatus
    nodes: dict[str, NodeStatus]


class StatusWatch:
    """Hears what nodes and services say.

    Args:
        bus: not yet started, so that what is retained is heard.
        node: whose readiness counts.
    """

    def __init__(self, bus: Bus, config: Config, node: str) -> None:
        self._bus = bus
        self._config = config
        self._node = node
        self._nodes: dict[str, NodeState] = {}
        self._services: dict[str, dict[str, ServiceState]] = {}
        self._liveness = Liveness()
        self._heard_s = time.monotonic()
        self._report: dict[tuple[str, str], Speaker] = {}
        self._reported_s: float | None = None
        self._asked_s = -PRESENCE_EVERY_S
        bus.hear(NodeState, self._hear_node)
        bus.hear(ServiceState, self._hear_service)

    def _hear_node(self, message: Received) -> None:
        self._liveness.hear(message)
        self._nodes[message.node] = message.data
        self._heard_s = time.monotonic()

    def _hear_service(self, message: Received) -> None:
        self._liveness.hear(message)
        self._services.setdefault(message.node, {})[message.topic.names["service"]] = message.data
        self._heard_s = time.monotonic()

    def wait_retained(self) -> None:
        """Wait until the retained states have come."""
        # Counted in naps, not by the clock: a process that a busy machine lets wait has heard nothing meanwhile.
        heard_s, quiet = self._heard_s, 0
        for _ in range(round(RETAINED_LONGEST_S / _NAP_S)):
            time.sleep(_NAP_S)
            heard_s, quiet = self._heard_s, quiet + 1 if self._heard_s == heard_s else 0
            if quiet >= RETAINED_QUIET_S / _NAP_S:
                return

    def look(self) -> Status:
        """All that is known now; asks presence when it was not asked for a while."""
        if time.monotonic() - self._asked_s >= PRESENCE_EVERY_S:
            self._ask_presence()
            self._asked_s = time.monotonic()
        own = {(each.node, each.service): each for each in self._liveness.speakers()}
        names = sorted({*self._nodes, *self._services})
        behind = _behind({name: dict(self._services.get(name, {})) for name in names})
        nodes = {name: self._node_status(name, own, behind.get(name)) for name in names}
        amiss = _amiss(self._node, nodes.get(self._node))
        return Status(
            node=self._node,
            ready=not amiss,
            amiss=amiss,
            judged_by="clocks" if self._reported_s is None else "presence",
            broker=self._broker(),
            nodes=nodes,
        )

    def _ask_presence(self) -> None:
        self._reported_s = None
        presence = self._services.get(self._bus.node, {}).get("presence")
        if presence is None or presence.state not in SERVING:
            return
        try:
            answer: PresenceHeard = self._bus.ask(self._bus.node, PresenceHeardAsk(), ttl_ms=PRESENCE_TTL_MS)
        except MindstreamError:
            return  # its silence shows in the table, by the clocks
        self._report = {(each.node, each.service): each for each in answer.speakers}
        self._reported_s = time.monotonic()

    def _broker(self) -> BrokerStatus:
        presence = self._services.get(self._bus.node, {}).get("presence")
        said = presence.details.get("broker") if presence is not None and presence.state in SERVING else None
        since_us = said.get("connected_us", 0) if isinstance(said, dict) else 0
        return BrokerStatus(
            url=self._bus.url,
            kind="external" if self._config.broker.url else "embedded",
            protocol=self._bus.protocol,
            connected_us=since_us if isinstance(since_us, int) else 0,
        )

    def _node_status(self, name: str, own: dict[tuple[str, str], Speaker], behind: dict[str, int] | None) -> NodeStatus:
        said = self._nodes.get(name) or NodeState(state="", time_us=0)
        speaker = self._speaker((name, ""), said.state, said.time_us, EVERY_S[STATE.name], own)
        services = {}
        for service, state in sorted(self._services.get(name, {}).items()):
            heard = self._speaker((name, service), state.state, state.time_us, EVERY_S[SERVICE_STATE.name], own)
            services[service] = ServiceStatus(
                state=state.state,
                liveness=heard.liveness,
                silent_s=heard.silent_s,
                reason=state.reason,
                pid=state.pid,
                queue=state.queue,
                counters=state.counters,
                details=state.details,
                said_us=state.time_us,
            )
        return NodeStatus(
            state=said.state,
            liveness=speaker.liveness,
            silent_s=speaker.silent_s,
            skew_ms=speaker.skew_ms,
            behind=None if behind is None else sum(behind.values()),
            behind_by_origin=behind or {},
            reason=said.reason,
            version=said.version,
            fingerprint=said.fingerprint,
            pid=said.pid,
            said_us=said.time_us,
            services=services,
        )

    def _speaker(
        self, key: tuple[str, str], state: str, time_us: int, every_s: float, own: dict[tuple[str, str], Speaker]
    ) -> Speaker:
        """How alive a speaker is: by presence, by what was heard here, or by the clocks."""
        node, service = key
        by_clocks_s = max(0.0, time.time() - time_us / 1e6) if time_us else 0.0
        if state in GONE or not state:
            return Speaker(node, service, state, "gone" if state else "unknown", round(by_clocks_s, 3))
        heard = own.get(key)
        reported = self._report.get(key) if self._reported_s is not None else None
        skew_ms = next((each.skew_ms for each in (reported, heard) if each and each.skew_ms is not None), None)
        if heard is not None and heard.liveness == "live":
            return Speaker(node, service, state, "live", heard.silent_s, skew_ms)
        if reported is not None and reported.liveness != "unknown" and self._reported_s is not None:
            silent_s = reported.silent_s + time.monotonic() - self._reported_s
            return Speaker(node, service, state, reported.liveness, round(silent_s, 3), skew_ms)
        liveness = "unknown"
        if by_clocks_s >= SILENT_AFTER * every_s:
            liveness = "silent"
        elif by_clocks_s >= LATE_AFTER * every_s:
            liveness = "late"
        elif self._reported_s is None:
            liveness = "live"
        return Speaker(node, service, state, liveness, round(by_clocks_s, 3), skew_ms)


def _behind(services: dict[str, dict[str, ServiceState]]) -> dict[str, dict[str, int]]:
    """Node to the memories of each origin that others hold and it does not, by the ``entries`` of memory stores."""
    held: dict[str, dict[str, int]] = {}
    for node, states in services.items():
        store = states.get("memory_store")
        entries = store.details.get("entries") if store is not None else None
        if isinstance(entries, dict):
            held[node] = {
                origin: seq
                for origin, seq in entries.items()
                if isinstance(seq, int) and origin.split("/")[1:2] != [SCOPE_PRIVATE]
            }
    furthest: dict[str, int] = {}
    for origins in held.values():
        for origin, seq in origins.items():
            furthest[origin] = max(seq, furthest.get(origin, 0))
    return {
        node: {origin: seq - origins.get(origin, 0) for origin, seq in furthest.items() if seq > origins.get(origin, 0)}
        for node, origins in held.items()
    }


def _amiss(name: str, node: NodeStatus | None) -> list[str]:
    """Why a node is not ready, if it is not."""
    if node is None:
        return [f"{name} has not said anything on this broker"]
    found = []
    if node.state != "ready":
        found.append(f"{name} is {node.state or 'unknown'}" + (f": {node.reason}" if node.reason else ""))
    elif node.liveness in ("late", "silent"):
        found.append(f"{name} has been silent for {node.silent_s:.0f} s")
    for service, each in node.services.items():
        if each.state in ("failed", "lost"):
            found.append(f"{service} is {each.state}" + (f": {each.reason}" if each.reason else ""))
        elif each.liveness in ("late", "silent"):
            found.append(f"{service} has been silent for {each.silent_s:.0f} s")
    return found
