"""The onnx engine against the reference engine, and its promises about rows, batches and caches."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: make install (extra `onnx`)")

from protocol.errors import ContextOverflow, InvalidPrompt, ModelError, ModelUnavailable, SnapshotRefused
from services.model_runner import onnx_engine
from services.model_runner.engine import PREFILL_CHUNK_TOKENS, KVCache, LayerSpec
from services.model_runner.onnx_engine import OnnxEngine, OnnxKVCache
from services.model_runner.onnx_memory import DeviceRows, RowArena
from services.model_runner.onnx_model import choose_provider
from services.model_runner.positions import prune
from services.model_runner.transformers_engine import TransformersEngine

TOKENS = [int(token) for token in np.random.default_rng(5).integers(0, 256, 1400)]
FAMILIES = ["llama", "qwen2", "gemma3"]


def load(folder: Path) -> OnnxEngine:
    return OnnxEngine.load(folder, provider="cpu", threads=1)


@pytest.fixture(scope="module")
def engines(built_models: dict[str, Path]) -> dict[str, OnnxEngine]:
    """Every built model, by the name of its folder."""
    return {name: load(folder) for name, folder in built_models.items()}


@pytest.fixture(params=FAMILIES)
def engine(request: pytest.FixtureRequest, engines: dict[str, OnnxEngine]) -> OnnxEngine:
    """Each family as int8."""
    return engines[request.param]


@pytest.fixture
def llama(engines: dict[str, OnnxEngine]) -> OnnxEngine:
    return engines["llama"]


def read(engine: OnnxEngine, tokens: list[int], capacity_tokens: int = 1400) -> OnnxKVCache:
    cache = engine.new_cache(capacity_tokens)
    engine.prefill(cache, tokens)
    return cache


def steps(engine: OnnxEngine, cache: KVCache, tokens: list[int]) -> np.ndarray:
    return np.stack([engine.step(cache, token) for token in tokens])


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_several_positions_gives_each_ones_logits(family: str, engines: dict[str, OnnxEngine]) -> None:
    engine = engines[f"{family}-fp32"]
    expected = steps(engine, read(engine, TOKENS[:40]), TOKENS[40:140])
    cache = read(engine, TOKENS[:40])
    actual = engine.read(cache, TOKENS[40:140])
    np.testing.assert_allclose(actual, expected, atol=2e-3 * expected.std())
    assert cache.length == 140


@pytest.mark.parametrize("prompt_tokens", [0, 1, 40, 64, 700])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_in_float32_are_those_of_the_reference_engine(
    family: str, prompt_tokens: int, engines: dict[str, OnnxEngine], small_models: dict[str, Path]
) -> None:
    engine = engines[f"{family}-fp32"]
    reference = TransformersEngine.load(small_models[family], device="cpu", dtype="float32", threads=1)
    theirs = reference.new_cache(1024)
    reference.prefill(theirs, TOKENS[:prompt_tokens])
    expected = np.stack([reference.step(theirs, token) for token in TOKENS[prompt_tokens : prompt_tokens + 6]])
    actual = steps(engine, read(engine, TOKENS[:prompt_tokens]), TOKENS[prompt_tokens : prompt_tokens + 6])
    assert actual.dtype == np.float32
    # Gemma's activation is the tanh form in one and the exact one in the other.
    np.testing.assert_allclose(actual, expected, atol=2e-3 * expected.std())
    assert engine.spec.layers == reference.spec.layers
    assert engine.spec.eos_token_ids == reference.spec.eos_token_ids
    assert (engine.spec.vocab_size, engine.spec.context_tokens) == (259, 2048)
    assert engine.spec.digests.config == reference.spec.digests.config


def test_int8_mostly_chooses_the_reference_engines_token(
    engine: OnnxEngine, engines: dict[str, OnnxEngine], request: pytest.FixtureRequest
) -> None:
    reference = engines[f"{request.node.callspec.params['engine']}-fp32"]
    expected = steps(reference, read(reference, TOKENS[:300]), TOKENS[300:364])
    actual = steps(engine, read(engine, TOKENS[:300]), TOKENS[300:364])
    assert (actual.argmax(1) == expected.argmax(1)).mean() > 0.85


def test_a_prefill_cancelled_between_chunks_and_taken_up_again_is_bit_identical(engine: OnnxEngine) -> None:
    assert PREFILL_CHUNK_TOKENS % engine.chunk_tokens == 0
    whole, parts = read(engine, TOKENS[:300]), engine.new_cache(1024)
    progress: list[tuple[int, int]] = []
    chunk = engine.chunk_tokens
    done = engine.prefill(parts, TOKENS[:300], lambda: parts.length >= chunk, lambda *at: progress.append(at))
    assert (done, parts.length, progress) == (chunk, chunk, [(chunk, 300)])
    assert engine.prefill(parts, TOKENS[chunk:300]) == 300 - chunk
    np.testing.assert_array_equal(engine.step(whole, 9), engine.step(parts, 9))


@pytest.mark.parametrize("prompt_tokens", [0, 1, 39, 300, 900])
def test_an_exported_cache_goes_on_bit_for_bit(engine: OnnxEngine, prompt_tokens: int) -> None:
    cache = read(engine, TOKENS[:prompt_tokens])
    steps(engine, cache, TOKENS[:10])
    layers = [
        replace(layer, keys=layer.keys.copy(), values=layer.values.copy()) for layer in engine.export_layers(cache)
    ]
    for spec, layer in zip(engine.spec.layers, layers, strict=True):
        assert layer.keys.shape == (spec.kv_heads, spec.held_tokens(prompt_tokens + 10), spec.head_dim)
        assert layer.seen_tokens == prompt_tokens + 10
    other = read(engine, TOKENS[7:500])  # Another conversation's row may have been anything before.
    other.close()
    resumed = engine.import_layers(layers, 1400)
    np.testing.assert_array_equal(steps(engine, resumed, TOKENS[:100]), steps(engine, cache, TOKENS[:100]))
    engine.prefill(resumed, TOKENS[:200])
    engine.prefill(cache, TOKENS[:200])
    np.testing.assert_array_equal(engine.step(resumed, 9), engine.step(cache, 9))


@pytest.mark.parametrize("builders_own", [False, True])
def test_graphs_that_compute_other_logits_than_ours_read_prompts_alike(
    builders_own: bool, engines: dict[str, OnnxEngine], built_models: dict[str, Path], tmp_path: Path
) -> None:
    import onnx

    def every_row(model: Any) -> None:
        """As the builder leaves it: logits of all positions; or, by its option, of the last one alone."""
        gather = next(node for node in model.graph.node if node.name == "/lm_head/rows/Gather")
        head = next(node for node in model.graph.node if node.input[:1] == gather.output)
        if builders_own:
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1]), "logits_indices"))
        else:
            head.input[0] = gather.input[0]
            model.graph.node.remove(gather)
        model.graph.input.remove(next(each for each in model.graph.input if each.name == "logits_indices"))
        (logits,) = [each for each in model.graph.output if each.name == "logits"]
        dimension = logits.type.tensor_type.shape.dim[1]
        dimension.dim_param = "sequence_length"
        if builders_own:
            dimension.dim_value = 1

    folder = tmp_path / "model"
    shutil.copytree(built_models["llama"], folder)
    changed_graph(every_row)(folder)
    other, llama = load(folder), engines["llama"]
    np.testing.assert_array_equal(other.step(read(other, TOKENS[:100]), 9), llama.step(read(llama, TOKENS[:100]), 9))


@pytest.mark.parametrize("tokens", [0, 30, 64, 300])
def test_a_fork_goes_on_as_its_source_does_and_leaves_it_alone(engine: OnnxEngine, tokens: int) -> None:
    source = read(engine, TOKENS[:tokens])
    fork = engine.fork(source, tokens, 512)
    assert fork is not None
    assert (fork.length, fork.capacity_tokens) == (tokens, 512)
    expected = steps(engine, source, TOKENS[:50])
    np.testing.assert_array_equal(steps(engine, fork, TOKENS[:50]), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fork_of_whole_chunks_is_what_reading_them_gives(family: str, engines: dict[str, OnnxEngine]) -> None:
    engine = engines[family]
    source = read(engine, TOKENS[:200])
    fork = engine.fork(source, 128, 1024)
    assert fork is not None
    np.testing.assert_array_equal(engine.step(fork, 9), engine.step(read(engine, TOKENS[:128]), 9))
    assert engine.fork(source, 201, 1024) is None


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_a_fork_of_what_a_window_has_left_behind_is_none(family: str, engines: dict[str, OnnxEngine]) -> None:
    engine = engines[family]
    assert engine.fork(read(engine, TOKENS[:1000]), 256, 1024) is None


# --- rows and batches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [2, 3, 8])
def test_a_batch_of_different_lengths_agrees_with_each_alone(engine: OnnxEngine, batch: int) -> None:
    lengths = [5, 130, 0, 300, 1, 64, 77, 41][:batch]
    together = [read(engine, TOKENS[n : 2 * n]) for n in lengths]
    alone = [read(engine, TOKENS[n : 2 * n]) for n in lengths]
    for token in TOKENS[:8]:
        expected = [engine.step(cache, token + at) for at, cache in enumerate(alone)]
        actual = engine.step_batch([(cache, token + at) for at, cache in enumerate(together)])
        np.testing.assert_allclose(np.stack(actual), np.stack(expected), atol=2e-2 * np.std(expected))
    assert [cache.length for cache in together] == [n + 8 for n in lengths]


def test_more_than_the_largest_batch_is_computed_in_parts(llama: OnnxEngine) -> None:
    many = [read(llama, TOKENS[at : at + 9]) for at in range(llama.max_batch + 3)]
    alone = [read(llama, TOKENS[at : at + 9]) for at in range(llama.max_batch + 3)]
    actual = llama.step_batch([(cache, 7) for cache in many])
    np.testing.assert_allclose(np.stack(actual), [llama.step(cache, 7) for cache in alone], atol=1e-2)


def test_a_conversation_alone_is_the_same_in_any_row_and_after_any_move(engine: OnnxEngine) -> None:
    expected = steps(engine, read(engine, TOKENS[:100]), TOKENS[:40])
    others = [read(engine, TOKENS[at : at + 300]) for at in range(4)]
    wanderer = read(engine, TOKENS[:100])
    rows = {wanderer.taken_row().index}
    actual = []
    for at, token in enumerate(TOKENS[:40]):
        if at % 10 == 5:  # It is moved beside a longer one, that steps with others; and goes on alone.
            engine._arena.together([others[at // 10].taken_row(), wanderer.taken_row()])
            rows.add(wanderer.taken_row().index)
            engine.step_batch([(others[0], 1), (others[-1], 2)])
            rows.add(wanderer.taken_row().index)
        actual.append(engine.step(wanderer, token))
    np.testing.assert_array_equal(np.stack(actual), expected)
    assert len(rows) > 1


def test_two_caches_do_not_see_each_other(llama: OnnxEngine) -> None:
    alone, first, second = (llama.new_cache(64) for _ in range(3))
    expected = steps(llama, alone, TOKENS[:20])
    for at, token in enumerate(TOKENS[:20]):
        np.testing.assert_array_equal(llama.step(first, token), expected[at])
        llama.step(second, TOKENS[500 + at])


def test_what_an_earlier_conversation_left_in_a_row_is_never_read(engine: OnnxEngine) -> None:
    expected = steps(engine, read(engine, TOKENS[:50]), TOKENS[:60])
    poisoned = read(engine, TOKENS[:600])
    row = poisoned.taken_row()
    for layer in range(len(engine.spec.layers)):
        for values in (False, True):
            engine._arena.read(row, layer, values, 0, 600)[:] = np.nan
    index = row.index
    poisoned.close()
    cache = engine.new_cache(1400)
    assert cache.taken_row().index == index
    engine.prefill(cache, TOKENS[:50])
    np.testing.assert_array_equal(steps(engine, cache, TOKENS[:60]), expected)


def test_a_step_that_cannot_be_made_is_named_and_nothing_is_computed(llama: OnnxEngine) -> None:
    caches = [read(llama, TOKENS[: 10 + index]) for index in range(llama.max_batch + 2)]
    full = read(llama, TOKENS[:2], capacity_tokens=2)
    for at in (1, llama.max_batch + 1):  # in the second part of a large batch too
        batch: list[tuple[KVCache, int]] = [(cache, 1) for cache in caches]
        with pytest.raises(ContextOverflow) as overflow:
            llama.step_batch([*batch[:at], (full, 1), *batch[at + 1 :]])
        assert overflow.value.field == f"steps[{at}]"
        with pytest.raises(InvalidPrompt) as invalid:
            llama.step_batch([*batch[:at], (caches[at], -1), *batch[at + 1 :]])
        assert invalid.value.field == f"steps[{at}]"
    closed = llama.new_cache(8)
    closed.close()
    with pytest.raises(ModelError, match="closed") as broken:
        llama.step_batch([(closed, 1), (caches[0], 1)])
    assert broken.value.field == "steps[0]"
    with pytest.raises(ContextOverflow) as alone:
        llama.step(full, 1)
    assert alone.value.field == "tokens"
    assert [cache.length for cache in caches] == [10 + index for index in range(len(caches))]


def test_one_cache_twice_in_a_batch_is_refused(llama: OnnxEngine) -> None:
    cache = read(llama, TOKENS[:9])
    with pytest.raises(ModelError, match="twice"):
        llama.step_batch([(cache, 1), (cache, 2)])
    assert cache.length == 9


def arena(rows: int = 6) -> RowArena:
    return RowArena((LayerSpec("full", 2, 32), LayerSpec("sliding", 1, 64, 40)), 256, np.dtype("<f4"), rows)


def fill(arena: RowArena, value: float, length: int) -> Any:
    row = arena.take()
    assert row is not None
    for layer in (0, 1):
        arena.read(row, layer, False, 0, length)[:] = value
        arena.read(row, layer, True, 0, length)[:] = -value
    row.length = length
    return row


def holds(arena: RowArena, row: Any, value: float) -> bool:
    return all(
        (arena.read(row, layer, values, 0, row.length) == (-value if values else value)).all()
        and not arena.read(row, layer, values, row.length, arena.positions).any()
        for layer in (0, 1)
        for values in (False, True)
    )


def test_rows_come_together_by_moving_the_fewest_positions_and_keep_what_they_hold() -> None:
    place = arena()
    rows = [fill(place, value, length) for value, length in ((1, 10), (2, 200), (3, 20), (4, 30))]
    assert place.together([rows[1], rows[2]])
    assert [row.index for row in rows] == [0, 1, 2, 3]
    assert place.together([rows[1], rows[3]])
    assert rows[1].index == 1  # The longest stays where it is.
    assert rows[3].index in (0, 2)
    assert all(holds(place, row, value) for row, value in zip(rows, (1, 2, 3, 4), strict=True))
    assert place.together([rows[0], rows[1], rows[2], rows[3]])
    assert sorted(row.index for row in rows) in ([0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5])
    assert all(holds(place, row, value) for row, value in zip(rows, (1, 2, 3, 4), strict=True))


def test_where_no_row_is_free_nothing_is_moved_and_a_batch_is_computed_one_by_one(llama: OnnxEngine) -> None:
    place = arena(rows=3)
    rows = [fill(place, value, 10) for value in (1, 2, 3)]
    assert place.take() is None
    assert not place.together([rows[0], rows[2]])
    assert [row.index for row in rows] == [0, 1, 2]
    place.release(rows[1])
    assert place.together([rows[0], rows[2]])
    assert all(holds(place, row, value) for row, value in ((rows[0], 1), (rows[2], 3)))


def test_closing_gives_the_memory_back_and_a_short_conversation_takes_little(engine: OnnxEngine) -> None:
    before = resident_bytes()
    cache = engine.new_cache(2048)
    assert cache.allocated_bytes == 0
    engine.prefill(cache, TOKENS[:40])
    assert 40 * engine.spec.kv_bytes_per_token <= cache.allocated_bytes < 400_000
    cache.close()
    cache.close()
    assert cache.allocated_bytes == 0
    with pytest.raises(ModelError, match="closed"):
        engine.step(cache, 9)
    place = RowArena((LayerSpec("full", 4, 256),) * 8, 2048, np.dtype("<f4"))
    rows = [fill_wide(place) for _ in range(2)]
    taken = resident_bytes() - before
    assert taken > sum(map(place.bytes_of, rows)) * 0.9 > 100_000_000
    for row in rows:
        place.release(row)
    assert resident_bytes() - before < taken / 4


def fill_wide(place: RowArena) -> Any:
    row = place.take()
    assert row is not None
    for layer in range(8):
        for values in (False, True):
            place.read(row, layer, values, 0, 1000)[:] = 1
    row.length = 1000
    return row


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_cache_that_is_forgotten_gives_its_row_back(llama: OnnxEngine) -> None:
    cache = read(llama, TOKENS[:9])
    index = cache.taken_row().index
    del cache
    assert read(llama, TOKENS[:9]).taken_row().index <= index


def test_sliding_layers_give_back_what_their_windows_have_left(engines: dict[str, OnnxEngine]) -> None:
    engine = engines["gemma3"]
    cache = read(engine, TOKENS[:1400])
    everything = 1400 * engine.spec.kv_bytes_per_token
    assert cache.allocated_bytes < everything * 0.5
    row = cache.taken_row()
    assert not engine._arena.read(row, 0, False, 0, 1024).any()
    assert engine._arena.read(row, 5, False, 0, 1400).any(axis=2).all()  # The full layer keeps all.


def test_rows_that_stand_alone_serve_as_well(engine: OnnxEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, in host memory here: what ONNX Runtime allocates, copied in and out, and no batches."""
    expected = steps(engine, read(engine, TOKENS[:100]), TOKENS[:5])
    source = read(engine, TOKENS[:100])
    exported = [
        replace(layer, keys=layer.keys.copy(), values=layer.values.copy()) for layer in engine.export_layers(source)
    ]
    alone = DeviceRows(engine.spec.layers, 512, np.dtype(np.float32), "cpu")
    monkeypatch.setattr(engine, "_arena", alone)
    caches = [read(engine, TOKENS[:100], 512), engine.import_layers(exported, 512)]
    forked = engine.fork(caches[0], 100, 512)
    assert forked is not None
    assert forked.allocated_bytes == 512 * engine.spec.kv_bytes_per_token
    for at, token in enumerate(TOKENS[:5]):
        for logits in engine.step_batch([(cache, token) for cache in (*caches, forked)]):
            np.testing.assert_array_equal(logits, expected[at])
    for layer, other in zip(engine.export_layers(caches[0]), engine.export_layers(forked), strict=True):
        np.testing.assert_array_equal(layer.values, other.values)
    forked.close()
    assert forked.allocated_bytes == 0


