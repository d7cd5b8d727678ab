"""The site's group key on this node: made on first use, granted to nodes that are trusted, and changed when one of
those who have it is trusted no more.

``keys/group.keys`` in the node's data folder holds every version that this node has, readable by its owner alone: a
later one is used for what is new, the earlier ones open what was sealed with them.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec.structs import replace

from edge.files import storage_errors, write_atomically
from edge.keys import Peers, key_folder, locked
from protocol.errors import UNREADABLE, StorageError, TrustError
from protocol.group_key import MAX_KEYS, GroupKey, SignedGrant, grant_key, read_grants
from protocol.identity import Identity, Keyring


class _Kept(msgspec.Struct):
    """A version on disk."""

    secret: bytes
    version: int
    by: str
    created_us: int
    giver: str = ""
    """The node that granted it to this one; empty: made here."""
    readers: dict[str, bytes] = {}
    """Whom this node granted it to, and the sealing key of then."""

    def key(self) -> GroupKey:
        return GroupKey(self.secret, self.version, self.by, self.created_us)


_decoder = msgspec.msgpack.Decoder(list[_Kept])


class GroupKeys:
    """The versions of the group key that one node has. On any thread; other processes of the node may change the file.

    Args:
        data_dir: the node's data folder.
        identity: this node's.
        peers: whom it trusts.
    """

    def __init__(self, data_dir: Path, identity: Identity, peers: Peers) -> None:
        self._folder = key_folder(data_dir)
        self._path = self._folder / "group.keys"
        self._identity = identity
        self._peers = peers
        self._stamp: tuple[int, int] = (-1, -1)
        self._pairs: list[tuple[_Kept, GroupKey]] = []
        """The newest first; replaced, never changed."""

    def versions(self) -> list[GroupKey]:
        """Every version, the newest first. Raises StorageError."""
        return [key for _, key in self._look()]

    def by_id(self, key_id: bytes) -> GroupKey | None:
        """The version of that id, if this node has it. Raises StorageError."""
        return next((key for key in self.versions() if key.id == key_id), None)

    def current(self) -> GroupKey | None:
        """What is new is sealed with this one: the highest version that nobody is known to have who is not trusted.
        None when there is none. Raises StorageError."""
        keyring = self._peers.keyring()
        return next((key for kept, key in self._look() if self._fits(kept, keyring)), None)

    def ensure(self) -> GroupKey:
        """``current``, made now where there is none. Raises StorageError."""
        found = self.current()
        if found is not None:
            return found
        with locked(self._folder):
            found = self.current()  # another process may have been quicker
            if found is None:
                pairs = self._look()
                found = GroupKey.generate(self._identity.node, max((kept.version for kept, _ in pairs), default=0) + 1)
                self._write([_Kept(found.data_key.secret, found.version, found.by, found.created_us), *_all(pairs)])
        return found

    def grant(self, asker: str) -> list[SignedGrant]:
        """Every version for ``asker``, the newest first; none when it is not trusted, or its sealing key is unknown.

        Raises StorageError.
        """
        public_key = self._peers.keyring().sealing_keys.get(asker)
        if public_key is None or asker == self._identity.node:
            return []
        with locked(self._folder):
            pairs = self._look()
            if any(kept.readers.get(asker) != public_key for kept, _ in pairs):
                now = [replace(kept, readers={**kept.readers, asker: public_key}) for kept, _ in pairs]
                self._write(now)
            return [grant_key(self._identity, key, asker, public_key) for _, key in pairs]

    def take(self, grants: Sequence[SignedGrant], giver: str) -> int:
        """Keep what ``giver`` granted; how many versions were new. Raises as ``read_grants``, and StorageError."""
        found = read_grants(grants, giver, self._identity, self._peers.keyring())
        with locked(self._folder):
            pairs = self._look()
            have = {key.id for _, key in pairs}
            new = {key.id: key for key in found if key.id not in have}
            kept = [_Kept(each.data_key.secret, each.version, each.by, each.created_us, giver) for each in new.values()]
            if kept:
                self._write([*kept, *_all(pairs)])
        return len(kept)

    def _fits(self, kept: _Kept, keyring: Keyring) -> bool:
        """Whether all that are known to have a version are trusted, with the sealing keys for which it was wrapped."""
        others = {kept.by, kept.giver} - {"", self._identity.node}
        sealing = keyring.sealing_keys
        return all(node in keyring for node in others) and all(
            sealing.get(node) == public_key for node, public_key in kept.readers.items()
        )

    def _look(self) -> list[tuple[_Kept, GroupKey]]:
        """What the file has; read when it has changed."""
        with storage_errors(f"reading {self._path}"):
            try:
                found = self._path.stat()
                stamp = found.st_mtime_ns, found.st_ino
                body = self._path.read_bytes() if stamp != self._stamp else b""
            except FileNotFoundError:
                return self._take([], (0, 0))
        if stamp == self._stamp:
            return self._pairs
        if stat.S_IMODE(found.st_mode) & 0o077:
            raise TrustError(
                f"reading {self._path}: others may read it (mode {stat.S_IMODE(found.st_mode):o})",
                hint=f"chmod 600 {self._path}",
                reason="unsafe mode",
            )
        try:
            return self._take(_decoder.decode(body), stamp)
        except UNREADABLE as error:
            raise StorageError(
                f"reading {self._path}: {error}",
                hint="remove it: the node asks its peers for the group key again, or makes a new one",
                reason="damaged",
            ) from None

    def _take(self, kept: list[_Kept], stamp: tuple[int, int]) -> list[tuple[_Kept, GroupKey]]:
        pairs = [(each, each.key()) for each in kept]
        pairs.sort(key=lambda pair: (pair[0].version, pair[1].id), reverse=True)
        self._pairs, self._stamp = pairs, stamp
        return pairs

    def _write(self, kept: list[_Kept]) -> None:
        kept = sorted(kept, key=lambda each: each.version, reverse=True)[:MAX_KEYS]
        write_atomically(self._path, msgspec.msgpack.encode(kept))
        self._stamp = (-1, -1)


def _all(pairs: list[tuple[_Kept, GroupKey]]) -> list[_Kept]:
    return [kept for kept, _ in pairs]
