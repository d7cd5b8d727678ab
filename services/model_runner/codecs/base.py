"""What every rung shares: the layout of a block, the interface of a codec, and reading bytes that may be hostile.

A snapshot's positions are cut at absolute multiples of ``BLOCK_TOKENS``. Each block is encoded by itself, from its own
keys and values alone, so that two snapshots with a common beginning have the same blocks. Recurrent states are no part
of a block.

A decoder knows the layout, from the model and the manifest, and the codec's parameters; everything else stands in the
block. Sizes are checked against the layout before anything is allocated from them, and damage raises SnapshotRefused.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from protocol.errors import SnapshotRefused
from protocol.layout import BLOCK_TOKENS, CodecRef
from services.model_runner.engine import DTYPE_BYTES, STORAGE_DTYPES, LayerState, ModelSpec
from services.model_runner.positions import offsets_of

MOST_EXACT = 255
"""Last tokens of a block that a lossy rung can keep exactly."""

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Data = bytes | memoryview


class Plane(NamedTuple):
    """One layer's keys and values of a block, each (kv_heads, tokens, head_dim) in ``STORAGE_DTYPES``."""

    keys: Array
    values: Array


class BlockLayer(NamedTuple):
    """How many of a block's positions one layer holds; they are its last ones, unless it was pruned."""

    kv_heads: int
    head_dim: int
    tokens: int
    """0 for a recurrent layer, and for a sliding one whose window has left the block."""
    kept: bytes = b""
    """Of a pruned layer: the bitmap of what it holds (``Block.kept``), which has ``tokens`` bits."""

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.kv_heads, self.tokens, self.head_dim


@dataclass(frozen=True)
class BlockLayout:
    """What one block holds."""

    dtype: str
    """A key of ``STORAGE_DTYPES``."""
    position: int
    """Of its first token in the conversation."""
    tokens: int
    layers: tuple[BlockLayer, ...]
    """All of the model's, in order."""

    @property
    def raw_bytes(self) -> int:
        """Its size as it lies in memory."""
        values = sum(2 * layer.kv_heads * layer.tokens * layer.head_dim for layer in self.layers)
        return values * DTYPE_BYTES[self.dtype]

    def offsets(self, layer: BlockLayer) -> Array:
        """Where in the block the rows of one of its layers are, int64, ascending."""
        return offsets_of(layer.kept) if layer.kept else np.arange(self.tokens - layer.tokens, self.tokens)

    def of_kind(self, spec: ModelSpec, kind: str) -> BlockLayout:
        """What a manifest's part holds of it: the layers of one kind; the others hold nothing."""
        layers = (
            layer if own.kind == kind else layer._replace(tokens=0, kept=b"")
            for layer, own in zip(self.layers, spec.layers, strict=True)
        )
        return replace(self, layers=tuple(layers))

    def empty(self) -> list[Plane]:
        """New arrays for it, not filled."""
        dtype = STORAGE_DTYPES[self.dtype]
        return [Plane(np.empty(layer.shape, dtype), np.empty(layer.shape, dtype)) for layer in self.layers]


def block_layouts(spec: ModelSpec, seen_tokens: int, kept: Sequence[bytes] = ()) -> list[BlockLayout]:
    """The blocks of a cache of ``spec`` after ``seen_tokens`` positions; the last may be shorter.

    ``kept`` are the blocks' bitmaps of a pruned one (``Block.kept``), which have been checked.
    """
    found = []
    for number, position in enumerate(range(0, seen_tokens, BLOCK_TOKENS)):
        tokens = min(BLOCK_TOKENS, seen_tokens - position)
        bitmap = kept[number] if kept else b""
        layers = []
        for layer in spec.layers:
            if bitmap and layer.kind == "full":
                layers.append(BlockLayer(layer.kv_heads, layer.head_dim, len(offsets_of(bitmap)), bitmap))
                continue
            first_held = seen_tokens - layer.held_tokens(seen_tokens)
            held = min(tokens, max(0, position + tokens - first_held))
            layers.append(BlockLayer(layer.kv_heads, layer.head_dim, held))
        found.append(BlockLayout(spec.dtype, position, tokens, tuple(layers)))
    return found


def empty_layers(
    spec: ModelSpec,
    seen_tokens: int,
    states: Sequence[tuple[Array, ...]] | None = None,
    positions: Array | None = None,
) -> list[LayerState]:
    """Layers of that length, not filled; ``states`` are those of each layer, which no block holds. ``positions`` are
    those that a pruned cache holds."""
    dtype = STORAGE_DTYPES[spec.dtype]
    found = []
    for at, layer in enumerate(spec.layers):
        pruned = positions if layer.kind == "full" else None
        held = layer.held_tokens(seen_tokens) if pruned is None else len(pruned)
        shape = (layer.kv_heads, held, layer.head_dim)
        keys, values = np.empty(shape, dtype), np.empty(shape, dtype)
        own = states[at] if states else ()
        found.append(LayerState(layer.kind, spec.dtype, keys, values, seen_tokens, own, pruned))
    return found


def block_planes(layers: Sequence[LayerState], layout: BlockLayout) -> list[Plane]:
    """Views of ``layers`` that hold the block of ``layout``: to encode them, or to decode into them."""
    planes = []
    for state, own in zip(layers, layout.layers, strict=True):
        # The row behind the block's last token, counted from the first that the layer holds.
        end = layout.position + layout.tokens - (state.seen_tokens - state.keys.shape[1])
        if state.positions is not None:
            end = int(np.searchsorted(state.positions, layout.position + layout.tokens))
        part = slice(end - own.tokens, end) if own.tokens else slice(0, 0)
        planes.append(Plane(state.keys[:, part], state.values[:, part]))
    return planes


