"""What is found wrong with a configuration, and the persistence folder tried out as the user that will write there."""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from broker.certificates import make_ca, make_server
from broker.check import FAILED, OK, WARNING, Finding, check, read, worst
from broker.configuration import Listener, Setup, render
from broker.mosquitto import MosquittoBroker
from broker.system_user import run_user, why_not_readable, why_not_writable
from edge.broker_setup import BrokerFolder
from edge.config import Config
from edge.doctor import _broker_configuration
from protocol.errors import BrokerError
from tests.broker.conftest import Certificates, device_setup
from tests.support.mosquittos import ME, PASSWORD

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can try what another user may")


def found(path: Path, name: str, **options: str) -> Finding:
    findings = [each for each in check(path, **options) if each.name == name]
    assert len(findings) == 1, findings
    return findings[0]


@pytest.fixture
def written(tmp_path: Path) -> BrokerFolder:
    """A device's configuration with one name, as it should be."""
    folder = BrokerFolder(tmp_path / "etc")
    folder.write(device_setup(tmp_path))
    folder.add("sprout", PASSWORD)
    return folder


def change(folder: BrokerFolder, old: str, new: str) -> Path:
    text = folder.config_path.read_text()
    assert old in text
    folder.config_path.write_text(text.replace(old, new))
    return folder.config_path


def test_what_we_render_has_nothing_wrong(written: BrokerFolder) -> None:
    findings = check(written.config_path)
    assert worst(findings) == OK, findings
    assert not [each for each in findings if each.next_step]


@pytest.mark.parametrize(
    ("old", "new", "name", "verdict", "says"),
    [
        ("persistence true", "persistence false", "persistence", FAILED, "nothing that waits outlives"),
        ("persistence_location ", "#", "persistence", FAILED, "whatever folder"),
        ("autosave_interval 1\n", "", "persistence", WARNING, "1800 s"),
        ("autosave_interval 1\n", "autosave_interval 0\n", "persistence", WARNING, "all is lost"),
        ("max_queued_messages 1000000000", "", "queues", WARNING, "1,000 messages"),
        ("max_queued_messages 1000000000", "max_queued_messages 0", "queues", WARNING, "misread"),
        ("max_packet_size 1114112", "max_packet_size 65536", "packets", FAILED, "65,536"),
        ("allow_anonymous false", "allow_anonymous true", "listener 1883", OK, "without passwords"),
        ("listener 1883 127.0.0.1", "listener 1883", "listener 1883", FAILED, "without TLS"),
        ("acl_file ", "# ", "rights", FAILED, "every name may write"),
    ],
)
def test_each_fault_is_found_with_what_to_do(
    old: str, new: str, name: str, verdict: str, says: str, tmp_path: Path
) -> None:
    folder = BrokerFolder(tmp_path / "etc")
    folder.write(device_setup(tmp_path, Listener(1883)))
    folder.add("sprout", PASSWORD)
    finding = found(change(folder, old, new), name)
    assert (finding.verdict, says in finding.found) == (verdict, True), finding
    assert finding.next_step or verdict == OK


def test_everyone_let_in_from_the_network_is_the_worst(tmp_path: Path) -> None:
    path = tmp_path / "mosquitto.conf"
    path.write_text("listener 1883\nallow_anonymous true\n")
    assert found(path, "listener 1883") == Finding(
        "listener 1883", FAILED, "every address: whoever connects is let in", "allow_anonymous false"
    )


def test_rights_of_an_older_topic_table_are_found_and_written_anew(written: BrokerFolder, tmp_path: Path) -> None:
    acl = written.folder / "acl"
    acl.write_text(acl.read_text().replace("pattern read mindstream/v1/+/memory/#\n", ""))
    assert "memory" in found(written.config_path, "rights").found
    written.write(device_setup(tmp_path))
    assert found(written.config_path, "rights").verdict == OK
    assert set(written.users()) == {"sprout"}


