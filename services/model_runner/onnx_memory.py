"""Where the KV of the onnx engine lies: one row for each conversation, in memory that is taken as it is written.

``RowArena`` reserves address space for many rows of the model's whole context, plane by plane (keys and values of
each layer), each plane laid out (rows, kv_heads, positions, head_dim). Pages of it are had from the kernel when they
are first written, and given back when a row is released, so that a short conversation takes little and nothing ever
grows by copying. Neighbouring rows are a batch: the graph is given a view of them, and a step copies nothing. Rows
are moved next to each other only when the members of a batch change.

What no conversation has written reads as zeros: a page that was given back comes back as zeros.

``DeviceRows`` is the same on a GPU, whose memory is not taken page by page: a row is allocated whole, and stands
alone, so that a batch is computed one conversation after another. It follows ONNX Runtime's documentation
(https://onnxruntime.ai/docs/performance/tune-performance/iobinding.html) and has not been run on a GPU.
"""

from __future__ import annotations

import math
import mmap
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from protocol.errors import ModelError
from services.model_runner.engine import LayerSpec

ARENA_ROWS = 256
"""Conversations whose KV may be in memory at once; address space, not memory."""

_BINDINGS = 64
"""Row ranges whose bindings are kept."""

_MAP_NORESERVE = 0x4000 if not hasattr(mmap, "MAP_NORESERVE") else int(mmap.MAP_NORESERVE)


class Row:
    """One conversation's place; its number changes when it is moved. Everything in it is of one conversation."""

    __slots__ = ("index", "kept_from", "length", "pinned")

    def __init__(self, index: int) -> None:
        self.index = index
        self.length = 0
        """Positions written."""
        self.kept_from = 0
        """Sliding layers hold the positions from this one on; the pages before it have been given back."""
        self.pinned = False
        """Another thread writes into it: it is not moved."""


class Rows(ABC):
    """Where the rows of an engine lie.

    ``values`` chooses between the keys (False) and the values (True) of a layer.
    """

    layers: tuple[LayerSpec, ...]
    positions: int
    """Of each row: the context, rounded up."""
    limit: int
    """Conversations that there is room for."""
    views: bool
    """Whether what ``read`` gives is the memory itself, and can be written to."""

    def __init__(self) -> None:
        self._bindings: OrderedDict[tuple[int, int], Any] = OrderedDict()

    @abstractmethod
    def take(self) -> Row | None:
        """An empty row; None when there is no room for one more."""

    @abstractmethod
    def release(self, row: Row) -> None:
        """Give the row and its memory back."""

    @abstractmethod
    def read(self, row: Row, layer: int, values: bool, start: int, end: int) -> npt.NDArray[Any]:
        """Positions ``start`` to ``end`` of a row: (kv_heads, tokens, head_dim); a view where it can be one."""

    @abstractmethod
    def write(self, row: Row, layer: int, values: bool, start: int, content: npt.NDArray[Any]) -> None:
        """Put (kv_heads, tokens, head_dim) into a row from position ``start`` on."""

    @abstractmethod
    def bytes_of(self, row: Row) -> int:
        """Memory that the row takes now."""

    @abstractmethod
    def bytes_for(self, tokens: int, slack_tokens: int) -> int:
        """Memory that a row takes once ``tokens`` are written, ``slack_tokens`` of sliding layers not trimmed yet."""

    @abstractmethod
    def trim(self, row: Row, keep_from: int) -> None:
        """Sliding layers need nothing before position ``keep_from`` any more."""

    @abstractmethod
    def together(self, rows: Sequence[Row]) -> bool:
        """Make ``rows`` neighbours, so that they can be one batch; False when they cannot be."""

    @abstractmethod
    def _bind(self, binding: Any, past: str, present: str, plane: tuple[int, bool], first: int, rows: int) -> None:
        """Bind neighbouring rows of a plane to the graph's input ``past`` and its output ``present``."""

    def binding(self, session: onnxruntime.InferenceSession, first: int, rows: int) -> Any:
        """The binding of the KV of ``rows`` neighbouring rows, kept from call to call."""
        binding = self._bindings.get((first, rows))
        if binding is None:
            binding = self._bindings[first, rows] = session.io_binding()
            for layer in range(len(self.layers)):
                for values, name in ((False, f"{layer}.key"), (True, f"{layer}.value")):
                    self._bind(binding, f"past_key_values.{name}", f"present.{name}", (layer, values), first, rows)
            if len(self._bindings) > _BINDINGS:
                self._bindings.popitem(last=False)
        return binding


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


