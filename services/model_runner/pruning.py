"""Pruners: which positions of a cache are kept when not all can be.

A pruner ranks all positions, the most important first; a budget of N keeps the first N. So what a smaller budget keeps
is a part of what a larger one does, and details go first. All layers of full attention keep the same positions, with
their true places (``positions``); per-head sets (KVzip, arXiv 2505.23416) would keep more for the same bytes, and would
cost a bitmap, a mask and a gather for each head.

`last`    the most recent ones.
`window`  attention sinks, then the most recent ones (StreamingLLM, arXiv 2309.17453).
`heavy`   sinks, recent ones, and those that the text's own later tokens looked at: each layer's and head's strongest
          look, averaged (the window of observation is SnapKV's, arXiv 2404.14469; heavy hitters are H2O's, 2306.14048;
          the maximum over queries, which says on SmolLM2 far more than their sum, is KVzip's).
`anchors` sinks, recent ones, then by level: where sentences begin and end (separators gather what was said before
          them: SepLLM, arXiv 2412.12094), names and numbers, tokens that surprised the model; then the rest of the
          text, what the model foresaw last.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from protocol.errors import ModelError
from services.model_runner.codecs.exact_rows import SINK_TOKENS
from services.model_runner.engine import Engine, LayerState
from services.model_runner.positions import Positions, positions_of

Floats = npt.NDArray[np.float32]

RECENT_TOKENS = 32
"""So many of the most recent ones are kept before anything else but the sinks."""
RECENT_EVERY = 3
"""Behind these every third one is the next recent one, whatever else a pruner ranks."""
OBSERVED_TOKENS = 128
"""Whose looks count for ``heavy``."""
UNSEEN_TOKENS = 128
"""The last tokens of a text, which are not observed: the self-test reads them, and what it measures must be new."""
PIECE_TOKENS = 64
"""So many are read again at a time."""
SURPRISED_NATS = 4.0
"""A token of a probability below 2 % has surprised the model."""
_ENDS = frozenset(".!?…。！？।؟\n")
"""Characters that end a sentence, or a line, in most scripts."""


@dataclass(frozen=True)
class Seen:
    """What a pruner looks at."""

    tokens: int
    """Cached positions."""
    pieces: Sequence[str] = ()
    """The text of each token; for ``anchors``."""
    attention: Floats | None = None
    """(tokens,): how strongly each was looked at; for ``heavy``."""
    surprise: Floats | None = None
    """(tokens,), nats: how little the model expected each; for ``anchors``, which do without."""
    salience: Floats | None = None
    """(tokens,), 0 to 1: how much what it is of matters to whoever remembers it; for ``anchors``, which do without."""


class Pruner(ABC):
    """Ranks positions. Stateless."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    """Fields of ``Seen`` beside ``tokens`` that it looks at."""

    @abstractmethod
    def rank(self, seen: Seen) -> Positions:
        """Every position once, the most important first."""

    def keep(self, seen: Seen, count: int, held: Positions | None = None) -> Positions:
        """The ``count`` most important ones, ascending; of ``held`` where the cache was pruned before."""
        ranked = self.rank(seen)
        if held is not None:
            ranked = ranked[np.isin(ranked, held)]
        return np.sort(ranked[:count])


class Last(Pruner):
    """The most recent ones, and no sinks: what a cut context would be. Here to compare with."""

    name = "last"

    def rank(self, seen: Seen) -> Positions:
        return np.arange(seen.tokens)[::-1]


class Window(Pruner):
    """Sinks and the most recent ones."""

    name = "window"

    def __init__(self, sinks: int = SINK_TOKENS) -> None:
        self.sinks = sinks

    def rank(self, seen: Seen) -> Positions:
        sinks = min(self.sinks, seen.tokens)
        return np.concatenate([np.arange(sinks), np.arange(sinks, seen.tokens)[::-1]])


class Heavy(Pruner):
    """Sinks, recent ones, and what was looked at most."""

    name = "heavy"
    needs = frozenset({"attention"})

    def rank(self, seen: Seen) -> Positions:
        if seen.attention is None:
            raise _cannot(self.name, "this engine does not tell what its attention looks at")
        return _with_recent(seen.tokens, np.argsort(-seen.attention, kind="stable"))


class Anchors(Pruner):
    """Sinks, recent ones, and what a text hangs on, level by level."""

    name = "anchors"
    needs = frozenset({"pieces", "surprise"})

    def rank(self, seen: Seen) -> Positions:
        if len(seen.pieces) != seen.tokens:
            raise _cannot(self.name, "the text of its tokens is not known")
        surprise = np.zeros(seen.tokens, np.float32) if seen.surprise is None else seen.surprise
        salience = np.zeros(seen.tokens, np.float32) if seen.salience is None else seen.salience
        level = levels(seen.pieces, surprise)
        # Salience lifts what it is of by a level at most; within one, what was foreseen goes first.
        return _with_recent(seen.tokens, np.lexsort((-surprise, level - np.clip(salience, 0, 1))))


def levels(pieces: Sequence[str], surprise: Floats) -> npt.NDArray[np.int64]:
    """What each token is of a text: 0 a sentence's first or last, 1 of a name or number, 2 a surprise, 3 the rest.

    By rules that know no language: a sentence ends with the punctuation of ``_ENDS`` or a line's end, a name is a word
    with an upper-case letter that begins no sentence, or has a digit. A word is what goes on without a space.
    """
    found = np.full(len(pieces), 3)
    begins, in_name = True, False
    for at, piece in enumerate(pieces):
        text = piece.strip()
        new_word = not piece[:1].isalnum()
        if begins and text:
            found[at] = 0
            in_name = False
        elif any(letter.isupper() or letter.isnumeric() for letter in text) or (in_name and not new_word):
            found[at], in_name = 1, True
        else:
            in_name = False
            if surprise[at] >= SURPRISED_NATS:
                found[at] = 2
        ended = piece.rstrip(" \t\"')]}»”’")[-1:] in _ENDS and bool(piece.strip(" "))
        if ended and not begins:
            found[at] = 0
        begins = ended or (begins and not text)
    return found


PRUNERS: dict[str, Pruner] = {pruner.name: pruner for pruner in (Last(), Window(), Heavy(), Anchors())}


@dataclass(frozen=True)
class PruneWish:
    """What ``SnapshotWishes.prune`` asks for."""

    pruner: Pruner
    amount: float
    """At most 1: a share of the positions; above: so many."""

    def count(self, tokens: int) -> int:
        """Of ``tokens`` positions."""
        return min(tokens, max(1, round(self.amount * tokens if self.amount <= 1 else self.amount)))


def read_wish(text: str) -> PruneWish:
    """``last:512``, ``window:4,1000`` (sinks and recent ones), ``heavy:0.5``, ``anchors:0.5``. Raises ModelError."""
    name, _, amounts = text.partition(":")
    try:
        numbers = [float(each) for each in amounts.split(",")]
    except ValueError:
        numbers = []
    two = name == Window.name and len(numbers) == 2
    if name not in PRUNERS or not (two or len(numbers) == 1) or not all(0 < each < 2**31 for each in numbers):
        raise ModelError(
            f"pruning by {text[:80]!r}: that is no pruner and how much it keeps",
            hint=f"name one of {', '.join(PRUNERS)}, and a share or a number of positions: heavy:0.5, last:512, "
            "window:4,1000",
            field="wishes.prune",
            reason="unknown pruner",
        )
    if two:
        return PruneWish(Window(int(numbers[0])), float(int(numbers[0]) + int(numbers[1])))
    return PruneWish(PRUNERS[name], numbers[0])


def look(
    engine: Engine, tokens: Sequence[int], layers: Sequence[LayerState], pieces: Sequence[str], needs: Iterable[str]
) -> Generator[None, None, Seen]:
    """What a pruner that ``needs`` these looks at, of a cache that holds ``layers``: part of its text is read again, a
    few tokens at a time, up to each ``yield``. ``seen`` does it at once.

    Args:
        tokens: the cached ones.
        pieces: the text of each of them.
    """
    wanted = frozenset(needs)
    attention = (yield from _observe(engine, tokens, layers)) if "attention" in wanted else None
    surprise = (yield from _surprises(engine, tokens)) if "surprise" in wanted else None
    return Seen(len(tokens), pieces, attention, surprise)


def seen(
    engine: Engine,
    tokens: Sequence[int],
    layers: Sequence[LayerState],
    pieces: Sequence[str] = (),
    needs: Iterable[str] = ("attention", "surprise"),
) -> Seen:
    """As ``look``, at once."""
    looking = look(engine, tokens, layers, pieces, needs)
    while True:
        try:
            next(looking)
        except StopIteration as stopped:
            found: Seen = stopped.value
            return found


def _observe(
    engine: Engine, tokens: Sequence[int], layers: Sequence[LayerState]
) -> Generator[None, None, Floats | None]:
    """How strongly each position was looked at by the ``OBSERVED_TOKENS`` before the last ``UNSEEN_TOKENS``, which are
    read again; those after them have 0. None when the engine cannot tell, or the cache not be taken back so far."""
    end = max(1, len(tokens) - UNSEEN_TOKENS)
    start = max(0, end - max(1, min(OBSERVED_TOKENS, end // 2)))
    before = [layer.prefix(spec, start) for layer, spec in zip(layers, engine.spec.layers, strict=True)]
    whole = [layer for layer in before if layer is not None]
    if len(whole) < len(before):
        return None
    held = positions_of(whole)
    rows = np.concatenate([np.arange(start) if held is None else held, np.arange(start, end)])
    found = np.zeros(len(tokens), np.float32)
    cache = engine.import_layers(whole, end)
    try:
        for at in range(start, end, PIECE_TOKENS):
            looked = engine.looked_at(cache, tokens[at : min(at + PIECE_TOKENS, end)])
            if looked is None:
                return None
            found[rows[: len(looked)]] = np.maximum(found[rows[: len(looked)]], looked)
            yield
    finally:
        cache.close()
    return found


def _surprises(engine: Engine, tokens: Sequence[int]) -> Generator[None, None, Floats]:
    """Nats by which each token was unexpected, (tokens,); the text is read again, into a cache of its own."""
    found = np.zeros(len(tokens), np.float32)
    cache = engine.new_cache(len(tokens))
    try:
        for start in range(0, len(tokens) - 1, PIECE_TOKENS):
            chunk = tokens[start : min(start + PIECE_TOKENS, len(tokens) - 1)]
            logits = engine.read(cache, chunk)
            logits -= logits.max(1, keepdims=True)
            said = logits[np.arange(len(chunk)), tokens[start + 1 : start + 1 + len(chunk)]]
            found[start + 1 : start + 1 + len(chunk)] = np.log(np.exp(logits).sum(1)) - said
            yield
    finally:
        cache.close()
    return found


def _with_recent(tokens: int, ranked: Positions) -> Positions:
    """``ranked``, behind sinks and recent ones, and mixed with further recent ones."""
    first = [*range(min(SINK_TOKENS, tokens)), *range(tokens - 1, max(SINK_TOKENS, tokens - RECENT_TOKENS) - 1, -1)]
    taken = np.zeros(tokens, bool)
    taken[first] = True
    rest = ranked[~taken[ranked]]
    # Place of each position in the two lists; a position comes where the earlier of its two places is.
    place = np.empty(tokens)
    at = np.arange(len(rest))
    place[rest] = at + at // (RECENT_EVERY - 1) + 1
    recent = np.flatnonzero(~taken)[::-1]
    place[recent] = np.minimum(place[recent], RECENT_EVERY * np.arange(len(recent)))
    return np.concatenate([np.array(first, np.int64), rest[np.argsort(place[rest], kind="stable")]])


def _cannot(name: str, why: str) -> ModelError:
    return ModelError(
        f"pruning by {name}: {why}",
        hint=f"use {Window.name}, which needs nothing",
        field="wishes.prune",
        reason="cannot be measured",
    )
