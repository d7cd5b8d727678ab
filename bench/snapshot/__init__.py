"""`mindstream bench snapshot`: how small, faithful and fast snapshots are, against raw KV of 16 bits a number.

A part is a module of this package with a function ``part(bench: Bench) -> Figures``, and a row of ``PARTS``.
"""

from __future__ import annotations

import importlib
import time
import traceback

from bench.report import Figures, Progress, machine, silent, versions
from bench.snapshot.frame import Bench as Bench
from bench.snapshot.frame import Options as Options
from bench.snapshot.wanted import rows as wanted_rows
from protocol.errors import ConfigError, MindstreamError

__all__ = ["PARTS", "Bench", "Options", "run", "wanted_rows"]

PARTS: dict[str, tuple[str, ...]] = {
    "exact": ("exact_token_match", "exact_logit_match"),
    "codecs": (
        "lossless_ratio",
        "near_lossless_ratio",
        "kl_at_near_lossless",
        "top1_at_near_lossless",
        "ratio_at_5pct",
        "basis_mb",
    ),
    "pruning": (),
    "sealed": ("encode_restore_s_per_gb",),
    "handoff": ("ttft_speedup_4k_disk", "ttft_speedup_4k_bus", "handoff_p95_over_recompute"),
    "mutations": ("mutations", "mutations_refused"),
    "variants": ("variant_speedup", "variant_kl"),
    "pool": (),
    "mailbox": ("mailbox_handles_per_s", "mailbox_gb_per_s"),
}
"""In this order; each can be measured alone, and the figures of ``wanted.WANTED`` that it owes are null when it
fails."""


def run(options: Options, progress: Progress = silent) -> Figures:
    """Measure, telling ``progress`` a line now and then.

    A part that fails says so, and the others are measured all the same: ``failed_parts`` names it with the reason.

    Raises ConfigError for a part that is none, and ModelUnavailable.
    """
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        raise ConfigError(f"{unknown[0]!r} is none of {', '.join(PARTS)}", field="--only", reason="unknown part")
    bench = Bench(options, progress)
    engine = bench.engine
    figures: Figures = {"model": engine.spec.name, "dtype": engine.spec.dtype, "threads": engine.fingerprint.threads}
    failed: list[str] = []
    for name in options.parts or PARTS:
        started_s = time.monotonic()
        progress(f"part {name}")
        try:
            figures |= importlib.import_module(f"bench.snapshot.{name}").part(bench)
        except Exception as error:  # noqa: BLE001 - the other parts' figures are worth having
            if not isinstance(error, MindstreamError):
                progress(traceback.format_exc().rstrip())
            failed.append(f"{name}: {error or type(error).__name__}")
            progress(f"part {failed[-1]}")
            figures |= dict.fromkeys(each for each in PARTS[name] if each not in figures)
        progress(f"part {name} took {time.monotonic() - started_s:.0f} s")
    return figures | {
        "failed_parts": "; ".join(failed),
        "machine": machine(),
        "versions": versions("torch", "transformers", "numpy", "zstandard", "cryptography", "blake3"),
        "baseline": "keys and values at 16 bits a number; perplexity after the exact cache, same engine and schedule",
    }
