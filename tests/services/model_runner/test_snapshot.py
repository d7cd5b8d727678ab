"""Snapshots: bit-exact where promised, refused with the reason where not, and never a crash."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from protocol.errors import ModelError, SnapshotRefused
from protocol.identity import Identity, Keyring, digest
from protocol.layout import CodecRef
from protocol.manifest import (
    MAX_CHUNK_BYTES,
    SnapshotManifest,
    open_manifest,
    open_private,
    prefix_addresses,
    seal_manifest,
    seal_private,
    verify_chunk,
)
from protocol.sealing import SEAL_BYTES, DataKey
from services.model_runner.codecs.int8 import Int8
from services.model_runner.codecs.ladder import decode_blocks, encode_blocks
from services.model_runner.codecs.lossless import Lossless
from services.model_runner.engine import Engine
from services.model_runner.generation import GenerationSettings, GenerationState, begin, generate
from services.model_runner.sampling import SamplingSettings
from services.model_runner.snapshot import (
    Packed,
    copy,
    extra_of,
    layers_of,
    pack,
    read,
    recompute,
    refusal,
    restore,
    unpack,
    why_not_exact,
)
from services.model_runner.transformers_engine import TransformersEngine

LONG = [int(token) for token in np.random.default_rng(2).integers(0, 256, 1500)]
KEY = DataKey(bytes(range(32)))
TOMATO = Identity("tomato", bytes(range(32)))
KEYRING = Keyring({"tomato": TOMATO.fingerprint})
SAMPLED = SamplingSettings(temperature=0.8, top_k=100, seed=4)


def started(engine: TransformersEngine, prompt: list[int], new_tokens: int) -> GenerationState:
    state = begin(engine, prompt, sampling=SAMPLED, settings=GenerationSettings(60, ("x",), ignore_eos=True))
    for _ in itertools.islice(generate(engine, state), new_tokens):
        pass
    return state


def through_the_wire(packed: Packed) -> tuple[SnapshotManifest, list[bytes]]:
    manifest = open_manifest(seal_manifest(TOMATO, packed.manifest), KEYRING)
    chunks = [bytes(chunk) for chunk in packed.chunks]
    for index, (ref, chunk) in enumerate(zip(manifest.chunks, chunks, strict=True)):
        verify_chunk(ref, chunk, index=index)
    return manifest, chunks


def saved(engine: Engine, state: GenerationState, **given: Any) -> Packed:
    return pack(engine, state, conversation="talk", creator="tomato", key=KEY, **given)


@pytest.mark.parametrize("prompt_tokens", [1, 38, 39, 41, 300, 1400])
def test_a_resumed_answer_is_the_uninterrupted_one_bit_for_bit(small_model: Path, prompt_tokens: int) -> None:
    engine = TransformersEngine.load(small_model, device="cpu", threads=1)
    uninterrupted = started(engine, LONG[:prompt_tokens], 9)
    packed = saved(engine, uninterrupted, extra={"messages": ["hello"]})
    expected = list(generate(engine, uninterrupted))
    manifest, chunks = through_the_wire(packed)
    assert extra_of(manifest, open_private(manifest, KEY)) == {"messages": ["hello"]}
    other = TransformersEngine.load(small_model, device="cpu", threads=1)
    state, how, reason, _ = unpack(other, manifest, KEY, chunks)
    assert (how, reason) == ("exact", "")
    assert list(generate(other, state)) == expected  # Tokens, and log-probabilities to the last bit.
    assert state.tokens == uninterrupted.tokens
    np.testing.assert_array_equal(other.step(state.cache, 1), engine.step(uninterrupted.cache, 1))


def test_chunks_are_full_but_the_last_of_a_block_and_hold_the_cache_and_no_more(engine: TransformersEngine) -> None:
    state = started(engine, LONG[:1400], 3)
    manifest, chunks = through_the_wire(saved(engine, state))
    assert manifest.cached_tokens == 1402
    assert [block.tokens for block in manifest.blocks] == [256] * 5 + [122]
    assert all(len(chunk) <= MAX_CHUNK_BYTES for chunk in chunks)
    encoded = sum(part.encoded_bytes for _, part in manifest.parts())
    assert encoded == manifest.cached_tokens * engine.spec.kv_bytes_per_token
    assert manifest.total_bytes == encoded + len(chunks) * SEAL_BYTES


def test_snapshots_of_one_conversation_share_the_blocks_of_their_common_prefix(engine: TransformersEngine) -> None:
    state = started(engine, LONG[:600], 3)
    first = through_the_wire(saved(engine, state))[0]
    list(generate(engine, state))
    second = through_the_wire(saved(engine, state))[0]
    assert first.cached_tokens < second.cached_tokens
    assert first.blocks[:2] == second.blocks[:2]
    assert first.blocks[2] != second.blocks[2]
    other = through_the_wire(pack(engine, state, conversation="talk", creator="tomato", key=DataKey.generate()))[0]
    assert not {ref.digest for ref in other.chunks} & {ref.digest for ref in second.chunks}


def test_the_logits_that_were_kept_are_those_of_the_first_step(engine: TransformersEngine) -> None:
    state = started(engine, LONG[:300], 3)
    there = engine.fork(state.cache, state.cache.length, 512)
    assert there is not None
    logits = engine.step(there, state.tokens[-1])
    manifest, chunks = through_the_wire(saved(engine, state, logits=logits))
    resumed = unpack(engine, manifest, KEY, chunks)
    np.testing.assert_array_equal(resumed.logits, logits)
    np.testing.assert_array_equal(engine.step(resumed.state.cache, resumed.state.tokens[-1]), logits)


def test_what_goes_on_after_packing_does_not_change_the_snapshot(engine: TransformersEngine) -> None:
    state = started(engine, LONG[:30], 3)
    packed = saved(engine, state)
    before = [bytes(chunk) for chunk in packed.chunks]
    list(generate(engine, state))
    assert [bytes(chunk) for chunk in packed.chunks] == before


def test_a_snapshot_before_the_prompt_was_read_is_refused(engine: TransformersEngine) -> None:
    state = begin(engine, LONG[:20])
    with pytest.raises(ModelError, match="0 of its 19 positions"):
        saved(engine, state)


def test_another_fingerprint_resumes_from_the_tokens_and_says_so(engine: TransformersEngine) -> None:
    state = started(engine, LONG[:300], 5)
    manifest, _ = through_the_wire(saved(engine, state))
    manifest.fingerprint = msgspec.structs.replace(manifest.fingerprint, threads=64)
    assert why_not_exact(engine, manifest) == f"other threads: 64 there, {engine.fingerprint.threads} here"
    resumed, how, reason, _ = unpack(engine, manifest, KEY, [])
    assert (how, resumed.cache.length, resumed.tokens) == ("recomputed", 0, state.tokens)
    assert "threads" in reason
    assert recompute(engine, resumed) == len(state.tokens) - 1
    assert resumed.prefilled
    assert len(list(generate(engine, resumed))) == 55


def of_another_model(packed: Packed, **digests: Any) -> SnapshotManifest:
    """The same as a node with another model would have saved it: the blocks' addresses are of its digests."""
    manifest = packed.manifest
    private = open_private(manifest, KEY)
    manifest.digests = msgspec.structs.replace(manifest.digests, **digests)
    addresses = prefix_addresses(manifest.digests, private.tokens, manifest.cached_tokens)
    private.addresses = b"".join(addresses)
    return msgspec.structs.replace(manifest, sealed=seal_private(KEY, private))


