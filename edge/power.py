"""Energy of this device in joules, from sensors alone: each figure names the one that measured it.

What is read: the CPU's own counter (RAPL, ``/sys/class/powercap``), a Jetson's INA3221 (``/sys/class/hwmon``, volts
times amperes, sampled ten times a second while somebody measures) and NVIDIA's counter (NVML, through the package
``nvidia-ml-py`` where it is installed). Where none can be read the answer is None and why; a rated power is never put
in a measurement's place.

The ``zeus`` package (0.16) reads the same sensors. It is not used: it needs pandas, scikit-learn and AMD's library, and
starts a process of its own for each counter that it watches, where here a few files are read.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

from edge.hardware import power_sensors

SAMPLE_S = 0.1
"""Between two readings of a sensor that shows power and not energy."""

_WHOLE_BOARD = ("VDD_IN", "POM_5V_IN")
"""Rails of Jetsons that feed all others."""


class Unreadable(Exception):
    """A sensor gave no figure; the text says which and why."""


class EnergySource(ABC):
    """One sensor's energy, counted from anywhere."""

    name: str
    resolution_s: float
    """Between two changes of its figure; what is measured over less is noise."""

    @abstractmethod
    def read_j(self) -> float:
        """Joules, never less than before. Raises Unreadable."""

    def start(self) -> None:  # noqa: B027 - most sensors count by themselves
        """Somebody measures from now on."""

    def stop(self) -> None:  # noqa: B027
        """Nobody does."""


class Rapl(EnergySource):
    """A CPU package's energy counter, which begins anew at ``max_energy_range_uj`` (some minutes under full load).

    Read at least once in that time while it counts; the memory's own counter is added where there is one.
    """

    resolution_s = 0.01

    def __init__(self, folder: Path) -> None:
        planes = sorted(folder.glob("intel-rapl:*:*/name"))
        memory = [path.parent for path in planes if _read_text(path) == "dram"]
        self._domains = [folder, *memory]
        self._range_uj = [_read_int(domain / "max_energy_range_uj") for domain in self._domains]
        self._last_uj: list[int | None] = [None] * len(self._domains)
        self._total_uj = 0
        self.name = "rapl " + "+".join(_read_text(domain / "name") or domain.name for domain in self._domains)

    def read_j(self) -> float:
        readings = [_read_int(domain / "energy_uj") for domain in self._domains]
        for index, reading in enumerate(readings):
            last = self._last_uj[index]
            if last is not None:
                self._total_uj += reading - last + (self._range_uj[index] if reading < last else 0)
            self._last_uj[index] = reading
        return self._total_uj / 1e6


