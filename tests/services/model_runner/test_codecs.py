"""The rungs of the ladder on arrays alone: what comes back, what damage does, and that blocks stand for themselves."""

from __future__ import annotations

import contextlib
import math
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import SnapshotRefused
from protocol.layout import RAW, CodecRef
from protocol.manifest import ModelDigests
from services.model_runner.codecs import RUNGS, codec
from services.model_runner.codecs.base import (
    BLOCK_TOKENS,
    BlockLayer,
    BlockLayout,
    Codec,
    Plane,
    block_layouts,
    block_planes,
    from_floats,
    to_floats,
)
from services.model_runner.codecs.exact_rows import recent_in
from services.model_runner.engine import STORAGE_DTYPES, LayerSpec, LayerState, ModelSpec, StateSpec

DTYPES = sorted(STORAGE_DTYPES)
EXACT = sorted(name for name, rung in RUNGS.items() if rung().exact)
LOSSY = sorted(name for name, rung in RUNGS.items() if not rung().exact)
# Mean squared error over mean square: what 8 and 4 bits must reach on numbers like a model's.
MOST_ERROR = {"int8": 1e-4, "rotated4": 0.0125}


def planes_of(layout: BlockLayout, seed: int = 0) -> list[Plane]:
    """Numbers like a model's: normally distributed, with channels of very different size among the keys."""
    rng = np.random.default_rng(seed)
    planes = layout.empty()
    for plane in planes:
        for array, spread in zip(plane, (1.5, 0.3), strict=True):
            channels = np.exp(spread * rng.standard_normal((array.shape[0], 1, array.shape[2])))
            from_floats((rng.standard_normal(array.shape) * channels).astype(np.float32), layout.dtype, array)
    return planes


def layout_of(dtype: str = "bfloat16", tokens: int = 40, position: int = 0) -> BlockLayout:
    return BlockLayout(dtype, position, tokens, (BlockLayer(2, 16, tokens), BlockLayer(0, 0, 0), BlockLayer(1, 24, 9)))


def same_bits(found: list[Plane], expected: list[Plane]) -> bool:
    return all(
        got.shape == want.shape and got.tobytes() == want.tobytes()
        for one, other in zip(found, expected, strict=True)
        for got, want in zip(one, other, strict=True)
    )


@st.composite
def blocks(draw: st.DrawFn) -> tuple[BlockLayout, list[Plane]]:
    """Any shapes, any bits: infinities, numbers that are none, and zeros among them."""
    tokens = draw(st.integers(1, 48))
    layers = tuple(
        BlockLayer(draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 8, 24])), draw(st.integers(0, tokens)))
        for _ in range(draw(st.integers(1, 3)))
    )
    layout = BlockLayout(draw(st.sampled_from(DTYPES)), draw(st.sampled_from([0, 256])), tokens, layers)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    planes = layout.empty()
    for array in (array for plane in planes for array in plane):
        bits = rng.integers(0, 256, array.nbytes, dtype=np.uint8)
        bits[: draw(st.integers(0, array.nbytes))] = draw(st.integers(0, 255))
        array[...] = bits.view(array.dtype).reshape(array.shape)
    return layout, planes


@pytest.mark.parametrize("name", EXACT)
@given(block=blocks())
def test_an_exact_rung_gives_every_bit_back(name: str, block: tuple[BlockLayout, list[Plane]]) -> None:
    layout, planes = block
    rung = RUNGS[name]()
    data = rung.encode(planes, layout, recent=3)
    assert same_bits(rung.decode(data, layout), planes)
    into = layout.empty()
    rung.decode(data, layout, into)
    assert same_bits(into, planes)


def test_raw_is_the_arrays_one_after_another() -> None:
    layout = layout_of()
    planes = planes_of(layout)
    data = RUNGS["raw"]().encode(planes, layout)
    assert data == b"".join(array.tobytes() for plane in planes for array in plane)
    assert len(data) == layout.raw_bytes


def test_lossless_takes_two_thirds_of_numbers_like_a_models() -> None:
    layout = BlockLayout("bfloat16", 0, BLOCK_TOKENS, (BlockLayer(3, 64, BLOCK_TOKENS),) * 2)
    data = RUNGS["lossless"]().encode(planes_of(layout), layout)
    assert layout.raw_bytes / len(data) >= 1.45
    # Numbers of 32 bits that were 16 take little more than those: a bit for the sign.
    wide = replace(layout, dtype="float32")
    planes = [
        Plane(to_floats(plane.keys, "bfloat16"), to_floats(plane.values, "bfloat16")) for plane in planes_of(layout)
    ]
    assert wide.raw_bytes / len(RUNGS["lossless"]().encode(planes, wide)) >= 2.7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LOSSY)
