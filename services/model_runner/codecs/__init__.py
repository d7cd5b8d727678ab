"""The ladder of KV codecs: one module a rung, one interface (``base.Codec``), and the table of them.

A rung turns one block of at most 256 tokens into bytes and back; it knows nothing of manifests, keys or the bus. From
the largest to the smallest: ``raw``, ``lossless``, ``int8``, ``rotated4``, and ``transform``, which needs the model's
basis. ``ladder`` takes the strongest that is faithful enough; ``calibrate`` makes a basis, and alone needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from services.model_runner.codecs.base import Codec, refused
from services.model_runner.codecs.basis import Basis
from services.model_runner.codecs.int8 import Int8
from services.model_runner.codecs.lossless import Lossless
from services.model_runner.codecs.raw import Raw
from services.model_runner.codecs.rotated4 import Rotated4
from services.model_runner.codecs.transform import Transform

RUNGS: dict[str, Callable[[], Codec]] = {rung.name: rung for rung in (Raw, Lossless, Int8, Rotated4)}
"""Those that need no basis, by name, the largest first."""


def codec(name: str, params: Mapping[str, Any], basis: Basis | None = None) -> Codec:
    """The decoder that a manifest names.

    Args:
        basis: of the model, for ``transform``: the one whose digest is in ``params`` (``basis_digest``).

    Raises SnapshotRefused for a rung, a version or a basis that is not here.
    """
    found: Codec
    if name == Transform.name:
        level = params.get("level")
        if basis is None or basis.digest != basis_digest(params):
            raise refused(name, "codec_params.basis", "this node has not that basis of the model")
        if not isinstance(level, str) or level not in basis.levels:
            raise refused(name, "codec_params.level", f"the basis has {', '.join(basis.levels)}")
        found = Transform(basis, level)
    elif name in RUNGS:
        found = RUNGS[name]()
    else:
        raise refused(name[:40], "codec", f"unknown; this version has {', '.join([*RUNGS, Transform.name])}")
    if dict(params) != found.params():
        raise refused(name, "codec_params", f"this version reads {found.params()}")
    return found


def basis_digest(params: Mapping[str, Any]) -> bytes:
    """Of the basis that a manifest's codec needs; empty when none."""
    found = params.get("basis", b"")
    return found if isinstance(found, bytes) else b""
