"""Embeddings on the model runner's node: a model of its own on a thread of its own, loaded when first asked for."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from edge.config import ModelConfig
from edge.embedding import Embedder, embedding_file
from protocol.errors import ModelUnavailable, Overloaded
from protocol.messages import ModelEmbed, ModelEmbedded

log = logging.getLogger(__name__)

LOOK_AGAIN_S = 15.0
"""So often it is looked whether the model has come onto this machine meanwhile."""
MAX_WAITING = 64


class Embeddings:
    """What a node can embed with. Thread-safe."""

    def __init__(self, settings: ModelConfig) -> None:
        self._settings = settings
        self._folders = [Path(folder) for folder in settings.folders]
        self._thread = ThreadPoolExecutor(1, "embedder")
        self._embedder: Embedder | None = None
        self._lock = threading.Lock()
        self._waiting = 0
        self._path: Path | None = None
        self._looked_s = float("-inf")

    @property
    def name(self) -> str:
        """The embedding model that this node has; empty without one."""
        if time.monotonic() - self._looked_s > LOOK_AGAIN_S:
            self._path = embedding_file(self._settings.embedding, self._folders)
            self._looked_s = time.monotonic()
        return self._settings.embedding if self._path is not None else ""

    def embed(self, ask: ModelEmbed) -> Future[ModelEmbedded]:
        """Vectors of some texts. Raises Overloaded when too many asks wait; the future may have ModelUnavailable."""
        with self._lock:
            if self._waiting >= MAX_WAITING:
                raise Overloaded(
                    f"embedding {len(ask.texts)} texts: {self._waiting} asks wait already",
                    hint="ask again a little later",
                    reason="too many asks",
                )
            self._waiting += 1
        future = self._thread.submit(self._embed, ask)
        future.add_done_callback(lambda _: self._one_less())
        return future

    def stop(self) -> None:
        """End its thread after the present ask."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _one_less(self) -> None:
        with self._lock:
            self._waiting -= 1

    def _embed(self, ask: ModelEmbed) -> ModelEmbedded:
        name = self._settings.embedding
        if self._embedder is None:
            path = embedding_file(name, self._folders)
            if path is None:
                raise ModelUnavailable(
                    f"embedding {len(ask.texts)} texts: there is no embedding model {name!r} here",
                    hint=f"mindstream models pull {name or 'all-minilm-l6-v2'}; it needs onnxruntime (extra `edge`)",
                    field="model.embedding",
                    reason="no such model",
                )
            started_s = time.monotonic()
            self._embedder = Embedder(path, threads=min(2, self._settings.threads or 2))
            log.info("loaded the embedding model %s in %.1f s", name, time.monotonic() - started_s)
        found = self._embedder.embed(ask.texts)
        return ModelEmbedded(
            model=name,
            dimensions=found.vectors.shape[1],
            vectors=found.vectors.astype("<f4").tobytes(),
            tokens=found.tokens,
            truncated=found.truncated,
        )
