"""Pruners rank every position once, and a budget is met by the most faithful pair of pruner and codec."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import ModelError
from services.model_runner.codecs.int8 import Int8
from services.model_runner.codecs.ladder import Test, rungs
from services.model_runner.codecs.raw import Raw
from services.model_runner.engine import Engine, LayerState
from services.model_runner.fitting import FEWEST_TOKENS, fit_budget, numbers_bytes
from services.model_runner.positions import positions_of, prune
from services.model_runner.pruning import (
    OBSERVED_TOKENS,
    PRUNERS,
    RECENT_TOKENS,
    UNSEEN_TOKENS,
    Pruner,
    Seen,
    Window,
    levels,
    read_wish,
    seen,
)
from services.model_runner.transformers_engine import TransformersEngine

TOKENS = [int(token) for token in np.random.default_rng(5).integers(0, 256, 700)]


def some(tokens: int, seed: int = 1) -> Seen:
    random = np.random.default_rng(seed)
    pieces = [str(each) for each in random.choice(["a", " b", ".", " Cde", "\n", "7", " "], tokens)]
    attention, surprise, salience = (random.random(tokens).astype(np.float32) for _ in range(3))
    return Seen(tokens, pieces, attention, 10 * surprise, salience)


@pytest.mark.parametrize("pruner", [*PRUNERS.values(), Window(0), Window(7)], ids=lambda each: each.name)
@given(tokens=st.integers(1, 400), seed=st.integers(0, 99), counts=st.tuples(st.integers(1, 400), st.integers(1, 400)))
def test_every_position_is_ranked_once_and_a_smaller_budget_keeps_a_part_of_a_larger_ones(
    pruner: Pruner, tokens: int, seed: int, counts: tuple[int, int]
) -> None:
    looked = some(tokens, seed)
    assert sorted(pruner.rank(looked).tolist()) == list(range(tokens))
    fewer, more = (set(pruner.keep(looked, count).tolist()) for count in sorted(counts))
    assert fewer <= more
    assert len(more) == min(tokens, max(counts))


@pytest.mark.parametrize("name", ["heavy", "anchors"])
def test_sinks_and_recent_ones_are_kept_first_and_recent_ones_go_on_beside_the_others(name: str) -> None:
    looked = some(400)
    kept = PRUNERS[name].keep(looked, 4 + RECENT_TOKENS)
    assert kept.tolist() == [0, 1, 2, 3, *range(400 - RECENT_TOKENS, 400)]
    more = PRUNERS[name].keep(looked, 4 + RECENT_TOKENS + 30)
    assert set(range(400 - RECENT_TOKENS - 10, 400)) <= set(more.tolist())


def test_what_is_looked_at_is_kept() -> None:
    attention = np.zeros(300, np.float32)
    attention[[20, 77, 150]] = 1
    kept = PRUNERS["heavy"].keep(Seen(300, attention=attention), 4 + RECENT_TOKENS + 5)
    assert {20, 77, 150} <= set(kept.tolist())


def test_an_already_pruned_cache_keeps_what_it_has() -> None:
    held = np.arange(0, 300, 3)
    assert PRUNERS["window"].keep(some(300), 5, held).tolist() == [0, 3, 291, 294, 297]


def test_anchors_are_sentences_then_names_and_numbers_then_surprises() -> None:
    pieces = [
        *("The", " cat", " s", "at", ".", " Then", " Ada", " Love", "l", "ace", " came", " in", " 18", "43"),
        *(" and", " said", " nothing", ".", " It", " rained"),
    ]
    surprise = np.zeros(len(pieces), np.float32)
    surprise[[1, 6, 19]] = 9
    found = dict(zip(range(len(pieces)), levels(pieces, surprise).tolist(), strict=True))
    assert [at for at, level in found.items() if level == 0] == [0, 4, 5, 17, 18]
    assert [at for at, level in found.items() if level == 1] == [6, 7, 8, 9, 12, 13]
    assert [at for at, level in found.items() if level == 2] == [1, 19]


@pytest.mark.parametrize("text", ["猫は座った。それから雨が降った", "وصلت القطة؟ ثم نامت", "un été. à côté\nligne"])
def test_anchors_know_sentences_of_other_scripts(text: str) -> None:
    found = levels(list(text), np.zeros(len(text), np.float32))
    end = next(at for at, letter in enumerate(text) if letter in "。؟.")
    begin = end + 1 + (text[end + 1] == " ")
    assert found[0] == found[end] == found[begin] == 0
    assert found[1] == 3


def test_salience_lifts_what_it_is_of() -> None:
    pieces = ["a"] * 200
    salience = np.zeros(200, np.float32)
    salience[50:60] = 0.8
    kept = PRUNERS["anchors"].keep(Seen(200, pieces, salience=salience), 4 + RECENT_TOKENS + 15)
    assert set(range(50, 60)) <= set(kept.tolist())


@pytest.mark.parametrize(
    ("text", "name", "count"),
    [
        ("last:512", "last", 512),
        ("heavy:0.5", "heavy", 500),
        ("anchors:1", "anchors", 1000),
        ("window:4,1000", "window", 1000),
        ("window:4,60", "window", 64),
        ("window:0.001", "window", 1),
    ],
)
def test_a_wish_names_a_pruner_and_how_much_it_keeps(text: str, name: str, count: int) -> None:
    wish = read_wish(text)
    assert (wish.pruner.name, wish.count(1000)) == (name, count)


@pytest.mark.parametrize("text", ["", "heavy", "heavy:", "heavy:x", "heavy:0", "heavy:-1", "heavy:nan", "last:1e99"])
@pytest.mark.parametrize("more", ["", ",1,2"])
def test_other_wishes_are_refused(text: str, more: str) -> None:
    with pytest.raises(ModelError) as caught:
        read_wish(text + more)
    assert caught.value.field == "wishes.prune"


# --- on an engine ---------------------------------------------------------------------------------------------


def read(engine: TransformersEngine, count: int) -> list[LayerState]:
    cache = engine.new_cache(count + 1)
    engine.prefill(cache, TOKENS[:count])
    return engine.export_layers(cache)


def test_attention_is_what_the_observed_tokens_give_to_what_is_before_them(engine: TransformersEngine) -> None:
    found = seen(engine, TOKENS[:600], read(engine, 600), needs=["attention"])
    assert found.attention is not None
    assert found.surprise is None
    end = 600 - UNSEEN_TOKENS
    assert (found.attention[:end] > 0).all()
    assert not found.attention[end:].any()
    assert found.attention.max() <= 1
    # At once, over another boundary between chunks.
    cache = engine.import_layers(
        [layer.prefix(spec, end - OBSERVED_TOKENS) for layer, spec in zip(read(engine, 600), engine.spec.layers)],  # type: ignore[misc]  # noqa: B905
        600,
    )
    whole = engine.looked_at(cache, TOKENS[end - OBSERVED_TOKENS : end])
    assert whole is not None
    np.testing.assert_allclose(found.attention[:end], whole, atol=0.05)


def test_observing_a_pruned_cache_names_true_positions(engine: TransformersEngine) -> None:
    kept = np.array([0, 1, 2, 3, *range(100, 300, 2), *range(400, 600)])
    found = seen(engine, TOKENS[:600], prune(read(engine, 600), kept), needs=["attention"])
    assert found.attention is not None
    start = 600 - UNSEEN_TOKENS - OBSERVED_TOKENS
    assert np.flatnonzero(found.attention[:start]).tolist() == [at for at in kept if at < start]


def test_surprise_is_the_nats_of_each_token(engine: TransformersEngine) -> None:
    found = seen(engine, TOKENS[:150], read(engine, 150), needs=["surprise"]).surprise
    assert found is not None
    cache = engine.new_cache(150)
    logits = engine.read(cache, TOKENS[:149]).astype(np.float64)
    expected = np.log(np.exp(logits).sum(1)) - logits[np.arange(149), TOKENS[1:150]]
    np.testing.assert_allclose(found[1:], expected, atol=0.1 * expected.std())
    assert found[0] == 0


def test_an_engine_that_cannot_tell_says_so(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(engine), "looked_at", Engine.looked_at)
    looked = seen(engine, TOKENS[:300], read(engine, 300), needs=["attention"])
    assert looked.attention is None
    with pytest.raises(ModelError, match="does not tell"):
        PRUNERS["heavy"].keep(looked, 100)


@pytest.mark.parametrize("ratio", [1.0, 3.0, 6.0, 12.0])
def test_a_budget_is_met_by_the_most_faithful_pair(engine: TransformersEngine, ratio: float) -> None:
    layers = read(engine, 600)
    test = Test.of(engine, TOKENS[:600], layers)
    fitted = fit_budget(
        engine.spec, layers, ratio, rungs(), lambda count: PRUNERS["window"].keep(Seen(600), count), test
    )
    best = fitted.best
    assert best.ratio >= ratio
    assert all(each.ratio >= ratio for each in fitted.tried)
    if ratio == 1:
        assert (best.exact, best.kept, best.fidelity) == (True, None, None)
        return
    assert best.fidelity is not None
    assert all(best.fidelity.mean_kl <= each.fidelity.mean_kl for each in fitted.tried if each.fidelity)
    if ratio == 3.0:  # A rung alone is small enough.
        assert "rotated4" in {each.codec.name for each in (best, *fitted.tried) if each.kept is None}
    if ratio == 12.0:
        assert best.kept is not None
        assert FEWEST_TOKENS <= len(best.kept) < 600
        assert best.ratio < 1.3 * ratio  # Not smaller than it need be.


def test_a_budget_out_of_reach_is_refused(engine: TransformersEngine) -> None:
    layers = read(engine, 200)
    with pytest.raises(ModelError) as caught:
        fit_budget(engine.spec, layers, 400.0, rungs(), lambda count: np.arange(count), None)
    assert caught.value.field == "wishes.budget_ratio"


def test_without_a_test_the_pair_that_prunes_least_is_taken(engine: TransformersEngine) -> None:
    layers = read(engine, 300)
    keep = lambda count: PRUNERS["window"].keep(Seen(300), count)  # noqa: E731
    best = fit_budget(engine.spec, layers, 4.0, [(Int8(), None), (Raw(), None)], keep, None).best
    assert (best.codec.name, best.fidelity) == ("int8", None)
    assert best.kept is not None
    assert numbers_bytes(prune(layers, best.kept)) < numbers_bytes(layers)


def test_a_pruned_cache_is_fitted_by_what_it_holds(engine: TransformersEngine) -> None:
    held = np.array([0, 1, 2, 3, *range(100, 300)])
    layers = prune(read(engine, 300), held)
    keep = lambda count: PRUNERS["window"].keep(Seen(300), count, held)  # noqa: E731
    best = fit_budget(engine.spec, layers, 4.0, [(Raw(), None)], keep, None).best
    assert best.kept is not None
    assert set(best.kept.tolist()) < set(held.tolist())
    assert positions_of(prune(layers, best.kept)) is not None
