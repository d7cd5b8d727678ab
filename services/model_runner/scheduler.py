"""What the engine does next: which run begins, whose prompt is read on, whose answers are decoded. Policy alone.

A round is one chunk of one prompt at most, and one decode step of the running answers, ``max_batch`` of them together.
Where more are running, a chunk comes after as many steps as there are answers: no stream waits for more than a chunk
and its turn. The rules:

- **Askers** share the engine's time, whatever each asks for: the next chunk, slot or beginning is the asker's that has
  had the least of it (start-time fair queueing, Goyal et al., SIGCOMM 1996). One who was away has saved up nothing.
- **Prompts** of one asker take turns between the one with the least left to read and the oldest one: a short prompt
  passes a long one, and the long one gets half of the chunks all the same. Equal ones are read one after another.
- **Background** work is done when no person's is there, and else in every ``BACKGROUND_EVERY``-th round; while it
  rests (the device is throttled, heat.py), in none.
- **Memory**: a run that does not fit now may be passed by ``PASSED_BY_MAX`` others, then nothing begins before it.
- **One conversation** has one run at a time, in the order in which they came.

Nothing here knows an engine, a thread or a clock: the caller says what each step cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

BACKGROUND_EVERY = 8
"""One round in so many is for background work too, and one beginning, while there is a person's."""
PASSED_BY_MAX = 8
"""So many runs may begin before one that waits for more memory than they."""

Stage = Literal["waiting", "reading", "decoding", "away"]
"""``reading``: its prompt. ``away``: it has begun, and waits for something that is not the engine."""


@dataclass(eq=False)
class Work:
    """One run, as the policy sees it."""

    asker: str
    """Whose time it takes: ``node/client``."""
    conversation: str
    background: bool = False
    stage: Stage = "waiting"
    left_tokens: int = 0
    """Of its prompt, still to be read."""
    passed_by: int = 0
    """Runs that began before it although it came first, because it did not fit."""
    order: int = 0
    """Of its coming; set by the scheduler."""
    stepped_at: int = 0
    """The round of its last decode step."""


class Round(NamedTuple):
    """What is to be done now; never both empty while the scheduler is busy."""

    read: Work | None
    """A chunk of its prompt."""
    step: list[Work]
    """One token each, together."""


@dataclass
class _Asker:
    had_s: float = 0.0
    """Engine time that it has had, on the common clock."""
    reads: int = 0
    """Chunks read for it."""
    works: int = 0
    """Its runs that are here."""


