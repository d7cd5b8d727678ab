"""`mindstream broker` as a person types it, from certificates to a bus that is connected."""

from __future__ import annotations

import io
import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from broker.child import spawn
from broker.mosquitto import INSTALL_HINT, find_mosquitto
from edge.bus import Bus
from tests.edge.test_cli import mindstream
from tests.support.mosquittos import ME, wait_for
from tests.support.ports import free_port


def typed(*arguments: str, stdin: str = "", code: int = 0) -> subprocess.CompletedProcess[str]:
    done: subprocess.CompletedProcess[str] = mindstream("broker", *arguments, stdin=stdin)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_from_certificate_to_a_connected_bus(tmp_path: Path) -> None:
    if find_mosquitto() is None:
        pytest.skip(f"Mosquitto is not installed: {INSTALL_HINT}")
    folder, pem, port = tmp_path / "hub", tmp_path / "pem", free_port()
    typed("certificate", "--out", str(pem), "--host", "127.0.0.1", "--user", ME)
    server = ["--certificate", str(pem / "server.pem"), "--key", str(pem / "server.key")]
    render = ["render", "hub", "--out", str(folder), *server, "--port", str(port), "--bind", "127.0.0.1"]
    render += ["--loopback-port", "0", "--user", ME, "--data", str(tmp_path / "data")]
    assert "nobody may connect yet" in typed(*render).stdout
    secret = tmp_path / "sprout.password"
    said = typed("user", "add", "sprout", "--folder", str(folder), "--to", str(secret)).stdout
    password = secret.read_text().strip()
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert password not in said
    typed("user", "add", "tomato", "--folder", str(folder), "--stdin", stdin="a password of hers\n")
    assert typed("check", str(folder / "mosquitto.conf")).returncode == 0
    # Written again, with another setting, its users stay.
    typed(*render, "--autosave-s", "5")
    assert "autosave_interval 5" in (folder / "mosquitto.conf").read_text()

    broker = spawn([str(find_mosquitto()), "-c", str(folder / "mosquitto.conf")], stderr=subprocess.DEVNULL)
    try:
        for name, word in (("sprout", password), ("tomato", "a password of hers")):
            url, ca_file = f"mqtts://127.0.0.1:{port}", str(pem / "ca.pem")
            bus = Bus(url=url, node=name, client="test", username=name, password=word, ca_file=ca_file)
            bus.start(None)
            wait_for(lambda bus=bus: bus.connected, f"{name} is connected")
            bus.stop()
    finally:
        broker.terminate()
        broker.wait()


def test_a_device_has_a_password_of_its_own_and_says_what_to_write_where(tmp_path: Path) -> None:
    out = tmp_path / "device"
    said = typed("render", "device", "--out", str(out), "--node", "sprout", "--user", ME).stdout
    assert f'username = "sprout", password_file = "{out}/sprout.password"' in said
    assert json.loads(typed("user", "list", "--folder", str(out), "--json").stdout) == [
        {"name": "sprout", "role": "node", "branches": []}
    ]
    findings = json.loads(typed("check", str(out / "mosquitto.conf"), "--json").stdout)
    assert {each["verdict"] for each in findings} == {"ok"}
    assert f"-c {out}/mosquitto.conf" in (out / "systemd-drop-in.conf").read_text()
    before = (out / "passwords").read_text()
    typed("render", "device", "--out", str(out), "--node", "sprout", "--user", ME)
    assert (out / "passwords").read_text() == before


def test_a_device_with_a_bridge_keeps_the_bridges_password_out_of_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "word").write_text("the bridge's password\n")
    (tmp_path / "ca.pem").write_text("")
    bridge = ["--bridge", "hub.local:8884", "--bridge-ca", str(tmp_path / "ca.pem")]
    device = ["render", "device", "--out", str(tmp_path / "etc"), "--node", "sprout", "--user", ME, *bridge]
    typed(*device, code=2)
    said = typed(*device, "--bridge-password-file", str(tmp_path / "word")).stdout
    text = (tmp_path / "etc" / "mosquitto.conf").read_text()
    assert "address hub.local:8884\n" in text
    assert "remote_username sprout\nremote_password the bridge's password\n" in text
    assert "the bridge's password" not in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["render", "hub", "--out", "OUT", "--user", ME], "without TLS"),
        (["render", "hub", "--out", "OUT", "--user", "no-such-user-here", "--bind", "127.0.0.1"], "no-such-user-here"),
        (["user", "add", "UPPER", "--folder", "OUT"], "as a name"),
        (["user", "add", "sprout", "--folder", "OUT", "--stdin"], "there is none"),
        (["user", "list", "--folder", "OUT/none"], "there is none"),
        (["check", "OUT/none"], "No such file"),
        (["certificate", "--out", "OUT", "--host", "näh"], "ASCII"),
    ],
)
def test_what_cannot_be_done_says_why_and_what_next(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from edge.cli import main

    monkeypatch.setattr(sys, "stdin", io.StringIO("a long password\n"))
    with pytest.raises(SystemExit) as ended:
        main(["broker", *(each.replace("OUT", str(tmp_path)) for each in arguments)])
    assert ended.value.code in (1, 2, 4)
    said = " ".join(capsys.readouterr().err.split())
    assert says in said
    assert "hint:" in said
    assert "Traceback" not in said


def test_users_are_replaced_only_when_asked_and_removed_once(tmp_path: Path) -> None:
    out = tmp_path / "etc"
    typed("render", "device", "--out", str(out), "--node", "sprout", "--user", ME)
    word = "a long password\n"
    typed("user", "add", "sprout", "--folder", str(out), "--stdin", stdin=word, code=1)
    bridge = ["--role", "bridge", "--branch", "tomato", "--branch", "pepper", "--replace"]
    typed("user", "add", "sprout", "--folder", str(out), "--stdin", *bridge, stdin=word)
    assert "tomato, pepper" in typed("user", "list", "--folder", str(out)).stdout
    typed("user", "rm", "sprout", "--folder", str(out))
    typed("user", "rm", "sprout", "--folder", str(out), code=4)


def test_a_broken_configuration_ends_check_with_1(tmp_path: Path) -> None:
    path = tmp_path / "mosquitto.conf"
    path.write_text("listener 1883\nallow_anonymous true\n")
    assert "whoever connects is let in" in typed("check", str(path), code=1).stdout
