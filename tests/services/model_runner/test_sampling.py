"""Sampling: what is chosen, what is reported, and that the state carries over."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from protocol.errors import InvalidPrompt, ModelError, SnapshotRefused
from services.model_runner.sampling import Sampler, SamplingSettings

LOGITS = np.random.default_rng(1).normal(scale=3, size=5000).astype(np.float32)
PROBABILITIES = np.exp(LOGITS.astype(np.float64)) / np.exp(LOGITS.astype(np.float64)).sum()


def test_temperature_zero_takes_the_likeliest_token_with_its_probability() -> None:
    choice = Sampler(SamplingSettings()).sample(LOGITS)
    assert choice.token == LOGITS.argmax()
    assert choice.logprob == pytest.approx(np.log(PROBABILITIES.max()), rel=1e-5)
    assert choice.entropy == pytest.approx(-(PROBABILITIES * np.log(PROBABILITIES)).sum(), rel=1e-4)


def test_confidence_is_the_models_and_not_the_samplers() -> None:
    plain = Sampler(SamplingSettings()).sample(LOGITS)
    hot = Sampler(SamplingSettings(temperature=5.0, top_k=1, repetition_penalty=1.0)).sample(LOGITS)
    assert hot == plain


def test_samples_are_distributed_as_the_softmax() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    sampler = Sampler(SamplingSettings(temperature=1.0, seed=3))
    counts = np.bincount([sampler.sample(logits).token for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.15, 0.05], atol=0.03)


def test_top_k_and_top_p_keep_only_the_likeliest() -> None:
    order = np.argsort(-LOGITS)
    sampler = Sampler(SamplingSettings(temperature=1.0, top_k=3, seed=1))
    assert {sampler.sample(LOGITS).token for _ in range(300)} == set(order[:3].tolist())
    cumulative = np.cumsum(PROBABILITIES[order])
    kept = int(np.searchsorted(cumulative, 0.4)) + 1
    sampler = Sampler(SamplingSettings(temperature=1.0, top_p=0.4, seed=1))
    drawn = {sampler.sample(LOGITS).token for _ in range(600)}
    assert drawn <= set(order[:kept].tolist())
    assert len(drawn) > kept / 2


def test_min_p_keeps_what_is_near_the_likeliest() -> None:
    sampler = Sampler(SamplingSettings(temperature=2.0, min_p=0.2, seed=1))
    tempered = np.exp((LOGITS - LOGITS.max()) / 2.0)
    drawn = {sampler.sample(LOGITS).token for _ in range(600)}
    assert drawn <= set(np.flatnonzero(tempered >= 0.2).tolist())
    assert len(drawn) > np.count_nonzero(tempered >= 0.2) / 2


def kept_by_definition(settings: SamplingSettings, logits: np.ndarray) -> np.ndarray:
    """Probabilities after the filters, by sorting the whole vocabulary in float64, as the papers say it."""
    order = np.lexsort((np.arange(len(logits)), -logits.astype(np.float64)))
    weights = np.exp((logits[order].astype(np.float64) - logits.max()) / settings.temperature)
    if settings.top_k:
        weights[settings.top_k :] = 0
    reached = np.cumsum(weights) - weights >= settings.top_p * weights.sum() * (1 - 1e-6)
    weights[reached & (settings.top_p < 1)] = 0
    weights[weights < settings.min_p * (1 - 1e-6)] = 0
    found = np.zeros(len(logits))
    found[order] = weights / weights.sum()
    return found


@hypothesis_settings(max_examples=80, deadline=None)
@given(
    size=st.integers(1, 3000),
    spread=st.sampled_from([0.0, 0.1, 2.0, 8.0]),
    temperature=st.sampled_from([0.2, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 5, 200, 5000]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    steps=st.sampled_from([0, 4]),
    seed=st.integers(0, 2**32),
)
def test_what_is_drawn_has_passed_every_filter_in_its_order(
    size: int, spread: float, temperature: float, top_k: int, top_p: float, min_p: float, steps: int, seed: int
) -> None:
    logits = np.random.default_rng(seed).normal(scale=spread, size=size).astype(np.float32)
    if steps:  # Many equals.
        logits = np.round(logits * steps) / steps
    settings = SamplingSettings(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    kept = kept_by_definition(settings, logits)
    sampler = Sampler(settings)
    for _ in range(4):
        uniform = Sampler(settings, sampler.draws)._uniform()
        token = sampler.sample(logits).token
        assert kept[token] > 0
        # It is the one whose part of the running sum, in the order of ids, has the drawn number in it.
        before, after = kept[:token].sum(), kept[: token + 1].sum()
        assert before - 1e-4 <= uniform <= after + 1e-4


def test_the_filters_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch = pytest.importorskip("torch", reason="torch is not installed")
    settings = SamplingSettings(temperature=1.3, top_k=60, top_p=0.8, min_p=0.05)
    scores = torch.from_numpy(LOGITS[None])
    for warper in (
        transformers.TemperatureLogitsWarper(1.3),
        transformers.TopKLogitsWarper(60),
        transformers.TopPLogitsWarper(0.8),
        transformers.MinPLogitsWarper(0.05),
    ):
        scores = warper(None, scores)
    theirs = scores[0].softmax(-1).numpy()
    assert set(np.flatnonzero(theirs)) == set(np.flatnonzero(kept_by_definition(settings, LOGITS)))
    np.testing.assert_allclose(theirs, kept_by_definition(settings, LOGITS), atol=1e-5)


def test_only_what_is_allowed_is_chosen_and_the_figures_stay_the_models() -> None:
    for few in (True, False):
        allowed = np.zeros(len(LOGITS), dtype=bool)
        allowed[np.argsort(LOGITS)[:50] if few else np.argsort(LOGITS)[:4900]] = True
        greedy = Sampler(SamplingSettings()).sample(LOGITS, allowed=allowed)
        assert greedy.token == np.flatnonzero(allowed)[LOGITS[allowed].argmax()]
        assert greedy.logprob == pytest.approx(np.log(PROBABILITIES[greedy.token]), rel=1e-4)
        assert greedy.entropy == Sampler(SamplingSettings()).sample(LOGITS).entropy
        for filters in ({}, {"top_p": 0.5}, {"top_k": 7}, {"min_p": 0.1}, {"repetition_penalty": 1.2}):
            sampler = Sampler(SamplingSettings(temperature=1.5, seed=4, **filters))
            assert all(allowed[sampler.sample(LOGITS, [1, 2], allowed=allowed).token] for _ in range(40))


def test_where_nothing_is_allowed_or_possible_it_says_so() -> None:
    for allowed in (np.zeros(5000, dtype=bool), np.arange(5000) < 2, np.arange(5000) >= 2):
        logits = np.where(allowed, np.float32(-np.inf), LOGITS)
        for temperature in (0.0, 1.0):
            with pytest.raises(ModelError, match="no probability"):
                Sampler(SamplingSettings(temperature=temperature)).sample(logits, allowed=allowed)


@pytest.mark.parametrize("count", [1, 5, 20, 300])
def test_the_likeliest_are_named_best_first(count: int) -> None:
    top = Sampler(SamplingSettings(temperature=1.0, seed=9)).sample(LOGITS, top=count).top
    order = np.argsort(-LOGITS, kind="stable")[:count]
    assert [chance.token for chance in top] == order.tolist()
    np.testing.assert_allclose([chance.logprob for chance in top], np.log(PROBABILITIES[order]), rtol=1e-4)


def test_of_equally_likely_tokens_the_lower_ids_are_named() -> None:
    top = Sampler(SamplingSettings()).sample(np.zeros(4000, dtype=np.float32), top=3).top
    assert [chance.token for chance in top] == [0, 1, 2]


def test_a_flat_distribution_has_a_nucleus_beyond_the_first_guess() -> None:
    logits = np.zeros(5000, dtype=np.float32)
    sampler = Sampler(SamplingSettings(temperature=1.0, top_p=0.9, seed=1))
    drawn = [sampler.sample(logits).token for _ in range(500)]
    assert max(drawn) < 4500  # Of equals the lower ids come first.
    assert max(drawn) > 2000


def test_a_very_small_temperature_and_infinite_logits_do_no_harm() -> None:
    logits = LOGITS.copy()
    logits[::2] = -np.inf
    choice = Sampler(SamplingSettings(temperature=1e-6, top_p=0.5)).sample(logits)
    assert choice.token == logits.argmax()
    assert np.isfinite([choice.logprob, choice.entropy]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_an_error_and_no_token(bad: float) -> None:
    logits = LOGITS.copy()
    logits[7] = bad
    with pytest.raises(ModelError, match="not numbers"):
        Sampler(SamplingSettings()).sample(logits)


def test_the_repetition_penalty_turns_away_from_what_was_said() -> None:
    logits = np.array([2.0, 1.9, -1.0], dtype=np.float32)
    sampler = Sampler(SamplingSettings(repetition_penalty=1.5))
    assert sampler.sample(logits).token == 0
    assert sampler.sample(logits, [0, 0, 2]).token == 1
    np.testing.assert_array_equal(logits, np.array([2.0, 1.9, -1.0], dtype=np.float32))


@hypothesis_settings(max_examples=60, deadline=None)
@given(turns=st.lists(st.lists(st.integers(0, 4999), max_size=400), max_size=4))
def test_the_penalty_of_a_context_that_grows_is_that_of_the_whole_context(turns: list[list[int]]) -> None:
    settings = SamplingSettings(temperature=1.0, repetition_penalty=1.4, seed=5)
    growing = Sampler(settings)
    context: list[int] = []
    for turn in turns:
        context.extend(turn)
        fresh = Sampler(settings, growing.draws)
        assert growing.sample(LOGITS, context).token == fresh.sample(LOGITS, list(context)).token
    other = [1, 2, 3]
    assert growing.sample(LOGITS, other).token == Sampler(settings, growing.draws - 1).sample(LOGITS, other).token


def test_draws_do_not_depend_on_what_else_is_sampled_between_them() -> None:
    settings = SamplingSettings(temperature=0.8, top_p=0.9, seed=42)
    alone, batched = Sampler(settings), Sampler(settings)
    others = [Sampler(SamplingSettings(temperature=1.0, seed=seed)) for seed in range(3)]
    expected = [alone.sample(LOGITS).token for _ in range(30)]
    drawn = []
    for _ in range(30):
        for other in others:
            other.sample(LOGITS[::-1].copy())
        drawn.append(batched.sample(LOGITS).token)
    assert drawn == expected


def test_a_state_from_before_min_p_goes_on_without_it() -> None:
    state = Sampler(SamplingSettings(temperature=0.9, seed=3), draws=5).to_state()
    del state["min_p"]
    restored = Sampler.from_state(state)
    assert (restored.settings, restored.draws) == (SamplingSettings(temperature=0.9, seed=3), 5)


def test_a_sampler_restored_from_plain_types_draws_what_the_first_would_have() -> None:
    settings = SamplingSettings(
        temperature=0.9, top_k=50, top_p=0.95, repetition_penalty=1.1, min_p=0.02, seed=2**63 - 1
    )
    uninterrupted, stopped = Sampler(settings), Sampler(settings)
    expected = [uninterrupted.sample(LOGITS, [1]).token for _ in range(40)]
    drawn = [stopped.sample(LOGITS, [1]).token for _ in range(17)]
    restored = Sampler.from_state(msgspec.msgpack.decode(msgspec.msgpack.encode(stopped.to_state())))
    assert drawn + [restored.sample(LOGITS, [1]).token for _ in range(23)] == expected


def test_seeds_differ() -> None:
    runs = []
    for seed in (0, 1):
        sampler = Sampler(SamplingSettings(temperature=1.0, seed=seed))
        runs.append([sampler.sample(LOGITS).token for _ in range(10)])
    assert runs[0] != runs[1]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("seed", -1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
    ],
)
def test_settings_out_of_range_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(InvalidPrompt) as caught:
        SamplingSettings(**{field: value})
    assert caught.value.field == field


@pytest.mark.parametrize(
    "change", [{"rng": "mt19937"}, {"draws": -1}, {"draws": "7"}, {"top_p": 9.0}, {"temperature": "hot"}, {"extra": 1}]
)
def test_a_state_that_does_not_fit_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(SnapshotRefused, match="restoring a sampler"):
        Sampler.from_state(Sampler(SamplingSettings()).to_state() | change)
