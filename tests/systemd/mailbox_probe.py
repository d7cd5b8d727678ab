"""Run in place of two services inside their units, as ``write`` and ``read``: whether a letter comes from one to the
other. What each saw, as JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from blake3 import blake3

from edge.counters import Counters
from edge.mailbox import Mailbox

STATE = Path("/var/lib/mindstream/mailbox-probe")
CONTENT = blake3(b"a letter").digest(length=300_000)
TRANSFER = "probe"


def said(name: str) -> bytes:
    """What the other one has written."""
    while not (STATE / name).exists():
        time.sleep(0.05)
    return (STATE / name).read_bytes()


def say(name: str, what: bytes) -> None:
    STATE.mkdir(exist_ok=True)
    (STATE / f".{name}").write_bytes(what)
    (STATE / f".{name}").replace(STATE / name)


def write() -> dict[str, object]:
    mailbox = Mailbox(2**22, Counters())
    here = mailbox.is_here(said("proof"), TRANSFER)
    say("handle", mailbox.put([CONTENT]) or b"")
    said("reader-ended")
    writer = mailbox._writer
    found = {"here": here, "left_bytes": mailbox.used_bytes, "folder": writer is not None and writer.folder.is_there()}
    mailbox.close()
    return {**found, "reason": mailbox.reason}


def read() -> dict[str, object]:
    with Mailbox(2**22, Counters()).reading() as reader:
        if reader is None:
            return {"read": "no mailbox"}
        say("proof", reader.proof(TRANSFER))
        with reader.open(said("handle"), len(CONTENT)) as view:
            return {"read": "right" if view == CONTENT else "WRONG"}


print(json.dumps(write() if sys.argv[1] == "write" else read()), flush=True)
