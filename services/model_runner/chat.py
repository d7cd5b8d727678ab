"""Text on both sides of an engine: the model's own chat template, and text out of tokens as they come.

This module knows text and templates and nothing of tensors; it runs in the same process as the engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from protocol.errors import InvalidPrompt, ModelUnavailable

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

    def __init__(self, tokenizer: Any, name: str) -> None:
        self._tokenizer = tokenizer
        self.name = name
        # Some tokenizers drop the space that a text begins with: a piece is decoded after another token.
        self._before_piece = self.encode("a", special=False)
        self._text_before_piece = self.decode(self._before_piece)
        self._pieces: dict[int, str] = {}

    @classmethod
    def load(cls, folder: Path, gguf_file: str = "") -> ChatFormat:
        """From a model folder, or from the GGUF file in it; nothing is fetched. Raises ModelUnavailable."""
        from transformers import AutoTokenizer

        source = {"gguf_file": gguf_file} if gguf_file else {}
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **source)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelUnavailable(
                f"loading the tokenizer in {folder}: {error}",
                hint="install the model again: its folder is not complete",
                reason=type(error).__name__,
            ) from error
        return cls(tokenizer, folder.name)

    @property
    def has_template(self) -> bool:
        """Whether the model is made for chat; a base model has no template."""
        return bool(self._tokenizer.chat_template)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of plain text. With ``special`` the model's own beginning is put before it."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special)
        return ids

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Text of ``tokens``; with ``special`` the special tokens are written out."""
        text: str = self._tokenizer.decode(
            list(tokens), skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )
        return text

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
            text: str = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except jinja2.TemplateError as error:
            raise InvalidPrompt(
                f"rendering a conversation for {self.name}: its chat template refuses it: {error}",
                hint="let user and assistant speak in turn, and use no role that the model has not",
                field="messages",
                reason=str(error)[:200],
            ) from error
        return text

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation's first turn. Raises as ``render``."""
        # The template writes the special tokens itself.
        return self.encode(self.render(messages), special=False)

    def next_turn(self, held: Sequence[int], messages: Sequence[Mapping[str, str]]) -> Turn:
        """What to read for the turn that ``messages`` (the whole history and the new ones) ends with.

        ``held`` are the tokens of the conversation so far, the pending one included. They are kept when the template
        renders the same history: as the same tokens, or as the same text where the model cut it into other tokens
        than its tokenizer does (then only the rest is tokenized, from where the held text ends). A cache is never
        cut back: a re-read prefix would be close and not exact. Raises as ``render``.
        """
        text = self.render(messages)
        tokens = self.encode(text, special=False)
        if tokens[: len(held)] == list(held):
            return Turn(bool(held), tokens[len(held) :])
        said = self.decode(held, special=True)
        if said and text.startswith(said):
            return Turn(True, self.encode(text[len(said) :], special=False))
        return Turn(False, tokens)

    def stream(self, stop: Sequence[str] = ()) -> TextStream:
        """For one answer: text out of its tokens as they come."""
        return TextStream(self, stop)


class TextStream:
    """Turns an answer's tokens into text, never cutting a character, and finds stop texts across tokens.

    Feed it every token of the answer. For an answer that was begun elsewhere, feed it those tokens first and drop
    what comes back: it then stands where the other one stood.
    """

    def __init__(self, chat: ChatFormat, stop: Sequence[str] = ()) -> None:
        self._chat = chat
        self._stop = tuple(stop)
        self._tokens: list[int] = []
        self._context = 0
        """Where decoding begins: a few tokens before what is new, because a token's text may need its left."""
        self._read = 0
        """Tokens before this have been turned into text."""
        self._held = ""
        """Text that may be the beginning of a stop text."""
        self.text = ""
        """All that was given out."""
        self.stopped = False
        """Whether a stop text was found; nothing is given out after it."""

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
            self.text += self._held
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
        waiting = self._held + new
        ends = [at for at in (waiting.find(stop) for stop in self._stop) if at >= 0]
        if ends:
            self.stopped = True
            given, self._held = waiting[: min(ends)], ""
        else:
            kept = self._longest_beginning(waiting)
            given, self._held = waiting[: len(waiting) - kept], waiting[len(waiting) - kept :]
        self.text += given
        return given

    def _longest_beginning(self, text: str) -> int:
        """Length of the longest end of ``text`` that a stop text begins with."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
