"""Whether a device is throttled, by files laid out as kernels and firmwares lay them out."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge.thermal import Heat, Thermometer
from tests.support.sysfs import BOARD, SLOWED, lay_out

THERMAL = "sys/class/thermal"
FIRMWARE = "sys/devices/platform/soc/soc:firmware/get_throttled"


def test_a_machine_without_any_of_it_is_not_throttled_and_says_so(tmp_path: Path) -> None:
    thermometer = Thermometer(tmp_path)
    assert thermometer.sources == ""
    assert thermometer.look() == Heat()


def test_this_machine_can_be_looked_at() -> None:
    heat = Thermometer().look()
    assert heat.hottest_c is None or -50 < heat.hottest_c < 150


def test_a_warm_board_with_a_running_fan_is_well(tmp_path: Path) -> None:
    lay_out(tmp_path, BOARD)
    thermometer = Thermometer(tmp_path)
    assert thermometer.sources == "1 thermal zone, 1 cooling device, 1 CPU frequency"
    assert thermometer.look() == Heat((), 54.0, "cpu-thermal")


def test_a_cooling_device_that_slows_the_cpu_is_named_with_its_step(tmp_path: Path) -> None:
    lay_out(tmp_path, BOARD)
    thermometer = Thermometer(tmp_path)
    lay_out(tmp_path, {f"{THERMAL}/cooling_device0/cur_state": 5})
    assert thermometer.look().reasons == ("cpufreq-cpu0 slows it down, step 5 of 14",)
    lay_out(tmp_path, {f"{THERMAL}/cooling_device0/cur_state": 0})
    assert not thermometer.look().throttled


@pytest.mark.parametrize(
    ("kind", "state", "throttled"),
    [
        ("Processor", 3, True),  # ACPI
        ("thermal-cpufreq-0", 1, True),
        ("devfreq-17000000.gpu", 2, True),
        ("gpu-throttle-alert", 1, True),  # a Jetson
        ("intel_powerclamp", -1, False),  # it is off
        ("intel_powerclamp", 20, True),
        ("LCD", 7, False),
        ("TCC Offset", 9, False),  # it lowers the trip point, and slows nothing down by itself
    ],
)
def test_only_what_slows_a_processor_counts(tmp_path: Path, kind: str, state: int, throttled: bool) -> None:
    folder = f"{THERMAL}/cooling_device0"
    lay_out(tmp_path, {f"{folder}/type": kind, f"{folder}/cur_state": state, f"{folder}/max_state": 50})
    assert Thermometer(tmp_path).look().throttled == throttled


def test_a_hot_zone_and_a_capped_cpu_are_throttling_together_and_neither_alone(tmp_path: Path) -> None:
    lay_out(tmp_path, BOARD)
    thermometer = Thermometer(tmp_path)
    hot = {f"{THERMAL}/thermal_zone0/temp": 81_000}
    capped = {"sys/devices/system/cpu/cpufreq/policy0/scaling_max_freq": 1_500_000}
    lay_out(tmp_path, hot)
    assert not thermometer.look().throttled
    lay_out(tmp_path, BOARD | capped)
    assert not thermometer.look().throttled, "that is a power mode, or somebody's choice"
    lay_out(tmp_path, hot)
    assert thermometer.look().reasons == (
        "cpu-thermal is at 81 °C, its passive trip point is 80 °C, and policy0 may run at 1.50 of 2.40 GHz",
    )


def test_a_trip_point_that_is_not_used_is_none(tmp_path: Path) -> None:
    lay_out(tmp_path, BOARD | {f"{THERMAL}/thermal_zone0/trip_point_0_temp": -274_000})
    lay_out(tmp_path, {"sys/devices/system/cpu/cpufreq/policy0/scaling_max_freq": 1_500_000})
    assert not Thermometer(tmp_path).look().throttled


def test_a_counter_says_it_when_it_rises_and_is_history_else(tmp_path: Path) -> None:
    counters = [f"sys/devices/system/cpu/cpu{cpu}/thermal_throttle/core_throttle_count" for cpu in (0, 1)]
    lay_out(tmp_path, {counters[0]: 7, counters[1]: 0})
    thermometer = Thermometer(tmp_path)
    assert thermometer.sources == "2 throttle counters"
    heat = thermometer.look()
    assert (heat.reasons, heat.before) == ((), "the CPU's throttle counters stand at 7 since its start")
    lay_out(tmp_path, {counters[0]: 9, counters[1]: 1})
    assert thermometer.look().reasons == ("the CPU was throttled 3 times since the look before",)
    assert not thermometer.look().throttled
    (tmp_path / counters[1]).unlink()  # that CPU was switched off, and comes back
    assert not thermometer.look().throttled
    lay_out(tmp_path, {counters[1]: 1})
    assert not thermometer.look().throttled


@pytest.mark.parametrize(
    ("word", "throttled", "power", "before"),
    [
        ("0", False, False, ""),
        ("50005", True, True, "some time since its start: under-voltage, the firmware throttles the board"),
        ("50000", False, False, "some time since its start: under-voltage, the firmware throttles the board"),
        ("80008", True, False, "some time since its start: the firmware's soft temperature limit is reached"),
        ("0x2", True, False, ""),
        ("nothing", False, False, ""),
    ],
)
def test_a_raspberrys_firmware_is_believed(
    tmp_path: Path, word: str, throttled: bool, power: bool, before: str
) -> None:
    lay_out(tmp_path, {FIRMWARE: word})
    heat = Thermometer(tmp_path).look()
    assert (heat.throttled, heat.for_want_of_power, heat.before) == (throttled, power, before)


def test_under_voltage_is_seen_by_its_alarm_too(tmp_path: Path) -> None:
    hwmon = "sys/class/hwmon/hwmon1"
    lay_out(tmp_path, {f"{hwmon}/name": "rpi_volt", f"{hwmon}/in0_lcrit_alarm": 0})
    thermometer = Thermometer(tmp_path)
    assert not thermometer.look().throttled
    lay_out(tmp_path, {f"{hwmon}/in0_lcrit_alarm": 1})
    assert thermometer.look().for_want_of_power


def test_what_cannot_be_read_just_now_is_left_out(tmp_path: Path) -> None:
    lay_out(tmp_path, BOARD | SLOWED)
    # A Jetson's zone answers an error while its part of the chip is off; here the file is a folder.
    (tmp_path / THERMAL / "thermal_zone0/temp").unlink()
    (tmp_path / THERMAL / "thermal_zone0/temp").mkdir()
    (tmp_path / THERMAL / "cooling_device0/max_state").unlink()
    heat = Thermometer(tmp_path).look()
    assert heat.hottest_c is None
    assert heat.reasons == ("cpufreq-cpu0 slows it down, step 5",)
