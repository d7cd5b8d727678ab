"""`mindstream bench snapshot` on a tiny model: it runs, says every key, and its texts are not those of calibration."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed: make install (extra `model`)")

from bench.snapshot import Options, codecs, run
from bench.snapshot.texts import measured_texts
from protocol.errors import ConfigError
from services.model_runner.codecs.texts import calibration_texts

RUNGS = ("raw", "lossless", "int8", "rotated4", "transform_near", "transform_small")


@pytest.mark.slow
def test_every_rung_is_measured_on_files(tiny_model: Path, tmp_path: Path) -> None:
    figures = run(Options(tiny_model, tmp_path, device="cpu", threads=1, quick=True))
    for rung in RUNGS:
        for key in ("ratio", "exact", "dppl_pct", "dppl_worst_pct", "kl", "top1", "encode_restore_s_per_gb"):
            assert figures[f"{rung}_{key}"] is not None
        assert f"{rung}_decode_4k_s" in figures or rung == "transform_small"
    assert figures["raw_ratio"] == 1.0
    assert figures["raw_exact"] == figures["lossless_exact"] == 1.0
    assert figures["raw_kl"] == figures["raw_dppl_pct"] == 0.0
    assert figures["int8_exact"] == 0.0
    assert figures["rotated4_ratio"] > figures["int8_ratio"] > 1.3
    assert figures["safetensors_ratio"] <= 1.0
    assert figures["near_lossless_ratio"] is None, "two texts are too few to say so"
    assert figures["basis_mb"] > 0
    json.dumps(figures, allow_nan=False)
    # The basis is kept, and read again.
    (kept,) = tmp_path.iterdir()
    before = kept.read_bytes()
    run(Options(tiny_model, tmp_path, device="cpu", threads=1, quick=True))
    assert kept.read_bytes() == before


def test_sealed_snapshots_are_measured_and_their_mutations_refused(tiny_model: Path, tmp_path: Path) -> None:
    figures = run(Options(tiny_model, tmp_path, device="cpu", threads=1, parts=["sealed"], quick=True))
    for key in ("encode_restore_s_per_gb", "store_save_s_per_gb", "store_load_s_per_gb", "int8_sealed_encode_s_per_gb"):
        assert float(figures[key] or 0) > 0
    assert figures["mutations"] == figures["mutations_refused"] == 100
    json.dumps(figures, allow_nan=False)


def test_parts_have_names(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none of codecs, sealed"):
        run(Options(tiny_model, tmp_path, parts=["speed"]))


def test_no_text_is_both_measured_and_calibrated_on() -> None:
    measured = measured_texts()
    assert len(measured) >= 6
    lines = {line.strip() for text in calibration_texts() for line in text.splitlines() if len(line.strip()) > 50}
    for kind, text in measured.items():
        own = {line.strip() for line in text.splitlines() if len(line.strip()) > 50}
        assert len(own & lines) <= 0.02 * len(own), kind


def test_the_same_logits_do_not_differ_and_others_do() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((20, 50)).astype(np.float32)
    answers = [int(each) for each in logits.argmax(1)]
    assert codecs.compared(logits, logits, answers) == (0.0, 0.0, 1.0)
    nats, divergence, top1 = codecs.compared(logits, rng.standard_normal((20, 50)).astype(np.float32), answers)
    assert nats > 0.5
    assert divergence > 0.3
    assert top1 < 0.3
