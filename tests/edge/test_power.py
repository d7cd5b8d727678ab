"""Energy from sensors' files as kernels write them: wraparound, permissions, sensors that vanish, and fair shares."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from edge.power import EnergyShares, EnergySource, Ina3221, Meter, Rapl, Unreadable, find_meter, visible_gpu

RANGE_UJ = 262_143_328_850


def write(root: Path, files: dict[str, object]) -> None:
    for name, value in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")


def rapl_files(root: Path, package: int = 0, *, energy_uj: int = 1_000_000, dram: bool = True) -> Path:
    """Files of a package with its planes, as /sys/class/powercap shows them (all side by side, and inside)."""
    folder = f"sys/class/powercap/intel-rapl:{package}"
    planes = {0: "core", 1: "dram"} if dram else {0: "core"}
    write(
        root,
        {
            f"{folder}/name": f"package-{package}",
            f"{folder}/energy_uj": energy_uj,
            f"{folder}/max_energy_range_uj": RANGE_UJ,
        },
    )
    for index, plane in planes.items():
        inner = f"{folder}/intel-rapl:{package}:{index}"
        write(root, {f"{inner}/name": plane, f"{inner}/energy_uj": 500, f"{inner}/max_energy_range_uj": 65_532_610_987})
    return root / folder


def ina_files(root: Path, rails: dict[int, tuple[str, int, int]], number: int = 1) -> Path:
    folder = f"sys/class/hwmon/hwmon{number}"
    write(root, {f"{folder}/name": "ina3221"})
    for index, (label, millivolts, milliamperes) in rails.items():
        write(
            root,
            {
                f"{folder}/in{index}_label": label,
                f"{folder}/in{index}_input": millivolts,
                f"{folder}/curr{index}_input": milliamperes,
            },
        )
    # The chip's seventh voltage is a sum of shunts, and has no current beside it.
    write(root, {f"{folder}/in7_label": "Sum of shunt voltages", f"{folder}/in7_input": 7})
    return root / folder


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_machine_without_sensors_measures_nothing_and_says_so(tmp_path: Path) -> None:
    meter = find_meter(tmp_path)
    assert (meter.sensor, meter.read_j()) == ("", None)
    assert "no energy sensor" in meter.reason


def test_rapl_counts_package_and_memory_and_not_the_planes_within(tmp_path: Path) -> None:
    folder = rapl_files(tmp_path)
    meter = find_meter(tmp_path)
    assert meter.sensor == "rapl package-0+dram"
    before = meter.read_j()
    write(folder, {"energy_uj": 3_500_000, "intel-rapl:0:0/energy_uj": 9_999_999, "intel-rapl:0:1/energy_uj": 250_500})
    after = meter.read_j()
    assert before is not None
    assert after == pytest.approx(before + 2.5 + 0.25)


def test_every_package_counts(tmp_path: Path) -> None:
    folders = [rapl_files(tmp_path, package, dram=False) for package in (0, 1)]
    # The same counter by another way in: it must not count twice.
    write(tmp_path, {"sys/class/powercap/intel-rapl-mmio:0/name": "package-0"})
    write(tmp_path, {"sys/class/powercap/intel-rapl-mmio:0/energy_uj": 5})
    meter = find_meter(tmp_path)
    assert meter.sensor == "rapl package-0, rapl package-1"
    before = meter.read_j()
    for folder in folders:
        write(folder, {"energy_uj": 2_000_000})
    after = meter.read_j()
    assert before is not None
    assert after == pytest.approx(before + 2.0)


@hypothesis_settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.integers(0, RANGE_UJ - 1), min_size=1, max_size=20), start=st.integers(0, RANGE_UJ - 1))
def test_a_counter_that_begins_anew_loses_nothing(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], start: int
) -> None:
    folder = rapl_files(tmp_path_factory.mktemp("rapl"), energy_uj=start, dram=False)
    source = Rapl(folder)
    before = source.read_j()
    counter = start
    for step in steps:
        counter = (counter + step) % RANGE_UJ
        (folder / "energy_uj").write_text(f"{counter}\n")
        source.read_j()
    assert source.read_j() - before == pytest.approx(sum(steps) / 1e6)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads files of mode 0")
def test_a_counter_for_root_only_is_named(tmp_path: Path) -> None:
    folder = rapl_files(tmp_path)
    (folder / "energy_uj").chmod(0)
    meter = find_meter(tmp_path)
    assert (meter.sensor, meter.read_j()) == ("", None)
    assert "root only" in meter.reason


def test_a_permission_denied_is_named_whoever_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rapl_files(tmp_path)
    read = Path.read_text

    def denied(path: Path, *args: Any, **kwargs: Any) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return read(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", denied)
    meter = find_meter(tmp_path)
    assert meter.sensor == ""
    assert "root only" in meter.reason


def test_a_sensor_that_vanishes_is_no_figure_and_its_return_is_one(tmp_path: Path) -> None:
    folder = rapl_files(tmp_path, dram=False)
    meter = find_meter(tmp_path)
    assert meter.read_j() is not None
    shutil.move(folder, tmp_path / "away")
    assert meter.read_j() is None
    assert "energy_uj" in meter.reason
    shutil.move(tmp_path / "away", folder)
    assert meter.read_j() is not None
    assert meter.reason == ""
    (folder / "energy_uj").write_text("no number\n")
    assert meter.read_j() is None


def test_a_jetsons_whole_board_is_one_rail_where_there_is_one(tmp_path: Path) -> None:
    ina_files(tmp_path, {1: ("VDD_IN", 5000, 1000), 2: ("VDD_CPU_GPU_CV", 5000, 400), 3: ("VDD_SOC", 5000, 300)})
    assert find_meter(tmp_path).sensor == "ina3221 VDD_IN"


def test_rails_add_up_where_no_one_feeds_all_over_both_chips(tmp_path: Path) -> None:
    ina_files(tmp_path, {1: ("VDD_GPU_SOC", 20_000, 100), 2: ("NC", 1000, 50)}, number=1)
    ina_files(tmp_path, {1: ("VDD_CPU_CV", 20_000, 50), 2: ("VIN_SYS_5V0", 5000, 200)}, number=2)
    meter = find_meter(tmp_path)
    assert meter.sensor == "ina3221 VDD_GPU_SOC+VDD_CPU_CV+VIN_SYS_5V0"


def test_power_is_added_up_over_time(tmp_path: Path) -> None:
    folder, clock = ina_files(tmp_path, {1: ("VDD_IN", 5000, 1000)}), Clock()
    source = Ina3221([folder], clock)
    assert source.read_j() == 0.0
    clock.now_s += 2.0
    assert source.read_j() == pytest.approx(10.0)  # 5 W for 2 s
    write(folder, {"curr1_input": 3000})
    clock.now_s += 1.0
    assert source.read_j() == pytest.approx(20.0)  # from 5 W to 15 W
    (folder / "in1_input").unlink()
    clock.now_s += 1.0
    with pytest.raises(Unreadable, match="in1_input"):
        source.read_j()
    write(folder, {"in1_input": 5000})
    assert source.read_j() == pytest.approx(20.0)  # the gap is not guessed


def test_a_gap_between_two_readings_is_said_even_if_the_sensor_is_back(tmp_path: Path) -> None:
    folder, clock = ina_files(tmp_path, {1: ("VDD_IN", 5000, 1000)}), Clock()
    source = Ina3221([folder], clock)
    source.read_j()
    (folder / "in1_input").unlink()
    source.sample()
    write(folder, {"in1_input": 5000})
    with pytest.raises(Unreadable):
        source.read_j()


def test_a_board_is_sampled_only_while_somebody_measures(tmp_path: Path) -> None:
    folder = ina_files(tmp_path, {1: ("VDD_IN", 5000, 1000)})
    meter = find_meter(tmp_path)

    def samplers() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name == "power sampler"]

    assert samplers() == []
    meter.start()
    try:
        assert samplers() == ["power sampler"]
        before = meter.read_j()
        write(folder, {"curr1_input": 2000})
        after = meter.read_j()
        assert before is not None
        assert after is not None
        assert after >= before
    finally:
        meter.stop()
    assert samplers() == []


class NvmlError(Exception):
    pass


def nvml(joules: list[float], **broken: Exception) -> Any:
    """What the module pynvml offers; there is no NVIDIA driver where tests run."""

    def call(name: str, value: Any) -> Any:
        def answer(*_: Any) -> Any:
            if name in broken:
                raise broken[name]
            return value() if callable(value) else value

        return answer

    return SimpleNamespace(
        NVMLError=NvmlError,
        nvmlInit=call("init", None),
        nvmlDeviceGetHandleByIndex=call("index", "handle"),
        nvmlDeviceGetHandleByUUID=call("uuid", "handle"),
        nvmlDeviceGetName=call("name", b"NVIDIA H200"),
        nvmlDeviceGetTotalEnergyConsumption=call("energy", lambda: joules[0] * 1000),
    )


def test_a_gpus_counter_stands_beside_the_cpus(tmp_path: Path) -> None:
    folder, joules = rapl_files(tmp_path, dram=False), [10.0]
    meter = find_meter(tmp_path, gpu=0, nvml=nvml(joules))
    assert meter.sensor == "rapl package-0, nvml NVIDIA H200"
    before = meter.read_j()
    joules[0] += 7.0
    write(folder, {"energy_uj": 2_000_000})
    after = meter.read_j()
    assert before is not None
    assert after == pytest.approx(before + 8.0)


def test_a_run_on_a_gpu_that_cannot_be_measured_has_no_figure_of_the_cpu_alone(tmp_path: Path) -> None:
    rapl_files(tmp_path)
    for broken in ("init", "index", "energy"):
        meter = find_meter(tmp_path, gpu=0, nvml=nvml([1.0], **{broken: NvmlError("Not Supported")}))
        assert meter.sensor == ""
        assert "Not Supported" in meter.reason


def test_the_gpu_is_the_one_that_cuda_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpu(1) == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-5a")
    assert (visible_gpu(0), visible_gpu(1)) == (3, "GPU-5a")


class Counter(EnergySource):
    """A counter that the test turns."""

    name = "counter"
    resolution_s = 0.1

    def __init__(self) -> None:
        self.joules = 1000.0
        self.broken = False
        self.running = 0

    def read_j(self) -> float:
        if self.broken:
            raise Unreadable("counter: gone")
        return self.joules

    def start(self) -> None:
        self.running += 1

    def stop(self) -> None:
        self.running -= 1


class Device:
    """A device that computes: time passes, energy is used."""

    def __init__(self) -> None:
        self.counter, self.clock = Counter(), Clock()
        self.shares = EnergyShares(Meter([self.counter]), self.clock)

    def compute(self, runs: list[str], seconds: float, watts: float) -> None:
        self.clock.now_s += seconds
        self.counter.joules += watts * seconds
        self.shares.computed(runs, seconds)


def test_one_run_alone_has_all_of_it() -> None:
    device = Device()
    device.shares.begin("a")
    device.compute(["a"], 0.3, 10)
    device.compute(["a"], 3.0, 20)
    assert device.shares.end("a") == pytest.approx(63.0)
    assert device.counter.running == 0


def test_a_steps_energy_is_shared_evenly_and_a_chunks_is_its_runs() -> None:
    device = Device()
    for run in ("a", "b"):
        device.shares.begin(run)
    device.compute(["a", "b"], 1.0, 10)  # 5 each
    device.compute(["a"], 2.0, 10)
    device.compute(["a", "b"], 2.0, 10)  # 10 each
    assert device.shares.end("b") == pytest.approx(15.0)
    device.compute(["a"], 1.0, 10)
    assert device.shares.end("a") == pytest.approx(45.0)


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sets(st.sampled_from("abc"), min_size=1), st.floats(0.001, 3), st.floats(0, 100)), max_size=30
    )
)
def test_the_shares_are_the_whole(steps: list[tuple[set[str], float, float]]) -> None:
    device = Device()
    begin_j = device.counter.joules
    for run in "abc":
        device.shares.begin(run)
    for runs, seconds, watts in steps:
        device.compute(sorted(runs), seconds, watts)
    device.compute(["a", "b", "c"], 1.0, 1)
    shares = [device.shares.end(run) for run in "abc"]
    assert sum(share for share in shares if share is not None) == pytest.approx(device.counter.joules - begin_j)


def test_what_a_run_drew_before_another_began_is_not_the_others() -> None:
    device = Device()
    device.shares.begin("a")
    device.compute(["a"], 0.5, 100)
    device.shares.begin("b")
    device.compute(["b"], 0.5, 10)
    assert device.shares.end("b") == pytest.approx(5.0)
    assert device.shares.end("a") == pytest.approx(50.0)


def test_a_sensor_that_fails_leaves_no_figure_for_those_under_way_alone() -> None:
    device = Device()
    device.shares.begin("a")
    device.compute(["a"], 2.0, 10)
    device.counter.broken = True
    device.compute(["a"], 2.0, 10)
    device.counter.broken = False
    device.shares.begin("b")
    device.compute(["a", "b"], 2.0, 10)
    assert device.shares.end("a") is None
    assert device.shares.end("b") == pytest.approx(10.0)


def test_what_is_too_short_for_the_sensor_is_not_measured() -> None:
    device = Device()
    device.shares.begin("a")
    device.compute(["a"], 0.15, 10)
    assert device.shares.end("a") is None


def test_without_a_sensor_there_are_no_shares() -> None:
    shares = EnergyShares(Meter([], "none"))
    shares.begin("a")
    shares.computed(["a"], 1.0)
    assert shares.end("a") is None
    assert shares.sensor == ""
