"""Where the KV of the onnx engine lies: one row for each conversation, in memory that is taken as it is written.

``RowArena`` reserves address space for many rows of the model's whole context, plane by plane (keys and values of
each layer), each plane laid out (rows, kv_heads, positions, head_dim). Pages of it are had from the kernel when they
are first written, and given back when a row is released, so that a short conversation takes little and nothing ever
grows by copying. Neighbouring rows are a batch: the graph is given a view of them, and a step copies nothing. Rows
are moved next to each other only when the members of a batch change.

What no conversation has written reads as zeros: a page that was given back comes back as zeros.
"""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from protocol.errors import ModelError
from services.model_runner.engine import LayerSpec

ARENA_ROWS = 256
"""Conversations whose KV may be in memory at once; address space, not memory."""

_MAP_NORESERVE = 0x4000 if not hasattr(mmap, "MAP_NORESERVE") else int(mmap.MAP_NORESERVE)


class Row:
    """One conversation's place; its number changes when it is moved. Everything in it is of one conversation."""

    __slots__ = ("index", "kept_from", "length")

    def __init__(self, index: int) -> None:
        self.index = index
        self.length = 0
        """Positions written."""
        self.kept_from = 0
        """Sliding layers hold the positions from this one on; the pages before it have been given back."""


class _Plane:
    """Keys or values of one layer for all rows."""

    def __init__(self, spec: LayerSpec, rows: int, positions: int, dtype: np.dtype[Any]) -> None:
        self.spec = spec
        self.head_bytes = positions * spec.head_dim * dtype.itemsize
        """Of one head of one row: a whole number of pages."""
        self.row_bytes = spec.kv_heads * self.head_bytes
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._map = mmap.mmap(-1, rows * self.row_bytes, flags=flags)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            # A huge page is 2 MB for a head's first positions: sixty planes of three heads would take 360 MB.
            self._map.madvise(mmap.MADV_NOHUGEPAGE)
        self.array: npt.NDArray[Any] = np.frombuffer(self._map, dtype=dtype).reshape(
            rows, spec.kv_heads, positions, spec.head_dim
        )

    def give_back(self, offset: int, size: int) -> None:
        """Return whole pages; they read as zeros afterwards."""
        if size > 0:
            self._map.madvise(mmap.MADV_DONTNEED, offset, size)


