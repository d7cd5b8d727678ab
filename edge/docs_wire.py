"""docs/asyncapi.yaml from the tables and the golden messages, and docs/clients.md with the example clients in it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from edge.docs_fields import Fields
from edge.docs_text import CHECKOUT, with_files_included
from protocol import asyncapi
from protocol.messages import MESSAGES

GOLDEN = CHECKOUT / "tests" / "golden"


def clients_page() -> str:
    """docs/clients.md: people write it, the programs in it are the files."""
    return with_files_included((CHECKOUT / "docs" / "clients.md").read_text("utf-8"))


# --- AsyncAPI -----------------------------------------------------------------------------------------------


def asyncapi_file() -> str:
    """docs/asyncapi.yaml; its examples are the golden messages."""
    examples = {}
    for type in MESSAGES:
        # A type without one is found by the golden tests; docs are made without them too.
        if (path := GOLDEN / f"{type}.json").exists():
            examples[type] = _hexadecimal(json.loads(path.read_text("utf-8"))["payload"])
    document = asyncapi.document(Fields().descriptions(), examples)
    return "# Made by `python -m edge.docs`: change the code, not this file.\n" + "\n".join(_yaml(document)) + "\n"


def _hexadecimal(value: Any) -> Any:
    """A golden file's binary values as plain texts."""
    if isinstance(value, dict):
        return value["hex"] if value.keys() == {"hex"} else {key: _hexadecimal(each) for key, each in value.items()}
    return [_hexadecimal(each) for each in value] if isinstance(value, list) else value


_PLAIN_TEXT = re.compile(r"\$?[A-Za-z_]\w*(?:[./-]\w+)*", re.ASCII)
_NOT_TEXT = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}
"""What YAML 1.1 readers take for something else than a text."""


def _yaml(value: Any) -> Iterator[str]:
    """The lines of JSON types as block YAML. All but the plainest texts are quoted as in JSON, which YAML 1.2 reads."""
    if isinstance(value, dict) and value:
        for key, each in value.items():
            if isinstance(each, (dict, list)) and each:
                yield f"{_scalar(key)}:"
                yield from (f"  {line}" for line in _yaml(each))
            else:
                yield f"{_scalar(key)}: {_scalar(each)}"
    elif isinstance(value, list) and value:
        for each in value:
            first, *rest = _yaml(each)
            yield f"- {first}"
            yield from (f"  {line}" for line in rest)
    else:
        yield _scalar(value)


def _scalar(value: Any) -> str:
    if isinstance(value, str) and _PLAIN_TEXT.fullmatch(value) and value.lower() not in _NOT_TEXT:
        return value
    return json.dumps(value, ensure_ascii=False)
