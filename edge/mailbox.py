"""The mailbox: between processes of one user on one host a handle crosses the bus, and not the bytes.

A *letter* is a memfd, memory without a name, that holds some chunks. Its writer seals it (memfd_create(2), "File
sealing": nobody can write, shrink or grow it any more, its writer neither, and what is mapped writable cannot be
sealed) and keeps it under a random id. The *handle*, which crosses the bus, names the writer's socket and the letter.
The reader connects, asks for the letter and gets the memfd itself (SCM_RIGHTS, unix(7)), maps it and works in it.

What this relies on:

- **Who is here.** Sockets are in a folder of mode 0700 that belongs to this user, in /dev/shm, which ends with the
  boot; both ends ask the kernel who the other is (SO_PEERCRED). That two nodes are on one host they do not believe from
  names: the folder has a random secret, and the receiver proves that it has read it by a keyed BLAKE3 over its
  transfer's id. Containers and users that do not share the folder have other secrets.
- **What is read.** A memfd without its seals is refused. Content under them cannot change, nor its pages go away (no
  SIGBUS), so it is verified in place, against the signed manifest, and then used in place: nothing is copied.
- **Who dies.** No letter has a name in a file system: the kernel frees it with the last process that has it open,
  however that one ends. A reader that dies is a connection that closes: its letters are let go. A writer that dies
  takes the letters along that nobody has asked for; one that a reader has is read to its end. A socket whose writer was
  killed is taken away by the next process that opens a mailbox: under the folder's lock, within which sockets are
  made, one that refuses connections has no owner.
- **When.** A letter expires by CLOCK_BOOTTIME in its writer's memory; after a reboot there is no such socket.

/dev/shm and not /proc/PID/fd: the services' units have user namespaces of their own (PrivateUsers=), across which the
kernel does not let even the same user into /proc/PID/fd; while PrivateTmp=, ProtectSystem= and PrivateDevices= leave
the host's /dev/shm in its place. A memfd does not count against the size of /dev/shm, which is small in containers.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import secrets
import selectors
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge.counters import Counters
from edge.mailbox_folder import (
    GONE,
    HERE,
    LETTER_ID_BYTES,
    MAX_LETTER_BYTES,
    PROOF_BYTES,
    SOCKET_ID_BYTES,
    TAKE,
    Buffer,
    MailboxFolder,
    default_folder,
    is_own_user,
    sealed_memory,
    unix_socket,
)
from edge.mailbox_reader import LetterReader
from edge.ttl import boottime_ms
from protocol.errors import StorageError

log = logging.getLogger(__name__)

LETTER_TTL_MS = 30_000
"""A letter that nobody asked for is kept so long."""
MAX_READERS = 64
"""Connections that one writer serves at once."""


@dataclass
class _Letter:
    size_bytes: int
    descriptor: int
    """-1 once a reader has it."""
    expires_ms: int
    """By CLOCK_BOOTTIME."""
    reader: socket.socket | None = None
    """Who has it, and has not said that it is done."""


class LetterWriter:
    """Letters of this process, its socket, and the thread that gives them out.

    Args:
        folder: where the socket is made; closed with the writer.
        most_bytes: of all letters, those that readers have included.
        counters: as ``Mailbox``'s.

    Raises OSError.
    """

    def __init__(self, folder: MailboxFolder, most_bytes: int, counters: Counters) -> None:
        self.folder = folder
        self._most_bytes = most_bytes
        self._counters = counters
        self._changing = threading.Lock()
        self._letters: dict[bytes, _Letter] = {}
        self._used_bytes = 0
        self._socket_id = secrets.token_bytes(SOCKET_ID_BYTES)
        self._listener = unix_socket()
        try:
            # Within the lock: a socket that is bound and does not listen yet refuses connections, and is not dead.
            with folder.locked():
                folder.clean()
                self._listener.bind(folder.address(self._socket_id.hex()))
                self._listener.listen(MAX_READERS)
            self._listener.setblocking(False)
            self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            self._listener.close()
            raise
        self._stopping = False
        self._waiting = selectors.DefaultSelector()
        self._waiting.register(self._listener, selectors.EVENT_READ)
        self._waiting.register(self._wake_read, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="mailbox", daemon=True)
        self._thread.start()

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    def put(self, chunks: Sequence[Buffer], ttl_ms: int) -> bytes | None:
        """See ``Mailbox.put``."""
        size_bytes = sum(map(len, chunks))
        with self._changing:
            self._expire()
            if self._used_bytes + size_bytes > self._most_bytes or not 0 < size_bytes <= MAX_LETTER_BYTES:
                self._counters.add("mailbox.full")
                return None
            self._used_bytes += size_bytes  # before it is written: other threads write at the same time
        try:
            descriptor = sealed_memory(chunks)
        except OSError as error:
            log.warning("a letter of %d bytes cannot be written: %s", size_bytes, error)
            self._counters.add("mailbox.full")
            with self._changing:
                self._used_bytes -= size_bytes
            return None
        name = secrets.token_bytes(LETTER_ID_BYTES)
        with self._changing:
            if self._stopping:
                os.close(descriptor)
                return None
            self._letters[name] = _Letter(size_bytes, descriptor, boottime_ms() + ttl_ms)
        self._counters.add("mailbox.written_bytes", size_bytes)
        self._wake()  # it has now something to let expire
        return self._socket_id + name

    def withdraw(self, handle: bytes) -> None:
        """Let a letter go unless a reader has it."""
        with self._changing:
            letter = self._letters.get(handle[SOCKET_ID_BYTES:])
            if letter is not None and letter.reader is None:
                self._let_go(handle[SOCKET_ID_BYTES:])

    def close(self) -> None:
        """Let all letters go; readers keep what they have."""
        self._stopping = True
        self._wake()
        self._thread.join()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: it is awake
            os.write(self._wake_write, b"w")

    def _let_go(self, name: bytes) -> None:
        letter = self._letters.pop(name)
        self._used_bytes -= letter.size_bytes
        if letter.descriptor >= 0:
            os.close(letter.descriptor)

    def _expire(self) -> int | None:
        """Let go what nobody asked for in time; milliseconds until the next is to go."""
        now_ms = boottime_ms()
        kept = {name: letter.expires_ms for name, letter in self._letters.items() if letter.reader is None}
        for name in [name for name, expires_ms in kept.items() if expires_ms <= now_ms]:
            self._counters.add("mailbox.expired")
            self._let_go(name)
            del kept[name]
        return min(kept.values()) - now_ms if kept else None

    # --- on its thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                with self._changing:
                    patience_ms = self._expire()
                for key, _ in self._waiting.select(None if patience_ms is None else max(0, patience_ms) / 1000):
                    if key.fileobj is self._listener:
                        self._accept()
                    elif isinstance(key.fileobj, socket.socket):
                        self._serve(key.fileobj)
                    else:
                        os.read(self._wake_read, 4096)
        finally:
            self._end()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        connection.setblocking(False)
        if not is_own_user(connection) or len(self._waiting.get_map()) >= MAX_READERS + 2:
            self._counters.add("refused.mailbox_reader")
            connection.close()
            return
        self._waiting.register(connection, selectors.EVENT_READ)

    def _serve(self, reader: socket.socket) -> None:
        try:
            asked = reader.recv(1 + LETTER_ID_BYTES + 1)
            if len(asked) != 1 + LETTER_ID_BYTES:
                raise ConnectionError("it has closed, or speaks something else")
            (self._give if asked[:1] == TAKE else self._take_back)(reader, asked[1:])
        except OSError:
            self._waiting.unregister(reader)
            reader.close()
            with self._changing:
                orphaned = [name for name, letter in self._letters.items() if letter.reader is reader]
                for name in orphaned:
                    self._let_go(name)
            self._counters.add("mailbox.orphaned", len(orphaned))

    def _give(self, reader: socket.socket, name: bytes) -> None:
        with self._changing:
            letter = self._letters.get(name)
            if letter is None or letter.reader is not None or letter.expires_ms <= boottime_ms():
                reader.send(GONE)
                return
            socket.send_fds(reader, [HERE], [letter.descriptor])
            # It is the reader's now. Its bytes count until it says that it is done, or its connection ends.
            os.close(letter.descriptor)
            letter.descriptor, letter.reader = -1, reader

    def _take_back(self, reader: socket.socket, name: bytes) -> None:
        with self._changing:
            letter = self._letters.get(name)
            if letter is not None and letter.reader is reader:
                self._let_go(name)

    def _end(self) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self._socket_id.hex(), dir_fd=self.folder.descriptor)
        with self._changing:
            self._stopping = True
            for name in list(self._letters):
                self._let_go(name)
        for key in list(self._waiting.get_map().values()):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
        self._waiting.close()
        self.folder.close()


class Mailbox:
    """A process's own mailbox, where there can be one: otherwise it keeps and proves nothing. Thread-safe.

    Args:
        most_bytes: of all letters that it keeps and that readers have; 0: none. What goes beyond it goes over the bus.
        counters: counts ``mailbox.written_bytes``, ``mailbox.full``, ``mailbox.expired``, ``mailbox.orphaned`` (let go
            by a reader that went away) and ``refused.mailbox_reader``.
        path: of the folder that it shares with others; None: this user's of this host.
    """

    def __init__(self, most_bytes: int, counters: Counters, path: Path | None = None) -> None:
        self._most_bytes = most_bytes
        self._counters = counters
        self._path = path or default_folder()
        self._opening = threading.Lock()
        self._writer: LetterWriter | None = None
        self._reason = "" if most_bytes else "it is turned off"
        self._closed = False

    @property
    def reason(self) -> str:
        """Why there is none; empty when there is, or nobody has asked for it yet."""
        return self._reason

    @property
    def used_bytes(self) -> int:
        """Of letters that are kept, and of those that readers have."""
        writer = self._writer
        return writer.used_bytes if writer is not None else 0

    def is_here(self, proof: bytes, transfer: str) -> bool:
        """Whether a ``proof`` (``LetterReader.proof``) is of a process that reads this one's folder."""
        if len(proof) != PROOF_BYTES:
            return False
        writer = self._live()
        return writer is not None and hmac.compare_digest(writer.folder.proof(transfer), proof)

    def put(self, chunks: Sequence[Buffer], ttl_ms: int = LETTER_TTL_MS) -> bytes | None:
        """Keep a copy of ``chunks`` as a letter for one reader; its handle, or None: they are to go over the bus."""
        writer = self._live()
        return writer.put(chunks, ttl_ms) if writer is not None else None

    def withdraw(self, handle: bytes) -> None:
        """Let a letter go whose handle nobody has got."""
        writer = self._writer
        if writer is not None:
            writer.withdraw(handle)

    @contextlib.contextmanager
    def reading(self) -> Iterator[LetterReader | None]:
        """To open letters of others; None where there is no mailbox. Its connections end with the block."""
        try:
            folder = MailboxFolder(self._path) if self._most_bytes else None
        except StorageError as error:
            log.warning("what is on this host comes over the bus as well: %s", error)
            folder = None
        if folder is None:
            yield None
            return
        reader = LetterReader(folder)
        try:
            yield reader
        finally:
            reader.close()
            folder.close()

    def close(self) -> None:
        """Let every letter go that no reader has."""
        with self._opening:
            self._closed = True
            if self._writer is not None:
                self._writer.close()
                self._writer = None

    def _live(self) -> LetterWriter | None:
        """The writer; another one when its folder has gone: some systems clear /dev/shm when a user logs out."""
        with self._opening:
            if self._closed or not self._most_bytes:
                return None
            if self._writer is not None and not self._writer.folder.is_there():
                self._writer.close()
                self._writer = None
            if self._writer is None and not self._reason:
                self._open()
            return self._writer

    def _open(self) -> None:
        try:
            if not hasattr(os, "memfd_create"):
                raise OSError("this system has no memfd_create")
            folder = MailboxFolder(self._path)
            try:
                self._writer = LetterWriter(folder, self._most_bytes, self._counters)
            except OSError:
                folder.close()
                raise
        except (OSError, StorageError) as error:
            self._reason = str(error)
            log.warning("chunks for processes on this host go over the bus as well: %s", error)
