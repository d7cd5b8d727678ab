"""One supervisor a data folder, and where others find it.

The lock is the kernel's (``flock``): it goes with its holder, however that one ends, so there is no stale lock to
remove. Beside it stands ``supervisor.json`` with what a program of the same node needs: process id and broker.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import msgspec

from edge.files import storage_errors, write_atomically
from protocol.errors import StorageError

LOCK = "supervisor.lock"
RUNNING = "supervisor.json"


class Running(msgspec.Struct):
    """A supervisor that is running."""

    pid: int
    node: str
    broker_url: str
    """Where its services speak; an embedded broker's port may be another at each start."""


class NodeLock:
    """The right to be the supervisor of a data folder. Raises StorageError when another process has it."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        path = data_dir / LOCK
        with storage_errors(f"opening {path}"):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._descriptor, 32).decode("ascii", "replace").strip() or "unknown"
            os.close(self._descriptor)
            raise StorageError(
                f"starting a supervisor in {data_dir}: another one runs there, process {holder}",
                hint=f"`mindstream status` shows it and `kill {holder}` stops it; a second node needs a node.name and"
                " node.data_dir of its own",
                field="node.data_dir",
                reason="already running",
            ) from None
        with storage_errors(f"writing {path}"):
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def announce(self, node: str, broker_url: str) -> None:
        """Write ``supervisor.json``. Raises StorageError."""
        running = Running(os.getpid(), node, broker_url)
        write_atomically(self._data_dir / RUNNING, msgspec.json.encode(running) + b"\n")

    def release(self) -> None:
        """Give the right back."""
        (self._data_dir / RUNNING).unlink(missing_ok=True)
        os.close(self._descriptor)


def running_in(data_dir: Path) -> Running | None:
    """The supervisor that runs in ``data_dir`` and has its broker, or None. Looks, and changes nothing."""
    try:
        descriptor = os.open(data_dir / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        # Somebody holds it: what is written beside it is true.
        try:
            return msgspec.json.decode((data_dir / RUNNING).read_bytes(), type=Running)
        except (OSError, msgspec.MsgspecError):
            return None
    finally:
        os.close(descriptor)
    return None
