"""From the bus's threads to asyncio: a queue that wakes the loop once for all that came meanwhile."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any


class Mailbox:
    """Items put by any thread, taken by one task. Bounded by who puts: a run has an end."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._items: deque[Any] = deque()
        self._waking = False
        self._filled = asyncio.Event()

    def put(self, item: Any) -> None:
        """Add an item; from any thread."""
        self._items.append(item)
        if not self._waking:
            self._waking = True
            try:
                self._loop.call_soon_threadsafe(self._wake)
            except RuntimeError:
                pass  # the loop has ended, and with it who would take it

    def _wake(self) -> None:
        self._waking = False  # before the items are looked at: what comes from now on wakes again
        self._filled.set()

    async def take(self) -> list[Any]:
        """All that is there, at least one item."""
        while not self._items:
            self._filled.clear()
            await self._filled.wait()
        items = []
        while self._items:
            items.append(self._items.popleft())
        return items
