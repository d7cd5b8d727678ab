"""Pruned caches: fewer rows than positions, every token at its own, and never taken for what they are not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from edge.db import Database
from protocol.errors import SnapshotRefused
from protocol.identity import Identity, Keyring
from protocol.manifest import SnapshotManifest, open_manifest, open_private, seal_manifest
from protocol.sealing import DataKey
from services.model_runner.codecs import RUNGS
from services.model_runner.codecs.base import block_layouts, block_planes
from services.model_runner.codecs.exact_rows import RECENT_TOKENS, SINK_TOKENS
from services.model_runner.codecs.ladder import decode_blocks, encode_blocks
from services.model_runner.conversations import Conversation, Conversations
from services.model_runner.engine import LayerState
from services.model_runner.generation import GenerationSettings, GenerationState, begin, extend, generate
from services.model_runner.parking import Parking
from services.model_runner.positions import bitmaps_of, from_bitmaps, positions_of, prune
from services.model_runner.prefixes import Prefixes, chunk_keys
from services.model_runner.snapshot import (
    Packed,
    copy,
    layers_of,
    read,
    restore,
    seal,
    unpack,
    why_not_exact,
    with_layers,
)
from services.model_runner.transformers_engine import TransformersEngine

TOKENS = [int(token) for token in np.random.default_rng(5).integers(0, 256, 700)]
KEY = DataKey(bytes(range(32)))
TOMATO = Identity("tomato", bytes(range(32)))
KEYRING = Keyring({"tomato": TOMATO.fingerprint})
LENGTH = 600
KEPT = np.array([*range(4), *range(9, 300, 5), 511, *range(560, LENGTH)])
"""Of 600 positions: all three blocks lose some."""


def load(folder: Path, dtype: str = "float32") -> TransformersEngine:
    return TransformersEngine.load(folder, device="cpu", dtype=dtype, threads=1)


def pruned_layers(engine: TransformersEngine, kept: np.ndarray = KEPT) -> list[LayerState]:
    cache = engine.new_cache(LENGTH + 1)
    engine.prefill(cache, TOKENS[:LENGTH])
    return prune(engine.export_layers(cache), kept)


def answering(engine: TransformersEngine, layers: list[LayerState]) -> GenerationState:
    """A conversation that goes on from a pruned cache."""
    state = begin(engine, TOKENS[: LENGTH + 1], settings=GenerationSettings(8, ignore_eos=True), capacity_tokens=900)
    state.cache = engine.import_layers(layers, 900)
    return state


def stock_logits(folder: Path, kept: np.ndarray, steps: int) -> np.ndarray:
    """The stock model without a cache: later tokens see of the first ones only ``kept``, in full attention."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    total = LENGTH + steps
    position = torch.arange(total)
    full = position[None, :] <= position[:, None]
    hidden = torch.ones(total, dtype=torch.bool)
    hidden[kept], hidden[LENGTH:] = False, False
    window = model.config.sliding_window if hasattr(model.config, "sliding_window") else None
    sliding = full & (position[None, :] > position[:, None] - window) if window else full
    full = full & ~(hidden[None, :] & (position[:, None] >= LENGTH))
    masks = {
        "full_attention": torch.zeros(full.shape).masked_fill(~full, float("-inf"))[None, None],
        "sliding_attention": torch.zeros(full.shape).masked_fill(~sliding, float("-inf"))[None, None],
    }
    mask = masks if window else masks["full_attention"]
    with torch.inference_mode():
        return model(torch.tensor([TOKENS[:total]]), attention_mask=mask).logits[0, LENGTH:].float().numpy()


def test_what_comes_after_a_pruned_cache_has_its_true_position_and_sees_the_held_rows(small_model: Path) -> None:
    engine = load(small_model)
    assert engine.explicit_positions
    steps = 40  # More than a chunk's worth of rows, so that storage grows at the end of it.
    expected = stock_logits(small_model, KEPT, steps)
    by_step = engine.import_layers(pruned_layers(engine), 900)
    assert (by_step.length, by_step.pruned) == (LENGTH, True)
    found = np.stack([engine.step(by_step, token) for token in TOKENS[LENGTH : LENGTH + steps]])
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * expected.std())
    by_chunk = engine.import_layers(pruned_layers(engine), 900)
    found = engine.read(by_chunk, TOKENS[LENGTH : LENGTH + steps])
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * expected.std())


