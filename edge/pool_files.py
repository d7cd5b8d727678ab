"""Where the pool's files are: a folder, or any URL that fsspec knows (S3, SFTP, WebDAV, memory).

A file is whole or not there: it is written under another name and renamed, or put at once where a store does that. It
is a cache and no record: nothing is synced to the disk, and who reads a file checks what it holds.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge.files import storage_errors
from protocol.errors import StorageError
from protocol.ids import uuid7

Data = bytes | bytearray | memoryview
LEFTOVER_S = 3600.0
"""What was being written so long ago never will be."""
_TEMPORARY = ".writing-"
_PUT_WHOLE = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory"})
"""Stores where an object is there when all of it has come, and not before."""


class PoolFiles(ABC):
    """Files in folders of one level. On any thread; several processes and machines may share them.

    Everything raises StorageError; what is not there, FileNotFoundError.
    """

    where: str
    """For people."""

    @abstractmethod
    def list(self, folder: str) -> dict[str, int]:
        """Names and sizes of a folder's files; empty when there is no such folder."""

    @abstractmethod
    def read(self, folder: str, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes ``start`` to ``stop`` (excluded; None: to the end) of a file, fewer where it ends before."""

    @abstractmethod
    def write(self, folder: str, name: str, parts: Sequence[Data]) -> None:
        """Put a file there, in place of any other of its name."""

    @abstractmethod
    def remove(self, folder: str, name: str) -> None:
        """Remove a file, if it is there."""

    def free_bytes(self) -> int | None:
        """Room on the disk; None where nobody can say."""
        return None


class LocalFiles(PoolFiles):
    """In a folder of this machine, readable by its owner alone.

    Args:
        root: made when absent.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self.where = str(root)

    def list(self, folder: str) -> dict[str, int]:
        with storage_errors(f"looking into {self._root / folder}"):
            try:
                found = list(os.scandir(self._root / folder))
            except FileNotFoundError:
                return {}
            sizes = {}
            for each in found:
                with contextlib.suppress(FileNotFoundError):
                    if each.name.startswith(_TEMPORARY):
                        if time.time() - each.stat().st_mtime > LEFTOVER_S:
                            Path(each.path).unlink()
                    else:
                        sizes[each.name] = each.stat().st_size
        return sizes

    def read(self, folder: str, name: str, start: int = 0, stop: int | None = None) -> bytes:
        path = self._root / folder / name
        try:
            with path.open("rb") as file:
                file.seek(start)
                return file.read(-1 if stop is None else stop - start)
        except FileNotFoundError:
            raise
        except OSError as error:
            with storage_errors(f"reading {path}"):
                raise error

    def write(self, folder: str, name: str, parts: Sequence[Data]) -> None:
        path = self._root / folder / name
        with storage_errors(f"writing {path}"):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            temporary = path.parent / f"{_TEMPORARY}{uuid7()}"
            try:
                descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                with os.fdopen(descriptor, "wb") as file:
                    for part in parts:
                        file.write(part)
                temporary.replace(path)
            except BaseException:
                with contextlib.suppress(OSError):
                    temporary.unlink()
                raise

    def remove(self, folder: str, name: str) -> None:
        with storage_errors(f"removing {self._root / folder / name}"):
            (self._root / folder / name).unlink(missing_ok=True)

    def free_bytes(self) -> int | None:
        try:
            return shutil.disk_usage(self._root).free
        except OSError:
            return None


class UrlFiles(PoolFiles):
    """Under a URL, by the package fsspec and what it needs for the URL's scheme.

    Args:
        url: such as ``s3://bucket/pool`` or ``sftp://host/pool``; names and passwords stand in fsspec's own
            configuration.
    """

    def __init__(self, url: str) -> None:
        self.where = url
        self._put_whole = url.partition(":")[0] in _PUT_WHOLE
        self._lock = threading.Lock()
        self._opened: tuple[Any, str] | None = None

    @property
    def _files(self) -> Any:
        return self._open()[0]

    @property
    def _root(self) -> str:
        return self._open()[1]

    def _open(self) -> tuple[Any, str]:
        """fsspec's file system and the path in it: opened when it is used, for that may want the network."""
        with self._lock:
            if self._opened is None:
                doing = f"opening the pool at {self.where}"
                try:
                    import fsspec
                except ImportError:
                    raise StorageError(
                        f"{doing}: the package fsspec is not installed",
                        hint="install the extra `pool`, or leave pool.url empty for a folder of this node",
                        field="pool.url",
                        reason="fsspec missing",
                    ) from None
                try:
                    files, path = fsspec.core.url_to_fs(self.where)
                except (ImportError, ValueError) as error:
                    raise StorageError(
                        f"{doing}: {error}",
                        hint="install the package that it names, or set pool.url to another URL",
                        field="pool.url",
                        reason=str(error),
                    ) from None
                except Exception as error:
                    raise _failed(doing, error) from error
                self._opened = files, str(path).rstrip("/")
            return self._opened

    def list(self, folder: str) -> dict[str, int]:
        found: list[dict[str, Any]] = []
        with contextlib.suppress(FileNotFoundError), _remote(f"looking into {self.where}/{folder}"):
            # Others put and remove files there: what was listed a moment ago counts for nothing.
            self._files.invalidate_cache()
            found = self._files.ls(f"{self._root}/{folder}", detail=True)
        sizes = {}
        for each in found:
            name = str(each["name"]).rstrip("/").rpartition("/")[2]
            if each.get("type") == "file" and not name.startswith(_TEMPORARY):
                sizes[name] = int(each.get("size") or 0)
        return sizes

    def read(self, folder: str, name: str, start: int = 0, stop: int | None = None) -> bytes:
        with _remote(f"reading {self.where}/{folder}/{name}"):
            found: bytes = self._files.cat_file(f"{self._root}/{folder}/{name}", start=start, end=stop)
        return found

    def write(self, folder: str, name: str, parts: Sequence[Data]) -> None:
        path = f"{self._root}/{folder}/{name}"
        with _remote(f"writing {self.where}/{folder}/{name}"):
            self._files.makedirs(f"{self._root}/{folder}", exist_ok=True)
            whole = b"".join(parts)
            if self._put_whole:
                self._files.pipe_file(path, whole)
                return
            temporary = f"{self._root}/{folder}/{_TEMPORARY}{uuid7()}"
            try:
                self._files.pipe_file(temporary, whole)
                self._files.mv(temporary, path)
            except BaseException:
                with contextlib.suppress(Exception):
                    self._files.rm_file(temporary)
                raise

    def remove(self, folder: str, name: str) -> None:
        with contextlib.suppress(FileNotFoundError), _remote(f"removing {self.where}/{folder}/{name}"):
            self._files.rm_file(f"{self._root}/{folder}/{name}")


class _remote(contextlib.AbstractContextManager[None]):
    """Whatever a backend raises becomes a StorageError; what is not there stays FileNotFoundError."""

    def __init__(self, doing: str) -> None:
        self._doing = doing

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, (FileNotFoundError, StorageError)):
            # Some say it in their own words: ftplib's 550, an HTTP status, botocore's NoSuchKey.
            if re.search(r"\b(550|404|NoSuchKey|not found|No such)\b", str(error), re.IGNORECASE):
                raise FileNotFoundError(errno.ENOENT, str(error)) from error
            raise _failed(self._doing, error) from error


def _failed(doing: str, error: Exception) -> StorageError:
    return StorageError(
        f"{doing}: {type(error).__name__}: {error}",
        hint="is it reachable, and may this node write there? the pool goes on without it meanwhile",
        reason=str(error) or type(error).__name__,
    )


def open_files(url: str, folder: Path) -> PoolFiles:
    """The files of the pool: at ``url``, or in ``folder`` where that is empty."""
    return UrlFiles(url) if url else LocalFiles(folder)
