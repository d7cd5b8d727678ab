"""Which rung of the ladder a copied state is encoded by, and its certificate.

Every part of a snapshot is encoded by itself, as it is then stored. What a lossy rung costs is measured on the decoded
parts: the context's last tokens are read again, after the copied cache and after the decoded one
(``codecs.ladder.Test``).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from protocol.errors import ModelError
from protocol.layout import PartPlace
from protocol.manifest import Certificate
from services.model_runner.blocks import Assembly, encode_part
from services.model_runner.codecs.base import Codec, block_layouts
from services.model_runner.codecs.basis import Basis
from services.model_runner.codecs.ladder import Asked, Fidelity, ReadAfter, Test, Usual, rungs
from services.model_runner.codecs.transform import Transform
from services.model_runner.engine import Engine, LayerState
from services.model_runner.snapshot import Copied, layers_of

AUTO = "auto"
"""The strongest rung whose self-test meets what is asked."""

Rung = tuple[Codec, Usual | None]


class Tried(NamedTuple):
    """A rung that was not taken."""

    rung: str
    reason: str


class Encoded(NamedTuple):
    """A copied state's parts, to be sealed."""

    codec: Codec
    parts: dict[PartPlace, memoryview]
    certificate: Certificate | None
    """None where the rung is exact."""
    tried: list[Tried]


NO_BASIS = Tried(
    Transform.name, "this node has no basis of the model: `mindstream snapshot calibrate` makes one, or fetches it"
)


def wanted_rungs(name: str, basis: Basis | None) -> list[Rung]:
    """Those to be tried for ``name``, the smallest first: all of them for ``auto``. Raises ModelError."""
    known = rungs(basis)
    found = [rung for rung in known if name in (AUTO, rung[0].name)]
    if not found:
        needs = name == Transform.name
        raise ModelError(
            f"saving with the codec {name[:40]!r}: "
            + (
                "this node has no basis of the model that a trusted node has signed"
                if needs
                else "there is none of that name here"
            ),
            hint="`mindstream snapshot calibrate` makes one, with --from NODE it fetches that node's"
            if needs
            else f"use {AUTO}, tokens, {_names(known)}",
            field="codec",
            reason="no basis" if needs else "unknown codec",
        )
    return found


def _names(known: Sequence[Rung]) -> str:
    return ", ".join(dict.fromkeys(codec.name for codec, _ in known))


def _label(codec: Codec) -> str:
    return f"{codec.name} ({codec.level.row.name})" if isinstance(codec, Transform) else codec.name


def encode(
    engine: Engine,
    copied: Copied,
    candidates: Sequence[Rung],
    asked: Asked | None,
    read: ReadAfter | None = None,
    *,
    against: str = "",
    inherited: Certificate | None = None,
    tested: bool = True,
) -> Encoded:
    """Encode all parts of ``copied`` by the first of ``candidates`` that is exact, or whose self-test meets ``asked``.

    Args:
        engine: that computed the state; used for the self-test alone, by ``read`` where that is given.
        candidates: the smallest first; ``raw`` can do without this.
        asked: None: whatever the self-test measures.
        against: the codec of the KV in ``copied``, where that is not exact.
        inherited: the certificate of that KV: an exact rung keeps it.
        tested: whether the self-test is made; else the rung's usual figures decide.

    Raises ModelError when no rung will do.
    """
    layouts = block_layouts(engine.spec, len(copied.tokens) - 1, copied.kept)
    test: Test | None = None
    untested = "" if tested else "no test was asked for"
    tried: list[Tried] = []
    encode_s = decode_s = 0.0
    for codec, usual in candidates:
        started_s = time.perf_counter()
        parts = {part.place: encode_part(codec, engine.spec, part, layouts) for part in copied.parts}
        encode_s += time.perf_counter() - started_s
        if codec.exact:
            return Encoded(codec, parts, inherited, tried)
        if test is None and not untested:
            try:
                test = Test.of(engine, copied.tokens[:-1], layers_of(copied), read=read)
                untested = "" if test else "the context is too short, or recurrent: nothing can be measured"
            except ModelError as error:
                untested = error.message
        found: Fidelity | None = None
        if test is not None:
            started_s = time.perf_counter()
            decoded = decode(copied, codec, parts)
            decode_s += time.perf_counter() - started_s
            found = test.compare(decoded)
            del decoded
        kl, top1 = (found.mean_kl, found.top1) if found else (usual.mean_kl, usual.top1) if usual else (None, None)
        reason = falls_short(kl, top1, asked)
        if not reason:
            certificate = Certificate(
                tested_tokens=found.tokens if found else 0,
                mean_kl=kl,
                top1=top1,
                measured=["mean_kl", "top1"] if found else [],
                usual_on=usual.measured_on if usual and not found else "",
                against=against,
                encode_ms=encode_s * 1000,
                decode_ms=decode_s * 1000,
                test_ms=found.took_s * 1000 if found else 0.0,
            )
            return Encoded(codec, parts, certificate, tried)
        tried.append(Tried(_label(codec), f"{reason}{f' ({untested})' if untested else ''}"))
    said = "; ".join(f"{each.rung}: {each.reason}" for each in tried)
    raise ModelError(
        f"saving {copied.conversation}: no codec that may be used is as faithful as asked: {said}",
        hint="ask for less, or for a rung that is exact: raw, lossless",
        field="most_kl",
        reason="not faithful enough",
    )


def falls_short(kl: float | None, top1: float | None, asked: Asked | None) -> str:
    """Why figures do not meet what is asked; empty when they do."""
    if asked is None:
        return ""
    if kl is None or top1 is None:
        return "nothing is known of its fidelity"
    if kl > asked.most_kl:
        return f"mean KL {kl:.4f} nats, {asked.most_kl:g} at most"
    return "" if top1 >= asked.least_top1 else f"top-1 agreement {top1:.3f}, {asked.least_top1:g} at least"


def decode(copied: Copied, codec: Codec, parts: dict[PartPlace, memoryview]) -> list[LayerState]:
    """What ``parts`` decode to, as whole layers. Raises SnapshotRefused."""
    assembly = Assembly(copied.spec, len(copied.tokens) - 1, copied.kept)
    for part in copied.parts:
        if part.place.kind != "logits":
            assembly.decode(part.place, parts[part.place], codec)
    return assembly.layers()
