"""Rounds: the scheduler's decisions carried out on one engine, for many conversations.

All of it runs on the worker's thread; commits and the reading of parked conversations have threads of their own, and
what they have done is taken up between two rounds. There the state of every conversation is whole. A failure is its
run's own: the others go on.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from edge.power import EnergyShares, Meter
from protocol.errors import MindstreamError, ModelError, to_wire
from protocol.layout import BLOCK_TOKENS
from protocol.messages import RunDone, RunToken, Usage
from services.model_runner.answers import Answer, Pooled, Run, given_before
from services.model_runner.chat import ChatFormat
from services.model_runner.constrained import Grammars
from services.model_runner.conversations import Conversation, Conversations
from services.model_runner.engine import Engine, Logits, chunk_ends
from services.model_runner.generation import GeneratedToken, accept, context_full
from services.model_runner.heat import rest_s
from services.model_runner.parking import Fetched
from services.model_runner.pool import Pool
from services.model_runner.pool_fetching import Taken
from services.model_runner.prefixes import chunk_keys
from services.model_runner.room import Room
from services.model_runner.scheduler import Scheduler, Work

log = logging.getLogger(__name__)

CHECKPOINT_S = 5.0
"""So often the tokens of answers under way are kept, in case the process dies."""
_AT_FAULT = re.compile(r"steps\[(\d+)\]")


@dataclass
class Loaded:
    """A model that is ready."""

    engine: Engine
    chat: ChatFormat
    conversations: Conversations
    max_context_tokens: int
    device_reason: str
    """Why the engine runs where it does."""
    max_batch: int = 0
    """Answers that are decoded together; 0: as many as the engine takes, 1: each alone, bit for bit the same."""
    kv_budget_bytes: int = 2**62
    """What all KV caches may take together."""
    budget_reason: str = ""
    """Why so much."""
    meter: Meter = field(default_factory=lambda: Meter([], "nobody has looked for a sensor"))
    """Measures the energy of what computes."""
    on_chunk: Callable[[int, int, float], None] = lambda _start, _end, _seconds: None
    """Called on the worker's thread with what was read of a prompt, and how long that took."""
    pool: Pool | None = None
    """Beginnings of prompts that the site has read; None: there is none."""
    watch: Callable[[Loaded, Answer, GeneratedToken, Logits], None] = lambda _loaded, _answer, _token, _logits: None
    """Called with each token, and the logits that it was chosen from, when it is the pending one; raises nothing."""
    grammars: Grammars = field(init=False)

    def __post_init__(self) -> None:
        spec = self.engine.spec
        self.grammars = Grammars(self.chat.tokenizer, spec.vocab_size, spec.eos_token_ids)


@dataclass
class Totals:
    """What has been done since the start."""

    steps: int = 0
    tokens: int = 0
    chunks: int = 0
    shared_tokens: int = 0
    pooled_tokens: int = 0
    """That came from the site's pool."""
    restored: int = 0
    """Conversations that came back from disk bit for bit."""

    @property
    def batch_mean(self) -> float:
        """Conversations decoded together, on average over steps."""
        return self.tokens / self.steps if self.steps else 0.0


Report = Callable[[str, str], None]
"""Called with the name of a counter and what happened, to be said as an event; an empty text is only counted."""


@dataclass
class _Landed:
    """What another thread has done for a run."""

    work: Work
    then: Callable[[], None]


