"""Rights and passwords, on a real Mosquitto: a name writes its own branch, and reads what is for it."""

from __future__ import annotations

import base64
import shutil
import subprocess
from pathlib import Path

import pytest

from broker import access
from broker.access import User, read_filters, render_acl, roles_of, rules_of, write_filters
from broker.passwords import hash_password, read_users, render_passwords
from protocol.errors import BrokerError
from protocol.topics import TOPICS, Topic
from tests.support.mosquittos import NOT_AUTHORISED, PASSWORD, Mosquitto, NamedClient, Refused, wait_for

SOMETHING = {"target": "tomato", "asker": "tomato"}


def concrete(row: Topic, node: str) -> str:
    names = {name: SOMETHING.get(name, "x1") for name in row.params}
    levels = [level.format(**{**names, "node": node}) if "{" in level else level for level in row.levels]
    return "/".join(levels)


def test_every_row_is_written_by_its_owner_alone_and_reaches_whom_it_is_for(device: Mosquitto) -> None:
    with (
        NamedClient(device.port, "sprout") as sprout,
        NamedClient(device.port, "tomato") as tomato,
        NamedClient(device.port, "mallory") as mallory,
    ):
        tomato.subscribe("#")
        mallory.subscribe("#", "mindstream/v1/+/ask/tomato/#", "mindstream/v1/+/reply/tomato/#")
        addressed = []
        for row in TOPICS:
            topic = concrete(row, "sprout")
            assert sprout.publish(topic, b"sprout " + row.name.encode()) < 0x80, topic
            assert mallory.publish(topic, b"mallory") == NOT_AUTHORISED, topic
            if {"target", "asker"} & set(row.params):
                addressed.append(topic)
        sprout.publish("mindstream/v1/sprout/event/last", b"last")
        for client in (tomato, mallory):
            wait_for(lambda c=client: b"last" in c.payloads, "all that came before has come")
        assert {m.topic for m in tomato.messages} >= {concrete(row, "sprout") for row in TOPICS}
        assert b"mallory" not in tomato.payloads
        assert addressed
        assert not {m.topic for m in mallory.messages} & set(addressed)


def test_a_name_reads_its_own_asks_and_the_broker_but_writes_neither_outside_nor_to_the_broker(
    device: Mosquitto,
) -> None:
    with NamedClient(device.port, "sprout") as sprout:
        sprout.subscribe("mindstream/v1/sprout/ask/#", "$SYS/broker/version")
        assert sprout.publish("mindstream/v1/sprout/ask/tomato/memory_store/put", b"own") < 0x80
        wait_for(lambda: b"own" in sprout.payloads, "its own ask comes back")
        wait_for(lambda: any(m.topic == "$SYS/broker/version" for m in sprout.messages), "the broker's version")
        for topic in ("mindstream/v1", "mindstream/v2/sprout/state", "$SYS/broker/version", "homeassistant/x", "x"):
            assert sprout.publish(topic) == NOT_AUTHORISED, topic


