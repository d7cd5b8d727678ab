"""Sysfs as devices have it, laid out in a folder: the same files and texts, and no kernel behind them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def lay_out(root: Path, files: Mapping[str, object]) -> None:
    """Write files below ``root``, each with its newline, and never to be read half, as the kernel does."""
    for name, value in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}")
        new.write_text(f"{value}\n")
        new.replace(path)


BOARD = {
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
    "sys/class/thermal/thermal_zone0/temp": 54_000,
    "sys/class/thermal/thermal_zone0/trip_point_0_type": "passive",
    "sys/class/thermal/thermal_zone0/trip_point_0_temp": 80_000,
    "sys/class/thermal/thermal_zone0/trip_point_1_type": "critical",
    "sys/class/thermal/thermal_zone0/trip_point_1_temp": 110_000,
    "sys/class/thermal/cooling_device0/type": "cpufreq-cpu0",
    "sys/class/thermal/cooling_device0/cur_state": 0,
    "sys/class/thermal/cooling_device0/max_state": 14,
    "sys/class/thermal/cooling_device1/type": "pwm-fan",
    "sys/class/thermal/cooling_device1/cur_state": 3,
    "sys/class/thermal/cooling_device1/max_state": 4,
    "sys/devices/system/cpu/cpufreq/policy0/cpuinfo_max_freq": 2_400_000,
    "sys/devices/system/cpu/cpufreq/policy0/scaling_max_freq": 2_400_000,
}
"""A board with an ARM CPU and a fan, warm and well."""
SLOWED = {
    "sys/class/thermal/thermal_zone0/temp": 86_500,
    "sys/class/thermal/cooling_device0/cur_state": 5,
    "sys/devices/system/cpu/cpufreq/policy0/scaling_max_freq": 1_500_000,
}
"""The same, too hot."""
