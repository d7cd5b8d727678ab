"""Hardware is read from files; the machines here are folders that look like theirs."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge.hardware import Hardware, choose_device, describe


def machine(root: Path, **files: str) -> Hardware:
    for path, text in files.items():
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    return describe(root)


def test_this_machine_has_cores_memory_and_a_name() -> None:
    hardware = describe()
    assert hardware.cores >= 1
    assert hardware.memory_bytes is not None
    assert hardware.memory_bytes > 2**28
    assert hardware.arch


def test_nothing_readable_is_unknown_not_guessed(tmp_path: Path) -> None:
    hardware = describe(tmp_path)
    assert hardware.cpu_model is None
    assert hardware.memory_bytes is None
    assert hardware.cpu_flags == ()
    assert not hardware.cuda
    assert hardware.cuda_reason == "no NVIDIA driver is loaded"
    assert hardware.power_sensors == ()


def test_x86_with_bf16_is_described(tmp_path: Path) -> None:
    cpu = "model name\t: AMD EPYC 9654\nflags\t\t: fpu avx2 avx512f avx512_bf16\n"
    hardware = machine(tmp_path, **{"proc/cpuinfo": cpu, "proc/meminfo": "MemTotal:  1024 kB\nMemAvailable: 512 kB\n"})
    assert hardware.cpu_model == "AMD EPYC 9654"
    assert hardware.cpu_flags == ("avx2", "avx512f", "avx512_bf16")
    assert (hardware.memory_bytes, hardware.memory_available_bytes) == (1024 * 1024, 512 * 1024)
    assert hardware.bf16 == "avx512_bf16"


def test_a_cpu_without_bf16_is_described(tmp_path: Path) -> None:
    hardware = machine(tmp_path, **{"proc/cpuinfo": "Features\t: fp asimd asimddp\n"})
    assert hardware.cpu_flags == ("asimd", "asimddp")
    assert not hardware.bf16


def test_a_jetson_is_known_by_its_device_tree_and_its_rails(tmp_path: Path) -> None:
    hardware = machine(
        tmp_path,
        **{
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
            "proc/cpuinfo": "Features\t: fp asimd bf16 i8mm\n",
            "dev/nvhost-gpu": "",
            "sys/class/hwmon/hwmon1/name": "ina3221\n",
            "sys/class/hwmon/hwmon1/in1_input": "5000\n",
            "sys/class/hwmon/hwmon0/name": "cpu_thermal\n",
        },
    )
    assert hardware.jetson == "NVIDIA Jetson Orin Nano Developer Kit"
    assert hardware.cpu_model == hardware.jetson
    assert hardware.cuda
    assert [(sensor.kind, sensor.readable) for sensor in hardware.power_sensors] == [("ina3221", True)]
    assert choose_device(hardware).value == "cuda"


def test_a_jetson_without_its_gpu_device_computes_on_the_cpu(tmp_path: Path) -> None:
    hardware = machine(tmp_path, **{"etc/nv_tegra_release": "# R36"})
    assert not hardware.cuda
    assert "missing in /dev" in choose_device(hardware).reason


def test_a_gpu_is_named_with_its_driver(tmp_path: Path) -> None:
    version = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22\n"
    hardware = machine(
        tmp_path,
        **{
            "proc/driver/nvidia/version": version,
            "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t NVIDIA GeForce RTX 3060\nIRQ: 1\n",
            "dev/nvidia0": "",
            "dev/nvidiactl": "",
        },
    )
    assert hardware.cuda
    assert "NVIDIA GeForce RTX 3060" in hardware.cuda_reason
    assert "550.54.14" in hardware.cuda_reason
    assert choose_device(hardware, torch_cuda=True).value == "cuda"
    without = choose_device(hardware, torch_cuda=False)
    assert without.value == "cpu"
    assert "without CUDA" in without.reason


def test_a_driver_without_a_device_is_no_gpu(tmp_path: Path) -> None:
    hardware = machine(tmp_path, **{"proc/driver/nvidia/version": "NVRM version: 550.54.14\n"})
    assert not hardware.cuda
    assert "no nvidia0" in hardware.cuda_reason


def test_rapl_counts_packages_not_the_planes_inside(tmp_path: Path) -> None:
    base = "sys/class/powercap"
    hardware = machine(
        tmp_path, **{f"{base}/intel-rapl:0/energy_uj": "12\n", f"{base}/intel-rapl:0:0/energy_uj": "3\n"}
    )
    assert [(sensor.kind, Path(sensor.path).name) for sensor in hardware.power_sensors] == [("rapl", "intel-rapl:0")]


def test_the_configuration_has_the_last_word(tmp_path: Path) -> None:
    hardware = describe(tmp_path)
    assert choose_device(hardware, "cuda").value == "cuda"
    assert choose_device(hardware, "cpu").reason == "set in the configuration"
    with pytest.raises(ValueError, match="none of auto, cpu, cuda"):
        choose_device(hardware, "tpu")