class RowArena(Rows):
    """Rows in host memory.

    Args:
        layers: of the model.
        context_tokens: positions that a row must have room for.
        dtype: of the KV.
        rows: how many at most; fewer when the address space is limited.

    Raises ModelError when not even one row can be reserved.
    """

    views = True

    def __init__(
        self, layers: Sequence[LayerSpec], context_tokens: int, dtype: np.dtype[Any], rows: int = ARENA_ROWS
    ) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self._page = mmap.PAGESIZE
        self._itemsize = dtype.itemsize
        # Each head of each row begins on a page, so that pages belong to one conversation.
        step = math.lcm(*(self._page // math.gcd(self._page, spec.head_dim * dtype.itemsize) for spec in layers))
        self.positions = -(-context_tokens // step) * step
        self._lock = threading.RLock()  # A cache may be collected, and so released, on any thread.
        self._planes = self._reserve(rows, dtype)
        self._rows: list[Row | None] = [None] * len(self._planes[0].array)
        self.limit = len(self._rows)

    def _reserve(self, rows: int, dtype: np.dtype[Any]) -> list[_Plane]:
        while True:
            try:
                return [_Plane(spec, rows, self.positions, dtype) for spec in self.layers for _ in range(2)]
            except (OSError, MemoryError, ValueError) as error:
                if rows == 1:
                    raise ModelError(
                        f"reserving address space for a KV cache of {self.positions:,} positions: {error}",
                        hint="raise the limit of the process's address space (ulimit -v), or set a shorter context",
                        reason="out of memory",
                    ) from error
                rows //= 2

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

    def _bind(self, binding: Any, past: str, present: str, plane: tuple[int, bool], first: int, rows: int) -> None:
        view = self._plane(*plane).array[first : first + rows]
        where = ("cpu", 0, view.dtype, view.shape, view.ctypes.data)
        binding.bind_input(past, *where)
        binding.bind_output(present, *where)

    def _plane(self, layer: int, values: bool) -> _Plane:
        return self._planes[2 * layer + values]

    def read(self, row: Row, layer: int, values: bool, start: int, end: int) -> npt.NDArray[Any]:
        return self._plane(layer, values).array[row.index, :, start:end]

    def write(self, row: Row, layer: int, values: bool, start: int, content: npt.NDArray[Any]) -> None:
        self._plane(layer, values).array[row.index, :, start : start + content.shape[1]] = content

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
            if start is None:
                return False
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

    def _cheapest_window(self, rows: Sequence[Row]) -> int | None:
        """The first row of the window into which fewest positions have to be moved, or out of it; None when rows that
        are not moved are in the way of each."""
        members = set(map(id, rows))
        total = sum(row.length for row in rows)
        best_start: int | None = None
        best_cost = float("inf")
        for start in range(len(self._rows) - len(rows) + 1):
            found = [row for row in self._rows[start : start + len(rows)] if row is not None]
            if any(row.pinned for row in found):
                continue
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


class DeviceRows(Rows):
    """Rows in a GPU's memory, each allocated whole."""

    limit = ARENA_ROWS
    views = False

    def __init__(self, layers: Sequence[LayerSpec], context_tokens: int, dtype: np.dtype[Any], device: str) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.positions = context_tokens
        self._dtype = dtype
        self._device = device
        self._planes: dict[int, list[Any]] = {}
        self._next = 0

    def take(self) -> Row | None:
        if len(self._planes) == self.limit:
            return None
        shapes = [(1, spec.kv_heads, self.positions, spec.head_dim) for spec in self.layers for _ in range(2)]
        planes = [
            onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, self._dtype), self._device, 0) for shape in shapes
        ]
        row = Row(self._next)
        self._next += 1
        self._planes[row.index] = planes
        return row

    def release(self, row: Row) -> None:
        self._planes.pop(row.index, None)
        self._bindings.pop((row.index, 1), None)

    def read(self, row: Row, layer: int, values: bool, start: int, end: int) -> npt.NDArray[Any]:
        content: npt.NDArray[Any] = self._planes[row.index][2 * layer + values].numpy()
        return content[0, :, start:end]

    def write(self, row: Row, layer: int, values: bool, start: int, content: npt.NDArray[Any]) -> None:
        plane = self._planes[row.index][2 * layer + values]
        whole = plane.numpy()
        whole[0, :, start : start + content.shape[1]] = content
        plane.update_inplace(whole)

    def bytes_of(self, row: Row) -> int:
        return self.bytes_for(0, 0) if row.index in self._planes else 0

    def bytes_for(self, tokens: int, slack_tokens: int) -> int:  # noqa: ARG002 - a row is allocated whole
        per_position = sum(2 * spec.kv_heads * spec.head_dim for spec in self.layers) * self._dtype.itemsize
        return self.positions * per_position

    def trim(self, row: Row, keep_from: int) -> None:
        row.kept_from = keep_from

    def together(self, rows: Sequence[Row]) -> bool:
        return len(rows) == 1

    def _bind(self, binding: Any, past: str, present: str, plane: tuple[int, bool], first: int, rows: int) -> None:
        assert rows == 1, "rows of a GPU stand alone"
        layer, values = plane
        value = self._planes[first][2 * layer + values]
        binding.bind_ortvalue_input(past, value)
        binding.bind_ortvalue_output(present, value)
