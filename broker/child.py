"""Child processes that die with their parent, however it dies.

The kernel sends a chosen signal to a child when its parent is gone (``prctl(PR_SET_PDEATHSIG)``), a ``kill -9`` of
the parent included. The setting survives ``exec``, so any program can be started through this file: it runs as a
script of the standard library alone, sets the signal, and becomes the program.

Two traps are handled here. The parent may die before the child has asked: the child then sees another parent and
leaves. And "parent" means the *thread* that forked: a child started from a short-lived thread would be killed when
that thread ends, so all of them are started from one thread that lives as long as the process.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

PR_SET_PDEATHSIG = 1
EXIT_ORPHANED = 125
"""Exit code of a child whose parent was gone before it could be tied to it."""

_spawner: ThreadPoolExecutor | None = None
_spawner_lock = threading.Lock()


def spawn(
    command: list[str],
    *,
    death_signal: signal.Signals = signal.SIGKILL,
    cwd: str | os.PathLike[str] | None = None,
    env: dict[str, str] | None = None,
    stdout: int | IO[bytes] | None = None,
    stderr: int | IO[bytes] | None = None,
    new_session: bool = True,
) -> subprocess.Popen[bytes]:
    """Start ``command`` as a child that gets ``death_signal`` when this process ends.

    ``new_session`` keeps the terminal's Ctrl-C from the child, so that its parent decides the order of the end.
    Raises OSError when the program cannot be started.
    """
    shim = [sys.executable, "-I", "-S", str(Path(__file__).resolve()), str(os.getpid()), str(int(death_signal))]

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            shim + command,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=new_session,
        )

    return _long_lived_thread().submit(start).result()


def die_with(parent_pid: int, death_signal: int = signal.SIGKILL) -> None:
    """Tie this process to its parent; leave at once if it is already gone. Raises OSError if the kernel refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl(PR_SET_PDEATHSIG): {os.strerror(number)}")
    if os.getppid() != parent_pid:
        os._exit(EXIT_ORPHANED)


def _long_lived_thread() -> ThreadPoolExecutor:
    global _spawner
    with _spawner_lock:
        if _spawner is None:
            _spawner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spawner")
        return _spawner


def _forget_thread() -> None:
    # A forked copy of this process has not the thread; it starts its own when it needs one.
    global _spawner, _spawner_lock
    _spawner, _spawner_lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_thread)


def main(arguments: list[str]) -> None:
    """``child.py PARENT_PID SIGNAL PROGRAM [ARGUMENT…]``: become PROGRAM, tied to the parent."""
    parent_pid, death_signal, command = int(arguments[0]), int(arguments[1]), arguments[2:]
    die_with(parent_pid, death_signal)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"starting {command[0]}: {error.strerror}")


if __name__ == "__main__":
    main(sys.argv[1:])
