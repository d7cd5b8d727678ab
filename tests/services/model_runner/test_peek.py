"""Peeking: the next step's logits before it is done, while the cache stays as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from services.model_runner.engine import Engine, KVCache
from services.model_runner.onnx_engine import OnnxEngine
from services.model_runner.transformers_engine import TransformersEngine
from tests.services.model_runner.conftest import FAMILIES, WINDOW

TOKENS = [int(token) for token in np.random.default_rng(9).integers(0, 256, 700)]
LENGTHS = (0, WINDOW - 1, WINDOW, 511, 512)
"""Around a window that fills, a window that moves, and memory that grows."""


def content(engine: Engine, cache: KVCache) -> list[bytes]:
    return [plane.tobytes() for layer in engine.export_layers(cache) for plane in layer.planes]


def check(engine: Engine) -> None:
    for length in LENGTHS:
        peeked, plain = engine.new_cache(1024), engine.new_cache(1024)
        for cache in (peeked, plain):
            engine.prefill(cache, TOKENS[:length])
        before = content(engine, peeked)
        first = engine.peek(peeked, TOKENS[length])
        engine.peek(peeked, 7)
        assert peeked.length == length
        assert content(engine, peeked) == before
        for at in range(length, length + 3):
            expected = engine.step(plain, TOKENS[at])
            np.testing.assert_array_equal(engine.step(peeked, TOKENS[at]), expected)
            if at == length:
                np.testing.assert_array_equal(first, expected)
                np.testing.assert_array_equal(Engine.peek(engine, peeked, 5), engine.peek(peeked, 5))
        assert content(engine, peeked) == content(engine, plain)
        peeked.close()
        plain.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_torch_cache_stays_as_it_is(family: str, small_models: dict[str, Path]) -> None:
    check(TransformersEngine.load(small_models[family], device="cpu", threads=1))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_onnx_cache_stays_as_it_is(family: str, built_models: dict[str, Path]) -> None:
    check(OnnxEngine.load(built_models[family], provider="cpu", threads=1))
