"""The loop: why an answer ends, and that stopping changes nothing."""

from __future__ import annotations

import itertools

import pytest

from protocol.errors import ContextOverflow, InvalidPrompt, ModelError
from services.model_runner.generation import (
    GenerationSettings,
    GenerationState,
    begin,
    extend,
    generate,
)
from services.model_runner.sampling import SamplingSettings
from services.model_runner.transformers_engine import TransformersEngine

PROMPT = list(range(40, 120))
SAMPLED = SamplingSettings(temperature=1.0, top_p=0.95, seed=11)


def settings(max_new_tokens: int) -> GenerationSettings:
    return GenerationSettings(max_new_tokens=max_new_tokens, ignore_eos=True)


def new(engine: TransformersEngine, sampling: SamplingSettings = SAMPLED, count: int = 40) -> GenerationState:
    return begin(engine, PROMPT, sampling=sampling, settings=settings(count))


@pytest.mark.parametrize("sampling", [SamplingSettings(), SAMPLED], ids=["greedy", "sampled"])
def test_stopping_anywhere_and_going_on_is_the_same_as_not_stopping(
    engine: TransformersEngine, sampling: SamplingSettings
) -> None:
    whole = new(engine, sampling)
    expected = list(generate(engine, whole))
    parts = new(engine, sampling)
    collected = []
    for count in itertools.chain([1, 2, 3], itertools.repeat(7)):
        collected += itertools.islice(generate(engine, parts), count)
        if parts.finish_reason:
            break
    assert collected == expected
    assert [token.index for token in expected] == list(range(40))
    assert parts.tokens == whole.tokens
    assert parts.finish_reason == whole.finish_reason == "length"


def test_the_cache_always_ends_before_the_pending_token(engine: TransformersEngine) -> None:
    state = new(engine)
    for _ in generate(engine, state):
        assert state.prefilled
        assert state.cache.length == len(state.tokens) - 1
    assert state.answer == state.tokens[len(PROMPT) :]


def test_a_cancelled_answer_can_go_on(engine: TransformersEngine) -> None:
    expected = [token.token for token in generate(engine, new(engine))]
    state = new(engine)
    got = [token.token for token in generate(engine, state, should_stop=lambda: state.new_tokens >= 5)]
    assert (len(got), state.finish_reason) == (5, "cancelled")
    assert got + [token.token for token in generate(engine, state)] == expected


def test_a_prompt_cancelled_while_it_is_read_goes_on_from_there(engine: TransformersEngine) -> None:
    prompt = PROMPT * 10
    whole = begin(engine, prompt, settings=settings(4))
    state = begin(engine, prompt, settings=settings(4))
    assert list(generate(engine, state, should_stop=lambda: state.cache.length >= 512)) == []
    assert (state.finish_reason, state.cache.length, state.prefilled) == ("cancelled", 512, False)
    assert list(generate(engine, state)) == list(generate(engine, whole))
    assert state.timing.prefilled_tokens == len(prompt) - 1


def test_an_end_of_sequence_ends_the_answer_and_is_its_last_token(engine: TransformersEngine) -> None:
    eos = next(iter(engine.spec.eos_token_ids))
    for seed in range(200):
        state = begin(
            engine, PROMPT, sampling=SamplingSettings(temperature=3.0, seed=seed), settings=GenerationSettings(60)
        )
        tokens = [token.token for token in generate(engine, state)]
        if state.finish_reason == "stop":
            assert tokens[-1] == eos
            assert eos not in tokens[:-1]
            return
    pytest.fail("no end of sequence in 200 random answers")


def test_a_full_context_ends_the_answer(engine: TransformersEngine) -> None:
    state = begin(engine, PROMPT, settings=settings(1000), capacity_tokens=100)
    tokens = list(generate(engine, state))
    assert state.finish_reason == "length"
    assert (len(tokens), state.cache.length, len(state.tokens)) == (21, 100, 101)


def test_a_finished_answer_must_be_extended_first(engine: TransformersEngine) -> None:
    state = new(engine, count=3)
    list(generate(engine, state))
    with pytest.raises(ModelError, match="has ended"):
        next(generate(engine, state))
    extend(engine, state, [1, 2, 3], settings=settings(2))
    assert [token.index for token in generate(engine, state)] == [0, 1]
    assert state.timing.reused_tokens == len(PROMPT) + 2
    assert state.timing.prefilled_tokens == 3  # The token that was pending, and two of three new ones.
    extend(engine, state, [], settings=settings(1))
    assert len(list(generate(engine, state))) == 1


def test_a_turn_that_does_not_fit_leaves_the_conversation_as_it_was(engine: TransformersEngine) -> None:
    state = begin(engine, PROMPT, settings=settings(2), capacity_tokens=90)
    list(generate(engine, state))
    before = list(state.tokens)
    with pytest.raises(ContextOverflow):
        extend(engine, state, PROMPT)
    with pytest.raises(InvalidPrompt):
        extend(engine, state, [-5])
    assert state.tokens == before
    assert state.finish_reason == "length"


def test_an_empty_prompt_and_impossible_settings_are_refused(engine: TransformersEngine) -> None:
    with pytest.raises(InvalidPrompt, match="no tokens"):
        begin(engine, [])
    with pytest.raises(ContextOverflow):
        begin(engine, PROMPT, capacity_tokens=10)
    with pytest.raises(InvalidPrompt, match="max_new_tokens"):
        GenerationSettings(max_new_tokens=0)
    with pytest.raises(InvalidPrompt, match="stop text is empty"):
        GenerationSettings(stop=("a", ""))


def test_the_likeliest_tokens_are_named_when_asked_for(engine: TransformersEngine) -> None:
    state = begin(engine, PROMPT, settings=GenerationSettings(5, ignore_eos=True, top_logprobs=3))
    for token in generate(engine, state):
        assert len(token.top) == 3
        assert token.top[0] == (token.token, token.logprob)  # Greedy.
        assert token.top[0].logprob >= token.top[1].logprob >= token.top[2].logprob
    assert all(not token.top for token in generate(engine, new(engine, count=3)))
