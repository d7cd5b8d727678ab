"""The golden replay finds a service that has changed: were it blind, its agreement would mean nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import golden_replay
from tests.support.golden_replay import FOLDER, assert_replay_matches

LEAK = """
import services.memory_store.service as module
recall = module.recall
module.recall = lambda *given, **options: recall(*given, **{**options, "include_private": True})
"""
FORGET = """
import services.memory_store.service as module
module.MemoryStore._say_new_entries = lambda self: None
"""
SILENT = """
import services.sync_bridge.service as module
module.SyncBridge._due = lambda self: None
"""


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden_replay, "SAY_S", 2.0)


def test_a_store_that_shows_private_memories_to_others_is_found(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="says other things than it did") as found:
        assert_replay_matches("memory_store", tmp_path, before=LEAK)
    added = [line for line in str(found.value).splitlines() if line.startswith("+{")]
    assert len(added) == 1
    assert "The key of the safe is 4711." in added[0]
    assert "tomato/reply/sprout/cli" in added[0]


@pytest.mark.slow
def test_a_store_that_says_less_is_found(tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as found:
        assert_replay_matches("memory_store", tmp_path, before=FORGET)
    removed = [line for line in str(found.value).splitlines() if line.startswith("-{")]
    assert sum('"topic": "tomato/memory/log"' in line for line in removed) == 5


@pytest.mark.slow
def test_a_bridge_that_no_longer_asks_is_found_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden_replay, "GATE_S", 5.0)
    with pytest.raises(AssertionError, match=r"never said, though the recording waits for it: memory\.vector\.ask"):
        assert_replay_matches("sync_bridge", tmp_path, before=SILENT)


def test_updating_writes_what_the_service_says_now(tmp_path: Path) -> None:
    golden = tmp_path / "new.jsonl"
    (tmp_path / "run").mkdir()
    assert_replay_matches("sync_bridge", tmp_path / "run", golden=golden, update=True)
    assert golden.read_text() == (FOLDER / "sync_bridge.jsonl").read_text()


def test_golden_recordings_are_small() -> None:
    recordings = list(FOLDER.glob("*.msrec"))
    assert recordings
    assert all(each.stat().st_size < 100_000 for each in recordings)