# --- bad input and faults -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1, 259, 2**40])
def test_a_token_outside_the_vocabulary_is_refused_and_named(llama: OnnxEngine, bad: int) -> None:
    cache, other = llama.new_cache(64), llama.new_cache(64)
    with pytest.raises(InvalidPrompt, match=f"token {bad} at position 2"):
        llama.prefill(cache, [1, 2, bad])
    with pytest.raises(InvalidPrompt):
        llama.step_batch([(other, 1), (cache, bad)])
    assert (cache.length, other.length) == (0, 0)


def test_more_tokens_than_the_context_are_refused_and_the_cache_stays_usable(llama: OnnxEngine) -> None:
    cache = llama.new_cache(8)
    with pytest.raises(ContextOverflow, match="9 positions"):
        llama.prefill(cache, TOKENS[:9])
    llama.prefill(cache, TOKENS[:8])
    with pytest.raises(ContextOverflow):
        llama.step(cache, 1)
    with pytest.raises(ContextOverflow, match="context is 2,048"):
        llama.new_cache(2049)
    full = read(llama, [1] * 2047, 2048)
    llama.step_batch([(full, 1), (read(llama, TOKENS[:5]), 1)])
    with pytest.raises(ContextOverflow):
        llama.step(full, 1)


def test_caches_and_layers_of_another_model_are_refused(engines: dict[str, OnnxEngine]) -> None:
    llama, gemma = engines["llama"], engines["gemma3"]
    with pytest.raises(ModelError, match="another engine"):
        llama.step(gemma.new_cache(8), 1)
    with pytest.raises(SnapshotRefused):
        llama.import_layers(gemma.export_layers(read(gemma, TOKENS[:9])), 64)
    with pytest.raises(ContextOverflow, match="9 positions"):
        llama.import_layers(llama.export_layers(read(llama, TOKENS[:9])), 8)


