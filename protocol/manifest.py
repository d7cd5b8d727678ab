"""Blob manifests: the signed bytes that say what a snapshot is and which chunks hold it.

A snapshot's id is the BLAKE3 of its manifest's bytes. Chunks are addressed by their own BLAKE3. Token ids are
always inside, so that any snapshot can be resumed by reading again.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from protocol.errors import UNREADABLE, BadSignature, MalformedMessage
from protocol.identity import DIGEST_BYTES, DOMAIN_MANIFEST, Identity, Keyring, digest

MANIFEST_VERSION = 1
MAX_MANIFEST_BYTES = 960 * 1024
"""A manifest crosses the bus in one message, below the 1 MiB limit of every broker that Mindstream configures."""
MAX_CHUNK_BYTES = 512 * 1024
MAX_SNAPSHOT_BYTES = 64 * 1024**3
"""A manifest that claims more is refused before anything is allocated."""


class NumericsFingerprint(msgspec.Struct, frozen=True):
    """What must be equal for a resumed run to be bit-identical to the uninterrupted one."""

    engine: str
    """``transformers`` or ``onnxruntime``."""
    engine_version: str
    """Versions of the libraries that compute, such as ``torch 2.13.0+cpu transformers 5.23.0``."""
    device: str
    """``cpu`` or the GPU's name."""
    instruction_set: str
    """The widest that the library uses, such as ``avx512_bf16``."""
    dtype: str
    """Of weights and KV, such as ``bfloat16``."""
    threads: int
    """Threads of the intra-op pool."""
    chunk_schedule: str
    """How a prompt is cut for prefill, such as ``multiples of 256``."""
    batch_mode: str
    """``deterministic`` (batch-1 steps) or ``batched``."""


class StateLayout(msgspec.Struct, frozen=True):
    """One array of a layer's recurrent part, C order."""

    shape: tuple[int, ...]
    dtype: str
    """``bfloat16``, ``float16`` or ``float32``."""


class LayerLayout(msgspec.Struct, frozen=True):
    """One layer's state in the snapshot; arrays are (kv_heads, tokens, head_dim), C order; then come its states."""

    kind: str
    """``full``, ``sliding`` or ``recurrent``."""
    kv_heads: int
    head_dim: int
    tokens: int
    """Positions held: for a sliding layer at most its window."""
    seen_tokens: int
    """Positions ever written to this layer (a sliding layer's cumulative length)."""
    window_tokens: int = 0
    """Window of a sliding layer; 0 for any other."""


class ChunkRef(msgspec.Struct, frozen=True):
    """One content-addressed chunk of at most 512 KiB."""

    digest: bytes
    """BLAKE3, 32 bytes, of the chunk's bytes."""
    size_bytes: int


class ModelDigests(msgspec.Struct, frozen=True):
    """BLAKE3 of what the numbers depend on, 32 bytes each."""

    weights: bytes
    tokenizer: bytes
    config: bytes


class SnapshotManifest(msgspec.Struct, omit_defaults=True):
    """What a snapshot holds. Its encoded bytes are what is signed, stored and forwarded."""

    version: int
    """1. Others are refused."""
    model: str
    """The model's name, for people; ``digests`` decide."""
    digests: ModelDigests
    creator: str
    """Node whose key signs the manifest."""
    created_us: int
    """Unix microseconds by the creator's clock."""
    conversation: str
    """Name of the conversation."""
    fingerprint: NumericsFingerprint
    kv_dtype: str
    """Of the cached keys and values, such as ``bfloat16``."""
    layers: list[LayerLayout]
    codec: str
    """``raw``: each layer's keys, then its values, as they lie in memory, little-endian."""
    codec_params: dict[str, Any]
    cached_tokens: int
    """Positions in the KV cache: always one less than ``len(tokens)``."""
    tokens: bytes
    """All token ids, the pending one last, uint32 little-endian."""
    sampler: dict[str, Any]
    """The sampler's settings and RNG state, plain msgpack types."""
    state: dict[str, Any]
    """The rest of the generation state: messages, settings, counts."""
    total_bytes: int
    """Sum of the chunks' sizes."""
    chunks: list[ChunkRef]
    states: list[list[StateLayout]] = []
    """The arrays of each layer's recurrent part, an empty list for a layer without one; empty when no layer has one."""


class SignedManifest(msgspec.Struct):
    """A manifest as it is stored and as it crosses the bus."""

    manifest: bytes
    """msgpack of SnapshotManifest: the signed bytes."""
    signature: bytes
    """Ed25519 over the domain ``mindstream/v1/manifest\\0`` and ``manifest``."""


