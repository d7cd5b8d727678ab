"""Rung ``rotated4``: 4 bits a number after a rotation that makes all channels alike.

Each head's vector of a token is turned by a Hadamard matrix with random signs (QuaRot, arXiv 2404.00456; TurboQuant,
2504.19874), after which its coordinates are close to normally distributed with one size, so that one scale a vector
and the 16 best levels of a normal distribution (Lloyd-Max) serve. Scales are one byte each, steps of an eighth of an
octave, less what the head's median is, and coded by zstd. Sinks and recent tokens are exact.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import zstandard

from services.model_runner.codecs.base import (
    BlockLayout,
    Bytes,
    Codec,
    Floats,
    Plane,
    Reader,
    from_floats,
    number,
    to_floats,
)
from services.model_runner.codecs.exact_rows import pack_rows, read_counts, unpack_rows
from services.model_runner.codecs.lossless import inflate

_LEVELS = np.array(
    [0.12839, 0.38810, 0.65680, 0.94230, 1.25620, 1.61804, 2.06896, 2.73259],
    np.float32,
)
"""Positive half of the 16 Lloyd-Max levels of the standard normal distribution (J. Max, 1960)."""
_BOUNDS = (_LEVELS[1:] + _LEVELS[:-1]) / 2
_STEPS_AN_OCTAVE = 8
_ZERO_SCALE = 160
"""Code of the scale 1: codes of 0 to 255 stand for 2^-20 to 2^11.9."""
_GRID = 32
"""Places a unit, of the grid on which an encoder looks for the nearest level."""
_WINDOW_BYTES = 1 << 22


class Rotated4(Codec):
    """Somewhat below a quarter of the size, and cheap to decode."""

    name = "rotated4"

    def _encode(self, planes: Sequence[Plane], layout: BlockLayout, recent: int) -> bytes:
        codes, numbers = [], []
        for plane in planes:
            for array in plane:
                if array.size:
                    scale_codes, packed = _quantise(to_floats(array, layout.dtype))
                    codes.append(scale_codes)
                    numbers.append(packed)
        medians = b"".join(np.median(each, axis=1).astype(np.uint8).tobytes() for each in codes)
        relative = b"".join((each - np.median(each, axis=1).astype(np.uint8)[:, None]).tobytes() for each in codes)
        coded = zstandard.ZstdCompressor(level=3, write_content_size=False).compress(relative) if relative else b""
        return b"".join(
            [
                medians,
                number(len(coded)),
                coded,
                *(each.tobytes() for each in numbers),
                pack_rows(planes, layout, recent),
            ]
        )

    def _decode(self, data: memoryview, layout: BlockLayout, out: Sequence[Plane] | None) -> Sequence[Plane]:
        reader = Reader(self.name, data)
        held = [layer for layer in layout.layers if 0 not in layer.shape for _ in range(2)]
        heads = [layer.kv_heads for layer in held]
        sizes = [layer.kv_heads * layer.tokens for layer in held]
        medians = reader.array("scales", "u1", (sum(heads),))
        coded = reader.take("scales", reader.number("scales", 2 * sum(sizes) + 1024 if sizes else 0))
        decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES)
        codes_of_all = inflate(reader, "scales", coded, sum(sizes), decompressor) if sizes else b""
        relative = np.frombuffer(codes_of_all, np.uint8)
        packed = [
            reader.array("numbers", "u1", (layer.kv_heads, layer.tokens, -(-layer.head_dim // 2))) for layer in held
        ]
        planes = layout.empty() if out is None else out
        targets = [array for plane in planes for array in plane if array.size]
        head_at = size_at = 0
        for layer, numbers, target in zip(held, packed, targets, strict=True):
            count = layer.kv_heads * layer.tokens
            codes = relative[size_at : size_at + count].reshape(layer.kv_heads, layer.tokens)
            codes = codes + medians[head_at : head_at + layer.kv_heads, None]
            head_at, size_at = head_at + layer.kv_heads, size_at + count
            from_floats(_dequantise(codes, numbers, layer.head_dim), layout.dtype, target)
        first, last = read_counts(reader, layout)
        unpack_rows(reader, layout, planes, first, last)
        return planes


@functools.cache
def rotation(size: int) -> Floats:
    """An orthogonal matrix (size, size): random signs, then a Hadamard matrix times a cosine transform of what is
    left when ``size`` is no power of two. The same on every machine."""
    odd = size
    while odd % 2 == 0:
        odd //= 2
    steps = np.arange(odd)
    matrix = np.cos(np.pi / odd * (steps[None, :] + 0.5) * steps[:, None]) * np.sqrt(2 / odd)
    matrix[0] /= np.sqrt(2)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]]) / np.sqrt(2)
    # SplitMix64 by hand: the streams of numpy's generators are promised for a version, not for ever.
    state = (np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)).copy()
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    signs = np.where((state >> np.uint64(63)).astype(bool), 1.0, -1.0)
    found = np.ascontiguousarray(signs[:, None] * matrix, np.float32)
    found.setflags(write=False)
    return found


@functools.cache
def _pairs() -> npt.NDArray[np.complex64]:
    """The two levels that each byte stands for, as one 8-byte number, so that one look-up gives both."""
    levels = np.concatenate([-_LEVELS[::-1], _LEVELS])
    byte = np.arange(256)
    return np.stack([levels[byte & 15], levels[byte >> 4]], axis=1).astype(np.float32).view(np.complex64)[:, 0]


def _scales(codes: Bytes) -> Floats:
    steps = np.arange(256, dtype=np.float32)
    return np.exp2((steps - _ZERO_SCALE) / _STEPS_AN_OCTAVE).astype(np.float32)[codes]


@functools.cache
def _packed() -> Bytes:
    """Of each two places of the grid, one byte each, as a 16-bit number: the byte of the levels nearest to them."""
    places = (np.arange(256, dtype=np.float32) - 128) / _GRID
    level = np.searchsorted(_BOUNDS, np.abs(places)).astype(np.uint8)
    level = np.where(places < 0, 7 - level, 8 + level)
    return np.ascontiguousarray((level[None, :] | (level[:, None] << 4)).reshape(-1).astype(np.uint8))


def _quantise(values: Floats) -> tuple[Bytes, Bytes]:
    """Codes of the scales (kv_heads, tokens), and two numbers a byte; ``values`` is used up."""
    heads, tokens, size = values.shape
    # A rotation keeps lengths.
    length = np.sqrt(np.einsum("htd,htd->ht", values, values) / size)
    codes = np.rint(np.log2(np.maximum(length, 1e-30)) * _STEPS_AN_OCTAVE) + _ZERO_SCALE
    codes = np.clip(codes, 0, 255).astype(np.uint8)
    values *= (_GRID / _scales(codes))[:, :, None]
    turned = np.matmul(values, rotation(size))
    # A number's level is looked up by its place on a grid of 1/32: a comparison with each bound takes five times as
    # long. To nearest, by the half that is added and the fraction that is cut off.
    turned += 128.5
    np.clip(turned, 1, 255, out=turned)
    places = np.full((heads, tokens, size + size % 2), 128, np.uint8)
    np.copyto(places[:, :, :size], turned, casting="unsafe")
    return codes, _packed()[places.view("<u2")]


def _dequantise(codes: Bytes, packed: Bytes, head_dim: int) -> Floats:
    turned = _pairs()[packed].view(np.float32)[:, :, :head_dim]
    turned *= _scales(codes)[:, :, None]
    found: Floats = turned @ rotation(head_dim).T
    return found