class Ina3221(EnergySource):
    """A Jetson's rails: millivolts times milliamperes, added up over time by a thread of its own (trapezoids)."""

    resolution_s = SAMPLE_S

    def __init__(self, folders: Sequence[Path], clock: Callable[[], float] = time.monotonic) -> None:
        rails: list[tuple[str, Path, Path]] = []
        for folder in folders:
            for volts in sorted(folder.glob("in[0-9]*_input")):
                amperes = folder / f"curr{volts.name[2:-6]}_input"
                label = _read_text(folder / f"{volts.name[:-6]}_label")
                if amperes.exists() and label != "NC":  # Not connected; "sum of shunt voltages" has no current.
                    rails.append((label or f"{folder.name}/{volts.name[:-6]}", volts, amperes))
        whole = [rail for rail in rails if rail[0] in _WHOLE_BOARD]
        self._rails = whole or rails
        if not self._rails:
            raise Unreadable(f"{folders[0]}: it has no rail with a voltage and a current")
        self.name = "ina3221 " + "+".join(label for label, _, _ in self._rails)
        self._clock = clock
        self._lock = threading.Lock()
        self._total_j = 0.0
        self._last: tuple[float, float] | None = None
        self._failed = ""
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def _watts(self) -> float:
        return sum(_read_int(volts) * _read_int(amperes) for _, volts, amperes in self._rails) / 1e6

    def sample(self) -> None:
        """Add the energy since the sample before."""
        with self._lock:
            try:
                watts, now_s = self._watts(), self._clock()
            except Unreadable as error:
                self._last, self._failed = None, str(error)
                return
            if self._last is not None:
                before_s, before_watts = self._last
                self._total_j += (watts + before_watts) / 2 * (now_s - before_s)
            self._last = (now_s, watts)

    def read_j(self) -> float:
        self.sample()
        with self._lock:
            failed, self._failed = self._failed, ""
            if failed:  # There is a gap, now or since the reading before.
                raise Unreadable(failed)
            return self._total_j

    def start(self) -> None:
        if self._thread is None:
            self._last = None  # What passed while nobody measured is not counted.
            self._stopping.clear()
            self._thread = threading.Thread(target=self._main, name="power sampler", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        if self._thread is not None:
            self._stopping.set()
            self._thread.join(5.0)
            self._thread = None

    def _main(self) -> None:
        while not self._stopping.wait(SAMPLE_S):
            self.sample()


class Nvml(EnergySource):
    """An NVIDIA GPU's energy since its driver was loaded, in millijoules (Volta and later)."""

    resolution_s = 0.1

    def __init__(self, gpu: int | str, library: Any = None) -> None:
        """``gpu``: its index for NVML, or its UUID; ``library`` stands for the module ``pynvml`` in tests."""
        try:
            self._library = library or importlib.import_module("pynvml")
        except ImportError as error:
            raise Unreadable("the package nvidia-ml-py is not installed") from error
        own = self._library
        try:
            own.nvmlInit()
            find = own.nvmlDeviceGetHandleByIndex if isinstance(gpu, int) else own.nvmlDeviceGetHandleByUUID
            self._device = find(gpu)
            name = own.nvmlDeviceGetName(self._device)
            own.nvmlDeviceGetTotalEnergyConsumption(self._device)
        except own.NVMLError as error:
            raise Unreadable(f"NVML, GPU {gpu}: {error}") from error
        self.name = f"nvml {name.decode() if isinstance(name, bytes) else name}"

    def read_j(self) -> float:
        try:
            return float(self._library.nvmlDeviceGetTotalEnergyConsumption(self._device)) / 1000
        except self._library.NVMLError as error:
            raise Unreadable(f"{self.name}: {error}") from error


class Meter:
    """All that can be measured of this device, as one figure. Used by one thread at a time.

    Attributes:
        sensor: what measures, such as ``rapl package-0+dram, nvml NVIDIA H200``; empty where nothing does.
        reason: why nothing is measured, or is not just now; else empty.
        resolution_s: what takes less time is not measured.
    """

    def __init__(self, sources: Sequence[EnergySource], reason: str = "") -> None:
        self._sources = tuple(sources)
        self.sensor = ", ".join(source.name for source in sources)
        self.reason = reason
        self.resolution_s = max((source.resolution_s for source in sources), default=0.0)

    def read_j(self) -> float | None:
        """Joules since anywhere: two readings make a measurement. None where a sensor gives nothing."""
        if not self._sources:
            return None
        try:
            total = sum(source.read_j() for source in self._sources)
        except Unreadable as error:
            self.reason = str(error)
            return None
        self.reason = ""
        return total

    def start(self) -> None:
        """Readings follow: sensors that must be sampled are, from now on."""
        for source in self._sources:
            source.start()

    def stop(self) -> None:
        """No reading follows for a while."""
        for source in self._sources:
            source.stop()


def find_meter(root: Path = Path("/"), *, gpu: int | str | None = None, nvml: Any = None) -> Meter:
    """The meter of this machine; never raises.

    Args:
        root: stands for ``/`` in tests.
        gpu: index for NVML, or UUID, of the GPU that computes, whose energy is measured as well; None for none.
        nvml: stands for the module ``pynvml`` in tests.
    """
    sources: list[EnergySource] = []
    missing: list[str] = []
    found = power_sensors(root)

    def add(make: Callable[[], EnergySource]) -> None:
        try:
            source = make()
            source.read_j()
            sources.append(source)
        except Unreadable as error:
            missing.append(str(error))

    rails = [Path(sensor.path) for sensor in found if sensor.kind == "ina3221"]
    if rails:  # A Jetson: its rails feed CPU and GPU.
        add(lambda: Ina3221(rails))
    else:
        for sensor in found:
            add(lambda path=Path(sensor.path): Rapl(path))  # type: ignore[misc]
        if gpu is not None:
            add(lambda: Nvml(gpu, nvml))
    if gpu is not None and not rails and not any(isinstance(source, Nvml) for source in sources):
        sources = []  # The CPU's part alone would be a wrong figure for a run on the GPU.
    return Meter(sources, "" if sources else "; ".join(missing) or "this device has no energy sensor")


def visible_gpu(index: int) -> int | str:
    """What NVML calls the GPU that CUDA calls ``index`` in this process (``CUDA_VISIBLE_DEVICES``)."""
    visible = [entry.strip() for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
    if index < len(visible):
        return int(visible[index]) if visible[index].isdigit() else visible[index]
    return index


class EnergyShares:
    """The device's energy, shared out among the runs that it computed for. Used by one thread.

    Each run's share of an interval is its share of the time that was computed in it: a chunk of a prompt is its
    run's own, a step of several conversations is shared evenly among them. (By tokens, a prompt's cheap ones would pay
    for the dear ones of decoding.) It is the whole device's energy, the idle part included: what is drawn while runs
    are under way is what answering them costs.
    """

    SETTLE_S = 1.0
    """Longest interval: counters begin anew, and runs change."""

    def __init__(self, meter: Meter, clock: Callable[[], float] = time.monotonic) -> None:
        self._meter = meter
        self._clock = clock
        self._joules: dict[Hashable, float | None] = {}
        self._begun_s: dict[Hashable, float] = {}
        self._seconds: dict[Hashable, float] = {}
        self._last_j: float | None = None
        self._last_s = 0.0

    @property
    def sensor(self) -> str:
        """What measures; empty where nothing does."""
        return self._meter.sensor

    def begin(self, run: Hashable) -> None:
        """``run`` is computed for from now on."""
        if not self._meter.sensor:
            return
        if not self._joules:
            self._meter.start()
            self._last_j, self._last_s = self._meter.read_j(), self._clock()
        else:
            self._settle()
        self._joules[run], self._begun_s[run] = 0.0, self._clock()

    def computed(self, runs: Sequence[Hashable], seconds: float) -> None:
        """The device computed for ``runs`` together, ``seconds`` long."""
        if not self._joules:
            return
        for run in runs:
            self._seconds[run] = self._seconds.get(run, 0.0) + seconds / len(runs)
        if self._clock() - self._last_s >= self.SETTLE_S:
            self._settle()

    def end(self, run: Hashable) -> float | None:
        """What ``run`` took in joules; None when it was not measured: no sensor, one that failed meanwhile, or a run
        too short for it."""
        if run not in self._joules:
            return None
        self._settle()
        took_s = self._clock() - self._begun_s.pop(run)
        joules = self._joules.pop(run)
        if not self._joules:
            self._meter.stop()
        return joules if took_s >= 2 * self._meter.resolution_s else None

    def _settle(self) -> None:
        now_j, seconds = self._meter.read_j(), self._seconds
        total_s = sum(seconds.values())
        if now_j is None or self._last_j is None:
            for run in self._joules:  # Nobody knows what this interval took.
                self._joules[run] = None
        elif total_s:
            for run, share in seconds.items():
                known = self._joules.get(run)
                if known is not None:
                    self._joules[run] = known + (now_j - self._last_j) * share / total_s
        if total_s or now_j is None or self._last_j is None:
            self._last_j, self._seconds = now_j, {}
        # An interval without work goes on: its energy belongs to the work that follows.
        self._last_s = self._clock()


def _read_text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace").strip()
    return ""


def _read_int(path: Path) -> int:
    try:
        return int(path.read_text())
    except PermissionError as error:
        raise Unreadable(f"{path} may be read by root only") from error
    except (OSError, ValueError) as error:
        raise Unreadable(f"{path}: {error}") from error
