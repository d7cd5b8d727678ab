"""Blocks for the pool: cut out of a cache when their last position has just been read, sealed, opened, put together.

A block's part is each layer's own rows, as the raw codec has them: all 256 of a full layer, of a sliding one the last
ones, as many as its window holds. So a prompt of n blocks needs the full parts of all of them, the sliding parts of the
last ``window / 256 + 1``, and the states of the last: nothing rolls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from protocol.errors import SnapshotRefused
from protocol.group_key import GroupKey
from protocol.layout import BLOCK_TOKENS, PART_SLACK_BYTES, RAW, ChunkRef, PartPlace
from protocol.manifest import NumericsFingerprint
from protocol.pool import ENTRY_VERSION, NO_PARENT, PoolEntry, PoolPart
from protocol.sealing import MAX_PLAIN_BYTES, SEAL_BYTES
from services.model_runner.blocks import KINDS, seal_part, state_layouts, with_states
from services.model_runner.codecs import codec as find_codec
from services.model_runner.codecs.base import (
    BlockLayout,
    Codec,
    Floats,
    Plane,
    block_layouts,
    block_planes,
    empty_layers,
)
from services.model_runner.codecs.base import to_floats as _to_floats
from services.model_runner.codecs.raw import Raw
from services.model_runner.engine import STORAGE_DTYPES, LayerState, ModelSpec

Data = bytes | bytearray | memoryview
EXACT_CODECS = ("raw", "lossless")
"""The pool takes no others: what comes from it is what its creator computed."""


class Place(NamedTuple):
    """Where a block belongs."""

    block: int
    """Its number in the prompt."""
    address: bytes
    """Its prefix address."""
    parent: bytes
    """Address of the block before; empty for the first."""


def layout_of(spec: ModelSpec, block: int, blocks: int = 0) -> BlockLayout:
    """What of block number ``block`` layers hold once ``blocks`` of them have been read; just itself by default."""
    return block_layouts(spec, (blocks or block + 1) * BLOCK_TOKENS)[block]


def cut_block(spec: ModelSpec, layers: Sequence[LayerState], block: int) -> dict[str, bytes]:
    """Copies of a block's raw parts; ``layers`` end with the block's last position."""
    found = {}
    for kind in KINDS:
        layout = layout_of(spec, block).of_kind(spec, kind)
        if layout.raw_bytes:
            found[kind] = Raw().encode(block_planes(layers, layout), layout)
    states = [state for layer in layers for state in layer.states]
    if states:
        found["recurrent"] = b"".join(np.ascontiguousarray(state).tobytes() for state in states)
    return found


def seal_block(
    spec: ModelSpec,
    fingerprint: NumericsFingerprint,
    raw: Mapping[str, bytes],
    place: Place,
    *,
    key: GroupKey,
    creator: str,
    created_us: int,
    cost_ms: int,
    codec: Codec,
) -> tuple[PoolEntry, list[bytearray]]:
    """An entry of a block's raw parts, and its chunks in order."""
    chunks: list[bytearray] = []

    def put(_: ChunkRef, chunk: bytearray) -> None:
        chunks.append(chunk)

    parts: dict[str, PoolPart] = {}
    for kind in ("full", "sliding", "recurrent"):
        data = raw.get(kind)
        if data is None:
            continue
        encoded: Data = data
        if codec.name != RAW.name and kind in KINDS:
            layout = layout_of(spec, place.block).of_kind(spec, kind)
            encoded = codec.encode(Raw().decode(data, layout), layout)
        view = memoryview(encoded).cast("B")
        part = seal_part(key.data_key, PartPlace(kind, 0), view, [place.address], codec.ref, put)
        parts[kind] = PoolPart(part.encoded_bytes, part.digests, key.content(data))
    entry = PoolEntry(
        version=ENTRY_VERSION,
        model=spec.name,
        digests=spec.digests,
        creator=creator,
        created_us=created_us,
        fingerprint=fingerprint,
        kv_dtype=spec.dtype,
        codec=codec.ref,
        key_id=key.id,
        name=key.name(place.address),
        parent=key.name(place.parent) if place.parent else NO_PARENT,
        block=place.block,
        cost_ms=cost_ms,
        full=parts.get("full"),
        sliding=parts.get("sliding"),
        recurrent=parts.get("recurrent"),
        states=state_layouts(spec),
    )
    return entry, chunks


