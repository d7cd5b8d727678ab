"""Stepping: a conversation that somebody moves on by hand, token by token, seeing what could come next.

It is a conversation of its own: a fork of another, resumed from a snapshot under its name, or begun with a text; it is
not kept on disk. Between two asks its state is whole, the cache ending before the pending token, so it is saved, pruned
and resumed by its name like any other. What could come next is computed in a fork of the cache that reads the pending
token; to take a token is to go on in that fork.

Everything of a conversation is done on the worker's thread, between two tokens of the runs under way: a step, or a
chunk of prompt, at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import msgspec

from protocol.errors import InvalidPrompt, ModelError
from protocol.messages import ChatMessage, ModelStep, ModelStepped, TokenChance
from services.model_runner.conversations import Conversation, unknown
from services.model_runner.engine import Engine, KVCache, Logits, chunk_ends
from services.model_runner.generation import GenerationState, begin, context_full
from services.model_runner.rounds import Loaded, Report
from services.model_runner.sampling import Sampler, SamplingSettings
from services.model_runner.worker import Worker

KEPT_SHARE = 8
"""One part in so many of the memory for KV caches may be states to go back to; what is older is read again."""
IDLE_S = 900.0
"""One that nobody has asked for in so long is let go."""
MOST_STEPPED = 8
"""For one more the one that was asked for longest ago is let go."""
TAIL_TOKENS, TAIL_LETTERS = 160, 400


@dataclass
class _Stepped:
    """A conversation that is being stepped."""

    conversation: Conversation
    used_s: float
    kept: dict[int, KVCache] = field(default_factory=dict)
    """Of a model whose caches cannot be cut back: as they were, by the number of tokens, the oldest first."""
    ahead: KVCache | None = None
    """The cache once it has read the pending token; None until it was looked ahead."""
    logits: Logits | None = None
    """What that gave."""
    left: tuple[KVCache | None, int] = (None, 0)
    """Its cache and number of tokens after the last ask: who else has moved it, has made these others."""
    note: str = ""
    """What the asker should know of this step."""

    @property
    def state(self) -> GenerationState:
        return self.conversation.state

    @property
    def first(self) -> int:
        """It can go back to so many tokens: of a chat to where the present answer begins."""
        return self.conversation.turn_start if self.conversation.messages else 1

    def look_no_further(self) -> None:
        if self.ahead is not None:
            self.ahead.close()
        self.ahead = self.logits = None

    def close_kept(self, above: int = 0) -> None:
        for tokens in [each for each in self.kept if each > above]:
            self.kept.pop(tokens).close()


class Stepping:
    """Answers asks to step.

    Args:
        report: told the name of a counter and what happened.
        now_s: a clock that only goes forward.
    """

    def __init__(self, worker: Worker, report: Report, *, now_s: Callable[[], float] = time.monotonic) -> None:
        self._worker = worker
        self._report = report
        self._now_s = now_s
        self._stepped: dict[str, _Stepped] = {}
        # Each waits for the worker, chunk after chunk: a long text must not hold up another's step.
        self._threads = ThreadPoolExecutor(4, "stepper")

    def stop(self) -> None:
        """Begin nothing more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def step(self, ask: ModelStep) -> Future[ModelStepped]:
        """Move a conversation, and say what could come next."""
        return self._threads.submit(self._step, ask)

    def tick(self) -> None:
        """Let go of those that nobody has asked for; called now and then, on any thread."""
        if any(self._now_s() - each.used_s > IDLE_S for each in list(self._stepped.values())):
            self._worker.between_tokens(self._let_go_of_idle)

    def _step(self, ask: ModelStep) -> ModelStepped:
        do = self._worker.between_tokens
        if ask.end:
            return do(lambda loaded: self._end(loaded, ask.conversation)).result()
        do(lambda loaded: self._move(loaded, ask)).result()
        while not do(lambda loaded: self._read_chunk(loaded, ask.conversation)).result():
            pass
        return do(lambda loaded: self._look(loaded, ask)).result()

    # --- on the worker's thread -----------------------------------------------------------------------------

    def _move(self, loaded: Loaded, ask: ModelStep) -> None:
        """Back, and then forward, as asked; what was appended is still to be read."""
        stepped = self._stepped.get(ask.conversation)
        appended = list(ask.take)
        if stepped is None:
            conversation = self._find(loaded, ask)
            begun = conversation is None
            stepped = self._hold(loaded, conversation or self._begin(loaded, ask))
            if ask.text and not (appended or begun):
                appended = loaded.chat.tokenizer.encode_after(ask.text)
        else:
            self._settle(loaded, stepped)
            appended = appended or (loaded.chat.tokenizer.encode_after(ask.text) if ask.text else [])
        stepped.used_s, stepped.note = self._now_s(), ""
        if ask.back:
            self._back(loaded, stepped, ask.back)
        if appended:
            self._append(loaded, stepped, appended)
        self._leave(loaded, stepped)

    def _find(self, loaded: Loaded, ask: ModelStep) -> Conversation | None:
        """What is to be stepped: the conversation of that name that is in memory, or a fork of another; None where it
        begins with a text. Raises ConversationUnknown."""
        self._check_not_running(ask.conversation)
        conversations, engine = loaded.conversations, loaded.engine
        here = conversations.live(ask.conversation)
        if here is not None and not ask.source:
            return here
        if not ask.source:
            if ask.text:
                return None
            raise unknown(ask.conversation)
        source = conversations.live(ask.source) or conversations.kept(ask.source)
        if source is None:
            raise unknown(ask.source)
        theirs = source.state
        cache: KVCache | None = theirs.cache
        if conversations.live(ask.source) is source:
            cache = engine.fork(theirs.cache, theirs.cache.length, theirs.cache.capacity_tokens)
        state = GenerationState(
            list(theirs.tokens),
            cache or engine.new_cache(theirs.cache.capacity_tokens),
            Sampler(theirs.sampler.settings, theirs.sampler.draws),
            theirs.settings,
            theirs.new_tokens,
        )
        found = Conversation(
            ask.conversation,
            state,
            source.messages,
            source.turn_start,
            key=source.key,
            parent=source.parent,
            salient=source.salient,
        )
        found.keep = False
        return found

    def _begin(self, loaded: Loaded, ask: ModelStep) -> Conversation:
        """A new one of plain text."""
        tokens = loaded.chat.encode(ask.text)
        sampling = SamplingSettings(temperature=ask.temperature, seed=ask.seed)
        state = begin(loaded.engine, tokens, sampling=sampling, capacity_tokens=loaded.max_context_tokens)
        found = Conversation(ask.conversation, state, [], len(tokens))
        found.keep = False
        return found

    def _hold(self, loaded: Loaded, conversation: Conversation) -> _Stepped:
        while len(self._stepped) >= MOST_STEPPED:
            self._let_go(loaded, min(self._stepped, key=lambda name: self._stepped[name].used_s))
        # No constraint: what is appended by hand need not fit it.
        conversation.state.settings = msgspec.structs.replace(conversation.state.settings, json_schema="")
        conversation.state.constrained_tokens, conversation.state.constraint = 0, None
        loaded.conversations.hold(conversation)
        stepped = self._stepped[conversation.name] = _Stepped(conversation, self._now_s())
        return stepped

    def _settle(self, loaded: Loaded, stepped: _Stepped) -> None:
        """Take notice of what others have done with the conversation since."""
        name = stepped.conversation.name
        self._check_not_running(name)
        live = loaded.conversations.live(name)
        if live is None:
            # It gave way in memory: its tokens are read again.
            stepped.look_no_further()
            cache = loaded.engine.new_cache(stepped.state.cache.capacity_tokens)
            stepped.state.cache, stepped.conversation.closed = cache, False
            loaded.conversations.hold(stepped.conversation)
        elif live is not stepped.conversation or stepped.left != (live.state.cache, len(live.state.tokens)):
            # It was resumed from a snapshot, pruned, or answered.
            stepped.look_no_further()
            stepped.close_kept()
            stepped.conversation = live

    def _leave(self, loaded: Loaded, stepped: _Stepped) -> None:
        """The history of a chat holds what the present answer is now."""
        conversation, state = stepped.conversation, stepped.state
        stepped.left = (state.cache, len(state.tokens))
        if conversation.messages:
            before = conversation.messages
            before = before[:-1] if before[-1].role == "assistant" else before
            said = loaded.chat.decode(state.tokens[conversation.turn_start :])
            conversation.messages = [*before, ChatMessage("assistant", said)] if said else before

    def _append(self, loaded: Loaded, stepped: _Stepped, tokens: list[int]) -> None:
        """Each is a token of the present answer, and takes the draw that its sampling would have taken."""
        state, engine = stepped.state, loaded.engine
        # The last one will be pending, and takes no room; the one that is pending now was looked at before.
        engine.check_tokens(state.cache, [*state.tokens[state.cache.length + 1 :], *tokens])
        if stepped.ahead is not None:
            if _can_be_cut(engine):
                state.cache.close()
            else:
                stepped.kept[len(state.tokens)] = state.cache
                self._trim(loaded)
            state.cache, stepped.ahead, stepped.logits = stepped.ahead, None, None
        state.tokens.extend(tokens)
        state.new_tokens += len(tokens)
        state.finish_reason = ""
        state.sampler = _drawn(state.sampler, len(tokens))

    def _back(self, loaded: Loaded, stepped: _Stepped, count: int) -> None:
        state, engine = stepped.state, loaded.engine
        aim = len(state.tokens) - count
        if aim < stepped.first:
            raise InvalidPrompt(
                f"taking back {count:,} tokens of {stepped.conversation.name}: "
                f"{len(state.tokens) - stepped.first:,} can be",
                hint="begin another with less of it",
                field="back",
                reason="out of range",
            )
        stepped.look_no_further()
        capacity = state.cache.capacity_tokens
        before = stepped.kept.pop(aim, None)
        if before is None and _can_be_cut(engine) and state.cache.length >= aim - 1:
            before = engine.fork(state.cache, aim - 1, capacity)
        if before is None:
            earlier = max((tokens for tokens in stepped.kept if tokens < aim), default=0)
            before = stepped.kept.pop(earlier) if earlier else engine.new_cache(capacity)
            stepped.note = f"{aim - 1 - before.length:,} tokens were read again"
        stepped.close_kept(above=aim)
        state.cache.close()
        state.cache = before
        del state.tokens[aim:]
        of_answer = min(count, state.new_tokens)
        state.new_tokens -= of_answer
        state.finish_reason = ""
        state.sampler = _drawn(state.sampler, -of_answer)

    def _trim(self, loaded: Loaded) -> None:
        """Keep no more states to go back to than have room."""
        room = loaded.kv_budget_bytes // KEPT_SHARE
        used = sum(cache.allocated_bytes for each in self._stepped.values() for cache in each.kept.values())
        for each in sorted(self._stepped.values(), key=lambda each: each.used_s):
            while used > room and each.kept:
                oldest = each.kept.pop(min(each.kept))
                used -= oldest.allocated_bytes
                oldest.close()

    def _read_chunk(self, loaded: Loaded, name: str) -> bool:
        """Read a chunk of what was appended; whether all is read."""
        stepped = self._get(name)
        state, engine = stepped.state, loaded.engine
        if not state.prefilled:
            end = chunk_ends(state.cache.length, len(state.tokens) - 1, engine.chunk_tokens)[0]
            engine.prefill(state.cache, state.tokens[state.cache.length : end])
        return state.prefilled

    def _look(self, loaded: Loaded, ask: ModelStep) -> ModelStepped:
        stepped = self._get(ask.conversation)
        state, engine, chat = stepped.state, loaded.engine, loaded.chat
        said = ModelStepped(
            ask.conversation,
            len(state.tokens),
            chat.decode(state.tokens[-TAIL_TOKENS:], special=True)[-TAIL_LETTERS:],
            [],
            entropy=0.0,
            sampled=-1,
            kept=len(state.tokens) - stepped.first,
            note=stepped.note,
        )
        if context_full(engine, state):
            said.note = "the context is full"
            return said
        if stepped.logits is None:
            ahead = engine.fork(state.cache, state.cache.length, state.cache.capacity_tokens)
            if ahead is None:
                raise ModelError(
                    f"looking ahead in {ask.conversation!r}: {engine.spec.name} cannot copy its own cache",
                    hint="this is a mistake in Mindstream: please report it",
                    reason="no fork",
                )
            stepped.ahead, stepped.logits = ahead, engine.step(ahead, state.tokens[-1])
        # A copy draws: looking twice gives the same.
        choice = _drawn(state.sampler, 0).sample(stepped.logits, state.tokens, top=ask.top)
        said.choices = [TokenChance(each.token, chat.piece(each.token), each.logprob) for each in choice.top]
        said.entropy, said.sampled = choice.entropy, choice.token
        said.ended = state.tokens[-1] in engine.spec.eos_token_ids
        return said

    def _get(self, name: str) -> _Stepped:
        found = self._stepped.get(name)
        if found is None:
            raise unknown(name)
        return found

    def _end(self, loaded: Loaded, name: str) -> ModelStepped:
        tokens = len(self._get(name).state.tokens)
        self._let_go(loaded, name)
        return ModelStepped(name, tokens, "", [], entropy=0.0, sampled=-1)

    def _let_go(self, loaded: Loaded, name: str) -> None:
        stepped = self._stepped.pop(name)
        stepped.look_no_further()
        stepped.close_kept()
        live = loaded.conversations.live(name)
        if live is None or name in self._worker.running:
            return
        if live.keep:
            loaded.conversations.save(live)
        else:
            loaded.conversations.forget(name)

    def _let_go_of_idle(self, loaded: Loaded) -> None:
        idle = [name for name, each in self._stepped.items() if self._now_s() - each.used_s > IDLE_S]
        for name in idle:
            self._let_go(loaded, name)
            self._report("evicted.stepped", f"{name} was not stepped for {IDLE_S / 60:.0f} minutes, and is gone")

    def _check_not_running(self, name: str) -> None:
        if name in self._worker.running:
            raise ModelError(
                f"stepping {name!r}: it is being answered",
                hint="wait for its end, cancel it, or step a fork of it",
                field="conversation",
                reason="busy",
            )


def _can_be_cut(engine: Engine) -> bool:
    """Whether every layer holds every position, so that a cache has all the earlier ones in itself."""
    return all(layer.kind == "full" and not layer.states for layer in engine.spec.layers)


def _drawn(sampler: Sampler, count: int) -> Sampler:
    """A copy that has made ``count`` draws more, or, where it is negative, fewer."""
    draws = sampler.draws + (count if sampler.settings.temperature else 0)
    return Sampler(sampler.settings, max(0, draws))
