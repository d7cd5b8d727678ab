"""The transformers engine against the stock model, and its promises about caches."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from protocol.errors import ContextOverflow, InvalidPrompt, ModelError, ModelUnavailable, SnapshotRefused
from services.model_runner import products
from services.model_runner.digests import model_digests
from services.model_runner.engine import PREFILL_CHUNK_TOKENS, chunk_ends
from services.model_runner.transformers_engine import TransformersEngine

TOKENS = [int(token) for token in np.random.default_rng(5).integers(0, 256, 1400)]


def stock_logits(folder: Path, tokens: list[int], dtype: torch.dtype) -> np.ndarray:
    """The stock model's logits at every position, without a cache: (tokens, vocabulary)."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].float().numpy()


def load(folder: Path, dtype: str = "auto") -> TransformersEngine:
    return TransformersEngine.load(folder, device="cpu", dtype=dtype, threads=1)


@pytest.mark.parametrize("prompt_tokens", [0, 1, 39, 40, 41, 255, 256, 257, 700])
def test_logits_in_float32_are_those_of_the_stock_model(small_model: Path, prompt_tokens: int) -> None:
    engine = load(small_model, "float32")
    cache = engine.new_cache(1024)
    engine.prefill(cache, TOKENS[:prompt_tokens])
    steps = 6
    expected = stock_logits(small_model, TOKENS[: prompt_tokens + steps], torch.float32)[prompt_tokens:]
    actual = np.stack([engine.step(cache, token) for token in TOKENS[prompt_tokens : prompt_tokens + steps]])
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4 * expected.std())


def test_logits_in_bfloat16_are_as_close_to_float32_as_the_stock_models(small_model: Path) -> None:
    engine = load(small_model, "bfloat16")
    cache = engine.new_cache(1024)
    engine.prefill(cache, TOKENS[:400])
    actual = np.stack([engine.step(cache, token) for token in TOKENS[400:416]])
    exact = stock_logits(small_model, TOKENS[:416], torch.float32)[400:]
    stock = stock_logits(small_model, TOKENS[:416], torch.bfloat16)[400:]
    assert np.abs(actual - exact).mean() < 1.5 * np.abs(stock - exact).mean()


@pytest.mark.parametrize("prompt_tokens", [300, 480, 1000])
def test_steps_past_windows_and_growths_stay_right(small_model: Path, prompt_tokens: int) -> None:
    engine = load(small_model, "float32")
    cache = engine.new_cache(2048)
    engine.prefill(cache, TOKENS[:prompt_tokens])
    end = prompt_tokens + 50  # Past 512 and 1,024 positions the cache grows; past 336 a sliding layer moves along.
    logits = [engine.step(cache, token) for token in TOKENS[prompt_tokens:end]]
    expected = stock_logits(small_model, TOKENS[:end], torch.float32)[prompt_tokens:]
    np.testing.assert_allclose(np.stack(logits), expected, rtol=1e-4, atol=1e-4 * expected.std())


def test_chunks_end_at_absolute_multiples() -> None:
    assert chunk_ends(0, 600, 256) == [256, 512, 600]
    assert chunk_ends(100, 600, 256) == [256, 512, 600]
    assert chunk_ends(256, 512, 256) == [512]
    assert chunk_ends(5, 5, 256) == []


def test_a_prefill_cancelled_between_chunks_and_taken_up_again_is_bit_identical(small_model: Path) -> None:
    engine = load(small_model)
    whole, parts = engine.new_cache(1024), engine.new_cache(1024)
    engine.prefill(whole, TOKENS[:700])
    progress: list[tuple[int, int]] = []
    chunk = engine.chunk_tokens
    assert PREFILL_CHUNK_TOKENS % chunk == 0
    read = engine.prefill(parts, TOKENS[:700], lambda: parts.length >= chunk, lambda *at: progress.append(at))
    assert (read, parts.length, progress) == (chunk, chunk, [(chunk, 700)])
    assert engine.prefill(parts, TOKENS[chunk:700]) == 700 - chunk
    np.testing.assert_array_equal(engine.step(whole, 9), engine.step(parts, 9))


