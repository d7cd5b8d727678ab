"""Letters between processes of one host: right or not at all, whoever dies, and nothing left behind."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from edge.counters import Counters
from edge.mailbox import Mailbox
from edge.mailbox_folder import HANDLE_BYTES, HERE, SOCKET_ID_BYTES, MailboxFolder, sealed_memory, unix_socket
from edge.mailbox_reader import LetterReader
from protocol.errors import BlobError
from tests.edge.mailbox_child import content
from tests.support.waiting import DEADLINE_S, wait_for

ROOT = Path(__file__).resolve().parents[2]
MANY = 64 * 1024 * 1024

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no memfd_create on this system")


class Child:
    """``mailbox_child.py`` in a process of its own."""

    def __init__(self, folder: Path, most_bytes: int = MANY, **options: Any) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.edge.mailbox_child", str(folder), str(most_bytes)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            **options,
        )
        self.said()

    def tell(self, *words: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write((" ".join(map(str, words)) + "\n").encode())
        self.process.stdin.flush()

    def said(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode().strip()

    def ask(self, *words: object) -> str:
        self.tell(*words)
        return self.said()

    def put(self, seed: str, size_bytes: int) -> bytes:
        return bytes.fromhex(self.ask("put", seed, size_bytes))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE_S)
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]


StartChild = Callable[..., Child]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "mailbox"


@pytest.fixture
def start(folder: Path) -> Iterator[StartChild]:
    with contextlib.ExitStack() as ending:

        def start(*arguments: Any, **options: Any) -> Child:
            child = Child(folder, *arguments, **options)
            ending.callback(child.kill)
            return child

        yield start


@pytest.fixture
def counters() -> Counters:
    return Counters()


@pytest.fixture
def mailbox(folder: Path, counters: Counters) -> Iterator[Mailbox]:
    made = Mailbox(MANY, counters, folder)
    yield made
    made.close()


@pytest.fixture
def reader(mailbox: Mailbox) -> Iterator[LetterReader]:
    with mailbox.reading() as found:
        assert found is not None
        yield found


def read(reader: LetterReader, handle: bytes, size_bytes: int) -> bytes:
    with reader.open(handle, size_bytes) as view:
        return bytes(view)


def put(mailbox: Mailbox, *chunks: bytes, ttl_ms: int = 600_000) -> bytes:
    handle = mailbox.put(chunks, ttl_ms)
    assert handle is not None
    return handle


def descriptors() -> int:
    """How many this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


def sockets(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_socket()}


# --- what a letter is -----------------------------------------------------------------------------------------


def test_a_letter_crosses_whole_and_is_gone_when_it_was_read(
    start: StartChild, mailbox: Mailbox, reader: LetterReader
) -> None:
    child = start()
    handle = child.put("a", 1_000_001)
    assert len(handle) == HANDLE_BYTES
    assert read(reader, handle, 1_000_001) == content("a", 1_000_001)
    wait_for(lambda: child.ask("used") == "0", "its writer knows that it was read")
    own = put(mailbox, b"one", b"", b"two" * 200_000)
    assert child.ask("read", own.hex(), "wrong-seed", 600_003) == "WRONG"
    wait_for(lambda: mailbox.used_bytes == 0, "its writer knows that it was read")


def test_a_letter_is_for_one_reader(mailbox: Mailbox, reader: LetterReader) -> None:
    handle = put(mailbox, b"content")
    with reader.open(handle, 7) as view, mailbox.reading() as other:
        assert other is not None
        with pytest.raises(BlobError, match="another reader"), other.open(handle, 7):
            pass
        assert view == b"content"
    with pytest.raises(BlobError, match="expired"), reader.open(handle, 7):
        pass


