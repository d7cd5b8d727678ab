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
from protocol.manifest import MAX_CHUNK_BYTES, SnapshotManifest, verify_chunk
from services.model_runner.generation import GenerationSettings, GenerationState, begin, generate
from services.model_runner.sampling import SamplingSettings
from services.model_runner.snapshot import Packed, extra_of, pack, recompute, refusal, unpack, why_not_exact
from services.model_runner.transformers_engine import TransformersEngine

LONG = [int(token) for token in np.random.default_rng(2).integers(0, 256, 1500)]
SAMPLED = SamplingSettings(temperature=0.8, top_k=100, seed=4)


def started(engine: TransformersEngine, prompt: list[int], new_tokens: int) -> GenerationState:
    state = begin(engine, prompt, sampling=SAMPLED, settings=GenerationSettings(60, ("x",), ignore_eos=True))
    for _ in itertools.islice(generate(engine, state), new_tokens):
        pass
    return state


def through_the_wire(packed: Packed) -> tuple[SnapshotManifest, list[bytes]]:
    manifest = msgspec.msgpack.decode(msgspec.msgpack.encode(packed.manifest), type=SnapshotManifest)
    chunks = [bytes(chunk) for chunk in packed.chunks]
    for index, (ref, chunk) in enumerate(zip(manifest.chunks, chunks, strict=True)):
        verify_chunk(ref, chunk, index=index)
    return manifest, chunks


@pytest.mark.parametrize("prompt_tokens", [1, 38, 39, 41, 300, 1400])
def test_a_resumed_answer_is_the_uninterrupted_one_bit_for_bit(small_model: Path, prompt_tokens: int) -> None:
    engine = TransformersEngine.load(small_model, device="cpu", threads=1)
    uninterrupted = started(engine, LONG[:prompt_tokens], 9)
    packed = pack(engine, uninterrupted, conversation="talk", creator="tomato", extra={"messages": ["hello"]})
    expected = list(generate(engine, uninterrupted))
    manifest, chunks = through_the_wire(packed)
    assert extra_of(manifest) == {"messages": ["hello"]}
    other = TransformersEngine.load(small_model, device="cpu", threads=1)
    state, how, reason = unpack(other, manifest, chunks)
    assert (how, reason) == ("exact", "")
    assert list(generate(other, state)) == expected  # Tokens, and log-probabilities to the last bit.
    assert state.tokens == uninterrupted.tokens
    np.testing.assert_array_equal(other.step(state.cache, 1), engine.step(uninterrupted.cache, 1))


def test_chunks_are_full_but_the_last_and_hold_the_cache_and_no_more(engine: TransformersEngine) -> None:
    state = started(engine, LONG[:1400], 3)
    manifest, chunks = through_the_wire(pack(engine, state, conversation="talk", creator="tomato"))
    assert [len(chunk) for chunk in chunks[:-1]] == [MAX_CHUNK_BYTES] * 2
    assert manifest.total_bytes == manifest.cached_tokens * engine.spec.kv_bytes_per_token
    assert manifest.cached_tokens == 1402


def test_what_goes_on_after_packing_does_not_change_the_snapshot(engine: TransformersEngine) -> None:
    state = started(engine, LONG[:30], 3)
    packed = pack(engine, state, conversation="talk", creator="tomato")
    before = [bytes(chunk) for chunk in packed.chunks]
    list(generate(engine, state))
    assert [bytes(chunk) for chunk in packed.chunks] == before


def test_a_snapshot_before_the_prompt_was_read_is_refused(engine: TransformersEngine) -> None:
    state = begin(engine, LONG[:20])
    with pytest.raises(ModelError, match="0 of its 19 positions"):
        pack(engine, state, conversation="talk", creator="tomato")


def test_another_fingerprint_resumes_from_the_tokens_and_says_so(engine: TransformersEngine) -> None:
    state = started(engine, LONG[:300], 5)
    manifest, _ = through_the_wire(pack(engine, state, conversation="talk", creator="tomato"))
    manifest.fingerprint = msgspec.structs.replace(manifest.fingerprint, threads=64)
    assert why_not_exact(engine, manifest) == f"other threads: 64 there, {engine.fingerprint.threads} here"
    resumed, how, reason = unpack(engine, manifest, [])
    assert (how, resumed.cache.length, resumed.tokens) == ("recomputed", 0, state.tokens)
    assert "threads" in reason
    assert recompute(engine, resumed) == len(state.tokens) - 1
    assert resumed.prefilled
    assert len(list(generate(engine, resumed))) == 55


