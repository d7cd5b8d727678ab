"""Steps of several conversations at once on torch: each as it would be alone, whatever the others are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from protocol.errors import ContextOverflow, InvalidPrompt, ModelError
from services.model_runner.engine import KVCache
from services.model_runner.transformers_engine import MAX_BATCH, TransformersEngine

RANDOM = np.random.default_rng(11)
PROMPTS = [[int(token) for token in RANDOM.integers(0, 256, count)] for count in (0, 1, 38, 39, 40, 300, 511, 700)]
"""Lengths before, at and past the windows (40), and just before a cache grows."""
STEPS = [[int(token) for token in RANDOM.integers(0, 256, len(PROMPTS))] for _ in range(5)]


def load(folder: Path, dtype: str = "auto") -> TransformersEngine:
    return TransformersEngine.load(folder, device="cpu", dtype=dtype, threads=1)


def caches_of(engine: TransformersEngine, prompts: Sequence[list[int]] = PROMPTS) -> list[KVCache]:
    caches: list[KVCache] = []
    for prompt in prompts:
        cache = engine.new_cache(1024)
        engine.prefill(cache, prompt)
        caches.append(cache)
    return caches


def test_a_batch_gives_what_each_alone_gives(small_model: Path) -> None:
    engine = load(small_model, "float32")
    assert engine.max_batch == MAX_BATCH == len(PROMPTS)
    together, alone = caches_of(engine), caches_of(engine)
    for tokens in STEPS:
        batch = engine.step_batch(list(zip(together, tokens, strict=True)))
        expected = np.stack([engine.step(cache, token) for cache, token in zip(alone, tokens, strict=True)])
        np.testing.assert_allclose(np.stack(batch), expected, rtol=1e-4, atol=1e-4 * expected.std())
        assert {row.dtype for row in batch} == {np.dtype(np.float32)}
    assert [cache.length for cache in together] == [cache.length for cache in alone]


def test_in_bfloat16_a_batch_is_as_close_to_float32_as_each_alone(small_model: Path) -> None:
    exact, engine = load(small_model, "float32"), load(small_model, "bfloat16")
    reference, together, alone = caches_of(exact), caches_of(engine), caches_of(engine)
    errors: dict[str, list[float]] = {"together": [], "alone": []}
    for tokens in STEPS:
        steps = [exact.step(cache, token) for cache, token in zip(reference, tokens, strict=True)]
        batch = engine.step_batch(list(zip(together, tokens, strict=True)))
        single = [engine.step(cache, token) for cache, token in zip(alone, tokens, strict=True)]
        for name, rows in (("together", batch), ("alone", single)):
            errors[name].append(float(np.abs(np.stack(rows) - np.stack(steps)).mean()))
    assert np.mean(errors["together"]) < 1.2 * np.mean(errors["alone"])


def test_a_batch_of_one_is_a_step_bit_for_bit(small_model: Path) -> None:
    engine = load(small_model)
    for prompt in PROMPTS:
        one, other = caches_of(engine, [prompt, prompt])
        (row,) = engine.step_batch([(one, 7)])
        np.testing.assert_array_equal(row, engine.step(other, 7))
    assert engine.step_batch([]) == []


def test_rows_belong_to_the_caller_and_do_not_hold_each_other(engine: TransformersEngine) -> None:
    first, second = engine.step_batch([(cache, 3) for cache in caches_of(engine, PROMPTS[:2])])
    kept = second.copy()
    first.fill(0)
    np.testing.assert_array_equal(second, kept)
    assert first.base is None


def test_a_conversation_that_leaves_and_one_that_joins_do_not_disturb_the_others(
    small_models: dict[str, Path],
) -> None:
    engine = load(small_models["gemma3"], "float32")
    (stays, leaves), (joins,) = caches_of(engine, PROMPTS[3:5]), caches_of(engine, PROMPTS[5:6])
    (alone,) = caches_of(engine, PROMPTS[3:4])
    expected = np.stack([engine.step(alone, token) for token in (1, 2, 3)])
    rows = [
        engine.step_batch([(stays, 1), (leaves, 9)])[0],
        engine.step_batch([(stays, 2)])[0],
        engine.step_batch([(joins, 9), (stays, 3)])[1],
    ]
    np.testing.assert_allclose(np.stack(rows), expected, rtol=1e-4, atol=1e-4 * expected.std())


def test_a_step_that_cannot_be_made_is_named_and_nothing_is_computed(engine: TransformersEngine) -> None:
    first, second = caches_of(engine, PROMPTS[1:3])
    full = engine.new_cache(2)
    engine.prefill(full, [1, 2])
    with pytest.raises(ContextOverflow) as overflow:
        engine.step_batch([(first, 1), (full, 1), (second, 1)])
    assert overflow.value.field == "steps[1]"
    with pytest.raises(InvalidPrompt, match="token 259") as invalid:
        engine.step_batch([(first, 1), (second, 259)])
    assert invalid.value.field == "steps[1]"
    closed = engine.new_cache(8)
    closed.close()
    with pytest.raises(ModelError, match="closed") as broken:
        engine.step_batch([(closed, 1), (first, 1)])
    assert broken.value.field == "steps[0]"
    assert (first.length, second.length) == (1, 38)
    assert len(engine.step_batch([(first, 1), (second, 1)])) == 2


def test_a_cache_that_cannot_grow_fails_alone(small_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load(small_models["llama"])
    small, large = caches_of(engine, [PROMPTS[2], [*PROMPTS[6], 1]])  # 512 positions: the next one needs more room

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", full)
        with pytest.raises(ModelError, match="out of memory") as failed:
            engine.step_batch([(small, 1), (large, 1)])
    assert failed.value.field == "steps[1]"
    assert len(engine.step_batch([(small, 1), (large, 1)])) == 2


def test_a_failure_amid_the_computation_spoils_every_cache_of_the_batch_and_no_other(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(small_model)
    first, second, other = caches_of(engine, PROMPTS[1:4])
    fast = engine._fast_decode
    assert fast is not None

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(fast, "_blocks", [fast._blocks[0], fast._blocks[1]._replace(activation=fail), *fast._blocks[2:]])
        with pytest.raises(ModelError, match="out of memory") as failed:
            engine.step_batch([(first, 1), (second, 1)])
    assert failed.value.field == ""
    for spoiled in (first, second):
        with pytest.raises(ModelError, match="half written"):
            engine.step(spoiled, 1)
    assert len(engine.step_batch([(other, 1)])) == 1


def test_bases_that_follow_the_longest_row_are_not_batched(small_models: dict[str, Path], tmp_path: Path) -> None:
    import transformers

    config = transformers.AutoConfig.from_pretrained(small_models["llama"])
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((small_models["llama"] / "tokenizer.json").read_bytes())
    engine = load(tmp_path)
    assert engine.max_batch == 1
    first, second = caches_of(engine, PROMPTS[1:3])
    alone, other = caches_of(engine, PROMPTS[1:3])
    rows = engine.step_batch([(first, 1), (second, 2)])
    np.testing.assert_array_equal(rows[0], engine.step(alone, 1))
    np.testing.assert_array_equal(rows[1], engine.step(other, 2))
