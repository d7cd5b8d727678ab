"""Which engine a node runs, and why: chosen from what is installed, what is built, and what was measured.

A CPU runs the model built for ONNX Runtime as int8, once it is built and near enough to its source; until then, the
transformers engine. A CUDA GPU runs whichever of transformers and onnx was faster when the model was built on this
machine. Without torch only a built model can run. ``model.engine`` and ``model.precision`` say it outright.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edge.config import ModelConfig
from edge.hardware import Choice, Hardware, choose_device, describe
from edge.model_cards import Built, built_models, check_built_files, other_builds
from edge.model_registry import all_models, default_cache_folder
from edge.models import ModelFiles, Progress, ensure, find, is_path
from protocol.errors import ModelUnavailable
from services.model_runner.engine import Engine

BUILD_HINT = "`mindstream models build` makes a built model, which decodes several times as fast"


@dataclass(frozen=True)
class Packages:
    """What can be imported here."""

    transformers: bool
    """torch and transformers."""
    onnxruntime: bool
    cuda_provider: bool
    """Whether onnxruntime can compute on a CUDA GPU."""

    @classmethod
    def installed(cls) -> Packages:
        """Of this Python environment; torch is not imported to find out."""

        def has(*names: str) -> bool:
            return all(importlib.util.find_spec(name) is not None for name in names)

        onnxruntime = has("onnxruntime")
        cuda_provider = False
        if onnxruntime:
            from onnxruntime import get_available_providers

            cuda_provider = "CUDAExecutionProvider" in get_available_providers()
        return cls(has("torch", "transformers"), onnxruntime, cuda_provider)


@dataclass(frozen=True)
class Chosen:
    """An engine and the folder that it loads."""

    engine: str
    """``transformers`` or ``onnx``."""
    folder: Path
    device: Choice
    reason: str
    """Why this engine."""
    built: Built | None = None
    """The built model, for ``onnx``."""

    @property
    def precision(self) -> str:
        """Of a built model's weights; empty for transformers, which has a dtype."""
        return self.built.card.precision if self.built else ""


def choose(
    settings: ModelConfig,
    *,
    cache: Path | None = None,
    packages: Packages | None = None,
    hardware: Hardware | None = None,
    on_progress: Progress = lambda _line: None,
) -> Chosen:
    """The engine for ``settings``, on this machine as it is now; the source is found and converted if it is needed.

    Raises ModelUnavailable with what to do when nothing can run.
    """
    cache = cache or default_cache_folder()
    packages = packages or Packages.installed()
    hardware = hardware or describe()
    folders = [Path(folder) for folder in settings.folders]
    device = _device(settings, hardware, packages)
    if settings.adapter:
        return _adapted(settings, folders, cache, packages, device, on_progress)
    source = _source(settings.name, folders, cache)
    built, refused = _usable(settings, source, cache, packages, device)
    if settings.engine == "onnx" or settings.precision != "auto":
        if settings.engine == "transformers":
            raise ModelUnavailable(
                f"choosing an engine: model.precision = {settings.precision} is of built models, and "
                "model.engine = transformers runs none",
                hint="set model.precision to auto (model.dtype is the dtype of transformers), or model.engine to onnx",
                field="model.precision",
                reason="they contradict each other",
            )
        if built is None:
            raise _no_built(settings, packages, refused)
        return Chosen("onnx", built.folder, device, "set in the configuration", built)
    if settings.engine == "auto" and built is not None:
        if reason := _better(built, device, packages):
            return Chosen("onnx", built.folder, device, reason, built)
        refused = refused or f"{built.card.variant} was not measured to be faster on this machine"
    if not packages.transformers:
        if settings.engine == "transformers":
            why = "torch and transformers are not installed"
            hint = "pip install 'mindstream[model]', or set model.engine to auto"
            raise ModelUnavailable(f"choosing an engine: {why}", hint=hint, reason=why)
        raise _no_built(settings, packages, refused)
    files = ensure(settings.name, cache, on_progress, folders)
    reason = "set in the configuration" if settings.engine == "transformers" else refused
    return Chosen("transformers", files.folder, device, reason or f"nothing is built: {BUILD_HINT}")


def load(chosen: Chosen, settings: ModelConfig, cache_dir: Path | None = None) -> Engine:
    """Load the engine that was chosen. Raises ModelUnavailable."""
    if chosen.built is not None:
        from services.model_runner.onnx_engine import OnnxEngine

        return OnnxEngine.load(
            chosen.folder,
            name=settings.name,
            provider=chosen.built.card.provider,
            threads=settings.threads,
            cache_dir=cache_dir,
        )
    from services.model_runner.transformers_engine import TransformersEngine

    return TransformersEngine.load(
        chosen.folder,
        name=settings.name,
        device=chosen.device.value,
        dtype=settings.dtype,
        threads=settings.threads,
        cache_dir=cache_dir,
        adapter=Path(settings.adapter).expanduser() if settings.adapter else None,
    )


def _adapted(
    settings: ModelConfig,
    folders: Sequence[Path],
    cache: Path,
    packages: Packages,
    device: Choice,
    on_progress: Progress,
) -> Chosen:
    """The engine for a model with an adapter: a built graph's weights are rounded already, and nothing is added to
    them."""
    if settings.engine == "onnx" or settings.precision != "auto":
        raise ModelUnavailable(
            "choosing an engine: model.adapter is set, and built models take no adapter",
            hint="set model.engine and model.precision to auto, or remove model.adapter",
            field="model.adapter",
            reason="they contradict each other",
        )
    if not packages.transformers:
        raise ModelUnavailable(
            "choosing an engine: model.adapter is set, and torch and transformers are not installed",
            hint="pip install 'mindstream[model]', or remove model.adapter",
            field="model.adapter",
            reason="no engine takes an adapter",
        )
    files = ensure(settings.name, cache, on_progress, folders)
    reason = f"the one that takes an adapter: {Path(settings.adapter).name}"
    return Chosen("transformers", files.folder, device, reason)


