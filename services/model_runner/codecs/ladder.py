"""Takes the strongest rung whose self-test meets the fidelity that was asked for, and says what was measured.

The self-test: the context's last tokens are read a second time, once after the exact cache as it was before them and
once after the decoded one, and the two's distributions of the next token are compared. It is what a resumed
conversation will see, on its own text; it costs two short prefills and the encoding, and its time is in the
certificate. A certificate also has the rung's usual figures, which were measured elsewhere and are marked so.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from protocol import manifest
from services.model_runner import distributions
from services.model_runner.codecs import RUNGS
from services.model_runner.codecs.base import Array, Codec, block_layouts, block_planes, empty_layers
from services.model_runner.codecs.basis import NEAR, SMALL, Basis
from services.model_runner.codecs.exact_rows import recent_in
from services.model_runner.codecs.transform import Transform
from services.model_runner.engine import Engine, LayerSpec, LayerState, ModelSpec
from services.model_runner.positions import Positions, bitmaps_of, positions_of

TEST_TOKENS = 128
ReadAfter = Callable[[Sequence[LayerState], Sequence[int]], Array]
"""As ``read_after``, of some engine."""


class Fidelity(msgspec.Struct, frozen=True):
    """How close the next-token distributions are after a decoded cache to those after the exact one."""

    mean_kl: float
    """Nats a token, exact against decoded."""
    top1: float
    """Share of positions whose likeliest token is the same."""
    tokens: int
    """Positions compared."""
    took_s: float


class Usual(msgspec.Struct, frozen=True):
    """What a rung does as a rule: measured by `mindstream bench snapshot`, or by calibration on its own texts."""

    mean_kl: float
    top1: float
    ratio: float
    """Size against 16 bits a number."""
    measured_on: str


class Certificate(msgspec.Struct, frozen=True):
    """What is known of an encoded state's fidelity; goes into the manifest."""

    rung: str
    exact: bool
    """Whether every bit comes back: then there was nothing to measure."""
    measured: Fidelity | None
    """On this very state; None when the rung is exact, or the context too short to test."""
    usual: Usual | None
    """Of the rung, not of this state."""
    encode_s: float
    decode_s: float
    """Seconds that this node took for the whole state; ``decode_s`` is 0 when no test was run."""

    def for_manifest(self) -> manifest.Certificate | None:
        """As a manifest holds it: what was measured, else the rung's usual figures; none when exact."""
        if self.exact:
            return None
        if self.measured is not None:
            found = self.measured
            return manifest.Certificate(found.tokens, found.mean_kl, found.top1, ["mean_kl", "top1"])
        if self.usual is not None:
            return manifest.Certificate(0, self.usual.mean_kl, self.usual.top1, [])
        return manifest.Certificate(0, None, None, [])


@dataclass(frozen=True)
class Asked:
    """The fidelity that a rung must have."""

    most_kl: float = 0.02
    least_top1: float = 0.94


@dataclass(frozen=True)
class Chosen:
    """An encoded state."""

    codec: Codec
    blocks: list[bytes]
    """In the order of ``block_layouts``."""
    certificate: Certificate
    tried: list[Certificate]
    """Of the stronger rungs that did not meet what was asked."""


_ON = "SmolLM2-135M, bfloat16, two texts of 2,048 tokens"
USUAL = {
    "int8": Usual(mean_kl=0.00005, top1=0.995, ratio=1.94, measured_on=_ON),
    "rotated4": Usual(mean_kl=0.0035, top1=0.971, ratio=3.84, measured_on=_ON),
}
"""Of the rungs that need no basis; those of ``transform`` stand in the basis."""


def rungs(basis: Basis | None = None) -> list[tuple[Codec, Usual | None]]:
    """All rungs, the smallest first, as ``choose`` wants them; without ``transform`` where there is no basis."""
    found: list[tuple[Codec, Usual | None]] = []
    for level in (SMALL, NEAR):
        if basis is not None and level in basis.levels:
            row = basis.levels[level].row
            found.append((Transform(basis, level), Usual(row.mean_kl, row.top1, row.ratio, "texts held back")))
    for name in ("rotated4", "int8", "lossless", "raw"):
        found.append((RUNGS[name](), USUAL.get(name)))
    return found


def encode_blocks(
    codec: Codec, spec: ModelSpec, layers: Sequence[LayerState], workers: Executor | None = None
) -> list[bytes]:
    """All blocks of a cache, on the calling thread or on ``workers``."""
    seen = layers[0].seen_tokens
    layouts = block_layouts(spec, seen, bitmaps_of(positions_of(layers), seen))
    planes = [block_planes(layers, layout) for layout in layouts]
    recent = [recent_in(layout, seen) for layout in layouts]
    each = workers.map if workers is not None else map
    return list(each(codec.encode, planes, layouts, recent))


def decode_blocks(
    codec: Codec,
    spec: ModelSpec,
    blocks: Sequence[bytes | memoryview],
    seen_tokens: int,
    states: Sequence[tuple[Array, ...]] | None = None,
    workers: Executor | None = None,
    positions: Positions | None = None,
) -> list[LayerState]:
    """The cache whose blocks these are; ``states`` are those of each layer, which no block holds; ``positions`` what a
    pruned one holds.

    The caller must have checked ``seen_tokens`` against the model's context: arrays of that size are allocated.
    Raises SnapshotRefused.
    """
    layouts = block_layouts(spec, seen_tokens, bitmaps_of(positions, seen_tokens))
    if len(blocks) != len(layouts):
        raise ValueError(f"{len(blocks)} blocks for {len(layouts)} of {seen_tokens:,} tokens")
    whole = empty_layers(spec, seen_tokens, states, positions)
    into = [block_planes(whole, layout) for layout in layouts]
    each = workers.map if workers is not None else map
    for _ in each(codec.decode, blocks, layouts, into):
        pass
    return whole


