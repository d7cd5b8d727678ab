"""SHA-256 of large files, computed once: kept with size and modification time, which tell when a file was changed."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from edge.models import sha256_of

_NAME = ".sha256.json"


class _Known(msgspec.Struct):
    size_bytes: int
    mtime_ns: int
    sha256: str


class FileDigests:
    """Digests of files, kept in ``FOLDER/.sha256.json``; where that cannot be written they are computed each time."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _NAME
        try:
            self._known = msgspec.json.decode(self._path.read_bytes(), type=dict[str, _Known])
        except (OSError, msgspec.MsgspecError):
            self._known = {}  # Absent or damaged: it only saves time.
        self._changed = False

    def sha256(self, path: Path) -> str:
        """In hexadecimal. Raises OSError."""
        status = path.stat()
        known = self._known.get(str(path))
        if known is not None and (known.size_bytes, known.mtime_ns) == (status.st_size, status.st_mtime_ns):
            return known.sha256
        digest = sha256_of(path)
        self._known[str(path)] = _Known(status.st_size, status.st_mtime_ns, digest)
        self._changed = True
        return digest

    def save(self) -> None:
        """Keep what was computed."""
        if not self._changed:
            return
        partial = self._path.with_name(f"{_NAME}.{os.getpid()}")
        try:
            self._known = {path: known for path, known in self._known.items() if Path(path).exists()}
            partial.write_bytes(msgspec.json.encode(self._known))
            partial.replace(self._path)
        except OSError:
            return