def _device(settings: ModelConfig, hardware: Hardware, packages: Packages) -> Choice:
    if settings.device != "auto":
        return Choice(settings.device, "set in the configuration")
    if not hardware.cuda or packages.cuda_provider or not packages.transformers:
        return choose_device(hardware, torch_cuda=packages.cuda_provider)
    from torch.cuda import is_available  # only where there is a GPU: importing torch takes a second

    return choose_device(hardware, torch_cuda=is_available())


def _source(name: str, folders: Sequence[Path], cache: Path) -> ModelFiles | None:
    """The source, if it is here. A model that only a peer has is known by its built folder alone."""
    if not is_path(name) and name not in [model.name for model in all_models(cache)]:
        return None
    return find(name, folders, cache)


def _usable(
    settings: ModelConfig, source: ModelFiles | None, cache: Path, packages: Packages, device: Choice
) -> tuple[Built | None, str]:
    """The built model that fits best, and why others were passed over."""
    name = Path(settings.name).expanduser().name if is_path(settings.name) else settings.name
    provider = "cuda" if device.value.startswith("cuda") else "cpu"
    wanted = [settings.precision] if settings.precision != "auto" else _by_preference(provider)
    explicit = settings.precision != "auto"
    refused = [f"{folder.name}: {error.reason} ({error.hint})" for folder, error in other_builds(cache, name)]
    found = []
    for built in built_models(cache, name):
        card = built.card
        if card.precision not in wanted:
            continue
        if not packages.onnxruntime:
            refused.append("onnxruntime is not installed: pip install 'mindstream[onnx]'")
        elif card.provider == "cuda" and not packages.cuda_provider:
            refused.append(f"{card.variant}: the installed onnxruntime has no CUDA provider")
        elif not _same_source(built, settings.name, source, cache):
            refused.append(f"{card.variant} was built from other weights than those here")
        elif card.not_default and not explicit:
            refused.append(f"{card.variant} is not default: {card.not_default}")
        else:
            try:
                check_built_files(built, cache)
            except ModelUnavailable as error:
                refused.append(f"{card.variant}: {error.message} ({error.hint})")
                continue
            found.append(built)
    found.sort(key=lambda built: (built.card.provider != provider, wanted.index(built.card.precision)))
    return (found[0] if found else None), "; ".join(dict.fromkeys(refused))


def _by_preference(provider: str) -> list[str]:
    # int4 is smaller and may be faster, and rounds more: it is taken when it is asked for.
    return ["fp16", "int8", "fp32"] if provider == "cuda" else ["int8", "fp32"]


def _same_source(built: Built, name: str, source: ModelFiles | None, cache: Path) -> bool:
    """Whether a built model is of the weights that lie here; true where none do."""
    if source is None:
        return True
    files = {file.name: file.size_bytes for file in built.card.source.files}
    if is_path(name):
        weights = sorted(source.folder.glob("*.safetensors"))
        return all(files.get(path.name) == path.stat().st_size for path in weights)
    row = next(model for model in all_models(cache) if model.name == name)
    return row.files[0].sha256 == built.card.source.identity


def _better(built: Built, device: Choice, packages: Packages) -> str:
    """Why the built model is to be run rather than transformers; empty when it is not."""
    card, measured = built.card, built.card.measured
    assert measured is not None
    near = f"perplexity {measured.perplexity_pct:+.2f} % against its source"
    if not packages.transformers:
        return f"built as {card.variant}, {near}; torch is not installed"
    if not device.value.startswith("cuda"):
        return f"built as {card.variant}, {near}; the faster engine on a CPU"
    own, other = measured.decode_tokens_per_s, measured.source_decode_tokens_per_s
    if own and other and card.provider == "cuda" and own > other:
        return f"built as {card.variant}, {near}; {own:.0f} tokens/s here against {other:.0f} on transformers"
    return ""


def _no_built(settings: ModelConfig, packages: Packages, refused: str) -> ModelUnavailable:
    what = settings.name if settings.precision == "auto" else f"{settings.name} as {settings.precision}"
    precision = "int8" if settings.precision == "auto" else settings.precision
    build = f"mindstream models build {settings.name} --precision {precision}"
    elsewhere = (
        f"on a node that has torch: {build}; then here: mindstream models fetch {settings.name} --from NODE"
        + (f" --precision {precision}" if precision != "int8" else "")
        + f", or copy that folder of its cache into {default_cache_folder()}"
    )
    if not packages.onnxruntime and not packages.transformers:
        return ModelUnavailable(
            f"choosing an engine for {what}: neither torch with transformers nor onnxruntime is installed",
            hint="pip install 'mindstream[model]', or 'mindstream[onnx]' on a node without torch",
            reason="no engine",
        )
    return ModelUnavailable(
        f"choosing an engine for {what}: no built model of it can run here" + (f": {refused}" if refused else ""),
        hint=build if packages.transformers else elsewhere,
        field="model.engine" if settings.engine == "onnx" else "model.name",
        reason="no built model",
    )
