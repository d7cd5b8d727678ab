"""The command table is true, and the help of the top level costs no import of a command."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import typer.main

from edge.cli.app import LazyCommands, app
from edge.cli.table import ABOUT, COMMANDS, OPTIONS, top_help
from tests.support.nodes import CHECKOUT

SHARED = {"__init__", "app", "context", "held", "progress", "table"}
"""Modules of edge/cli that hold no command."""
OF_GROUPS = {"snapshot_asks", "snapshot_diff", "explore"}
"""Modules that hold some of a group's commands."""
HEAVY = {
    *("torch", "transformers", "numpy", "rich", "paho", "apsw", "cryptography", "iotcore", "psutil"),
    *("msgspec", "msgpack", "prometheus_client", "onnxruntime", "tokenizers"),
}


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=CHECKOUT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def loaded_by(*words: str) -> tuple[str, set[str]]:
    """What the program prints, and the modules that it has then."""
    done = run(
        "import sys\nfrom edge.cli import main\n"
        f"try:\n    main({list(words)!r})\nexcept SystemExit:\n    pass\n"
        "print('\\nMODULES', *sys.modules)"
    )
    assert done.returncode == 0, done.stderr
    shown, _, modules = done.stdout.rpartition("\nMODULES")
    return shown, set(modules.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_a_line_of_the_help_is_the_commands_own_first_sentence(name: str) -> None:
    command = LazyCommands()[name]
    assert command.name == name
    assert command.get_short_help_str(limit=10_000) == COMMANDS[name][2]
    assert not command.hidden


def test_every_module_of_the_command_line_and_every_group_is_in_the_table() -> None:
    modules = {path.stem for path in (CHECKOUT / "edge" / "cli").glob("*.py")} - SHARED - OF_GROUPS
    assert {module for module, _, _ in COMMANDS.values()} == modules
    for module in modules:
        if isinstance(getattr(importlib.import_module(f"edge.cli.{module}"), "app", None), typer.Typer):
            assert (module, "app") in {row[:2] for row in COMMANDS.values()}


def test_the_options_shown_are_the_programs() -> None:
    root: Any = typer.main.get_command(app)
    shown = {
        ", ".join(option.opts) + (f" {option.metavar}" if option.metavar else ""): option.help for option in root.params
    }
    assert shown | {"-h, --help": "Show this message and exit."} == OPTIONS
    assert root.help == ABOUT


@pytest.mark.parametrize("words", [("--help",), ("-h",)])
def test_the_help_imports_no_command_nor_typer(words: tuple[str, ...]) -> None:
    shown, modules = loaded_by(*words)
    assert all(f"\n  {name} " in shown for name in COMMANDS)
    assert "edge.cli.table" in modules
    assert not {name for name in modules if name.startswith("edge.cli.")} - {"edge.cli.table"}
    assert not {name.partition(".")[0] for name in modules} & {"typer", "click", *HEAVY}


@pytest.mark.parametrize(
    ("words", "module"),
    [(("--debug", "--help"), ""), (("--debug",), ""), (("keys", "--help"), "keys"), (("up", "--help"), "node")],
)
def test_what_typer_answers_imports_no_other_command(words: tuple[str, ...], module: str) -> None:
    _, modules = loaded_by(*words)
    own = {f"edge.cli.{module}"} if module else set()
    shared = {f"edge.cli.{name}" for name in SHARED}
    assert {name for name in modules if name.startswith("edge.cli.")} - shared == own
    assert not {name.partition(".")[0] for name in modules} & HEAVY


def test_the_help_is_one_text_with_typer_and_without() -> None:
    for columns in ("50", "71", "200", "0", "wide"):
        with_typer = run("from edge.cli import main; main(['--debug', '--help'])", COLUMNS=columns)
        without = run("from edge.cli import main; main(['--help'])", COLUMNS=columns)
        assert (with_typer.returncode, without.returncode) == (0, 0)
        assert with_typer.stdout == without.stdout
    bare = run("from edge.cli import main; main([])", COLUMNS="80")
    assert bare.returncode == 2
    assert top_help(80) in bare.stdout + bare.stderr


@pytest.mark.parametrize("columns", [1, 50, 64, 80, 1000])
def test_the_help_keeps_to_the_terminal_and_loses_no_word(columns: int) -> None:
    text = top_help(columns)
    assert max(map(len, text.splitlines())) <= max(48, min(78, columns - 2))
    words = text.split()
    for line in (ABOUT, *OPTIONS.values(), *(row[2] for row in COMMANDS.values())):
        here = line.split()
        assert any(words[at : at + len(here)] == here for at in range(len(words)))


def test_a_mistyped_command_is_refused_with_the_nearest_and_imports_none() -> None:
    done = run("from edge.cli import main; main(['recal'])")
    assert done.returncode == 2
    assert "recall" in done.stderr
    assert LazyCommands().get("recal") is None
    assert "recal" not in LazyCommands()


def test_a_reader_that_has_gone_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-c", "from edge.cli import main; main(['--help'])"],
            cwd=Path(CHECKOUT),
            stdout=writer,
            stderr=subprocess.PIPE,
            check=False,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
