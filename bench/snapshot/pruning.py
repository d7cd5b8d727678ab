"""Pruners: size against fidelity, alone, with the codecs' rungs, and fitted together into a budget.

A text's first 2,048 tokens are read; its cache is pruned, or pruned and encoded, and handed back to the engine; then
256 tokens more are read after it and after the exact cache. Pruners look at the prefix alone. Names of the figures:
``prune_PRUNER_50`` keeps 50 % of the positions at 16 bits; ``prune_PRUNER_50+RUNG`` encodes what is left;
``budget_10x+PRUNER`` is what ``fit_budget`` makes of ten times, and ``budget_10x+PRUNER_took`` the pair that it took.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from bench.report import Figures
from bench.snapshot.codecs import Logits, compared
from bench.snapshot.frame import Bench
from bench.snapshot.texts import measured_texts
from services.model_runner.codecs import RUNGS
from services.model_runner.codecs.base import Codec
from services.model_runner.codecs.basis import NEAR
from services.model_runner.codecs.ladder import Test, decode_blocks, encode_blocks, rungs
from services.model_runner.codecs.transform import Transform
from services.model_runner.engine import Engine, LayerState
from services.model_runner.fitting import fit_budget, numbers_bytes
from services.model_runner.positions import Positions, positions_of, prune
from services.model_runner.pruning import PRUNERS, Seen, seen

PREFIX_TOKENS, CONTINUATION_TOKENS = 2_048, 256
KINDS = ("dialogue", "python", "essay", "narrative", "configuration")
"""Texts of ``measured_texts`` that are unlike each other; the first ones that are here and long enough are read."""
MOST_TEXTS = 3
SHARES = (0.7, 0.5, 0.25, 0.125)
WITH_RUNGS = (0.7, 0.5)
BUDGETS = (4, 10, 16, 20)
FITTED = ("window", "heavy")


class _Text(NamedTuple):
    layers: list[LayerState]
    continuation: list[int]
    answers: list[int]
    exact: Logits
    seen: Seen
    test: Test | None


@dataclass
class _Row:
    """What was measured of one way to make a cache smaller."""

    before_bytes: int = 0
    after_bytes: int = 0
    kl: list[float] = field(default_factory=list)
    top1: list[float] = field(default_factory=list)
    dppl_pct: list[float] = field(default_factory=list)
    tested_kl: list[float] = field(default_factory=list)
    """By the self-test, where there is one."""

    def figures(self, name: str) -> Figures:
        found: Figures = {
            f"{name}_ratio": round(self.before_bytes / max(1, self.after_bytes), 3),
            f"{name}_kl": round(statistics.mean(self.kl), 5),
            f"{name}_top1": round(statistics.mean(self.top1), 4),
            f"{name}_dppl_pct": round(statistics.mean(map(abs, self.dppl_pct)), 3),
            f"{name}_dppl_worst_pct": round(max(map(abs, self.dppl_pct)), 3),
        }
        if self.tested_kl:
            found[f"{name}_tested_kl"] = round(statistics.mean(self.tested_kl), 5)
        return found


def part(bench: Bench) -> Figures:
    """Of every pruner."""
    engine, quick = bench.engine, bench.quick
    prefix, continuation = (400, 32) if quick else (PREFIX_TOKENS, CONTINUATION_TOKENS)
    texts = measured_texts()
    basis = bench.basis
    ladder = rungs(basis)
    coded: dict[str, Codec] = {"int8": RUNGS["int8"](), "rotated4": RUNGS["rotated4"]()}
    if NEAR in basis.levels:
        coded["transform_near"] = Transform(basis, NEAR)
    rows: dict[str, _Row] = {}
    took: dict[str, Counter[str]] = {}
    read: list[str] = []
    for kind in KINDS:
        tokens = bench.chat.encode(texts.get(kind, ""), special=False)[: prefix + continuation + 1]
        if len(tokens) <= prefix + continuation or len(read) >= (1 if quick else MOST_TEXTS):
            continue
        text = _read(engine, tokens, prefix, bench.chat.piece)
        read.append(kind)
        for name in PRUNERS:
            for share in (0.5,) if quick else SHARES:
                kept = PRUNERS[name].keep(text.seen, round(share * prefix))
                pruned = prune(text.layers, kept)
                size = numbers_bytes(pruned)
                label = f"prune_{name}_{100 * share:g}"
                _measure(rows.setdefault(label, _Row()), engine, text, pruned, size)
                if name != "heavy" or share not in WITH_RUNGS:
                    continue
                for rung, codec in coded.items():
                    decoded, size = _coded(engine, codec, pruned)
                    _measure(rows.setdefault(f"{label}+{rung}", _Row()), engine, text, decoded, size)
        bench.progress(f"{kind}: pruned")
        for name in FITTED:
            for budget in (4,) if quick else BUDGETS:
                keep = _keeper(name, text.seen)
                best = fit_budget(engine.spec, text.layers, budget, ladder, keep, text.test).best
                smaller = text.layers if best.kept is None else prune(text.layers, best.kept)
                decoded, size = _coded(engine, best.codec, smaller)
                row = rows.setdefault(f"budget_{budget}x+{name}", _Row())
                _measure(row, engine, text, decoded, size)
                if best.fidelity is not None:
                    row.tested_kl.append(best.fidelity.mean_kl)
                took.setdefault(f"budget_{budget}x+{name}_took", Counter())[best.name] += 1
                bench.progress(f"{kind}: {budget}x by {name}: {best}")
    figures: Figures = {"pruning_texts": ", ".join(read), "pruning_prefix_tokens": prefix}
    for label, row in rows.items():
        figures |= row.figures(label)
        said = ", ".join(f"{key.removeprefix(f'{label}_')} {value}" for key, value in row.figures(label).items())
        bench.progress(f"{label}: {said}")
    return figures | {key: ", ".join(f"{name} {count}" for name, count in found.items()) for key, found in took.items()}


def _keeper(name: str, looked: Seen) -> Callable[[int], Positions]:
    return lambda count: PRUNERS[name].keep(looked, count)


def _read(engine: Engine, tokens: list[int], prefix: int, text_of: Callable[[int], str]) -> _Text:
    cache = engine.new_cache(prefix + 1)
    engine.prefill(cache, tokens[:prefix])
    held = engine.export_layers(cache)
    layers = [replace(layer, keys=layer.keys.copy(), values=layer.values.copy()) for layer in held]
    cache.close()
    continuation, answers = tokens[prefix:-1], tokens[prefix + 1 :]
    looked = seen(engine, tokens[:prefix], layers, [text_of(token) for token in tokens[:prefix]])
    test = Test.of(engine, tokens[:prefix], layers)
    return _Text(layers, continuation, answers, _continued(engine, layers, continuation), looked, test)


def _continued(engine: Engine, layers: Sequence[LayerState], tokens: list[int]) -> Logits:
    cache = engine.import_layers(layers, layers[0].seen_tokens + len(tokens))
    try:
        return engine.read(cache, tokens)
    finally:
        cache.close()


def _coded(engine: Engine, codec: Codec, layers: Sequence[LayerState]) -> tuple[list[LayerState], int]:
    blocks = encode_blocks(codec, engine.spec, layers)
    seen_tokens, positions = layers[0].seen_tokens, positions_of(layers)
    states = [layer.states for layer in layers]
    decoded = decode_blocks(codec, engine.spec, blocks, seen_tokens, states, positions=positions)
    return decoded, sum(map(len, blocks))


def _measure(row: _Row, engine: Engine, text: _Text, layers: Sequence[LayerState], size: int) -> None:
    found = _continued(engine, layers, text.continuation)
    nats, divergence, top1 = compared(text.exact, found, text.answers)
    row.before_bytes += numbers_bytes(text.layers)
    row.after_bytes += size
    row.kl.append(divergence)
    row.top1.append(top1)
    row.dppl_pct.append(100 * math.expm1(nats))
