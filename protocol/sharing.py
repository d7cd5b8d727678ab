"""Who may read a snapshot: it is opened with the reader's own keys, and its key wrapped again for a node that asks.

``open_snapshot`` is the one way in from bytes that others sent: signature, form, provenance, key, and then what only
readers see. Nothing is allocated for its chunks meanwhile.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from protocol.errors import MindstreamError, SnapshotRefused, TrustError
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
from protocol.sealing import MAX_WRAPS, DataKey, SignedWrap, read_wrap, unwrap_key, wrap_key

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


def known_to_others(signed: SignedManifest, key_id: bytes, keyring: Keyring) -> bool:
    """Whether somebody has the key of ``signed`` whom this node does not trust any more: a reader for whom it was
    wrapped, with the sealing key of then, or its creator. What is saved next then wants another key."""
    try:
        open_manifest(signed, keyring)
    except TrustError:
        return True
    trusted = keyring.sealing_keys
    wraps = [wrap for wrap in map(read_wrap, signed.wraps) if wrap is not None and wrap.key_id == key_id]
    return any(
        trusted.get(wrap.recipient) != wrap.recipient_key
        for wrap in wraps
        if not wrap.recipient.startswith(GROUP_PREFIX)
    )


def wrap_for_all(identity: Identity, key: DataKey, keyring: Keyring) -> list[SignedWrap]:
    """``key`` for this node, and for every node that it trusts and whose sealing key it knows."""
    others = sorted((node, public) for node, public in keyring.sealing_keys.items() if node != identity.node)
    readers = [(identity.node, identity.sealing.public_key), *others]
    return [wrap_key(identity, key, node, public_key) for node, public_key in readers[:MAX_WRAPS]]


def share(signed: SignedManifest, asker: str, identity: Identity, keyring: Keyring) -> Shared:
    """What a node that asks for a snapshot is sent, and what is to be kept of that.

    It is sent the signed bytes, their provenance, and the wraps for it and for groups. The key is wrapped for the asker
    now, where this node holds it, may share it, and trusts the asker; else it is sent what others wrapped for it. An
    asker that gets no wrap can fetch the chunks and not read them.
    """
    found = [(each, read_wrap(each)) for each in signed.wraps]
    asker_key = keyring.sealing_keys.get(asker)
    own = [each for each, wrap in found if wrap and wrap.recipient == asker]
    groups = [each for each, wrap in found if wrap and wrap.recipient.startswith(GROUP_PREFIX)]
    new: list[SignedWrap] = []
    if asker_key is not None:
        new = _wrap(signed, asker, asker_key, identity, keyring)
    sent = SignedManifest(signed.manifest, signed.signature, [*(new or own), *groups], signed.provenance)
    while sent.wraps and len(msgspec.msgpack.encode((sent.wraps, sent.provenance))) > MAX_BESIDE_BYTES:
        sent.wraps.pop()
    has = any(wrap and (wrap.recipient, wrap.recipient_key) == (asker, asker_key) for _, wrap in found)
    if new and not has and len(signed.wraps) < MAX_WRAPS:
        return Shared(sent, msgspec.structs.replace(signed, wraps=[*signed.wraps, *new]))
    return Shared(sent, None)


class Shared(NamedTuple):
    """A snapshot that another node asked for."""

    sent: SignedManifest
    kept: SignedManifest | None
    """With the asker among its readers: to be stored, so that it is known who has the key. None: it was already."""


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
