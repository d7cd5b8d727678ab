"""Layers cut into blocks of 256 positions, encoded, sealed, and put together again.

A part before it is encoded is, for each layer of its kind in the model's order, the keys and then the values of the
block's positions that the layer still holds, (kv_heads, tokens, head_dim) in C order, little-endian. So the blocks of a
prefix are the same bytes however the conversation goes on; only a sliding layer's first block shrinks as its window
moves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from protocol.identity import digest
from protocol.layout import BLOCK_TOKENS, RAW, Block, ChunkRef, CodecRef, LayerLayout, Part, PartPlace, held_in_block
from protocol.manifest import SnapshotManifest
from protocol.sealing import MAX_PLAIN_BYTES, SEAL_BYTES, DataKey
from services.model_runner.codecs.base import BlockLayout, Codec, Plane
from services.model_runner.codecs.exact_rows import recent_in
from services.model_runner.engine import STORAGE_DTYPES, LayerState, ModelSpec

Array = npt.NDArray[Any]
Put = Callable[[ChunkRef, bytearray], object]
"""Takes a sealed chunk and its name."""
KINDS = ("full", "sliding")


class RawPart(NamedTuple):
    """A part before it is encoded."""

    place: PartPlace
    raw: npt.NDArray[np.uint8]
    """All of it, as the raw codec has it."""


def encode_part(codec: Codec, spec: ModelSpec, part: RawPart, blocks: Sequence[BlockLayout]) -> memoryview:
    """A part's bytes, to be sealed. ``blocks`` are those of the whole snapshot (``codecs.base.block_layouts``)."""
    if codec.name == RAW.name or part.place.kind not in KINDS:
        return part.raw.data
    layout = blocks[part.place.block].of_kind(spec, part.place.kind)
    dtype = STORAGE_DTYPES[layout.dtype]
    offset = 0
    planes = []
    for layer in layout.layers:
        keys, offset = _array(part.raw.data, offset, layer.shape, dtype)
        values, offset = _array(part.raw.data, offset, layer.shape, dtype)
        planes.append(Plane(keys, values))
    seen_tokens = blocks[-1].position + blocks[-1].tokens
    return memoryview(codec.encode(planes, layout, recent_in(layout, seen_tokens))).cast("B")


