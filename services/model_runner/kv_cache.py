"""Preallocated KV caches for transformers models: layer classes for full attention, for sliding windows, and for what
is recurrent, alone or beside attention.

transformers' own dynamic cache concatenates at every step, which copies the whole cache once a token. These layers
write into storage that grows by doubling, and hand out views. A layer's storage is laid out (1, kv_heads, capacity,
head_dim), so that a view of its first positions is what attention reads.

The amount allocated is a function of the positions held and of the capacity alone, so that a resumed cache has the
strides that the uninterrupted one has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionLayer

from protocol.errors import ModelError
from services.model_runner.engine import PREFILL_CHUNK_TOKENS, KVCache, LayerSpec

CONV, RECURRENT = "conv", "recurrent"
"""How the states of transformers' recurrent layers are called; several of a kind have a number after a dot."""
TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

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
    if spec.kind == "recurrent":
        return 0
    if spec.kind == "full":
        return allocated_tokens(tokens, capacity)
    first = allocated_tokens(0, capacity)
    return first if tokens <= first else max(first, 2 * spec.window_tokens + PREFILL_CHUNK_TOKENS)


class Mark(NamedTuple):
    """Where a layer is."""

    seen_tokens: int
    states: list[torch.Tensor]
    held: tuple[int, int] = (0, 0)
    """First row and end of what it holds of its storage, where it has any."""


