"""Choosing the next token from logits: greedy, or seeded random sampling.

The random numbers are counter-based (Philox, Salmon et al., SC 2011): draw ``n`` of a seed is a pure function of
both, so the whole state of a sampler is two integers, and a resumed run draws what the uninterrupted one would have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from protocol.errors import InvalidPrompt, ModelError, SnapshotRefused
from services.model_runner.engine import Logits

_NUCLEUS_GUESS = 1024
"""Tokens looked at first for a nucleus: nearly always enough, and much cheaper than sorting a vocabulary."""

_IMPOSSIBLE = -1e4
"""Natural logarithm of no probability at all, and finite: a logit of -inf times its weight of 0 is no number."""


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

    def __post_init__(self) -> None:
        for field, fits, wanted in (
            ("temperature", 0 <= self.temperature <= 100, "between 0 and 100"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", 0 < self.repetition_penalty <= 100, "above 0 and at most 100"),
            ("seed", 0 <= self.seed < 2**63, "between 0 and 2**63 - 1"),
        ):
            if not fits:  # A NaN fits nothing.
                raise InvalidPrompt(
                    f"setting up sampling: {field} is {getattr(self, field)}, it must be {wanted}",
                    hint=f"choose a {field} {wanted}",
                    field=field,
                    reason="out of range",
                )


class Choice(NamedTuple):
    """A chosen token, and what the model thought. Both figures are of the model's own distribution over the whole
    vocabulary, before penalty, temperature and truncation: they measure the model's confidence, not the sampler's."""

    token: int
    logprob: float
    """Natural logarithm of the token's probability."""
    entropy: float
    """Nats."""


class Sampler:
    """Settings and the count of draws made."""

    def __init__(self, settings: SamplingSettings, draws: int = 0) -> None:
        self.settings = settings
        self.draws = draws

    def sample(self, logits: Logits, context: Sequence[int] = ()) -> Choice:
        """Choose from ``logits``, float32 of shape (vocab_size,).

        ``context`` are the tokens that the repetition penalty counts as said; unused when it is off.
        Raises ModelError when the logits are not numbers.
        """
        best = float(logits.max())
        if not math.isfinite(best):
            raise ModelError(
                f"choosing a token: the model's logits are not numbers (largest: {best})",
                hint="the computation overflowed: run the model in bfloat16 or float32, and check its files",
                reason="logits not finite",
            )
        shifted = np.maximum(logits - best, _IMPOSSIBLE)
        weights = np.exp(shifted)
        total = float(weights.sum(dtype=np.float64))
        log_total = float(np.log(total))
        entropy = log_total - float(np.dot(weights, shifted)) / total
        token = self._choose(logits, context)
        return Choice(token, float(shifted[token]) - log_total, max(entropy, 0.0))

    def _choose(self, logits: Logits, context: Sequence[int]) -> int:
        settings = self.settings
        if settings.repetition_penalty != 1.0 and len(context):
            logits = _penalised(logits, context, settings.repetition_penalty)
        if settings.temperature == 0.0:
            return int(logits.argmax())
        best = _likeliest(logits, settings.top_k) if settings.top_k else None
        candidates, weights = _nucleus(logits, best, settings.temperature, settings.top_p)
        cumulative = np.cumsum(weights)
        at = np.searchsorted(cumulative, self._uniform() * cumulative[-1], side="right")
        return int(candidates[min(int(at), len(candidates) - 1)])

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
        """The sampler that ``to_state`` described. Raises SnapshotRefused when it does not fit."""
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


def _penalised(logits: Logits, context: Sequence[int], penalty: float) -> Logits:
    said = np.unique(np.asarray(context, dtype=np.int64))
    scores = logits.copy()
    scores[said] = np.where(scores[said] > 0, scores[said] / penalty, scores[said] * penalty)
    return scores


def _likeliest(logits: Logits, count: int) -> npt.NDArray[np.intp]:
    """The ``count`` likeliest tokens, best first; of equals the lower id, so that no sort's whim decides."""
    if count < len(logits):
        threshold = np.partition(logits, len(logits) - count)[len(logits) - count]
        found = np.flatnonzero(logits >= threshold)
    else:
        found = np.arange(len(logits))
    order = np.argsort(-logits[found], kind="stable")
    return found[order][:count]


def _nucleus(
    logits: Logits, candidates: npt.NDArray[np.intp] | None, temperature: float, top_p: float
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
    """Candidates cut to the nucleus, and their unnormalised probabilities; ``None`` stands for the vocabulary."""
    if candidates is not None:
        weights = _weights(logits[candidates], temperature)
        return _cut(candidates, weights, top_p, float(weights.sum()))
    if top_p == 1.0:
        return np.arange(len(logits)), _weights(logits, temperature)
    total = float(_weights(logits, temperature).sum())
    likeliest = _likeliest(logits, _NUCLEUS_GUESS)
    weights = _weights(logits[likeliest], temperature)
    if weights.sum() < top_p * total:
        likeliest = _likeliest(logits, len(logits))
        weights = _weights(logits[likeliest], temperature)
    return _cut(likeliest, weights, top_p, total)


def _cut(
    candidates: npt.NDArray[np.intp], weights: npt.NDArray[np.float64], top_p: float, total: float
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
    """The fewest of the best-first ``candidates`` that reach ``top_p`` of ``total``; at least one."""
    kept = int(np.searchsorted(np.cumsum(weights), top_p * total)) + 1
    return candidates[:kept], weights[:kept]


def _weights(logits: Logits, temperature: float) -> npt.NDArray[np.float64]:
    """exp(logits / temperature) up to a common factor, in float64 so that a small temperature loses nothing."""
    scaled = logits.astype(np.float64) / temperature
    weights: npt.NDArray[np.float64] = np.exp(scaled - scaled.max())
    return weights