def test_nobody_can_change_what_is_in_a_letter() -> None:
    descriptor = sealed_memory([b"content"])
    with contextlib.closing(os.fdopen(descriptor, "rb", closefd=True)):
        for change in (
            lambda: os.pwrite(descriptor, b"C", 0),
            lambda: os.ftruncate(descriptor, 3),
            lambda: os.ftruncate(descriptor, 30),
            lambda: mmap.mmap(descriptor, 7, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
            lambda: fcntl.fcntl(descriptor, 1033, 0x10),
        ):
            with pytest.raises(PermissionError):
                change()
        with contextlib.closing(mmap.mmap(descriptor, 7, mmap.MAP_SHARED, mmap.PROT_READ)) as mapped:
            assert mapped[:] == b"content"
            with pytest.raises(TypeError):
                mapped[0] = 0


def test_a_view_that_is_kept_keeps_its_content(mailbox: Mailbox, reader: LetterReader) -> None:
    handle = put(mailbox, b"content" * 10_000)
    with reader.open(handle, 70_000) as view:
        kept = view[7:14]
        assert view.readonly
    mailbox.close()
    assert kept == b"content"


@pytest.mark.parametrize("kind", ["unsealed", "write seal missing", "longer", "a file", "two", "nothing", "silent"])
def test_what_a_hostile_writer_hands_over_is_not_opened(
    kind: str, folder: Path, reader: LetterReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.mailbox_reader.ANSWER_S", 0.5)
    made: list[int] = []
    if kind in ("unsealed", "write seal missing"):
        made.append(os.memfd_create("hostile", 0x3))
        os.write(made[0], b"content")
        if kind == "write seal missing":
            fcntl.fcntl(made[0], 1033, 0x2 | 0x4 | 0x10)  # with F_SEAL_FUTURE_WRITE its writer's own mapping stays
    elif kind == "longer":
        made.append(sealed_memory([b"content and more"]))
    elif kind == "a file":
        (tmp_path / "file").write_bytes(b"content")
        made.append(os.open(tmp_path / "file", os.O_RDONLY))
    elif kind == "two":
        made += [sealed_memory([b"content"]), sealed_memory([b"content"])]
    name = bytes(range(SOCKET_ID_BYTES))
    before = descriptors()
    with unix_socket() as listener:
        listener.bind(f"/proc/self/fd/{reader._folder.descriptor}/{name.hex()}")
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(100)
                if kind != "silent":
                    socket.send_fds(connection, [HERE], made)
                connection.recv(100)  # until it closes

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(BlobError), reader.open(name + bytes(16), 7):
            pass
        thread.join(DEADLINE_S)
    for descriptor in made:
        os.close(descriptor)
    assert descriptors() <= before, "no descriptor is kept"


@pytest.mark.parametrize("handle", [b"", bytes(HANDLE_BYTES), bytes(HANDLE_BYTES + 1), b"/" * HANDLE_BYTES])
def test_a_handle_of_nothing_is_not_opened(handle: bytes, mailbox: Mailbox, reader: LetterReader) -> None:
    for size_bytes in (0, -1, 7, 2**40):
        with pytest.raises(BlobError), reader.open(handle, size_bytes):
            pass
    with pytest.raises(BlobError), reader.open(put(mailbox, b"content"), 8):
        pass


# --- who dies -------------------------------------------------------------------------------------------------


def test_a_reader_that_dies_while_it_reads_gives_the_room_back(
    start: StartChild, mailbox: Mailbox, counters: Counters
) -> None:
    child = start()
    handle = put(mailbox, content("a", 500_000))
    assert child.ask("hold", handle.hex(), "a", 500_000) == "holding"
    assert mailbox.used_bytes == 500_000
    child.kill()
    wait_for(lambda: mailbox.used_bytes == 0, "what the dead reader had is let go")
    wait_for(lambda: counters["mailbox.orphaned"] == 1, "it is counted")


def test_a_writer_that_dies_while_its_letter_is_read_spoils_nothing(start: StartChild) -> None:
    writer, reading = start(), start()
    handle = writer.put("a", 700_000)
    later = writer.put("b", 700_000)
    assert reading.ask("hold", handle.hex(), "a", 700_000) == "holding"
    writer.kill()
    assert reading.ask("go on") == "right"
    assert reading.ask("read", later.hex(), "b", 700_000).startswith("lost"), "what nobody had asked for went with it"


def test_a_writer_that_dies_while_writing_leaves_a_socket_at_most_and_the_next_one_removes_it(
    start: StartChild, folder: Path, mailbox: Mailbox, reader: LetterReader
) -> None:
    put(mailbox, b"content")
    child = start()
    handle = child.put("a", 100)
    assert child.ask("write-on") == "writing"
    child.kill()
    assert {path.name for path in folder.iterdir()} == {"secret", *sockets(folder)}
    assert len(sockets(folder)) == 2
    with pytest.raises(BlobError), reader.open(handle, 100):
        pass
    other = start()
    other.put("b", 1)
    assert handle[:SOCKET_ID_BYTES].hex() not in sockets(folder)
    assert len(sockets(folder)) == 2, "those of the living stay"


def test_many_that_open_at_once_take_nobodys_socket_away(folder: Path) -> None:
    made = [Mailbox(MANY, Counters(), folder) for _ in range(16)]
    handles: list[bytes] = [b""] * len(made)
    together = threading.Barrier(len(made))

    def open_one(at: int) -> None:
        together.wait(DEADLINE_S)
        handles[at] = put(made[at], str(at).encode())

    threads = [threading.Thread(target=open_one, args=(at,)) for at in range(len(made))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    with made[0].reading() as reader:
        assert reader is not None
        assert [read(reader, handle, len(str(at))) for at, handle in enumerate(handles)] == [
            str(at).encode() for at in range(len(made))
        ]
    for each in made:
        each.close()
    assert sockets(folder) == set()


# --- when, and how much ---------------------------------------------------------------------------------------


def test_a_letter_that_nobody_asks_for_expires(mailbox: Mailbox, reader: LetterReader, counters: Counters) -> None:
    handle = put(mailbox, bytes(1000), ttl_ms=1)
    wait_for(lambda: mailbox.used_bytes == 0, "it expires with nobody there to look at it")
    assert counters["mailbox.expired"] == 1
    with pytest.raises(BlobError, match="expired"), reader.open(handle, 1000):
        pass


def test_a_letter_that_is_being_read_does_not_expire(mailbox: Mailbox, reader: LetterReader) -> None:
    handle = put(mailbox, b"content")
    with reader.open(handle, 7) as view:
        mailbox._writer._letters[handle[SOCKET_ID_BYTES:]].expires_ms = 0  # type: ignore[union-attr]
        put(mailbox, b"another", ttl_ms=0)
        assert mailbox.used_bytes >= 7
        assert view == b"content"


def test_a_full_mailbox_takes_nothing_until_something_was_read(
    folder: Path, counters: Counters, start: StartChild
) -> None:
    small = Mailbox(1000, counters, folder)
    with small.reading() as reader:
        assert reader is not None
        handle = put(small, bytes(600))
        assert small.put([bytes(401)]) is None
        assert counters["mailbox.full"] == 1
        other = put(small, bytes(400))
        with reader.open(handle, 600):
            assert small.put([b"x"]) is None, "what a reader has counts"
        wait_for(lambda: small.used_bytes == 400, "it was read")
        small.withdraw(other)
        assert put(small, bytes(1000))
    small.close()
    assert small.put([b"x"]) is None
    child = start(50)
    assert child.ask("put", "a", 51) == "full"


def test_there_is_none_where_it_is_turned_off(folder: Path, counters: Counters) -> None:
    off = Mailbox(0, counters, folder)
    assert off.put([b"x"]) is None
    with off.reading() as reader:
        assert reader is None
    assert not folder.exists()


def test_nothing_is_left_after_many_letters(mailbox: Mailbox) -> None:
    put(mailbox, b"first")  # opens what stays open
    before = descriptors()
    for _ in range(3):
        with mailbox.reading() as reader:
            assert reader is not None
            for size_bytes in range(1, 60):
                assert read(reader, put(mailbox, bytes(size_bytes)), size_bytes) == bytes(size_bytes)
    wait_for(lambda: mailbox.used_bytes == 5, "all but the first are done with")
    wait_for(lambda: descriptors() <= before, "no descriptor is kept")


# --- whose it is ----------------------------------------------------------------------------------------------


def test_a_proof_is_of_this_folder_and_this_transfer(folder: Path, tmp_path: Path, mailbox: Mailbox) -> None:
    elsewhere = Mailbox(MANY, Counters(), tmp_path / "elsewhere")
    with mailbox.reading() as here, elsewhere.reading() as there:
        assert here is not None
        assert there is not None
        assert mailbox.is_here(here.proof("t1"), "t1")
        assert not mailbox.is_here(here.proof("t1"), "t2")
        assert not mailbox.is_here(there.proof("t1"), "t1")
        assert not mailbox.is_here(b"", "t1")
        assert here.proof("t1") == MailboxFolder(folder).proof("t1"), "whoever reads the folder"
    elsewhere.close()


@pytest.mark.parametrize("kind", ["open to others", "another's", "a link", "a file"])
def test_a_folder_that_is_not_this_users_alone_is_refused(kind: str, folder: Path, tmp_path: Path) -> None:
    if kind == "a link":
        (tmp_path / "target").mkdir(0o700)
        folder.symlink_to(tmp_path / "target")
    elif kind == "a file":
        folder.write_text("")
    else:
        folder.mkdir(0o700)
        if kind == "open to others":
            folder.chmod(0o711)
        elif os.geteuid() != 0:
            pytest.skip("only root gives a folder away")
        else:
            os.chown(folder, 12345, 12345)
    refused = Mailbox(MANY, Counters(), folder)
    assert refused.put([b"x"]) is None
    assert "opening the mailbox folder" in refused.reason
    with refused.reading() as reader:
        assert reader is None


def test_another_user_gets_nothing(folder: Path, mailbox: Mailbox, counters: Counters) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can be another user")
    handle = put(mailbox, b"content")
    # Let in by the files' modes, which it would not be: the kernel says who it is.
    folder.chmod(0o777)
    name = handle[:SOCKET_ID_BYTES].hex()
    (folder / name).chmod(0o777)
    asks = (
        "import os, socket\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "each = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        f"each.connect('{name}')\n"
        "try:\n"
        f"    each.send(b't' + bytes.fromhex('{handle[SOCKET_ID_BYTES:].hex()}'))\n"
        "    print(socket.recv_fds(each, 100, 4)[:2])\n"
        "except ConnectionError:\n"
        "    print('refused')\n"
    )
    found = subprocess.run([sys.executable, "-c", asks], cwd=folder, capture_output=True, check=False)
    assert found.stdout.decode().strip() in ("refused", "(b'', [])"), found
    assert counters["refused.mailbox_reader"] == 1
    assert mailbox.used_bytes == 7


def test_a_folder_that_was_cleared_away_is_made_again(folder: Path, mailbox: Mailbox) -> None:
    put(mailbox, b"lost")
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    handle = put(mailbox, b"content")
    with mailbox.reading() as reader:
        assert reader is not None
        assert read(reader, handle, 7) == b"content"
        assert mailbox.is_here(reader.proof("t"), "t")
    assert mailbox.used_bytes <= 7, "what the old one had is let go"


# --- all at once ----------------------------------------------------------------------------------------------


def test_many_writers_and_readers_at_once_and_some_are_killed(start: StartChild) -> None:
    writers, readers = [start() for _ in range(3)], [start() for _ in range(3)]
    chance = random.Random(5)
    outcomes: dict[str, int] = {"right": 0, "lost": 0}
    waiting: list[tuple[int, bytes, str, int]] = []
    for step in range(60):
        at = chance.randrange(3)
        seed, size_bytes = f"s{step}", chance.choice((1, 4096, 70_001, 600_000))
        waiting.append((at, writers[at].put(seed, size_bytes), seed, size_bytes))
        if step in (20, 40):
            writers[at].kill()
            writers[at] = start()
        if step == 30:
            readers[0].tell("hold", waiting[-1][1].hex(), "x", 1)
            readers[0].kill()
            readers[0] = start()
        # All readers at once, each with a letter of its own.
        chance.shuffle(waiting)
        taken = [waiting.pop() for _ in range(min(len(waiting), chance.randrange(4)))]
        for reading, (_, handle, seed, size_bytes) in zip(readers, taken, strict=False):
            reading.tell("read", handle.hex(), seed, size_bytes)
        for reading, _ in zip(readers, taken, strict=False):
            outcomes[reading.said().split(":")[0]] += 1
    assert outcomes["right"] > 30
    assert "WRONG" not in outcomes
    for _, handle, seed, size_bytes in waiting:
        readers[0].ask("read", handle.hex(), seed, size_bytes)
    for writer in writers:
        wait_for(lambda writer=writer: writer.ask("used") == "0", "nothing is kept")  # type: ignore[misc]


class Exchange(RuleBasedStateMachine):
    """Three mailboxes in one folder: whatever happens, what is read is right, and what is used adds up."""

    folder: Path
    runs = 0

    def __init__(self) -> None:
        super().__init__()
        Exchange.runs += 1
        path = self.folder / str(Exchange.runs)
        self.boxes = [Mailbox(5_000, Counters(), path) for _ in range(3)]
        self.ending = contextlib.ExitStack()
        self.readers = [self.ending.enter_context(box.reading()) for box in self.boxes]
        self.kept: dict[bytes, tuple[int, bytes]] = {}

    @rule(at=st.integers(0, 2), chunks=st.lists(st.binary(max_size=3_000), min_size=1, max_size=3))
    def put(self, at: int, chunks: list[bytes]) -> None:
        size_bytes, used_bytes = sum(map(len, chunks)), self._used(at)
        handle = self.boxes[at].put(chunks, 600_000)
        if handle is None:
            assert not size_bytes or used_bytes + size_bytes > 5_000
        else:
            self.kept[handle] = at, b"".join(chunks)

    @rule(data=st.data(), at=st.integers(0, 2), wrong=st.booleans())
    def read(self, data: st.DataObject, at: int, wrong: bool) -> None:
        if self.kept:
            handle = data.draw(st.sampled_from(list(self.kept)))
            owner, expected = self.kept.pop(handle)
            reader = self.readers[at]
            assert reader is not None
            if wrong:
                with pytest.raises(BlobError), reader.open(handle, len(expected) + 1):
                    pass
                # It was given away, and is let go as its reader closed.
            else:
                assert read(reader, handle, len(expected)) == expected
            wait_for(lambda: self.boxes[owner].used_bytes == self._used(owner), "what was read is let go")

    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        if self.kept:
            handle = data.draw(st.sampled_from(list(self.kept)))
            owner, _ = self.kept.pop(handle)
            self.boxes[owner].withdraw(handle)

    @invariant()
    def adds_up(self) -> None:
        for at, box in enumerate(self.boxes):
            assert box.used_bytes == self._used(at)

    def _used(self, at: int) -> int:
        return sum(len(content) for owner, content in self.kept.values() if owner == at)

    def teardown(self) -> None:
        self.ending.close()
        for box in self.boxes:
            box.close()


def test_any_order_of_putting_reading_and_withdrawing_adds_up(tmp_path: Path) -> None:
    Exchange.folder = tmp_path
    (tmp_path / "x").mkdir()
    checks = settings(
        max_examples=25, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    run_state_machine_as_test(Exchange, settings=checks)
