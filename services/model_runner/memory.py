"""How much memory KV caches may take."""

from __future__ import annotations

from typing import NamedTuple

from edge.hardware import describe

MIB = 2**20
FREE_SHARE = 0.5
"""Of the memory that is free once the model is loaded: the rest is for what computing takes, and for other programs."""
UNKNOWN_BYTES = 1024 * MIB
"""Where nothing says how much is free."""


class Budget(NamedTuple):
    """What all KV caches of a model may take together."""

    size_bytes: int
    reason: str
    """Why so much."""


def free_memory(device: str) -> tuple[int | None, str]:
    """Bytes that are free now where a model of ``device`` (``cpu``, or a GPU's name) keeps its KV, and where that
    is; None when nothing says."""
    if device == "cpu":
        return describe().memory_available_bytes, "this machine's memory"
    try:
        import torch

        return int(torch.cuda.mem_get_info()[0]), f"the memory of {device}"
    except (ImportError, RuntimeError, AssertionError):
        return None, f"the memory of {device}"


def kv_budget(configured_mib: int, free_bytes: int | None, where: str) -> Budget:
    """The budget: ``configured_mib``, or when that is 0 a share of the ``free_bytes`` of ``where``."""
    if configured_mib:
        return Budget(configured_mib * MIB, "set by model.kv_memory_mib")
    if free_bytes is None:
        return Budget(UNKNOWN_BYTES, f"nothing says how much of {where} is free")
    size_bytes = int(free_bytes * FREE_SHARE)
    return Budget(size_bytes, f"{FREE_SHARE:.0%} of {free_bytes / MIB:,.0f} MiB that were free in {where}")
