"""What conversations have in common at their beginning, computed once.

A new prompt takes whole chunks from a conversation that has read the same tokens, or from a few prefixes that were
kept because several prompts began so (a system prompt). Only chunks of prefill count, which end at absolute
multiples: they are what the new one would have computed itself, bit for bit. What was decoded token by token is not.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from services.model_runner.conversations import Conversation
from services.model_runner.engine import Engine, KVCache

KEPT_PREFIXES = 8
"""Copies of common beginnings that are kept; the one unused for longest goes."""
SEEN_CHUNKS = 16_384
"""Beginnings of prompts that are remembered (16 bytes each), to know one that comes again."""


def chunk_keys(tokens: Sequence[int], chunk_tokens: int) -> list[bytes]:
    """A digest for each whole chunk of ``tokens``, of everything up to its end."""
    whole = len(tokens) // chunk_tokens
    data = np.asarray(tokens[: whole * chunk_tokens], dtype="<u4")
    running = hashlib.blake2b(digest_size=16)
    keys = []
    for index in range(whole):
        running.update(data[index * chunk_tokens : (index + 1) * chunk_tokens].tobytes())
        keys.append(running.digest())
    return keys


class Prefixes:
    """Who holds which beginning. Used by the worker thread alone."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._holders: dict[bytes, Conversation] = {}
        self._kept: OrderedDict[bytes, KVCache] = OrderedDict()
        self._seen: OrderedDict[bytes, str] = OrderedDict()
        self._foreign: set[bytes] = set()

    @property
    def allocated_bytes(self) -> int:
        """Of the kept copies."""
        return sum(cache.allocated_bytes for cache in self._kept.values())

    def common_chunks(self, name: str, keys: Sequence[bytes]) -> int:
        """How many chunks the prompt of conversation ``name`` has in common with earlier ones of others; it is
        remembered itself."""
        common = 0
        for index, key in enumerate(keys):
            if self._seen.get(key, name) != name:
                common = index + 1
            self._seen[key] = name
            self._seen.move_to_end(key)
        while len(self._seen) > SEEN_CHUNKS:
            self._seen.popitem(last=False)
        return common

    def read(self, conversation: Conversation) -> None:
        """``conversation`` has read one more whole chunk, the last of its ``whole_chunks``."""
        self._holders[conversation.whole_chunks[-1]] = conversation

    def mark_foreign(self, keys: Sequence[bytes]) -> None:
        """These chunks came from the pool on another node's word; so did every copy of them, for as long as this
        process lives."""
        self._foreign.update(keys)

    def is_foreign(self, keys: Sequence[bytes]) -> bool:
        """Whether any of these did."""
        return not self._foreign.isdisjoint(keys)

    def held_chunks(self, keys: Sequence[bytes]) -> int:
        """How many chunks of a prompt with these ``keys`` ``fork`` would find."""
        for chunks in range(len(keys), 0, -1):
            key = keys[chunks - 1]
            holder = self._holders.get(key)
            held = holder is not None and not holder.closed and holder.whole_chunks[chunks - 1 : chunks] == [key]
            if held or key in self._kept:
                return chunks
        return 0

    def fork(self, keys: Sequence[bytes], more_than: int, capacity_tokens: int) -> tuple[KVCache, int] | None:
        """A copy of the longest held beginning of a prompt with these ``keys``, and its chunks, if they are
        ``more_than`` so many. Raises as ``Engine.new_cache``."""
        for chunks in range(len(keys), more_than, -1):
            key = keys[chunks - 1]
            source = self._kept.get(key)
            if source is not None:
                self._kept.move_to_end(key)
            else:
                holder = self._holders.get(key)
                if holder is None:
                    continue
                if holder.closed or len(holder.whole_chunks) < chunks or holder.whole_chunks[chunks - 1] != key:
                    del self._holders[key]
                    continue
                source = holder.state.cache
            if source.pruned:
                continue  # It is not what reading this beginning gives.
            forked = self._engine.fork(source, chunks * self._engine.chunk_tokens, capacity_tokens)
            if forked is not None:
                return forked, chunks
        return None

    def keep(self, key: bytes, cache: KVCache, most_bytes: int) -> None:
        """Keep a copy of ``cache``, which ends with the chunk of ``key``, unless it is kept or all of them would
        take more than ``most_bytes``. Raises as ``Engine.new_cache``."""
        if key in self._kept:
            return
        while self._kept and (
            len(self._kept) >= KEPT_PREFIXES or self.allocated_bytes + cache.allocated_bytes > most_bytes
        ):
            self.drop_oldest()
        if cache.allocated_bytes > most_bytes or cache.pruned:
            return
        copy = self._engine.fork(cache, cache.length, cache.length)
        if copy is not None:
            self._kept[key] = copy

    def drop_oldest(self) -> bool:
        """Give up the copy unused for longest; whether there was one."""
        if not self._kept:
            return False
        self._kept.popitem(last=False)[1].close()
        return True

    def forget(self, conversation: Conversation) -> None:
        """Its cache is gone."""
        for key in conversation.whole_chunks:
            if self._holders.get(key) is conversation:
                del self._holders[key]