@pytest.mark.parametrize("changed", [{"weights": bytes(32)}, {"config": bytes(32)}, {"adapters": (bytes(32),)}])
def test_other_weights_or_adapters_resume_from_the_tokens(engine: TransformersEngine, changed: dict[str, Any]) -> None:
    state = started(engine, LONG[:30], 2)
    packed = saved(engine, state)
    manifest = of_another_model(packed, **changed)
    resumed = unpack(engine, manifest, KEY, packed.chunks)
    assert (resumed.how, resumed.state.tokens) == ("recomputed", state.tokens)
    assert next(iter(changed)) in resumed.reason


def test_another_tokenizer_is_refused(engine: TransformersEngine) -> None:
    packed = saved(engine, started(engine, LONG[:30], 2))
    manifest = of_another_model(packed, tokenizer=bytes(32))
    error = refusal(engine, manifest, open_private(manifest, KEY))
    assert error is not None
    assert error.field == "digests.tokenizer"
    with pytest.raises(SnapshotRefused, match="another tokenizer"):
        unpack(engine, manifest, KEY, packed.chunks)


@pytest.mark.parametrize("codec", [CodecRef("raw", 2, {}), CodecRef("zip", 1, {}), CodecRef("raw", 1, {"level": 3})])
def test_an_unknown_codec_or_version_resumes_from_the_tokens(engine: TransformersEngine, codec: CodecRef) -> None:
    manifest, _ = through_the_wire(saved(engine, started(engine, LONG[:30], 2)))
    manifest.codec = codec
    assert unpack(engine, manifest, KEY, []).how == "recomputed"
    assert f"codec '{codec.name}' of version {codec.version}" in why_not_exact(engine, manifest)


