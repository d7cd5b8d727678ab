"""Text on both sides of an engine: the model's own chat template, and text out of tokens as they come.

This module knows text and templates and nothing of tensors; it runs in the same process as the engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2

from protocol.errors import InvalidPrompt, ModelUnavailable
from services.model_runner.quoting import Part, after, marked
from services.model_runner.tokenizer import ModelTokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

_HELD_TOKENS = 16
"""A character has at most four bytes, but a token may end one and begin the next: what is no text after so many
tokens never becomes text, and is given out as it is."""


class Turn(NamedTuple):
    """The tokens that a conversation's next turn needs."""

    extends: bool
    """True: append ``tokens`` to those held, and the KV cache stays. False: ``tokens`` are the whole prompt, to be
    read into a fresh cache, because the template renders the history otherwise than the model said it."""
    tokens: list[int]


class ChatFormat:
    """A model's tokenizer and chat template."""

    def __init__(self, tokenizer: ModelTokenizer, name: str) -> None:
        self.tokenizer = tokenizer
        self.name = name
        # Some tokenizers drop the space that a text begins with: a piece is decoded after another token.
        self._before_piece = self.encode("a", special=False)
        self._text_before_piece = self.decode(self._before_piece)
        self._pieces: dict[int, str] = {}

    @classmethod
    def load(cls, folder: Path, gguf_file: str = "") -> ChatFormat:
        """From a model folder, or from the GGUF file in it; nothing is fetched. Raises ModelUnavailable."""
        return cls(ModelTokenizer.load(folder, gguf_file), folder.name)

    @property
    def has_template(self) -> bool:
        """Whether the model is made for chat; a base model has no template."""
        return bool(self.tokenizer.template)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of plain text. With ``special`` the model's own beginning is put before it."""
        return self.tokenizer.encode(text, special=special)

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Text of ``tokens``; with ``special`` the special tokens are written out."""
        return self.tokenizer.decode(tokens, special=special)

    def piece(self, token: int) -> str:
        """The text of one token as it stands within a text: a leading space stays. Special tokens are written out;
        part of a character is U+FFFD."""
        known = self._pieces.get(token)
        if known is None:
            known = self.decode([*self._before_piece, token], special=True)[len(self._text_before_piece) :]
            self._pieces[token] = known
        return known

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The whole prompt's text, up to where the assistant speaks.

        ``messages`` have ``role`` and ``content``. Raises InvalidPrompt when there are none, or the template refuses
        them, and ModelUnavailable when the model has no template.
        """
        return "".join(part.text for part in self._parts(messages))

    def _parts(self, messages: Sequence[Mapping[str, str]]) -> list[Part]:
        """The same, with the names of special tokens that stand in ``messages`` apart."""
        names = {text: self.tokenizer.special_names(text) for message in messages for text in message.values()}
        if not any(names.values()):
            return [Part(self._render(messages), False)]
        quoted, marks = marked(messages, names)
        parts = marks.parts(self._render(quoted))
        if "".join(part.text for part in parts) != self._render(messages):
            name = next(text[slice(*spans[0])] for text, spans in names.items() if spans)
            raise InvalidPrompt(
                f"rendering a conversation for {self.name}: a message has {name!r} in it, the name of a special token, "
                "and the chat template does not leave it as it is",
                hint="leave it out",
                field="messages",
                reason="special token in a message",
            )
        return parts

    def _encode(self, parts: Sequence[Part]) -> list[int]:
        tokens: list[int] = []
        for part in parts:
            if part.quoted:
                tokens += self.tokenizer.encode_quoted(part.text)
            elif tokens:
                tokens += self.tokenizer.encode_after(part.text)
            else:
                tokens += self.encode(part.text, special=False)
        return tokens

    def _render(self, messages: Sequence[Mapping[str, str]]) -> str:
        if not self.has_template:
            raise ModelUnavailable(
                f"rendering a conversation for {self.name}: it has no chat template, it is a base model",
                hint="use an instruction-tuned model for chat",
                reason="no chat template",
            )
        if not messages:
            raise InvalidPrompt(
                f"rendering a conversation for {self.name}: it has no messages",
                hint="say something",
                field="messages",
                reason="empty prompt",
            )
        try:
            return self.tokenizer.render(messages)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise InvalidPrompt(
                f"rendering a conversation for {self.name}: its chat template refuses it: {error}",
                hint="let user and assistant speak in turn, and use no role that the model has not",
                field="messages",
                reason=str(error)[:200],
            ) from error

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation's first turn. Only the template writes special tokens: their names in
        ``messages`` are text (quoting.py). Raises as ``render``."""
        return self._encode(self._parts(messages))

    def next_turn(self, held: Sequence[int], messages: Sequence[Mapping[str, str]]) -> Turn:
        """What to read for the turn that ``messages`` (the whole history and the new ones) ends with.

        ``held`` are the tokens of the conversation so far, the pending one included. They are kept when the template
        renders the same history: as the same tokens, or as the same text where the model cut it into other tokens
        than its tokenizer does (then only the rest is tokenized, from where the held text ends). A cache is never
        cut back: a re-read prefix would be close and not exact. Raises as ``render``.
        """
        parts = self._parts(messages)
        tokens = self._encode(parts)
        if tokens[: len(held)] == list(held):
            return Turn(bool(held), tokens[len(held) :])
        said = self.decode(held, special=True)
        if said and "".join(part.text for part in parts).startswith(said):
            return Turn(True, self._encode(after(parts, len(said))))
        return Turn(False, tokens)

    def stream(self, stop: Sequence[str] = ()) -> TextStream:
        """For one answer: text out of its tokens as they come."""
        return TextStream(self, stop)


class _Stops:
    """Looks for stop texts character by character (Knuth, Morris and Pratt): what it costs does not depend on how long
    they are, and what it finds not on how the text is cut into tokens."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [(stop, _failures(stop)) for stop in dict.fromkeys(stops) if stop]
        self._states = [0] * len(self._stops)

    @property
    def held(self) -> int:
        """Length of the longest end of the text so far that a stop text begins with."""
        return max(self._states, default=0)

    def find(self, new: str) -> tuple[int, int]:
        """(characters of ``new`` up to the first end of a stop text, that one's length); of those that end there the
        longest. (-1, 0) when there is none, and ``new`` is then part of the text so far."""
        states = self._states
        for at, character in enumerate(new if self._stops else ""):
            found = 0
            for index, (stop, failures) in enumerate(self._stops):
                state = states[index]
                while state and stop[state] != character:
                    state = failures[state - 1]
                if stop[state] == character:
                    state += 1
                if state == len(stop):
                    found = max(found, state)
                    state = 0  # Nothing is looked for after this.
                states[index] = state
            if found:
                return at + 1, found
        return -1, 0


