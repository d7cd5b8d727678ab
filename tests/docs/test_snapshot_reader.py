"""The program that docs/snapshots.md shows reads a snapshot that Mindstream wrote, with two packages of others."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from edge.keys import load_or_create_identity
from edge.snapshot_store import SnapshotStore
from protocol.sealing import wrap_key
from tests.support.snapshots import KEY, Small, small_snapshot

CHECKOUT = Path(__file__).resolve().parents[2]
PROGRAM = CHECKOUT / "examples" / "read_snapshot.py"


@pytest.fixture
def node(tmp_path: Path) -> tuple[Path, Small]:
    identity = load_or_create_identity(tmp_path, "tomato")
    small = small_snapshot(identity)
    small.signed.wraps = [wrap_key(identity, KEY, "tomato", identity.sealing.public_key)]
    SnapshotStore(tmp_path / "model_runner" / "snapshots").save(small.signed, small.refs, small.chunks)
    return tmp_path, small


def run(folder: Path, identifier: str) -> subprocess.CompletedProcess[str]:
    # Not from the checkout, and without its path: nothing of Mindstream may be needed.
    command = [sys.executable, "-I", str(PROGRAM), str(folder), identifier]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_the_program_reads_tokens_and_every_block(node: tuple[Path, Small]) -> None:
    folder, small = node
    done = run(folder, small.identifier)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "garden: 601 tokens of small, the last ones [170, 177, 184]"
    found = [re.fullmatch(r"block (\d), (\w+) layers: (\d+) tokens, (\d+) bytes of .*", line) for line in lines[1:]]
    read = [(int(match[1]), match[2], int(match[4])) for match in found if match]
    assert read == [(place.block, place.kind, part.encoded_bytes) for place, part in small.manifest.parts()]


def test_the_program_refuses_what_was_changed(node: tuple[Path, Small]) -> None:
    folder, small = node
    chunk = folder / "model_runner" / "snapshots" / "chunks" / small.refs[0].digest.hex()
    body = bytearray(chunk.read_bytes())
    body[100] ^= 1
    chunk.write_bytes(body)
    done = run(folder, small.identifier)
    assert done.returncode != 0
    assert "InvalidTag" in done.stderr


def test_the_program_shown_is_the_program_that_is_run() -> None:
    page = (CHECKOUT / "docs" / "snapshots.md").read_text("utf-8")
    assert f"\n{PROGRAM.read_text('utf-8')}```\n" in page
    imported = set(re.findall(r"^(?:import|from) (\w+)", PROGRAM.read_text("utf-8"), re.MULTILINE))
    assert imported == {"sys", "pathlib", "msgpack", "cryptography"}
