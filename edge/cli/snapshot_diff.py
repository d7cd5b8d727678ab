"""The command snapshot diff: what two snapshots have in common, and where they part."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edge.cli.context import JsonOption, print_json
from edge.cli.snapshot_asks import IdArgument

if TYPE_CHECKING:
    from edge.cli.held import Held
    from protocol.manifest import PrivatePart, SnapshotManifest


def diff(first: IdArgument, second: IdArgument, json: JsonOption = False) -> None:
    """Compare two snapshots: their tokens, where they part, what they share, how each is encoded."""
    from edge.cli.held import held
    from edge.text import printable

    node = held()
    found = compare(node, node.find(first), node.find(second))
    if json:
        print_json(found)
        return
    tokens, shared = found["tokens"], found["shared"]
    lines = [f"{name}  {_line(found[name])}" for name in ("first", "second")]
    lines += [f"{field}: {one} | {other}" for field, (one, other) in found["differs"].items()]
    if tokens is None:
        lines.append(f"tokens cannot be compared: {found['not_readable']}")
    else:
        part = "the same" if tokens["common"] == tokens["first"] == tokens["second"] else f"{tokens['common']:,} alike"
        lines.append(f"tokens  {part}; {tokens['first']:,} | {tokens['second']:,}")
    if found["text"]:
        lines.append(f"they part in {found['text']['where']}: {found['text']['first']!r} | {found['text']['second']!r}")
    lines.append(
        f"shared  {shared['blocks']:,} blocks at the beginning, {shared['chunks']:,} chunks, "
        f"{shared['bytes'] / 1e6:,.1f} MB"
    )
    lines.append(f"origin  {found['relation'] or 'neither was made of the other'}")
    for line in lines:
        print(printable(line))


def _line(side: dict[str, Any]) -> str:
    label = f"@{side['label']}" if side["label"] else ""
    return (
        f"{side['snapshot'][:12]}  {side['conversation']}{label}: {side['tokens']:,} tokens, {side['codec']}, "
        f"{side['size_bytes'] / 1e6:,.1f} MB, {side['fidelity']}; {', '.join(side['provenance'])}"
    )


def compare(node: Held, first: str, second: str) -> dict[str, Any]:
    """What ``snapshot diff --json`` prints."""
    from edge.cli.held import fidelity, summary
    from protocol.errors import MindstreamError
    from protocol.manifest import open_manifest
    from protocol.provenance import read_chain
    from protocol.sharing import open_snapshot

    manifests: list[SnapshotManifest] = []
    privates: list[PrivatePart] = []
    sides: list[dict[str, Any]] = []
    not_readable = ""
    for identifier in (first, second):
        signed = node.store.manifest(identifier)
        manifest = open_manifest(signed, node.keyring)
        chain = read_chain(signed.provenance, bytes.fromhex(identifier), manifest.creator, node.keyring)
        steps = [f"{each.statement.kind} by {each.statement.node}" for each in chain]
        manifests.append(manifest)
        sides.append({"snapshot": identifier, **summary(manifest), "fidelity": fidelity(manifest), "provenance": steps})
        try:
            privates.append(open_snapshot(signed, identifier, node.identity, node.keyring).private)
        except MindstreamError as error:
            not_readable = f"{identifier[:12]}: {error.reason or error.message}"
    one, other = manifests
    chunks = {ref.digest: ref.size_bytes for ref in one.chunks}
    common = {ref.digest for ref in other.chunks if ref.digest in chunks}
    readable = len(privates) == 2
    return {
        "first": sides[0],
        "second": sides[1],
        "differs": _differs(one, other),
        "tokens": _tokens(*privates) if readable else None,
        "text": _text(*privates) if readable else None,
        "not_readable": not_readable,
        "shared": {
            "blocks": _common(privates[0].address_list()[:-1], privates[1].address_list()[:-1]) if readable else 0,
            "chunks": len(common),
            "bytes": sum(chunks[digest] for digest in common),
        },
        "relation": _relation(one, other, first, second),
    }


def _differs(one: SnapshotManifest, other: SnapshotManifest) -> dict[str, tuple[str, str]]:
    """Of the model and its numerics: each field that is not the same."""
    found: dict[str, tuple[str, str]] = {}
    for theirs, ours in ((one.digests, other.digests), (one.fingerprint, other.fingerprint)):
        for field in theirs.__struct_fields__:
            pair = getattr(theirs, field), getattr(ours, field)
            if pair[0] != pair[1]:
                found[field] = _brief(pair[0]), _brief(pair[1])
    if one.model != other.model:
        found["model"] = one.model, other.model
    return found


def _brief(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(_brief(each) for each in value) or "none"
    return value.hex()[:12] if isinstance(value, bytes) else str(value)


def _common(one: Any, other: Any) -> int:
    """How many items two sequences begin with alike."""
    length = min(len(one), len(other))
    return next((index for index in range(length) if one[index] != other[index]), length)


def _tokens(one: PrivatePart, other: PrivatePart) -> dict[str, int]:
    first, second = (memoryview(each.tokens).cast("I") for each in (one, other))
    return {"first": len(first), "second": len(second), "common": _common(first, second)}


def _text(one: PrivatePart, other: PrivatePart) -> dict[str, str] | None:
    """Where the messages of two chats part; None where they do not, or are none."""
    first, second = (_messages(each) for each in (one, other))
    at = _common(first, second)
    if not first or not second or at == max(len(first), len(second)):
        return None
    texts = [messages[at] if at < len(messages) else "" for messages in (first, second)]
    letter = _common(*texts)
    begin = max(0, letter - 20)
    return {
        "where": f"message {at + 1}, letter {letter + 1}",
        "first": texts[0][begin : letter + 40],
        "second": texts[1][begin : letter + 40],
    }


def _messages(private: PrivatePart) -> list[str]:
    extra = private.state.get("extra")
    messages = extra.get("messages", []) if isinstance(extra, dict) else []
    return [f"{each.get('role', '')}: {each.get('content', '')}" for each in messages if isinstance(each, dict)]


def _relation(one: SnapshotManifest, other: SnapshotManifest, first: str, second: str) -> str:
    if one.parent.hex() == second:
        return "the second is the parent of the first"
    if other.parent.hex() == first:
        return "the first is the parent of the second"
    if one.parent and one.parent == other.parent:
        return f"both have the parent {one.parent.hex()[:12]}"
    return ""
