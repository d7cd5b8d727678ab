"""Bases on the disk and over a real broker: found for their model alone, whole and signed, or not used."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("torch", reason="torch is not installed: make install (extra `model`)")

from broker.embedded import EmbeddedBroker
from edge.blobs import BlobSender
from edge.bus import Bus
from edge.snapshot_store import SnapshotStore
from protocol.basis_manifest import BasisManifest, SignedBasis, basis_id, sign_basis
from protocol.errors import BadSignature, BlobError, MalformedMessage, NotFound, SnapshotRefused, UnknownPeer
from protocol.identity import DOMAIN_BASIS, Identity, Keyring, digest
from protocol.manifest import ModelDigests
from protocol.messages import BlobChunk, BlobPull, ModelBasisAsk
from services.model_runner.bases import find_basis, here, keep_basis
from services.model_runner.basis_sharing import BasisFetcher, BasisShelf, HeldBasis, ask_for, fetch_basis
from services.model_runner.codecs.calibrate import calibrate
from services.model_runner.engine import ModelSpec
from services.model_runner.transformers_engine import TransformersEngine
from tests.support.waiting import wait_for

TOMATO = Identity("tomato", bytes(range(32)))
MALLORY = Identity("mallory", bytes(32))
KEYRING = Keyring({"tomato": TOMATO.fingerprint})


@pytest.fixture(scope="module")
def data(engine: TransformersEngine) -> bytes:
    texts = [[(seed * at) % 97 for at in range(5 * 48)] for seed in (3, 5)]
    return calibrate(engine, texts, group_layers=2, prefix_tokens=32, continuation_tokens=16)


@pytest.fixture
def signed(engine: TransformersEngine, data: bytes) -> SignedBasis:
    return sign_basis(TOMATO, engine.spec.name, engine.spec.digests, data)


def other_build(spec: ModelSpec, **changes: Any) -> ModelSpec:
    return dataclasses.replace(spec, digests=msgspec.structs.replace(spec.digests, **changes))


def test_a_basis_is_found_for_every_build_of_its_model_and_for_no_other(
    engine: TransformersEngine, signed: SignedBasis, data: bytes, tmp_path: Path
) -> None:
    spec = engine.spec
    assert find_basis(spec, folder=tmp_path / "bases") is None
    keep_basis(signed, data, tmp_path / "bases")
    found = find_basis(spec, keyring=KEYRING, folder=tmp_path / "bases")
    assert found is not None
    assert found.digest == digest(data)
    assert find_basis(spec, folder=tmp_path / "bases") is found, "read once"
    assert find_basis(spec, digest(data), folder=tmp_path / "bases") is found
    assert find_basis(spec, digest(b"another"), folder=tmp_path / "bases") is None
    assert find_basis(other_build(spec, weights=bytes(32)), folder=tmp_path / "bases") is not None
    for name in ("tokenizer", "config"):
        assert find_basis(other_build(spec, **{name: bytes(32)}), folder=tmp_path / "bases") is None
    assert find_basis(other_build(spec, adapters=(bytes(32),)), folder=tmp_path / "bases") is None


def test_what_nobody_signed_or_a_stranger_or_was_changed_is_not_used(
    engine: TransformersEngine, signed: SignedBasis, data: bytes, tmp_path: Path
) -> None:
    path = keep_basis(signed, data, tmp_path)
    assert find_basis(engine.spec, keyring=Keyring(), folder=tmp_path) is None
    assert find_basis(other_build(engine.spec, weights=b"1" * 32), folder=tmp_path) is not None
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert find_basis(other_build(engine.spec, weights=b"2" * 32), folder=tmp_path) is None
    path.write_bytes(data)
    path.with_suffix(".signed").write_bytes(b"\xc1")
    assert here(tmp_path) == []
    path.with_suffix(".signed").unlink()
    assert here(tmp_path) == []


def test_a_folder_that_rests_is_looked_into_again_when_it_or_the_trust_changes(
    engine: TransformersEngine, signed: SignedBasis, data: bytes, tmp_path: Path
) -> None:
    path = keep_basis(signed, data, tmp_path)
    os.utime(tmp_path, (1, 1))
    for _ in range(2):
        assert [found.path for found in here(tmp_path, KEYRING)] == [path]
    assert here(tmp_path, Keyring()) == []
    assert here(tmp_path, Keyring({"tomato": MALLORY.fingerprint})) == []
    assert [found.path for found in here(tmp_path, KEYRING)] == [path]
    other = keep_basis(sign_basis(TOMATO, "other", engine.spec.digests, data + b"\xc0"), data + b"\xc0", tmp_path)
    assert {found.path for found in here(tmp_path, KEYRING)} == {path, other}
    other.unlink()
    assert [found.path for found in here(tmp_path, KEYRING)] == [path]


class Site:
    """``tomato``, who has bases in ``folder``; ``sprout`` asks."""

    def __init__(self, url: str, folder: Path, sprout: Bus, sprout_blobs: Bus, cleanup: ExitStack) -> None:
        self.folder = folder / "tomato"
        self.shelf = BasisShelf(TOMATO, folder=self.folder)
        self.answer: Callable[[ModelBasisAsk], SignedBasis] = self.shelf.manifest
        self.bus = Bus(url=url, node="tomato", client="model_runner")
        store = SnapshotStore(folder / "store")
        self.sender = BlobSender(store, self.bus, lambda _: pytest.fail("a snapshot"), self.shelf.held)
        cleanup.callback(self.bus.stop)
        cleanup.callback(self.sender.stop)
        self.bus.hear(ModelBasisAsk, lambda message: self.answer(message.data))
        self.bus.hear(BlobPull, self.sender.pull)
        self.bus.start()
        self.sprout, self.sprout_blobs = sprout, sprout_blobs
        wait_for(lambda: self.bus.connected, "tomato is on the broker")

    def fetch(self, ask: ModelBasisAsk, into: Path, **options: Any) -> Any:
        keyring = options.pop("keyring", KEYRING)
        return fetch_basis(self.sprout, self.sprout_blobs, keyring, "tomato", ask, folder=into, **options)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with ExitStack() as cleanup:
        broker = cleanup.enter_context(EmbeddedBroker())
        sprout = cleanup.enter_context(Bus(url=broker.url, node="sprout", client="cli-1"))
        blobs = cleanup.enter_context(Bus(url=broker.url, node="sprout", client="cli-2"))
        yield Site(broker.url, tmp_path, sprout, blobs, cleanup)


def test_a_node_asks_another_for_the_basis_and_keeps_it(
    engine: TransformersEngine, signed: SignedBasis, data: bytes, site: Site, tmp_path: Path
) -> None:
    ask = ask_for(engine.spec.digests, engine.spec.name)
    with pytest.raises(NotFound, match="tomato has none"):
        site.fetch(ask, tmp_path / "sprout")
    keep_basis(signed, data, site.folder)
    progress: list[tuple[int, int]] = []
    found = site.fetch(ask, tmp_path / "sprout", on_progress=lambda *each: progress.append(each))
    assert progress[-1] == (len(data), len(data))
    assert found.path.read_bytes() == data
    assert find_basis(engine.spec, keyring=KEYRING, folder=tmp_path / "sprout") is not None
    # It is here: its chunks do not cross the bus again.
    progress.clear()
    assert site.fetch(ask, tmp_path / "sprout", on_progress=lambda *each: progress.append(each)).path == found.path
    assert progress == []
    # One that is named is another matter.
    with pytest.raises(NotFound):
        site.fetch(ask_for(engine.spec.digests, engine.spec.name, digest(b"another")), tmp_path / "sprout")


def test_what_is_not_signed_by_the_trusted_holder_or_not_what_was_asked_for_is_not_kept(
    engine: TransformersEngine, signed: SignedBasis, data: bytes, site: Site, tmp_path: Path
) -> None:
    into = tmp_path / "sprout"
    keep_basis(signed, data, site.folder)
    spec = engine.spec
    ask = ask_for(spec.digests, spec.name)
    with pytest.raises(UnknownPeer):
        site.fetch(ask, into, keyring=Keyring())
    both = Keyring({"tomato": TOMATO.fingerprint, "mallory": MALLORY.fingerprint})
    other = ModelDigests(bytes(32), bytes(32), bytes(32))
    good = msgspec.msgpack.decode(signed.manifest, type=BasisManifest)
    lied = msgspec.msgpack.encode(msgspec.structs.replace(good, total_bytes=2**50))
    for answer, error in (
        (sign_basis(MALLORY, spec.name, spec.digests, data), BadSignature),
        (sign_basis(TOMATO, spec.name, other, data), SnapshotRefused),
        (SignedBasis(signed.manifest, bytes(64)), BadSignature),
        (SignedBasis(lied, TOMATO.sign(DOMAIN_BASIS, lied)), MalformedMessage),
    ):
        site.answer = lambda _ask, answer=answer: answer  # type: ignore[misc]
        with pytest.raises(error):
            site.fetch(ask, into, keyring=both)
    # A file of another model under a manifest of this one; and one that is no basis at all.
    for wrong in (b"no basis", data.replace(spec.digests.config, bytes(32), 1)):
        site.answer = lambda _ask, wrong=wrong: _give(site, sign_basis(TOMATO, spec.name, spec.digests, wrong), wrong)  # type: ignore[misc]
        with pytest.raises(SnapshotRefused):
            site.fetch(ask, into)
    assert here(into) == []


def test_a_chunk_that_comes_damaged_is_not_kept(
    engine: TransformersEngine, signed: SignedBasis, data: bytes, site: Site, tmp_path: Path
) -> None:
    keep_basis(signed, data, site.folder)
    say = site.bus.say

    def damaged(message: Any, **names: Any) -> None:
        if isinstance(message, BlobChunk):
            message = BlobChunk(message.index, bytes(message.data[:-1]) + bytes([message.data[-1] ^ 1]))
        say(message, **names)

    with contextlib.ExitStack() as undo:
        site.bus.say = damaged  # type: ignore[method-assign]
        undo.callback(setattr, site.bus, "say", say)
        with pytest.raises(BlobError, match="damaged"):
            site.fetch(ask_for(engine.spec.digests, engine.spec.name), tmp_path / "sprout")
    assert here(tmp_path / "sprout") == []


def test_a_basis_that_a_snapshot_needs_is_fetched_behind_it(
    engine: TransformersEngine, signed: SignedBasis, data: bytes, site: Site, tmp_path: Path
) -> None:
    into = tmp_path / "sprout"
    fetcher = BasisFetcher(site.sprout, site.sprout_blobs, lambda: KEYRING, lambda: False, into)
    counters = site.sprout.counters
    fetcher.want(engine.spec, "tomato", digest(data))
    wait_for(lambda: counters["basis.not_fetched"] == 1, "tomato has said that it has none")
    keep_basis(signed, data, site.folder)
    fetcher.want(engine.spec, "tomato", digest(data))
    wait_for(lambda: counters["basis.fetched"] == 1, "it is fetched")
    assert find_basis(engine.spec, digest(data), keyring=KEYRING, folder=into) is not None
    fetcher.stop()


def _give(site: Site, signed: SignedBasis, data: bytes) -> SignedBasis:
    chunks = msgspec.msgpack.decode(signed.manifest, type=BasisManifest).chunk_list()
    site.shelf._given[basis_id(signed)] = HeldBasis(chunks, data)
    return signed
