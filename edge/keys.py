"""A node's key file and its table of trusted peers, in the node's data folder.

``keys/node.key`` holds the 32-byte private key, readable by its owner alone. ``keys/peers.json`` maps node names to
fingerprints; services read it again when it has changed, so that trust given by the CLI takes effect at once.
``keys/sealing.json`` maps them to the sealing keys that they announced (``protocol.identity``), each signed with the
key that the fingerprint is: one that its node did not sign, or of a node that is not trusted, counts for nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import msgspec

from edge.files import storage_errors, write_atomically
from protocol.errors import UNREADABLE, StorageError, TrustError
from protocol.identity import Identity, Keyring, public_key_of
from protocol.ids import check_name

SEED_BYTES = 32


def key_folder(data_dir: Path) -> Path:
    """Where a node keeps its keys; made when absent. Raises StorageError."""
    folder = data_dir / "keys"
    with storage_errors(f"making the key folder {folder}"):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One writer at a time among all processes of the node."""
    with storage_errors(f"locking {folder}"):
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def load_or_create_identity(data_dir: Path, node: str) -> Identity:
    """The identity of ``node``, made on first use. Raises StorageError, or TrustError for an unsafe key file."""
    folder = key_folder(data_dir)
    path = folder / "node.key"
    with locked(folder):
        if not path.exists():
            identity = Identity.generate(node)
            write_atomically(path, identity.seed)
            return identity
        with storage_errors(f"reading {path}"):
            mode = path.stat().st_mode
            seed = path.read_bytes()
    if stat.S_IMODE(mode) & 0o077:
        raise TrustError(
            f"reading the key file {path}: others may read it (mode {stat.S_IMODE(mode):o})",
            hint=f"chmod 600 {path}",
            reason="unsafe mode",
        )
    if len(seed) != SEED_BYTES:
        raise StorageError(
            f"reading the key file {path}: {len(seed)} bytes, a key has {SEED_BYTES}",
            hint="restore it from a backup; without it this node is a new one to its peers",
            reason="damaged",
        )
    return Identity(node, seed)


class Peers:
    """The table of trusted peers of one node.

    Args:
        data_dir: the node's data folder.
        own: this node's identity, which the keyring always holds.
    """

    def __init__(self, data_dir: Path, own: Identity) -> None:
        self._folder = key_folder(data_dir)
        self._path = self._folder / "peers.json"
        self._sealing_path = self._folder / "sealing.json"
        self._own = own
        self._stamp: tuple[tuple[int, int], ...] = ()
        self._keyring = Keyring()

    def keyring(self) -> Keyring:
        """This node's key and those it trusts; read again when the table has changed. Raises StorageError."""
        stamp = tuple(self._stamp_of(path) for path in (self._path, self._sealing_path))
        if stamp != self._stamp:
            keyring = Keyring({**self.table(), self._own.node: self._own.fingerprint})
            for node, announced in {**self._read(self._sealing_path), self._own.node: self._own.sealing_key}.items():
                with contextlib.suppress(TrustError):  # of a key that was replaced, or a peer that was forgotten
                    keyring.add_sealing_key(node, announced)
            self._keyring, self._stamp = keyring, stamp
        return self._keyring

    @staticmethod
    def _stamp_of(path: Path) -> tuple[int, int]:
        with storage_errors(f"reading {path}"):
            try:
                found = path.stat()
            except FileNotFoundError:
                return 0, 0
        return found.st_mtime_ns, found.st_ino

    def table(self) -> dict[str, str]:
        """Node name to fingerprint. Raises StorageError when the file is damaged."""
        return self._read(self._path)

    def learn_sealing_key(self, node: str, announced: str) -> bool:
        """Keep the sealing key that ``node`` announced; whether it is a key of a node that is trusted.

        Raises StorageError.
        """
        keyring = self.keyring()
        try:
            public_key = keyring.read_sealing_key(node, announced)
        except TrustError:
            return False
        if node != self._own.node and keyring.sealing_keys.get(node) != public_key:
            with locked(self._folder):
                self._write(self._sealing_path, {**self._read(self._sealing_path), node: announced})
        return True

    @staticmethod
    def _read(path: Path) -> dict[str, str]:
        with storage_errors(f"reading {path}"):
            try:
                body = path.read_bytes()
            except FileNotFoundError:
                return {}
        try:
            return msgspec.json.decode(body, type=dict[str, str])
        except UNREADABLE as error:
            raise StorageError(f"reading {path}: {error}", hint="mend the JSON, or remove it and trust again") from None

    @staticmethod
    def _write(path: Path, table: dict[str, str]) -> None:
        write_atomically(path, msgspec.json.format(msgspec.json.encode(table, order="sorted")) + b"\n")

    def trust(self, node: str, fingerprint: str, *, replace: bool = False) -> None:
        """Trust ``fingerprint`` as the key of ``node``.

        Raises TrustError for a malformed one, or when another key is trusted under that name and ``replace`` is not
        given; StorageError.
        """
        check_name(node, "node")
        wanted = fingerprint.strip().lower()
        public_key_of(wanted)
        with locked(self._folder):
            table = self.table()
            known = self._own.fingerprint if node == self._own.node else table.get(node, wanted)
            if known != wanted and (not replace or node == self._own.node):
                raise TrustError(
                    f"trusting {wanted} as {node}: another key is trusted under that name: {known}",
                    hint="compare both with `mindstream keys show` on that node, then use --replace",
                    field="fingerprint",
                    reason="other key",
                )
            table[node] = wanted
            self._write(self._path, table)

    def forget(self, node: str) -> bool:
        """Trust ``node`` no longer; whether it was trusted. Raises StorageError."""
        with locked(self._folder):
            table = self.table()
            found = table.pop(node, None) is not None
            if found:
                self._write(self._path, table)
            return found
