"""Bad snapshots as a node gets them over the bus, of a holder that it trusts; and runners killed in mid-save and
mid-load."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import msgspec
import pytest

pytest.importorskip("torch", reason="torch is not installed: make install (extra `model`)")

from broker.embedded import EmbeddedBroker
from edge.bus import Bus
from edge.snapshot_store import SnapshotStore
from protocol.errors import MalformedMessage, MindstreamError, SnapshotRefused
from protocol.identity import Keyring, digest
from protocol.layout import CodecRef, Part
from protocol.manifest import (
    ModelDigests,
    SignedManifest,
    SnapshotManifest,
    open_private,
    prefix_addresses,
    seal_manifest,
    seal_private,
    snapshot_id,
)
from protocol.messages import ModelGenerate, ModelResume, ModelResumed, ModelSnapshot, RunDone, SnapshotSaved
from protocol.provenance import add_statement
from protocol.sealing import DataKey, wrap_key
from protocol.sharing import Opened, open_snapshot
from tests.services.model_runner.conftest import make_small_models
from tests.support.nodes import Node, Watcher, two_nodes, wait_for

pytestmark = pytest.mark.model

RUNNER = "model_runner"
TTL_MS = 60_000
PROMPT = [(7 * at) % 250 for at in range(700)]
KILLS = 3


class Pair:
    """``tomato``, whose snapshots are bad, and ``sprout``, who resumes them."""

    def __init__(self, tomato: Node, sprout: Node, watcher: Watcher, bus: Bus) -> None:
        self.tomato, self.sprout, self.watcher, self.bus = tomato, sprout, watcher, bus

    def answer(self, node: str, conversation: str, **settings: Any) -> RunDone:
        settings = {"max_new_tokens": 4, "ignore_eos": True} | settings
        done: RunDone = self.bus.ask(node, ModelGenerate(conversation, **settings), ttl_ms=TTL_MS)
        return done

    def resume(self, snapshot: str, name: str = "", holder: str = "tomato") -> ModelResumed:
        ask = ModelResume(snapshot, holder, name, way="chunks")
        resumed: ModelResumed = self.bus.ask("sprout", ask, ttl_ms=TTL_MS)
        return resumed

    def save(self, conversation: str) -> SnapshotSaved:
        saved: SnapshotSaved = self.bus.ask("tomato", ModelSnapshot(conversation), ttl_ms=TTL_MS)
        return saved


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    models = make_small_models(tmp_path_factory)
    toml = (
        f'[model]\nname = "{models["llama"]}"\nengine = "transformers"\nthreads = 1\nmax_batch = 1\n'
        "[supervisor]\nbackoff_max_s = 1.0\n"
    )
    folder = tmp_path_factory.mktemp("nodes")
    with EmbeddedBroker() as broker, two_nodes(folder, broker.url, (RUNNER,), toml) as (tomato, sprout):
        watcher = Watcher(broker.url)
        bus = Bus(url=broker.url, node="tester", client="talker")
        bus.start()
        try:
            for node in (tomato, sprout):
                watcher.wait_ready(node.name, (RUNNER,))
            yield Pair(tomato, sprout, watcher, bus)
        finally:
            bus.stop()
            watcher.bus.stop()


# --- bad snapshots ----------------------------------------------------------------------------------------------------


class Forger:
    """Puts snapshots into tomato's store that are signed by tomato, and made of a good one."""

    def __init__(self, pair: Pair, snapshot: str) -> None:
        self.node = pair.tomato
        self.snapshot = snapshot
        self.store = SnapshotStore(self.node.data_dir / RUNNER / "snapshots")
        keyring = Keyring({"tomato": self.node.identity.fingerprint})
        self.opened: Opened = open_snapshot(self.store.manifest(snapshot), snapshot, self.node.identity, keyring)

    @property
    def good(self) -> SnapshotManifest:
        return self.opened.manifest

    def put(self, key: DataKey | None = None, **changes: Any) -> str:
        """The id of one with other fields, and the key ``key`` in its wraps."""
        signed = seal_manifest(self.node.identity, msgspec.structs.replace(self.good, **changes))
        signed.wraps = [
            wrap_key(self.node.identity, key or self.opened.key, "tomato", self.node.identity.sealing.public_key)
        ]
        signed.provenance = add_statement(self.node.identity, [], digest(signed.manifest), "created")
        return self.write(signed)

    def write(self, signed: SignedManifest) -> str:
        identifier = snapshot_id(signed)
        (self.node.data_dir / RUNNER / "snapshots" / "manifests" / identifier).write_bytes(
            msgspec.msgpack.encode(signed)
        )
        return identifier

    def of_model(self, **changed: Any) -> str:
        """The id of one of another model, its addresses right."""
        digests: ModelDigests = msgspec.structs.replace(self.good.digests, **changed)
        private = open_private(self.good, self.opened.key)
        addresses = b"".join(prefix_addresses(digests, private.tokens, self.good.cached_tokens))
        sealed = seal_private(self.opened.key, msgspec.structs.replace(private, addresses=addresses))
        return self.put(digests=digests, sealed=sealed)

    def with_part(self, at: int, part: Part, **changes: Any) -> str:
        """The id of one whose block ``at`` has another part."""
        blocks = [msgspec.structs.replace(block) for block in self.good.blocks]
        blocks[at].full = part
        return self.put(blocks=blocks, **changes)


