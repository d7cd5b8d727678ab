"""The golden snapshots: what was once saved is read for ever, and what must be the same bytes is.

Another program's reader goes through the same files in ``tests/docs/test_snapshot_reader.py``.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("numpy", reason="numpy is not installed: make install (extra `onnx`)")

import numpy as np

from edge.snapshot_store import SnapshotStore
from protocol.errors import SnapshotRefused
from protocol.identity import Identity, Keyring, digest
from protocol.manifest import SnapshotManifest, snapshot_id
from protocol.sharing import Opened, open_snapshot
from services.model_runner.snapshot import Read
from tests.golden import snapshots

INDEX: dict[str, Any] = json.loads((snapshots.FOLDER / "index.json").read_text("utf-8"))
WRITTEN: dict[str, dict[str, Any]] = INDEX["snapshots"]
MOST_BYTES = 300_000
every_one = pytest.mark.parametrize("name", WRITTEN)
every_row = pytest.mark.parametrize("name", snapshots.ROWS)


@pytest.fixture
def store(tmp_path: Path) -> SnapshotStore:
    return SnapshotStore(shutil.copytree(snapshots.FOLDER, tmp_path / "snapshots"))


def row_of(name: str) -> str:
    return name.partition(".v")[0]


def opened(store: SnapshotStore, name: str, reader: Identity = snapshots.TOMATO) -> Opened:
    identifier = WRITTEN[name]["snapshot"]
    keyring = Keyring({"tomato": INDEX["fingerprint"]})
    return open_snapshot(store.manifest(identifier), identifier, reader, keyring)


def check(found: Read, manifest: SnapshotManifest, said: dict[str, Any], name: str) -> None:
    """What was read is what the index says."""
    assert found.reason == ""
    assert len(found.tokens) == said["tokens"]
    assert digest(np.array(found.tokens, "<u4").tobytes()).hex() == said["tokens_blake3"]
    assert manifest.kept_tokens == said["kept_tokens"]
    if "kv_blake3" in said:
        assert snapshots.kv_digest(found.layers) == said["kv_blake3"]
    if "errors" in said:
        exact = snapshots.layers_of(snapshots.ROWS[row_of(name)])
        assert snapshots.errors(found.layers, exact) == pytest.approx(said["errors"], abs=2e-4)
    if "logits_blake3" in said:
        assert found.logits is not None
        assert digest(found.logits.astype("<f4").tobytes()).hex() == said["logits_blake3"]


def test_there_is_one_of_every_kind() -> None:
    assert {row_of(name) for name in WRITTEN} == set(snapshots.ROWS)
    assert {said["codec"] for said in WRITTEN.values()} == {
        *("raw", "lossless", "int8", "rotated4", "transform", "tokens")
    }
    files = [path for path in snapshots.FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MOST_BYTES


@every_one
def test_what_was_once_saved_is_read(store: SnapshotStore, name: str) -> None:
    manifest, private, key, chain = opened(store, name)
    assert key.secret.hex() == INDEX["data_key"]
    assert [each.trusted for each in chain] == [True] * len(chain)
    chunks = store.chunks(manifest)
    if manifest.codec.name == "tokens":
        found = snapshots.read(row_of(name), manifest, chunks, None)
        assert found.reason == "it holds token ids alone"
        check(found._replace(reason=""), manifest, WRITTEN[name], name)
    else:
        found = snapshots.read(row_of(name), manifest, chunks, snapshots.basis_of(manifest.codec))
        check(found, manifest, WRITTEN[name], name)
    assert private.sampler["seed"] == found.sampler.settings.seed == 11
    assert found.progress.extra["turn_start"] == 20


def test_the_other_node_that_may_read_them_can_and_a_third_cannot(store: SnapshotStore) -> None:
    assert opened(store, "raw", snapshots.SPROUT).key.secret.hex() == INDEX["data_key"]
    with pytest.raises(SnapshotRefused, match="not wrapped"):
        opened(store, "raw", Identity("basil", bytes(range(2, 34))))


@every_row
def test_what_is_saved_today_is_read_alike(name: str) -> None:
    last = snapshots.newest(name, WRITTEN)
    made = snapshots.make_all(snapshots.read_basis(snapshots.basis_bytes(), snapshots.MIXED))[name]
    basis = snapshots.basis_of(made.manifest.codec, snapshots.basis_bytes())
    found = snapshots.read(name, made.manifest, made.chunks, basis)
    check(found._replace(reason=""), made.manifest, WRITTEN[last], name)


@pytest.mark.parametrize("name", [name for name, row in snapshots.ROWS.items() if row.stable])
def test_what_is_exact_is_saved_as_the_same_bytes(store: SnapshotStore, name: str) -> None:
    said = WRITTEN[snapshots.newest(name, WRITTEN)]
    made = snapshots.make_all(snapshots.read_basis(snapshots.basis_bytes(), snapshots.MIXED))[name]
    assert snapshot_id(made.signed) == said["snapshot"], "see tests/golden/snapshots.py for what may change"
    assert store.manifest(said["snapshot"]) == made.signed
    assert store.chunks(made.manifest) == made.chunks


# --- the maker --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copied = shutil.copytree(snapshots.FOLDER, tmp_path / "snapshots")
    monkeypatch.setattr(snapshots, "FOLDER", copied)
    return copied


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_maker_writes_nothing_when_all_is_there(folder: Path) -> None:
    before = contents(folder)
    assert snapshots.main([]) == 0
    assert contents(folder) == before


def test_the_maker_changes_no_snapshot_that_is_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(folder)
    monkeypatch.setattr(snapshots, "TIME_US", snapshots.TIME_US + 1)  # as a field that came would: other bytes
    assert snapshots.main([]) == 1
    assert "raw, tokens, recurrent" in capsys.readouterr().err
    assert contents(folder) == before
    assert snapshots.main(["--grow", "raw", "--rewrite", "tokens", "--rewrite", "recurrent"]) == 0
    after = contents(folder)
    known = json.loads(after["index.json"])["snapshots"]
    assert known["raw"] == WRITTEN["raw"]
    assert known["raw.v2"]["kv_blake3"] == WRITTEN["raw"]["kv_blake3"]
    assert f"manifests/{known['raw.v2']['snapshot']}" in after
    assert f"manifests/{WRITTEN['raw']['snapshot']}" in after
    assert f"manifests/{WRITTEN['tokens']['snapshot']}" not in after
    assert snapshots.main([]) == 0
