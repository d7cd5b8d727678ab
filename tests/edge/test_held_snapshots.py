"""A snapshot that is given away before it is synced: it can be fetched at once, and is on the disk behind that."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge.snapshot_store import SnapshotStore
from protocol.errors import NotFound
from tests.support.snapshots import small_snapshot


def test_a_held_snapshot_can_be_given_away_and_is_on_the_disk_once_it_is_put(tmp_path: Path) -> None:
    small = small_snapshot()
    store = SnapshotStore(tmp_path)
    with store.saving() as put:
        for ref, chunk in zip(small.refs, small.chunks, strict=True):
            put(ref, bytearray(chunk))
        assert store.hold_manifest(small.signed) == small.identifier
        assert store.manifest(small.identifier) == small.signed
        assert all(store.has(ref) for ref in small.refs)
        with pytest.raises(NotFound):
            SnapshotStore(tmp_path).manifest(small.identifier)
        store.put_held_manifest(small.identifier)
    assert SnapshotStore(tmp_path).manifest(small.identifier) == small.signed
