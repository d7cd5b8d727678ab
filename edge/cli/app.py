"""The program ``mindstream``: its global options, and its commands by the table, each imported when it is wanted."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
import typer.core
import typer.main

from edge.cli.context import settings
from edge.cli.table import ABOUT, COMMANDS, OPTIONS, terminal_columns, top_help


class LazyCommands(Mapping[str, Any]):
    """The commands of the table. To ask for one imports its module, and no other; names cost nothing."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            self._made[name] = _make(name)
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in COMMANDS

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


def _make(name: str) -> Any:
    """The command or group of a row of the table. Raises KeyError for another name."""
    module, attribute, _ = COMMANDS[name]
    found = getattr(importlib.import_module(f"edge.cli.{module}"), attribute)
    if isinstance(found, typer.Typer):
        command: Any = typer.main.get_group(found)
    else:
        alone = typer.Typer(rich_markup_mode=None, add_completion=False)
        alone.command(name)(found)
        command = typer.main.get_command(alone)
    command.name = name
    return command


class LazyGroup(typer.core.TyperGroup):
    """The top level: a listing of it, its help and its suggestions for a mistyped name import no command."""

    def __init__(self, **settings_: Any) -> None:
        super().__init__(**settings_)
        self.commands: Any = LazyCommands()

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - the parent's signature
        """In the order of the table."""
        return list(COMMANDS)

    def get_help(self, ctx: Any) -> str:  # noqa: ARG002
        """The same text that ``main`` prints without typer."""
        return top_help(terminal_columns())


# rich_markup_mode None: help is drawn without rich, which takes as long to import as all the rest.
app = typer.Typer(
    cls=LazyGroup,
    rich_markup_mode=None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        from edge.text import mindstream_version

        print(f"mindstream {mindstream_version()}")
        raise typer.Exit


@app.callback(help=ABOUT)
def _options(
    config: Annotated[
        Optional[Path],  # noqa: UP045 - typer reads the annotation at run time, on Python 3.10 too
        typer.Option("--config", metavar="FILE", help=OPTIONS["--config FILE"]),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help=OPTIONS["--debug"])] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help=OPTIONS["--version"])
    ] = False,
) -> None:
    settings.config_path = config
    settings.debug = debug
