"""Rung ``int8``: 8 bits a number, keys with a scale for each channel of the block, values for each head and token.

Keys have channels far larger than the rest, values have not (KIVI, arXiv 2402.02750), hence the two ways. Scales are
bfloat16, whose range no model leaves. Sinks and recent tokens are exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from services.model_runner.codecs.base import (
    Array,
    BlockLayout,
    Codec,
    Floats,
    Plane,
    Reader,
    from_floats,
    to_floats,
)
from services.model_runner.codecs.exact_rows import pack_rows, read_counts, unpack_rows

_MOST = 127
_LARGEST_SCALE = 1e36
_KEY_AXIS, _VALUE_AXIS = 1, 2
"""The axes of (kv_heads, tokens, head_dim) along which numbers share a scale."""


class Int8(Codec):
    """About half the size, and no difference that a model's answers show."""

    name = "int8"

    def _encode(self, planes: Sequence[Plane], layout: BlockLayout, recent: int) -> bytes:
        parts = []
        for plane in planes:
            for array, axis in zip(plane, (_KEY_AXIS, _VALUE_AXIS), strict=True):
                if array.size:
                    parts += _quantise(to_floats(array, layout.dtype), axis)
        return b"".join(parts) + pack_rows(planes, layout, recent)

    def _decode(self, data: memoryview, layout: BlockLayout, out: Sequence[Plane] | None) -> Sequence[Plane]:
        reader = Reader(self.name, data)
        parts = []
        for layer in layout.layers:
            for axis in (_KEY_AXIS, _VALUE_AXIS):
                scales = to_floats(reader.array("scales", "<u2", _shape_of_scales(layer.shape, axis)), "bfloat16")
                if not (np.abs(scales) < _LARGEST_SCALE).all():
                    raise reader.refuse("scales", "one is larger than any model's, or no number")
                parts.append((scales, reader.array("numbers", "i1", layer.shape)))
        planes = layout.empty() if out is None else out
        targets = (array for plane in planes for array in plane)
        for (scales, numbers), target in zip(parts, targets, strict=True):
            if numbers.size:
                floats = np.multiply(numbers, scales, dtype=np.float32)
                from_floats(floats, layout.dtype, target)
        first, last = read_counts(reader, layout)
        unpack_rows(reader, layout, planes, first, last)
        return planes


def _shape_of_scales(shape: tuple[int, int, int], axis: int) -> tuple[int, ...]:
    if 0 in shape:
        return (0,)
    return tuple(1 if at == axis else size for at, size in enumerate(shape))


def _quantise(values: Floats, axis: int) -> list[bytes]:
    scales = scales_above(np.abs(values).max(axis=axis, keepdims=True) / _MOST)
    values /= to_floats(scales, "bfloat16")
    np.rint(values, out=values)
    return [scales.tobytes(), values.astype(np.int8).tobytes()]


def scales_above(least: Floats) -> Array:
    """Scales as bfloat16 bits, the smallest that are at least ``least`` and not 0."""
    bits = np.maximum(np.ascontiguousarray(least, np.float32), np.float32(1e-30)).view(np.uint32)
    return ((bits + 0xFFFF) >> 16).astype("<u2")
