"""The command group snapshot: the snapshots on this node's disk. What asks the model runner stands beside it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge.cli import explore, snapshot_asks, snapshot_diff
from edge.cli.context import EXIT_FAILED, JsonOption, load, print_json
from edge.cli.held import fidelity, held, local_time, summary

if TYPE_CHECKING:
    from edge.snapshot_store import SnapshotStore
    from protocol.identity import Keyring
    from protocol.manifest import SnapshotManifest
    from protocol.provenance import Proven
    from protocol.sharing import Opened

app = typer.Typer(
    help="Save conversations, go on from them, make them smaller, compare them.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.command()(snapshot_asks.save)

IdArgument = snapshot_asks.IdArgument


@app.command("list")
def list_snapshots(json: JsonOption = False) -> None:
    """List them, the newest first."""
    from edge.text import printable

    store, _, keyring = held()
    rows = _rows(store, keyring)
    if json:
        print_json(rows)
        return
    if not rows:
        print("this node holds no snapshot")
    for row in rows:
        if row["refused"]:
            print(printable(f"{row['snapshot'][:12]}  cannot be used: {row['refused']}"))
            continue
        shared = f", {row['shared_bytes'] / 1e6:,.1f} MB of it shared" if row["shared_bytes"] else ""
        label = f"@{row['label']}" if row["label"] else ""
        kept = f", {row['kept_tokens']:,} of them kept" if row["kept_tokens"] < row["tokens"] - 1 else ""
        line = (
            f"{row['snapshot'][:12]}  {local_time(row['created_us'])}  {row['conversation']}{label}: "
            f"{row['tokens']:,} tokens of {row['model']}{kept}, {row['codec']}, {row['size_bytes'] / 1e6:,.1f} MB"
            f"{shared}, by {row['creator']}"
        )
        print(printable(line))


def _rows(store: SnapshotStore, keyring: Keyring) -> list[dict[str, Any]]:
    from collections import Counter

    from protocol.errors import MindstreamError
    from protocol.manifest import open_manifest

    manifests: dict[str, SnapshotManifest] = {}
    refused: dict[str, str] = {}
    for identifier in store.identifiers():
        try:
            manifests[identifier] = open_manifest(store.manifest(identifier), keyring)
        except MindstreamError as error:
            refused[identifier] = error.reason or error.message
    holders: Counter[bytes] = Counter()
    for manifest in manifests.values():
        holders.update({ref.digest for ref in manifest.chunks})
    rows = []
    for identifier in store.identifiers():
        row: dict[str, Any] = {"snapshot": identifier, "refused": refused.get(identifier, "")}
        if identifier in manifests:
            manifest = manifests[identifier]
            shared = sum(ref.size_bytes for ref in manifest.chunks if holders[ref.digest] > 1)
            row |= {**summary(manifest), "shared_bytes": shared}
        rows.append(row)
    return rows


@app.command()
def show(snapshot: IdArgument, json: JsonOption = False) -> None:
    """Show a snapshot: model, sizes, who can read it, and where it comes from, signature by signature."""
    from edge.text import printable

    shown = _show(snapshot)
    if json:
        print_json(shown)
        return
    text = (
        f"snapshot      {shown['snapshot']}\n"
        f"conversation  {shown['conversation']}, {shown['tokens']:,} tokens"
        + (f", {shown['kept_tokens']:,} of them kept" if shown["kept_tokens"] < shown["tokens"] - 1 else "")
        + (f"\nlabel         {shown['label']}" if shown["label"] else "")
        + f"\n"
        f"model         {shown['model']}, weights {shown['weights'][:12]}, {shown['dtype']}"
        + (f", {len(shown['adapters'])} adapters" if shown["adapters"] else "")
        + f"\nlayers        {shown['layers']}\n"
        f"size          {shown['size_bytes'] / 1e6:,.1f} MB in {shown['chunks']} chunks of {shown['blocks']} blocks,"
        f" codec {shown['codec']}\n"
        f"engine        {shown['engine']}\n"
        f"fidelity      {shown['fidelity']}\n"
        f"readers       {', '.join(shown['readers']) or 'nobody'}; this node "
        + ("can read it" if shown["readable"] else f"cannot: {shown['not_readable']}")
        + (f"\nparent        {shown['parent']}" if shown["parent"] else "")
    )
    for line in text.splitlines():
        print(printable(line))
    for step in shown["provenance"]:
        said = "signature checked" if step["trusted"] else "not a trusted node: vouched for by those that follow"
        details = "".join(f", {key} {value}" for key, value in step["details"].items())
        print(printable(f"  {local_time(step['time_us'])}  {step['kind']} by {step['node']}{details} ({said})"))


def _show(given: str) -> dict[str, Any]:
    from collections import Counter

    from protocol.errors import SnapshotRefused
    from protocol.manifest import open_manifest
    from protocol.provenance import read_chain
    from protocol.sealing import read_wrap
    from protocol.sharing import key_of

    node = held()
    store, identity, keyring = node
    identifier = node.find(given)
    signed = store.manifest(identifier)
    manifest = open_manifest(signed, keyring)
    chain = read_chain(signed.provenance, bytes.fromhex(identifier), manifest.creator, keyring)
    not_readable = ""
    try:
        key_of(signed, manifest, identity, keyring)
    except SnapshotRefused as error:
        not_readable = error.reason
    kinds = Counter(
        f"{layer.kind} of {layer.window_tokens}" * bool(layer.window_tokens) or layer.kind for layer in manifest.layers
    )
    numerics, digests = manifest.fingerprint, manifest.digests
    return {
        "snapshot": identifier,
        **summary(manifest),
        "weights": digests.weights.hex(),
        "tokenizer": digests.tokenizer.hex(),
        "config": digests.config.hex(),
        "adapters": [adapter.hex() for adapter in digests.adapters],
        "dtype": manifest.kv_dtype,
        "layers": ", ".join(f"{count} {kind}" for kind, count in kinds.items()),
        "blocks": len(manifest.blocks),
        "chunks": len(manifest.chunks),
        "engine": f"{numerics.engine} ({numerics.engine_version}) on {numerics.device}, {numerics.batch_mode}",
        "fidelity": fidelity(manifest),
        "parent": manifest.parent.hex(),
        "sharing": manifest.sharing,
        "readers": sorted({wrap.recipient for wrap in map(read_wrap, signed.wraps) if wrap}),
        "readable": not not_readable,
        "not_readable": not_readable,
        "provenance": [_step(proven) for proven in chain],
    }


def _step(proven: Proven) -> dict[str, Any]:
    said = proven.statement
    details = {key: value.hex() if isinstance(value, bytes) else value for key, value in said.details.items()}
    return {
        "kind": said.kind,
        "node": said.node,
        "time_us": said.time_us,
        "snapshot": said.snapshot.hex(),
        "details": details,
        "trusted": proven.trusted,
    }


@app.command()
def verify(snapshot: IdArgument, json: JsonOption = False) -> None:
    """Read and decrypt all of a snapshot: whether it is whole, genuine, and this node's to use."""
    from protocol.sharing import open_snapshot

    node = held()
    store, identity, keyring = node
    identifier = node.find(snapshot)
    started_s = time.monotonic()
    opened = open_snapshot(store.manifest(identifier), identifier, identity, keyring)
    bad = _bad_chunks(store, opened)
    took_s = time.monotonic() - started_s
    manifest = opened.manifest
    if json:
        print_json({"snapshot": identifier, **summary(manifest), "ok": not bad, "bad_chunks": bad, "took_s": took_s})
    elif bad:
        print(f"{identifier[:12]}: {len(bad)} of {len(manifest.chunks)} chunks are missing or damaged")
        for name, reason in bad.items():
            print(f"  {name}: {reason}")
        print("resuming it from another node fetches them again; else its tokens are read again")
    else:
        print(
            f"{identifier[:12]}: whole and genuine, {len(manifest.chunks)} chunks, "
            f"{manifest.total_bytes / 1e6:,.1f} MB read in {took_s:.1f} s"
        )
    if bad:
        raise typer.Exit(EXIT_FAILED)


