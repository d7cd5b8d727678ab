"""Parking: the KV of idle conversations on disk while their memory is wanted, and back bit for bit.

A parked file is a snapshot of this runner's own: the sealed chunks, then the signed manifest with its key wrapped for
this node, and at the end its size and digest. It is a cache and no record: it is not synced, and one that is damaged,
or of another model or numerics, is dropped, and the conversation's tokens are read again. Reading and writing have a
thread of their own; the copy out of the engine's memory is the worker's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import msgspec

from edge.files import storage_errors
from protocol.errors import UNREADABLE, BlobError, MindstreamError
from protocol.identity import Identity, Keyring, digest
from protocol.manifest import (
    PrivatePart,
    SignedManifest,
    SnapshotManifest,
    open_manifest,
    open_private,
    seal_manifest,
    verify_chunk,
)
from protocol.sealing import DataKey, wrap_key
from protocol.sharing import key_of
from services.model_runner import snapshot
from services.model_runner.engine import Engine

log = logging.getLogger(__name__)

MAGIC = b"MSPARK02"
_SIZE_BYTES = 8
_DIGEST_BYTES = 32
_TRAILER_BYTES = _SIZE_BYTES + _DIGEST_BYTES
_UNUSABLE: tuple[type[Exception], ...] = (OSError, MindstreamError, *UNREADABLE)
MOST_MANIFEST_BYTES = 64 * 2**20


class Fetched(NamedTuple):
    """A parked state, verified and decrypted."""

    manifest: SnapshotManifest
    private: PrivatePart
    key: DataKey
    found: snapshot.Read


class Parking:
    """Parked conversations in a folder. ``park``, ``fetch`` and ``discard`` are the worker's; files have one thread.

    Args:
        folder: made when absent.
        identity: this node's: files are sealed for it, and signed by it.
        most_bytes: of all files together; the oldest go first. 0 parks nothing.
        on_drop: called on any thread with a conversation's name and why its file is no more.
        on_change: called on the parking thread when memory has come free.
    """

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        *,
        identity: Identity,
        most_bytes: int,
        on_drop: Callable[[str, str], None],
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._folder = folder
        self._engine = engine
        self._identity = identity
        self._keyring = Keyring({identity.node: identity.fingerprint})
        self._most_bytes = most_bytes
        self._on_drop = on_drop
        self.on_change = on_change
        self._lock = threading.Lock()
        self._sizes: OrderedDict[str, int] = OrderedDict()
        """Bytes of each conversation's file, the oldest first; those being written included."""
        self._thread = ThreadPoolExecutor(1, "KV parking")
        self.writing_bytes = 0
        """Copies in memory that are not on the disk yet."""
        self.parked = 0
        """How often a conversation was parked."""
        with storage_errors(f"making the folder {folder}"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._look()

    @property
    def node(self) -> str:
        """Whose files they are."""
        return self._identity.node

    # --- the worker's side ----------------------------------------------------------------------------------

    def has(self, name: str) -> bool:
        """Whether a conversation is parked."""
        with self._lock:
            return name in self._sizes

    @property
    def totals(self) -> tuple[int, int]:
        """Conversations parked, and their bytes."""
        with self._lock:
            return len(self._sizes), sum(self._sizes.values())

    def park(self, copied: snapshot.Copied) -> bool:
        """Write a copied state; False when there is no room for so much."""
        size = copied.size_bytes
        if size > self._most_bytes:
            return False
        dropped = []
        with self._lock:
            self._sizes.pop(copied.conversation, None)
            while self._sizes and sum(self._sizes.values()) + size > self._most_bytes:
                dropped.append(self._sizes.popitem(last=False)[0])
            self._sizes[copied.conversation] = size
            self.writing_bytes += size
            self.parked += 1
        for name in dropped:
            self._on_drop(name, "there was no more room for parked conversations (model.parked_mib)")
            self._thread.submit(self._remove, name)
        self._thread.submit(self._write, copied)
        return True

    def fetch(self, name: str) -> Future[Fetched]:
        """Read and decrypt a parked state, and remove its file.

        The future raises BlobError, StorageError, TrustError or SnapshotRefused.
        """
        with self._lock:
            self._sizes.pop(name, None)
        return self._thread.submit(self._read, name)

    def discard(self, name: str) -> None:
        """The conversation has gone on from elsewhere: its file is of no use."""
        with self._lock:
            known = self._sizes.pop(name, None)
        if known is not None:
            self._thread.submit(self._remove, name)

    def stop(self) -> None:
        """Write what waits, and end."""
        self._thread.shutdown(wait=True)

    # --- on the parking thread ------------------------------------------------------------------------------

    def _path(self, name: str) -> Path:
        return self._folder / f"{digest(name.encode()).hex()[:32]}.kv"

    def _look(self) -> None:
        """What an earlier process has parked."""
        found = []
        for path in self._folder.iterdir():
            if path.suffix != ".kv":
                path.unlink(missing_ok=True)  # half written
                continue
            try:
                with path.open("rb") as file:
                    manifest = self._read_manifest(file)[1]
                stat = path.stat()
                found.append((stat.st_mtime, manifest.conversation, stat.st_size))
            except _UNUSABLE as error:
                log.warning("the parked conversation in %s is removed: %s", path, error)
                path.unlink(missing_ok=True)
        for _, name, size in sorted(found):
            self._sizes[name] = size

    def _write(self, copied: snapshot.Copied) -> None:
        name, path = copied.conversation, self._path(copied.conversation)
        temporary = path.with_suffix(".new")
        try:
            with storage_errors(f"parking conversation {name}"):
                descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
                with os.fdopen(descriptor, "wb") as file:
                    file.write(MAGIC)
                    key = copied.key
                    # Chunk by chunk: beside the copy there is one sealed chunk in memory.
                    signed = seal_manifest(self._identity, snapshot.seal(copied, lambda _, chunk: file.write(chunk)))
                    own = self._identity.sealing
                    signed.wraps = [wrap_key(self._identity, key, own.recipient, own.public_key)]
                    body = msgspec.msgpack.encode(signed)
                    file.write(body + len(body).to_bytes(_SIZE_BYTES, "little") + digest(body))
                temporary.replace(path)
        except MindstreamError as error:
            with self._lock:
                self._sizes.pop(name, None)
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            self._on_drop(name, str(error))
        finally:
            with self._lock:
                self.writing_bytes -= copied.size_bytes
            self.on_change()

    def _read(self, name: str) -> Fetched:
        path = self._path(name)
        try:
            with storage_errors(f"reading the parked conversation {name}"), path.open("rb") as file:
                try:
                    signed, manifest = self._read_manifest(file)
                except UNREADABLE as error:
                    raise _damaged(str(error)) from None
                if manifest.conversation != name:
                    raise _damaged("it is another conversation's")
                file.seek(len(MAGIC))
                chunks = [file.read(ref.size_bytes) for ref in manifest.chunks]
            for index, (ref, chunk) in enumerate(zip(manifest.chunks, chunks, strict=True)):
                verify_chunk(ref, chunk, index=index)
            key = key_of(signed, manifest, self._identity, self._keyring)
            private = open_private(manifest, key)
            # Pruned or not, it comes back as it was parked.
            found = snapshot.read(self._engine, manifest, private, key, chunks, lossy=True)
            return Fetched(manifest, private, key, found)
        finally:
            self._remove(name)

    def _read_manifest(self, file: BinaryIO) -> tuple[SignedManifest, SnapshotManifest]:
        """What stands at the end of a file. Raises BlobError, TrustError, MalformedMessage, OSError or UNREADABLE."""
        size = file.seek(0, os.SEEK_END)
        if size < len(MAGIC) + _TRAILER_BYTES:
            raise _damaged(f"{size} bytes")
        file.seek(0)
        if file.read(len(MAGIC)) != MAGIC:
            raise _damaged("it does not begin as one")
        file.seek(size - _TRAILER_BYTES)
        length, expected = int.from_bytes(file.read(_SIZE_BYTES), "little"), file.read(_DIGEST_BYTES)
        if length > min(MOST_MANIFEST_BYTES, size - len(MAGIC) - _TRAILER_BYTES):
            raise _damaged(f"a manifest of {length:,} bytes")
        file.seek(size - _TRAILER_BYTES - length)
        body = file.read(length)
        if digest(body) != expected:
            raise _damaged("its manifest's digest is another")
        signed = msgspec.msgpack.decode(body, type=SignedManifest)
        return signed, open_manifest(signed, self._keyring)

    def _remove(self, name: str) -> None:
        with self._lock:
            if name in self._sizes:
                return  # parked again meanwhile: that is written after this
        with contextlib.suppress(OSError):
            self._path(name).unlink(missing_ok=True)


def _damaged(reason: str) -> BlobError:
    return BlobError(
        f"reading a parked conversation: its file is damaged: {reason}",
        hint="its tokens are read again",
        reason="damaged",
    )
