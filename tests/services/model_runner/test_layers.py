"""The kinds of layers: what each keeps, and what of it an earlier position still has."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from protocol.errors import SnapshotRefused
from protocol.manifest import ModelDigests
from services.model_runner.engine import LayerSpec, LayerState, ModelSpec, StateSpec, check_layers

FULL = LayerSpec("full", 1, 4)
SLIDING = LayerSpec("sliding", 1, 4, window_tokens=3)
RECURRENT = LayerSpec("recurrent", 0, 0, states=(StateSpec((1, 8, 3), "bfloat16"), StateSpec((2, 4, 4), "float32")))
SPEC = ModelSpec(
    "three kinds", (FULL, SLIDING, RECURRENT), 100, 64, frozenset(), "bfloat16", "", ModelDigests(b"", b"", b"")
)


def layer(spec: LayerSpec, seen: int) -> LayerState:
    plane = np.zeros((spec.kv_heads, spec.held_tokens(seen), spec.head_dim), "<u2")
    states = (np.zeros((1, 8, 3), "<u2"), np.zeros((2, 4, 4), "<f4")) if spec.states else ()
    return LayerState(spec.kind, "bfloat16", plane, plane, seen, states)


def test_each_kind_holds_what_it_needs_and_only_attention_takes_memory_for_a_position() -> None:
    assert [spec.held_tokens(10) for spec in SPEC.layers] == [10, 2, 0]
    assert SPEC.kv_bytes_per_token == 2 * (2 * 4 * 2)
    check_layers(SPEC, [layer(spec, 10) for spec in SPEC.layers])


def test_an_earlier_position_is_had_from_full_layers_alone() -> None:
    full, sliding, recurrent = (layer(spec, 10) for spec in SPEC.layers)
    assert full.prefix(FULL, 4) is not None
    assert sliding.prefix(SLIDING, 4) is None
    assert recurrent.prefix(RECURRENT, 9) is None
    assert recurrent.prefix(RECURRENT, 10) is recurrent


@pytest.mark.parametrize(
    "states",
    [
        (),
        (np.zeros((1, 8, 3), "<u2"),),
        (np.zeros((1, 8, 3), "<u2"), np.zeros((2, 4, 5), "<f4")),
        (np.zeros((1, 8, 3), "<f4"), np.zeros((2, 4, 4), "<f4")),
    ],
)
def test_states_of_another_shape_or_dtype_are_refused(states: tuple[np.ndarray, ...]) -> None:
    layers = [layer(spec, 10) for spec in SPEC.layers]
    layers[2] = replace(layers[2], states=states)
    with pytest.raises(SnapshotRefused, match=r"layers\[2\].states"):
        check_layers(SPEC, layers)
