"""The doctor in made-up broken situations: each check finds its trouble, and says what to type next."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from broker.embedded import EmbeddedBroker
from edge import doctor, units
from edge.doctor import FAILED, OK, WARNING, Check, examine
from edge.model_pull import pull_folder
from edge.models import converted_name, default_cache_folder, known_models, publish
from edge.power import Meter
from edge.thermal import Thermometer
from tests.support.ports import free_port
from tests.support.sysfs import BOARD, SLOWED, lay_out

MODEL = known_models()[0]


class Situation:
    """A node's configuration and surroundings, to be broken."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, stack: ExitStack) -> None:
        self.folder = folder
        self.monkeypatch = monkeypatch
        self.stack = stack
        self.toml = {
            "node": {"name": '"tomato"', "data_dir": f'"{folder / "data"}"'},
            "broker": {"port": "0"},
            "services": {"enabled": '["memory_store", "model_runner"]'},
        }
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        for name in ("MINDSTREAM_MODELS", "CACHE_DIRECTORY", "CREDENTIALS_DIRECTORY"):
            monkeypatch.delenv(name, raising=False)

    def set(self, section: str, key: str, value: object) -> None:
        text = str(value) if isinstance(value, (int, list)) else f'"{value}"'
        self.toml.setdefault(section, {})[key] = text

    def examine(self) -> dict[str, Check]:
        path = self.folder / "mindstream.toml"
        path.write_text(
            "".join(
                f"[{section}]\n" + "".join(f"{key} = {value}\n" for key, value in keys.items())
                for section, keys in self.toml.items()
            )
        )
        return {check.name: check for check in examine(path)}

    def without_packages(self, *names: str) -> None:
        real = importlib.util.find_spec

        def find_spec(name: str, *rest: Any) -> Any:
            return None if name in names else real(name, *rest)

        self.monkeypatch.setattr(importlib.util, "find_spec", find_spec)

    def without_model(self) -> None:
        self.monkeypatch.setattr("edge.models.find_all", lambda *_: iter(()))


@pytest.fixture
def situation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    with ExitStack() as stack:
        yield Situation(tmp_path, monkeypatch, stack)


def old_python(it: Situation) -> None:
    it.monkeypatch.setattr(sys, "version_info", (3, 9, 1, "final", 0))


def no_apsw(it: Situation) -> None:
    it.without_packages("apsw")


def no_torch(it: Situation) -> None:
    it.without_packages("torch")


def no_opencv(it: Situation) -> None:
    it.without_packages("cv2")


def misspelt_key(it: Situation) -> None:
    it.set("model", "nmae", "x")


def data_below_a_file(it: Situation) -> None:
    (it.folder / "file").write_text("")
    it.set("node", "data_dir", it.folder / "file" / "data")


def data_not_ours(it: Situation) -> None:
    if os.getuid() == 0:
        pytest.skip("root may write everywhere")
    (it.folder / "data").mkdir(mode=0o555)


def data_read_only(it: Situation) -> None:
    it.set("node", "data_dir", "/proc/mindstream")


def disk_full(it: Situation) -> None:
    it.monkeypatch.setattr(doctor, "free_bytes", lambda _folder: 1000)


def disk_low(it: Situation) -> None:
    it.monkeypatch.setattr(doctor, "free_bytes", lambda _folder: 100_000_000)


def pool_below_a_file(it: Situation) -> None:
    (it.folder / "data").mkdir()
    (it.folder / "data" / "model_runner").write_text("")


def pool_away(it: Situation) -> None:
    pytest.importorskip("fsspec", reason="fsspec is not installed (extra `pool`)")
    it.set("pool", "url", f"ftp://127.0.0.1:{free_port()}/pool")


def pool_at_no_url(it: Situation) -> None:
    pytest.importorskip("fsspec", reason="fsspec is not installed (extra `pool`)")
    it.set("pool", "url", "cupboard://top-shelf")


def nothing_yet(it: Situation) -> None:
    pass


def units_missing(it: Situation) -> None:
    it.monkeypatch.setattr(units, "UNIT_DIR", it.folder)
    (it.folder / units.TEMPLATE).write_text("[Service]\n")


def port_of_a_broker(it: Situation) -> None:
    broker = it.stack.enter_context(EmbeddedBroker())
    it.set("broker", "port", int(broker.url.rpartition(":")[2]))


