"""Pieces of Markdown that the generated pages share."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

GENERATED = "<!-- Made by `python -m edge.docs`: change the code, not this page. -->"


def sentence(struct: type) -> str:
    """A struct's docstring on one line."""
    return plain(inspect.getdoc(struct) or "")


def plain(text: str | None) -> str:
    """One line, with Markdown's code marks in place of reST's."""
    return " ".join((text or "").split()).replace("``", "`")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"
