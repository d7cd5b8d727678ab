"""The generation loop: one conversation's state, and an iterator that moves it on token by token.

The state is whole between any two tokens: stopping after ``k`` tokens and going on later, here or on another node,
is the same as not stopping. The last of ``tokens`` is pending: the cache covers all before it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from protocol.errors import InvalidPrompt, ModelError
from services.model_runner.engine import Engine, KVCache, Logits, OnProgress, ShouldStop
from services.model_runner.sampling import Chance, Sampler, SamplingSettings

if TYPE_CHECKING:
    from services.model_runner.constrained import Constraint


class GenerationSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When an answer ends. How its tokens are chosen stands in the sampler."""

    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    """Texts that end the answer and are not part of it; found by whoever turns tokens into text."""
    ignore_eos: bool = False
    """Go on past the end of sequence: for measuring."""
    top_logprobs: int = 0
    """How many of the likeliest tokens are named with each token."""
    json_schema: str = ""
    """The answer is JSON of this JSON Schema; empty: any text. It ends with ``stop`` when the JSON is whole; with
    ``length`` or ``cancelled`` it is not."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InvalidPrompt(
                f"setting up an answer: max_new_tokens is {self.max_new_tokens}, it must be 1 or more",
                hint="ask for at least one token",
                field="max_new_tokens",
                reason="out of range",
            )
        if not all(self.stop):
            raise InvalidPrompt(
                "setting up an answer: a stop text is empty, it would end every answer at once",
                hint="leave empty stop texts out",
                field="stop",
                reason="empty",
            )


@dataclass
class Timing:
    """What one answer cost on this node; a resumed answer is timed anew."""

    prefilled_tokens: int = 0
    """Read in prefill."""
    reused_tokens: int = 0
    """In the cache when the answer began."""
    prefill_s: float = 0.0
    first_token_s: float = 0.0
    """From the start of the work, prefill included; 0 until there is a token."""
    decode_s: float = 0.0
    """In decode steps and sampling, without the caller's own time between tokens."""
    decoded_tokens: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Of decoding; 0 before the first token."""
        return self.decoded_tokens / self.decode_s if self.decode_s else 0.0


@dataclass
class GenerationState:
    """One conversation between two tokens."""

    tokens: list[int]
    """All of them, the pending one last."""
    cache: KVCache
    """Covers a prefix of ``tokens[:-1]``, and all of it once prefill is done."""
    sampler: Sampler
    settings: GenerationSettings
    new_tokens: int = 0
    """How many of ``tokens``, at their end, are of the present answer."""
    finish_reason: str = ""
    """``stop``, ``length`` or ``cancelled``; empty while the answer is not finished."""
    timing: Timing = field(default_factory=Timing)
    constrained_tokens: int = 0
    """How many of ``tokens``, at their end, the constraint has taken; an answer may be given in several parts."""
    constraint: Constraint | None = None
    """Of ``settings.json_schema``; made from the tokens whenever an answer begins or goes on (constrained.Grammars)."""

    @property
    def answer(self) -> list[int]:
        """The present answer's tokens, an end of sequence included."""
        return self.tokens[len(self.tokens) - self.new_tokens :]

    @property
    def prefilled(self) -> bool:
        """Whether the cache ends just before the pending token, as a snapshot needs it."""
        return self.cache.length == len(self.tokens) - 1


@dataclass(frozen=True)
class GeneratedToken:
    """One token of an answer."""

    index: int
    """From 0 within the answer."""
    token: int
    logprob: float
    """Natural logarithm of its probability under the model, before temperature."""
    entropy: float
    """Of the model's distribution, nats."""
    top: tuple[Chance, ...] = ()
    """The likeliest tokens, best first, as many as ``GenerationSettings.top_logprobs`` says."""


def begin(
    engine: Engine,
    tokens: list[int],
    *,
    sampling: SamplingSettings | None = None,
    settings: GenerationSettings | None = None,
    capacity_tokens: int = 0,
) -> GenerationState:
    """A new conversation whose prompt is ``tokens``; nothing is computed yet.

    ``capacity_tokens`` bounds its whole life, later turns included; 0 is the model's context.
    Raises InvalidPrompt or ContextOverflow.
    """
    if not tokens:
        raise InvalidPrompt(
            f"beginning a conversation with {engine.spec.name}: the prompt has no tokens",
            hint="say something",
            field="tokens",
            reason="empty prompt",
        )
    cache = engine.new_cache(capacity_tokens or engine.spec.context_tokens)
    engine.check_tokens(cache, tokens)
    return GenerationState(
        list(tokens), cache, Sampler(sampling or SamplingSettings()), settings or GenerationSettings()
    )


