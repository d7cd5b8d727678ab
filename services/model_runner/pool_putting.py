"""Putting: what was read here is compared with what others have put in, and put in where nobody has."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from edge.pool_store import Held, chunk_indexes
from protocol.errors import BlobError, MindstreamError, SnapshotRefused, StorageError, TrustError
from protocol.group_key import GroupKey
from protocol.messages import MAX_POOL_BLOCKS
from protocol.pool import PoolEntry, SignedPoolEntry, entry_id, open_entry, read_witness, sign_entry
from services.model_runner import pool_blocks
from services.model_runner.codecs import RUNGS
from services.model_runner.pool_blocks import Place
from services.model_runner.pool_fetching import Fetched
from services.model_runner.pool_peers import PoolPeers
from services.model_runner.pool_site import CLOSE_TOLERANCE, Site

log = logging.getLogger(__name__)

ASK_S = 5.0
"""How long a peer may take to answer where nobody waits for it."""
PULL_S = 60.0
AGAIN_S = 30.0
"""A peer whose entries could not be compared is asked again after so long."""
MOST_SETTLED = 16_384
_COMPARABLE = ("digests", "fingerprint", "kv_dtype", "codec", "key_id", "block")
"""Fields of two entries that are equal where equal readings have equal bytes."""


class ReadBlock(NamedTuple):
    """A block that this node has read itself."""

    place: Place
    raw: dict[str, bytes]
    cost_ms: int
    since_s: float

    @property
    def size_bytes(self) -> int:
        """Of its parts."""
        return sum(map(len, self.raw.values()))


class Putting:
    """All on the pool's own thread, but for ``settled``."""

    def __init__(self, site: Site, peers: PoolPeers) -> None:
        self._site = site
        self._peers = peers
        self._settled: OrderedDict[bytes, frozenset[str]] = OrderedDict()
        """Addresses whose entries were compared with what was read here, and the peers that were asked for theirs."""
        self._audited: set[tuple[str, bytes]] = set()
        self._again_s: dict[str, float] = {}

    def settled(self, place: Place, names: Sequence[bytes]) -> bool:
        """Whether there is nothing to put in or to compare of a block. On any thread."""
        asked = self._settled.get(place.address)
        return asked is not None and asked >= self._peers.holders([names], 0).keys()

    def put(self, item: ReadBlock) -> None:
        """Compare what others have put in with what was read here, and put it in where nobody has."""
        key = self._peers.ensure_key()
        keys = self._site.keys.versions()
        names = [each.name(item.place.address) for each in keys]
        there = False
        for held in (each for name in names for each in self._site.store.of_name(name)):
            there |= self._compare_own(item, held)
        asked = frozenset(self._peers.holders([names], 0))
        for node in asked - self._settled.get(item.place.address, frozenset()):
            try:
                self._compare_with(item, node, names)
            except MindstreamError as error:
                log.info("%s's entries could not be compared: %s", node, error)
                asked -= {node}
                self._again_s[node] = time.monotonic() + AGAIN_S
        if not there:
            self._publish(item, key)
        self._settled[item.place.address] = asked
        while len(self._settled) > MOST_SETTLED:
            self._settled.popitem(last=False)

    def _compare_own(self, item: ReadBlock, held: Held) -> bool:
        def chunks(entry: PoolEntry, own: Sequence[int]) -> list[bytes]:
            return self._site.store.chunks(held, entry, own)

        try:
            return self._compare(item, self._site.store.signed(held), chunks)
        except BlobError:  # it is gone
            return False

    def _compare_with(self, item: ReadBlock, node: str, names: Sequence[bytes]) -> None:
        answer = self._peers.ask_entries(node, [self._peers.name_at(node, names) or names[0]], ASK_S)
        keyring = self._site.keyring()
        entries = [open_entry(signed, keyring) for signed in answer.entries]
        for signed in answer.entries:
            if self._site.store.get(entry_id(signed)) is not None:
                continue

            def chunks(entry: PoolEntry, own: Sequence[int]) -> list[bytes]:
                digests = [entry.chunks[index].digest for index in own]
                found = self._peers.pull(node, answer.bundle, entries, digests, PULL_S)
                return [found[each] for each in digests]

            self._compare(item, signed, chunks)

    def to_audit_again(self) -> list[str]:
        """Peers that did not answer ``audit``, and may now; each is said once."""
        now_s = time.monotonic()
        return [node for node, at_s in tuple(self._again_s.items()) if at_s <= now_s and self._again_s.pop(node)]

    def audit(self, node: str) -> None:
        """Compare what a peer announced with what this node read, and put in, before."""
        own: dict[bytes, PoolEntry] = {}
        keyring = self._site.keyring()
        for held in self._site.store.all():
            if (node, held.name) in self._audited or self._peers.name_at(node, [held.name], lately=True) is None:
                continue
            self._audited.add((node, held.name))
            with contextlib.suppress(BlobError, TrustError):
                entry = open_entry(self._site.store.signed(held), keyring)
                if entry.creator == self._site.node:
                    own[held.name] = entry
        if len(self._audited) > 4 * MOST_SETTLED:
            self._audited.clear()
        names = list(own)
        for at in range(0, len(names), MAX_POOL_BLOCKS):
            try:
                answer = self._peers.ask_entries(node, names[at : at + MAX_POOL_BLOCKS], ASK_S)
            except MindstreamError as error:
                log.info("%s's entries could not be compared: %s", node, error)
                self._audited -= {(node, name) for name in names[at:]}
                self._again_s[node] = time.monotonic() + AGAIN_S
                return
            for signed in answer.entries:
                identifier = entry_id(signed)
                with contextlib.suppress(MindstreamError):
                    entry = open_entry(signed, keyring)
                    mine = own.get(entry.name)
                    if (
                        mine is None
                        or entry.creator == self._site.node
                        or self._site.node in self._site.store.said_by(identifier)
                    ):
                        continue
                    if all(getattr(mine, field) == getattr(entry, field) for field in _COMPARABLE):
                        agrees = list(mine.parts()) == list(entry.parts())
                        self._site.bear_witness(identifier, agrees, "exact", 0.0 if agrees else float("inf"))

    def _compare(
        self,
        item: ReadBlock,
        signed: SignedPoolEntry,
        chunks: Callable[[PoolEntry, Sequence[int]], list[bytes]],
    ) -> bool:
        """Say of an entry whether it is what was read here; whether it is, and need not be put in again."""
        engine = self._site.engine
        identifier = entry_id(signed)
        try:
            entry = open_entry(signed, self._site.keyring())
            key = self._site.keys.by_id(entry.key_id)
            if key is None:
                return False
            pool_blocks.check_entry(engine.spec, entry, item.place, key)
        except MindstreamError as error:
            self._site.refused(error)
            return False
        exact = entry.fingerprint == engine.fingerprint
        here = self._site.store.get(identifier)
        if entry.creator == self._site.node or self._site.node in self._site.store.said_by(identifier):
            return exact and here is not None and not self._site.against(here)
        how, error_ = ("exact", 0.0) if exact else ("close", 0.0)
        if exact:
            own, _ = pool_blocks.seal_block(
                engine.spec, engine.fingerprint, item.raw, item.place, key=key, creator=self._site.node, created_us=0,
                cost_ms=0, codec=RUNGS[entry.codec.name](),
            )  # fmt: skip
            agrees = list(own.parts()) == list(entry.parts())
            error_ = 0.0 if agrees else float("inf")
        else:
            kinds = [kind for kind, _ in entry.parts()]
            try:
                found = chunks(entry, chunk_indexes(entry, kinds))
            except MindstreamError as error:
                log.info("an entry of %s could not be compared: %s", entry.creator, error)
                return False
            try:
                theirs = pool_blocks.open_block(engine.spec, entry, item.place, key, kinds, found)
                error_ = pool_blocks.difference(engine.spec, item.place.block, item.raw, theirs)
            except SnapshotRefused:
                error_ = float("inf")  # its creator signed what does not open, or is other than it says
            agrees = error_ <= CLOSE_TOLERANCE
        self._site.bear_witness(identifier, agrees, how, error_)
        return agrees and exact

    def _publish(self, item: ReadBlock, key: GroupKey) -> None:
        engine = self._site.engine
        if not self._site.rates.pays(item.size_bytes, item.cost_ms / 1000):
            self._site.count("pool.not_worth")
            return
        entry, chunks = pool_blocks.seal_block(
            engine.spec,
            engine.fingerprint,
            item.raw,
            item.place,
            key=key,
            creator=self._site.node,
            created_us=time.time_ns() // 1000,
            cost_ms=item.cost_ms,
            codec=RUNGS[self._site.config.codec](),
        )
        if self._store(sign_entry(self._site.identity, entry), entry, chunks):
            self._site.count("pool.put")

    def keep(self, item: Fetched) -> None:
        """Keep a peer's entries here as well, the parts that were not needed fetched too."""
        keyring = self._site.keyring()
        entries = [open_entry(signed, keyring) for signed in item.given]
        wanted = [ref.digest for each in item.used for ref in each.entry.chunks]
        missing = [each for each in wanted if each not in item.chunks]
        chunks = item.chunks
        if missing:
            chunks = {**chunks, **self._peers.pull(item.node, item.bundle, entries, missing, PULL_S)}
        for each in item.used:
            identifier = entry_id(each.signed)
            for statement in each.signed.witnesses:
                with contextlib.suppress(MindstreamError):
                    said = read_witness(statement, keyring)
                    if said.entry == identifier:
                        self._site.store.keep_statement(identifier, said.node, statement, instead=not said.agrees)
            if self._store(each.signed, each.entry, [chunks[ref.digest] for ref in each.entry.chunks]):
                self._site.count("pool.kept")

    def _store(self, signed: SignedPoolEntry, entry: PoolEntry, chunks: Sequence[bytes | bytearray]) -> bool:
        try:
            return self._site.store.put(signed, entry, chunks)
        except StorageError as error:
            self._site.count("failed.pool_put")
            self._site.report("pool-not-written", "warning", str(error))
            return False
