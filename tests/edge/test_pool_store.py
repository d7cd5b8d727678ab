"""The pool's store: on a disk and on real stores of other kinds; what goes first, what is damaged, what is full."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from pathlib import Path

import pytest

from edge.pool_files import Data, LocalFiles, PoolFiles, UrlFiles
from edge.pool_store import ENTRIES, PoolStore, chunk_indexes
from protocol.errors import BlobError, StorageError
from protocol.group_key import GroupKey
from protocol.identity import Identity, digest
from protocol.layout import RAW
from protocol.manifest import ModelDigests, NumericsFingerprint
from protocol.pool import NO_PARENT, PoolEntry, PoolPart, SignedPoolEntry, entry_id, sign_entry, witness
from tests.support.ports import free_port
from tests.support.waiting import DEADLINE_S

TOMATO = Identity("tomato", bytes(range(32)))
KEY = GroupKey(bytes(32), 1, "tomato", 0)
DIGESTS = ModelDigests(bytes(32), bytes(32), bytes(32))
NUMERICS = NumericsFingerprint("transformers", "1", "cpu", "avx2", "bfloat16", 1, "multiples of 256", "deterministic")


def entry(
    label: str, parent: str = "", *, cost_ms: int = 100, size: int = 1000
) -> tuple[SignedPoolEntry, PoolEntry, list[bytes]]:
    """An entry of one chunk, called after ``label``."""
    chunk = (label.encode() * size)[:size]
    found = PoolEntry(
        version=1,
        model="small",
        digests=DIGESTS,
        creator="tomato",
        created_us=1,
        fingerprint=NUMERICS,
        kv_dtype="bfloat16",
        codec=RAW,
        key_id=KEY.id,
        name=KEY.name(label.encode()),
        parent=KEY.name(parent.encode()) if parent else NO_PARENT,
        block=1 if parent else 0,
        cost_ms=cost_ms,
        full=PoolPart(size - 28, digest(chunk), bytes(32)),
    )
    return sign_entry(TOMATO, found), found, [chunk]


def put(store: PoolStore, label: str, parent: str = "", **settings: int) -> bool:
    return store.put(*entry(label, parent, **settings))


def names(store: PoolStore) -> set[bytes]:
    return {held.name for held in store.all()}


def called(*labels: str) -> set[bytes]:
    return {KEY.name(label.encode()) for label in labels}


@pytest.fixture
def files(tmp_path: Path) -> LocalFiles:
    return LocalFiles(tmp_path / "pool")


class _FtpServer:
    """A real FTP server on loopback, in a thread."""

    def __init__(self, folder: Path) -> None:
        from pyftpdlib.authorizers import DummyAuthorizer
        from pyftpdlib.handlers import FTPHandler
        from pyftpdlib.servers import FTPServer

        authorizer = DummyAuthorizer()
        authorizer.add_anonymous(str(folder), perm="elradfmwMT")
        handler = type("Handler", (FTPHandler,), {"authorizer": authorizer})
        self.port = free_port()
        self._server = FTPServer(("127.0.0.1", self.port), handler)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._server.serve_forever(timeout=0.05, blocking=False, handle_exit=False)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(DEADLINE_S)
        self._server.close_all()


@pytest.fixture(params=["folder", "file", "memory", "ftp"])
def any_files(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[PoolFiles]:
    if request.param == "folder":
        yield LocalFiles(tmp_path / "pool")
        return
    pytest.importorskip("fsspec", reason="fsspec is not installed: make install (extra `pool`)")
    if request.param == "ftp":
        pytest.importorskip("pyftpdlib", reason="pyftpdlib is not installed: make install (extra `dev`)")
        (tmp_path / "served").mkdir()
        server = _FtpServer(tmp_path / "served")
        try:
            yield UrlFiles(f"ftp://127.0.0.1:{server.port}/pool")
        finally:
            server.stop()
        return
    yield UrlFiles(f"file://{tmp_path}/pool" if request.param == "file" else f"memory://{tmp_path.name}/pool")


def test_entries_and_statements_come_back_from_any_store_for_another_process_as_well(any_files: PoolFiles) -> None:
    store = PoolStore(any_files, 10**6)
    store.refresh()
    assert store.totals[0] == 0
    signed, made, chunks = entry("a")
    assert store.put(signed, made, chunks)
    said = witness(Identity("sprout", bytes(32)), entry_id(signed), True, "exact")
    assert store.keep_statement(entry_id(signed), "sprout", said)
    put(store, "b", "a")
    other = PoolStore(any_files, 10**6)
    other.refresh()
    assert names(other) == called("a", "b")
    held = other.of_name(KEY.name(b"a"))[0]
    assert (held.cost_ms, held.creator, held.parent) == (100, "tomato", NO_PARENT)
    found = other.signed(held)
    assert (found.entry, found.witnesses) == (signed.entry, [said])
    assert other.chunks(held, made, chunk_indexes(made, ["full"])) == chunks
    other.remove(held)
    store.refresh()
    assert names(store) == called("b"), "what others have removed is noticed"
    with pytest.raises(BlobError):
        other.signed(held)
    assert other.clear() == 1
    assert any_files.list(ENTRIES) == {}


def test_what_saves_least_reading_for_its_bytes_goes_first_and_never_what_another_continues(files: LocalFiles) -> None:
    size = files_size(files)
    store = PoolStore(files, 3 * size)
    put(store, "cheap", cost_ms=1)
    put(store, "cheap-child", "cheap", cost_ms=500)
    put(store, "dear", cost_ms=1000)
    # The cheapest is the parent of another: that one goes before it.
    assert put(store, "new", cost_ms=600)
    assert names(store) == called("cheap", "dear", "new")
    assert put(store, "newer", cost_ms=600)
    assert names(store) == called("dear", "new", "newer")


def files_size(files: LocalFiles) -> int:
    """Of one entry on the disk, as long as the longest here, nearly."""
    store = PoolStore(LocalFiles(Path(files.where) / "probe"), 10**9)
    put(store, "cheap-child", "cheap", cost_ms=1000)
    return store.totals[1] + 64


def test_what_was_used_stays_and_what_is_not_used_any_more_ages(files: LocalFiles) -> None:
    size = files_size(files)
    store = PoolStore(files, 3 * size)
    for label in ("a", "b", "c"):
        put(store, label)
    for _ in range(3):
        store.used(store.of_name(KEY.name(b"a"))[0])
    put(store, "d")
    put(store, "e")
    assert KEY.name(b"a") in names(store)
    for number in range(12):  # none of which is used more than once: the clock goes on, and "a" does not
        put(store, f"later-{number}", cost_ms=100 + number)
    assert KEY.name(b"a") not in names(store)


def test_what_is_set_aside_or_has_lost_its_parent_goes_before_anything_else(files: LocalFiles) -> None:
    size = files_size(files)
    store = PoolStore(files, 3 * size)
    put(store, "accused", cost_ms=9000)
    put(store, "orphan", "nobody", cost_ms=8000)
    put(store, "cheap", cost_ms=1)
    accused = store.of_name(KEY.name(b"accused"))[0].identifier
    store.set_aside_by(lambda held: held.identifier == accused)
    put(store, "x", cost_ms=50)
    assert names(store) == called("orphan", "cheap", "x")
    put(store, "y", cost_ms=50)
    assert names(store) == called("cheap", "x", "y")


def test_what_is_worth_less_than_all_that_is_here_is_not_kept(files: LocalFiles) -> None:
    counted: list[str] = []
    store = PoolStore(files, 2 * files_size(files), lambda counter, _text: counted.append(counter))
    put(store, "a", cost_ms=500)
    put(store, "b", cost_ms=500)
    assert not put(store, "worthless", cost_ms=0)
    assert names(store) == called("a", "b")
    assert not put(store, "larger than all", size=10**6)
    assert counted == ["pool.not_kept"] * 2


@pytest.mark.parametrize("harm", ["cut", "flipped in a chunk", "flipped in the header", "emptied", "another's"])
def test_a_damaged_entry_is_refused_removed_and_said(files: LocalFiles, harm: str) -> None:
    dropped: list[tuple[str, str]] = []
    store = PoolStore(files, 10**6, lambda counter, text: dropped.append((counter, text)))
    signed, made, chunks = entry("a")
    store.put(signed, made, chunks)
    put(store, "b")
    path = next(Path(files.where, ENTRIES).glob(f"*{entry_id(signed)}*"))
    other = next(each for each in Path(files.where, ENTRIES).iterdir() if each != path)
    body = bytearray(path.read_bytes())
    if harm == "cut":
        del body[-100:]
    elif harm == "flipped in a chunk":
        body[-100] ^= 1
    elif harm == "flipped in the header":
        body[40] ^= 1
    path.write_bytes(b"" if harm == "emptied" else other.read_bytes() if harm == "another's" else bytes(body))
    with pytest.raises(BlobError):
        store.chunks(store.of_name(made.name)[0], made, [0])
    assert not path.exists()
    assert names(store) == called("b")
    assert [counter for counter, _ in dropped] == ["pool.damaged"]


class FullDisk(LocalFiles):
    """A folder on a disk with room for so many bytes."""

    room = 10**9

    def write(self, folder: str, name: str, parts: Sequence[Data]) -> None:
        if sum(self.list(folder).values()) + sum(map(len, parts)) > self.room:
            raise StorageError("writing: no space left on device", reason=str(errno.ENOSPC))
        super().write(folder, name, parts)


def test_a_full_disk_makes_the_pool_smaller_and_one_with_no_room_at_all_is_an_error(tmp_path: Path) -> None:
    disk = FullDisk(tmp_path / "pool")
    store = PoolStore(disk, 10**9)
    for label in ("a", "b", "c", "d"):
        put(store, label)
    disk.room = store.totals[1] + 10
    assert put(store, "e", cost_ms=1000)
    assert KEY.name(b"e") in names(store)
    assert len(names(store)) == 3, "half of it made room"
    disk.room = 0
    with pytest.raises(StorageError):
        put(store, "f", cost_ms=2000)


def test_what_was_being_written_when_a_process_died_is_no_entry_and_goes_in_time(
    files: LocalFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = PoolStore(files, 10**6)
    put(store, "a")
    half = Path(files.where, ENTRIES, ".writing-019d463e-967b-7000-8000-000000000001")
    half.write_bytes(b"MSPOOL01 half")
    store.refresh()
    assert names(store) == called("a")
    assert half.exists(), "it may be another process's, writing now"
    monkeypatch.setattr("edge.pool_files.LEFTOVER_S", -1.0)
    store.refresh()
    assert not half.exists()


def _put_many(folder: str, first: int) -> None:
    store = PoolStore(LocalFiles(Path(folder)), 20_000)
    for number in range(first, first + 30):
        store.refresh()
        put(store, f"e{number}")
        for held in store.all():
            try:
                signed = store.signed(held)
                assert entry_id(signed) == held.identifier
            except BlobError as error:
                if error.reason != "gone":
                    raise


def test_several_processes_put_read_and_throw_out_in_one_folder_without_breaking_each_others_entries(
    tmp_path: Path,
) -> None:
    context = get_context("spawn")
    processes = [context.Process(target=_put_many, args=(str(tmp_path), 100 * number)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(DEADLINE_S)
        assert process.exitcode == 0
    store = PoolStore(LocalFiles(tmp_path), 10**6)
    store.refresh()
    assert store.all()
    for held in store.all():
        store.signed(held)


def test_a_url_that_cannot_be_opened_says_what_to_do(tmp_path: Path) -> None:
    pytest.importorskip("fsspec", reason="fsspec is not installed: make install (extra `pool`)")
    with pytest.raises(StorageError, match="nonsense"):
        PoolStore(UrlFiles("nonsense://there"), 10**6).refresh()
    with pytest.raises(StorageError) as refused:
        PoolStore(UrlFiles(f"ftp://127.0.0.1:{free_port()}/pool"), 10**6).refresh()
    assert refused.value.hint