@dataclass
class Scheduler:
    """The policy. Used under the worker's lock.

    Args:
        max_batch: answers that are decoded together.
    """

    max_batch: int = 1
    changed: bool = False
    """Whether a run came or ended since this was set to False: another may begin now."""
    background_rests: bool = False
    """Whether no round is for background work now."""
    _works: dict[Stage, list[Work]] = field(
        default_factory=lambda: {"waiting": [], "reading": [], "decoding": [], "away": []}
    )
    _askers: dict[str, _Asker] = field(default_factory=dict)
    _count: int = 0
    _round: int = 0
    _begun: int = 0
    _stepped: int = 0
    """Steps since the last chunk."""
    _owed_chunk: bool = False
    """Whether the next chunk is a background prompt's, should there be one."""
    _slot_s: float = 0.0
    """What one slot of a batch has cost of late."""

    def add(self, work: Work) -> None:
        """A run has come."""
        asker = self._askers.get(work.asker)
        if asker is None or not asker.works:
            present = [each.had_s for each in self._askers.values() if each.works]
            asker = self._askers.setdefault(work.asker, _Asker())
            # It is not owed the time that it did not want.
            asker.had_s = max(asker.had_s, min(present, default=0.0))
        asker.works += 1
        self._count += 1
        work.order = self._count
        self._works[work.stage].append(work)
        self.changed = True

    def remove(self, work: Work) -> None:
        """A run has ended, whether it had begun or not."""
        self._works[work.stage].remove(work)
        self.changed = True
        asker = self._askers[work.asker]
        asker.works -= 1
        if not asker.works:
            self._forget_absent()

    def move(self, work: Work, stage: Stage) -> None:
        """A run goes on to another stage."""
        self._works[work.stage].remove(work)
        work.stage = stage
        self._works[stage].append(work)

    def charge(self, works: Iterable[Work], seconds: float) -> None:
        """The engine has spent ``seconds`` on ``works`` together."""
        works = list(works)
        share_s = seconds / len(works)
        for work in works:
            self._askers[work.asker].had_s += share_s
            if work.stage == "decoding":
                self._slot_s += (share_s - self._slot_s) / 16

    def count(self, stage: Stage) -> int:
        """Runs in a stage."""
        return len(self._works[stage])

    def of(self, stage: Stage) -> list[Work]:
        """The runs in a stage."""
        return list(self._works[stage])

    @property
    def busy(self) -> bool:
        """Whether there is something for a round to do."""
        begun = (*self._works["reading"], *self._works["decoding"])
        return any(not work.background for work in begun) if self.background_rests else bool(begun)

    # --- which run begins -----------------------------------------------------------------------------------

    def next_to_begin(self, fits: Callable[[Work], bool]) -> Work | None:
        """The run that should begin now; None when none may. It stays ``waiting`` until the caller moves it.

        ``fits`` says whether there is room for a run; asked for one after another, in order of fairness.
        """
        passed: list[Work] = []
        for work in self._candidates():
            if fits(work):
                for each in passed:
                    each.passed_by += 1
                self._begun += 1
                return work
            passed.append(work)
            if work.passed_by >= PASSED_BY_MAX:
                return None
        return None

    def _candidates(self) -> Iterator[Work]:
        taken = {work.conversation for works in self._works.values() for work in works if work.stage != "waiting"}
        free: list[Work] = []
        for work in self._works["waiting"]:
            if work.conversation not in taken:
                taken.add(work.conversation)
                free.append(work)
        persons = [work for work in free if not work.background]
        others = [work for work in free if work.background]
        if others and self._begun % BACKGROUND_EVERY == BACKGROUND_EVERY - 1:
            yield others[0]
            others = others[1:]
        for group in (persons, others):
            # Stable: the oldest of each asker first.
            yield from sorted(group, key=lambda work: self._askers[work.asker].had_s)

    # --- what a round does ----------------------------------------------------------------------------------

    def next_round(self) -> Round:
        """What to do now with the runs that have begun."""
        self._round += 1
        reading, decoding = self._works["reading"], self._works["decoding"]
        everyone = self._round % BACKGROUND_EVERY == 0
        self._owed_chunk |= everyone
        if self.background_rests:
            reading = [work for work in reading if not work.background]
            decoding = [work for work in decoding if not work.background]
        elif any(not work.background for work in (*reading, *decoding)):
            reading = [work for work in reading if not work.background or self._owed_chunk]
            decoding = [work for work in decoding if not work.background or everyone]
        read = None
        if reading and (not decoding or self._stepped >= len(decoding)):
            read = self._read(reading, background_first=self._owed_chunk)
            self._owed_chunk &= self.background_rests  # Still owed then.
            self._stepped = 0
        step = self._batch(decoding, background_slot=everyone)
        for work in step:
            work.stepped_at = self._round
        self._stepped += len(step)
        return Round(read, step)

    def _read(self, reading: list[Work], *, background_first: bool) -> Work:
        of_a_kind = [work for work in reading if work.background == background_first] or reading
        name = min((work.asker for work in of_a_kind), key=lambda asker: self._askers[asker].had_s)
        own = [work for work in of_a_kind if work.asker == name]
        asker = self._askers[name]
        asker.reads += 1
        if asker.reads % 2:
            return min(own, key=lambda work: (work.left_tokens, work.order))
        return min(own, key=lambda work: work.order)

    def _batch(self, decoding: list[Work], *, background_slot: bool) -> list[Work]:
        if len(decoding) <= self.max_batch:
            return list(decoding)
        persons = [work for work in decoding if not work.background]
        others = [work for work in decoding if work.background]
        for_others = 1 if others and background_slot else 0
        chosen = self._fair(persons, self.max_batch - for_others)
        return chosen + self._fair(others, self.max_batch - len(chosen))

    def _fair(self, works: list[Work], count: int) -> list[Work]:
        """``count`` of ``works``, slot by slot the asker's that has had least, of its own the longest unserved."""
        if len(works) <= count:
            return works
        queues: dict[str, list[Work]] = {}
        for work in sorted(works, key=lambda work: (work.stepped_at, work.order), reverse=True):
            queues.setdefault(work.asker, []).append(work)
        had_s = {asker: self._askers[asker].had_s for asker in queues}
        slot_s = self._slot_s or 1e-3
        chosen: list[Work] = []
        while len(chosen) < count:
            asker = min(queues, key=lambda name: had_s[name])
            chosen.append(queues[asker].pop())
            had_s[asker] += slot_s
            if not queues[asker]:
                del queues[asker]
        return chosen

    def _forget_absent(self) -> None:
        """Those without runs who would start at the common clock anyhow."""
        present = [each.had_s for each in self._askers.values() if each.works]
        clock_s = min(present, default=float("inf"))
        self._askers = {name: each for name, each in self._askers.items() if each.works or each.had_s > clock_s}
