"""A presence service in this process, on a real broker, with clocks and intervals of the test's own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from broker.embedded import EmbeddedBroker
from edge.bus import Bus
from edge.config import load_config
from edge.keys import Peers, load_or_create_identity
from edge.service import Context
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


class Voice:
    """A client that speaks as a service of a node, as fast as it is told to."""

    def __init__(self, url: str, node: str, service: str) -> None:
        self.service = service
        self.bus = Bus(url=url, node=node, client=service)
        self.bus.start()
        self._going = threading.Event()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._speak, daemon=True)
        self._thread.start()

    def say(self, state: str = "ready", **fields: Any) -> None:
        """Say one word."""
        self.bus.say(ServiceState(state=state, time_us=time.time_ns() // 1000, **fields), service=self.service)

    def keep_speaking(self, going: bool = True) -> None:
        """Begin or end to speak ten times a second."""
        (self._going.set if going else self._going.clear)()

    def _speak(self) -> None:
        while not self._end.wait(0.1):
            if self._going.is_set():
                self.say()

    def close(self) -> None:
        """End it."""
        self._end.set()
        self._thread.join()
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
