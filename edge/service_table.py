"""The service table: every service of a node, declared once."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass


@dataclass(frozen=True)
class ServiceRow:
    """One row."""

    name: str
    module: str
    class_name: str
    about: str
    needs: tuple[str, ...] = ()
    """Packages that must be importable, beyond the core's."""
    extra: str = ""
    """The extra of pyproject.toml that brings them."""


SERVICES: tuple[ServiceRow, ...] = (
    ServiceRow(
        "memory_store",
        "services.memory_store.service",
        "MemoryStore",
        "keeps this node's memories and its copies of the others', and answers recalls",
    ),
    ServiceRow(
        "sync_bridge",
        "services.sync_bridge.service",
        "SyncBridge",
        "compares what nodes hold and fetches what is missing",
    ),
    ServiceRow(
        "model_runner",
        "services.model_runner.service",
        "ModelRunner",
        "runs a local model: conversations, snapshots, handoff",
        needs=("torch", "transformers", "numpy"),
        extra="model",
    ),
)
"""In the order in which they are started; they are stopped in the reverse."""

BY_NAME = {row.name: row for row in SERVICES}


def missing_packages(row: ServiceRow) -> list[str]:
    """What of ``row.needs`` is not installed; nothing is imported to find out."""
    return [name for name in row.needs if importlib.util.find_spec(name) is None]
