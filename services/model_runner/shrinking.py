"""A copied state made smaller than by a codec alone: pruned as ``SnapshotWishes.prune`` says, or fitted into a budget.

Its certificate is of pruning and codec together, against the state as it was copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from protocol.errors import ModelError
from protocol.manifest import Certificate
from protocol.messages import SnapshotWishes
from services.model_runner.blocks import encode_part
from services.model_runner.codecs.base import block_layouts
from services.model_runner.codecs.ladder import Asked, Fidelity, ReadAfter, Test
from services.model_runner.encoding import AUTO, Encoded, Rung, Tried, decode, encode, falls_short
from services.model_runner.engine import NO_POSITIONS, Engine, LayerState
from services.model_runner.fitting import Fit, fit_budget
from services.model_runner.positions import Positions, positions_of, prune
from services.model_runner.pruning import PRUNERS, Heavy, Pruner, PruneWish, Seen, Window, read_wish
from services.model_runner.snapshot import Copied, layers_of, with_layers

Look = Callable[[Sequence[LayerState], frozenset[str]], Seen]
"""What a pruner that needs these sees of the state (``pruning.look``)."""
RungsOf = Callable[[str], Sequence[Rung]]
"""The rungs to be tried for a codec's name (``encoding.wanted_rungs``)."""


class Shrunk(NamedTuple):
    """A smaller state, encoded."""

    copied: Copied
    encoded: Encoded | None
    """None where the parts are encoded while they are written."""
    statement: dict[str, Any]
    """What its provenance says of it: positions kept and how many there were, and by whom; empty when none went."""


def shrink(
    engine: Engine,
    copied: Copied,
    wishes: SnapshotWishes,
    rungs_of: RungsOf,
    look: Look,
    read: ReadAfter | None = None,
    *,
    against: str = "",
    inherited: Certificate | None = None,
) -> Shrunk:
    """Prune ``copied`` and encode what is left, as ``wishes`` ask; it asks for either ``prune`` or ``budget_ratio``.

    Args:
        read: for self-tests, as ``encoding.encode``; ``against`` and ``inherited`` are its as well.

    Raises ModelError for wishes that cannot be met.
    """
    wish = read_wish(wishes.prune) if wishes.prune else None
    if wish is not None and not engine.explicit_positions:
        raise _no_positions(copied, engine)
    whole = layers_of(copied)
    test = Test.of(engine, copied.tokens[:-1], whole, read=read)
    pruner = wish.pruner if wish is not None else _best(engine)
    seen: Seen | None = None

    def keep(count: int, held: Positions | None) -> Positions:
        nonlocal pruner, seen
        if seen is None:
            seen = look(whole, pruner.needs)
            if wish is None and "attention" in pruner.needs and seen.attention is None:
                pruner = Window()  # a budget is met by what can be had
        return pruner.keep(seen, count, held)

    layers = whole
    if wish is not None:
        held = positions_of(whole)
        layers = prune(whole, keep(wish.count(len(copied.tokens) - 1 if held is None else len(held)), held))
    if wishes.budget_ratio:
        candidates = rungs_of(AUTO if wishes.codec == "raw" else wishes.codec)
        limit = positions_of(layers)
        fitted = fit_budget(
            engine.spec,
            layers,
            wishes.budget_ratio,
            candidates,
            lambda count: keep(count, limit),
            test,
            prunes=engine.explicit_positions,
            whole=whole,
        )
        best = fitted.best
        _check_faithful(copied, best, wishes)
        layers = layers if best.kept is None else prune(layers, best.kept)
        pruned = with_layers(copied, layers)
        layouts = block_layouts(engine.spec, len(copied.tokens) - 1, pruned.kept)
        parts = {part.place: encode_part(best.codec, engine.spec, part, layouts) for part in pruned.parts}
        certificate = inherited if best.exact and wish is None else _certificate(best.fidelity, against, best)
        tried = [Tried(each.name, str(each)) for each in fitted.tried]
        encoded = Encoded(best.codec, parts, certificate, tried)
    else:
        pruned = with_layers(copied, layers)
        asked = Asked(wishes.most_kl, wishes.least_top1)
        encoded = encode(engine, pruned, rungs_of(wishes.codec), asked, read, against=against, inherited=inherited)
        if pruned.kept:
            # The rung was asked to be faithful to what is left; what is certified is what the whole has lost.
            found = test.compare(decode(pruned, encoded.codec, encoded.parts)) if test is not None else None
            encoded = encoded._replace(certificate=_certificate(found, against))
    return Shrunk(pruned, encoded, _statement(whole, layers, wish, pruner))


def _check_faithful(copied: Copied, best: Fit, wishes: SnapshotWishes) -> None:
    """Raises ModelError where the most faithful pair is less so than asked."""
    figures = best.fidelity or best.usual
    kl, top1 = (figures.mean_kl, figures.top1) if figures else (None, None)
    short = "" if best.exact else falls_short(kl, top1, Asked(wishes.most_kl, wishes.least_top1))
    if short:
        raise ModelError(
            f"saving {copied.conversation} {wishes.budget_ratio:g} times smaller: the most faithful way ({best}) is "
            f"less so than asked: {short}",
            hint="ask for less, of size or of fidelity; where there is no basis for the smallest codec, "
            "`mindstream snapshot calibrate` makes one",
            field="wishes.budget_ratio",
            reason="not faithful enough",
        )


def _best(engine: Engine) -> Pruner:
    """For a budget, where no pruner is named."""
    return PRUNERS[Heavy.name if engine.explicit_positions else Window.name]


def _statement(
    whole: Sequence[LayerState], layers: Sequence[LayerState], wish: PruneWish | None, pruner: Pruner
) -> dict[str, Any]:
    before, after = positions_of(whole), positions_of(layers)
    if after is None or (before is not None and len(before) == len(after)):
        return {}
    by = wish.pruner.name if wish is not None else pruner.name
    return {"kept": len(after), "of": layers[0].seen_tokens, "by": by}


def _certificate(found: Fidelity | None, against: str, fit: Fit | None = None) -> Certificate:
    figures = found or (fit.usual if fit else None)
    return Certificate(
        tested_tokens=found.tokens if found else 0,
        mean_kl=figures.mean_kl if figures else None,
        top1=figures.top1 if figures else None,
        measured=["mean_kl", "top1"] if found else [],
        usual_on=fit.usual.measured_on if fit and fit.usual and not found else "",
        against=against,
        encode_ms=fit.encode_s * 1000 if fit else 0.0,
        decode_ms=fit.decode_s * 1000 if fit else 0.0,
        test_ms=found.took_s * 1000 if found else 0.0,
    )


def _no_positions(copied: Copied, engine: Engine) -> ModelError:
    return ModelError(
        f"pruning {copied.conversation} with {engine.fingerprint.engine}: what is left could not be tested or resumed "
        f"here: {NO_POSITIONS}",
        hint="leave `prune` out: a budget is then met by codecs alone; or prune on a node with the engine transformers",
        field="wishes.prune",
        reason="no explicit positions",
    )
