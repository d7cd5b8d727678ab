"""Bases of the rung ``transform`` on this machine: found for a model, kept, given to other nodes, and asked of them.

They lie in ``bases`` in the cache of models: ``NAME-DIGEST.basis`` is the file, DIGEST the first digits of its BLAKE3,
and ``….signed`` beside it who vouches for it. A file without that, or one that is not what was signed, is none.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edge.blobs import BlobReceiver
from edge.bus import Bus
from edge.files import storage_errors, write_atomically
from edge.model_registry import default_cache_folder
from protocol.basis_manifest import BasisManifest, SignedBasis, basis_id, enumerated, open_basis, sign_basis
from protocol.errors import UNREADABLE, BadSignature, MindstreamError, NotFound, SnapshotRefused
from protocol.identity import Identity, Keyring, digest
from protocol.layout import ChunkRef
from protocol.manifest import ModelDigests, verify_chunk
from protocol.messages import ModelBasisAsk
from services.model_runner.codecs.basis import Basis, file_of, read_basis
from services.model_runner.engine import ModelSpec

log = logging.getLogger(__name__)

BASIS_SUFFIX, SIGNED_SUFFIX = ".basis", ".signed"
MANIFEST_TTL_MS = 20_000
TRANSFER_TIMEOUT_S = 1800.0
_DIGEST_DIGITS = 16
_NOT_PLAIN = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Found:
    """A basis file that lies here, by its manifest; the file's content is not read yet."""

    path: Path
    signed: SignedBasis
    manifest: BasisManifest

    def fits(self, digests: ModelDigests, wanted: bytes = b"") -> bool:
        """Whether it is of that model, in any build of it, or the one ``wanted`` by its BLAKE3."""
        own = self.manifest.digests
        same = (own.tokenizer, own.config, own.adapters) == (digests.tokenizer, digests.config, digests.adapters)
        return same and (not wanted or wanted == self.manifest.basis)

    def read(self) -> bytes:
        """The file's bytes. Raises BadSignature when they are not those that were signed; StorageError."""
        with storage_errors(f"reading {self.path}"):
            data = self.path.read_bytes()
        if digest(data) != self.manifest.basis:
            raise BadSignature(
                f"reading the basis {self.path}: it is not what {self.manifest.creator} signed",
                hint="remove it; `mindstream snapshot calibrate` makes it again",
                field="basis",
                reason="damaged",
            )
        return data


def bases_folder(cache: Path | None = None) -> Path:
    """Where they lie; it may not exist yet."""
    return (cache or default_cache_folder()) / "bases"


_lock = threading.Lock()
_manifests: dict[Path, tuple[tuple[int, int], SignedBasis, BasisManifest]] = {}
_parsed: dict[tuple[bytes, ModelDigests], Basis | None] = {}
"""By the file's BLAKE3 and the model; None for one that cannot be used, so that it is said once."""


def find_basis(
    spec: ModelSpec, wanted: bytes = b"", *, keyring: Keyring | None = None, folder: Path | None = None
) -> Basis | None:
    """The basis of ``spec``'s model that lies here; None when there is none. Cheap: a file is read once.

    Args:
        spec: of the engine that encodes or decodes.
        wanted: BLAKE3 of the one that a manifest names (``codecs.basis_digest``); empty: the best there is.
        keyring: whose signature counts; None: nobody's is asked for.
        folder: ``bases_folder()`` when not given.
    """
    for found in here(folder or bases_folder(), keyring):
        if not found.fits(spec.digests, wanted):
            continue
        key = found.manifest.basis, spec.digests
        with _lock:
            if key not in _parsed:
                try:
                    _parsed[key] = read_basis(found.read(), spec)
                except MindstreamError as error:
                    log.warning("%s is not used: %s", found.path, error)
                    _parsed[key] = None
            basis = _parsed[key]
        if basis is not None:
            return basis
    return None