def test_a_lossy_rung_is_as_close_as_its_bits_allow(name: str, dtype: str) -> None:
    layout = layout_of(dtype, tokens=64, position=512)
    planes = planes_of(layout)
    rung = RUNGS[name]()
    found = rung.decode(rung.encode(planes, layout), layout)
    for got, want in zip(found, planes, strict=True):
        for own, expected in zip(got, want, strict=True):
            if expected.size:
                wanted = to_floats(expected, dtype)
                error = to_floats(own, dtype) - wanted
                assert np.square(error).sum() / np.square(wanted).sum() <= MOST_ERROR[name]


@pytest.mark.parametrize("name", LOSSY)
def test_sinks_and_recent_tokens_are_exact(name: str) -> None:
    layout = layout_of()
    planes = planes_of(layout)
    rung = RUNGS[name]()
    found = rung.decode(rung.encode(planes, layout, recent=7), layout)
    for got, want in zip(found, planes, strict=True):
        for own, expected in zip(got, want, strict=True):
            assert own[:, -7:].tobytes() == expected[:, -7:].tobytes()
    # A layer that holds the block's last nine positions alone has none of its first four.
    assert found[0].keys[:, :4].tobytes() == planes[0].keys[:, :4].tobytes()
    assert found[2].keys[:, :2].tobytes() != planes[2].keys[:, :2].tobytes()


def test_sinks_are_the_conversations_first_tokens_and_recent_ones_the_snapshots_last() -> None:
    layouts = block_layouts(SPEC, 520)
    assert [recent_in(layout, 520) for layout in layouts] == [0, 8, 8]
    far = layout_of(position=256)
    planes = planes_of(far)
    rung = RUNGS["int8"]()
    found = rung.decode(rung.encode(planes, far), far)
    assert found[0].keys[:, :4].tobytes() != planes[0].keys[:, :4].tobytes()


@pytest.mark.parametrize("name", sorted(RUNGS))
def test_damage_is_refused_or_changes_numbers_only(name: str) -> None:
    layout = layout_of(tokens=30)
    rung = RUNGS[name]()
    data = rung.encode(planes_of(layout), layout, recent=5)
    chance = random.Random(1)
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        kind = chance.randrange(4)
        if kind == 0:
            damaged = damaged[: chance.randrange(len(damaged))]
        elif kind == 1:
            damaged += bytes(chance.randint(1, 9))
        with contextlib.suppress(SnapshotRefused):
            found = rung.decode(bytes(damaged), layout)
            assert kind > 1
            assert [array.shape for plane in found for array in plane] == [
                layer.shape for layer in layout.layers for _ in range(2)
            ]
    for cut in (b"", data[:-1], data + b"\0"):
        with pytest.raises(SnapshotRefused):
            rung.decode(cut, layout)


@pytest.mark.parametrize("name", sorted(RUNGS))
def test_a_block_of_another_layout_is_refused(name: str) -> None:
    rung = RUNGS[name]()
    layout = layout_of()
    data = rung.encode(planes_of(layout), layout)
    for other in (layout_of("float32"), layout_of(tokens=39), layout_of(tokens=41)):
        with pytest.raises(SnapshotRefused):
            rung.decode(data, other)
    with pytest.raises(ValueError, match="layout says"):
        rung.encode(planes_of(layout), layout_of(tokens=41))


def test_a_frame_that_claims_more_than_the_layout_is_refused_before_it_is_unpacked() -> None:
    import zstandard

    layout = BlockLayout("bfloat16", 0, 64, (BlockLayer(1, 8, 64),))
    bomb = zstandard.compress(bytes(50_000_000))
    plane = bytes([1]) + len(bomb).to_bytes(4, "little") + bomb
    with pytest.raises(SnapshotRefused) as refusal:
        RUNGS["lossless"]().decode(bytes(9) + plane, layout)
    assert refusal.value.field == "plane"


