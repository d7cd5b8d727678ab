"""Text on its way to a terminal, and Mindstream's own version."""

from __future__ import annotations

import importlib.metadata
import unicodedata
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

_KEPT = frozenset("\n\t")


def printable(text: str) -> str:
    """``text`` without what a terminal would obey: control characters (C0, C1) and direction overrides.

    What a peer, a model or a microphone said is data: it must not move the cursor, name a window or hide a line.
    Each is shown as U+FFFD; newlines and tabs stay.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join("\N{REPLACEMENT CHARACTER}" if _obeyed(character) else character for character in text)


def details_line(details: Mapping[str, Any]) -> str:
    """What a service says of itself, in a line: without what is empty, and without ids and reasons, which
    `mindstream status --json` has."""
    return ", ".join(
        f"{key} {value}"
        for key, value in details.items()
        if isinstance(value, (str, int, float)) and value and not key.endswith(("_reason", "_id"))
    )


def _obeyed(character: str) -> bool:
    # Cf holds the bidirectional controls, and also the joiner that emoji and several scripts need.
    category = unicodedata.category(character)
    return (category == "Cc" and character not in _KEPT) or (category == "Cf" and character not in "\u200c\u200d")


@lru_cache(maxsize=1)
def mindstream_version() -> str:
    """The installed version, or ``0+source`` for a checkout that was never installed."""
    try:
        return importlib.metadata.version("mindstream")
    except importlib.metadata.PackageNotFoundError:
        return "0+source"
