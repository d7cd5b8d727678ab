"""Ports that no other test takes, in this process, in another worker or in another run on this machine."""

from __future__ import annotations

import fcntl
import os
import random
import socket
import tempfile
from pathlib import Path

from broker.base import FREE_PORTS

PORTS = range(FREE_PORTS.start - 10_000, FREE_PORTS.start)
"""Apart from what programs under test choose for themselves, and below what Linux gives to outgoing connections."""

_file: int | None = None
_mine: set[int] = set()


def free_port(host: str = "127.0.0.1") -> int:
    """A port where nothing listens, held for this process until it ends.

    Between choosing a port and listening there, and while a broker that was killed is down, another would find it
    free. So each is reserved by a lock on one byte of a file that all runs share: the kernel drops it with us.
    """
    for port in random.sample(PORTS, k=len(PORTS)):
        if port not in _mine and _reserve(port) and _is_free(host, port):
            return port
    raise AssertionError(f"no port from {PORTS.start} to {PORTS.stop - 1} is free on {host}")


def _reserve(port: int) -> bool:
    global _file
    if _file is None:
        path = Path(tempfile.gettempdir()) / f"mindstream-test-ports-{os.getuid()}"
        _file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.lockf(_file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
    except OSError:
        return False
    _mine.add(port)
    return True


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
