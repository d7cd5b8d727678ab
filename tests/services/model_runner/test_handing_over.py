"""Handing over between two nodes: what is weighed, what crosses the link, and what a node takes from itself."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

pytest.importorskip("torch", reason="torch is not installed: make install (extra `model`)")

from broker.embedded import EmbeddedBroker
from edge.bus import Bus
from protocol.errors import MindstreamError, SnapshotRefused
from protocol.manifest import snapshot_id, unpack_signed
from protocol.messages import (
    HandoffOffer,
    HandoffOfferAsk,
    ModelGenerate,
    ModelResume,
    ModelResumed,
    ModelSnapshot,
    RunDone,
    SnapshotSaved,
)
from protocol.sharing import open_snapshot
from tests.services.model_runner.conftest import make_small_models
from tests.support.nodes import Node, Watcher, two_nodes, wait_for

pytestmark = pytest.mark.model

RUNNER = ("model_runner",)
TTL_MS = 90_000
PROMPT = [(7 * at) % 250 for at in range(300)]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, Node, Watcher, Bus, str]]:
    """tomato and sprout with a tiny model; tomato has read a prompt."""
    folder = make_small_models(tmp_path_factory)["llama"]
    toml = f'[model]\nname = "{folder}"\nengine = "transformers"\nthreads = 1\n[bus]\nmailbox_mib = 0\n'
    with EmbeddedBroker() as broker, two_nodes(tmp_path_factory.mktemp("nodes"), broker.url, RUNNER, toml) as pair:
        watcher = Watcher(broker.url)
        bus = Bus(url=broker.url, node="tester", client="talker")
        bus.start()
        try:
            for node in pair:
                watcher.wait_ready(node.name, RUNNER)
            asked = ModelGenerate("garden", prompt_tokens=PROMPT, max_new_tokens=2, ignore_eos=True)
            bus.ask("tomato", asked, ttl_ms=TTL_MS)
            yield (*pair, watcher, bus, broker.url)
        finally:
            bus.stop()
            watcher.bus.stop()


def resume(bus: Bus, node: str, ask: ModelResume) -> ModelResumed:
    resumed: ModelResumed = bus.ask(node, ask, ttl_ms=TTL_MS)
    return resumed


def go_on(bus: Bus, node: str, name: str) -> list[int]:
    done: RunDone = bus.ask(node, ModelGenerate(name, max_new_tokens=6, ignore_eos=True, keep=False), ttl_ms=TTL_MS)
    return done.tokens


def test_an_offer_has_the_token_ids_for_the_asker_alone_and_is_short(
    nodes: tuple[Node, Node, Watcher, Bus, str],
) -> None:
    tomato, sprout, _, bus, url = nodes
    nobody: HandoffOffer = bus.ask("tomato", HandoffOfferAsk("garden"), ttl_ms=TTL_MS)
    assert not unpack_signed(nobody.packed).wraps  # the tester is not trusted
    with Bus(url=url, node="sprout", client="asker") as asker:
        offer: HandoffOffer = asker.ask("tomato", HandoffOfferAsk("garden", sprout.identity.sealing_key), ttl_ms=TTL_MS)
    signed = unpack_signed(offer.packed)
    assert len(signed.wraps) == 1
    assert len(offer.packed) < len(msgspec.msgpack.encode(signed))
    opened = open_snapshot(signed, snapshot_id(signed), sprout.identity, sprout.peers.keyring())
    assert opened.private.tokens[: 4 * len(PROMPT)] == b"".join(token.to_bytes(4, "little") for token in PROMPT)
    assert not opened.manifest.chunks
    with pytest.raises(SnapshotRefused):
        open_snapshot(signed, snapshot_id(signed), tomato.identity, tomato.peers.keyring())


@pytest.mark.parametrize("way", ["auto", "chunks", "tokens"])
def test_a_node_branches_from_its_own_conversation_as_if_from_another_nodes(
    nodes: tuple[Node, Node, Watcher, Bus, str], way: str
) -> None:
    _, _, _, bus, _ = nodes
    ask = ModelResume("", "tomato", f"branch-{way}", "garden", way=way)  # type: ignore[arg-type]
    resumed = resume(bus, "tomato", ask)
    assert resumed.how == {"chunks": "exact", "tokens": "recomputed"}.get(way, resumed.how)
    assert resumed.tokens >= len(PROMPT) + 2
    if resumed.how == "exact":
        assert go_on(bus, "tomato", f"branch-{way}") == go_on(bus, "tomato", "garden")
    with pytest.raises(MindstreamError, match="nowhere"):
        resume(bus, "tomato", msgspec.structs.replace(ask, source="nowhere"))


def test_over_a_slow_link_the_holder_is_asked_to_transcode_what_it_has(
    nodes: tuple[Node, Node, Watcher, Bus, str],
) -> None:
    _, sprout, watcher, bus, _ = nodes
    saved: SnapshotSaved = bus.ask("tomato", ModelSnapshot("garden"), ttl_ms=TTL_MS)
    # The probe of its codecs runs behind its start.
    asked = HandoffOfferAsk("", snapshot=saved.snapshot)

    def offered() -> dict[str, float | None]:
        offer: HandoffOffer = bus.ask("tomato", asked, ttl_ms=TTL_MS)
        return {rung.codec: rung.save_ms for rung in offer.rungs}

    wait_for(lambda: {offered().get("int8"), offered().get("rotated4")}.isdisjoint({None}), "its rungs are not known")
    assert "raw" not in offered()  # it is raw
    sprout.stop()
    wait_for(lambda: watcher.state("sprout", "model_runner") != "ready", "sprout is still there")
    _believe_in_a_slow_link(sprout.data_dir / "model_runner" / "costs.msgpack")
    sprout.start()
    watcher.wait_ready("sprout", RUNNER)
    ask = ModelResume(saved.snapshot, "tomato", "kitchen", lossy=True, most_kl=99.0, least_top1=0.0, explain=True)
    resumed = resume(bus, "sprout", ask)
    assert (resumed.how, resumed.way) == ("lossy", "rotated4")
    assert resumed.snapshot != saved.snapshot
    assert resumed.size_bytes < saved.size_bytes / 2
    reasons = {option.way: option.reason for option in resumed.options}
    assert reasons["raw"] == "rotated4 is quicker"
    assert {"tokens", "int8"} <= set(reasons)
    # Nothing lossy is allowed: then it is fetched as it is.
    resumed = resume(bus, "sprout", msgspec.structs.replace(ask, conversation="hall", lossy=False))
    assert (resumed.how, resumed.snapshot) == ("exact", saved.snapshot)


def _believe_in_a_slow_link(path: Path) -> None:
    """Write into a node's book that its link and its reading are slow, so that what it decides is foreseeable."""
    book = msgspec.msgpack.decode(path.read_bytes())

    def each(seconds: float) -> dict[str, float]:
        return {"log_mean": math.log(seconds), "log_var": 0.0, "count": 24.0, "updated_us": time.time_ns() // 1000}

    for rate in book["prefill"].values():
        rate["sum_y"] *= 1e5
        rate["sum_xy"] *= 1e5
    book["links"] = {"tomato": {"latency": each(1e-3), "byte": each(1e-4)}}
    book["codecs"] |= {f"restore/{rung}": each(1e-9) for rung in ("raw", "lossless", "int8", "rotated4")}
    path.write_bytes(msgspec.msgpack.encode(book))
