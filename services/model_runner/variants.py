"""Reuse of keys and values between variants of one model: other weights, another engine, other adapters.

What a variant has computed is near to what the model here would have computed, and how near depends on the pair. It is
measured once a pair on calibration texts (``certify``), never assumed, and a state is taken in (``take_in``) only where
a certificate says that it is as faithful as asked. Where all of it is not, a part is computed again from the tokens and
the rest kept: the last positions in all layers, whose keys and values matter most to what comes next, or the first
layers of all positions, which are exact then. The first positions, where most heads rest, are always computed here.

Computing the last layers instead would need what flows into them, which no cache holds; docs/snapshots.md has what that
was measured to bring. After DroidSpeak (arXiv 2411.02820), which looks for the layers to compute by profiling a pair,
and CacheBlend (arXiv 2405.16444), which computes a part of the positions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np
import numpy.typing as npt

from protocol.errors import Cancelled, ModelError
from protocol.variants import SINK_TOKENS, LayerEffect, Reuse, Variant, VariantCertificate
from services.model_runner import distributions
from services.model_runner.codecs.base import Array, from_floats, to_floats
from services.model_runner.codecs.ladder import Asked
from services.model_runner.engine import STORAGE_DTYPES, Engine, KVCache, LayerState, ModelSpec, ShouldStop

PREFIX_TOKENS, TEST_TOKENS = 512, 64
"""Of each text: positions whose KV is the other variant's, and positions after them that are compared."""
MOST_TEXTS = 6
_ENOUGH = Asked(most_kl=0.001, least_top1=0.99)
"""Once a reuse reaches this, ones that compute more are not measured."""
_GROWTH = 1.25
"""Numbers of computed layers that are measured grow by this."""
_FEWEST_RECENT = 32
"""Numbers of recent positions that are measured begin with this, and double."""

Say = Callable[[str], None]
Figures = npt.NDArray[np.float64]


def variant_of(engine: Engine) -> Variant:
    """Whose KV ``engine`` computes."""
    return Variant.of(engine.spec.digests, engine.fingerprint)


def not_variants(source: ModelSpec, target: ModelSpec) -> str:
    """Why KV of ``source`` can be none of ``target`` whatever is measured; empty when it might."""
    if source.digests.tokenizer != target.digests.tokenizer:
        return "they have two tokenizers"
    if source.layers != target.layers:
        return "their layers are of other kinds or shapes"
    if any(layer.states for layer in target.layers):
        return "recurrent states are not taken from another variant"
    return ""


def converted(layers: Sequence[LayerState], dtype: str) -> list[LayerState]:
    """The same numbers in ``dtype``, rounded to nearest; new arrays where that is another."""
    return [
        layer
        if layer.dtype == dtype
        else replace(
            layer,
            dtype=dtype,
            keys=_converted(layer.keys, layer.dtype, dtype),
            values=_converted(layer.values, layer.dtype, dtype),
        )
        for layer in layers
    ]


def _converted(array: Array, source: str, dtype: str) -> Array:
    out = np.empty(array.shape, STORAGE_DTYPES[dtype])
    from_floats(to_floats(array, source), dtype, out)
    return out


def take_in(
    engine: Engine,
    layers: Sequence[LayerState],
    tokens: Sequence[int],
    capacity_tokens: int,
    computed_layers: int,
    recent_tokens: int = 0,
    should_stop: ShouldStop | None = None,
) -> KVCache:
    """A cache of ``engine`` with another variant's ``layers``, of which the first ``computed_layers``, the first
    ``SINK_TOKENS`` positions and the last ``recent_tokens`` are computed here. Of pruned layers nothing is.

    Args:
        layers: of any dtype, of the engine's shapes.
        tokens: those in the cache, without the pending one.

    Raises as ``Engine.import_computing`` and ``Engine.prefill``, and ModelError where layers do not go back so far.
    """
    own = converted(layers, engine.spec.dtype)
    if any(layer.positions is not None for layer in own):
        return engine.import_layers(own, capacity_tokens)
    kept = len(tokens) - recent_tokens
    if kept <= SINK_TOKENS:
        cache = engine.new_cache(capacity_tokens)
        kept = 0
    else:
        own = with_sinks(kept_of(engine.spec, own, kept), sinks_of(engine, tokens))
        if computed_layers:
            cache = engine.import_computing(own, tokens[:kept], computed_layers, capacity_tokens, should_stop)
        else:
            cache = engine.import_layers(own, capacity_tokens)
    try:
        if kept < len(tokens):
            engine.prefill(cache, tokens[kept:], should_stop)
        if cache.length < len(tokens):
            raise Cancelled(f"computing the last positions of {engine.spec.name}: stopped at {cache.length:,}")
    except BaseException:
        cache.close()
        raise
    return cache


