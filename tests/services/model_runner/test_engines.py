"""Which engine a node runs: by what is installed, what is built, and what was measured; always with its reason."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from edge.config import ModelConfig
from edge.hardware import Hardware
from edge.model_build import write_card
from edge.model_cards import BUILD, Built, Card, CardSource, Measured, built_models, built_name
from edge.model_registry import ModelFile
from edge.models import sha256_of
from protocol.errors import ModelUnavailable
from services.model_runner.engines import Packages, choose

ALL = Packages(transformers=True, onnxruntime=True, cuda_provider=False)
NO_TORCH = Packages(transformers=False, onnxruntime=True, cuda_provider=False)
CPU = Hardware("x86_64", "a CPU", 2, (), None, None, None, False, "no NVIDIA driver is loaded", ())
GPU = msgspec.structs.replace(CPU, cuda=True, cuda_reason="NVIDIA")
MakeBuilt = Callable[..., Built]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "little"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def make_built(source: Path, tmp_path: Path) -> MakeBuilt:
    """Puts a built model of ``source`` into the cache, with a card as a build writes it."""

    def make(precision: str = "int8", provider: str = "cpu", ppl_pct: float | None = 0.5, **card: object) -> Built:
        weights = ModelFile("model.safetensors", 7, sha256_of(source / "model.safetensors"))
        folder = tmp_path / "cache" / built_name("little", weights.sha256, precision, provider)
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_bytes(b"graph")
        measured = None
        if ppl_pct is not None:
            speeds = {name: card.pop(name) for name in list(card) if name.endswith("tokens_per_s")}
            measured = Measured("transformers float32", (), ppl_pct, 0.97, **speeds)  # type: ignore[arg-type]
        written = Card(
            build=BUILD,
            model="little",
            source=CardSource("here", "", "LlamaForCausalLM", weights.sha256, (weights,)),
            precision=precision,
            provider=provider,
            method="by hand",
            versions={},
            files=(ModelFile("model.onnx", 5, sha256_of(folder / "model.onnx")),),
            measured=measured,
            build_s=1.0,
            time_us=0,
        )
        write_card(folder, msgspec.structs.replace(written, **card))
        return Built(folder, written)

    return make


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_a_cpu_runs_transformers_until_something_is_built(source: Path, cache: Path) -> None:
    chosen = choose(ModelConfig(name=str(source)), cache=cache, packages=ALL, hardware=CPU)
    assert (chosen.engine, chosen.folder) == ("transformers", source)
    assert "mindstream models build" in chosen.reason


def test_a_cpu_runs_int8_once_it_is_built(source: Path, cache: Path, make_built: MakeBuilt) -> None:
    make_built("int4")
    built = make_built("int8")
    chosen = choose(ModelConfig(name=str(source)), cache=cache, packages=ALL, hardware=CPU)
    assert (chosen.engine, chosen.folder, chosen.precision) == ("onnx", built.folder, "int8")
    assert "+0.50 %" in chosen.reason


def test_a_model_too_far_from_its_source_runs_only_when_it_is_named(
    source: Path, cache: Path, make_built: MakeBuilt
) -> None:
    built = make_built("int8", ppl_pct=31.2)
    assert next(built_models(cache, "little")).card.not_default == "+31.2 %"
    chosen = choose(ModelConfig(name=str(source)), cache=cache, packages=ALL, hardware=CPU)
    assert chosen.engine == "transformers"
    assert "not default: +31.2 %" in chosen.reason
    named = choose(ModelConfig(name=str(source), precision="int8"), cache=cache, packages=ALL, hardware=CPU)
    assert (named.engine, named.folder) == ("onnx", built.folder)


@pytest.mark.parametrize("ppl_pct", [None, float("nan")])
def test_a_model_that_was_not_measured_is_no_default(
    ppl_pct: float | None, source: Path, cache: Path, make_built: MakeBuilt
) -> None:
    make_built("int8", ppl_pct=ppl_pct)
    chosen = choose(ModelConfig(name=str(source)), cache=cache, packages=ALL, hardware=CPU)
    assert chosen.engine == "transformers"


def test_a_gpu_runs_what_was_measured_to_be_faster_on_it(source: Path, cache: Path, make_built: MakeBuilt) -> None:
    packages = Packages(transformers=True, onnxruntime=True, cuda_provider=True)
    settings = ModelConfig(name=str(source), device="cuda")
    built = make_built("fp16", "cuda", 0.1, decode_tokens_per_s=100.0, source_decode_tokens_per_s=150.0)
    chosen = choose(settings, cache=cache, packages=packages, hardware=GPU)
    assert chosen.engine == "transformers"
    assert "not measured to be faster" in chosen.reason
    shutil.rmtree(built.folder)
    make_built("fp16", "cuda", 0.1, decode_tokens_per_s=150.0, source_decode_tokens_per_s=100.0)
    chosen = choose(settings, cache=cache, packages=packages, hardware=GPU)
    assert (chosen.engine, chosen.precision) == ("onnx", "fp16")
    assert "150 tokens/s here against 100" in chosen.reason


def test_without_torch_a_built_model_runs_and_without_one_it_says_what_to_type(
    source: Path, cache: Path, make_built: MakeBuilt
) -> None:
    settings = ModelConfig(name=str(source))
    with pytest.raises(ModelUnavailable, match="no built model") as refused:
        choose(settings, cache=cache, packages=NO_TORCH, hardware=CPU)
    assert "mindstream models build" in refused.value.hint
    assert "copy" in refused.value.hint
    make_built("int8")
    assert choose(settings, cache=cache, packages=NO_TORCH, hardware=CPU).engine == "onnx"


def test_nothing_installed_names_both_extras(source: Path, cache: Path) -> None:
    nothing = Packages(transformers=False, onnxruntime=False, cuda_provider=False)
    with pytest.raises(ModelUnavailable) as refused:
        choose(ModelConfig(name=str(source)), cache=cache, packages=nothing, hardware=CPU)
    assert "mindstream[model]" in refused.value.hint
    assert "mindstream[onnx]" in refused.value.hint


def test_a_damaged_model_is_passed_over_with_its_reason_and_refused_when_named(
    source: Path, cache: Path, make_built: MakeBuilt
) -> None:
    built = make_built("int8")
    choose(ModelConfig(name=str(source)), cache=cache, packages=ALL, hardware=CPU)  # its digest is known now
    (built.folder / "model.onnx").write_bytes(b"grapg")
    chosen = choose(ModelConfig(name=str(source)), cache=cache, packages=ALL, hardware=CPU)
    assert chosen.engine == "transformers"
    assert "SHA-256" in chosen.reason
    with pytest.raises(ModelUnavailable, match="SHA-256"):
        choose(ModelConfig(name=str(source), engine="onnx"), cache=cache, packages=ALL, hardware=CPU)


@pytest.mark.parametrize("build", [BUILD - 1, BUILD + 1])
def test_a_model_of_another_build_is_refused_with_how_to_build_it_again(
    build: int, source: Path, cache: Path, make_built: MakeBuilt
) -> None:
    make_built("int8", build=build)
    with pytest.raises(ModelUnavailable, match="built by another version") as refused:
        choose(ModelConfig(name=str(source), engine="onnx"), cache=cache, packages=ALL, hardware=CPU)
    assert "mindstream models build little --precision int8 --provider cpu" in str(refused.value)


def test_a_model_built_from_other_weights_is_not_taken(source: Path, cache: Path, make_built: MakeBuilt) -> None:
    make_built("int8")
    (source / "model.safetensors").write_bytes(b"other weights")
    chosen = choose(ModelConfig(name=str(source)), cache=cache, packages=ALL, hardware=CPU)
    assert chosen.engine == "transformers"
    assert "other weights" in chosen.reason


def test_what_contradicts_itself_is_refused(source: Path, cache: Path) -> None:
    settings = ModelConfig(name=str(source), engine="transformers", precision="int8")
    with pytest.raises(ModelUnavailable, match="none"):
        choose(settings, cache=cache, packages=ALL, hardware=CPU)


def test_a_model_with_an_adapter_runs_on_transformers_though_it_is_built(
    source: Path, tmp_path: Path, make_built: MakeBuilt
) -> None:
    make_built()
    adapted = ModelConfig(name=str(source), adapter=str(tmp_path / "lora"))
    chosen = choose(adapted, cache=tmp_path / "cache", packages=ALL, hardware=CPU)
    assert (chosen.engine, chosen.built) == ("transformers", None)
    assert "lora" in chosen.reason
    for settings, packages in (
        (msgspec.structs.replace(adapted, engine="onnx"), ALL),
        (msgspec.structs.replace(adapted, precision="int8"), ALL),
        (adapted, NO_TORCH),
    ):
        with pytest.raises(ModelUnavailable, match="adapter"):
            choose(settings, cache=tmp_path / "cache", packages=packages, hardware=CPU)
