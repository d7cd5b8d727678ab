"""What a snapshot is made of: layers, blocks of positions, their parts, and the chunks of these.

A manifest says all sizes twice, as what its layers hold and as what its parts take: here they are held against each
other, before anything is allocated from either.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec

from protocol.errors import MalformedMessage
from protocol.identity import DIGEST_BYTES
from protocol.sealing import MAX_PLAIN_BYTES, SEAL_BYTES, chunk_role

MAX_SNAPSHOT_BYTES = 64 * 1024**3
"""A manifest that claims more is refused before anything is allocated."""
BLOCK_TOKENS = 256
PART_SLACK_BYTES = 64 * 1024
"""A codec's output may be so much longer than its input, and no more."""
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


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
    """Positions held: for a sliding layer at most its window, for one of full attention what pruning has left."""
    seen_tokens: int
    """Positions ever written to this layer (a sliding layer's cumulative length)."""
    window_tokens: int = 0
    """Window of a sliding layer; 0 for any other."""


class ChunkRef(msgspec.Struct, frozen=True):
    """One content-addressed chunk of at most 512 KiB."""

    digest: bytes
    """BLAKE3, 32 bytes, of the chunk's bytes, which are sealed."""
    size_bytes: int


class CodecRef(msgspec.Struct, frozen=True):
    """How blocks are encoded."""

    name: str
    """``raw``: each layer's keys, then its values, as they lie in memory, little-endian. ``tokens``: there are no
    parts."""
    version: int
    params: dict[str, Any]
    """Of the codec, plain msgpack types."""


RAW = CodecRef("raw", 1, {})
TOKENS = CodecRef("tokens", 1, {})
"""Of a snapshot that holds no KV: it is resumed by reading its token ids."""


