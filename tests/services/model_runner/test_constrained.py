"""Answers under a JSON schema: always JSON that it accepts, refused before a token when that cannot be, and exact over
every stop, snapshot and restart."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

pytest.importorskip("llguidance", reason="llguidance is not installed: make install (extra `model`)")

from protocol.errors import InvalidPrompt, ModelError, SnapshotRefused
from protocol.sealing import DataKey
from services.model_runner import snapshot
from services.model_runner.constrained import MAX_SCHEMA_CHARACTERS, Grammars
from services.model_runner.generation import GenerationSettings, GenerationState, accept, begin, extend, generate
from services.model_runner.sampling import Sampler, SamplingSettings
from services.model_runner.tokenizer import ModelTokenizer
from services.model_runner.transformers_engine import TransformersEngine

EOS = 257
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["tomato", "sprout", None]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}
SAMPLED = SamplingSettings(temperature=1.0, top_p=0.95, seed=3)


@pytest.fixture(scope="session")
def tokenizer(small_models: dict[str, Path]) -> ModelTokenizer:
    return ModelTokenizer.load(small_models["llama"])


@pytest.fixture(scope="session")
def grammars(tokenizer: ModelTokenizer) -> Grammars:
    return Grammars(tokenizer, tokenizer.size, [EOS])


def constrained(
    engine: TransformersEngine, grammars: Grammars, schema: Any = PERSON, count: int = 400, **more: Any
) -> GenerationState:
    settings = GenerationSettings(count, json_schema=json.dumps(schema), **more)
    state = begin(engine, list(range(40, 60)), sampling=SAMPLED, settings=settings)
    grammars.attach(state)
    return state


def text_of(tokenizer: ModelTokenizer, state: GenerationState) -> str:
    return tokenizer.decode(state.tokens[-state.constrained_tokens :], special=False)


def test_an_answer_is_json_of_its_schema_and_stops_when_it_is_whole(
    engine: TransformersEngine, grammars: Grammars, tokenizer: ModelTokenizer
) -> None:
    state = constrained(engine, grammars)
    tokens = list(generate(engine, state))
    assert state.finish_reason == "stop"
    jsonschema.validate(json.loads(text_of(tokenizer, state)), PERSON)
    assert tokenizer.decode([tokens[-1].token], special=True) == "}", "no step was spent on an end of sequence"
    assert min(token.logprob for token in tokens) < -3, "the log-probabilities are the model's own"


def test_what_may_go_on_ends_with_the_models_end_of_sequence(
    engine: TransformersEngine, grammars: Grammars, tokenizer: ModelTokenizer
) -> None:
    state = constrained(engine, grammars, {"type": "integer"}, ignore_eos=True)
    constraint = state.constraint
    assert constraint is not None
    assert not constraint.allowed()[EOS]
    constraint.take(tokenizer.encode("7", special=False)[0])
    assert constraint.allowed()[EOS]
    assert constraint.allowed()[tokenizer.encode("1", special=False)[0]]
    assert not constraint.ended
    constraint.take(EOS)
    assert constraint.ended


_NAMES = st.sampled_from(["a", "b", "é", "long name", 'quo"te'])


def _schemas() -> st.SearchStrategy[Any]:
    leaves: st.SearchStrategy[Any] = st.one_of(
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
        st.builds(
            lambda low, width: {"type": "integer", "minimum": low, "maximum": low + width},
            st.integers(-200, 200),
            st.integers(0, 500),
        ),
        st.builds(
            lambda low, width: {"type": "string", "minLength": low, "maxLength": low + width},
            st.integers(0, 3),
            st.integers(0, 5),
        ),
        st.builds(
            lambda values: {"enum": values},
            st.lists(
                st.one_of(st.integers(-9, 9), st.text(max_size=4), st.none(), st.booleans()), min_size=1, max_size=4
            ),
        ),
        st.just({"type": "string", "pattern": "^[a-c]{2,4}$"}),
        st.just({"type": "string", "format": "date"}),
    )

    def grow(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        return st.one_of(
            st.builds(
                lambda items, low, more: {"type": "array", "items": items, "minItems": low, "maxItems": low + more},
                inner,
                st.integers(0, 2),
                st.integers(0, 2),
            ),
            st.builds(
                lambda properties: {
                    "type": "object",
                    "properties": properties,
                    "required": sorted(properties)[:2],
                    "additionalProperties": False,
                },
                st.dictionaries(_NAMES, inner, max_size=3),
            ),
            st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3)),
        )

    return st.recursive(leaves, grow, max_leaves=5)


@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(schema=_schemas(), seed=st.integers(0, 2**32))
def test_whatever_the_model_thinks_the_answer_fits_the_schema(
    grammars: Grammars, tokenizer: ModelTokenizer, schema: Any, seed: int
) -> None:
    constraint = grammars.begin(json.dumps(schema))
    sampler = Sampler(SamplingSettings(temperature=1.0, seed=seed))
    random = np.random.default_rng(seed)
    said: list[int] = []
    while not constraint.ended and len(said) < 3000:
        logits = random.normal(scale=2, size=tokenizer.size).astype(np.float32)
        # A text that wants to end, or the many bytes of Unicode would go on for ever.
        logits[tokenizer.encode('"}]', special=False)] += 3
        said.append(sampler.sample(logits, allowed=constraint.allowed()).token)
        constraint.take(said[-1])
    assert constraint.ended
    jsonschema.validate(json.loads(tokenizer.decode(said, special=False)), schema)


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ("{", "no JSON"),
        ("", "no JSON"),
        ("nonsense", "no JSON"),
        ("[" * 100_000, "characters"),
        ("[" * 50_000, "no JSON"),
        ("[1]", "neither an object"),
        ('"text"', "neither an object"),
        ('{"type": "strin"}', "strin"),
        ('{"type": 5}', "type must be"),
        ("false", "false"),
        ('{"enum": []}', "empty"),
        ('{"type": "integer", "minimum": 5, "maximum": 1}', "minimum"),
        ('{"type": "string", "minLength": 5, "maxLength": 2}', "minLength"),
        ('{"type": "string", "pattern": "^a$", "minLength": 3}', ""),
        ('{"allOf": [{"type": "string"}, {"type": "integer"}]}', "incompatible"),
        ('{"type": "object", "required": ["a"], "properties": {"a": false}}', "required property"),
        ('{"not": {"type": "string"}}', "not"),
        ('{"type": "array", "contains": {"type": "number"}}', "contains"),
        ('{"type": "string", "pattern": "(?=a)b"}', "look-around"),
        ('{"type": "string", "format": "nope"}', "nope"),
        ('{"$ref": "#/nowhere"}', "nowhere"),
        ('{"$ref": "https://example.org/schema"}', "example.org"),
        ('{"not": {}, "x-guidance": {"lenient": true}}', "not"),
        ('{"type": "string", "description": "' + "x" * MAX_SCHEMA_CHARACTERS + '"}', "characters"),
    ],
)
def test_a_schema_that_cannot_be_met_is_refused_before_anything_is_generated(
    grammars: Grammars, schema: str, said: str
) -> None:
    for _ in range(2):  # What was refused is not kept as if it were ready.
        with pytest.raises(InvalidPrompt, match="JSON schema") as caught:
            grammars.check(schema)
        assert caught.value.field == "json_schema"
        assert said in str(caught.value)


@pytest.mark.parametrize("schema", ['{"type": "object"}', "{}", "true"])
def test_any_json_is_a_schema_too(grammars: Grammars, tokenizer: ModelTokenizer, schema: str) -> None:
    whole = tokenizer.encode('{"a": [1, 2.5e3, {"b": null}], "c": "é\\n"}', special=False)
    assert grammars.begin(schema, whole).ended or grammars.begin(schema, whole).allowed()[EOS]
    free = grammars.begin(schema).allowed()
    assert free[tokenizer.encode("[", special=False)[0]] == (schema != '{"type": "object"}')


def test_blank_space_cannot_go_on_for_ever(grammars: Grammars, tokenizer: ModelTokenizer) -> None:
    space = tokenizer.encode(" ", special=False)
    constraint = grammars.begin(json.dumps(PERSON), tokenizer.encode("{", special=False) + 16 * space)
    assert not constraint.allowed()[space[0]]


def test_logits_wider_than_the_tokenizer_are_never_chosen_there(tokenizer: ModelTokenizer) -> None:
    allowed = Grammars(tokenizer, tokenizer.size + 61, [EOS]).begin("{}").allowed()
    assert len(allowed) == tokenizer.size + 61
    assert allowed[: tokenizer.size].any()
    assert not allowed[tokenizer.size :].any()


def test_a_tokenizer_wider_than_the_logits_is_cut_to_them(tokenizer: ModelTokenizer) -> None:
    assert len(Grammars(tokenizer, tokenizer.size - 1, [EOS]).begin("{}").allowed()) == tokenizer.size - 1


@pytest.mark.parametrize("at", [1, 4, 17])
def test_a_constrained_answer_goes_on_exactly_from_a_snapshot(
    engine: TransformersEngine, grammars: Grammars, tokenizer: ModelTokenizer, at: int
) -> None:
    whole = constrained(engine, grammars)
    expected = list(generate(engine, whole))
    first = constrained(engine, grammars)
    said = list(itertools.islice(generate(engine, first), at))
    key = DataKey.generate()
    packed = snapshot.pack(engine, first, conversation="c", creator="here", key=key)
    there = snapshot.unpack(engine, packed.manifest, key, packed.chunks).state
    assert there.constraint is None
    with pytest.raises(ModelError, match="not of one state"):
        accept(engine, there, np.zeros(tokenizer.size, dtype=np.float32))
    Grammars(tokenizer, tokenizer.size, [EOS]).attach(there)
    assert said + list(generate(engine, there)) == expected
    assert there.finish_reason == "stop"


def test_an_answer_cut_by_its_length_is_gone_on_with_under_its_schema(
    engine: TransformersEngine, grammars: Grammars, tokenizer: ModelTokenizer
) -> None:
    whole = constrained(engine, grammars)
    expected = [token.token for token in generate(engine, whole)]
    state = constrained(engine, grammars, count=9)
    said = [token.token for token in generate(engine, state)]
    assert state.finish_reason == "length"
    with pytest.raises(ValueError):
        json.loads(text_of(tokenizer, state))
    for schema in ("", json.dumps(PERSON)):  # Not named, or named again.
        extend(engine, state, [], settings=GenerationSettings(7, json_schema=schema))
        grammars.attach(state)
        said += [token.token for token in generate(engine, state)]
    extend(engine, state, [], settings=GenerationSettings(400))
    # As after a restart: only what is kept is there.
    state.constraint = None
    grammars.attach(state)
    said += [token.token for token in generate(engine, state)]
    assert said == expected
    # Whole: what goes on after it is free again.
    extend(engine, state, [], settings=GenerationSettings(3, ignore_eos=True))
    grammars.attach(state)
    assert state.constraint is None
    assert len(list(generate(engine, state))) == 3


def test_a_new_turn_has_a_constraint_of_its_own(engine: TransformersEngine, grammars: Grammars) -> None:
    state = constrained(engine, grammars, count=5)
    list(generate(engine, state))
    extend(engine, state, [70, 71], settings=GenerationSettings(5, json_schema='{"const": "abc"}'))
    grammars.attach(state)
    assert len(list(generate(engine, state))) == 5
    assert state.constrained_tokens == 5
    extend(engine, state, [70], settings=GenerationSettings(2, ignore_eos=True))
    grammars.attach(state)
    assert state.constraint is None


def test_tokens_that_do_not_fit_the_schema_are_refused(grammars: Grammars, tokenizer: ModelTokenizer) -> None:
    with pytest.raises(SnapshotRefused, match="do not fit"):
        grammars.begin(json.dumps(PERSON), tokenizer.encode("[1", special=False))


def test_without_the_library_a_schema_is_refused_and_nothing_else(
    tokenizer: ModelTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(InvalidPrompt, match="no llguidance"):
        Grammars(tokenizer, tokenizer.size, [EOS]).check("{}")
