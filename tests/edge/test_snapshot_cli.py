"""`mindstream snapshot` as a person and a script meet it, on the store of a node that does not run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edge.keys import Peers, load_or_create_identity
from edge.snapshot_store import SnapshotStore
from protocol.identity import Identity
from protocol.provenance import add_statement
from protocol.sealing import wrap_key
from tests.support.nodes import CHECKOUT
from tests.support.snapshots import KEY, Small, small_snapshot

PROGRAM = [sys.executable, "-c", "from edge.cli import main; main()"]
MARS = Identity("mars", bytes(range(3, 35)))


class Node:
    """sprout, with two snapshots by tomato: 600 tokens, and the 520 before them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "mindstream.toml"
        self.config.write_text(f'[node]\nname = "sprout"\ndata_dir = "{folder}"\n[broker]\nport = 0\n')
        self.identity = load_or_create_identity(folder, "sprout")
        self.tomato = Identity("tomato", bytes(range(32)))
        self.peers = Peers(folder, self.identity)
        self.peers.trust("tomato", self.tomato.fingerprint)
        self.store = SnapshotStore(folder / "model_runner" / "snapshots")
        self.short, self.long = self.keep(small_snapshot(tokens=520)), self.keep(small_snapshot())

    def keep(self, small: Small) -> Small:
        own = self.identity.sealing
        small.signed.wraps = [wrap_key(self.tomato, KEY, "sprout", own.public_key)]
        small.signed.provenance = add_statement(
            self.identity, small.signed.provenance, bytes.fromhex(small.identifier), "moved", {"from": "tomato"}
        )
        self.store.save(small.signed, small.refs, small.chunks)
        return small

    def run(self, *arguments: str, code: int = 0) -> str:
        done = subprocess.run(
            [*PROGRAM, "--config", str(self.config), "snapshot", *arguments],
            cwd=CHECKOUT,
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def json(self, *arguments: str, code: int = 0) -> Any:
        return json.loads(self.run(*arguments, "--json", code=code))


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def test_the_list_says_what_is_there_and_how_much_of_it_is_shared(node: Node) -> None:
    rows = {row["snapshot"]: row for row in node.json("list")}
    assert rows.keys() == {node.short.identifier, node.long.identifier}
    long = rows[node.long.identifier]
    assert (long["conversation"], long["tokens"], long["creator"], long["codec"]) == ("garden", 601, "tomato", "raw 1")
    assert long["size_bytes"] == node.long.manifest.total_bytes
    # The first block is whole in both, and so is the second one's part of full attention.
    assert long["shared_bytes"] == sum(len(chunk) for chunk in node.long.chunks[:2])
    text = node.run("list")
    assert "garden: 601 tokens of small" in text
    assert "shared" in text


def test_a_snapshot_of_a_node_that_is_not_trusted_is_listed_with_the_reason(node: Node) -> None:
    node.peers.forget("tomato")
    assert [row["refused"] for row in node.json("list")] == ["unknown peer"] * 2
    assert "unknown peer" in node.run("list")
    assert "does not trust it" in node.run("show", node.long.identifier, code=1)


def test_show_prints_readers_and_the_chain_with_its_signatures(node: Node) -> None:
    shown = node.json("show", node.long.identifier[:10])
    assert shown["snapshot"] == node.long.identifier
    assert (shown["readers"], shown["readable"], shown["fidelity"]) == (["sprout"], True, "exact")
    assert shown["layers"] == "1 full, 1 sliding of 300"
    steps = [(step["kind"], step["node"], step["trusted"]) for step in shown["provenance"]]
    assert steps == [("created", "tomato", True), ("moved", "sprout", True)]
    text = node.run("show", node.long.identifier)
    assert "moved by sprout, from tomato (signature checked)" in text


def test_show_says_when_this_node_cannot_read_it(node: Node) -> None:
    small = small_snapshot(tokens=100)
    small.signed.wraps = [wrap_key(node.tomato, KEY, "mars", MARS.sealing.public_key)]
    node.store.save(small.signed, small.refs, small.chunks)
    shown = node.json("show", small.identifier)
    assert (shown["readers"], shown["readable"]) == (["mars"], False)
    assert "this node cannot: no recipient" in node.run("show", small.identifier)
    assert "not wrapped for that reader" in node.run("verify", small.identifier, code=1)


def test_verify_finds_every_chunk_that_is_damaged_or_missing_and_leaves_it(node: Node) -> None:
    assert node.json("verify", node.long.identifier)["ok"]
    folder = node.folder / "model_runner" / "snapshots" / "chunks"
    lost, damaged = (ref.digest.hex() for ref in node.long.refs[2:4])
    (folder / lost).unlink()
    body = bytearray((folder / damaged).read_bytes())
    body[50] ^= 1
    (folder / damaged).write_bytes(body)
    found = node.json("verify", node.long.identifier, code=1)
    assert found["bad_chunks"] == {lost: "missing", damaged: "digest mismatch"}
    assert "2 of 5 chunks" in node.run("verify", node.long.identifier, code=1)
    assert (folder / damaged).read_bytes() == body


def test_rm_removes_one_and_says_what_came_free(node: Node) -> None:
    shared = sum(len(chunk) for chunk in node.long.chunks[:2])
    removed = node.json("rm", node.long.identifier)
    assert removed == {
        "snapshot": node.long.identifier,
        "freed_bytes": node.long.manifest.total_bytes - shared,
    }
    assert node.json("verify", node.short.identifier)["ok"]
    assert "does not hold it" in node.run("rm", node.long.identifier, code=4)


def test_a_prefix_that_several_have_is_refused(node: Node) -> None:
    assert "give more digits" in node.run("show", "", code=1)