def check_entry(spec: ModelSpec, entry: PoolEntry, place: Place, key: GroupKey) -> None:
    """Raises SnapshotRefused unless ``entry`` is of that block of a prompt of this model, and no larger than it.

    Nothing has been allocated from it.
    """
    if entry.digests != spec.digests or entry.kv_dtype != spec.dtype:
        raise _refused(entry, "digests", f"of {entry.model[:80]}, {entry.kv_dtype}, not of {spec.name}, {spec.dtype}")
    if (entry.key_id, entry.name, entry.block) != (key.id, key.name(place.address), place.block):
        raise _refused(entry, "name", "it is another block's")
    if entry.parent != (key.name(place.parent) if place.parent else NO_PARENT):
        raise _refused(entry, "parent", "it follows another block")
    if entry.codec.name not in EXACT_CODECS:
        raise _refused(entry, "codec", f"{entry.codec.name[:40]} is not exact")
    find_codec(entry.codec)
    if entry.states != state_layouts(spec):
        raise _refused(entry, "states", f"they are not those of {spec.name}")
    found = dict(entry.parts())
    for kind in ("full", "sliding", "recurrent"):
        expected = plain_bytes(spec, place.block, kind)
        part = found.get(kind)
        if (part is not None) != (expected > 0):
            raise _refused(entry, kind, f"the model's layers hold {expected:,} bytes there")
        if part is None:
            continue
        coded = entry.codec.name != RAW.name and kind in KINDS
        if part.encoded_bytes > expected + PART_SLACK_BYTES if coded else part.encoded_bytes != expected:
            raise _refused(entry, kind, f"{part.encoded_bytes:,} bytes, its layers take {expected:,}")


def plain_bytes(spec: ModelSpec, block: int, kind: str) -> int:
    """What a part of a block takes before it is encoded."""
    return spec.state_bytes if kind == "recurrent" else layout_of(spec, block).of_kind(spec, kind).raw_bytes


