"""`mindstream pool`: what a node's pool holds, and removing it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edge.keys import Peers, load_or_create_identity
from edge.pool_files import LocalFiles
from edge.pool_store import PoolStore
from protocol.identity import Identity
from protocol.pool import entry_id, sign_entry, witness
from tests.edge.test_pool_store import entry
from tests.support.nodes import CHECKOUT


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """A configuration whose node has two entries, one of which another node disagrees with."""
    data = tmp_path / "tomato"
    identity = load_or_create_identity(data, "tomato")
    sprout = Identity.generate("sprout")
    Peers(data, identity).trust("sprout", sprout.fingerprint)
    store = PoolStore(LocalFiles(data / "model_runner" / "pool"), 10**9)
    for label, cost_ms in (("a", 900), ("b", 400)):
        _, made, chunks = entry(label, cost_ms=cost_ms)
        signed = sign_entry(identity, made)
        store.put(signed, made, chunks)
        if label == "b":
            said = witness(sprout, entry_id(signed), False, "exact", float("inf"))
            store.keep_statement(entry_id(signed), "sprout", said)
    config = tmp_path / "mindstream.toml"
    config.write_text(f'[node]\nname = "tomato"\ndata_dir = "{data}"\n')
    return config


def mindstream(config: Path, *arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-c", "from edge.cli import main; main()", "--config", str(config), "pool", *arguments],
        cwd=CHECKOUT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def as_json(config: Path, *arguments: str) -> Any:
    return json.loads(mindstream(config, *arguments, "--json"))


def test_status_list_rm_and_clear_show_and_do_what_they_say(node: Path) -> None:
    found = as_json(node, "status")
    assert (found["entries"], found["set_aside"], found["trust"], found["group_key"]) == (2, 1, "creator", None)
    assert "set aside  1" in mindstream(node, "status")
    first, second = as_json(node, "list")
    assert (first["cost_ms"], first["creator"], first["not_used"]) == (900, "tomato", "")
    assert (second["disagree"], second["not_used"]) == (1, "set aside: sprout read otherwise")
    assert "1 disagree: set aside" in mindstream(node, "list")
    assert as_json(node, "rm", first["entry"][:16])["entry"] == first["entry"]
    assert "is not there" in mindstream(node, "rm", first["entry"][:16], code=4)
    assert as_json(node, "clear")["entries"] == 1
    assert mindstream(node, "list") == "this node's pool holds nothing\n"
