"""A node with a pool as a process: python -m tests.services.model_runner.pool_child ROOT NAME BROKER MODEL [WAY ...]

It does what the lines of its input say and answers each with a line; at the end of its input it ends. Ways: ``liar``
shows altered keys; ``reads`` holds reading to be quick, so that it fetches nothing; ``stalls`` sends one chunk of its
entries and then no other, and says so by a file ``stalled`` in its folder.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from pathlib import Path

from protocol.layout import ChunkRef
from services.model_runner.pool_peers import Bundle
from tests.services.model_runner.pool_nodes import BLOCKS, LyingEngine, PoolNode, prompt, wait_heard
from tests.support.waiting import wait_for

DEADLINE_S = 15.0
"""Of a fetch: what reading is held to take."""


def stall(marker: Path) -> None:
    """Give away one chunk of a bundle, and wait for ever with the next."""
    real = Bundle.verified_chunk
    given = threading.Event()

    def verified_chunk(self: Bundle, ref: ChunkRef, _index: int) -> bytes | None:
        if given.is_set():
            marker.write_text("")
            threading.Event().wait()
        given.set()
        return real(self, ref, _index)

    Bundle.verified_chunk = verified_chunk  # type: ignore[method-assign]


def announced(node: PoolNode, holder: str) -> bool:
    """Whether ``node`` knows by name what ``holder`` holds of the prompt, whatever it thinks of fetching it."""
    pool = node.pool
    places = pool._places(pool._engine, prompt(), BLOCKS)
    names = [[key.name(place.address) for key in pool._site.keys.versions()] for place in places]
    known: bool = pool.peers.holders(names, 0).get(holder) == BLOCKS
    return known


def main() -> None:
    """The process."""
    root, name, url, model, *ways = sys.argv[1:]
    node = PoolNode(Path(root), name, url, Path(model))
    if "liar" in ways:
        node.engine_class = LyingEngine
    if "stalls" in ways:
        stall(node.root / "stalled")
    node.start()
    node.pool.rates.read_s = lambda start, end: 0.0 if "reads" in ways else DEADLINE_S
    print("ready", flush=True)
    for line in sys.stdin:
        words = line.split()
        if words[0] == "heard":
            wait_heard(node, words[1], prompt())
        elif words[0] == "announced":
            wait_for(lambda: announced(node, words[1]), f"{name} has not heard what {words[1]} holds")  # noqa: B023
        elif words[0] == "entries":
            node.wait_entries(int(words[1]))
        print("yes", flush=True)
    node.stop()


if __name__ == "__main__":
    try:
        main()
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        os._exit(1)  # its threads would let it live on, and the test wait for its next line
