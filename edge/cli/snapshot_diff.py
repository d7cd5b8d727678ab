"""The command snapshot diff: what two snapshots have in common, and where they part."""

from __future__ import annotations

from collections.abc import Iterator
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
    lines = [f"{name:6}  {_line(found[name])}" for name in ("first", "second")]
    lines += [f"differ  {field}: {one} | {other}" for field, (one, other) in found["differs"].items()]
    if tokens is None:
        lines.append(f"tokens  cannot be compared: {found['not_readable']}")
    else:
        part = "the same" if tokens["common"] == tokens["first"] == tokens["second"] else f"{tokens['common']:,} alike"
        lines.append(f"tokens  {part}; {tokens['first']:,} | {tokens['second']:,}")
    if found["text"]:
        lines.append(
            f"text    they part in {found['text']['where']}: {found['text']['first']!r} | {found['text']['second']!r}"
        )
    lines.append(
        f"shared  {_many(shared['blocks'], 'block')} at the beginning, {_many(shared['chunks'], 'chunk')}, "
        f"{shared['bytes'] / 1e6:,.1f} MB"
    )
    lines.append(f"origin  {found['relation'] or 'neither comes from the other, as far as this node knows'}")
    for line in lines:
        print(printable(line))


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}" + "s" * (count != 1)


def _line(side: dict[str, Any]) -> str:
    label = f"@{side['label']}" if side["label"] else ""
    kept = f", {side['kept_tokens']:,} of them kept" if side["kept_tokens"] < side["tokens"] - 1 else ""
    return (
        f"{side['snapshot'][:12]}  {side['conversation']}{label}: {side['tokens']:,} tokens{kept}, {side['codec']}, "
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
        "relation": _relation(node.manifests(), first, second),
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


def _relation(manifests: dict[str, SnapshotManifest], first: str, second: str) -> str:
    """By their parents, as far back as this node holds them."""
    if first == second:
        return "the two are one"
    ours, theirs = ([*_lineage(manifests, each)] for each in (first, second))
    for name, line, other in (("second", ours, second), ("first", theirs, first)):
        if other in line:
            back = line.index(other)
            child = "first" if name == "second" else "second"
            return f"the {name} is the parent of the {child}" if back == 1 else f"the {child} comes from the {name}"
    common = next((each for each in ours[1:] if each in theirs), "")
    if not common:
        return ""
    both = ours.index(common) == theirs.index(common) == 1
    return f"both have the parent {common[:12]}" if both else f"both come from {common[:12]}"


def _lineage(manifests: dict[str, SnapshotManifest], identifier: str) -> Iterator[str]:
    """It, its parent, and so on."""
    seen: set[str] = set()
    while identifier and identifier not in seen:
        seen.add(identifier)
        yield identifier
        manifest = manifests.get(identifier)
        identifier = manifest.parent.hex() if manifest is not None else ""
