"""The one interface of every engine: token ids in, logits out.

An engine knows token ids and nothing of text, sampling or the bus. It never sees two conversations in one cache.

The rule of the pending token: a KV cache always ends before one pending token. ``prefill`` is given all tokens but
the last and returns no logits; the last one is a decode step, by ``step``. A state that was saved and resumed goes
on with exactly the step that the uninterrupted one would have done next, so nothing is cropped and nothing is
computed a second time.

Importing this module imports no tensor library.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from protocol.errors import ContextOverflow, InvalidPrompt, ModelError, SnapshotRefused
from protocol.manifest import ModelDigests, NumericsFingerprint

PREFILL_CHUNK_TOKENS = 256
"""Chunks of a prompt end at absolute multiples of an engine's ``chunk_tokens``, wherever prefill begins: the same
prefix is always cut the same way, whether it was read at once, after a cancellation, or turn by turn from the same
boundary. This is the largest; every engine's divides it."""

NO_POSITIONS = "it was pruned, and this engine counts positions by the rows it holds"
"""Why an engine without ``explicit_positions`` refuses a cache."""

LayerKind = Literal["full", "sliding", "recurrent"]
Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class StateSpec:
    """One array that a recurrent layer keeps, of the same shape at every length."""

    shape: tuple[int, ...]
    dtype: str
    """A key of ``STORAGE_DTYPES``; often float32 in a model of another dtype, since errors add up in it."""
    name: str = ""
    """The engine's own word for it."""

    @property
    def size_bytes(self) -> int:
        """Of the array."""
        return math.prod(self.shape) * STORAGE_DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class LayerSpec:
    """What one layer keeps of the positions it has seen."""

    kind: LayerKind
    """``full`` keeps every position; ``sliding`` the last ``window_tokens - 1``, which with the pending token's
    own make a window; ``recurrent`` (linear attention, short convolutions, Mamba) none of them, but ``states`` that
    all of them have gone into, and that cannot be taken back to an earlier position. A layer that keeps nothing is
    ``full``, with no KV heads."""
    kv_heads: int
    head_dim: int
    window_tokens: int = 0
    """Positions a query of a sliding layer sees, itself included; 0 for any other."""
    states: tuple[StateSpec, ...] = ()
    """Of a recurrent layer, which has no KV heads, or of one that has such a part beside its attention."""

    @property
    def state_bytes(self) -> int:
        """Of all ``states``, whatever the length."""
        return sum(state.size_bytes for state in self.states)

    def held_tokens(self, seen_tokens: int) -> int:
        """Positions this layer holds once ``seen_tokens`` have been written to it."""
        if self.kind == "recurrent":
            return 0
        return seen_tokens if self.kind == "full" else min(seen_tokens, self.window_tokens - 1)


@dataclass(frozen=True)
class ModelSpec:
    """What a conversation needs to know of a model; two engines of equal ``digests`` run the same model."""

    name: str
    layers: tuple[LayerSpec, ...]
    vocab_size: int
    context_tokens: int
    eos_token_ids: frozenset[int]
    dtype: str
    """Of weights, activations and KV: ``bfloat16``, ``float16`` or ``float32``."""
    dtype_reason: str
    """Why that dtype on this hardware."""
    digests: ModelDigests

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one position takes while no window is full."""
        return sum(2 * layer.kv_heads * layer.head_dim for layer in self.layers) * DTYPE_BYTES[self.dtype]

    @property
    def state_bytes(self) -> int:
        """Bytes of all recurrent states of a conversation, whatever its length."""
        return sum(layer.state_bytes for layer in self.layers)


DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

STORAGE_DTYPES: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
}
"""How each dtype's bytes look in numpy, which has no bfloat16: its bits as unsigned integers."""


