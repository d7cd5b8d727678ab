"""The snapshots of this node's disk, as commands find and describe them."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from edge.snapshot_store import SnapshotStore
    from protocol.identity import Identity, Keyring
    from protocol.manifest import SnapshotManifest


class Held(NamedTuple):
    """This node's store, and whom it trusts."""

    store: SnapshotStore
    identity: Identity
    keyring: Keyring

    def find(self, named: str) -> str:
        """The id of what somebody calls ``ID``, its first digits, ``CONVERSATION@LABEL``, or ``CONVERSATION``: of that
        the newest snapshot. Raises NotFound, or BlobError when several ids begin so."""
        from protocol.errors import NotFound

        conversation, at, label = named.rpartition("@") if "@" in named else (named, "", "")
        if not at:
            try:
                return self.store.find(named)
            except NotFound as error:
                missing = error
        newest = max(
            (
                (manifest.created_us, identifier)
                for identifier, manifest in self.manifests().items()
                if manifest.conversation == conversation and (not at or manifest.label == label)
            ),
            default=None,
        )
        if newest is not None:
            return newest[1]
        if not at:
            raise missing
        raise NotFound(
            f"looking for snapshot {label[:80]!r} of {conversation[:80]}: this node does not hold it",
            hint=f"`mindstream snapshot timeline {conversation[:80]}` shows those that it holds",
            field="snapshot",
        )

    def manifests(self) -> dict[str, SnapshotManifest]:
        """Those that can be used, by id."""
        from protocol.errors import MindstreamError
        from protocol.manifest import open_manifest

        found = {}
        for identifier in self.store.identifiers():
            try:
                found[identifier] = open_manifest(self.store.manifest(identifier), self.keyring)
            except MindstreamError:
                continue  # `list` says why
        return found


def held() -> Held:
    """This node's."""
    from edge.cli.context import load
    from edge.keys import Peers, load_or_create_identity
    from edge.snapshot_store import SnapshotStore

    config = load()
    folder = config.node.folder()
    identity = load_or_create_identity(folder, config.node.name)
    return Held(SnapshotStore(folder / "model_runner" / "snapshots"), identity, Peers(folder, identity).keyring())


def summary(manifest: SnapshotManifest) -> dict[str, Any]:
    """What every command says of a snapshot."""
    return {
        "conversation": manifest.conversation,
        "label": manifest.label,
        "model": manifest.model,
        "tokens": manifest.cached_tokens + 1,
        "kept_tokens": manifest.kept_tokens,
        "codec": f"{manifest.codec.name} {manifest.codec.version}",
        "creator": manifest.creator,
        "created_us": manifest.created_us,
        "size_bytes": manifest.total_bytes,
    }


def fidelity(manifest: SnapshotManifest) -> str:
    """In words, as its certificate says."""
    found = manifest.certificate
    if found is None:
        return "exact" if manifest.codec.name in ("raw", "lossless") else "no certificate"
    return said_fidelity(found.tested_tokens, found.mean_kl, found.top1, found.measured)


def said_fidelity(tested_tokens: int, mean_kl: float | None, top1: float | None, measured: list[str]) -> str:
    """A certificate in words."""
    figures = [("mean KL {:.4f} nats", "mean_kl", mean_kl), ("top-1 agreement {:.3f}", "top1", top1)]
    said = [
        text.format(value) + (" (measured)" if name in measured else " (the codec's usual)")
        for text, name, value in figures
        if value is not None
    ]
    return f"{', '.join(said) or 'nothing measured'} over {tested_tokens:,} tokens"


def local_time(time_us: int) -> str:
    """As this machine's clock shows it."""
    when = datetime.datetime.fromtimestamp(time_us / 1e6, datetime.timezone.utc)
    return when.astimezone().strftime("%Y-%m-%d %H:%M:%S")
