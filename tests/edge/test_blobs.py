"""Snapshots that cross the bus: whole, verified chunk by chunk, and on again after a cut."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge import blobs as blobs_module
from edge.blobs import BlobReceiver, BlobSender
from edge.bus import Bus
from edge.mailbox import Mailbox
from edge.snapshot_store import SnapshotStore
from protocol.errors import BadSignature, BlobError, NotFound, Overloaded, UnknownPeer
from protocol.identity import Identity, Keyring, digest
from protocol.layout import RAW, Block, ChunkRef, LayerLayout, Part
from protocol.manifest import (
    MANIFEST_VERSION,
    MAX_CHUNK_BYTES,
    ModelDigests,
    NumericsFingerprint,
    SignedManifest,
    SnapshotManifest,
    open_manifest,
    seal_manifest,
)
from protocol.messages import BlobChunk, BlobPull
from protocol.sealing import SEAL_BYTES
from tests.edge.bus_support import Child, wait_for
from tests.edge.conftest import OpenBus

CHUNKS = 24


@dataclass
class Held:
    """A snapshot of tomato's, in its store."""

    folder: Path
    store: SnapshotStore
    identity: Identity
    keyring: Keyring
    identifier: str
    signed: SignedManifest
    manifest: SnapshotManifest
    data: list[bytes]


def make_snapshot(folder: Path, chunks: int = CHUNKS) -> Held:
    """Random chunks, the last one short, signed by tomato."""
    identity = Identity.generate("tomato")
    data = [os.urandom(MAX_CHUNK_BYTES) for _ in range(chunks - 1)] + [os.urandom(1000)]
    refs = [ChunkRef(digest=digest(chunk), size_bytes=len(chunk)) for chunk in data]
    encoded_bytes = sum(map(len, data)) - chunks * SEAL_BYTES
    manifest = SnapshotManifest(
        version=MANIFEST_VERSION,
        model="none",
        digests=ModelDigests(weights=bytes(32), tokenizer=bytes(32), config=bytes(32)),
        creator="tomato",
        created_us=1,
        conversation="c1",
        fingerprint=NumericsFingerprint(
            engine="none",
            engine_version="0",
            device="cpu",
            instruction_set="none",
            dtype="float32",
            threads=1,
            chunk_schedule="none",
            batch_mode="deterministic",
        ),
        kv_dtype="float32",
        layers=[LayerLayout("full", 2**12, 2**10, 1, 1)],
        codec=RAW,
        cached_tokens=1,
        blocks=[Block(1, full=Part(encoded_bytes, b"".join(ref.digest for ref in refs)))],
        key_id=bytes(32),
        sealed=b"",
        total_bytes=sum(map(len, data)),
    )
    signed = seal_manifest(identity, manifest)
    store = SnapshotStore(folder / "store")
    identifier = store.save(signed, refs, data)
    (folder / "fingerprint").write_text(identity.fingerprint)
    return Held(folder, store, identity, Keyring({"tomato": identity.fingerprint}), identifier, signed, manifest, data)


@pytest.fixture
def held(tmp_path: Path) -> Held:
    return make_snapshot(tmp_path / "tomato")


class Holder:
    """tomato's side, in this process."""

    def __init__(self, held: Held, open_bus: OpenBus, make_bus: OpenBus, mailbox: Mailbox | None = None) -> None:
        self.blob_bus: Bus = open_bus("tomato", "model_runner-blobs")
        self.bus: Bus = make_bus("tomato", "model_runner")
        self.sender = BlobSender(
            held.store, self.blob_bus, lambda identifier: self.read(held, identifier), mailbox=mailbox
        )
        self.bus.hear(BlobPull, self.sender.pull)
        self.bus.start()

    @staticmethod
    def read(held: Held, identifier: str) -> SnapshotManifest:
        return open_manifest(held.store.manifest(identifier), held.keyring)


@pytest.fixture
def holder(held: Held, open_bus: OpenBus, make_bus: OpenBus, closing: Any) -> Holder:
    made = Holder(held, open_bus, make_bus)
    closing.callback(made.sender.stop)
    return made


@dataclass
class Fetcher:
    """sprout's side, in this process."""

    bus: Bus
    blob_bus: Bus
    store: SnapshotStore
    progress: list[tuple[int, int]]
    mailbox: Mailbox | None = None

    def pull(self, held: Held, timeout_s: float = 60.0) -> int:
        receiver = BlobReceiver(
            self.bus,
            self.blob_bus,
            self.store,
            lambda here, total: self.progress.append((here, total)),
            mailbox=self.mailbox,
        )
        return receiver.pull("tomato", held.identifier, held.manifest, timeout_s=timeout_s)


