"""LoRA adapters: what PEFT writes is merged as PEFT would, and what is not understood is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make install (extra `model`)")

from safetensors.torch import load_file, save_file  # noqa: E402

from bench.lora import train_lora  # noqa: E402
from protocol.errors import ModelUnavailable  # noqa: E402
from services.model_runner.adapter import CONFIG_NAME, WEIGHTS_NAME, read_adapter  # noqa: E402
from services.model_runner.transformers_engine import TransformersEngine  # noqa: E402

TOKENS = [(7 * index * index + 3 * index) % 256 for index in range(40)]


@pytest.fixture(scope="module")
def adapter(small_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the small Llama, really trained."""
    folder = tmp_path_factory.mktemp("adapter") / "trained"
    train_lora(small_models["llama"], [TOKENS, TOKENS[::-1]], folder, steps=8, rank=4, alpha=8, rate=1e-2)
    return folder


def load(folder: Path, adapter: Path | None = None, dtype: str = "float32") -> TransformersEngine:
    return TransformersEngine.load(folder, device="cpu", dtype=dtype, threads=1, adapter=adapter)


def logits(engine: TransformersEngine) -> Any:
    return engine.read(engine.new_cache(len(TOKENS)), TOKENS)


def changed(
    adapter: Path, folder: Path, config: dict[str, Any] | None = None, tensors: Callable[[Any], Any] | None = None
) -> Path:
    """A copy of an adapter with a few things changed."""
    shutil.copytree(adapter, folder)
    if config:
        known = json.loads((folder / CONFIG_NAME).read_text())
        (folder / CONFIG_NAME).write_text(json.dumps({**known, **config}))
    if tensors:
        save_file(tensors(load_file(folder / WEIGHTS_NAME)), folder / WEIGHTS_NAME)
    return folder


def test_training_makes_an_adapter_that_foretells_its_text_better(small_models: dict[str, Path], adapter: Path) -> None:
    base, adapted = (logits(load(small_models["llama"], each)) for each in (None, adapter))
    answers = np.arange(len(TOKENS) - 1), np.array(TOKENS[1:])

    def nats(found: Any) -> float:
        rows = found[:-1].astype(np.float64)
        return float((np.log(np.exp(rows).sum(1)) - rows[answers]).mean())

    assert nats(adapted) < nats(base)


def test_it_is_merged_as_peft_merges_it(small_models: dict[str, Path], adapter: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed (extra `dev`)")
    from transformers import AutoModelForCausalLM

    for folder, config in ((adapter, {}), (adapter, {"use_rslora": True, "alpha_pattern": {"q_proj": 3}})):
        wanted = changed(folder, folder.parent / f"like-peft-{len(config)}", config)
        model: Any = AutoModelForCausalLM.from_pretrained(small_models["llama"], dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(model, wanted).merge_and_unload().eval()
        with torch.inference_mode():
            expected = model(torch.tensor([TOKENS]), use_cache=False).logits[0].numpy()
        found = logits(load(small_models["llama"], wanted))
        np.testing.assert_allclose(found, expected, atol=2e-4)


def test_what_peft_writes_is_read(small_models: dict[str, Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed (extra `dev`)")
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(small_models["llama"], dtype=torch.float32)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["k_proj", "down_proj"], rank_pattern={"down_proj": 2})
    config.init_lora_weights = False  # so that it changes something at once
    model = peft.get_peft_model(model, config).eval()
    model.save_pretrained(tmp_path / "peft")
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS]), use_cache=False).logits[0].numpy()
    found = logits(load(small_models["llama"], tmp_path / "peft"))
    np.testing.assert_allclose(found, expected, atol=2e-4)
    assert np.abs(found - logits(load(small_models["llama"]))).max() > 0.01


