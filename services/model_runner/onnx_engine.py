"""The fast engine: models built for ONNX Runtime, with the KV cache as plain arrays, and no torch on the node.

It runs graphs as onnxruntime-genai's builder writes them (``mindstream models build``): ``past_key_values.N.key``
in, ``present.N.key`` out. Both are bound to the same memory, so that attention appends to the cache where it lies
and a step copies nothing that grows. Several conversations are one batch when their rows are neighbours
(onnx_memory.py); their lengths differ, and each row's is the sum of its attention mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from protocol.errors import ContextOverflow, ModelError, ModelUnavailable, SnapshotRefused
from protocol.manifest import NumericsFingerprint
from services.model_runner.codecs.base import from_floats, to_floats
from services.model_runner.codecs.transform import turn
from services.model_runner.engine import (
    STORAGE_DTYPES,
    Engine,
    KVCache,
    LayerState,
    Logits,
    OnProgress,
    ShouldStop,
    chunk_ends,
    chunk_schedule,
    naming_step,
)
from services.model_runner.onnx_graph import INDICES_NAME
from services.model_runner.onnx_memory import DeviceRows, Row, RowArena, Rows
from services.model_runner.onnx_model import PROVIDERS, RUNTIME_ERRORS, OpenModel, failed, instruction_set, open_model
from services.model_runner.positions import Positions, positions_of

_CHUNK_TOKENS, _SHORT_CHUNK_TOKENS = 64, 32
"""Eight streams that step between two chunks of a prompt wait for one chunk, and the prompt waits for their step: so a
chunk takes between two and five such steps. Where a CPU has no products of 8-bit numbers, it takes longer and is
shorter (measured on AVX2: 95 ms for 32 tokens beside steps of 37 ms, and no slower a token than 64 or 128)."""
_DOT_PRODUCTS = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}
_MAX_BATCH = 8
_MASK_STEP = 64
"""Masks of a batch are as long as the next multiple of this, so that they are rarely of another shape."""
_TRIM_TOKENS = 256
"""Pages that a sliding window has left are given back once in so many positions."""
_SPARE_BYTES = 64 * 1024 * 1024
"""Memory that a prompt must leave to everything else."""


class OnnxKVCache(KVCache):
    """One conversation's row of the arena, taken with its first position."""

    def __init__(self, arena: Rows, capacity_tokens: int) -> None:
        self.capacity_tokens = capacity_tokens
        self.arena = arena
        self.row: Row | None = None
        self.closed = False
        self.kept: Positions | None = None
        """Of a pruned one: the positions that it held when it was taken in, of the first ``kept_of``."""
        self.kept_of = 0

    @property
    def length(self) -> int:
        return self.row.length + self.missing if self.row is not None else 0

    @property
    def missing(self) -> int:
        """Positions that were pruned. The graph takes a row's number for its position, so all keys are turned back by
        as many: what rotary attention sees is how far positions are apart, and that stays."""
        return self.kept_of - len(self.kept) if self.kept is not None else 0

    @property
    def pruned(self) -> bool:
        return self.kept is not None

    @property
    def positions(self) -> Positions | None:
        """True ones of its rows; None: all."""
        return None if self.kept is None else np.concatenate([self.kept, np.arange(self.kept_of, self.length)])

    @property
    def allocated_bytes(self) -> int:
        return self.arena.bytes_of(self.row) if self.row is not None else 0

    def written(self) -> None:
        if self.row is not None:
            self.row.pinned = False

    def close(self) -> None:
        self.closed = True
        row, self.row = self.row, None
        if row is not None:
            self.arena.release(row)

    def __del__(self) -> None:
        self.close()

    def taken_row(self) -> Row:
        """Its row, taken now if need be. Raises ModelError."""
        if self.closed:
            raise ModelError(
                "using a KV cache that was closed",
                hint="make a new cache and read the conversation's tokens again",
                reason="cache closed",
            )
        if self.row is None:
            try:
                self.row = self.arena.take()
            except RUNTIME_ERRORS as error:
                raise ModelError(
                    f"allocating a KV cache on the GPU: {error}",
                    hint="close other conversations, or set a shorter context",
                    reason="out of memory",
                ) from error
        if self.row is None:
            raise ModelError(
                f"making room for another conversation: {self.arena.limit} are in memory already",
                hint="close other conversations",
                reason="out of memory",
            )
        return self.row