def test_a_prompt_for_which_no_memory_is_left_is_refused_and_nothing_is_read(
    llama: OnnxEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = read(llama, TOKENS[:9])
    monkeypatch.setattr(onnx_engine, "_available_bytes", lambda: 64 * 1024 * 1024 + 1000)
    with pytest.raises(ModelError, match="are left") as caught:
        llama.prefill(cache, TOKENS[:100])
    assert caught.value.reason == "out of memory"
    assert cache.length == 9


def test_a_failure_inside_the_runtime_leaves_the_cache_as_it_was(
    engine: OnnxEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = steps(engine, read(engine, TOKENS[:100]), TOKENS[:5])
    cache = read(engine, TOKENS[:64])

    def fail(_binding: Any) -> None:
        raise RuntimeError("Failed to allocate memory for requested buffer of size 123")

    with monkeypatch.context() as patch:
        patch.setattr(engine._session, "run_with_iobinding", fail)
        with pytest.raises(ModelError, match="out of memory"):
            engine.prefill(cache, TOKENS[64:100])
        with pytest.raises(ModelError, match="out of memory"):
            engine.step_batch([(cache, 1), (engine.new_cache(8), 1)])
    assert cache.length == 64
    engine.prefill(cache, TOKENS[64:100])
    np.testing.assert_array_equal(steps(engine, cache, TOKENS[:5]), expected)


def cut_graph(folder: Path) -> None:
    path = folder / "model.onnx"
    path.write_bytes(path.read_bytes()[:20_000])


def other_graph(folder: Path) -> None:
    import onnx

    one = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    two = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "other", [one], [two])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def changed_graph(change: Callable[[Any], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        import onnx

        model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
        change(model)
        (folder / "model.onnx").write_bytes(model.SerializeToString())

    return damage


def newer_opset(model: Any) -> None:
    model.opset_import[0].version = 999


def rename_an_output(model: Any) -> None:
    for node in model.graph.node:
        for at, name in enumerate(node.output):
            if name == "present.1.key":
                node.output[at] = "other.1.key"
    for output in model.graph.output:
        if output.name == "present.1.key":
            output.name = "other.1.key"


def unknown_operator(model: Any) -> None:
    next(node for node in model.graph.node if node.op_type == "GroupQueryAttention").op_type = "NextYearsAttention"


def rolling_cache(model: Any) -> None:
    import onnx

    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            for attribute in node.attribute:
                if attribute.name == "local_window_size":
                    attribute.i = 40
            node.attribute.append(onnx.helper.make_attribute("sliding_window_cache", 1))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut_graph, "ends in the middle"),
        (lambda folder: (folder / "model.onnx").write_bytes(b"\xff" * 64), "reading the graph"),
        (lambda folder: (folder / "model.onnx").write_bytes(b""), "model.onnx"),
        (lambda folder: (folder / "model.onnx").unlink(), "No such file"),
        (lambda folder: (folder / "model.onnx.data").unlink(), "model.onnx.data"),
        (lambda folder: (folder / "model.onnx.data").write_bytes(b"too short"), "model"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "genai_config.json").write_text("{"), "genai_config.json"),
        (lambda folder: (folder / "genai_config.json").write_text('{"model": {}}'), "lacks something"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
        (other_graph, "lacks attention_mask"),
        (changed_graph(newer_opset), "loading the graph"),
        (changed_graph(rename_an_output), "lacks present.1.key"),
        (changed_graph(unknown_operator), "NextYearsAttention"),
        (changed_graph(rolling_cache), "rolling cache"),
    ],
)
def test_a_damaged_or_foreign_model_is_refused_with_its_reason(
    damage: Callable[[Path], None], said: str, built_models: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(built_models["llama"], folder)
    damage(folder)
    with pytest.raises(ModelUnavailable, match=said) as caught:
        load(folder)
    assert caught.value.hint


def test_any_cut_and_any_flipped_byte_of_the_graph_is_refused_or_runs_and_never_crashes(
    built_models: dict[str, Path], tmp_path: Path
) -> None:
    from services.model_runner.onnx_graph import attention_nodes

    whole = (built_models["llama"] / "model.onnx").read_bytes()
    random = np.random.default_rng(3)
    graph = tmp_path / "model.onnx"
    for at in random.integers(0, len(whole), 150):
        graph.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :] if at % 2 else whole[:at])
        try:
            attention_nodes(graph)
        except ModelUnavailable:
            continue


