"""Layers cut into blocks of 256 positions, encoded, sealed, and put together again.

A part before it is encoded is, for each layer of its kind in the model's order, the keys and then the values of the
block's positions that the layer still holds, (kv_heads, tokens, head_dim) in C order, little-endian. So the blocks of a
prefix are the same bytes however the conversation goes on; only a sliding layer's first block shrinks as its window
moves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edge.spread import spread
from protocol.identity import digest
from protocol.layout import BLOCK_TOKENS, RAW, Block, ChunkRef, CodecRef, Part, PartPlace, StateLayout
from protocol.manifest import SnapshotManifest
from protocol.sealing import MAX_PLAIN_BYTES, SEAL_BYTES, DataKey
from services.model_runner.codecs.base import BlockLayout, Codec, Plane, block_layouts, block_planes, empty_layers
from services.model_runner.codecs.exact_rows import recent_in
from services.model_runner.engine import STORAGE_DTYPES, LayerState, ModelSpec
from services.model_runner.positions import bitmaps_of, from_bitmaps, positions_of

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


def cut(
    spec: ModelSpec, layers: Sequence[LayerState], cached_tokens: int, without: Container[PartPlace] = ()
) -> list[RawPart]:
    """Copies of all that ``layers`` hold, in the order of a manifest's parts, but for those of ``without``; the layers
    may change from then on."""
    found: list[tuple[PartPlace, list[Array]]] = []
    kept = bitmaps_of(positions_of(layers), cached_tokens)
    for number, block in enumerate(block_layouts(spec, cached_tokens, kept)):
        for kind in KINDS:
            if PartPlace(kind, number) in without:
                continue
            # The one copy: it frees the cache to go on, and makes planes contiguous whatever the engine's strides.
            planes = [array for plane in block_planes(layers, block.of_kind(spec, kind)) for array in plane]
            if any(array.size for array in planes):
                found.append((PartPlace(kind, number), planes))
    states = [state for layer in layers for state in layer.states]
    if states:
        found.append((PartPlace("recurrent", -(-cached_tokens // BLOCK_TOKENS) - 1), states))
    parts = [RawPart(place, np.empty(sum(each.nbytes for each in planes), np.uint8)) for place, planes in found]
    # Spread: the engine waits for it.
    spread(lambda at: _join(found[at][1], parts[at].raw), range(len(parts)))
    return parts


def _join(planes: Sequence[Array], buffer: npt.NDArray[np.uint8]) -> None:
    """Copy ``planes`` into ``buffer``, one after another."""
    offset = 0
    for plane in planes:
        target = buffer[offset : offset + plane.nbytes].view(plane.dtype).reshape(plane.shape)
        np.copyto(target, plane)
        offset += plane.nbytes


def seal_part(
    key: DataKey, place: PartPlace, data: memoryview, addresses: Sequence[bytes], codec: CodecRef, put: Put
) -> Part:
    """Seal what a codec made of a part, chunk by chunk, and hand each to ``put``."""

    # Memory is taken by this thread, and not by those that fill it: what it has freed before is used again.
    cuts = [data[offset : offset + MAX_PLAIN_BYTES] for offset in range(0, len(data), MAX_PLAIN_BYTES)]
    rooms = [bytearray(len(each) + SEAL_BYTES) for each in cuts]

    def seal(index: int) -> ChunkRef:
        key.seal_into(place.role(addresses, codec, index), cuts[index], memoryview(rooms[index]))
        return ChunkRef(digest(rooms[index]), len(rooms[index]))

    refs = spread(seal, range(len(cuts)))
    for ref, sealed in zip(refs, rooms, strict=True):
        put(ref, sealed)
    return Part(len(data), b"".join(ref.digest for ref in refs))


def blocks_of(cached_tokens: int, parts: Sequence[tuple[PartPlace, Part]], kept: Sequence[bytes] = ()) -> list[Block]:
    """The manifest's blocks, of the sealed parts; ``kept`` are the bitmaps of a pruned state."""
    blocks = [Block(tokens=min(BLOCK_TOKENS, cached_tokens - start)) for start in range(0, cached_tokens, BLOCK_TOKENS)]
    for block, bitmap in zip(blocks, kept, strict=bool(kept)):
        block.kept = bitmap
    for place, part in parts:
        if place.kind in KINDS:
            setattr(blocks[place.block], place.kind, part)
    return blocks


class Assembly:
    """Layers of ``spec`` after ``seen_tokens`` positions that are being put together from parts; ``kept`` are the
    bitmaps of a pruned state.

    They are written into ``layers`` where these are given (``Engine.open_cache``), else into new arrays.
    """

    def __init__(
        self,
        spec: ModelSpec,
        seen_tokens: int,
        kept: Sequence[bytes] = (),
        *,
        layers: list[LayerState] | None = None,
    ) -> None:
        self._spec = spec
        self._blocks = block_layouts(spec, seen_tokens, kept)
        self._layers = layers or empty_layers(spec, seen_tokens, positions=from_bitmaps(kept, seen_tokens))

    def decode(self, place: PartPlace, data: memoryview, codec: Codec) -> None:
        """Take in what ``codec`` made of a part; states are always raw, and of their size. Raises SnapshotRefused."""
        if place.kind == "recurrent":
            self._layers[:] = with_states(self._spec, self._layers, data)
        else:
            layout = self._blocks[place.block].of_kind(self._spec, place.kind)
            codec.decode(data, layout, block_planes(self._layers, layout))

    def layers(self) -> list[LayerState]:
        """What was put together."""
        return self._layers


def state_layouts(spec: ModelSpec) -> list[list[StateLayout]]:
    """The arrays of each layer's recurrent part, as a manifest has them; empty when no layer has one."""
    states = [[StateLayout(state.shape, state.dtype) for state in layer.states] for layer in spec.layers]
    return states if any(states) else []


def with_states(spec: ModelSpec, layers: Sequence[LayerState], data: memoryview) -> list[LayerState]:
    """``layers`` with all their recurrent states, copied out of ``data``, one after another as they lie in memory."""
    found = []
    offset = 0
    for own, layer in zip(spec.layers, layers, strict=True):
        states = []
        for state in own.states:
            array, offset = _array(data, offset, state.shape, STORAGE_DTYPES[state.dtype])
            states.append(array.copy())
        found.append(replace(layer, states=tuple(states)))
    return found


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