@dataclass(frozen=True)
class LayerState:
    """One layer's keys and values, outside any engine."""

    kind: LayerKind
    dtype: str
    keys: npt.NDArray[Any]
    """(kv_heads, tokens, head_dim) in ``STORAGE_DTYPES[dtype]``."""
    values: npt.NDArray[Any]
    """The same shape and dtype."""
    seen_tokens: int
    """Positions ever written to the layer; more than it holds when a sliding window has moved on."""
    states: tuple[npt.NDArray[Any], ...] = ()
    """As ``LayerSpec.states`` says; zeros when nothing has been written."""
    positions: npt.NDArray[np.int64] | None = None
    """True positions of its rows, ascending, where a full layer was pruned and not all are held; None: the last ones,
    as many as are held."""

    @property
    def planes(self) -> tuple[npt.NDArray[Any], ...]:
        """All its arrays, in the order in which a snapshot holds them."""
        return (self.keys, self.values, *self.states)

    def prefix(self, spec: LayerSpec, tokens: int) -> LayerState | None:
        """As it was after the first ``tokens`` positions, as views; None when it has not all of them any more."""
        if spec.states:  # What has gone into a state does not come out of it again.
            return self if tokens == self.seen_tokens else None
        if self.positions is not None:
            rows = int(np.searchsorted(self.positions, tokens))
            if tokens > self.seen_tokens:
                return None
            held = None if rows == tokens else self.positions[:rows]
            keys, values = self.keys[:, :rows], self.values[:, :rows]
            return LayerState(self.kind, self.dtype, keys, values, tokens, positions=held)
        first_held = self.seen_tokens - self.keys.shape[1]
        start, end = tokens - spec.held_tokens(tokens) - first_held, tokens - first_held
        if start < 0 or tokens > self.seen_tokens:
            return None
        return LayerState(self.kind, self.dtype, self.keys[:, start:end], self.values[:, start:end], tokens)


class KVCache(ABC):
    """One conversation's keys and values, opaque outside its engine; used by one thread at a time."""

    capacity_tokens: int
    """Positions it may ever hold."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Positions written so far, those included that were pruned."""

    @property
    def pruned(self) -> bool:
        """Whether layers of full attention do not hold all of them: then it is nobody else's beginning."""
        return False

    @property
    @abstractmethod
    def allocated_bytes(self) -> int:
        """Memory that it takes now, room for what is still to come included."""

    def written(self) -> None:  # noqa: B027 - most engines leave nothing open
        """What ``Engine.open_cache`` left open is in its place now."""

    @abstractmethod
    def close(self) -> None:
        """Give its memory back at once; it may not be used after. A second call does nothing."""


ShouldStop = Callable[[], bool]
OnProgress = Callable[[int, int], None]
"""Called with (positions in the cache, positions it will have when the prefill is done)."""