def kept_of(spec: ModelSpec, layers: Sequence[LayerState], tokens: int) -> list[LayerState]:
    """The first ``tokens`` positions of ``layers``, as views. Raises ModelError when a window has left them."""
    found = [layer.prefix(own, tokens) for own, layer in zip(spec.layers, layers, strict=True)]
    held = [layer for layer in found if layer is not None]
    if len(held) < len(found):
        raise ModelError(
            f"computing the last positions of {spec.name} again: its windows do not go back to {tokens:,} positions",
            hint="read the conversation's tokens again",
            reason="windows",
        )
    return held


def sinks_of(engine: Engine, tokens: Sequence[int]) -> list[LayerState]:
    """The first ``SINK_TOKENS`` positions as ``engine`` computes them, copied."""
    cache = engine.new_cache(SINK_TOKENS)
    try:
        engine.prefill(cache, tokens[:SINK_TOKENS])
        return [_copied(layer) for layer in engine.export_layers(cache)]
    finally:
        cache.close()


def with_sinks(layers: Sequence[LayerState], sinks: Sequence[LayerState]) -> list[LayerState]:
    """``layers`` with these first positions, where they hold them still; new arrays."""
    found = []
    for layer, sink in zip(layers, sinks, strict=True):
        if layer.keys.shape[1] == layer.seen_tokens and sink.keys.shape[1] == SINK_TOKENS < layer.seen_tokens:
            layer = _copied(layer)
            layer.keys[:, :SINK_TOKENS], layer.values[:, :SINK_TOKENS] = sink.keys, sink.values
        found.append(layer)
    return found


@dataclass(frozen=True)
class Sampled:
    """What one variant keeps of the texts."""

    spec: ModelSpec
    variant: Variant
    windows: list[list[int]]
    """Tokens of each text: the prefix and what is compared after it."""
    prefix_tokens: int
    states: list[list[LayerState]]
    """After each prefix, copied."""


def windows_of(texts: Sequence[Sequence[int]], prefix_tokens: int, test_tokens: int, most: int) -> list[list[int]]:
    """The first tokens of each text that is long enough, of texts as far apart in the list as can be."""
    size = prefix_tokens + test_tokens
    found = [list(text[:size]) for text in texts if len(text) >= size]
    if len(found) <= most:
        return found
    return [found[round(index * (len(found) - 1) / (most - 1))] for index in range(most)] if most > 1 else found[:1]


def sample(
    engine: Engine, windows: Sequence[Sequence[int]], prefix_tokens: int, say: Say = lambda _line: None
) -> Sampled:
    """Read the prefix of each window."""
    states = []
    for number, window in enumerate(windows):
        say(f"{variant_of(engine)}: reading text {number + 1} of {len(windows)}")
        cache = engine.new_cache(prefix_tokens)
        try:
            engine.prefill(cache, window[:prefix_tokens])
            states.append([_copied(layer) for layer in engine.export_layers(cache)])
        finally:
            cache.close()
    return Sampled(engine.spec, variant_of(engine), [list(window) for window in windows], prefix_tokens, states)


def _copied(layer: LayerState) -> LayerState:
    return replace(layer, keys=layer.keys.copy(), values=layer.values.copy())