@pytest.fixture
def fetcher(open_bus: OpenBus, tmp_path: Path) -> Fetcher:
    return Fetcher(
        open_bus("sprout", "model_runner"),
        open_bus("sprout", "model_runner-blobs"),
        SnapshotStore(tmp_path / "sprout"),
        [],
    )


def lose(blob_bus: Bus, which: Callable[[BlobChunk], bool]) -> list[int]:
    """Make ``blob_bus`` lose the chunks that ``which`` picks; their indexes."""
    lost: list[int] = []
    say = blob_bus.say

    def say_some(message: Any, **names: Any) -> None:
        if which(message):
            lost.append(message.index)
        else:
            say(message, **names)

    blob_bus.say = say_some  # type: ignore[method-assign]
    return lost


def test_a_snapshot_crosses_whole(held: Held, holder: Holder, fetcher: Fetcher) -> None:
    assert fetcher.pull(held) == held.manifest.total_bytes
    assert fetcher.store.chunks(held.manifest) == held.data
    assert fetcher.progress[-1] == (held.manifest.total_bytes, held.manifest.total_bytes)
    assert holder.blob_bus.counters["blob.sent_bytes"] == held.manifest.total_bytes
    assert fetcher.pull(held) == 0, "what is here is not fetched again"


def test_what_is_here_already_does_not_cross_again(held: Held, holder: Holder, fetcher: Fetcher) -> None:
    for index in (0, 7, CHUNKS - 1):
        fetcher.store.put_chunk(held.manifest.chunks[index], held.data[index])
    expected = held.manifest.total_bytes - 2 * MAX_CHUNK_BYTES - 1000
    assert fetcher.pull(held) == expected
    assert holder.blob_bus.counters["blob.sent_bytes"] == expected
    assert fetcher.store.chunks(held.manifest) == held.data


def test_lost_chunks_are_asked_for_again(
    held: Held, holder: Holder, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blobs_module, "STALL_S", 0.3)
    once = {3, 4, CHUNKS - 1}
    lost = lose(holder.blob_bus, lambda chunk: chunk.index in once and not once.remove(chunk.index))
    fetcher.pull(held)
    assert sorted(lost) == [3, 4, CHUNKS - 1]
    assert fetcher.store.chunks(held.manifest) == held.data
    assert fetcher.bus.counters["blob.stalled"] >= 1


def test_a_chunk_damaged_on_the_way_is_refused_counted_and_asked_for_again(
    held: Held, holder: Holder, fetcher: Fetcher
) -> None:
    damaged = {2, 9}
    say = holder.blob_bus.say

    def damage(message: Any, **names: Any) -> None:
        if message.index in damaged:
            damaged.remove(message.index)
            message = BlobChunk(index=message.index, data=bytes([message.data[0] ^ 1]) + message.data[1:])
        say(message, **names)

    holder.blob_bus.say = damage  # type: ignore[method-assign]
    fetcher.pull(held)
    assert fetcher.bus.counters["refused.blob_chunk"] == 2
    assert fetcher.bus.counters["event.bad-chunk"] == 2
    assert fetcher.store.chunks(held.manifest) == held.data


def test_a_chunk_that_always_comes_damaged_ends_the_transfer(held: Held, holder: Holder, fetcher: Fetcher) -> None:
    say = holder.blob_bus.say

    def damage(message: Any, **names: Any) -> None:
        say(BlobChunk(index=5, data=b"damaged") if message.index == 5 else message, **names)

    holder.blob_bus.say = damage  # type: ignore[method-assign]
    with pytest.raises(BlobError, match="chunk 5 came damaged 3 times") as caught:
        fetcher.pull(held)
    assert caught.value.reason == "chunk damaged"
    assert not fetcher.store.has(held.manifest.chunks[5])


def test_a_chunk_damaged_on_its_holders_disk_is_lost_to_it_and_not_sent(
    held: Held, holder: Holder, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blobs_module, "STALL_S", 0.3)
    path = held.folder / "store" / "chunks" / held.manifest.chunks[5].digest.hex()
    path.write_bytes(bytes([held.data[5][0] ^ 1]) + held.data[5][1:])
    with pytest.raises(BlobError, match="has lost 1 of its chunks"):
        fetcher.pull(held)
    assert fetcher.bus.counters["refused.blob_chunk"] == 0