def test_the_provider_is_chosen_with_its_reason(built_models: dict[str, Path]) -> None:
    cuda = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert choose_provider(cuda).value == "cuda"
    assert "CUDA" in choose_provider(cuda).reason
    assert choose_provider(cuda, "cpu").value == "cpu"
    assert choose_provider(["CPUExecutionProvider"]).value == "cpu"
    for wanted in ("cuda", "tensorrt", "abacus"):
        with pytest.raises(ModelUnavailable, match=f"'{wanted}' is not available, cpu is"):
            choose_provider(["CPUExecutionProvider"], wanted)


def test_fingerprint_and_digests_tell_models_apart(
    engines: dict[str, OnnxEngine], built_models: dict[str, Path]
) -> None:
    int8, float32 = engines["llama"], engines["llama-fp32"]
    assert (int8.fingerprint.engine, int8.fingerprint.device) == ("onnxruntime", "cpu")
    assert "CPUExecutionProvider" in int8.fingerprint.engine_version
    assert int8.fingerprint.chunk_schedule == f"multiples of {int8.chunk_tokens}"
    assert int8.spec.digests.weights != float32.spec.digests.weights
    assert int8.spec.digests.tokenizer == float32.spec.digests.tokenizer
    assert json.loads((built_models["llama"] / "config.json").read_text())["model_type"] == "llama"


