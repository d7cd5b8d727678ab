"""Every rung of the codec ladder, and the usual file formats, on one table: size, fidelity and speed.

A text's first 2,048 tokens are read, their keys and values encoded to a real file, read back, decoded and handed to the
engine; then 512 tokens more are read after the decoded cache and after the exact one, and perplexity, divergence and
the likeliest token are compared. Sizes are those of the files, against 16 bits a number; the model's basis, which is
fetched once, stands by itself (``basis_mb``).
"""

from __future__ import annotations

import gzip
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.report import Figures, Progress
from bench.snapshot.frame import Bench
from bench.snapshot.texts import measured_texts
from protocol.errors import MindstreamError
from services.model_runner import distributions
from services.model_runner.bases import find_basis
from services.model_runner.calibration import calibrated
from services.model_runner.chat import ChatFormat
from services.model_runner.codecs import RUNGS
from services.model_runner.codecs.base import Codec
from services.model_runner.codecs.basis import NEAR, Basis, read_basis
from services.model_runner.codecs.ladder import decode_blocks, encode_blocks
from services.model_runner.codecs.transform import Transform
from services.model_runner.engine import Engine, LayerState
from services.model_runner.transformers_engine import TransformersEngine

PREFIX_TOKENS, CONTINUATION_TOKENS = 2_048, 512
LONG_TOKENS = 4_096
LEAST_TEXTS = 8
_SPEED_ROUNDS = 3

Logits = npt.NDArray[np.float32]


@dataclass
class _Row:
    """What was measured of one rung."""

    raw_bytes: int = 0
    file_bytes: int = 0
    dppl_pct: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    top1: list[float] = field(default_factory=list)
    exact: bool = True
    encode_s: list[float] = field(default_factory=list)
    restore_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class _Text:
    """One text, read once."""

    kind: str
    answers: list[int]
    """The tokens that the continuation's logits are about."""
    continuation: list[int]
    layers: list[LayerState]
    exact: Logits


def part(bench: Bench) -> Figures:
    """Of every rung on files, and how long each takes to decode a long context."""
    engine, chat, progress = bench.engine, bench.chat, bench.progress
    sizes: dict[str, Any] = {"prefix_tokens": 96, "continuation_tokens": 32, "most_texts": 2} if bench.quick else {}
    figures = measure(engine, chat, bench.basis, progress, **sizes)
    return figures | long_figures(engine, chat, bench.basis, progress, 300 if bench.quick else LONG_TOKENS)


def basis_of(
    engine: TransformersEngine, chat: ChatFormat, keep: Path, progress: Progress, quick: bool = False
) -> Basis:
    """The model's basis: the one that `mindstream snapshot calibrate` made; else the file in ``keep``, which is made
    now when it is absent or of other weights. A quick one is poor, and always in ``keep``."""
    basis = find_basis(engine.spec) if not quick else None
    if basis is not None and basis.file.digests == engine.spec.digests:
        progress(f"the basis is {basis.digest.hex()[:12]}, from {basis.file.tokens:,} tokens")
        return basis
    if keep.is_file():
        try:
            found = read_basis(keep.read_bytes(), engine.spec)
            if found.file.digests == engine.spec.digests:
                return found
        except MindstreamError as error:
            progress(f"{keep.name} is made again: {error}")
    data = calibrated(engine, chat, 3 if quick else 99, progress)
    keep.parent.mkdir(parents=True, exist_ok=True)
    keep.write_bytes(data)
    return read_basis(data, engine.spec)


def measure(
    engine: Engine,
    chat: ChatFormat,
    basis: Basis | None,
    progress: Progress,
    *,
    prefix_tokens: int = PREFIX_TOKENS,
    continuation_tokens: int = CONTINUATION_TOKENS,
    most_texts: int = 99,
    source: Callable[[], dict[str, str]] = measured_texts,
) -> Figures:
    """The table, as figures; ``{rung}_…`` each."""
    texts = _texts(engine, chat, source(), prefix_tokens, continuation_tokens, most_texts, progress)
    rungs: dict[str, Codec] = {name: rung() for name, rung in RUNGS.items()}
    if basis is not None:
        rungs |= {f"transform_{level}": Transform(basis, level) for level in basis.levels}
    rows = {}
    with tempfile.TemporaryDirectory(prefix="mindstream-bench-") as scratch, _workers() as workers:
        for name, rung in rungs.items():
            rows[name] = _measure(engine, rung, texts, Path(scratch) / "blocks", workers)
            progress(f"{name}: {_line(rows[name])}")
        formats = _formats(texts, Path(scratch))
    figures: Figures = {"codec_texts": ", ".join(text.kind for text in texts), "codec_texts_count": len(texts)}
    for name, row in rows.items():
        figures |= _figures(name, row)
    figures |= formats
    figures |= _summary(figures, basis)
    return figures