class OnnxEngine(Engine):
    """One built model on ONNX Runtime. Made by ``load``."""

    def __init__(self, model: OpenModel) -> None:
        session, spec, provider, precision, threads, self._angles = model
        self.explicit_positions = self._angles is not None
        self.spec = spec
        self.provider = provider
        instructions = instruction_set()
        fast = provider.value != "cpu" or bool(_DOT_PRODUCTS & set(instructions.split("+")))
        self.chunk_tokens = _CHUNK_TOKENS if fast else _SHORT_CHUNK_TOKENS
        self.max_batch = _MAX_BATCH
        self._session = session
        self._dtype = STORAGE_DTYPES[spec.dtype]
        inputs = {each.name: each for each in session.get_inputs()}
        self._has_positions = "position_ids" in inputs
        self._has_indices = INDICES_NAME in inputs
        (logits,) = [each for each in session.get_outputs() if each.name == "logits"]
        self._last_logits_only = logits.shape[1] == 1
        self._logits_dtype = np.dtype(np.float16 if logits.type == "tensor(float16)" else np.float32)
        shape = (spec.layers, spec.context_tokens, self._dtype)
        self._arena: Rows = RowArena(*shape) if provider.value == "cpu" else DeviceRows(*shape, "cuda")
        # What a step changes is changed in place: the graph is bound to these for good.
        self._indices = np.arange(self.chunk_tokens, dtype=np.int64)
        self._ids = np.zeros((self.max_batch, 1), np.int64)
        self._logits = np.zeros((self.max_batch, 1, spec.vocab_size), self._logits_dtype)
        self._ones = np.ones((1, self._arena.positions), np.int64)
        self._positions = np.arange(self._arena.positions, dtype=np.int64)
        self._mask = np.zeros(0, np.int64)
        self.fingerprint = NumericsFingerprint(
            engine="onnxruntime",
            engine_version=f"onnxruntime {onnxruntime.__version__} {PROVIDERS[provider.value]}",
            device="cpu" if provider.value == "cpu" else provider.value,
            instruction_set=instructions,
            dtype=f"{precision} weights, {spec.dtype} KV",
            threads=threads,
            chunk_schedule=chunk_schedule(self.chunk_tokens),
            batch_mode="deterministic",
        )
        self._warm_up()

    @property
    def device(self) -> str:
        """Where it runs: ``cpu``, ``cuda`` or ``tensorrt``."""
        return self.provider.value

    @classmethod
    def load(
        cls, folder: Path, *, name: str = "", provider: str = "auto", threads: int = 0, cache_dir: Path | None = None
    ) -> OnnxEngine:
        """Load the built model in ``folder``; nothing is fetched from anywhere.

        Args:
            folder: holds model.onnx and its weights, genai_config.json, config.json and the tokenizer.
            name: the model's name for people; the folder's by default.
            provider: ``cpu``, ``cuda``, ``tensorrt``, or ``auto``: ``choose_provider``.
            threads: of the pool that computes; 0 takes every core that this process may use.
            cache_dir: where digests of the weights are kept between starts.

        Raises ModelUnavailable when it cannot be loaded, with the reason.
        """
        return cls(open_model(folder, name, provider, threads, cache_dir))

    def new_cache(self, capacity_tokens: int) -> OnnxKVCache:
        if not 0 < capacity_tokens <= self.spec.context_tokens:
            raise ContextOverflow(
                f"making a KV cache of {capacity_tokens:,} positions for {self.spec.name}, whose context is "
                f"{self.spec.context_tokens:,}",
                hint="ask for fewer tokens",
                field="capacity_tokens",
                reason="beyond the context",
            )
        return OnnxKVCache(self._arena, capacity_tokens)

    def cache_bytes(self, tokens: int, capacity_tokens: int) -> int:
        return self._arena.bytes_for(min(tokens, capacity_tokens), _TRIM_TOKENS)

    def prefill(
        self,
        cache: KVCache,
        tokens: Sequence[int],
        should_stop: ShouldStop | None = None,
        on_progress: OnProgress | None = None,
    ) -> int:
        own = self._own(cache)
        self.check_tokens(own, tokens)
        self._check_memory(len(tokens))
        start = own.length
        end = start + len(tokens)
        for chunk_end in chunk_ends(start, end, self.chunk_tokens):
            if should_stop is not None and should_stop():
                break
            self._read(own.taken_row(), tokens[own.length - start : chunk_end - start])
            if on_progress is not None:
                on_progress(own.length, end)
        return own.length - start

    def step(self, cache: KVCache, token: int) -> Logits:
        return self.step_batch([(cache, token)])[0]

    def step_batch(self, steps: Sequence[tuple[KVCache, int]]) -> list[Logits]:
        caches = [self._own(cache) for cache, _ in steps]
        rows = []
        for index, (cache, (_, token)) in enumerate(zip(caches, steps, strict=True)):
            with naming_step(index, steps):
                self.check_tokens(cache, (token,))
                rows.append(cache.taken_row())
        if len(steps) > self.max_batch:
            parts = [steps[at : at + self.max_batch] for at in range(0, len(steps), self.max_batch)]
            return [logits for part in parts for logits in self.step_batch(part)]
        self._check_memory(len(steps))
        if len(set(map(id, rows))) < len(rows):
            raise ModelError(
                f"stepping {len(rows)} conversations of {self.spec.name} at once: one of them is there twice",
                reason="same cache twice",
            )
        if not self._arena.together(rows):
            return [self.step(cache, token) for cache, token in steps]
        first = min(row.index for row in rows)
        for row, (_, token) in zip(rows, steps, strict=True):
            self._ids[row.index - first, 0] = token
        self._compute(first, rows)
        for row in rows:
            self._advance(row, 1)
        return [self._logits[row.index - first, 0].astype(np.float32) for row in rows]

    def peek(self, cache: KVCache, token: int) -> Logits:
        own = self._own(cache)
        self.check_tokens(own, (token,))
        row = own.taken_row()
        self._check_memory(1)
        self._ids[0, 0] = token
        # What the graph writes lies behind the row's length, and the next step writes it again.
        self._compute(row.index, [row])
        found: Logits = self._logits[0, 0].astype(np.float32)
        return found

    def read(self, cache: KVCache, tokens: Sequence[int]) -> Logits:
        own = self._own(cache)
        if self._last_logits_only and not self._has_indices:
            return super().read(cache, tokens)
        self.check_tokens(own, tokens)
        self._check_memory(len(tokens))
        start, rows = own.length, []
        for end in chunk_ends(start, start + len(tokens), self.chunk_tokens):
            chunk = tokens[own.length - start : end - start]
            rows.append(self._read(own.taken_row(), chunk, all_logits=True).astype(np.float32))
        return np.concatenate(rows)

    def export_layers(self, cache: KVCache) -> list[LayerState]:
        own = self._own(cache)
        return self._prefix_of(own, own.length)

    def _pruned_layers(self, own: OnnxKVCache) -> list[LayerState]:
        """The layers of a pruned cache, as they are now."""
        assert own.row is not None
        states = []
        rows, seen = own.row.length, own.length
        for index, spec in enumerate(self.spec.layers):
            full = spec.kind == "full"
            start = 0 if full else rows - spec.held_tokens(seen)
            keys, values = (self._arena.read(own.row, index, plane, start, rows) for plane in (False, True))
            keys = self._turned(keys, index, own.missing)
            positions = own.positions if full else None
            states.append(LayerState(spec.kind, self.spec.dtype, keys, values, seen, positions=positions))
        return states

    def _turned(self, keys: npt.NDArray[Any], layer: int, by: int) -> npt.NDArray[Any]:
        """Keys as if they were ``by`` positions further on."""
        assert self._angles is not None
        heads = to_floats(keys, self.spec.dtype).transpose(1, 0, 2)
        moved = turn(heads, np.full(len(heads), by, np.float64), self._angles[layer]).transpose(1, 0, 2)
        found = np.empty(keys.shape, self._dtype)
        from_floats(np.ascontiguousarray(moved), self.spec.dtype, found)
        return found

    def _import_pruned(
        self, layers: Sequence[LayerState], positions: Positions, seen: int, capacity_tokens: int
    ) -> OnnxKVCache:
        rows = len(positions)
        if any(layer.keys.shape[1] > rows for layer in layers):
            raise SnapshotRefused(
                f"restoring a pruned KV cache of {self.spec.name}: its full layers hold {rows:,} positions, less "
                "than a sliding one",
                hint="resume it from its token ids, or keep as many positions as a window has",
                field="kept",
                reason="fewer rows than a window",
            )
        cache = self.new_cache(capacity_tokens)
        self._check_memory(rows)
        row = cache.taken_row()
        for index, state in enumerate(layers):
            start = rows - state.keys.shape[1]
            self._arena.write(row, index, False, start, self._turned(state.keys, index, rows - seen))
            self._arena.write(row, index, True, start, state.values)
        row.length = rows
        row.kept_from = self._first_needed(rows)
        cache.kept, cache.kept_of = positions.copy(), seen
        return cache

    def _prefix_of(self, own: OnnxKVCache, length: int) -> list[LayerState]:
        """Its layers as they were after ``length`` positions."""
        if own.pruned:
            return self._pruned_layers(own)
        states = []
        for index, spec in enumerate(self.spec.layers):
            start = length - spec.held_tokens(length)
            keys, values = (
                self._arena.read(own.row, index, plane, start, length)
                if own.row is not None
                else np.zeros((spec.kv_heads, 0, spec.head_dim), self._dtype)
                for plane in (False, True)
            )
            states.append(LayerState(spec.kind, self.spec.dtype, keys, values, length))
        return states

    def import_layers(self, layers: Sequence[LayerState], capacity_tokens: int) -> OnnxKVCache:
        length = self.check_restored(layers, capacity_tokens)
        positions = positions_of(layers)
        if positions is not None:
            return self._import_pruned(layers, positions, length, capacity_tokens)
        cache = self.new_cache(capacity_tokens)
        self._check_memory(length)
        row = cache.taken_row()
        for index, state in enumerate(layers):
            start = length - state.keys.shape[1]
            self._arena.write(row, index, False, start, state.keys)
            self._arena.write(row, index, True, start, state.values)
        row.length = length
        row.kept_from = self._first_needed(length)
        return cache

    def open_cache(self, tokens: int, capacity_tokens: int) -> tuple[KVCache, list[LayerState]] | None:
        if not self._arena.views or tokens > capacity_tokens:
            return None
        cache = self.new_cache(capacity_tokens)
        self._check_memory(tokens)
        row = cache.taken_row()
        row.pinned = True
        row.length = tokens
        row.kept_from = self._first_needed(tokens)
        return cache, self._prefix_of(cache, tokens)

    def fork(self, cache: KVCache, tokens: int, capacity_tokens: int) -> OnnxKVCache | None:
        own = self._own(cache)
        if own.pruned:
            forked = super().fork(own, tokens, capacity_tokens)
            assert forked is None or isinstance(forked, OnnxKVCache)
            return forked
        if tokens > own.length or (own.row is not None and own.row.kept_from > self._first_needed(tokens)):
            return None
        return self.import_layers(self._prefix_of(own, tokens), capacity_tokens)

    def _first_needed(self, length: int) -> int:
        """The first position that some sliding layer still needs after ``length`` of them."""
        sliding = [spec for spec in self.spec.layers if spec.kind == "sliding"]
        return min((length - spec.held_tokens(length) for spec in sliding), default=0)

    def _own(self, cache: KVCache) -> OnnxKVCache:
        if not isinstance(cache, OnnxKVCache) or cache.arena is not self._arena:
            raise ModelError(
                f"running {self.spec.name}: the KV cache belongs to another engine",
                hint="make caches with the engine that uses them",
                reason="foreign cache",
            )
        return cache

    # --- the graph ------------------------------------------------------------------------------------------------

    def _read(self, row: Row, tokens: Sequence[int], all_logits: bool = False) -> npt.NDArray[Any]:
        """Append a chunk of a prompt to ``row``. The logits that the graph computed on the way: of every position
        where ``all_logits``."""
        count = len(tokens)
        ids = np.array([tokens], np.int64)
        # Where the graph lets them be chosen, no logits are computed for a prompt.
        rows = (count if all_logits else 0) if self._has_indices else 1 if self._last_logits_only else count
        logits = np.empty((1, rows, self.spec.vocab_size), self._logits_dtype)
        self._run(row.index, ids, self._ones[:, : row.length + count], self._lengths_of([row]), logits)
        self._advance(row, count)
        found: npt.NDArray[Any] = logits[0]
        return found

    def _compute(self, first: int, rows: Sequence[Row]) -> None:
        """One step of neighbouring rows, whose tokens are in ``_ids``; the logits come into ``_logits``."""
        count = len(rows)
        lengths = self._lengths_of(rows)
        if count == 1:
            mask = self._ones[:, : rows[0].length + 1]
        else:
            width = min(-(-(int(lengths.max()) + 1) // _MASK_STEP) * _MASK_STEP, self._arena.positions)
            if self._mask.size < count * width:
                self._mask = np.zeros(2 * self.max_batch * width, np.int64)
            mask = self._mask[: count * width].reshape(count, width)
            np.less_equal(self._positions[:width], lengths, out=mask)
        self._run(first, self._ids[:count], mask, lengths, self._logits[:count])

    @staticmethod
    def _lengths_of(rows: Sequence[Row]) -> npt.NDArray[np.int64]:
        """(rows, 1), in the order in which the rows lie."""
        return np.array([[row.length] for row in sorted(rows, key=lambda row: row.index)], np.int64)

    def _run(
        self,
        first: int,
        ids: npt.NDArray[np.int64],
        mask: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
        logits: npt.NDArray[Any],
    ) -> None:
        """Compute ``ids``, (rows, tokens), on the rows from ``first`` on, whose ``lengths`` are (rows, 1)."""
        rows, tokens = ids.shape
        binding = self._arena.binding(self._session, first, rows)
        binding.bind_input("input_ids", "cpu", 0, np.int64, ids.shape, ids.ctypes.data)
        binding.bind_input("attention_mask", "cpu", 0, np.int64, mask.shape, mask.ctypes.data)
        if self._has_indices:
            indices = self._indices[: logits.shape[1]]
            binding.bind_input(INDICES_NAME, "cpu", 0, np.int64, indices.shape, indices.ctypes.data)
        if self._has_positions:
            positions = lengths + self._positions[:tokens]
            binding.bind_input("position_ids", "cpu", 0, np.int64, positions.shape, positions.ctypes.data)
        binding.bind_output("logits", "cpu", 0, self._logits_dtype, logits.shape, logits.ctypes.data)
        try:
            self._session.run_with_iobinding(binding)
            if self.provider.value != "cpu":
                binding.synchronize_outputs()
        except RUNTIME_ERRORS as error:
            # A row is written only behind its length, which has not moved: the cache is as it was.
            raise failed(self.spec, rows * tokens, error) from error

    def _advance(self, row: Row, count: int) -> None:
        row.length += count
        needed = self._first_needed(row.length)
        if needed >= row.kept_from + _TRIM_TOKENS:
            self._arena.trim(row, needed)

    def _check_memory(self, tokens: int) -> None:
        """Raises ModelError when the KV of ``tokens`` more positions does not fit the memory that is left.

        Pages are taken as they are written, and the kernel ends a process that writes one too many: so it is asked
        before.
        """
        available = _available_bytes() if tokens > 1 else None
        needed = tokens * self.spec.kv_bytes_per_token
        if available is not None and needed + _SPARE_BYTES > available:
            raise ModelError(
                f"reading {tokens:,} tokens with {self.spec.name}: their KV takes {needed:,} bytes, and "
                f"{available:,} are left",
                hint="close other conversations, use a shorter context, or a smaller model",
                reason="out of memory",
            )

    def _warm_up(self) -> None:
        """One step, so that a graph that does not run is refused here."""
        cache = self.new_cache(1)
        try:
            logits = self.step(cache, 0)
        except ModelError as error:
            raise ModelUnavailable(
                f"trying {self.spec.name} with one token: {error.message}",
                hint="build the model again with this version of Mindstream",
                reason="the graph does not run",
            ) from error
        finally:
            cache.close()
        if not np.isfinite(logits).all():
            raise ModelUnavailable(
                f"trying {self.spec.name} with one token: its logits are not finite",
                hint="build the model again: its weights are damaged",
                reason="damaged weights",
            )


def _available_bytes() -> int | None:
    """Memory that can be had without swapping, now; None where the kernel does not say."""
    try:
        with Path("/proc/meminfo").open() as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None