def here(folder: Path, keyring: Keyring | None = None) -> list[Found]:
    """All in ``folder``, the newest first; with ``keyring``, those that trusted nodes signed."""
    found = []
    try:
        paths = sorted(folder.glob(f"*{BASIS_SUFFIX}"))
    except OSError:
        return []
    for path in paths:
        beside = path.with_suffix(SIGNED_SUFFIX)
        try:
            status = beside.stat()
            stamp = status.st_mtime_ns, status.st_size
            kept = _manifests.get(beside)
            if kept is None or kept[0] != stamp:
                signed = msgspec.msgpack.decode(beside.read_bytes(), type=SignedBasis)
                manifest = msgspec.msgpack.decode(signed.manifest, type=BasisManifest)
                kept = _manifests[beside] = stamp, signed, manifest
            if keyring is not None:
                open_basis(kept[1], keyring)
        except (OSError, *UNREADABLE, MindstreamError) as error:
            log.debug("%s is passed over: %s", path, error)
            continue
        found.append(Found(path, kept[1], kept[2]))
    return sorted(found, key=lambda each: each.path.stat().st_mtime_ns, reverse=True)


def keep_basis(signed: SignedBasis, data: bytes, folder: Path | None = None) -> Path:
    """Put a basis among those of this machine; where it lies. Raises StorageError."""
    manifest = msgspec.msgpack.decode(signed.manifest, type=BasisManifest)
    into = folder or bases_folder()
    name = _NOT_PLAIN.sub("-", manifest.model).strip("-.")[:80] or "model"
    path = into / f"{name}-{manifest.basis.hex()[:_DIGEST_DIGITS]}{BASIS_SUFFIX}"
    with storage_errors(f"making {into}"):
        into.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data, mode=0o644)
    # Last: a file without it is none.
    write_atomically(path.with_suffix(SIGNED_SUFFIX), msgspec.msgpack.encode(signed), mode=0o644)
    return path


class BasisShelf:
    """This node's bases as others may ask for them, each signed again by this node. Thread-safe.

    Args:
        identity: signs.
        keyring: whose bases are passed on.
        folder: ``bases_folder()`` when not given.
    """

    def __init__(
        self, identity: Identity, keyring: Callable[[], Keyring | None] = lambda: None, folder: Path | None = None
    ) -> None:
        self._identity = identity
        self._keyring = keyring
        self._folder = folder
        self._lock = threading.Lock()
        self._given: dict[str, HeldBasis] = {}
        self._signed: dict[bytes, SignedBasis] = {}

    def manifest(self, ask: ModelBasisAsk) -> SignedBasis:
        """The manifest of what was asked for. Raises NotFound, BadSignature for a damaged file, StorageError."""
        digests = ModelDigests(ask.weights, ask.tokenizer, ask.config, tuple(ask.adapters))
        for found in here(self._folder or bases_folder(), self._keyring()):
            if found.fits(digests, ask.basis):
                break
        else:
            raise NotFound(
                f"looking for the basis of {ask.model[:80]}: node {self._identity.node} has none",
                hint="there: mindstream snapshot calibrate",
                field="basis" if ask.basis else "model",
                reason="no basis",
            )
        with self._lock:
            signed = self._signed.get(found.manifest.basis)
            if signed is None:
                data = found.read()
                signed = sign_basis(self._identity, found.manifest.model, found.manifest.digests, data)
                self._signed[found.manifest.basis] = signed
                chunks = msgspec.msgpack.decode(signed.manifest, type=BasisManifest).chunk_list()
                self._given[basis_id(signed)] = HeldBasis(chunks, data)
            return signed

    def held(self, identifier: str) -> HeldBasis | None:
        """What was given out under this id since this process started."""
        return self._given.get(identifier)


