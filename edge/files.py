"""Files that are whole or not there, and storage errors that say what to do."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from protocol.errors import StorageError

_HINTS = {
    errno.ENOSPC: "free some space on that disk",
    errno.EDQUOT: "free some space: the quota is used up",
    errno.EROFS: "the file system is read-only: remount it, or set node.data_dir elsewhere",
    errno.EACCES: "give this user the right to write there, or set node.data_dir elsewhere",
    errno.EPERM: "give this user the right to write there, or set node.data_dir elsewhere",
}


@contextlib.contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    """Turn an OSError into a StorageError that names what was being done and what to do next."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{doing}: {error.strerror or error}",
            hint=_HINTS.get(error.errno or 0, "look at the disk and its permissions"),
            reason=error.strerror or str(error),
        ) from error


def write_atomically(
    path: Path,
    data: bytes | bytearray | memoryview,
    *,
    mode: int = 0o600,
    owner: tuple[int, int] | None = None,
    sync: bool = True,
) -> None:
    """Write ``data`` to ``path``, synced to disk: after a crash the old file is there, or the new one, whole.

    Without ``sync`` that holds when the process dies, and not when the machine does: for what names its own digest.
    ``owner`` (user and group id) gives the file away, which only root may. Raises StorageError.
    """
    with storage_errors(f"writing {path}"):
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:80]}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(descriptor, mode)
                if owner is not None:
                    os.fchown(descriptor, *owner)
                file.write(data)
                file.flush()
                if sync:
                    os.fsync(descriptor)
            Path(temporary).replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()
            raise
        if sync:
            sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Have the names in ``folder`` on the disk, as they are after a rename. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
