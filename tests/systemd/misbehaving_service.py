"""A memory store that answers well until it is told to misbehave: ``misbehaving_service.py HOW``.

HOW: ``handler`` (a handler never returns), ``worker`` (a thread ends), ``main`` (the main loop hangs).
"""

from __future__ import annotations

import logging
import sys
import threading

from edge import service_table
from edge.service import Service, hears, main
from protocol.codec import Received
from protocol.messages import MemoryPut, MemoryStored

HOW = sys.argv[1]
never = threading.Event()


def misbehave_handler() -> None:
    never.wait()


def misbehave_main() -> None:
    logging.warning("the main loop hangs")
    never.wait()


class Misbehaving(Service):
    name = "memory_store"

    def setup(self) -> None:
        self.told = threading.Event()
        self.worker = self.worker_thread(self.told.wait, "worker")  # type: ignore[arg-type]
        self.other_told = threading.Event()

    def started(self) -> None:
        self.worker.start()

    @hears(MemoryPut)
    def put(self, message: Received) -> MemoryStored:
        if message.data.text == "misbehave":
            self.other_told.set()
            if HOW == "worker":
                self.told.set()
            if HOW == "handler":
                misbehave_handler()
        return MemoryStored(id=message.id, node=self.node, scope="everyone", log_id="log", seq=1)

    def tick(self) -> None:
        if HOW == "main" and self.other_told.is_set():
            misbehave_main()


if __name__ == "__main__":
    row = service_table.ServiceRow("memory_store", "__main__", "Misbehaving", "a test")
    service_table.BY_NAME["memory_store"] = row
    sys.exit(main(["memory_store"]))
