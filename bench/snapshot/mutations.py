"""Snapshots changed by chance and by intent, as a reader gets them: every one must be refused before there is room made
for it."""

from __future__ import annotations

import tracemalloc

import msgspec

from bench.mutations import Mutator, Reader, Sent
from bench.report import Figures, Progress
from bench.snapshot.frame import Bench, read_state
from bench.snapshot.texts import measured_texts
from protocol.identity import Identity, Keyring, digest
from protocol.manifest import seal_manifest, snapshot_id
from protocol.provenance import add_statement
from protocol.sealing import DataKey, wrap_key
from services.model_runner import snapshot
from services.model_runner.engine import Engine
from services.model_runner.generation import GenerationState

MUTATIONS = 12_000
MUTATED_TOKENS = 520
"""Three blocks, of which the last is short."""


def part(bench: Bench) -> Figures:
    """Of real snapshots of the model."""
    corpus = bench.chat.encode("\n\n".join(measured_texts().values()), special=False)
    small = read_state(bench.engine, corpus[: MUTATED_TOKENS + 1])
    try:
        return _mutations(bench.engine, small, 100 if bench.quick else MUTATIONS, bench.progress)
    finally:
        small.cache.close()


def _mutations(engine: Engine, state: GenerationState, count: int, progress: Progress) -> Figures:
    """How many of ``count`` mutations of a real snapshot are refused, and the most memory that one took."""
    tomato, sprout = Identity.generate("tomato"), Identity.generate("sprout")
    keyring = Keyring({each.node: each.fingerprint for each in (tomato, sprout)})
    key = DataKey.generate()

    def sent(state: GenerationState, key: DataKey) -> Sent:
        packed = snapshot.pack(engine, state, conversation="bench", creator="tomato", key=key)
        signed = seal_manifest(tomato, packed.manifest)
        signed.wraps = [wrap_key(tomato, key, "sprout", sprout.sealing.public_key)]
        signed.provenance = add_statement(tomato, [], digest(signed.manifest), "created")
        return Sent(snapshot_id(signed), msgspec.msgpack.encode(signed), [bytes(each) for each in packed.chunks])

    genuine = sent(state, key)
    longer = read_state(engine, [*state.tokens, *state.tokens[:20]])
    others = [sent(longer, key), sent(state, DataKey.generate())]
    longer.cache.close()
    reader = Reader(sprout, keyring)
    for each in (genuine, *others):
        reader.take(each)  # it is for their changes that they are refused
    mutator = Mutator(genuine, others, reader)
    tracemalloc.start()
    try:
        outcomes = [mutator.outcome(seed) for seed in range(count)]
    finally:
        tracemalloc.stop()
    refused, peak_bytes = sum(each.refused for each in outcomes), max(each.peak_bytes for each in outcomes)
    progress(f"{refused:,} of {count:,} mutations refused, at most {peak_bytes / 1e3:.0f} kB allocated for one")
    return {
        "mutations": count,
        "mutations_refused": refused,
        "mutation_peak_kb": round(peak_bytes / 1e3, 1),
        "mutated_snapshot_mb": round(sum(map(len, genuine.chunks)) / 1e6, 2),
    }
