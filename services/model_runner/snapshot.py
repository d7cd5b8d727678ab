"""The raw, exact codec: a generation state to a manifest and chunks, and back, bit for bit.

The chunks are one stream, cut every 512 KiB: for each layer its keys, then its values, each (kv_heads, tokens,
head_dim), then its recurrent states, all in C order, little-endian, as the manifest's layouts say. Nothing is pickled;
sizes are checked against the model, and against each other, before anything is allocated from them.

The token ids are always in the manifest, so a node whose numerics differ reads them again instead of using the KV.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from protocol.errors import InvalidPrompt, ModelError, SnapshotRefused
from protocol.identity import digest
from protocol.manifest import (
    MANIFEST_VERSION,
    MAX_CHUNK_BYTES,
    ChunkRef,
    LayerLayout,
    ModelDigests,
    NumericsFingerprint,
    SnapshotManifest,
    StateLayout,
)
from services.model_runner.engine import (
    STORAGE_DTYPES,
    Engine,
    LayerState,
    ModelSpec,
    OnProgress,
    ShouldStop,
    StateSpec,
    check_layers,
)
from services.model_runner.generation import GenerationSettings, GenerationState
from services.model_runner.sampling import Sampler

CODEC = "raw"

How = Literal["exact", "recomputed"]


class Packed(NamedTuple):
    """A snapshot before it is signed."""

    manifest: SnapshotManifest
    chunks: list[memoryview]
    """Slices of one buffer, in the order of ``manifest.chunks``."""


class Unpacked(NamedTuple):
    """A resumed state."""

    state: GenerationState
    how: How
    """``exact``: the KV was restored bit for bit, and the next token is the one that would have come.
    ``recomputed``: the tokens are to be read again by the next ``generate``, here, with this node's numerics."""
    reason: str
    """Why it was recomputed; empty when exact."""


class _Progress(msgspec.Struct, forbid_unknown_fields=True):
    """What of the generation state has no field of its own in the manifest."""

    settings: GenerationSettings
    new_tokens: int
    finish_reason: str
    capacity_tokens: int
    extra: dict[str, Any]
    constrained_tokens: int = 0


class Copied(NamedTuple):
    """A generation state taken out of the engine: it may go on at once, and this can be described on any thread."""

    conversation: str
    creator: str
    tokens: list[int]
    sampler: dict[str, Any]
    progress: _Progress
    buffer: npt.NDArray[np.uint8]
    """Keys and values as the chunks hold them."""


def copy(
    engine: Engine, state: GenerationState, *, conversation: str, creator: str, extra: dict[str, Any] | None = None
) -> Copied:
    """Copy ``state``; the worker's part of ``pack``, which see."""
    if not state.prefilled:
        raise ModelError(
            f"saving {conversation}: {state.cache.length:,} of its {len(state.tokens) - 1:,} positions have been read",
            hint="let the prompt be read first: save after its first token, or cancel the run between two tokens",
            reason="prefill not finished",
        )
    layers = engine.export_layers(state.cache)
    buffer = np.empty(sum(plane.nbytes for layer in layers for plane in layer.planes), dtype=np.uint8)
    offset = 0
    for layer in layers:
        for plane in layer.planes:
            # The one copy: it frees the cache to go on, and makes planes contiguous whatever the engine's strides.
            target = buffer[offset : offset + plane.nbytes].view(plane.dtype).reshape(plane.shape)
            np.copyto(target, plane)
            offset += plane.nbytes
    progress = _Progress(
        settings=state.settings,
        new_tokens=state.new_tokens,
        finish_reason=state.finish_reason,
        capacity_tokens=state.cache.capacity_tokens,
        extra=extra or {},
        constrained_tokens=state.constrained_tokens,
    )
    return Copied(conversation, creator, list(state.tokens), state.sampler.to_state(), progress, buffer)


def describe(engine: Engine, copied: Copied) -> Packed:
    """The chunks of a copied state and the manifest that names them."""
    stream = copied.buffer.data
    chunks = [stream[at : at + MAX_CHUNK_BYTES] for at in range(0, len(stream), MAX_CHUNK_BYTES)]
    manifest = SnapshotManifest(
        version=MANIFEST_VERSION,
        model=engine.spec.name,
        digests=engine.spec.digests,
        creator=copied.creator,
        created_us=time.time_ns() // 1000,
        conversation=copied.conversation,
        fingerprint=engine.fingerprint,
        kv_dtype=engine.spec.dtype,
        layers=_layouts(engine.spec, len(copied.tokens) - 1),
        states=_states(engine.spec),
        codec=CODEC,
        codec_params={},
        cached_tokens=len(copied.tokens) - 1,
        tokens=np.asarray(copied.tokens, dtype="<u4").tobytes(),
        sampler=copied.sampler,
        state=msgspec.to_builtins(copied.progress),
        total_bytes=len(stream),
        chunks=[ChunkRef(digest=digest(chunk), size_bytes=len(chunk)) for chunk in chunks],
    )
    return Packed(manifest, chunks)


