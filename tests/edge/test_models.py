"""The model registry: where models are found, and how a GGUF becomes a folder to load."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from edge import models
from edge.models import DEFAULT_MODEL, default_cache_folder, ensure, find, known_models
from protocol.errors import ModelUnavailable, StorageError
from tests.support.waiting import wait_for

ROOT = Path(__file__).resolve().parents[2]


def model_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"")
    return path


@pytest.fixture
def smollm2_gguf() -> Path:
    """The GGUF of the wheel."""
    model = known_models()[0]
    for folder in models.wheel_folders(model):
        return folder / model.files[0].name
    pytest.skip(f"SmolLM2 is not installed: {model.how_to_get}")


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without any model, and an empty cache."""
    monkeypatch.delenv("MINDSTREAM_MODELS", raising=False)
    monkeypatch.setattr(models, "_places", _only_folders(models._places))
    return tmp_path / "cache"


def _only_folders(places: Callable[..., object]) -> Callable[..., object]:
    def only(*arguments: object) -> list[tuple[Path, str]]:
        hidden = ("in an installed wheel", "in ../shared")
        return [(folder, reason) for folder, reason in places(*arguments) if not reason.startswith(hidden)]  # type: ignore[attr-defined]

    return only


def test_every_row_names_its_file_origin_licence_and_digest() -> None:
    names = [model.name for model in known_models()]
    assert names[0] == DEFAULT_MODEL
    assert len(set(names)) == len(names)
    for model in known_models():
        assert all(len(bytes.fromhex(file.sha256)) == 32 and file.size_bytes > 0 for file in model.files)
        assert model.licence.name
        assert model.licence.url.startswith("https://")
        assert "/" in model.upstream
        assert {source.file for source in model.sources} <= {file.name for file in model.files}
    assert [model.name for model in known_models() if model.licence.terms] == ["gemma3-270m"]


def test_importing_the_registry_imports_no_torch() -> None:
    code = "import sys, edge.models; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_an_unknown_name_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="'smollm2-135m'") as caught:
        find("smollm2-135m", cache_dir=tmp_path)
    assert DEFAULT_MODEL in caught.value.hint
    assert caught.value.field == "model.name"


def test_a_missing_model_says_what_to_type_and_where_it_looked(bare: Path) -> None:
    assert find(DEFAULT_MODEL, cache_dir=bare) is None
    with pytest.raises(ModelUnavailable, match=str(bare)) as caught:
        ensure(DEFAULT_MODEL, cache_dir=bare)
    assert caught.value.hint == f"mindstream models pull {DEFAULT_MODEL}"
    with pytest.raises(ModelUnavailable) as caught:
        ensure("yunet", cache_dir=bare)
    assert "MINDSTREAM_MODELS" in caught.value.hint


def test_a_folders_path_is_a_model_too(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "mine")
    found = ensure(str(folder))
    assert (found.folder, found.file, found.kind, found.name) == (folder, "model.safetensors", "language", "mine")
    with pytest.raises(ModelUnavailable, match=r"no config\.json with safetensors"):
        ensure(str(tmp_path / "other"))