@pytest.fixture(scope="module")
def forger(pair: Pair) -> Forger:
    pair.answer("tomato", "garden", prompt_tokens=PROMPT)
    return Forger(pair, pair.save("garden").snapshot)


@pytest.mark.parametrize("bad", ["weights", "adapter", "codec version", "replayed chunk", "reordered chunks"])
def test_what_cannot_be_used_is_read_again_from_its_tokens(pair: Pair, forger: Forger, bad: str) -> None:
    first, second = forger.good.blocks[0].full, forger.good.blocks[1].full
    assert first is not None
    assert second is not None
    if bad == "weights":
        snapshot, why = forger.of_model(weights=bytes(32)), "other weights"
    elif bad == "adapter":
        snapshot, why = forger.of_model(adapters=(bytes(32),)), "other adapters"
    elif bad == "codec version":
        snapshot, why = forger.put(codec=CodecRef("raw", 7, {})), "of version 7"
    elif bad == "replayed chunk":
        snapshot, why = forger.with_part(1, first), "another place"
    else:
        blocks = [msgspec.structs.replace(block) for block in forger.good.blocks]
        blocks[0].full, blocks[1].full = second, first
        snapshot, why = forger.put(blocks=blocks), "another place"
    name = f"bad-{bad.replace(' ', '-')}"
    resumed = pair.resume(snapshot, name)
    assert (resumed.how, resumed.tokens) == ("recomputed", forger.good.cached_tokens + 1)
    assert why in resumed.reason
    assert len(pair.answer("sprout", name).tokens) == 4


