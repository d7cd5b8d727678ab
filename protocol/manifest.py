"""Snapshot manifests: the signed bytes that say what a snapshot is and which sealed chunks hold it.

A snapshot's id is the BLAKE3 of its manifest's bytes. Positions are cut at absolute multiples of 256 tokens into
blocks, each encoded and sealed by itself (``protocol.sealing``), so that snapshots of one conversation share the blocks
of their common prefix. Token ids are always inside, sealed as what they are the key to is: any snapshot can be resumed
by reading again.

Bytes are canonical msgpack: maps sorted by their keys, no key twice, every number and length in its shortest form,
floats of 64 bits. What is not is refused, so no two readers can see two things in one signature.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from protocol.errors import UNREADABLE, BadSignature, MalformedMessage, SnapshotRefused
from protocol.identity import DIGEST_BYTES, DOMAIN_MANIFEST, Identity, Keyring, digest
from protocol.layout import (
    BLOCK_TOKENS,
    Block,
    ChunkRef,
    CodecRef,
    LayerLayout,
    Part,
    PartPlace,
    StateLayout,
    check_layout,
    check_parts,
    malformed,
)
from protocol.provenance import SignedStatement
from protocol.sealing import MAX_CHUNK_BYTES as MAX_CHUNK_BYTES
from protocol.sealing import (
    ROLE_PRIVATE,
    DataKey,
    SignedWrap,
)

MANIFEST_VERSION = 2
MAX_MANIFEST_BYTES = 960 * 1024
"""A manifest crosses the bus in one message, below the 1 MiB limit of every broker that Mindstream configures."""
MAX_BESIDE_BYTES = 56 * 1024
"""So many bytes of wraps and provenance cross the bus beside it."""
MAX_LABEL = 200
"""Characters of a label."""
DOMAIN_PREFIX = b"mindstream/v1/prefix\0"
DOMAIN_PRUNED = b"mindstream/v1/pruned\0"


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


class ModelDigests(msgspec.Struct, frozen=True):
    """BLAKE3 of what the numbers depend on, 32 bytes each."""

    weights: bytes
    tokenizer: bytes
    config: bytes
    adapters: tuple[bytes, ...] = ()
    """Of the adapters that are on the weights, in the order in which they were put there."""


class Certificate(msgspec.Struct, frozen=True, omit_defaults=True):
    """How faithful a snapshot is that is not exact: its decoded KV against the KV that it was made from."""

    tested_tokens: int
    """Positions, the last of the context, whose next-token distributions were compared."""
    mean_kl: float | None
    """Mean Kullback-Leibler divergence in nats, from the exact distribution to the decoded one."""
    top1: float | None
    """Share of these positions whose likeliest token is the same."""
    measured: list[str]
    """Which of these figures were measured on this snapshot; any other is the codec's usual one."""
    usual_on: str = ""
    """On what the codec's usual figures were measured, where one of them is said; else empty."""
    against: str = ""
    """Name of the codec of the KV that it was compared with, where that was itself not exact: then the two errors add
    up. Empty: the KV that the model computed."""
    encode_ms: float = 0.0
    """What encoding took, every rung that was tried included."""
    decode_ms: float = 0.0
    """What decoding took, for the test."""
    test_ms: float = 0.0
    """What reading the tested tokens again took, after either KV."""


