"""A built model's folder, opened: the session, and what the graph and the files beside it say of the model.

The folder holds model.onnx and its weights as onnxruntime-genai's builder writes them, genai_config.json, and the
source's config.json and tokenizer. All that cannot be run here is refused with its reason, before anything is
computed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state

from edge.hardware import Choice, describe
from edge.model_cards import CARD_NAME, GRAPH_NAME
from protocol.errors import ModelError, ModelUnavailable
from services.model_runner.digests import model_digests
from services.model_runner.engine import LayerSpec, ModelSpec
from services.model_runner.onnx_graph import INDICES_NAME, PAST_NAME, AttentionNode, attention_nodes

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}

_SESSION_OPTIONS = {
    # A step is some 300 short products, and a sleeping thread wakes too late for them: threads wait awake for a
    # moment, and not for the milliseconds that are the default and that the broker beside them needs.
    "session.intra_op.allow_spinning": "1",
    "session.intra_op.spin_duration_us": "100",
}

_NUMPY_DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16"}

RUNTIME_ERRORS: tuple[type[Exception], ...] = (
    MemoryError,
    OSError,
    RuntimeError,
    ValueError,
    *(
        error
        for error in vars(onnxruntime_pybind11_state).values()
        if isinstance(error, type) and issubclass(error, Exception)
    ),
)
"""What ONNX Runtime raises: its errors have no root of their own below Exception."""


def choose_provider(available: Sequence[str], wanted: str = "auto") -> Choice:
    """``cpu``, ``cuda`` or ``tensorrt``, from what ``onnxruntime.get_available_providers()`` says.

    Raises ModelUnavailable when the wanted one is not there.
    """
    if wanted == "auto":
        if PROVIDERS["cuda"] in available:
            return Choice("cuda", "the installed onnxruntime has CUDA")
        return Choice("cpu", "the installed onnxruntime has no CUDA")
    if wanted not in PROVIDERS or PROVIDERS[wanted] not in available:
        known = ", ".join(name for name, provider in PROVIDERS.items() if provider in available)
        raise ModelUnavailable(
            f"choosing where ONNX Runtime computes: {wanted!r} is not available, {known} is",
            hint="set it to auto, or install the onnxruntime that has it (the gpu extra)",
            field="provider",
            reason="no such provider",
        )
    return Choice(wanted, "set in the configuration")


class OpenModel(NamedTuple):
    """A built model that is ready to compute."""

    session: onnxruntime.InferenceSession
    spec: ModelSpec
    provider: Choice
    precision: str
    """Of the weights, as the builder was asked: ``int8``, ``int4``, ``fp16`` or ``fp32``; empty when it is not said."""
    threads: int
    angles: tuple[npt.NDArray[np.float64], ...] | None
    """Of each layer: by how much, in radians, dimensions i and i + n of n angles are turned with each position; None
    where positions go in otherwise than that."""


def open_model(folder: Path, name: str, provider: str, threads: int, cache_dir: Path | None) -> OpenModel:
    """Open the built model in ``folder``; the arguments are those of ``OnnxEngine.load``. Raises ModelUnavailable."""
    choice = choose_provider(onnxruntime.get_available_providers(), provider)
    nodes = attention_nodes(folder / GRAPH_NAME)
    settings = _Settings.read(folder)
    threads = threads or describe().cores
    session = _open(folder, choice.value, threads)
    spec = _spec(folder, session, nodes, settings, name or folder.name, cache_dir)
    return OpenModel(session, spec, choice, settings.precision, threads, _angles(folder, spec))


_ROTARY = frozenset({"llama", "mistral", "qwen2", "gemma3", "gemma3_text"})
"""Families whose heads are turned whole, in halves (RoFormer, arXiv 2104.09864), at one pace for each kind of layer."""


def _angles(folder: Path, spec: ModelSpec) -> tuple[npt.NDArray[np.float64], ...] | None:
    """As ``OpenModel.angles``, from the source's configuration."""
    config = _json(folder / "config.json")
    text = config.get("text_config", config)
    rope = text.get("rope_parameters")
    if text.get("model_type") not in _ROTARY or not isinstance(rope, dict):
        return None
    found = []
    for layer in spec.layers:
        own = rope.get(f"{layer.kind}_attention", rope)
        if not isinstance(own, dict) or own.get("rope_type") != "default" or own.get("partial_rotary_factor", 1) != 1:
            return None
        theta = own.get("rope_theta")
        if not isinstance(theta, (int, float)) or theta <= 0 or layer.head_dim % 2:
            return None
        found.append(float(theta) ** (-np.arange(0, layer.head_dim, 2, dtype=np.float64) / layer.head_dim))
    return tuple(found)


