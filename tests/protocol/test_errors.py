"""The error tree: drawn as it is, each with a stable code, the same before and after the wire."""

from __future__ import annotations

import re

import msgspec
import pytest

from protocol import errors
from protocol.errors import BY_CODE, ErrorInfo, MindstreamError, from_wire, to_wire

every_kind = pytest.mark.parametrize("kind", BY_CODE.values(), ids=lambda kind: kind.__name__)


def subclasses(kind: type[MindstreamError]) -> set[type[MindstreamError]]:
    return {kind}.union(*(subclasses(child) for child in kind.__subclasses__()))


def ours() -> set[type[MindstreamError]]:
    return {kind for kind in subclasses(MindstreamError) if kind.__module__ == errors.__name__}


def test_the_tree_in_the_docstring_is_the_tree_in_the_code() -> None:
    drawn = re.findall(r"^ {4}[│├└─ ]*([A-Z]\w+)", errors.__doc__ or "", re.MULTILINE)
    assert sorted(drawn) == sorted(kind.__name__ for kind in ours())


def test_each_kind_has_a_code_of_its_own() -> None:
    assert len({kind.code for kind in ours()}) == len(ours())
    assert ours() <= set(BY_CODE.values())


@every_kind
def test_an_error_comes_out_of_the_wire_as_it_went_in(kind: type[MindstreamError]) -> None:
    error = kind("storing x: no room", hint="make room", field="text", reason="full", topic="a/b", type="memory.put")
    info = msgspec.msgpack.decode(msgspec.msgpack.encode(to_wire(error)), type=ErrorInfo)
    back = from_wire(info, remote="sprout/memory_store")
    assert type(back) is kind
    assert (back.message, back.hint, back.field, back.reason, back.topic, back.type) == (
        error.message,
        error.hint,
        error.field,
        error.reason,
        error.topic,
        error.type,
    )
    assert str(back) == "sprout/memory_store: storing x: no room (make room)"


def test_an_unknown_code_becomes_the_root() -> None:
    assert type(from_wire(ErrorInfo(code="from_the_future", message="m"))) is MindstreamError


def test_an_exception_outside_the_tree_keeps_its_name() -> None:
    info = to_wire(KeyError("x"), topic="a/b", type="t")
    assert (info.code, info.reason, info.topic, info.type) == ("error", "KeyError", "a/b", "t")
    assert "KeyError" in info.message


def test_what_is_known_of_the_message_at_fault_is_added_but_never_overwritten() -> None:
    assert to_wire(MindstreamError("m"), topic="a/b", type="t").topic == "a/b"
    assert to_wire(MindstreamError("m", topic="c/d"), topic="a/b").topic == "c/d"
