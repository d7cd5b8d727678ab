"""A whole node under a real systemd: installed, hardened, killed, hung, upgraded, removed.

systemd is process 1 of namespaces of its own (tests/support/private_systemd.py); so this needs root, and is slow.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.mosquitto import find_mosquitto
from edge import units
from edge.service_table import SERVICES, ServiceRow, missing_packages
from tests.support.nodes import CHECKOUT, wait_for
from tests.support.private_systemd import PrivateSystemd, private_systemd, why_not
from tests.support.wheelhouse import build_wheelhouse, other_version

PYTHON = "/usr/bin/python3"
CORE = [units.instance(row.name) for row in SERVICES if not row.needs]
MEMORY = units.instance("memory_store")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def lacks() -> str:
    """What is missing here for these tests; empty when nothing is."""
    if reason := why_not():
        return reason
    if find_mosquitto() is None or not Path("/lib/systemd/system/mosquitto.service").exists():
        return "needs Debian's Mosquitto with its unit"
    script = "import ensurepip, sys; print(sys.version_info[:2])"
    done = subprocess.run([PYTHON, "-c", script], capture_output=True, text=True, check=False)
    if done.returncode or done.stdout.strip() != str(sys.version_info[:2]):
        return f"{PYTHON} is not the Python of this environment, whose packages it would be given"
    return ""


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateSystemd]:
    if reason := lacks():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("machine")
    share = folder / "share"
    wheels = share / "wheels"
    wheels.mkdir(parents=True)
    build_wheelhouse(wheels)
    other_version(wheels, share / "broken", "9.9.1", {"services/memory_store/service.py": "\nraise SystemExit(3)\n"})
    other_version(wheels, share / "better", "9.9.2")
    for path in (
        CHECKOUT / "systemd" / "install.sh",
        Path(__file__).with_name("probe.py"),
        Path(__file__).with_name("mailbox_probe.py"),
    ):
        (share / path.name).write_bytes(path.read_bytes())
    with private_systemd(folder) as booted:
        wait_for(lambda: booted.property("mosquitto", "ActiveState") == "active", "Mosquitto does not run")
        yield booted


def install(machine: PrivateSystemd, *arguments: str, check: bool = True) -> str:
    return machine.run("sh", "/srv/share/install.sh", *arguments, "--python", PYTHON, check=check)


def override(machine: PrivateSystemd, unit: str, text: str) -> None:
    """A drop-in of the owner's, as `systemctl edit` makes it."""
    script = f'mkdir -p "/etc/systemd/system/{unit}.d"; cat > "/etc/systemd/system/{unit}.d/override.conf"'
    machine.run("sh", "-c", f"{script} <<'TEXT'\n{text}TEXT\nsystemctl daemon-reload")


def recall(machine: PrivateSystemd) -> list[str]:
    return sorted(hit["text"] for hit in json.loads(machine.run("mindstream", "recall", "key", "--json"))["hits"])


def node_state(machine: PrivateSystemd) -> str:
    # Its exit code says whether the node is ready.
    shown = json.loads(machine.run("mindstream", "status", "--json", check=False))
    return str(shown["nodes"]["sprout"]["state"])


def test_a_node_lives_its_life_under_systemd(machine: PrivateSystemd) -> None:
    said = install(machine, "--wheelhouse", "/srv/share/wheels", "--node", "sprout")
    assert "is installed" in said
    assert "not ready" not in said
    for unit in CORE:
        assert machine.property(unit, "ActiveState") == "active"
        assert machine.property(unit, "StatusText").startswith("ready")
    machine.run("mindstream", "units", "check")
    assert "sprout runs under systemd: presence, memory_store, sync_bridge" in machine.run("mindstream", "doctor")
    machine.run("mindstream", "remember", "The key is under the pot.")
    assert recall(machine) == ["The key is under the pot."]

    # kill -9 of a service: systemd starts it again, with all it had.
    pid = machine.property(MEMORY, "MainPID")
    machine.run("kill", "-9", pid)
    wait_for(lambda: machine.property(MEMORY, "NRestarts") == "1", "it is not started again")
    wait_for(lambda: machine.property(MEMORY, "ActiveState") == "active", "it does not get ready again")
    assert recall(machine) == ["The key is under the pot."]

    # One that hangs is ended by the watchdog and leaves its stacks.
    sync = units.instance("sync_bridge")
    override(machine, sync, "[Service]\nWatchdogSec=3\nRestartSec=100ms\n")
    machine.run("systemctl", "restart", sync)
    machine.run("kill", "-STOP", machine.property(sync, "MainPID"))
    wait_for(lambda: machine.property(sync, "NRestarts") == "1", "the watchdog did not end it")
    assert "Fatal Python error: Aborted" in machine.journal(sync)
    wait_for(lambda: machine.property(sync, "ActiveState") == "active", "it does not get ready again")

    # A broker that is away holds up nothing; whoever waits for it says so, and goes on when it is back.
    machine.run("systemctl", "stop", "mosquitto")
    machine.run("systemctl", "mask", "--runtime", "mosquitto")
    machine.run("systemctl", "restart", "--no-block", "mindstream.target")
    wait_for(lambda: machine.property(MEMORY, "StatusText").startswith("waiting for the broker"), "it does not wait")
    assert machine.property("mindstream.target", "ActiveState") == "active"
    assert "memory_store is activating (waiting for the broker" in machine.run("mindstream", "doctor", check=False)
    machine.run("systemctl", "unmask", "--runtime", "mosquitto")
    machine.run("systemctl", "start", "mosquitto")
    for unit in CORE:
        wait_for(lambda each=unit: machine.property(each, "ActiveState") == "active", f"{unit} is not ready")  # type: ignore[misc]
    assert recall(machine) == ["The key is under the pot."]

    # What systemd starts before a suspend. (There is none here: so the node does not notice that it is over.)
    assert machine.run("systemctl", "is-enabled", units.SLEEP).strip() == "enabled"
    machine.run("systemctl", "start", units.SLEEP)
    assert node_state(machine) == "sleeping"
    machine.run("mindstream", "wake")
    wait_for(lambda: node_state(machine) == "ready", "the node does not wake")

    # An upgrade that fails, and one that does not.
    first = machine.run("readlink", "/opt/mindstream/current")
    assert "runs again" in install(machine, "upgrade", "--wheelhouse", "/srv/share/broken", check=False)
    assert machine.run("readlink", "/opt/mindstream/current") == first
    assert recall(machine) == ["The key is under the pot."]
    assert "runs the new version" in install(machine, "upgrade", "--wheelhouse", "/srv/share/better")
    assert "/9.9.2-" in machine.run("readlink", "/opt/mindstream/current")
    assert recall(machine) == ["The key is under the pot."]

    assert "its data stay" in install(machine, "uninstall")
    assert machine.property(MEMORY, "LoadState") == "not-found"
    machine.run("test", "-f", "/var/lib/mindstream/memory_store/memory.db")


