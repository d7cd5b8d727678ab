"""`mindstream bench snapshot`: how small, faithful and fast snapshots are, against raw KV of 16 bits a number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.report import Figures, Progress, machine, silent, versions
from bench.snapshot import codecs, sealed
from protocol.errors import ConfigError
from services.model_runner.chat import ChatFormat
from services.model_runner.transformers_engine import TransformersEngine

PARTS = ("codecs", "sealed")
"""Each can be measured alone."""


@dataclass(frozen=True)
class Options:
    """What to measure, and on which model."""

    folder: Path
    """A model folder with safetensors weights."""
    bases: Path
    """Where a model's basis is kept between runs."""
    device: str = "cpu"
    dtype: str = "auto"
    threads: int = 0
    """0 is torch's own choice."""
    parts: Sequence[str] = PARTS
    quick: bool = False
    """Short texts: shows that it works, and its figures are no measurement."""


def run(options: Options, progress: Progress = silent) -> Figures:
    """Measure, telling ``progress`` a line now and then. Raises what the model runner raises."""
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        raise ConfigError(f"{unknown[0]!r} is none of {', '.join(PARTS)}", field="--only", reason="unknown part")
    progress(f"loading {options.folder.name}")
    engine = TransformersEngine.load(
        options.folder, device=options.device, dtype=options.dtype, threads=options.threads
    )
    chat = ChatFormat.load(options.folder)
    figures: Figures = {"model": engine.spec.name, "dtype": engine.spec.dtype, "threads": engine.fingerprint.threads}
    if "codecs" in options.parts:
        # A quick one is poor: it must not be taken for the model's in a later run.
        keep = options.bases / f"{engine.spec.name}{'-quick' if options.quick else ''}.basis"
        basis = codecs.basis_of(engine, chat, keep, progress, 3 if options.quick else 99)
        sizes = {"prefix_tokens": 96, "continuation_tokens": 32, "most_texts": 2} if options.quick else {}
        figures |= codecs.measure(engine, chat, basis, progress, **sizes)
        figures |= codecs.long_figures(engine, chat, basis, progress, 300 if options.quick else codecs.LONG_TOKENS)
    if "sealed" in options.parts:
        sizes = {"tokens": 300, "mutations": 100} if options.quick else {}
        figures |= sealed.measure(engine, chat, progress, **sizes)
    return figures | {
        "machine": machine(),
        "versions": versions("torch", "transformers", "numpy", "zstandard", "cryptography", "blake3"),
        "baseline": "keys and values at 16 bits a number; perplexity after the exact cache, same engine and schedule",
    }
