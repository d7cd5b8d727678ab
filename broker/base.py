"""What every broker of ours has: a port on loopback, a child process, a true readiness check, and an end.

Knows the first two packets of MQTT and nothing of topics or payloads.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from ipaddress import AddressValueError, IPv4Address
from pathlib import Path
from types import TracebackType
from typing import IO

import psutil

from broker.child import spawn
from protocol.errors import BrokerError

MIB = 1024 * 1024

MAX_PACKET_BYTES = MIB + 64 * 1024
"""Largest MQTT packet taken: the largest payload of the topic table (1 MiB) and room for topic and properties."""
MAX_INFLIGHT = 100
"""Unacknowledged QoS 1 messages on the way to one client: enough to hide 1 ms of round trip at 100,000 messages a
second. A client's queue must hold at least as many: in rumqttd the number is fixed, and a smaller Receive Maximum is
not heeded."""
MAX_CONNECTIONS = 1_000
"""Connections at once: a node has some 20, the tests' largest fleet some 200; a runaway client stops here."""
CONNECT_TIMEOUT_MS = 5_000
"""A socket that has not said CONNECT by then is closed, so that idle ones cannot use up the connections."""

FREE_PORTS = range(20_000, 32_000)
"""Where a free port is looked for: below the range that Linux gives to outgoing connections."""

READY_TIMEOUT_S = 15.0
STOP_TIMEOUT_S = 5.0
_FREE_PORT_TRIES = 5
_PROBE_TIMEOUT_S = 1.0
_LOG_TAIL_BYTES = 2_000


class Broker(ABC):
    """A broker on this machine, held by this process and gone with it.

    Args:
        port: TCP port, or None for a free one, chosen at the first start and kept after it.
        host: a loopback address; anything else is refused, because these brokers trust who can connect.
        log_path: file that the broker's own output is appended to; None keeps it only to explain a failed start.
    """

    kind: str
    """Its name in messages and in ``mindstream status``."""
    death_signal: signal.Signals = signal.SIGKILL
    """What the child gets when this process dies."""
    mqtt_level: int = 5
    """Protocol level that it is asked in whether it is ready: 5, or 4 for MQTT 3.1.1."""

    def __init__(self, port: int | None = None, *, host: str = "127.0.0.1", log_path: Path | None = None) -> None:
        self.host = _loopback(host)
        self.log_path = log_path
        self._wanted_port = port
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    @abstractmethod
    def _command(self, port: int) -> list[str]:
        """The program and its arguments; may write the files that they name."""

    def _working_folder(self) -> Path | None:
        return None

    def _cleanup(self) -> None:  # noqa: B027  (not every broker leaves files)
        """Remove what ``_command`` wrote and the next start does not need."""

    @property
    def port(self) -> int:
        """The TCP port. Raises BrokerError before the first start of a broker that chooses its own."""
        if self._port is None:
            raise BrokerError(f"asking the {self.kind} broker for its port: it has none yet", hint="call start() first")
        return self._port

    @property
    def url(self) -> str:
        """``mqtt://127.0.0.1:PORT``."""
        return f"mqtt://{self.host}:{self.port}"

    @property
    def pid(self) -> int | None:
        """Process id of the running broker, else None."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    @property
    def alive(self) -> bool:
        """Whether the process runs. A dead one is started again by ``start()``, on the same port."""
        return self.pid is not None

    def start(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Start it and return when it has answered a real MQTT CONNECT. Does nothing if it runs.

        Raises BrokerError when the port is taken, the program is missing or fails, or nothing answers in time.
        """
        if self.alive:
            return
        # A free port may be taken by another between finding and using it; a given one is the user's decision.
        tries = 1 if self._port is not None else _FREE_PORT_TRIES
        for attempt in range(tries):
            port = self._port if self._port is not None else _free_port(self.host)
            try:
                self._start_on(port, timeout_s)
            except _PortTaken:
                if attempt + 1 == tries:
                    raise
            else:
                self._port = port
                return

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """End the process and wait for it. Safe to call twice, and on one that died."""
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._log is not None:
            self._log.close()
            self._log = None
        self._cleanup()

    def __enter__(self) -> Broker:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        state = f"pid {self.pid}" if self.alive else "stopped"
        return f"<{type(self).__name__} {self.host}:{self._port or 'free port'} {state}>"

    def _start_on(self, port: int, timeout_s: float) -> None:
        self._refuse_taken(port)
        if self._log is not None:
            self._log.close()
        self._log = self.log_path.open("ab+") if self.log_path else tempfile.TemporaryFile()  # noqa: SIM115
        command = self._command(port)
        try:
            process = spawn(
                command,
                death_signal=self.death_signal,
                cwd=self._working_folder(),
                stdout=self._log,
                stderr=self._log,
            )
        except OSError as error:
            raise BrokerError(
                f"starting the {self.kind} broker ({command[0]}): {error.strerror}", reason="cannot start the program"
            ) from error
        self._process = process
        try:
            self._wait_ready(process, port, timeout_s)
        except BaseException:
            self.stop()
            raise

    def _wait_ready(self, process: subprocess.Popen[bytes], port: int, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        pause_s = 0.005
        while time.monotonic() < deadline:
            if process.poll() is not None:
                # Another program may have been quicker to take the port than this child.
                self._refuse_taken(port)
                raise BrokerError(
                    f"starting the {self.kind} broker on {self.host}:{port}: it ended with code {process.returncode}"
                    f"{self._last_words()}",
                    reason="the broker ended at its start",
                )
            # Whoever answers must be our child, not a program that took the port in the meantime.
            if answers_connect(self.host, port, level=self.mqtt_level) and _listens(process.pid, port):
                return
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, 0.1)
        self._refuse_taken(port, ours=process.pid)
        raise BrokerError(
            f"starting the {self.kind} broker on {self.host}:{port}: no answer to MQTT CONNECT within {timeout_s:g} s"
            f"{self._last_words()}",
            hint="is this machine overloaded? see the broker's log",
            reason="not ready in time",
        )

    def _refuse_taken(self, port: int, ours: int | None = None) -> None:
        if ours is not None and _listens(ours, port):
            return
        with socket.socket() as probe:
            # As the brokers do it: sockets of dead connections that wait on this port are no obstacle.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.host, port))
            except OSError as error:
                raise _PortTaken(
                    f"starting the {self.kind} broker on {self.host}:{port}: {_why_not(port, error)}",
                    hint=f"stop the program that has port {port} (`ss -ltnp 'sport = :{port}'` names it), or set"
                    " another port in broker.url",
                    field="broker.url",
                    reason="port not available",
                ) from error

    def _last_words(self) -> str:
        if self._log is None:
            return ""
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - _LOG_TAIL_BYTES))
        tail = self._log.read().decode("utf-8", "replace").strip()
        return f"; its last words: {tail}" if tail else ""


