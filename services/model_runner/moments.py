"""Moments: where in an answer something was decided, and which of them are worth keeping.

A token decides something where the model was undecided before it (the entropy of its distribution is high), or where
it took a turn that the model did not expect (its log-probability falls far below that of the tokens before it). Most
tokens of a text are neither: in chains of reasoning a fifth of them, those of high entropy, are where it forks (Wang
et al., arXiv 2506.01939; Bigelow et al., arXiv 2412.07961). What is high differs between models, texts and
temperatures, so each figure is ranked among the conversation's own last ``WINDOW_TOKENS``: a running percentile.

- entropy, nats: of the model's own distribution;
- jump, nats: the mean log-probability of the last ``CALM_TOKENS`` tokens, less that of this one.

The surprise of a token is the larger of the two percentiles, 0 to 1; of an entropy below ``LEAST_ENTROPY`` or a jump
below ``LEAST_JUMP`` it is 0, for where a text is all certain nothing is decided. It is a moment when its surprise is
above a threshold, which the run's salience lowers, and the last moment is far enough away. The first token of a run
of high salience is one whatever its surprise.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from services.model_runner.engine import Logits
from services.model_runner.generation import GeneratedToken

WINDOW_TOKENS = 256
LEAST_TOKENS = 32
"""A percentile of fewer says nothing."""
CALM_TOKENS = 8
LEAST_ENTROPY = 0.7
"""Nats: about two tokens that are as likely as each other."""
LEAST_JUMP = 2.0
THRESHOLD = 0.98
SALIENCE_LOWERS = 0.08
"""So much lower is the threshold of a run of salience 1."""
SALIENT = 0.5
ALTERNATIVES = 5
HALF_LIFE_US = 7 * 86_400 * 1_000_000


class Alternative(msgspec.Struct, frozen=True):
    """A token that might have been chosen instead."""

    token: int
    logprob: float


class Moment(msgspec.Struct, frozen=True):
    """Why a checkpoint was taken: what is said of the pending token, which is the one that decided something."""

    why: str
    """``undecided`` (entropy), ``unexpected`` (a jump) or ``salient`` (the first token of a salient run)."""
    surprise: float
    """0 to 1."""
    salience: float
    """Of the run, 0 to 1."""
    entropy: float
    logprob: float
    alternatives: list[Alternative]
    """The likeliest tokens there, best first. The pending token has not been read: any of them may take its place."""

    @property
    def weight(self) -> float:
        """How much it is worth keeping, above 0 and at most 2."""
        return max(0.01, self.surprise + self.salience)


class _Percentile:
    """Rank of a value among the last ``WINDOW_TOKENS``."""

    def __init__(self) -> None:
        self._last: deque[float] = deque()
        self._sorted: list[float] = []

    def __len__(self) -> int:
        return len(self._last)

    def rank(self, value: float) -> float:
        """Share of the earlier values that are below it, equal ones counted half; then it is one of them."""
        below = bisect.bisect_left(self._sorted, value)
        rank = (below + bisect.bisect_right(self._sorted, value)) / 2 / len(self._sorted) if self._sorted else 0.0
        if len(self._last) == WINDOW_TOKENS:
            del self._sorted[bisect.bisect_left(self._sorted, self._last.popleft())]
        self._last.append(value)
        bisect.insort(self._sorted, value)
        return rank


class Watch:
    """Watches one conversation's tokens for moments.

    Args:
        distance_tokens: between two moments at least.
    """

    def __init__(self, distance_tokens: int) -> None:
        self._distance = distance_tokens
        self._entropy, self._jump = _Percentile(), _Percentile()
        self._calm: deque[float] = deque(maxlen=CALM_TOKENS)
        self._since = distance_tokens
        """Tokens since the last moment."""

    def token(self, generated: GeneratedToken, salience: float) -> tuple[str, float]:
        """Why a token is a moment, and its surprise; an empty reason when it is none. Call it for every token;
        ``taken`` when a checkpoint was made of it."""
        calm = sum(self._calm) / len(self._calm) if self._calm else generated.logprob
        self._calm.append(generated.logprob)
        jump = calm - generated.logprob
        enough = len(self._entropy) >= LEAST_TOKENS
        undecided, unexpected = self._entropy.rank(generated.entropy), self._jump.rank(jump)
        if not enough or generated.entropy < LEAST_ENTROPY:
            undecided = 0.0
        if not enough or jump < LEAST_JUMP:
            unexpected = 0.0
        self._since += 1
        surprise = max(undecided, unexpected)
        if generated.index == 0 and salience >= SALIENT:
            return "salient", surprise
        if self._since <= self._distance or surprise < THRESHOLD - SALIENCE_LOWERS * salience:
            return "", surprise
        return "undecided" if undecided >= unexpected else "unexpected", surprise

    def taken(self) -> None:
        """A checkpoint was made."""
        self._since = 0


def moment(why: str, surprise: float, salience: float, generated: GeneratedToken, logits: Logits) -> Moment:
    """All that is kept of one; ``logits`` are those that the token was chosen from."""
    best = np.argpartition(logits, -min(ALTERNATIVES, len(logits)))[-ALTERNATIVES:]
    best = best[np.argsort(-logits[best], kind="stable")]
    total = float(logits[generated.token]) - generated.logprob
    alternatives = [Alternative(int(token), float(logits[token]) - total) for token in best]
    return Moment(why, surprise, salience, generated.entropy, generated.logprob, alternatives)


class Kept(NamedTuple):
    """A checkpoint, as thinning sees it."""

    snapshot: str
    conversation: str
    position: int
    """Tokens before the moment."""
    weight: float
    created_us: int
    chunks: frozenset[tuple[bytes, int]]
    """Digests and sizes, in bytes, of what it is made of."""


def to_thin(kept: Sequence[Kept], most: int, most_bytes: int, now_us: int) -> list[Kept]:
    """Which checkpoints go, so that each conversation has at most ``most`` and all together take ``most_bytes``.

    One after another goes the one that is worth least: its weight (surprise + salience) times its distance in tokens to
    the nearest one of at least that weight, or to the beginning of the conversation, halved for every week of age. So
    they stay spread over the conversation, and of neighbours the weightiest stays. Chunks that several share are
    counted once.
    """
    left = sorted(kept, key=lambda each: (each.conversation, each.position, each.created_us))
    gone: list[Kept] = []
    while left:
        crowded = {name for name, count in _counts(left).items() if count > most}
        size = sum(size for _, size in frozenset[tuple[bytes, int]]().union(*(each.chunks for each in left)))
        candidates = [each for each in left if size > most_bytes or each.conversation in crowded]
        if not candidates:
            break
        gone.append(min(candidates, key=lambda each: _value(left, each, now_us)))
        left.remove(gone[-1])
    return gone


def _counts(kept: Sequence[Kept]) -> dict[str, int]:
    found: dict[str, int] = {}
    for each in kept:
        found[each.conversation] = found.get(each.conversation, 0) + 1
    return found


def _value(left: Sequence[Kept], own: Kept, now_us: int) -> float:
    near = (
        abs(own.position - each.position)
        for each in left
        if each is not own and each.conversation == own.conversation and each.weight >= own.weight
    )
    age = max(0, now_us - own.created_us) / HALF_LIFE_US
    return float(own.weight * max(1, min([own.position, *near])) * 0.5 ** min(age, 1000.0))