class RowArena:
    """Rows in host memory.

    Args:
        layers: of the model.
        context_tokens: positions that a row must have room for.
        dtype: of the KV.
        rows: how many at most; fewer when the address space is limited.

    Raises ModelError when not even one row can be reserved.
    """

    def __init__(
        self, layers: Sequence[LayerSpec], context_tokens: int, dtype: np.dtype[Any], rows: int = ARENA_ROWS
    ) -> None:
        self._layers = tuple(layers)
        self._page = mmap.PAGESIZE
        self._itemsize = dtype.itemsize
        # Each head of each row begins on a page, so that pages belong to one conversation.
        step = math.lcm(*(self._page // math.gcd(self._page, spec.head_dim * dtype.itemsize) for spec in layers))
        self.positions = -(-context_tokens // step) * step
        self._lock = threading.RLock()  # A cache may be collected, and so released, on any thread.
        self._planes = self._reserve(rows, dtype)
        self._rows: list[Row | None] = [None] * len(self._planes[0].array)

    def _reserve(self, rows: int, dtype: np.dtype[Any]) -> list[_Plane]:
        while True:
            try:
                return [_Plane(spec, rows, self.positions, dtype) for spec in self._layers for _ in range(2)]
            except (OSError, MemoryError, ValueError) as error:
                if rows == 1:
                    raise ModelError(
                        f"reserving address space for a KV cache of {self.positions:,} positions: {error}",
                        hint="raise the limit of the process's address space (ulimit -v), or set a shorter context",
                        reason="out of memory",
                    ) from error
                rows //= 2

    @property
    def rows(self) -> int:
        """Conversations that it has room for."""
        return len(self._rows)

    def take(self) -> Row | None:
        """An empty row, the lowest that is free so that those in use lie together; None when all are in use."""
        with self._lock:
            index = next((index for index, row in enumerate(self._rows) if row is None), None)
            if index is None:
                return None
            row = self._rows[index] = Row(index)
            return row

    def release(self, row: Row) -> None:
        """Give the row and its memory back."""
        with self._lock:
            if self._rows[row.index] is row:
                self._rows[row.index] = None
                self._clear(row.index)

    def view(self, layer: int, values: bool, start_row: int, rows: int) -> npt.NDArray[Any]:
        """Keys or values of neighbouring rows: (rows, kv_heads, positions, head_dim), contiguous, not copied."""
        return self._planes[2 * layer + values].array[start_row : start_row + rows]

    def held(self, row: Row, layer: int, values: bool, start: int, end: int) -> npt.NDArray[Any]:
        """Positions ``start`` to ``end`` of a row: a view of (kv_heads, tokens, head_dim)."""
        return self._planes[2 * layer + values].array[row.index, :, start:end]

    def bytes_of(self, row: Row) -> int:
        """Memory that the row's pages take, counted in whole pages from what was written."""
        total = 0
        for plane in self._planes:
            position = plane.spec.head_dim * self._itemsize
            first = self._kept_from(plane.spec, row) * position // self._page
            last = -(-row.length * position // self._page)
            total += plane.spec.kv_heads * (last - first) * self._page
        return total

    def bytes_for(self, tokens: int, slack_tokens: int) -> int:
        """Memory that a row takes once ``tokens`` are written, ``slack_tokens`` of sliding layers not trimmed yet."""
        total = 0
        for plane in self._planes:
            held = tokens if plane.spec.kind == "full" else min(tokens, plane.spec.window_tokens + slack_tokens)
            total += plane.spec.kv_heads * -(-held * plane.spec.head_dim * self._itemsize // self._page) * self._page
        return total

    def trim(self, row: Row, keep_from: int) -> None:
        """Give back the pages of sliding layers that hold only positions before ``keep_from``."""
        with self._lock:
            for plane in self._planes:
                if plane.spec.kind != "sliding":
                    continue
                position = plane.spec.head_dim * self._itemsize
                first = row.kept_from * position // self._page * self._page
                size = keep_from * position // self._page * self._page - first
                for head in range(plane.spec.kv_heads):
                    plane.give_back(row.index * plane.row_bytes + head * plane.head_bytes + first, size)
            row.kept_from = keep_from

    def together(self, rows: Sequence[Row]) -> bool:
        """Make ``rows`` neighbours, moving as few bytes as that takes; False when there is no room to move them.

        A row costs a copy of what it holds, and only when a batch has other members than before.
        """
        with self._lock:
            if self._span(rows) == len(rows):
                return True
            start = self._cheapest_window(rows)
            window = range(start, start + len(rows))
            members = set(map(id, rows))
            outside = [row for row in rows if row.index not in window]
            for index in window:
                found = self._rows[index]
                if found is not None and id(found) in members:
                    continue
                if found is not None:
                    spare = next((at for at, row in enumerate(self._rows) if row is None and at not in window), None)
                    if spare is None:
                        return False
                    self._move(found, spare)
                self._move(outside.pop(), index)
            return True

    @staticmethod
    def _span(rows: Sequence[Row]) -> int:
        indices = [row.index for row in rows]
        return max(indices) - min(indices) + 1

    def _cheapest_window(self, rows: Sequence[Row]) -> int:
        """The first row of the window into which fewest positions have to be moved, or out of it."""
        members = set(map(id, rows))
        total = sum(row.length for row in rows)
        best_start, best_cost = 0, float("inf")
        for start in range(len(self._rows) - len(rows) + 1):
            found = [row for row in self._rows[start : start + len(rows)] if row is not None]
            staying = sum(row.length for row in found if id(row) in members)
            leaving = sum(row.length for row in found if id(row) not in members)
            if total - staying + leaving < best_cost:
                best_start, best_cost = start, total - staying + leaving
        return best_start

    def _move(self, row: Row, index: int) -> None:
        for plane in self._planes:
            start = self._kept_from(plane.spec, row)
            plane.array[index, :, start : row.length] = plane.array[row.index, :, start : row.length]
        self._rows[row.index], self._rows[index] = None, row
        self._clear(row.index)
        row.index = index

    def _clear(self, index: int) -> None:
        for plane in self._planes:
            plane.give_back(index * plane.row_bytes, plane.row_bytes)

    @staticmethod
    def _kept_from(spec: LayerSpec, row: Row) -> int:
        return row.kept_from if spec.kind == "sliding" else 0
