"""The program that docs/snapshots.md names reads what Mindstream wrote, with nothing of Mindstream."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("numpy", reason="numpy is not installed: make install (extra `onnx`)")

import numpy as np

from edge.keys import load_or_create_identity
from edge.snapshot_store import SnapshotStore
from protocol.identity import digest
from protocol.sealing import wrap_key
from tests.support.snapshots import KEY, Small, small_snapshot

CHECKOUT = Path(__file__).resolve().parents[2]
PROGRAM = CHECKOUT / "examples" / "read_snapshot.py"
SNAPSHOTS = CHECKOUT / "tests" / "golden" / "snapshots"
GOLDEN = json.loads((SNAPSHOTS / "index.json").read_text("utf-8"))


@pytest.fixture
def node(tmp_path: Path) -> tuple[Path, Small]:
    identity = load_or_create_identity(tmp_path, "tomato")
    small = small_snapshot(identity)
    small.signed.wraps = [wrap_key(identity, KEY, "tomato", identity.sealing.public_key)]
    SnapshotStore(tmp_path / "model_runner" / "snapshots").save(small.signed, small.refs, small.chunks)
    return tmp_path, small


def run(folder: Path, identifier: str, *options: str | Path) -> subprocess.CompletedProcess[str]:
    # Not from the checkout, and without its path: nothing of Mindstream may be needed.
    command = [sys.executable, "-I", str(PROGRAM), str(folder), identifier, *map(str, options)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_the_program_reads_tokens_and_every_block(node: tuple[Path, Small]) -> None:
    folder, small = node
    done = run(folder, small.identifier)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "garden: 601 tokens of small, the last ones [170, 177, 184]"
    assert lines[1] == "codec raw; created by tomato"
    found = [re.fullmatch(r"block (\d), (\w+) layers: (\d+) tokens, (\d+) bytes of .*", line) for line in lines[2:]]
    read = [(int(match[1]), match[2], int(match[4])) for match in found if match]
    assert read == [(place.block, place.kind, part.encoded_bytes) for place, part in small.manifest.parts()]


@pytest.mark.parametrize("name", GOLDEN["snapshots"])
def test_the_program_decodes_every_golden_snapshot(tmp_path: Path, name: str) -> None:
    said = GOLDEN["snapshots"][name]
    done, arrays = read_golden(tmp_path, name)
    assert done.returncode == 0, done.stderr
    assert digest(arrays.pop("tokens").astype("<u4").tobytes()).hex() == said["tokens_blake3"]
    logits = arrays.pop("logits", None)
    assert (logits is not None) == ("logits_blake3" in said)
    if logits is not None:
        assert digest(logits.astype("<f4").tobytes()).hex() == said["logits_blake3"]
    in_order = [arrays[key] for key in sorted(arrays, key=_order)]
    if "kv_blake3" in said:
        assert digest(*(array.astype("<f4").tobytes() for array in in_order)).hex() == said["kv_blake3"]
    elif said["codec"] != "tokens":
        _, exact = read_golden(tmp_path / "exact", "raw")
        for side, error in said["errors"].items():
            ours, theirs = (
                np.concatenate([array.ravel() for key, array in each.items() if key.endswith(side)])
                for each in (arrays, exact)
            )
            assert np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) == pytest.approx(error, abs=2e-4)


def read_golden(folder: Path, name: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """The program's answer, and the arrays that it has decoded."""
    said = GOLDEN["snapshots"][name]
    (folder / "keys").mkdir(parents=True)
    (folder / "keys" / "node.key").write_bytes(bytes.fromhex(GOLDEN["private_key"]))
    (folder / "model_runner").mkdir()
    (folder / "model_runner" / "snapshots").symlink_to(SNAPSHOTS)
    done = run(folder, said["snapshot"], "--bases", SNAPSHOTS / "bases", "--out", folder / "out.npz")
    if done.returncode:
        return done, {}
    with np.load(folder / "out.npz", allow_pickle=False) as found:
        return done, dict(found)


def _order(key: str) -> tuple[int, int, str]:
    layer, _, side = key.partition(".")
    return int(layer.removeprefix("layer")), ("keys", "values").index(side) if side in ("keys", "values") else 2, side


def test_the_program_refuses_what_was_changed(node: tuple[Path, Small]) -> None:
    folder, small = node
    chunk = folder / "model_runner" / "snapshots" / "chunks" / small.refs[0].digest.hex()
    body = bytearray(chunk.read_bytes())
    body[100] ^= 1
    chunk.write_bytes(body)
    done = run(folder, small.identifier)
    assert done.returncode != 0
    assert f"refused: chunk {chunk.name} was damaged" in done.stderr


def test_the_program_refuses_what_others_signed(node: tuple[Path, Small]) -> None:
    folder, small = node
    (folder / "keys" / "node.key").write_bytes(bytes(range(7, 39)))
    done = run(folder, small.identifier)
    assert done.returncode != 0
    assert "InvalidSignature" in done.stderr


def test_the_program_imports_nothing_else_than_the_page_says() -> None:
    page = (CHECKOUT / "docs" / "snapshots.md").read_text("utf-8")
    imported = set(re.findall(r"^(?:import|from) (\w+)", PROGRAM.read_text("utf-8"), re.MULTILINE))
    packages = imported - set(sys.stdlib_module_names)
    assert packages == {"msgpack", "cryptography", "blake3", "numpy", "zstandard"}
    assert all(f"`{package}`" in page for package in packages)
