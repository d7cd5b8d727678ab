"""What every benchmark says beside its figures: the machine, the versions, and the disk that it wrote to."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable
from pathlib import Path

import psutil

from edge.hardware import describe

Figures = dict[str, float | int | str | None]
Progress = Callable[[str], None]


def silent(_line: str) -> None:
    """Progress for those who do not ask."""


def machine() -> str:
    """CPU and its count."""
    return f"{describe().cpu_model or platform.machine()}, {os.cpu_count()} CPUs"


def versions(*packages: str) -> str:
    """Python's version and those of ``packages``."""
    return " ".join(
        [f"python {platform.python_version()}", *(f"{p} {importlib.metadata.version(p)}" for p in packages)]
    )


def file_system(folder: Path) -> str:
    """Type of the file system that holds ``folder``, such as ``ext4``; ``tmpfs`` means no disk at all."""
    path = folder.resolve()
    holding = [each for each in psutil.disk_partitions(all=True) if path.is_relative_to(each.mountpoint)]
    return max(holding, key=lambda each: len(each.mountpoint)).fstype if holding else "unknown"
