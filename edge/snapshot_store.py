"""Snapshots on disk: signed manifests and their content-addressed chunks in a folder, whole or not there.

A chunk that was put without syncing it stands in ``arriving/``, in a folder named by the boot: it is as good as any
other while the machine runs, whatever process is killed, and after a power cut it counts for nothing. Before a
manifest is put, those that it names are synced, many at a time, and moved to ``chunks/``.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from edge.files import storage_errors, sync_folder, write_atomically
from edge.spread import spread
from edge.ttl import boot_id
from protocol.errors import UNREADABLE, BadSignature, BlobError, NotFound, StorageError
from protocol.layout import ChunkRef
from protocol.manifest import SignedManifest, SnapshotManifest, snapshot_id, verify_chunk

log = logging.getLogger(__name__)

SYNC_THREADS = 8
"""Files that are synced at once: the file system commits them together."""
SNAPSHOT_ID = re.compile("[0-9a-f]{64}")
ORPHAN_S = 86_400.0
"""A chunk that no snapshot has is left alone for so long: it may be of a transfer that will go on."""
_DAMAGED: tuple[type[Exception], ...] = (BlobError, *UNREADABLE)


class SnapshotStore:
    """Signed manifests and their chunks in a folder. Whole or not there: the manifest is written last.

    Args:
        folder: made when absent.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._manifests = folder / "manifests"
        self._chunks = folder / "chunks"
        self._arriving = folder / "arriving" / boot_id()
        self._syncing = threading.Lock()
        self._held: dict[str, SignedManifest] = {}
        with storage_errors(f"making the snapshot folder {folder}"):
            self._manifests.mkdir(parents=True, exist_ok=True)
            self._chunks.mkdir(parents=True, exist_ok=True)
        self._drop_unsynced()

    def _drop_unsynced(self) -> None:
        """Remove what another boot has left: nobody knows how much of it came to the disk."""
        with contextlib.suppress(OSError, StorageError):
            others = [path for path in self._arriving.parent.iterdir() if path != self._arriving]
            if others:
                with self._locked(fcntl.LOCK_EX | fcntl.LOCK_NB):
                    for path in others:
                        shutil.rmtree(path, ignore_errors=True)

    def save(
        self, signed: SignedManifest, refs: Sequence[ChunkRef], chunks: Sequence[bytes | bytearray | memoryview]
    ) -> str:
        """Write chunks, then the manifest, all synced to disk; the snapshot's id. Raises StorageError."""
        for ref, chunk in zip(refs, chunks, strict=True):
            self.put_chunk(ref, chunk)
        return self.put_manifest(signed)

    def put_manifest(self, signed: SignedManifest) -> str:
        """Write a manifest whose chunks are all here, once they are synced to disk; its id. Raises StorageError."""
        identifier = snapshot_id(signed)
        if self._arriving.exists():
            self.sync_chunks(msgspec.msgpack.decode(signed.manifest, type=SnapshotManifest).chunks)
        write_atomically(self._manifests / identifier, msgspec.msgpack.encode(signed))
        return identifier

    def hold_manifest(self, signed: SignedManifest) -> str:
        """Have a snapshot to give away whose chunks are here and not synced yet: in this process, until
        ``put_held_manifest``; its id."""
        identifier = snapshot_id(signed)
        self._held[identifier] = signed
        return identifier

    def put_held_manifest(self, identifier: str) -> None:
        """``put_manifest`` of a snapshot that is held. Raises StorageError: then it is gone."""
        try:
            self.put_manifest(self._held[identifier])
        finally:
            del self._held[identifier]

    def put_chunk(self, ref: ChunkRef, data: bytes | bytearray | memoryview, *, sync: bool = False) -> None:
        """Write one chunk unless it is here, whole. Raises StorageError.

        Unless ``sync``, it is synced when a manifest is put that names it.
        """
        # Compared, not only looked for: what was damaged on the disk is healed by saving or fetching it again.
        if self.chunk(ref) == data:
            if sync:
                self.sync_chunks([ref])
        elif sync:
            write_atomically(self._chunk_path(ref), data)
        else:
            with storage_errors(f"writing into {self._arriving}"):
                self._arriving.mkdir(parents=True, exist_ok=True)
                self._chunk_path(ref).unlink(missing_ok=True)  # damaged: it would be found first
            write_atomically(self._arriving / ref.digest.hex(), data, sync=False)

    def sync_chunks(self, refs: Iterable[ChunkRef]) -> None:
        """Have chunks on the disk that were put without. Raises StorageError."""
        # One after another: whoever finds nothing to sync may rely on it.
        with self._syncing, storage_errors(f"syncing {self._chunks}"):
            names = {path.name for path in self._arriving.iterdir()} if self._arriving.exists() else set()
            arrived = [self._arriving / name for name in {ref.digest.hex() for ref in refs} & names]
            if not arrived:
                return
            with ThreadPoolExecutor(min(SYNC_THREADS, len(arrived)), "sync") as pool:
                list(pool.map(_sync, arrived))
            for path in arrived:
                path.replace(self._chunks / path.name)
            sync_folder(self._chunks)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """While chunks are put whose manifest is still to come, so that ``remove`` takes none of them away."""
        with self._locked(fcntl.LOCK_SH):
            yield

    @contextlib.contextmanager
    def saving(self) -> Iterator[Callable[[ChunkRef, bytearray], None]]:
        """As ``writing``, for a snapshot that is made here: chunks are put by what is given. When it comes to nothing
        (the disk is full), those that were new are removed again."""
        new: list[ChunkRef] = []

        def put(ref: ChunkRef, data: bytearray) -> None:
            if not self.has(ref):
                new.append(ref)
            self.put_chunk(ref, data)

        with self.writing():
            try:
                yield put
            except BaseException:
                for ref in new:
                    self.drop_chunk(ref)
                raise

    def sweep(self, older_than_s: float = ORPHAN_S) -> int:
        """Remove what a process that was killed has left: chunks of no snapshot, and files half written.

        What is younger stays: a transfer that was cut goes on with the chunks that have come. Returns the bytes that
        came free; 0 also while snapshots are being written. Raises StorageError.
        """
        try:
            with self._locked(fcntl.LOCK_EX | fcntl.LOCK_NB):
                return self._sweep(time.time() - older_than_s)
        except BlockingIOError:
            return 0

    def _sweep(self, before_s: float) -> int:
        known = set().union(*(self._chunk_sizes(identifier) for identifier in self.identifiers()))
        freed_bytes = 0
        with storage_errors(f"sweeping {self._folder}"):
            arriving = self._arriving.iterdir() if self._arriving.exists() else ()
            for path in (*self._chunks.iterdir(), *arriving, *self._manifests.iterdir()):
                half = path.name.startswith(".")
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    if (half or (path.parent != self._manifests and path.name not in known)) and (
                        status.st_mtime <= before_s
                    ):
                        path.unlink()
                        freed_bytes += status.st_size
        return freed_bytes

    @contextlib.contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        with storage_errors(f"locking {self._folder}"):
            descriptor = os.open(self._folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, how)
            yield
        finally:
            os.close(descriptor)

    def identifiers(self) -> list[str]:
        """Of every snapshot here, the newest file first. Raises StorageError."""
        with storage_errors(f"looking into {self._manifests}"):
            found = [path for path in self._manifests.iterdir() if SNAPSHOT_ID.fullmatch(path.name)]
            return [path.name for path in sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)]

    def find(self, prefix: str) -> str:
        """The id of the one snapshot that begins so. Raises NotFound, or BlobError when several do."""
        found = [each for each in self.identifiers() if each.startswith(prefix.lower())]
        if not found:
            raise NotFound(
                f"looking for snapshot {prefix[:64]}: this node does not hold it",
                hint="`mindstream snapshot list` shows those that it holds",
                field="snapshot",
            )
        if len(found) > 1:
            raise BlobError(
                f"looking for snapshot {prefix[:64]}: {len(found)} begin so: {', '.join(i[:16] for i in found[:4])}",
                hint="give more digits",
                field="snapshot",
                reason="ambiguous",
            )
        return found[0]

    def remove(self, identifier: str) -> int:
        """Remove a snapshot, and those of its chunks that no other has; the bytes that came free.

        Raises NotFound; BlobError while snapshots are being written; StorageError.
        """
        try:
            with self._locked(fcntl.LOCK_EX | fcntl.LOCK_NB):
                return self._remove(identifier)
        except BlockingIOError:
            raise BlobError(
                f"removing snapshot {identifier[:12]}: a snapshot is being saved or fetched",
                hint="try again in a moment",
                reason="in use",
            ) from None

    def _remove(self, identifier: str) -> int:
        own = self._chunk_sizes(identifier)
        others = [other for other in self.identifiers() if other != identifier]
        shared = set().union(*(self._chunk_sizes(other) for other in others))
        freed_bytes = 0
        with storage_errors(f"removing snapshot {identifier[:12]}"):
            (self._manifests / identifier).unlink()  # first: a snapshot without its manifest is none
            for name in own.keys() - shared:
                gone = [path for path in (self._chunks / name, self._arriving / name) if path.exists()]
                for path in gone:
                    path.unlink(missing_ok=True)
                freed_bytes += own[name] if gone else 0
        return freed_bytes

    def _chunk_sizes(self, identifier: str) -> dict[str, int]:
        """Names and sizes of a snapshot's chunks; of a damaged manifest none. Raises NotFound."""
        try:
            manifest = msgspec.msgpack.decode(self.manifest(identifier).manifest, type=SnapshotManifest)
            return {ref.digest.hex(): ref.size_bytes for ref in manifest.chunks}
        except _DAMAGED as error:
            log.warning("the chunks of snapshot %s are not known: %s", identifier[:12], error)
            return {}

    def manifest(self, identifier: str) -> SignedManifest:
        """The signed manifest of a snapshot. Raises NotFound, or BlobError when the file is damaged."""
        held = self._held.get(identifier)
        if held is not None:
            return held
        path = self._manifests / identifier
        if not SNAPSHOT_ID.fullmatch(identifier) or not path.exists():
            raise NotFound(
                f"looking for snapshot {identifier[:64]}: this node does not hold it",
                hint="it may have been removed; save it again where the conversation lives",
                field="snapshot",
            )
        with storage_errors(f"reading {path}"):
            body = path.read_bytes()
        try:
            signed = msgspec.msgpack.decode(body, type=SignedManifest)
        except UNREADABLE as error:
            raise BlobError(f"reading the manifest {path}: {error}", hint=_remove_hint(identifier)) from None
        if snapshot_id(signed) != identifier:
            raise BlobError(
                f"reading the manifest {path}: its content is not what its name says", hint=_remove_hint(identifier)
            )
        return signed

    def has(self, ref: ChunkRef) -> bool:
        """Whether a chunk is here, in its full size; its content is verified when it is used."""
        for path in self._places(ref):
            with contextlib.suppress(OSError):
                return path.stat().st_size == ref.size_bytes
        return False

    def chunk(self, ref: ChunkRef) -> bytes | None:
        """A chunk's bytes, not verified; None when it is not here. Raises StorageError."""
        with storage_errors(f"reading the chunk {ref.digest.hex()} in {self._folder}"):
            for path in self._places(ref):
                with contextlib.suppress(FileNotFoundError):
                    return path.read_bytes()
        return None

    def _places(self, ref: ChunkRef) -> tuple[Path, Path, Path]:
        """Where a chunk may be; the first once more, as it may have been moved there meanwhile."""
        synced = self._chunk_path(ref)
        return synced, self._arriving / synced.name, synced

    def chunks(self, manifest: SnapshotManifest) -> list[bytes]:
        """All chunks of a manifest, verified.

        Raises BlobError when some are missing or damaged; the damaged ones are removed, to be fetched again.
        """
        found = spread(lambda numbered: self.verified_chunk(numbered[1], numbered[0]), enumerate(manifest.chunks))
        missing = sum(data is None for data in found)
        if missing:
            raise BlobError(
                f"reading a snapshot of {manifest.conversation}: {missing} of its {len(found)} chunks are missing or"
                " were damaged on the disk",
                hint="fetch it from another node, or save the conversation again",
                reason="chunks missing",
            )
        return [data for data in found if data is not None]

    def verified_chunk(self, ref: ChunkRef, index: int) -> bytes | None:
        """A chunk's bytes; None when it is not here, or was damaged, and is removed now. Raises StorageError."""
        data = self.chunk(ref)
        if data is not None:
            try:
                verify_chunk(ref, data, index=index)
            except BadSignature as error:
                log.error("%s is damaged on the disk and removed: %s", self._chunk_path(ref), error)
                self.drop_chunk(ref)
                return None
        return data

    def drop_chunk(self, ref: ChunkRef) -> None:
        """Remove a chunk that is damaged, so that it is fetched again."""
        for path in self._places(ref):
            with contextlib.suppress(OSError):
                path.unlink()

    def _chunk_path(self, ref: ChunkRef) -> Path:
        return self._chunks / ref.digest.hex()


def _remove_hint(identifier: str) -> str:
    return f"`mindstream snapshot rm {identifier[:12]}` removes it; save the conversation again, or fetch it"


def _sync(path: Path) -> None:
    """Have a file's content on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
