"""install.sh: installed from a wheelhouse without network, upgraded while the node runs, removed with its data kept.

Under a root of the test's own, with the manager of tests/support/unit_manager.py in place of systemd; the services,
Mosquitto and the packages are real.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.mosquitto import MosquittoBroker
from edge import units
from edge.bus import Bus
from protocol.messages import MemoryPut, MemoryRecall, MemoryRecalled, MemoryStored
from tests.support.nodes import CHECKOUT
from tests.support.once import once_a_run
from tests.support.unit_manager import UnitManager
from tests.support.waiting import TTL_MS
from tests.support.wheelhouse import build_wheelhouse, other_version

INSTALL = CHECKOUT / "systemd" / "install.sh"
ENABLED = ["presence", "memory_store", "sync_bridge"]
PRESENCE, MEMORY, SYNC = UNITS = [units.instance(name) for name in ENABLED]

pytestmark = pytest.mark.skipif(shutil.which("flock") is None, reason="flock (util-linux) is not installed")


@pytest.fixture(scope="session")
def wheelhouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that the core needs, as wheels."""
    return once_a_run(tmp_path_factory, "wheelhouse", build_wheelhouse)


def install(*arguments: str | Path, root: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MINDSTREAM_", "PYTHON"))}
    # No package may come from anywhere else.
    environment |= {"PIP_NO_INDEX": "1", "PIP_NO_CACHE_DIR": "1"}
    done = subprocess.run(
        ["sh", str(INSTALL), *map(str, arguments), "--root", str(root), "--python", sys.executable],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


class Device:
    """One device: a root, its manager, its broker."""

    def __init__(self, folder: Path, broker: MosquittoBroker) -> None:
        self.root = folder / "device"
        self.broker = broker
        self.config = self.root / "etc/mindstream/mindstream.toml"
        self.config.parent.mkdir(parents=True)
        self.config.write_text(
            f'# mine\n[node]\nname = "sprout"\ndata_dir = "{self.root}/var/lib/mindstream"\n'
            f'[broker]\nurl = "{broker.url}"\n[services]\nenabled = {ENABLED[1:]!r}\n'
        )
        self.units = self.root / "etc/systemd/system"
        self.units.mkdir(parents=True)
        self.manager = UnitManager(self.root, folder)

    def install(self, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        return install(*arguments, "--systemctl", self.manager.systemctl, root=self.root, check=check)

    @property
    def current(self) -> str:
        """The version that `current` leads to."""
        return (self.root / "opt/mindstream/current").resolve().name

    def versions(self) -> set[str]:
        return {path.name for path in (self.root / "opt/mindstream/versions").iterdir()}


@pytest.fixture
def device(tmp_path: Path, mosquitto_broker: MosquittoBroker) -> Iterator[Device]:
    made = Device(tmp_path, mosquitto_broker)
    yield made
    made.manager.close()


def remember(bus: Bus, text: str) -> MemoryStored:
    stored: MemoryStored = bus.ask("sprout", MemoryPut(text=text), ttl_ms=TTL_MS)
    return stored


def recalled(bus: Bus) -> list[str]:
    found: MemoryRecalled = bus.ask("sprout", MemoryRecall(query="pot"), ttl_ms=TTL_MS)
    return sorted(hit.text for hit in found.hits)


def test_the_script_is_plain_sh() -> None:
    assert INSTALL.stat().st_mode & 0o111
    subprocess.run(["sh", "-n", str(INSTALL)], check=True)
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", "-s", "sh", str(INSTALL)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


@pytest.mark.timeout(600)
def test_a_device_is_installed_without_network_and_removed_with_its_data_kept(device: Device, wheelhouse: Path) -> None:
    assert "is installed" in device.install("--wheelhouse", wheelhouse).stdout
    first = device.current
    assert {device.manager.state(name) for name in UNITS} == {"active"}
    # A configuration that is there is kept, the units are the table's, the program is the version's own.
    assert device.config.read_text().startswith("# mine\n")
    assert {each.verdict for each in units.check(device.units, wanted=ENABLED)} == {"ok"}
    program = device.root / "opt/mindstream/versions" / first / "bin/mindstream-service"
    assert device.manager.started == [(name, str(program)) for name in UNITS]
    # In a deep folder the interpreter stands on the second line: the kernel takes 127 characters of the first.
    assert f"{program.parent}/python" in "".join(program.read_text().splitlines()[:2])
    with Bus(url=device.broker.url, node="sprout", client="tester") as bus:
        remember(bus, "The key is under the pot.")

    # Again, a unit having been edited by hand: nothing is restarted, the edit is kept beside and said.
    edited = device.units / f"{MEMORY}.d" / units.DROP_IN
    edited.write_text(edited.read_text() + "MemoryMax=3G\n")
    pids = [device.manager.pid(name) for name in UNITS]
    done = device.install("--wheelhouse", wheelhouse)
    assert "installed already" in done.stdout
    assert f"{edited} had been edited by hand" in done.stdout
    assert edited.with_name(f"{edited.name}.orig").read_text().endswith("MemoryMax=3G\n")
    assert [device.manager.pid(name) for name in UNITS] == pids

    check = f"ExecStartPre=+{device.root}/opt/mindstream/current/bin/mindstream broker check /etc/mosquitto/x.conf"
    mosquitto = device.units / "mosquitto.service.d" / "mindstream.conf"
    mosquitto.parent.mkdir()
    mosquitto.write_text(f"[Service]\n{check}\nExecStart=\n")
    done = device.install("uninstall")
    assert "its data stay" in done.stdout
    assert mosquitto.read_text() == "[Service]\nExecStart=\n"  # it would not start without the program that has gone
    assert device.manager.state(MEMORY) == "inactive"
    assert not (device.root / "opt/mindstream").exists()
    assert not list(device.units.rglob("10-mindstream.conf"))
    assert (device.root / "var/lib/mindstream/memory_store/memory.db").is_file()
    assert device.config.is_file()
    device.install("uninstall", "--purge")
    assert not (device.root / "var/lib/mindstream").exists()
    assert not device.config.exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_upgrade_over_a_running_node_comes_whole_or_not_at_all(
    device: Device, wheelhouse: Path, tmp_path: Path
) -> None:
    device.install("--wheelhouse", wheelhouse)
    first = device.current
    with Bus(url=device.broker.url, node="sprout", client="tester") as bus:
        stored = remember(bus, "The key is under the pot.")

        # A version that never gets ready: the old one runs again, with all it had.
        broken = other_version(
            wheelhouse, tmp_path / "broken", "9.9.1", {"services/memory_store/service.py": "\nraise SystemExit(3)\n"}
        )
        done = device.install("upgrade", "--wheelhouse", broken, check=False)
        assert done.returncode == 1
        assert f"{first} runs again" in done.stderr
        assert device.current == first
        assert device.versions() == {first}
        assert {device.manager.state(name) for name in UNITS} == {"active"}
        assert recalled(bus) == ["The key is under the pot."]

        # One that cannot be installed, a package being absent: what runs was not touched.
        lacking = other_version(wheelhouse, tmp_path / "lacking", "9.9.2")
        next(lacking.glob("paho_mqtt-*")).unlink()
        pids = [device.manager.pid(name) for name in UNITS]
        done = device.install("upgrade", "--wheelhouse", lacking, check=False)
        assert done.returncode == 1
        assert "nothing was changed" in done.stderr
        assert device.versions() == {first}
        assert [device.manager.pid(name) for name in UNITS] == pids

        # A good one, while the sync bridge is stopped by its owner: that it stays.
        subprocess.run([str(device.manager.systemctl), "stop", SYNC], check=True)
        better = other_version(wheelhouse, tmp_path / "better", "9.9.3")
        del device.manager.started[:]
        done = device.install("upgrade", "--wheelhouse", better)
        assert device.current.startswith("9.9.3-")
        assert device.versions() == {first, device.current}
        assert [name for name, _ in device.manager.started] == [PRESENCE, MEMORY]
        assert device.manager.state(SYNC) == "inactive"
        assert recalled(bus) == ["The key is under the pot."]
        second = remember(bus, "The pot is by the river.")
        assert (second.log_id, second.seq) == (stored.log_id, stored.seq + 1)

        # Had that run been cut short, the next one restarts what may still run the old version.
        (device.root / "opt/mindstream/current/active").unlink()
        del device.manager.started[:]
        assert f"{first} is kept" in device.install("--wheelhouse", better).stdout
        assert [name for name, _ in device.manager.started] == [PRESENCE, MEMORY]
        assert "installed already" in device.install("--wheelhouse", better).stdout

        # One that refuses the configuration, the key being unknown to it, is not begun with.
        strict = other_version(
            wheelhouse, tmp_path / "strict", "9.9.4", {"edge/config.py": "\ndel SECTIONS['services']\n"}
        )
        done = device.install("upgrade", "--wheelhouse", strict, check=False)
        assert f"does not accept {device.config}" in done.stderr
        assert device.current.startswith("9.9.3-")


def test_what_cannot_be_done_is_said_before_anything_is_changed(tmp_path: Path) -> None:
    root = tmp_path / "device"
    done = install("upgrade", "--wheelhouse", tmp_path, root=root, check=False)
    assert done.returncode == 1
    assert "nothing is installed here" in done.stderr
    done = install("--wheelhouse", tmp_path, root=root, check=False)
    assert done.returncode == 1
    assert "no mindstream-*.whl" in done.stderr
    for version in ("1", "2"):
        (tmp_path / f"mindstream-{version}-py3-none-any.whl").touch()
    assert "several versions" in install("--wheelhouse", tmp_path, root=root, check=False).stderr
    assert install("--frobnicate", root=root, check=False).returncode == 2
    assert not list((root / "opt/mindstream").glob("versions/*"))
