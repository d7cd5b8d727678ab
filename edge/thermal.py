"""Is this device throttled: slowed down by its own kernel or firmware, for heat or for want of power?

Files of sysfs alone, each optional, none written; the kernel's word, or the firmware's:

- cooling devices that slow a processor (``/sys/class/thermal/cooling_device*``, ``cur_state`` above 0), a Jetson's
  ``*-throttle-alert`` among them (Documentation/driver-api/thermal/sysfs-api.rst);
- a thermal zone at its passive or hot trip point while a CPU may not run at its full frequency (``scaling_max_freq``
  below ``cpuinfo_max_freq``). Each alone says nothing: a trip point may have no effect, and people set frequencies;
- ``thermal_throttle/*_throttle_count`` of x86 CPUs, where it has risen since the look before;
- a Raspberry Pi's ``get_throttled`` bits and its under-voltage alarm (``rpi_volt``).
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

_SLOWING = re.compile(r"processor|cpufreq|devfreq|cpuidle|powerclamp|throttle-alert", re.IGNORECASE)
"""Types of cooling devices that slow something down. A fan does not, nor a screen."""
_FIRMWARE_BITS = {
    0: "under-voltage: the firmware slows the board down",
    1: "the firmware caps the CPU's frequency",
    2: "the firmware throttles the board",
    3: "the firmware's soft temperature limit is reached",
}
"""Of the Raspberry Pi's ``get_throttled``; from bit 16 on the same, some time since the board was started."""


class Heat(msgspec.Struct, frozen=True):
    """What one look found."""

    reasons: tuple[str, ...] = ()
    """What says that the device is slowed down; empty when nothing does."""
    hottest_c: float | None = None
    """Of all thermal zones, in °C; None where none can be read."""
    hottest_zone: str = ""
    before: str = ""
    """That it was slowed down some time since its start, by counters that nobody else resets; empty if not."""

    @property
    def throttled(self) -> bool:
        """Whether the device is slowed down."""
        return bool(self.reasons)

    @property
    def for_want_of_power(self) -> bool:
        """Whether it is the power supply, and no heat."""
        return any(reason.startswith("under-voltage") for reason in self.reasons)


class _Zone:
    def __init__(self, folder: Path) -> None:
        self.name = _text(folder / "type") or folder.name
        self.temp = folder / "temp"
        self.trips: list[tuple[float, str]] = []
        """Temperature in °C and kind of those that slow something down, the lowest first."""
        for kind in sorted(folder.glob("trip_point_*_type")):
            celsius = _number(folder / kind.name.replace("_type", "_temp"))
            # Drivers show 0 or below for one that is not used.
            if _text(kind) in ("passive", "hot") and celsius is not None and celsius > 0:
                self.trips.append((celsius / 1000, _text(kind)))
        self.trips.sort()


class Thermometer:
    """Looks at this device. Finds its files once; counters are compared with the look before. Used by one thread.

    Args:
        root: stands for ``/`` in tests.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        thermal, cpus = root / "sys/class/thermal", root / "sys/devices/system/cpu"
        self._zones = [_Zone(folder) for folder in sorted(thermal.glob("thermal_zone*"))]
        self._coolers = [
            (kind, folder)
            for folder in sorted(thermal.glob("cooling_device*"))
            if _SLOWING.search(kind := _text(folder / "type"))
        ]
        self._policies = [
            (folder.name, folder / "scaling_max_freq", full_khz)
            for folder in sorted((cpus / "cpufreq").glob("policy*"))
            if (full_khz := _number(folder / "cpuinfo_max_freq"))
        ]
        self._counters = sorted(cpus.glob("cpu[0-9]*/thermal_throttle/*_throttle_count"))
        self._firmware = sorted((root / "sys/devices/platform").glob("soc*/*firmware/get_throttled"))[:1]
        self._supply = [
            name.parent / "in0_lcrit_alarm"
            for name in sorted((root / "sys/class/hwmon").glob("hwmon*/name"))
            if _text(name) == "rpi_volt"
        ][:1]
        self._last = self._counts()

    @property
    def sources(self) -> str:
        """What is read, such as ``2 thermal zones, 1 cooling device``; empty where there is nothing."""
        found = {
            "thermal zone": len(self._zones),
            "cooling device": len(self._coolers),
            "CPU frequency": len(self._policies),
            "throttle counter": len(self._counters),
            "firmware's word": len(self._firmware) + len(self._supply),
        }
        plural = {"CPU frequency": "CPU frequencies", "firmware's word": "firmware's words"}
        return ", ".join(
            f"{count} {name if count == 1 else plural.get(name, name + 's')}" for name, count in found.items() if count
        )

    def look(self) -> Heat:
        """What is so now; never raises. Some milliseconds at most."""
        temperatures = [(milli / 1000, zone) for zone in self._zones if (milli := _number(zone.temp)) is not None]
        hottest_c, hottest = max(temperatures, key=lambda each: each[0], default=(None, None))
        reasons = [
            f"{kind} slows it down, step {state}{f' of {most}' if (most := _number(folder / 'max_state')) else ''}"
            for kind, folder in self._coolers
            if (state := _number(folder / "cur_state") or 0) > 0
        ]
        reasons += self._capped(temperatures)
        counts = self._counts()
        if (rise := sum(max(0, count - self._last.get(path, count)) for path, count in counts.items())) > 0:
            reasons.append(f"the CPU was throttled {rise} times since the look before")
        self._last = counts
        now, before = self._firmwares_word()
        if total := sum(counts.values()):
            before = before or f"the CPU's throttle counters stand at {total:,} since its start"
        return Heat((*reasons, *now), hottest_c, hottest.name if hottest else "", before)

    def _capped(self, temperatures: list[tuple[float, _Zone]]) -> list[str]:
        """CPUs below their full frequency, where a zone is at a trip point."""
        at_trip = [
            f"{zone.name} is at {celsius:.0f} °C, its {zone.trips[0][1]} trip point is {zone.trips[0][0]:.0f} °C"
            for celsius, zone in temperatures
            if zone.trips and celsius >= zone.trips[0][0]
        ]
        capped = [
            f"{name} may run at {khz / 1e6:.2f} of {full_khz / 1e6:.2f} GHz"
            for name, path, full_khz in self._policies
            if (khz := _number(path)) is not None and khz < full_khz
        ]
        return [f"{at_trip[0]}, and {capped[0]}"] if at_trip and capped else []

    def _counts(self) -> dict[Path, int]:
        return {path: count for path in self._counters if (count := _number(path)) is not None}

    def _firmwares_word(self) -> tuple[list[str], str]:
        """What it says of now, and of before."""
        bits = 0
        for path in self._firmware:
            try:
                bits = int(_text(path).removeprefix("0x") or "0", 16)
            except ValueError:
                continue
        if any(_number(path) for path in self._supply):
            bits |= 1
        now = [text for bit, text in _FIRMWARE_BITS.items() if bits >> bit & 1]
        was = [text.partition(":")[0] for bit, text in _FIRMWARE_BITS.items() if bits >> (bit + 16) & 1]
        return now, f"some time since its start: {', '.join(was)}" if was else ""


def _text(path: Path) -> str:
    """Empty when it cannot be read: drivers answer errors for a sensor whose part of the chip is switched off."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    try:
        return int(_text(path))
    except ValueError:
        return None
