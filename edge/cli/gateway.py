"""The command group gateway."""

from __future__ import annotations

from typing import Annotated

import typer

from edge.cli.context import JsonOption, load, print_json

app = typer.Typer(
    help="The OpenAI-compatible endpoint: its address and its token.", no_args_is_help=True, rich_markup_mode=None
)


@app.command()
def url(json: JsonOption = False) -> None:
    """Print the endpoint's address, the base URL that programs are given."""
    from edge.gateway_token import base_url
    from protocol.errors import ConfigError

    config = load()
    if not config.gateway.port:
        raise ConfigError(
            "looking for the endpoint: gateway.port is 0, there is none",
            hint="set gateway.port, to 8650 for example, and start the node again",
            field="gateway.port",
            reason="off",
        )
    found = base_url(config.gateway)
    if json:
        print_json({"url": found})
    else:
        print(found)


@app.command()
def token(
    new: Annotated[bool, typer.Option("--new", help="Make a new one; the old one is worth nothing at once.")] = False,
    json: JsonOption = False,
) -> None:
    """Print the token that programs must show, made when there is none."""
    from edge.gateway_token import make_token, read_token, token_file

    path = token_file(load())
    found = make_token(path) if new or not path.exists() else read_token(path)
    if json:
        print_json({"token": found, "file": path})
    else:
        print(found)
