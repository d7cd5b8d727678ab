"""The other process in tests of the bus: ``bus_child.py MODE URL [FOLDER]``. It says on stdout what it does."""

from __future__ import annotations

import functools
import os
import sys
import threading
from pathlib import Path
from typing import Any

from edge.blobs import BlobReceiver, BlobSender
from edge.bus import Bus, Deferred
from edge.db import open_database
from edge.journal import JOURNAL, CommandJournal
from edge.mailbox import Mailbox
from edge.snapshot_store import SnapshotStore
from protocol.errors import BlobError
from protocol.identity import Keyring
from protocol.manifest import open_manifest
from protocol.messages import (
    BlobPull,
    Event,
    MemoryPut,
    MemoryStored,
    ModelGenerate,
    RunDone,
    ServiceState,
    SnapshotAnnounce,
)

FOREVER = threading.Event()
make_bus = functools.partial(Bus, protocol=os.environ.get("BUS_CHILD_PROTOCOL", "auto"))


def mailbox_of(bus: Bus) -> Mailbox | None:
    """In the folder that the environment names."""
    folder = os.environ.get("BUS_CHILD_MAILBOX")
    return Mailbox(64 * 1024 * 1024, bus.counters, Path(folder)) if folder else None


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())  # whole, whichever thread says it: print() mixes lines of two, or loses one


def hear_events(url: str, *, hold: bool) -> Bus:
    """A durable session that hears events; with ``hold`` its handler never ends.

    Told "barrier" it says so once the broker has read all that it sent before, acknowledgements included.
    """
    bus = make_bus(url=url, node="sprout", client="listener", durable_session=True)

    def barrier() -> None:
        bus.say(Event(name="barrier", severity="info", text="passed"), service="listener")
        if bus.flush(60.0):
            say("barrier passed")

    def heard(message: Any) -> None:
        say(f"heard {message.data.text}")
        if message.data.text == "barrier":
            threading.Thread(target=barrier, daemon=True).start()
        if hold:
            FOREVER.wait()

    bus.hear(Event, heard)
    return bus


def hear_and_die(url: str, folder: Path) -> Bus:
    """A durable session whose handler ends the process when it hears "poison"."""
    bus = make_bus(url=url, node="sprout", client="listener", durable_session=True)

    def heard(message: Any) -> None:
        say(f"heard {message.data.text}")
        if message.data.text == "poison":
            os._exit(3)

    bus.hear(Event, heard)
    bus.keep_asks_in(CommandJournal(open_database(folder / "journal.db", schema=JOURNAL)))
    return bus


def durable(url: str, folder: Path, *, hold: bool) -> Bus:
    """Answers generate asks from a journal; with ``hold`` it takes them on and never ends."""
    bus = make_bus(url=url, node="sprout", client="model_runner", durable_session=True)

    def generate(message: Any) -> Deferred:
        say(f"generate {message.data.conversation}")
        answer = Deferred()
        if not hold:
            answer.set_result(
                RunDone(run="r", conversation=message.data.conversation, text="done", tokens=[1], finish_reason="stop")
            )
        return answer

    bus.hear(ModelGenerate, generate)
    bus.keep_asks_in(CommandJournal(open_database(folder / "journal.db", schema=JOURNAL)))
    return bus


def answer_puts(url: str) -> Bus:
    bus = make_bus(url=url, node="sprout", client="memory_store", queue_messages=200)

    def put(message: Any) -> MemoryStored:
        return MemoryStored(id=message.id, node="sprout", scope="everyone", log_id="log", seq=1)

    bus.hear(MemoryPut, put)
    bus.hear(Event, lambda message: None)
    bus.hear(SnapshotAnnounce, lambda message: None)
    bus.hear(ServiceState, lambda message: None)
    return bus


def hold_blobs(url: str, folder: Path) -> Bus:
    """Answers pulls of the snapshots in ``folder``."""
    bus = make_bus(url=url, node="tomato", client="model_runner", durable_session=True)
    blob_bus = make_bus(url=url, node="tomato", client="model_runner-blobs")
    blob_bus.start()
    store = SnapshotStore(folder / "store")
    keyring = Keyring({"tomato": (folder / "fingerprint").read_text()})
    sender = BlobSender(
        store,
        blob_bus,
        lambda identifier: open_manifest(store.manifest(identifier), keyring),
        mailbox=mailbox_of(blob_bus),
    )
    bus.hear(BlobPull, sender.pull)
    return bus


def pull_blobs(url: str, folder: Path, holder_folder: Path, identifier: str) -> None:
    """Pull a snapshot from tomato; says how many bytes are here after each chunk."""
    keyring = Keyring({"tomato": (holder_folder / "fingerprint").read_text()})
    signed = SnapshotStore(holder_folder / "store").manifest(identifier)
    store = SnapshotStore(folder)
    bus = make_bus(url=url, node="sprout", client="model_runner")
    blob_bus = make_bus(url=url, node="sprout", client="model_runner-blobs")
    bus.start()
    blob_bus.start()
    receiver = BlobReceiver(
        bus,
        blob_bus,
        store,
        on_progress=lambda here, total: say(f"here {here} of {total}"),
        mailbox=mailbox_of(blob_bus),
    )
    try:
        receiver.pull("tomato", identifier, open_manifest(signed, keyring))
        say("pulled")
    except BlobError as error:
        say(f"failed {error}")
    FOREVER.wait()


def main(mode: str, url: str, *rest: str) -> None:
    if mode == "pull":
        pull_blobs(url, Path(rest[0]), Path(rest[1]), rest[2])
        return
    if mode == "will":
        lost = ServiceState(state="lost", time_us=0, reason="its connection broke")
        bus = make_bus(url=url, node="sprout", client="listener", will=(lost, {"service": "listener"}))
    elif mode in ("hear", "hear-and-hold"):
        bus = hear_events(url, hold=mode == "hear-and-hold")
    elif mode == "hear-and-die":
        bus = hear_and_die(url, Path(rest[0]))
    elif mode in ("durable", "durable-and-hold"):
        bus = durable(url, Path(rest[0]), hold=mode == "durable-and-hold")
    elif mode == "puts":
        bus = answer_puts(url)
    elif mode == "hold-blobs":
        bus = hold_blobs(url, Path(rest[0]))
    else:
        raise SystemExit(f"no mode {mode!r}")
    bus.start()
    say("ready")
    FOREVER.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
