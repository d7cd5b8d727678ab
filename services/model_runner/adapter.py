"""LoRA adapters (Hu et al., 2021, arXiv 2106.09685) as PEFT writes them, merged into a model's weights at load.

An adapter is a folder with ``adapter_config.json`` and ``adapter_model.safetensors``: for some linear layers two thin
matrices, whose product, scaled, is added to the layer's weight. Merged once, it costs nothing at run time, and every
path of the engine has it. What a bfloat16 weight cannot hold of a small change is rounded away: the sum is made in
float32 and rounded once.

Only what is understood is merged. A configuration that asks for anything else, tensors that do not fit, or ones that
belong to no layer are refused: half an adapter is another model.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from protocol.errors import ModelUnavailable
from protocol.identity import digest

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"

_PREFIX = "base_model.model."
_TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_PATTERN = re.compile(r"[\w.]+")
_NUMBERS = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
"""Keys of the configuration that what is added depends on, beside the tensors."""
_ABOUT = frozenset(
    {
        *_NUMBERS,
        "peft_type",
        "task_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "target_modules",
        "exclude_modules",
        "lora_dropout",
        "bias",
        "init_lora_weights",
        "layers_to_transform",
        "layers_pattern",
        "peft_version",
        "loftq_config",
        "eva_config",
        "ensure_weight_tying",
        "qalora_group_size",
        "megatron_core",
    }
)
"""Keys that are read here, or that concern training alone. Any other must be empty: it would change what is added."""
_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Ways to begin training that leave the base model's weights alone."""


class _Delta(NamedTuple):
    """What is added to one layer's weight: ``scale`` times B A."""

    a: torch.Tensor
    """(rank, in_features)."""
    b: torch.Tensor
    """(out_features, rank)."""
    scale: float


@dataclass(frozen=True)
class Adapter:
    """An adapter as it was read."""

    folder: Path
    digest: bytes
    """BLAKE3, 32 bytes, of all that its numbers depend on."""
    deltas: dict[str, _Delta]
    """By the name of the linear layer."""

    def merge_into(self, model: torch.nn.Module) -> None:
        """Add it to the weights of ``model``. Raises ModelUnavailable, before anything is changed, when it does not
        fit."""
        layers = {name: self._layer(model, name, delta) for name, delta in self.deltas.items()}
        with torch.no_grad():
            for name, layer in layers.items():
                delta = self.deltas[name]
                weight = layer.weight
                change = delta.scale * (delta.b.float() @ delta.a.float())
                weight.copy_((weight.float() + change.to(weight.device)).to(weight.dtype))

    def _layer(self, model: torch.nn.Module, name: str, delta: _Delta) -> torch.nn.Linear:
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            raise _refused(self.folder, name, "the model has no such layer") from None
        if type(layer) is not torch.nn.Linear:
            raise _refused(self.folder, name, f"the model's is a {type(layer).__name__}, no linear layer")
        shape = (delta.b.shape[0], delta.a.shape[1])
        if layer.weight.shape != shape:
            raise _refused(self.folder, name, f"it is for {shape}, the model's is {tuple(layer.weight.shape)}")
        embedding: Any = getattr(model, "get_input_embeddings", lambda: None)()
        if embedding is not None and embedding.weight is layer.weight:
            raise _refused(self.folder, name, "the model's is its embedding too, which would change with it")
        return layer


def read_adapter(folder: Path) -> Adapter:
    """The adapter in ``folder``. Raises ModelUnavailable, naming what in it cannot be used."""
    config = _config(folder)
    path = folder / WEIGHTS_NAME
    try:
        data = path.read_bytes()
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise _refused(folder, WEIGHTS_NAME, f"{error} (adapters in pickled files are never read)") from error
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        found = _TENSOR.fullmatch(name)
        if found is None or tensor.dim() != 2 or not tensor.is_floating_point():
            raise _refused(
                folder, name, f"a tensor of shape {tuple(tensor.shape)} is no part of a LoRA of linear layers"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise _refused(folder, name, "it holds numbers that are not finite")
        sides.setdefault(found["module"].removeprefix(_PREFIX), {})[found["side"]] = tensor
    if not sides:
        raise _refused(folder, WEIGHTS_NAME, "it holds no tensor")
    deltas = {name: _delta(folder, config, name, pair) for name, pair in sorted(sides.items())}
    numbers = json.dumps({key: config.get(key) for key in _NUMBERS}, sort_keys=True, separators=(",", ":"))
    return Adapter(folder, digest(digest(numbers.encode()), digest(data)), deltas)


def _config(folder: Path) -> dict[str, Any]:
    """Its configuration, once it asks for nothing that is not done here."""
    try:
        config = json.loads((folder / CONFIG_NAME).read_bytes())
    except (OSError, ValueError) as error:
        raise _refused(folder, CONFIG_NAME, str(error)) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise _refused(folder, "peft_type", "LORA is the one kind that is merged")
    for key, value in config.items():
        if key not in _ABOUT and value:
            raise _refused(folder, key, f"{str(value)[:80]}: it changes what is added in a way that is not done here")
    if config.get("bias") not in (None, "none"):
        raise _refused(folder, "bias", f"{config['bias']}: biases are not trained here")
    if not any(config.get("init_lora_weights", True) is each or config["init_lora_weights"] == each for each in _INITS):
        raise _refused(
            folder, "init_lora_weights", f"{config['init_lora_weights']}: it changes the base model's weights"
        )
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(_PATTERN.fullmatch(name) for name in pattern):
            raise _refused(folder, key, "names of layers are understood, expressions are not")
    return config


def _delta(folder: Path, config: dict[str, Any], name: str, pair: dict[str, torch.Tensor]) -> _Delta:
    if len(pair) != 2:
        raise _refused(folder, name, f"it has lora_{next(iter(pair))} alone")
    a, b = pair["A"], pair["B"]
    rank = _of(config, "rank_pattern", name, config.get("r"))
    alpha = _of(config, "alpha_pattern", name, config.get("lora_alpha"))
    if a.shape[0] != b.shape[1] or a.shape[0] != rank:
        raise _refused(folder, name, f"ranks of {a.shape[0]} and {b.shape[1]}, its configuration says {rank}")
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise _refused(folder, "lora_alpha", f"{alpha} is no number")
    return _Delta(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _of(config: dict[str, Any], key: str, name: str, otherwise: Any) -> Any:
    """A figure of the layer ``name``: of the first pattern that is the end of its name, as PEFT matches them."""
    patterns: dict[str, Any] = config.get(key) or {}
    return next((value for end, value in patterns.items() if f".{name}".endswith(f".{end}")), otherwise)


def _refused(folder: Path, field: str, reason: str) -> ModelUnavailable:
    return ModelUnavailable(
        f"loading the adapter in {folder}: {field}: {reason}",
        hint=f"name a folder with a LoRA of this model, as PEFT writes it: {CONFIG_NAME} and {WEIGHTS_NAME}",
        field="model.adapter",
        reason=reason,
    )