def certify(
    source: Sampled, engine: Engine, creator: str, say: Say = lambda _line: None, *, layer_texts: int = MOST_TEXTS
) -> VariantCertificate:
    """Measure what KV of ``source`` does to the answers of ``engine``, on the texts that ``source`` has read.

    Every text's prefix is read by the engine too; then the tokens after it are read behind the engine's own KV, and
    behind KV of which some layers are the other's, and the distributions of the next token are compared.

    Args:
        source: as ``sample`` makes it; its engine need not be loaded any more.
        creator: the node that will sign.
        layer_texts: so many texts are what single layers are measured on; what may be reused, on all.

    Raises ModelError when the two cannot be variants of one model, or there are no texts.
    """
    reason = not_variants(source.spec, engine.spec) or ("" if source.windows else "no text is long enough")
    if reason:
        raise ModelError(
            f"measuring KV of {source.variant} on {variant_of(engine)}: {reason}",
            hint="name two variants of one model: its precisions, its engines, or adapters of it",
            reason=reason,
        )
    own = sample(engine, source.windows, source.prefix_tokens, say)
    comparison = _Comparison(engine, own, [converted(state, engine.spec.dtype) for state in source.states])
    count = len(engine.spec.layers)
    effects = []
    for layer in range(count):
        kl, top1 = comparison.of({layer}, texts=layer_texts)
        effects.append(LayerEffect(float(kl.mean()), float(top1.mean())))
        say(f"layer {layer} of the other: mean KL {kl.mean():.5f}")
    reuses: list[Reuse] = []
    recents = [(0, recent) for recent in recent_counts(engine.spec, source.prefix_tokens)]
    for computed, recent in [
        (0, 0),
        *recents,
        *((each, 0) for each in computed_counts(engine.most_computed_layers)[1:]),
    ]:
        # What is already faithful enough computes less: the others need not be measured.
        share = Reuse(computed, 0, 0, 0, recent).share(count, source.prefix_tokens)
        if any(_enough(each) and each.share(count, source.prefix_tokens) <= share for each in reuses):
            continue
        # The engine's own first layers are what computing them again gives: nothing else goes into them.
        kl, top1 = comparison.of(set(range(computed, count)), recent)
        found = Reuse(computed, float(kl.mean()), float(kl.max()), float(top1.mean()), recent)
        reuses.append(found)
        say(
            f"{computed} layers and {recent} recent positions computed: mean KL {found.mean_kl:.5f}, worst "
            f"{found.worst_kl:.5f}, top-1 {found.top1:.3f}"
        )
    tested = sum(len(window) - source.prefix_tokens for window in source.windows)
    return VariantCertificate(
        created_us=time.time_ns() // 1000,
        creator=creator,
        layers=effects,
        model=engine.spec.name,
        prefix_tokens=source.prefix_tokens,
        reuses=reuses,
        source=source.variant,
        target=own.variant,
        tested_tokens=tested,
        texts=len(source.windows),
    )


def computed_counts(most: int) -> list[int]:
    """Numbers of computed layers that are measured: none, one, and so on in growing steps to ``most``."""
    counts = [0]
    while counts[-1] < most:
        counts.append(min(most, max(counts[-1] + 1, int(counts[-1] * _GROWTH))))
    return counts


def recent_counts(spec: ModelSpec, prefix_tokens: int) -> list[int]:
    """Numbers of recent positions that are measured; none where windows forget what lies before them."""
    counts = []
    recent = _FEWEST_RECENT
    while recent < prefix_tokens - SINK_TOKENS and goes_back(spec):
        counts.append(recent)
        recent *= 2
    return counts


def goes_back(spec: ModelSpec) -> bool:
    """Whether every layer holds every position, so that the last ones can be computed again whatever the length."""
    return all(layer.kind == "full" for layer in spec.layers)


def _enough(found: Reuse) -> bool:
    return found.worst_kl <= _ENOUGH.most_kl and found.top1 >= _ENOUGH.least_top1


