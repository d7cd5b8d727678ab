"""The pool in the runner: prompts whose beginning the site has read are fetched, what is read here is put in.

On the worker's thread stands what is quick: looking whether a prompt's blocks are here or announced by a peer
(``look``), and copying a block that was just read (``has_read``). Fetching has threads of its own and a deadline: a run
waits for it no longer than the cost model says that it saves. Sealing, writing, comparing and announcing are done by
one thread of low priority, when no run is under way.

**Trust.** What comes from the pool is its creator's word. A node that has read a prefix itself compares what it finds
in the pool with what it has, and says so in a signed statement: under an equal fingerprint the sealed parts must be
the same bytes, otherwise the numbers lie within ``CLOSE_TOLERANCE``. Where one disagrees, and no more stand by it, the
entry is set aside on every node that hears of it. Whoever has begun from another node's entries has not read the prefix itself: it
bears no witness, and puts nothing into the pool that rests on them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edge.bus import Bus
from edge.config import PoolConfig
from edge.group_keys import GroupKeys
from edge.pool_files import open_files
from edge.pool_store import Held, PoolStore, chunk_indexes
from edge.service import Context
from protocol.codec import Received
from protocol.errors import BlobError, MindstreamError, SnapshotRefused, StorageError, TrustError
from protocol.group_key import GroupKey
from protocol.layout import BLOCK_TOKENS
from protocol.manifest import prefix_addresses
from protocol.messages import MAX_POOL_BLOCKS, PoolWitness
from protocol.pool import (
    PoolEntry,
    SignedPoolEntry,
    Witness,
    entry_id,
    judge,
    open_entry,
    read_witness,
    read_witnesses,
    set_aside,
    sign_entry,
    witness,
)
from services.model_runner import pool_blocks
from services.model_runner.codecs import RUNGS
from services.model_runner.engine import Engine, KVCache, LayerState
from services.model_runner.memory import MIB
from services.model_runner.pool_blocks import Place
from services.model_runner.pool_peers import PoolPeers
from services.model_runner.pool_rates import PoolRates

log = logging.getLogger(__name__)

CLOSE_TOLERANCE = 0.1
"""Of readings under other numerics: so far may keys, values and states be apart, relative to their size (Frobenius
norms), in the worst layer. bfloat16 with other threads, chunks or instructions differs by some hundredths."""
MOST_QUEUED_BYTES = 256 * MIB
"""Blocks that were read and not yet put into the pool; what is beyond is not put."""
MOST_SETTLED = 16_384
ASK_S = 5.0
"""How long a peer may take to answer where nobody waits for it."""
WAIT_IDLE_S = 5.0
"""A block is put into the pool when no run is under way, or after so long."""
ANNOUNCE_S = 1.0
REFRESH_S = 15.0
"""So often it is looked what others have put into the folder, or under the URL."""
KEY_RETRY_S = 5.0
_COMPARABLE = ("digests", "fingerprint", "kv_dtype", "codec", "key_id", "block")
"""Fields of two entries that are equal where equal readings have equal bytes."""


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


class _Found(NamedTuple):
    """An entry that may be used, and where its chunks are."""

    signed: SignedPoolEntry
    entry: PoolEntry
    key: GroupKey
    held: Held | None
    """None: at the holder of the plan."""


class _Read(NamedTuple):
    """A block that this node has read itself."""

    place: Place
    raw: dict[str, bytes]
    cost_ms: int
    since_s: float

    @property
    def size_bytes(self) -> int:
        return sum(map(len, self.raw.values()))


class _Keep(NamedTuple):
    """Entries of a peer that were used, to be kept here as well."""

    node: str
    bundle: str
    given: list[SignedPoolEntry]
    """All of the bundle."""
    used: list[_Found]
    chunks: dict[bytes, bytes]

    @property
    def size_bytes(self) -> int:
        return sum(map(len, self.chunks.values()))


class _Lost(Exception):
    """A block cannot be had after all."""

    def __init__(self, block: int, reason: str) -> None:
        super().__init__(reason)
        self.block = block


class Pool:
    """One node's part in the site's pool.

    Args:
        folder: for its entries, where ``pool.url`` names no other place.
        node_folder: the node's data folder, which has its keys.
        idle: whether no run is under way.
        patience: how many times longer than expected a fetch may take, and never longer than reading.
    """

    def __init__(
        self,
        context: Context,
        bus: Bus,
        blob_bus: Bus,
        folder: Path,
        node_folder: Path,
        *,
        idle: Callable[[], bool],
        stopping: Callable[[], bool],
        patience: float = 2.0,
    ) -> None:
        self.config: PoolConfig = context.config.pool
        self._context = context
        self._identity = context.identity
        self._node = context.identity.node
        self._bus = bus
        self._idle = idle
        self._stopping = stopping
        self.patience = patience
        self._engine: Engine | None = None
        self._keys = GroupKeys(node_folder, context.identity, context.peers)
        files = open_files(self.config.url, folder)
        self.store = PoolStore(files, self.config.most_mib * MIB, self._dropped)
        self.store.set_aside_by(self._against)
        self._wake = threading.Condition()
        self.peers = PoolPeers(context, bus, blob_bus, self.store, self._keys, self._notify, stopping)
        self.rates = PoolRates()
        self._verdicts: dict[str, tuple[object, int, bool]] = {}
        self._settled: OrderedDict[bytes, frozenset[str]] = OrderedDict()
        """Addresses whose entries were compared with what was read here, and the peers that were asked for theirs."""
        self._queue: deque[_Read | _Keep] = deque()
        self._queued_bytes = 0
        self._threads = ThreadPoolExecutor(2, "pool fetcher")
        self._answers = ThreadPoolExecutor(1, "pool answerer")
        self._thread = threading.Thread(target=self._run, name="pool", daemon=True)
        self._announced_changes = -1
        self._next_refresh_s = self._next_announce_s = 0.0
        self._next_key_s: dict[str, float] = {}
        self._audited: set[tuple[str, bytes]] = set()
        self._unreachable = ""

    # --- life -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Connected: begin."""
        if self.config.enabled:
            self._thread.start()

    def stop(self) -> None:
        """Begin nothing more; what waits to be put in is let go: it is a cache."""
        self._notify()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._answers.shutdown(wait=False, cancel_futures=True)
        if self._thread.ident is not None:
            self._thread.join(10.0)

    def attach(self, engine: Engine) -> None:
        """The model is loaded."""
        self._engine = engine

    def reconnected(self) -> None:
        """The broker may have lost what was retained."""
        self.peers.say_again()
        self._announced_changes = -1
        self._notify()

    def details(self) -> dict[str, Any]:
        """For the service's state."""
        if not self.config.enabled:
            return {}
        entries, size_bytes = self.store.totals
        found: dict[str, Any] = {"pool_entries": entries, "pool_mib": round(size_bytes / MIB, 1)}
        if self._unreachable:
            found["pool_reason"] = self._unreachable
        return found

    @property
    def busy(self) -> bool:
        """Whether something waits to be put in or compared."""
        with self._wake:
            return bool(self._queue)

    # --- heard ----------------------------------------------------------------------------------------------

    def hear_witness(self, message: Received) -> None:
        """What another node says of an entry."""
        said: PoolWitness = message.data
        if not self.config.enabled or message.node == self._node:
            return
        try:
            found = read_witness(said.statement, self._context.peers.keyring())
        except (TrustError, SnapshotRefused) as error:
            self._count("refused.pool_witness")
            log.info("%s said of a pool entry what does not count: %s", message.node, error)
            return
        self._take_statement(found, said)

    def _take_statement(self, found: Witness, said: PoolWitness) -> None:
        if not self.store.keep_statement(found.entry, found.node, said.statement, instead=not found.agrees):
            return
        self._count("pool.witnessed" if found.agrees else "pool.disagreed")
        if not found.agrees:
            self._say_set_aside(found)

    def _say_set_aside(self, found: Witness) -> None:
        apart = f"{found.error:.3g} apart" if np.isfinite(found.error) else "other content"
        self._bus.events.report(
            "pool-set-aside",
            "error",
            f"pool entry {found.entry[:12]} is set aside: {found.node} has read the same prefix itself and found "
            f"otherwise ({found.how}, {apart})",
        )
        self._notify()

    def answer_entries(self, message: Received) -> Future[Any]:
        """Entries for a node that asks; files are read on a thread of their own."""
        return self._answers.submit(self.peers.answer, message)

    # --- on the worker's thread -----------------------------------------------------------------------------

    def look(self, tokens: Sequence[int], have_tokens: int) -> Plan | None:
        """What of a prompt could be fetched, where that is quicker than reading it. Reads no file.

        Args:
            tokens: the prompt, its last, pending one included.
            have_tokens: so many at its beginning need not be read anyway.
        """
        engine = self._engine
        blocks = (len(tokens) - 1) // BLOCK_TOKENS
        if not self.config.enabled or engine is None or blocks * BLOCK_TOKENS <= have_tokens:
            return None
        try:
            keys = self._keys.versions()
            if not keys:
                return None
            places = self._places(engine, tokens, blocks)
            names = [[key.name(place.address) for key in keys] for place in places]
            local = 0
            while local < blocks and self._here(names[local]):
                local += 1
            holders = {"": local, **(self.peers.holders(names, local) if local < blocks else {})}
        except MindstreamError as error:
            self._count("failed.pool_look")
            log.warning("looking into the pool: %s", error)
            return None
        best: Plan | None = None
        saved_s = 0.0
        for node, stop in holders.items():
            if stop * BLOCK_TOKENS <= have_tokens:
                continue
            own_bytes = pool_blocks.load_bytes(engine.spec, 0, min(local, stop))
            peer_bytes = pool_blocks.load_bytes(engine.spec, 0, stop) - own_bytes if node else 0
            expected_s = self.rates.load_s(own_bytes, node, peer_bytes)
            read_s = self.rates.read_s(have_tokens, stop * BLOCK_TOKENS)
            if read_s - expected_s > saved_s:
                saved_s = read_s - expected_s
                deadline_s = min(read_s, self.patience * expected_s + 0.25)
                best = Plan(places[:stop], names[:stop], have_tokens, local, node, stop, expected_s, deadline_s)
        return best

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

    def has_read(self, cache: KVCache, tokens: Sequence[int], seconds: float) -> None:
        """``cache`` ends with a block that was read here, as was all before it, in whole chunks. Raises nothing."""
        try:
            self._has_read(cache, tokens, seconds)
        except Exception as error:  # noqa: BLE001 - the run that was read for does not depend on it
            self._count("failed.pool_block")
            log.warning("a block is not put into the pool: %s: %s", type(error).__name__, error)

    def _has_read(self, cache: KVCache, tokens: Sequence[int], seconds: float) -> None:
        engine = self._engine
        block = cache.length // BLOCK_TOKENS - 1
        self.rates.has_read(block * BLOCK_TOKENS, cache.length, seconds)
        if not self.config.enabled or engine is None:
            return
        place = self._places(engine, tokens, block + 1)[-1]
        names = [key.name(place.address) for key in self._keys.versions()]
        asked = self._settled.get(place.address)
        if asked is not None and asked >= self.peers.holders([names], 0).keys() and self._here(names):
            return
        size = sum(pool_blocks.plain_bytes(engine.spec, block, kind) for kind in ("full", "sliding", "recurrent"))
        with self._wake:
            if self._queued_bytes + size > MOST_QUEUED_BYTES:
                self._count("dropped.pool_block")
                return
        raw = pool_blocks.cut_block(engine.spec, engine.export_layers(cache), block)
        item = _Read(place, raw, max(1, round(seconds * 1000)), time.monotonic())
        with self._wake:
            self._queue.append(item)
            self._queued_bytes += item.size_bytes
            self._wake.notify_all()

    def _places(self, engine: Engine, tokens: Sequence[int], blocks: int) -> list[Place]:
        count = blocks * BLOCK_TOKENS
        data = np.asarray(tokens[:count], dtype="<u4").tobytes()
        addresses = prefix_addresses(engine.spec.digests, data, count)[:-1]
        return [
            Place(block, address, addresses[block - 1] if block else b"") for block, address in enumerate(addresses)
        ]

    def _here(self, names: Iterable[bytes]) -> bool:
        return any(not self._against(held) for name in names for held in self.store.of_name(name))

    # --- fetching -------------------------------------------------------------------------------------------

    def _late(self, result: Future[Taken | None]) -> None:
        if _settle(result, None):
            self._count("pool.late")

    def _fetch(self, plan: Plan, result: Future[Taken | None]) -> None:
        taken: Taken | None = None
        try:
            taken = self._take(plan, result)
        except (MindstreamError, OSError) as error:
            self._count("failed.pool_fetch")
            log.info("nothing came from the pool: %s", error)
        except Exception:
            self._count("failed.pool_fetch")
            log.exception("fetching from the pool")
        if _settle(result, taken):
            self._count("pool.hits" if taken is not None else "pool.misses")

    def _take(self, plan: Plan, result: Future[Taken | None]) -> Taken | None:
        engine = self._engine
        assert engine is not None
        started_s = time.monotonic()
        found = self._local(plan)
        bundle = ""
        given: list[SignedPoolEntry] = []
        if plan.holder and len(found) == plan.local:
            names = [self.peers.name_at(plan.holder, names) or names[0] for names in plan.names[plan.local :]]
            asked_s = time.monotonic()
            answer = self.peers.ask_entries(plan.holder, names, plan.deadline_s)
            self.rates.asked(plan.holder, time.monotonic() - asked_s)
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
                    self.store.used(each.held)
            if chunks:
                self._later(_Keep(plan.holder, bundle, given, [each for each in used if each.held is None], chunks))
            exact = all(each.entry.fingerprint == engine.fingerprint for each in used)
            sources = sorted({each.entry.creator for each in used})
            foreign = any(not self._own_word(each) for each in used)
            return Taken(layers, blocks * BLOCK_TOKENS, "exact" if exact else "close", sources, foreign)
        return None

    def _own_word(self, found: _Found) -> bool:
        """Whether this node has read the entry's prefix itself."""
        return found.entry.creator == self._node or self._node in self.store.said_by(entry_id(found.signed))

    def _local(self, plan: Plan) -> list[_Found]:
        """Of each block the best entry here, as far as there are any that may be used."""
        found: list[_Found] = []
        for place, names in zip(plan.places[: plan.local], plan.names, strict=False):
            here: list[tuple[SignedPoolEntry, Held | None]] = []
            for held in (each for name in names for each in self.store.of_name(name)):
                with contextlib.suppress(BlobError):
                    here.append((self.store.signed(held), held))
            best = self._best(place, here)
            if best is None:
                break
            found.append(best)
        return found

    def _of_peer(self, plan: Plan, given: Sequence[SignedPoolEntry]) -> list[_Found]:
        found: list[_Found] = []
        opened: dict[bytes, list[tuple[SignedPoolEntry, Held | None]]] = {}
        keyring = self._context.peers.keyring()
        for signed in given:
            try:
                opened.setdefault(open_entry(signed, keyring).name, []).append((signed, None))
            except MindstreamError as error:
                self._refused(error)
        for place, names in zip(plan.places[plan.local :], plan.names[plan.local :], strict=True):
            best = self._best(place, [each for name in names for each in opened.get(name, ())])
            if best is None:
                break
            found.append(best)
        return found

    def _best(self, place: Place, entries: Sequence[tuple[SignedPoolEntry, Held | None]]) -> _Found | None:
        """The entry of a block to be used: exact before close, this node's own before others, then by witnesses."""
        engine = self._engine
        assert engine is not None
        keyring = self._context.peers.keyring()
        best: tuple[tuple[bool, bool, int], _Found] | None = None
        for signed, held in entries:
            try:
                entry = open_entry(signed, keyring)
                key = self._keys.by_id(entry.key_id)
                if key is None:
                    continue
                pool_blocks.check_entry(engine.spec, entry, place, key)
            except MindstreamError as error:
                self._refused(error)
                continue
            exact = entry.fingerprint == engine.fingerprint
            if not exact and self.config.accept == "exact":
                continue
            said = self._witnesses(signed)
            fine, _ = judge(entry.creator, self._node, said, self.config.trust, self.config.quorum)
            if not fine:
                continue
            rank = exact, entry.creator == self._node, sum(each.agrees for each in said)
            if best is None or rank > best[0]:
                best = rank, _Found(signed, entry, key, held)
        return best[1] if best is not None else None

    def _load(
        self, plan: Plan, found: Sequence[_Found], bundle: str, given: Sequence[SignedPoolEntry], left_s: float
    ) -> tuple[list[LayerState], dict[bytes, bytes]]:
        """The layers after these blocks, and the chunks that came from the peer. Raises _Lost."""
        engine = self._engine
        assert engine is not None
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
            entries = [open_entry(signed, self._context.peers.keyring()) for signed in given]
            started_s = time.monotonic()
            try:
                arrived = self.peers.pull(plan.holder, bundle, entries, wanted, max(0.05, left_s))
            except MindstreamError as error:
                raise _Lost(first, str(error)) from error
            self.rates.came(plan.holder, sum(map(len, arrived.values())), time.monotonic() - started_s)
        assembly = pool_blocks.Assembly(spec, blocks)
        local_bytes, local_s = 0, 0.0
        for block, (each, own) in enumerate(zip(found, indexes, strict=True)):
            started_s = time.monotonic()
            try:
                if each.held is not None:
                    chunks = self.store.chunks(each.held, each.entry, own)
                else:
                    chunks = [arrived[each.entry.chunks[index].digest] for index in own]
                raw = pool_blocks.open_block(spec, each.entry, plan.places[block], each.key, kinds[block], chunks)
            except SnapshotRefused as error:
                self._refused(error)
                if each.held is not None:
                    self.store.remove(each.held)
                raise _Lost(block, str(error)) from error
            except (BlobError, StorageError) as error:
                raise _Lost(block, str(error)) from error
            assembly.take(block, raw)
            if each.held is not None:
                local_bytes += sum(map(len, chunks))
                local_s += time.monotonic() - started_s
        if local_bytes:
            self.rates.came("", local_bytes, local_s)
        return assembly.layers(), arrived

    # --- verdicts -------------------------------------------------------------------------------------------

    def _witnesses(self, signed: SignedPoolEntry) -> list[Witness]:
        """What trusted nodes say of an entry: what came with it, and what was heard."""
        identifier = entry_id(signed)
        said = read_witnesses([*signed.witnesses, *self.store.statements(identifier)], self._context.peers.keyring())
        return [each for each in said if each.entry == identifier]

    def _against(self, held: Held) -> bool:
        """Whether an entry here is set aside."""
        said = self.store.statements(held.identifier)
        if not said:
            return False
        keyring = self._context.peers.keyring()
        known = self._verdicts.get(held.identifier)
        stamp = hash(tuple(each.signature for each in said))
        if known is None or known[0] is not keyring or known[1] != stamp:
            known = keyring, stamp, set_aside(held.creator, read_witnesses(said, keyring))
            if len(self._verdicts) > MOST_SETTLED:
                self._verdicts.clear()
            self._verdicts[held.identifier] = known
        return known[2]

    # --- on the pool's own thread ---------------------------------------------------------------------------

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify_all()

    def _later(self, item: _Keep) -> None:
        with self._wake:
            if self._queued_bytes + item.size_bytes <= MOST_QUEUED_BYTES:
                self._queue.append(item)
                self._queued_bytes += item.size_bytes
                self._wake.notify_all()

    def _run(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # of this thread alone, on Linux
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        while not self._stopping():
            try:
                self._housekeeping()
                item = self._next()
                if item is not None:
                    self._do(item)
            except (MindstreamError, OSError) as error:
                self._count("failed.pool")
                log.warning("the pool: %s", error)
            except Exception:
                self._count("failed.pool")
                log.exception("the pool")

    def _next(self) -> _Read | _Keep | None:
        """What is to be done next, once there is time for it; None after a second without."""
        with self._wake:
            if not self._queue:
                self._wake.wait(1.0)
            if not self._queue:
                return None
            first = self._queue[0]
            if isinstance(first, _Read) and not self._idle():
                wait_s = first.since_s + WAIT_IDLE_S - time.monotonic()
                if wait_s > 0:
                    self._wake.wait(min(0.1, wait_s))
                    return None
            return first

    def _do(self, item: _Read | _Keep) -> None:
        try:
            if isinstance(item, _Read):
                self._put(item)
            else:
                self._keep(item)
        finally:
            with self._wake:
                self._queue.popleft()
                self._queued_bytes -= item.size_bytes

    def _housekeeping(self) -> None:
        now_s = time.monotonic()
        if now_s >= self._next_refresh_s:
            self._next_refresh_s = now_s + REFRESH_S
            try:
                self.store.refresh()
                self._unreachable = ""
            except StorageError as error:
                if not self._unreachable:
                    self._bus.events.report("pool-unreachable", "warning", str(error))
                self._unreachable = error.message
        for node in tuple(self.peers.no_key_of):
            if now_s >= self._next_key_s.get(node, 0.0):
                self._next_key_s[node] = now_s + KEY_RETRY_S
                self._ask_for_key(node)
        while self.peers.news:
            self._audit(self.peers.news.pop())
        if self.store.changes != self._announced_changes and now_s >= self._next_announce_s:
            self._next_announce_s = now_s + ANNOUNCE_S
            changes = self.store.changes
            with contextlib.suppress(MindstreamError):  # again in a second
                names = [held.name for held in self.store.all() if not self._against(held)]
                self.peers.announce(list(dict.fromkeys(names)))
                self._announced_changes = changes

    def _ask_for_key(self, node: str) -> None:
        try:
            if self.peers.ask_for_key(node):
                self._announced_changes = -1  # the newest version is used from now on
        except MindstreamError as error:
            log.info("%s has not granted its group key: %s", node, error)

    def _put(self, item: _Read) -> None:
        """Compare what others have put in with what was read here, and put it in where nobody has."""
        engine = self._engine
        assert engine is not None
        key = self.peers.ensure_key()
        keys = self._keys.versions()
        names = [each.name(item.place.address) for each in keys]
        there = False
        for held in (each for name in names for each in self.store.of_name(name)):
            with contextlib.suppress(BlobError):
                signed = self.store.signed(held)
                there |= self._compare(item, signed, lambda entry, own, held=held: self.store.chunks(held, entry, own))  # type: ignore[misc]
        asked = frozenset(self.peers.holders([names], 0))
        for node in asked - self._settled.get(item.place.address, frozenset()):
            try:
                self._compare_with(item, node, names)
            except MindstreamError as error:
                log.info("%s's entries could not be compared: %s", node, error)
        if not there:
            self._publish(item, key)
        self._settled[item.place.address] = asked
        while len(self._settled) > MOST_SETTLED:
            self._settled.popitem(last=False)

    def _compare_with(self, item: _Read, node: str, names: Sequence[bytes]) -> None:
        answer = self.peers.ask_entries(node, [self.peers.name_at(node, names) or names[0]], ASK_S)
        keyring = self._context.peers.keyring()
        entries = [open_entry(signed, keyring) for signed in answer.entries]
        for signed in answer.entries:
            if self.store.get(entry_id(signed)) is not None:
                continue

            def chunks(entry: PoolEntry, own: Sequence[int]) -> list[bytes]:
                digests = [entry.chunks[index].digest for index in own]
                found = self.peers.pull(node, answer.bundle, entries, digests, 60.0)
                return [found[each] for each in digests]

            self._compare(item, signed, chunks)

    def _audit(self, node: str) -> None:
        """Compare what a peer announced with what this node read, and put in, before."""
        own: dict[bytes, PoolEntry] = {}
        keyring = self._context.peers.keyring()
        for held in self.store.all():
            if (node, held.name) in self._audited or self.peers.name_at(node, [held.name]) is None:
                continue
            self._audited.add((node, held.name))
            with contextlib.suppress(BlobError, TrustError):
                entry = open_entry(self.store.signed(held), keyring)
                if entry.creator == self._node:
                    own[held.name] = entry
        if len(self._audited) > 4 * MOST_SETTLED:
            self._audited.clear()
        names = list(own)
        for at in range(0, len(names), MAX_POOL_BLOCKS):
            try:
                answer = self.peers.ask_entries(node, names[at : at + MAX_POOL_BLOCKS], ASK_S)
            except MindstreamError as error:
                log.info("%s's entries could not be compared: %s", node, error)
                return
            for signed in answer.entries:
                identifier = entry_id(signed)
                with contextlib.suppress(MindstreamError):
                    entry = open_entry(signed, keyring)
                    mine = own.get(entry.name)
                    if mine is None or entry.creator == self._node or self._node in self.store.said_by(identifier):
                        continue
                    if all(getattr(mine, field) == getattr(entry, field) for field in _COMPARABLE):
                        agrees = list(mine.parts()) == list(entry.parts())
                        self._bear_witness(identifier, agrees, "exact", 0.0 if agrees else float("inf"))

    def _compare(
        self,
        item: _Read,
        signed: SignedPoolEntry,
        chunks: Callable[[PoolEntry, Sequence[int]], list[bytes]],
    ) -> bool:
        """Say of an entry whether it is what was read here; whether it is, and need not be put in again."""
        engine = self._engine
        assert engine is not None
        identifier = entry_id(signed)
        try:
            entry = open_entry(signed, self._context.peers.keyring())
            key = self._keys.by_id(entry.key_id)
            if key is None:
                return False
            pool_blocks.check_entry(engine.spec, entry, item.place, key)
        except MindstreamError as error:
            self._refused(error)
            return False
        exact = entry.fingerprint == engine.fingerprint
        here = self.store.get(identifier)
        if entry.creator == self._node or self._node in self.store.said_by(identifier):
            return exact and here is not None and not self._against(here)
        how, error_ = ("exact", 0.0) if exact else ("close", 0.0)
        if exact:
            own, _ = pool_blocks.seal_block(
                engine.spec, engine.fingerprint, item.raw, item.place, key=key, creator=self._node, created_us=0,
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
        self._bear_witness(identifier, agrees, how, error_)
        return agrees and exact

    def _bear_witness(self, identifier: str, agrees: bool, how: str, error: float) -> None:
        tolerance = CLOSE_TOLERANCE if how == "close" else 0.0
        said = PoolWitness(witness(self._identity, identifier, agrees, how, error, tolerance))
        self._take_statement(Witness(self._node, identifier, agrees, how, error), said)
        try:
            self._bus.say(said, timeout_s=ASK_S)
        except MindstreamError as failed:
            self._count("dropped.pool_witness")
            log.warning("what this node says of pool entry %s could not be said: %s", identifier[:12], failed)

    def _publish(self, item: _Read, key: GroupKey) -> None:
        engine = self._engine
        assert engine is not None
        if not self.rates.pays(item.size_bytes, item.cost_ms / 1000):
            self._count("pool.not_worth")
            return
        entry, chunks = pool_blocks.seal_block(
            engine.spec,
            engine.fingerprint,
            item.raw,
            item.place,
            key=key,
            creator=self._node,
            created_us=time.time_ns() // 1000,
            cost_ms=item.cost_ms,
            codec=RUNGS[self.config.codec](),
        )
        if self._store(sign_entry(self._identity, entry), entry, chunks):
            self._count("pool.put")

    def _keep(self, item: _Keep) -> None:
        """Keep a peer's entries here as well, the parts that were not needed fetched too."""
        keyring = self._context.peers.keyring()
        entries = [open_entry(signed, keyring) for signed in item.given]
        wanted = [ref.digest for each in item.used for ref in each.entry.chunks]
        missing = [each for each in wanted if each not in item.chunks]
        chunks = item.chunks
        if missing:
            chunks = {**chunks, **self.peers.pull(item.node, item.bundle, entries, missing, 60.0)}
        for each in item.used:
            identifier = entry_id(each.signed)
            for statement in each.signed.witnesses:
                with contextlib.suppress(MindstreamError):
                    said = read_witness(statement, keyring)
                    if said.entry == identifier:
                        self.store.keep_statement(identifier, said.node, statement, instead=not said.agrees)
            if self._store(each.signed, each.entry, [chunks[ref.digest] for ref in each.entry.chunks]):
                self._count("pool.kept")

    def _store(self, signed: SignedPoolEntry, entry: PoolEntry, chunks: Sequence[bytes | bytearray]) -> bool:
        try:
            return self.store.put(signed, entry, chunks)
        except StorageError as error:
            self._count("failed.pool_put")
            self._bus.events.report("pool-not-written", "warning", str(error))
            return False

    # --- counting -------------------------------------------------------------------------------------------

    def _count(self, counter: str) -> None:
        self._bus.counters.add(counter)

    def _dropped(self, counter: str, text: str) -> None:
        self._count(counter)
        if text:
            self._bus.events.report(counter.replace(".", "-"), "warning", text)

    def _refused(self, error: MindstreamError) -> None:
        self._count("refused.pool_entry")
        self._bus.events.report("refused-pool-entry", "warning", str(error))


def _settle(result: Future[Taken | None], value: Taken | None) -> bool:
    """Whether it was not settled before."""
    try:
        result.set_result(value)
    except InvalidStateError:
        return False
    return True
