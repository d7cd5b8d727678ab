"""`mindstream bench engines` on a tiny model: it runs, says every key, and what is not a time is right."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("torch", reason="torch is not installed: make install (extra `model`)")

from bench.engines import Model, Options, plot, run, serving, speed
from bench.engines.options import PARTS
from protocol.errors import ConfigError, NotFound

MACHINE = {"model": "a <model>", "machine": "a machine", "threads": 2}


def measured(folder: Path, *parts: str) -> dict[str, float | int | str | None]:
    lines: list[str] = []
    figures = run(Options(Model(str(folder), folder), parts=parts, threads=1, quick=True), lines.append)
    assert lines
    assert {"machine", "versions", "baseline", "model", "threads"} <= set(figures)
    assert all(value is None or isinstance(value, (int, float, str)) for value in figures.values()), "it is not flat"
    json.dumps(figures, allow_nan=False)
    return figures


@pytest.mark.slow
def test_engines_take_turns_and_what_is_not_here_is_null(tiny_model: Path) -> None:
    figures = measured(tiny_model, "decode", "quality")
    assert set(speed.keys()) <= set(figures)
    for engine in ("torch", "torch_stock"):
        for context in (64, 1024, 4096):
            assert figures[f"{engine}_decode_{context}_tokens_per_s"] > 0
        assert figures[f"{engine}_memory_mb"] > 50
    for key in ("onnx_decode_ratio_vs_torch", "onnx_decode_4k_ratio_vs_own_torch", "onnx_dppl_pct"):
        assert figures[key] is None
    assert set(plot.lines_of(figures)) == {"torch", "torch_stock"}


@pytest.mark.slow
def test_a_resumed_conversation_is_the_same_and_a_batch_is_close(tiny_model: Path) -> None:
    figures = measured(tiny_model, "resume", "agreement")
    assert figures["batched_token_agreement"] is None
    assert 0 <= figures["torch_batched_token_agreement"] <= 1
    assert figures["resume_token_match"] == 1.0
    assert figures["resume_logit_match"] == 1.0
    assert figures["tiny_qwen2_torch_resume_exact"] == 1.0
    assert figures["tiny_lfm2_torch_resume_exact"] == 1.0
    assert "tiny_lfm2_onnx_int8" in figures["resume_left_out"]
    assert figures["resume_prompts"] >= 4


@pytest.mark.slow
def test_a_node_is_measured_as_a_user_sees_it(tiny_model: Path) -> None:
    figures = measured(tiny_model, "serving")
    assert set(serving.KEYS) <= set(figures)
    for key in ("batch8_throughput_ratio", "stall_max_ratio", "prompt_ttft_ratio", "http_overhead_ratio"):
        assert figures[key] > 0, key
    assert figures["serving_engine"] == "transformers bfloat16"


def test_ratios_are_of_the_medians_and_null_without_both() -> None:
    figures = {
        "onnx_int8_decode_64_tokens_per_s": 120.0,
        "torch_stock_decode_64_tokens_per_s": 30.0,
        "torch_decode_64_tokens_per_s": 40.0,
        "onnx_int8_decode_4096_tokens_per_s": 60.0,
        "torch_stock_decode_4096_tokens_per_s": None,
    }
    assert speed.ratios(figures) == {
        "onnx_decode_ratio_vs_torch": 4.0,
        "onnx_decode_4k_ratio_vs_torch": None,
        "onnx_decode_ratio_vs_own_torch": 3.0,
        "onnx_decode_4k_ratio_vs_own_torch": None,
    }


def test_gaps_are_those_during_which_the_prompt_was_read() -> None:
    stream = serving.Run(None, "", 0.0, None, [1.0, 2.0, 4.0, 7.0, 8.0])  # type: ignore[arg-type]
    assert stream.gaps(2.5, 6.0) == [2.0, 3.0]
    assert stream.gaps(0.0, 2.5) == [1.0, 2.0]
    assert stream.first_token_s == 1.0


def test_an_unknown_part_is_refused_and_the_parts_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=", ".join(PARTS)):
        run(Options(Model("m", tmp_path), parts=("decoding",)))


def test_the_plot_has_a_line_for_each_engine_that_was_measured() -> None:
    figures = {
        **MACHINE,
        **{
            f"{engine}_decode_{context}_tokens_per_s": rate / (1 + context / 4096)
            for engine, rate in (("torch_stock", 27.0), ("torch", 40.0), ("onnx_int8", 131.0))
            for context in (64, 1024, 4096)
        },
        "onnx_int4_decode_64_tokens_per_s": None,
        "torch_prefill_1024_tokens_per_s": 1000.0,
    }
    picture = ElementTree.fromstring(plot.svg(figures))
    space = "{http://www.w3.org/2000/svg}"
    lines = [line.get("points", "").split() for line in picture.iter(f"{space}polyline")]
    assert [len(points) for points in lines] == [3, 3, 3]
    for points in lines:
        places = [tuple(map(float, point.split(","))) for point in points]
        assert places == sorted(places), "a slower engine stands lower, and lengths grow to the right"
    texts = [text.text for text in picture.iter(f"{space}text")]
    assert {"64", "1,024", "4,096", "a <model>, a machine, 2 threads"} <= set(texts)
    with pytest.raises(NotFound, match="none were measured"):
        plot.svg({**MACHINE, "torch_decode_64_tokens_per_s": None})


@pytest.mark.parametrize(
    ("highest", "wanted"), [(131.0, (20.0, 140.0)), (7.0, (1.0, 7.0)), (0.4, (0.1, 0.4)), (999.0, (200.0, 1000.0))]
)
def test_ticks_are_round_numbers(highest: float, wanted: tuple[float, float]) -> None:
    assert plot._ticks(highest) == pytest.approx(wanted)
