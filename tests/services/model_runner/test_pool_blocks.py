"""Blocks of the pool: cut while a prompt is read, sealed, opened and put together again, bit for bit."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from protocol.errors import SnapshotRefused
from protocol.group_key import GroupKey
from protocol.layout import BLOCK_TOKENS
from protocol.manifest import prefix_addresses
from protocol.pool import PoolEntry
from services.model_runner.codecs import RUNGS
from services.model_runner.pool_blocks import (
    Assembly,
    Place,
    check_entry,
    cut_block,
    difference,
    layout_of,
    needed,
    open_block,
    seal_block,
)
from services.model_runner.pool_site import CLOSE_TOLERANCE
from services.model_runner.transformers_engine import TransformersEngine
from tests.services.model_runner.conftest import THREADS, WINDOW

KEY = GroupKey(bytes(range(32)), 1, "tomato", 0)
BLOCKS = 3
TOKENS = [(7 * at * at + at) % 256 for at in range(BLOCKS * BLOCK_TOKENS + 20)]


@pytest.fixture
def any_engine(small_model: Path) -> TransformersEngine:
    return TransformersEngine.load(small_model, name="small", device="cpu", threads=THREADS)


def places(engine: TransformersEngine) -> list[Place]:
    data = np.asarray(TOKENS, dtype="<u4").tobytes()
    addresses = prefix_addresses(engine.spec.digests, data, BLOCKS * BLOCK_TOKENS)[:-1]
    return [Place(at, address, addresses[at - 1] if at else b"") for at, address in enumerate(addresses)]


def read_in_blocks(engine: TransformersEngine) -> list[dict[str, bytes]]:
    """The raw parts of each block, cut when it had just been read."""
    cache = engine.new_cache(len(TOKENS))
    found = []
    for block in range(BLOCKS):
        engine.prefill(cache, TOKENS[block * BLOCK_TOKENS : (block + 1) * BLOCK_TOKENS])
        found.append(cut_block(engine.spec, engine.export_layers(cache), block))
    cache.close()
    return found


def sealed(
    engine: TransformersEngine, raw: dict[str, bytes], place: Place, codec: str = "raw"
) -> tuple[PoolEntry, list[bytearray]]:
    return seal_block(
        engine.spec,
        engine.fingerprint,
        raw,
        place,
        key=KEY,
        creator="tomato",
        created_us=1,
        cost_ms=1,
        codec=RUNGS[codec](),
    )


@pytest.mark.parametrize("codec", ["raw", "lossless"])
def test_going_on_from_pooled_blocks_is_going_on_from_reading_bit_for_bit(
    any_engine: TransformersEngine, codec: str
) -> None:
    engine, spec = any_engine, any_engine.spec
    entries = [
        sealed(engine, raw, place, codec) for raw, place in zip(read_in_blocks(engine), places(engine), strict=True)
    ]
    for blocks in range(1, BLOCKS + 1):
        assembly = Assembly(spec, blocks)
        for place, (entry, chunks) in zip(places(engine)[:blocks], entries, strict=False):
            check_entry(spec, entry, place, KEY)
            kinds = needed(spec, place.block, blocks)
            own = [chunk for kind, chunk in of_kinds(entry, chunks) if kind in kinds]
            assembly.take(place.block, open_block(spec, entry, place, KEY, kinds, own))
        pooled = engine.import_layers(assembly.layers(), len(TOKENS) + 8)
        straight = engine.new_cache(len(TOKENS) + 8)
        engine.prefill(straight, TOKENS[: blocks * BLOCK_TOKENS])
        for cache in (pooled, straight):
            engine.prefill(cache, TOKENS[blocks * BLOCK_TOKENS : -1])
        for token in TOKENS[-1:] * 3:
            assert np.array_equal(engine.step(pooled, token), engine.step(straight, token))
        for one, other in zip(engine.export_layers(pooled), engine.export_layers(straight), strict=True):
            assert np.array_equal(one.keys, other.keys)
            assert np.array_equal(one.values, other.values)


def of_kinds(entry: PoolEntry, chunks: list[bytearray]) -> list[tuple[str, bytearray]]:
    """Each chunk with the kind of its part."""
    kinds = [kind for kind, part in entry.parts() for _ in part.chunks()]
    return list(zip(kinds, chunks, strict=True))


def test_only_the_last_blocks_of_a_window_are_needed_of_sliding_layers(any_engine: TransformersEngine) -> None:
    spec = any_engine.spec
    slides = any(layer.kind == "sliding" for layer in spec.layers)
    assert WINDOW <= BLOCK_TOKENS
    assert [("sliding" in needed(spec, block, 8)) for block in range(8)] == [False] * 7 + [slides]
    held = {
        layer.tokens for layer, own in zip(layout_of(spec, 4).layers, spec.layers, strict=True) if own.window_tokens
    }
    assert held <= {WINDOW - 1}, "a sliding layer's rows of a block are those that its window held at the block's end"


def test_an_entry_of_another_place_model_or_size_is_refused_before_anything_is_decoded(
    any_engine: TransformersEngine,
) -> None:
    spec = any_engine.spec
    first, second, _ = places(any_engine)
    raw = read_in_blocks(any_engine)[0]
    entry, chunks = sealed(any_engine, raw, first)
    other_model = msgspec.structs.replace(entry, digests=msgspec.structs.replace(entry.digests, weights=bytes(32)))
    assert entry.full is not None
    longer = msgspec.structs.replace(entry, full=msgspec.structs.replace(entry.full, encoded_bytes=10**12))
    lossy = msgspec.structs.replace(entry, codec=RUNGS["int8"]().ref)
    for wrong, place, field in (
        (entry, second, "name"),
        (other_model, first, "digests"),
        (longer, first, "full"),
        (lossy, first, "codec"),
        (msgspec.structs.replace(entry, full=None), first, "full"),
        (msgspec.structs.replace(entry, parent=bytes(range(16))), first, "parent"),
    ):
        with pytest.raises(SnapshotRefused) as refused:
            check_entry(spec, wrong, place, KEY)
        assert refused.value.field == field
    kinds = [kind for kind, _ in entry.parts()]
    with pytest.raises(SnapshotRefused):  # a chunk opens in its own place only
        open_block(spec, entry, second, KEY, kinds, chunks)
    lying = msgspec.structs.replace(entry, full=msgspec.structs.replace(entry.full, content=bytes(32)))
    with pytest.raises(SnapshotRefused, match="content"):
        open_block(spec, lying, first, KEY, kinds, chunks)


def test_the_difference_of_two_readings_is_relative_and_of_the_worst_layer(any_engine: TransformersEngine) -> None:
    spec = any_engine.spec
    raw = read_in_blocks(any_engine)[0]
    assert difference(spec, 0, raw, raw) == 0
    zeroed = dict(raw)
    kind = next(iter(raw))
    zeroed[kind] = bytes(len(raw[kind]))
    assert difference(spec, 0, raw, zeroed) == pytest.approx(1.0)
    assert difference(spec, 0, raw, {}) == float("inf")


def test_one_other_token_among_256_is_further_than_witnesses_tolerate(any_engine: TransformersEngine) -> None:
    spec = any_engine.spec
    raw = read_in_blocks(any_engine)[0]
    tokens = list(TOKENS[:BLOCK_TOKENS])
    tokens[-20] = (tokens[-20] + 1) % 256
    cache = any_engine.new_cache(BLOCK_TOKENS)
    any_engine.prefill(cache, tokens)
    other = cut_block(spec, any_engine.export_layers(cache), 0)
    assert difference(spec, 0, raw, other) > CLOSE_TOLERANCE