def test_a_folder_of_the_configuration_goes_before_the_environment_and_the_cache(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = model_folder(bare / DEFAULT_MODEL)
    assert ensure(DEFAULT_MODEL, bare).folder == cached
    named = model_folder(tmp_path / "named" / DEFAULT_MODEL)
    monkeypatch.setenv("MINDSTREAM_MODELS", f"{tmp_path / 'absent'}{os.pathsep}{tmp_path / 'named'}")
    found = ensure(DEFAULT_MODEL, bare)
    assert (found.folder, found.reason) == (named, "in $MINDSTREAM_MODELS")
    configured = model_folder(tmp_path / "configured" / DEFAULT_MODEL)
    assert ensure(DEFAULT_MODEL, bare, folders=[tmp_path / "configured"]).folder == configured


def test_a_file_that_is_not_the_one_of_the_registry_is_refused(bare: Path, tmp_path: Path) -> None:
    yunet = next(model for model in known_models() if model.name == "yunet")
    file = yunet.files[0]
    (tmp_path / file.name).write_bytes(b"short")
    with pytest.raises(ModelUnavailable, match="it has 5 bytes, not 317,434"):
        ensure("yunet", bare, folders=[tmp_path])
    (tmp_path / file.name).write_bytes(bytes(file.size_bytes))
    with pytest.raises(ModelUnavailable, match="its SHA-256 is"):
        ensure("yunet", bare, folders=[tmp_path])


@pytest.mark.parametrize("name", ["yolox-nano", "yunet", "yamnet"])
def test_the_shared_models_are_the_ones_of_the_registry(name: str, shared_folder: Path, tmp_path: Path) -> None:
    found = ensure(name, tmp_path)
    assert found.folder == shared_folder / "models"
    assert found.reason == "in ../shared/models"


def test_a_damaged_gguf_is_not_converted(bare: Path, tmp_path: Path) -> None:
    (tmp_path / known_models()[0].files[0].name).write_bytes(b"GGUF")
    with pytest.raises(ModelUnavailable, match="not 98,362,432"):
        ensure(DEFAULT_MODEL, bare, folders=[tmp_path])
    assert [path.name for path in bare.iterdir()] == [f".{DEFAULT_MODEL}.lock"]


def test_a_converted_model_that_was_cut_is_not_loaded(bare: Path) -> None:
    model = known_models()[0]
    partial = model_folder(bare / "partial")
    (partial / "model.safetensors").write_bytes(b"12345678")
    target = bare / models.converted_name(model)
    models.publish(partial, target, model, made="converted")
    assert ensure(DEFAULT_MODEL, bare).folder == target
    (target / "model.safetensors").write_bytes(b"1234")
    with pytest.raises(ModelUnavailable, match="it has 4 bytes, not 8") as caught:
        ensure(DEFAULT_MODEL, bare)
    assert f"mindstream models rm {DEFAULT_MODEL}" in caught.value.hint


def test_systemds_cache_directory_is_the_cache_of_a_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_DIRECTORY", "/var/cache/mindstream:/other")
    assert default_cache_folder() == Path("/var/cache/mindstream/models")


def test_a_cache_that_cannot_be_written_is_named(smollm2_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a folder is wanted")
    with pytest.raises(StorageError, match=str(tmp_path / "cache")) as caught:
        ensure(DEFAULT_MODEL, tmp_path / "cache", folders=[smollm2_gguf.parent])
    assert "XDG_CACHE_HOME" in caught.value.hint


def test_missing_packages_are_named_with_the_extra_that_brings_them(
    smollm2_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A module that shadows torch and fails, as an environment without it does.
    (tmp_path / "shadow").mkdir()
    (tmp_path / "shadow" / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "shadow"))
    with pytest.raises(ModelUnavailable, match="No module named 'torch'") as caught:
        ensure(DEFAULT_MODEL, tmp_path / "cache", folders=[smollm2_gguf.parent])
    assert "mindstream[model]" in caught.value.hint
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f".{DEFAULT_MODEL}.lock"]


@pytest.mark.model
def test_the_converted_model_holds_the_weights_of_the_gguf(smollm2_path: Path, smollm2_gguf: Path) -> None:
    torch = pytest.importorskip("torch")
    gguf = pytest.importorskip("gguf")
    from safetensors import safe_open
    from transformers import AutoTokenizer

    reader = gguf.GGUFReader(smollm2_gguf)
    packed = next(tensor for tensor in reader.tensors if tensor.name == "blk.7.ffn_down.weight")
    expected = torch.from_numpy(gguf.quants.dequantize(packed.data, packed.tensor_type)).to(torch.bfloat16)
    with safe_open(smollm2_path / "model.safetensors", framework="pt") as weights:
        found = weights.get_tensor("model.layers.7.mlp.down_proj.weight")
    assert torch.equal(found, expected)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    assert "<|im_start|>user" in tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.timeout(300)
def test_two_processes_convert_once_and_a_killed_one_leaves_no_model(smollm2_gguf: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    cache = tmp_path / "cache"
    code = (
        "import sys\nfrom pathlib import Path\nfrom edge.models import ensure\n"
        f"found = ensure({DEFAULT_MODEL!r}, Path({str(cache)!r}), on_progress=lambda line: print(line, flush=True))\n"
        "print('ready', found.folder, flush=True)\n"
    )

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)

    first = start()
    assert first.stdout is not None
    assert "converting" in first.stdout.readline()
    wait_for(lambda: bool(psutil.Process(first.pid).children()), "the conversion runs")
    worker = psutil.Process(first.pid).children()[0]
    first.send_signal(signal.SIGKILL)
    first.communicate()
    wait_for(lambda: not worker.is_running(), "the conversion ends with its parent")
    assert find(DEFAULT_MODEL, cache_dir=cache, folders=[]) is None or not _converted(cache)

    outputs = [process.communicate(timeout=240)[0] for process in [start(), start()]]
    assert all("ready" in output for output in outputs)
    assert sum("converting SmolLM2" in output for output in outputs) == 1
    assert [path.name for path in cache.iterdir() if not path.name.endswith(".lock")] == [_converted(cache)[0].name]
    shutil.rmtree(cache)


def _converted(cache: Path) -> list[Path]:
    return [path for path in cache.glob(f"{DEFAULT_MODEL}-*") if (path / "config.json").exists()]
