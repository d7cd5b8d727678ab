"""The rendered units: what the table says, valid, hardened, and an edit by hand is found and kept."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench import units as bench_units
from edge import units
from edge.cli import main
from edge.doctor import examine
from edge.service_table import SERVICES, ServiceRow

CHECKOUT = Path(__file__).resolve().parents[2]
MAX_EXPOSURE = 2.0
# What a later service may ask for: the most that any row can.
EYES_AND_EARS = ServiceRow(
    "sensor_ingest", "none", "None", "a test", devices=("camera", "microphone", "power"), makes_code=True
)
EVERYTHING = replace(EYES_AND_EARS, name="everything", devices=tuple(units.DEVICES))
ROWS = (*SERVICES, EYES_AND_EARS, EVERYTHING)

needs_systemd_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed: apt-get install systemd"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every unit, rendered around a program that exists."""
    folder = tmp_path_factory.mktemp("units")
    for name, text in units.render(ROWS, runner=Path(sys.executable)).items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder


def analyze(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", "--no-pager", *arguments],
        # A colon at the end: the system's own units after these.
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{folder}:", "SYSTEMD_LOG_LEVEL": "notice"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_committed_units_are_what_the_table_says() -> None:
    committed = CHECKOUT / "systemd"
    for name, text in units.render().items():
        path = committed / name
        assert path.is_file(), f"mindstream units render --out systemd makes {name}"
        assert path.read_text() == text, f"mindstream units render --out systemd renews {name}"
    there = {str(path.relative_to(committed)) for path in committed.rglob("*") if path.is_file()}
    assert there - {"install.sh"} == set(units.render())


@needs_systemd_analyze
@pytest.mark.parametrize("unit", [units.TARGET, units.SLEEP, *(units.instance(row.name) for row in ROWS)])
def test_systemd_has_nothing_to_say_against_a_unit(folder: Path, unit: str) -> None:
    done = analyze(folder, "verify", "--man=no", unit)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@needs_systemd_analyze
def test_systemd_would_say_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    # The check above can fail: a misspelt key is found.
    shutil.copytree(folder, tmp_path / "units")
    template = tmp_path / "units" / units.TEMPLATE
    template.write_text(template.read_text().replace("WatchdogSec=", "WatchdogSeconds="))
    done = analyze(tmp_path / "units", "verify", "--man=no", units.instance("memory_store"))
    assert "WatchdogSeconds" in done.stderr


@needs_systemd_analyze
@pytest.mark.parametrize("unit", [units.SLEEP, *(units.instance(row.name) for row in ROWS)])
def test_each_service_is_exposed_to_little(folder: Path, unit: str) -> None:
    done = analyze(folder, "security", "--offline=true", unit)
    exposure = units.read_exposure(done.stdout)
    assert exposure is not None, done.stdout + done.stderr
    assert exposure <= MAX_EXPOSURE, "\n".join(line for line in done.stdout.splitlines() if line.startswith("✗"))


def test_devices_are_opened_to_those_who_ask_alone() -> None:
    files = units.render(ROWS)
    drop_in = {row.name: files[f"{units.instance(row.name)}.d/{units.DROP_IN}"] for row in ROWS}
    for row in ROWS:
        assert ("PrivateDevices=no" in drop_in[row.name]) == bool(row.devices)
        assert ("MemoryDenyWriteExecute=no" in drop_in[row.name]) == row.makes_code
        assert f"MemoryMax={row.memory_max}\n" in drop_in[row.name]
    # A camera alone keeps the list of allowed devices; a GPU's drivers name theirs as they like.
    assert "DeviceAllow=char-video4linux rw" in drop_in["sensor_ingest"]
    assert "DevicePolicy=auto" not in drop_in["sensor_ingest"]
    assert "DevicePolicy=auto" in drop_in["everything"]
    assert "DeviceAllow" not in drop_in["everything"]


def test_rendering_twice_changes_nothing(tmp_path: Path) -> None:
    assert len(units.write(tmp_path)) == len(units.render())
    assert units.write(tmp_path) == []
    assert {each.verdict for each in units.check(tmp_path)} == {"ok"}


def test_a_unit_edited_by_hand_is_named_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    units.write(tmp_path)
    name = f"{units.instance('memory_store')}.d/{units.DROP_IN}"
    path = tmp_path / name
    edited = path.read_text().replace("MemoryMax=1G", "MemoryMax=7G")
    path.write_text(edited)
    found = {each.file: each for each in units.check(tmp_path)}
    assert found[str(path)].verdict == "edited"
    assert "sudo systemctl edit mindstream@memory_store.service" in found[str(path)].next_step
    assert {each.verdict for each in found.values() if each.file != str(path)} == {"ok"}
    with pytest.raises(SystemExit) as ended:
        main(["units", "check", "--dir", str(tmp_path)])
    assert ended.value.code == 1
    assert "edited" in capsys.readouterr().out
    # Rendered again: the table's file is there, and the edit beside it; both are said.
    lines = units.write(tmp_path)
    assert any("edited by hand" in line and f"{path}.orig" in line for line in lines)
    assert path.with_name(f"{path.name}.orig").read_text() == edited
    assert {each.verdict for each in units.check(tmp_path)} == {"ok"}


def test_units_of_another_version_are_renewed_without_ado(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "WATCHDOG_S", 61)
    units.write(tmp_path)
    monkeypatch.undo()
    gone = tmp_path / "mindstream@gone.service.d" / units.DROP_IN
    gone.parent.mkdir()
    gone.write_text((tmp_path / units.TEMPLATE).read_text())
    own = tmp_path / "mindstream@memory_store.service.d" / "override.conf"
    own.write_text("[Service]\nMemoryMax=2G\n")
    verdicts = {Path(each.file).name: each.verdict for each in units.check(tmp_path)}
    assert verdicts[units.TEMPLATE] == "other version"
    assert "stale" in {each.verdict for each in units.check(tmp_path)}
    said = units.write(tmp_path)
    assert not any("edited by hand" in line for line in said)
    assert {each.verdict for each in units.check(tmp_path)} == {"ok"}
    assert not gone.parent.exists()
    assert own.exists()  # a drop-in of the user's own is not ours


def test_what_is_enabled_is_compared_with_the_configuration(tmp_path: Path) -> None:
    units.write(tmp_path)
    wants = tmp_path / units.WANTS
    wants.mkdir()
    (wants / units.instance("sync_bridge")).symlink_to("/etc/systemd/system/mindstream@.service")
    found = {Path(each.file).name: each for each in units.check(tmp_path, wanted=["memory_store"])}
    assert found[units.instance("memory_store")].next_step.startswith("sudo systemctl enable --now")
    assert found[units.instance("sync_bridge")].next_step.endswith("disable --now mindstream@sync_bridge.service")
    assert units.instance("model_runner") not in found


def test_the_doctor_looks_at_the_units_of_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "mindstream.toml"
    config.write_text(f'[node]\nname = "sprout"\ndata_dir = "{tmp_path}"\n[services]\nenabled = []\n')
    monkeypatch.setattr(units, "UNIT_DIR", tmp_path)

    def units_check() -> tuple[str, str, str]:
        check = next(each for each in examine(config) if each.name == "units")
        return check.verdict, check.found, check.next_step

    assert "mindstream up" in units_check()[1]
    units.write(tmp_path)
    wants = tmp_path / units.WANTS
    wants.mkdir()
    (wants / units.instance("presence")).symlink_to("/etc/systemd/system/mindstream@.service")
    assert units_check()[0] == "ok"
    with (tmp_path / units.TEMPLATE).open("a") as file:
        file.write("RestartSec=1\n")
    verdict, found, next_step = units_check()
    assert verdict == "warning"
    assert f"{tmp_path / units.TEMPLATE} is edited" in found
    assert "systemctl edit" in next_step


@needs_systemd_analyze
def test_the_benchmark_names_the_worst_unit() -> None:
    figures = bench_units.run()
    exposures = {name: figures[f"exposure_{name}"] for name in [*(row.name for row in SERVICES), "sleep"]}
    worst = figures["worst_exposure"]
    assert isinstance(worst, float)
    assert worst == max(exposures.values()) <= MAX_EXPOSURE < figures["bare_exposure"]  # type: ignore[operator, type-var]


def test_without_systemd_the_benchmark_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    figures = bench_units.run()
    assert figures["worst_exposure"] is None
    assert figures["bare_exposure"] is None
