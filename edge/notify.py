"""What a service tells systemd: ready, how it is, that it lives, that it needs longer, that it ends.

The protocol of sd_notify(3), by hand: datagrams of ``NAME=value`` lines to the Unix socket that ``NOTIFY_SOCKET``
names. Nothing is said, and nothing fails, where there is no such socket: under ``mindstream up``, in a terminal, in
tests.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping

log = logging.getLogger(__name__)

STATUS_CHARS = 300
"""A status is one line in `systemctl status`."""


class Notifier:
    """Speaks to the service manager that started this process.

    Args:
        address: a path, or a name in the abstract namespace with ``@`` before it; empty for nobody.
        watchdog_s: the manager kills this process when it says nothing for so long; 0 for never.
    """

    def __init__(self, address: str = "", watchdog_s: float = 0.0) -> None:
        self.watchdog_s = watchdog_s
        self._status = ""
        self._address = ""
        self._socket: socket.socket | None = None
        if not address.startswith(("/", "@")):
            return  # systemd also knows vsock addresses: those are a virtual machine's, not a service's
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        # The manager reads at once, or is in trouble itself: a service does not wait for it.
        self._socket.setblocking(False)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Notifier:
        """As ``NOTIFY_SOCKET``, ``WATCHDOG_USEC`` and ``WATCHDOG_PID`` say (sd_watchdog_enabled(3))."""
        environ = os.environ if environ is None else environ
        try:
            meant_for_us = int(environ.get("WATCHDOG_PID") or os.getpid()) == os.getpid()
            watchdog_s = int(environ.get("WATCHDOG_USEC") or 0) / 1e6 if meant_for_us else 0.0
        except ValueError:
            log.warning("WATCHDOG_USEC or WATCHDOG_PID is no number: the watchdog is not fed")
            watchdog_s = 0.0
        return cls(environ.get("NOTIFY_SOCKET", ""), watchdog_s)

    @property
    def listened_to(self) -> bool:
        """Whether there is a service manager that wants to know."""
        return self._socket is not None

    def ready(self) -> None:
        """The service can be used."""
        self._send("READY=1")

    def stopping(self) -> None:
        """It is ending."""
        self._send("STOPPING=1")

    def alive(self) -> None:
        """Feed the watchdog."""
        self._send("WATCHDOG=1")

    def extend_timeout(self, seconds: float) -> None:
        """The start (or the end) is under way and takes at least ``seconds`` from now."""
        self._send(f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")

    def status(self, text: str) -> None:
        """Say how it is, in one line, if it differs from what was said last."""
        line = " ".join(text.split())[:STATUS_CHARS]
        if line != self._status and self._send(f"STATUS={line}"):
            self._status = line

    def close(self) -> None:
        """Say nothing from now on."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, text: str) -> bool:
        if self._socket is None:
            return False
        try:
            self._socket.sendto(text.encode("utf-8", "replace"), self._address)
        except OSError as error:
            log.warning("telling the service manager %s: %s", text.partition("=")[0], error.strerror or error)
            return False
        return True
