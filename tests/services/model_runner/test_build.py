"""A model built for ONNX Runtime computes what its source computes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed: make install (extra `build`)")

from edge.model_build import Said
from protocol.errors import ModelUnavailable
from services.model_runner.build import build
from services.model_runner.build_check import check_built, compare, load_texts
from services.model_runner.quantise import appended, block_sums, round_4


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_a_float32_graph_agrees_with_its_source_at_every_position(
    family: str, small_models: dict[str, Path], built_models: dict[str, Path]
) -> None:
    measured = check_built(small_models[family], built_models[f"{family}-fp32"], "cpu", lambda _line: None)
    assert measured is not None
    assert abs(measured.perplexity_pct) < 0.01
    assert measured.top1 > 0.999
    assert [text.kind for text in measured.texts] == [text.kind for text in load_texts()]
    # Windows of 40 tokens were left behind many times over.
    assert all(text.tokens > 400 for text in measured.texts)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_int8_is_close_to_its_source_and_smaller(
    family: str, small_models: dict[str, Path], built_models: dict[str, Path]
) -> None:
    measured = check_built(small_models[family], built_models[family], "cpu", lambda _line: None)
    assert measured is not None
    assert 0.95 < measured.top1 < 1.0
    sizes = [(built_models[name] / "model.onnx.data").stat().st_size for name in (family, f"{family}-fp32")]
    assert sizes[0] < 0.6 * sizes[1]  # the tables of RoPE are a third of so small a model


def test_int4_keeps_a_model_whose_weights_lie_on_a_4_bit_grid(small_models: dict[str, Path], tmp_path: Path) -> None:
    # As those of a GGUF do. Random weights off the grid agree in half of all tokens only.
    from safetensors.numpy import load_file, save_file

    source, folder = tmp_path / "source", tmp_path / "built"
    shutil.copytree(small_models["qwen2"], source)
    folder.mkdir()
    weights = load_file(source / "model.safetensors")
    for name, matrix in weights.items():
        if "proj.weight" in name:
            blocks = matrix.reshape(matrix.shape[0], -1, 32)
            low = blocks.min(-1, keepdims=True)
            step = (blocks.max(-1, keepdims=True) - low) / 15
            weights[name] = (np.rint((blocks - low) / step) * step + low).reshape(matrix.shape)
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    said: list[Said] = []
    build(source, folder, "int4", "cpu", True, said.append)
    assert said[-1].measured is not None
    assert said[-1].measured.top1 > 0.9
    assert abs(said[-1].measured.perplexity_pct) < 1.0


def test_weights_on_a_grid_of_4_bits_with_any_minimum_are_hardly_changed() -> None:
    # What a GGUF's Q4_1 holds: 16 levels for each 32 inputs, that begin anywhere.
    random = np.random.default_rng(5)
    steps, lows = random.uniform(0.01, 0.02, (2, 24, 64, 1)) * np.array([1.0, -8.0])[:, None, None, None]
    codes = random.integers(0, 16, (24, 64, 32))
    codes[..., 0], codes[..., 1] = 0, 15
    weights = (codes * steps + lows).reshape(24, -1).astype(np.float32)
    inputs = random.normal(size=(5, weights.shape[1])).astype(np.float32)
    rounded = appended(weights)
    assert rounded.zero_points is not None
    values = (rounded.codes.astype(np.float32) - rounded.zero_points[..., None]) * rounded.scales[..., None]
    with_sums = np.concatenate([inputs, inputs @ block_sums(weights.shape[1])], 1)
    exact = inputs @ weights.T
    error = np.abs(with_sums @ values.reshape(24, -1).T - exact).std() / exact.std()
    blocks = round_4(weights)[0]
    assert blocks.zero_points is not None
    plain = (blocks.codes.astype(np.float32) - blocks.zero_points[..., None]) * blocks.scales[..., None]
    plain_error = np.abs(inputs @ plain.reshape(24, -1).T - exact).std() / exact.std()
    assert error < 0.01
    assert error < 0.15 * plain_error


def test_a_model_that_differs_is_seen_by_the_check(
    small_models: dict[str, Path], built_models: dict[str, Path], tmp_path: Path
) -> None:
    import onnx

    graph = onnx.load(str(built_models["llama-fp32"] / "model.onnx"))
    weights = next(each for each in graph.graph.initializer if "layers.1.mlp.down_proj" in each.name)
    array = onnx.numpy_helper.to_array(weights)
    weights.CopyFrom(onnx.numpy_helper.from_array(np.flip(array, 0).copy(), weights.name))
    onnx.save(graph, str(tmp_path / "model.onnx"))
    (tmp_path / "genai_config.json").write_bytes((built_models["llama-fp32"] / "genai_config.json").read_bytes())
    measured = check_built(small_models["llama"], tmp_path, "cpu", lambda _line: None)
    assert measured is not None
    assert measured.top1 < 0.9
    assert measured.perplexity_pct > 2.0


def test_the_comparison_is_of_perplexity_and_the_likeliest_token() -> None:
    sure = np.array([[0.0, 4.0], [4.0, 0.0], [0.0, 0.0]], np.float32)
    unsure = np.array([[0.0, 1.0], [0.0, 1.0], [0.0, 0.0]], np.float32)
    source, built, same, count = compare(sure, unsure, [0, 1, 0])
    assert count == 2
    assert same == 1
    assert source == pytest.approx(2 * np.log1p(np.exp(-4)), rel=1e-5)
    assert built == pytest.approx(np.log1p(np.exp(-1)) + np.log1p(np.exp(1)), rel=1e-5)


def test_an_architecture_that_the_builder_does_not_know_is_named(small_models: dict[str, Path], tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "built"
    source.mkdir()
    folder.mkdir()
    for path in small_models["llama"].iterdir():
        (source / path.name).symlink_to(path)
    config: dict[str, Any] = msgspec.json.decode((source / "config.json").read_bytes())
    (source / "config.json").unlink()
    (source / "config.json").write_bytes(msgspec.json.encode(config | {"architectures": ["OddForCausalLM"]}))
    said: list[Said] = []
    with pytest.raises(ModelUnavailable, match=r"builds no OddForCausalLM"):
        build(source, folder, "int8", "cpu", False, said.append)
