"""Bases of the rung ``transform`` on this machine: found for a model, and kept.

They lie in ``bases`` in the cache of models: ``NAME-DIGEST.basis`` is the file, DIGEST the first digits of its BLAKE3,
and ``….signed`` beside it who vouches for it. A file without that, or one that is not what was signed, is none.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edge.files import storage_errors, write_atomically
from edge.model_registry import default_cache_folder
from protocol.basis_manifest import BasisManifest, SignedBasis, open_basis
from protocol.errors import UNREADABLE, BadSignature, MindstreamError
from protocol.identity import Keyring, digest
from protocol.manifest import ModelDigests
from services.model_runner.codecs.basis import Basis, read_basis
from services.model_runner.engine import ModelSpec

log = logging.getLogger(__name__)

BASIS_SUFFIX, SIGNED_SUFFIX = ".basis", ".signed"
_DIGEST_DIGITS = 16
_NOT_USABLE: tuple[type[Exception], ...] = (OSError, MindstreamError, *UNREADABLE)
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


class _Known:
    """What was found out of the file at its last change."""

    def __init__(self, stamp: tuple[int, int], signed: SignedBasis) -> None:
        self.stamp = stamp
        self.signed = signed
        self.manifest = msgspec.msgpack.decode(signed.manifest, type=BasisManifest)
        self.trusted: set[str] = set()
        """Fingerprints that its signature was checked by."""

    def trust(self, keyring: Keyring) -> None:
        """Raises as ``open_basis``."""
        fingerprint = keyring.fingerprint(self.manifest.creator)
        if not fingerprint or fingerprint not in self.trusted:
            open_basis(self.signed, keyring)
            self.trusted.add(fingerprint)


_SETTLED_NS = 2_000_000_000
"""A folder that was changed less than this ago is looked into again: its time of change may stand still for as long."""
_lock = threading.Lock()
_listed: dict[Path, tuple[int, list[Path]]] = {}
_manifests: dict[Path, _Known] = {}
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
    for path in _paths(folder):
        beside = path.with_suffix(SIGNED_SUFFIX)
        try:
            status = beside.stat()
            stamp = status.st_mtime_ns, status.st_size
            known = _manifests.get(beside)
            if known is None or known.stamp != stamp:
                known = _Known(stamp, msgspec.msgpack.decode(beside.read_bytes(), type=SignedBasis))
                _manifests[beside] = known
            if keyring is not None:
                known.trust(keyring)
            found.append((path.stat().st_mtime_ns, Found(path, known.signed, known.manifest)))
        except _NOT_USABLE as error:
            log.debug("%s is passed over: %s", path, error)
    return [each for _, each in sorted(found, key=lambda dated: dated[0], reverse=True)]


def _paths(folder: Path) -> list[Path]:
    """The files there, by name."""
    try:
        changed_ns = folder.stat().st_mtime_ns
        known = _listed.get(folder)
        if known is None or known[0] != changed_ns:
            known = changed_ns, sorted(folder.glob(f"*{BASIS_SUFFIX}"))
            if time.time_ns() - changed_ns > _SETTLED_NS:
                _listed[folder] = known
        return known[1]
    except OSError:
        return []


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
