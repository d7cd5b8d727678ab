"""Chunks for a receiver on the same host: by the mailbox, and over the bus wherever that fails."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from edge import blobs as blobs_module
from edge.counters import Counters
from edge.mailbox import Mailbox
from edge.snapshot_store import SnapshotStore
from protocol.layout import ChunkRef
from protocol.manifest import MAX_CHUNK_BYTES
from protocol.messages import BlobLetter
from tests.edge.bus_support import Child, wait_for
from tests.edge.conftest import OpenBus
from tests.edge.test_blobs import CHUNKS, Fetcher, Held, Holder, make_snapshot

MANY = 64 * 1024 * 1024
OpenMailbox = Callable[..., Mailbox]

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no memfd_create on this system")


@pytest.fixture
def held(tmp_path: Path) -> Held:
    return make_snapshot(tmp_path / "tomato")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "mailbox"


@pytest.fixture
def open_mailbox(folder: Path) -> Iterator[OpenMailbox]:
    with contextlib.ExitStack() as ending:

        def make(most_bytes: int = MANY, at: Path = folder) -> Mailbox:
            made = Mailbox(most_bytes, Counters(), at)
            ending.callback(made.close)
            return made

        yield make


@pytest.fixture
def holder(held: Held, open_bus: OpenBus, make_bus: OpenBus, closing: Any, open_mailbox: OpenMailbox) -> Holder:
    made = Holder(held, open_bus, make_bus, open_mailbox())
    closing.callback(made.sender.stop)
    return made


@pytest.fixture
def fetcher(open_bus: OpenBus, tmp_path: Path, open_mailbox: OpenMailbox) -> Fetcher:
    return Fetcher(
        open_bus("sprout", "model_runner"),
        open_bus("sprout", "model_runner-blobs"),
        SnapshotStore(tmp_path / "sprout"),
        [],
        open_mailbox(),
    )


def mailed(holder: Holder) -> tuple[int, int]:
    """Bytes that went by the mailbox, and over the bus."""
    counters = holder.blob_bus.counters
    return counters["blob.mailed_bytes"], counters["blob.sent_bytes"]


def mailbox_of(holder: Holder) -> Mailbox:
    found = holder.sender._mailbox
    assert found is not None
    return found


def test_on_one_host_only_handles_cross_the_bus(held: Held, holder: Holder, fetcher: Fetcher) -> None:
    assert fetcher.pull(held) == held.manifest.total_bytes
    assert fetcher.store.chunks(held.manifest) == held.data
    assert mailed(holder) == (held.manifest.total_bytes, 0)
    assert fetcher.progress[-1] == (held.manifest.total_bytes, held.manifest.total_bytes)
    wait_for(lambda: mailbox_of(holder).used_bytes == 0, "all letters were read")


def test_to_another_host_chunks_cross_the_bus(
    held: Held, holder: Holder, fetcher: Fetcher, tmp_path: Path, open_mailbox: OpenMailbox
) -> None:
    fetcher.mailbox = open_mailbox(at=tmp_path / "another host")
    fetcher.pull(held)
    assert fetcher.store.chunks(held.manifest) == held.data
    assert mailed(holder) == (0, held.manifest.total_bytes)


def test_what_a_full_mailbox_does_not_take_crosses_the_bus(
    held: Held,
    open_bus: OpenBus,
    make_bus: OpenBus,
    fetcher: Fetcher,
    closing: Any,
    open_mailbox: OpenMailbox,
) -> None:
    small = open_mailbox(MAX_CHUNK_BYTES * blobs_module.LETTER_CHUNKS)
    taken = small.put([bytes(MAX_CHUNK_BYTES)])
    holder = Holder(held, open_bus, make_bus, small)
    closing.callback(holder.sender.stop)
    fetcher.pull(held)
    assert fetcher.store.chunks(held.manifest) == held.data
    by_mailbox, by_bus = mailed(holder)
    assert by_mailbox + by_bus == held.manifest.total_bytes
    assert by_bus >= MAX_CHUNK_BYTES * blobs_module.LETTER_CHUNKS
    assert small._counters["mailbox.full"] >= 1
    assert taken is not None
    wait_for(lambda: small.used_bytes == MAX_CHUNK_BYTES, "only what nobody asked for is kept")


def test_after_a_letter_that_is_gone_all_crosses_the_bus(held: Held, holder: Holder, fetcher: Fetcher) -> None:
    mailbox = mailbox_of(holder)
    put = mailbox.put

    def put_and_lose(chunks: Sequence[bytes]) -> bytes | None:
        handle = put(chunks)
        assert handle is not None
        mailbox.withdraw(handle)
        return handle

    mailbox.put = put_and_lose  # type: ignore[method-assign, assignment]
    fetcher.pull(held)
    assert fetcher.store.chunks(held.manifest) == held.data
    assert fetcher.bus.counters["mailbox.lost"] >= 1
    assert mailed(holder)[1] == held.manifest.total_bytes


def test_what_is_damaged_in_a_letter_is_refused_and_comes_over_the_bus(
    held: Held, holder: Holder, fetcher: Fetcher
) -> None:
    mailbox = mailbox_of(holder)
    put = mailbox.put

    def damage(chunks: Sequence[bytes]) -> bytes | None:
        return put([chunks[0], bytes([chunks[1][0] ^ 1]) + chunks[1][1:], *chunks[2:]])

    mailbox.put = damage  # type: ignore[method-assign, assignment]
    fetcher.pull(held)
    assert fetcher.store.chunks(held.manifest) == held.data
    assert fetcher.bus.counters["refused.blob_chunk"] == 1
    assert fetcher.bus.counters["event.bad-chunk"] == 1
    assert mailed(holder)[1] > 0


@pytest.mark.parametrize(
    "indexes", [[CHUNKS], [2**40], [0, 0], [CHUNKS - 1, 0]], ids=["beyond", "far beyond", "twice", "another order"]
)
def test_a_letter_that_is_not_what_it_says_does_no_harm(
    indexes: list[int], held: Held, holder: Holder, fetcher: Fetcher
) -> None:
    said: list[BlobLetter] = []
    say = holder.blob_bus.say

    def say_wrong_first(message: Any, **names: Any) -> None:
        if isinstance(message, BlobLetter) and not said:
            said.append(message)
            say(BlobLetter(message.handle, indexes), **names)
        say(message, **names)

    holder.blob_bus.say = say_wrong_first  # type: ignore[method-assign]
    fetcher.pull(held)
    assert said
    assert fetcher.store.chunks(held.manifest) == held.data


def test_a_handle_that_is_lost_on_the_bus_is_asked_for_again(
    held: Held, holder: Holder, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blobs_module, "STALL_S", 0.3)
    lost: list[Any] = []
    say = holder.blob_bus.say

    def lose_one(message: Any, **names: Any) -> None:
        if lost:
            say(message, **names)
        else:
            lost.append(message)

    holder.blob_bus.say = lose_one  # type: ignore[method-assign]
    fetcher.pull(held)
    assert isinstance(lost[0], BlobLetter)
    assert fetcher.store.chunks(held.manifest) == held.data
    assert mailbox_of(holder).used_bytes > 0, "the lost one is kept until it expires"


def test_a_holder_killed_half_way_goes_on_when_it_is_back(
    held: Held,
    folder: Path,
    fetcher: Fetcher,
    start_child: Callable[..., Child],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blobs_module, "STALL_S", 0.5)
    monkeypatch.setenv("BUS_CHILD_MAILBOX", str(folder))
    child = start_child("hold-blobs", held.folder)
    child.wait_for("ready")
    put = fetcher.store.put_chunk
    stored: list[int] = []

    def put_and_kill(ref: ChunkRef, data: bytes | memoryview) -> None:
        if len(stored) == 5:
            child.kill()  # what this letter holds can still be read
            start_child("hold-blobs", held.folder)
        assert isinstance(data, memoryview) or len(stored) > 5
        put(ref, data)
        stored.append(ref.size_bytes)

    fetcher.store.put_chunk = put_and_kill  # type: ignore[method-assign]
    fetcher.pull(held)
    assert fetcher.store.chunks(held.manifest) == held.data
    assert len(stored) == CHUNKS


def test_a_receiver_killed_half_way_leaves_nothing_and_goes_on_where_it_was(
    held: Held,
    folder: Path,
    holder: Holder,
    start_child: Callable[..., Child],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blobs_module, "LETTER_CHUNKS", 4)
    monkeypatch.setenv("BUS_CHILD_MAILBOX", str(folder))
    half, go_on = threading.Event(), threading.Event()
    mailbox = mailbox_of(holder)
    put = mailbox.put

    def put_half(chunks: Sequence[bytes]) -> bytes | None:
        if holder.blob_bus.counters["blob.mailed_bytes"] >= CHUNKS // 2 * MAX_CHUNK_BYTES:
            half.set()
            go_on.wait(60.0)
        return put(chunks)

    mailbox.put = put_half  # type: ignore[method-assign, assignment]
    store = tmp_path / "sprout"
    child = start_child("pull", store, held.folder, held.identifier)
    wait_for(half.is_set, "half of it was handed over")
    wait_for(lambda: len(child.lines) >= 3, "some of it is here")
    child.kill()
    here = sum(SnapshotStore(store).has(ref) for ref in held.manifest.chunks)
    assert 3 <= here <= CHUNKS // 2
    go_on.set()
    again = start_child("pull", store, held.folder, held.identifier)
    again.wait_for("pulled")
    assert SnapshotStore(store).chunks(held.manifest) == held.data
    assert sum(line.startswith("here") for line in again.lines) == CHUNKS - here


def test_two_receivers_at_once_each_get_theirs(
    held: Held,
    holder: Holder,
    fetcher: Fetcher,
    open_bus: OpenBus,
    tmp_path: Path,
    open_mailbox: OpenMailbox,
) -> None:
    other = Fetcher(open_bus("mars", "a"), open_bus("mars", "b"), SnapshotStore(tmp_path / "mars"), [], open_mailbox())
    with ThreadPoolExecutor(2) as pool:
        for pulled in [pool.submit(each.pull, held) for each in (fetcher, other)]:
            assert pulled.result(60) == held.manifest.total_bytes
    for each in (fetcher, other):
        assert each.store.chunks(held.manifest) == held.data
    assert mailed(holder) == (2 * held.manifest.total_bytes, 0)