def test_a_pruned_cache_takes_the_memory_of_its_rows_and_gives_them_back_as_they_were(small_model: Path) -> None:
    engine = load(small_model)
    layers = pruned_layers(engine)
    cache = engine.import_layers(layers, 900)
    for own, there in zip(engine.export_layers(cache), layers, strict=True):
        np.testing.assert_array_equal(own.positions, there.positions)
        np.testing.assert_array_equal(own.keys, there.keys)
        assert own.seen_tokens == LENGTH
    engine.step(cache, 5)
    positions = positions_of(engine.export_layers(cache))
    np.testing.assert_array_equal(positions, [*KEPT, LENGTH])
    whole = engine.new_cache(900)
    engine.prefill(whole, TOKENS[:LENGTH])
    assert cache.allocated_bytes < whole.allocated_bytes
    assert not whole.pruned


def test_a_pruned_cache_can_be_forked_pruned_again_and_answered_in_a_batch(engine: TransformersEngine) -> None:
    layers = pruned_layers(engine)
    first, second = (engine.import_layers(layers, 900) for _ in range(2))
    fork = engine.fork(first, LENGTH, 900)
    assert fork is not None
    alone = engine.step(fork, 7)
    np.testing.assert_array_equal(engine.step(first, 7), alone)
    whole = engine.new_cache(900)
    engine.prefill(whole, TOKENS[:100])
    in_a_batch = engine.step_batch([(whole, 3), (second, 7)])[1]
    np.testing.assert_allclose(in_a_batch, alone, atol=0.05 * alone.std())
    earlier = engine.fork(second, 300, 900)
    assert earlier is not None
    np.testing.assert_array_equal(positions_of(engine.export_layers(earlier)), KEPT[KEPT < 300])
    again = prune(engine.export_layers(second), np.array([0, 5, 511]))  # 5 is not held any more
    np.testing.assert_array_equal(positions_of(again), [0, 511])


@pytest.mark.parametrize(
    ("positions", "field"),
    [
        (KEPT[::-1].copy(), "positions"),
        (np.array([0, 0, 1]), "positions"),
        (np.array([-1, 4]), "positions"),
        (np.array([4, LENGTH]), "positions"),
        (np.arange(LENGTH), "positions"),
        (np.array([1.0, 2.0]), "positions"),
        (KEPT[:-1], "layers[0].keys"),
    ],
)
def test_positions_that_cannot_be_are_refused(engine: TransformersEngine, positions: np.ndarray, field: str) -> None:
    layers = [replace(layer, positions=positions) for layer in pruned_layers(engine)]
    with pytest.raises(SnapshotRefused) as caught:
        engine.import_layers(layers, 900)
    assert caught.value.field == field


def test_layers_that_hold_other_positions_than_each_other_are_refused(engine: TransformersEngine) -> None:
    layers = pruned_layers(engine)
    layers[1] = replace(layers[1], positions=np.array([*KEPT[:-1] - (KEPT[:-1] == 511), KEPT[-1]]))
    with pytest.raises(SnapshotRefused, match="same positions") as caught:
        engine.import_layers(layers, 900)
    assert caught.value.field == "layers[1].positions"