class HeldBasis:
    """A basis in memory, whole or on its way: chunks are read from it (edge.blobs.Held) or put into it."""

    def __init__(self, chunks: Sequence[ChunkRef], data: bytes | None = None) -> None:
        self.chunks = chunks
        size_bytes = sum(ref.size_bytes for ref in chunks)
        self._data = bytearray(data) if data is not None else bytearray(size_bytes)
        # One chunk may stand in several places.
        self._places: dict[bytes, list[int]] = {}
        for (_, offset), ref in zip(enumerated(size_bytes), chunks, strict=True):
            self._places.setdefault(ref.digest, []).append(offset)
        self._here = set(self._places) if data is not None else set()

    def has(self, ref: ChunkRef) -> bool:
        """Whether a chunk is here."""
        return ref.digest in self._here

    def verified_chunk(self, ref: ChunkRef, index: int) -> bytes | None:
        """A chunk's bytes; None when it is not here."""
        if not self.has(ref):
            return None
        offset = self._places[ref.digest][0]
        data = bytes(self._data[offset : offset + ref.size_bytes])
        verify_chunk(ref, data, index=index)
        return data

    def put_chunk(self, ref: ChunkRef, data: bytes | memoryview) -> None:
        """Keep a chunk that was verified."""
        for offset in self._places[ref.digest]:
            self._data[offset : offset + ref.size_bytes] = data
        self._here.add(ref.digest)

    def whole(self) -> bytes:
        """All of it."""
        return bytes(self._data)


def ask_for(digests: ModelDigests, model: str, wanted: bytes = b"") -> ModelBasisAsk:
    """The ask for a basis of a model; ``wanted``: for that one alone."""
    return ModelBasisAsk(
        model=model,
        tokenizer=digests.tokenizer,
        config=digests.config,
        weights=digests.weights,
        adapters=list(digests.adapters),
        basis=wanted,
    )


def fetch_basis(
    bus: Bus,
    blob_bus: Bus,
    keyring: Keyring,
    holder: str,
    ask: ModelBasisAsk,
    *,
    folder: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Found:
    """Ask ``holder`` for a basis and keep it; what is here already is not fetched.

    Raises NotFound when it has none; TrustError and MalformedMessage before anything is fetched; SnapshotRefused for a
    file that is no basis of that model; BlobError for a transfer that was cut; StorageError; AskExpired.
    """
    signed: SignedBasis = bus.ask(holder, ask, ttl_ms=MANIFEST_TTL_MS)
    manifest = open_basis(signed, keyring)
    asked = f"fetching the basis of {ask.model[:80]} from {holder}"
    if manifest.creator != holder:
        raise BadSignature(
            f"{asked}: its manifest is signed by {manifest.creator[:80]}",
            hint=f"ask that node: --from {manifest.creator[:63]}",
            field="creator",
            reason="another signer",
        )
    found = Found(Path(), signed, manifest)
    if not found.fits(ModelDigests(ask.weights, ask.tokenizer, ask.config, tuple(ask.adapters)), ask.basis):
        raise SnapshotRefused(
            f"{asked}: it sent one of another model, {manifest.model[:80]!r}",
            hint="are both nodes' models the same? `mindstream models list` on both",
            field="digests",
            reason="another model",
        )
    into = folder or bases_folder()
    for own in here(into, keyring):
        if own.manifest.basis == manifest.basis and _is_whole(own):
            return own
    target = HeldBasis(manifest.chunk_list())
    receiver = BlobReceiver(
        bus, blob_bus, target, on_progress, should_stop, what="basis", mend="mindstream snapshot calibrate there"
    )
    receiver.pull(holder, basis_id(signed), _Chunks(target.chunks), timeout_s=TRANSFER_TIMEOUT_S)
    data = target.whole()
    if digest(data) != manifest.basis:
        raise BadSignature(f"{asked}: the file is not what its digest says", field="basis", reason="damaged")
    if file_of(data).digests != manifest.digests:
        raise SnapshotRefused(f"{asked}: the file is of another model", field="digests", reason="another model")
    return Found(keep_basis(signed, data, into), signed, manifest)


@dataclass(frozen=True)
class _Chunks:
    chunks: Sequence[ChunkRef]


def _is_whole(found: Found) -> bool:
    try:
        found.read()
    except MindstreamError:
        return False
    return True