def test_a_holder_that_has_lost_chunks_says_so(held: Held, holder: Holder, fetcher: Fetcher) -> None:
    for index in (1, 2):
        held.store.drop_chunk(held.manifest.chunks[index])
    with pytest.raises(BlobError, match="has lost 2 of its chunks") as caught:
        fetcher.pull(held)
    assert caught.value.reason == "chunks missing"


def test_a_snapshot_that_the_holder_has_not_is_not_found(holder: Holder, fetcher: Fetcher, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="does not hold it"):
        fetcher.pull(make_snapshot(tmp_path / "elsewhere", chunks=2))


def test_a_silent_holder_is_a_blob_error(held: Held, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs_module, "PULL_TTL_MS", 300)
    with pytest.raises(BlobError, match="tomato does not answer") as caught:
        fetcher.pull(held)
    assert caught.value.reason == "holder silent"


def test_a_transfer_that_takes_too_long_keeps_what_came_and_goes_on_later(
    held: Held, holder: Holder, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blobs_module, "STALL_S", 0.2)
    lose(holder.blob_bus, lambda chunk: chunk.index >= 10)
    with pytest.raises(BlobError, match=f"10 of {CHUNKS} chunks") as caught:
        fetcher.pull(held, timeout_s=2.0)
    assert caught.value.reason == "too slow"
    del holder.blob_bus.say  # what it lost it sends now
    assert fetcher.pull(held) == held.manifest.total_bytes - 10 * MAX_CHUNK_BYTES
    assert fetcher.store.chunks(held.manifest) == held.data


