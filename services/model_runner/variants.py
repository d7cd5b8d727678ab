"""Reuse of keys and values between variants of one model: other weights, another engine, other adapters.

What a variant has computed is near to what the model here would have computed, and how near depends on the pair. It is
measured once a pair on calibration texts (``certify``), never assumed, and a state is taken in (``take_in``) only where
a certificate says that it is as faithful as asked. Where all of it is not, the first layers are computed again from the
tokens and the others kept: that needs no more than tokens, and is exact as far as it goes.

Computing the last layers instead would need what flows into them, which no cache holds; docs/snapshots.md has what that
was measured to bring. After DroidSpeak (arXiv 2411.02820), which looks for the layers to compute by profiling a pair.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from protocol.errors import ModelError
from protocol.variants import LayerEffect, Reuse, Variant, VariantCertificate
from services.model_runner import distributions
from services.model_runner.codecs.base import Array, from_floats, to_floats
from services.model_runner.codecs.ladder import Asked
from services.model_runner.engine import STORAGE_DTYPES, Engine, KVCache, LayerState, ModelSpec, ShouldStop

PREFIX_TOKENS, TEST_TOKENS = 512, 64
"""Of each text: positions whose KV is the other variant's, and positions after them that are compared."""
MOST_TEXTS = 6
_ENOUGH = Asked(most_kl=0.001, least_top1=0.99)
"""Once so many computed layers reach this, more of them are not measured."""
_GROWTH = 1.25
"""Numbers of computed layers that are measured grow by this."""

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
    should_stop: ShouldStop | None = None,
) -> KVCache:
    """A cache of ``engine`` with another variant's ``layers``, the first ``computed_layers`` of them computed here.

    Args:
        layers: of any dtype, of the engine's shapes.
        tokens: those in the cache, without the pending one.

    Raises as ``Engine.import_computing``.
    """
    own = converted(layers, engine.spec.dtype)
    if not computed_layers:
        return engine.import_layers(own, capacity_tokens)
    return engine.import_computing(own, tokens, computed_layers, capacity_tokens, should_stop)


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
        kl, top1 = comparison.of({layer}, layer_texts)
        effects.append(LayerEffect(float(kl.mean()), float(top1.mean())))
        say(f"layer {layer} of the other: mean KL {kl.mean():.5f}")
    reuses = []
    for computed in computed_counts(engine.most_computed_layers):
        # The engine's own first layers are what computing them again gives: nothing else goes into them.
        kl, top1 = comparison.of(set(range(computed, count)))
        found = Reuse(computed, float(kl.mean()), float(kl.max()), float(top1.mean()))
        reuses.append(found)
        say(
            f"{computed} layers computed: mean KL {found.mean_kl:.5f}, worst {found.worst_kl:.5f}, "
            f"top-1 {found.top1:.3f}"
        )
        if found.worst_kl <= _ENOUGH.most_kl and found.top1 >= _ENOUGH.least_top1:
            break
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


class _Comparison:
    """The engine's answers behind its own KV, and behind a mixture."""

    def __init__(self, engine: Engine, own: Sampled, others: Sequence[Sequence[LayerState]]) -> None:
        self._engine = engine
        self._own = own
        self._others = others
        self._expected = [self._read(text, set()) for text in range(len(own.windows))]

    def of(self, from_other: set[int], texts: int | None = None) -> tuple[Figures, Figures]:
        """Mean divergence, and share of equal likeliest tokens, of each text, with these layers of the other.

        ``texts``: only the first ones.
        """
        kl, top1 = [], []
        for text, expected in enumerate(self._expected[:texts]):
            found = self._read(text, from_other)
            of_text = distributions.compare(expected, found)
            kl.append(of_text[0])
            top1.append(of_text[1])
        return np.array(kl), np.array(top1)

    def _read(self, text: int, from_other: set[int]) -> distributions.LogProbabilities:
        own = self._own
        tokens = own.windows[text][own.prefix_tokens :]
        pairs = zip(own.states[text], self._others[text] if from_other else own.states[text], strict=True)
        layers = [other if index in from_other else mine for index, (mine, other) in enumerate(pairs)]
        cache = self._engine.import_layers(layers, own.prefix_tokens + len(tokens))
        try:
            return distributions.log_probabilities(self._engine.read(cache, tokens))
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


def permit(certificate: VariantCertificate | None, source: Variant, engine: Engine, asked: Asked) -> Permit | str:
    """Whether KV of ``source`` may be used by ``engine``: how, or why not.

    Args:
        certificate: of this pair, opened; None when there is none.
    """
    if certificate is None:
        return f"no certificate for KV of {source}"
    if (certificate.source, certificate.target) != (source, variant_of(engine)):
        return f"the certificate is of another pair: {certificate.source} on {certificate.target}"
    if len(certificate.layers) != len(engine.spec.layers):
        return f"the certificate is of a model of {len(certificate.layers)} layers"
    found = certificate.least(asked.most_kl, asked.least_top1, engine.most_computed_layers)
    if found is None:
        here = [each for each in certificate.reuses if each.computed_layers <= engine.most_computed_layers]
        best = min(here, key=lambda each: each.worst_kl)
        return (
            f"KV of {source} is not near enough: mean KL {best.mean_kl:.4f}, worst {best.worst_kl:.4f}, top-1 "
            f"{best.top1:.3f} with {best.computed_layers} layers computed, asked {asked.most_kl:g} and "
            f"{asked.least_top1:g}, by {certificate.creator}'s certificate"
        )
    computed = f", the first {found.computed_layers} layers computed here" if found.computed_layers else ""
    return Permit(
        source,
        found.computed_layers,
        f"KV of {source}{computed}: mean KL {found.mean_kl:.4f}, worst {found.worst_kl:.4f}, top-1 {found.top1:.3f} by "
        f"{certificate.creator}'s certificate",
    )
