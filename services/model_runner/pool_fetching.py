"""Fetching: a prompt's first blocks from this node's store and from a peer, put together, in time or not at all."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from typing import NamedTuple

from edge.pool_store import Held, chunk_indexes
from protocol.errors import BlobError, MindstreamError, SnapshotRefused, StorageError
from protocol.group_key import GroupKey
from protocol.layout import BLOCK_TOKENS
from protocol.pool import PoolEntry, SignedPoolEntry, entry_id, judge, open_entry
from services.model_runner import pool_blocks
from services.model_runner.engine import LayerState
from services.model_runner.pool_blocks import Place
from services.model_runner.pool_peers import PoolPeers
from services.model_runner.pool_site import Site

log = logging.getLogger(__name__)


class Plan(NamedTuple):
    """What of a prompt could be fetched, and from whom."""

    places: list[Place]
    names: list[list[bytes]]
    """Of each block, one for every group key."""
    have_tokens: int
    """At the prompt's beginning, in memory already."""
    local: int
    """So many blocks are in this node's own store."""
    holder: str
    """Who has the others; empty: nobody."""
    blocks: int
    """In all."""
    expected_s: float
    deadline_s: float


class Taken(NamedTuple):
    """The beginning of a prompt, from the pool."""

    layers: list[LayerState]
    tokens: int
    how: str
    """``exact`` or ``close``."""
    sources: list[str]
    """The nodes that had read it."""
    foreign: bool
    """Whether another node's word was taken for any of it."""


class Found(NamedTuple):
    """An entry that may be used, and where its chunks are."""

    signed: SignedPoolEntry
    entry: PoolEntry
    key: GroupKey
    held: Held | None
    """None: at the holder of the plan."""


class Fetched(NamedTuple):
    """A peer's entries that were used."""

    node: str
    bundle: str
    given: list[SignedPoolEntry]
    """All of the bundle."""
    used: list[Found]
    chunks: dict[bytes, bytes]
    """By their digests: not all of what was used, but what was needed of it."""

    @property
    def size_bytes(self) -> int:
        """Of these chunks."""
        return sum(map(len, self.chunks.values()))


class _Lost(Exception):
    """A block cannot be had after all."""

    def __init__(self, block: int, reason: str) -> None:
        super().__init__(reason)
        self.block = block


