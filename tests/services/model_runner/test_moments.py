"""Moments: tokens at which something was decided are told from the others, and thinning keeps those that matter."""

from __future__ import annotations

import numpy as np
import pytest

from services.model_runner.generation import GeneratedToken
from services.model_runner.moments import (
    HALF_LIFE_US,
    LEAST_TOKENS,
    WINDOW_TOKENS,
    Kept,
    Watch,
    moment,
    to_thin,
)

RANDOM = np.random.default_rng(4)


def token(entropy: float, logprob: float, index: int = 1) -> GeneratedToken:
    return GeneratedToken(index, 5, logprob, entropy)


def calm(watch: Watch, count: int) -> list[str]:
    """Tokens of an even text; why each would be a moment."""
    return [watch.token(token(0.3 + 0.2 * RANDOM.random(), -0.2 - 0.2 * RANDOM.random()), 0.0)[0] for _ in range(count)]


@pytest.mark.parametrize(
    ("entropy", "logprob", "why"), [(2.5, -0.9, "undecided"), (0.4, -6.0, "unexpected"), (0.5, -0.4, "")]
)
def test_a_token_that_decides_stands_out_from_the_text_around_it(entropy: float, logprob: float, why: str) -> None:
    watch = Watch(distance_tokens=0)
    assert not any(calm(watch, LEAST_TOKENS + 20))
    found, surprise = watch.token(token(entropy, logprob), 0.0)
    assert found == why
    assert (surprise > 0.98) == bool(why)


def test_what_is_high_follows_the_text() -> None:
    entropy = 2.0
    watch = Watch(distance_tokens=0)
    calm(watch, 60)
    assert watch.token(token(entropy, -0.3), 0.0)[0]
    for _ in range(WINDOW_TOKENS + 30):  # a text that is undecided all over: it is nothing special there
        watch.token(token(entropy + 0.5 * RANDOM.random(), -0.3), 0.0)
    assert watch.token(token(entropy + 0.1, -0.3), 0.0)[0] == ""
    assert watch.token(token(entropy + 1, -0.3), 0.0)[0] == "undecided"


def test_nothing_is_a_moment_before_there_is_anything_to_compare_with() -> None:
    watch = Watch(distance_tokens=0)
    assert [watch.token(token(5.0, -9.0), 0.0)[0] for _ in range(LEAST_TOKENS)] == [""] * LEAST_TOKENS


def test_moments_keep_their_distance() -> None:
    watch = Watch(distance_tokens=10)
    calm(watch, 60)
    assert watch.token(token(3.0, -0.3), 0.0)[0]
    watch.taken()
    for at in range(10):
        assert watch.token(token(4.0 + at, -0.3), 0.0)[0] == ""
    assert watch.token(token(20.0, -0.3), 0.0)[0] == "undecided"


def test_salience_marks_the_first_token_and_lowers_the_threshold() -> None:
    watch = Watch(distance_tokens=0)
    assert watch.token(token(0.1, -0.1, index=0), 0.4)[0] == ""
    assert watch.token(token(0.1, -0.1, index=0), 0.5)[0] == "salient"
    for at in range(200):
        watch.token(token(0.01 * at, -0.2), 0.0)
    # Of the last 202 tokens 5 % have a higher entropy.
    assert watch.token(token(1.9, -0.2), 0.0)[0] == ""
    assert watch.token(token(1.9, -0.2), 1.0)[0] == "undecided"


def test_alternatives_are_the_likeliest_tokens_with_their_probabilities() -> None:
    logits = RANDOM.normal(size=100).astype(np.float32)
    logprobs = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    found = moment("undecided", 1.0, 0.0, GeneratedToken(3, 7, float(logprobs[7]), 2.0), logits)
    assert [each.token for each in found.alternatives] == np.argsort(-logits)[:5].tolist()
    np.testing.assert_allclose([each.logprob for each in found.alternatives], np.sort(logprobs)[::-1][:5], atol=1e-5)


def kept(position: int, weight: float = 1.0, conversation: str = "talk", created_us: int = 0, size: int = 1) -> Kept:
    name = f"{conversation}-{position}"
    return Kept(name, conversation, position, weight, created_us, frozenset({(name.encode(), size), (b"common", 10)}))


def test_thinning_leaves_them_spread_and_keeps_what_weighs_most() -> None:
    crowd = [kept(position) for position in (100, 200, 210, 220, 300, 400)]
    gone = to_thin(crowd, most=4, most_bytes=10**9, now_us=0)
    assert {each.position for each in gone} < {200, 210, 220}
    crowd[2] = kept(210, weight=2.0)
    assert {each.position for each in to_thin(crowd, 4, 10**9, 0)} == {200, 220}


def test_thinning_counts_each_conversation_by_itself_and_shared_bytes_once() -> None:
    both = [kept(100 * at, conversation=name) for name in ("one", "two") for at in range(1, 5)]
    assert to_thin(both, most=4, most_bytes=18, now_us=0) == []
    assert len(to_thin(both, most=4, most_bytes=17, now_us=0)) == 1
    assert {each.conversation for each in to_thin([*both, kept(500, conversation="two")], 4, 10**9, 0)} == {"two"}


def test_of_equals_the_oldest_goes() -> None:
    old, new = (kept(100, conversation=name, created_us=at) for name, at in (("old", 0), ("new", HALF_LIFE_US)))
    assert to_thin([new, old], most=5, most_bytes=11, now_us=HALF_LIFE_US) == [old]


def test_a_budget_of_nothing_keeps_nothing() -> None:
    crowd = [kept(100), kept(200)]
    assert len(to_thin(crowd, most=0, most_bytes=10**9, now_us=0)) == 2
    assert len(to_thin(crowd, most=9, most_bytes=0, now_us=0)) == 2
