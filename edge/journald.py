"""Entries for systemd's journal, by its native protocol: one datagram an entry, fields and all.

The protocol is documented at https://systemd.io/JOURNAL_NATIVE_PROTOCOL/: ``NAME=value`` and a newline for a value of
one line, else ``NAME``, a newline, the length as 64-bit little-endian, the value, and a newline. An entry that is too
large for a datagram goes into a sealed memfd whose descriptor is sent instead.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import socket
import time
from collections.abc import Mapping

SOCKET = "/run/systemd/journal/socket"
SEND_TIMEOUT_S = 1.0
"""A journal that takes nothing for so long must not hold up the bus's network thread any further."""
PAUSE_S = 10.0
"""After that it is left alone for so long."""
_SEND_BUFFER_BYTES = 8 * 1024 * 1024  # as sd-journal asks for


def encode_entry(fields: Mapping[str, str]) -> bytes:
    """The entry's bytes. Names are A-Z, 0-9 and underscores; values any text."""
    parts = []
    for name, value in fields.items():
        data = value.encode("utf-8", "replace")
        if b"\n" in data:
            parts += [name.encode(), b"\n", len(data).to_bytes(8, "little"), data, b"\n"]
        else:
            parts += [name.encode(), b"=", data, b"\n"]
    return b"".join(parts)


class JournalSocket:
    """Where entries are sent. The journal may be started again at any time: there is no connection to lose."""

    def __init__(self, path: str = SOCKET) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        self._socket.settimeout(SEND_TIMEOUT_S)
        self._paused_until_s = 0.0

    def send(self, fields: Mapping[str, str]) -> None:
        """Send one entry. Raises OSError when the journal is not there, or does not take it in time."""
        if time.monotonic() < self._paused_until_s:
            raise TimeoutError("the journal took nothing a moment ago")
        entry = encode_entry(fields)
        try:
            self._socket.sendto(entry, self._path)
        except TimeoutError:
            self._paused_until_s = time.monotonic() + PAUSE_S
            raise
        except OSError as error:
            if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                raise
            self._send_by_memfd(entry)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _send_by_memfd(self, entry: bytes) -> None:
        descriptor = os.memfd_create("mindstream-log", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            with os.fdopen(os.dup(descriptor), "wb") as file:
                file.write(entry)
            # The journal maps it only when nobody can change it any more.
            seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))
            self._socket.sendmsg([], [rights], 0, self._path)
        finally:
            os.close(descriptor)


def is_journal(descriptor: int, environ: Mapping[str, str]) -> bool:
    """Whether a descriptor leads to the journal: systemd names its device and inode in ``$JOURNAL_STREAM``."""
    try:
        status = os.fstat(descriptor)
    except OSError:
        return False
    return environ.get("JOURNAL_STREAM", "") == f"{status.st_dev}:{status.st_ino}"
