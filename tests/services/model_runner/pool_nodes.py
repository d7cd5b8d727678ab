"""Model runners with a small model, each a whole service on a broker, as threads of the test's process."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edge.bus import Bus
from edge.config import Config
from edge.keys import Peers, load_or_create_identity
from edge.service import Context
from protocol.layout import BLOCK_TOKENS
from protocol.messages import Event, ModelGenerate, RunDone
from services.model_runner.chat import ChatFormat
from services.model_runner.conversations import Conversations
from services.model_runner.engine import KVCache, LayerState
from services.model_runner.rounds import Loaded
from services.model_runner.service import ModelRunner
from services.model_runner.transformers_engine import TransformersEngine
from tests.services.model_runner.conftest import THREADS
from tests.support.waiting import DEADLINE_S, wait_for

TTL_MS = 60_000
CONTEXT_TOKENS = 2048
BLOCKS = 2


def prompt(seed: int = 0, blocks: int = BLOCKS) -> list[int]:
    """Somewhat more than so many blocks."""
    return [(at * at + 3 * at + seed * 17 + at // (seed + 2)) % 256 for at in range(blocks * BLOCK_TOKENS + 30)]


class LyingEngine(TransformersEngine):
    """Computes like any other, and shows altered keys to whoever takes them out."""

    def export_layers(self, cache: KVCache) -> list[LayerState]:
        layers = super().export_layers(cache)
        keys = layers[0].keys.copy()
        keys[..., 0] = 0
        return [replace(layers[0], keys=keys), *layers[1:]]


class OtherEngine(TransformersEngine):
    """One of other numerics: its values are a little off."""

    def export_layers(self, cache: KVCache) -> list[LayerState]:
        found = []
        for layer in super().export_layers(cache):
            wide = layer.keys.astype(np.uint32) << 16
            near = (wide.view(np.float32) * np.float32(1.01)).view(np.uint32) >> 16
            found.append(replace(layer, keys=near.astype(layer.keys.dtype)))
        return found


class SmallRunner(ModelRunner):
    """The model runner with a small model in place of the configured one."""

    folder: Path
    engine_class: type[TransformersEngine] = TransformersEngine
    other_numerics = False

    def _load(self) -> Loaded:
        engine = self.engine_class.load(self.folder, name="small-llama", dtype="bfloat16", threads=THREADS)
        if self.other_numerics:
            engine.fingerprint = msgspec.structs.replace(engine.fingerprint, instruction_set="another")
        self.pool.attach(engine)
        # What is tested is not the cost model: reading is held to be slow, and a fetch may take its time.
        self.pool.rates.read_s = lambda start, end: float(end - start)  # type: ignore[method-assign]
        self.pool.patience = math.inf
        chat = ChatFormat.load(self.folder)
        conversations = Conversations(self.db, engine, in_memory=50, now_us=lambda: 0, on_evict=lambda *_: None)
        return Loaded(engine, chat, conversations, CONTEXT_TOKENS, "", max_batch=1, pool=self.pool)


class PoolNode:
    """A node whose model runner is a thread.

    Args:
        pool: of its configuration, key by key.
    """

    def __init__(self, root: Path, name: str, broker_url: str, folder: Path, **pool: Any) -> None:
        self.name = name
        self.root = root / name
        self.root.mkdir(parents=True, exist_ok=True)
        self.identity = load_or_create_identity(self.root, name)
        self.peers = Peers(self.root, self.identity)
        self._broker_url = broker_url
        self._folder = folder
        self._config = Config()
        self._config.node.name, self._config.node.data_dir = name, str(self.root)
        for key, value in pool.items():
            setattr(self._config.pool, key, value)
        self.engine_class: type[TransformersEngine] = TransformersEngine
        self.other_numerics = False
        self.runner: SmallRunner | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start its model runner; ready when the model is loaded."""
        context = Context(self._config, self.identity, self.peers, self.root / "model_runner", self._broker_url)
        runner = self.runner = SmallRunner(context)
        runner.folder, runner.engine_class, runner.other_numerics = self._folder, self.engine_class, self.other_numerics
        self._thread = threading.Thread(target=runner.run, name=f"runner {self.name}", daemon=True)
        self._thread.start()
        wait_for(lambda: hasattr(runner, "worker") and runner.worker.rounds is not None, f"{self.name} is not ready")

    def stop(self) -> None:
        """End it, and wait."""
        if self.runner is not None and self._thread is not None:
            self.runner.stop()
            self._thread.join(DEADLINE_S)
            assert not self._thread.is_alive()
            self.runner = None

    @property
    def pool(self) -> Any:
        assert self.runner is not None
        return self.runner.pool

    @property
    def counters(self) -> dict[str, int]:
        """What its model runner has counted."""
        assert self.runner is not None
        return self.runner.bus.counters.snapshot()

    @property
    def entries(self) -> int:
        """Entries in its pool."""
        count: int = self.pool.store.totals[0]
        return count

    def wait_entries(self, count: int) -> None:
        """Until it has put so many into its pool, and has nothing left to do."""
        wait_for(lambda: self.entries >= count and not self.pool.busy, f"{self.name} has {count} pool entries")


def wait_heard(node: PoolNode, holder: str, tokens: list[int]) -> None:
    """Until ``node`` knows that ``holder`` holds the beginning of ``tokens``."""

    def known() -> bool:
        # Whom it would ask is another matter where several hold them.
        plan = node.pool.look(tokens, 0)
        blocks = (len(tokens) - 1) // BLOCK_TOKENS
        return plan is not None and node.pool.peers.holders(plan.names, 0).get(holder) == blocks

    wait_for(known, f"{node.name} has not heard what {holder} holds")


class Talker:
    """A client that lets nodes answer."""

    def __init__(self, broker_url: str) -> None:
        self._events: list[tuple[str, Event]] = []
        self.bus = Bus(url=broker_url, node="tester", client="talker")
        self.bus.hear(Event, lambda message: self._events.append((message.node, message.data)))
        self.bus.start(DEADLINE_S)
        self._number = 0

    def events(self, name: str) -> set[str]:
        """The nodes that have said an event of that name."""
        return {node for node, event in self._events if event.name == name}

    def ask(self, node: PoolNode, prompt: Sequence[int], **settings: Any) -> RunDone:
        """``node``'s answer to ``prompt``, in a new conversation."""
        done: RunDone = self.ask_later(node, prompt, **settings).result()
        return done

    def ask_later(self, node: PoolNode, prompt: Sequence[int], **settings: Any) -> Future[RunDone]:
        """The same, as it will come."""
        self._number += 1
        asked = {"max_new_tokens": 4, "ignore_eos": True} | settings
        ask = ModelGenerate(f"c{self._number}", prompt_tokens=list(prompt), **asked)
        return self.bus.ask_later(node.name, ask, ttl_ms=TTL_MS)


@contextmanager
def site(
    root: Path, broker_url: str, folder: Path, *names: str, **pool: Any
) -> Iterator[tuple[Talker, list[PoolNode]]]:
    """Nodes that trust each other, not started yet, and one who talks with them."""
    nodes = [PoolNode(root, name, broker_url, folder, **pool) for name in names]
    for node in nodes:
        for other in nodes:
            if node is not other:
                node.peers.trust(other.name, other.identity.fingerprint)
                node.peers.learn_sealing_key(other.name, other.identity.sealing_key)
    talker = Talker(broker_url)
    try:
        yield talker, nodes
    finally:
        for node in nodes:
            node.stop()
        talker.bus.stop()