def long_figures(
    engine: Engine, chat: ChatFormat, basis: Basis | None, progress: Progress, tokens: int = LONG_TOKENS
) -> Figures:
    """Seconds that a context of 4,096 tokens takes to decode by each rung, and to read again by this engine."""
    corpus = chat.encode("\n\n".join(measured_texts().values()), special=False)[:tokens]
    cache = engine.new_cache(len(corpus) + 1)
    started_s = time.perf_counter()
    engine.prefill(cache, corpus)
    figures: Figures = {"prefill_4k_s": round(time.perf_counter() - started_s, 3)}
    layers = _copied(engine.export_layers(cache))
    cache.close()
    rungs: dict[str, Codec] = {name: rung() for name, rung in RUNGS.items()}
    if basis is not None:
        rungs["transform_near"] = Transform(basis, NEAR)
    for name, rung in rungs.items():
        with _workers() as workers:
            blocks = encode_blocks(rung, engine.spec, layers, workers)
            took = [
                _timed(lambda: decode_blocks(rung, engine.spec, blocks, len(corpus), workers=workers))  # noqa: B023 - called at once
                for _ in range(_SPEED_ROUNDS)
            ]
        figures[f"{name}_decode_4k_s"] = round(statistics.median(took), 3)
        progress(f"{name}: decoding {len(corpus):,} tokens {figures[f'{name}_decode_4k_s']} s")
    return figures


def _texts(
    engine: Engine,
    chat: ChatFormat,
    source: dict[str, str],
    prefix_tokens: int,
    continuation_tokens: int,
    most: int,
    progress: Progress,
) -> list[_Text]:
    found = []
    for kind, text in source.items():
        tokens = chat.encode(text, special=False)[: prefix_tokens + continuation_tokens]
        if len(tokens) < prefix_tokens + continuation_tokens:
            progress(f"{kind} is left out: {len(tokens):,} tokens")
            continue
        progress(f"reading {kind}")
        cache = engine.new_cache(prefix_tokens + 1)
        engine.prefill(cache, tokens[:prefix_tokens])
        layers = _copied(engine.export_layers(cache))
        cache.close()
        continuation, answers = tokens[prefix_tokens:-1], tokens[prefix_tokens + 1 :]
        found.append(_Text(kind, answers, continuation, layers, _continued(engine, layers, continuation)))
        if len(found) == most:
            break
    return found


def _workers() -> ThreadPoolExecutor:
    """A block each, as many at a time as there are cores."""
    return ThreadPoolExecutor(os.cpu_count() or 1, "codec")


def _measure(engine: Engine, rung: Codec, texts: Sequence[_Text], folder: Path, workers: Executor) -> _Row:
    row = _Row()
    for text in texts:
        seen = text.layers[0].seen_tokens
        started_s = time.perf_counter()
        blocks = encode_blocks(rung, engine.spec, text.layers, workers)
        row.encode_s.append(time.perf_counter() - started_s)
        folder.mkdir(exist_ok=True)
        for number, block in enumerate(blocks):
            (folder / str(number)).write_bytes(block)
        row.file_bytes += sum((folder / str(number)).stat().st_size for number in range(len(blocks)))
        row.raw_bytes += _raw_bytes(text.layers)
        started_s = time.perf_counter()
        read = [(folder / str(number)).read_bytes() for number in range(len(blocks))]
        states = [layer.states for layer in text.layers]
        decoded = decode_blocks(rung, engine.spec, read, seen, states, workers=workers)
        row.restore_s.append(time.perf_counter() - started_s)
        same = all(
            one.tobytes() == other.tobytes()
            for own, theirs in zip(text.layers, decoded, strict=True)
            for one, other in zip(own.planes, theirs.planes, strict=True)
        )
        row.exact = row.exact and same
        found = _continued(engine, decoded, text.continuation) if not same else text.exact
        nats, divergence, top1 = compared(text.exact, found, text.answers)
        row.dppl_pct.append(100 * float(np.expm1(nats)))
        row.kl.append(divergence)
        row.top1.append(top1)
    return row


def compared(exact: Logits, found: Logits, answers: Sequence[int]) -> tuple[float, float, float]:
    """Nats a token more than exact, mean divergence, and the share of equal likeliest tokens."""
    expected, other = (distributions.log_probabilities(each) for each in (exact, found))
    rows = np.arange(len(answers))
    nats = float((expected[rows, answers] - other[rows, answers]).mean())
    return nats, *distributions.compare(expected, other)


def _continued(engine: Engine, layers: Sequence[LayerState], tokens: list[int]) -> Logits:
    cache = engine.import_layers(layers, layers[0].seen_tokens + len(tokens))
    try:
        return engine.read(cache, tokens)
    finally:
        cache.close()


def _copied(layers: Sequence[LayerState]) -> list[LayerState]:
    return [
        replace(
            layer,
            keys=layer.keys.copy(),
            values=layer.values.copy(),
            states=tuple(state.copy() for state in layer.states),
        )
        for layer in layers
    ]


def _raw_bytes(layers: Sequence[LayerState]) -> int:
    """At 16 bits a number."""
    return sum(2 * plane.size for layer in layers for plane in (layer.keys, layer.values))