class Engine(ABC):
    """Runs one model. Calls may come from any thread, one at a time."""

    spec: ModelSpec
    fingerprint: NumericsFingerprint
    chunk_tokens: int = PREFILL_CHUNK_TOKENS
    """Chunks of a prompt end at absolute multiples of this; it divides ``PREFILL_CHUNK_TOKENS``."""
    max_batch: int = 1
    """Most conversations that ``step_batch`` computes together."""
    explicit_positions: bool = False
    """Whether a pruned cache (``LayerState.positions``) can be taken in: new tokens are then as far from what is held
    as their true positions say, although fewer are held."""
    most_computed_layers: int = 0
    """First layers, at most, that ``import_computing`` computes without the others."""

    @abstractmethod
    def new_cache(self, capacity_tokens: int) -> KVCache:
        """An empty cache for at most ``capacity_tokens`` positions; memory is taken as it fills.

        Raises ContextOverflow when the model's context is shorter.
        """

    def cache_bytes(self, tokens: int, capacity_tokens: int) -> int:
        """Memory that a cache of ``capacity_tokens`` takes once it has held ``tokens`` positions."""
        values = sum(
            2 * layer.kv_heads * layer.head_dim * layer.held_tokens(min(tokens, capacity_tokens))
            for layer in self.spec.layers
        )
        return values * DTYPE_BYTES[self.spec.dtype] + self.spec.state_bytes

    @abstractmethod
    def prefill(
        self,
        cache: KVCache,
        tokens: Sequence[int],
        should_stop: ShouldStop | None = None,
        on_progress: OnProgress | None = None,
    ) -> int:
        """Append ``tokens`` to the cache, chunk by chunk, without logits.

        ``should_stop`` is asked before each chunk; what was read until then stays, and a later call with the rest
        makes the same chunks. Returns the number of tokens appended.

        Raises InvalidPrompt, ContextOverflow, or ModelError when memory runs out.
        """

    @abstractmethod
    def step(self, cache: KVCache, token: int) -> Logits:
        """Append the pending ``token`` and return the next token's logits, float32 of shape (vocab_size,).

        The array belongs to the caller. Raises as ``prefill``.
        """

    def step_batch(self, steps: Sequence[tuple[KVCache, int]]) -> list[Logits]:
        """``step`` for several conversations at once: (cache, pending token) each, at most ``max_batch`` of them.

        Close to each of them alone, and not bit-equal to it: products of several rows round otherwise than those of
        one. A single one is ``step`` itself. Raises as ``step``, for the first that fails. When the error's
        ``field`` is ``steps[N]``, only step N is at fault and nothing was computed: the others can be tried again
        without it. With any other error every cache of the batch may be unusable.
        """
        return [self.step(cache, token) for cache, token in steps]

    def peek(self, cache: KVCache, token: int) -> Logits:
        """What ``step`` would give, bit for bit; ``cache`` stays as it is, and the next step is the same again.

        Raises as ``step``; here, where a copy of the cache is stepped, also as ``new_cache``.
        """
        forked = self.import_layers(self.export_layers(cache), min(cache.length + 1, self.spec.context_tokens))
        try:
            return self.step(forked, token)
        finally:
            forked.close()

    def read(self, cache: KVCache, tokens: Sequence[int]) -> Logits:
        """Append ``tokens`` and return the logits after each of them, float32 of shape (tokens, vocab_size).

        For measuring: engines may compute several positions at once, which rounds otherwise than steps do. Raises as
        ``prefill``.
        """
        return np.stack([self.step(cache, token) for token in tokens])

    def looked_at(self, _cache: KVCache, _tokens: Sequence[int]) -> npt.NDArray[np.float32] | None:
        """Append tokens and say how strongly each row of full attention was looked at meanwhile, their own included, in
        the cache's order: the largest share of attention that any of them gave it, as the mean over layers and heads.
        None when this engine cannot tell; nothing was appended then. Raises as ``prefill``."""
        return None

    def fork(self, cache: KVCache, tokens: int, capacity_tokens: int) -> KVCache | None:
        """A new cache that begins with the first ``tokens`` positions of ``cache``, copied bit for bit.

        None when they are not held any more, because a sliding window has moved past them or a recurrent state has
        taken in more. Raises as ``new_cache``.
        """
        if tokens != cache.length and self.spec.state_bytes:
            return None
        prefix = [
            layer.prefix(spec, tokens) for layer, spec in zip(self.export_layers(cache), self.spec.layers, strict=True)
        ]
        if any(layer is None for layer in prefix):
            return None
        return self.import_layers([layer for layer in prefix if layer is not None], capacity_tokens)

    @abstractmethod
    def export_layers(self, cache: KVCache) -> list[LayerState]:
        """The cache's content. Where memory allows these are views: copy them before the cache is used again."""

    @abstractmethod
    def import_layers(self, layers: Sequence[LayerState], capacity_tokens: int) -> KVCache:
        """A new cache with ``layers`` copied in, bit for bit.

        Raises SnapshotRefused, before anything is allocated, when they do not fit ``spec``.
        """

    def import_computing(
        self,
        layers: Sequence[LayerState],  # noqa: ARG002 - for engines that can
        tokens: Sequence[int],  # noqa: ARG002
        first: int,
        capacity_tokens: int,  # noqa: ARG002
        should_stop: ShouldStop | None = None,  # noqa: ARG002
    ) -> KVCache:
        """``import_layers``, but the first ``first`` layers are computed from ``tokens``, bit for bit as ``prefill``
        does, and what ``layers`` has of them is not looked at.

        Args:
            tokens: of all positions that ``layers`` hold.
            first: at most ``most_computed_layers``.
            should_stop: asked before each chunk; Cancelled is raised when it says so.

        Raises as ``import_layers`` and ``prefill``, and ModelError when the engine cannot compute layers apart.
        """
        raise ModelError(
            f"computing the first {first} layers of {self.spec.name} apart: this engine computes all or none",
            hint="read the conversation's tokens again",
            reason="all layers or none",
        )

    def open_cache(
        self,
        tokens: int,  # noqa: ARG002 - for engines that can
        capacity_tokens: int,  # noqa: ARG002
    ) -> tuple[KVCache, list[LayerState]] | None:
        """A new cache of ``tokens`` positions that are still to be written, and its layers as views to write them into.

        Another thread may write them, while the engine goes on; the cache is not used before ``KVCache.written`` is
        called, and closed only when nobody writes any more. None where that cannot be: then ``import_layers`` copies.
        Raises as ``new_cache``.
        """
        return None

    def check_restored(self, layers: Sequence[LayerState], capacity_tokens: int) -> int:
        """The positions that ``layers`` hold, once they fit this model and a cache of ``capacity_tokens``.

        Raises SnapshotRefused or ContextOverflow; nothing was allocated.
        """
        check_layers(self.spec, layers)
        if not self.explicit_positions and any(layer.positions is not None for layer in layers):
            raise SnapshotRefused(
                f"restoring a pruned KV cache of {self.spec.name}: {NO_POSITIONS}",
                hint="resume it from its token ids, or on a node whose engine keeps true positions",
                field="kept",
                reason=NO_POSITIONS,
            )
        seen = layers[0].seen_tokens
        if seen > capacity_tokens:
            raise ContextOverflow(
                f"restoring {seen:,} positions into a KV cache of {capacity_tokens:,}",
                hint="ask for a larger capacity",
                field="capacity_tokens",
                reason="too small",
            )
        return seen

    def check_tokens(self, cache: KVCache, tokens: Sequence[int]) -> None:
        """Raises InvalidPrompt or ContextOverflow unless ``tokens`` can be appended to ``cache``."""
        for position, token in enumerate(tokens):
            if not 0 <= token < self.spec.vocab_size:
                raise InvalidPrompt(
                    f"reading a prompt with {self.spec.name}: token {token} at position {cache.length + position} "
                    f"is not in its vocabulary of {self.spec.vocab_size:,}",
                    hint="make the tokens with this model's own tokenizer",
                    field="tokens",
                    reason="unknown token id",
                )
        limit = min(cache.capacity_tokens, self.spec.context_tokens)
        if cache.length + len(tokens) > limit:
            raise ContextOverflow(
                f"running {self.spec.name}: {cache.length + len(tokens):,} positions do not fit its limit of {limit:,}",
                hint="begin a new conversation, or shorten this one",
                field="tokens",
                reason="context full",
            )


