"""Snapshots as they are kept and sent: encoded, encrypted, addressed by content, and back.

Every figure is of the whole way that the model runner goes: the cache copied out of the engine, encoded, sealed; then
every chunk's digest checked, opened, decoded, and taken in by the engine. With the threads that the model runner takes
for it (``sealed_threads``), in memory but for the figures of the store.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from bench.report import Figures, Progress
from bench.snapshot.frame import Bench, read_state
from bench.snapshot.texts import measured_texts
from edge.snapshot_store import SnapshotStore
from edge.spread import spread, threads
from protocol.identity import Identity
from protocol.manifest import SnapshotManifest, open_private, seal_manifest, verify_chunk
from protocol.sealing import DataKey
from services.model_runner import snapshot
from services.model_runner.chat import ChatFormat
from services.model_runner.codecs import RUNGS
from services.model_runner.codecs.base import Codec
from services.model_runner.engine import Engine
from services.model_runner.generation import GenerationState

TOKENS = 4_096
ROUNDS = 5

T = TypeVar("T")


def part(bench: Bench) -> Figures:
    """Of the whole way, by each rung that needs no basis."""
    return measure(bench.engine, bench.chat, bench.progress, tokens=300 if bench.quick else TOKENS)


def measure(engine: Engine, chat: ChatFormat, progress: Progress, *, tokens: int = TOKENS) -> Figures:
    """Seconds a gigabyte of 16-bit KV by each rung that needs no basis."""
    corpus = chat.encode("\n\n".join(measured_texts().values()), special=False)
    state = read_state(engine, corpus[: tokens + 1])
    figures: Figures = {"sealed_tokens": len(state.tokens) - 1, "sealed_threads": threads()}
    try:
        for name, rung in RUNGS.items():
            seal_s, restore_s = _round_trip(engine, state, rung())
            figures[f"{name}_sealed_encode_s_per_gb"] = round(seal_s, 2)
            figures[f"{name}_sealed_restore_s_per_gb"] = round(restore_s, 2)
            figures[f"{name}_sealed_encode_restore_s_per_gb"] = round(seal_s + restore_s, 2)
            progress(f"{name}, sealed: {seal_s:.2f} + {restore_s:.2f} s/GB")
        figures["encode_restore_s_per_gb"] = figures["raw_sealed_encode_restore_s_per_gb"]
        figures |= _store(engine, state)
    finally:
        state.cache.close()
    return figures


def _gigabytes(engine: Engine, state: GenerationState) -> float:
    """Of the KV that the cache holds, at 16 bits a number."""
    layers = engine.export_layers(state.cache)
    return sum(2 * plane.size for layer in layers for plane in (layer.keys, layer.values)) / 1e9


def _round_trip(engine: Engine, state: GenerationState, codec: Codec) -> tuple[float, float]:
    """Seconds a gigabyte to seal and to restore, medians. The first round, which takes memory, does not count."""
    key = DataKey.generate()
    gigabytes = _gigabytes(engine, state)
    seal_s, restore_s = [], []
    for _ in range(1 + ROUNDS):
        took_s, packed = _timed(
            lambda: snapshot.pack(engine, state, conversation="bench", creator="bench", key=key, codec=codec)
        )
        seal_s.append(took_s)
        took_s, restored = _timed(lambda: _restored(engine, packed, key))  # noqa: B023 - called at once
        restore_s.append(took_s)
        restored.state.cache.close()
    return statistics.median(seal_s[1:]) / gigabytes, statistics.median(restore_s[1:]) / gigabytes


def _restored(engine: Engine, packed: snapshot.Packed, key: DataKey) -> snapshot.Unpacked:
    """As a resume does it (``services.model_runner.taking``): into the engine's own memory where it opens that."""
    manifest, chunks, refs = packed.manifest, packed.chunks, packed.manifest.chunks
    private = open_private(manifest, key)
    capacity = snapshot.capacity_of(engine, manifest, private)
    cache, layers = engine.open_cache(manifest.cached_tokens, capacity) or (None, None)
    taken = snapshot.intake(engine, manifest, private, key, layers=layers)

    def take(index: int) -> None:
        verify_chunk(refs[index], chunks[index], index=index)
        taken.put(index, chunks[index])

    spread(take, range(len(refs)))
    return snapshot.restore(engine, snapshot.read_taken(engine, manifest, private, taken, cache=cache))


def _store(engine: Engine, state: GenerationState) -> Figures:
    """The same of the raw rung by way of this disk, each chunk synced; a second snapshot is there already."""
    key = DataKey.generate()
    gigabytes = _gigabytes(engine, state)
    identity = Identity.generate("bench")

    def save(store: SnapshotStore) -> str:
        copied = snapshot.copy(engine, state, conversation="bench", creator="bench", key=key)
        return store.put_manifest(seal_manifest(identity, snapshot.seal(copied, store.put_chunk)))

    with tempfile.TemporaryDirectory(prefix="mindstream-bench-") as scratch:
        store = SnapshotStore(Path(scratch))
        save_s, identifier = _timed(lambda: save(store))
        again_s, _ = _timed(lambda: save(store))
        manifest = msgspec.msgpack.decode(store.manifest(identifier).manifest, type=SnapshotManifest)
        load_s, chunks = _timed(lambda: store.chunks(manifest))
        restored = snapshot.read(engine, manifest, open_private(manifest, key), key, chunks)
        assert not restored.reason
    return {
        "store_save_s_per_gb": round(save_s / gigabytes, 2),
        "store_save_again_s_per_gb": round(again_s / gigabytes, 2),
        "store_load_s_per_gb": round(load_s / gigabytes, 2),
    }


def _timed(call: Callable[[], T]) -> tuple[float, T]:
    started_s = time.perf_counter()
    found = call()
    return time.perf_counter() - started_s, found
