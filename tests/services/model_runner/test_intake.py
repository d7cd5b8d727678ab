"""A snapshot's chunks taken in as they arrive: in any order, twice, by many threads; what is not right is refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from protocol.errors import SnapshotRefused
from protocol.manifest import open_private
from protocol.sealing import DataKey
from services.model_runner import snapshot
from services.model_runner.codecs.base import Codec
from services.model_runner.codecs.int8 import Int8
from services.model_runner.codecs.raw import Raw
from services.model_runner.generation import begin
from services.model_runner.intake import Intake
from services.model_runner.transformers_engine import TransformersEngine

pytestmark = pytest.mark.model

KEY = DataKey(bytes(range(32)))
PROMPT = [(11 * at) % 250 for at in range(700)]


def packed(engine: TransformersEngine, codec: Codec) -> snapshot.Packed:
    state = begin(engine, PROMPT)
    engine.prefill(state.cache, PROMPT[:-1])
    logits = engine.peek(state.cache, PROMPT[-1])
    found = snapshot.pack(engine, state, conversation="garden", creator="tomato", key=KEY, logits=logits, codec=codec)
    state.cache.close()
    return found


def intake(engine: TransformersEngine, found: snapshot.Packed, key: DataKey = KEY) -> Intake:
    return snapshot.intake(engine, found.manifest, open_private(found.manifest, KEY), key)


def same(one: Intake, other: Intake) -> bool:
    pairs = zip(one.layers(), other.layers(), strict=True)
    return all(np.array_equal(a.keys, b.keys) and np.array_equal(a.values, b.values) for a, b in pairs)


@pytest.mark.parametrize("make", [Raw, Int8])
def test_the_order_of_chunks_and_their_repetition_do_not_matter(
    engine: TransformersEngine, make: Callable[[], Codec]
) -> None:
    found = packed(engine, make())
    straight, mixed = intake(engine, found), intake(engine, found)
    for index, chunk in enumerate(found.chunks):
        assert not straight.whole
        straight.put(index, chunk)
    assert straight.whole
    order = [*range(len(found.chunks)), *range(len(found.chunks))]
    random.Random(4).shuffle(order)
    for index in order:
        mixed.put(index, found.chunks[index])
    assert mixed.whole
    assert same(straight, mixed)
    assert straight.logits is not None
    assert np.array_equal(straight.logits, mixed.logits)  # type: ignore[arg-type]
    assert straight.codec.exact == (make is Raw)


def test_many_threads_put_it_together_as_one_does(engine: TransformersEngine) -> None:
    found = packed(engine, Raw())
    one, many = intake(engine, found), intake(engine, found)
    for index, chunk in enumerate(found.chunks):
        one.put(index, chunk)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda index: many.put(index, found.chunks[index]), [*range(len(found.chunks))] * 3))
    assert many.whole
    assert same(one, many)


def test_layers_that_are_not_whole_are_not_given_out(engine: TransformersEngine) -> None:
    found = packed(engine, Raw())
    taking = intake(engine, found)
    for index, chunk in enumerate(found.chunks[1:], start=1):
        taking.put(index, chunk)
    with pytest.raises(SnapshotRefused, match="not whole"):
        taking.layers()
    taking.put(0, found.chunks[0])
    assert taking.layers()


def test_a_chunk_opens_in_its_own_place_alone_and_the_error_names_its_block(engine: TransformersEngine) -> None:
    found = packed(engine, Raw())
    assert len(found.manifest.blocks) == 3
    taking = intake(engine, found)
    with pytest.raises(SnapshotRefused) as refused:
        taking.put(1, found.chunks[0])
    assert refused.value.field == "blocks[1].full"
    damaged = bytearray(found.chunks[2])
    damaged[20] ^= 1
    with pytest.raises(SnapshotRefused) as refused:
        intake(engine, found).put(2, damaged)
    assert refused.value.field == "blocks[2].full"
    with pytest.raises(SnapshotRefused):
        intake(engine, found, DataKey(bytes(32))).put(0, found.chunks[0])


def test_a_block_that_decrypts_and_does_not_decode_is_refused(engine: TransformersEngine) -> None:
    found = packed(engine, Int8())
    private = open_private(found.manifest, KEY)
    place, part = next(found.manifest.parts())
    role = place.role(private.address_list(), found.manifest.codec, 0)
    nonsense = KEY.seal(role, bytes(part.encoded_bytes))
    with pytest.raises(SnapshotRefused) as refused:
        intake(engine, found).put(0, nonsense)
    assert refused.value.field == "blocks[0].full"
