"""The ladder of KV codecs: one module a rung, one interface (``base.Codec``), and the table of them.

A rung turns one block of at most 256 tokens into bytes and back; it knows nothing of manifests, keys or the bus. The
rungs, from the largest to the smallest: ``raw``, ``lossless``, ``int8``, ``rotated4``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.model_runner.codecs.base import Codec, refused
from services.model_runner.codecs.int8 import Int8
from services.model_runner.codecs.lossless import Lossless
from services.model_runner.codecs.raw import Raw
from services.model_runner.codecs.rotated4 import Rotated4

RUNGS: dict[str, type[Codec]] = {rung.name: rung for rung in (Raw, Lossless, Int8, Rotated4)}
"""By name, the largest first."""


def codec(name: str, params: Mapping[str, Any]) -> Codec:
    """The decoder that a manifest names. Raises SnapshotRefused for one that this version has not."""
    rung = RUNGS.get(name)
    if rung is None:
        raise refused(name[:40], "codec", f"unknown; this version has {', '.join(RUNGS)}")
    found = rung()
    if dict(params) != found.params():
        raise refused(name, "codec_params", f"this version reads {found.params()}")
    return found
