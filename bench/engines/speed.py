"""Tokens a second of every engine, prefill and decode, and the memory that each takes."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Sequence

from bench.engines.child import EngineProcess
from bench.engines.loading import Which
from bench.engines.options import CONTEXTS, CUDA_ENGINES, ENGINES, Options
from bench.report import Figures, Progress
from protocol.errors import ModelError

_LONG_PREFILL_TOKENS, _LONG_PREFILL_ROUNDS = 1024, 2
"""Long prompts take stock transformers minutes on a CPU without bfloat16 products, and vary little."""


def measure(
    engines: Sequence[Which], corpus: list[int], options: Options, progress: Progress, *, prefix: str = ""
) -> Figures:
    """Tokens a second and memory of the engines given."""
    figures: Figures = {}
    with contextlib.ExitStack() as stack:
        processes = []
        for which in engines:
            progress(f"loading {which.label}: {which.folder}")
            try:
                processes.append(stack.enter_context(EngineProcess(which)))
            except ModelError as error:
                progress(f"{which.label} is left out: {error}")
        for asked, context in zip(CONTEXTS, _contexts(options), strict=True):
            if context is None:
                continue
            figures |= _at(processes, corpus[:context], asked, options, progress, prefix)
        for process in processes:
            figures[f"{prefix}{process.label}_memory_mb"] = round(process.rss_bytes() / 1e6)
            figures[f"{prefix}{process.label}_what"] = process.versions
    return figures


def _contexts(options: Options) -> list[int | None]:
    """The length that stands for each of ``CONTEXTS``: itself, or in a quick run a short one; None: left out."""
    if not options.quick:
        return [context if context in options.contexts else None for context in CONTEXTS]
    short = iter(options.contexts)
    return [next(short) if context in (64, 1024, 4096) else None for context in CONTEXTS]


def _at(
    processes: Sequence[EngineProcess],
    prompt: list[int],
    context: int,
    options: Options,
    progress: Progress,
    prefix: str,
) -> Figures:
    figures: Figures = {}
    prefills: dict[str, list[float]] = {process.label: [] for process in processes}
    decodes: dict[str, list[float]] = {process.label: [] for process in processes}
    rounds = options.rounds if context < _LONG_PREFILL_TOKENS else min(options.rounds, _LONG_PREFILL_ROUNDS)
    for _ in range(rounds):
        for process in processes:
            prefills[process.label].append((len(prompt) - 1) / process.read(prompt))
    for number in range(options.rounds + 1):
        for process in processes:
            seconds, _ = process.decode(options.decoded)
            if number or options.quick:  # The first round warms up.
                decodes[process.label].append(options.decoded / seconds)
    for process in processes:
        label = process.label
        decode, prefill = statistics.median(decodes[label]), statistics.median(prefills[label])
        figures[f"{prefix}{label}_decode_{context}_tokens_per_s"] = round(decode, 2)
        if context >= 1024:
            figures[f"{prefix}{label}_prefill_{context}_tokens_per_s"] = round(prefill, 1)
        progress(
            f"{prefix}{label} after {len(prompt):,} tokens: {decode:.1f} tokens/s, prefill {prefill:,.0f} tokens/s"
        )
    return figures


def keys() -> list[str]:
    """Those that are always there; lengths between stand beside them where they were measured."""
    found = []
    for label in ENGINES:
        found += [f"{label}_decode_{context}_tokens_per_s" for context in (64, 1024, 4096)]
        found += [f"{label}_prefill_{context}_tokens_per_s" for context in (1024, 4096)]
        found.append(f"{label}_memory_mb")
    return found + [f"{label}_decode_{context}_tokens_per_s" for label in CUDA_ENGINES for context in (64, 4096)]


def ratios(figures: Figures) -> Figures:
    """onnx int8 against torch, at 64 and 4,096 tokens; None where one of them was not measured."""

    def ratio(context: int, baseline: str) -> float | None:
        ours = figures.get(f"onnx_int8_decode_{context}_tokens_per_s")
        theirs = figures.get(f"{baseline}_decode_{context}_tokens_per_s")
        if not isinstance(ours, float) or not isinstance(theirs, float):
            return None
        return round(ours / theirs, 3)

    return {
        "onnx_decode_ratio_vs_torch": ratio(64, "torch_stock"),
        "onnx_decode_4k_ratio_vs_torch": ratio(4096, "torch_stock"),
        "onnx_decode_ratio_vs_own_torch": ratio(64, "torch"),
        "onnx_decode_4k_ratio_vs_own_torch": ratio(4096, "torch"),
    }