class SnapshotManifest(msgspec.Struct, omit_defaults=True, dict=True):
    """What a snapshot holds. Its encoded bytes are what is signed, stored and forwarded."""

    version: int
    """2. Others are refused."""
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
    codec: CodecRef
    cached_tokens: int
    """Positions in the KV cache: always one less than there are token ids."""
    blocks: list[Block]
    """In order; together they hold ``cached_tokens``."""
    key_id: bytes
    """Of the data key, 32 bytes."""
    sealed: bytes
    """The sealed msgpack of PrivatePart, in the role ``mindstream/v1/private\\0``."""
    total_bytes: int
    """Sum of the chunks' sizes."""
    states: list[list[StateLayout]] = []
    """The arrays of each layer's recurrent part, an empty list for a layer without one; empty when no layer has one."""
    recurrent: Part | None = None
    """All arrays of ``states``, as they are after the last cached position; never lossy."""
    logits: Part | None = None
    """float32, little-endian, one for each id of the vocabulary: what reading the pending token gives, so that who
    resumes can check the first step."""
    parent: bytes = b""
    """Digest of the snapshot that the conversation was saved as, or resumed from, before; empty when there is none."""
    sharing: Literal["peers", "creator"] = "peers"
    """Who may wrap the data key for further readers: any holder for nodes that it trusts, or the creator alone."""
    certificate: Certificate | None = None
    """How faithful it is; nil where the codec is exact and nothing was pruned."""
    label: str = ""
    """Its name among the conversation's snapshots, where somebody gave it one. The newest of a label counts."""
    automatic: bool = False
    """Whether nobody asked for it: a checkpoint of a moment at which something was decided. It may go when room is
    wanted."""

    @cached_property
    def chunks(self) -> list[ChunkRef]:
        """Every chunk, in order: of each block the full part, then the sliding one; then recurrent, then logits."""
        return [chunk for _, part in self.parts() for chunk in part.chunks()]

    @property
    def kept(self) -> list[bytes]:
        """``Block.kept`` of every block; empty when nothing was pruned."""
        found = [block.kept for block in self.blocks]
        return found if any(found) else []

    @property
    def kept_tokens(self) -> int:
        """Positions that the layers of full attention hold: all that are cached, unless it was pruned."""
        return sum(block.kept_tokens for block in self.blocks)

    def parts(self) -> Iterator[tuple[PartPlace, Part]]:
        """Every part and where it belongs, in the order of their chunks."""
        for index, block in enumerate(self.blocks):
            if block.full is not None:
                yield PartPlace("full", index), block.full
            if block.sliding is not None:
                yield PartPlace("sliding", index), block.sliding
        last = len(self.blocks) - 1
        if self.recurrent is not None:
            yield PartPlace("recurrent", last), self.recurrent
        if self.logits is not None:
            yield PartPlace("logits", last), self.logits


class PrivatePart(msgspec.Struct):
    """What of a snapshot its readers alone see."""

    addresses: bytes
    """The prefix address of every block, 32 bytes each, and behind them the root of their chain."""
    sampler: dict[str, Any]
    """The sampler's settings and RNG state, plain msgpack types."""
    state: dict[str, Any]
    """The rest of the generation state: messages, settings, counts."""
    tokens: bytes
    """All token ids, the pending one last, uint32 little-endian."""

    def address_list(self) -> list[bytes]:
        """The addresses one by one."""
        return [self.addresses[at : at + DIGEST_BYTES] for at in range(0, len(self.addresses), DIGEST_BYTES)]


class SignedManifest(msgspec.Struct, omit_defaults=True):
    """A manifest as it is stored and as it crosses the bus. What is beside the signed bytes grows on its way."""

    manifest: bytes
    """msgpack of SnapshotManifest: the signed bytes."""
    signature: bytes
    """Ed25519 over the domain ``mindstream/v1/manifest\\0`` and ``manifest``."""
    wraps: Annotated[list[SignedWrap], Meta(max_length=1024)] = []
    """The data key, wrapped for each reader; over the bus, for the asker and for groups."""
    provenance: Annotated[list[SignedStatement], Meta(max_length=128)] = []
    """What happened to the snapshot, oldest first."""


T = TypeVar("T")

_UNREADABLE: tuple[type[Exception], ...] = (TypeError, *UNREADABLE)
"""TypeError: of a map whose keys have no order among each other."""
_UNPACKABLE: tuple[type[Exception], ...] = (zlib.error, *UNREADABLE)
_canonical = msgspec.msgpack.Encoder(order="sorted")
_decoder = msgspec.msgpack.Decoder(SnapshotManifest)
_signed_encoder = msgspec.msgpack.Encoder()
_signed_decoder = msgspec.msgpack.Decoder(SignedManifest)
_private_decoder = msgspec.msgpack.Decoder(PrivatePart)