def test_an_engine_that_counts_rows_refuses_before_it_allocates(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = pruned_layers(engine)
    manifest, chunks = through_the_wire(saved(engine))
    monkeypatch.setattr(engine, "explicit_positions", False)
    monkeypatch.setattr(engine, "new_cache", lambda _capacity: pytest.fail("a cache was made"))
    with pytest.raises(SnapshotRefused, match="counts positions") as caught:
        engine.import_layers(layers, 900)
    assert caught.value.field == "kept"
    reason = why_not_exact(engine, manifest, lossy=True)
    assert "counts positions" in reason
    found = read(engine, manifest, open_private(manifest, KEY), KEY, chunks, lossy=True)
    assert (found.reason, found.layers, found.tokens) == (reason, [], TOKENS[: LENGTH + 1])


# --- blocks ---------------------------------------------------------------------------------------------------


@given(st.integers(1, 900).flatmap(lambda seen: st.tuples(st.just(seen), st.sets(st.integers(0, seen - 1)))))
def test_bitmaps_say_which_positions_are_held(drawn: tuple[int, set[int]]) -> None:
    seen, kept = drawn
    positions = np.array(sorted(kept), np.int64)
    bitmaps = bitmaps_of(positions, seen)
    if len(kept) == seen:
        assert bitmaps == []
    else:
        found = from_bitmaps(bitmaps, seen)
        assert found is not None
        np.testing.assert_array_equal(found, positions)
        assert len(bitmaps) == -(-seen // 256)


@pytest.mark.parametrize("name", RUNGS)
def test_every_rung_gives_the_held_rows_back_and_sinks_and_recent_ones_exactly(small_model: Path, name: str) -> None:
    engine = load(small_model, "bfloat16")
    layers = pruned_layers(engine)
    rung = RUNGS[name]()
    blocks = encode_blocks(rung, engine.spec, layers)
    found = decode_blocks(rung, engine.spec, blocks, LENGTH, positions=positions_of(layers))
    for own, there in zip(layers, found, strict=True):
        held = np.arange(LENGTH - own.keys.shape[1], LENGTH) if own.positions is None else own.positions
        exact = (held < SINK_TOKENS) | (held >= LENGTH - RECENT_TOKENS) | rung.exact
        for one, other in ((own.keys, there.keys), (own.values, there.values)):
            np.testing.assert_array_equal(one[:, exact], other[:, exact])
            if not rung.exact:  # Of the size of its numbers, at least.
                assert np.corrcoef(as_floats(one).ravel(), as_floats(other).ravel())[0, 1] > 0.98


def as_floats(array: np.ndarray) -> np.ndarray:
    return (array.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("name", RUNGS)
def test_a_block_of_which_nothing_is_kept_is_encoded_as_nothing(engine: TransformersEngine, name: str) -> None:
    layers = pruned_layers(engine, np.arange(512, LENGTH))
    rung = RUNGS[name]()
    blocks = encode_blocks(rung, engine.spec, layers)
    decoded = decode_blocks(rung, engine.spec, blocks, LENGTH, positions=positions_of(layers))
    assert decoded[0].keys.shape == layers[0].keys.shape
    layout = block_layouts(engine.spec, LENGTH, bitmaps_of(positions_of(layers), LENGTH))[0]
    assert not any(plane.keys.size for plane in block_planes(layers, layout))


# --- snapshots ------------------------------------------------------------------------------------------------


def saved(engine: TransformersEngine, kept: np.ndarray = KEPT, codec: Any = None) -> Packed:
    cache = engine.new_cache(900)
    state = begin(engine, TOKENS[: LENGTH + 1], settings=GenerationSettings(8, ignore_eos=True), capacity_tokens=900)
    engine.prefill(cache, TOKENS[:LENGTH])
    state.cache = cache
    copied = copy(engine, state, conversation="talk", creator="tomato", key=KEY)
    copied = with_layers(copied, prune(layers_of(copied), kept))
    chunks: list[bytearray] = []
    return Packed(seal(copied, lambda _, chunk: chunks.append(chunk), codec), chunks)


def through_the_wire(packed: Packed) -> tuple[SnapshotManifest, list[bytes]]:
    manifest = open_manifest(seal_manifest(TOMATO, packed.manifest), KEYRING)
    return manifest, [bytes(chunk) for chunk in packed.chunks]


def test_a_pruned_snapshot_is_resumed_by_who_takes_lossy_ones_and_read_again_by_others(small_model: Path) -> None:
    engine = load(small_model, "bfloat16")
    manifest, chunks = through_the_wire(saved(engine))
    assert manifest.kept_tokens == len(KEPT)
    assert next(layer.tokens for layer in manifest.layers if layer.kind == "full") == len(KEPT)
    assert manifest.certificate is not None
    assert manifest.certificate.measured == []
    again = unpack(engine, manifest, KEY, [])
    assert (again.how, again.reason) == ("recomputed", "it was pruned, so it is not exact")
    found = read(engine, manifest, open_private(manifest, KEY), KEY, chunks, lossy=True)
    resumed = restore(engine, found)
    assert (resumed.how, resumed.state.cache.length) == ("lossy", LENGTH)
    expected = answering(engine, pruned_layers(engine))
    assert list(generate(engine, resumed.state)) == list(generate(engine, expected))


def test_a_conversation_that_goes_on_from_a_pruned_snapshot_is_saved_as_pruned(engine: TransformersEngine) -> None:
    state = answering(engine, pruned_layers(engine))
    list(generate(engine, state))
    extend(engine, state, TOKENS[:250])
    list(generate(engine, state))
    copied = copy(engine, state, conversation="talk", creator="tomato", key=KEY)
    chunks: list[bytearray] = []
    manifest, sealed = through_the_wire(Packed(seal(copied, lambda _, chunk: chunks.append(chunk)), chunks))
    cached = len(state.tokens) - 1
    assert (manifest.cached_tokens, manifest.kept_tokens) == (cached, cached - LENGTH + len(KEPT))
    assert [bool(block.kept) for block in manifest.blocks] == [True, True, True, False]
    found = read(engine, manifest, open_private(manifest, KEY), KEY, sealed, lossy=True)
    resumed = restore(engine, found).state
    np.testing.assert_array_equal(engine.step(resumed.cache, 3), engine.step(state.cache, 3))


def test_a_pruned_part_has_no_address_and_no_chunk_in_common_with_a_whole_one(engine: TransformersEngine) -> None:
    whole, one, other = (
        saved(engine, kept) for kept in (np.arange(LENGTH), KEPT, np.array([*KEPT[:-1] - (KEPT[:-1] == 511), KEPT[-1]]))
    )
    addresses = [set(open_private(each.manifest, KEY).address_list()[:-1]) for each in (whole, one, other)]
    assert not addresses[0] & addresses[1]
    # Those two differ in their second block: what lies before it is the same.
    assert len(addresses[1] & addresses[2]) == 1
    digests = [{ref.digest for ref in each.manifest.chunks} for each in (whole, one, other)]
    assert not digests[0] & digests[1]


def _swap(manifest: SnapshotManifest) -> None:
    """Another set of as many positions: every size agrees, and the keys would be turned wrong."""
    kept = bytearray(manifest.blocks[0].kept)
    kept[0] = (kept[0] << 1) & 0xFF if kept[0] < 0x80 else kept[0] >> 1
    manifest.blocks[0] = msgspec.structs.replace(manifest.blocks[0], kept=bytes(kept))


def test_bitmaps_that_were_changed_by_who_signs_do_not_open(engine: TransformersEngine) -> None:
    manifest, chunks = through_the_wire(saved(engine))
    _swap(manifest)
    with pytest.raises(SnapshotRefused) as caught:
        read(engine, manifest, open_private(manifest, KEY), KEY, chunks, lossy=True)
    assert caught.value.field == "addresses"


# --- beside other conversations -------------------------------------------------------------------------------


def test_a_pruned_cache_is_never_another_conversations_beginning(engine: TransformersEngine) -> None:
    prefixes = Prefixes(engine)
    state = answering(engine, pruned_layers(engine))
    keys = chunk_keys(TOKENS[:LENGTH], engine.chunk_tokens)
    conversation = Conversation("talk", state, [], 0)
    conversation.whole_chunks = keys[:1]  # As if it had them from its own prefill.
    prefixes.read(conversation)
    assert prefixes.fork(keys, 0, 900) is None
    prefixes.keep(keys[0], state.cache, 2**40)
    assert prefixes.allocated_bytes == 0


@pytest.fixture
def conversations(engine: TransformersEngine, db: Database, tmp_path: Path) -> Conversations:
    parking = Parking(
        tmp_path / "parked", engine, identity=TOMATO, most_bytes=2**30, on_drop=lambda _, why: pytest.fail(why)
    )
    on_evict: Callable[[str, str], None] = lambda _name, _left: None  # noqa: E731
    return Conversations(db, engine, in_memory=2, now_us=lambda: 0, on_evict=on_evict, parking=parking)


def test_a_pruned_conversation_is_parked_and_comes_back_as_it_was(
    engine: TransformersEngine, conversations: Conversations
) -> None:
    assert conversations.parking is not None
    conversation = conversations.hold(Conversation("talk", answering(engine, pruned_layers(engine)), [], 0))
    conversations.save(conversation)
    conversations.evict(conversation)
    back = conversations.restore(conversations.parking.fetch("talk").result(60))
    conversations.parking.stop()
    assert back.state.cache.pruned
    expected = answering(engine, pruned_layers(engine))
    assert list(generate(engine, back.state)) == list(generate(engine, expected))