def fidelity(
    engine: Engine,
    tokens: Sequence[int],
    exact: Sequence[LayerState],
    decoded: Sequence[LayerState],
    test_tokens: int = TEST_TOKENS,
) -> Fidelity | None:
    """Compare the two caches by reading the context's last tokens again after each.

    Args:
        tokens: those in the cache, without the pending one.
        exact: the cache itself.
        decoded: what a codec made of it.

    None when the model has recurrent layers, which cannot be taken back, or the context is too short. A sliding
    layer no longer has all that its window held then: what is missing is filled, alike in both caches, with other
    positions of it, so the comparison stands, though it is not quite the text's own distribution that is compared.
    """
    test = Test.of(engine, tokens, exact, test_tokens)
    return None if test is None else test.compare(decoded)


class Test:
    """The exact half of a self-test, computed once for all rungs."""

    __test__ = False  # for pytest
    _engine: Engine
    _read_after: ReadAfter
    _tokens: list[int]
    _start: int
    _expected: Array
    _took_s: float

    @classmethod
    def of(
        cls,
        engine: Engine,
        tokens: Sequence[int],
        exact: Sequence[LayerState],
        test_tokens: int = TEST_TOKENS,
        read: ReadAfter | None = None,
    ) -> Test | None:
        """None when it cannot be made, as ``fidelity`` says. ``read`` is the engine's, unless it is given."""
        seen = exact[0].seen_tokens
        count = min(test_tokens, seen // 2)
        if count < 1 or any(layer.kind == "recurrent" for layer in exact) or len(tokens) < seen:
            return None
        started_s = time.perf_counter()
        found = cls()
        found._engine = engine
        found._read_after = read or functools.partial(read_after, engine)
        found._start = seen - count
        found._tokens = [int(token) for token in tokens[found._start : seen]]
        found._expected = distributions.log_probabilities(found._read(exact))
        found._took_s = time.perf_counter() - started_s
        return found

    def compare(self, decoded: Sequence[LayerState]) -> Fidelity:
        """Of a decoded cache."""
        started_s = time.perf_counter()
        found = distributions.log_probabilities(self._read(decoded))
        mean_kl, top1 = distributions.compare(self._expected, found)
        took_s = self._took_s + time.perf_counter() - started_s
        return Fidelity(mean_kl, top1, len(found), took_s)

    def _read(self, layers: Sequence[LayerState]) -> Array:
        """Logits (tokens, vocabulary) of the last tokens, read after ``layers`` as they were before them."""
        before = [
            _earlier(state, own, self._start) for state, own in zip(layers, self._engine.spec.layers, strict=True)
        ]
        return self._read_after(before, self._tokens)


def read_after(engine: Engine, layers: Sequence[LayerState], tokens: Sequence[int]) -> Array:
    """Logits (tokens, vocabulary) after each of ``tokens``, read into a cache that holds ``layers``."""
    cache = engine.import_layers(layers, layers[0].seen_tokens + len(tokens))
    try:
        return engine.read(cache, tokens)
    finally:
        cache.close()


def choose(
    engine: Engine,
    tokens: Sequence[int],
    layers: Sequence[LayerState],
    rungs: Iterable[tuple[Codec, Usual | None]],
    asked: Asked | None = None,
    workers: Executor | None = None,
) -> Chosen:
    """Encode ``layers`` by the strongest rung that meets what is asked.

    Args:
        tokens: those in the cache.
        layers: copied out of the engine: they must not change meanwhile.
        rungs: the smallest first; the last should be exact, for it is taken whatever comes of the others.
        asked: ``Asked()`` by default.

    Raises ValueError when there are no rungs, or none of them is exact and none meets what is asked.
    """
    wanted = asked or Asked()
    test: Test | None = None
    tested = False
    tried: list[Certificate] = []
    for codec, usual in rungs:
        started_s = time.perf_counter()
        blocks = encode_blocks(codec, engine.spec, layers, workers)
        certificate = Certificate(codec.name, codec.exact, None, usual, time.perf_counter() - started_s, 0.0)
        if codec.exact:
            return Chosen(codec, blocks, certificate, tried)
        if not tested:
            test, tested = Test.of(engine, tokens, layers), True
        if test is None:
            # Nothing can be measured here: a lossy rung is as good as it usually is.
            if usual is not None and usual.mean_kl <= wanted.most_kl and usual.top1 >= wanted.least_top1:
                return Chosen(codec, blocks, certificate, tried)
            tried.append(certificate)
            continue
        started_s = time.perf_counter()
        seen, held = layers[0].seen_tokens, positions_of(layers)
        decoded = decode_blocks(codec, engine.spec, blocks, seen, workers=workers, positions=held)
        decode_s = time.perf_counter() - started_s
        measured = test.compare(decoded)
        certificate = msgspec.structs.replace(certificate, measured=measured, decode_s=decode_s)
        if measured.mean_kl <= wanted.most_kl and measured.top1 >= wanted.least_top1:
            return Chosen(codec, blocks, certificate, tried)
        tried.append(certificate)
    raise ValueError(f"none of {len(tried)} rungs meets {wanted}, and none is exact")


def _earlier(state: LayerState, own: LayerSpec, tokens: int) -> LayerState:
    """A layer as it was after its first ``tokens`` positions, filled where a window has moved on."""
    found = state.prefix(own, tokens)
    if found is not None:
        return found
    held, wanted = state.keys.shape[1], own.held_tokens(tokens)
    have = max(1, held - (state.seen_tokens - tokens))
    rows = np.arange(have - wanted, have) % have
    return replace(state, keys=state.keys[:, rows], values=state.values[:, rows], seen_tokens=tokens)
