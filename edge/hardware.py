"""What this machine is, and what to compute on, each choice with its reason.

Reads ``/proc``, ``/sys`` and ``/dev`` and asks nobody: no torch, no driver library, no subprocess. What cannot be
read is said to be unknown (None), never guessed.
"""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import msgspec

CPU_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "avx_vnni",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "bf16",
    "i8mm",
)
"""Instruction sets that decide speed or dtype, by the names of ``/proc/cpuinfo`` (x86-64 and aarch64)."""
BF16_FLAGS = ("amx_bf16", "avx512_bf16", "bf16")
"""Any of these multiplies bfloat16 in hardware."""


class PowerSensor(msgspec.Struct, frozen=True):
    """A sensor that can be read for power or energy."""

    kind: str
    """``ina3221`` (Jetson's rails: mV × mA) or ``rapl`` (the CPU's energy counter, µJ)."""
    path: str
    """Folder with its files."""
    readable: bool
    """RAPL's counter is for root only on most systems."""


class Hardware(msgspec.Struct, frozen=True):
    """What was found. None is unknown."""

    arch: str
    """``x86_64``, ``aarch64``, …"""
    cpu_model: str | None
    cores: int
    """CPUs that this process may use."""
    cpu_flags: tuple[str, ...]
    """Those of ``CPU_FLAGS`` that the CPU has."""
    memory_bytes: int | None
    """Total memory."""
    memory_available_bytes: int | None
    """Memory that can be had without swapping, now."""
    jetson: str | None
    """Model name of an NVIDIA Jetson, else None."""
    cuda: bool
    """Whether an NVIDIA driver is loaded and has a device that this process may use."""
    cuda_reason: str
    """What that was read from, or what is missing."""
    power_sensors: tuple[PowerSensor, ...]

    @property
    def bf16(self) -> str | None:
        """The instruction set that computes in bfloat16, or None."""
        return next((flag for flag in BF16_FLAGS if flag in self.cpu_flags), None)


class Choice(msgspec.Struct, frozen=True):
    """A value and why it was chosen."""

    value: str
    reason: str


def describe(root: Path = Path("/")) -> Hardware:
    """Read this machine; ``root`` stands for ``/`` in tests. Never raises for what is missing."""
    cpuinfo = _text(root / "proc/cpuinfo")
    has = set(re.split(r"\s+", _field(cpuinfo, "flags") or _field(cpuinfo, "Features") or ""))
    meminfo = _text(root / "proc/meminfo")
    jetson = _jetson(root)
    cuda, cuda_reason = _cuda(root, jetson)
    return Hardware(
        arch=platform.machine(),
        cpu_model=_field(cpuinfo, "model name") or _device_tree_model(root),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        cpu_flags=tuple(flag for flag in CPU_FLAGS if flag in has),
        memory_bytes=_kib(meminfo, "MemTotal"),
        memory_available_bytes=_kib(meminfo, "MemAvailable"),
        jetson=jetson,
        cuda=cuda,
        cuda_reason=cuda_reason,
        power_sensors=tuple(power_sensors(root)),
    )


def choose_device(hardware: Hardware, wanted: str = "auto", *, torch_cuda: bool | None = None) -> Choice:
    """``cpu`` or ``cuda``. ``wanted`` is the configuration's word: ``auto``, ``cpu`` or ``cuda``.

    Args:
        torch_cuda: whether the installed torch can use CUDA; None when torch has not been asked. A GPU that the
            installed packages cannot drive is no GPU.

    Raises ValueError for another word.
    """
    if wanted not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device {wanted!r} is none of auto, cpu, cuda")
    if wanted != "auto":
        return Choice(wanted, "set in the configuration")
    if not hardware.cuda:
        return Choice("cpu", hardware.cuda_reason)
    if torch_cuda is False:
        return Choice("cpu", f"{hardware.cuda_reason}, but the installed torch is built without CUDA")
    return Choice("cuda", hardware.cuda_reason)


def _cuda(root: Path, jetson: str | None) -> tuple[bool, str]:
    if jetson:
        device = next(
            (path for path in ("dev/nvhost-gpu", "dev/nvgpu/igpu0", "dev/nvidia0") if (root / path).exists()), ""
        )
        return (True, f"{jetson}: /{device}") if device else (False, f"{jetson}, but its GPU device is missing in /dev")
    version = _text(root / "proc/driver/nvidia/version")
    devices = sorted(path.name for path in (root / "dev").glob("nvidia[0-9]*"))
    if not version and not devices:
        return False, "no NVIDIA driver is loaded"
    if not devices:
        return False, "the NVIDIA driver is loaded, but /dev has no nvidia0"
    if not os.access(root / "dev" / devices[0], os.R_OK | os.W_OK):
        return False, f"/dev/{devices[0]} is there, but this user may not use it (groups video, render)"
    found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", version)
    driver = f" with driver {found.group(1)}" if found else ""
    return True, f"NVIDIA {', '.join(_gpu_names(root)) or devices[0]}{driver}"


def _gpu_names(root: Path) -> list[str]:
    infos = sorted((root / "proc/driver/nvidia/gpus").glob("*/information"))
    return [name for name in (_field(_text(path), "Model") for path in infos) if name]


def _jetson(root: Path) -> str | None:
    model = _device_tree_model(root)
    if (root / "etc/nv_tegra_release").exists() or (model and "jetson" in model.lower()):
        return model or "NVIDIA Jetson"
    return None


def _device_tree_model(root: Path) -> str | None:
    return _text(root / "proc/device-tree/model").strip("\0\n ") or None


def power_sensors(root: Path = Path("/")) -> list[PowerSensor]:
    """The sensors that measure power or energy, readable or not."""
    found = []
    for name in sorted((root / "sys/class/hwmon").glob("hwmon*/name")):
        if _text(name).strip() == "ina3221":
            rails = sorted(name.parent.glob("in[0-9]_input"))
            found.append(PowerSensor("ina3221", str(name.parent), bool(rails) and os.access(rails[0], os.R_OK)))
    for energy in sorted((root / "sys/class/powercap").glob("intel-rapl:[0-9]*/energy_uj")):
        if energy.parent.name.count(":") == 1:  # a whole package; the planes inside it have a second colon
            found.append(PowerSensor("rapl", str(energy.parent), os.access(energy, os.R_OK)))
    return found


def _field(text: str, name: str) -> str | None:
    found = re.search(rf"^{re.escape(name)}\s*:\s*(.+?)\s*$", text, re.MULTILINE)
    return found.group(1) if found else None


def _kib(text: str, name: str) -> int | None:
    value = _field(text, name)
    return int(value.split()[0]) * 1024 if value else None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