class Codec(ABC):
    """One rung: blocks to bytes and back. Stateless between calls, so that threads may share one."""

    name: ClassVar[str]
    """Of the rung, in manifests."""
    exact: ClassVar[bool] = False
    """Whether decoding gives every bit back."""

    version: ClassVar[int] = 1
    """Of the bytes of a block; a decoder reads its own alone."""

    def params(self) -> dict[str, Any]:
        """What a decoder must know beside name and version: plain msgpack types."""
        return {}

    @property
    def ref(self) -> CodecRef:
        """How a manifest names it."""
        return CodecRef(self.name, self.version, self.params())

    def encode(self, planes: Sequence[Plane], layout: BlockLayout, recent: int = 0) -> bytes:
        """One block as bytes.

        Args:
            planes: of each layer, as ``layout`` says.
            recent: how many of the block's last tokens belong to the snapshot's most recent ones, which a lossy rung
                keeps exactly (``recent_tokens``).

        Raises ValueError when the arrays are not those of the layout.
        """
        dtype = STORAGE_DTYPES[layout.dtype]
        if len(planes) != len(layout.layers):
            raise ValueError(f"{len(planes)} planes for {len(layout.layers)} layers")
        for plane, layer in zip(planes, layout.layers, strict=True):
            for array in plane:
                if array.shape != layer.shape or array.dtype != dtype:
                    raise ValueError(f"a plane is {array.dtype} {array.shape}, the layout says {dtype} {layer.shape}")
        return self._encode(planes, layout, min(recent, layout.tokens, MOST_EXACT))

    def decode(self, data: Data, layout: BlockLayout, out: Sequence[Plane] | None = None) -> list[Plane]:
        """The block's arrays, in ``out`` (of the layout's shapes, any strides) or in new ones.

        Raises SnapshotRefused when ``data`` is damaged, or of another layout; what is in ``out`` is then undefined.
        """
        return list(self._decode(memoryview(data).cast("B"), layout, out))

    @abstractmethod
    def _encode(self, planes: Sequence[Plane], layout: BlockLayout, recent: int) -> bytes: ...

    @abstractmethod
    def _decode(self, data: memoryview, layout: BlockLayout, out: Sequence[Plane] | None) -> Sequence[Plane]: ...


def refused(rung: str, field: str, reason: str) -> SnapshotRefused:
    """The error of a block that cannot be decoded."""
    return SnapshotRefused(
        f"decoding a block of the rung {rung}: {field}: {reason}",
        hint="fetch the snapshot again, or resume it from its token ids",
        field=field,
        reason=reason,
    )


class Reader:
    """Takes fields from a block's bytes, in order; whatever is missing or left over is refused."""

    def __init__(self, rung: str, data: memoryview) -> None:
        self.rung = rung
        self._data = data
        self._at = 0

    def refuse(self, field: str, reason: str) -> SnapshotRefused:
        """To be raised."""
        return refused(self.rung, field, reason)

    @property
    def left(self) -> int:
        """Bytes not taken yet."""
        return len(self._data) - self._at

    def take(self, field: str, size: int) -> memoryview:
        """The next ``size`` bytes."""
        if not 0 <= size <= self.left:
            raise self.refuse(field, f"{size:,} bytes, and {self.left:,} are left of the block")
        found = self._data[self._at : self._at + size]
        self._at += size
        return found

    def array(self, field: str, dtype: str, shape: tuple[int, ...]) -> Array:
        """The next bytes as an array, not copied."""
        kind = np.dtype(dtype)
        count = int(np.prod(shape, dtype=np.int64))
        found: Array = np.frombuffer(self.take(field, count * kind.itemsize), kind).reshape(shape)
        return found

    def number(self, field: str, most: int) -> int:
        """An unsigned 32-bit number of at most ``most``."""
        found = int.from_bytes(self.take(field, 4), "little")
        if found > most:
            raise self.refuse(field, f"{found:,}, and {most:,} at most")
        return found

    def end(self) -> None:
        """Raises SnapshotRefused unless all has been taken."""
        if self.left:
            raise self.refuse("size", f"{self.left:,} bytes too many")


def number(value: int) -> bytes:
    """What ``Reader.number`` reads."""
    return value.to_bytes(4, "little")


def to_floats(array: Array, dtype: str) -> Floats:
    """Stored numbers as new float32 ones, of the same shape."""
    if dtype == "bfloat16":
        wide = array.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return array.astype(np.float32)


def from_floats(values: Floats, dtype: str, out: Array) -> None:
    """Write ``values`` into ``out``, an array of ``STORAGE_DTYPES[dtype]``, rounded to nearest; ``values`` is used up.

    A float16 saturates: infinities would spoil every later token.
    """
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        # To nearest, and ties to even like every processor does.
        odd = bits >> 16
        odd &= 1
        odd += 0x7FFF
        bits += odd
        bits >>= 16
        np.copyto(out, bits, casting="unsafe")
    elif dtype == "float16":
        np.copyto(out, np.clip(values, -65504, 65504), casting="unsafe")
    else:
        np.copyto(out, values)
