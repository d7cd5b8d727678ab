"""The transform rung and its coder: on tables made by hand, and on a basis calibrated from a small model."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import ModelUnavailable, SnapshotRefused
from protocol.layout import CodecRef
from services.model_runner.codecs import RUNGS, basis_digest, codec
from services.model_runner.codecs.base import Plane, Reader, block_layouts, block_planes, number, to_floats
from services.model_runner.codecs.basis import NEAR, SMALL, Basis, BasisFile, read_basis, write_basis
from services.model_runner.codecs.exact_rows import RECENT_TOKENS, SINK_TOKENS
from services.model_runner.codecs.ladder import Asked, Usual, choose, decode_blocks, encode_blocks, fidelity, rungs
from services.model_runner.codecs.rans import TOTAL, Run, Table, decode, encode, scaled_frequencies
from services.model_runner.codecs.transform import Transform, turn
from services.model_runner.engine import Engine, LayerState
from services.model_runner.positions import prune

pytest.importorskip("torch", reason="torch is not installed: make install (extra `model`)")

from services.model_runner.codecs.calibrate import calibrate, rotations
from services.model_runner.transformers_engine import TransformersEngine

PREFIX, CONTINUATION, LENGTH = 64, 32, 300


def words(engine: Engine, count: int, seed: int) -> list[int]:
    return [int(each) for each in np.random.default_rng(seed).integers(0, engine.spec.vocab_size, count)]


def state(engine: Engine, tokens: list[int]) -> list[LayerState]:
    cache = engine.new_cache(len(tokens) + 1)
    engine.prefill(cache, tokens)
    return engine.export_layers(cache)


def calibrated(engine: TransformersEngine) -> bytes:
    texts = [words(engine, 4 * (PREFIX + CONTINUATION), seed) for seed in (1, 2)]
    return calibrate(engine, texts, group_layers=2, prefix_tokens=PREFIX, continuation_tokens=CONTINUATION)


@pytest.fixture(scope="module")
def basis_file(engine: TransformersEngine) -> bytes:
    return calibrated(engine)


@pytest.fixture(scope="module")
def basis(engine: TransformersEngine, basis_file: bytes) -> Basis:
    return read_basis(basis_file, engine.spec)


# --- the entropy coder ------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**32), lanes=st.integers(1, 70), count=st.integers(0, 12))
def test_symbols_come_back_from_the_entropy_coder(seed: int, lanes: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    tables = [
        Table.of(scaled_frequencies(rng.exponential(1, size) ** 4 + 1e-9), rng.standard_normal(size))
        for size in rng.integers(2, 60, 3)
    ]
    runs = [Run(int(rng.integers(0, 3)), int(rng.integers(1, lanes + 1))) for _ in range(count)]
    parts = [rng.integers(0, len(tables[run.table].frequencies), run.lanes) for run in runs]
    symbols = np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.uint8)
    reader = Reader("rans", memoryview(encode(runs, tables, symbols)))
    slots = decode(reader, runs, tables)
    reader.end()
    found = [tables[run.table].symbols[part] for run, part in zip(runs, _split(slots, runs), strict=True)]
    assert [list(part) for part in found] == [list(part) for part in parts]


def _split(slots: Any, runs: list[Run]) -> list[Any]:
    ends = np.cumsum([run.lanes for run in runs])
    return np.split(slots, ends[:-1]) if runs else []


def test_the_entropy_coder_comes_close_to_the_entropy() -> None:
    rng = np.random.default_rng(0)
    share = np.array([0.9, 0.05, 0.03, 0.02])
    symbols = rng.choice(4, 200_000, p=share).astype(np.uint8)
    table = Table.of(scaled_frequencies(share), np.zeros(4))
    data = encode([Run(0, 500)] * 400, [table], symbols)
    assert 8 * len(data) < 1.02 * len(symbols) * -(share * np.log2(share)).sum() + 500 * 32


@pytest.mark.parametrize("frequencies", [[TOTAL], [0, TOTAL], [1, 2], [TOTAL, 1], [-1, TOTAL + 1], [16] * 256])
def test_frequencies_that_make_no_table_are_refused(frequencies: list[int]) -> None:
    with pytest.raises(ValueError, match="frequencies"):
        Table.of(frequencies, [0.0] * len(frequencies))


# --- a small model's basis --------------------------------------------------------------------------------------------


def test_keys_turned_back_and_forth_are_the_same() -> None:
    vectors = np.random.default_rng(0).standard_normal((5, 2, 8)).astype(np.float32)
    positions = np.array([0, 1, 100, 4_000, 131_000], np.float64)
    angles = 10_000.0 ** (-np.arange(3) / 3)
    turned = turn(vectors, positions, angles)
    assert np.allclose(turn(turned, -positions, angles), vectors, atol=1e-5)
    assert np.array_equal(turned[..., 6:], vectors[..., 6:])
    assert np.allclose(turned[1, 0, 0], vectors[1, 0, 0] * np.cos(1) - vectors[1, 0, 3] * np.sin(1), atol=1e-6)


def test_angles_are_those_of_the_model(engine: TransformersEngine) -> None:
    # A key of one token at one position is that at position 0, turned: nothing else in layer 0 depends on the place.
    found = state(engine, [5, 5, 5, 5])[0]
    keys = to_floats(found.keys, found.dtype).transpose(1, 0, 2)
    back = turn(keys, -np.arange(4, dtype=np.float64), rotations(engine)[0])
    assert np.abs(back - back[0]).max() < 0.02 * np.abs(back).max()


def test_a_basis_has_the_levels_and_all_layers_once(engine: TransformersEngine, basis: Basis) -> None:
    assert set(basis.levels) == {NEAR, SMALL}
    assert basis.levels[NEAR].row.mean_kl <= basis.levels[SMALL].row.mean_kl
    assert basis.levels[NEAR].row.ratio <= basis.levels[SMALL].row.ratio
    layers = sorted(at for group in basis.groups for at in group.layers if group.side == "keys")
    assert layers == list(range(len(engine.spec.layers)))


def test_calibration_gives_the_same_file_again(engine: TransformersEngine, basis_file: bytes) -> None:
    first, second = (msgspec.msgpack.decode(data, type=BasisFile) for data in (basis_file, calibrated(engine)))
    assert [level.step for level in first.levels] == [level.step for level in second.levels]
    assert first.texts == second.texts


def test_too_little_text_is_refused(engine: TransformersEngine) -> None:
    with pytest.raises(ModelUnavailable, match="3 windows"):
        calibrate(engine, [words(engine, 300, 1)], prefix_tokens=PREFIX, continuation_tokens=CONTINUATION)


@pytest.mark.parametrize("level", [NEAR, SMALL])
def test_a_calibrated_level_keeps_the_models_answers(engine: TransformersEngine, basis: Basis, level: str) -> None:
    tokens = words(engine, LENGTH, 9)
    exact = state(engine, tokens)
    rung = Transform(basis, level)
    blocks = encode_blocks(rung, engine.spec, exact)
    decoded = decode_blocks(rung, engine.spec, blocks, LENGTH)
    found = fidelity(engine, tokens, exact, decoded)
    assert found is not None
    # Texts of the same kind as those it was calibrated on, which here is noise.
    assert found.mean_kl < 4 * basis.levels[level].row.mean_kl + 0.01
    assert sum(map(len, blocks)) < 0.6 * sum(plane.nbytes for layer in exact for plane in layer.planes)
    for own, other in zip(exact, decoded, strict=True):
        assert own.keys[:, :4].tobytes() == other.keys[:, :4].tobytes()
        assert own.values[:, -16:].tobytes() == other.values[:, -16:].tobytes()


def test_keys_of_a_pruned_cache_are_turned_by_their_true_positions(engine: TransformersEngine, basis: Basis) -> None:
    whole = state(engine, words(engine, LENGTH, 3))
    kept = np.array([0, *range(3, LENGTH, 3)])
    exact = prune(whole, kept)
    rung = Transform(basis)
    decoded = decode_blocks(rung, engine.spec, encode_blocks(rung, engine.spec, exact), LENGTH, positions=kept)
    expected = prune(decode_blocks(rung, engine.spec, encode_blocks(rung, engine.spec, whole), LENGTH), kept)
    for pruned, other, own in zip(decoded, expected, exact, strict=True):
        for one, two in ((pruned.keys, other.keys), (pruned.values, other.values)):
            found, wanted = (to_floats(each, engine.spec.dtype) for each in (one, two))
            # A product of other rows may round otherwise in its last bits.
            np.testing.assert_allclose(found, wanted, atol=0.02 * float(wanted.std()))
        held_first, held_last = int((kept < SINK_TOKENS).sum()), int((kept >= LENGTH - RECENT_TOKENS).sum())
        np.testing.assert_array_equal(pruned.keys[:, :held_first], own.keys[:, :held_first])
        np.testing.assert_array_equal(pruned.keys[:, -held_last:], own.keys[:, -held_last:])


def test_numbers_that_no_table_has_come_back_all_the_same(engine: TransformersEngine, basis: Basis) -> None:
    exact = state(engine, words(engine, 60, 3))
    layout = block_layouts(engine.spec, 60)[0]
    planes = [Plane(np.array(plane.keys), np.array(plane.values)) for plane in block_planes(exact, layout)]
    planes[0].values[0, 20] = 0x4700  # 32,768 in bfloat16, in every dimension
    rung = Transform(basis)
    found = rung.decode(rung.encode(planes, layout), layout)
    outlier = to_floats(found[0].values[0, 20], "bfloat16")
    assert np.abs(outlier - 32_768).mean() < 0.3 * 32_768


def test_a_block_needs_nothing_of_the_others(engine: TransformersEngine, basis: Basis) -> None:
    tokens = words(engine, LENGTH, 9)
    rung = Transform(basis)
    longer = state(engine, tokens)
    whole = encode_blocks(rung, engine.spec, longer)
    layout = block_layouts(engine.spec, LENGTH)[0]
    assert rung.encode(block_planes(longer, layout), layout) == whole[0]
    alone = rung.decode(whole[1], block_layouts(engine.spec, LENGTH)[1])
    together = decode_blocks(rung, engine.spec, whole, LENGTH)
    assert alone[0].keys.tobytes() == together[0].keys[:, 256:].tobytes()


def test_damaged_blocks_are_refused(engine: TransformersEngine, basis: Basis) -> None:
    rung = Transform(basis)
    layout = block_layouts(engine.spec, 50)[0]
    data = rung.encode(block_planes(state(engine, words(engine, 50, 3)), layout), layout, 7)
    chance = random.Random(2)
    kept = 0
    for _ in range(150):
        damaged = bytearray(data)
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        with contextlib.suppress(SnapshotRefused):
            rung.decode(bytes(damaged), layout)
            kept += 1
    # The coder's last states tell nearly all damage; that of exact tokens and escapes is the digest's to find.
    assert kept < 75
    for cut in (b"", data[:-1], data + b"\0", data[: len(data) // 2], number(2**32 - 1) + data):
        with pytest.raises(SnapshotRefused):
            rung.decode(cut, layout)


def test_damaged_bases_are_refused(engine: TransformersEngine, basis_file: bytes) -> None:
    chance = random.Random(3)
    for _ in range(60):
        damaged = bytearray(basis_file)
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        with contextlib.suppress(SnapshotRefused):
            found = read_basis(bytes(damaged), engine.spec)
            assert found.digest != read_basis(basis_file, engine.spec).digest
    with pytest.raises(SnapshotRefused):
        read_basis(basis_file[:-1], engine.spec)


def _changed(**fields: Any) -> Callable[[BasisFile], BasisFile]:
    return lambda file: msgspec.structs.replace(file, **fields)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (_changed(version=2), "version"),
        (_changed(layers=[(2, 32)]), "layers"),
        (_changed(groups=[]), "groups"),
        (lambda file: msgspec.structs.replace(file, groups=[*file.groups, file.groups[0]]), "groups"),
        (lambda file: _group(file, components=2**40), "groups.components"),
        (lambda file: _group(file, axes=b""), "groups.axes"),
        (lambda file: _group(file, side="both"), "groups"),
        (lambda file: _group(file, layers=[99]), "groups"),
        (_changed(layer_rotations=[7, 7, 7]), "layer_rotations"),
        (lambda file: _level(file, step=float("nan")), "levels.step"),
        (lambda file: _level(file, classes=[]), "levels.classes"),
        (lambda file: _level(file, tables=[]), "levels.classes"),
    ],
)
def test_a_basis_that_does_not_fit_names_the_field(
    engine: TransformersEngine, basis_file: bytes, change: Callable[[BasisFile], BasisFile], field: str
) -> None:
    file = msgspec.msgpack.decode(basis_file, type=BasisFile)
    with pytest.raises(SnapshotRefused) as refusal:
        read_basis(write_basis(change(file)), engine.spec)
    assert refusal.value.field == f"basis.{field}"


def _group(file: BasisFile, **fields: Any) -> BasisFile:
    return msgspec.structs.replace(file, groups=[msgspec.structs.replace(file.groups[0], **fields), *file.groups[1:]])


def _level(file: BasisFile, **fields: Any) -> BasisFile:
    return msgspec.structs.replace(file, levels=[msgspec.structs.replace(file.levels[0], **fields)])


def test_a_manifest_names_the_basis(basis: Basis) -> None:
    ref = Transform(basis, SMALL).ref
    assert isinstance(codec(ref, basis), Transform)
    assert basis_digest(ref) == basis.digest
    for wrong in ({**ref.params, "basis": b"other"}, {**ref.params, "level": "best"}, {**ref.params, "more": 1}, {}):
        with pytest.raises(SnapshotRefused):
            codec(CodecRef("transform", 1, wrong), basis)
    with pytest.raises(SnapshotRefused) as refusal:
        codec(CodecRef("transform", 9, ref.params), basis)
    assert refusal.value.field == "codec.version"
    with pytest.raises(SnapshotRefused, match="not that basis"):
        codec(ref, None)


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_layers_of_several_kinds_are_calibrated_apart(family: str, small_models: dict[str, Path]) -> None:
    engine = TransformersEngine.load(small_models[family], device="cpu", threads=1)
    found = read_basis(calibrated(engine), engine.spec)
    tokens = words(engine, LENGTH, 4)
    exact = state(engine, tokens)
    rung = Transform(found, NEAR)
    decoded = decode_blocks(rung, engine.spec, encode_blocks(rung, engine.spec, exact), LENGTH)
    compared = fidelity(engine, tokens, exact, decoded)
    assert compared is not None
    assert compared.mean_kl < 0.2
    engine.import_layers(decoded, LENGTH + 1)


# --- the ladder -------------------------------------------------------------------------------------------------------


def test_the_same_cache_is_perfectly_faithful(engine: TransformersEngine) -> None:
    tokens = words(engine, LENGTH, 9)
    exact = state(engine, tokens)
    found = fidelity(engine, tokens, exact, exact)
    assert found is not None
    assert (found.mean_kl, found.top1, found.tokens) == (0.0, 1.0, 128)


def test_reading_gives_the_logits_of_every_position(engine: TransformersEngine) -> None:
    tokens = words(engine, 40, 2)
    one, other = engine.new_cache(40), engine.new_cache(40)
    engine.prefill(one, tokens[:10])
    engine.prefill(other, tokens[:10])
    together = engine.read(one, tokens[10:])
    alone = Engine.read(engine, other, tokens[10:])
    assert together.shape == alone.shape == (30, engine.spec.vocab_size)
    assert np.abs(together - alone).max() < 0.05 * np.abs(alone).max()
    assert one.length == other.length == 40


def test_the_strongest_rung_that_is_faithful_enough_is_taken(engine: TransformersEngine, basis: Basis) -> None:
    tokens = words(engine, LENGTH, 9)
    exact = state(engine, tokens)
    offered = [(Transform(basis, SMALL), None), *((RUNGS[name](), None) for name in ("int8", "lossless"))]
    anything = choose(engine, tokens, exact, offered, Asked(most_kl=100, least_top1=0))
    assert anything.codec.name == "transform"
    assert anything.certificate.measured is not None
    for_manifest = anything.certificate.for_manifest()
    assert for_manifest is not None
    assert for_manifest.tested_tokens == 128
    assert for_manifest.measured == ["mean_kl", "top1"]
    assert not anything.tried
    strict = choose(engine, tokens, exact, offered, Asked(most_kl=0, least_top1=1.01))
    assert strict.codec.name == "lossless"
    assert strict.certificate.exact
    assert strict.certificate.measured is None
    assert strict.certificate.for_manifest() is None
    assert [each.rung for each in strict.tried] == ["transform", "int8"]
    found = decode_blocks(strict.codec, engine.spec, strict.blocks, LENGTH)
    assert found[0].keys.tobytes() == exact[0].keys.tobytes()
    with pytest.raises(ValueError, match="none is exact"):
        choose(engine, tokens, exact, offered[:1], Asked(most_kl=0, least_top1=1.01))


def test_without_a_test_the_rungs_usual_figures_decide(engine: TransformersEngine) -> None:
    tokens = words(engine, 1, 9)
    exact = state(engine, tokens)
    good, bad = Usual(0.0001, 0.999, 2.0, "elsewhere"), Usual(0.5, 0.5, 9.0, "elsewhere")
    offered = [(RUNGS["rotated4"](), bad), (RUNGS["int8"](), good), (RUNGS["raw"](), None)]
    found = choose(engine, tokens, exact, offered)
    assert found.codec.name == "int8"
    assert found.certificate.measured is None
    assert found.certificate.usual == good


def test_all_rungs_are_offered_the_smallest_first(basis: Basis) -> None:
    offered = rungs(basis)
    assert [codec.name for codec, _ in offered] == ["transform", "transform", "rotated4", "int8", "lossless", "raw"]
    assert [codec.name for codec, _ in rungs()] == ["rotated4", "int8", "lossless", "raw"]
    small, near = (usual for _, usual in offered[:2])
    assert small is not None
    assert near is not None
    assert small.ratio >= near.ratio


@pytest.mark.parametrize("rung", ["transform", "rotated4", "lossless"])
def test_threads_that_share_a_codec_decode_alike(engine: TransformersEngine, basis: Basis, rung: str) -> None:
    exact = state(engine, words(engine, 2 * LENGTH, 6))
    shared = Transform(basis) if rung == "transform" else RUNGS[rung]()
    with ThreadPoolExecutor(3) as workers:
        blocks = encode_blocks(shared, engine.spec, exact, workers)
        together = decode_blocks(shared, engine.spec, blocks, 2 * LENGTH, workers=workers)
    alone = decode_blocks(shared, engine.spec, blocks, 2 * LENGTH)
    # Products that several threads ask for at once may round otherwise.
    for own, other in zip(together, alone, strict=True):
        for one, two in ((own.keys, other.keys), (own.values, other.values)):
            found, wanted = (to_floats(each, own.dtype) for each in (one, two))
            assert np.abs(found - wanted).max() <= 0.01 * np.abs(wanted).max()
