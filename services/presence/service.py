"""Presence: says how this node is.

It hears its node's services and says the node's state, retained, with a will on a connection of its own: who asks the
broker knows whether the node is there. Before the machine is suspended it says ``sleeping`` and takes that connection
down in good order; after it, which the clocks show, it says ``ready`` again by itself. It follows who of the others
is alive, and says who has fallen silent. It declares the node to Home Assistant, and serves metrics for all of its
services on one local port.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
from typing import TYPE_CHECKING, Any

import msgspec

from edge.bus import Bus
from edge.liveness import Liveness
from edge.service import STATE_INTERVAL_S, Context, Service, hears
from edge.text import mindstream_version
from protocol.codec import Received
from protocol.errors import MindstreamError, StorageError
from protocol.messages import (
    HomeAssistantDevice,
    NodeNow,
    NodeSleep,
    NodeState,
    NodeWake,
    PresenceHeard,
    PresenceHeardAsk,
    ServiceState,
    Speaker,
)
from protocol.topics import HOME_ASSISTANT, STATE
from services.presence import home_assistant
from services.presence.node import OwnServices
from services.presence.suspend import SuspendClock

if TYPE_CHECKING:
    from services.presence.metrics import MetricsServer, Snapshot

log = logging.getLogger(__name__)

SLEEP_PATIENCE_S = 60.0
"""A node that said ``sleeping`` and has been awake for so long since does not sleep: it says so."""
STOOD_STILL_S = 5 * STATE_INTERVAL_S
"""A tick so long after the last: this process stood still and heard nobody, so nobody's silence counts."""
STUCK_S = 30.0
METRICS_RETRY_S = 10.0
SKEW_STEP_MS = 100.0
"""The skew that is shown follows in steps: a state that changed with every message would be said with every message."""