def test_the_engine_runs_where_torch_and_transformers_are_absent(built_models: dict[str, Path]) -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'onnx', 'onnxruntime_genai')))\n"
        "from pathlib import Path\n"
        "from services.model_runner.onnx_engine import OnnxEngine\n"
        "engine = OnnxEngine.load(Path(sys.argv[1]), threads=1)\n"
        "cache = engine.new_cache(64); engine.prefill(cache, [1, 2, 3]); print(engine.step(cache, 4).argmax())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(built_models["llama"])],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


# --- pruned caches --------------------------------------------------------------------------------------------


LENGTH = 600
KEPT = np.array([*range(4), *range(9, 300, 5), 511, *range(560, LENGTH)])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_cache_gives_the_reference_engines_logits(
    family: str, engines: dict[str, OnnxEngine], small_models: dict[str, Path]
) -> None:
    engine = engines[f"{family}-fp32"]
    assert engine.explicit_positions
    reference = TransformersEngine.load(small_models[family], device="cpu", dtype="float32", threads=1)
    source = reference.new_cache(LENGTH)
    reference.prefill(source, TOKENS[:LENGTH])
    layers = prune(reference.export_layers(source), KEPT)
    expected = reference.read(reference.import_layers(layers, 900), TOKENS[LENGTH : LENGTH + 60])
    cache = engine.import_layers(layers, 900)
    assert (cache.length, cache.pruned) == (LENGTH, True)
    found = steps(engine, cache, TOKENS[LENGTH : LENGTH + 60])
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3 * expected.std())
    by_chunk = engine.import_layers(layers, 900)
    np.testing.assert_allclose(engine.read(by_chunk, TOKENS[LENGTH : LENGTH + 60]), found, atol=1e-3 * found.std())


