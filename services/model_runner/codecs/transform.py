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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from services.model_runner.codecs import rans
from services.model_runner.codecs.base import (
    Array,
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
"""A number is rounded up only this much beyond the half: fewer symbols that are not 0, at hardly any more error."""
_LANES = 1024
"""Symbols that one numpy call decodes: more cost 4 bytes each a block, fewer are slow."""


@dataclass(frozen=True)
class _Stream:
    """The components of all groups whose layers hold equally many of the block's tokens."""

    rows: int
    groups: tuple[int, ...]
    order: Array
    """Components of the groups put one after another, dropped ones left out, sorted by class."""
    classes: Array
    """Of ``order``: index of its table."""
    runs: tuple[rans.Run, ...]


class Transform(Codec):
    """The smallest rung. Needs the model's basis."""

    name = "transform"

    def __init__(self, basis: Basis, level: str = NEAR) -> None:
        self.basis = basis
        self.level = basis.levels[level]
        step = np.float32(self.level.row.step)
        self._forward: list[Floats | None] = [None] * len(basis.groups)
        self._back = [(group.axes * step) / group.weights for group in basis.groups]

    def params(self) -> dict[str, Any]:
        return {"version": self.version, "basis": self.basis.digest, "level": self.level.row.name}

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
        streams = [self._read(reader, stream) for stream in self._streams(layout, first, last)]
        reader.end()
        planes = layout.empty() if out is None else out
        for stream, values in streams:
            start = 0
            for at in stream.groups:
                count = len(self.basis.groups[at].axes)
                self._restore(at, values[start : start + count], planes, layout, first, last)
                start += count
        unpack_rows(Reader(self.name, exact), layout, planes, first, last)
        return planes

    def _read(self, reader: Reader, stream: _Stream) -> tuple[_Stream, Floats]:
        """Components (all of the stream's groups', rows), in steps."""
        slots = rans.decode(reader, stream.runs, self.level.tables)
        values = np.empty(len(slots), np.float32)
        escapes = []
        at = 0
        for run in stream.runs:
            table = self.level.tables[run.table]
            part = slots[at : at + run.lanes]
            np.take(table.slot_values, part, out=values[at : at + run.lanes])
            # The escape is a table's last symbol.
            escapes.append(part >= table.starts[-1])
            at += run.lanes
        escaped = np.flatnonzero(np.concatenate(escapes)) if escapes else np.zeros(0, np.int64)
        if reader.number("escapes", len(values)) != len(escaped):
            raise reader.refuse("escapes", "their number is not that of the escape symbols")
        values[escaped] = reader.array("escapes", "<i4", (len(escaped),))
        total = sum(len(self.basis.groups[at].axes) for at in stream.groups)
        found = np.zeros((total, stream.rows), np.float32)
        found[stream.order] = values.reshape(len(stream.order), stream.rows)
        return stream, found

    # --- numbers --------------------------------------------------------------------------------------------------

    def _streams(self, layout: BlockLayout, first: int, last: int) -> list[_Stream]:
        by_rows: dict[int, list[int]] = {}
        for at, group in enumerate(self.basis.groups):
            rows = held_rows(layout.layers[group.layers[0]], layout.tokens, first, last)
            by_rows.setdefault(rows.stop - rows.start, []).append(at)
        return [self._stream(rows, groups) for rows, groups in by_rows.items() if rows > 0]

    def _stream(self, rows: int, groups: Sequence[int]) -> _Stream:
        classes = np.concatenate([self.level.classes[at] for at in groups])
        order = np.argsort(classes, kind="stable")[int((classes == 0).sum()) :]
        tables = classes[order].astype(np.int64) - 1
        at_once = max(1, _LANES // rows)
        runs = []
        for table, count in zip(*np.unique(tables, return_counts=True), strict=True):
            for start in range(0, int(count), at_once):
                runs.append(rans.Run(int(table), min(at_once, int(count) - start) * rows))
        return _Stream(rows, tuple(groups), order, tables, tuple(runs))

    def _round(self, at: int, planes: Sequence[Plane], layout: BlockLayout, first: int, last: int) -> Array:
        """Components of one group, (components, rows), int32."""
        forward = self._forward[at]
        group = self.basis.groups[at]
        if forward is None:
            # The axes are rounded to 8 bits, so not quite at right angles: (A Aᵀ)⁻¹ ≈ 2 − A Aᵀ for a matrix near 1.
            gram = group.axes @ group.axes.T
            forward = (group.axes.T @ (2 * np.eye(len(gram), dtype=np.float32) - gram)) * group.weights[:, None]
            self._forward[at] = forward
        numbers = gather(group, planes, layout, self.basis.angles, first, last)
        components = ((numbers - group.mean) @ forward).astype(np.float32, copy=False)
        components /= self.level.row.step
        return quantise(components.T)

    def _restore(
        self, at: int, values: Floats, planes: Sequence[Plane], layout: BlockLayout, first: int, last: int
    ) -> None:
        group = self.basis.groups[at]
        kept = np.flatnonzero(self.level.classes[at])
        numbers = values[kept].T @ self._back[at][kept]
        numbers += group.mean
        column = 0
        for index in group.layers:
            layer = layout.layers[index]
            rows = held_rows(layer, layout.tokens, first, last)
            width = layer.kv_heads * layer.head_dim
            own = numbers[:, column : column + width].reshape(-1, layer.kv_heads, layer.head_dim)
            column += width
            plane = planes[index]
            if group.side == KEYS:
                own = turn(own, _positions(layout, layer.tokens, rows), self.basis.angles[index])
            target = plane.keys if group.side == KEYS else plane.values
            from_floats(np.ascontiguousarray(own.transpose(1, 0, 2)), layout.dtype, target[:, rows])


def gather(
    group: Group,
    planes: Sequence[Plane],
    layout: BlockLayout,
    angles: Sequence[Array],
    first: int = 0,
    last: int = 0,
) -> Floats:
    """A group's numbers of a block, (rows, width), keys turned back; without its ``first`` and ``last`` tokens."""
    found = []
    for index in group.layers:
        layer = layout.layers[index]
        rows = held_rows(layer, layout.tokens, first, last)
        array = (planes[index].keys if group.side == KEYS else planes[index].values)[:, rows]
        own = to_floats(array, layout.dtype).transpose(1, 0, 2)
        if group.side == KEYS:
            own = turn(own, -_positions(layout, layer.tokens, rows), angles[index])
        found.append(own.reshape(len(own), -1))
    return np.concatenate(found, axis=1)


def quantise(components: Floats) -> Array:
    """Rounded to whole numbers, int32."""
    size = np.floor(np.abs(components) + np.float32(0.5 - DEAD_ZONE))
    return np.copysign(np.minimum(size, 2**30), components).astype(np.int32)


def turn(vectors: Floats, positions: Array, angles: Array) -> Floats:
    """Rotary embedding (RoFormer, arXiv 2104.09864) of ``vectors`` (rows, heads, head_dim); dimension i is turned with
    i + n, where n is the number of ``angles``. The opposite positions turn back."""
    half = len(angles)
    if not half:
        return vectors
    by = positions[:, None] * angles
    cos, sin = np.cos(by).astype(np.float32)[:, None], np.sin(by).astype(np.float32)[:, None]
    one, other = vectors[..., :half], vectors[..., half : 2 * half]
    found = np.empty(vectors.shape, np.float32)
    np.multiply(one, cos, out=found[..., :half])
    found[..., :half] -= other * sin
    np.multiply(other, cos, out=found[..., half : 2 * half])
    found[..., half : 2 * half] += one * sin
    found[..., 2 * half :] = vectors[..., 2 * half :]
    return found


def _positions(layout: BlockLayout, held: int, rows: slice) -> Array:
    """Of a layer's ``rows``, when it holds the last ``held`` of the block."""
    begin = layout.position + layout.tokens - held
    return np.arange(begin + rows.start, begin + rows.stop, dtype=np.float64)