class _Comparison:
    """The engine's answers behind its own KV, and behind a mixture."""

    def __init__(self, engine: Engine, own: Sampled, others: Sequence[Sequence[LayerState]]) -> None:
        self._engine = engine
        self._own = own
        self._others = others
        self._sinks = [sinks_of(engine, window) for window in own.windows]
        self._expected = [self._read(text, set()) for text in range(len(own.windows))]

    def of(self, from_other: set[int], recent_tokens: int = 0, *, texts: int | None = None) -> tuple[Figures, Figures]:
        """Mean divergence, and share of equal likeliest tokens, of each text, with these layers of the other but for
        their first and so many last positions.

        ``texts``: only the first ones.
        """
        kl, top1 = [], []
        for text, expected in enumerate(self._expected[:texts]):
            found = self._read(text, from_other, recent_tokens)
            of_text = distributions.compare(expected, found)
            kl.append(of_text[0])
            top1.append(of_text[1])
        return np.array(kl), np.array(top1)

    def _read(self, text: int, from_other: set[int], recent_tokens: int = 0) -> distributions.LogProbabilities:
        own, engine = self._own, self._engine
        window, kept = own.windows[text], own.prefix_tokens - recent_tokens
        layers = own.states[text]
        if from_other:
            others = with_sinks(self._others[text], self._sinks[text])
            layers = [other if index in from_other else layers[index] for index, other in enumerate(others)]
        if recent_tokens:
            layers = kept_of(engine.spec, layers, kept)
        cache = engine.import_layers(layers, len(window))
        try:
            if recent_tokens:
                engine.prefill(cache, window[kept : own.prefix_tokens])
            return distributions.log_probabilities(engine.read(cache, window[own.prefix_tokens :]))
        finally:
            cache.close()


@dataclass(frozen=True)
class Permit:
    """That KV of another variant may be used."""

    variant: Variant
    """Whose it is."""
    computed_layers: int
    """The first ones, that are computed again."""
    reason: str
    """Whose KV, and what the certificate says of it."""
    recent_tokens: int = 0
    """Last positions, that are computed again in all layers."""

    def share(self, engine: Engine, tokens: int) -> float:
        """How much of reading so many positions it is."""
        return Reuse(self.computed_layers, 0, 0, 0, self.recent_tokens).share(len(engine.spec.layers), tokens)


def permit(
    certificate: VariantCertificate | None, source: Variant, engine: Engine, asked: Asked, tokens: int = 0
) -> Permit | str:
    """Whether KV of ``source`` may be used by ``engine``: how, or why not.

    Args:
        certificate: of this pair, opened; None when there is none.
        tokens: positions of the state; of the measured texts where 0.
    """
    if certificate is None:
        return f"no certificate for KV of {source}"
    if (certificate.source, certificate.target) != (source, variant_of(engine)):
        return f"the certificate is of another pair: {certificate.source} on {certificate.target}"
    if len(certificate.layers) != len(engine.spec.layers):
        return f"the certificate is of a model of {len(certificate.layers)} layers"
    here = [
        each
        for each in certificate.reuses
        if each.computed_layers <= engine.most_computed_layers and (goes_back(engine.spec) or not each.recent_tokens)
    ]
    known = msgspec.structs.replace(certificate, reuses=here)
    found = known.least(asked.most_kl, asked.least_top1, engine.most_computed_layers, tokens)
    if found is None:
        best = min(here, key=lambda each: each.worst_kl)
        return (
            f"KV of {source} is not near enough: mean KL {best.mean_kl:.4f}, worst {best.worst_kl:.4f}, top-1 "
            f"{best.top1:.3f} with {best.computed_layers} layers and {best.recent_tokens} recent positions computed, "
            f"asked {asked.most_kl:g} and {asked.least_top1:g}, by {certificate.creator}'s certificate"
        )
    computed = f", the first {found.computed_layers} layers computed here" if found.computed_layers else ""
    computed += f", the last {found.recent_tokens} positions computed here" if found.recent_tokens else ""
    return Permit(
        source,
        found.computed_layers,
        f"KV of {source}{computed}: mean KL {found.mean_kl:.4f}, worst {found.worst_kl:.4f}, top-1 {found.top1:.3f} by "
        f"{certificate.creator}'s certificate",
        found.recent_tokens,
    )