def _bad_chunks(store: SnapshotStore, opened: Opened) -> dict[str, str]:
    """Names of the chunks that cannot be used, and why."""
    from protocol.errors import BadSignature, SnapshotRefused
    from protocol.manifest import verify_chunk

    manifest, private, key, _ = opened
    addresses = private.address_list()
    bad: dict[str, str] = {}
    number = 0
    for place, part in manifest.parts():
        for index, ref in enumerate(part.chunks()):
            data = store.chunk(ref)
            try:
                if data is None:
                    bad[ref.digest.hex()] = "missing"
                else:
                    verify_chunk(ref, data, index=number)
                    key.open(place.role(addresses, manifest.codec, index), data)
            except (BadSignature, SnapshotRefused) as error:
                bad[ref.digest.hex()] = error.reason
            number += 1
    return bad


@app.command()
def rm(snapshot: IdArgument, json: JsonOption = False) -> None:
    """Remove a snapshot, and what no other snapshot shares with it."""
    node = held()
    identifier = node.find(snapshot)
    freed_bytes = node.store.remove(identifier)
    if json:
        print_json({"snapshot": identifier, "freed_bytes": freed_bytes})
    else:
        print(f"{identifier[:12]} is removed, {freed_bytes / 1e6:,.1f} MB are free")


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="The model. Default: model.name.")] = "",
    holder: Annotated[
        str, typer.Option("--from", help="Fetch it from that node, which has it, rather than make it.", metavar="NODE")
    ] = "",
    json: JsonOption = False,
) -> None:
    """Make a model's basis: what the smallest codec, transform, knows of it beforehand.

    Once a model, some minutes; other nodes can then fetch it. Signed, and kept in the cache of models.
    """
    import importlib
    import sys

    import msgspec

    from edge.cli.context import EXIT_INTERRUPTED, connected, expect_service
    from edge.keys import Peers, load_or_create_identity

    config = load()
    settings = msgspec.structs.replace(config.model, **({"name": model} if model else {}))
    folder = config.node.folder()
    identity = load_or_create_identity(folder, config.node.name)

    def say(line: str) -> None:
        print(f"  {line}", file=sys.stderr, flush=True)

    work = importlib.import_module("services.model_runner.calibration")
    try:
        if holder:
            with connected(config) as bus:
                expect_service(bus, holder, "model_runner")
                made = work.fetch(settings, bus, bus, Peers(folder, identity).keyring(), holder, say=say)
        else:
            made = work.make(settings, identity, say=say, cache_dir=folder / "model_runner")
    except KeyboardInterrupt:
        say("stopped: nothing is kept")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if json:
        print_json(made)
        return
    print(f"the basis of {made.model}, {made.size_bytes / 1e6:.1f} MB from {made.tokens:,} tokens, is {made.path}")
    for level in made.levels:
        print(f"  {level.name}: ratio {level.ratio:.1f}, mean KL {level.mean_kl:.4f}, top-1 {level.top1:.3f}")


for _command in (snapshot_asks.prune, snapshot_asks.transcode, snapshot_asks.resume, snapshot_asks.timeline):
    app.command()(_command)
app.command()(snapshot_diff.diff)
app.command()(explore.explore)