class _Settings(NamedTuple):
    """What the files beside the graph say."""

    context_tokens: int
    eos_token_ids: frozenset[int]
    head_dim: int
    precision: str

    @classmethod
    def read(cls, folder: Path) -> _Settings:
        """Raises ModelUnavailable."""
        genai = _json(folder / "genai_config.json")
        config = _json(folder / "config.json")
        text = config.get("text_config", config)
        generation = _json(folder / "generation_config.json") if (folder / "generation_config.json").is_file() else {}
        card = _json(folder / CARD_NAME) if (folder / CARD_NAME).is_file() else {}
        try:
            model = genai["model"]
            eos: set[int] = set()
            for source in (generation, text, model):
                ids = source.get("eos_token_id")
                eos.update([ids] if isinstance(ids, int) else ids or [])
            return cls(
                context_tokens=min(int(model["context_length"]), int(text["max_position_embeddings"])),
                eos_token_ids=frozenset(eos),
                head_dim=int(model["decoder"]["head_size"]),
                precision=str(card.get("precision", "")),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _damaged(folder, f"its configuration lacks something: {type(error).__name__} {error}") from error


def _open(folder: Path, provider: str, threads: int) -> onnxruntime.InferenceSession:
    """The session. Raises ModelUnavailable."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # What fails is raised, and told once.
    # A pattern is kept for each shape of the inputs, and a conversation has a new one at each token.
    options.enable_mem_pattern = False
    for key, value in _SESSION_OPTIONS.items():
        options.add_session_config_entry(key, value)
    names = [PROVIDERS[name] for name in dict.fromkeys((provider, "cuda" if provider != "cpu" else "cpu", "cpu"))]
    try:
        return onnxruntime.InferenceSession(str(folder / GRAPH_NAME), options, providers=names)
    except RUNTIME_ERRORS as error:
        raise ModelUnavailable(
            f"loading the graph in {folder} with onnxruntime {onnxruntime.__version__}: {_first_line(error)}",
            hint="build the model again, with the versions that are installed here",
            reason=type(error).__name__,
        ) from error


def _spec(
    folder: Path,
    session: onnxruntime.InferenceSession,
    nodes: dict[int, AttentionNode],
    settings: _Settings,
    name: str,
    cache_dir: Path | None,
) -> ModelSpec:
    """What the graph is, for conversations and snapshots. Raises ModelUnavailable when it is none that runs here."""
    inputs = {each.name: each for each in session.get_inputs()}
    outputs = {each.name: each for each in session.get_outputs()}
    count = sum(1 for each in inputs if PAST_NAME.fullmatch(each)) // 2
    kv = [f"{layer}.{what}" for layer in range(count) for what in ("key", "value")]
    wanted = {"input_ids", "attention_mask", *(f"past_key_values.{each}" for each in kv)}
    unknown = set(inputs) - wanted - {"position_ids", INDICES_NAME}
    missing = (wanted - set(inputs)) | ({"logits", *(f"present.{each}" for each in kv)} - set(outputs))
    if missing or unknown or not count:
        what = (
            f"lacks {', '.join(sorted(missing)[:3])}"
            if missing
            else f"wants {', '.join(sorted(unknown)[:3]) or 'no KV'}"
        )
        raise _damaged(folder, f"its graph {what}", "build it with `mindstream models build`: this graph is another's")
    layers = []
    for layer in range(count):
        node = nodes.get(layer)
        shape = inputs[f"past_key_values.{layer}.key"].shape
        if node is None or node.op_type != "GroupQueryAttention" or node.rolls_cache or len(shape) != 4:
            kind = node.op_type if node else "no attention"
            rolling = " with a rolling cache" if node and node.rolls_cache else ""
            raise _damaged(folder, f"its layer {layer} is {kind}{rolling}, which this engine cannot cache")
        head_dim = shape[3] if isinstance(shape[3], int) else settings.head_dim
        window = node.window_tokens
        layers.append(LayerSpec("sliding" if window else "full", int(shape[1]), head_dim, window))
    kv_type = inputs["past_key_values.0.key"].type
    vocabulary = outputs["logits"].shape[-1]
    if kv_type not in _NUMPY_DTYPES or not isinstance(vocabulary, int):
        raise _damaged(folder, f"its KV is {kv_type} and its vocabulary {vocabulary}")
    return ModelSpec(
        name=name,
        layers=tuple(layers),
        vocab_size=vocabulary,
        context_tokens=settings.context_tokens,
        eos_token_ids=settings.eos_token_ids,
        dtype=_NUMPY_DTYPES[kv_type],
        dtype_reason=f"the model was built so{f' ({settings.precision} weights)' if settings.precision else ''}",
        digests=model_digests(folder, weights=(GRAPH_NAME, *_data_files(folder)), cache_dir=cache_dir),
    )


def _data_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(f"{GRAPH_NAME}*") if path.name != GRAPH_NAME)


def failed(spec: ModelSpec, tokens: int, error: Exception) -> ModelError:
    text = _first_line(error)
    if isinstance(error, MemoryError) or "alloc" in text.lower() or "memory" in text.lower():
        return ModelError(
            f"computing {tokens:,} positions of {spec.name}: out of memory ({text})",
            hint="close other conversations, use a shorter context, or a smaller model",
            reason="out of memory",
        )
    return ModelError(
        f"computing {tokens:,} positions of {spec.name}: {text}",
        hint="build the model again, with the versions that are installed here",
        reason=type(error).__name__,
    )


def _damaged(
    folder: Path, why: str, hint: str = "build the model again: its folder is not complete"
) -> ModelUnavailable:
    return ModelUnavailable(f"loading the built model in {folder}: {why}", hint=hint, reason="unusable graph")


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
        return content
    except (OSError, ValueError) as error:
        raise _damaged(path.parent, f"{path.name} cannot be read: {error}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:400]


def instruction_set() -> str:
    """What decides how ONNX Runtime rounds on this CPU: its instruction sets, and the cache that its tiles fit."""
    hardware = describe()
    try:
        level2 = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
    except OSError:
        level2 = "unknown"
    return "+".join([*(hardware.cpu_flags or (hardware.arch,)), f"L2={level2}"])
