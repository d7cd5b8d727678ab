"""Presence: says how this node is.

It hears its node's services and says the node's state, retained, with a will on a connection of its own: who asks the
broker knows whether the node is there. Before the machine is suspended it says ``sleeping`` and takes that connection
down in good order; after it, which the clocks show, it says ``ready`` again by itself.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Any

import msgspec

from edge.bus import Bus
from edge.service import Context, Service, hears
from edge.text import mindstream_version
from protocol.codec import Received
from protocol.errors import MindstreamError
from protocol.messages import NodeNow, NodeSleep, NodeState, NodeWake, ServiceState
from protocol.topics import STATE
from services.presence.node import OwnServices
from services.presence.suspend import SuspendClock

log = logging.getLogger(__name__)

SLEEP_PATIENCE_S = 60.0
"""A node that said ``sleeping`` and has been awake for so long since does not sleep: it says so."""


class Presence(Service):
    """One node's voice."""

    name = "presence"
    durable_session = False  # states that were said while it was away are no news any more

    def __init__(self, context: Context, suspend_clock: SuspendClock | None = None) -> None:
        super().__init__(context)
        self._suspend_clock = suspend_clock or SuspendClock()

    def setup(self) -> None:
        self._own = OwnServices([name for name in self.config.services.names() if name != self.name])
        self._lock = threading.RLock()
        self._node_bus: Bus | None = None
        self._connections = 0
        self._node_stands = "init"
        self._node_said: NodeState | None = None
        self._node_said_at_s = 0.0
        self._asleep_since_s = 0.0
        """When it said ``sleeping``, monotonic: 0 while it has not."""
        self._slept_s = 0.0

    def started(self) -> None:
        with self._lock:
            self._node_bus = self._open_node_bus()
        self._say_node()

    def reconnected(self) -> None:
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
        self._say_node()

    def teardown(self) -> None:
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

    def details(self) -> dict[str, Any]:
        return {"node": self._node_said.state if self._node_said else "init", "slept_s": round(self._slept_s)}

    # --- what it hears --------------------------------------------------------------------------------------

    @hears(ServiceState)
    def service(self, message: Received) -> None:
        """How a service is, of this node or of another."""
        if message.node != self.node:
            return
        name = message.topic.names["service"]
        with self._lock:
            self._own.hear(name, message.data, retained=message.retained)
        self._say_node()

    @hears(NodeState)
    def other_node(self, message: Received) -> None:
        """This node's own words, or those of another that has its name."""
        state: NodeState = message.data
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

    @hears(NodeSleep)
    def sleep(self, _message: Received) -> NodeNow:
        """Say ``sleeping``, and leave in good order: an end of the connection would be taken for a loss."""
        with self._lock:
            bus, self._node_bus = self._node_bus, None
            self._asleep_since_s = time.monotonic()
            if bus is not None:
                bus.stop(goodbye=[(self._node_state("sleeping"), {})], timeout_s=2.0)
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

    def _node_state(self, state: str) -> NodeState:
        return NodeState(
            state=state,
            time_us=0,
            fingerprint=self._fingerprint,
            version=mindstream_version(),
            services=[self.name, *self._own.running],
            pid=os.getpid(),
            reason=self._own.reason(),
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


def _now_us() -> int:
    return time.time_ns() // 1000
