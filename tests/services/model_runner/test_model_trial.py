"""Models that no code of ours knows: recurrent layers, attention of other kinds, and what cannot be kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from protocol.errors import ModelUnavailable
from protocol.sealing import DataKey
from services.model_runner import snapshot
from services.model_runner.engine import LayerState
from services.model_runner.generation import GenerationSettings, begin, generate
from services.model_runner.prefixes import Prefixes, chunk_keys
from services.model_runner.sampling import SamplingSettings
from services.model_runner.transformers_engine import TransformersEngine
from tests.support.once import once_a_run

KEY = DataKey(bytes(32))
TOKENS = [int(token) for token in np.random.default_rng(5).integers(0, 256, 600)]
_SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "bos_token_id": None,
}
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}


def _configs() -> dict[str, Callable[[], Any]]:
    """Small ones of many kinds."""
    t: Any = transformers
    return {
        # Gated delta rule with a full layer among them; states of float32 or of the model's dtype.
        "qwen3_5": lambda: t.Qwen3_5TextConfig(
            **_SIZES,
            head_dim=16,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            layer_types=["linear_attention", "linear_attention", "full_attention", "linear_attention"],
        ),
        # Short convolutions alone beside attention.
        "lfm2": lambda: t.Lfm2Config(
            **_SIZES, layer_types=["conv", "full_attention", "conv", "conv"], block_auto_adjust_ff_dim=False
        ),
        # No attention at all, another name for the cache, and code that cannot go on from a state with a chunk.
        "mamba": lambda: t.MambaConfig(**{**_SIZES, "num_hidden_layers": 2}, state_size=8),
        # Attention and a state space side by side in each layer.
        "falcon_h1": lambda: t.FalconH1Config(**{**_SIZES, "num_hidden_layers": 2}, mamba_d_ssm=64, **_MAMBA2),
        # A layer that keeps nothing.
        "nemotron_h": lambda: t.NemotronHConfig(
            **_SIZES,
            head_dim=16,
            mamba_num_heads=8,
            mamba_head_dim=16,
            n_groups=2,
            ssm_state_size=8,
            chunk_size=8,
            hybrid_override_pattern="M*M-",
        ),
        # Scores that are capped, and windows.
        "gemma2": lambda: t.Gemma2Config(**_SIZES, head_dim=16, sliding_window=24, query_pre_attn_scalar=16),
        # Positions by a bias in the mask, and attention of the module's own.
        "bloom": lambda: t.BloomConfig(vocab_size=259, hidden_size=64, n_layer=2, n_head=4, seq_length=2048),
        # Attention within chunks of the text.
        "llama4": lambda: t.Llama4TextConfig(
            **_SIZES, head_dim=16, attention_chunk_size=24, num_local_experts=2, intermediate_size_mlp=96
        ),
        "gpt2": lambda: t.GPT2Config(vocab_size=259, n_positions=1024, n_embd=64, n_layer=2, n_head=4),
        # Its states are in its modules: two conversations would share them.
        "recurrent_gemma": lambda: t.RecurrentGemmaConfig(
            **{**_SIZES, "num_hidden_layers": 3}, lru_width=64, attention_window_size=32, head_dim=16
        ),
        "rwkv": lambda: t.RwkvConfig(vocab_size=259, hidden_size=64, num_hidden_layers=2, context_length=512),
        # Keys and values of different sizes.
        "deepseek_v3": lambda: t.DeepseekV3Config(
            **{**_SIZES, "num_key_value_heads": 4, "num_hidden_layers": 1},
            n_routed_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=32,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=16,
            n_group=1,
            topk_group=1,
        ),
    }


RECURRENT = ("qwen3_5", "lfm2", "mamba", "falcon_h1", "nemotron_h")
OTHERS = ("gemma2", "bloom", "llama4", "gpt2")
REFUSED = {
    "recurrent_gemma": "layer 0 keeps its state elsewhere",
    "rwkv": "takes none of transformers' own",
    "deepseek_v3": "keeps keys .* and values",
}


@pytest.fixture(scope="session")
def models(small_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of all of them, with random weights, by name."""

    def make(root: Path) -> None:
        for name, config in _configs().items():
            torch.manual_seed(7)
            model = transformers.AutoModelForCausalLM.from_config(config(), dtype=torch.float32)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() == 2:
                        parameter.mul_(3)
            model.save_pretrained(root / name)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                (root / name / file).write_bytes((small_models["llama"] / file).read_bytes())

    return once_a_run(tmp_path_factory, "unknown-models", make)


