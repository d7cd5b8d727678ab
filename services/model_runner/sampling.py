"""Choosing the next token from logits: greedy, or seeded random sampling.

The filters work in one order, that of transformers: repetition penalty, temperature, top-k, top-p (of what top-k
left), min-p (relative to the likeliest). A constraint comes before all of them: what it forbids is no candidate.

The random numbers are counter-based (Philox, Salmon et al., SC 2011): draw ``n`` of a seed is a pure function of
both, so the whole state of a sampler is two integers, a resumed run draws what the uninterrupted one would have, and
what else is in a batch has no part in it.

A choice costs a few passes over the vocabulary in float32 and hardly ever a sort of it: candidates stay in the
order of their ids, and only the weights of those near the likeliest are sorted to find where a nucleus ends.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from protocol.errors import InvalidPrompt, ModelError, SnapshotRefused
from services.model_runner.engine import Logits

_IMPOSSIBLE = np.float32(-1e4)
"""Natural logarithm of no probability at all, and finite: a logit of -inf times its weight of 0 is no number."""

_COLDEST = 1e-6
"""Temperatures below are taken as this one: float32 holds nothing finer."""

_DEPTHS = (4.0, 10.0)
"""How far below the likeliest candidates are looked for first, nats: nearly always enough, and then few."""

_BLOCK = 512

Indices = npt.NDArray[np.intp]
Weights = npt.NDArray[np.float32]


class SamplingSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a token is chosen. Raises InvalidPrompt, naming the field, when a value is out of range."""

    temperature: float = 0.0
    """0 is greedy, and then the other fields but ``repetition_penalty`` mean nothing."""
    top_k: int = 0
    """Only the ``top_k`` likeliest tokens; 0 is off."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability (Holtzman et al., 2020); 1 is off."""
    repetition_penalty: float = 1.0
    """Tokens already in the context are made less likely by this factor (Keskar et al., 2019); 1 is off."""
    seed: int = 0
    min_p: float = 0.0
    """Only tokens at least this likely relative to the likeliest (Nguyen et al., 2024); 0 is off."""

    def __post_init__(self) -> None:
        for field, fits, wanted in (
            ("temperature", 0 <= self.temperature <= 100, "between 0 and 100"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", 0 < self.repetition_penalty <= 100, "above 0 and at most 100"),
            ("seed", 0 <= self.seed < 2**63, "between 0 and 2**63 - 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
        ):
            if not fits:  # A NaN fits nothing.
                raise InvalidPrompt(
                    f"setting up sampling: {field} is {getattr(self, field)}, it must be {wanted}",
                    hint=f"choose a {field} {wanted}",
                    field=field,
                    reason="out of range",
                )


class Chance(NamedTuple):
    """A token that might have come."""

    token: int
    logprob: float
    """Natural logarithm of its probability under the model."""


class Choice(NamedTuple):
    """A chosen token, and what the model thought. All figures are of the model's own distribution over the whole
    vocabulary, before constraint, penalty, temperature and truncation: they measure the model's confidence, not the
    sampler's."""

    token: int
    logprob: float
    """Natural logarithm of the token's probability."""
    entropy: float
    """Nats."""
    top: tuple[Chance, ...] = ()
    """The likeliest tokens, best first, of equals the lower id first; as many as were asked for."""


class Sampler:
    """Settings and the count of draws made."""

    def __init__(self, settings: SamplingSettings, draws: int = 0) -> None:
        self.settings = settings
        self.draws = draws
        self._said = _Said()

    def sample(
        self,
        logits: Logits,
        context: Sequence[int] = (),
        *,
        allowed: npt.NDArray[np.bool_] | None = None,
        top: int = 0,
    ) -> Choice:
        """Choose from ``logits``, float32 of shape (vocab_size,); they are left as they are.

        Args:
            context: the tokens that the repetition penalty counts as said; unused when it is off. Between calls
                with one list it may only have grown at its end.
            allowed: shape (vocab_size,): which tokens may be chosen; None: all.
            top: how many of the likeliest to name in the choice.

        Raises ModelError when the logits are not numbers, or when nothing that is allowed is possible.
        """
        best = float(logits.max())
        if not math.isfinite(best):
            raise ModelError(
                f"choosing a token: the model's logits are not numbers (largest: {best})",
                hint="the computation overflowed: run the model in bfloat16 or float32, and check its files",
                reason="logits not finite",
            )
        room = _room(len(logits))
        shifted = np.subtract(logits, np.float32(best), out=room[0])
        weights = np.exp(shifted, out=room[1])
        total = float(weights.sum())
        log_total = math.log(total)
        # einsum and not dot: BLAS would wake its own threads, whose number changes the sum.
        mean = float(np.einsum("i,i->", weights, shifted))
        if math.isnan(mean):
            mean = float(np.einsum("i,i->", weights, np.maximum(shifted, _IMPOSSIBLE)))
        token = self._choose(logits, shifted, weights, context, allowed)
        return Choice(
            token,
            max(float(shifted[token]), float(_IMPOSSIBLE)) - log_total,
            max(log_total - mean / total, 0.0),
            likeliest(shifted, log_total, top) if top else (),
        )

    def _choose(
        self,
        logits: Logits,
        shifted: Logits,
        weights: Weights,
        context: Sequence[int],
        allowed: npt.NDArray[np.bool_] | None,
    ) -> int:
        settings = self.settings
        scores = shifted
        if settings.repetition_penalty != 1.0 and len(context):
            # Of the model's own logits: the penalty depends on their sign.
            scores = _penalised(logits, self._said.in_(context), settings.repetition_penalty)
        tokens: Indices | None = None
        if allowed is not None:
            count = int(np.count_nonzero(allowed))
            if 4 * count < len(allowed):
                tokens = np.flatnonzero(allowed)
                scores = scores[tokens]
            else:
                scores = np.where(allowed, scores, np.float32(-np.inf))
        if scores is not shifted and (not len(scores) or float(scores.max()) == -math.inf):
            raise ModelError(
                "choosing a token: the model gives no probability to any token that is allowed here",
                hint="loosen the constraint, or use another model",
                reason="no token allowed",
            )
        if settings.temperature == 0.0:
            at = int(scores.argmax())
        else:
            known = scores is shifted and settings.temperature == 1.0
            if scores is not shifted:
                scores -= scores.max()
            at = self._draw(scores, weights if known else None)
        return at if tokens is None else int(tokens[at])

    def _draw(self, scores: Logits, weights: Weights | None) -> int:
        """An index of ``scores``, whose largest is 0, by temperature and filters; ``weights`` are exp(scores) where
        they are known."""
        settings = self.settings
        temperature = max(settings.temperature, _COLDEST)
        kept: Indices | None = None

        def keep(found: Indices) -> None:
            nonlocal kept, scores, weights
            kept = found if kept is None else kept[found]
            scores = scores[found]
            weights = None if weights is None else weights[found]

        # top-k and min-p look at the order and at differences alone: before the temperature is as well as after it,
        # and what they leave out need not be computed any further.
        if 0 < settings.top_k < len(scores):
            keep(_largest(scores, settings.top_k))
        least = temperature * math.log(settings.min_p) if settings.min_p else -math.inf
        if settings.min_p and settings.top_p == 1.0:
            keep(np.flatnonzero(scores >= np.float32(least)))
        if weights is None:
            weights = _room(len(scores))[1]
            with np.errstate(over="ignore"):  # A logit near float32's least becomes -inf here, which is right.
                np.divide(scores, np.float32(temperature), out=weights)
            np.exp(weights, out=weights)
        if settings.top_p < 1.0:
            keep(_nucleus(weights, settings.top_p * float(weights.sum())))
            if settings.min_p:
                keep(np.flatnonzero(scores >= np.float32(least)))
        at = _weighted(weights, self._uniform())
        return at if kept is None else int(kept[at])

    def _uniform(self) -> float:
        """Draw number ``draws`` of the seed, in [0, 1) with 53 bits."""
        raw = np.random.Philox(key=self.settings.seed, counter=self.draws).random_raw()
        self.draws += 1
        return float((int(raw) >> 11) * 2.0**-53)

    def to_state(self) -> dict[str, Any]:
        """Settings and RNG state in plain msgpack types."""
        return {**msgspec.structs.asdict(self.settings), "rng": "philox", "draws": self.draws}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Sampler:
        """The sampler that ``to_state`` described; settings that an older version did not have are off.

        Raises SnapshotRefused when it does not fit.
        """
        rest = dict(state)
        rng, draws = rest.pop("rng", None), rest.pop("draws", None)
        try:
            settings = msgspec.convert(rest, SamplingSettings)
        except (msgspec.ValidationError, InvalidPrompt) as error:
            reason = str(error)
        else:
            if rng == "philox" and type(draws) is int and 0 <= draws < 2**63:
                return cls(settings, draws)
            reason = f"rng {rng!r} with {draws!r} draws"
        raise SnapshotRefused(
            f"restoring a sampler: {reason}",
            hint="the snapshot was written by another version; resume it there",
            field="sampler",
            reason=reason,
        )


class _Said:
    """The different tokens of a context that grows: each is looked at once, not once a step."""

    def __init__(self) -> None:
        self._context: Sequence[int] = ()
        self._counted = 0
        self._known: set[int] = set()
        self._ids = np.empty(256, dtype=np.intp)

    def in_(self, context: Sequence[int]) -> Indices:
        counted = self._counted
        if context is not self._context or len(context) < counted:
            self._context, self._known, counted = context, set(), 0
        for token in context[counted:]:
            if token not in self._known:
                if len(self._known) == len(self._ids):
                    self._ids = np.concatenate((self._ids, np.empty_like(self._ids)))
                self._ids[len(self._known)] = token
                self._known.add(token)
        self._counted = len(context)
        return self._ids[: len(self._known)]


class _Rooms(threading.local):
    """Two arrays of the size of a vocabulary for each thread: memory of that size is handed back to the system when
    it is freed, and to get it anew at each step costs more than the sums."""

    arrays: tuple[Weights, Weights] = (np.empty(0, dtype=np.float32), np.empty(0, dtype=np.float32))


_rooms = _Rooms()


def _room(size: int) -> tuple[Weights, Weights]:
    if len(_rooms.arrays[0]) < size:
        _rooms.arrays = (np.empty(size, dtype=np.float32), np.empty(size, dtype=np.float32))
    first, second = _rooms.arrays
    return first[:size], second[:size]


def likeliest(shifted: Logits, log_total: float, count: int) -> tuple[Chance, ...]:
    """The ``count`` likeliest tokens, best first; ``shifted`` are logits less the largest, ``log_total`` the
    logarithm of the sum of their exponentials."""
    found = _largest(shifted, count) if count < len(shifted) else np.arange(len(shifted))
    order = np.argsort(-shifted[found], kind="stable")
    return tuple(
        Chance(int(token), max(float(shifted[token]), float(_IMPOSSIBLE)) - log_total) for token in found[order]
    )


def _penalised(logits: Logits, said: Indices, penalty: float) -> Logits:
    scores = logits.copy()
    here = scores[said]
    factor = np.float32(penalty)
    scores[said] = np.where(here > 0, here / factor, here * factor)
    return scores


def _first(values: Logits, least: np.float32, count: int) -> Indices:
    """Indices of the ``count`` largest, where ``least`` is the value of the last of them; of equals the lower index,
    so that no sort's whim decides."""
    found = np.flatnonzero(values >= least)
    if len(found) > count:
        equal = np.flatnonzero(values[found] == least)
        found = np.delete(found, equal[len(equal) - (len(found) - count) :])
    return found


def _largest(values: Logits, count: int) -> Indices:
    """Indices of the ``count`` largest of ``values``, whose largest is 0; ascending."""
    for depth in _DEPTHS:
        near = np.flatnonzero(values >= np.float32(-depth))
        if len(near) >= count:
            some = values[near]
            least = np.partition(some, len(some) - count)[len(some) - count]
            return near[_first(some, least, count)]
    least = np.partition(values, len(values) - count)[len(values) - count]
    return _first(values, least, count)


def _nucleus(weights: Weights, wanted: float) -> Indices:
    """Indices of the fewest of the largest ``weights`` (the largest is 1) that together reach ``wanted``; ascending."""
    near: Indices | None = None
    some = weights
    for depth in _DEPTHS:
        here = weights >= np.float32(math.exp(-depth))
        if 4 * np.count_nonzero(here) > len(weights):
            break  # A flat distribution: picking would cost as much as it saves.
        found = np.flatnonzero(here)
        taken = weights[found]
        if float(taken.sum()) >= wanted:
            near, some = found, taken
            break
    ranked = np.sort(some)[::-1]
    last = _passing(ranked, wanted, "left")
    kept = _first(some, ranked[last], last + 1)
    return kept if near is None else near[kept]


def _weighted(weights: Weights, uniform: float) -> int:
    """The index at which the running sum of ``weights`` passes ``uniform`` of their total; never one of no weight."""
    at = _passing(weights, uniform * float(weights.sum(dtype=np.float64)), "right")
    # The ways of adding up differ in the last digit: an end without weight may be reached.
    return at if weights[at] else int(np.flatnonzero(weights)[-1])


def _passing(weights: Weights, aim: float, side: Literal["left", "right"]) -> int:
    """The first index at which the running sum of ``weights`` reaches (``left``) or passes (``right``) ``aim``, the
    last index when none does. Blocks are added up first: a running sum over a whole vocabulary is slow, and coarse."""
    whole = len(weights) // _BLOCK * _BLOCK
    sums = np.cumsum(weights[:whole].reshape(-1, _BLOCK).sum(axis=1), dtype=np.float64)
    block = int(np.searchsorted(sums, aim, side=side))
    if block == len(sums) and whole == len(weights):
        return len(weights) - 1
    before = float(sums[block - 1]) if block else 0.0
    start = block * _BLOCK
    part = np.cumsum(weights[start : start + _BLOCK], dtype=np.float64)
    return start + min(int(np.searchsorted(part, aim - before, side=side)), len(part) - 1)
