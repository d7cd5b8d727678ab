"""Work on chunks, spread over this machine's cores: hashing, encrypting and reading files leave Python's lock."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

MOST_THREADS = 4
"""Beyond it memory is what one waits for."""

T = TypeVar("T")
R = TypeVar("R")

_making = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_inside = threading.local()


def threads() -> int:
    """How many there are: one for each core that this process may use, and few."""
    return min(MOST_THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def spread(call: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """``call`` of each item, several at a time; the results in order. Raises what the first that failed has raised.

    When it raises, all calls have ended. What is called may itself call this: it then goes on in its own thread.
    """
    waiting = list(items)
    if len(waiting) < 2 or threads() < 2 or getattr(_inside, "is", False):
        return [call(item) for item in waiting]
    futures = [_threads().submit(call, item) for item in waiting]
    found: list[R] = []
    failed: BaseException | None = None
    for future in futures:
        if failed is not None and future.cancel():
            continue
        try:
            found.append(future.result())
        except BaseException as error:  # noqa: BLE001 - raised below, once nothing of it runs any more
            failed = failed or error
    if failed is not None:
        raise failed
    return found


def _threads() -> ThreadPoolExecutor:
    global _pool
    with _making:
        if _pool is None:
            _pool = ThreadPoolExecutor(threads(), "chunks", initializer=lambda: setattr(_inside, "is", True))
        return _pool
