"""Rung ``lossless``: every bit, in about two thirds of the bytes: byte planes and entropy coding.

Nearly all that can be saved lies in the exponents: the numbers of one channel (a layer's head and dimension) have
about the same size. Each number's bits are turned left by one, so that its exponent fills the uppermost byte and its
sign joins the mantissa. From that byte the channel's own mean is taken, and the sign is turned round where most of the
channel's are negative; what is left is entropy coded by zstd (Huffman, since there is nothing to match). Bytes stay as
they are where coding gains nothing. The same idea without channels: ZipNN (arXiv 2411.05239), DFloat11 (2504.11651).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import zstandard

from services.model_runner.codecs.base import Array, BlockLayout, Bytes, Codec, Plane, Reader, number
from services.model_runner.engine import DTYPE_BYTES

_LEVEL = 1
"""Higher ones look longer for matches, of which there are none."""
_FEWEST_TOKENS = 24
"""Channels of fewer have no mean of their own: its byte would cost more than it saves."""
_STORED, _CODED = 0, 1
_GAIN = 0.98
"""What coding must bring, or the plane is stored: decoding costs time."""
_WINDOW_BYTES = 1 << 27


class Lossless(Codec):
    """Bit for bit; bfloat16, float16 and float32."""

    name = "lossless"
    exact = True

    def _encode(self, planes: Sequence[Plane], _layout: BlockLayout, _recent: int) -> bytes:
        return pack_exact([array for plane in planes for array in plane])

    def _decode(self, data: memoryview, layout: BlockLayout, out: Sequence[Plane] | None) -> Sequence[Plane]:
        reader = Reader(self.name, data)
        shapes = [layer.shape for layer in layout.layers for _ in range(2)]
        found = unpack_exact(reader, shapes, DTYPE_BYTES[layout.dtype])
        reader.end()
        planes = layout.empty() if out is None else out
        for array, target in zip(found, (array for plane in planes for array in plane), strict=True):
            if array.size:
                np.copyto(target, array.view(target.dtype))
        return planes


def pack_exact(arrays: Sequence[Array]) -> bytes:
    """Arrays of 2- or 4-byte numbers, each (kv_heads, tokens, head_dim), as bytes."""
    compressor = zstandard.ZstdCompressor(level=_LEVEL, write_content_size=False, write_checksum=False)
    parts = [part for array in arrays if array.size for part in _pack_one(array, compressor)]
    return b"".join(parts)


def unpack_exact(reader: Reader, shapes: Sequence[tuple[int, ...]], itemsize: int) -> list[Array]:
    """What ``pack_exact`` packed, as unsigned numbers of ``itemsize`` bytes. Raises SnapshotRefused."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES)
    return [_unpack_one(reader, shape, itemsize, decompressor) for shape in shapes]


def _pack_one(array: Array, compressor: zstandard.ZstdCompressor) -> list[bytes]:
    itemsize = array.dtype.itemsize
    bits = 8 * itemsize
    words = np.ascontiguousarray(array).view(f"<u{itemsize}")
    turned = words << 1
    turned |= words >> (bits - 1)
    parts = []
    top = (turned >> (bits - 8)).astype(np.uint8)
    if array.shape[1] >= _FEWEST_TOKENS:
        means = np.rint(top.mean(axis=1, dtype=np.float32)).astype(np.uint8)
        parts.append(means.tobytes())
        top -= means[:, None, :]
        flips = (turned & 1).mean(axis=1, dtype=np.float32) > 0.5
        parts.append(np.packbits(flips).tobytes())
        turned ^= flips[:, None, :]
    parts.append(_pack_plane(top, compressor))
    for shift in range(bits - 16, -1, -8):
        parts.append(_pack_plane((turned >> shift).astype(np.uint8), compressor))
    return parts


def _pack_plane(plane: Bytes, compressor: zstandard.ZstdCompressor) -> bytes:
    coded = compressor.compress(plane.data)
    if len(coded) < _GAIN * plane.nbytes:
        return bytes([_CODED]) + number(len(coded)) + coded
    return bytes([_STORED]) + plane.tobytes()


def _unpack_one(
    reader: Reader, shape: tuple[int, ...], itemsize: int, decompressor: zstandard.ZstdDecompressor
) -> Array:
    kind = f"<u{itemsize}"
    if 0 in shape:
        return np.empty(shape, kind)
    channels = (shape[0], 1, shape[2])
    means = np.zeros(channels, np.uint8)
    flips = np.zeros(channels, np.uint8)
    if shape[1] >= _FEWEST_TOKENS:
        means = reader.array("means", "u1", channels)
        count = shape[0] * shape[2]
        flips = np.unpackbits(reader.array("signs", "u1", (-(-count // 8),)), count=count).reshape(channels)
    top = _unpack_plane(reader, shape, decompressor) + means
    turned = top.astype(kind)
    for _ in range(itemsize - 1):
        turned <<= 8
        turned |= _unpack_plane(reader, shape, decompressor)
    turned ^= flips
    words = turned >> 1
    turned <<= 8 * itemsize - 1
    words |= turned
    return words


def _unpack_plane(reader: Reader, shape: tuple[int, ...], decompressor: zstandard.ZstdDecompressor) -> Bytes:
    size = int(np.prod(shape))
    (mode,) = reader.take("plane", 1)
    if mode == _STORED:
        return reader.array("plane", "u1", shape)
    if mode != _CODED:
        raise reader.refuse("plane", f"mode {mode} is unknown")
    coded = reader.take("plane", reader.number("plane", size))
    return np.frombuffer(inflate(reader, "plane", coded, size, decompressor), np.uint8).reshape(shape)


def inflate(
    reader: Reader, field: str, coded: memoryview, size: int, decompressor: zstandard.ZstdDecompressor
) -> bytes:
    """``size`` bytes out of a zstd frame that may claim anything. Raises SnapshotRefused."""
    try:
        # A frame that names its size would have that much allocated.
        if zstandard.get_frame_parameters(coded).content_size not in (zstandard.CONTENTSIZE_UNKNOWN, size):
            raise reader.refuse(field, "its frame is of another size than the layout")
        found = decompressor.decompress(coded, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise reader.refuse(field, str(error)) from None
    if len(found) != size:
        raise reader.refuse(field, f"{len(found):,} bytes, the layout takes {size:,}")
    return found