class Fetching:
    """Carries plans out, on threads of its own.

    Args:
        fetched: called with what came from a peer and was used, so that it can be kept.
    """

    def __init__(self, site: Site, peers: PoolPeers, fetched: Callable[[Fetched], None]) -> None:
        self._site = site
        self._peers = peers
        self._fetched = fetched
        self._threads = ThreadPoolExecutor(2, "pool fetcher")

    def stop(self) -> None:
        """Begin nothing more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def fetch(self, plan: Plan) -> Future[Taken | None]:
        """What the plan promised; None when it could not be had in time."""
        result: Future[Taken | None] = Future()
        late = threading.Timer(plan.deadline_s, self._late, (result,))
        late.daemon = True
        late.start()
        try:
            self._threads.submit(self._fetch, plan, result)
        except RuntimeError:  # the service ends
            _settle(result, None)
        result.add_done_callback(lambda _: late.cancel())
        return result

    def _late(self, result: Future[Taken | None]) -> None:
        if _settle(result, None):
            self._site.count("pool.late")

    def _fetch(self, plan: Plan, result: Future[Taken | None]) -> None:
        taken: Taken | None = None
        try:
            taken = self._take(plan, result)
        except (MindstreamError, OSError) as error:
            self._site.count("failed.pool_fetch")
            log.info("nothing came from the pool: %s", error)
        except Exception:
            self._site.count("failed.pool_fetch")
            log.exception("fetching from the pool")
        if _settle(result, taken):
            self._site.count("pool.hits" if taken is not None else "pool.misses")

    def _take(self, plan: Plan, result: Future[Taken | None]) -> Taken | None:
        engine = self._site.engine
        started_s = time.monotonic()
        found = self._local(plan)
        bundle = ""
        given: list[SignedPoolEntry] = []
        if plan.holder and len(found) == plan.local:
            names = [self._peers.name_at(plan.holder, names) or names[0] for names in plan.names[plan.local :]]
            asked_s = time.monotonic()
            answer = self._peers.ask_entries(plan.holder, names, plan.deadline_s)
            self._site.rates.asked(plan.holder, time.monotonic() - asked_s)
            bundle, given = answer.bundle, answer.entries
            found += self._of_peer(plan, given)
        blocks = len(found)
        while blocks * BLOCK_TOKENS > plan.have_tokens and not result.done():
            left_s = plan.deadline_s - (time.monotonic() - started_s)
            try:
                layers, chunks = self._load(plan, found[:blocks], bundle, given, left_s)
            except _Lost as lost:
                log.info("block %d of a prompt could not be had from the pool: %s", lost.block, lost)
                blocks = lost.block
                continue
            used = found[:blocks]
            for each in used:
                if each.held is not None:
                    self._site.store.used(each.held)
            if chunks:
                self._fetched(Fetched(plan.holder, bundle, given, [each for each in used if each.held is None], chunks))
            exact = all(each.entry.fingerprint == engine.fingerprint for each in used)
            sources = sorted({each.entry.creator for each in used})
            foreign = any(not self._own_word(each) for each in used)
            return Taken(layers, blocks * BLOCK_TOKENS, "exact" if exact else "close", sources, foreign)
        return None

    def _own_word(self, found: Found) -> bool:
        """Whether this node has read the entry's prefix itself."""
        return found.entry.creator == self._site.node or self._site.node in self._site.store.said_by(
            entry_id(found.signed)
        )

    def _local(self, plan: Plan) -> list[Found]:
        """Of each block the best entry here, as far as there are any that may be used."""
        found: list[Found] = []
        for place, names in zip(plan.places[: plan.local], plan.names, strict=False):
            here: list[tuple[SignedPoolEntry, Held | None]] = []
            for held in (each for name in names for each in self._site.store.of_name(name)):
                with contextlib.suppress(BlobError):
                    here.append((self._site.store.signed(held), held))
            best = self._best(place, here)
            if best is None:
                break
            found.append(best)
        return found

    def _of_peer(self, plan: Plan, given: Sequence[SignedPoolEntry]) -> list[Found]:
        found: list[Found] = []
        opened: dict[bytes, list[tuple[SignedPoolEntry, Held | None]]] = {}
        keyring = self._site.keyring()
        for signed in given:
            try:
                opened.setdefault(open_entry(signed, keyring).name, []).append((signed, None))
            except MindstreamError as error:
                self._site.refused(error)
        for place, names in zip(plan.places[plan.local :], plan.names[plan.local :], strict=True):
            best = self._best(place, [each for name in names for each in opened.get(name, ())])
            if best is None:
                break
            found.append(best)
        return found

    def _best(self, place: Place, entries: Sequence[tuple[SignedPoolEntry, Held | None]]) -> Found | None:
        """The entry of a block to be used: exact before close, this node's own before others, then by witnesses."""
        engine = self._site.engine
        keyring = self._site.keyring()
        best: tuple[tuple[bool, bool, int], Found] | None = None
        for signed, held in entries:
            try:
                entry = open_entry(signed, keyring)
                key = self._site.keys.by_id(entry.key_id)
                if key is None:
                    continue
                pool_blocks.check_entry(engine.spec, entry, place, key)
            except MindstreamError as error:
                self._site.refused(error)
                continue
            exact = entry.fingerprint == engine.fingerprint
            if not exact and self._site.config.accept == "exact":
                continue
            said = self._site.witnesses(signed)
            fine, _ = judge(entry.creator, self._site.node, said, self._site.config.trust, self._site.config.quorum)
            if not fine:
                continue
            rank = exact, entry.creator == self._site.node, sum(each.agrees for each in said)
            if best is None or rank > best[0]:
                best = rank, Found(signed, entry, key, held)
        return best[1] if best is not None else None

    def _load(
        self, plan: Plan, found: Sequence[Found], bundle: str, given: Sequence[SignedPoolEntry], left_s: float
    ) -> tuple[list[LayerState], dict[bytes, bytes]]:
        """The layers after these blocks, and the chunks that came from the peer. Raises _Lost."""
        engine = self._site.engine
        spec, blocks = engine.spec, len(found)
        kinds = [pool_blocks.needed(spec, block, blocks) for block in range(blocks)]
        indexes = [chunk_indexes(each.entry, kind) for each, kind in zip(found, kinds, strict=True)]
        arrived: dict[bytes, bytes] = {}
        first = next((block for block, each in enumerate(found) if each.held is None), None)
        if first is not None:
            wanted = [
                each.entry.chunks[index].digest
                for each, own in zip(found, indexes, strict=True)
                if each.held is None
                for index in own
            ]
            entries = [open_entry(signed, self._site.keyring()) for signed in given]
            started_s = time.monotonic()
            try:
                arrived = self._peers.pull(plan.holder, bundle, entries, wanted, max(0.05, left_s))
            except MindstreamError as error:
                raise _Lost(first, str(error)) from error
            self._site.rates.came(plan.holder, sum(map(len, arrived.values())), time.monotonic() - started_s)
        assembly = pool_blocks.Assembly(spec, blocks)
        local_bytes, local_s = 0, 0.0
        for block, (each, own) in enumerate(zip(found, indexes, strict=True)):
            started_s = time.monotonic()
            try:
                if each.held is not None:
                    chunks = self._site.store.chunks(each.held, each.entry, own)
                else:
                    chunks = [arrived[each.entry.chunks[index].digest] for index in own]
                raw = pool_blocks.open_block(spec, each.entry, plan.places[block], each.key, kinds[block], chunks)
            except SnapshotRefused as error:
                self._site.refused(error)
                if each.held is not None:
                    self._site.store.remove(each.held)
                raise _Lost(block, str(error)) from error
            except (BlobError, StorageError) as error:
                raise _Lost(block, str(error)) from error
            assembly.take(block, raw)
            if each.held is not None:
                local_bytes += sum(map(len, chunks))
                local_s += time.monotonic() - started_s
        if local_bytes:
            self._site.rates.came("", local_bytes, local_s)
        return assembly.layers(), arrived


def _settle(result: Future[Taken | None], value: Taken | None) -> bool:
    """Whether it was not settled before."""
    try:
        result.set_result(value)
    except InvalidStateError:
        return False
    return True