def pack(
    engine: Engine, state: GenerationState, *, conversation: str, creator: str, extra: dict[str, Any] | None = None
) -> Packed:
    """Copy ``state`` into chunks and describe it; the state may go on at once.

    Args:
        conversation: its name.
        creator: the node whose key will sign.
        extra: what the caller keeps with the state (its messages), plain msgpack types; given back by ``extra_of``.

    Raises ModelError while the prompt has not been read to its end.
    """
    return describe(engine, copy(engine, state, conversation=conversation, creator=creator, extra=extra))


def refusal(engine: Engine, manifest: SnapshotManifest) -> SnapshotRefused | None:
    """Why ``engine`` cannot resume this conversation at all, or None. Asked before any chunk is fetched."""
    spec = engine.spec
    if manifest.digests.tokenizer != spec.digests.tokenizer:
        return refused(
            manifest,
            "digests.tokenizer",
            f"its token ids are of {manifest.model}, another tokenizer than {spec.name}'s",
        )
    try:
        _read_state(engine, manifest)
    except SnapshotRefused as error:
        return error
    return None


def why_not_exact(engine: Engine, manifest: SnapshotManifest) -> str:
    """Why the KV of a snapshot must not be used here, so that its tokens are read again; empty when it may be.

    Bit-equality is promised between equal weights, configurations and fingerprints alone.
    """
    own: ModelDigests | NumericsFingerprint
    theirs: ModelDigests | NumericsFingerprint
    for own, theirs in ((engine.spec.digests, manifest.digests), (engine.fingerprint, manifest.fingerprint)):
        for name in own.__struct_fields__:
            here, there = getattr(own, name), getattr(theirs, name)
            if here != there:
                return f"other {name}: {_brief(there)} there, {_brief(here)} here"
    if manifest.codec != CODEC:
        return f"unknown codec {manifest.codec}"
    return ""


def unpack(engine: Engine, manifest: SnapshotManifest, chunks: Sequence[bytes | memoryview]) -> Unpacked:
    """The state that ``pack`` described.

    ``chunks`` must have been verified against the manifest's digests (``protocol.manifest.verify_chunk``). They may
    be left out (an empty sequence) when ``why_not_exact`` gave a reason. Nothing is allocated before the layouts
    match the model and the sizes match the layouts.

    Raises SnapshotRefused, naming the field.
    """
    error = refusal(engine, manifest)
    if error is not None:
        raise error
    tokens, sampler, progress = _read_state(engine, manifest)
    reason = why_not_exact(engine, manifest)
    capacity = min(progress.capacity_tokens, engine.spec.context_tokens)
    if reason:
        cache = engine.new_cache(capacity)
    else:
        cache = engine.import_layers(_read_layers(engine, manifest, chunks), capacity)
    state = GenerationState(
        tokens=tokens,
        cache=cache,
        sampler=sampler,
        settings=progress.settings,
        new_tokens=progress.new_tokens,
        finish_reason=progress.finish_reason,
        constrained_tokens=progress.constrained_tokens,
    )
    return Unpacked(state, "recomputed" if reason else "exact", reason)


def recompute(
    engine: Engine,
    state: GenerationState,
    should_stop: ShouldStop | None = None,
    on_progress: OnProgress | None = None,
) -> int:
    """Read the tokens of a ``recomputed`` state now, so that it can be saved again. Returns how many were read."""
    missing = state.tokens[state.cache.length : -1]
    return engine.prefill(state.cache, missing, should_stop, on_progress) if missing else 0


def extra_of(manifest: SnapshotManifest) -> dict[str, Any]:
    """What the caller of ``pack`` kept with the state. Raises SnapshotRefused when it is damaged."""
    return _progress(manifest).extra


def _read_state(engine: Engine, manifest: SnapshotManifest) -> tuple[list[int], Sampler, _Progress]:
    """Everything but the KV, checked against the model."""
    spec = engine.spec
    if (
        manifest.cached_tokens < 0
        or len(manifest.tokens) % 4
        or len(manifest.tokens) // 4 != manifest.cached_tokens + 1
    ):
        raise refused(manifest, "tokens", "their number does not match cached_tokens")
    tokens: list[int] = np.frombuffer(manifest.tokens, dtype="<u4").tolist()
    progress = _progress(manifest)
    if not max(1, manifest.cached_tokens) <= min(progress.capacity_tokens, spec.context_tokens):
        raise refused(
            manifest,
            "cached_tokens",
            f"{manifest.cached_tokens:,} positions, its capacity is {progress.capacity_tokens:,} and the model's "
            f"context {spec.context_tokens:,}",
        )
    for name in ("new_tokens", "constrained_tokens"):
        count = getattr(progress, name)
        if not 0 <= count <= len(tokens):
            raise refused(manifest, f"state.{name}", f"{count} of {len(tokens)} tokens")
    if max(tokens) >= spec.vocab_size:
        raise refused(manifest, "tokens", f"token {max(tokens)} is not in the vocabulary of {spec.vocab_size:,}")
    return tokens, Sampler.from_state(manifest.sampler), progress