@pytest.mark.parametrize("prompt_tokens", [1, 39, 300, 700])
def test_an_exported_cache_goes_on_bit_for_bit(small_model: Path, prompt_tokens: int) -> None:
    engine = load(small_model)
    cache = engine.new_cache(1400)
    engine.prefill(cache, TOKENS[:prompt_tokens])
    for token in TOKENS[:10]:
        engine.step(cache, token)
    layers = [
        replace(layer, keys=layer.keys.copy(), values=layer.values.copy()) for layer in engine.export_layers(cache)
    ]
    for spec, layer in zip(engine.spec.layers, layers, strict=True):
        held = prompt_tokens + 10 if spec.kind == "full" else min(prompt_tokens + 10, spec.window_tokens - 1)
        assert layer.keys.shape == (spec.kv_heads, held, spec.head_dim)
        assert layer.seen_tokens == prompt_tokens + 10
    resumed = engine.import_layers(layers, 1400)
    for token in TOKENS[:100]:  # Far enough for the windows to move along.
        np.testing.assert_array_equal(engine.step(resumed, token), engine.step(cache, token))


@pytest.mark.parametrize("prompt_tokens", [1, 300, 700])
def test_a_cache_that_was_written_from_outside_goes_on_bit_for_bit(
    engine: TransformersEngine, small_models: dict[str, Path], prompt_tokens: int
) -> None:
    cache = engine.new_cache(1024)
    engine.prefill(cache, TOKENS[:prompt_tokens])
    found = engine.open_cache(prompt_tokens, 1024)
    assert found is not None
    opened, layers = found
    for own, layer in zip(engine.export_layers(cache), layers, strict=True):
        layer.keys[:], layer.values[:] = own.keys, own.values
    opened.written()
    assert (opened.length, opened.allocated_bytes) == (cache.length, cache.allocated_bytes)
    for token in TOKENS[prompt_tokens : prompt_tokens + 4]:
        assert np.array_equal(engine.step(opened, token), engine.step(cache, token))
    assert engine.open_cache(1025, 1024) is None
    assert load(small_models["gemma3"]).open_cache(8, 64) is None, "a window has more to it than rows"


def test_two_caches_do_not_see_each_other(engine: TransformersEngine) -> None:
    alone, first, second = (engine.new_cache(64) for _ in range(3))
    expected = [engine.step(alone, token) for token in TOKENS[:20]]
    for at, token in enumerate(TOKENS[:20]):
        np.testing.assert_array_equal(engine.step(first, token), expected[at])
        engine.step(second, TOKENS[500 + at])


@pytest.mark.parametrize("bad", [-1, 259, 2**40])
def test_a_token_outside_the_vocabulary_is_refused_and_named(engine: TransformersEngine, bad: int) -> None:
    cache = engine.new_cache(64)
    with pytest.raises(InvalidPrompt, match=f"token {bad} at position 2"):
        engine.prefill(cache, [1, 2, bad])
    assert cache.length == 0


def test_more_tokens_than_the_context_are_refused_and_the_cache_stays_usable(engine: TransformersEngine) -> None:
    cache = engine.new_cache(8)
    with pytest.raises(ContextOverflow, match="9 positions"):
        engine.prefill(cache, TOKENS[:9])
    engine.prefill(cache, TOKENS[:8])
    with pytest.raises(ContextOverflow):
        engine.step(cache, 1)
    with pytest.raises(ContextOverflow, match="context is 2,048"):
        engine.new_cache(2049)


def test_a_cache_of_another_model_is_refused(engine: TransformersEngine, small_models: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match="another engine"):
        engine.step(load(small_models["gemma3"]).new_cache(8), 1)


