"""Which conversation of a model runner holds which history.

OpenAI's protocol has no conversations: a program sends the whole history each time. Read again each time, it would
cost more with every turn. So what a history looks like once the model has answered is noted, by its digest, with the
conversation that holds it in its KV cache; when a request begins with that history, only what is new is sent.

An entry is taken out when it is used: of two that go on from one history at once, one reads it again, and they cannot
mix. Should the runner have forgotten the conversation meanwhile, it says so, and all is sent.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

from protocol.messages import ChatMessage

CAPACITY = 10_000
"""Histories that are remembered: some 200 bytes each."""


def digest(messages: Sequence[ChatMessage]) -> bytes:
    """Of a history. Space around what the model said does not count: many programs trim it."""
    found = hashlib.sha256()
    for message in messages:
        content = message.content.strip() if message.role == "assistant" else message.content
        for text in (message.role, content):
            encoded = text.encode("utf-8", "surrogatepass")
            found.update(len(encoded).to_bytes(8, "big"))
            found.update(encoded)
    return found.digest()


def split(messages: Sequence[ChatMessage]) -> int:
    """Where the new messages begin: after the last one of the model's. 0 where it has not spoken, or spoke last."""
    for index in range(len(messages) - 1, -1, -1):
        if messages[index].role == "assistant":
            return index + 1 if index + 1 < len(messages) else 0
    return 0


class Histories:
    """Digest to conversation, the one unused for longest forgotten first. For one thread."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._held: OrderedDict[tuple[str, str, bytes], str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def note(self, node: str, model: str, messages: Sequence[ChatMessage], conversation: str) -> None:
        """``conversation`` of ``node`` holds just these messages now."""
        key = (node, model, digest(messages))
        self._held[key] = conversation
        self._held.move_to_end(key)
        while len(self._held) > self._capacity:
            self._held.popitem(last=False)

    def take(self, nodes: Sequence[str], model: str, messages: Sequence[ChatMessage]) -> tuple[str, str] | None:
        """Node and conversation that hold just these messages, the first of ``nodes`` that has one; it is taken out."""
        history = digest(messages)
        for node in nodes:
            if conversation := self._held.pop((node, model, history), ""):
                return node, conversation
        return None