_loaded: dict[tuple[str, str], TransformersEngine] = {}


@pytest.fixture
def load(models: Path) -> Callable[..., TransformersEngine]:
    def loaded(name: str, dtype: str = "float32") -> TransformersEngine:
        if (name, dtype) not in _loaded:
            engine = TransformersEngine.load(models / name, device="cpu", dtype=dtype, threads=1)
            _loaded[name, dtype] = engine
        return _loaded[name, dtype]

    return loaded


Load = Callable[..., TransformersEngine]


def copied(layers: list[LayerState]) -> list[LayerState]:
    return [
        LayerState(
            layer.kind,
            layer.dtype,
            layer.keys.copy(),
            layer.values.copy(),
            layer.seen_tokens,
            tuple(state.copy() for state in layer.states),
        )
        for layer in layers
    ]


@pytest.mark.parametrize("name", [*RECURRENT, *OTHERS])
def test_its_logits_are_those_of_the_stock_model_read_at_once(name: str, load: Load, models: Path) -> None:
    engine = load(name)
    stock = transformers.AutoModelForCausalLM.from_pretrained(models / name, attn_implementation="eager")
    cache = engine.new_cache(512)
    engine.prefill(cache, TOKENS[:200])  # In two parts, the second from within a chunk; far past each window.
    engine.prefill(cache, TOKENS[200:280])
    actual = np.stack([engine.step(cache, token) for token in TOKENS[280:290]])
    with torch.inference_mode():
        expected = stock(torch.tensor([TOKENS[:290]]), use_cache=False).logits[0, 280:].numpy()
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3 * expected.std())


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("prompt_tokens", [1, 3, 300])
def test_a_resumed_state_gives_the_same_tokens_and_logits(name: str, prompt_tokens: int, load: Load) -> None:
    engine = load(name, "bfloat16")
    settings = GenerationSettings(12, ignore_eos=True)
    state = begin(engine, TOKENS[:prompt_tokens], settings=settings, sampling=SamplingSettings(temperature=0.8, seed=3))
    stream = generate(engine, state)
    for _ in range(4):
        next(stream)
    stream.close()
    packed = snapshot.pack(engine, state, conversation="c", creator="here", key=KEY)
    assert packed.manifest.states
    assert packed.manifest.total_bytes == sum(len(chunk) for chunk in packed.chunks)
    resumed = snapshot.unpack(engine, packed.manifest, KEY, [bytes(chunk) for chunk in packed.chunks])
    assert (resumed.how, resumed.reason) == ("exact", "")
    fork = engine.fork(state.cache, state.cache.length, 512)
    assert fork is not None
    peeked = engine.peek(state.cache, TOKENS[0])  # and the cache stays as it is
    np.testing.assert_array_equal(engine.peek(resumed.state.cache, TOKENS[0]), peeked)
    for token in TOKENS[:20]:
        np.testing.assert_array_equal(engine.step(fork, token), engine.step(resumed.state.cache, token))
    again = snapshot.unpack(engine, packed.manifest, KEY, [bytes(chunk) for chunk in packed.chunks]).state
    assert [token.token for token in generate(engine, again)] == [token.token for token in generate(engine, state)]


@pytest.mark.parametrize("name", RECURRENT)
def test_two_conversations_do_not_see_each_other(name: str, load: Load) -> None:
    engine = load(name, "bfloat16")
    alone, first, second = (engine.new_cache(64) for _ in range(3))
    expected = [engine.step(alone, token) for token in TOKENS[:8]]
    for at, token in enumerate(TOKENS[:8]):
        np.testing.assert_array_equal(engine.step(first, token), expected[at])
        engine.step(second, TOKENS[500 + at])


