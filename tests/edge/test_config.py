"""mindstream.toml: defaults, overrides, and what is refused with file, line, key and the nearest valid key."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge.config import SECTIONS, default_data_home, find_config, load_config, to_toml
from edge.service_table import BY_NAME
from protocol.errors import ConfigError
from protocol.ids import NAME_PATTERN


def written(folder: Path, text: str) -> Path:
    path = folder / "mindstream.toml"
    path.write_text(text)
    return path


def refused(path: Path | None, environ: dict[str, str] | None = None) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(path, environ or {})
    return caught.value


def test_an_empty_file_means_the_defaults_and_a_usable_node_name(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, ""), {})
    assert NAME_PATTERN.fullmatch(config.node.name)
    assert config.broker.url == ""
    assert config.services.enabled is None
    assert set(config.service_names()) <= set(BY_NAME)
    assert config.node.folder() == default_data_home() / config.node.name


def test_values_of_the_file_are_taken_and_services_run_in_the_order_of_the_table(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        '[node]\nname = "tomato"\n[services]\nenabled = ["sync_bridge", "memory_store"]\n'
        "[supervisor]\nrestart_limit = 2\n",
    )
    config = load_config(path, {})
    assert config.node.name == "tomato"
    assert config.service_names() == ["presence", "memory_store", "sync_bridge"]
    assert config.supervisor.restart_limit == 2


@pytest.mark.parametrize(
    ("text", "key", "line", "hint"),
    [
        ("[node]\nnmae = 'x'\n", "node.nmae", 2, "node.name"),
        ("[brokr]\nurl = ''\n", "brokr", 1, "broker"),
        ("[supervisor]\n# a comment\nrestart_limt = 3\n", "supervisor.restart_limt", 3, "supervisor.restart_limit"),
        ("[node]\n\n[bus]\nrestart_limit = 3\n", "bus.restart_limit", 4, "supervisor.restart_limit"),
    ],
)
def test_unknown_names_are_refused_with_line_and_nearest_name(
    tmp_path: Path, text: str, key: str, line: int, hint: str
) -> None:
    path = written(tmp_path, text)
    error = refused(path)
    assert error.field == key
    assert f"{path}, line {line}" in error.message
    assert hint in error.hint


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[supervisor]\nrestart_limit = 'five'\n", "supervisor.restart_limit"),
        ("[supervisor]\nrestart_limit = -1\n", "supervisor.restart_limit"),
        ("[broker]\nport = 70000\n", "broker.port"),
        ("[bus]\nqueue_messages = 1.5\n", "bus.queue_messages"),
        ("[log]\nlevel = 'loud'\n", "log.level"),
        ("[node]\nname = 'Tomato Plant'\n", "node.name"),
        ("[services]\nenabled = 'memory_store'\n", "services.enabled"),
    ],
)
def test_wrong_types_and_values_out_of_range_are_refused_with_their_line(tmp_path: Path, text: str, key: str) -> None:
    error = refused(written(tmp_path, text))
    assert error.field == key
    assert "line 2" in error.message
    assert error.hint


def test_a_section_written_as_a_key_is_refused(tmp_path: Path) -> None:
    error = refused(written(tmp_path, "node = 'tomato'\n"))
    assert "[node]" in error.hint


def test_an_unknown_service_is_refused_with_the_nearest(tmp_path: Path) -> None:
    error = refused(written(tmp_path, "[services]\nenabled = ['memory_stor']\n"))
    assert error.field == "services.enabled"
    assert "memory_store" in error.hint


def test_text_that_is_not_toml_is_refused_with_its_place(tmp_path: Path) -> None:
    error = refused(written(tmp_path, "[node\nname = 1\n"))
    assert "line 1" in error.message


def test_a_file_that_was_named_and_is_not_there_is_an_error(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "absent.toml").message


@pytest.mark.parametrize("url", ["mqtt://192.168.1.4:1883", "mqtt://tomato.local", "mqtt://[2001:db8::1]:1883"])
def test_another_host_without_tls_is_refused(tmp_path: Path, url: str) -> None:
    error = refused(written(tmp_path, f"[broker]\nurl = '{url}'\n"))
    assert error.field == "broker.url"
    assert "mqtts://" in error.hint


@pytest.mark.parametrize(
    "url",
    ["mqtts://tomato.local:8883", "mqtt://127.0.0.1:1883", "mqtt://127.0.0.9", "mqtt://localhost", "mqtt://[::1]"],
)
def test_tls_and_loopback_are_taken(tmp_path: Path, url: str) -> None:
    assert load_config(written(tmp_path, f"[broker]\nurl = '{url}'\n"), {}).broker.url == url


@pytest.mark.parametrize("url", ["tomato:1883", "http://localhost", "mqtt://", "mqtt://localhost:port", "mqtt://h:1/x"])
def test_what_is_no_broker_url_is_refused(tmp_path: Path, url: str) -> None:
    assert refused(written(tmp_path, f"[broker]\nurl = '{url}'\n")).field == "broker.url"


def test_a_password_in_the_url_is_refused_and_not_repeated(tmp_path: Path) -> None:
    error = refused(written(tmp_path, "[broker]\nurl = 'mqtts://me:hunter2@tomato.local'\n"))
    assert "hunter2" not in str(error)
    assert "broker.password_file" in error.hint


def test_variables_override_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "[node]\nname = 'tomato'\n[broker]\nport = 1\n")
    environ = {
        "MINDSTREAM_NODE__NAME": "sprout",
        "MINDSTREAM_BROKER__PORT": "2",
        "MINDSTREAM_SERVICES__ENABLED": '["memory_store"]',
        "MINDSTREAM_BROKER__USERNAME": "1883",
        "OTHER": "x",
    }
    config = load_config(path, environ)
    assert (config.node.name, config.broker.port, config.services.enabled) == ("sprout", 2, ["memory_store"])
    assert config.broker.username == "1883"  # a text stays one


@pytest.mark.parametrize(
    ("variable", "value", "hint"),
    [
        ("MINDSTREAM_BROKER__PRT", "1", "broker.port"),
        ("MINDSTREAM_BROKR__PORT", "1", "broker"),
        ("MINDSTREAM_CONFG", "x", ""),
        ("MINDSTREAM_NODE", "x", "MINDSTREAM_NODE__KEY"),
        ("MINDSTREAM_BROKER__PORT", "many", ""),
    ],
)
def test_wrong_variables_are_refused_by_name(variable: str, value: str, hint: str) -> None:
    error = refused(None, {variable: value})
    assert variable in error.message
    assert hint in error.hint


def test_the_search_path_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "home" / "mindstream").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MINDSTREAM_CONFIG", raising=False)
    home = tmp_path / "home" / "mindstream" / "mindstream.toml"
    home.write_text("")
    assert find_config() == home
    (tmp_path / "here" / "mindstream.toml").write_text("")
    assert find_config() == Path("mindstream.toml")
    monkeypatch.setenv("MINDSTREAM_CONFIG", str(tmp_path / "named.toml"))
    assert find_config() == tmp_path / "named.toml"


def test_relative_paths_stand_beside_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "[node]\ndata_dir = 'data'\n[model]\nfolders = ['models', '/opt/models']\n")
    config = load_config(path, {})
    assert config.node.folder() == tmp_path / "data"
    assert config.model.folders == [str(tmp_path / "models"), "/opt/models"]


def test_a_password_comes_from_a_file_that_others_may_not_read(tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("hunter2 \n")
    secret.chmod(0o600)
    broker = load_config(written(tmp_path, "[broker]\npassword_file = 'password'\n"), {}).broker
    assert broker.password() == "hunter2 "
    secret.chmod(0o644)
    with pytest.raises(ConfigError, match="every user") as caught:
        broker.password()
    assert "hunter2" not in str(caught.value)
    secret.unlink()
    with pytest.raises(ConfigError, match="No such file"):
        broker.password()


def test_a_password_comes_from_systemds_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broker-password").write_text("hunter2\n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert load_config(written(tmp_path, ""), {}).broker.password() == "hunter2"


def test_a_missing_ca_file_is_refused(tmp_path: Path) -> None:
    assert refused(written(tmp_path, "[broker]\nca_file = 'ca.pem'\n")).field == "broker.ca_file"


def test_systemds_state_directory_holds_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/mindstream")
    assert default_data_home() == Path("/var/lib/mindstream")


def test_what_is_printed_reads_as_the_same_configuration(tmp_path: Path) -> None:
    config = load_config(
        written(tmp_path, "[node]\nname = 'tomato'\ndata_dir = '/srv/a \"b\"'\n[services]\nenabled = []\n"), {}
    )
    again = load_config(written(tmp_path, to_toml(config)), {})
    assert again == config


def test_every_key_says_what_it_is() -> None:
    from typing import get_type_hints

    for section, struct in SECTIONS.items():
        assert struct.__doc__, section
        for name, hint in get_type_hints(struct, include_extras=True).items():
            if name in struct.__struct_fields__:
                texts = [getattr(each, "description", "") for each in getattr(hint, "__metadata__", ())]
                assert any(texts), f"{section}.{name}"


def test_the_environment_is_read_when_none_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINDSTREAM_NODE__NAME", "sprout")
    assert load_config(written(tmp_path, "")).node.name == "sprout"
