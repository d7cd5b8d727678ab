"""Child processes of a node: they die with their parent, and they end when asked to, or are ended.

``broker.child`` ties a child to this process by the kernel, so that a ``kill -9`` of this one leaves no orphan; here
is what a parent does with a child: ask it to end, wait until a deadline, kill it, and keep what it printed.
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

from broker.child import spawn
from protocol.errors import MindstreamError, StorageError

MAX_LINE_BYTES = 16 * 1024
"""A longer line of a child's output is passed on in pieces: a child that prints no newline must not fill the memory."""


class ChildProcess:
    """A running child. Make one with ``start_child``."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], on_line: Callable[[bytes], None] | None) -> None:
        self.name = name
        self.pid = process.pid
        self.last_line = ""
        """The last line that it printed and that was not empty: usually why it ended."""
        self._process = process
        self._reader: threading.Thread | None = None
        if on_line is not None:
            self._reader = threading.Thread(target=self._read, args=(on_line,), name=f"output of {name}", daemon=True)
            self._reader.start()

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self._process.poll()

    def terminate(self) -> None:
        """Ask it to end (SIGTERM)."""
        self._process.terminate()

    def kill(self) -> None:
        """End it (SIGKILL)."""
        self._process.kill()

    def wait(self, timeout_s: float) -> int | None:
        """Wait for its end; its exit code, or None when it still runs after ``timeout_s``."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def wait_or_kill(self, timeout_s: float) -> bool:
        """Wait for its end and kill it when it does not come; whether it ended by itself."""
        ended = self.wait(timeout_s) is not None
        if not ended:
            self.kill()
            self._process.wait()
        self.drain()
        return ended

    def drain(self, timeout_s: float = 1.0) -> None:
        """After its end: wait until all that it printed has been passed on."""
        # A grandchild may hold the pipe open, hence the limit.
        if self._reader is not None:
            self._reader.join(timeout_s)

    def _read(self, on_line: Callable[[bytes], None]) -> None:
        stream = self._process.stdout
        assert stream is not None
        with stream:
            while line := stream.readline(MAX_LINE_BYTES):
                line = line.rstrip(b"\n")
                if line.strip():
                    self.last_line = line.decode("utf-8", "replace").strip()
                on_line(line)


def start_child(
    command: list[str],
    *,
    name: str = "",
    on_line: Callable[[bytes], None] | None = None,
    stdout: int | IO[bytes] | None = None,
    stderr: int | IO[bytes] | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
) -> ChildProcess:
    """Start a child that dies with this process and does not get the terminal's Ctrl-C.

    Args:
        command: program and arguments.
        name: what to call it; empty for the program's name.
        on_line: called, on a thread of its own, with each line that the child prints on either stream, without its
            newline. Takes the place of ``stdout`` and ``stderr``.
        stdout, stderr: as for subprocess.Popen.
        env, cwd: environment and working folder; None for this process's own.

    Raises MindstreamError when the program cannot be started.
    """
    if on_line is not None:
        stdout, stderr = subprocess.PIPE, subprocess.STDOUT
    try:
        process = spawn(
            command, cwd=cwd, env=None if env is None else dict(env), stdout=stdout, stderr=stderr, new_session=True
        )
    except OSError as error:
        raise MindstreamError(
            f"starting {command[0]}: {error.strerror}", hint="is it installed?", reason="cannot start the program"
        ) from error
    return ChildProcess(name or Path(command[0]).name, process, on_line)


class RotatingLog:
    """A log file of bounded size: at ``max_bytes`` it becomes ``NAME.1``, that one ``NAME.2`` and so on. Thread-safe.

    A disk that refuses must not stop the one who logs: what could not be written is counted.

    Args:
        path: the file; its folder must exist.
        max_bytes: size at which it is put aside.
        files: files kept in all, the current one included.
    """

    def __init__(self, path: Path, *, max_bytes: int, files: int) -> None:
        self.path = path
        self.lost_lines = 0
        self._max_bytes = max_bytes
        self._files = files
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None

    def write_line(self, line: bytes) -> bool:
        """Append a line; False when the disk refused it."""
        with self._lock:
            try:
                if self._file is None:
                    self._file = self.path.open("ab", buffering=0)
                if self._file.tell() + len(line) >= self._max_bytes:
                    self._rotate()
                self._file.write(line + b"\n")
            except OSError:
                self.lost_lines += 1
                return False
            return True

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _rotate(self) -> None:
        assert self._file is not None
        self._file.close()
        self._file = None
        names = [self.path, *(self.path.with_name(f"{self.path.name}.{n}") for n in range(1, self._files))]
        for older, newer in zip(reversed(names), list(reversed(names))[1:], strict=False):
            if newer.exists():
                newer.replace(older)
        if self._files == 1:
            self.path.unlink()
        self._file = self.path.open("ab", buffering=0)


def free_bytes(folder: Path) -> int:
    """Space on the disk of ``folder`` that this user may take. Raises StorageError."""
    try:
        found = os.statvfs(folder)
    except OSError as error:
        raise StorageError(f"asking for the free space of {folder}: {error.strerror}") from error
    return found.f_bavail * found.f_frsize