def test_an_exact_codec_is_resumed_bit_for_bit_and_is_smaller(engine: TransformersEngine) -> None:
    state = started(engine, LONG[:600], 3)
    plain, packed = saved(engine, state), saved(engine, state, codec=Lossless())
    manifest, chunks = through_the_wire(packed)
    assert manifest.codec == CodecRef("lossless", 1, {})
    assert manifest.total_bytes < 0.9 * plain.manifest.total_bytes
    resumed = unpack(engine, manifest, KEY, chunks)
    assert (resumed.how, resumed.reason) == ("exact", "")
    for here, there in zip(engine.export_layers(state.cache), engine.export_layers(resumed.state.cache), strict=True):
        np.testing.assert_array_equal(here.keys, there.keys)
        np.testing.assert_array_equal(here.values, there.values)


def test_a_codec_that_is_not_exact_is_resumed_from_the_tokens(engine: TransformersEngine) -> None:
    state = started(engine, LONG[:300], 3)
    manifest, _ = through_the_wire(saved(engine, state, codec=Int8()))
    resumed = unpack(engine, manifest, KEY, [])
    assert (resumed.how, resumed.reason) == ("recomputed", "codec int8 is not exact")


def test_who_takes_a_lossy_codec_gets_its_cache_and_is_told(engine: TransformersEngine) -> None:
    state = started(engine, LONG[:600], 3)
    manifest, chunks = through_the_wire(saved(engine, state, codec=Int8()))
    found = read(engine, manifest, open_private(manifest, KEY), KEY, chunks, lossy=True)
    resumed = restore(engine, found)
    assert (resumed.how, resumed.reason, resumed.state.cache.length) == ("lossy", "", state.cache.length)
    own = decode_blocks(
        Int8(),
        engine.spec,
        encode_blocks(Int8(), engine.spec, engine.export_layers(state.cache)),
        manifest.cached_tokens,
    )
    for there, here in zip(found.layers, own, strict=True):
        np.testing.assert_array_equal(there.keys, here.keys)
        np.testing.assert_array_equal(there.values, here.values)