@pytest.mark.parametrize(
    ("bad", "refusal", "field"),
    [
        ("10 TB in a part", MalformedMessage, "blocks[0].full.encoded_bytes"),
        ("10 TB in all", MalformedMessage, "total_bytes"),
        ("2 billion tokens", MalformedMessage, "layers[0]"),
        ("version", MalformedMessage, "version"),
        ("tokenizer", SnapshotRefused, "digests.tokenizer"),
        ("key", SnapshotRefused, "wraps"),
        ("sealed part cut", SnapshotRefused, "sealed"),
    ],
)
def test_what_does_not_hold_together_is_refused_by_field(
    pair: Pair, forger: Forger, bad: str, refusal: type[MindstreamError], field: str
) -> None:
    part = forger.good.blocks[0].full
    assert part is not None
    made = {
        "10 TB in a part": lambda: forger.with_part(0, Part(10**13, part.digests), total_bytes=10**13),
        "10 TB in all": lambda: forger.put(total_bytes=10**13),
        "2 billion tokens": lambda: forger.put(cached_tokens=2**31 - 1),
        "version": lambda: forger.put(version=9),
        "tokenizer": lambda: forger.of_model(tokenizer=bytes(32)),
        "key": lambda: forger.put(DataKey.generate(), label="another key"),
        "sealed part cut": lambda: forger.put(sealed=forger.good.sealed[:-1]),
    }[bad]
    with pytest.raises(refusal) as caught:
        pair.resume(made(), "refused")
    assert caught.value.field == field, caught.value
    assert caught.value.hint
    with pytest.raises(MindstreamError):  # and nothing of it is here
        pair.answer("sprout", "refused")
    assert pair.resume(forger.snapshot, "good").how == "exact"


# --- killed -----------------------------------------------------------------------------------------------------------


def wait_restarted(pair: Pair, node: str, pid: int) -> None:
    """Until another process than ``pid`` is ready."""

    def ready() -> bool:
        return pair.watcher.pid(node, RUNNER) not in (0, pid) and pair.watcher.state(node, RUNNER) == "ready"

    wait_for(ready, f"{node} has not come back")


def held(node: Node) -> set[str]:
    """The snapshots that a node says it has."""
    return set(SnapshotStore(node.data_dir / RUNNER / "snapshots").identifiers())


def check_whole(node: Node, before: set[str]) -> None:
    """All that have come since ``before`` are whole."""
    store = SnapshotStore(node.data_dir / RUNNER / "snapshots")
    for identifier in held(node) - before:
        store.chunks(msgspec.msgpack.decode(store.manifest(identifier).manifest, type=SnapshotManifest))


def kill_some_time_into(pair: Pair, node: str, answer: Future[Any], most_s: float) -> None:
    """kill -9 of a runner at a random moment; the answer may have come."""
    pid = pair.watcher.pid(node, RUNNER)
    time.sleep(random.uniform(0, most_s))  # any moment will do: what must hold holds at each
    pair.watcher.kill_service(node, RUNNER)
    wait_restarted(pair, node, pid)
    answer.cancel()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_runner_that_is_killed_while_it_saves_leaves_nothing_half_done(pair: Pair) -> None:
    pair.answer("tomato", "kept", prompt_tokens=PROMPT)
    before = held(pair.tomato)
    for number in range(KILLS):
        ask = ModelSnapshot("kept", label=f"try {number}")
        kill_some_time_into(pair, "tomato", pair.bus.ask_later("tomato", ask, ttl_ms=TTL_MS), 0.3)
        check_whole(pair.tomato, before)
    saved = pair.save("kept")  # of a conversation that is read again from its tokens
    assert saved.tokens == len(PROMPT) + 4
    check_whole(pair.tomato, before)
    assert saved.snapshot in held(pair.tomato) - before
    assert pair.resume(saved.snapshot, "kept").how == "exact"
    assert pair.answer("sprout", "kept").tokens == pair.answer("tomato", "kept").tokens


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_runner_that_is_killed_while_it_loads_resumes_when_asked_again(pair: Pair) -> None:
    pair.answer("tomato", "moved", prompt_tokens=PROMPT)
    saved = pair.save("moved")
    before = held(pair.sprout)
    for number in range(KILLS):
        ask = ModelResume(saved.snapshot, "tomato", f"moved-{number}", way="chunks")
        kill_some_time_into(pair, "sprout", pair.bus.ask_later("sprout", ask, ttl_ms=TTL_MS), 0.3)
        check_whole(pair.sprout, before)
    resumed = pair.resume(saved.snapshot, "moved")
    assert (resumed.how, resumed.tokens) == ("exact", saved.tokens)
    assert pair.answer("sprout", "moved").tokens == pair.answer("tomato", "moved").tokens
