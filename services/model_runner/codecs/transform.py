"""Rung ``transform``: principal axes across layers, rounded as coarsely as each number's part in the answer allows.

After KVTC (arXiv 2511.01815), with the steps weighted by sensitivity:

1. Keys are turned back by their true positions: before RoPE they vary far less from token to token.
2. From the keys, and apart from them the values, of a few layers together the mean is taken, and each number is
   multiplied by a weight: the root of the mean square of the gradient of the log-likelihood by it (Fisher
   information), so that an error of one size costs the same in every number.
3. Principal axes of that; each component is rounded to a multiple of one step. Equal steps in a space where errors
   cost the same are the best allocation of bits there is (reverse water-filling); a component that hardly ever
   reaches the step is dropped.
4. The rounded numbers are entropy coded (rans.py) by tables of the basis, one for each class of components of about
   the same deviation, so that a block carries no table. What a table has no symbol for follows as it is.

Sinks and recent tokens are exact and no part of this.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from services.model_runner.codecs import rans
from services.model_runner.codecs.base import (
    Array,
    BlockLayer,
    BlockLayout,
    Codec,
    Floats,
    Plane,
    Reader,
    from_floats,
    number,
    to_floats,
)
from services.model_runner.codecs.basis import KEYS, NEAR, Basis, Group
from services.model_runner.codecs.exact_rows import held_rows, pack_rows, read_counts, sinks_in, unpack_rows

DEAD_ZONE = 0.15
"""A number is rounded away from 0 only when it is this much beyond the half: more zeros, at hardly any more error."""
_LANES = 2048
"""Symbols that one numpy call codes. Part of the format: each lane costs 4 bytes a block, and fewer are slower."""


@dataclass(frozen=True)
class _Stream:
    """The components of all groups whose layers hold equally many of the block's tokens."""

    rows: int
    groups: tuple[int, ...]
    order: Array
    """Kept components of the groups, put one after another, sorted by class."""
    classes: Array
    """Of ``order``: index of its table."""
    tables: tuple[tuple[int, int], ...]
    """Each table of ``classes``, and the symbols that it has: components of one class follow one another."""
    runs: tuple[rans.Run, ...]


