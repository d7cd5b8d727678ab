"""The command table: every command of ``mindstream`` and its group."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from edge.cli import (
    bench,
    broker,
    config,
    decode,
    gateway,
    keys,
    memory,
    model,
    models,
    node,
    record,
    status,
    units,
    watch,
)
from edge.cli.context import settings

# rich_markup_mode None: help is drawn without rich, which takes as long to import as all the rest.
app = typer.Typer(
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


@app.callback()
def _options(
    config: Annotated[
        Optional[Path],  # noqa: UP045 - typer reads the annotation at run time, on Python 3.10 too
        typer.Option("--config", metavar="FILE", help="mindstream.toml. Default: the first of the search path."),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Log everything, and show where errors come from.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Small machines think together: shared memories, conversations that move between nodes, over MQTT."""
    settings.config_path = config
    settings.debug = debug


app.command()(node.up)
app.command()(status.status)
app.command()(node.demo)
app.command()(model.chat)
app.command()(memory.remember)
app.command()(memory.recall)
app.command()(model.handoff)
app.command()(watch.watch)
app.command()(decode.decode)
app.command()(record.record)
app.command()(record.recordings)
app.command()(record.replay)
app.add_typer(models.app, name="models")
app.add_typer(keys.app, name="keys")
app.add_typer(broker.app, name="broker")
app.add_typer(gateway.app, name="gateway")
app.command()(node.doctor)
app.command()(bench.bench)
app.add_typer(config.app, name="config")
app.add_typer(units.app, name="units")
app.command()(status.sleep)
app.command()(status.wake)
app.command()(node.version)