@pytest.mark.parametrize("row", [row for row in SERVICES if not missing_packages(row)], ids=lambda row: row.name)
def test_a_unit_lets_its_service_do_what_it_must_and_no_more(machine: PrivateSystemd, row: ServiceRow) -> None:
    unit = units.instance(row.name)
    install(machine, "--wheelhouse", "/srv/share/wheels", "--node", "sprout", "--no-systemctl")
    machine.run("install", "-m", "755", "/srv/share/probe.py", "/opt/mindstream/current/probe.py")
    machine.run("sh", "-c", "umask 077; echo secret > /etc/mindstream/credentials/broker-password")
    override(
        machine,
        unit,
        "[Service]\nType=oneshot\nWatchdogSec=0\nRestart=no\nExecStart=\n"
        f"ExecStart={PYTHON} /opt/mindstream/current/probe.py\n",
    )
    machine.run("systemctl", "start", unit)
    line = next(each for each in reversed(machine.journal(unit).splitlines()) if each.startswith("{"))
    found = json.loads(line)
    # It may ask whether the clock is synchronised (0 to 5), and not set it.
    assert found["clock_state"] in range(6)
    assert found["set_clock"] == "Operation not permitted"
    assert (found["boot_id"], found["cpuinfo"]) == ("done", "done")
    assert found["password"] == "secret\n"
    assert found["password_file"] == found["shadow"] == found["home"] == "Permission denied"
    assert (found["write_state"], found["write_cache"]) == ("done", "done")
    assert found["write_program"] == found["write_etc"] == "Read-only file system"
    assert found["processes"] == 1
    assert found["disks"] == (["a-disk"] if row.devices else [])
    assert found["uid"] != 0


def test_a_letter_crosses_between_two_hardened_units(machine: PrivateSystemd) -> None:
    writer, reader = units.instance("model_runner"), units.instance("memory_store")
    install(machine, "--wheelhouse", "/srv/share/wheels", "--node", "sprout", "--no-systemctl")
    machine.run("install", "-m", "755", "/srv/share/mailbox_probe.py", "/opt/mindstream/current/mailbox_probe.py")
    machine.run("rm", "-rf", "/var/lib/mindstream/mailbox-probe")
    for unit, role in ((writer, "write"), (reader, "read")):
        program = f"/opt/mindstream/current/bin/python /opt/mindstream/current/mailbox_probe.py {role}"
        text = f"[Service]\nType=oneshot\nWatchdogSec=0\nRestart=no\nExecStart=\nExecStart={program}\n"
        override(machine, unit, text)

    def answer(unit: str) -> dict[str, object]:
        wait_for(lambda: machine.property(unit, "ActiveState") in ("inactive", "failed"), f"{unit} does not end")
        lines = [
            line
            for line in machine.journal(unit).splitlines()
            if line.startswith('{"read"' if unit == reader else '{"here"')
        ]
        assert lines, machine.journal(unit)[-3000:]
        found: dict[str, object] = json.loads(lines[-1])
        return found

    machine.run("systemctl", "start", "--no-block", writer)
    machine.run("systemctl", "start", "--no-block", reader)
    assert answer(reader) == {"read": "right"}
    # RemoveIPC= takes what a user has in /dev/shm, with the last of its units: not with the first.
    machine.run("sh", "-c", "touch /var/lib/mindstream/mailbox-probe/reader-ended")
    assert answer(writer) == {"here": True, "left_bytes": 0, "folder": True, "reason": ""}

    wait_for(lambda: "mindstream" not in machine.run("ls", "/dev/shm"), "the last unit has not cleared the folder away")
