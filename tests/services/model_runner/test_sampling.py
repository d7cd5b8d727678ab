"""Sampling: what is chosen, what is reported, and that the state carries over."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

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


def test_a_sampler_restored_from_plain_types_draws_what_the_first_would_have() -> None:
    settings = SamplingSettings(temperature=0.9, top_k=50, top_p=0.95, repetition_penalty=1.1, seed=2**63 - 1)
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
    [("temperature", -0.1), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.5), ("seed", -1)],
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