def test_an_earlier_position_cannot_be_had_from_recurrent_states(load: Load) -> None:
    engine = load("lfm2")
    cache = engine.new_cache(600)
    engine.prefill(cache, TOKENS[:300])
    assert engine.fork(cache, 256, 600) is None
    assert engine.fork(cache, 300, 600) is not None
    # An empty one is shared as well as any other: nothing has gone into it.
    empty = engine.new_cache(600)
    forked = engine.fork(empty, 0, 600)
    assert forked is not None
    np.testing.assert_array_equal(engine.step(forked, 5), engine.step(empty, 5))


def test_a_kept_beginning_is_shared_and_a_longer_conversations_is_read_again(load: Load) -> None:
    engine = load("lfm2")
    prefixes = Prefixes(engine)
    keys = chunk_keys(TOKENS[:300], engine.chunk_tokens)
    cache = engine.new_cache(600)
    engine.prefill(cache, TOKENS[:256])
    whole = 256 // engine.chunk_tokens
    prefixes.keep(keys[whole - 1], cache, 2**30)
    engine.prefill(cache, TOKENS[256:300])
    found = prefixes.fork(keys, 0, 600)
    assert found is not None
    shared, chunks = found
    assert (shared.length, chunks) == (256, whole)
    engine.prefill(shared, TOKENS[256:300])
    np.testing.assert_array_equal(engine.step(shared, 7), engine.step(cache, 7))


def test_what_states_take_is_counted_and_given_back(load: Load) -> None:
    for name in RECURRENT:
        engine = load(name)
        assert engine.spec.state_bytes > 0
        cache = engine.new_cache(512)
        engine.prefill(cache, TOKENS[:100])
        assert cache.allocated_bytes == engine.cache_bytes(100, 512) >= engine.spec.state_bytes
        cache.close()
        assert cache.allocated_bytes == 0


def test_a_state_of_another_model_or_length_is_refused(load: Load) -> None:
    engine = load("lfm2")
    cache = engine.new_cache(64)
    engine.prefill(cache, TOKENS[:9])
    layers = copied(engine.export_layers(cache))
    layers[0] = LayerState("recurrent", "float32", layers[0].keys, layers[0].values, 8, layers[0].states)
    with pytest.raises(Exception, match="different lengths"):
        engine.import_layers(layers, 64)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_kept_is_refused_with_the_reason(name: str, load: Load) -> None:
    with pytest.raises(ModelUnavailable, match=REFUSED[name]) as caught:
        load(name)
    assert caught.value.hint
    assert name in caught.value.message


@pytest.mark.parametrize("name", ["lfm2", "mamba", "falcon_h1"])
def test_recurrent_layers_are_not_built_for_onnx(name: str, models: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed: make install (extra `build`)")
    from services.model_runner.build import build

    with pytest.raises(ModelUnavailable, match="has layers of kind"):
        build(models / name, tmp_path, "int8", "cpu", False, lambda _said: None)


def test_a_model_that_answers_wrongly_from_its_cache_is_refused(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.gpt2.modeling_gpt2 import GPT2Model

    stock = GPT2Model.forward

    # Positions that begin anew with each piece are what a model does that counts them itself.
    def counts(self: Any, input_ids: Any = None, past_key_values: Any = None, **kwargs: Any) -> Any:
        kwargs.pop("position_ids", None)
        positions = torch.arange(input_ids.shape[1]).unsqueeze(0)
        return stock(self, input_ids, past_key_values=past_key_values, position_ids=positions, **kwargs)

    monkeypatch.setattr(GPT2Model, "forward", counts)
    _loaded.pop(("gpt2", "bfloat16"), None)
    with pytest.raises(ModelUnavailable, match="read in pieces its answer is another"):
        load("gpt2", "bfloat16")


def test_how_an_unknown_model_is_run_stands_in_its_fingerprint(load: Load) -> None:
    assert "mindstream attention" in load("gpt2").fingerprint.engine_version
    assert "eager attention, one by one" in load("mamba").fingerprint.engine_version
    assert "eager attention" in load("gemma2").fingerprint.engine_version
    assert "sdpa attention" in load("llama4").fingerprint.engine_version
    assert "eager attention" in load("bloom").fingerprint.engine_version
