"""Fixtures of this room: folders for Mosquitto, and a CA with a server's certificate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from broker.certificates import make_ca, make_server
from broker.configuration import Listener, Setup
from broker.mosquitto import INSTALL_HINT, find_mosquitto
from tests.support.mosquittos import ME, Mosquitto
from tests.support.ports import free_port


@dataclass
class Certificates:
    """Paths of PEM files."""

    ca: Path
    other_ca: Path
    server: Path
    key: Path


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """A CA, a certificate from it for this machine, and a CA that signed nothing here."""
    folder = tmp_path_factory.mktemp("certificates")
    ca = make_ca()
    server = make_server(ca, ["127.0.0.1", "localhost"])
    paths = Certificates(folder / "ca.pem", folder / "other-ca.pem", folder / "server.pem", folder / "server.key")
    paths.ca.write_bytes(ca.certificate)
    paths.other_ca.write_bytes(make_ca("another").certificate)
    paths.server.write_bytes(server.certificate)
    paths.key.write_bytes(server.key)
    paths.key.chmod(0o600)
    return paths


@pytest.fixture
def needs_mosquitto() -> None:
    """Skip where there is none."""
    if find_mosquitto() is None:
        pytest.skip(f"Mosquitto is not installed: {INSTALL_HINT}")


def device_setup(folder: Path, *listeners: Listener, **changes: object) -> Setup:
    """A device whose Mosquitto runs as this user."""
    listeners = listeners or (Listener(free_port()),)
    return Setup("device", folder / "etc", folder / "data", ME, listeners, **changes)  # type: ignore[arg-type]


@pytest.fixture
def device(tmp_path: Path, needs_mosquitto: None) -> Iterator[Mosquitto]:
    """A device's Mosquitto with the names sprout, tomato and mallory."""
    with Mosquitto(device_setup(tmp_path), "sprout", "tomato", "mallory") as running:
        yield running