def _failures(stop: str) -> list[int]:
    """For each beginning of ``stop``: the length of its longest end that is a shorter beginning."""
    found = [0] * len(stop)
    length = 0
    for at in range(1, len(stop)):
        while length and stop[at] != stop[length]:
            length = found[length - 1]
        if stop[at] == stop[length]:
            length += 1
        found[at] = length
    return found


class TextStream:
    """Turns an answer's tokens into text, never cutting a character, and finds stop texts across tokens.

    Feed it every token of the answer. For an answer that was begun elsewhere, feed it those tokens first and drop
    what comes back: it then stands where the other one stood.
    """

    def __init__(self, chat: ChatFormat, stop: Sequence[str] = ()) -> None:
        self._chat = chat
        self._stops = _Stops(stop)
        self._tokens: list[int] = []
        self._context = 0
        """Where decoding begins: a few tokens before what is new, because a token's text may need its left."""
        self._read = 0
        """Tokens before this have been turned into text."""
        self._held = ""
        """Text that may be the beginning of a stop text."""
        self._given: list[str] = []
        self.stopped = False
        """Whether a stop text was found; nothing is given out after it."""

    @property
    def text(self) -> str:
        """All that was given out."""
        if len(self._given) > 1:
            self._given = ["".join(self._given)]
        return self._given[0] if self._given else ""

    def push(self, token: int) -> str:
        """Text that ``token`` makes certain; empty while a character or a stop text may be incomplete."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        return self._give(self._decode(final=False))

    def finish(self) -> str:
        """The rest, when no token follows."""
        if self.stopped:
            return ""
        rest = self._give(self._decode(final=True))
        if not self.stopped:
            rest += self._held
            self._given.append(self._held)
            self._held = ""
        return rest

    def _decode(self, *, final: bool) -> str:
        before = self._chat.decode(self._tokens[self._context : self._read])
        now = self._chat.decode(self._tokens[self._context :])
        incomplete = now.endswith(_REPLACEMENT) and len(self._tokens) - self._read < _HELD_TOKENS
        if incomplete and not final:
            return ""
        self._context, self._read = self._read, len(self._tokens)
        return now[len(before) :]

    def _give(self, new: str) -> str:
        end, length = self._stops.find(new)
        if end >= 0:
            self.stopped = True
            waiting = self._held + new[:end]
            given, self._held = waiting[: len(waiting) - length], ""
        else:
            waiting = self._held + new
            kept = self._stops.held
            given, self._held = waiting[: len(waiting) - kept], waiting[len(waiting) - kept :]
        if given:
            self._given.append(given)
        return given
