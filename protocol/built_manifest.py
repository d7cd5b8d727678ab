"""Manifests of built models: the signed bytes that say which files a built model's folder has, and their chunks.

The files are cut, each by itself and in order, into chunks of 512 KiB, the last of a file shorter; so their sizes
follow from the files' and only their digests are listed. A model's chunks are pulled by the BLAKE3 of its manifest's
bytes, as a snapshot's are.
"""

from __future__ import annotations

import msgspec

from protocol.errors import MalformedMessage
from protocol.identity import DIGEST_BYTES, DOMAIN_BUILT_MODEL, Identity, Keyring, digest
from protocol.layout import ChunkRef
from protocol.manifest import MAX_CHUNK_BYTES, MAX_MANIFEST_BYTES, read_signed

BUILT_MANIFEST_VERSION = 1
MAX_FILES = 64
MAX_NAME_BYTES = 200
MAX_MODEL_BYTES = MAX_MANIFEST_BYTES // DIGEST_BYTES * MAX_CHUNK_BYTES
"""A manifest that claims more could not list its chunks."""
SHA256_BYTES = 32


class BuiltFile(msgspec.Struct, frozen=True):
    """One file of a built model's folder."""

    name: str
    """Without a folder, and without a dot at the beginning."""
    size_bytes: int
    sha256: bytes
    """32 bytes, of the whole file."""


class BuiltManifest(msgspec.Struct, omit_defaults=True):
    """What a built model's folder holds. Its encoded bytes are what is signed."""

    version: int
    """1. Others are refused."""
    creator: str
    """Node whose key signs the manifest: the holder."""
    model: str
    """The model's name."""
    folder: str
    """Name of the folder in a cache, which ends in the number of the build format."""
    build: int
    """That number."""
    card: bytes
    """SHA-256, 32 bytes, of ``card.json``."""
    files: list[BuiltFile]
    """All of them, the card as well, in the order of their chunks."""
    total_bytes: int
    """Sum of the files' sizes."""
    chunks: bytes
    """BLAKE3 of every chunk, 32 bytes each, one after another."""


class SignedBuiltManifest(msgspec.Struct):
    """A built model's manifest as it crosses the bus."""

    manifest: bytes
    """msgpack of BuiltManifest: the signed bytes."""
    signature: bytes
    """Ed25519 over the domain ``mindstream/v1/built-model\\0`` and ``manifest``."""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(BuiltManifest)


def built_id(signed: SignedBuiltManifest) -> str:
    """What its chunks are pulled by: BLAKE3 of the manifest's bytes, 64 hex digits."""
    return digest(signed.manifest).hex()


def seal_built(identity: Identity, manifest: BuiltManifest) -> SignedBuiltManifest:
    """Sign ``manifest``. Raises MalformedMessage when it is above its limit."""
    body = _encoder.encode(manifest)
    if len(body) > MAX_MANIFEST_BYTES:
        raise MalformedMessage(
            f"sealing the manifest of {manifest.folder}: {len(body):,} bytes, above the limit of "
            f"{MAX_MANIFEST_BYTES:,}: the model has {manifest.total_bytes / 1e9:.1f} GB",
            hint="copy the folder by other means",
            field="manifest",
            reason="too large",
        )
    return SignedBuiltManifest(manifest=body, signature=identity.sign(DOMAIN_BUILT_MODEL, body))


def open_built(signed: SignedBuiltManifest, keyring: Keyring) -> BuiltManifest:
    """The manifest, once signature, version, names and arithmetic hold; nothing is allocated from it before.

    Raises MalformedMessage, UnknownPeer or BadSignature.
    """

    def malformed(field: str, reason: str) -> MalformedMessage:
        return MalformedMessage(f"reading a built model's manifest: {field}: {reason}", field=field, reason=reason)

    manifest = read_signed(
        "a built model's manifest", DOMAIN_BUILT_MODEL, signed.manifest, signed.signature, _decoder, keyring
    )
    if manifest.version != BUILT_MANIFEST_VERSION:
        raise malformed("version", f"{manifest.version}, this node reads {BUILT_MANIFEST_VERSION}")
    names = [file.name for file in manifest.files]
    for field, name in (("model", manifest.model), ("folder", manifest.folder), *(("files", name) for name in names)):
        if not is_plain_name(name):
            raise malformed(field, f"{name[:80]!r} is no plain name of a file")
    if not 0 < len(names) <= MAX_FILES or len({name.casefold() for name in names}) != len(names):
        raise malformed("files", f"{len(names)} files, at most {MAX_FILES}, no two of one name")
    if any(file.size_bytes < 0 or len(file.sha256) != SHA256_BYTES for file in manifest.files):
        raise malformed("files", "a size is below 0, or a SHA-256 has not 32 bytes")
    if manifest.total_bytes != sum(file.size_bytes for file in manifest.files):
        raise malformed("total_bytes", f"{manifest.total_bytes:,} is not the sum of the files")
    if manifest.total_bytes > MAX_MODEL_BYTES:
        raise malformed("total_bytes", f"{manifest.total_bytes:,}, limit {MAX_MODEL_BYTES:,}")
    wanted = sum(-(-file.size_bytes // MAX_CHUNK_BYTES) for file in manifest.files)
    if len(manifest.chunks) != wanted * DIGEST_BYTES:
        raise malformed("chunks", f"{len(manifest.chunks):,} bytes, not {DIGEST_BYTES} for each of {wanted:,} chunks")
    return manifest


def chunk_places(manifest: BuiltManifest) -> list[tuple[ChunkRef, str, int]]:
    """Every chunk in order: what it is, the file it belongs to, and where in it, in bytes."""
    places: list[tuple[ChunkRef, str, int]] = []
    for file in manifest.files:
        for offset in range(0, file.size_bytes, MAX_CHUNK_BYTES):
            at = len(places) * DIGEST_BYTES
            ref = ChunkRef(manifest.chunks[at : at + DIGEST_BYTES], min(MAX_CHUNK_BYTES, file.size_bytes - offset))
            places.append((ref, file.name, offset))
    return places


def is_plain_name(name: str) -> bool:
    """Whether a name stays in the folder that it is put into, on any file system, and is not hidden there."""
    return (
        0 < len(name.encode(errors="replace")) <= MAX_NAME_BYTES
        and name.isprintable()
        and not name.startswith(".")
        and not set(name) & set("/\\:")
    )
