"""The pool between nodes: what each announces, entries asked for and given, and the site's group key passed on.

Announcements are made with the group key (``protocol.group_key``): who has it knows which blocks a peer holds without
asking anybody; who has not learns how many there are. Entries are asked for by name, their chunks are pulled like a
snapshot's, in one transfer for all of them.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from edge.blobs import BlobReceiver
from edge.bus import Bus
from edge.group_keys import GroupKeys
from edge.mailbox import Mailbox
from edge.pool_store import Held, PoolStore
from edge.service import Context
from protocol import messages
from protocol.codec import Received
from protocol.errors import AskExpired, BlobError, MindstreamError, StorageError, UnknownPeer
from protocol.group_key import NAME_BYTES, SHORT_NAME_BYTES, GroupKey
from protocol.identity import digest
from protocol.layout import ChunkRef
from protocol.messages import (
    MAX_ANNOUNCED,
    GroupKeyAsk,
    PoolEntries,
    PoolEntriesAsk,
    PoolHave,
)
from protocol.pool import PoolEntry, SignedPoolEntry, entry_id, open_entry

log = logging.getLogger(__name__)

KEPT_BUNDLES = 64
MAX_REPLY_BYTES = 900_000
GROUP_KEY_TTL_MS = 3_000
"""A node that has not granted by then has none to give, or is away."""
AWAY_S = 30.0
"""A node that did not answer is not asked for entries for so long."""


class Announced(NamedTuple):
    """What a node has said that it holds."""

    key_id: bytes
    names: frozenset[bytes]
    before: frozenset[bytes] = frozenset()
    """What it had said before that. Left out now, it may be set aside, which who has read it may change."""


class Bundle:
    """The chunks of several entries here, one entry after another, for a peer that pulls them."""

    def __init__(self, store: PoolStore, entries: Sequence[tuple[Held, PoolEntry]]) -> None:
        self._store = store
        self._places = {
            ref.digest: (held, entry, index) for held, entry in entries for index, ref in enumerate(entry.chunks)
        }
        self.chunks: list[ChunkRef] = [ref for _, entry in entries for ref in entry.chunks]

    def has(self, ref: ChunkRef) -> bool:
        """Whether it is here still."""
        place = self._places.get(ref.digest)
        return place is not None and self._store.get(place[0].identifier) is not None

    def verified_chunk(self, ref: ChunkRef, _index: int) -> bytes | None:
        """A chunk's bytes; None when it is gone, or damaged. Raises StorageError."""
        held, entry, index = self._places[ref.digest]
        try:
            return self._store.chunks(held, entry, [index])[0]
        except BlobError:
            return None


class Arrived:
    """Where pulled chunks are put: in memory. What is not wanted counts as being there."""

    def __init__(self, chunks: list[ChunkRef], wanted: Iterable[bytes]) -> None:
        self.chunks = chunks
        self._wanted = frozenset(wanted)
        self.found: dict[bytes, bytes] = {}

    def has(self, ref: ChunkRef) -> bool:
        """Whether it need not be sent."""
        return ref.digest not in self._wanted or ref.digest in self.found

    def put_chunk(self, ref: ChunkRef, data: bytes | memoryview) -> None:
        """Keep a chunk that was verified."""
        self.found[ref.digest] = bytes(data)