def cut(layers: Sequence[LayerState], layouts: Sequence[LayerLayout], cached_tokens: int) -> list[RawPart]:
    """Copies of all that ``layers`` hold, in the order of a manifest's parts; the layers may change from then on."""
    parts = []
    for place in _places(cached_tokens):
        found = [
            (layer, *_rows(layout, place.block))
            for layer, layout in zip(layers, layouts, strict=True)
            if layout.kind == place.kind
        ]
        # The one copy: it frees the cache to go on, and makes planes contiguous whatever the engine's strides.
        planes = [plane[:, start:stop] for layer, start, stop in found for plane in (layer.keys, layer.values)]
        if any(plane.size for plane in planes):
            parts.append(RawPart(place, _joined(planes)))
    states = [state for layer in layers for state in layer.states]
    if states:
        parts.append(RawPart(PartPlace("recurrent", -(-cached_tokens // BLOCK_TOKENS) - 1), _joined(states)))
    return parts


def _places(cached_tokens: int) -> Iterator[PartPlace]:
    for block in range(-(-cached_tokens // BLOCK_TOKENS)):
        for kind in KINDS:
            yield PartPlace(kind, block)


def _rows(layout: LayerLayout, block: int) -> tuple[int, int]:
    """Where the positions of ``block`` lie among those that a layer holds."""
    first_held = layout.seen_tokens - layout.tokens
    start, stop = held_in_block(layout, block)
    return start - first_held, stop - first_held


def _joined(planes: Sequence[Array]) -> npt.NDArray[np.uint8]:
    buffer = np.empty(sum(plane.nbytes for plane in planes), dtype=np.uint8)
    offset = 0
    for plane in planes:
        target = buffer[offset : offset + plane.nbytes].view(plane.dtype).reshape(plane.shape)
        np.copyto(target, plane)
        offset += plane.nbytes
    return buffer


def seal_part(
    key: DataKey, place: PartPlace, data: memoryview, addresses: Sequence[bytes], codec: CodecRef, put: Put
) -> Part:
    """Seal what a codec made of a part, chunk by chunk, and hand each to ``put``."""
    digests = []
    for index, offset in enumerate(range(0, len(data), MAX_PLAIN_BYTES)):
        sealed = key.seal(place.role(addresses, codec, index), data[offset : offset + MAX_PLAIN_BYTES])
        ref = ChunkRef(digest(sealed), len(sealed))
        put(ref, sealed)
        digests.append(ref.digest)
    return Part(len(data), b"".join(digests))


def open_part(
    key: DataKey,
    place: PartPlace,
    chunks: Sequence[bytes | bytearray | memoryview],
    addresses: Sequence[bytes],
    codec: CodecRef,
    target: memoryview,
) -> None:
    """Decrypt a part's chunks into ``target``, of its encoded size. Raises SnapshotRefused."""
    offset = 0
    for index, chunk in enumerate(chunks):
        size = len(chunk) - SEAL_BYTES
        key.open_into(place.role(addresses, codec, index), chunk, target[offset : offset + size])
        offset += size


def blocks_of(cached_tokens: int, parts: Sequence[tuple[PartPlace, Part]]) -> list[Block]:
    """The manifest's blocks, of the sealed parts."""
    blocks = [Block(tokens=min(BLOCK_TOKENS, cached_tokens - start)) for start in range(0, cached_tokens, BLOCK_TOKENS)]
    for place, part in parts:
        if place.kind in KINDS:
            setattr(blocks[place.block], place.kind, part)
    return blocks


class Assembly:
    """Layers that are being put together from parts.

    Args:
        spec: of the model; ``layouts`` and ``cached_tokens`` must be its own.
    """

    def __init__(self, spec: ModelSpec, layouts: Sequence[LayerLayout]) -> None:
        self._spec = spec
        self._layouts = layouts
        dtype = STORAGE_DTYPES[spec.dtype]
        self._planes = [
            [np.empty((layout.kv_heads, layout.tokens, layout.head_dim), dtype) for _ in range(2)] for layout in layouts
        ]
        self._states: list[list[Array]] = [[] for _ in layouts]

    def put(self, place: PartPlace, data: memoryview) -> None:
        """Take in the plaintext of a part, of its raw size."""
        offset = 0
        for index, layout in enumerate(self._layouts):
            if place.kind == "recurrent":
                for state in self._spec.layers[index].states:
                    array, offset = _array(data, offset, state.shape, STORAGE_DTYPES[state.dtype])
                    self._states[index].append(array.copy())
            elif layout.kind == place.kind:
                start, stop = _rows(layout, place.block)
                shape = (layout.kv_heads, stop - start, layout.head_dim)
                for plane in self._planes[index]:
                    array, offset = _array(data, offset, shape, plane.dtype)
                    plane[:, start:stop] = array

    def decode(self, place: PartPlace, data: memoryview, codec: Codec, blocks: Sequence[BlockLayout]) -> None:
        """Take in what a codec made of a part. Raises SnapshotRefused."""
        if codec.name == RAW.name or place.kind not in KINDS:
            self.put(place, data)
            return
        planes = []
        for layout, (keys, values) in zip(self._layouts, self._planes, strict=True):
            start, stop = _rows(layout, place.block) if layout.kind == place.kind else (0, 0)
            planes.append(Plane(keys[:, start:stop], values[:, start:stop]))
        codec.decode(data, blocks[place.block].of_kind(self._spec, place.kind), planes)

    def layers(self) -> list[LayerState]:
        """What was put together."""
        return [
            LayerState(own.kind, self._spec.dtype, keys, values, layout.seen_tokens, tuple(states))
            for own, layout, (keys, values), states in zip(
                self._spec.layers, self._layouts, self._planes, self._states, strict=True
            )
        ]


def _array(data: memoryview, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[Array, int]:
    """An array over ``data``, and where it ends."""
    count = math.prod(shape)
    return np.frombuffer(data, dtype, count, offset).reshape(shape), offset + count * dtype.itemsize


def chunks_of_parts(manifest: SnapshotManifest) -> Iterator[tuple[PartPlace, Part, slice]]:
    """Every part, and which of the manifest's chunks are its own."""
    start = 0
    for place, part in manifest.parts():
        count = -(-part.encoded_bytes // MAX_PLAIN_BYTES)
        yield place, part, slice(start, start + count)
        start += count
