"""Tokens that a lossy rung keeps exactly: a conversation's first ones, and the snapshot's most recent ones.

Every query looks at the first positions (attention sinks, arXiv 2309.17453), whose keys and values are unlike all
others; the most recent ones matter most for what comes next. How many of a block are exact stands in the block, so
that it decodes alike in every snapshot that holds it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from services.model_runner.codecs.base import Array, BlockLayer, BlockLayout, Plane, Reader
from services.model_runner.codecs.lossless import pack_exact, unpack_exact
from services.model_runner.engine import DTYPE_BYTES

SINK_TOKENS = 4
RECENT_TOKENS = 16


def recent_in(layout: BlockLayout, seen_tokens: int, recent_tokens: int = RECENT_TOKENS) -> int:
    """How many of a block's last tokens are among the snapshot's last ``recent_tokens``."""
    behind = seen_tokens - (layout.position + layout.tokens)
    return max(0, min(layout.tokens, recent_tokens - behind))


def sinks_in(layout: BlockLayout) -> int:
    """How many of a block's first tokens are sinks."""
    return max(0, min(layout.tokens, SINK_TOKENS - layout.position))


def pack_rows(planes: Sequence[Plane], layout: BlockLayout, recent: int) -> bytes:
    """The exact tokens of a block, and how many they are."""
    first, last = sinks_in(layout), recent
    arrays = [
        array[:, part]
        for plane, layer in zip(planes, layout.layers, strict=True)
        for array in plane
        for part in _parts(layer, layout, first, last)
    ]
    return bytes([first, last]) + pack_exact(arrays)


def read_counts(reader: Reader, layout: BlockLayout) -> tuple[int, int]:
    """How many of the block's first and last tokens are exact. Raises SnapshotRefused."""
    first, last = reader.take("exact", 2)
    if max(first, last) > layout.tokens:
        raise reader.refuse("exact", f"{first} and {last} tokens of {layout.tokens}")
    return first, last


def unpack_rows(reader: Reader, layout: BlockLayout, planes: Sequence[Plane], first: int, last: int) -> None:
    """Read what ``pack_rows`` wrote after the counts, to the end of ``reader``, into ``planes``.

    Raises SnapshotRefused.
    """
    targets: list[Array] = [
        array[:, part]
        for plane, layer in zip(planes, layout.layers, strict=True)
        for array in plane
        for part in _parts(layer, layout, first, last)
    ]
    found = unpack_exact(reader, [target.shape for target in targets], DTYPE_BYTES[layout.dtype])
    for target, array in zip(targets, found, strict=True):
        if target.size:
            np.copyto(target, array.view(target.dtype))
    reader.end()


def held_rows(layer: BlockLayer, layout: BlockLayout, first: int, last: int) -> slice:
    """The rows of a layer that are not exact; none where all are."""
    head, tail = _parts(layer, layout, first, last)
    return slice(head.stop, tail.start)


def _parts(layer: BlockLayer, layout: BlockLayout, first: int, last: int) -> tuple[slice, slice]:
    """The block's ``first`` and ``last`` tokens, as far as this layer holds them."""
    held_first, begin_last = np.searchsorted(layout.offsets(layer), (first, layout.tokens - last)).tolist()
    return slice(0, held_first), slice(max(held_first, begin_last), layer.tokens)