def test_a_receiver_killed_half_way_goes_on_where_it_was(
    held: Held, holder: Holder, start_child: Callable[..., Child], tmp_path: Path
) -> None:
    folder = tmp_path / "sprout"
    lost = lose(holder.blob_bus, lambda chunk: chunk.index >= CHUNKS // 2)
    child = start_child("pull", folder, held.folder, held.identifier)
    wait_for(lambda: len(child.lines) >= CHUNKS // 2, f"half of it is here: {child.lines}")
    child.kill()
    here = sum(SnapshotStore(folder).has(ref) for ref in held.manifest.chunks)
    assert here == CHUNKS // 2
    assert lost
    del holder.blob_bus.say
    sent_before = holder.blob_bus.counters["blob.sent_bytes"]
    again = start_child("pull", folder, held.folder, held.identifier)
    again.wait_for("pulled")
    assert SnapshotStore(folder).chunks(held.manifest) == held.data
    assert holder.blob_bus.counters["blob.sent_bytes"] > sent_before
    assert sum(line.startswith("here") for line in again.lines) == CHUNKS - here


def test_a_holder_killed_half_way_goes_on_when_it_is_back(
    held: Held, fetcher: Fetcher, start_child: Callable[..., Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blobs_module, "STALL_S", 0.5)
    child = start_child("hold-blobs", held.folder)
    child.wait_for("ready")
    put = fetcher.store.put_chunk
    stored: list[int] = []

    def put_and_kill(ref: ChunkRef, data: bytes | memoryview) -> None:
        put(ref, data)
        stored.append(ref.size_bytes)
        if len(stored) == 5:
            child.kill()
            start_child("hold-blobs", held.folder)

    fetcher.store.put_chunk = put_and_kill  # type: ignore[method-assign]
    fetcher.pull(held)
    assert fetcher.store.chunks(held.manifest) == held.data
    assert len(stored) == CHUNKS


def test_two_receivers_at_once_each_get_theirs(
    held: Held, holder: Holder, fetcher: Fetcher, open_bus: OpenBus, tmp_path: Path
) -> None:
    other = Fetcher(open_bus("mars", "a"), open_bus("mars", "b"), SnapshotStore(tmp_path / "mars"), [])
    with ThreadPoolExecutor(2) as pool:
        for pulled in [pool.submit(each.pull, held) for each in (fetcher, other)]:
            assert pulled.result(60) == held.manifest.total_bytes
    for each in (fetcher, other):
        assert each.store.chunks(held.manifest) == held.data


def test_a_pull_beyond_what_a_sender_may_have_queued_is_refused(
    held: Held, open_bus: OpenBus, monkeypatch: pytest.MonkeyPatch, closing: Any
) -> None:
    monkeypatch.setattr(blobs_module, "MAX_QUEUED", 10)
    sender = BlobSender(held.store, open_bus("tomato", "blobs"), lambda identifier: held.manifest)
    closing.callback(sender.stop)

    class Pull:
        data = BlobPull(snapshot=held.identifier, transfer="t", have=b"", credit=16)

    with pytest.raises(Overloaded, match="wait to be sent"):
        sender.pull(Pull())  # type: ignore[arg-type]


# --- the store ----------------------------------------------------------------------------------------------


def test_a_manifest_whose_file_was_changed_is_refused(held: Held) -> None:
    path = held.folder / "store" / "manifests" / held.identifier
    for change in (
        lambda body: body[:-1],
        lambda body: b"\xc1" + body[1:],
        lambda body: body.replace(b"tomato", b"potato"),
        lambda body: b"",
    ):
        original = path.read_bytes()
        path.write_bytes(change(original))
        with pytest.raises(BlobError, match="reading the manifest"):
            held.store.manifest(held.identifier)
        path.write_bytes(original)
    assert held.store.manifest(held.identifier) == held.signed


def test_a_manifest_changed_under_its_signature_is_refused(held: Held) -> None:
    changes: list[dict[str, Any]] = [
        {"conversation": "other"},
        {"blocks": []},
        {"creator": "mars"},
        {"sealed": bytes(8)},
    ]
    for change in changes:
        body = msgspec.msgpack.encode(msgspec.structs.replace(held.manifest, **change))
        with pytest.raises((BadSignature, UnknownPeer)):
            open_manifest(SignedManifest(manifest=body, signature=held.signed.signature), held.keyring)
    with pytest.raises(BadSignature):
        open_manifest(SignedManifest(manifest=held.signed.manifest, signature=bytes(64)), held.keyring)
    with pytest.raises(UnknownPeer):
        open_manifest(held.signed, Keyring())


def test_names_that_are_no_ids_do_not_leave_the_folder(held: Held) -> None:
    for name in ("../../etc/passwd", "", "a" * 63, "A" * 64, "0" * 64):
        with pytest.raises(NotFound):
            held.store.manifest(name)


@pytest.mark.parametrize("damage", [lambda data: b"x", lambda data: bytes(len(data))])
def test_a_damaged_chunk_is_found_and_removed(held: Held, damage: Callable[[bytes], bytes]) -> None:
    ref = held.manifest.chunks[0]
    (held.folder / "store" / "chunks" / ref.digest.hex()).write_bytes(damage(held.data[0]))
    with pytest.raises(BlobError, match=f"1 of its {CHUNKS} chunks are missing or"):
        held.store.chunks(held.manifest)
    assert held.store.chunk(ref) is None
    held.store.put_chunk(ref, held.data[0])
    assert held.store.chunks(held.manifest) == held.data


def make_sharing(held: Held, store: SnapshotStore, *, last: bytes) -> str:
    """Another snapshot in ``store`` whose chunks are those of ``held``, but for the last one."""
    refs = [*held.manifest.chunks[:-1], ChunkRef(digest(last), len(last))]
    part = Part(sum(ref.size_bytes - SEAL_BYTES for ref in refs), b"".join(ref.digest for ref in refs))
    total = sum(ref.size_bytes for ref in refs)
    manifest = msgspec.structs.replace(held.manifest, blocks=[Block(1, full=part)], total_bytes=total)
    return store.save(seal_manifest(held.identity, manifest), refs, [*held.data[:-1], last])


def test_removing_a_snapshot_leaves_what_another_shares_with_it(held: Held) -> None:
    other = make_sharing(held, held.store, last=bytes(500))
    assert held.store.identifiers() == [other, held.identifier]
    assert held.store.remove(held.identifier) == len(held.data[-1])
    assert held.store.identifiers() == [other]
    chunks = open_manifest(held.store.manifest(other), held.keyring)
    assert held.store.chunks(chunks) == [*held.data[:-1], bytes(500)]
    with pytest.raises(NotFound):
        held.store.remove(held.identifier)
    assert held.store.remove(other) == chunks.total_bytes
    assert list((held.folder / "store" / "chunks").iterdir()) == []


def test_nothing_is_removed_while_a_snapshot_is_being_written(held: Held) -> None:
    with held.store.writing(), held.store.writing(), pytest.raises(BlobError, match="being saved or fetched"):
        held.store.remove(held.identifier)
    assert held.store.chunks(held.manifest) == held.data
    assert held.store.remove(held.identifier) == held.manifest.total_bytes