class Presence(Service):
    """One node's voice."""

    name = "presence"
    durable_session = False  # states that were said while it was away are no news any more

    def __init__(
        self, context: Context, *, suspend_clock: SuspendClock | None = None, liveness: Liveness | None = None
    ) -> None:
        super().__init__(context)
        self._suspend_clock = suspend_clock or SuspendClock()
        self._liveness = liveness or Liveness()
        self._ticked_s = time.monotonic()
        self._connections = 0
        """The bus's count at the last tick: the connection may break and be back between two."""
        self._late: tuple[str, ...] = ()
        """Services of this node that have fallen silent."""
        self._peers_late = 0

    def setup(self) -> None:
        self._own = OwnServices([name for name in self.config.service_names() if name != self.name])
        self._lock = threading.RLock()
        self._node_bus: Bus | None = None
        self._connections = 0
        self._node_stands = "init"
        self._node_said: NodeState | None = None
        self._node_said_at_s = 0.0
        self._asleep_since_s = 0.0
        """When it said ``sleeping``, monotonic: 0 while it has not."""
        self._slept_s = 0.0
        self._skew_ms = 0.0
        """The largest clock skew among live nodes, as it was shown last."""
        self._undeclared = True
        self._connected_us = 0
        self._metrics: MetricsServer | None = None
        self._metrics_at_s = 0.0
        self._metrics_refusal = ""
        """Why the metrics' port could not be had; empty when it could, or none is wanted."""
        settings = self.config.home_assistant
        if settings.discovery:
            self.bus.watch(f"{settings.prefix}/status", self._hear_home_assistant)
        else:
            topic = dataclasses.replace(HOME_ASSISTANT, root=settings.prefix).format_topic(node=self.node)
            self.bus.watch(topic, self._hear_discovery)

    def started(self) -> None:
        self._connected_us = _now_us()
        with self._lock:
            self._node_bus = self._open_node_bus()
        self._say_node()

    def reconnected(self) -> None:
        self._undeclared = True
        self._connected_us = _now_us()
        self._say_node()

    def tick(self) -> None:
        slept_s = self._suspend_clock.slept_s()
        if slept_s:
            self._slept_s += slept_s
            self.bus.counters.add("slept")
            self.bus.events.report("woke", "info", f"{self.node} is awake again; it slept for {slept_s:,.0f} s")
        if self._asleep_since_s:
            awake_s = time.monotonic() - self._asleep_since_s
            if slept_s or awake_s > SLEEP_PATIENCE_S:
                if not slept_s:
                    self.bus.events.report(
                        "did-not-sleep",
                        "warning",
                        f"{self.node} said that it would sleep, and has been awake for {awake_s:.0f} s since",
                    )
                self._wake()
        self._judge_silence()
        self._say_node()
        if self._undeclared and self.config.home_assistant.discovery:
            self._declare()
        if self._metrics is None and self.config.metrics.port and time.monotonic() >= self._metrics_at_s:
            self._serve_metrics()

    def _judge_silence(self) -> None:
        """Who has fallen silent, and who is back: said once each."""
        now_s = time.monotonic()
        connections = self.bus.connections
        deaf = not self.bus.connected or connections != self._connections or now_s - self._ticked_s > STOOD_STILL_S
        self._ticked_s, self._connections = now_s, connections
        if deaf:
            self._liveness.forgive()
        changes = self._liveness.changes()
        speakers = self._liveness.speakers()
        nodes_late = {speaker.node for speaker in speakers if not speaker.service and _is_late(speaker)}
        texts: dict[tuple[str, str], list[str]] = {}
        for speaker, change in changes:
            whose = "service" if speaker.node == self.node else "peer"
            self.bus.counters.add(f"{whose}.{change}")
            if speaker.service and speaker.node in nodes_late and whose == "peer":
                continue  # all of that node is silent, and that is said once
            name = f"{speaker.node}/{speaker.service}" if speaker.service else speaker.node
            what = f"has been silent for {speaker.silent_s:.0f} s" if change == "late" else "speaks again"
            texts.setdefault((whose, change), []).append(f"{name} {what} ({speaker.state})")
        for (whose, change), names in texts.items():
            if change != "gone":  # that was said: goodbye, or lost
                severity = "warning" if change == "late" else "info"
                self.bus.events.report(f"{whose}-{change}", severity, "; ".join(names), count=len(names))
        self._late = tuple(speaker.service for speaker in speakers if speaker.node == self.node and _is_late(speaker))
        self._peers_late = sum(_is_late(each) for each in speakers if each.node != self.node and not each.service)
        skews = [each.skew_ms for each in speakers if each.liveness == "live" and each.skew_ms is not None]
        skew_ms = max(skews, key=abs, default=0.0)
        if abs(skew_ms - self._skew_ms) >= SKEW_STEP_MS:
            self._skew_ms = skew_ms

    def teardown(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
        gone = NodeState(state="disconnected", time_us=_now_us(), fingerprint=self._fingerprint, pid=os.getpid())
        with self._lock:
            bus, self._node_bus = self._node_bus, None
            if bus is None and self._asleep_since_s:
                bus = self._open_node_bus()
                try:
                    bus.wait_subscribed(2.0)
                except MindstreamError as error:
                    log.warning("%s stays known as sleeping: %s", self.node, error)
            if bus is not None:
                bus.stop(goodbye=[(gone, {})], timeout_s=2.0)

    def condition(self) -> tuple[str, str]:
        return ("degraded", self._metrics_refusal) if self._metrics_refusal else ("ready", "")

    def stuck(self) -> str:
        found, bus = super().stuck(), self._node_bus
        if not found and bus is not None and bus.stalled_s() > STUCK_S:
            found = "its connection for the node's state makes no progress"
        return found

    def details(self) -> dict[str, Any]:
        return {
            "node": self._node_said.state if self._node_said else "init",
            "peers_late": self._peers_late,
            "clock_skew_ms": round(self._skew_ms, 1),
            "slept_s": round(self._slept_s),
            "broker": {"protocol": self.bus.protocol, "connected_us": self._connected_us},
            "metrics": f"{self.config.metrics.host}:{self._metrics.port}" if self._metrics else "",
        }

    # --- what it hears --------------------------------------------------------------------------------------

    @hears(ServiceState)
    def service(self, message: Received) -> None:
        """How a service is, of this node or of another."""
        self._liveness.hear(message)
        if message.node != self.node:
            return
        name = message.topic.names["service"]
        with self._lock:
            self._own.hear(name, message.data, retained=message.retained)
        self._say_node()

    @hears(NodeState)
    def other_node(self, message: Received) -> None:
        """How a node is: another one, this one itself, or another that has its name."""
        if message.node != self.node:
            self._liveness.hear(message)
        state: NodeState = message.data
        if state.sealing_key and message.node != self.node:
            try:
                self.context.peers.learn_sealing_key(message.node, state.sealing_key)
            except StorageError as error:  # a node whose disk is full still hears the others
                log.warning("the sealing key of %s is not kept: %s", message.node, error)
        if (
            message.node == self.node
            and state.fingerprint
            and state.fingerprint != self._fingerprint
            and state.state in ("init", "ready")
        ):
            # As often as the other one speaks, hence through the limit of one a second.
            self.bus.events.report(
                "node-name-taken",
                "error",
                f"another node is called {self.node} on this broker (key {state.fingerprint}): give one of them"
                " another node.name",
            )

    @hears(PresenceHeardAsk)
    def heard(self, _message: Received) -> PresenceHeard:
        """Whom this node hears."""
        return PresenceHeard(self._liveness.speakers())

    @hears(NodeSleep)
    def sleep(self, _message: Received) -> NodeNow:
        """Say ``sleeping``, and leave in good order: an end of the connection would be taken for a loss."""
        with self._lock:
            bus, self._node_bus = self._node_bus, None
            self._asleep_since_s = time.monotonic()
            if bus is not None:
                bus.stop(goodbye=[(self._node_state("sleeping", _now_us()), {})], timeout_s=2.0)
        log.info("%s sleeps", self.node)
        return NodeNow("sleeping")

    @hears(NodeWake)
    def wake(self, _message: Received) -> NodeNow:
        """Be there again."""
        self._wake()
        return NodeNow(self._node_stands)

    def _wake(self) -> None:
        with self._lock:
            if not self._asleep_since_s:
                return
            self._asleep_since_s = 0.0
            self._node_bus = self._open_node_bus()
        log.info("%s is awake", self.node)

    # --- Home Assistant and metrics -------------------------------------------------------------------------

    def _hear_home_assistant(self, _topic: str, payload: bytes) -> None:
        """Its birth message: it has started, and may have missed what is not retained."""
        if payload == b"online":
            self._undeclared = True

    def _hear_discovery(self, _topic: str, payload: bytes) -> None:
        """What the broker keeps of this node for Home Assistant, though discovery is switched off: taken back."""
        if payload:
            try:
                self.bus.forget(HomeAssistantDevice, root=self.config.home_assistant.prefix)
            except MindstreamError as error:
                log.warning("Home Assistant still knows this node: %s", error)

    def _declare(self) -> None:
        message = home_assistant.device(self.node, [self.name, *self._own.names], mindstream_version())
        try:
            self.bus.say(message, timeout_s=1.0, root=self.config.home_assistant.prefix)
        except MindstreamError as error:
            log.warning("Home Assistant was not told of this node: %s", error)
            return
        self._undeclared = False

    def _serve_metrics(self) -> None:
        from services.presence.metrics import MetricsServer

        settings = self.config.metrics
        try:
            self._metrics = MetricsServer(settings.host, settings.port, self._look)
        except MindstreamError as error:
            self._metrics_at_s = time.monotonic() + METRICS_RETRY_S
            self._metrics_refusal = error.message
            self.bus.events.report("metrics-port", "warning", str(error))
            return
        self._metrics_refusal = ""
        log.info("metrics at http://%s:%d/metrics", settings.host, self._metrics.port)

    def _look(self) -> Snapshot:
        """What a scrape shows."""
        from services.presence.metrics import Snapshot

        with self._lock:
            state = self._node_said.state if self._node_said else "init"
            return Snapshot(
                node=self.node,
                version=mindstream_version(),
                state="sleeping" if self._asleep_since_s else state,
                services=self._own.states,
                speakers=self._liveness.speakers(),
                starts=dict(self._own.starts),
            )

    # --- what it says ---------------------------------------------------------------------------------------

    def _open_node_bus(self) -> Bus:
        lost = NodeState(state="lost", time_us=_now_us(), fingerprint=self._fingerprint, pid=os.getpid())
        bus = self.open_bus("node", will=(lost, {}))
        bus.start(timeout_s=None)
        self._connections = 0
        return bus

    @property
    def _fingerprint(self) -> str:
        return self.context.identity.fingerprint

    def _node_state(self, state: str, time_us: int = 0) -> NodeState:
        return NodeState(
            state=state,
            time_us=time_us,
            fingerprint=self._fingerprint,
            version=mindstream_version(),
            services=[self.name, *self._own.running],
            pid=os.getpid(),
            reason=self._own.reason(self._late),
            sealing_key=self.context.identity.sealing_key,
        )

    def _say_node(self) -> None:
        """Say the node's state if it changed, has not been said for a while, or the connection is a new one."""
        with self._lock:
            bus = self._node_bus
            if bus is None or not bus.connected:
                return
            if bus.connections != self._connections:
                # The broker may have forgotten what it retained, or have said that this node is lost.
                self._connections = bus.connections
                self._node_said = None
            became_ready = self._node_stands == "init" and self._own.settled
            state = self._node_state("ready" if became_ready else self._node_stands)
            now_s = time.monotonic()
            if state == self._node_said and now_s - self._node_said_at_s < STATE.every_s:
                return
            try:
                bus.say(msgspec.structs.replace(state, time_us=_now_us()), timeout_s=1.0)
            except MindstreamError as error:
                log.warning("%s could not say how it is: %s", self.node, error)
                return
            self._node_said, self._node_said_at_s, self._node_stands = state, now_s, state.state
        if became_ready:
            log.info("the node is ready%s", f", but {state.reason}" if state.reason else "")


def _is_late(speaker: Speaker) -> bool:
    return speaker.liveness in ("late", "silent")


def _now_us() -> int:
    return time.time_ns() // 1000
