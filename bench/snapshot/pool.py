"""The pool: time to the first token of a prompt whose beginning the site has read, over that of reading it.

Two nodes of one process on a real broker (embedded), each with its own keys, store and connections. One has read the
prompt's first blocks and put them into its pool. Then, in turns: the other reads the prompt; fetches the blocks from
the first, over the bus (no mailbox); loads them from its own store on the disk. Each way ends with the first token's
logits, which are the same bit for bit, or the part fails. What a fetch of a run does is done here by the same code.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bench.report import Figures
from bench.snapshot.frame import Bench
from bench.snapshot.texts import measured_texts
from broker.embedded import EmbeddedBroker
from edge.blobs import BlobSender
from edge.bus import Bus
from edge.config import Config
from edge.keys import Peers, load_or_create_identity
from edge.service import Context
from edge.snapshot_store import SnapshotStore
from protocol.codec import Received
from protocol.errors import NotFound, SnapshotRefused
from protocol.layout import BLOCK_TOKENS
from protocol.manifest import SnapshotManifest
from protocol.messages import BlobPull, GroupKeyAsk, PoolEntriesAsk, PoolHave
from services.model_runner.cost_book import CostBook
from services.model_runner.engine import Engine, Logits
from services.model_runner.pool import Pool
from services.model_runner.pool_peers import Bundle

TOKENS = 2_048
ROUNDS = 5
WAIT_S = 120.0


class Node:
    """A node's pool on a broker, without a runner around it."""

    def __init__(self, root: Path, name: str, url: str, engine: Engine) -> None:
        self.name, self.root = name, root / name
        self.root.mkdir(parents=True)
        identity = load_or_create_identity(self.root, name)
        self.peers = Peers(self.root, identity)
        self.identity = identity
        self.bus = Bus(url=url, node=name, client="model_runner")
        self.blob_bus = Bus(url=url, node=name, client="model_runner-blob")
        self._stopping = threading.Event()
        context = Context(Config(), identity, self.peers, self.root, url)
        self.pool = Pool(
            context,
            self.bus,
            self.blob_bus,
            self.root / "pool",
            self.root,
            CostBook(None),
            idle=lambda: True,
            stopping=self._stopping.is_set,
        )
        self.pool.attach(engine)
        # Every way is measured, whichever the node would take, and none is given up.
        self.pool.rates.read_s = lambda start, end: WAIT_S  # type: ignore[method-assign]  # noqa: ARG005
        self.pool.patience = float("inf")
        self._sender = BlobSender(SnapshotStore(self.root / "snapshots"), self.blob_bus, _no_snapshot, self._held)
        self.bus.hear(PoolHave, self.pool.peers.hear)
        self.bus.hear(GroupKeyAsk, self.pool.peers.grant)
        self.bus.hear(PoolEntriesAsk, self._entries)
        self.bus.hear(BlobPull, self._sender.pull)

    def _held(self, identifier: str) -> Bundle | None:
        return self.pool.peers.bundle(identifier)

    def _entries(self, message: Received) -> object:
        return self.pool.peers.answer(message)

    def start(self) -> None:
        self.bus.start()
        self.blob_bus.start()
        self.pool.start()

    def stop(self) -> None:
        self._stopping.set()
        self.pool.stop()
        self._sender.stop()
        self.bus.stop()
        self.blob_bus.stop()


def _no_snapshot(identifier: str) -> SnapshotManifest:
    raise NotFound(f"looking for snapshot {identifier[:12]}: only the pool's entries are here")


def part(bench: Bench) -> Figures:
    """Of a prompt's first 2,048 tokens, and eight more."""
    engine = bench.engine
    blocks = 2 if bench.quick else TOKENS // BLOCK_TOKENS
    corpus = bench.chat.encode("\n\n".join(measured_texts().values()), special=False)
    prompt = corpus[: blocks * BLOCK_TOKENS + 9]
    with tempfile.TemporaryDirectory() as folder, EmbeddedBroker() as broker:
        nodes = [Node(Path(folder), name, broker.url, engine) for name in ("holder", "reader")]
        holder, reader = nodes
        holder.peers.trust("reader", reader.identity.fingerprint)
        reader.peers.trust("holder", holder.identity.fingerprint)
        for node, other in ((holder, reader), (reader, holder)):
            node.peers.learn_sealing_key(other.name, other.identity.sealing_key)
        try:
            for node in nodes:
                node.start()
            return _measure(bench, engine, prompt, blocks, holder, reader)
        finally:
            for node in nodes:
                node.stop()