def open_block(
    spec: ModelSpec, entry: PoolEntry, place: Place, key: GroupKey, kinds: Sequence[str], chunks: Sequence[Data]
) -> dict[str, bytes]:
    """The raw parts of these ``kinds``, decrypted, decoded, and of the content that the entry says.

    Args:
        entry: checked by ``check_entry``.
        chunks: of these parts alone, in order, verified against their digests.

    Raises SnapshotRefused.
    """
    codec = find_codec(entry.codec)
    found: dict[str, bytes] = {}
    at = 0
    for kind, part in entry.parts():
        if kind not in kinds:
            continue
        count = -(-part.encoded_bytes // MAX_PLAIN_BYTES)
        buffer = memoryview(bytearray(part.encoded_bytes))
        offset = 0
        for index, chunk in enumerate(chunks[at : at + count]):
            target = buffer[offset : offset + len(chunk) - SEAL_BYTES]
            key.data_key.open_into(PartPlace(kind, 0).role([place.address], entry.codec, index), chunk, target)
            offset += len(target)
        at += count
        raw = bytes(buffer)
        if codec.name != RAW.name and kind in KINDS:
            layout = layout_of(spec, place.block).of_kind(spec, kind)
            raw = Raw().encode(codec.decode(buffer, layout), layout)
        if key.content(raw) != part.content:
            raise _refused(entry, kind, "its content is not what its creator signed")
        found[kind] = raw
    return found


def needed(spec: ModelSpec, block: int, blocks: int) -> list[str]:
    """Which parts of a block are needed to go on after ``blocks`` of them."""
    layout = layout_of(spec, block, blocks)
    kinds = [kind for kind in KINDS if layout.of_kind(spec, kind).raw_bytes]
    return [*kinds, "recurrent"] if block == blocks - 1 and spec.state_bytes else kinds


def load_bytes(spec: ModelSpec, first: int, blocks: int) -> int:
    """Before they are encoded, of the parts that are needed of blocks ``first`` to ``blocks`` (excluded)."""
    return sum(plain_bytes(spec, block, kind) for block in range(first, blocks) for kind in needed(spec, block, blocks))


class Assembly:
    """The layers after ``blocks`` blocks, put together from their raw parts."""

    def __init__(self, spec: ModelSpec, blocks: int) -> None:
        self._spec = spec
        self._blocks = blocks
        seen = blocks * BLOCK_TOKENS
        self._layouts = block_layouts(spec, seen)
        self._layers = empty_layers(spec, seen)

    def take(self, block: int, raw: Mapping[str, bytes]) -> None:
        """Take in what is needed of a block."""
        spec = self._spec
        for kind in KINDS:
            if kind not in raw:
                continue
            own = Raw().decode(raw[kind], layout_of(spec, block).of_kind(spec, kind))
            for found, target in zip(
                own, block_planes(self._layers, self._layouts[block].of_kind(spec, kind)), strict=True
            ):
                rows = target.keys.shape[1]
                if rows:
                    np.copyto(target.keys, found.keys[:, -rows:])
                    np.copyto(target.values, found.values[:, -rows:])
        if block == self._blocks - 1 and "recurrent" in raw:
            self._layers[:] = with_states(spec, self._layers, memoryview(raw["recurrent"]))

    def layers(self) -> list[LayerState]:
        """What was put together."""
        return self._layers


def difference(spec: ModelSpec, block: int, ours: Mapping[str, bytes], theirs: Mapping[str, bytes]) -> float:
    """How far two readings of a block are apart: ``|theirs - ours| / |ours|``, Euclidean norms, of the keys or values
    of the worst position in the worst layer, or of the worst recurrent state. Infinite where one has what the other
    has not, or no numbers.

    By position, so that one altered token among 256 shows. Where a position's numbers are very small, they count as a
    tenth of the layer's mean.
    """
    if ours.keys() != theirs.keys():
        return float("inf")
    worst = 0.0
    for kind in ours:
        pair = (_arrays(spec, block, kind, raw[kind]) for raw in (ours, theirs))
        for one, other in zip(*pair, strict=True):
            if not one.size:
                continue
            size, apart = (np.linalg.norm(rows, axis=1) for rows in (one, other - one))
            floor = max(float(size.mean()) / 10, 1e-30)
            found = float((apart / np.maximum(size, floor)).max())
            worst = max(worst, found) if found == found else float("inf")
    return worst


def _arrays(spec: ModelSpec, block: int, kind: str, data: bytes) -> list[Floats]:
    """A raw part's arrays as float32, one row a position; of a state one row."""
    if kind in KINDS:
        planes: list[Plane] = Raw().decode(data, layout_of(spec, block).of_kind(spec, kind))
        arrays = (_to_floats(array, spec.dtype) for plane in planes for array in plane)
        return [array.swapaxes(0, 1).reshape(array.shape[1], -1) for array in arrays if array.size]
    found, offset = [], 0
    for own in spec.layers:
        for state in own.states:
            dtype = STORAGE_DTYPES[state.dtype]
            array = np.frombuffer(data, dtype, state.size_bytes // dtype.itemsize, offset)
            found.append(_to_floats(array, state.dtype).reshape(1, -1))
            offset += state.size_bytes
    return found


def _refused(entry: PoolEntry, field: str, reason: str) -> SnapshotRefused:
    return SnapshotRefused(
        f"using block {entry.block} of {entry.model[:80]!r} that {entry.creator[:80]} has put into the pool: {field}: "
        f"{reason}",
        hint="the block is read again",
        field=field,
        reason=reason,
    )