class Transform(Codec):
    """The smallest rung. Needs the model's basis."""

    name = "transform"

    def __init__(self, basis: Basis, level: str = NEAR) -> None:
        self.basis = basis
        self.level = basis.levels[level]
        step = np.float32(self.level.row.step)
        self._kept = [np.flatnonzero(classes) for classes in self.level.classes]
        self._forward: list[Floats | None] = [None] * len(basis.groups)
        self._back = [
            (group.axes[kept] * step) / group.weights for group, kept in zip(basis.groups, self._kept, strict=True)
        ]

    def params(self) -> dict[str, Any]:
        return {"basis": self.basis.digest, "level": self.level.row.name}

    # --- bytes ----------------------------------------------------------------------------------------------------

    def _encode(self, planes: Sequence[Plane], layout: BlockLayout, recent: int) -> bytes:
        first, last = sinks_in(layout), recent
        exact = pack_rows(planes, layout, recent)
        parts = [exact[:2], number(len(exact) - 2), exact[2:]]
        for stream in self._streams(layout, first, last):
            rounded = np.concatenate([self._round(at, planes, layout, first, last) for at in stream.groups])
            rounded = rounded[stream.order]
            reach = np.array([row.reach for row in self.level.row.tables], np.int32)[stream.classes][:, None]
            escaped = np.abs(rounded) > reach
            symbols = np.where(escaped, 2 * reach + 1, rounded + reach).astype(np.uint8)
            beyond = rounded[escaped].astype("<i4")
            parts += [rans.encode(stream.runs, self.level.tables, symbols.reshape(-1))]
            parts += [number(len(beyond)), beyond.tobytes()]
        return b"".join(parts)

    def _decode(self, data: memoryview, layout: BlockLayout, out: Sequence[Plane] | None) -> Sequence[Plane]:
        reader = Reader(self.name, data)
        first, last = read_counts(reader, layout)
        exact = reader.take("exact", reader.number("exact", reader.left))
        streams = [(stream, self._read(reader, stream)) for stream in self._streams(layout, first, last)]
        reader.end()
        planes = layout.empty() if out is None else out
        for stream, values in streams:
            start = 0
            for at in stream.groups:
                count = len(self._kept[at])
                self._restore(at, values[start : start + count], planes, layout, first, last)
                start += count
        unpack_rows(Reader(self.name, exact), layout, planes, first, last)
        return planes

    def _read(self, reader: Reader, stream: _Stream) -> Floats:
        """Kept components (all of the stream's groups', rows), in steps."""
        slots = rans.decode(reader, stream.runs, self.level.tables)
        values = np.empty(len(slots), np.float32)
        escaped = np.empty(len(slots), bool)
        at = 0
        for index, count in stream.tables:
            table, part = self.level.tables[index], slots[at : at + count]
            np.take(table.slot_values, part, out=values[at : at + count], mode="clip")
            # The escape is a table's last symbol.
            np.greater_equal(part, table.starts[-1], out=escaped[at : at + count])
            at += count
        beyond = np.flatnonzero(escaped)
        if reader.number("escapes", len(values)) != len(beyond):
            raise reader.refuse("escapes", "their number is not that of the escape symbols")
        values[beyond] = reader.array("escapes", "<i4", (len(beyond),))
        found = np.empty((len(stream.order), stream.rows), np.float32)
        found[stream.order] = values.reshape(found.shape)
        return found

    # --- numbers --------------------------------------------------------------------------------------------------

    def _streams(self, layout: BlockLayout, first: int, last: int) -> list[_Stream]:
        by_rows: dict[int, list[int]] = {}
        for at, group in enumerate(self.basis.groups):
            rows = held_rows(layout.layers[group.layers[0]], layout, first, last)
            by_rows.setdefault(rows.stop - rows.start, []).append(at)
        return [self._stream(rows, groups) for rows, groups in by_rows.items() if rows > 0]

    def _stream(self, rows: int, groups: Sequence[int]) -> _Stream:
        classes = np.concatenate([self.level.classes[at][self._kept[at]] for at in groups])
        order = np.argsort(classes, kind="stable")
        indices = classes[order].astype(np.int64) - 1
        at_once = max(1, _LANES // rows)
        runs, tables = [], []
        for table, count in zip(*(each.tolist() for each in np.unique(indices, return_counts=True)), strict=True):
            tables.append((table, count * rows))
            runs += [rans.Run(table, min(at_once, count - start) * rows) for start in range(0, count, at_once)]
        return _Stream(rows, tuple(groups), order, indices, tuple(tables), tuple(runs))

    def _round(self, at: int, planes: Sequence[Plane], layout: BlockLayout, first: int, last: int) -> Array:
        """Kept components of one group, (components, rows), int32."""
        forward = self._forward[at]
        group = self.basis.groups[at]
        if forward is None:
            # The axes are rounded to 8 bits, so not quite at right angles: (A Aᵀ)⁻¹ ≈ 2 − A Aᵀ for a matrix near 1.
            axes = group.axes[self._kept[at]]
            gram = axes @ axes.T
            forward = (axes.T @ (2 * np.eye(len(gram), dtype=np.float32) - gram)) * group.weights[:, None]
            forward /= np.float32(self.level.row.step)
            self._forward[at] = forward
        numbers = gather(group, planes, layout, self.basis.angles, first, last)
        numbers -= group.mean
        return quantise((numbers @ forward).T)

    def _restore(
        self, at: int, values: Floats, planes: Sequence[Plane], layout: BlockLayout, first: int, last: int
    ) -> None:
        group = self.basis.groups[at]
        layer = layout.layers[group.layers[0]]
        rows = held_rows(layer, layout, first, last)
        numbers = values.T @ self._back[at]
        numbers += group.mean
        # All layers of a group are alike, and their keys turn alike. One layer at a time stays in a processor's cache.
        turned = _waves_of(layout, layer, rows, self.basis.angles[group.layers[0]]) if group.side == KEYS else None
        heads = numbers.reshape(len(numbers), -1, layer.head_dim)
        floats = np.empty((layer.kv_heads, len(numbers), layer.head_dim), np.float32)
        for place, index in enumerate(group.layers):
            own = heads[:, place * layer.kv_heads : (place + 1) * layer.kv_heads]
            np.copyto(floats, (own if turned is None else rotate(own, *turned)).transpose(1, 0, 2))
            target = planes[index].keys if group.side == KEYS else planes[index].values
            from_floats(floats, layout.dtype, target[:, rows])


def gather(
    group: Group,
    planes: Sequence[Plane],
    layout: BlockLayout,
    angles: Sequence[Array],
    first: int = 0,
    last: int = 0,
) -> Floats:
    """A group's numbers of a block, (rows, width), keys turned back; without its ``first`` and ``last`` tokens."""
    layer = layout.layers[group.layers[0]]
    rows = held_rows(layer, layout, first, last)
    arrays = [(planes[index].keys if group.side == KEYS else planes[index].values)[:, rows] for index in group.layers]
    heads = to_floats(np.concatenate(arrays), layout.dtype).transpose(1, 0, 2)
    if group.side == KEYS:
        cos, sin = _waves_of(layout, layer, rows, angles[group.layers[0]])
        heads = rotate(heads, cos, -sin)
    return np.ascontiguousarray(heads).reshape(len(heads), group.width)


def quantise(components: Floats) -> Array:
    """Rounded to whole numbers, int32."""
    size = np.floor(np.abs(components) + np.float32(0.5 - DEAD_ZONE))
    return np.copysign(np.minimum(size, 2**30), components).astype(np.int32)


def turn(vectors: Floats, positions: Array, angles: Array) -> Floats:
    """Rotary embedding (RoFormer, arXiv 2104.09864) of ``vectors`` (rows, heads, head_dim); dimension i is turned with
    i + n, where n is the number of ``angles``. The opposite positions turn back."""
    return rotate(vectors, *waves(positions, angles))


def rotate(vectors: Floats, cos: Floats, sin: Floats) -> Floats:
    """``vectors`` (rows, heads, head_dim) turned by ``waves``; the sine's opposite turns back."""
    half = cos.shape[-1]
    if not half:
        return vectors
    one, other = vectors[..., :half], vectors[..., half : 2 * half]
    found = np.empty(vectors.shape, np.float32)
    np.multiply(one, cos, out=found[..., :half])
    found[..., :half] -= other * sin
    np.multiply(other, cos, out=found[..., half : 2 * half])
    found[..., half : 2 * half] += one * sin
    found[..., 2 * half :] = vectors[..., 2 * half :]
    return found


def waves(positions: Array, angles: Array) -> tuple[Floats, Floats]:
    """Cosines and sines of the turn at each position, (rows, 1, angles)."""
    by = positions[:, None] * angles
    return np.cos(by).astype(np.float32)[:, None], np.sin(by).astype(np.float32)[:, None]


def _waves_of(layout: BlockLayout, layer: BlockLayer, rows: slice, angles: Array) -> tuple[Floats, Floats]:
    """Of a layer's ``rows``, by their true positions."""
    positions = layout.position + layout.offsets(layer)[rows].astype(np.float64)
    return _waves_at(positions.tobytes(), angles.tobytes())


@functools.lru_cache(maxsize=8)
def _waves_at(positions: bytes, angles: bytes) -> tuple[Floats, Floats]:
    """All groups of a block ask for the same ones."""
    return waves(np.frombuffer(positions, np.float64), np.frombuffer(angles, np.float64))