@dataclass
class Rounds:
    """The runs of one model.

    Args:
        loaded: the model.
        scheduler: decides; shared with the worker, under ``lock``.
        runs: what each work of the scheduler is.
        lock: notified when another thread has done something for a run.
        say_token: called with a run's id and each of its tokens.
        report: called with what should be counted and said.
        throttled: whether the device is slowed down, so that background work should rest (heat.py).
    """

    loaded: Loaded
    scheduler: Scheduler
    runs: dict[Work, Run]
    lock: threading.Condition
    say_token: Callable[[str, RunToken], None]
    report: Report
    throttled: Callable[[], bool] = lambda: False
    totals: Totals = field(default_factory=Totals)
    last_usage: Usage | None = None
    _answers: dict[Work, Answer] = field(default_factory=dict)
    _landed: deque[_Landed] = field(default_factory=deque)

    def __post_init__(self) -> None:
        loaded = self.loaded
        self._engine = loaded.engine
        self._conversations = loaded.conversations
        self.scheduler.max_batch = min(loaded.max_batch or loaded.engine.max_batch, loaded.engine.max_batch)
        self.room = Room(
            loaded.engine, loaded.chat, loaded.conversations, loaded.kv_budget_bytes, loaded.max_context_tokens
        )
        if loaded.conversations.parking is not None:
            loaded.conversations.parking.on_change = self.room_changed
        self._keeper = ThreadPoolExecutor(1, "conversation keeper")
        self._checkpoint_s = time.monotonic()
        self._energy = EnergyShares(loaded.meter)
        self._rests_until_s = 0.0

    @property
    def answering(self) -> list[str]:
        """Conversations whose run has begun."""
        return [work.conversation for work in tuple(self._answers)]

    def stop(self) -> None:
        """Keep how far the answers under way have come, and end. The worker's thread has ended."""
        self._keep_checkpoints()
        self._keeper.shutdown(wait=True)
        self.loaded.meter.stop()
        if self._conversations.parking is not None:
            self._conversations.parking.stop()

    def room_changed(self) -> None:
        """There may be room for another run. On any thread."""
        with self.lock:
            self.scheduler.changed = True
            self.lock.notify_all()

    def _land(self, work: Work, future: Future[Any], then: Callable[[], None]) -> None:
        """``then`` on the worker's thread, when ``future`` is done."""

        def done(_: Future[Any]) -> None:
            self._landed.append(_Landed(work, then))
            self.room_changed()

        future.add_done_callback(done)

    # --- beginning ------------------------------------------------------------------------------------------

    def begin_waiting(self) -> None:
        """Begin every run for which there is room, and take up what other threads have done."""
        with self.lock:
            if not self.scheduler.changed:
                return
            self.scheduler.changed = False
        while self._landed:
            landed = self._landed.popleft()
            self._attempt(landed.work, landed.then)
        while True:
            with self.lock:
                work = self.scheduler.next_to_begin(lambda work: self.room.fits(work, self.runs[work]))
                if work is None:
                    return
                self.scheduler.move(work, "away")
            self._attempt(work, lambda work=work: self._begin(work))  # type: ignore[misc]

    def _attempt(self, work: Work, do: Callable[[], None]) -> None:
        """An error ends the run and nothing else."""
        try:
            do()
        except Exception as error:  # noqa: BLE001 - it is this run's outcome, and its asker is told
            self._fail(work, error)

    def _begin(self, work: Work) -> None:
        run, name = self.runs[work], work.conversation
        if run.cancelled.is_set():
            self._end(work, run.not_begun())
            return
        self._conversations.in_use.add(name)
        half = self._conversations.checkpoint(name, run.command)
        if half is not None:
            self._conversations.hold(half)
            self.report(
                "resumed.answers", f"the answer to run {run.identifier} goes on after {half.state.new_tokens} tokens"
            )
            self._answer(work, half, dropped_tokens=0)
            return
        parking = self._conversations.parking
        if parking is not None and self._conversations.live(name) is None and parking.has(name):
            fetching = parking.fetch(name)
            self._land(work, fetching, lambda: self._restore(work, fetching))
            return
        self._begin_here(work)

    def _restore(self, work: Work, fetching: Future[Fetched]) -> None:
        """The parked cache is in memory, or cannot be used: then the tokens are read again."""
        try:
            self._conversations.restore(fetching.result())
            self.totals.restored += 1
            self.report("restored.kv_cache", "")
        except MindstreamError as error:
            self.report(
                "refused.parked", f"{work.conversation} could not come back from disk, it is read again: {error}"
            )
        self._begin_here(work)

    def _begin_here(self, work: Work) -> None:
        run, name = self.runs[work], work.conversation
        found = self._conversations.find(name)
        if found is not None and found.last_command == run.command:
            self._end(work, given_before(self.loaded.chat, run, found))
            return
        turn = self.room.turn(work, run)
        if turn.settings.json_schema:
            self.loaded.grammars.check(turn.settings.json_schema)  # Refused while the conversation is as it was.
        conversation = turn.apply(self._engine, found, self.loaded.max_context_tokens)
        self._conversations.hold(conversation)
        self._answer(work, conversation, turn.dropped_tokens)

    def _answer(self, work: Work, conversation: Conversation, dropped_tokens: int) -> None:
        answer = Answer(self.runs[work], work, conversation, self.loaded.chat)
        answer.dropped_tokens = dropped_tokens
        if dropped_tokens:
            self.report("dropped.prompt_tokens", "")
        state = conversation.state
        answer.keys = chunk_keys(state.tokens[:-1], self._engine.chunk_tokens)
        if not state.cache.length:
            answer.common_chunks = self.room.prefixes.common_chunks(work.conversation, answer.keys)
        self._answers[work] = answer
        self.loaded.grammars.attach(state)
        self._energy.begin(work)
        if not self._look_into_pool(answer):
            self._go_on(answer)

    def _look_into_pool(self, answer: Answer) -> bool:
        """Whether the run waits for its prompt's beginning to come from the pool."""
        state, pool = answer.state, self.loaded.pool
        if pool is None or state.new_tokens:
            return False
        in_memory = self.room.prefixes.held_chunks(answer.keys) * self._engine.chunk_tokens
        plan = pool.look(state.tokens, max(state.cache.length, in_memory))
        if plan is None:
            return False
        fetching = pool.fetch(plan)
        self._land(answer.work, fetching, lambda: self._take_pooled(answer, fetching.result()))
        return True

    def _take_pooled(self, answer: Answer, taken: Taken | None) -> None:
        """The prompt's beginning has come, or has not: then it is read."""
        conversation, state = answer.conversation, answer.state
        if taken is not None and taken.tokens > state.cache.length:
            try:
                cache = self._engine.import_layers(taken.layers, state.cache.capacity_tokens)
            except MindstreamError as error:
                self.report("refused.pooled", f"what came from the pool cannot be used, it is read: {error}")
            else:
                self.room.prefixes.forget(conversation)
                new_tokens = taken.tokens - state.cache.length
                state.cache.close()
                state.cache = cache
                conversation.whole_chunks = []
                conversation.foreign = taken.foreign
                state.timing.reused_tokens += new_tokens
                answer.pooled = Pooled(new_tokens, taken.sources, taken.how)
                self.totals.pooled_tokens += new_tokens
                if taken.how == "exact":
                    keys = answer.keys[: taken.tokens // self._engine.chunk_tokens]
                    if taken.foreign:
                        self.room.prefixes.mark_foreign(keys)
                    for key in keys:
                        conversation.whole_chunks.append(key)
                        self.room.prefixes.read(conversation)
        self._go_on(answer)

    def _go_on(self, answer: Answer) -> None:
        """To reading its prompt, or to decoding when that is read."""
        state = answer.state
        answer.work.left_tokens = len(state.tokens) - 1 - state.cache.length
        with self.lock:
            self.scheduler.move(answer.work, "reading" if answer.work.left_tokens else "decoding")

    # --- a round --------------------------------------------------------------------------------------------

    def rest(self) -> float | None:
        """Let background work rest or go on, as it should now. Called under the lock.

        Returns how many seconds it still rests; None when it does not.
        """
        left_s = self._rests_until_s - time.monotonic() if self.throttled() else 0.0
        self.scheduler.background_rests = left_s > 0
        return left_s if left_s > 0 else None

    def end_cancelled(self) -> None:
        """End the runs that were stopped since the round before."""
        for answer in [each for each in self._answers.values() if each.run.cancelled.is_set()]:
            if answer.work.stage != "away":
                answer.state.finish_reason = "cancelled"
                self._finish(answer)

    def round(self) -> None:
        """A chunk of one prompt, and a step of the running answers."""
        started_s = time.monotonic()
        with self.lock:
            read, step = self.scheduler.next_round()
        if read is not None:
            self._read(self._answers[read])
        if step:
            # The chunk may have taken its time: who was cancelled meanwhile gets one token more.
            self._step([self._answers[work] for work in step])
        now_s = time.monotonic()
        if any(work.background for work in (*step, *([read] if read else []))):
            self._rests_until_s = now_s + rest_s(now_s - started_s)
        if now_s - self._checkpoint_s > CHECKPOINT_S:
            self._checkpoint_s = now_s
            self._keep_checkpoints()

    def _read(self, answer: Answer) -> None:
        state, started = answer.state, time.perf_counter()
        try:
            self._share(answer)
            start = end = state.cache.length
            if not state.prefilled:
                end = chunk_ends(start, len(state.tokens) - 1, self._engine.chunk_tokens)[0]
                reading_s = time.perf_counter()
                self._engine.prefill(state.cache, state.tokens[start:end])
                self.loaded.on_chunk(start, end, time.perf_counter() - reading_s)
                self._has_read(answer, start, end)
        except Exception as error:  # noqa: BLE001 - it is this run's outcome, and its asker is told
            if not self._out_of_memory(answer, error):
                self._fail(answer.work, error)
            return
        seconds = time.perf_counter() - started
        state.timing.prefilled_tokens += end - start
        state.timing.prefill_s += seconds
        self.totals.chunks += 1
        self._offer_to_pool(answer, start, end, seconds)
        with self.lock:
            self.scheduler.charge([answer.work], seconds)
        self._energy.computed([answer.work], seconds)
        if state.prefilled:
            self._go_on(answer)
        else:
            answer.work.left_tokens = len(state.tokens) - 1 - end

    def _share(self, answer: Answer) -> None:
        """Take what another conversation has read of the same beginning, in place of reading it."""
        conversation, state = answer.conversation, answer.state
        own = len(conversation.whole_chunks)
        if own >= len(answer.keys) or state.cache.length != own * self._engine.chunk_tokens:
            return
        found = self.room.prefixes.fork(answer.keys, own, state.cache.capacity_tokens)
        if found is None:
            return
        forked, chunks = found
        taken = forked.length - state.cache.length
        state.cache.close()
        state.cache = forked
        conversation.whole_chunks = answer.keys[:chunks]
        conversation.foreign = self.room.prefixes.is_foreign(conversation.whole_chunks)
        state.timing.reused_tokens += taken
        answer.shared_tokens += taken
        self.totals.shared_tokens += taken
        if chunks == answer.common_chunks:
            self.room.keep_prefix(answer.keys[chunks - 1], forked)

    def _has_read(self, answer: Answer, start: int, end: int) -> None:
        """Note a whole chunk, for those who come with the same beginning."""
        conversation, chunk = answer.conversation, self._engine.chunk_tokens
        if end % chunk or start != len(conversation.whole_chunks) * chunk or end // chunk > len(answer.keys):
            return
        conversation.whole_chunks.append(answer.keys[start // chunk])
        if conversation.foreign:
            self.room.prefixes.mark_foreign(conversation.whole_chunks)
        self.room.prefixes.read(conversation)
        if len(conversation.whole_chunks) == answer.common_chunks:
            self.room.keep_prefix(conversation.whole_chunks[-1], answer.state.cache)

    def _offer_to_pool(self, answer: Answer, start: int, end: int, seconds: float) -> None:
        """A block that was read whole, as was all before it, can be of use to others."""
        conversation, pool = answer.conversation, self.loaded.pool
        if start % BLOCK_TOKENS == 0:
            answer.block_s = 0.0
        answer.block_s += seconds
        whole = len(conversation.whole_chunks) * self._engine.chunk_tokens
        if pool is None or end % BLOCK_TOKENS or end != whole or start == end:
            return
        if not conversation.foreign and conversation.keep:
            pool.has_read(answer.state.cache, answer.state.tokens, answer.block_s)

    def _out_of_memory(self, answer: Answer, error: Exception) -> bool:
        """Whether the run is tried once more, its prompt read from the start, because memory could be had."""
        if not isinstance(error, ModelError) or error.reason != "out of memory" or answer.tried_again:
            return False
        answer.tried_again = True
        freed = self.room.free_all()
        self.report("out_of_memory.retried", f"{error}; {freed} idle caches were given up, and it is tried once more")
        self._read_again(answer)
        return True

    def _read_again(self, answer: Answer) -> None:
        """Its cache may be half written: its tokens are read again into a new one."""
        state, conversation = answer.state, answer.conversation
        self.room.prefixes.forget(conversation)
        capacity = state.cache.capacity_tokens
        state.cache.close()
        conversation.whole_chunks, conversation.foreign, answer.pooled = [], False, None
        try:
            state.cache = self._engine.new_cache(capacity)
        except MindstreamError as error:
            self._fail(answer.work, error)
            return
        self._go_on(answer)

    def _step(self, answers: list[Answer]) -> None:
        ready = []
        for answer in answers:
            if context_full(self._engine, answer.state):
                answer.state.finish_reason = "length"
                self._finish(answer)
            else:
                ready.append(answer)
        if not ready:
            return
        started = time.perf_counter()
        try:
            if len(ready) == 1:  # the step that is promised to be the same, bit for bit
                rows = [self._engine.step(ready[0].state.cache, ready[0].state.tokens[-1])]
            else:
                rows = self._engine.step_batch([(each.state.cache, each.state.tokens[-1]) for each in ready])
        except Exception as error:  # noqa: BLE001 - it is these runs' outcome, and their askers are told
            self._step_failed(ready, error)
            return
        seconds = time.perf_counter() - started
        self.totals.steps += 1
        self.totals.tokens += len(ready)
        with self.lock:
            self.scheduler.charge([answer.work for answer in ready], seconds)
        self._energy.computed([answer.work for answer in ready], seconds)
        for answer, row in zip(ready, rows, strict=True):
            try:
                generated = accept(self._engine, answer.state, row)
                self.say_token(answer.run.identifier, answer.took(generated, len(ready), seconds))
                self.loaded.watch(self.loaded, answer, generated, row)
            except Exception as error:  # noqa: BLE001 - it is this run's outcome, and its asker is told
                self._fail(answer.work, error)
                continue
            if answer.state.finish_reason:
                self._finish(answer)

    def _step_failed(self, answers: list[Answer], error: Exception) -> None:
        """One is at fault and the others can go on, or all caches may be half written and are read again, once."""
        at_fault = _AT_FAULT.fullmatch(error.field) if isinstance(error, MindstreamError) else None
        if at_fault is not None and int(at_fault[1]) < len(answers):
            answer = answers[int(at_fault[1])]
            if not self._out_of_memory(answer, error):
                self._fail(answer.work, error)
            return
        if len(answers) == 1:
            if not self._out_of_memory(answers[0], error):
                self._fail(answers[0].work, error)
            return
        self.room.free_all()
        self.report("failed.batch", f"{len(answers)} answers are read again, a step of all of them failed: {error}")
        for answer in answers:
            if answer.tried_again:
                self._fail(answer.work, error)
            else:
                answer.tried_again = True
                self._read_again(answer)

    # --- ending ---------------------------------------------------------------------------------------------

    def _finish(self, answer: Answer) -> None:
        """The answer has a finish reason: keep it, then say so."""
        conversation, work = answer.conversation, answer.work
        try:
            done = answer.end(self._energy.end(work), self._energy.sensor)
            self.last_usage = done.usage
            if not conversation.keep:
                if done.finish_reason == "cancelled":
                    self.room.prefixes.forget(conversation)
                    self._conversations.forget(conversation.name)
                self._end(work, done)
                return
            record = self._conversations.encode(conversation)
        except Exception as error:  # noqa: BLE001 - it is this run's outcome, and its asker is told
            self._fail(work, error)
            return
        with self.lock:
            self.scheduler.move(work, "away")
        kept = self._keeper.submit(self._conversations.keep, conversation.name, record)

        def then() -> None:
            kept.result()
            self._end(work, done)

        self._land(work, kept, then)

    def _fail(self, work: Work, error: Exception) -> None:
        """Half an answer is in memory: back to what was kept, so that the same turn can be asked again."""
        run = self.runs[work]
        if not isinstance(error, MindstreamError):
            log.error("run %s failed", run.identifier, exc_info=error)
        answer = self._answers.get(work)
        if answer is not None:
            self.room.prefixes.forget(answer.conversation)
            self._conversations.forget(work.conversation)
            self._keeper.submit(self._conversations.drop_checkpoint, work.conversation)
        self._end(work, RunDone(run.identifier, work.conversation, "", [], "error", error=to_wire(error)))

    def _end(self, work: Work, done: RunDone) -> None:
        self._answers.pop(work, None)
        self._energy.end(work)
        self._conversations.in_use.discard(work.conversation)
        self.room.end(work)
        with self.lock:
            self.scheduler.remove(work)
            run = self.runs.pop(work)
        run.done.set_result(done)

    def _keep_checkpoints(self) -> None:
        """Keep the tokens of answers under way; the next process goes on from them."""
        records = {
            work.conversation: self._conversations.encode(answer.conversation, answer.run.command)
            for work, answer in self._answers.items()
            if answer.conversation.keep and work.stage == "decoding" and answer.state.new_tokens
        }
        if not records:
            return

        def keep() -> None:
            try:
                self._conversations.keep_checkpoints(records)
            except MindstreamError as error:
                self.report("failed.checkpoint", f"{len(records)} answers under way were not kept: {error}")

        self._keeper.submit(keep)
