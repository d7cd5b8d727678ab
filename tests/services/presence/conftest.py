"""A presence service in this process, on a real broker, with clocks and intervals of the test's own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest

from broker.embedded import EmbeddedBroker
from edge.bus import Bus
from edge.config import load_config
from edge.keys import Peers, load_or_create_identity
from edge.liveness import LATE_AFTER, Liveness
from edge.service import Context
from protocol.codec import Received
from protocol.messages import ServiceState
from services.presence.service import Presence
from tests.support.nodes import Watcher, wait_for
from tests.support.waiting import DEADLINE_S

StartPresence = Callable[..., Presence]


@pytest.fixture
def start_presence(tmp_path: Path, embedded_broker: EmbeddedBroker) -> Iterator[StartPresence]:
    """``start_presence(toml, **arguments of Presence)`` runs one of node ``tomato`` in a thread."""
    with ExitStack() as cleanup:

        def start(toml: str = "", *, enabled: str = "[]", url: str = "", **arguments: Any) -> Presence:
            folder = tmp_path / "tomato"
            path = tmp_path / "tomato.toml"
            path.write_text(
                f'[node]\nname = "tomato"\ndata_dir = "{folder}"\n[broker]\nurl = "{url or embedded_broker.url}"\n'
                f"[services]\nenabled = {enabled}\n{toml}"
            )
            config = load_config(path)
            identity = load_or_create_identity(folder, "tomato")
            context = Context(config, identity, Peers(folder, identity), folder / "presence", config.broker.url)
            presence = Presence(context, **arguments)
            thread = threading.Thread(target=presence.run)
            thread.start()

            def end() -> None:
                presence.stop()
                thread.join(DEADLINE_S)
                assert not thread.is_alive()

            cleanup.callback(end)
            return presence

        yield start


@pytest.fixture
def watcher(embedded_broker: EmbeddedBroker) -> Iterator[Watcher]:
    found = Watcher(embedded_broker.url)
    yield found
    found.bus.stop()


class Ahead(Liveness):
    """A liveness whose time passes when it is told to, so that a busy machine makes nobody late."""

    EVERY_S = 1_000.0

    def __init__(self) -> None:
        self._ahead_s = 0.0
        super().__init__({"state": self.EVERY_S, "service_state": self.EVERY_S}, self._now)

    def _now(self) -> float:
        return time.monotonic() + self._ahead_s

    def hear(self, message: Received) -> None:
        """At the time that it is here."""
        super().hear(msgspec.structs.replace(message, received_s=message.received_s + self._ahead_s))

    def skip(self) -> None:
        """Let pass what makes late whoever says nothing meanwhile."""
        self._ahead_s += (LATE_AFTER + 0.5) * self.EVERY_S

    def live(self) -> set[str]:
        """Names of those who are."""
        return {f"{each.node}/{each.service}" for each in self.speakers() if each.liveness == "live"}


class Voice:
    """A client that speaks as a service of a node."""

    def __init__(self, url: str, node: str, service: str) -> None:
        self.service = service
        self.bus = Bus(url=url, node=node, client=service)
        self.bus.start(DEADLINE_S)

    def say(self, state: str = "ready", **fields: Any) -> None:
        """Say one word."""
        self.bus.say(ServiceState(state=state, time_us=time.time_ns() // 1000, **fields), service=self.service)

    def close(self) -> None:
        """End it."""
        self.bus.stop()


@pytest.fixture
def voice(embedded_broker: EmbeddedBroker) -> Iterator[Callable[[str, str], Voice]]:
    with ExitStack() as cleanup:

        def make(node: str, service: str) -> Voice:
            found = Voice(embedded_broker.url, node, service)
            cleanup.callback(found.close)
            return found

        yield make


__all__ = ["StartPresence", "Voice", "wait_for"]