def _figures(name: str, row: _Row) -> Figures:
    gigabytes = row.raw_bytes / 1e9
    return {
        f"{name}_ratio": round(row.raw_bytes / max(1, row.file_bytes), 3),
        f"{name}_exact": float(row.exact),
        f"{name}_dppl_pct": round(statistics.mean(map(abs, row.dppl_pct)), 3),
        f"{name}_dppl_worst_pct": round(max(map(abs, row.dppl_pct)), 3),
        f"{name}_kl": round(statistics.mean(row.kl), 5),
        f"{name}_top1": round(statistics.mean(row.top1), 4),
        f"{name}_encode_s_per_gb": round(sum(row.encode_s) / gigabytes, 2),
        f"{name}_restore_s_per_gb": round(sum(row.restore_s) / gigabytes, 2),
        f"{name}_encode_restore_s_per_gb": round((sum(row.encode_s) + sum(row.restore_s)) / gigabytes, 2),
    }


def _summary(figures: Figures, basis: Basis | None) -> Figures:
    """The figures that stand for the ladder: null where a level misses its fidelity, or texts are too few."""
    found: Figures = dict.fromkeys(("near_lossless_ratio", "kl_at_near_lossless", "top1_at_near_lossless"))
    found |= {"ratio_at_5pct": None, "near_lossless_rung": None, "near_lossless_top1_94_ratio": None}
    found["basis_mb"] = round(basis.size_bytes / 1e6, 3) if basis is not None else None
    enough = int(figures["codec_texts_count"] or 0) >= LEAST_TEXTS
    ratios: list[tuple[float, str]] = []
    agreeing, at_5pct = [], []
    transforms = [f"transform_{level}" for level in basis.levels] if basis is not None else []
    for name in ("lossless", "int8", "rotated4", *transforms):
        values = [figures.get(f"{name}_{each}") for each in ("ratio", "dppl_pct", "dppl_worst_pct", "top1")]
        if None in values:
            continue
        ratio, mean, worst, top1 = (float(value) for value in values if value is not None)
        if mean <= 1 and worst <= 2.5:
            ratios.append((ratio, name))
            if top1 >= 0.94:
                agreeing.append(ratio)
        if mean <= 5:
            at_5pct.append(ratio)
    if enough and ratios:
        ratio, name = max(ratios)
        found |= {
            "near_lossless_ratio": ratio,
            "near_lossless_rung": name,
            "kl_at_near_lossless": figures[f"{name}_kl"],
            "top1_at_near_lossless": figures[f"{name}_top1"],
        }
    if enough and agreeing:
        found["near_lossless_top1_94_ratio"] = max(agreeing)
    if enough and at_5pct:
        found["ratio_at_5pct"] = max(at_5pct)
    return found


def _formats(texts: Sequence[_Text], scratch: Path) -> Figures:
    """What the usual ways to write arrays make of the first text. torch.save is written only: nothing is unpickled."""
    import torch
    import zstandard
    from safetensors.numpy import load_file, save_file

    text = texts[0]
    arrays = {
        f"{at}.{name}": np.ascontiguousarray(array)
        for at, layer in enumerate(text.layers)
        for name, array in (("keys", layer.keys), ("values", layer.values))
    }
    raw = _raw_bytes(text.layers)
    plain = scratch / "plain.safetensors"
    save_file(arrays, plain)

    def saved_by_torch(path: Path) -> None:
        signed = {
            name: torch.from_numpy(array.view(np.int16 if array.itemsize == 2 else np.int32))
            for name, array in arrays.items()
        }
        torch.save(signed, path)

    formats: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any] | None]] = {
        "torch_save": (saved_by_torch, None),
        "safetensors": (lambda path: save_file(arrays, path), load_file),
        "gzip": (
            lambda path: path.write_bytes(gzip.compress(plain.read_bytes(), 6)),
            lambda path: gzip.decompress(path.read_bytes()),
        ),
        "zstd": (
            lambda path: path.write_bytes(zstandard.ZstdCompressor(level=3).compress(plain.read_bytes())),
            lambda path: zstandard.ZstdDecompressor().decompress(path.read_bytes()),
        ),
    }
    figures: Figures = {}
    for name, (write, read) in formats.items():
        path = scratch / name
        took_s = _timed(lambda: write(path))  # noqa: B023 - called at once
        figures[f"{name}_ratio"] = round(raw / path.stat().st_size, 3)
        figures[f"{name}_encode_s_per_gb"] = round(took_s / (raw / 1e9), 2)
        if read is not None:
            figures[f"{name}_restore_s_per_gb"] = round(_timed(lambda: read(path)) / (raw / 1e9), 2)  # noqa: B023
    return figures


def _timed(call: Callable[[], Any]) -> float:
    started_s = time.perf_counter()
    call()
    return time.perf_counter() - started_s


def _line(row: _Row) -> str:
    figures = _figures("", row)
    return ", ".join(f"{name.strip('_')} {value}" for name, value in figures.items())