class _Creator(msgspec.Struct):
    """As much of a manifest as must be read before its signature can be checked."""

    creator: str


_creator_decoder = msgspec.msgpack.Decoder(_Creator)


def snapshot_id(signed: SignedManifest) -> str:
    """The snapshot's id: BLAKE3 of the manifest bytes, 64 hex digits."""
    return digest(signed.manifest).hex()


def seal_manifest(identity: Identity, manifest: SnapshotManifest) -> SignedManifest:
    """Sign ``manifest``. Raises MalformedMessage when it is above its limit."""
    body = _canonical.encode(manifest)
    if len(body) > MAX_MANIFEST_BYTES:
        raise MalformedMessage(
            f"sealing a snapshot manifest of {len(body):,} bytes: above the limit of {MAX_MANIFEST_BYTES:,}",
            hint="the conversation is too long for one manifest; start a new one",
            field="manifest",
            reason="too large",
        )
    return SignedManifest(manifest=body, signature=identity.sign(DOMAIN_MANIFEST, body))


def pack_signed(signed: SignedManifest) -> bytes:
    """For a message that a slow link must not feel: msgpack, in zlib's format. A model's layers are alike."""
    return zlib.compress(_signed_encoder.encode(signed), 9)


def unpack_signed(packed: bytes) -> SignedManifest:
    """What ``pack_signed`` packed; no more is unpacked than one message may have. Raises MalformedMessage."""
    inflating = zlib.decompressobj()
    try:
        body = inflating.decompress(packed, MAX_MANIFEST_BYTES + MAX_BESIDE_BYTES)
        if not inflating.eof:
            raise malformed("packed", "it is cut, or larger than a manifest may be")
        return _signed_decoder.decode(body)
    except _UNPACKABLE as error:
        raise malformed("packed", str(error)) from None


def read_signed(
    what: str, domain: bytes, body: bytes, signature: bytes, decoder: msgspec.msgpack.Decoder[T], keyring: Keyring
) -> T:
    """What ``body`` says, once the node that it names as its ``creator`` is trusted and has signed it in ``domain``.

    ``what`` it is stands in errors. Raises MalformedMessage, UnknownPeer or BadSignature.
    """
    if len(body) > MAX_MANIFEST_BYTES:
        raise malformed("manifest", f"{len(body):,} bytes, limit {MAX_MANIFEST_BYTES:,}", what)
    # Free-form maps may take 60 times their size once decoded: that is done for trusted peers only.
    try:
        keyring.verify(_creator_decoder.decode(body).creator, domain, body, signature)
        return decoder.decode(body)
    except UNREADABLE as error:
        raise malformed("manifest", str(error), what) from None


def open_manifest(signed: SignedManifest, keyring: Keyring) -> SnapshotManifest:
    """The manifest, once signature, version and arithmetic hold; nothing is allocated from it before.

    Raises MalformedMessage, UnknownPeer or BadSignature.
    """
    manifest = read_signed("a snapshot manifest", DOMAIN_MANIFEST, signed.manifest, signed.signature, _decoder, keyring)
    if manifest.version != MANIFEST_VERSION:
        raise malformed("version", f"{manifest.version}, this node reads {MANIFEST_VERSION}")
    if not is_canonical(signed.manifest):
        raise malformed("manifest", "it is not canonical msgpack")
    digests = manifest.digests
    for field, value in (
        ("key_id", manifest.key_id),
        *(("digests", each) for each in (digests.weights, digests.tokenizer, digests.config, *digests.adapters)),
        *((("parent", manifest.parent),) if manifest.parent else ()),
    ):
        if len(value) != DIGEST_BYTES:
            raise malformed(field, f"{len(value)} bytes, a digest has {DIGEST_BYTES}")
    if len(manifest.label) > MAX_LABEL:
        raise malformed("label", f"{len(manifest.label):,} characters, limit {MAX_LABEL}")
    check_layout(manifest)
    check_parts(manifest)
    return manifest