T = TypeVar("T")

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(SnapshotManifest)


class _Creator(msgspec.Struct):
    """As much of a manifest as must be read before its signature can be checked."""

    creator: str


_creator_decoder = msgspec.msgpack.Decoder(_Creator)


def snapshot_id(signed: SignedManifest) -> str:
    """The snapshot's id: BLAKE3 of the manifest bytes, 64 hex digits."""
    return digest(signed.manifest).hex()


def seal_manifest(identity: Identity, manifest: SnapshotManifest) -> SignedManifest:
    """Sign ``manifest``. Raises MalformedMessage when it is above its limit."""
    body = _encoder.encode(manifest)
    if len(body) > MAX_MANIFEST_BYTES:
        raise MalformedMessage(
            f"sealing a snapshot manifest of {len(body):,} bytes: above the limit of {MAX_MANIFEST_BYTES:,}",
            hint="the conversation is too long for one manifest; start a new one",
            field="manifest",
            reason="too large",
        )
    return SignedManifest(manifest=body, signature=identity.sign(DOMAIN_MANIFEST, body))


def _malformed(what: str, field: str, reason: str) -> MalformedMessage:
    return MalformedMessage(f"reading {what}: {field}: {reason}", field=field, reason=reason)


def read_signed(
    what: str, domain: bytes, body: bytes, signature: bytes, decoder: msgspec.msgpack.Decoder[T], keyring: Keyring
) -> T:
    """What ``body`` says, once the node that it names as its ``creator`` is trusted and has signed it in ``domain``.

    ``what`` it is stands in errors. Raises MalformedMessage, UnknownPeer or BadSignature.
    """
    if len(body) > MAX_MANIFEST_BYTES:
        raise _malformed(what, "manifest", f"{len(body):,} bytes, limit {MAX_MANIFEST_BYTES:,}")
    # Free-form maps may take 60 times their size once decoded: that is done for trusted peers only.
    try:
        keyring.verify(_creator_decoder.decode(body).creator, domain, body, signature)
        return decoder.decode(body)
    except UNREADABLE as error:
        raise _malformed(what, "manifest", str(error)) from None


def open_manifest(signed: SignedManifest, keyring: Keyring) -> SnapshotManifest:
    """The manifest, once signature, version and arithmetic hold; nothing is allocated from it before.

    Raises MalformedMessage, UnknownPeer or BadSignature.
    """

    def malformed(field: str, reason: str) -> MalformedMessage:
        return _malformed("a snapshot manifest", field, reason)

    manifest = read_signed("a snapshot manifest", DOMAIN_MANIFEST, signed.manifest, signed.signature, _decoder, keyring)
    if manifest.version != MANIFEST_VERSION:
        raise malformed("version", f"{manifest.version}, this node reads {MANIFEST_VERSION}")
    if any(
        not 0 < chunk.size_bytes <= MAX_CHUNK_BYTES or len(chunk.digest) != DIGEST_BYTES for chunk in manifest.chunks
    ):
        raise malformed("chunks", f"a chunk is empty or above {MAX_CHUNK_BYTES:,} bytes, or its digest is not 32 bytes")
    if manifest.total_bytes != sum(chunk.size_bytes for chunk in manifest.chunks):
        raise malformed("total_bytes", f"{manifest.total_bytes:,} is not the sum of the chunks")
    if manifest.total_bytes > MAX_SNAPSHOT_BYTES:
        raise malformed("total_bytes", f"{manifest.total_bytes:,}, limit {MAX_SNAPSHOT_BYTES:,}")
    if (
        manifest.cached_tokens < 0
        or len(manifest.tokens) % 4
        or len(manifest.tokens) // 4 != manifest.cached_tokens + 1
    ):
        raise malformed(
            "tokens",
            f"{len(manifest.tokens)} bytes for {manifest.cached_tokens} cached tokens and a pending one",
        )
    return manifest


def verify_chunk(ref: ChunkRef, data: bytes | memoryview, *, index: int) -> None:
    """Raises BadSignature unless ``data`` is the chunk that ``ref`` names."""
    if len(data) != ref.size_bytes or digest(data) != ref.digest:
        raise BadSignature(
            f"checking chunk {index}: {len(data):,} bytes do not match the signed manifest",
            hint="the chunk was damaged on the way; it is asked for again",
            field="data",
            reason="digest mismatch",
        )
