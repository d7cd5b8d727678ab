"""Between messages and settings: nothing that is asked for is lost on the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from protocol.errors import InvalidPrompt
from protocol.messages import ModelGenerate
from services.model_runner.chat import ChatFormat
from services.model_runner.generation import GeneratedToken, GenerationSettings
from services.model_runner.sampling import Chance, SamplingSettings
from services.model_runner.wire import run_token, sampling_of, settings_of


def test_every_sampling_field_of_an_ask_is_heeded() -> None:
    ask = ModelGenerate(
        "c", temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.2, seed=9, max_new_tokens=3
    )
    assert sampling_of(ask) == SamplingSettings(
        temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.2, seed=9
    )
    assert sampling_of(ModelGenerate("c")) == SamplingSettings()


def test_every_field_of_an_ask_about_the_answer_is_heeded() -> None:
    ask = ModelGenerate("c", max_new_tokens=3, stop=["END"], ignore_eos=True, top_logprobs=4)
    assert settings_of(ask) == GenerationSettings(3, ("END",), ignore_eos=True, top_logprobs=4)
    with pytest.raises(InvalidPrompt):
        settings_of(ModelGenerate("c", stop=[""]))


def test_a_token_is_said_with_its_likeliest_rivals_as_text(small_models: dict[str, Path]) -> None:
    chat = ChatFormat.load(small_models["llama"])
    space, letter = chat.encode(" x", special=False)
    said = run_token(chat, GeneratedToken(2, letter, -0.5, 1.5, (Chance(letter, -0.5), Chance(space, -2.0))), "x")
    assert (said.index, said.token, said.text, said.logprob, said.entropy) == (2, letter, "x", -0.5, 1.5)
    assert [(each.token, each.text, each.logprob) for each in said.top] == [(letter, "x", -0.5), (space, " ", -2.0)]
