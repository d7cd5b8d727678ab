"""From an ask to the tokens that the model reads for it: chat turns, plain text, prompts that are too long.

Nothing is computed or allocated here, so a run can be prepared to see whether there is room for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from protocol.errors import ContextOverflow, ConversationUnknown, InvalidPrompt
from protocol.messages import ChatMessage, ModelGenerate
from services.model_runner.chat import ChatFormat
from services.model_runner.conversations import Conversation, History, unknown
from services.model_runner.engine import Engine
from services.model_runner.generation import GenerationSettings, begin, extend
from services.model_runner.sampling import SamplingSettings
from services.model_runner.wire import sampling_of, settings_of

ROOM_SHARE = 4
"""Of a prompt that is cut to the context, at most one part in so many makes room for the answer."""


@dataclass
class Turn:
    """What one ask gives the model to read."""

    ask: ModelGenerate
    history: History | None
    """What the conversation held when this was made; None for a new one."""
    held: int
    """Tokens of ``history``."""
    tokens: list[int]
    """New ones of a turn that ``extends``, else the whole prompt."""
    extends: bool
    messages: list[ChatMessage]
    """The whole history, this turn's included."""
    settings: GenerationSettings
    sampling: SamplingSettings | None
    """None: as it stands."""
    dropped_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Of the conversation when the answer begins."""
        return self.held + len(self.tokens) if self.extends else len(self.tokens)

    def most_tokens(self, context_tokens: int) -> int:
        """Of the conversation when the answer ends."""
        return min(self.total_tokens + self.ask.max_new_tokens, context_tokens)

    def stands(self, history: History | None) -> bool:
        """Whether the conversation still holds what it did when this was made."""
        if self.history is None or history is None:
            return self.history is history
        return len(history.tokens) == self.held and history.messages == self.history.messages

    def apply(self, engine: Engine, found: Conversation | None, capacity_tokens: int) -> Conversation:
        """The conversation with this turn's tokens in it, to be answered; ``found`` is the one that it is of.

        Raises InvalidPrompt or ContextOverflow, and then the conversation is as it was; ModelError when memory runs
        out."""
        if found is not None and self.extends:
            start = len(found.state.tokens)
            extend(engine, found.state, self.tokens, sampling=self.sampling, settings=self.settings)
            if self.tokens:
                found.messages, found.turn_start = self.messages, len(found.state.tokens)
            found.note_salience(start, self.ask.salience)
            found.keep = found.keep or self.ask.keep
            return found
        state = begin(
            engine, self.tokens, sampling=self.sampling, settings=self.settings, capacity_tokens=capacity_tokens
        )
        key, parent = (found.key, found.parent) if found is not None else (None, b"")
        made = Conversation(self.ask.conversation, state, self.messages, len(self.tokens), key=key, parent=parent)
        made.note_salience(0, self.ask.salience)
        made.keep = self.ask.keep or (found is not None and found.keep)
        return made


def prepare(engine: Engine, chat: ChatFormat, ask: ModelGenerate, found: History | None, context_tokens: int) -> Turn:
    """The turn that ``ask`` makes of its conversation.

    Raises InvalidPrompt naming the field, ContextOverflow, or ConversationUnknown when there is nothing to go on from,
    or another history than the asker knows.
    """
    settings = settings_of(ask)
    given = [name for name in ("messages", "prompt", "prompt_tokens") if getattr(ask, name)]
    if len(given) > 1:
        raise _invalid(ask, given[1], f"{' and '.join(given)} are both given", "give one of them", "given twice")
    held = len(found.tokens) if found else 0
    holds = len(found.messages) if found else 0
    if ask.held_messages and ask.held_messages != holds:
        raise ConversationUnknown(
            f"going on with conversation {ask.conversation!r}: it holds {holds} messages, not {ask.held_messages}",
            hint="begin a new one with the whole history",
            field="held_messages",
            reason="another history",
        )
    if not given:
        if found is None:
            raise unknown(ask.conversation)
        return Turn(ask, found, held, [], True, found.messages, settings, None)
    sampling = sampling_of(ask)
    if given == ["messages"]:
        turn = _chat_turn(chat, ask, found, settings, sampling)
        return _fit_messages(engine, chat, turn, context_tokens)
    turn = _text_turn(engine, chat, ask, found, settings, sampling)
    return _fit_tokens(engine, turn, context_tokens)


def _invalid(ask: ModelGenerate, field: str, text: str, hint: str, reason: str) -> InvalidPrompt:
    return InvalidPrompt(f"reading the prompt of {ask.conversation!r}: {text}", hint=hint, field=field, reason=reason)


# --- what the ask says ----------------------------------------------------------------------------------------


def _rendered(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _chat_turn(
    chat: ChatFormat,
    ask: ModelGenerate,
    found: History | None,
    settings: GenerationSettings,
    sampling: SamplingSettings,
) -> Turn:
    if found is None:
        messages = list(ask.messages)
        return Turn(ask, None, 0, chat.prompt(_rendered(messages)), False, messages, settings, sampling)
    if not found.chats:
        raise _invalid(
            ask, "messages", "it holds plain text, and no chat", "go on with `prompt`, or begin another", "plain text"
        )
    messages = [*found.messages, *ask.messages]
    tokens = chat.next_turn(found.tokens, _rendered(messages))
    held = len(found.tokens)
    return Turn(ask, found, held, tokens.tokens, tokens.extends, messages, settings, sampling)


def _text_turn(
    engine: Engine,
    chat: ChatFormat,
    ask: ModelGenerate,
    found: History | None,
    settings: GenerationSettings,
    sampling: SamplingSettings,
) -> Turn:
    if found is not None and found.chats:
        field = "prompt" if ask.prompt else "prompt_tokens"
        raise _invalid(ask, field, "it holds a chat, and no plain text", "go on with `messages`", "chat")
    if ask.prompt:
        tokens = chat.encode(ask.prompt, special=found is None)
    else:
        tokens = list(ask.prompt_tokens)
        for position, token in enumerate(tokens):
            if not 0 <= token < engine.spec.vocab_size:
                raise _invalid(
                    ask,
                    "prompt_tokens",
                    f"token {token} at position {position} is not in the vocabulary of {engine.spec.name}, "
                    f"{engine.spec.vocab_size:,} tokens",
                    "make the tokens with this model's own tokenizer",
                    "unknown token id",
                )
    if not tokens:
        raise _invalid(ask, "prompt", "it has no tokens", "say something", "empty prompt")
    held = len(found.tokens) if found else 0
    return Turn(ask, found, held, tokens, found is not None, [], settings, sampling)


# --- what the context holds -----------------------------------------------------------------------------------


def _overflow(engine: Engine, turn: Turn, context_tokens: int, tokens: int, what: str) -> ContextOverflow:
    return ContextOverflow(
        f"reading the prompt of {turn.ask.conversation!r} with {engine.spec.name}: {what} {tokens:,} tokens, the "
        f"context holds {context_tokens:,}",
        hint="shorten it, begin a new conversation, or ask with on_overflow = window to leave out the oldest part",
        field="tokens",
        reason="context full",
    )


def _cut_to(engine: Engine, turn: Turn, context_tokens: int) -> int | None:
    """What is left of a prompt that must be cut, the answer getting some room as well; None when it fits as it is.

    Raises ContextOverflow when the ask does not want it cut.
    """
    total = turn.total_tokens
    if turn.ask.on_overflow == "refuse":
        if total > context_tokens:
            raise _overflow(engine, turn, context_tokens, total, "it has")
        return None
    most = context_tokens - min(turn.ask.max_new_tokens, max(1, context_tokens // ROOM_SHARE))
    return most if total > most else None


def _fit_messages(engine: Engine, chat: ChatFormat, turn: Turn, context_tokens: int) -> Turn:
    """As it is if it fits, else without its oldest turns; the system messages stay."""
    most = _cut_to(engine, turn, context_tokens)
    if most is None:
        return turn
    total = turn.total_tokens
    system = [message for message in turn.messages if message.role == "system"]
    said = [message for message in turn.messages if message.role != "system"]
    # A template may want the user to speak first.
    starts = [at for at, message in enumerate(said) if message.role == "user" and at] or [len(said) - 1]
    low, high = 0, len(starts) - 1
    best: tuple[list[ChatMessage], list[int]] | None = None
    shortest = total
    while low <= high:
        middle = (low + high) // 2
        messages = [*system, *said[starts[middle] :]]
        tokens = chat.prompt(_rendered(messages))
        shortest = min(shortest, len(tokens))
        if len(tokens) <= most:
            best, high = (messages, tokens), middle - 1
        else:
            low = middle + 1
    if best is None:
        raise _overflow(engine, turn, most, shortest, "its last turn and the system message alone have")
    turn.messages, turn.tokens = best
    turn.extends = False
    turn.dropped_tokens = total - len(turn.tokens)
    return turn


def _fit_tokens(engine: Engine, turn: Turn, context_tokens: int) -> Turn:
    """As it is if it fits, else its last tokens."""
    most = _cut_to(engine, turn, context_tokens)
    if most is None:
        return turn
    total = turn.total_tokens
    whole = [*(turn.history.tokens if turn.history and turn.extends else []), *turn.tokens]
    turn.tokens = whole[-most:]
    turn.extends = False
    turn.dropped_tokens = total - most
    return turn
