"""A small snapshot for tests of what surrounds it: three blocks of a model with a full and a sliding layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from protocol.identity import Identity, digest
from protocol.layout import RAW, Block, ChunkRef, LayerLayout, Part, PartPlace, plain_bytes
from protocol.manifest import (
    MANIFEST_VERSION,
    ModelDigests,
    NumericsFingerprint,
    PrivatePart,
    SignedManifest,
    SnapshotManifest,
    prefix_addresses,
    seal_manifest,
    seal_private,
    snapshot_id,
)
from protocol.provenance import add_statement
from protocol.sealing import MAX_PLAIN_BYTES, DataKey, wrap_key

TOMATO = Identity("tomato", bytes(range(32)))
SPROUT = Identity("sprout", bytes(range(1, 33)))
KEY = DataKey(bytes(range(64, 96)))
CACHED_TOKENS = 600
MODEL = ModelDigests(weights=bytes([1]) * 32, tokenizer=bytes([2]) * 32, config=bytes([3]) * 32)
LAYERS = [
    LayerLayout("full", 2, 64, CACHED_TOKENS, CACHED_TOKENS),
    LayerLayout("sliding", 1, 16, 299, CACHED_TOKENS, 300),
]


@dataclass
class Small:
    """A snapshot by tomato, with all that it is made of."""

    manifest: SnapshotManifest
    signed: SignedManifest
    chunks: list[bytes]
    """Sealed."""
    plain: list[bytes]
    """The same before."""
    addresses: list[bytes]

    @property
    def identifier(self) -> str:
        return snapshot_id(self.signed)

    @property
    def refs(self) -> list[ChunkRef]:
        return self.manifest.chunks


def small_manifest(**changes: Any) -> SnapshotManifest:
    """Its manifest, with fields changed."""
    return msgspec.structs.replace(small_snapshot().manifest, **changes)


def small_snapshot(
    identity: Identity = TOMATO, key: DataKey = KEY, tokens: int = CACHED_TOKENS, *, pruned: bool = False
) -> Small:
    """Made by ``identity``; its key is wrapped for tomato and sprout. Pruned, every second position of the first block
    is left."""
    ids = b"".join((7 * position % 251).to_bytes(4, "little") for position in range(tokens + 1))
    kept = [bytes([0x55] * 32) if pruned and not start else b"" for start in range(0, tokens, 256)]
    addresses = prefix_addresses(MODEL, ids, tokens, kept if pruned else ())
    left = tokens - 128 * pruned
    layers = [
        msgspec.structs.replace(
            layer, seen_tokens=tokens, tokens=left if layer.kind == "full" else min(tokens, layer.window_tokens - 1)
        )
        for layer in LAYERS
    ]
    manifest = SnapshotManifest(
        version=MANIFEST_VERSION,
        model="small",
        digests=MODEL,
        creator=identity.node,
        created_us=1_763_700_000_000_000,
        conversation="garden",
        fingerprint=NumericsFingerprint(
            "transformers", "torch 2", "cpu", "avx512", "bfloat16", 2, "multiples of 256", "deterministic"
        ),
        kv_dtype="bfloat16",
        layers=layers,
        codec=RAW,
        cached_tokens=tokens,
        blocks=[Block(min(256, tokens - start), kept[start // 256]) for start in range(0, tokens, 256)],
        key_id=key.id,
        sealed=seal_private(key, PrivatePart(b"".join(addresses), {"seed": 1}, {"messages": []}, ids)),
        total_bytes=0,
    )
    chunks: list[bytes] = []
    plain: list[bytes] = []
    for index, block in enumerate(manifest.blocks):
        for kind in ("full", "sliding"):
            place = PartPlace(kind, index)
            size = plain_bytes(manifest, place)
            if size:
                setattr(block, kind, _sealed(key, place, bytes([index + 1]) * size, addresses, chunks, plain))
    manifest.total_bytes = sum(map(len, chunks))
    signed = seal_manifest(identity, manifest)
    signed.wraps = [wrap_key(identity, key, each.node, each.sealing.public_key) for each in (TOMATO, SPROUT)]
    signed.provenance = add_statement(identity, [], digest(signed.manifest), "created")
    return Small(manifest, signed, chunks, plain, addresses)


def _sealed(
    key: DataKey, place: PartPlace, data: bytes, addresses: list[bytes], chunks: list[bytes], plain: list[bytes]
) -> Part:
    own = []
    for index, start in enumerate(range(0, len(data), MAX_PLAIN_BYTES)):
        cut = data[start : start + MAX_PLAIN_BYTES]
        own.append(bytes(key.seal(place.role(addresses, RAW, index), cut)))
        plain.append(cut)
    chunks += own
    return Part(len(data), b"".join(map(digest, own)))
