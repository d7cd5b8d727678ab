"""Manifests of bases: the signed bytes that say which file a model's basis is, for the codec ``transform``, and its
chunks.

The file is cut into chunks of 512 KiB, the last one shorter. They are pulled by the BLAKE3 of the manifest's bytes, as
a snapshot's are. Whoever made a basis signs it; a node that passes it on signs it again, as its own.
"""

from __future__ import annotations

import msgspec

from protocol.errors import MalformedMessage
from protocol.identity import DIGEST_BYTES, DOMAIN_BASIS, Identity, Keyring, digest
from protocol.layout import ChunkRef
from protocol.manifest import MAX_CHUNK_BYTES, ModelDigests, read_signed

BASIS_MANIFEST_VERSION = 1
MAX_BASIS_BYTES = 256 * 1024 * 1024


class BasisManifest(msgspec.Struct, omit_defaults=True):
    """What a basis is of. Its encoded bytes are what is signed."""

    version: int
    """1. Others are refused."""
    creator: str
    """Node whose key signs the manifest: who made the basis, or has it from a node that it trusts."""
    model: str
    """The model's name where it was made."""
    digests: ModelDigests
    """Of the model that it was made with. It serves every build of these weights."""
    basis: bytes
    """BLAKE3, 32 bytes, of the file: what a snapshot's codec names."""
    total_bytes: int
    """The file's size."""
    chunks: bytes
    """BLAKE3 of every chunk, 32 bytes each, one after another."""

    def chunk_list(self) -> list[ChunkRef]:
        """Every chunk, in order."""
        return [
            ChunkRef(self.chunks[at : at + DIGEST_BYTES], min(MAX_CHUNK_BYTES, self.total_bytes - offset))
            for at, offset in enumerated(self.total_bytes)
        ]


class SignedBasis(msgspec.Struct):
    """A basis' manifest as it crosses the bus, and as it lies beside the file."""

    manifest: bytes
    """msgpack of BasisManifest: the signed bytes."""
    signature: bytes
    """Ed25519 over the domain ``mindstream/v1/basis\\0`` and ``manifest``."""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(BasisManifest)


def enumerated(total_bytes: int) -> list[tuple[int, int]]:
    """Of each chunk of a file: where its digest stands in ``chunks``, and where it begins in the file."""
    offsets = range(0, total_bytes, MAX_CHUNK_BYTES)
    return [(number * DIGEST_BYTES, offset) for number, offset in enumerate(offsets)]


def basis_id(signed: SignedBasis) -> str:
    """What its chunks are pulled by: BLAKE3 of the manifest's bytes, 64 hex digits."""
    return digest(signed.manifest).hex()


def sign_basis(identity: Identity, model: str, digests: ModelDigests, data: bytes) -> SignedBasis:
    """The manifest of the basis file ``data``, signed. Raises MalformedMessage when it is above the limit."""
    if len(data) > MAX_BASIS_BYTES:
        raise _malformed("total_bytes", f"{len(data):,}, limit {MAX_BASIS_BYTES:,}")
    body = _encoder.encode(
        BasisManifest(
            version=BASIS_MANIFEST_VERSION,
            creator=identity.node,
            model=model,
            digests=digests,
            basis=digest(data),
            total_bytes=len(data),
            chunks=b"".join(digest(data[at : at + MAX_CHUNK_BYTES]) for _, at in enumerated(len(data))),
        )
    )
    return SignedBasis(manifest=body, signature=identity.sign(DOMAIN_BASIS, body))


def open_basis(signed: SignedBasis, keyring: Keyring) -> BasisManifest:
    """The manifest, once signature, version and arithmetic hold; nothing is allocated from it before.

    Raises MalformedMessage, UnknownPeer or BadSignature.
    """
    manifest = read_signed(
        "the manifest of a basis", DOMAIN_BASIS, signed.manifest, signed.signature, _decoder, keyring
    )
    if manifest.version != BASIS_MANIFEST_VERSION:
        raise _malformed("version", f"{manifest.version}, this node reads {BASIS_MANIFEST_VERSION}")
    if not 0 < manifest.total_bytes <= MAX_BASIS_BYTES:
        raise _malformed("total_bytes", f"{manifest.total_bytes:,}, limit {MAX_BASIS_BYTES:,}")
    own = manifest.digests
    for field, value in (
        ("basis", manifest.basis),
        *(("digests", each) for each in (own.weights, own.tokenizer, own.config, *own.adapters)),
    ):
        if len(value) != DIGEST_BYTES:
            raise _malformed(field, f"{len(value)} bytes, a digest has {DIGEST_BYTES}")
    wanted = len(enumerated(manifest.total_bytes)) * DIGEST_BYTES
    if len(manifest.chunks) != wanted:
        raise _malformed("chunks", f"{len(manifest.chunks):,} bytes, not {wanted:,}")
    return manifest


def _malformed(field: str, reason: str) -> MalformedMessage:
    return MalformedMessage(f"reading the manifest of a basis: {field}: {reason}", field=field, reason=reason)