class _Layer(CacheLayerMixin):
    """What attention of both kinds shares: storage, its growth, and the figures that transformers asks for."""

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
        self.recurrent = _states(spec, device)
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

    def states(self) -> list[torch.Tensor]:
        """The recurrent states, as ``LayerSpec.states`` says."""
        found = []
        for state in self.spec.states:
            assert self.recurrent is not None
            kind, index = _place(state.name)
            tensor = (self.recurrent.conv_states if kind == CONV else self.recurrent.recurrent_states)[index]
            assert tensor is not None
            found.append(tensor[0])
        return found

    @property
    def allocated_bytes(self) -> int:
        """Memory of its storage."""
        states = sum(state.nbytes for state in self.states()) if self.recurrent else 0
        return self.key_storage.nbytes + self.value_storage.nbytes + states

    def release(self) -> None:
        """Give its storage back."""
        self.key_storage = self.value_storage = self.key_storage.new_empty(0)
        self.recurrent = None

    def advance(self, end: int) -> None:
        """The model has read the positions before ``end``; layers that keep them have counted themselves."""

    def restore(
        self, keys: torch.Tensor, values: torch.Tensor, states: Sequence[torch.Tensor], seen_tokens: int
    ) -> None:
        """Copy in keys and values of shape (kv_heads, tokens, head_dim), and states; the layer must be empty."""
        tokens = keys.shape[1]
        self.reserve(tokens)
        self.update(keys.unsqueeze(0), values.unsqueeze(0))
        self._restore_states(states, seen_tokens)
        self.seen_tokens = seen_tokens

    def mark(self) -> Mark:
        """Where it is, for ``go_back``; room for what comes in between must have been reserved before."""
        return Mark(self.seen_tokens, [state.clone() for state in self.states()])

    def go_back(self, mark: Mark) -> None:
        """Be as it was: what was appended since lies behind its end, and is written over."""
        self.seen_tokens = mark.seen_tokens
        self._restore_states(mark.states, mark.seen_tokens)

    def _restore_states(self, states: Sequence[torch.Tensor], seen_tokens: int) -> None:
        if self.recurrent is None:
            return
        for own, state in zip(self.states(), states, strict=True):
            own.copy_(state)
        for index in self.recurrent.has_previous_state:
            self.recurrent.has_previous_state[index] = seen_tokens > 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: storage is there from the start."""

    def get_seq_length(self) -> int:
        return self.seen_tokens

    def get_max_length(self) -> int:
        return self.capacity_tokens


class FullLayer(_Layer):
    """Keeps every position, but those that were pruned: it then holds fewer rows than it has seen, and what comes is
    appended to them. Every row is older than what comes, so a query sees all rows before its own."""

    def __init__(self, spec: LayerSpec, capacity_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        self._rows = 0
        self._kept: npt.NDArray[np.int64] | None = None
        self._kept_of = 0
        super().__init__(spec, capacity_tokens, dtype, device)

    @property
    def positions(self) -> npt.NDArray[np.int64] | None:
        """True positions of its rows; None: all that it has seen."""
        if self._kept is None:
            return None
        return np.concatenate([self._kept, np.arange(self._kept_of, self.seen_tokens)])

    def restore_pruned(
        self, keys: torch.Tensor, values: torch.Tensor, positions: npt.NDArray[np.int64], seen_tokens: int
    ) -> None:
        """Copy in the rows of ``positions``, which are not all before ``seen_tokens``; the layer must be empty."""
        self.restore(keys, values, (), seen_tokens)
        self._kept, self._kept_of = positions.copy(), seen_tokens

    def open(self, tokens: int) -> None:
        """Have so many rows, which somebody else writes; the layer must be empty."""
        self.reserve(tokens)
        self._rows = self.seen_tokens = tokens

    def reserve(self, new_tokens: int) -> None:
        needed = self._rows + new_tokens
        if needed <= self.key_storage.shape[2]:
            return
        keys, values = self.held()
        self._allocate(allocated_tokens(needed, self.capacity_tokens))
        self.key_storage[0, :, : self._rows] = keys
        self.value_storage[0, :, : self._rows] = values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start = self._rows
        count = key_states.shape[2]
        self.key_storage.narrow(2, start, count).copy_(key_states)
        self.value_storage.narrow(2, start, count).copy_(value_states)
        self._rows = end = start + count
        self.seen_tokens += count
        return self.key_storage.narrow(2, 0, end), self.value_storage.narrow(2, 0, end)

    def held(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.key_storage[0, :, : self._rows], self.value_storage[0, :, : self._rows]

    def mark(self) -> Mark:
        return super().mark()._replace(held=(0, self._rows))

    def go_back(self, mark: Mark) -> None:
        super().go_back(mark)
        self._rows = mark.held[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # As if its rows were the last positions: they are all visible, and so are those that they stand for.
        return self._rows + query_length, self.seen_tokens - self._rows


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

    def mark(self) -> Mark:
        return super().mark()._replace(held=(self._start, self._end))

    def go_back(self, mark: Mark) -> None:
        super().go_back(mark)
        self._start, self._end = mark.held

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        held = self._end - self._start
        return held + query_length, self.seen_tokens - held


class RecurrentLayer(_Layer):
    """Keeps states alone, or (``full`` without KV heads) nothing at all; it counts the positions that it is told of."""

    def reserve(self, new_tokens: int) -> None:
        pass

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError("a layer that keeps no keys and values was given some")

    def held(self) -> tuple[torch.Tensor, torch.Tensor]:
        empty = self.key_storage.new_empty((0, self.spec.held_tokens(self.seen_tokens), 0))
        return empty, empty

    def restore(
        self, _keys: torch.Tensor, _values: torch.Tensor, states: Sequence[torch.Tensor], seen_tokens: int
    ) -> None:
        self._restore_states(states, seen_tokens)
        self.seen_tokens = seen_tokens

    def advance(self, end: int) -> None:
        self.seen_tokens = end

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen_tokens + query_length, 0


def _states(spec: LayerSpec, device: torch.device) -> LinearAttentionLayer | None:
    """Where a layer's recurrent states are: written by transformers' own code, and allocated here at once, since they
    have one shape at every length. Until the first position they count as absent, which is not the same as zeros to
    every model."""
    if not spec.states:
        return None
    made: Any = LinearAttentionLayer(number_of_states=1 + max(_place(state.name)[1] for state in spec.states))
    made.device = device
    for state in spec.states:
        kind, index = _place(state.name)
        zeros = torch.zeros((1, *state.shape), dtype=TORCH_DTYPES[state.dtype], device=device)
        if kind == CONV:
            made.dtype = zeros.dtype
            made.conv_states[index] = zeros
            made.conv_kernel_size[index] = state.shape[-1]
            made.is_conv_states_initialized[index] = True
        else:
            made.recurrent_states[index] = zeros
            made.is_recurrent_states_initialized[index] = True
    found: LinearAttentionLayer = made
    return found


def _place(name: str) -> tuple[str, int]:
    """Kind and number of a state: ``conv.0``, ``recurrent.0``."""
    kind, _, number = name.partition(".")
    return kind, int(number)


def _layer_class(spec: LayerSpec) -> type[_Layer]:
    if spec.kind == "recurrent" or not spec.kv_heads:
        return RecurrentLayer
    return SlidingLayer if spec.kind == "sliding" else FullLayer


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

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        layer = self._own[layer_idx]
        if not layer.spec.kv_heads:  # Asked for layer 0 when what is meant is the first one with attention.
            layer = next((each for each in self._own if each.spec.kv_heads), layer)
        return layer.get_mask_sizes(query_length)

    # What the base class asks of layers of its own classes, here of any layer that has recurrent states.

    @property
    def is_linear(self) -> list[bool]:
        return [layer.spec.kind == "recurrent" for layer in self._own]

    @property
    def is_dummy(self) -> list[bool]:
        return [not layer.spec.kv_heads and layer.recurrent is None for layer in self._own]

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        found = self._recurrent(layer_idx)
        return found.conv_states[state_idx] if found.has_previous_state[state_idx] else None

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        found = self._recurrent(layer_idx)
        return found.recurrent_states[state_idx] if found.has_previous_state[state_idx] else None

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        return self._recurrent(layer_idx).update_conv_state(conv_states, state_idx, **kwargs)

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        return self._recurrent(layer_idx).update_recurrent_state(recurrent_states, state_idx, **kwargs)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        if layer_idx is None:
            layer_idx = max(index for index, layer in enumerate(self._own) if layer.recurrent is not None)
        found = self._recurrent(layer_idx).has_previous_state
        return all(found.values()) if state_idx is None else found[state_idx]

    def _recurrent(self, layer_idx: int) -> LinearAttentionLayer:
        found = self._own[layer_idx].recurrent
        if found is None:
            raise ValueError(f"layer {layer_idx} has no recurrent state")
        return found


class TorchKVCache(KVCache):
    """One conversation's cache: a list of layers, and the object that transformers models write to."""

    def __init__(
        self, specs: tuple[LayerSpec, ...], capacity_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.capacity_tokens = capacity_tokens
        self.layers: list[_Layer] = [_layer_class(spec)(spec, capacity_tokens, dtype, device) for spec in specs]
        self.model_cache = _ModelCache(self.layers)
        self._broken = False

    @property
    def length(self) -> int:
        return self.layers[0].seen_tokens

    @property
    def pruned(self) -> bool:
        return any(isinstance(layer, FullLayer) and layer.positions is not None for layer in self.layers)

    @property
    def allocated_bytes(self) -> int:
        return sum(layer.allocated_bytes for layer in self.layers)

    def close(self) -> None:
        self._broken = True
        for layer in self.layers:
            layer.release()

    def advance(self, end: int) -> None:
        """The model has read the positions before ``end``."""
        for layer in self.layers:
            layer.advance(end)

    def reserve(self, new_tokens: int, layers: Sequence[_Layer] | None = None) -> None:
        """Make room in every layer, or in these. Raises ModelError when an earlier failure left this cache half
        written."""
        if self._broken:
            raise ModelError(
                "using a KV cache that was closed, or that an earlier failure left half written",
                hint="make a new cache and read the conversation's tokens again",
                reason="cache incomplete",
            )
        for layer in self.layers if layers is None else layers:
            layer.reserve(new_tokens)

    def marks(self) -> list[Mark]:
        """Where every layer is."""
        return [layer.mark() for layer in self.layers]

    def go_back(self, marks: Sequence[Mark]) -> None:
        """Be as it was when ``marks`` were taken."""
        for layer, mark in zip(self.layers, marks, strict=True):
            layer.go_back(mark)

    def mark_broken(self) -> None:
        """Some layers hold a position that others do not: refuse any further use."""
        self._broken = True