def test_it_stands_in_the_models_digests_and_every_figure_counts(
    small_models: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    base, adapted = (load(small_models["llama"], each).spec.digests for each in (None, adapter))
    assert adapted.adapters == (read_adapter(adapter).digest,)
    assert (adapted.weights, adapted.config, base.adapters) == (base.weights, base.config, ())
    louder = read_adapter(changed(adapter, tmp_path / "louder", {"lora_alpha": 9})).digest
    renamed = read_adapter(changed(adapter, tmp_path / "renamed", {"base_model_name_or_path": "elsewhere"})).digest
    assert louder != adapted.adapters[0] == renamed


def test_steps_and_chunks_have_it_alike(small_models: dict[str, Path], adapter: Path) -> None:
    # Steps run on fused weights, chunks on the modules.
    engine = load(small_models["llama"], adapter)
    read = logits(engine)
    cache = engine.new_cache(len(TOKENS))
    stepped = np.stack([engine.step(cache, token) for token in TOKENS])
    np.testing.assert_allclose(stepped, read, atol=2e-4)


def without(part: str) -> Callable[[Any], Any]:
    return lambda tensors: {name: each for name, each in tensors.items() if part not in name}


def renamed(old: str, new: str) -> Callable[[Any], Any]:
    return lambda tensors: {name.replace(old, new): each for name, each in tensors.items()}


@pytest.mark.parametrize(
    ("config", "tensors", "reason"),
    [
        ({"peft_type": "IA3"}, None, "LORA"),
        ({"use_dora": True}, None, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, None, "modules_to_save"),
        ({"bias": "all"}, None, "bias"),
        ({"init_lora_weights": "pissa"}, None, "base model"),
        ({"something_new": 3}, None, "something_new"),
        ({"r": 5}, None, "ranks"),
        ({"alpha_pattern": {".*proj": 3}}, None, "expressions"),
        ({"lora_alpha": "much"}, None, "lora_alpha"),
        ({}, without("lora_B"), "lora_A alone"),
        ({}, without("lora"), "no tensor"),
        ({}, renamed("layers.0", "layers.70"), "no such layer"),
        ({}, renamed("self_attn.q_proj", "self_attn"), "no linear layer"),
        ({}, renamed("lora_A", "lora_embedding_A"), "no part of a LoRA"),
        ({}, lambda tensors: {name: each * float("nan") for name, each in tensors.items()}, "not finite"),
        (
            {},
            lambda tensors: {
                name: each[:, :-1].contiguous() if "lora_A" in name else each for name, each in tensors.items()
            },
            "the model's is",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    small_models: dict[str, Path],
    adapter: Path,
    tmp_path: Path,
    config: dict[str, Any],
    tensors: Callable[[Any], Any] | None,
    reason: str,
) -> None:
    folder = changed(adapter, tmp_path / "other", config, tensors)
    with pytest.raises(ModelUnavailable, match=reason) as refused:
        load(small_models["llama"], folder)
    assert refused.value.field == "model.adapter"


def test_pickled_or_damaged_weights_are_never_read(
    small_models: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    pickled = changed(adapter, tmp_path / "pickled")
    (pickled / WEIGHTS_NAME).rename(pickled / "adapter_model.bin")
    damaged = changed(adapter, tmp_path / "damaged")
    (damaged / WEIGHTS_NAME).write_bytes((damaged / WEIGHTS_NAME).read_bytes()[:-9])
    for folder in (pickled, damaged, tmp_path / "absent"):
        with pytest.raises(ModelUnavailable, match="adapter"):
            load(small_models["llama"], folder)


def test_an_adapter_of_the_embedding_that_is_the_head_too_is_refused(
    small_models: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    # Gemma's head is its embedding: what is added to one would be added to the other.
    size = 96
    tensors = {
        "base_model.model.lm_head.lora_A.weight": torch.ones(4, size),
        "base_model.model.lm_head.lora_B.weight": torch.ones(259, 4),
    }
    folder = changed(adapter, tmp_path / "head", {}, lambda _: tensors)
    with pytest.raises(ModelUnavailable, match="embedding"):
        load(small_models["gemma3"], folder)
