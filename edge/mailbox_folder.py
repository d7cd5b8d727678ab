"""Where mailboxes meet: a folder of this user's alone that ends with the boot, its sockets, and sealed memory."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import socket
import stat
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from blake3 import blake3

from protocol.errors import StorageError

SOCKET_ID_BYTES, LETTER_ID_BYTES, SECRET_BYTES, PROOF_BYTES = 8, 16, 32, 16
HANDLE_BYTES = SOCKET_ID_BYTES + LETTER_ID_BYTES
MAX_LETTER_BYTES = 16 * 1024 * 1024
"""A handle for more is refused before anything is mapped."""
TAKE, DONE = b"t", b"d"
"""What a reader says, before a letter's id."""
HERE, GONE = b"h", b"g"
"""What it is answered; with the first comes the letter."""
DOMAIN_PROOF = b"mindstream/v1/mailbox\0"
Buffer = bytes | bytearray | memoryview

_SECRET = "secret"
# fcntl and os have these names on Linux alone, and only from some versions of Python on.
_ADD_SEALS, _GET_SEALS = 1033, 1034
_SEAL_SEAL, _SEAL_SHRINK, _SEAL_GROW, _SEAL_WRITE = 1, 2, 4, 8
_MFD_CLOEXEC, _MFD_ALLOW_SEALING, _MFD_NOEXEC_SEAL = 1, 2, 8


def default_folder() -> Path:
    """Of this user on this host."""
    return Path("/dev/shm") / f"mindstream-{os.getuid()}"


class MailboxFolder:
    """The folder that mailboxes of one user meet in. It need not stay: what is not there any more is no mailbox.

    Args:
        path: made when absent.

    Raises StorageError when it is not this user's alone.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        doing = f"opening the mailbox folder {path}"
        try:
            with contextlib.suppress(FileExistsError):
                path.mkdir(0o700)
            # Not followed, and looked at by its descriptor: what was checked is what is used.
            self.descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise StorageError(f"{doing}: {error.strerror}", reason=error.strerror or str(error)) from None
        try:
            self._check(doing)
            with self.locked():
                self._secret = self._read_secret()
        except OSError as error:
            self.close()
            raise StorageError(f"{doing}: {error.strerror}", reason=error.strerror or str(error)) from None
        except StorageError:
            self.close()
            raise

    def _check(self, doing: str) -> None:
        found = os.fstat(self.descriptor)
        if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise StorageError(
                f"{doing}: it belongs to user {found.st_uid} with mode {stat.S_IMODE(found.st_mode):o}",
                hint="remove it: it must be this user's alone",
                reason="not this user's alone",
            )

    def _read_secret(self) -> bytes:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(_SECRET, flags, 0o600, dir_fd=self.descriptor)
        try:
            found = os.pread(descriptor, SECRET_BYTES, 0)
            if len(found) != SECRET_BYTES:  # new, or its maker was killed here
                found = secrets.token_bytes(SECRET_BYTES)
                os.pwrite(descriptor, found, 0)
            return found
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Alone among all processes that have this folder; a lock goes with its process."""
        descriptor = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def is_there(self) -> bool:
        """Whether its path still leads here, with its secret: some clear /dev/shm when a user logs out."""
        try:
            here, there = os.fstat(self.descriptor), self.path.lstat()
            os.stat(_SECRET, dir_fd=self.descriptor)
            return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)
        except OSError:
            return False

    def proof(self, transfer: str) -> bytes:
        """What only who can read this folder knows of ``transfer``."""
        return blake3(DOMAIN_PROOF + transfer.encode(), key=self._secret).digest(length=PROOF_BYTES)

    def address(self, name: str) -> str:
        """A socket's path: short, whatever the folder's own is (sun_path has 108 bytes), and in this very folder."""
        return f"/proc/self/fd/{self.descriptor}/{name}"

    def clean(self) -> int:
        """Take away the sockets of writers that were killed; how many. Under the lock. Raises OSError."""
        taken = 0
        for name in os.listdir(self.descriptor):  # noqa: PTH208 - by its descriptor
            if len(name) == 2 * SOCKET_ID_BYTES and not self._answers(name):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=self.descriptor)
                    taken += 1
        return taken

    def _answers(self, name: str) -> bool:
        with unix_socket() as probe:
            probe.setblocking(False)
            try:
                probe.connect(self.address(name))
            except (ConnectionRefusedError, FileNotFoundError):
                return False
            except OSError:
                return True  # it is full, or is no socket of ours: not to be taken away
            return True

    def close(self) -> None:
        """Let the folder go; it stays."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def unix_socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)


def is_own_user(connection: socket.socket) -> bool:
    """Whether who is at the other end had this process's user when it connected, or listened."""
    size = struct.calcsize("3i")
    _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return bool(uid == os.getuid())


def sealed_memory(chunks: Sequence[Buffer]) -> int:
    """A sealed memfd with ``chunks`` one after another. Raises OSError."""
    try:
        descriptor = os.memfd_create("mindstream-letter", _MFD_CLOEXEC | _MFD_ALLOW_SEALING | _MFD_NOEXEC_SEAL)
    except OSError:  # before Linux 6.3
        descriptor = os.memfd_create("mindstream-letter", _MFD_CLOEXEC | _MFD_ALLOW_SEALING)
    try:
        # Written, not mapped: a page that is written whole is not cleared first, and takes no fault of its own.
        left = [memoryview(chunk).cast("B") for chunk in chunks]
        while left:
            written = os.writev(descriptor, left[:512])
            while left and written >= len(left[0]):
                written -= len(left.pop(0))
            if written:
                left[0] = left[0][written:]
        fcntl.fcntl(descriptor, _ADD_SEALS, _SEAL_SEAL | _SEAL_SHRINK | _SEAL_GROW | _SEAL_WRITE)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def is_sealed(descriptor: int, size_bytes: int) -> bool:
    """Whether this is a memfd of that size that nobody can write, shrink or grow any more."""
    needed = _SEAL_SHRINK | _SEAL_GROW | _SEAL_WRITE
    try:
        return os.fstat(descriptor).st_size == size_bytes and fcntl.fcntl(descriptor, _GET_SEALS) & needed == needed
    except OSError:
        return False  # no memfd
