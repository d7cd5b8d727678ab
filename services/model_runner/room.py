"""Room: which runs fit into the memory for KV caches, and what goes to make place.

A run is admitted with the memory that it will have taken when its answer is as long as it may be. Idle conversations
give way, the one unused for longest first; then the kept prefixes. Used by the worker thread alone.
"""

from __future__ import annotations

from protocol.errors import MindstreamError, ModelError
from services.model_runner.answers import Run
from services.model_runner.chat import ChatFormat
from services.model_runner.conversations import Conversations
from services.model_runner.engine import Engine, KVCache
from services.model_runner.memory import MIB
from services.model_runner.prefixes import Prefixes
from services.model_runner.scheduler import Work
from services.model_runner.turns import Turn, prepare

PREFIX_SHARE = 8
"""One part in so many of the budget may be copies of common beginnings."""


class Room:
    """The memory for KV caches of one model.

    Args:
        budget_bytes: what all caches may take together.
    """

    def __init__(
        self,
        engine: Engine,
        chat: ChatFormat,
        conversations: Conversations,
        budget_bytes: int,
        context_tokens: int,
    ) -> None:
        self._engine = engine
        self._chat = chat
        self._conversations = conversations
        self._budget_bytes = budget_bytes
        self._context_tokens = context_tokens
        self.prefixes = Prefixes(engine)
        self._turns: dict[Work, Turn | MindstreamError] = {}
        """Of runs that were looked at."""
        self._reserved: dict[Work, int] = {}
        """Bytes that each run that has begun will need."""
        self.used_bytes = 0
        """What all caches took when it was looked at last."""

    def turn(self, work: Work, run: Run) -> Turn:
        """What the run gives the model to read. Raises what ``turns.prepare`` raises."""
        history = self._conversations.history(work.conversation)
        known = self._turns.get(work)
        if isinstance(known, MindstreamError):
            raise known
        if known is not None and known.stands(history):
            return known
        return prepare(self._engine, self._chat, run.ask, history, self._context_tokens)

    def fits(self, work: Work, run: Run) -> bool:
        """Whether there is room for a run now; what is idle is sent away for it. One that can never be answered is
        let in too: it fails when it begins."""
        known = self._turns.get(work)
        if known is None:
            try:
                known = self.turn(work, run)
                self._check_possible(known)
            except MindstreamError as error:
                known = error
            self._turns[work] = known
        if isinstance(known, MindstreamError):
            return True
        need = self._need(known)
        own = self._conversations.live(work.conversation)
        used = self._measure() - (own.state.cache.allocated_bytes if own is not None else 0)
        parking = self._conversations.parking
        coming_free = parking.writing_bytes if parking is not None else 0
        if need > self._budget_bytes - used + coming_free:
            idle = [each for each in self._conversations.idle() if each is not own]
            could = sum(each.state.cache.allocated_bytes for each in idle) + self.prefixes.allocated_bytes
            if need > self._budget_bytes - used + coming_free + could:
                return False  # they may stay: their going would not be enough
            while need > self._budget_bytes - used + coming_free and idle:
                going = idle.pop(0)
                used -= going.state.cache.allocated_bytes
                self.prefixes.forget(going)
                before = parking.writing_bytes if parking is not None else 0
                self._conversations.evict(going)
                if parking is not None:
                    added = max(0, parking.writing_bytes - before)
                    used += added
                    coming_free += added
            while need > self._budget_bytes - used + coming_free and self.prefixes.allocated_bytes:
                used -= self.prefixes.allocated_bytes
                self.prefixes.drop_oldest()
                used += self.prefixes.allocated_bytes
        if need > self._budget_bytes - used:
            return False  # until what goes to the disk is there
        self._reserved[work] = need
        self._measure()
        return True

    def _need(self, turn: Turn) -> int:
        return self._engine.cache_bytes(turn.most_tokens(self._context_tokens), self._context_tokens)

    def _check_possible(self, turn: Turn) -> None:
        need = self._need(turn)
        if need > self._budget_bytes:
            raise ModelError(
                f"answering {turn.ask.conversation!r} with {self._engine.spec.name}: {turn.total_tokens:,} tokens and "
                f"an answer of {turn.ask.max_new_tokens:,} take {need / MIB:,.0f} MiB of KV, the budget is "
                f"{self._budget_bytes / MIB:,.0f} MiB",
                hint="ask for a shorter answer, shorten the prompt, or raise model.kv_memory_mib",
                field="max_new_tokens",
                reason="above the memory budget",
            )

    def _measure(self) -> int:
        """What all caches take, or will when the answers under way are at their end."""
        idle = sum(each.state.cache.allocated_bytes for each in self._conversations.idle())
        reserved = sum(self._reserved.values())
        busy = sum(each.state.cache.allocated_bytes for each in self._conversations.busy())
        parking = self._conversations.parking
        writing = parking.writing_bytes if parking is not None else 0
        self.used_bytes = idle + busy + self.prefixes.allocated_bytes + writing
        return idle + max(reserved, busy) + self.prefixes.allocated_bytes + writing

    def keep_prefix(self, key: bytes, cache: KVCache) -> None:
        """Keep a copy of a beginning that several prompts have, where there is memory for it."""
        try:
            self.prefixes.keep(key, cache, self._budget_bytes // PREFIX_SHARE)
        except ModelError:
            self.prefixes.drop_oldest()  # it is a convenience: no run fails for it

    def free_all(self) -> int:
        """Give up every idle cache; how many."""
        idle = self._conversations.idle()
        for each in idle:
            self.prefixes.forget(each)
            self._conversations.evict(each)
        freed = len(idle)
        while self.prefixes.drop_oldest():
            freed += 1
        return freed

    def end(self, work: Work) -> None:
        """The run has ended."""
        self._reserved.pop(work, None)
        self._turns.pop(work, None)