@pytest.mark.parametrize("name", sorted(RUNGS))
def test_a_block_is_the_same_whatever_stands_beside_it(name: str) -> None:
    # The pool shares blocks: the first two of a longer conversation are those of a shorter one with the same beginning.
    rung = RUNGS[name]()
    longer = states_of(SPEC, 600)
    blocks_of = {}
    for seen in (512, 600):
        states = [
            replace(state, keys=state.keys[:, :seen], values=state.values[:, :seen], seen_tokens=seen)
            for state in longer
        ]
        blocks_of[seen] = [rung.encode(block_planes(states, layout), layout) for layout in block_layouts(SPEC, seen)]
    assert blocks_of[512] == blocks_of[600][:2]


SPEC = ModelSpec(
    "two full layers and a recurrent one",
    (LayerSpec("full", 1, 8), LayerSpec("recurrent", 0, 0, states=(StateSpec((2, 2), "float32"),)),
     LayerSpec("full", 2, 4)),
    100, 4096, frozenset(), "bfloat16", "", ModelDigests(b"", b"", b""),
)  # fmt: skip


def states_of(spec: ModelSpec, seen: int) -> list[LayerState]:
    rng = np.random.default_rng(3)
    states = []
    for layer in spec.layers:
        shape = (layer.kv_heads, layer.held_tokens(seen), layer.head_dim)
        planes = [rng.standard_normal(shape).astype(np.float32).view(np.uint32) >> 16 for _ in range(2)]
        keys, values = (plane.astype("<u2") for plane in planes)
        states.append(LayerState(layer.kind, spec.dtype, keys, values, seen))
    return states


def test_a_sliding_layer_is_in_the_blocks_that_its_window_reaches() -> None:
    spec = replace(SPEC, layers=(LayerSpec("full", 1, 8), LayerSpec("sliding", 1, 8, window_tokens=301)))
    layouts = block_layouts(spec, 700)
    assert [[layer.tokens for layer in layout.layers] for layout in layouts] == [[256, 0], [256, 112], [188, 188]]
    states = states_of(spec, 700)
    again = [
        LayerState(state.kind, state.dtype, np.zeros_like(state.keys), np.zeros_like(state.values), 700)
        for state in states
    ]
    rung = RUNGS["lossless"]()
    for layout in layouts:
        # As a manifest has them: a part for each kind of layer.
        for kind in ("full", "sliding"):
            part = layout.of_kind(spec, kind)
            rung.decode(rung.encode(block_planes(states, part), part), part, block_planes(again, part))
    for state, other in zip(states, again, strict=True):
        assert state.keys.tobytes() == other.keys.tobytes()
        assert state.values.tobytes() == other.values.tobytes()


@pytest.mark.parametrize("name", sorted(RUNGS))
def test_a_block_that_no_layer_holds_any_more_is_empty(name: str) -> None:
    layout = BlockLayout("bfloat16", 0, 256, (BlockLayer(2, 16, 0), BlockLayer(0, 0, 0)))
    rung = RUNGS[name]()
    data = rung.encode(layout.empty(), layout)
    assert len(data) < 10
    assert [plane.keys.shape for plane in rung.decode(data, layout)] == [(2, 0, 16), (0, 0, 0)]


def test_a_manifest_names_a_rung_of_this_version_or_is_refused() -> None:
    assert RUNGS["raw"]().ref == RAW
    for name, rung in RUNGS.items():
        found = codec(rung().ref)
        assert isinstance(found, Codec)
        assert found.name == name
    with pytest.raises(SnapshotRefused, match="unknown") as refusal:
        codec(CodecRef("gzip", 1, {}))
    assert refusal.value.field == "codec.name"
    with pytest.raises(SnapshotRefused) as refusal:
        codec(CodecRef("int8", 2, {}))
    assert refusal.value.field == "codec.version"
    with pytest.raises(SnapshotRefused) as refusal:
        codec(CodecRef("int8", 1, {"groups": 32}))
    assert refusal.value.field == "codec.params"


@given(value=st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**127), max_value=2.0**127))
@settings(max_examples=200)
def test_rounding_to_bfloat16_is_to_the_nearest(value: float) -> None:
    out = np.empty(1, "<u2")
    from_floats(np.array([value], np.float32), "bfloat16", out)
    back = float(to_floats(out, "bfloat16")[0])
    assert math.isclose(back, value, rel_tol=2.0**-8, abs_tol=1e-38)
