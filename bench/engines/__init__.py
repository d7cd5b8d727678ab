"""`mindstream bench engines`: every engine on one model, alone and serving, against stock transformers.

The baseline is transformers' ``generate`` with its default cache in bfloat16. Engines run in processes of their own
that take turns, with the same number of threads; medians of several rounds are compared. What is served is measured
on a real node over the bus. Keys without an engine's name are of the engine that a node chooses by itself.
"""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.engines import fidelity, serving, speed
from bench.engines.loading import english
from bench.engines.options import ENGINES, PARTS, Model, Options
from bench.report import Figures, Progress, machine, silent, versions
from edge.model_cards import built_models
from edge.models import default_cache_folder, ensure, find
from protocol.errors import ConfigError, MindstreamError, ModelUnavailable
from services.model_runner.chat import ChatFormat

__all__ = ["Model", "Options", "model_of", "run"]

FAMILY = "gemma3-270m"
"""Measured beside the configured model where its files are at hand."""
TINY = ("tiny-qwen2", "tiny-lfm2")
"""Families that stand in with random weights, since no small real model of theirs can be had everywhere; the second has
recurrent layers."""
_FAMILY_CONTEXTS = (64, 1024)


def model_of(name: str, folders: Sequence[Path], progress: Progress) -> Model:
    """A model and what was built from it. Raises ModelUnavailable."""
    files = ensure(name, on_progress=progress, folders=folders)
    built = {each.card.variant: each.folder for each in built_models(default_cache_folder(), files.name)}
    return Model(name, files.folder, built)


def families(folders: Sequence[Path], progress: Progress) -> list[Model]:
    """The other family, if it is here."""
    try:
        return [model_of(FAMILY, folders, progress)] if find(FAMILY, folders) is not None else []
    except ModelUnavailable as error:
        progress(f"{FAMILY} is left out: {error}")
        return []


def run(options: Options, progress: Progress = silent) -> Figures:
    """Measure, telling ``progress`` a line now and then. Raises what the engines and the node raise."""
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        raise ConfigError(f"{unknown[0]!r} is none of {', '.join(PARTS)}", field="--only", reason="unknown part")
    options = options.effective()
    model = options.model
    cuda = _cuda()
    engines = model.engines(options.threads, cuda=cuda)
    for label in set(ENGINES[2:]) - {which.label for which in engines}:
        precision = label.removeprefix("onnx_")
        progress(f"{label} is not measured: `mindstream models build {model.name} --precision {precision}` makes it")
    corpus = ChatFormat.load(model.folder).encode(english(), special=False)
    figures: Figures = {"model": model.name, "threads": options.threads}
    if "decode" in options.parts:
        figures |= dict.fromkeys(speed.keys())
        figures |= speed.measure(engines, corpus, options, progress)
        figures |= speed.ratios(figures)
        for family in options.families:
            figures |= _family_speed(family, options, cuda, progress)
    if "quality" in options.parts:
        figures |= fidelity.quality(model, progress)
    if "agreement" in options.parts:
        figures |= fidelity.agreement(engines, corpus, options, progress)
    if "resume" in options.parts:
        figures |= _resume(options, corpus, progress)
    if "serving" in options.parts:
        figures |= serving.measure(options, corpus, progress)
    return figures | {
        "machine": machine(),
        "versions": versions("torch", "transformers", "numpy", *(["onnxruntime"] if _has("onnxruntime") else [])),
        "baseline": "torch_stock: transformers generate(), its default DynamicCache and SDPA attention, bfloat16, the "
        "same threads and context; for serving ratios the same node idle, one conversation at a time, or over the bus",
    }


def _family_speed(family: Model, options: Options, cuda: bool, progress: Progress) -> Figures:
    fewer = Options(**{**options.__dict__, "contexts": _FAMILY_CONTEXTS}) if not options.quick else options
    corpus = ChatFormat.load(family.folder).encode(english(), special=False)
    prefix = f"{fidelity.slug(family.name)}_"
    return speed.measure(family.engines(options.threads, cuda=cuda), corpus, fewer, progress, prefix=prefix)


def _resume(options: Options, corpus: list[int], progress: Progress) -> Figures:
    """Of the model, of the other families at hand, and of small ones with random weights, made and built here."""
    corpora = {options.model.name: corpus}
    with tempfile.TemporaryDirectory(prefix="mindstream-bench-") as scratch:
        for family in options.families:
            corpora[family.name] = ChatFormat.load(family.folder).encode(english(), special=False)
        tiny = [_tiny(name, options.model.folder, Path(scratch), progress) for name in TINY]
        for model in tiny:
            corpora[model.name] = [token % 1_000 for token in corpus]
        everything = Options(**{**options.__dict__, "families": (*options.families, *tiny)})
        return fidelity.resumes(everything, corpora, progress)


def _tiny(name: str, tokenizer: Path, scratch: Path, progress: Progress) -> Model:
    """A model of few layers with random weights, and its int8 graph where the builder makes one."""
    import shutil

    import torch
    import transformers

    from edge.model_build import build

    folder = scratch / name
    sizes: dict[str, Any] = {
        "vocab_size": 1_024,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4_096,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "bos_token_id": 0,
    }
    config = (
        transformers.Lfm2Config(**sizes, num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"])
        if name == "tiny-lfm2"
        else transformers.Qwen2Config(**sizes, num_hidden_layers=2)
    )
    torch.manual_seed(2026)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        if (tokenizer / file).is_file():
            shutil.copyfile(tokenizer / file, folder / file)
    built = {}
    try:
        made = build(str(folder), "int8", "cpu", cache_dir=scratch / "built", check=False, on_progress=progress)
        built[made.card.variant] = made.folder
    except MindstreamError as error:
        progress(f"{name} is not built for onnx: {error}")
    return Model(name, folder, built)


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _has(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
