"""The site's group key: made once, granted to those who are trusted, changed when one of them is trusted no more."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from edge.group_keys import GroupKeys
from edge.keys import Peers, load_or_create_identity
from protocol.errors import BadSignature, SnapshotRefused, TrustError, UnknownPeer
from protocol.group_key import SignedGrant


class Site:
    """Nodes with keys of their own, that trust each other."""

    def __init__(self, root: Path, *names: str) -> None:
        self.root = root
        self.identities = {name: load_or_create_identity(root / name, name) for name in names}
        self.peers = {name: Peers(root / name, identity) for name, identity in self.identities.items()}
        self.keys = {name: GroupKeys(root / name, self.identities[name], self.peers[name]) for name in names}
        for one in names:
            for other in names:
                if one != other:
                    self.trust(one, other)

    def trust(self, one: str, other: str) -> None:
        self.peers[one].trust(other, self.identities[other].fingerprint)
        self.peers[one].learn_sealing_key(other, self.identities[other].sealing_key)

    def give(self, giver: str, taker: str) -> int:
        return self.keys[taker].take(self.keys[giver].grant(taker), giver)


def test_a_key_is_made_once_kept_for_its_owner_alone_and_granted_to_a_trusted_node(tmp_path: Path) -> None:
    site = Site(tmp_path, "tomato", "sprout")
    made = site.keys["tomato"].ensure()
    assert site.keys["tomato"].ensure().id == made.id
    path = tmp_path / "tomato" / "keys" / "group.keys"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert site.give("tomato", "sprout") == 1
    assert site.give("tomato", "sprout") == 0
    held = site.keys["sprout"].current()
    assert held is not None
    assert held.data_key.secret == made.data_key.secret
    # Another process of the node, and this one after a restart, have the same.
    again = GroupKeys(tmp_path / "sprout", site.identities["sprout"], site.peers["sprout"])
    assert [key.id for key in again.versions()] == [made.id]
    assert made.data_key.secret.hex() not in repr(made)


def test_a_node_that_is_not_trusted_is_granted_nothing_and_takes_from_nobody_it_does_not_trust(tmp_path: Path) -> None:
    site = Site(tmp_path, "tomato", "sprout", "stranger")
    site.keys["tomato"].ensure()
    site.peers["tomato"].forget("stranger")
    assert site.keys["tomato"].grant("stranger") == []
    grants = site.keys["tomato"].grant("sprout")
    with pytest.raises(SnapshotRefused):  # wrapped for another
        site.keys["stranger"].take(grants, "tomato")
    site.peers["sprout"].forget("tomato")
    with pytest.raises(UnknownPeer):
        site.keys["sprout"].take(grants, "tomato")
    assert site.keys["sprout"].versions() == []


def test_a_grant_that_was_changed_on_the_way_or_is_said_to_be_anothers_is_refused(tmp_path: Path) -> None:
    site = Site(tmp_path, "tomato", "sprout", "basil")
    site.keys["tomato"].ensure()
    (signed,) = site.keys["tomato"].grant("sprout")
    for at in range(0, len(signed.grant), 17):
        body = bytearray(signed.grant)
        body[at] ^= 1
        with pytest.raises(BadSignature):
            site.keys["sprout"].take([SignedGrant(bytes(body), signed.signature)], "tomato")
    with pytest.raises(BadSignature):
        site.keys["sprout"].take([signed], "basil")


def test_when_a_reader_is_forgotten_what_is_new_gets_another_key_that_it_is_not_granted(tmp_path: Path) -> None:
    site = Site(tmp_path, "tomato", "sprout", "thief")
    first = site.keys["tomato"].ensure()
    site.give("tomato", "sprout")
    site.give("tomato", "thief")
    site.peers["tomato"].forget("thief")
    assert site.keys["tomato"].current() is None
    second = site.keys["tomato"].ensure()
    assert (second.version, second.id != first.id) == (2, True)
    assert [key.id for key in site.keys["tomato"].versions()] == [second.id, first.id], "what is old can still be read"
    assert site.give("tomato", "sprout") == 1
    newest = site.keys["sprout"].current()
    assert newest is not None
    assert newest.id == second.id, "the others use the newest version as soon as they have it"
    assert site.keys["tomato"].grant("thief") == []


def test_a_key_whose_maker_is_forgotten_or_whose_reader_has_another_sealing_key_is_not_used_any_more(
    tmp_path: Path,
) -> None:
    site = Site(tmp_path, "tomato", "sprout")
    site.keys["tomato"].ensure()
    site.give("tomato", "sprout")
    site.peers["sprout"].forget("tomato")
    assert site.keys["sprout"].current() is None
    other = load_or_create_identity(tmp_path / "another", "sprout")  # the node was set up anew
    site.peers["tomato"].trust("sprout", other.fingerprint, replace=True)
    site.peers["tomato"].learn_sealing_key("sprout", other.sealing_key)
    assert site.keys["tomato"].current() is None


def test_two_keys_made_apart_become_one_for_all(tmp_path: Path) -> None:
    site = Site(tmp_path, "tomato", "sprout", "basil")
    for name in ("tomato", "sprout"):
        site.keys[name].ensure()
    for giver, taker in (("tomato", "sprout"), ("sprout", "tomato"), ("tomato", "basil"), ("sprout", "basil")):
        site.give(giver, taker)
    used = {keys.ensure().id for keys in site.keys.values()}
    assert len(used) == 1
    assert all(len(keys.versions()) == 2 for keys in site.keys.values())


def test_a_key_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    site = Site(tmp_path, "tomato")
    site.keys["tomato"].ensure()
    (tmp_path / "tomato" / "keys" / "group.keys").chmod(0o644)
    again = GroupKeys(tmp_path / "tomato", site.identities["tomato"], site.peers["tomato"])
    with pytest.raises(TrustError, match="others may read it"):
        again.versions()
