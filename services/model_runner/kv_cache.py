"""Preallocated KV caches for transformers models: one layer class for full attention, one for sliding windows.

transformers' own dynamic cache concatenates at every step, which copies the whole cache once a token. These layers
write into storage that grows by doubling, and hand out views. A layer's storage is laid out (1, kv_heads, capacity,
head_dim), so that a view of its first positions is what attention reads.

The amount allocated is a function of the positions held and of the capacity alone, so that a resumed cache has the
strides that the uninterrupted one has.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from protocol.errors import ModelError
from services.model_runner.engine import PREFILL_CHUNK_TOKENS, KVCache, LayerSpec

_FIRST_TOKENS = 2 * PREFILL_CHUNK_TOKENS
"""Positions first allocated: enough for a short exchange, so that it never grows."""


def allocated_tokens(held: int, capacity: int) -> int:
    """Positions to allocate for ``held``: the smallest doubling that holds them, at most ``capacity``."""
    size = _FIRST_TOKENS
    while size < held:
        size *= 2
    return min(size, capacity)


def layer_tokens(spec: LayerSpec, tokens: int, capacity: int) -> int:
    """Positions that a layer has storage for once it has held ``tokens``."""
    if spec.kind == "full":
        return allocated_tokens(tokens, capacity)
    first = allocated_tokens(0, capacity)
    return first if tokens <= first else max(first, 2 * spec.window_tokens + PREFILL_CHUNK_TOKENS)


class _Layer(CacheLayerMixin):
    """What both kinds share: storage, its growth, and the figures that transformers asks for."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, spec: LayerSpec, capacity_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.spec = spec
        self.capacity_tokens = capacity_tokens
        self.dtype = dtype
        self.device = device
        self.seen_tokens = 0
        self.is_initialized = True
        self._allocate(allocated_tokens(0, capacity_tokens))

    def _allocate(self, tokens: int) -> None:
        shape = (1, self.spec.kv_heads, tokens, self.spec.head_dim)
        # Storage is set in one assignment, after both allocations: a failure leaves the old one whole.
        keys = torch.empty(shape, dtype=self.dtype, device=self.device)
        values = torch.empty(shape, dtype=self.dtype, device=self.device)
        self.key_storage, self.value_storage = keys, values

    def reserve(self, new_tokens: int) -> None:
        """Make room for ``new_tokens`` more positions; on failure nothing has changed."""
        raise NotImplementedError

    def held(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the keys and values held, (kv_heads, tokens, head_dim)."""
        raise NotImplementedError

    def restore(self, keys: torch.Tensor, values: torch.Tensor, seen_tokens: int) -> None:
        """Copy in keys and values of shape (kv_heads, tokens, head_dim); the layer must be empty."""
        tokens = keys.shape[1]
        self.reserve(tokens)
        self.update(keys.unsqueeze(0), values.unsqueeze(0))
        self.seen_tokens = seen_tokens

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: storage is there from the start."""

    def get_seq_length(self) -> int:
        return self.seen_tokens

    def get_max_length(self) -> int:
        return self.capacity_tokens


class FullLayer(_Layer):
    """Keeps every position."""

    def reserve(self, new_tokens: int) -> None:
        needed = self.seen_tokens + new_tokens
        if needed <= self.key_storage.shape[2]:
            return
        keys, values = self.held()
        self._allocate(allocated_tokens(needed, self.capacity_tokens))
        self.key_storage[0, :, : self.seen_tokens] = keys
        self.value_storage[0, :, : self.seen_tokens] = values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start = self.seen_tokens
        count = key_states.shape[2]
        self.key_storage.narrow(2, start, count).copy_(key_states)
        self.value_storage.narrow(2, start, count).copy_(value_states)
        self.seen_tokens = end = start + count
        return self.key_storage.narrow(2, 0, end), self.value_storage.narrow(2, 0, end)

    def held(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.key_storage[0, :, : self.seen_tokens], self.value_storage[0, :, : self.seen_tokens]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen_tokens + query_length, 0


class SlidingLayer(_Layer):
    """Keeps the last ``window_tokens - 1`` positions.

    Positions are appended to a buffer of twice the window and a chunk; when it is full, those still wanted move to
    its front. One position in that many moves the window, so an append stays cheap and every view contiguous.
    """

    is_sliding = True

    def __init__(self, spec: LayerSpec, capacity_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        self._start = 0
        self._end = 0
        super().__init__(spec, capacity_tokens, dtype, device)

    @property
    def _largest(self) -> int:
        return 2 * self.spec.window_tokens + PREFILL_CHUNK_TOKENS

    def reserve(self, new_tokens: int) -> None:
        if self._end + new_tokens <= self.key_storage.shape[2]:
            return
        keys, values = (tensor.clone() for tensor in self.held())
        kept = keys.shape[1]
        needed = kept + new_tokens
        if needed > self.key_storage.shape[2] or self.key_storage.shape[2] < self._largest:
            self._allocate(min(allocated_tokens(2 * needed, 2**62), max(self._largest, needed)))
        self.key_storage[0, :, :kept] = keys
        self.value_storage[0, :, :kept] = values
        self._start, self._end = 0, kept

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        count = key_states.shape[2]
        self.key_storage.narrow(2, self._end, count).copy_(key_states)
        self.value_storage.narrow(2, self._end, count).copy_(value_states)
        self._end += count
        self.seen_tokens += count
        # The oldest query of this call sees window - 1 positions before itself, the newest the same.
        visible = min(self._end - self._start, self.spec.window_tokens - 1 + count)
        start = self._end - visible
        self._start = self._end - min(visible, self.spec.window_tokens - 1)
        return self.key_storage.narrow(2, start, visible), self.value_storage.narrow(2, start, visible)

    def held(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.key_storage[0, :, self._start : self._end], self.value_storage[0, :, self._start : self._end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        held = self._end - self._start
        return held + query_length, self.seen_tokens - held


class _ModelCache(Cache):
    """transformers' view of the layers."""

    def __init__(self, layers: list[_Layer]) -> None:
        super().__init__(layers=[*layers])
        self._own = layers

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Shorter than the base class's, which looks for offloading and lazy layers at every call.
        return self._own[layer_idx].update(key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._own[layer_idx].seen_tokens


class TorchKVCache(KVCache):
    """One conversation's cache: a list of layers, and the object that transformers models write to."""

    def __init__(
        self, specs: tuple[LayerSpec, ...], capacity_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.capacity_tokens = capacity_tokens
        self.layers: list[_Layer] = [
            (SlidingLayer if spec.kind == "sliding" else FullLayer)(spec, capacity_tokens, dtype, device)
            for spec in specs
        ]
        self.model_cache = _ModelCache(self.layers)
        self._broken = False

    @property
    def length(self) -> int:
        return self.layers[0].seen_tokens

    @property
    def allocated_bytes(self) -> int:
        return sum(layer.key_storage.nbytes + layer.value_storage.nbytes for layer in self.layers)

    def close(self) -> None:
        self._broken = True
        for layer in self.layers:
            layer.key_storage = layer.value_storage = layer.key_storage.new_empty(0)

    def reserve(self, new_tokens: int) -> None:
        """Make room in every layer. Raises ModelError when an earlier failure left this cache half written."""
        if self._broken:
            raise ModelError(
                "using a KV cache that was closed, or that an earlier failure left half written",
                hint="make a new cache and read the conversation's tokens again",
                reason="cache incomplete",
            )
        for layer in self.layers:
            layer.reserve(new_tokens)

    def mark_broken(self) -> None:
        """Some layers hold a position that others do not: refuse any further use."""
        self._broken = True
