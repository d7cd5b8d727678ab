"""The store's promise over a power cut: a manifest that is there has all its chunks."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from edge import snapshot_store as store_module
from edge.snapshot_store import SnapshotStore
from protocol.errors import BlobError
from tests.edge.test_blobs import Held, make_snapshot


@pytest.fixture
def held(tmp_path: Path) -> Held:
    """A snapshot of tomato's, in another store."""
    return make_snapshot(tmp_path / "tomato", chunks=6)


def put_chunks(held: Held, store: SnapshotStore) -> None:
    for ref, data in zip(held.manifest.chunks, held.data, strict=True):
        store.put_chunk(ref, data)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_every_chunk_is_on_the_disk_before_the_manifest_is_there(
    held: Held, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SnapshotStore(tmp_path / "store")
    happened: list[tuple[str, str]] = []
    fsync, replace = os.fsync, Path.replace

    def watched_fsync(descriptor: int) -> None:
        fsync(descriptor)
        happened.append(("synced", Path(f"/proc/self/fd/{descriptor}").readlink().name))

    def watched_replace(self: Path, target: Any) -> Path:
        happened.append(("named", Path(target).name))
        return replace(self, target)

    put_chunks(held, store)
    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    store.put_manifest(held.signed)
    chunks = {ref.digest.hex() for ref in held.manifest.chunks}
    assert set(happened[: len(chunks)]) == {("synced", name) for name in chunks}
    assert set(happened[len(chunks) : 2 * len(chunks)]) == {("named", name) for name in chunks}
    assert happened[2 * len(chunks)] == ("synced", "chunks")
    assert happened.index(("named", held.identifier)) > 2 * len(chunks)
    assert happened[-1] == ("synced", "manifests")
    assert names(tmp_path / "store" / "chunks") == chunks
    assert names(tmp_path / "store" / "arriving") == set()


def test_what_was_not_synced_outlives_its_process_and_not_its_boot(
    held: Held, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_chunks(held, SnapshotStore(tmp_path / "store"))
    again = SnapshotStore(tmp_path / "store")
    assert all(again.has(ref) for ref in held.manifest.chunks)
    assert again.chunks(held.manifest) == held.data
    with again.writing():
        monkeypatch.setattr(store_module, "boot_id", lambda: "another")
        other = SnapshotStore(tmp_path / "store")
        assert again.chunks(held.manifest) == held.data, "nothing is taken from who is writing"
    assert not any(other.has(ref) for ref in held.manifest.chunks)
    after = SnapshotStore(tmp_path / "store")
    assert names(tmp_path / "store") == set()
    with pytest.raises(BlobError, match="6 of its 6 chunks are missing"):
        after.chunks(held.manifest)


def test_an_equal_chunk_that_another_put_is_synced_for_this_manifest_too(held: Held, tmp_path: Path) -> None:
    put_chunks(held, SnapshotStore(tmp_path / "store"))  # whoever it was, it was killed
    store = SnapshotStore(tmp_path / "store")
    put_chunks(held, store)
    store.put_manifest(held.signed)
    assert len(names(tmp_path / "store" / "chunks")) == 6
    assert names(tmp_path / "store" / "arriving") == set()
    before = [path.stat().st_ino for path in sorted((tmp_path / "store" / "chunks").iterdir())]
    put_chunks(held, store)
    store.put_manifest(held.signed)
    assert [path.stat().st_ino for path in sorted((tmp_path / "store" / "chunks").iterdir())] == before


def test_a_chunk_damaged_on_the_disk_is_healed_by_putting_it_again(held: Held, tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path / "store")
    put_chunks(held, store)
    store.put_manifest(held.signed)
    ref = held.manifest.chunks[2]
    (tmp_path / "store" / "chunks" / ref.digest.hex()).write_bytes(b"damaged")
    assert not store.has(ref)
    store.put_chunk(ref, held.data[2])
    assert store.chunks(held.manifest) == held.data
    store.put_chunk(ref, held.data[2], sync=True)
    assert names(tmp_path / "store" / "arriving") == set()
    assert store.chunks(held.manifest) == held.data


def test_chunks_are_found_while_they_are_synced(held: Held, tmp_path: Path) -> None:
    for turn in range(10):
        store = SnapshotStore(tmp_path / str(turn))
        put_chunks(held, store)
        missed: list[int] = []
        looking, ended = threading.Event(), threading.Event()

        def look(store: SnapshotStore = store, missed: list[int] = missed, ended: threading.Event = ended) -> None:
            while not ended.is_set():
                looking.set()  # noqa: B023 - the thread ends within this turn
                missed.extend(at for at, ref in enumerate(held.manifest.chunks) if store.chunk(ref) != held.data[at])

        thread = threading.Thread(target=look)
        thread.start()
        assert looking.wait(60.0)
        store.sync_chunks(held.manifest.chunks)
        ended.set()
        thread.join(60.0)
        assert missed == []


def test_removing_a_snapshot_takes_what_was_not_synced_as_well(held: Held, tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path / "store")
    store.put_manifest(held.signed)
    put_chunks(held, store)
    assert store.remove(held.identifier) == held.manifest.total_bytes
    assert names(tmp_path / "store") == set()
