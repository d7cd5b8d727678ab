"""The mailbox: four nodes of one host hand chunks to four others, by handles, and the same bytes over the broker.

Eight processes on one broker, Mosquitto where it is installed. Each reader pulls from all writers, one after another
and all readers at once, as a snapshot is pulled: the writer verifies each chunk as it does one that it has read from
its disk, the reader verifies it against the manifest. Chunks come from memory and go to nowhere, so that no disk is
measured. By the mailbox and over the broker take turns, and medians count.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import sys
import time
from dataclasses import dataclass

from blake3 import blake3

from bench.report import Figures
from bench.snapshot.frame import Bench
from bench.worker import Worker, answer, commands, worker
from broker.base import Broker
from broker.embedded import EmbeddedBroker
from broker.mosquitto import MosquittoBroker, find_mosquitto
from edge import blobs
from edge.bus import Bus
from edge.mailbox import Mailbox
from protocol.identity import digest
from protocol.layout import ChunkRef
from protocol.manifest import MAX_CHUNK_BYTES, verify_chunk
from protocol.messages import BlobPull

WRITERS = 4
READERS = 4
ROUNDS = 3
PULL_CHUNKS = 128
"""64 MiB that each reader pulls from each writer."""
HANDLES = 1_000
"""That each reader gets from each writer, each for 4 KiB."""
SMALL_BYTES = 4096
DISTINCT = 16
"""Chunks that a writer has; a pull names each again and again."""
MOST_BYTES = 1024 * 1024 * 1024
LARGE, SMALL = "1" * 64, "2" * 64


def part(bench: Bench) -> Figures:
    """Handles a second, and gigabytes a second both ways."""
    pulled, handles, rounds = (8, 20, 1) if bench.quick else (PULL_CHUNKS, HANDLES, ROUNDS)
    brokers: type[Broker] = MosquittoBroker if find_mosquitto() is not None else EmbeddedBroker
    with contextlib.ExitStack() as ending:
        broker = ending.enter_context(brokers())

        def start(role: str, number: int) -> Worker:
            made = ending.enter_context(worker(__name__, role, broker.url, str(number), str(pulled), str(handles)))
            assert made.read() == "ready"
            return made

        writers = [start("writer", number) for number in range(WRITERS)]
        readers = [start("reader", number) for number in range(READERS)]
        sizes = {"mailbox": pulled * MAX_CHUNK_BYTES, "broker": pulled * MAX_CHUNK_BYTES, "handles": handles}
        rates: dict[str, list[float]] = {kind: [] for kind in sizes}
        for number, (kind, each) in itertools.product(range(rounds), sizes.items()):
            for writing in writers:
                writing.write(f"letter {1 if kind == 'handles' else blobs.LETTER_CHUNKS}")
                writing.read()
            started_s = time.monotonic()
            for reading in readers:
                reading.write(f"{kind} 0")
            for reading in readers:
                said = reading.read()
                assert said == "0" if kind != "broker" else int(said) > 0, f"{kind}: {said} bytes came over the broker"
            rates[kind].append(each * WRITERS * READERS / (time.monotonic() - started_s))
            unit = "handles/s" if kind == "handles" else "GB/s"
            rate = rates[kind][-1] / (1 if kind == "handles" else 1e9)
            bench.progress(f"round {number + 1}, {kind}: {rate:,.2f} {unit}")
    by_mailbox, by_broker = statistics.median(rates["mailbox"]), statistics.median(rates["broker"])
    return {
        "mailbox_handles_per_s": round(statistics.median(rates["handles"])),
        "mailbox_gb_per_s": round(by_mailbox / 1e9, 3),
        "mailbox_broker_gb_per_s": round(by_broker / 1e9, 3),
        "mailbox_over_broker": round(by_mailbox / by_broker, 1),
        "mailbox_broker": brokers.__name__.removesuffix("Broker").lower(),
    }


@dataclass
class _Corpus:
    """What writer ``number`` holds: both ends can make it."""

    number: int
    size_bytes: int
    count: int

    def __post_init__(self) -> None:
        seeds = (f"{self.number}/{at}".encode() for at in range(DISTINCT))
        self.data = [blake3(seed).digest(length=self.size_bytes) for seed in seeds]
        refs = [ChunkRef(digest(each), len(each)) for each in self.data]
        self.chunks = [refs[at % DISTINCT] for at in range(self.count)]

    def has(self, _ref: ChunkRef) -> bool:
        return True

    def verified_chunk(self, ref: ChunkRef, index: int) -> bytes:
        found = self.data[index % DISTINCT]
        verify_chunk(ref, found, index=index)
        return found


class _Nowhere:
    """Takes chunks, and keeps none."""

    over_broker_bytes = 0

    def has(self, _ref: ChunkRef) -> bool:
        return False

    def put_chunk(self, ref: ChunkRef, data: bytes | memoryview) -> None:
        if isinstance(data, bytes):
            self.over_broker_bytes += ref.size_bytes


def _writer(url: str, number: int, pulled: int, handles: int) -> None:
    held = {LARGE: _Corpus(number, MAX_CHUNK_BYTES, pulled), SMALL: _Corpus(number, SMALL_BYTES, handles)}
    bus = Bus(url=url, node=f"writer{number}", client="model_runner")
    blob_bus = Bus(url=url, node=f"writer{number}", client="model_runner-blob")
    mailbox = Mailbox(MOST_BYTES, blob_bus.counters)
    # It has no snapshots: all it holds is something else.
    sender = blobs.BlobSender(None, blob_bus, lambda _: None, held.get, mailbox)  # type: ignore[arg-type, return-value]
    bus.hear(BlobPull, sender.pull)
    bus.start()
    blob_bus.start()
    answer("ready")
    for _, count in commands():
        blobs.LETTER_CHUNKS = count
        answer(count)
    sender.stop()
    mailbox.close()
    blob_bus.stop()
    bus.stop()


def _reader(url: str, number: int, pulled: int, handles: int) -> None:
    large = [_Corpus(each, MAX_CHUNK_BYTES, pulled) for each in range(WRITERS)]
    small = [_Corpus(each, SMALL_BYTES, handles) for each in range(WRITERS)]
    bus = Bus(url=url, node=f"reader{number}", client="model_runner")
    blob_bus = Bus(url=url, node=f"reader{number}", client="model_runner-blob")
    mailbox = Mailbox(MOST_BYTES, blob_bus.counters)
    bus.start()
    blob_bus.start()
    answer("ready")
    for kind, _ in commands():
        target = _Nowhere()
        receiver = blobs.BlobReceiver(bus, blob_bus, target, mailbox=None if kind == "broker" else mailbox)
        for turn in range(WRITERS):
            writer = (number + turn) % WRITERS
            corpus, identifier = (small[writer], SMALL) if kind == "handles" else (large[writer], LARGE)
            receiver.pull(f"writer{writer}", identifier, corpus)
        answer(target.over_broker_bytes)
    mailbox.close()
    blob_bus.stop()
    bus.stop()


if __name__ == "__main__":
    _role, _url, *_numbers = sys.argv[1:]
    {"writer": _writer, "reader": _reader}[_role](_url, *map(int, _numbers))