def chunk_schedule(chunk_tokens: int) -> str:
    """How a numerics fingerprint names the schedule of prefill."""
    return f"multiples of {chunk_tokens}"


def chunk_ends(start: int, stop: int, chunk_tokens: int) -> list[int]:
    """Ends of the chunks that cover positions ``start`` to ``stop`` (excluded): absolute multiples of
    ``chunk_tokens``, then ``stop``."""
    first = (start // chunk_tokens + 1) * chunk_tokens
    ends = list(range(first, stop, chunk_tokens))
    return [*ends, stop] if stop > start else []


@contextlib.contextmanager
def naming_step(index: int, steps: Sequence[object]) -> Iterator[None]:
    """For ``step_batch``: errors raised within, before anything is computed, name the step that they are about."""
    try:
        yield
    except ModelError as error:
        if len(steps) > 1:
            error.field = f"steps[{index}]"
        raise


def check_layers(spec: ModelSpec, layers: Sequence[LayerState]) -> None:
    """Raises SnapshotRefused unless ``layers`` are a whole state of ``spec``, all of one length."""

    def refuse(field: str, reason: str) -> SnapshotRefused:
        return SnapshotRefused(
            f"restoring a KV cache of {spec.name}: {field}: {reason}",
            hint="resume it on a node that runs the same model, or from its token ids",
            field=field,
            reason=reason,
        )

    if len(layers) != len(spec.layers):
        raise refuse("layers", f"{len(layers)} of them, the model has {len(spec.layers)}")
    pruned = next((layer.positions for layer in layers if layer.kind == "full"), None)
    for index, (own, state) in enumerate(zip(spec.layers, layers, strict=True)):
        held = own.held_tokens(state.seen_tokens)
        if pruned is not None and own.kind == "full":
            held = len(pruned)
            if not _ascending(pruned, state.seen_tokens):
                raise refuse("positions", f"they are not ascending ones below {state.seen_tokens:,}")
        shape = (own.kv_heads, held, own.head_dim)
        if state.kind != own.kind or state.dtype != spec.dtype:
            reason = f"{state.kind} {state.dtype}, the model has {own.kind} {spec.dtype}"
            raise refuse(f"layers[{index}]", reason)
        if state.seen_tokens != layers[0].seen_tokens:
            raise refuse(f"layers[{index}].seen_tokens", "layers are of different lengths")
        if not _equal(state.positions, pruned if own.kind == "full" else None):
            raise refuse(f"layers[{index}].positions", "pruned layers do not hold the same positions")
        for field, array in (("keys", state.keys), ("values", state.values)):
            if array.shape != shape or array.dtype != STORAGE_DTYPES[spec.dtype]:
                raise refuse(f"layers[{index}].{field}", f"{array.dtype} {array.shape}, expected {shape}")
        found = [(array.shape, array.dtype) for array in state.states]
        if found != [(each.shape, STORAGE_DTYPES[each.dtype]) for each in own.states]:
            raise refuse(f"layers[{index}].states", f"{found}, expected {list(own.states)}")


def _equal(one: npt.NDArray[np.int64] | None, other: npt.NDArray[np.int64] | None) -> bool:
    return one is other if one is None or other is None else np.array_equal(one, other)


def _ascending(positions: npt.NDArray[np.int64], seen_tokens: int) -> bool:
    """Whether they are fewer than all positions before ``seen_tokens``, in order."""
    if positions.dtype != np.int64 or positions.ndim != 1 or len(positions) >= seen_tokens:
        return False
    inside = not len(positions) or (positions[0] >= 0 and positions[-1] < seen_tokens)
    return bool(inside and (np.diff(positions) > 0).all())
