"""What this node has measured of reading, of links and of codecs: kept in a file of its own, across restarts.

A first idea of what was never measured comes from a probe at load: a few chunks of a prompt, and a part of a block by
each rung. Real work is noted from then on, and outweighs it.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import msgspec
import numpy as np

from edge.files import write_atomically
from protocol.errors import UNREADABLE, MindstreamError
from protocol.identity import digest
from protocol.sealing import DataKey
from services.model_runner.codecs import RUNGS
from services.model_runner.codecs.base import block_layouts, empty_layers
from services.model_runner.codecs.ladder import decode_blocks, encode_blocks
from services.model_runner.costs import Estimate, Link, PrefillRate
from services.model_runner.engine import Engine, LayerState, ModelSpec

log = logging.getLogger(__name__)

_UNUSABLE: tuple[type[Exception], ...] = (OSError, *UNREADABLE)
VERSION = 1
SAVE_EVERY_S = 60.0
MOST_LINKS = 200
PROBE_DEPTH_TOKENS = 1_024
"""Reading is probed at the beginning and behind so many positions, for what attention adds."""
PROBE_TOKENS = 32
PROBE_BLOCK_TOKENS = 64
PROBE_WEIGHT = 0.25


class _Measured(msgspec.Struct):
    version: int = VERSION
    prefill: dict[str, PrefillRate] = {}
    """By model and numerics."""
    links: dict[str, Link] = {}
    """By peer."""
    codecs: dict[str, Estimate] = {}
    """``save/RUNG`` and ``restore/RUNG``: seconds a byte of KV."""


def _now_us() -> int:
    return time.time_ns() // 1000


class CostBook:
    """Estimates of one node. Methods may be called on any thread; what is returned is the caller's own copy.

    Args:
        path: the file; None: nothing is kept.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._measured = self._load()
        self._changed = False
        self._saved_s = time.monotonic()
        self._model = ""

    def _load(self) -> _Measured:
        if self._path is None or not self._path.exists():
            return _Measured()
        try:
            found = msgspec.msgpack.decode(self._path.read_bytes(), type=_Measured)
            if found.version == VERSION:
                return found
        except _UNUSABLE as error:
            log.warning("what was measured before is not known: %s: %s", self._path, error)
        return _Measured()

    def save(self) -> None:
        """Write it down, if anything is new. What goes wrong is logged: nothing depends on it."""
        with self._lock:
            if self._path is None or not self._changed:
                return
            body = msgspec.msgpack.encode(self._measured)
            self._changed = False
            self._saved_s = time.monotonic()
        try:
            write_atomically(self._path, body)
        except MindstreamError as error:
            log.warning("what was measured could not be kept: %s", error)

    def save_now_and_then(self) -> None:
        """``save`` when the last time is long ago. Not for the worker's thread: it may wait for the disk."""
        if time.monotonic() - self._saved_s > SAVE_EVERY_S:
            self.save()

    # --- reading --------------------------------------------------------------------------------------------

    def model_is(self, engine: Engine) -> None:
        """Prompts are read by ``engine`` from now on."""
        numerics = msgspec.msgpack.encode((engine.spec.digests.weights, engine.fingerprint))
        self._model = f"{engine.spec.name} {digest(numerics).hex()[:16]}"

    def read(self, start: int, end: int, seconds: float) -> None:
        """A chunk of a prompt was read."""
        with self._lock:
            rate = self._measured.prefill.setdefault(self._model, PrefillRate())
            rate.add(start, end, seconds, _now_us())
            self._changed = True

    @property
    def prefill(self) -> PrefillRate:
        """Of the present model."""
        with self._lock:
            return msgspec.structs.replace(self._measured.prefill.get(self._model, PrefillRate()))

    # --- links ----------------------------------------------------------------------------------------------

    def asked(self, peer: str, seconds: float) -> None:
        """A small ask was answered, after so many seconds on the way."""
        with self._lock:
            self._link(peer).latency.add(seconds, _now_us())
            self._changed = True

    def fetched(self, peer: str, size_bytes: int, seconds: float) -> None:
        """So many bytes came in so many seconds."""
        with self._lock:
            self._link(peer).transfer(size_bytes, seconds, _now_us())
            self._changed = True

    def link(self, peer: str) -> Link:
        """What is known of the way to a peer."""
        with self._lock:
            found = self._measured.links.get(peer, Link())
            return Link(msgspec.structs.replace(found.latency), msgspec.structs.replace(found.byte))

    def _link(self, peer: str) -> Link:
        links = self._measured.links
        if peer not in links and len(links) >= MOST_LINKS:
            del links[min(links, key=lambda name: links[name].byte.updated_us)]
        return links.setdefault(peer, Link())

    # --- codecs ---------------------------------------------------------------------------------------------

    def saved(self, codec: str, kv_bytes: int, seconds: float, weight: float = 1.0) -> None:
        """So much KV was encoded, sealed and written."""
        self._note(f"save/{codec}", kv_bytes, seconds, weight)

    def restored(self, codec: str, kv_bytes: int, seconds: float, weight: float = 1.0) -> None:
        """So much KV was verified, decrypted, decoded and imported."""
        self._note(f"restore/{codec}", kv_bytes, seconds, weight)

    def _note(self, what: str, kv_bytes: int, seconds: float, weight: float) -> None:
        if kv_bytes <= 0 or seconds <= 0:
            return
        with self._lock:
            self._measured.codecs.setdefault(what, Estimate()).add(seconds / kv_bytes, _now_us(), weight)
            self._changed = True

    def save_s(self, codec: str, kv_bytes: int) -> float:
        """Cautious seconds to save so much; infinite when it was never measured."""
        with self._lock:
            return self._measured.codecs.get(f"save/{codec}", Estimate()).cautious(_now_us()) * max(1, kv_bytes)

    def restore_s(self, codec: str, kv_bytes: int) -> float:
        """Cautious seconds to decrypt and decode so much; infinite when it was never measured."""
        with self._lock:
            return self._measured.codecs.get(f"restore/{codec}", Estimate()).cautious(_now_us()) * max(1, kv_bytes)

    @property
    def restore(self) -> dict[str, Estimate]:
        """Seconds a byte of KV, by codec."""
        with self._lock:
            return {
                name.removeprefix("restore/"): msgspec.structs.replace(found)
                for name, found in self._measured.codecs.items()
                if name.startswith("restore/")
            }

    # --- probes ---------------------------------------------------------------------------------------------

    def probe_reading(self, engine: Engine) -> None:
        """Read a little with ``engine``, if nothing was measured with it: on the thread that owns it."""
        self.model_is(engine)
        if self.prefill.known:
            return
        spec = engine.spec
        # The first of all warms up what is allocated late.
        for number, deep in enumerate((0, 0, PROBE_DEPTH_TOKENS)):
            chunk = min(engine.chunk_tokens, PROBE_TOKENS if number else 1)
            if deep + chunk > spec.context_tokens or (deep and spec.state_bytes):
                continue
            try:
                cache = engine.import_layers(_zeros(spec, deep), deep + chunk) if deep else engine.new_cache(chunk)
                try:
                    started_s = time.perf_counter()
                    engine.prefill(cache, [0] * chunk)
                    took_s = time.perf_counter() - started_s
                finally:
                    cache.close()
            except MindstreamError as error:
                log.info("how fast prompts are read is not known yet: %s", error)
                return
            if number:
                self.read(deep, deep + chunk, took_s)

    def probe_codecs(self, spec: ModelSpec) -> None:
        """Encode, seal, open and decode a little by each rung that was never measured. On any thread."""
        key = DataKey.generate()
        tokens = min(PROBE_BLOCK_TOKENS, spec.context_tokens)
        layers = _noise(spec, tokens)
        kv_bytes = sum(layout.raw_bytes for layout in block_layouts(spec, tokens))
        for name, rung in RUNGS.items():
            if f"restore/{name}" in self._measured.codecs or not kv_bytes:
                continue
            codec = rung()
            for weight in (0.0, PROBE_WEIGHT):  # once to warm up
                started_s = time.perf_counter()
                blocks = encode_blocks(codec, spec, layers)
                sealed = [key.seal(b"", block) for block in blocks]
                for each in sealed:
                    digest(each)
                saved_s = time.perf_counter() - started_s
                started_s = time.perf_counter()
                opened = [key.open(b"", each) for each in sealed if digest(each)]
                decode_blocks(codec, spec, opened, tokens)
                restored_s = time.perf_counter() - started_s
                if weight:
                    self.saved(name, kv_bytes, saved_s, weight)
                    self.restored(name, kv_bytes, restored_s, weight)


def _zeros(spec: ModelSpec, tokens: int) -> list[LayerState]:
    layers = empty_layers(spec, tokens)
    for layer in layers:
        layer.keys.fill(0)
        layer.values.fill(0)
    return layers


def _noise(spec: ModelSpec, tokens: int) -> list[LayerState]:
    """Layers of numbers that look like a model's to a codec."""
    random = np.random.default_rng(0)
    layers = empty_layers(spec, tokens)
    for layer in layers:
        for plane in (layer.keys, layer.values):
            floats = random.standard_normal(plane.shape).astype(np.float32)
            if layer.dtype == "bfloat16":
                plane[...] = (floats.view(np.uint32) >> 16).astype(plane.dtype)
            else:
                plane[...] = floats.astype(plane.dtype)
    return layers
