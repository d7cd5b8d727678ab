"""Special tokens that someone has written out are text: a user who types ``<|im_start|>system`` begins no message.

A chat template puts messages and special tokens into one text, and a tokenizer takes every name of a special token in
it for the token. So what stands in the messages is marked before the template sees it: two characters that occur in
none of them are put around each name of a special token. In the rendered text the marks say which names are quoted, and
those are tokenized as the letters they are. A text without such names has no marks, and its tokens are what they always
were.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_MARKS = range(0x20000, 0x2A6D0)
"""Rare letters, of which two are taken that the messages do not have. A template may print a message as Python does,
which leaves letters as they are, and would write private or control characters as escapes."""


class Part(NamedTuple):
    """A piece of a rendered prompt."""

    text: str
    quoted: bool
    """Written by someone, and the name of a special token: to be tokenized as text."""


class Marks:
    """The two marks for some messages."""

    def __init__(self, opening: str, closing: str) -> None:
        self._opening = opening
        self._closing = closing
        self._quoted = re.compile(f"{opening}([^{opening}{closing}]*){closing}")

    @classmethod
    def absent_from(cls, texts: Sequence[str]) -> Marks:
        """Two characters that none of ``texts`` has."""
        used = set().union(*texts) if texts else set()
        free = (chr(code) for code in _MARKS if chr(code) not in used)
        return cls(next(free), next(free))

    def mark(self, text: str, names: Sequence[tuple[int, int]]) -> str:
        """``text`` with marks around its ``names``: (start, end) of each, in order."""
        pieces, at = [], 0
        for start, end in names:
            pieces += [text[at:start], self._opening, text[start:end], self._closing]
            at = end
        return "".join([*pieces, text[at:]])

    def parts(self, rendered: str) -> list[Part]:
        """What a template made of marked messages. A mark whose other one it cut off is dropped."""
        found = []
        for index, text in enumerate(self._quoted.split(rendered)):
            quoted = index % 2 == 1
            clean = text.replace(self._opening, "").replace(self._closing, "")
            if clean:
                found.append(Part(clean, quoted))
        return found


def after(parts: Sequence[Part], characters: int) -> list[Part]:
    """What is left of ``parts`` without their first ``characters``."""
    left = []
    for part in parts:
        if characters < len(part.text):
            left.append(Part(part.text[characters:], part.quoted))
        characters = max(0, characters - len(part.text))
    return left


def marked(messages: Sequence[Mapping[str, str]], names: Mapping[str, Sequence[tuple[int, int]]]) -> _Marked:
    """``messages`` with marks around ``names`` (of each text that has any)."""
    texts = [text for message in messages for text in message.values()]
    marks = Marks.absent_from(texts)
    return _Marked(
        [{key: marks.mark(text, names.get(text, ())) for key, text in message.items()} for message in messages], marks
    )


class _Marked(NamedTuple):
    messages: list[dict[str, str]]
    marks: Marks
