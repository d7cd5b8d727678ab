"""A SQLite VFS that knows what a disk would still hold if the power were cut now.

SQLite works on real files through the default VFS. Beside them this one keeps, for every file, what was synced
and each write and truncation since; and for the directory, which names were made durable. ``survivors`` builds
what a disk may hold after a power cut: all that was synced, and of the rest any subset, torn at sectors.

Promised by POSIX and counted on here: fsync(file) makes the file's content durable; a name in a directory is
durable after fsync(directory). SQLite's unix VFS does the latter at the first sync of a new journal or WAL,
and when it is told so at a deletion.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import apsw

SECTOR_BYTES = 512
"""What a disk writes whole or not at all."""


@dataclass
class _Write:
    offset: int
    data: bytes

    def sectors(self) -> list[_Write]:
        """The parts of this write that lie in different sectors."""
        parts = []
        at = self.offset
        end = self.offset + len(self.data)
        while at < end:
            stop = min(end, (at // SECTOR_BYTES + 1) * SECTOR_BYTES)
            parts.append(_Write(at, self.data[at - self.offset : stop - self.offset]))
            at = stop
        return parts

    def apply(self, content: bytearray) -> None:
        if len(content) < self.offset:
            content.extend(bytes(self.offset - len(content)))
        content[self.offset : self.offset + len(self.data)] = self.data


@dataclass
class _Truncate:
    size: int

    def apply(self, content: bytearray) -> None:
        del content[self.size :]


@dataclass
class _Inode:
    """One file's content, whatever its name."""

    synced: bytearray = field(default_factory=bytearray)
    unsynced: list[_Write | _Truncate] = field(default_factory=list)
    syncs_directory: bool = False
    """Its next sync makes the directory durable too."""

    def sync(self) -> None:
        for change in self.unsynced:
            change.apply(self.synced)
        self.unsynced.clear()


Survives = Callable[[], bool]


class PowerVFS(apsw.VFS):
    """The default VFS, watched. One directory, one thread.

    Args:
        name: to open databases with.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name, "")
        self.name = name
        self.before_change: Callable[[], None] = lambda: None
        """Called before anything is changed on the disk: the moments at which the power can go."""
        self._names: dict[str, _Inode] = {}
        self._durable_names: dict[str, _Inode] = {}
        self._unsynced_names: list[tuple[str, _Inode | None]] = []

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> apsw.VFSFile:
        if name is None:
            raise AssertionError("a temporary file on the disk: temp_store should keep it in memory")
        path = name.filename() if isinstance(name, apsw.URIFilename) else name
        if path not in self._names:
            self.before_change()
            journal = bool(flags[0] & (apsw.SQLITE_OPEN_WAL | apsw.SQLITE_OPEN_MAIN_JOURNAL))
            self._rename(path, _Inode(syncs_directory=journal))
        return _PowerFile(self, self._names[path], name, flags)

    def xDelete(self, filename: str, syncdir: bool) -> None:
        if filename in self._names:
            self.before_change()
            self._rename(filename, None)
        super().xDelete(filename, syncdir)
        if syncdir:
            self.sync_directory()

    def _rename(self, path: str, inode: _Inode | None) -> None:
        if inode is None:
            del self._names[path]
        else:
            self._names[path] = inode
        self._unsynced_names.append((path, inode))

    def sync_directory(self) -> None:
        """All names are durable now."""
        self._durable_names = dict(self._names)
        self._unsynced_names.clear()

    def survivors(self, survives: Survives) -> dict[str, bytes]:
        """File name to content, after a power cut now.

        Args:
            survives: whether one unsynced change reached the disk; asked for each in turn.
        """
        names = dict(self._durable_names)
        for path, inode in self._unsynced_names:
            if survives():
                if inode is None:
                    names.pop(path, None)
                else:
                    names[path] = inode
        found = {}
        for path, inode in names.items():
            content = bytearray(inode.synced)
            for change in inode.unsynced:
                for part in change.sectors() if isinstance(change, _Write) else [change]:
                    if survives():
                        part.apply(content)
            found[Path(path).name] = bytes(content)
        return found


class _PowerFile(apsw.VFSFile):
    def __init__(self, vfs: PowerVFS, inode: _Inode, name: str | apsw.URIFilename, flags: list[int]) -> None:
        super().__init__("", name, flags)
        self._vfs = vfs
        self._inode = inode

    def xWrite(self, data: bytes, offset: int) -> None:
        self._vfs.before_change()
        super().xWrite(data, offset)
        self._inode.unsynced.append(_Write(offset, bytes(data)))

    def xTruncate(self, newsize: int) -> None:
        self._vfs.before_change()
        super().xTruncate(newsize)
        self._inode.unsynced.append(_Truncate(newsize))

    def xSync(self, flags: int) -> None:
        self._vfs.before_change()
        super().xSync(flags)
        self._inode.sync()
        if self._inode.syncs_directory:
            self._inode.syncs_directory = False
            self._vfs.sync_directory()


def nothing_unsynced() -> bool:
    """Only what was synced survives."""
    return False


def some_unsynced(chance: random.Random) -> Survives:
    """Each unsynced change survives or not, by chance; how likely is chance too, once for all."""
    share = chance.random()
    return lambda: chance.random() < share
