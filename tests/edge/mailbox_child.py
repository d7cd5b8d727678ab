"""The other process in tests of the mailbox: ``mailbox_child.py FOLDER MOST_BYTES``; it answers line by line."""

from __future__ import annotations

import sys
from pathlib import Path

from blake3 import blake3

from edge.counters import Counters
from edge.mailbox import Mailbox
from protocol.errors import BlobError


def content(seed: str, size_bytes: int) -> bytes:
    """Of a letter: both ends can make it."""
    return blake3(seed.encode()).digest(length=size_bytes)


def main(folder: Path, most_bytes: int) -> None:
    mailbox = Mailbox(most_bytes, Counters(), folder)
    with mailbox.reading() as reader:
        assert reader is not None
        print("ready", flush=True)
        for line in sys.stdin:
            command, *words = line.split()
            if command == "put":
                handle = mailbox.put([content(words[0], int(words[1]))])
                print(handle.hex() if handle else "full", flush=True)
            elif command == "write-on":  # until it is killed
                print("writing", flush=True)
                for _ in range(100_000):
                    mailbox.put([content("x", 300_000)] * 4, ttl_ms=20)
            elif command == "used":
                print(mailbox.used_bytes, flush=True)
            elif command in ("read", "hold"):
                handle, seed, size_bytes = bytes.fromhex(words[0]), words[1], int(words[2])
                try:
                    with reader.open(handle, size_bytes) as view:
                        if command == "hold":
                            print("holding", flush=True)
                            sys.stdin.readline()
                        print("right" if view == content(seed, size_bytes) else "WRONG", flush=True)
                except BlobError as error:
                    print(f"lost: {error.reason}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
