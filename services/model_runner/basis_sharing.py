"""Bases between nodes: given to who asks, each signed again by this node, and asked of a peer.

Never in the midst of a handoff: a snapshot whose basis is not here is read from its token ids, and the basis is fetched
behind it, for the next one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edge.blobs import BlobReceiver
from edge.bus import Bus
from protocol.basis_manifest import BasisManifest, SignedBasis, basis_id, enumerated, open_basis, sign_basis
from protocol.errors import BadSignature, MindstreamError, NotFound, SnapshotRefused
from protocol.identity import Identity, Keyring, digest
from protocol.layout import ChunkRef
from protocol.manifest import ModelDigests, verify_chunk
from protocol.messages import ModelBasisAsk
from services.model_runner.bases import Found, bases_folder, here, keep_basis
from services.model_runner.codecs.basis import file_of
from services.model_runner.engine import ModelSpec

log = logging.getLogger(__name__)

MANIFEST_TTL_MS = 20_000
TRANSFER_TIMEOUT_S = 1800.0


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


class BasisFetcher:
    """Fetches bases behind the work, one after another, each once.

    Args:
        bus, blob_bus: for asks and for chunks.
        keyring: whose signature counts, asked for each time.
        stopping: whether to give up.
        folder: ``bases_folder()`` when not given.
    """

    def __init__(
        self,
        bus: Bus,
        blob_bus: Bus,
        keyring: Callable[[], Keyring],
        stopping: Callable[[], bool],
        folder: Path | None = None,
    ) -> None:
        self._bus = bus
        self._blob_bus = blob_bus
        self._keyring = keyring
        self._stopping = stopping
        self._folder = folder
        self._lock = threading.Lock()
        self._under_way: set[tuple[str, bytes]] = set()
        self._thread = ThreadPoolExecutor(1, "basis fetcher")

    def stop(self) -> None:
        """Begin nothing more."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def want(self, spec: ModelSpec, holder: str, wanted: bytes) -> None:
        """Have the basis that a snapshot of ``holder`` named, some time; what comes of it is logged and counted."""
        with self._lock:
            if (holder, wanted) in self._under_way:
                return
            self._under_way.add((holder, wanted))
        self._thread.submit(self._fetch, spec, holder, wanted)

    def fetch(self, spec: ModelSpec, holder: str, wanted: bytes) -> None:
        """Have it now. Raises as ``fetch_basis``."""
        ask = ask_for(spec.digests, spec.name, wanted)
        fetch_basis(
            self._bus, self._blob_bus, self._keyring(), holder, ask, folder=self._folder, should_stop=self._stopping
        )

    def _fetch(self, spec: ModelSpec, holder: str, wanted: bytes) -> None:
        ask = ask_for(spec.digests, spec.name, wanted)
        try:
            found = fetch_basis(
                self._bus, self._blob_bus, self._keyring(), holder, ask, folder=self._folder, should_stop=self._stopping
            )
        except MindstreamError as error:
            self._bus.counters.add("basis.not_fetched")
            log.warning("the basis that a snapshot of %s needs is not here: %s", holder, error)
        else:
            self._bus.counters.add("basis.fetched")
            log.info("%s is here now, from %s", found.path.name, holder)
        finally:
            with self._lock:
                self._under_way.discard((holder, wanted))
