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
    """Packages that must be importable, beyond the core's; ``a|b``: one of them."""
    extra: str = ""
    """The extra of pyproject.toml that brings them."""
    always: bool = False
    """Runs on every node, whether or not ``services.enabled`` names it."""
    switch: str = ""
    """The configuration's key that turns it on where ``services.enabled`` is left out; while that is 0 or empty it does
    not run. Empty: it runs wherever its packages are."""

    # What systemd gives it beyond the template, rendered into its drop-in by edge/units.py.
    memory_max: str = "1G"
    """MemoryMax=: with more than this it is killed and started again (a leak must not take the machine)."""
    devices: tuple[str, ...] = ()
    """Groups of devices it opens, of edge/units.py's table: ``gpu``, ``camera``, ``microphone``, ``power``."""
    makes_code: bool = False
    """It maps memory that is writable and executable: native libraries that compile or are built so."""
    oom_score: int = 0
    """OOMScoreAdjust=: the highest dies first when the machine has no memory left."""
    cpu_weight: int = 100
    """CPUWeight=: its share of a busy CPU, against 100 of the others."""
    credentials: tuple[str, ...] = ()
    """Secrets that it alone is given, files of these names in the folder of credentials; one that is not there is
    empty."""


SERVICES: tuple[ServiceRow, ...] = (
    ServiceRow(
        "presence",
        "services.presence.service",
        "Presence",
        "says how this node is: its state, Home Assistant discovery, metrics; notices peers that fall silent",
        always=True,
        memory_max="256M",
    ),
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
        memory_max="512M",
    ),
    ServiceRow(
        "model_runner",
        "services.model_runner.service",
        "ModelRunner",
        "runs a local model: conversations, snapshots, handoff",
        needs=("torch|onnxruntime", "numpy", "tokenizers", "jinja2"),
        extra="model",
        memory_max="90%",
        devices=("gpu",),
        makes_code=True,
        oom_score=500,
        cpu_weight=50,
    ),
    ServiceRow(
        "gateway",
        "services.gateway.service",
        "Gateway",
        "an OpenAI-compatible endpoint: chat programs use any node's model through this node",
        needs=("starlette", "uvicorn"),
        extra="gateway",
        switch="gateway.port",
        memory_max="512M",
        credentials=("gateway-token",),
    ),
)
"""In the order in which they are started; they are stopped in the reverse."""

BY_NAME = {row.name: row for row in SERVICES}


def missing_packages(row: ServiceRow) -> list[str]:
    """What of ``row.needs`` is not installed; nothing is imported to find out."""

    def here(name: str) -> bool:
        return importlib.util.find_spec(name) is not None

    return [name.replace("|", " or ") for name in row.needs if not any(map(here, name.split("|")))]