def test_layers_that_do_not_fit_are_refused(engine: TransformersEngine) -> None:
    cache = engine.new_cache(64)
    engine.prefill(cache, TOKENS[:9])
    layers = engine.export_layers(cache)
    for damaged in (
        layers[:-1],
        [replace(layers[0], keys=layers[0].keys[:, :-1]), *layers[1:]],
        [replace(layers[0], kind="sliding"), *layers[1:]],
        [replace(layers[0], dtype="float64"), *layers[1:]],
        [*layers[:-1], replace(layers[-1], seen_tokens=8)],
    ):
        with pytest.raises(SnapshotRefused):
            engine.import_layers(damaged, 64)


def fail_in_third_block(patch: pytest.MonkeyPatch, engine: TransformersEngine, fail: Callable[..., None]) -> None:
    fast = engine._fast_decode
    assert fast is not None
    patch.setattr(fast, "_blocks", [*fast._blocks[:2], fast._blocks[2]._replace(activation=fail), *fast._blocks[3:]])


def test_a_failure_inside_the_model_spoils_only_that_cache(
    small_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(small_models["gemma3"])
    spoiled, other = engine.new_cache(64), engine.new_cache(64)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate")

    with monkeypatch.context() as patch:
        fail_in_third_block(patch, engine, fail)
        with pytest.raises(ModelError, match="out of memory"):
            engine.step(spoiled, 1)
    with pytest.raises(ModelError, match="half written"):
        engine.step(spoiled, 1)
    assert engine.step(other, 1).shape == (engine.spec.vocab_size,)


def test_a_real_allocation_failure_is_told_as_out_of_memory(engine: TransformersEngine) -> None:
    with pytest.raises(ModelError, match="out of memory"), engine._memory_errors("growing the KV cache", 1):
        torch.empty(2**59)


def test_a_folder_without_weights_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="no safetensors weights"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelUnavailable, match="loading the model"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("file", "damage", "reason"),
    [
        ("model.safetensors", lambda data: data[: len(data) // 2], "SafetensorError"),
        ("model.safetensors", lambda _data: b"", "SafetensorError"),
        ("config.json", lambda _data: b"{", "OSError"),
        ("config.json", lambda data: data.replace(b'"num_hidden_layers": 3', b'"num_hidden_layers": "x"'), "Strict"),
        ("config.json", lambda data: data.replace(b'"num_attention_heads": 6', b'"num_attention_heads": 0'), "Zero"),
        # transformers would make up the layer that is not there.
        ("config.json", lambda data: data.replace(b'"num_hidden_layers": 3', b'"num_hidden_layers": 4'), "missing"),
    ],
)
def test_a_damaged_model_is_refused(
    file: str, damage: Callable[[bytes], bytes], reason: str, small_models: dict[str, Path], tmp_path: Path
) -> None:
    for path in small_models["llama"].iterdir():
        data = path.read_bytes()
        (tmp_path / path.name).write_bytes(damage(data) if path.name == file else data)
    assert (tmp_path / file).read_bytes() != (small_models["llama"] / file).read_bytes()
    with pytest.raises(ModelUnavailable, match="loading the model") as caught:
        load(tmp_path)
    assert reason in str(caught.value.reason)


def test_an_unknown_dtype_and_an_absent_gpu_are_refused(small_models: dict[str, Path]) -> None:
    with pytest.raises(ModelUnavailable, match="no dtype"):
        load(small_models["llama"], "float8")
    if not torch.cuda.is_available():
        with pytest.raises(ModelUnavailable, match="no CUDA GPU"):
            TransformersEngine.load(small_models["llama"], device="cuda")


def test_the_dtype_comes_with_its_reason(engine: TransformersEngine) -> None:
    assert engine.spec.dtype == "bfloat16"
    assert "bytes of the weights" in engine.spec.dtype_reason
    assert engine.fingerprint.dtype == "bfloat16"
    assert engine.spec.kv_bytes_per_token == 3 * 2 * 2 * 32 * 2


def test_an_engine_computes_with_the_threads_of_its_fingerprint(engine: TransformersEngine) -> None:
    torch.set_num_threads(engine.fingerprint.threads + 1)  # As another engine in this process would.
    engine.step(engine.new_cache(8), 1)
    assert torch.get_num_threads() == engine.fingerprint.threads


@pytest.mark.parametrize("bias", [True, False])
def test_products_made_in_float32_are_those_of_bfloat16(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_BLOCK_VALUES", 64 * 20)  # Three blocks, the last a shorter one.
    linear = torch.nn.Linear(64, 48, bias=bias, dtype=torch.bfloat16)
    upcast = products.UpcastLinear(linear)
    for rows in (1, 3, 4, 8, 31, 32, 200):
        x = torch.randn(1, rows, 64, dtype=torch.bfloat16)
        with torch.inference_mode():
            torch.testing.assert_close(upcast(x), linear(x), rtol=2**-7, atol=2**-8)


def test_the_digest_of_weights_is_kept_until_the_file_changes(small_models: dict[str, Path], tmp_path: Path) -> None:
    folder, cache_dir = tmp_path / "model", tmp_path / "digests"
    folder.mkdir()
    for file in small_models["llama"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    first = model_digests(folder, cache_dir=cache_dir)
    assert model_digests(folder, cache_dir=cache_dir) == first == model_digests(small_models["llama"])
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    second = model_digests(folder, cache_dir=cache_dir)
    assert second.weights != first.weights
    assert (second.tokenizer, second.config) == (first.tokenizer, first.config)
    next(cache_dir.iterdir()).write_bytes(b"{damaged")
    assert model_digests(folder, cache_dir=cache_dir) == second


def test_the_interface_and_all_but_the_engine_import_without_torch() -> None:
    rooms = ["engine", "sampling", "generation", "snapshot", "chat", "digests"]
    code = ";".join(f"import services.model_runner.{room}" for room in rooms)
    code += ";import sys; assert not {'torch', 'transformers'} & set(sys.modules), 'torch was imported'"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("tokens", [0, 30, 256, 300])
def test_a_fork_goes_on_as_its_source_does_and_leaves_it_alone(small_model: Path, tokens: int) -> None:
    engine = load(small_model)
    source = engine.new_cache(1024)
    engine.prefill(source, TOKENS[:tokens])
    fork = engine.fork(source, tokens, 512)
    assert fork is not None
    expected = engine.step(source, 9)
    assert (fork.length, fork.capacity_tokens) == (tokens, 512)
    np.testing.assert_array_equal(engine.step(fork, 9), expected)


def test_a_fork_of_whole_chunks_is_what_reading_them_gives(small_models: dict[str, Path]) -> None:
    engine = load(small_models["llama"])
    source, alone = engine.new_cache(1024), engine.new_cache(1024)
    engine.prefill(source, TOKENS[:300])
    engine.prefill(alone, TOKENS[:256])
    fork = engine.fork(source, 256, 1024)
    assert fork is not None
    np.testing.assert_array_equal(engine.step(fork, 9), engine.step(alone, 9))


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_a_fork_of_what_a_window_has_left_behind_is_none(small_models: dict[str, Path], family: str) -> None:
    engine = load(small_models[family])
    source = engine.new_cache(1024)
    engine.prefill(source, TOKENS[:400])
    assert engine.fork(source, 256, 1024) is None


def test_a_closed_cache_holds_no_memory_and_cannot_be_used(small_model: Path) -> None:
    engine = load(small_model)
    cache = engine.new_cache(1024)
    engine.prefill(cache, TOKENS[:30])
    assert cache.allocated_bytes >= 30 * engine.spec.kv_bytes_per_token
    cache.close()
    cache.close()
    assert cache.allocated_bytes == 0
    with pytest.raises(ModelError, match="closed"):
        engine.step(cache, 9)
