"""The command group pool: beginnings of prompts that the site has read, as far as this node holds them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge.cli.context import JsonOption, load, print_json

if TYPE_CHECKING:
    from edge.config import Config
    from edge.group_keys import GroupKeys
    from edge.pool_store import Held, PoolStore
    from protocol.identity import Keyring

app = typer.Typer(
    help="Beginnings of prompts that the site has read, and this node holds.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def _open() -> tuple[Config, PoolStore, GroupKeys, Keyring]:
    from edge.group_keys import GroupKeys
    from edge.keys import Peers, load_or_create_identity
    from edge.pool_files import open_files
    from edge.pool_store import PoolStore
    from protocol.pool import read_witnesses, set_aside

    config = load()
    folder = config.node.folder()
    identity = load_or_create_identity(folder, config.node.name)
    peers = Peers(folder, identity)
    store = PoolStore(open_files(config.pool.url, folder / "model_runner" / "pool"), config.pool.most_mib * 2**20)
    keyring = peers.keyring()
    store.set_aside_by(lambda held: set_aside(held.creator, read_witnesses(store.statements(held.identifier), keyring)))
    store.refresh()
    return config, store, GroupKeys(folder, identity, peers), keyring


@app.command()
def status(json: JsonOption = False) -> None:
    """Show how much the pool holds, whom it trusts, and the site's group key."""
    from edge.text import printable

    config, store, keys, _ = _open()
    entries, size_bytes = store.totals
    current = keys.current()
    shown: dict[str, Any] = {
        "enabled": config.pool.enabled,
        "where": store.files.where,
        "entries": entries,
        "size_bytes": size_bytes,
        "most_bytes": config.pool.most_mib * 2**20,
        "set_aside": sum(store.is_set_aside(held) for held in store.all()),
        "saves_s": sum(held.cost_ms for held in store.all()) / 1000,
        "trust": config.pool.trust,
        "quorum": config.pool.quorum if config.pool.trust == "quorum" else None,
        "accept": config.pool.accept,
        "group_key": None
        if current is None
        else {"id": current.id.hex(), "version": current.version, "by": current.by, "versions": len(keys.versions())},
    }
    if json:
        print_json(shown)
        return
    trusted = "their creators" if config.pool.trust == "creator" else f"{config.pool.quorum} agreeing witnesses"
    key = (
        f"{current.id.hex()[:12]}, version {current.version}, made by {current.by}" if current else "none as yet"
    )  # never the secret
    print(
        printable(
            f"pool       {'on' if config.pool.enabled else 'off'}, at {shown['where']}\n"
            f"entries    {entries:,}, {size_bytes / 1e6:,.1f} of {shown['most_bytes'] / 1e6:,.0f} MB; "
            f"reading them took {shown['saves_s']:,.1f} s\n"
            f"set aside  {shown['set_aside']:,}\n"
            f"trust      by {trusted}; numerics: {config.pool.accept}\n"
            f"group key  {key}"
        )
    )


@app.command("list")
def list_entries(json: JsonOption = False) -> None:
    """List the entries, those first that are worth most."""
    from edge.text import printable

    config, store, _, keyring = _open()
    rows = [_row(store, held, keyring, config) for held in store.all()]
    if json:
        print_json(rows)
        return
    if not rows:
        print("this node's pool holds nothing")
    for row in rows:
        said = f", {row['agree']} agree" if row["agree"] else ""
        said += f", {row['disagree']} disagree" if row["disagree"] else ""
        line = (
            f"{row['entry'][:12]}  {row['size_bytes'] / 1e6:,.2f} MB, read by {row['creator']} in "
            f"{row['cost_ms'] / 1000:,.2f} s{said}" + (f": {row['not_used']}" if row["not_used"] else "")
        )
        print(printable(line))


def _row(store: PoolStore, held: Held, keyring: Keyring, config: Config) -> dict[str, Any]:
    from protocol.pool import judge, read_witnesses

    said = read_witnesses(store.statements(held.identifier), keyring)
    not_used = "" if held.creator in keyring else f"{held.creator} is not trusted"
    if not not_used:
        _, not_used = judge(held.creator, config.node.name, said, config.pool.trust, config.pool.quorum)
    return {
        "entry": held.identifier,
        "name": held.name.hex(),
        "parent": held.parent.hex(),
        "creator": held.creator,
        "cost_ms": held.cost_ms,
        "size_bytes": held.size_bytes,
        "agree": sum(each.agrees for each in said),
        "disagree": sum(not each.agrees for each in said),
        "not_used": not_used,
    }


@app.command()
def rm(
    entry: Annotated[str, typer.Argument(help="The entry's id, or as many of its first digits as are its alone.")],
    json: JsonOption = False,
) -> None:
    """Remove one entry; those that continue it are of no use then, and go when room is wanted."""
    from protocol.errors import BlobError, NotFound

    _, store, _, _ = _open()
    found = [held for held in store.all() if held.identifier.startswith(entry.lower())]
    if not found:
        raise NotFound(
            f"looking for pool entry {entry[:64]}: it is not there", hint="`mindstream pool list` shows them"
        )
    if len(found) > 1:
        raise BlobError(f"looking for pool entry {entry[:64]}: {len(found)} begin so", hint="give more digits")
    store.remove(found[0])
    if json:
        print_json({"entry": found[0].identifier, "freed_bytes": found[0].size_bytes})
    else:
        print(f"{found[0].identifier[:12]} is removed, {found[0].size_bytes / 1e6:,.1f} MB are free")


@app.command()
def clear(json: JsonOption = False) -> None:
    """Remove all entries, and what witnesses said of them."""
    _, store, _, _ = _open()
    freed_bytes = store.totals[1]
    count = store.clear()
    if json:
        print_json({"entries": count, "freed_bytes": freed_bytes})
    else:
        print(f"{count:,} entries are removed, {freed_bytes / 1e6:,.1f} MB are free")
