"""One ask to resume, while it is worked on: what there is to be had, what was decided, and where the time went."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from dataclasses import dataclass, field

from protocol.codec import Received
from protocol.manifest import SignedManifest, SnapshotManifest
from protocol.messages import HandoffOption, HandoffPhases, ModelResume
from protocol.sharing import Opened
from services.model_runner import costs
from services.model_runner.engine import Engine
from services.model_runner.first_step import FirstStep
from services.model_runner.reading import Reading
from services.model_runner.variants import Permit


class Outrun(Exception):
    """Reading again was quicker than what was being fetched."""


class Unusable(Exception):
    """The KV cannot be used, for the reason given."""


@dataclass
class Handoff:
    """One ask to resume."""

    ask: ModelResume
    message: Received
    started_s: float
    opened: Opened
    """Of the snapshot named, or of one of the conversation's token ids alone."""
    identifier: str
    signed: SignedManifest
    name: str
    """Of the conversation here."""
    engine: Engine
    kv_refused: str
    """Why no KV of the holder's can be used; empty when it can."""
    kv_bytes: int
    """In memory."""
    rungs: list[costs.RungOffer]
    variant: Permit | None = None
    """By which its KV is used although another variant of the model computed it."""
    options: list[costs.Option] = field(default_factory=list)
    best: costs.Option = field(default_factory=lambda: costs.Option(costs.TOKENS, 0, {}, 0.0, 0.0))
    reading: Reading | None = None
    """Of its tokens again, where that has begun."""
    prefill_s: float = 0.0
    """Predicted, of reading all of it again."""
    phases: HandoffPhases = field(default_factory=HandoffPhases)
    decided_s: float = 0.0
    outrun: threading.Event = field(default_factory=threading.Event)
    """Set when its chunks are not wanted any more."""
    total_bytes: int = 0
    """Of the chunks, once that is known."""
    here_bytes: int = 0
    """Of them, here."""
    fetched_bytes: int = 0
    """That crossed the bus."""
    fetching_s: float = 0.0
    """When chunks began to come."""
    first_step: FirstStep | None = None
    """Against the logits in the snapshot, where there are any."""
    lock: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    """Keeps chunks in the store whose manifest is still to come."""

    @property
    def manifest(self) -> SnapshotManifest:
        """Of what there is."""
        return self.opened.manifest

    @property
    def named(self) -> bool:
        """Whether the ask names a snapshot; else the holder saves its conversation as suits the way."""
        return bool(self.ask.snapshot)

    @property
    def tokens(self) -> int:
        """The pending one included."""
        return self.manifest.cached_tokens + 1

    @property
    def read_tokens(self) -> int:
        """Read again so far."""
        return self.reading.tokens if self.reading is not None else 0

    def check_wanted(self) -> None:
        """Raises Outrun when its chunks are not wanted any more."""
        if self.outrun.is_set():
            raise Outrun

    def should_read_too(self) -> bool:
        """Whether to begin reading again beside what is under way: it takes longer than was predicted."""
        now_s = time.monotonic()
        fetched = self.fetched_bytes
        left_bytes = self.total_bytes - self.here_bytes if self.total_bytes else self.best.size_bytes
        if fetched:
            byte_s = (now_s - self.fetching_s) / fetched
        elif self.fetching_s:
            # Nothing yet: as if the first chunk came now.
            byte_s = (now_s - self.fetching_s) / costs.CHUNK_BYTES
        else:
            late_s = now_s - self.decided_s - 2 * self.best.phases_s.get("save", 0.0)
            predicted = self.best.phases_s.get("transfer", 0.0) / max(1, self.best.size_bytes)
            byte_s = math.inf if late_s > self.prefill_s else predicted
        share_left = left_bytes / max(1, self.total_bytes or self.best.size_bytes)
        return costs.should_read_instead(
            left_bytes=left_bytes,
            byte_s=byte_s,
            waited_s=now_s - (self.fetching_s or self.decided_s),
            decode_left_s=share_left * self.best.phases_s.get("decode", 0.0),
            prefill_s=self.prefill_s,
        )

    def said_options(self) -> list[HandoffOption]:
        """As the answer has them, the one that was taken first."""
        ordered = sorted(self.options, key=lambda option: (option is not self.best, option.likely_s))
        return [
            HandoffOption(
                option.codec,
                option.size_bytes,
                _ms(option.likely_s),
                HandoffPhases(**{f"{name}_ms": _ms(seconds) or 0.0 for name, seconds in option.phases_s.items()}),
                option.why_not,
            )
            for option in ordered
        ]


def _ms(seconds: float) -> float | None:
    return round(seconds * 1000, 3) if seconds < math.inf else None


def since_ms(started_s: float) -> float:
    """Milliseconds since a moment of the monotonic clock."""
    return (time.monotonic() - started_s) * 1000
