"""The command group config."""

from __future__ import annotations

import typer

from edge.cli.context import EXIT_NOT_FOUND, JsonOption, load, print_json, settings

app = typer.Typer(help="The configuration in force.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def show(json: JsonOption = False) -> None:
    """Print every key with the value in force: defaults, file and environment together."""
    from edge.config import to_toml

    config = load()
    if json:
        print_json(config)
    else:
        print(to_toml(config), end="")


@app.command()
def path() -> None:
    """Print the file that the configuration comes from."""
    from edge.config import find_config

    found = settings.config_path or find_config()
    if found is None:
        print("no file: the defaults are in force")
        raise typer.Exit(EXIT_NOT_FOUND)
    print(found)
