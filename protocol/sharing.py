"""Who may read a snapshot: it is opened with the reader's own keys, and its key wrapped again for a node that asks.

``open_snapshot`` is the one way in from bytes that others sent: signature, form, provenance, key, and then what only
readers see. Nothing is allocated for its chunks meanwhile.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from protocol.errors import MindstreamError, SnapshotRefused
from protocol.identity import Identity, Keyring
from protocol.manifest import (
    MAX_BESIDE_BYTES,
    PrivatePart,
    SignedManifest,
    SnapshotManifest,
    open_manifest,
    open_private,
    snapshot_id,
)
from protocol.provenance import Proven, read_chain
from protocol.sealing import DataKey, SignedWrap, read_wrap, unwrap_key, wrap_key

GROUP_PREFIX = "group/"


class Opened(NamedTuple):
    """A snapshot that holds together, without its chunks."""

    manifest: SnapshotManifest
    private: PrivatePart
    key: DataKey
    provenance: list[Proven]


def open_snapshot(signed: SignedManifest, identifier: str, identity: Identity, keyring: Keyring) -> Opened:
    """The snapshot that was asked for as ``identifier``, for ``identity`` to read.

    Raises SnapshotRefused, MalformedMessage, UnknownPeer or BadSignature, each with the field.
    """
    if snapshot_id(signed) != identifier:
        raise SnapshotRefused(
            f"opening snapshot {identifier[:12]}: the manifest is another one",
            hint="fetch it from another holder",
            field="snapshot",
            reason="digest mismatch",
        )
    manifest = open_manifest(signed, keyring)
    provenance = read_chain(signed.provenance, bytes.fromhex(identifier), manifest.creator, keyring)
    key = key_of(signed, manifest, identity, keyring)
    return Opened(manifest, open_private(manifest, key), key, provenance)


def key_of(signed: SignedManifest, manifest: SnapshotManifest, identity: Identity, keyring: Keyring) -> DataKey:
    """The data key of a snapshot, as ``identity`` may have it. Raises SnapshotRefused."""
    only_by = manifest.creator if manifest.sharing == "creator" else ""
    return unwrap_key(signed.wraps, manifest.key_id, [identity.sealing], keyring, only_by=only_by)


def share(signed: SignedManifest, asker: str, identity: Identity, keyring: Keyring) -> SignedManifest:
    """What a node that asks for a snapshot is sent: the signed bytes, its provenance, the wraps for it and for groups.

    The key is wrapped for the asker now, where this node holds it, may share it, and trusts the asker; else it is sent
    what others wrapped for it. An asker that gets no wrap can fetch the chunks and not read them.
    """
    found = [(each, read_wrap(each)) for each in signed.wraps]
    asker_key = keyring.sealing_keys.get(asker)
    own = [each for each, wrap in found if wrap and wrap.recipient == asker]
    groups = [each for each, wrap in found if wrap and wrap.recipient.startswith(GROUP_PREFIX)]
    if asker_key is not None:
        own = _wrap(signed, asker, asker_key, identity, keyring) or own
    sent = SignedManifest(signed.manifest, signed.signature, [*own, *groups], signed.provenance)
    while sent.wraps and len(msgspec.msgpack.encode((sent.wraps, sent.provenance))) > MAX_BESIDE_BYTES:
        sent.wraps.pop()
    return sent


def _wrap(
    signed: SignedManifest, asker: str, asker_key: bytes, identity: Identity, keyring: Keyring
) -> list[SignedWrap]:
    """For the asker; empty where this node does not hold the key, or may not share it."""
    try:
        manifest = open_manifest(signed, keyring)
        if manifest.sharing == "creator" and manifest.creator != identity.node:
            return []
        return [wrap_key(identity, key_of(signed, manifest, identity, keyring), asker, asker_key)]
    except MindstreamError:
        return []
