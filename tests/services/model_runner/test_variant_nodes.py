"""Two nodes with two variants of one model: a certificate is measured on request, asked for, and decides a resume."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make install (extra `model`)")

from bench.lora import train_lora  # noqa: E402
from broker.embedded import EmbeddedBroker  # noqa: E402
from edge.bus import Bus  # noqa: E402
from edge.config import load_config  # noqa: E402
from protocol.errors import MindstreamError, ModelError  # noqa: E402
from protocol.messages import (  # noqa: E402
    ModelCertified,
    ModelCertify,
    ModelGenerate,
    ModelResume,
    ModelResumed,
    ModelSnapshot,
    VariantCertificateAsk,
)
from protocol.variants import open_variant  # noqa: E402
from services.model_runner.pairing import make  # noqa: E402
from services.model_runner.variant_store import FOLDER, VariantStore  # noqa: E402
from tests.support.nodes import Node, Watcher  # noqa: E402

pytestmark = pytest.mark.slow

TTL_MS = 120_000
ANYTHING = {"lossy": True, "most_kl": 1e6, "least_top1": 0.0, "way": "chunks"}
TEXT = "the tomato and the sprout have read the same book, and each remembers it in its own way. " * 4


@pytest.fixture(scope="module")
def nodes(small_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, Node, Bus]]:
    """``tomato`` has the base model, ``sprout`` the model with an adapter."""
    folder = tmp_path_factory.mktemp("nodes")
    train_lora(small_models["llama"], [list(range(60)), list(range(60, 120))], folder / "lora", steps=4, rate=1e-2)
    model = f'[model]\nname = "{small_models["llama"]}"\nengine = "transformers"\ndtype = "float32"\nthreads = 1\n'
    with EmbeddedBroker() as broker:
        tomato = Node(folder, "tomato", broker.url, ("model_runner",), model)
        sprout = Node(folder, "sprout", broker.url, ("model_runner",), f'{model}adapter = "{folder / "lora"}"\n')
        tomato.trust(sprout)
        sprout.trust(tomato)
        watcher = Watcher(broker.url)
        bus = Bus(url=broker.url, node="sprout", client="talker")
        bus.start()
        try:
            for node in (tomato, sprout):
                node.start()
            for node in (tomato, sprout):
                watcher.wait_ready(node.name, ("model_runner",))
            yield tomato, sprout, bus
        finally:
            for node in (tomato, sprout):
                if node.process is not None and node.process.poll() is None:
                    node.stop()
            bus.stop()
            watcher.bus.stop()


def saved(bus: Bus, node: str, conversation: str) -> str:
    bus.ask(node, ModelGenerate(conversation, prompt=TEXT, max_new_tokens=2, ignore_eos=True), ttl_ms=TTL_MS)
    identifier: str = bus.ask(node, ModelSnapshot(conversation), ttl_ms=TTL_MS).snapshot
    return identifier


def resume(bus: Bus, node: str, snapshot: str, holder: str, name: str, **wishes: Any) -> ModelResumed:
    resumed: ModelResumed = bus.ask(node, ModelResume(snapshot, holder, name, **wishes), ttl_ms=TTL_MS)
    return resumed


def test_kv_of_another_variant_is_used_once_its_certificate_is_measured(nodes: tuple[Node, Node, Bus]) -> None:
    _, _, bus = nodes
    snapshot = saved(bus, "tomato", "garden")
    found = resume(bus, "sprout", snapshot, "tomato", "not-lossy", way="chunks")
    assert found.how == "recomputed"
    assert "adapters" in found.reason
    assert "not exact" in found.reason
    with pytest.raises(ModelError, match="one variant"):
        bus.ask("sprout", ModelCertify("own"), ttl_ms=TTL_MS)
    certified: ModelCertified = bus.ask("sprout", ModelCertify("transformers"), ttl_ms=TTL_MS)
    assert certified.layers == 3
    assert certified.mean_kl > 0
    found = resume(bus, "sprout", snapshot, "tomato", "variant", **ANYTHING)
    assert found.how == "variant"
    assert "sprout's certificate" in found.reason
    # It goes on from there.
    done = bus.ask("sprout", ModelGenerate("variant", max_new_tokens=3, ignore_eos=True), ttl_ms=TTL_MS)
    assert len(done.tokens) == 3
    assert done.usage.cached_tokens == found.tokens - 1
    # Asked to be closer than it was measured to be, it is read again.
    found = resume(bus, "sprout", snapshot, "tomato", "strict", **{**ANYTHING, "most_kl": 0.0})
    assert found.how == "recomputed"
    assert "not near enough" in found.reason


def test_a_certificate_is_asked_of_the_holder_and_kept(nodes: tuple[Node, Node, Bus]) -> None:
    tomato, sprout, bus = nodes
    folder = sprout.data_dir / "model_runner"
    made = make(
        load_config(sprout.config).model,
        "own",
        "transformers",
        sprout.identity,
        VariantStore(folder / FOLDER, sprout.peers.keyring),
        cache_dir=folder,
    )
    found = resume(bus, "tomato", saved(bus, "sprout", "kitchen"), "sprout", "kitchen", **ANYTHING)
    assert found.how == "variant"
    assert "sprout's certificate" in found.reason
    kept = VariantStore(tomato.data_dir / "model_runner" / FOLDER, tomato.peers.keyring).find(made.source, made.target)
    assert kept == made
    # What was passed on is passed on again, as it was signed.
    signed = bus.ask("tomato", VariantCertificateAsk(made.source, made.target), ttl_ms=TTL_MS)
    assert open_variant(signed, tomato.peers.keyring()) == made
    with pytest.raises(MindstreamError, match="none"):
        bus.ask("tomato", VariantCertificateAsk(made.source, made.source), ttl_ms=TTL_MS)