def test_secrets_that_all_may_read_and_a_cut_password_file_are_found(written: BrokerFolder) -> None:
    passwords = written.folder / "passwords"
    passwords.chmod(0o644)
    assert found(written.config_path, "password_file").verdict == WARNING
    passwords.write_text(passwords.read_text()[:40])
    finding = found(written.config_path, "users")
    assert finding.verdict == FAILED
    assert "line 1" in finding.found


@pytest.mark.parametrize(("days", "verdict"), [(-0.5, FAILED), (10, WARNING), (400, OK)])
def test_a_certificate_is_looked_at_before_it_ends(days: float, verdict: str, tmp_path: Path) -> None:
    server = make_server(make_ca(), ["hub.local"], days=days)  # type: ignore[arg-type]
    (tmp_path / "server.pem").write_bytes(server.certificate)
    (tmp_path / "server.key").write_bytes(server.key)
    folder = BrokerFolder(tmp_path / "etc")
    pem = (tmp_path / "server.pem", tmp_path / "server.key")
    folder.write(Setup("hub", tmp_path / "etc", tmp_path / "data", ME, (Listener(8883, "", *pem),)))
    finding = found(folder.config_path, "certificate")
    assert finding.verdict == verdict
    assert bool(finding.next_step) == (verdict != OK)


def test_a_bridge_that_strips_properties_or_speaks_in_the_clear_is_found(tmp_path: Path) -> None:
    path = tmp_path / "mosquitto.conf"
    path.write_text(
        "persistence false\nconnection old\naddress hub.local:1883\ntopic # both 0\n"
        "connection clear\naddress hub.local:1883\nbridge_protocol_version mqttv50\n"
    )
    assert found(path, "bridge old").verdict == WARNING
    assert found(path, "bridge clear").verdict == FAILED


def test_included_files_count_in_their_order(tmp_path: Path) -> None:
    included = tmp_path / "conf.d"
    included.mkdir()
    (included / "b.conf").write_text("autosave_interval 7\n")
    (included / "a.conf").write_text("autosave_interval 5\nlistener 1884\ncertfile /x.pem\n")
    path = tmp_path / "mosquitto.conf"
    path.write_text(f"# a comment\n\npersistence true\ninclude_dir {included}\n")
    parsed = read(path)
    assert parsed.options["autosave_interval"] == "7"
    assert parsed.listeners == [{"port": "1884", "host": "", "certfile": "/x.pem"}]


def test_no_finding_repeats_a_password(written: BrokerFolder) -> None:
    change(written, "listener ", "connection hub\naddress h:1\nremote_password hunter2\nlistener ")
    assert "hunter2" not in str(check(written.config_path))


def test_a_file_that_is_not_there_is_an_error_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(BrokerError, match="No such file") as caught:
        check(tmp_path / "none.conf")
    assert "render" in caught.value.hint


def test_an_unknown_user_is_a_finding(written: BrokerFolder) -> None:
    findings = check(written.config_path, user="no-such-user-here")
    assert [(each.name, each.verdict) for each in findings] == [("user", FAILED)]