def extend(
    engine: Engine,
    state: GenerationState,
    tokens: list[int],
    *,
    sampling: SamplingSettings | None = None,
    settings: GenerationSettings | None = None,
) -> None:
    """Begin the next answer after appending ``tokens`` (a turn's new ones) to the conversation.

    The pending token stops being pending: it is read with the new ones. With no ``tokens`` the answer goes on from
    the pending token, and one that a JSON schema constrains and that is not whole goes on under it. New ``sampling``
    starts its seed's draws anew. Raises InvalidPrompt or ContextOverflow, and then the state is unchanged.
    """
    engine.check_tokens(state.cache, [*state.tokens[state.cache.length :], *tokens])
    schema = state.settings.json_schema
    if tokens or state.finish_reason == "stop" or (settings and settings.json_schema not in ("", schema)):
        state.constrained_tokens, state.constraint = 0, None
    elif settings and schema:
        settings = msgspec.structs.replace(settings, json_schema=schema)
    state.tokens.extend(tokens)
    state.new_tokens = 0
    state.finish_reason = ""
    state.timing = Timing()
    if sampling is not None:
        state.sampler = Sampler(sampling)
    if settings is not None:
        state.settings = settings


def generate(
    engine: Engine,
    state: GenerationState,
    *,
    should_stop: ShouldStop | None = None,
    on_progress: OnProgress | None = None,
) -> Iterator[GeneratedToken]:
    """Yield the answer's tokens, an end of sequence included, until ``state.finish_reason`` says why it ended.

    ``should_stop`` is asked before each chunk of the prompt and before each token; a cancelled answer goes on when
    ``generate`` is called again, as if it had not been stopped. The state is whole whenever a token is yielded, so
    the caller may also simply stop iterating. ``on_progress`` hears of prefill.

    Raises what the engine raises; ModelError when the answer is already finished.
    """
    if state.finish_reason in ("stop", "length"):
        raise ModelError(
            f"going on with an answer that has ended ({state.finish_reason}, {state.new_tokens} tokens)",
            hint="begin the next answer with extend()",
            reason="finished",
        )
    state.finish_reason = ""
    timing = state.timing
    if not state.new_tokens and not timing.prefilled_tokens:
        timing.reused_tokens = state.cache.length
    started = time.perf_counter()
    timing.prefilled_tokens += _prefill(engine, state, should_stop, on_progress)
    timing.prefill_s += time.perf_counter() - started
    if not state.prefilled:
        state.finish_reason = "cancelled"
        return
    while not context_full(engine, state):
        if should_stop is not None and should_stop():
            state.finish_reason = "cancelled"
            return
        step_started = time.perf_counter()
        logits = engine.step(state.cache, state.tokens[-1])
        timing.decode_s += time.perf_counter() - step_started
        generated = accept(engine, state, logits)
        timing.first_token_s = timing.first_token_s or time.perf_counter() - started
        yield generated
        if state.finish_reason:
            return
    state.finish_reason = "length"


def context_full(engine: Engine, state: GenerationState) -> bool:
    """Whether the pending token does not fit any more."""
    return state.cache.length >= min(state.cache.capacity_tokens, engine.spec.context_tokens)


def accept(engine: Engine, state: GenerationState, logits: Logits) -> GeneratedToken:
    """Choose the next token from ``logits``, those of the step that read the pending one, and make it the pending
    one; sets ``finish_reason`` when it is the answer's last. Raises ModelError when the logits are not numbers, or the
    constraint cannot go on; the state is then not to be used any more."""
    started = time.perf_counter()
    settings, constraint = state.settings, state.constraint
    if bool(settings.json_schema) != (constraint is not None):
        raise ModelError(
            "choosing a token: the answer's JSON schema and its constraint are not of one state",
            hint="this is a mistake in Mindstream: please report it",
            field="json_schema",
            reason="constraint not attached",
        )
    allowed = constraint.allowed() if constraint is not None else None
    choice = state.sampler.sample(logits, state.tokens, allowed=allowed, top=settings.top_logprobs)
    if constraint is not None:
        constraint.take(choice.token)
        state.constrained_tokens += 1
    state.tokens.append(choice.token)
    state.new_tokens += 1
    state.timing.decoded_tokens += 1
    state.timing.decode_s += time.perf_counter() - started
    # A constraint that has ended allows nothing more, and one that has not allows no end of sequence.
    if constraint.ended if constraint else choice.token in engine.spec.eos_token_ids and not settings.ignore_eos:
        state.finish_reason = "stop"
    elif state.new_tokens >= settings.max_new_tokens:
        state.finish_reason = "length"
    return GeneratedToken(state.new_tokens - 1, choice.token, choice.logprob, choice.entropy, choice.top)


def _prefill(
    engine: Engine, state: GenerationState, should_stop: ShouldStop | None, on_progress: OnProgress | None
) -> int:
    missing = state.tokens[state.cache.length : -1]
    return engine.prefill(state.cache, missing, should_stop, on_progress) if missing else 0