class Part(msgspec.Struct):
    """Encoded content of one kind, in sealed chunks."""

    encoded_bytes: int
    """Before sealing. Cut every 524,260 bytes, so the chunks' sizes follow: each is 28 bytes longer than its cut."""
    digests: bytes
    """BLAKE3 of every chunk's sealed bytes, 32 bytes each, one after another."""

    def chunks(self) -> Iterator[ChunkRef]:
        """Every chunk, in order; no more than there are digests, whatever size is claimed."""
        count = min(-(-self.encoded_bytes // MAX_PLAIN_BYTES), len(self.digests) // DIGEST_BYTES)
        for index in range(count):
            offset = index * MAX_PLAIN_BYTES
            size = min(MAX_PLAIN_BYTES, self.encoded_bytes - offset)
            yield ChunkRef(self.digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES], size + SEAL_BYTES)


class Block(msgspec.Struct, omit_defaults=True):
    """Up to 256 positions: of every layer that holds them its keys, then its values, (kv_heads, tokens, head_dim)."""

    tokens: int
    """256, but in the last one."""
    kept: bytes = b""
    """Bitmap of the positions that pruning has left in the layers of full attention, one bit each, least significant
    first; empty: all of them."""
    full: Part | None = None
    """The layers of full attention."""
    sliding: Part | None = None
    """The sliding layers, as far as they still hold positions of this block."""

    @property
    def kept_tokens(self) -> int:
        """Positions that its layers of full attention hold."""
        return int.from_bytes(self.kept, "little").bit_count() if self.kept else self.tokens


class PartPlace(NamedTuple):
    """Where a part belongs."""

    kind: str
    """``full``, ``sliding``, ``recurrent`` or ``logits``."""
    block: int
    """Index of the block; of the last one for what belongs to the whole prefix; -1 when there is none."""

    def address(self, addresses: Sequence[bytes]) -> bytes:
        """Of its block, or the chain's root when there is no block: the last of ``addresses``."""
        return addresses[self.block]

    def role(self, addresses: Sequence[bytes], codec: CodecRef, index: int) -> bytes:
        """Of its chunk ``index``. What is no KV has the raw codec always."""
        used = codec if self.kind in ("full", "sliding") else RAW
        return chunk_role(self.kind, self.address(addresses), used, index)


class Laid(Protocol):
    """As much of a manifest as says how large it is."""

    kv_dtype: str
    layers: list[LayerLayout]
    codec: CodecRef
    states: list[list[StateLayout]]
    cached_tokens: int
    blocks: list[Block]
    recurrent: Part | None
    logits: Part | None
    total_bytes: int

    @property
    def chunks(self) -> list[ChunkRef]:
        """All of them."""


def malformed(field: str, reason: str, what: str = "a snapshot manifest") -> MalformedMessage:
    """The error of a manifest that cannot be read, naming the field."""
    return MalformedMessage(
        f"reading {what}: {field}: {reason}",
        hint="it is damaged or made up, or of another version of Mindstream: take it from another holder, or have it "
        "made again",
        field=field,
        reason=reason,
    )


def check_layout(manifest: Laid) -> None:
    """Raises MalformedMessage unless layers, states and blocks are of one state of ``cached_tokens`` positions."""
    cached = manifest.cached_tokens
    if not 0 <= cached < 2**31:
        raise malformed("cached_tokens", f"{cached:,}")
    if manifest.kv_dtype not in DTYPE_BYTES:
        raise malformed("kv_dtype", f"{manifest.kv_dtype[:80]!r} is none of {', '.join(DTYPE_BYTES)}")
    kept = cached - _pruned_tokens(manifest)
    for index, layer in enumerate(manifest.layers):
        field = f"layers[{index}]"
        if layer.kind not in ("full", "sliding", "recurrent"):
            raise malformed(f"{field}.kind", f"{layer.kind[:80]!r} is unknown")
        if not (0 <= layer.kv_heads <= 2**16 and 0 <= layer.head_dim <= 2**16 and 0 <= layer.window_tokens < 2**31):
            raise malformed(field, "a size is out of range")
        most = {"full": kept, "sliding": min(cached, max(0, layer.window_tokens - 1)), "recurrent": 0}[layer.kind]
        if (layer.seen_tokens, layer.tokens) != (cached, most):
            raise malformed(
                field, f"holds {layer.tokens:,} of {layer.seen_tokens:,} tokens, expected {most:,} of {cached:,}"
            )
    if manifest.states and len(manifest.states) != len(manifest.layers):
        raise malformed("states", f"of {len(manifest.states)} layers, there are {len(manifest.layers)}")
    for arrays in manifest.states:
        if any(
            len(array.shape) > 8 or not all(0 < size <= 2**24 for size in array.shape) or array.dtype not in DTYPE_BYTES
            for array in arrays
        ):
            raise malformed("states", "a shape or a dtype is out of range")
    count = -(-cached // BLOCK_TOKENS)
    if len(manifest.blocks) != count or any(
        block.tokens != min(BLOCK_TOKENS, cached - index * BLOCK_TOKENS) for index, block in enumerate(manifest.blocks)
    ):
        raise malformed("blocks", f"they do not cut {cached:,} positions at multiples of {BLOCK_TOKENS}")


def _pruned_tokens(manifest: Laid) -> int:
    """Positions that the blocks' bitmaps leave out. Raises MalformedMessage."""
    pruned = 0
    for index, block in enumerate(manifest.blocks):
        if not block.kept:
            continue
        field = f"blocks[{index}].kept"
        if not 0 < block.tokens <= BLOCK_TOKENS or len(block.kept) != -(-block.tokens // 8):
            raise malformed(field, f"{len(block.kept):,} bytes for {block.tokens:,} positions")
        if int.from_bytes(block.kept, "little") >> block.tokens:
            raise malformed(field, f"it has more than the block's {block.tokens} positions")
        if block.kept_tokens == block.tokens:
            raise malformed(field, "it has all positions, which is said by leaving it out")
        pruned += block.tokens - block.kept_tokens
    if pruned and not any(layer.kind == "full" for layer in manifest.layers):
        raise malformed("blocks", "positions are pruned, and no layer has full attention")
    return pruned


def check_parts(manifest: Laid) -> None:
    """Raises MalformedMessage unless every part is there whose layers hold something, and no larger than they are."""
    for index, block in enumerate(manifest.blocks):
        for kind, part in (("full", block.full), ("sliding", block.sliding)):
            field = f"blocks[{index}].{kind}"
            plain = plain_bytes(manifest, PartPlace(kind, index))
            if (part is not None) != (plain > 0):
                raise malformed(field, f"its layers hold {plain:,} bytes there")
            if part is not None:
                _check_part(field, part, plain + PART_SLACK_BYTES)
    plain = plain_bytes(manifest, PartPlace("recurrent", -1))
    if (manifest.recurrent is not None) != (plain > 0):
        raise malformed("recurrent", f"the layers hold {plain:,} bytes")
    if manifest.recurrent is not None:
        _check_part("recurrent", manifest.recurrent, plain)
    if manifest.logits is not None:
        _check_part("logits", manifest.logits, 2**26)
    if manifest.total_bytes != sum(chunk.size_bytes for chunk in manifest.chunks):
        raise malformed("total_bytes", f"{manifest.total_bytes:,} is not the sum of the chunks")
    if manifest.total_bytes > MAX_SNAPSHOT_BYTES:
        raise malformed("total_bytes", f"{manifest.total_bytes:,}, limit {MAX_SNAPSHOT_BYTES:,}")


def _check_part(field: str, part: Part, most: int) -> None:
    if not 0 < part.encoded_bytes <= most:
        raise malformed(f"{field}.encoded_bytes", f"{part.encoded_bytes:,}, its layers allow 1 to {most:,}")
    count = -(-part.encoded_bytes // MAX_PLAIN_BYTES)
    if len(part.digests) != count * DIGEST_BYTES:
        raise malformed(
            f"{field}.digests", f"{len(part.digests):,} bytes, not {DIGEST_BYTES} for each of {count:,} chunks"
        )


def held_in_block(layer: LayerLayout, index: int, block: Block) -> int:
    """Positions that a layer holds of a block, the ``index``-th."""
    if layer.kind == "full":
        return block.kept_tokens
    end = index * BLOCK_TOKENS + block.tokens
    return max(0, min(block.tokens, end - (layer.seen_tokens - layer.tokens)))


def plain_bytes(manifest: Laid, place: PartPlace) -> int:
    """What a part takes before it is encoded, by the manifest's layouts; 0 where it holds token ids alone."""
    if manifest.codec.name == TOKENS.name:
        return 0
    if place.kind == "recurrent":
        return sum(math.prod(array.shape) * DTYPE_BYTES[array.dtype] for arrays in manifest.states for array in arrays)
    size = 0
    for layer in manifest.layers:
        if layer.kind == place.kind:
            held = held_in_block(layer, place.block, manifest.blocks[place.block])
            size += 2 * layer.kv_heads * layer.head_dim * held
    return size * DTYPE_BYTES[manifest.kv_dtype]
