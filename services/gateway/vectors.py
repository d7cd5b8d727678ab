"""/v1/embeddings: texts are asked of a node in asks of a size that the bus carries, and put together again."""

from __future__ import annotations

import array
import asyncio
import base64
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from edge.bus import Bus
from protocol.errors import MindstreamError
from protocol.messages import ModelEmbed, ModelEmbedded
from services.gateway.errors import ApiError, api_error

TEXTS_AN_ASK = 64
CHARACTERS_AN_ASK = 200_000
"""At most three bytes of UTF-8 each (four, for rare ones): below the limit of an ask's payload."""
MAX_CHARACTERS = 16_000
"""Of one text: far more than a model reads of it; what is beyond is cut off here, and counts as truncated."""
FLOAT_BYTES = 4


class Vectors:
    """Embeds texts by asking nodes.

    Args:
        bus: the gateway's.
    """

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._askers = ThreadPoolExecutor(4, "gateway embeddings")

    def close(self) -> None:
        """No more is asked."""
        self._askers.shutdown(wait=False, cancel_futures=True)

    async def embed(self, node: str, name: str, texts: Sequence[str], *, as_base64: bool, ttl_ms: int) -> bytes:
        """The reply's body. Raises ApiError."""
        loop = asyncio.get_running_loop()
        try:
            parts: list[ModelEmbedded] = [
                await loop.run_in_executor(self._askers, self._ask, node, some, ttl_ms) for some in _portions(texts)
            ]
        except MindstreamError as error:
            raise api_error(error) from None
        data: list[dict[str, Any]] = []
        truncated = []
        for part in parts:
            truncated += [len(data) + index for index in part.truncated]
            size = part.dimensions * FLOAT_BYTES
            if not size or len(part.vectors) % size:
                raise ApiError(502, f"{node} sent vectors of a wrong size", type="server_error", code="bad_reply")
            for begin in range(0, len(part.vectors), size):
                vector = part.vectors[begin : begin + size]
                shown = base64.b64encode(vector).decode() if as_base64 else _floats(vector)
                data.append({"object": "embedding", "index": len(data), "embedding": shown})
        if len(data) != len(texts):
            raise ApiError(502, f"{node} sent {len(data)} vectors", type="server_error", code="bad_reply")
        tokens = sum(part.tokens for part in parts)
        return msgspec.json.encode(
            {
                "object": "list",
                "data": data,
                "model": name,
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
                "mindstream": {"node": node, "truncated": truncated},
            }
        )

    def _ask(self, node: str, texts: list[str], ttl_ms: int) -> ModelEmbedded:
        embedded: ModelEmbedded = self._bus.ask(node, ModelEmbed(texts), ttl_ms=min(ttl_ms, 600_000))
        return embedded


def _portions(texts: Sequence[str]) -> Iterator[list[str]]:
    some: list[str] = []
    characters = 0
    for text in texts:
        text = text[:MAX_CHARACTERS]
        if some and (len(some) == TEXTS_AN_ASK or characters + len(text) > CHARACTERS_AN_ASK):
            yield some
            some, characters = [], 0
        some.append(text)
        characters += len(text)
    yield some


def _floats(vector: bytes) -> list[float]:
    found = array.array("f", vector)
    if sys.byteorder == "big":
        found.byteswap()
    return found.tolist()
