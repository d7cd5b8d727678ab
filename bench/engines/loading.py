"""Which engine, on which files: what a process of a benchmark needs to load one."""

from __future__ import annotations

from pathlib import Path

import msgspec

from services.model_runner.engine import Engine


class Which(msgspec.Struct, frozen=True):
    """One engine on one model."""

    label: str
    """In the keys of the figures: ``torch``, ``onnx_int8``."""
    kind: str
    """``stock`` (transformers as it comes), ``torch`` (our engine on it) or ``onnx``."""
    folder: str
    """The model's files."""
    device: str = "cpu"
    dtype: str = "auto"
    threads: int = 0
    """0 is the engine's own choice."""


def load(which: Which) -> Engine:
    """One of our engines. Raises ModelUnavailable."""
    folder = Path(which.folder)
    if which.kind == "onnx":
        from services.model_runner.onnx_engine import OnnxEngine

        return OnnxEngine.load(folder, provider=which.device, threads=which.threads)
    from services.model_runner.transformers_engine import TransformersEngine

    return TransformersEngine.load(folder, device=which.device, dtype=which.dtype, threads=which.threads)


def english() -> str:
    """Real text that is on every machine: the reference that comes with Python."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))
