"""Where chunks land: on the disk and in the cache at once; what goes wrong is said to who goes on sending."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from edge.snapshot_store import SnapshotStore
from protocol.errors import SnapshotRefused, StorageError
from protocol.layout import ChunkRef
from protocol.manifest import open_private
from protocol.sealing import DataKey
from services.model_runner import snapshot
from services.model_runner.generation import begin
from services.model_runner.intake import Intake
from services.model_runner.landing import Landing
from services.model_runner.transformers_engine import TransformersEngine
from tests.support.waiting import wait_for

pytestmark = pytest.mark.model

KEY = DataKey(bytes(range(32)))
PROMPT = [(11 * at) % 250 for at in range(1_100)]


@pytest.fixture
def packed(engine: TransformersEngine) -> snapshot.Packed:
    state = begin(engine, PROMPT)
    engine.prefill(state.cache, PROMPT[:-1])
    found = snapshot.pack(engine, state, conversation="garden", creator="tomato", key=KEY)
    state.cache.close()
    return found


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(3) as found:
        yield found


def intake(engine: TransformersEngine, found: snapshot.Packed) -> Intake:
    return snapshot.intake(engine, found.manifest, open_private(found.manifest, KEY), KEY)


def refs(found: snapshot.Packed) -> list[tuple[ChunkRef, bytes]]:
    return [(ref, bytes(chunk)) for ref, chunk in zip(found.manifest.chunks, found.chunks, strict=True)]


def test_what_has_landed_is_in_the_cache_before_it_is_synced_and_kept_only_after(
    tmp_path: Path, engine: TransformersEngine, packed: snapshot.Packed, threads: ThreadPoolExecutor
) -> None:
    store, taking = SnapshotStore(tmp_path / "snapshots"), intake(engine, packed)
    landing = Landing(store, packed.manifest, taking, threads)
    assert landing.take_stored() == 0
    for ref, chunk in refs(packed):
        assert not landing.has(ref)
        landing.put_chunk(ref, chunk)
        assert landing.has(ref)
    landing.finish()
    assert taking.whole
    assert landing.busy_s > 0
    # Another boot of the node drops what was not synced; this one was.
    landing.sync()
    again = SnapshotStore(tmp_path / "snapshots")
    assert all(again.verified_chunk(ref, index) == chunk for index, (ref, chunk) in enumerate(refs(packed)))


def test_a_transfer_that_was_cut_goes_on_with_what_is_on_the_disk(
    tmp_path: Path, engine: TransformersEngine, packed: snapshot.Packed, threads: ThreadPoolExecutor
) -> None:
    store = SnapshotStore(tmp_path / "snapshots")
    first = Landing(store, packed.manifest, intake(engine, packed), threads)
    for ref, chunk in refs(packed)[::2]:
        first.put_chunk(ref, chunk)
    first.abandon()
    taking = intake(engine, packed)
    second = Landing(store, packed.manifest, taking, threads)
    assert second.take_stored() == sum(len(chunk) for _, chunk in refs(packed)[::2])
    assert [second.has(ref) for ref, _ in refs(packed)] == [index % 2 == 0 for index in range(len(packed.chunks))]
    for ref, chunk in refs(packed)[1::2]:
        second.put_chunk(ref, chunk)
    second.finish()
    assert taking.whole


def test_a_chunk_that_was_damaged_on_the_disk_is_asked_for_again(
    tmp_path: Path, engine: TransformersEngine, packed: snapshot.Packed, threads: ThreadPoolExecutor
) -> None:
    store = SnapshotStore(tmp_path / "snapshots")
    for ref, chunk in refs(packed):
        store.put_chunk(ref, chunk, sync=True)
    ref = packed.manifest.chunks[1]
    (path,) = (tmp_path / "snapshots").rglob(ref.digest.hex())
    path.chmod(0o600)
    path.write_bytes(bytes(ref.size_bytes))
    landing = Landing(store, packed.manifest, intake(engine, packed), threads)
    assert landing.take_stored() == packed.manifest.total_bytes - ref.size_bytes
    assert not landing.has(ref)
    assert not store.has(ref)


def test_a_chunk_that_does_not_open_is_said_at_the_next_one_and_at_the_end(
    tmp_path: Path, engine: TransformersEngine, packed: snapshot.Packed, threads: ThreadPoolExecutor
) -> None:
    landing = Landing(SnapshotStore(tmp_path / "snapshots"), packed.manifest, intake(engine, packed), threads)
    (first, chunk), (second, other), *_ = refs(packed)
    landing.put_chunk(first, bytes(len(chunk)))  # of the right digest, as far as who verified it is concerned
    with pytest.raises(SnapshotRefused):
        landing.finish()
    with pytest.raises(SnapshotRefused, match=r"blocks\[0\]"):
        landing.put_chunk(second, other)


def test_a_disk_that_is_full_ends_it_with_the_disks_own_error(
    tmp_path: Path,
    engine: TransformersEngine,
    packed: snapshot.Packed,
    threads: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = SnapshotStore(tmp_path / "snapshots")

    def full(_ref: ChunkRef, _data: object, *, sync: bool = False) -> None:
        raise StorageError(f"writing a chunk: no space left on device, sync {sync}", reason="ENOSPC")

    monkeypatch.setattr(store, "put_chunk", full)
    landing = Landing(store, packed.manifest, intake(engine, packed), threads)
    landing.put_chunk(*refs(packed)[0])
    with pytest.raises(StorageError, match="no space"):
        landing.finish()


def test_a_transfer_that_fills_the_disk_gives_back_what_it_took_and_no_more(
    tmp_path: Path,
    engine: TransformersEngine,
    packed: snapshot.Packed,
    threads: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = SnapshotStore(tmp_path / "snapshots")
    put_chunk, chunks = store.put_chunk, refs(packed)
    put_chunk(*chunks[0])  # of another snapshot, say
    last = chunks[-1][0].digest

    def full(ref: ChunkRef, data: bytes, *, sync: bool = False) -> None:
        if ref.digest == last:
            raise StorageError("writing a chunk: no space left on device", reason="ENOSPC")
        put_chunk(ref, data, sync=sync)

    monkeypatch.setattr(store, "put_chunk", full)
    landing = Landing(store, packed.manifest, intake(engine, packed), threads)
    for ref, chunk in chunks:
        landing.put_chunk(ref, chunk)
    with pytest.raises(StorageError, match="no space"):
        landing.finish()
    assert [store.has(ref) for ref, _ in chunks] == [True] + [False] * (len(chunks) - 1)


def test_who_sends_faster_than_chunks_are_worked_on_waits(
    tmp_path: Path, engine: TransformersEngine, packed: snapshot.Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.model_runner.landing.MOST_WAITING", 2)
    taking = intake(engine, packed)
    with ThreadPoolExecutor(1) as slow, ThreadPoolExecutor(1) as sending:
        landing = Landing(SnapshotStore(tmp_path / "snapshots"), packed.manifest, taking, slow)
        gate: list[ThreadPoolExecutor] = []
        busy = slow.submit(lambda: wait_for(lambda: bool(gate), "the gate was not opened"))

        def send() -> None:
            for ref, chunk in refs(packed):
                landing.put_chunk(ref, chunk)

        sent = sending.submit(send)
        wait_for(lambda: landing.has(packed.manifest.chunks[1]), "two did not land")
        assert not landing.has(packed.manifest.chunks[3])
        assert not sent.done()
        gate.append(slow)
        sent.result()
        busy.result()
        landing.finish()
    assert taking.whole
