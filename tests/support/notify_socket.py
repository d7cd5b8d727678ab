"""The other end of sd_notify: a service manager's socket, and a service started as systemd starts it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from broker.child import spawn
from tests.support.nodes import CHECKOUT
from tests.support.waiting import DEADLINE_S


class NotifySocket:
    """Hears one process; ``lines`` is what it has said so far, in order.

    Args:
        address: a path, or ``@NAME`` in the abstract namespace.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.lines: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._socket.settimeout(0.1)
        self._closing = False
        self._thread = threading.Thread(target=self._hear, daemon=True)
        self._thread.start()

    def _hear(self) -> None:
        while not self._closing:
            with contextlib.suppress(TimeoutError):
                self.lines += self._socket.recv(65_536).decode().splitlines()

    def count(self, line: str) -> int:
        """How often ``line`` has been said."""
        return self.lines.count(line)

    def wait(self, line: str, count: int = 1, timeout_s: float = DEADLINE_S) -> None:
        """Wait until a line that begins with ``line`` has been said ``count`` times."""

        deadline_s = time.monotonic() + timeout_s
        while sum(each.startswith(line) for each in list(self.lines)) < count:
            assert time.monotonic() < deadline_s, f"{line!r} was not said {count} times: {self.lines[-8:]}"
            time.sleep(0.02)

    def catch_up(self) -> None:
        """Wait until all that had been said so far is in ``lines``: what is sent to the socket comes in order."""
        mark = f"X_MARK={time.monotonic_ns()}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as speaker:
            speaker.sendto(mark.encode(), self._socket.getsockname())
        self.wait(mark)

    @property
    def status(self) -> str:
        """The last status line."""
        return next((line.removeprefix("STATUS=") for line in reversed(self.lines) if line.startswith("STATUS=")), "")

    def close(self) -> None:
        self._closing = True
        self._thread.join()
        self._socket.close()


class Unit:
    """One service in its own process, under a notify socket of its own."""

    def __init__(self, process: subprocess.Popen[bytes], heard: NotifySocket, log_path: Path) -> None:
        self.process = process
        self.heard = heard
        self._log_path = log_path

    @property
    def log(self) -> str:
        """What it has printed."""
        return self._log_path.read_text(errors="replace")

    def stop(self) -> int:
        """SIGTERM, as systemd does; its exit code."""
        self.process.terminate()
        return self.process.wait(DEADLINE_S)


@contextmanager
def started(
    command: Sequence[str], config: Path, folder: Path, *, watchdog_s: float = 0.0, address: str = ""
) -> Iterator[Unit]:
    """``command`` (arguments to this Python) as a unit; killed at the end if it still runs."""
    name = command[-1].rpartition("/")[2]
    heard = NotifySocket(address or str(folder / f"{name}.notify"))
    log_path = folder / f"{name}.log"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MINDSTREAM_")}
    environment |= {
        "NOTIFY_SOCKET": heard.address,
        "MINDSTREAM_CONFIG": str(config),
        "PYTHONPATH": str(CHECKOUT),
    }
    if watchdog_s:
        environment["WATCHDOG_USEC"] = str(round(watchdog_s * 1e6))
    with log_path.open("ab") as log:
        process = spawn([sys.executable, *command], cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        yield Unit(process, heard, log_path)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
        heard.close()
        if not address:
            Path(heard.address).unlink()


def write_config(folder: Path, broker_url: str, extra_toml: str = "") -> Path:
    """A node's configuration, its data beside it."""
    path = folder / "mindstream.toml"
    path.write_text(
        f'[node]\nname = "sprout"\ndata_dir = "{folder / "data"}"\n[broker]\nurl = "{broker_url}"\n{extra_toml}'
    )
    return path
