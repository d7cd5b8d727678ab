"""Which positions the layers of full attention hold, once a cache was pruned: as positions, and as blocks' bitmaps.

The layers of full attention hold the same ones, in ascending order; sliding layers keep their window. Keys stay as
they are, turned by their true positions, and what comes after goes on at its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from protocol.layout import BLOCK_TOKENS
from services.model_runner.engine import LayerState

Positions = npt.NDArray[np.int64]


def positions_of(layers: Sequence[LayerState]) -> Positions | None:
    """What the layers of full attention hold of a pruned cache; None: all positions."""
    return next((layer.positions for layer in layers if layer.kind == "full"), None)


def bitmaps_of(positions: Positions | None, seen_tokens: int) -> list[bytes]:
    """``Block.kept`` of every block of ``seen_tokens`` positions; empty when all are held."""
    if positions is None or len(positions) == seen_tokens:
        return []
    held = np.zeros(seen_tokens, bool)
    held[positions] = True
    blocks = [held[start : start + BLOCK_TOKENS] for start in range(0, seen_tokens, BLOCK_TOKENS)]
    return [b"" if block.all() else np.packbits(block, bitorder="little").tobytes() for block in blocks]


def from_bitmaps(kept: Sequence[bytes], seen_tokens: int) -> Positions | None:
    """The positions that checked bitmaps (``protocol.layout.check_layout``) say; None: all."""
    if not any(kept):
        return None
    found = []
    for start, bitmap in zip(range(0, seen_tokens, BLOCK_TOKENS), kept, strict=True):
        tokens = min(BLOCK_TOKENS, seen_tokens - start)
        found.append(start + (offsets_of(bitmap) if bitmap else np.arange(tokens)))
    return np.concatenate(found)


def offsets_of(bitmap: bytes) -> Positions:
    """The bits that are set, in order."""
    return np.flatnonzero(np.unpackbits(np.frombuffer(bitmap, np.uint8), bitorder="little")).astype(np.int64)


def prune(layers: Sequence[LayerState], kept: Positions) -> list[LayerState]:
    """``layers`` with no more than the positions ``kept`` in those of full attention, copied; the others as they are.

    Positions that are not held any more are left out. Sliding layers keep their window.
    """
    found = []
    for layer in layers:
        if layer.kind == "full":
            seen = layer.seen_tokens
            own = np.arange(seen) if layer.positions is None else layer.positions
            rows = np.flatnonzero(np.isin(own, kept))
            positions = None if len(rows) == seen else own[rows].astype(np.int64)
            layer = replace(layer, keys=layer.keys[:, rows], values=layer.values[:, rows], positions=positions)
        found.append(layer)
    return found
