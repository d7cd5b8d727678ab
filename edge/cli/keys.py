"""The command group keys: who this node is, and whom it trusts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from edge.cli.context import EXIT_NOT_FOUND, JsonOption, load, print_json

if TYPE_CHECKING:
    from edge.keys import Peers
    from protocol.identity import Identity

app = typer.Typer(
    help="This node's key, and the keys of the nodes it trusts.", no_args_is_help=True, rich_markup_mode=None
)


def _open() -> tuple[Identity, Peers]:
    from edge.keys import Peers, load_or_create_identity

    config = load()
    identity = load_or_create_identity(config.node.folder(), config.node.name)
    return identity, Peers(config.node.folder(), identity)


@app.command()
def show(json: JsonOption = False) -> None:
    """Show this node's name and fingerprint, and what to type on the other nodes."""
    identity, _ = _open()
    if json:
        print_json({"node": identity.node, "fingerprint": identity.fingerprint})
        return
    print(f"{identity.node} {identity.fingerprint}")
    print(f"on each node that shall trust it: mindstream keys trust {identity.node} {identity.fingerprint}")


@app.command()
def trust(
    node: Annotated[str, typer.Argument(help="The other node's name.")],
    fingerprint: Annotated[str, typer.Argument(help="What `mindstream keys show` prints there.")],
    replace: Annotated[bool, typer.Option("--replace", help="Take it in place of another key of that name.")] = False,
) -> None:
    """Trust what a node signs: its memories and snapshots. Takes effect at once."""
    _, peers = _open()
    peers.trust(node, fingerprint, replace=replace)
    print(f"{node} is trusted with {fingerprint.strip().lower()}")


@app.command("list")
def list_peers(json: JsonOption = False) -> None:
    """List the nodes that this node trusts, itself included."""
    identity, peers = _open()
    table = {identity.node: identity.fingerprint, **peers.table()}
    if json:
        print_json(table)
    else:
        for name, fingerprint in sorted(table.items()):
            print(f"{name} {fingerprint}" + (" (this node)" if name == identity.node else ""))


@app.command()
def forget(node: Annotated[str, typer.Argument(help="The other node's name.")]) -> None:
    """Trust a node no longer. What it said before stays."""
    _, peers = _open()
    if not peers.forget(node):
        print(f"{node} was not trusted")
        raise typer.Exit(EXIT_NOT_FOUND)
    print(f"{node} is trusted no longer")
