"""`mindstream bench snapshot` on a tiny model: it runs, says every key, and its texts are not those of calibration."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed: make install (extra `model`)")

from bench.snapshot import PARTS, Options, codecs, run, sealed, wanted_rows
from bench.snapshot.texts import development_texts, measured_texts
from bench.snapshot.wanted import WANTED
from edge.config import ModelConfig
from protocol.errors import ConfigError
from protocol.identity import Identity, Keyring, digest
from services.model_runner.bases import here
from services.model_runner.calibration import make
from services.model_runner.codecs.texts import calibration_texts
from services.model_runner.pruning import PRUNERS

RUNGS = ("raw", "lossless", "int8", "rotated4", "transform_near", "transform_small")


@pytest.mark.slow
def test_every_rung_is_measured_on_files(tiny_model: Path, tmp_path: Path) -> None:
    figures = run(Options(tiny_model, tmp_path, device="cpu", threads=1, parts=["codecs"], quick=True))
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
    run(Options(tiny_model, tmp_path, device="cpu", threads=1, parts=["codecs"], quick=True))
    assert kept.read_bytes() == before


@pytest.mark.slow
def test_every_pruner_is_measured_alone_with_rungs_and_fitted_into_a_budget(tiny_model: Path, tmp_path: Path) -> None:
    figures = run(Options(tiny_model, tmp_path, device="cpu", threads=1, parts=["pruning"], quick=True))
    names = [f"prune_{pruner}_50" for pruner in PRUNERS] + [
        "prune_heavy_50+int8",
        "budget_4x+heavy",
        "budget_4x+window",
    ]
    for name in names:
        for key in ("ratio", "kl", "top1", "dppl_pct", "dppl_worst_pct"):
            assert figures[f"{name}_{key}"] is not None
    assert figures["prune_window_50_ratio"] == 2.0
    assert float(figures["prune_heavy_50+int8_ratio"] or 0) > 2.5
    assert float(figures["budget_4x+heavy_ratio"] or 0) >= 4
    assert figures["budget_4x+heavy_took"]
    json.dumps(figures, allow_nan=False)


@pytest.mark.slow
def test_calibration_makes_signs_and_keeps_a_basis(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CACHE_DIRECTORY", raising=False)
    tomato = Identity("tomato", bytes(range(32)))
    said: list[str] = []
    made = make(ModelConfig(name=str(tiny_model), device="cpu", threads=1), tomato, say=said.append)
    assert any("window 2 of" in line for line in said)
    assert [level.name for level in made.levels] == ["near", "small"]
    (found,) = here(tmp_path / "mindstream" / "models" / "bases", Keyring({"tomato": tomato.fingerprint}))
    assert found.path == made.path
    assert digest(found.read()).hex() == made.basis
    assert found.manifest.creator == "tomato"


def test_sealed_snapshots_are_measured_and_their_mutations_refused(tiny_model: Path, tmp_path: Path) -> None:
    figures = run(Options(tiny_model, tmp_path, device="cpu", threads=1, parts=["sealed", "mutations"], quick=True))
    for key in ("encode_restore_s_per_gb", "store_save_s_per_gb", "store_load_s_per_gb", "int8_sealed_encode_s_per_gb"):
        assert float(figures[key] or 0) > 0
    assert int(figures["mutations"] or 0) >= 300
    assert figures["mutations"] == figures["mutations_refused"]
    assert 0 < int(figures["mutations_with_tokens"] or 0) < int(figures["mutations"] or 0)
    json.dumps(figures, allow_nan=False)


@pytest.mark.slow
def test_the_mailbox_is_measured_with_real_processes(tiny_model: Path, tmp_path: Path) -> None:
    figures = run(Options(tiny_model, tmp_path, device="cpu", threads=1, parts=["mailbox"], quick=True))
    assert figures["failed_parts"] == ""
    for key in ("mailbox_handles_per_s", "mailbox_gb_per_s", "mailbox_broker_gb_per_s", "mailbox_over_broker"):
        assert float(figures[key] or 0) > 0


@pytest.mark.slow
def test_the_pool_is_measured_on_a_real_broker_and_gives_what_reading_gives(tiny_model: Path, tmp_path: Path) -> None:
    figures = run(Options(tiny_model, tmp_path, device="cpu", threads=1, parts=["pool"], quick=True))
    assert figures["failed_parts"] == ""
    for key in ("pool_ttft_read_s", "pool_ttft_bus_s", "pool_ttft_disk_s", "pool_ttft_speedup_bus"):
        assert float(figures[key] or 0) > 0


def test_parts_have_names(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none of exact, codecs, pruning, sealed"):
        run(Options(tiny_model, tmp_path, parts=["speed"]))


@pytest.mark.slow
def test_a_saved_conversation_goes_on_exactly_in_another_process(tiny_model: Path, tmp_path: Path) -> None:
    figures = run(Options(tiny_model, tmp_path, device="cpu", threads=1, parts=["exact"], quick=True))
    assert (figures["exact_token_match"], figures["exact_logit_match"], figures["exact_restored"]) == (1, 1, 1)


def test_a_part_that_fails_says_so_and_the_others_are_measured(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_bench: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(sealed, "part", fail)
    said: list[str] = []
    options = Options(tiny_model, tmp_path, device="cpu", threads=1, parts=["sealed", "mutations"], quick=True)
    figures = run(options, said.append)
    assert figures["failed_parts"] == "sealed: the disk is full"
    assert figures["encode_restore_s_per_gb"] is None
    assert figures["mutations_refused"] == figures["mutations"]
    assert "part sealed: the disk is full" in said


def test_every_figure_that_is_wanted_is_owed_by_one_part_at_most() -> None:
    owed = [figure for figures in PARTS.values() for figure in figures]
    assert len(owed) == len(set(owed))
    assert set(owed) <= WANTED.keys()


def test_wanted_figures_are_held_against_their_bounds() -> None:
    figures: dict[str, float | int | str | None] = {
        "lossless_ratio": 1.39,
        "encode_restore_s_per_gb": 1.9,
        "ratio_at_5pct": None,
        "mutations": 20_000,
        "mutations_refused": 19_999,
        "variant_kl": 0.1,
        "another": 1.0,
    }
    assert wanted_rows(figures) == [
        ["lossless_ratio", 1.39, "at least 1.4, goal 1.5", "NO"],
        ["ratio_at_5pct", None, "at least 18", ""],
        ["encode_restore_s_per_gb", 1.9, "at most 2", "yes"],
        ["mutations", 20_000, "at least 10,000", "yes"],
        ["mutations_refused", 19_999, "all of mutations", "NO"],
        ["variant_kl", 0.1, "", ""],
    ]


def test_no_text_is_of_two_uses() -> None:
    uses = {
        "calibration": dict(enumerate(calibration_texts())),
        "development": development_texts(),
        "measured": measured_texts(),
    }
    assert len(uses["measured"]) >= 6
    assert len(uses["development"]) >= 6
    lines = {
        use: {
            kind: {line.strip() for line in text.splitlines() if len(line.strip()) > 50} for kind, text in texts.items()
        }
        for use, texts in uses.items()
    }
    for one, other in (("measured", "calibration"), ("measured", "development"), ("development", "calibration")):
        theirs = set().union(*lines[other].values())
        for kind, own in lines[one].items():
            assert len(own & theirs) <= 0.02 * len(own), (one, kind, other)


def test_the_same_logits_do_not_differ_and_others_do() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((20, 50)).astype(np.float32)
    answers = [int(each) for each in logits.argmax(1)]
    assert codecs.compared(logits, logits, answers) == (0.0, 0.0, 1.0)
    nats, divergence, top1 = codecs.compared(logits, rng.standard_normal((20, 50)).astype(np.float32), answers)
    assert nats > 0.5
    assert divergence > 0.3
    assert top1 < 0.3


@pytest.mark.slow
def test_variants_are_certified_reused_and_compared(tiny_model: Path, tmp_path: Path) -> None:
    options = Options(tiny_model, tmp_path / "bases", device="cpu", threads=1, parts=["variants"], quick=True)
    figures = run(options)
    assert not figures["failed_parts"]
    # It is not built for ONNX Runtime here, and is near enough to its own adapters.
    assert figures["variant_torch_to_int8"] == figures["variant_int8_to_torch"] == "not measured"
    for pair in ("torch_to_lora_a", "lora_a_to_lora_b"):
        for key in ("computed_layers", "speedup", "kl", "top1"):
            assert figures[f"variant_{pair}_{key}"] is not None
    assert 0 < float(figures["variant_kl"] or 0) < 0.1
    assert figures["variant_speedup_pair"]
    json.dumps(figures, allow_nan=False)
    # The adapters are kept, and used again.
    assert len(list((tmp_path / "bench-adapters").iterdir())) == 2
