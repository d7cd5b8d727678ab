"""The memory store, replayed against a recording, says what it said: docs/recordings.md has the habit."""

from __future__ import annotations

from pathlib import Path

from tests.support.golden_replay import assert_replay_matches


def test_memory_store_says_what_it_said(tmp_path: Path, update_golden: bool) -> None:
    assert_replay_matches("memory_store", tmp_path, update=update_golden)
