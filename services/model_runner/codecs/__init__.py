"""The ladder of KV codecs: one module a rung, one interface (``base.Codec``), and the table of them.

A rung turns one block of at most 256 tokens into bytes and back; it knows nothing of manifests, keys or the bus. From
the largest to the smallest: ``raw``, ``lossless``, ``int8``, ``rotated4``, and ``transform``, which needs the model's
basis. ``ladder`` takes the strongest that is faithful enough; ``calibrate`` makes a basis, and alone needs torch.
"""

from __future__ import annotations

from collections.abc import Callable

from protocol.layout import CodecRef
from services.model_runner.codecs.base import Codec, refused
from services.model_runner.codecs.basis import Basis
from services.model_runner.codecs.int8 import Int8
from services.model_runner.codecs.lossless import Lossless
from services.model_runner.codecs.raw import Raw
from services.model_runner.codecs.rotated4 import Rotated4
from services.model_runner.codecs.transform import Transform

RUNGS: dict[str, Callable[[], Codec]] = {rung.name: rung for rung in (Raw, Lossless, Int8, Rotated4)}
"""Those that need no basis, by name, the largest first."""


def codec(ref: CodecRef, basis: Basis | None = None) -> Codec:
    """The decoder that a manifest names.

    Args:
        basis: of the model, for ``transform``: the one whose digest is in its parameters (``basis_digest``).

    Raises SnapshotRefused for a rung, a version or a basis that is not here.
    """
    found: Codec
    name = ref.name[:40]
    if name == Transform.name:
        level = ref.params.get("level")
        if basis is None or basis.digest != basis_digest(ref):
            raise refused(name, "codec.params.basis", "this node has not that basis of the model")
        if not isinstance(level, str) or level not in basis.levels:
            raise refused(name, "codec.params.level", f"the basis has {', '.join(basis.levels)}")
        found = Transform(basis, level)
    elif name in RUNGS:
        found = RUNGS[name]()
    else:
        raise refused(name, "codec.name", f"unknown; this node has {', '.join([*RUNGS, Transform.name])}")
    if ref.version != found.version:
        raise refused(name, "codec.version", f"{ref.version}, this node reads {found.version}")
    if ref.params != found.params():
        raise refused(name, "codec.params", f"this node reads {found.params()}")
    return found


def basis_digest(ref: CodecRef) -> bytes:
    """Of the basis that a manifest's codec needs; empty when none."""
    found = ref.params.get("basis", b"")
    return found if isinstance(found, bytes) else b""
