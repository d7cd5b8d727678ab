"""Opening the letters of other processes on this host; edge/mailbox.py says what they are."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
from collections.abc import Iterator

from edge.mailbox_folder import (
    DONE,
    HANDLE_BYTES,
    HERE,
    MAX_LETTER_BYTES,
    SOCKET_ID_BYTES,
    TAKE,
    MailboxFolder,
    is_own_user,
    is_sealed,
    unix_socket,
)
from protocol.errors import BlobError

ANSWER_S = 2.0
"""A writer that does not answer for so long is given up: the bus has it too."""


class LetterReader:
    """Opens letters of other processes, for one transfer; made by ``Mailbox.reading``. For one thread.

    Args:
        folder: where their sockets are.
    """

    def __init__(self, folder: MailboxFolder) -> None:
        self._folder = folder
        self._connections: dict[bytes, socket.socket] = {}

    def proof(self, transfer: str) -> bytes:
        """For the holder of what is pulled in ``transfer``: that this process reads the folder."""
        return self._folder.proof(transfer)

    @contextlib.contextmanager
    def open(self, handle: bytes, size_bytes: int) -> Iterator[memoryview]:
        """The content of a letter, read-only, of ``size_bytes``; it cannot change, and is still to be verified.

        It stays as long as anybody has a view of it, and counts against its writer's bound until the block ends.

        Raises BlobError when it is not to be had: its writer is gone, it has expired, somebody else has it, or it is
        not what it must be.
        """
        if len(handle) != HANDLE_BYTES or not 0 < size_bytes <= MAX_LETTER_BYTES:
            raise _not_opened(f"a handle of {len(handle)} bytes for {size_bytes:,}")
        socket_id, name = handle[:SOCKET_ID_BYTES], handle[SOCKET_ID_BYTES:]
        try:
            connection = self._connection(socket_id)
            content = _map(_ask(connection, name), size_bytes)
        except OSError as error:
            # Whatever else it was about to say would be taken for the answer to the next question.
            self._disconnect(socket_id)
            raise _not_opened(str(error) or type(error).__name__) from None
        view = memoryview(content)
        try:
            yield view
        finally:
            with contextlib.suppress(BufferError):  # somebody keeps a part of it: it is unmapped with the last one
                view.release()
                content.close()
            try:
                connection.send(DONE + name)
            except OSError:
                self._disconnect(socket_id)

    def close(self) -> None:
        """End its connections: what it has not said to be done with is let go."""
        for socket_id in list(self._connections):
            self._disconnect(socket_id)

    def _connection(self, socket_id: bytes) -> socket.socket:
        found = self._connections.get(socket_id)
        if found is None:
            found = unix_socket()
            try:
                found.settimeout(ANSWER_S)
                found.connect(self._folder.address(socket_id.hex()))
                if not is_own_user(found):
                    raise PermissionError("its writer is another user")
            except OSError:
                found.close()
                raise
            self._connections[socket_id] = found
        return found

    def _disconnect(self, socket_id: bytes) -> None:
        connection = self._connections.pop(socket_id, None)
        if connection is not None:
            connection.close()


def _ask(connection: socket.socket, name: bytes) -> int:
    """The descriptor of a letter. Raises OSError."""
    connection.send(TAKE + name)
    answer, descriptors, _, _ = socket.recv_fds(connection, 8, 2, socket.MSG_CMSG_CLOEXEC)
    if answer == HERE and len(descriptors) == 1:
        return descriptors[0]
    for descriptor in descriptors:
        os.close(descriptor)
    raise FileNotFoundError("it has expired, or another reader has it")


def _map(descriptor: int, size_bytes: int) -> mmap.mmap:
    """A sealed letter in memory. Raises OSError when it is not sealed, or of another size."""
    try:
        if not is_sealed(descriptor, size_bytes):
            raise PermissionError("it is not sealed, or of another size than it should be")
        return mmap.mmap(descriptor, size_bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE, mmap.PROT_READ)
    finally:
        os.close(descriptor)


def _not_opened(reason: str) -> BlobError:
    return BlobError(f"opening a letter: {reason}", hint="its chunks come over the bus", reason=reason)
