"""Mosquitto as a child process on loopback: the broker that devices run, for tests, benchmarks and one's own node.

The configuration is valid on 2.0 and 2.1. It keeps sessions, retained and waiting messages on disk; a crash loses
at most the last two seconds of them (``autosave_interval``), and nothing that the memory log would not repair.

Mosquitto 2.0.11 (Debian 12) keeps to a client's Receive Maximum only until the first acknowledgement, and then sends
all that waits: a client bounds its queue by not reading on, not by that number alone. And it does not save a session
that began with Clean Start, whatever its expiry: a client that wants its session back after a crash of the broker
connects with Clean Start 0 from the first time.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import tempfile
from pathlib import Path

from broker.base import MAX_CONNECTIONS, MAX_INFLIGHT, MAX_PACKET_BYTES, Broker
from broker.configuration import AUTOSAVE_INTERVAL_S, UNLIMITED_MESSAGES
from broker.system_user import why_not_readable, why_not_writable
from protocol.errors import BrokerError

INSTALL_HINT = "sudo apt-get install --yes --no-install-recommends mosquitto mosquitto-clients"

CONFIG = """\
listener {port} {host}
allow_anonymous true
user {user}

persistence true
persistence_location {folder}/
autosave_interval {autosave_interval_s}

max_connections {max_connections}
max_packet_size {max_packet_bytes}
max_inflight_messages {max_inflight}
# No limit. The defaults drop silently what is beyond 1,000 messages for a client that is away.
max_queued_messages {unlimited}
max_queued_bytes 0
set_tcp_nodelay true

log_dest stderr
log_type error
log_type warning
connection_messages false
"""


class MosquittoBroker(Broker):
    """Mosquitto in a child process; see ``Broker`` for ``port``, ``host`` and ``log_path``.

    Args:
        data_folder: where its state and configuration are; kept over starts. None: a temporary one, removed by stop().
        binary: the program; None looks in PATH and the sbin folders.
    """

    kind = "mosquitto"
    # It writes its state when asked to end, so it is asked.
    death_signal = signal.SIGTERM

    def __init__(
        self,
        port: int | None = None,
        *,
        host: str = "127.0.0.1",
        log_path: Path | None = None,
        data_folder: Path | None = None,
        binary: Path | None = None,
    ) -> None:
        super().__init__(port, host=host, log_path=log_path)
        self.data_folder = data_folder
        self._temporary: Path | None = None
        self._binary = binary

    def _command(self, port: int) -> list[str]:
        binary = self._binary or find_mosquitto()
        if binary is None:
            raise BrokerError(
                "starting Mosquitto: the program is not installed", hint=INSTALL_HINT, reason="program not found"
            )
        folder = self._folder()
        config_path = folder / "mosquitto.conf"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            config_path.write_text(render_config(self.host, port, folder))
        except OSError as error:
            raise BrokerError(
                f"starting Mosquitto: writing {config_path}: {error.strerror}",
                hint="give it a data folder that this user may write",
                reason="data folder not writable",
            ) from error
        _refuse_unsaved(folder)
        return [str(binary), "-c", str(config_path)]

    def _folder(self) -> Path:
        if self.data_folder is not None:
            return self.data_folder.resolve()
        if self._temporary is None:
            self._temporary = Path(tempfile.mkdtemp(prefix="mindstream-mosquitto-"))
        return self._temporary

    def _cleanup(self) -> None:
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary = None


def _refuse_unsaved(folder: Path) -> None:
    """Mosquitto runs on, and saves nothing, where it cannot write; and forgets what it cannot read."""
    account = pwd.getpwuid(os.geteuid())
    database = folder / "mosquitto.db"
    reason = why_not_writable(folder, account)
    if not reason and database.exists() and (unreadable := why_not_readable(database, account)):
        reason = f"{database.name}: {unreadable}"
    if reason:
        raise BrokerError(
            f"starting Mosquitto: {account.pw_name} cannot keep its state in {folder}: {reason}",
            hint="give it a data folder that this user may read and write",
            reason="data folder not writable",
        )


def render_config(host: str, port: int, folder: Path) -> str:
    """Mosquitto's configuration; ``folder`` holds its state."""
    return CONFIG.format(
        host=host,
        port=port,
        # Started as root it would become the user `mosquitto`, persist nothing where that user may not write, and
        # run on without a word; started as another user it ignores this line.
        user=pwd.getpwuid(os.geteuid()).pw_name,
        folder=folder,
        autosave_interval_s=AUTOSAVE_INTERVAL_S,
        unlimited=UNLIMITED_MESSAGES,
        max_connections=MAX_CONNECTIONS,
        max_packet_bytes=MAX_PACKET_BYTES,
        max_inflight=MAX_INFLIGHT,
    )


def find_mosquitto() -> Path | None:
    """The program ``mosquitto``, in PATH or where Debian puts it (an ordinary user's PATH has no sbin)."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin"])
    found = shutil.which("mosquitto", path=path)
    return Path(found) if found else None