def test_a_copied_cache_can_be_looked_at_as_layers_before_it_is_sealed(engine: TransformersEngine) -> None:
    state = started(engine, LONG[:600], 3)
    copied = copy(engine, state, conversation="talk", creator="tomato", key=KEY)
    for there, here in zip(layers_of(copied), engine.export_layers(state.cache), strict=True):
        assert (there.kind, there.seen_tokens) == (here.kind, here.seen_tokens)
        for one, other in zip(there.planes, here.planes, strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_block_that_was_encoded_wrong_is_refused_by_its_place(engine: TransformersEngine) -> None:
    """Sealed and signed by its creator, and still no block of this codec."""
    state = started(engine, LONG[:30], 2)
    packed = saved(engine, state)
    packed.manifest.codec = CodecRef("lossless", 1, {})
    place, part = next(packed.manifest.parts())
    addresses = open_private(packed.manifest, KEY).address_list()
    sealed = bytes(KEY.seal(place.role(addresses, packed.manifest.codec, 0), b"not a block" * 9))
    part.encoded_bytes, part.digests = 99, digest(sealed)
    packed.manifest.total_bytes = len(sealed)
    manifest = open_manifest(seal_manifest(TOMATO, packed.manifest), KEYRING)
    with pytest.raises(SnapshotRefused) as caught:
        unpack(engine, manifest, KEY, [sealed])
    assert caught.value.field == "blocks[0].full"


def test_chunks_that_changed_places_do_not_open(engine: TransformersEngine) -> None:
    """Signed by its creator and whole, and still not what it says."""
    manifest, chunks = through_the_wire(saved(engine, started(engine, LONG[:600], 2)))
    first, second = manifest.blocks[0], manifest.blocks[1]
    manifest.blocks[:2] = [second, first]
    count = len(list(first.full.chunks())) if first.full else 0
    swapped = [*chunks[count : 2 * count], *chunks[:count], *chunks[2 * count :]]
    with pytest.raises(SnapshotRefused, match="another place") as caught:
        unpack(engine, msgspec.structs.replace(manifest), KEY, swapped)
    assert caught.value.field == "blocks[0].full"
    found = read(engine, manifest, open_private(manifest, KEY), KEY, [], from_tokens="damaged")
    assert restore(engine, found).how == "recomputed"


def test_another_key_opens_nothing(engine: TransformersEngine) -> None:
    manifest, chunks = through_the_wire(saved(engine, started(engine, LONG[:30], 2)))
    with pytest.raises(SnapshotRefused) as caught:
        unpack(engine, manifest, DataKey.generate(), chunks)
    assert caught.value.field == "key_id"


class Seen:
    """A snapshot's public and private halves, to be damaged in either."""

    def __init__(self, manifest: SnapshotManifest) -> None:
        self.manifest = manifest
        self.private = open_private(manifest, KEY)


def _shorten_layer(seen: Seen) -> None:
    seen.manifest.layers[1] = msgspec.structs.replace(seen.manifest.layers[1], tokens=7)


def _huge_layers(seen: Seen) -> None:
    seen.manifest.layers = [msgspec.structs.replace(layer, head_dim=2**40) for layer in seen.manifest.layers]


def _foreign_token(seen: Seen) -> None:
    seen.private.tokens = np.array([999], dtype="<u4").tobytes() + seen.private.tokens[4:]


def _short_part(seen: Seen) -> None:
    assert seen.manifest.blocks[0].full is not None
    seen.manifest.blocks[0].full.encoded_bytes -= 2


@pytest.mark.parametrize(
    ("damage", "field"),
    [
        (_shorten_layer, "layers"),
        (_huge_layers, "layers"),
        (lambda seen: seen.manifest.layers.pop(), "layers"),
        (_foreign_token, "tokens"),
        (lambda seen: setattr(seen.private, "tokens", seen.private.tokens[:-4]), "tokens"),
        (lambda seen: setattr(seen.private, "tokens", seen.private.tokens[:-1]), "tokens"),
        (lambda seen: setattr(seen.manifest, "cached_tokens", -1), "tokens"),
        (_short_part, "blocks[0].full"),
        (lambda seen: setattr(seen.manifest, "kv_dtype", "float32"), "kv_dtype"),
        (lambda seen: seen.private.state.update(capacity_tokens=3), "cached_tokens"),
        (lambda seen: seen.private.state.update(new_tokens=10**9), "state.new_tokens"),
        (lambda seen: seen.private.state.pop("settings"), "state"),
        (lambda seen: seen.private.state["settings"].update(max_new_tokens=0), "state"),
        (lambda seen: seen.private.sampler.update(rng="dice"), "sampler"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused_by_field(
    engine: TransformersEngine, damage: Callable[[Seen], Any], field: str
) -> None:
    manifest, chunks = through_the_wire(saved(engine, started(engine, LONG[:30], 2)))
    seen = Seen(manifest)
    damage(seen)
    with pytest.raises(SnapshotRefused) as caught:
        read(engine, seen.manifest, seen.private, KEY, chunks)
    assert caught.value.field == field


def test_missing_extra_and_cut_chunks_are_refused(engine: TransformersEngine) -> None:
    manifest, chunks = through_the_wire(saved(engine, started(engine, LONG[:1400], 2)))
    for damaged in ([], chunks[:-1], [*chunks, b"more"], [chunks[0][:-1], *chunks[1:]]):
        with pytest.raises(SnapshotRefused, match="chunks"):
            unpack(engine, manifest, KEY, damaged)


_plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@hypothesis_settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.data())
def test_no_state_crashes_the_reader(engine: TransformersEngine, data: st.DataObject) -> None:
    state = started(engine, LONG[:3], 1)
    manifest, chunks = through_the_wire(saved(engine, state))
    private = open_private(manifest, KEY)
    part = getattr(private, data.draw(st.sampled_from(["state", "sampler"])))
    part[data.draw(st.sampled_from([*part, "unknown"]))] = data.draw(_plain)
    manifest.cached_tokens = data.draw(st.sampled_from([manifest.cached_tokens, 0, -1, 2**62]))
    refused = refusal(engine, manifest, private)
    if refused is None:
        assert restore(engine, read(engine, manifest, private, KEY, chunks)).how == "exact"
    else:
        with pytest.raises(SnapshotRefused, match=re.escape(refused.reason[:40])):
            read(engine, manifest, private, KEY, chunks)