def _measure(bench: Bench, engine: Engine, prompt: list[int], blocks: int, holder: Node, reader: Node) -> Figures:
    cache = engine.new_cache(len(prompt) + 8)
    for block in range(blocks):
        started_s = time.perf_counter()
        engine.prefill(cache, prompt[block * BLOCK_TOKENS : (block + 1) * BLOCK_TOKENS])
        holder.pool.has_read(cache, prompt, time.perf_counter() - started_s)
    cache.close()
    _wait(lambda: holder.pool.store.totals[0] == blocks and not holder.pool.busy)
    bench.progress(f"{blocks} blocks are in the holder's pool, {holder.pool.store.totals[1] / 1e6:.1f} MB")
    times: dict[str, list[float]] = {"read": [], "bus": [], "disk": []}
    for number in range(2 if bench.quick else ROUNDS):
        seconds, expected = _read(engine, prompt)
        times["read"].append(seconds)
        for way in ("bus", "disk"):
            holder_wanted = "holder" if way == "bus" else ""
            _wait(lambda wanted=holder_wanted: _plan_is(reader, prompt, blocks, wanted))  # type: ignore[misc]
            seconds, logits = _fetch(engine, reader, prompt)
            if not np.array_equal(logits, expected):
                raise SnapshotRefused(f"comparing logits after {way}: they are not those of reading", reason=way)
            times[way].append(seconds)
            # What came over the bus is kept here: then it is loaded from the disk, and for the next round removed.
            _wait(lambda: reader.pool.store.totals[0] == blocks and not reader.pool.busy)
        reader.pool.store.clear()
        bench.progress(f"round {number + 1}: " + ", ".join(f"{way} {taken[-1]:.2f} s" for way, taken in times.items()))
    read_s, bus_s, disk_s = (statistics.median(taken) for taken in times.values())
    return {
        "pool_tokens": blocks * BLOCK_TOKENS,
        "pool_mb": round(holder.pool.store.totals[1] / 1e6, 1),
        "pool_ttft_read_s": round(read_s, 3),
        "pool_ttft_bus_s": round(bus_s, 3),
        "pool_ttft_disk_s": round(disk_s, 3),
        "pool_ttft_speedup_bus": round(read_s / bus_s, 2),
        "pool_ttft_speedup_disk": round(read_s / disk_s, 2),
    }


def _plan_is(reader: Node, prompt: list[int], blocks: int, holder: str) -> bool:
    plan = reader.pool.look(prompt, 0)
    return plan is not None and (plan.blocks, plan.holder) == (blocks, holder)


def _read(engine: Engine, prompt: list[int]) -> tuple[float, Logits]:
    started_s = time.perf_counter()
    cache = engine.new_cache(len(prompt) + 8)
    engine.prefill(cache, prompt[:-1])
    logits = engine.step(cache, prompt[-1])
    took_s = time.perf_counter() - started_s
    cache.close()
    return took_s, logits


def _fetch(engine: Engine, reader: Node, prompt: list[int]) -> tuple[float, Logits]:
    started_s = time.perf_counter()
    plan = reader.pool.look(prompt, 0)
    taken = reader.pool.fetch(plan).result() if plan is not None else None
    if taken is None:
        raise SnapshotRefused("fetching from the pool: nothing came", reason="nothing came")
    cache = engine.import_layers(taken.layers, len(prompt) + 8)
    engine.prefill(cache, prompt[taken.tokens : -1])
    logits = engine.step(cache, prompt[-1])
    took_s = time.perf_counter() - started_s
    cache.close()
    return took_s, logits


def _wait(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > deadline_s:
            raise SnapshotRefused("measuring the pool: a node has not done its part in time", reason="too slow")
        time.sleep(0.01)