def test_a_row_with_the_name_inside_a_level_is_written_by_that_name_alone(
    device: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = (
        Topic("inside", "device/other-{node}/config", "", 1024, root="homeassistant"),
        Topic("whole", "device/{node}/other/config", "", 1024, root="homeassistant"),
    )
    monkeypatch.setattr(access, "TOPICS", (*TOPICS, *rows))
    device.folder.add("late", PASSWORD)  # writes the rights anew
    device.reload()
    # 2.1 puts a name only where %u is the whole level.
    rules = rules_of(render_acl())
    assert "pattern write homeassistant/device/%u/other/config" in rules
    assert not [rule for rule in rules if "%u" in rule and "/%u" not in rule]
    with NamedClient(device.port, "sprout") as sprout, NamedClient(device.port, "mallory") as mallory:
        mallory.subscribe("homeassistant/#")
        for row in rows:
            topic = concrete(row, "sprout")
            assert mallory.publish(topic, b"mallory") == NOT_AUTHORISED
            assert sprout.publish(topic, topic.encode()) < 0x80
        wait_for(lambda: len(mallory.messages) == len(rows), "what stands outside is for all to read")
        assert b"mallory" not in mallory.payloads


def test_a_row_that_says_nobodys_name_is_read_by_all_and_written_by_none(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Topic("shared", "weather/{place}", "", 1024, root="homeassistant")
    monkeypatch.setattr(access, "TOPICS", (*TOPICS, row))
    rules = [rule for rule in rules_of(render_acl([User("sprout", "x")])) if "weather" in rule]
    assert rules == ["pattern read homeassistant/weather/+"]
    assert not [each for each in write_filters("sprout") if "weather" in each]


def test_a_bridge_writes_the_branches_it_carries_and_discovery_what_is_home_assistants(device: Mosquitto) -> None:
    device.folder.add("carrier", PASSWORD, role="bridge", branches=("tomato", "pepper"))
    device.folder.add("hass", PASSWORD, role="discovery")
    device.reload()
    with NamedClient(device.port, "carrier") as carrier, NamedClient(device.port, "hass") as hass:
        carrier.subscribe("mindstream/v1/+/ask/+/#")
        assert carrier.publish("mindstream/v1/pepper/memory/log") < 0x80
        assert carrier.publish("mindstream/v1/tomato/ask/sprout/memory_store/put") < 0x80
        assert carrier.publish("mindstream/v1/sprout/memory/log") == NOT_AUTHORISED
        assert hass.publish("homeassistant/status") < 0x80
        assert hass.publish("mindstream/v1/sprout/state") == NOT_AUTHORISED
        with NamedClient(device.port, "sprout") as sprout:
            sprout.publish("mindstream/v1/sprout/ask/mallory/memory_store/put", b"for mallory")
            sprout.publish("mindstream/v1/sprout/ask/pepper/memory_store/put", b"for pepper")
        wait_for(lambda: b"for pepper" in carrier.payloads, "what is for a carried node comes")
        assert b"for mallory" not in carrier.payloads


def test_a_wrong_password_no_password_and_an_unknown_name_are_refused(device: Mosquitto) -> None:
    for name, password in (("sprout", PASSWORD + "!"), ("sprout", ""), ("nobody", PASSWORD), ("", "")):
        with pytest.raises(Refused) as caught:
            NamedClient(device.port, name, password=password)
        assert caught.value.code == NOT_AUTHORISED, name


def test_users_come_and_go_while_the_broker_runs(device: Mosquitto) -> None:
    device.folder.add("late", PASSWORD)
    device.folder.remove("mallory")
    device.reload()
    NamedClient(device.port, "late").close()
    NamedClient(device.port, "sprout").close()
    with pytest.raises(Refused):
        NamedClient(device.port, "mallory")


def test_our_hash_is_that_of_mosquitto_passwd(tmp_path: Path) -> None:
    program = shutil.which("mosquitto_passwd")
    if program is None:
        pytest.skip("mosquitto_passwd is not installed")
    path = tmp_path / "passwords"
    path.touch(mode=0o600)
    words = f"{PASSWORD}\n{PASSWORD}\n"
    subprocess.run([program, path, "theirs"], input=words, capture_output=True, text=True, check=True)
    theirs = read_users(path.read_text())["theirs"].password_hash
    _, _, iterations, salt, _ = theirs.split("$")
    assert hash_password(PASSWORD, salt=base64.b64decode(salt), iterations=int(iterations)) == theirs


def test_users_and_roles_are_read_back_as_they_were_written() -> None:
    password_hash = hash_password(PASSWORD)
    users = {
        "sprout": User("sprout", password_hash),
        "up": User("up", password_hash, "bridge", ("tomato", "pepper")),
        "hass": User("hass", password_hash, "discovery"),
    }
    listed = list(users.values())
    assert read_users(render_passwords(listed), render_acl(listed)) == users
    assert set(roles_of(render_acl(listed))) == {"up", "hass"}


@pytest.mark.parametrize("name", ["", "a/b", "+", "#", "a b", "A", "ä", "x" * 64, "$sys", "-a"])
def test_a_name_that_is_no_level_of_a_topic_is_refused(name: str) -> None:
    with pytest.raises(BrokerError, match="as a name"):
        User(name, hash_password(PASSWORD))


@pytest.mark.parametrize("password", ["", "short", "x" * 513, "two\nlines of it"])
def test_a_password_that_is_too_short_or_not_a_line_is_refused_and_not_repeated(password: str) -> None:
    with pytest.raises(BrokerError, match="password") as caught:
        hash_password(password)
    assert not password or password not in str(caught.value)


@pytest.mark.parametrize(
    "line",
    ["sprout", "sprout:", "sprout:plain", "sprout:$6$abc$def", "sprout:$7$x$YQ==$YQ==", "sprout:$7$101$YQ==$YQ=="],
)
def test_a_line_that_mosquitto_could_not_read_is_named(line: str) -> None:
    with pytest.raises(BrokerError, match="line 2"):
        read_users(f"{render_passwords([User('ok', hash_password(PASSWORD))])}{line}\n")


def test_a_bridge_carries_no_blobs_and_only_what_is_for_its_nodes() -> None:
    inward, outward = read_filters("sprout", bridged=True), write_filters("sprout")
    assert not [each for each in inward + outward if "blob" in each]
    assert "mindstream/v1/+/ask/sprout/#" in inward
    assert "mindstream/v1/+/memory/#" in inward
    assert all("/+/ask/" not in each or "/sprout/" in each for each in inward)
    assert "mindstream/v1/sprout/ask/+/#" in outward


def test_a_new_row_in_a_known_area_changes_no_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    before = render_acl()
    row = Topic("memory_new", "{node}/memory/new/{thing}", "", 1024)
    asked = Topic("reply_new", "{node}/reply/{asker}/{client}/more", "", 1024)
    monkeypatch.setattr(access, "TOPICS", (*TOPICS, row, asked))
    assert render_acl() == before


def test_an_addressed_row_keeps_its_area_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (*TOPICS, Topic("new", "{node}/memory/{target}/secret", "", 1024))
    monkeypatch.setattr(access, "TOPICS", rows)
    rules = render_acl()
    assert "pattern read mindstream/v1/+/memory/%u/#" in rules
    assert "pattern read mindstream/v1/+/memory/#" not in rules
    assert "pattern read mindstream/v1/+/memory/log" in rules
