"""Pieces of Markdown that the generated pages share."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
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


_INCLUDED = re.compile(r"^<!-- (examples/[\w./-]+) -->\n(?:```\w*\n.*?^```\n)?", re.MULTILINE | re.DOTALL)
_LANGUAGES = {".py": "python", ".mjs": "javascript", ".sh": "sh"}


def with_files_included(page: str) -> str:
    """A page that people write, each ``<!-- examples/… -->`` followed by that file as it is."""

    def fenced(match: re.Match[str]) -> str:
        path = CHECKOUT / match[1]
        return f"<!-- {match[1]} -->\n```{_LANGUAGES[path.suffix]}\n{path.read_text('utf-8')}```\n"

    return _INCLUDED.sub(fenced, page)
