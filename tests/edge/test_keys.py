"""Key files and the table of trusted peers."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from edge.keys import Peers, load_or_create_identity
from protocol.errors import MalformedMessage, StorageError, TrustError
from protocol.identity import Identity

OTHER = Identity.generate("sprout")


def peers_of(folder: Path) -> Peers:
    return Peers(folder, load_or_create_identity(folder, "tomato"))


def key_file(folder: Path) -> Path:
    return folder / "keys" / "node.key"


def test_an_identity_is_made_once_and_stays(tmp_path: Path) -> None:
    first = load_or_create_identity(tmp_path, "tomato")
    assert load_or_create_identity(tmp_path, "tomato").fingerprint == first.fingerprint
    assert stat.S_IMODE(key_file(tmp_path).stat().st_mode) == 0o600
    assert stat.S_IMODE(key_file(tmp_path).parent.stat().st_mode) == 0o700


def test_processes_that_start_at_once_make_one_identity(tmp_path: Path) -> None:
    program = (
        "from pathlib import Path; from edge.keys import load_or_create_identity as load;"
        f"print(load(Path({str(tmp_path)!r}), 'tomato').fingerprint)"
    )
    processes = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) for _ in range(6)]
    assert len({process.communicate(timeout=150)[0] for process in processes}) == 1


def test_a_key_file_that_others_may_read_is_refused_with_what_to_type(tmp_path: Path) -> None:
    load_or_create_identity(tmp_path, "tomato")
    key_file(tmp_path).chmod(0o640)
    with pytest.raises(TrustError) as caught:
        load_or_create_identity(tmp_path, "tomato")
    assert caught.value.hint == f"chmod 600 {key_file(tmp_path)}"


def test_a_damaged_key_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    load_or_create_identity(tmp_path, "tomato")
    key_file(tmp_path).write_bytes(b"short")
    with pytest.raises(StorageError, match="5 bytes"):
        load_or_create_identity(tmp_path, "tomato")
    assert key_file(tmp_path).read_bytes() == b"short"


def test_a_node_trusts_itself_and_whom_it_was_told_to(tmp_path: Path) -> None:
    peers = peers_of(tmp_path)
    assert set(peers.keyring().fingerprints) == {"tomato"}
    peers.trust("sprout", OTHER.fingerprint)
    assert peers.keyring().fingerprints["sprout"] == OTHER.fingerprint


def test_trust_given_by_another_process_is_seen_at_once(tmp_path: Path) -> None:
    running, told = peers_of(tmp_path), peers_of(tmp_path)
    assert "sprout" not in running.keyring()
    told.trust("sprout", OTHER.fingerprint)
    assert "sprout" in running.keyring()
    told.forget("sprout")
    assert "sprout" not in running.keyring()


def test_another_key_under_a_trusted_name_needs_replace(tmp_path: Path) -> None:
    peers = peers_of(tmp_path)
    peers.trust("sprout", OTHER.fingerprint)
    newer = Identity.generate("sprout").fingerprint
    with pytest.raises(TrustError, match="another key") as caught:
        peers.trust("sprout", newer)
    assert "--replace" in caught.value.hint
    assert peers.table() == {"sprout": OTHER.fingerprint}
    peers.trust("sprout", newer, replace=True)
    assert peers.table() == {"sprout": newer}


def test_the_nodes_own_name_cannot_be_given_another_key(tmp_path: Path) -> None:
    peers = peers_of(tmp_path)
    with pytest.raises(TrustError):
        peers.trust("tomato", OTHER.fingerprint, replace=True)


@pytest.mark.parametrize(
    "fingerprint",
    ["", "ed25519:", "ed25519:abc", "rsa:" + "a" * 52, OTHER.fingerprint[:-1]],
    ids=["empty", "no key", "short", "another kind", "cut"],
)
def test_what_is_no_fingerprint_is_refused(tmp_path: Path, fingerprint: str) -> None:
    with pytest.raises(TrustError):
        peers_of(tmp_path).trust("sprout", fingerprint)


@pytest.mark.parametrize("name", ["", "Sprout", "a/b", "+", "#", "../x"])
def test_what_is_no_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(MalformedMessage):
        peers_of(tmp_path).trust(name, OTHER.fingerprint)


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    peers = peers_of(tmp_path)
    (tmp_path / "keys" / "peers.json").write_text("{")
    with pytest.raises(StorageError, match=r"peers\.json"):
        peers.keyring()


def test_many_processes_may_trust_at_once(tmp_path: Path) -> None:
    peers_of(tmp_path)
    program = (
        "import sys; from pathlib import Path; from edge.keys import Peers, load_or_create_identity as load;"
        f"folder = Path({str(tmp_path)!r}); Peers(folder, load(folder, 'tomato')).trust(sys.argv[1], sys.argv[2])"
    )
    names = [f"node-{number}" for number in range(6)]
    processes = [subprocess.Popen([sys.executable, "-c", program, name, OTHER.fingerprint]) for name in names]
    assert [process.wait(150) for process in processes] == [0] * 6
    assert set(peers_of(tmp_path).table()) == set(names)


# --- sealing keys -----------------------------------------------------------------------------------------------


def test_the_sealing_key_of_a_trusted_node_is_kept_and_seen_by_other_processes(tmp_path: Path) -> None:
    hearing, sealing = peers_of(tmp_path), peers_of(tmp_path)
    hearing.trust("sprout", OTHER.fingerprint)
    assert set(sealing.keyring().sealing_keys) == {"tomato"}
    assert hearing.learn_sealing_key("sprout", OTHER.sealing_key)
    assert sealing.keyring().sealing_keys["sprout"] == OTHER.sealing.public_key
    assert peers_of(tmp_path).keyring().sealing_keys["sprout"] == OTHER.sealing.public_key


def test_a_sealing_key_of_another_or_of_a_stranger_is_not_kept(tmp_path: Path) -> None:
    peers = peers_of(tmp_path)
    assert not peers.learn_sealing_key("sprout", OTHER.sealing_key)
    peers.trust("sprout", OTHER.fingerprint)
    for announced in (Identity.generate("sprout").sealing_key, "x25519:abc", ""):
        assert not peers.learn_sealing_key("sprout", announced)
    assert set(peers.keyring().sealing_keys) == {"tomato"}
    assert not (tmp_path / "keys" / "sealing.json").exists()


def test_a_sealing_key_goes_with_the_trust_in_its_node(tmp_path: Path) -> None:
    peers = peers_of(tmp_path)
    peers.trust("sprout", OTHER.fingerprint)
    assert peers.learn_sealing_key("sprout", OTHER.sealing_key)
    newer = Identity.generate("sprout")
    peers.trust("sprout", newer.fingerprint, replace=True)
    assert set(peers.keyring().sealing_keys) == {"tomato"}
    assert peers.learn_sealing_key("sprout", newer.sealing_key)
    assert peers.keyring().sealing_keys["sprout"] == newer.sealing.public_key
    peers.forget("sprout")
    assert set(peers.keyring().sealing_keys) == {"tomato"}
