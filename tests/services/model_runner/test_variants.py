"""KV of another variant of a model: how near it is is measured, what a certificate allows is used, and no more."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make install (extra `model`)")

from bench.lora import train_lora  # noqa: E402
from protocol.errors import BadSignature, Cancelled, MalformedMessage, ModelError, NotFound, UnknownPeer  # noqa: E402
from protocol.identity import Identity, Keyring  # noqa: E402
from protocol.variants import Reuse, VariantCertificate, open_variant, pair_name, seal_variant  # noqa: E402
from services.model_runner.codecs.ladder import Asked  # noqa: E402
from services.model_runner.engine import Engine, LayerState  # noqa: E402
from services.model_runner.transformers_engine import TransformersEngine  # noqa: E402
from services.model_runner.variant_store import VariantStore  # noqa: E402
from services.model_runner.variants import (  # noqa: E402
    Permit,
    certify,
    computed_counts,
    converted,
    permit,
    recent_counts,
    sample,
    take_in,
    variant_of,
    windows_of,
)

PREFIX, TEST = 150, 24
TEXTS = [[(index * index * step + 5 * index) % 256 for index in range(PREFIX + TEST)] for step in (3, 11)]
ANYTHING = Asked(most_kl=1e9, least_top1=0.0)


def load(folder: Path, dtype: str = "float32", adapter: Path | None = None) -> TransformersEngine:
    return TransformersEngine.load(folder, device="cpu", dtype=dtype, threads=1, adapter=adapter)


@pytest.fixture(scope="module")
def base(small_models: dict[str, Path]) -> TransformersEngine:
    return load(small_models["llama"])


@pytest.fixture(scope="module")
def adapted(small_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> TransformersEngine:
    folder = tmp_path_factory.mktemp("adapter") / "trained"
    train_lora(small_models["llama"], TEXTS, folder, steps=6, rank=4, rate=1e-2)
    return load(small_models["llama"], adapter=folder)


@pytest.fixture(scope="module")
def certificate(base: TransformersEngine, adapted: TransformersEngine) -> VariantCertificate:
    return certify(sample(base, TEXTS, PREFIX), adapted, "tomato")


def state(engine: Engine, tokens: Sequence[int]) -> list[LayerState]:
    cache = engine.new_cache(len(tokens))
    engine.prefill(cache, tokens)
    return [
        dataclasses.replace(layer, keys=layer.keys.copy(), values=layer.values.copy())
        for layer in engine.export_layers(cache)
    ]


def same(one: LayerState, other: LayerState) -> bool:
    return one.keys.tobytes() == other.keys.tobytes() and one.values.tobytes() == other.values.tobytes()


# --- computing layers apart -------------------------------------------------------------------------------------


def test_first_layers_computed_apart_are_those_of_a_whole_prefill_bit_for_bit(small_model: Path) -> None:
    engine = load(small_model, "bfloat16")
    tokens = TEXTS[0]
    own = state(engine, tokens)
    strange = [
        dataclasses.replace(layer, keys=np.zeros_like(layer.keys), values=np.ones_like(layer.values)) for layer in own
    ]
    for first in range(1, len(own)):
        cache = engine.import_computing(strange, tokens, first, len(tokens) + 8)
        assert cache.length == len(tokens)
        found = engine.export_layers(cache)
        assert all(same(one, other) for one, other in zip(found[:first], own[:first], strict=True))
        assert all(same(one, other) for one, other in zip(found[first:], strange[first:], strict=True))


def test_with_its_own_last_layers_it_goes_on_as_if_it_had_read_everything(small_model: Path) -> None:
    engine = load(small_model, "bfloat16")
    tokens = TEXTS[1]
    whole = engine.new_cache(len(tokens) + 8)
    engine.prefill(whole, tokens)
    partly = engine.import_computing(state(engine, tokens), tokens, 2, len(tokens) + 8)
    for token in (5, 200, 31):
        assert engine.step(whole, token).tobytes() == engine.step(partly, token).tobytes()


def test_computing_apart_stops_between_chunks_and_refuses_what_it_cannot(base: TransformersEngine) -> None:
    own = state(base, TEXTS[0])
    with pytest.raises(Cancelled):
        base.import_computing(own, TEXTS[0], 1, 300, should_stop=lambda: True)
    for first in (0, len(own)):
        with pytest.raises(ModelError, match="layers"):
            base.import_computing(own, TEXTS[0], first, 300)
    with pytest.raises(ModelError, match="tokens"):
        base.import_computing(own, TEXTS[0][:-1], 1, 300)


# --- certificates -----------------------------------------------------------------------------------------------


def test_a_variant_of_itself_changes_nothing(base: TransformersEngine) -> None:
    found = certify(sample(base, TEXTS, PREFIX), base, "tomato")
    # Its first positions are computed by themselves, and round otherwise.
    assert [each.top1 for each in found.layers] == [1.0] * 3
    assert [each.mean_kl for each in found.layers] == pytest.approx([0.0] * 3, abs=1e-9)
    (reuse,) = found.reuses
    assert (reuse.computed_layers, reuse.recent_tokens, reuse.top1) == (0, 0, 1.0)
    assert reuse.worst_kl == pytest.approx(0.0, abs=1e-9)


def test_a_certificate_says_what_each_layer_and_each_number_of_computed_layers_does(
    base: TransformersEngine, adapted: TransformersEngine, certificate: VariantCertificate
) -> None:
    assert (certificate.source, certificate.target) == (variant_of(base), variant_of(adapted))
    assert (certificate.texts, certificate.prefix_tokens, certificate.tested_tokens) == (2, PREFIX, 2 * TEST)
    assert len(certificate.layers) == 3
    assert all(each.mean_kl > 0 for each in certificate.layers)
    reuses = {(each.computed_layers, each.recent_tokens): each.mean_kl for each in certificate.reuses}
    assert list(reuses) == [(0, 0), (0, 32), (0, 64), (0, 128), (1, 0), (2, 0)]
    # With all but the last layer computed, the last one's KV alone is the other's.
    assert reuses[2, 0] == pytest.approx(certificate.layers[2].mean_kl)
    assert reuses[2, 0] < reuses[0, 0]
    assert reuses[0, 128] < reuses[0, 0]


def test_what_a_certificate_says_is_what_taking_in_gives(
    base: TransformersEngine, adapted: TransformersEngine, certificate: VariantCertificate
) -> None:
    for reuse in certificate.reuses:
        divergences = []
        for text in TEXTS:
            tokens, rest = text[:PREFIX], text[PREFIX:]
            expected = log_probabilities(adapted, adapted.import_layers(state(adapted, tokens), PREFIX + TEST), rest)
            cache = take_in(
                adapted, state(base, tokens), tokens, PREFIX + TEST, reuse.computed_layers, reuse.recent_tokens
            )
            found = log_probabilities(adapted, cache, rest)
            divergences.append(float((np.exp(expected) * (expected - found)).sum(1).mean()))
        assert np.mean(divergences) == pytest.approx(reuse.mean_kl, rel=1e-3)
        assert max(divergences) == pytest.approx(reuse.worst_kl, rel=1e-3)


def log_probabilities(engine: Engine, cache, tokens):  # type: ignore[no-untyped-def]
    logits = engine.read(cache, tokens).astype(np.float64)
    logits -= logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def test_precisions_are_variants_and_numbers_are_converted(
    small_models: dict[str, Path], base: TransformersEngine
) -> None:
    short = load(small_models["llama"], "bfloat16")
    found = certify(sample(short, TEXTS, PREFIX), base, "tomato")
    assert 0 < found.reuses[0].mean_kl < 0.1
    assert found.reuses[0].recent_tokens == 0
    assert str(found.source) != str(found.target)
    there = state(short, TEXTS[0])
    back = converted(converted(there, "float32"), "bfloat16")
    assert all(same(one, other) for one, other in zip(there, back, strict=True))


def test_models_that_are_no_variants_of_each_other_are_refused(
    small_models: dict[str, Path], base: TransformersEngine
) -> None:
    other = load(small_models["gemma3"])
    with pytest.raises(ModelError, match="other kinds or shapes"):
        certify(sample(other, TEXTS, PREFIX), base, "tomato")
    with pytest.raises(ModelError, match="long enough"):
        certify(sample(base, [], PREFIX), base, "tomato")


def test_first_and_last_positions_are_its_own_and_those_between_the_others(
    base: TransformersEngine, adapted: TransformersEngine
) -> None:
    tokens = TEXTS[0]
    theirs, own = state(base, tokens), state(adapted, tokens)
    found = adapted.export_layers(take_in(adapted, theirs, tokens, 300, 0, 40))
    for layer, other, mine in zip(found, theirs, own, strict=True):
        assert layer.keys.shape == mine.keys.shape
        np.testing.assert_allclose(layer.keys[:, :4], mine.keys[:, :4], rtol=1e-4, atol=1e-5)
        assert np.array_equal(layer.keys[:, 4:-40], other.keys[:, 4:-40])
        assert not np.array_equal(layer.keys[:, -40:], other.keys[:, -40:])
    # Nothing of the other's is left where all are recent.
    whole = adapted.export_layers(take_in(adapted, theirs, tokens, 300, 0, len(tokens)))
    assert all(same(one, other) for one, other in zip(whole, own, strict=True))
    with pytest.raises(Cancelled):
        take_in(adapted, theirs, tokens, 300, 0, 40, should_stop=lambda: True)


def test_where_windows_forget_last_positions_are_not_computed_again(small_models: dict[str, Path]) -> None:
    engine = load(small_models["gemma3"])
    assert recent_counts(engine.spec, 512) == []
    tokens = TEXTS[0]
    with pytest.raises(ModelError, match="windows do not go back"):
        take_in(engine, state(engine, tokens), tokens, 300, 0, 40)


def test_texts_are_taken_from_all_over_the_list() -> None:
    texts = [[index] * (20 if index % 2 else 5) for index in range(20)]
    assert [window[0] for window in windows_of(texts, 8, 4, 3)] == [1, 9, 19]
    assert windows_of(texts, 8, 4, 1) == [[1] * 12]
    assert len(windows_of(texts, 8, 4, 99)) == 10


def test_numbers_of_computed_layers_grow_to_the_last_but_one() -> None:
    assert computed_counts(0) == [0]
    assert computed_counts(2) == [0, 1, 2]
    counts = computed_counts(29)
    assert counts[:4] == [0, 1, 2, 3]
    assert counts[-1] == 29
    assert counts == sorted(set(counts))


# --- what it allows ---------------------------------------------------------------------------------------------


def test_the_fewest_computed_layers_that_are_faithful_enough_are_taken(
    base: TransformersEngine, adapted: TransformersEngine, certificate: VariantCertificate
) -> None:
    figures = [Reuse(0, 0.5, 0.9, 0.5), Reuse(1, 0.01, 0.03, 0.95), Reuse(2, 0.01, 0.015, 0.95)]
    known = msgspec.structs.replace(certificate, reuses=figures)
    source = variant_of(base)
    for asked, computed in ((ANYTHING, 0), (Asked(0.05, 0.94), 1), (Asked(0.02, 0.94), 2)):
        found = permit(known, source, adapted, asked)
        assert isinstance(found, Permit)
        assert found.computed_layers == computed
        assert "tomato" in found.reason
    refused = permit(known, source, adapted, Asked(0.02, 0.96))
    assert isinstance(refused, str)
    assert "top-1 0.950" in refused


def test_of_reuses_that_are_faithful_enough_the_one_that_computes_least_of_the_prompt_is_taken(
    base: TransformersEngine, adapted: TransformersEngine, certificate: VariantCertificate
) -> None:
    figures = [Reuse(0, 0.5, 0.9, 0.5), Reuse(0, 0.01, 0.015, 0.95, 64), Reuse(1, 0.01, 0.015, 0.95)]
    known = msgspec.structs.replace(certificate, reuses=figures)
    for tokens, computed, recent in ((100, 1, 0), (1_000, 0, 64), (0, 1, 0)):
        found = permit(known, variant_of(base), adapted, Asked(), tokens)
        assert isinstance(found, Permit)
        assert (found.computed_layers, found.recent_tokens) == (computed, recent)
    assert found.share(adapted, 300) == pytest.approx(1 / 3)
    assert Permit(found.variant, 0, "", 64).share(adapted, 640) == pytest.approx(0.1)


def test_an_engine_that_computes_all_layers_or_none_takes_all_or_none(
    base: TransformersEngine,
    adapted: TransformersEngine,
    certificate: VariantCertificate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    figures = [Reuse(0, 0.5, 0.9, 0.5), Reuse(1, 0.001, 0.001, 1.0)]
    known = msgspec.structs.replace(certificate, reuses=figures)
    assert isinstance(permit(known, variant_of(base), adapted, Asked()), Permit)
    monkeypatch.setattr(adapted, "most_computed_layers", 0)
    assert "with 0 layers and 0 recent positions computed" in str(permit(known, variant_of(base), adapted, Asked()))


def test_without_a_certificate_of_this_pair_nothing_is_taken(
    base: TransformersEngine, adapted: TransformersEngine, certificate: VariantCertificate
) -> None:
    assert "no certificate" in str(permit(None, variant_of(base), adapted, ANYTHING))
    # The other way round is another pair.
    assert "another pair" in str(permit(certificate, variant_of(adapted), base, ANYTHING))


def test_a_certificate_is_its_creators_or_refused(certificate: VariantCertificate) -> None:
    tomato, sprout = Identity.generate("tomato"), Identity.generate("sprout")
    signed = seal_variant(tomato, certificate)
    trusts = Keyring({"tomato": tomato.fingerprint, "sprout": sprout.fingerprint})
    assert open_variant(signed, trusts) == certificate
    with pytest.raises(UnknownPeer):
        open_variant(signed, Keyring())
    better = msgspec.structs.replace(certificate, reuses=[Reuse(0, 0.0, 0.0, 1.0)])
    with pytest.raises(BadSignature):
        open_variant(msgspec.structs.replace(signed, certificate=seal_variant(sprout, better).certificate), trusts)
    with pytest.raises(BadSignature):
        open_variant(seal_variant(sprout, certificate), trusts)


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"reuses": []},
        {"reuses": [Reuse(1, 0.0, 0.0, 1.0)]},
        {"reuses": [Reuse(0, 0.0, 0.0, 1.0), Reuse(3, 0.0, 0.0, 1.0)]},
        {"reuses": [Reuse(0, 0.0, 0.0, 1.0), Reuse(0, 0.0, 0.0, 1.0, -1)]},
        {"reuses": [Reuse(0, 0.0, 0.0, 1.0), Reuse(0, 0.0, 0.0, 1.0, PREFIX)]},
        {"reuses": [Reuse(0, 0.0, 0.0, 1.0, 8)]},
        {"reuses": [Reuse(0, float("nan"), 0.0, 1.0)]},
        {"reuses": [Reuse(0, -1.0, 0.0, 1.0)]},
        {"reuses": [Reuse(0, 0.2, 0.1, 1.0)]},
        {"reuses": [Reuse(0, 0.0, 0.0, 1.5)]},
        {"tested_tokens": 0},
    ],
)
def test_figures_that_cannot_be_are_refused(certificate: VariantCertificate, changes: dict[str, object]) -> None:
    tomato = Identity.generate("tomato")
    wrong = msgspec.structs.replace(certificate, **changes)
    with pytest.raises(MalformedMessage):
        open_variant(seal_variant(tomato, wrong), Keyring({"tomato": tomato.fingerprint}))


def test_certificates_are_kept_by_pair_and_count_while_their_creator_is_trusted(
    certificate: VariantCertificate, tmp_path: Path
) -> None:
    tomato = Identity.generate("tomato")
    trusted = [Keyring({"tomato": tomato.fingerprint})]
    store = VariantStore(tmp_path / "variants", lambda: trusted[0])
    source, target = certificate.source, certificate.target
    assert store.find(source, target) is None
    assert store.all() == []
    store.put(seal_variant(tomato, certificate))
    newer = msgspec.structs.replace(certificate, created_us=certificate.created_us + 1)
    store.put(seal_variant(tomato, newer))
    assert store.find(source, target) == newer
    assert store.all() == [newer]
    assert store.find(target, source) is None
    with pytest.raises(NotFound):
        store.signed(target, source)
    # Under another pair's name it is no certificate of that pair.
    (kept,) = (tmp_path / "variants").iterdir()
    kept.with_name(pair_name(target, source)).write_bytes(kept.read_bytes())
    assert store.find(target, source) is None
    kept.write_bytes(kept.read_bytes()[:-7])
    assert store.find(source, target) is None
    store.put(seal_variant(tomato, newer))
    trusted[0] = Keyring()
    assert store.find(source, target) is None
    with pytest.raises(UnknownPeer):
        store.put(seal_variant(tomato, certificate))
