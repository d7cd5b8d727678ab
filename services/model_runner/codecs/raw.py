"""Rung ``raw``: each layer's keys, then its values, as they lie in memory, little-endian, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from services.model_runner.codecs.base import BlockLayout, Codec, Plane, Reader
from services.model_runner.engine import STORAGE_DTYPES


class Raw(Codec):
    """Bit for bit, at the speed of a copy."""

    name = "raw"
    exact = True

    def _encode(self, planes: Sequence[Plane], _layout: BlockLayout, _recent: int) -> bytes:
        return b"".join(np.ascontiguousarray(array).data for plane in planes for array in plane if array.size)

    def _decode(self, data: memoryview, layout: BlockLayout, out: Sequence[Plane] | None) -> Sequence[Plane]:
        reader = Reader(self.name, data)
        if len(data) != layout.raw_bytes:
            raise reader.refuse("size", f"{len(data):,} bytes, the layout takes {layout.raw_bytes:,}")
        dtype = STORAGE_DTYPES[layout.dtype].str
        # Without a place to go to they are views of the data: whoever imports them copies them.
        planes = [
            Plane(reader.array("keys", dtype, layer.shape), reader.array("values", dtype, layer.shape))
            for layer in layout.layers
        ]
        if out is None:
            return planes
        for plane, target in zip(planes, out, strict=True):
            np.copyto(target.keys, plane.keys)
            np.copyto(target.values, plane.values)
        return out
