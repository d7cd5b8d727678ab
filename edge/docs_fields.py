"""The fields of every struct of the protocol, as a person reads them, with the docstrings below them."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import msgspec

from edge.docs_text import plain, table
from protocol import (
    basis_manifest,
    built_manifest,
    codec,
    entries,
    errors,
    group_key,
    layout,
    manifest,
    messages,
    pool,
    provenance,
    sealing,
    variants,
)
from protocol.topics import KIB

SOURCES: tuple[ModuleType, ...] = (
    messages,
    entries,
    manifest,
    layout,
    sealing,
    provenance,
    basis_manifest,
    built_manifest,
    group_key,
    pool,
    variants,
    errors,
    codec,
)


class Fields:
    """Fields of every struct of the protocol, with the text of their types and their docstrings."""

    def __init__(self, sources: Sequence[ModuleType] = SOURCES) -> None:
        self._classes: dict[str, ast.ClassDef] = {}
        self._aliases: dict[str, ast.expr] = {}
        for module in sources:
            tree = ast.parse(inspect.getsource(module))
            self._classes.update({node.name: node for node in tree.body if isinstance(node, ast.ClassDef)})
            for node in tree.body:
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    self._aliases[node.targets[0].id] = node.value
        self.named: dict[str, str] = {}
        """Structs that a type names, in the order in which they were met."""

    def table(self, struct: type[msgspec.Struct], explained_by: type[msgspec.Struct] | None = None) -> str:
        """Name, type, default and meaning of each field; its meaning, if given, from another struct."""
        texts = dict(self._docstrings(self._classes[(explained_by or struct).__name__]))
        rows = []
        for node in self._classes[struct.__name__].body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                default = f"{_shown(_value(node.value))}" if node.value is not None else "required"
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
            if node.value.id == "Literal":
                return " or ".join(f"`{_value(each)}`" for each in node.slice.elts)
            if node.value.id == "tuple":
                return f"list of {self._type(node.slice.elts[0])}"
            return f"map of {self._type(node.slice.elts[0])} to {self._type(node.slice.elts[1])}"
        if isinstance(node, ast.Subscript):
            return f"list of {self._type(node.slice)}"
        if isinstance(node, ast.BinOp):
            return f"{self._type(node.left)} or {self._type(node.right)}"
        name = ast.unparse(node)
        if name in self._classes:
            self.named.setdefault(name, name)
            return f"[{name}](#{name.lower()})"
        if name in self._aliases and name not in _WIRE_TYPES:
            return self._type(self._aliases[name])
        return _WIRE_TYPES.get(name, name)

    @staticmethod
    def _constraint(node: ast.expr) -> str:
        words = {"ge": "≥", "gt": ">", "le": "≤", "min_length": "length ≥", "max_length": "length ≤", "pattern": "like"}
        if not isinstance(node, ast.Call):
            return ""
        said = ((words[each.arg], _value(each.value)) for each in node.keywords if each.arg in words)
        return ", ".join(f"{word} `{value}`" if isinstance(value, str) else f"{word} {value:,}" for word, value in said)


_WIRE_TYPES = {
    "str": "text",
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "bytes": "binary",
    "None": "nil",
    "Any": "any",
    "Name": "name",
    "SnapshotId": "text, 64 of 0-9 and a-f",
    "MaybeSnapshotId": "text, empty or 64 of 0-9 and a-f",
    "Digest": "binary of 32 bytes",
    "Count": "integer ≥ 0",
    "msgspec.Raw": "any",
}


def _shown(value: Any) -> str:
    """A default, as a reader of any language knows it."""
    return "empty" if value == b"" else f"`{json.dumps(value)}`"


def _value(node: ast.expr) -> Any:
    """What a default or a limit is; ours are made of literals and KIB."""
    return eval(
        compile(ast.Expression(node), "a field", "eval"), {"__builtins__": {}, "KIB": KIB, "_END": messages._END}
    )