# --- the persistence folder -----------------------------------------------------------------------------------


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users reach: tmp_path is this user's alone."""
    with TemporaryDirectory(prefix="mindstream-test-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@needs_root
def test_a_folder_that_mosquittos_user_cannot_write_is_found_by_trying(open_folder: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    assert why_not_writable(open_folder, nobody) == "Permission denied"
    open_folder.chmod(0o777)
    assert why_not_writable(open_folder, nobody) == ""
    assert list(open_folder.iterdir()) == []
    secret = open_folder / "secret"
    secret.write_text("x")
    secret.chmod(0o600)
    assert why_not_readable(secret, nobody) == "Permission denied"
    assert why_not_readable(open_folder / "none", nobody) == "is not there"
    secret.chmod(0o644)
    assert why_not_readable(secret, nobody) == ""
    assert why_not_writable(open_folder / "none", nobody) == "is not there"
    assert why_not_writable(secret, nobody) == "is no folder"


@needs_root
def test_check_says_that_mosquitto_would_save_nothing(open_folder: Path) -> None:
    setup = Setup("device", open_folder / "etc", open_folder / "data", "nobody", (Listener(1883),))
    folder = BrokerFolder(setup.folder)
    folder.write(setup)
    folder.add("sprout", PASSWORD)
    assert worst(check(folder.config_path)) == OK
    assert (folder.folder / "passwords").stat().st_uid == pwd.getpwnam("nobody").pw_uid
    os.chown(setup.data_folder, 0, 0)
    finding = found(folder.config_path, "persistence")
    assert finding.verdict == FAILED
    assert "nobody cannot write" in finding.found
    assert "install -d -o nobody" in finding.next_step
    doctor = _broker_configuration(config_of(folder))
    assert (doctor.verdict, "persistence" in doctor.found) == (FAILED, True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads and writes everywhere")
def test_a_folder_of_ones_own_that_is_closed_is_found(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert why_not_writable(tmp_path, pwd.getpwuid(os.geteuid())) == "Permission denied"


@needs_root
def test_by_mode_alone_it_comes_to_the_same(open_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = pwd.getpwnam("nobody")
    monkeypatch.setattr("broker.system_user.os.geteuid", lambda: 12345)
    assert "Permission denied" in why_not_writable(open_folder, nobody)
    open_folder.chmod(0o777)
    assert why_not_writable(open_folder, nobody) == ""
    file = open_folder / "file"
    file.write_text("x")
    file.chmod(0o640)
    assert "Permission denied" in why_not_readable(file, nobody)


def test_mosquitto_does_not_start_where_it_could_save_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needs_mosquitto: None
) -> None:
    monkeypatch.setattr("broker.mosquitto.why_not_writable", lambda *_: "Read-only file system")
    broker = MosquittoBroker(data_folder=tmp_path)
    with pytest.raises(BrokerError, match=r"cannot keep its state .* Read-only file system"):
        broker.start()
    assert not broker.alive


def test_the_default_user_may_be_absent_a_named_one_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def known(name: str) -> pwd.struct_passwd:
        if name != "nobody":
            raise KeyError(name)
        return by_id

    by_id = pwd.getpwuid(os.geteuid())
    monkeypatch.setattr("broker.system_user.pwd.getpwnam", known)
    assert run_user() == run_user("mosquitto") == by_id
    with pytest.raises(BrokerError, match="'broker'"):
        run_user("broker")


# --- files and doctor -----------------------------------------------------------------------------------------


def config_of(folder: BrokerFolder) -> Config:
    config = Config()
    config.broker.config_file = str(folder.config_path)
    return config


def test_all_that_holds_a_secret_is_for_one_user_alone(written: BrokerFolder) -> None:
    for name in ("mosquitto.conf", "passwords", "acl"):
        assert stat.S_IMODE((written.folder / name).stat().st_mode) == 0o600


def test_doctor_looks_at_the_configuration(written: BrokerFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.check.installed_config", lambda: None)
    assert _broker_configuration(config_of(written)).verdict == OK
    change(written, "autosave_interval 1", "autosave_interval 1800")
    check = _broker_configuration(config_of(written))
    assert (check.verdict, check.next_step) == (WARNING, "autosave_interval 1")
    written.config_path.unlink()
    assert _broker_configuration(config_of(written)).verdict == WARNING
    assert _broker_configuration(Config()).verdict == OK


def test_a_hub_is_right_too(tmp_path: Path, certificates: Certificates) -> None:
    listeners = (Listener(8883, "", certificates.server, certificates.key),)
    setup = Setup("hub", tmp_path / "etc", tmp_path / "data", ME, listeners)
    folder = BrokerFolder(setup.folder)
    folder.write(setup)
    assert render(setup) == folder.config_path.read_text()
    assert worst(check(folder.config_path)) == WARNING  # nobody may connect yet
    folder.add("sprout", PASSWORD)
    assert worst(check(folder.config_path)) == OK
