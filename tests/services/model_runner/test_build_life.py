"""A built model from `mindstream models build` to `rm`: the child, the card, and what is left when things go wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed: make install (extra `build`)")

from edge import model_build
from edge.model_build import build
from edge.model_cards import BUILD, built_models, read_card
from protocol.errors import ConfigError, ModelUnavailable, StorageError

DEADLINE_S = 60.0
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CACHE_DIRECTORY", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "mindstream" / "models"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from edge.cli import main; main()", "models", *arguments]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command(*arguments), capture_output=True, text=True, env=environment, check=False)


def answer(*arguments: str) -> Any:
    done = run(*arguments, "--json")
    assert done.returncode in (0, 1), done.stderr
    return msgspec.json.decode(done.stdout)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE_S:g} s: {what}"
        time.sleep(0.01)


@pytest.mark.slow
def test_a_life_of_a_built_model_build_list_verify_path_rm(small_models: dict[str, Path], cache: Path) -> None:
    source = small_models["llama"]
    built = answer("build", str(source))
    folder = Path(built["folder"])
    card = built["card"]
    assert folder.parent == cache
    assert (card["build"], card["precision"], card["provider"]) == (BUILD, "int8", "cpu")
    assert card["source"]["architecture"] == "LlamaForCausalLM"
    assert {file["name"] for file in card["source"]["files"]} >= {"model.safetensors", "config.json", "tokenizer.json"}
    assert {file["name"] for file in card["files"]} >= {
        "model.onnx",
        "model.onnx.data",
        "config.json",
        "tokenizer.json",
    }
    assert card["versions"].keys() >= {"onnxruntime-genai", "onnxruntime", "torch", "transformers"}
    measured = card["measured"]
    assert abs(measured["perplexity_pct"]) < 2
    assert measured["decode_tokens_per_s"] > 0
    assert measured["source_decode_tokens_per_s"] > 0
    assert read_card(folder).not_default == ""

    listed = {row["model"]["name"]: row for row in answer("list")}
    assert [each["card"]["precision"] for each in listed[source.name]["built"]] == ["int8"]
    assert run("path", source.name, "--variant", "int8-cpu").stdout.strip() == str(folder)
    assert [(each["what"], each["verdict"]) for each in answer("verify", source.name)] == [("int8-cpu", "ok")]

    data = folder / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    (damaged,) = answer("verify", source.name)
    assert damaged["verdict"] == "damaged"
    assert "--variant int8-cpu" in damaged["next_step"]

    assert answer("rm", source.name, "--variant", "int8-cpu")["folders"] == [str(folder)]
    assert list(built_models(cache)) == []


@pytest.mark.slow
def test_a_build_that_is_killed_leaves_nothing_half_done_and_the_next_one_clears_up(
    small_models: dict[str, Path], cache: Path
) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(
        command("build", str(small_models["llama"]), "--no-check"), env=environment, stderr=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: any(cache.glob(".*-b*/graph")), "the build has begun")
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert list(built_models(cache)) == []
    assert not [path for path in cache.iterdir() if path.is_dir() and not path.name.startswith(".")]
    built = build(str(small_models["llama"]), cache_dir=cache, check=False)
    assert built.card.measured is None
    assert built.card.not_default == "not checked against its source"
    assert [path for path in cache.iterdir() if path.is_dir()] == [built.folder]
    # It is there now: nothing is built again.
    assert build(str(small_models["llama"]), cache_dir=cache).card == built.card


def test_without_space_nothing_is_begun(
    small_models: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_build, "free_bytes", lambda _folder: 1_000_000)
    with pytest.raises(StorageError, match="1 MB are free"):
        build(str(small_models["llama"]), cache_dir=cache)
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_a_missing_builder_is_named_with_its_extra(
    small_models: dict[str, Path], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = tmp_path / "hidden" / "onnxruntime_genai"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("raise ImportError(\"No module named 'onnxruntime_genai'\")")
    monkeypatch.setenv("PYTHONPATH", f"{hidden.parent}:{ROOT}")
    with pytest.raises(ModelUnavailable, match="No module named 'onnxruntime_genai'") as refused:
        build(str(small_models["llama"]), cache_dir=cache)
    assert "mindstream[model,build]" in refused.value.hint
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_an_unknown_precision_names_the_known_ones(small_models: dict[str, Path], cache: Path) -> None:
    with pytest.raises(ConfigError, match="int8, int4, fp16, fp32"):
        build(str(small_models["llama"]), "int3", cache_dir=cache)