def _progress(manifest: SnapshotManifest) -> _Progress:
    try:
        return msgspec.convert(manifest.state, _Progress)
    except (msgspec.ValidationError, InvalidPrompt) as error:
        raise refused(manifest, "state", str(error)) from error


def _read_layers(engine: Engine, manifest: SnapshotManifest, chunks: Sequence[bytes | memoryview]) -> list[LayerState]:
    """The layers as arrays over the chunks; only planes that cross a chunk's border are copied."""
    spec = engine.spec
    expected = _layouts(spec, manifest.cached_tokens)
    if manifest.kv_dtype != spec.dtype:
        raise refused(manifest, "kv_dtype", f"{manifest.kv_dtype}, the model runs in {spec.dtype}")
    if manifest.layers != expected:
        raise refused(
            manifest, "layers", f"they are not those of {spec.name} after {manifest.cached_tokens:,} positions"
        )
    if manifest.states != _states(spec):
        raise refused(manifest, "states", f"they are not those of {spec.name}")
    arrays = [_arrays(layout, own.states, spec.dtype) for own, layout in zip(spec.layers, expected, strict=True)]
    total = sum(size for layer in arrays for _, _, size in layer)
    counted = [chunk.size_bytes for chunk in manifest.chunks]
    if manifest.total_bytes != total or sum(counted) != total:
        raise refused(manifest, "total_bytes", f"{manifest.total_bytes:,}, the layers take {total:,}")
    if any(size != MAX_CHUNK_BYTES for size in counted[:-1]):
        raise refused(manifest, "chunks", f"one before the last is not of {MAX_CHUNK_BYTES:,} bytes")
    if [len(chunk) for chunk in chunks] != counted:
        raise refused(manifest, "chunks", f"{len(chunks)} given, or of other sizes than the manifest's {len(counted)}")
    layers = []
    offset = 0
    for own, layout, planned in zip(spec.layers, expected, arrays, strict=True):
        planes: list[npt.NDArray[Any]] = []
        for shape, dtype, size in planned:
            planes.append(_slice(chunks, offset, size).view(dtype).reshape(shape))
            offset += size
        keys, values, *states = planes
        layers.append(LayerState(own.kind, spec.dtype, keys, values, layout.seen_tokens, tuple(states)))
    check_layers(spec, layers)
    return layers


def _arrays(
    layout: LayerLayout, states: Sequence[StateSpec], kv_dtype: str
) -> list[tuple[tuple[int, ...], np.dtype[Any], int]]:
    """Shape, dtype and bytes of a layer's keys, values and states."""
    kv = (layout.kv_heads, layout.tokens, layout.head_dim)
    shapes = [(kv, kv_dtype), (kv, kv_dtype), *((state.shape, state.dtype) for state in states)]
    return [
        (shape, STORAGE_DTYPES[dtype], math.prod(shape) * STORAGE_DTYPES[dtype].itemsize) for shape, dtype in shapes
    ]


def _slice(chunks: Sequence[bytes | memoryview], offset: int, size: int) -> npt.NDArray[np.uint8]:
    """``size`` bytes of the stream from ``offset``: a view where one chunk holds them, else a copy."""
    first, start = divmod(offset, MAX_CHUNK_BYTES)
    if size == 0:
        return np.empty(0, dtype=np.uint8)
    if start + size <= len(chunks[first]):
        return np.frombuffer(chunks[first], dtype=np.uint8, count=size, offset=start)
    joined = np.empty(size, dtype=np.uint8)
    done = 0
    while done < size:
        part = np.frombuffer(chunks[first], dtype=np.uint8)[start : start + size - done]
        joined[done : done + len(part)] = part
        done += len(part)
        first, start = first + 1, 0
    return joined


def _layouts(spec: ModelSpec, seen_tokens: int) -> list[LayerLayout]:
    """The layers of ``spec`` after ``seen_tokens`` positions."""
    return [
        LayerLayout(
            kind=layer.kind,
            kv_heads=layer.kv_heads,
            head_dim=layer.head_dim,
            tokens=layer.held_tokens(seen_tokens),
            seen_tokens=seen_tokens,
            window_tokens=layer.window_tokens,
        )
        for layer in spec.layers
    ]


def _states(spec: ModelSpec) -> list[list[StateLayout]]:
    """Of each layer of ``spec``; empty when none is recurrent."""
    states = [[StateLayout(state.shape, state.dtype) for state in layer.states] for layer in spec.layers]
    return states if any(states) else []


def refused(manifest: SnapshotManifest, field: str, reason: str) -> SnapshotRefused:
    """The error of a snapshot that cannot be used, naming the field."""
    return SnapshotRefused(
        f"resuming the snapshot of {manifest.conversation[:80]!r} by {manifest.creator[:80]!r}: {field}: {reason}",
        hint="resume it on a node that runs the same model",
        field=field,
        reason=reason,
    )


def _brief(value: object) -> str:
    return value.hex()[:12] if isinstance(value, bytes) else str(value)
