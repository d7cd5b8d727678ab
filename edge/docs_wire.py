"""The pages that say what crosses the bus: docs/protocol.md and docs/asyncapi.yaml."""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import msgspec

from edge.docs_text import CHECKOUT, GENERATED, plain, table, with_files_included
from protocol import asyncapi, codec, entries, errors, manifest, messages
from protocol.messages import MESSAGES
from protocol.topics import MAX_PACKET_BYTES, ROOT, TOPICS

GOLDEN = CHECKOUT / "tests" / "golden"

# --- the wire ---------------------------------------------------------------------------------------------

_PROTOCOL = """\
# Protocol

{generated}

What crosses the bus, for clients in any language. Everything is below `{root}/`, in lowercase, but
for the one topic whose name Home Assistant chose.

- **A node writes its own branch and nothing else.** The first level below the root is the node that speaks; the
  `source` of its envelopes begins with that name, and what does not is refused.
- **Names** (levels in braces, and fields of type *name*) are 1 to 63 of `a-z`, `0-9`, `-` and `_`, first a letter
  or digit.
- **Payloads** are one msgpack map, the envelope below, whose `data` is the message. Topics of format JSON carry a bare
  JSON object instead, so that any tool can read who is there.
- Unknown fields are ignored, unknown types are counted. Missing or ill-typed fields are an error that names topic,
  type, field and reason. Fields carry their units in their names. From the first release on a message only grows.
- **Asks** go out in the asker's branch (`{{asker}}/ask/{{target}}/{{service}}/{{verb}}`) with `reply_to` (the asker's
  client name) and `ttl_ms`, always; the answer comes in the responder's branch
  (`{{responder}}/reply/{{asker}}/{{client}}`) with the ask's id as its `correlation`. Age is judged by monotonic clocks
  and the broker's own message expiry, never by wall clocks. An ask repeated with the same id is carried out once.
- **Liveness.** Where a topic is said *at least every* so often, a live speaker repeats its word after that time, also
  an unchanged one; silent for three of these times it is late. A retained message that comes with a subscription (it
  has MQTT's RETAIN flag) may be old and says nothing of that.
- **QoS 1 everywhere.** A PUBACK means that the broker has it, nothing more.
- No packet is above {max_packet:,} bytes; each topic and type has a limit of its own.

## Envelope
{envelope}

## Topics
{topics}

## Messages
Types in the order of the table. *Durable* asks are written to disk before they are acknowledged, and carried out after
a crash of the service.
"""

_SOURCES: tuple[ModuleType, ...] = (messages, entries, manifest, errors, codec)


class _Fields:
    """Fields of every struct of the protocol, with the text of their types and their docstrings."""

    def __init__(self) -> None:
        self._classes: dict[str, ast.ClassDef] = {}
        for module in _SOURCES:
            tree = ast.parse(inspect.getsource(module))
            self._classes.update({node.name: node for node in tree.body if isinstance(node, ast.ClassDef)})
        self.named: dict[str, str] = {}
        """Structs that a type names, in the order in which they were met."""

    def table(self, struct: type[msgspec.Struct]) -> str:
        body = self._classes[struct.__name__].body
        texts = dict(self._docstrings(self._classes[struct.__name__]))
        rows = []
        for node in body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                default = f"`{ast.unparse(node.value)}`" if node.value is not None else "required"
                rows.append((f"`{node.target.id}`", self._type(node.annotation), default, texts[node.target.id]))
        return table(("field", "type", "default", "meaning"), rows) if rows else "No fields."

    def descriptions(self) -> dict[str, dict[str, str]]:
        """Every struct's fields, and what their docstrings say."""
        return {name: dict(self._docstrings(node)) for name, node in self._classes.items()}

    @staticmethod
    def _docstrings(found: ast.ClassDef) -> Iterator[tuple[str, str]]:
        """Field by field the text below it, empty where there is none."""
        for node, follows in zip(found.body, [*found.body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                below = follows.value if isinstance(follows, ast.Expr) else None
                yield node.target.id, plain(str(below.value)) if isinstance(below, ast.Constant) else ""

    def _type(self, node: ast.expr) -> str:
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and isinstance(node.slice, ast.Tuple):
            if node.value.id == "Annotated":
                base, *rest = node.slice.elts
                return ", ".join([self._type(base), *filter(None, map(self._constraint, rest))])
            return f"map of {self._type(node.slice.elts[0])} to {self._type(node.slice.elts[1])}"
        if isinstance(node, ast.Subscript):
            return f"list of {self._type(node.slice)}"
        if isinstance(node, ast.BinOp):
            return f"{self._type(node.left)} or {self._type(node.right)}"
        name = ast.unparse(node)
        if name in self._classes:
            self.named.setdefault(name, name)
            return f"[{name}](#{name.lower()})"
        return _WIRE_TYPES.get(name, name)

    @staticmethod
    def _constraint(node: ast.expr) -> str:
        words = {"ge": "≥", "gt": ">", "le": "≤", "min_length": "length ≥", "max_length": "length ≤", "pattern": "like"}
        if not isinstance(node, ast.Call):
            return ""
        return ", ".join(
            f"{words[each.arg]} `{ast.unparse(each.value)}`" for each in node.keywords if each.arg in words
        )


_WIRE_TYPES = {
    "str": "text",
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "bytes": "binary",
    "None": "nil",
    "Any": "any",
    "Name": "name",
    "Digest": "binary of 32 bytes",
    "Count": "integer ≥ 0",
    "msgspec.Raw": "any",
}


def protocol_page() -> str:
    """docs/protocol.md."""
    fields = _Fields()
    topics = table(
        ("topic", "what", "limit in bytes", "format", "retained", "at least every"),
        [
            (
                f"`{row.shown}`",
                row.about,
                f"{row.max_bytes:,}",
                row.format,
                "yes" if row.retain else "",
                f"{row.every_s:g} s" if row.every_s else "",
            )
            for row in TOPICS
        ],
    )
    parts = [
        _PROTOCOL.format(
            generated=GENERATED,
            root=ROOT,
            max_packet=MAX_PACKET_BYTES,
            envelope=fields.table(codec.Envelope),
            topics=topics,
        )
    ]
    structs_of_rows = {row.struct.__name__ for row in MESSAGES.values()}
    for row in MESSAGES.values():
        lines = [
            f"### `{row.type}`",
            f'<a id="{row.struct.__name__.lower()}"></a>{plain(inspect.getdoc(row.struct) or "")}',
        ]
        if row.ask is not None:
            marks = "; durable" * row.ask.durable + "; of the node's own programs only" * row.ask.own_node_only
            lines.append(
                f"\nAsked of `{row.ask.service}` as `{row.ask.verb}`, answered with `{row.ask.reply}`; time to live at"
                f" most {row.ask.ttl_max_ms:,} ms{marks}."
            )
        lines.append(f"\nOn `{row.topic.shown}`, at most {row.max_bytes:,} bytes.\n")
        lines.append(fields.table(row.struct))
        parts.append("\n".join(lines))
    # Structs inside messages name others in turn: the list grows while it is walked.
    parts.append("## Structures inside messages\n")
    done: set[str] = set()
    while todo := [name for name in fields.named if name not in done and name not in structs_of_rows]:
        for name in todo:
            done.add(name)
            struct = next(getattr(module, name) for module in _SOURCES if hasattr(module, name))
            parts.append(f"### {name}\n{plain(inspect.getdoc(struct) or '')}\n\n{fields.table(struct)}")
    return "\n".join(parts)


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
    document = asyncapi.document(_Fields().descriptions(), examples)
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