def is_canonical(body: bytes) -> bool:
    """Whether msgpack bytes are in the one form that this protocol signs."""
    try:
        return _canonical.encode(msgspec.msgpack.decode(body)) == body
    except _UNREADABLE:
        return False


def prefix_addresses(
    digests: ModelDigests, tokens: bytes, cached_tokens: int, kept: Sequence[bytes] = ()
) -> list[bytes]:
    """The address of every block and, behind them, the root of the chain.

    The root is BLAKE3 of ``mindstream/v1/prefix\\0`` and the model's digests: weights, tokenizer, config, adapters. A
    block's address is BLAKE3 of the address before it and the block's token ids, so it names the whole prefix. Before
    a pruned block BLAKE3 of ``mindstream/v1/pruned\\0``, that address and the block's bitmap takes its place: what is
    pruned, and all that was computed after it, has no address in common with what is not.

    Args:
        tokens: ids, uint32 little-endian, ``cached_tokens`` of them or more.
        kept: ``Block.kept`` of every block; empty when nothing was pruned.
    """
    root = digest(DOMAIN_PREFIX, digests.weights, digests.tokenizer, digests.config, *digests.adapters)
    addresses = []
    before = root
    for start in range(0, cached_tokens, BLOCK_TOKENS):
        if kept and kept[start // BLOCK_TOKENS]:
            before = digest(DOMAIN_PRUNED, before, kept[start // BLOCK_TOKENS])
        before = digest(before, tokens[4 * start : 4 * min(start + BLOCK_TOKENS, cached_tokens)])
        addresses.append(before)
    return [*addresses, root]


def seal_private(key: DataKey, private: PrivatePart) -> bytes:
    """The manifest's ``sealed``."""
    return bytes(key.seal(ROLE_PRIVATE, _canonical.encode(private)))


def open_private(manifest: SnapshotManifest, key: DataKey) -> PrivatePart:
    """What only readers see, once it opens and its token ids are those of the blocks. Raises SnapshotRefused."""

    def refuse(field: str, reason: str) -> SnapshotRefused:
        return SnapshotRefused(
            f"opening the snapshot of {manifest.conversation[:80]!r} by {manifest.creator[:80]!r}: {field}: {reason}",
            hint="fetch it from another holder, or save the conversation again",
            field=field,
            reason=reason,
        )

    if key.id != manifest.key_id:
        raise refuse("key_id", "it was sealed with another key")
    try:
        body = key.open(ROLE_PRIVATE, manifest.sealed)
    except SnapshotRefused as error:
        raise refuse("sealed", error.reason) from None
    try:
        private = _private_decoder.decode(body)
    except UNREADABLE as error:
        raise refuse("sealed", str(error)) from None
    if len(private.tokens) != 4 * (manifest.cached_tokens + 1):
        raise refuse(
            "tokens", f"{len(private.tokens)} bytes for {manifest.cached_tokens} cached ones and a pending one"
        )
    expected = prefix_addresses(manifest.digests, private.tokens, manifest.cached_tokens, manifest.kept)
    if private.addresses != b"".join(expected):
        raise refuse("addresses", "they are not those of its token ids")
    return private


def verify_chunk(ref: ChunkRef, data: bytes | bytearray | memoryview, *, index: int) -> None:
    """Raises BadSignature unless ``data`` is the chunk that ``ref`` names."""
    if len(data) != ref.size_bytes or digest(data) != ref.digest:
        raise BadSignature(
            f"checking chunk {index}: {len(data):,} bytes do not match the signed manifest",
            hint="the chunk was damaged on the way; it is asked for again",
            field="data",
            reason="digest mismatch",
        )