class PoolPeers:
    """The pool's part that speaks with other nodes.

    Args:
        blob_bus: a connection of its own for chunks.
        wake: called when there is something to do on another thread than a handler's.
        stopping: whether the service ends.
    """

    def __init__(
        self,
        context: Context,
        bus: Bus,
        blob_bus: Bus,
        store: PoolStore,
        keys: GroupKeys,
        mailbox: Mailbox | None,
        wake: Callable[[], None],
        stopping: Callable[[], bool],
    ) -> None:
        self._context = context
        self._node = context.identity.node
        self._bus = bus
        self._store = store
        self._keys = keys
        self._wake = wake
        self._receiver = lambda target: BlobReceiver(
            bus,
            blob_bus,
            target,
            should_stop=stopping,
            what="pool entries",
            mend="let it read them again",
            mailbox=mailbox,
        )
        self._announced: dict[str, Announced] = {}
        self._away_until_s: dict[str, float] = {}
        self._bundles: OrderedDict[str, Bundle] = OrderedDict()
        self.no_key_of: set[str] = set()
        """Nodes whose announcements cannot be read yet: their group key is to be asked for."""
        self.news: set[str] = set()
        """Nodes that have announced something, to be compared with what was read here."""
        self._said: PoolHave | None = None

    # --- announcements --------------------------------------------------------------------------------------

    def hear(self, message: Received) -> None:
        """What another node holds now."""
        said: PoolHave = message.data
        if message.node == self._node or message.node not in self._context.peers.keyring():
            return
        names = (said.names[at : at + SHORT_NAME_BYTES] for at in range(0, len(said.names), SHORT_NAME_BYTES))
        last = self._announced.get(message.node)
        before = last.names if last is not None and last.key_id == said.key_id else frozenset[bytes]()
        self._announced[message.node] = Announced(said.key_id, frozenset(names), before)
        self._away_until_s.pop(message.node, None)
        if self._keys.by_id(said.key_id) is None:
            self.no_key_of.add(message.node)
        else:
            self.news.add(message.node)
        self._wake()

    def holders(self, names: Sequence[Sequence[bytes]], first: int) -> dict[str, int]:
        """Who holds the blocks from number ``first`` on without a gap, and up to which number (excluded).

        ``names`` are those of each block of a prompt, one for every group key that the entry may be sealed with.
        """
        found = {}
        now_s = time.monotonic()
        keyring = self._context.peers.keyring()
        for node, announced in tuple(self._announced.items()):
            key = self._keys.by_id(announced.key_id)
            if key is None or node not in keyring or self._away_until_s.get(node, 0.0) > now_s:
                continue
            stop = first
            while stop < len(names) and self._says(node, key, announced.names, names[stop]):
                stop += 1
            if stop > first:
                found[node] = stop
        return found

    def _says(self, node: str, key: GroupKey, said: frozenset[bytes], names: Sequence[bytes]) -> bytes | None:
        return next((name for name in names if key.short_name(node, name) in said), None)

    def name_at(self, node: str, names: Sequence[bytes], *, lately: bool = False) -> bytes | None:
        """By which of its ``names`` a node announced a block; None when it did not.

        ``lately``: also by what it announced before its last word.
        """
        announced = self._announced.get(node)
        key = self._keys.by_id(announced.key_id) if announced is not None else None
        if announced is None or key is None:
            return None
        return self._says(node, key, announced.names | announced.before if lately else announced.names, names)

    def announce(self, names: Sequence[bytes]) -> None:
        """Say what this node holds, if it is anything new. Raises MindstreamError."""
        key = self._keys.current()
        if key is None:
            return
        shorts = b"".join(sorted(key.short_name(self._node, name) for name in names[:MAX_ANNOUNCED]))
        have = PoolHave(key.id, shorts)
        if have != self._said and (shorts or self._said is not None):
            self._bus.say(have, timeout_s=5.0)
            self._said = have

    def say_again(self) -> None:
        """The broker may have lost what was said."""
        self._said = None

    # --- the group key --------------------------------------------------------------------------------------

    def grant(self, message: Received) -> messages.GroupKeys:
        """The group key for a node that asks. Raises UnknownPeer when it is not trusted."""
        ask: GroupKeyAsk = message.data
        peers = self._context.peers
        if message.node not in peers.keyring():
            raise UnknownPeer(
                f"granting the site's group key to {message.node}: it is not a trusted node",
                hint=f"run `mindstream keys trust {message.node} FINGERPRINT` here",
                field="node",
                reason="not trusted",
            )
        if ask.sealing_key:
            peers.learn_sealing_key(message.node, ask.sealing_key)
        return messages.GroupKeys(self._keys.grant(message.node))

    def ask_for_key(self, node: str) -> int:
        """Ask a node for the group key; how many versions of it were new. Blocks. Raises MindstreamError."""
        ask = GroupKeyAsk(self._context.identity.sealing_key)
        answer: messages.GroupKeys = self._bus.ask(node, ask, ttl_ms=GROUP_KEY_TTL_MS)
        self.no_key_of.discard(node)
        new = self._keys.take(answer.grants, node)
        self.news.add(node)
        return new

    def ensure_key(self) -> GroupKey:
        """The key for what is new. Before one is made, every trusted node is asked for its own. Blocks.

        Raises StorageError.
        """
        found = self._keys.current()
        if found is not None:
            return found
        ask = GroupKeyAsk(self._context.identity.sealing_key)
        nodes = sorted(self._context.peers.keyring().fingerprints.keys() - {self._node})
        asked = [(node, self._bus.ask_later(node, ask, ttl_ms=GROUP_KEY_TTL_MS)) for node in nodes]
        for node, answer in asked:
            try:
                self._keys.take(answer.result().grants, node)
            except StorageError:
                raise
            except MindstreamError as error:  # it is away, has no model runner, or does not trust this node
                log.info("%s grants no group key: %s", node, error)
        return self._keys.ensure()

    # --- entries --------------------------------------------------------------------------------------------

    def answer(self, message: Received) -> PoolEntries:
        """The entries of these names that this node holds, with what is said of them; reads files. Raises UnknownPeer.

        Those set aside too: the asker judges by what is said, and who has read the same can only speak for them when
        it sees them. Else the first to speak against an entry would have the last word.
        """
        ask: PoolEntriesAsk = message.data
        keyring = self._context.peers.keyring()
        if message.node not in keyring:
            raise UnknownPeer(
                f"giving pool entries to {message.node}: it is not a trusted node",
                hint=f"run `mindstream keys trust {message.node} FINGERPRINT` here",
                field="node",
                reason="not trusted",
            )
        found: list[tuple[Held, PoolEntry]] = []
        given: list[SignedPoolEntry] = []
        size_bytes = 0
        for at in range(0, len(ask.names) - NAME_BYTES + 1, NAME_BYTES):
            for held in self._store.of_name(ask.names[at : at + NAME_BYTES]):
                try:
                    signed = self._store.signed(held)
                    entry = open_entry(signed, keyring)
                except MindstreamError:
                    continue
                size_bytes += len(signed.entry) + sum(len(each.statement) + 100 for each in signed.witnesses) + 200
                if size_bytes > MAX_REPLY_BYTES:
                    break
                found.append((held, entry))
                given.append(signed)
        identifier = digest(*(bytes.fromhex(entry_id(signed)) for signed in given)).hex()
        self._bundles[identifier] = Bundle(self._store, found)
        self._bundles.move_to_end(identifier)
        while len(self._bundles) > KEPT_BUNDLES:
            self._bundles.popitem(last=False)
        return PoolEntries(given, identifier)

    def bundle(self, identifier: str) -> Bundle | None:
        """What was given under an id."""
        return self._bundles.get(identifier)

    def ask_entries(self, node: str, names: Sequence[bytes], timeout_s: float) -> PoolEntries:
        """The entries of these blocks that ``node`` holds. Blocks. Raises MindstreamError."""
        try:
            found: PoolEntries = self._bus.ask(
                node, PoolEntriesAsk(b"".join(names[: messages.MAX_POOL_BLOCKS])), ttl_ms=max(1, int(timeout_s * 1000))
            )
        except AskExpired:
            self._away_until_s[node] = time.monotonic() + AWAY_S
            raise
        return found

    def pull(
        self, node: str, bundle: str, entries: Sequence[PoolEntry], wanted: Iterable[bytes], timeout_s: float
    ) -> dict[bytes, bytes]:
        """The chunks with these digests, of a bundle of these ``entries``. Blocks. Raises MindstreamError."""
        arrived = Arrived([ref for entry in entries for ref in entry.chunks], wanted)
        self._receiver(arrived).pull(node, bundle, arrived, timeout_s=timeout_s)
        return arrived.found
