"""The pool in the runner: prompts whose beginning the site has read are fetched, what is read here is put in.

On the worker's thread stands what is quick: looking whether a prompt's blocks are here or announced by a peer
(``look``), and copying a block that was just read (``has_read``). Fetching has threads of its own and a deadline: a run
waits for it no longer than the cost model says that it saves (``pool_fetching``). Sealing, writing, comparing and
announcing are done by one thread of low priority, when no run is under way (``pool_putting``).

**Trust.** What comes from the pool is its creator's word. A node that has read a prefix itself compares what it finds
in the pool with what it has, and says so in a signed statement: under an equal fingerprint the sealed parts must be
the same bytes, otherwise the numbers lie within ``pool_site.CLOSE_TOLERANCE``. Where one disagrees, and no more stand
by it, the entry is set aside on every node that hears of it. Whoever has begun from another node's entries has not read
the prefix itself: it bears no witness, and puts nothing into the pool that rests on them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from edge.bus import Bus
from edge.group_keys import GroupKeys
from edge.mailbox import Mailbox
from edge.pool_files import open_files
from edge.pool_store import PoolStore
from edge.service import Context
from protocol.codec import Received
from protocol.errors import MindstreamError, StorageError
from protocol.layout import BLOCK_TOKENS
from protocol.manifest import prefix_addresses
from services.model_runner import pool_blocks
from services.model_runner.cost_book import CostBook
from services.model_runner.engine import Engine, KVCache
from services.model_runner.memory import MIB
from services.model_runner.pool_blocks import Place
from services.model_runner.pool_fetching import Fetched, Fetching, Plan, Taken
from services.model_runner.pool_peers import PoolPeers
from services.model_runner.pool_putting import Putting, ReadBlock
from services.model_runner.pool_rates import PoolRates
from services.model_runner.pool_site import Site

log = logging.getLogger(__name__)

MOST_QUEUED_BYTES = 256 * MIB
"""Blocks that were read and not yet put into the pool; what is beyond is not put."""
WAIT_IDLE_S = 5.0
"""A block is put into the pool when no run is under way, or after so long."""
ANNOUNCE_S = 1.0
REFRESH_S = 15.0
"""So often it is looked what others have put into the folder, or under the URL."""
KEY_RETRY_S = 5.0


class Pool:
    """One node's part in the site's pool.

    Args:
        folder: for its entries, where ``pool.url`` names no other place.
        node_folder: the node's data folder, which has its keys.
        costs: what was measured of reading and of links.
        mailbox: of this host; None: all comes over the bus.
        idle: whether no run is under way.
    """

    patience = 2.0
    """How many times longer than expected a fetch may take; never longer than reading."""

    def __init__(
        self,
        context: Context,
        bus: Bus,
        blob_bus: Bus,
        folder: Path,
        node_folder: Path,
        costs: CostBook,
        mailbox: Mailbox | None = None,
        *,
        idle: Callable[[], bool],
        stopping: Callable[[], bool],
    ) -> None:
        self.enabled = context.config.pool.enabled
        self._idle = idle
        self._stopping = stopping
        self._engine: Engine | None = None
        keys = GroupKeys(node_folder, context.identity, context.peers)
        self._site = Site(context, bus, open_files(context.config.pool.url, folder), keys, costs)
        self.peers = PoolPeers(context, bus, blob_bus, self._site.store, keys, mailbox, self._notify, stopping)
        self._fetching = Fetching(self._site, self.peers, self._later)
        self._putting = Putting(self._site, self.peers)
        self._wake = threading.Condition()
        self._queue: deque[ReadBlock | Fetched] = deque()
        self._queued_bytes = 0
        self._answers = ThreadPoolExecutor(1, "pool answerer")
        self._thread = threading.Thread(target=self._run, name="pool", daemon=True)
        self._announced_changes = -1
        self._next_refresh_s = self._next_announce_s = 0.0
        self._next_key_s: dict[str, float] = {}
        self._unreachable = ""

    # --- life -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Connected: begin."""
        if self.enabled:
            self._thread.start()

    def stop(self) -> None:
        """Begin nothing more; what waits to be put in is let go: it is a cache."""
        self._notify()
        self._fetching.stop()
        self._answers.shutdown(wait=False, cancel_futures=True)
        if self._thread.ident is not None:
            self._thread.join(10.0)

    def attach(self, engine: Engine) -> None:
        """The model is loaded."""
        self._site.engine = self._engine = engine

    def reconnected(self) -> None:
        """The broker may have lost what was retained."""
        self.peers.say_again()
        self._announced_changes = -1
        self._notify()

    def details(self) -> dict[str, Any]:
        """For the service's state."""
        if not self.enabled:
            return {}
        entries, size_bytes = self.store.totals
        found: dict[str, Any] = {"pool_entries": entries, "pool_mib": round(size_bytes / MIB, 1)}
        if self._unreachable:
            found["pool_reason"] = self._unreachable
        return found

    @property
    def store(self) -> PoolStore:
        """This node's entries."""
        return self._site.store

    @property
    def rates(self) -> PoolRates:
        """What was measured."""
        return self._site.rates

    @property
    def busy(self) -> bool:
        """Whether something waits to be put in or compared."""
        with self._wake:
            return bool(self._queue)

    # --- heard ----------------------------------------------------------------------------------------------

    def hear_witness(self, message: Received) -> None:
        """What another node says of an entry."""
        if self.enabled:
            self._site.hear_witness(message)
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
        if not self.enabled or engine is None or blocks * BLOCK_TOKENS <= have_tokens:
            return None
        try:
            keys = self._site.keys.versions()
            if not keys:
                return None
            places = self._places(engine, tokens, blocks)
            names = [[key.name(place.address) for key in keys] for place in places]
            local = 0
            while local < blocks and self._here(names[local]):
                local += 1
            holders = {"": local, **(self.peers.holders(names, local) if local < blocks else {})}
        except MindstreamError as error:
            self._site.count("failed.pool_look")
            log.warning("looking into the pool: %s", error)
            return None
        best: Plan | None = None
        saved_s = 0.0
        for node, stop in holders.items():
            if stop * BLOCK_TOKENS <= have_tokens:
                continue
            own_bytes = pool_blocks.load_bytes(engine.spec, 0, min(local, stop))
            peer_bytes = pool_blocks.load_bytes(engine.spec, 0, stop) - own_bytes if node else 0
            expected_s = self._site.rates.load_s(own_bytes, node, peer_bytes)
            read_s = self._site.rates.read_s(have_tokens, stop * BLOCK_TOKENS)
            if read_s - expected_s > saved_s:
                saved_s = read_s - expected_s
                deadline_s = min(read_s, self.patience * expected_s + 0.25)
                best = Plan(places[:stop], names[:stop], have_tokens, local, node, stop, expected_s, deadline_s)
        return best

    def fetch(self, plan: Plan) -> Future[Taken | None]:
        """What the plan promised; None when it could not be had in time."""
        return self._fetching.fetch(plan)

    def has_read(self, cache: KVCache, tokens: Sequence[int], seconds: float) -> None:
        """``cache`` ends with a block that was read here, as was all before it, in whole chunks. Raises nothing."""
        try:
            self._has_read(cache, tokens, seconds)
        except Exception as error:  # noqa: BLE001 - the run that was read for does not depend on it
            self._site.count("failed.pool_block")
            log.warning("a block is not put into the pool: %s: %s", type(error).__name__, error)

    def _has_read(self, cache: KVCache, tokens: Sequence[int], seconds: float) -> None:
        engine = self._engine
        block = cache.length // BLOCK_TOKENS - 1
        if not self.enabled or engine is None or cache.pruned:
            return
        place = self._places(engine, tokens, block + 1)[-1]
        names = [key.name(place.address) for key in self._site.keys.versions()]
        if self._putting.settled(place, names) and self._here(names):
            return
        size = sum(pool_blocks.plain_bytes(engine.spec, block, kind) for kind in ("full", "sliding", "recurrent"))
        with self._wake:
            if self._queued_bytes + size > MOST_QUEUED_BYTES:
                self._site.count("dropped.pool_block")
                return
        raw = pool_blocks.cut_block(engine.spec, engine.export_layers(cache), block)
        item = ReadBlock(place, raw, max(1, round(seconds * 1000)), time.monotonic())
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
        return any(not self._site.against(held) for name in names for held in self._site.store.of_name(name))

    # --- on the pool's own thread ---------------------------------------------------------------------------

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify_all()

    def _later(self, item: Fetched) -> None:
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
                self._site.count("failed.pool")
                log.warning("the pool: %s", error)
            except Exception:
                self._site.count("failed.pool")
                log.exception("the pool")

    def _next(self) -> ReadBlock | Fetched | None:
        """What is to be done next, once there is time for it; None after a second without."""
        with self._wake:
            if not self._queue:
                self._wake.wait(1.0)
            if not self._queue:
                return None
            first = self._queue[0]
            if isinstance(first, ReadBlock) and not self._idle():
                wait_s = first.since_s + WAIT_IDLE_S - time.monotonic()
                if wait_s > 0:
                    self._wake.wait(min(0.1, wait_s))
                    return None
            return first

    def _do(self, item: ReadBlock | Fetched) -> None:
        try:
            if isinstance(item, ReadBlock):
                self._putting.put(item)
            else:
                self._putting.keep(item)
        finally:
            with self._wake:
                self._queue.popleft()
                self._queued_bytes -= item.size_bytes

    def _housekeeping(self) -> None:
        now_s = time.monotonic()
        if now_s >= self._next_refresh_s:
            self._next_refresh_s = now_s + REFRESH_S
            try:
                self._site.store.refresh()
                self._unreachable = ""
            except StorageError as error:
                if not self._unreachable:
                    self._site.report("pool-unreachable", "warning", str(error))
                self._unreachable = error.message
        for node in tuple(self.peers.no_key_of):
            if now_s >= self._next_key_s.get(node, 0.0):
                self._next_key_s[node] = now_s + KEY_RETRY_S
                self._ask_for_key(node)
        self.peers.news.update(self._putting.to_audit_again())
        while self.peers.news:
            self._putting.audit(self.peers.news.pop())
        if self._site.store.changes != self._announced_changes and now_s >= self._next_announce_s:
            self._next_announce_s = now_s + ANNOUNCE_S
            changes = self._site.store.changes
            with contextlib.suppress(MindstreamError):  # again in a second
                names = [held.name for held in self._site.store.all() if not self._site.against(held)]
                self.peers.announce(list(dict.fromkeys(names)))
                self._announced_changes = changes

    def _ask_for_key(self, node: str) -> None:
        try:
            if self.peers.ask_for_key(node):
                self._announced_changes = -1  # the newest version is used from now on
        except MindstreamError as error:
            log.info("%s has not granted its group key: %s", node, error)
