"""Who may import whom, held by reading every import of the source folders."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
ROOMS = ("protocol", "broker", "edge", "services", "bench")
MAY_IMPORT = {
    "protocol": {"protocol"},
    "broker": {"broker", "protocol"},
    "edge": {"edge", "broker", "protocol"},
    # A service imports itself and what lies under it; see below for one another.
    "services": {"services", "edge", "protocol"},
    "bench": set(ROOMS),
}
NO_IO_IN_PROTOCOL = {
    "socket",
    "subprocess",
    "sqlite3",
    "apsw",
    "paho",
    "torch",
    "numpy",
    "pathlib",
    "tempfile",
    "shutil",
}


def modules(room: str) -> list[Path]:
    return sorted((CHECKOUT / room).rglob("*.py"))


def imported(path: Path) -> list[tuple[str, int]]:
    """Every module that a file imports, wherever in it, with the line."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_lies_under_it(room: str) -> None:
    assert modules(room)
    wrong = [
        f"{path.relative_to(CHECKOUT)}:{line} imports {name}"
        for path in modules(room)
        for name, line in imported(path)
        if name.partition(".")[0] in {*ROOMS, "tests"} - MAY_IMPORT[room]
    ]
    assert not wrong


def test_services_never_import_each_other() -> None:
    wrong = []
    for path in modules("services"):
        own = path.relative_to(CHECKOUT / "services").parts[0]
        for name, line in imported(path):
            parts = name.split(".")
            if parts[0] == "services" and parts[1] != own:
                wrong.append(f"{path.relative_to(CHECKOUT)}:{line} imports {name}")
    assert not wrong


def test_the_protocol_does_no_io() -> None:
    wrong = [
        f"{path.relative_to(CHECKOUT)}:{line} imports {name}"
        for path in modules("protocol")
        for name, line in imported(path)
        if name.partition(".")[0] in NO_IO_IN_PROTOCOL
    ]
    assert not wrong
    opened = [
        f"{path.relative_to(CHECKOUT)}:{node.lineno}"
        for path in modules("protocol")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"open", "print", "input"}
    ]
    assert not opened


def test_sqlite_comes_through_one_library() -> None:
    # Two SQLite libraries in one process on one file break each other's locks.
    wrong = [
        f"{path.relative_to(CHECKOUT)}:{line}"
        for room in ROOMS
        for path in modules(room)
        for name, line in imported(path)
        if name.partition(".")[0] == "sqlite3"
    ]
    assert not wrong


def test_nothing_is_unpickled() -> None:
    # A pickle that came from outside runs what it likes.
    wrong = [
        f"{path.relative_to(CHECKOUT)}:{line} imports {name}"
        for room in ROOMS
        for path in modules(room)
        for name, line in imported(path)
        if name.partition(".")[0] in {"pickle", "dill", "cloudpickle", "joblib", "marshal"}
    ]
    assert not wrong
