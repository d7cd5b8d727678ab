"""The built models of this node as others may fetch them: a signed manifest each, and chunks read from the files."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
from pathlib import Path

from edge.files import storage_errors
from edge.model_cards import CARD_NAME, Built, built_models, check_built_files
from protocol.built_manifest import (
    BUILT_MANIFEST_VERSION,
    BuiltFile,
    BuiltManifest,
    SignedBuiltManifest,
    built_id,
    chunk_places,
    seal_built,
)
from protocol.errors import BadSignature, NotFound
from protocol.identity import Identity, digest
from protocol.layout import ChunkRef
from protocol.manifest import MAX_CHUNK_BYTES, verify_chunk

log = logging.getLogger(__name__)

_Stamp = tuple[tuple[str, int, int], ...]
"""Names, sizes and modification times of a folder's files: when they are the same, so are the contents."""


class BuiltFolder:
    """A built model's files, read chunk by chunk. See edge.blobs.Held.

    Args:
        folder: where they are.
        manifest: what they were when they were digested.
    """

    def __init__(self, folder: Path, manifest: BuiltManifest) -> None:
        places = chunk_places(manifest)
        self.chunks = [ref for ref, _, _ in places]
        self._folder = folder
        self._places = {ref.digest: (name, offset) for ref, name, offset in places}

    def has(self, ref: ChunkRef) -> bool:
        """Whether a chunk is here; false once it was found damaged."""
        return ref.digest in self._places

    def verified_chunk(self, ref: ChunkRef, index: int) -> bytes | None:
        """A chunk's bytes; None when its file has been removed or changed. Raises StorageError."""
        place = self._places.get(ref.digest)
        if place is None:
            return None
        path = self._folder / place[0]
        data = b""
        with storage_errors(f"reading {path}"), contextlib.suppress(FileNotFoundError), path.open("rb") as stream:
            stream.seek(place[1])
            data = stream.read(ref.size_bytes)
        try:
            verify_chunk(ref, data, index=index)
        except BadSignature as error:
            log.error("%s is not what it was when it was digested: %s", path, error)
            self._places.pop(ref.digest, None)  # whoever pulls it is told that it is lost
            return None
        return data


class BuiltShelf:
    """Signed manifests of a cache's built models, each made once while its files stay as they are. Thread-safe.

    Args:
        cache: the folder of built models.
        identity: signs.
    """

    def __init__(self, cache: Path, identity: Identity) -> None:
        self._cache = cache
        self._identity = identity
        self._making = threading.Lock()
        self._made: dict[Path, tuple[_Stamp, SignedBuiltManifest]] = {}
        self._folders: dict[str, BuiltFolder] = {}

    def manifest(self, name: str, precision: str, provider: str) -> SignedBuiltManifest:
        """The manifest of the newest model so built; its files are read, a second for each GB, if they have changed.

        Raises NotFound, ModelUnavailable for a damaged one, MalformedMessage for one that is too large, StorageError.
        """
        found = list(built_models(self._cache, name))
        fitting = [each for each in found if (each.card.precision, each.card.provider) == (precision, provider)]
        if not fitting:
            there = ", ".join(sorted({each.card.variant for each in found}))
            raise NotFound(
                f"looking for {name[:80]} built as {precision}-{provider}: node {self._identity.node} has "
                + (f"only {there} of it" if there else "built none of it, or by another version"),
                hint=f"there: mindstream models build {name[:80]} --precision {precision} --provider {provider}",
                field="precision" if there else "name",
                reason="not built",
            )
        built = max(fitting, key=lambda each: each.card.time_us)
        with self._making, storage_errors(f"reading {built.folder}"):
            stamp = _stamp(built)
            stamped = self._made.get(built.folder)
            if stamped is None or stamped[0] != stamp:
                check_built_files(built, self._cache)
                manifest = _manifest(built, self._identity.node)
                stamped = stamp, seal_built(self._identity, manifest)
                self._made[built.folder] = stamped
                self._folders[built_id(stamped[1])] = BuiltFolder(built.folder, manifest)
            return stamped[1]

    def held(self, identifier: str) -> BuiltFolder | None:
        """What was given out under this id since this process started."""
        return self._folders.get(identifier)


def _stamp(built: Built) -> _Stamp:
    names = (CARD_NAME, *(file.name for file in built.card.files))
    status = [(built.folder / name).stat() for name in names]
    return tuple((name, each.st_size, each.st_mtime_ns) for name, each in zip(names, status, strict=True))


def _manifest(built: Built, node: str) -> BuiltManifest:
    card = (built.folder / CARD_NAME).read_bytes()
    card_sha256 = hashlib.sha256(card).digest()
    files = [BuiltFile(CARD_NAME, len(card), card_sha256)]
    files += [BuiltFile(file.name, file.size_bytes, bytes.fromhex(file.sha256)) for file in built.card.files]
    digests = bytearray()
    for file in files:
        with (built.folder / file.name).open("rb") as stream:
            while chunk := stream.read(MAX_CHUNK_BYTES):
                digests += digest(chunk)
    return BuiltManifest(
        version=BUILT_MANIFEST_VERSION,
        creator=node,
        model=built.card.model,
        folder=built.folder.name,
        build=built.card.build,
        card=card_sha256,
        files=files,
        total_bytes=sum(file.size_bytes for file in files),
        chunks=bytes(digests),
    )
