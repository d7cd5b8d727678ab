"""What the golden recordings hold, and how they are made: ``python -m tests.support.golden_inputs NAME``.

Each function plays one scene with real services, real clients and a recorder on a private broker. Keys are made from
names (``golden_identity``); everything else is as it comes.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from broker.embedded import EmbeddedBroker
from edge.bus import Bus
from edge.mqtt_wire import WireClient
from edge.recorder import SESSION_EXPIRY_S, Recorder
from protocol.codec import Received
from protocol.entries import GENESIS, MemoryContent, Origin, SignedEntry, entry_hash, seal
from protocol.errors import MindstreamError
from protocol.ids import uuid7
from protocol.messages import (
    MemoryEntries,
    MemoryHave,
    MemoryMerge,
    MemoryPut,
    MemoryRecall,
    MemoryRepair,
    MemoryVectorAsk,
    ServiceState,
)
from tests.support.golden_replay import FOLDER, NODE, golden_identity, prepare_node, start_service
from tests.support.nodes import wait_for
from tests.support.waiting import DEADLINE_S

TTL_MS = 20_000


class Scene:
    """A private broker, a recorder, and services and clients as they are called for."""

    def __init__(self, folder: Path, url: str) -> None:
        self._folder = folder
        self._url = url
        self._configs: dict[str, Path] = {}
        self._states: dict[tuple[str, str], str] = {}
        self._stack = contextlib.ExitStack()
        watcher = self.client("watcher", "watcher")
        watcher.hear(ServiceState, self._heard)
        watcher.wait_subscribed(DEADLINE_S)

    def _heard(self, message: Received) -> None:
        self._states[message.node, message.topic.names["service"]] = message.data.state

    def client(self, node: str, name: str) -> Bus:
        """A started bus of ``node``, stopped at the end."""
        return self._stack.enter_context(Bus(url=self._url, node=node, client=name))

    def service(self, node: str, name: str) -> subprocess.Popen[bytes]:
        """A service of ``node``, ready; ended at the end."""
        if node not in self._configs:
            self._configs[node] = prepare_node(self._folder, node, self._url)
        process = start_service(self._configs[node], name)
        self._stack.callback(self.end, process)
        wait_for(lambda: self._states.get((node, name)) == "ready", f"{node}/{name} is not ready")
        return process

    @staticmethod
    def end(process: subprocess.Popen[bytes]) -> None:
        """End a service in order."""
        process.send_signal(signal.SIGTERM)
        process.wait(DEADLINE_S)

    @contextlib.contextmanager
    def recording(self, path: Path) -> Iterator[None]:
        """Everything from here on is recorded, and what is retained."""
        client = WireClient(self._url, "golden-recorder", session_expiry_s=SESSION_EXPIRY_S)
        recorder = Recorder(client, path, ["mindstream/v1/#"], node=NODE)
        thread = threading.Thread(target=recorder.run)
        thread.start()
        try:
            yield
            self._stack.close()
            time.sleep(0.5)  # the last goodbyes
        finally:
            recorder.stop()
            thread.join()


def ask(bus: Bus, message: Any) -> Any:
    """The answer of NODE; an error is one, too."""
    try:
        return bus.ask(NODE, message, ttl_ms=TTL_MS)
    except MindstreamError as error:
        return error


def entries(node: str, texts: list[str]) -> list[SignedEntry]:
    """A log of ``node``."""
    identity, origin = golden_identity(node), Origin(node, "everyone", uuid7())
    found: list[SignedEntry] = []
    for seq, text in enumerate(texts, start=1):
        content = MemoryContent(text=text, time_us=time.time_ns() // 1000, role="note", source=f"{node}/cli")
        prev = entry_hash(found[-1].header) if found else GENESIS
        hlc = (time.time_ns() // 1_000_000) << 16 | seq
        found.append(seal(identity, content, origin=origin, seq=seq, prev=prev, hlc=hlc, id=uuid7(), clock_synced=True))
    return found


def memory_store(scene: Scene, path: Path) -> None:
    """Puts, repeated and private ones; recalls by two nodes; entries of a peer, with a gap, a forgery and a stranger's;
    ranges; and what is refused."""
    with scene.recording(path):
        scene.service(NODE, "memory_store")
        own, peer = scene.client(NODE, "cli"), scene.client("sprout", "cli")
        stranger = scene.client("pear", "cli")
        for number, text in enumerate(
            ("The spare key is under the blue flower pot.", "Das Fahrrad steht im Schuppen. 🚲", "Water at six.")
        ):
            stored = ask(own, MemoryPut(text, role="user", conversation="garden" if number else ""))
        ask(own, MemoryPut("Said twice, stored once.", id=(twice := uuid7()), time_us=1_700_000_000_000_000))
        ask(own, MemoryPut("Said twice, stored once.", id=twice, time_us=1_700_000_000_000_000))
        private = ask(own, MemoryPut("The key of the safe is 4711.", scope="private"))
        ask(peer, MemoryPut("Sprout asked tomato to remember the ladder."))
        for bus in (own, peer):
            ask(bus, MemoryRecall("where is the key"))
        ask(own, MemoryRecall('key" OR * NEAR(', limit=1))
        ask(own, MemoryRecall("nothing of the kind"))

        log = entries("sprout", ["The hammer is on the roof.", "The ladder is in the shed.", "Rain tomorrow."])
        peer.say(MemoryEntries(log[:1]))
        ask(own, MemoryVectorAsk())
        peer.say(MemoryEntries(log[2:]))  # its predecessor is missing: it waits
        ask(own, MemoryVectorAsk())
        ask(own, MemoryMerge([log[1]]))
        ask(own, MemoryVectorAsk())
        ask(own, MemoryRecall("hammer ladder rain"))
        forged = SignedEntry(log[2].header, bytes(64), log[2].salt, log[2].content)
        ask(own, MemoryMerge([forged]))
        ask(own, MemoryMerge(entries("pear", ["Nobody here trusts me."])))
        ask(peer, MemoryMerge(log))  # only the node's own services may
        stranger.say(MemoryHave(digest=bytes(64), entries=0))
        for scope, log_id in (("everyone", stored.log_id), ("private", private.log_id)):
            ask(peer, MemoryRepair(NODE, scope, log_id, 1, 2))
        ask(peer, MemoryRepair("sprout", "everyone", uuid7(), 1, 2))
        ask(own, MemoryVectorAsk())


def sync_bridge(scene: Scene, path: Path) -> None:
    """A peer holds five memories that this node has not: they are fetched; then news come by themselves."""
    scene.service("sprout", "memory_store")
    peer = scene.client("sprout", "cli")
    for number in range(5):
        peer.ask("sprout", MemoryPut(f"Sprout saw cat {number}."), ttl_ms=TTL_MS)
    held: list[int] = []
    scene.client("watcher", "haves").hear(MemoryHave, lambda message: held.append(message.data.entries), node=NODE)
    with scene.recording(path):
        scene.service(NODE, "memory_store")
        scene.service(NODE, "sync_bridge")
        wait_for(lambda: 5 in held, "the five were not fetched")
        peer.ask("sprout", MemoryPut("Sprout saw one more cat."), ttl_ms=TTL_MS)
        wait_for(lambda: 6 in held, "the sixth did not come")


SCENES: dict[str, Callable[[Scene, Path], None]] = {"memory_store": memory_store, "sync_bridge": sync_bridge}


def main() -> None:
    """Make one recording anew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=SCENES)
    name = parser.parse_args().name
    path = FOLDER / f"{name}.msrec"
    path.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="golden-") as folder, EmbeddedBroker() as broker:
        SCENES[name](Scene(Path(folder), broker.url), path)
    print(f"{path}: {path.stat().st_size:,} bytes; now: pytest --update-golden")


if __name__ == "__main__":
    main()