def port_of_another_program(it: Situation) -> None:
    listener = it.stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    it.set("broker", "port", listener.getsockname()[1])
    it.monkeypatch.setattr("edge.doctor.answers_connect", lambda *_, **__: False)  # it would wait for a CONNACK


def broker_away(it: Situation) -> None:
    it.monkeypatch.setattr(doctor, "BROKER_TIMEOUT_S", 0.5)
    it.set("broker", "url", f"mqtt://127.0.0.1:{free_port()}")


def password_for_all(it: Situation) -> None:
    (it.folder / "password").write_text("hunter2")
    (it.folder / "password").chmod(0o644)
    it.set("broker", "password_file", it.folder / "password")
    it.set("broker", "url", "mqtt://127.0.0.1:1")


def broker_configuration_away(it: Situation) -> None:
    it.set("broker", "config_file", it.folder / "absent.conf")


def model_absent(it: Situation) -> None:
    it.without_model()


def model_with_terms_half_pulled(it: Situation) -> None:
    it.without_model()
    it.set("model", "name", "gemma3-270m")
    pull_folder(default_cache_folder(), "gemma3-270m").mkdir(parents=True)
    (pull_folder(default_cache_folder(), "gemma3-270m") / "x.part").write_bytes(bytes(3_000_000))


def model_unknown(it: Situation) -> None:
    it.set("model", "name", "smollm2-135m")


def model_folder_empty(it: Situation) -> None:
    it.set("model", "name", it.folder / "empty")


def model_damaged(it: Situation) -> None:
    partial = it.folder / "partial"
    partial.mkdir()
    (partial / "config.json").write_text("{}")
    (partial / "model.safetensors").write_bytes(b"1234")
    cache = default_cache_folder()
    cache.mkdir(parents=True)
    publish(partial, cache / converted_name(MODEL), MODEL, made="converted")
    (cache / converted_name(MODEL) / "model.safetensors").write_bytes(b"12")


def no_room_to_convert(it: Situation) -> None:
    (it.folder / MODEL.files[0].name).write_bytes(b"GGUF")
    it.set("model", "folders", [str(it.folder)])
    it.monkeypatch.setattr(doctor, "free_bytes", lambda _folder: 200_000_000)


def endpoint_on(it: Situation) -> None:
    it.set("gateway", "port", 8650)
    it.set("services", "enabled", ["memory_store", "gateway"])


def endpoint_not_enabled(it: Situation) -> None:
    it.set("gateway", "port", 8650)


def endpoint_without_packages(it: Situation) -> None:
    endpoint_on(it)
    it.without_packages("uvicorn")


def endpoint_token_for_all(it: Situation) -> None:
    endpoint_on(it)
    token = it.folder / "data" / "gateway" / "token"
    token.parent.mkdir(parents=True)
    token.write_text("hunter2-hunter2-hunter2")
    token.chmod(0o644)


def endpoint_port_taken(it: Situation) -> None:
    endpoint_on(it)
    listener = it.stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    it.set("gateway", "port", listener.getsockname()[1])


def power_for_root_only(it: Situation) -> None:
    meter = Meter([], "/sys/class/powercap/intel-rapl:0/energy_uj may be read by root only")
    it.monkeypatch.setattr(doctor, "find_meter", lambda **_: meter)


def too_hot(it: Situation) -> None:
    lay_out(it.folder / "root", BOARD | SLOWED)
    it.monkeypatch.setattr(doctor, "Thermometer", lambda: Thermometer(it.folder / "root"))


def supply_too_weak(it: Situation) -> None:
    lay_out(it.folder / "root", {"sys/devices/platform/soc/soc:firmware/get_throttled": "50005"})
    it.monkeypatch.setattr(doctor, "Thermometer", lambda: Thermometer(it.folder / "root"))


def clock_adrift(it: Situation) -> None:
    it.monkeypatch.setattr(doctor, "read_clock_synced", lambda: False)


