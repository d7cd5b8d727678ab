"""The points of a conversation that it can return to: its snapshots on this node, read from their manifests.

Nothing is kept beside the snapshots themselves, so there is nothing that could disagree with them. A snapshot that
cannot be read is left out and counted.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from edge.keys import Peers
from edge.snapshot_store import SnapshotStore
from protocol.errors import MindstreamError, NotFound
from protocol.identity import Identity
from protocol.layout import ChunkRef
from protocol.manifest import SnapshotManifest, open_manifest, open_private
from protocol.messages import SnapshotMoment, SnapshotTimeline, TokenChance
from protocol.sealing import DataKey
from protocol.sharing import key_of, known_to_others
from services.model_runner.moments import Kept, Moment
from services.model_runner.saving import Extra, read_extra

MOST_SHOWN = 1000
TEXT_CHARACTERS = 200
_TEXT_TOKENS = 64
_CACHED = 4096

Decode = Callable[[list[int]], str]


class Point(NamedTuple):
    """One snapshot, as far as it does not change."""

    identifier: str
    conversation: str
    parent: str
    created_us: int
    tokens: int
    label: str
    codec: str
    creator: str
    key_id: bytes
    size_bytes: int
    chunks: frozenset[ChunkRef]
    automatic: bool
    moment: Moment | None
    text: list[int] | None
    """The last tokens, the pending one among them; None where this node has not the key."""

    @property
    def kept(self) -> Kept:
        """As thinning sees it."""
        weight = self.moment.weight if self.moment is not None else 0.01
        chunks = frozenset((chunk.digest, chunk.size_bytes) for chunk in self.chunks)
        return Kept(self.identifier, self.conversation, self.tokens, weight, self.created_us, chunks)


class Timeline:
    """Reads the store. Used from any thread."""

    def __init__(self, store: SnapshotStore, identity: Identity, peers: Peers) -> None:
        self._store = store
        self._identity = identity
        self._peers = peers
        self._lock = threading.Lock()
        self._known: dict[str, Point] = {}

    def points(self, conversation: str = "") -> list[Point]:
        """Of a conversation, or of all, the oldest first. Raises StorageError."""
        found = [point for point in map(self._point, self._store.identifiers()) if point is not None]
        found.sort(key=lambda point: (point.created_us, point.tokens))
        return [point for point in found if conversation in ("", point.conversation)]

    def lineage(self, conversation: str, parent_id: str = "") -> list[Point]:
        """The points of a conversation and, before them, those that it was branched from, by their parents;
        ``parent_id`` is that of the conversation as it is now, which may not have been saved since."""
        everything = {point.identifier: point for point in self.points()}
        found = {point.identifier: point for point in everything.values() if point.conversation == conversation}
        for identifier in (parent_id, *(point.parent for point in found.values())):
            parent = everything.get(identifier)
            while parent is not None and parent.identifier not in found:
                found[parent.identifier] = parent
                parent = everything.get(parent.parent)
        return sorted(found.values(), key=lambda point: (point.created_us, point.tokens))

    def labelled(self, conversation: str, label: str) -> str:
        """The id of a conversation's newest snapshot of that label. Raises NotFound."""
        points = [point for point in self.points(conversation) if point.label == label]
        if not points:
            raise not_labelled(conversation, label, self._identity.node)
        return points[-1].identifier

    def ask(self, conversation: str, decode: Decode | None, parent_id: str = "") -> SnapshotTimeline:
        """What is answered to who asks for a timeline; without ``decode`` (there is no model) no texts; ``parent_id``
        as of ``lineage``."""
        points = self.lineage(conversation, parent_id)
        holders: Counter[bytes] = Counter()
        for point in self.points():
            holders.update(chunk.digest for chunk in point.chunks)
        return SnapshotTimeline(
            conversation, [_moment(point, conversation, holders, decode) for point in points[-MOST_SHOWN:]]
        )

    def key_was_shared(self, conversation: str, key: DataKey) -> bool:
        """Whether a checkpoint of key moments of this conversation was given to a node that is not trusted (any more).
        The conversation's parent is looked at by whoever saves."""
        keyring = self._peers.keyring()
        for point in self.points(conversation):
            if point.automatic and point.key_id == key.id:
                try:
                    if known_to_others(self._store.manifest(point.identifier), key.id, keyring):
                        return True
                except MindstreamError:
                    continue
        return False

    def _point(self, identifier: str) -> Point | None:
        with self._lock:
            known = self._known.get(identifier)
        if known is not None:
            return known
        try:
            signed = self._store.manifest(identifier)
            keyring = self._peers.keyring()
            manifest = open_manifest(signed, keyring)
        except MindstreamError:
            return None
        tokens: list[int] | None = None
        extra = Extra([], 0)
        try:
            private = open_private(manifest, key_of(signed, manifest, self._identity, keyring))
            extra = read_extra(manifest, private)
            tokens = memoryview(private.tokens).cast("I").tolist()[-_TEXT_TOKENS:]
        except MindstreamError:
            pass  # its place in the timeline is known all the same
        point = _point(identifier, manifest, len(signed.manifest), extra.moment, tokens)
        with self._lock:
            if len(self._known) >= _CACHED:
                self._known.clear()
            if tokens is not None:  # else its key may still come
                self._known[identifier] = point
        return point


def not_labelled(conversation: str, label: str, node: str) -> NotFound:
    """For a label that no snapshot has."""
    return NotFound(
        f"looking for {conversation}@{label[:80]}: {node} holds no snapshot of that label",
        hint=f"`mindstream snapshot timeline {conversation}` shows its checkpoints",
        field="source",
    )


def _point(
    identifier: str, manifest: SnapshotManifest, manifest_bytes: int, moment: Moment | None, text: list[int] | None
) -> Point:
    return Point(
        identifier,
        manifest.conversation,
        manifest.parent.hex(),
        manifest.created_us,
        manifest.cached_tokens + 1,
        manifest.label,
        manifest.codec.name,
        manifest.creator,
        manifest.key_id,
        manifest.total_bytes + manifest_bytes,
        frozenset(manifest.chunks),
        manifest.automatic,
        moment,
        text,
    )


def _moment(point: Point, conversation: str, holders: Counter[bytes], decode: Decode | None) -> SnapshotMoment:
    moment = point.moment
    own_bytes = sum(chunk.size_bytes for chunk in point.chunks if holders[chunk.digest] == 1)
    text = decode(point.text)[-TEXT_CHARACTERS:] if decode is not None and point.text else ""
    return SnapshotMoment(
        snapshot=point.identifier,
        conversation="" if point.conversation == conversation else point.conversation,
        time_us=point.created_us,
        tokens=point.tokens,
        label=point.label,
        why=moment.why if moment is not None else "asked",
        surprise=moment.surprise if moment is not None else None,
        salience=moment.salience if moment is not None else None,
        entropy=moment.entropy if moment is not None else None,
        logprob=moment.logprob if moment is not None else None,
        alternatives=[
            TokenChance(each.token, decode([each.token]) if decode is not None else "", each.logprob)
            for each in (moment.alternatives if moment is not None else ())
        ],
        codec=point.codec,
        size_bytes=point.size_bytes,
        own_bytes=own_bytes,
        text=text,
        parent=point.parent,
    )