class _PortTaken(BrokerError):
    """Apart from other failures only inside this module: a broker with no port of its own tries another."""


def answers_connect(host: str, port: int, timeout_s: float = _PROBE_TIMEOUT_S, level: int = 5) -> bool:
    """Whether an MQTT broker there answers a CONNECT with a CONNACK that accepts it; ``level`` 4 is MQTT 3.1.1."""
    client_id = f"mindstream-probe-{os.getpid()}".encode()
    # Protocol name and level, clean start, keep-alive 10 s (rumqttd refuses 0), in MQTT 5 no properties, client id.
    level_and_flags = bytes([level, 0x02]) + b"\x00\x0a" + (b"\x00" if level == 5 else b"")
    body = b"\x00\x04MQTT" + level_and_flags + len(client_id).to_bytes(2, "big") + client_id
    try:
        with socket.create_connection((host, port), timeout=timeout_s) as connection:
            connection.sendall(bytes([0x10, len(body)]) + body)
            answer = connection.recv(4)
            while 0 < len(answer) < 4:
                more = connection.recv(4 - len(answer))
                if not more:
                    return False
                answer += more
            connection.sendall(b"\xe0\x00")
    except OSError:
        return False
    # CONNACK: type 2, a remaining length of one byte, flags, reason 0 (success).
    return len(answer) == 4 and answer[0] == 0x20 and answer[3] == 0


def _free_port(host: str) -> int:
    # Not from the kernel's range for outgoing connections: while a broker is down, a client that tries to reconnect
    # could be given that very port as its own, and the broker could not come back.
    for port in random.sample(FREE_PORTS, k=100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
    raise BrokerError(
        f"looking for a free port on {host}: 100 tries from {FREE_PORTS.start} to {FREE_PORTS.stop - 1} are all taken",
        hint="set a port in broker.url",
        field="broker.url",
        reason="no free port",
    )


def _listens(pid: int, port: int) -> bool:
    try:
        return any(
            connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port
            for connection in psutil.Process(pid).net_connections("tcp4")
        )
    except psutil.Error:
        return False


def _why_not(port: int, error: OSError) -> str:
    if isinstance(error, PermissionError):
        return f"port {port} is below 1024, and this user may not listen there"
    return "another program listens there" if error.errno == 98 else str(error.strerror)


def _loopback(host: str) -> str:
    try:
        address = IPv4Address("127.0.0.1" if host == "localhost" else host)
    except AddressValueError:
        address = None
    if address is None or not address.is_loopback:
        raise BrokerError(
            f"starting a broker on {host!r}: only loopback (127.0.0.1) is served",
            hint="this broker lets in whoever can connect; for other machines run Mosquitto with passwords and ACLs"
            " and point broker.url at it",
            field="broker.url",
            reason="not a loopback address",
        )
    return str(address)