SITUATIONS: list[tuple[Callable[[Situation], None], str, str, str]] = [
    (old_python, "python", FAILED, "make install PYTHON="),
    (no_apsw, "packages", FAILED, "make install"),
    (no_torch, "extra model", WARNING, "EXTRAS=model"),
    (no_opencv, "extra edge", WARNING, "EXTRAS=edge"),
    (misspelt_key, "configuration", FAILED, "model.name"),
    (data_below_a_file, "data folder", FAILED, "disk"),
    (data_not_ours, "data folder", FAILED, "right to write"),
    (data_read_only, "data folder", FAILED, "disk"),
    (disk_full, "data folder", FAILED, "free some space"),
    (disk_low, "data folder", WARNING, "free some space"),
    (nothing_yet, "keys", WARNING, "mindstream keys show"),
    (nothing_yet, "node", WARNING, "mindstream up"),
    (units_missing, "units", WARNING, "mindstream units"),
    (port_of_a_broker, "broker", FAILED, "broker.url"),
    (port_of_another_program, "broker", FAILED, "broker.port"),
    (broker_away, "broker", FAILED, "broker.url"),
    (password_for_all, "broker", FAILED, "chmod"),
    (broker_configuration_away, "broker configuration", WARNING, "mindstream broker"),
    (model_absent, "model", WARNING, "mindstream models pull smollm2-135m-instruct"),
    (model_with_terms_half_pulled, "model", WARNING, "mindstream models pull gemma3-270m"),
    (model_unknown, "model", WARNING, "smollm2-135m-instruct"),
    (model_folder_empty, "model", WARNING, "model.name"),
    (model_damaged, "model", WARNING, "mindstream models rm"),
    (no_room_to_convert, "model", WARNING, "free some space"),
    (endpoint_not_enabled, "endpoint", WARNING, "services.enabled"),
    (endpoint_without_packages, "endpoint", WARNING, "EXTRAS=gateway"),
    (endpoint_token_for_all, "endpoint", FAILED, "chmod"),
    (endpoint_port_taken, "endpoint", WARNING, "gateway.port"),
    (pool_below_a_file, "pool", WARNING, "disk"),
    (disk_full, "pool", WARNING, "pool.url"),
    (pool_away, "pool", WARNING, "reachable"),
    (pool_at_no_url, "pool", WARNING, "pool.url"),
    (power_for_root_only, "energy", OK, "udev"),
    (too_hot, "heat", WARNING, "fan"),
    (supply_too_weak, "heat", WARNING, "power supply"),
    (clock_adrift, "clock", WARNING, ""),
]


@pytest.mark.parametrize(
    ("break_it", "name", "verdict", "next_step"),
    SITUATIONS,
    ids=[f"{case[0].__name__}-{case[1]}" for case in SITUATIONS],
)
def test_trouble_is_found_and_what_to_do_is_said(
    situation: Situation, break_it: Callable[[Situation], None], name: str, verdict: str, next_step: str
) -> None:
    break_it(situation)
    checks = situation.examine()
    assert checks[name].verdict == verdict, checks[name]
    assert next_step in checks[name].next_step, checks[name]
    assert "hunter2" not in str(checks)
    # Whatever else is wrong there: nothing is found wrong without a word on what to do.
    for check in checks.values():
        assert check.found, check
        assert check.verdict == OK or check.next_step, check


def test_every_check_that_can_find_something_has_its_situation(situation: Situation) -> None:
    tried = {case[1] for case in SITUATIONS}
    assert set(situation.examine()) - tried == {"machine"}


def test_a_check_that_cannot_be_made_says_so(situation: Situation) -> None:
    def unreadable(_config: Any) -> Check:
        raise PermissionError(13, "Permission denied", "/secret")

    situation.monkeypatch.setitem(doctor._CHECKS, "units", unreadable)
    check = situation.examine()["units"]
    assert (check.verdict, bool(check.next_step)) == (FAILED, True)
    assert "/secret" in check.found


def test_a_model_that_is_being_pulled_and_its_terms_are_shown(situation: Situation) -> None:
    model_with_terms_half_pulled(situation)
    found = situation.examine()["model"].found
    assert "253 MB" in found
    assert "https://ai.google.dev/gemma/terms" in found
    assert "3 MB of it are pulled" in found


def test_a_pool_that_can_be_used_says_what_it_holds(situation: Situation) -> None:
    check = situation.examine()["pool"]
    assert (check.verdict, check.found.endswith(": 0 entries, 0.0 MB of 2,048 MiB")) == (OK, True)
    pytest.importorskip("fsspec", reason="fsspec is not installed (extra `pool`)")
    situation.set("pool", "url", "memory://doctor-pool")
    check = situation.examine()["pool"]
    assert (check.verdict, check.found) == (OK, "memory://doctor-pool: 0 entries, 0.0 MB of 2,048 MiB")


def test_a_node_without_a_model_runner_needs_no_model(situation: Situation) -> None:
    situation.without_model()
    situation.set("services", "enabled", ["memory_store"])
    assert situation.examine()["model"].verdict == OK