def test_a_pruned_cache_comes_out_with_its_true_positions_and_is_forked_and_batched(
    engines: dict[str, OnnxEngine],
) -> None:
    engine = engines["llama-fp32"]
    layers = prune(engine.export_layers(read(engine, TOKENS[:LENGTH])), KEPT)
    cache = engine.import_layers(layers, 900)
    for own, there in zip(engine.export_layers(cache), layers, strict=True):
        np.testing.assert_array_equal(own.positions, there.positions)
        np.testing.assert_allclose(own.keys, there.keys, atol=1e-4 * float(there.keys.std()))
        np.testing.assert_array_equal(own.values, there.values)
    fork = engine.fork(cache, LENGTH, 900)
    earlier = engine.fork(cache, 300, 900)
    assert fork is not None
    assert earlier is not None
    assert (fork.pruned, earlier.length) == (True, 300)
    alone = engine.step(fork, 7)
    assert fork.length == LENGTH + 1
    positions = engine.export_layers(fork)[0].positions
    np.testing.assert_array_equal(positions, [*KEPT, LENGTH])
    together = engine.step_batch([(read(engine, TOKENS[:50]), 3), (cache, 7)])[1]
    np.testing.assert_allclose(together, alone, atol=1e-3 * alone.std())


def test_a_pruned_cache_with_less_than_a_window_is_refused(engines: dict[str, OnnxEngine]) -> None:
    engine = engines["gemma3-fp32"]
    layers = prune(engine.export_layers(read(engine, TOKENS[:LENGTH])), np.arange(10))
    with pytest.raises(SnapshotRefused, match="sliding") as caught:
        engine.import_layers(layers, 900)
    assert caught.value.field == "kept"


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "phi3"},
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "yarn"}},
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5}},
        {"rope_parameters": None},
    ],
)
def test_a_model_that_turns_keys_otherwise_has_no_explicit_positions(
    changes: dict[str, Any], built_models: dict[str, Path], engines: dict[str, OnnxEngine], tmp_path: Path
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(built_models["llama-fp32"], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    other = load(folder)
    assert not other.explicit_positions
    whole = engines["llama-fp32"]
    layers = prune(whole.export_layers(read(whole, TOKENS[:LENGTH])), KEPT)
    with pytest.raises(SnapshotRefused, match="counts positions") as caught:
        other.import_layers(layers, 900)
    assert caught.value.field == "kept"
