"""Fits a snapshot into a budget: pruner and codec together, whichever pair is most faithful at the size asked.

A rung that is smaller than the budget needs no pruning; with any other fewer positions are kept. Each rung's pair is
encoded, decoded and put to the ladder's self-test, against the cache that was not pruned, and the one of least
divergence is taken. Few tests: one for each rung.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from protocol.errors import ModelError
from services.model_runner.codecs.base import Codec
from services.model_runner.codecs.exact_rows import SINK_TOKENS
from services.model_runner.codecs.ladder import Fidelity, Test, Usual, decode_blocks, encode_blocks
from services.model_runner.engine import LayerState, ModelSpec
from services.model_runner.positions import Positions, positions_of, prune
from services.model_runner.pruning import RECENT_TOKENS

FEWEST_TOKENS = SINK_TOKENS + RECENT_TOKENS
"""Positions that are kept at least, or the budget cannot be met."""
_BITS = 16
_TRIES = 4
_SLACK = 0.99
"""Aimed at a little below the budget: sizes do not follow counts exactly."""

Keep = Callable[[int], Positions]
"""The positions that a pruner keeps when it may keep so many, ascending."""


class Fit(NamedTuple):
    """A pair of pruner and codec."""

    codec: Codec
    kept: Positions | None
    """None: all positions."""
    ratio: float
    """16 bits a number of the cache that was not pruned, over the encoded blocks."""
    fidelity: Fidelity | None
    """None where nothing could be measured."""
    usual: Usual | None
    """Of the rung, where nothing was pruned."""
    exact: bool
    """Whether it is neither pruned nor lossy."""
    encode_s: float
    decode_s: float

    @property
    def name(self) -> str:
        """Of its rung."""
        level = self.codec.params().get("level")
        return f"{self.codec.name} ({level})" if level else self.codec.name

    def __str__(self) -> str:
        found = f", mean KL {self.fidelity.mean_kl:.4f}" if self.fidelity else ""
        kept = "all" if self.kept is None else f"{len(self.kept):,}"
        return f"{self.name}, {kept} positions: {self.ratio:.1f}x{found}"


class Fitted(NamedTuple):
    """The best pair, and the others."""

    best: Fit
    tried: list[Fit]
    """The others that meet the budget, the most faithful first."""


def numbers_bytes(layers: Sequence[LayerState]) -> int:
    """Of all keys and values at 16 bits a number."""
    return sum(2 * layer.keys.size for layer in layers) * _BITS // 8


def fit_budget(
    spec: ModelSpec,
    layers: Sequence[LayerState],
    ratio: float,
    rungs: Sequence[tuple[Codec, Usual | None]],
    keep: Keep,
    test: Test | None,
    *,
    prunes: bool = True,
    whole: Sequence[LayerState] | None = None,
) -> Fitted:
    """The pair that is most faithful when the cache is ``ratio`` times smaller than 16 bits a number.

    Args:
        layers: copied out of the engine.
        rungs: of the ladder (``codecs.ladder.rungs``).
        keep: of a pruner (``Pruner.keep``), of positions that ``layers`` hold.
        test: against which cache fidelity is measured: of ``layers``, as a rule. None where nothing can be measured:
            then the rungs' usual figures decide, and if it must be pruned the pair that prunes least is taken.
        prunes: False: by codecs alone.
        whole: the cache that ``ratio`` is of, where ``layers`` are less.

    Raises ModelError when no rung can be so small and keep ``FEWEST_TOKENS`` positions.
    """
    before = numbers_bytes(whole or layers)
    less = whole is not None and whole is not layers
    candidates = [_fit(spec, layers, before, ratio, rung, keep if prunes else None, test, less) for rung in rungs]
    fits = [fit for fit in candidates if fit is not None]
    if not fits:
        raise ModelError(
            f"fitting {layers[0].seen_tokens:,} positions into a budget of {ratio:g}x: no rung of {len(rungs)} can and "
            f"keep {FEWEST_TOKENS} positions",
            hint="ask for less; with a basis of the model (`mindstream snapshot calibrate`) more is possible",
            field="wishes.budget_ratio",
            reason="out of reach",
        )
    fits.sort(key=_divergence)
    return Fitted(fits[0], fits[1:])


def _divergence(fit: Fit) -> float:
    if fit.exact:
        return 0.0
    if fit.fidelity is not None:
        return fit.fidelity.mean_kl
    if fit.usual is not None:
        return fit.usual.mean_kl
    # Nothing is known of it: what is pruned least comes first, behind all the others.
    return 1e6 if fit.kept is None else 2e6 - len(fit.kept)


def _fit(
    spec: ModelSpec,
    layers: Sequence[LayerState],
    before: int,
    ratio: float,
    rung: tuple[Codec, Usual | None],
    keep: Keep | None,
    test: Test | None,
    less: bool,
) -> Fit | None:
    """By one rung, with as many positions as the budget allows; None when that is too few."""
    started_s = time.perf_counter()
    codec, usual = rung
    most_bytes = before / ratio
    held = positions_of(layers)
    total = count = layers[0].seen_tokens if held is None else len(held)
    kept, found = held, layers
    for _ in range(_TRIES):
        blocks = encode_blocks(codec, spec, found)
        size = sum(map(len, blocks))
        if size <= most_bytes:
            break
        count = math.floor(_fewer(layers, count, size, most_bytes))
        if keep is None or count < min(FEWEST_TOKENS, total):
            return None
        kept = keep(count)
        found = prune(layers, kept)
    else:
        return None
    encode_s = time.perf_counter() - started_s
    exact = codec.exact and count == total and not less
    fidelity, decode_s = None, 0.0
    if test is not None and not exact:
        started_s = time.perf_counter()
        positions = positions_of(found)
        decoded = decode_blocks(codec, spec, blocks, layers[0].seen_tokens, positions=positions)
        decode_s = time.perf_counter() - started_s
        fidelity = test.compare(decoded)
    kept = None if count == total else np.asarray(kept)
    pruned = kept is not None or less
    return Fit(codec, kept, before / max(1, size), fidelity, None if pruned else usual, exact, encode_s, decode_s)


def _fewer(layers: Sequence[LayerState], count: int, size: int, most_bytes: float) -> float:
    """How many positions would do, where ``count`` take ``size`` bytes: sliding layers cannot be pruned."""
    width = sum(layer.keys.shape[0] * layer.keys.shape[2] for layer in layers if layer.kind == "full")
    fixed = sum(layer.keys.size for layer in layers if layer.kind != "full")
    prunable = size * (width * count) / max(1, width * count + fixed)
    return float(count * (_SLACK * most_bytes - (size - prunable)) / max(1.0, prunable))
