"""Programs on a terminal of their own, as a person meets them."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import time

import pytest

from tests.support.nodes import CHECKOUT
from tests.support.waiting import DEADLINE_S


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, command: list[str]) -> None:
        self._master, terminal = pty.openpty()
        self._unread = ""
        self.process = subprocess.Popen(
            command,
            cwd=CHECKOUT,
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(terminal)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def expect(self, text: str, timeout_s: float = DEADLINE_S) -> None:
        """Read until ``text`` has come; what follows it is for the next call."""
        deadline_s = time.monotonic() + timeout_s
        while text not in self._unread:
            assert time.monotonic() < deadline_s, f"{text!r} did not come; there was {self._unread!r}"
            if select.select([self._master], [], [], 0.2)[0]:
                try:
                    self._unread += os.read(self._master, 4096).decode("utf-8", "replace")
                except OSError:  # the program has closed its terminal
                    pytest.fail(f"{text!r} did not come before the end; there was {self._unread!r}")
        self._unread = self._unread.partition(text)[2]


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