def test_other_weights_resume_from_the_tokens_and_another_tokenizer_not_at_all(engine: TransformersEngine) -> None:
    state = started(engine, LONG[:30], 2)
    manifest, chunks = through_the_wire(pack(engine, state, conversation="talk", creator="tomato"))
    own = manifest.digests
    manifest.digests = msgspec.structs.replace(own, weights=bytes(32))
    assert unpack(engine, manifest, chunks).how == "recomputed"
    manifest.digests = msgspec.structs.replace(own, tokenizer=bytes(32))
    refused = refusal(engine, manifest)
    assert refused is not None
    assert refused.field == "digests.tokenizer"
    with pytest.raises(SnapshotRefused, match="another tokenizer"):
        unpack(engine, manifest, chunks)


def _shorten_layer(manifest: SnapshotManifest) -> None:
    manifest.layers[1] = msgspec.structs.replace(manifest.layers[1], tokens=7)


def _huge_layers(manifest: SnapshotManifest) -> None:
    manifest.layers = [msgspec.structs.replace(layer, head_dim=2**40) for layer in manifest.layers]


def _foreign_token(manifest: SnapshotManifest) -> None:
    manifest.tokens = np.array([999], dtype="<u4").tobytes() + manifest.tokens[4:]


@pytest.mark.parametrize(
    ("damage", "field"),
    [
        (_shorten_layer, "layers"),
        (_huge_layers, "layers"),
        (lambda manifest: manifest.layers.pop(), "layers"),
        (_foreign_token, "tokens"),
        (lambda manifest: setattr(manifest, "tokens", manifest.tokens[:-4]), "tokens"),
        (lambda manifest: setattr(manifest, "tokens", manifest.tokens[:-1]), "tokens"),
        (lambda manifest: setattr(manifest, "cached_tokens", -1), "tokens"),
        (lambda manifest: setattr(manifest, "total_bytes", 2**60), "total_bytes"),
        (lambda manifest: setattr(manifest, "kv_dtype", "float32"), "kv_dtype"),
        (lambda manifest: manifest.state.update(capacity_tokens=3), "cached_tokens"),
        (lambda manifest: manifest.state.update(new_tokens=10**9), "state.new_tokens"),
        (lambda manifest: manifest.state.pop("settings"), "state"),
        (lambda manifest: manifest.state["settings"].update(max_new_tokens=0), "state"),
        (lambda manifest: manifest.sampler.update(rng="dice"), "sampler"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused_by_field(
    engine: TransformersEngine, damage: Callable[[SnapshotManifest], Any], field: str
) -> None:
    state = started(engine, LONG[:30], 2)
    manifest, chunks = through_the_wire(pack(engine, state, conversation="talk", creator="tomato"))
    damage(manifest)
    with pytest.raises(SnapshotRefused) as caught:
        unpack(engine, manifest, chunks)
    assert caught.value.field == field


def test_missing_extra_and_cut_chunks_are_refused(engine: TransformersEngine) -> None:
    state = started(engine, LONG[:1400], 2)
    manifest, chunks = through_the_wire(pack(engine, state, conversation="talk", creator="tomato"))
    for damaged in ([], chunks[:-1], [*chunks, b"more"], [chunks[0][:-1], *chunks[1:]]):
        with pytest.raises(SnapshotRefused, match="chunks"):
            unpack(engine, manifest, damaged)


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
    manifest, chunks = through_the_wire(pack(engine, state, conversation="talk", creator="tomato"))
    part = getattr(manifest, data.draw(st.sampled_from(["state", "sampler", "codec_params"])))
    part[data.draw(st.sampled_from([*part, "unknown"]))] = data.draw(_plain)
    manifest.cached_tokens = data.draw(st.sampled_from([manifest.cached_tokens, 0, -1, 2**62]))
    refused = refusal(engine, manifest)
    if refused is None:
        assert unpack(engine, manifest, chunks).how == "exact"
    else:
        with pytest.raises(SnapshotRefused, match=re.escape(refused.reason[:40])):
            unpack(engine, manifest, chunks)
