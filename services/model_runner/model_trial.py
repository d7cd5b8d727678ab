"""What a model that transformers loads keeps of a conversation, found by trying it, and how it has to be run.

Which layers a model has, and of what shape, is read off transformers' own cache once a few tokens have gone into it.
The families of fast_decode.py are held by tests. Any other model is tried: its answer to a few tokens read in pieces,
with another conversation in between, must be its answer to all of them read at once by transformers alone, without a
cache. So a model that keeps its state where we do not see it, or whose attention is not what ours computes, is
refused, or run with transformers' own attention, and never answers wrongly.
"""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from protocol.errors import ModelError, ModelUnavailable
from services.model_runner import attention
from services.model_runner.engine import LayerKind, LayerSpec, ModelSpec, StateSpec
from services.model_runner.kv_cache import CONV, RECURRENT, TorchKVCache

FAILURES = (AttributeError, IndexError, KeyError, ModelError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What a model raises that is given a cache which it does not understand."""

_KINDS: dict[type, LayerKind] = {
    DynamicLayer: "full",
    DummyLayer: "full",
    DynamicSlidingWindowLayer: "sliding",
    LinearAttentionLayer: "recurrent",
    LinearAttentionAndFullAttentionLayer: "full",
    LinearAttentionAndSlidingWindowAttentionLayer: "sliding",
}
_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
_KERNELS = ("causal-conv1d", "flash-linear-attention", "mamba-ssm")
"""Packages that transformers computes recurrent layers with where they are installed."""

_TRIAL_TOKENS = 24
_PIECES = (8, 16, 23, 24)
_FAR = {"float32": 1e-3, "bfloat16": 0.2, "float16": 0.1}
"""How far an answer may be from the expected one, as a part of what other earlier tokens change in it."""


@dataclass(frozen=True)
class Kept:
    """What a model keeps, and where it wants it."""

    layers: tuple[LayerSpec, ...]
    argument: str
    """Of ``forward``, that takes the cache."""


@dataclass(frozen=True)
class Settled:
    """How a model is run."""

    attention: str
    """``attention.NAME``, or one of transformers'."""
    chunks_whole: bool
    """False: its code for several tokens begins afresh, so that what comes after the first chunk is read one by one."""
    kernels: str

    def __str__(self) -> str:
        return f"{self.attention} attention" + ("" if self.chunks_whole else ", one by one") + self.kernels


def unusable(model: PreTrainedModel, what: str, reason: str) -> ModelUnavailable:
    """The refusal of a model that was tried."""
    return ModelUnavailable(
        f"trying a model of type {model.config.model_type} with {what}",
        hint="this engine cannot keep its conversations: use another model",
        field="model.name",
        reason=reason,
    )


def cache_of(model: PreTrainedModel, dtype: str) -> Kept:
    """The layers of ``model``, whose activations are of ``dtype``. Raises ModelUnavailable for what cannot be kept."""
    parameters = inspect.signature(model.forward).parameters
    argument = next((name for name in ("past_key_values", "cache_params") if name in parameters), "")
    if not argument:
        raise unusable(model, "a cache: it takes none of transformers' own", "no cache")
    text: Any = model.config.get_text_config(decoder=True)
    try:
        cache = DynamicCache(config=text)
        ids = torch.tensor([_tokens(text.vocab_size, 1)[:3]], device=model.device)
        model(input_ids=ids, use_cache=True, **{argument: cache})
    except FAILURES as error:
        raise unusable(model, f"transformers' own cache: {error}", "unsupported cache") from error
    specs = tuple(_spec(model, index, layer, dtype) for index, layer in enumerate(cache.layers))
    if not any(spec.kv_heads or spec.states for spec in specs):
        raise unusable(model, "transformers' own cache: nothing was written to it", "unsupported cache")
    return Kept(specs, argument)


def settle(
    model: PreTrainedModel,
    spec: ModelSpec,
    new_cache: Callable[[], TorchKVCache],
    read: Callable[[TorchKVCache, Sequence[int], bool], torch.Tensor],
) -> Settled:
    """Try ``model`` and say how it answers rightly; it is left with that attention.

    Args:
        read: (cache, tokens, whether a chunk may be read at once) to the logits after the last of them.

    Raises ModelUnavailable when it does not.
    """
    tokens, others = _tokens(spec.vocab_size, 1), _tokens(spec.vocab_size, 7)
    others[-1] = tokens[-1]
    kernels = _kernels() if spec.state_bytes else ""
    why = ""
    try:
        use_attention(model, "eager")
        expected, other = _whole(model, tokens), _whole(model, others)
    except FAILURES as error:
        raise unusable(model, f"{len(tokens)} tokens and no cache: {error}", "unsupported model") from error
    scale = float(_distance(expected, other)) + 0.05 * float(expected.std())
    for name in _attentions(model, spec):
        for whole in _ways(spec):
            try:
                use_attention(model, name)
                if whole and spec.state_bytes and not _goes_on(tokens, new_cache, read):
                    continue
                found = _in_pieces(tokens, others, whole, new_cache, read)
            except FAILURES as error:
                why = str(error)
                break
            far = _distance(expected, found) / scale
            if far <= _FAR[spec.dtype]:
                return Settled(name, whole, kernels)
            why = f"read in pieces its answer is another than read at once (by {far:.3f} of what other text changes)"
    raise unusable(model, f"{len(tokens)} tokens in pieces: {why}", "unsupported cache")


def use_attention(model: PreTrainedModel, name: str) -> None:
    """Compute with this attention from now on. Raises ValueError when the model cannot."""
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        # Modules with attention of their own: the name says only whether a mask is made for them.
        model.config._attn_implementation = name


def _spec(model: PreTrainedModel, index: int, layer: Any, dtype: str) -> LayerSpec:
    """What one of transformers' layers was seen to keep."""
    kind = _KINDS.get(type(layer))
    if kind is None:
        raise unusable(
            model, f"its cache: layer {index} keeps a {type(layer).__name__}, which is not known", "unsupported layer"
        )
    states = tuple(_states(model, index, layer)) if isinstance(layer, LinearAttentionLayer) else ()
    if isinstance(layer, LinearAttentionLayer) and not states:
        raise unusable(model, f"its cache: layer {index} keeps its state elsewhere", "unsupported layer")
    if type(layer) in (DummyLayer, LinearAttentionLayer):
        return LayerSpec(kind, 0, 0, states=states)
    keys, values = layer.keys, layer.values
    if keys is None or not keys.numel():
        raise unusable(model, f"its cache: layer {index} keeps its keys and values elsewhere", "unsupported layer")
    if keys.shape != values.shape or keys.dim() != 4 or keys.shape[0] != 1 or _DTYPES.get(keys.dtype) != dtype:
        raise unusable(
            model,
            f"its cache: layer {index} keeps keys {tuple(keys.shape)} and values {tuple(values.shape)} of "
            f"{keys.dtype}, not both (1, heads, tokens, size) of {dtype}",
            "unsupported layer",
        )
    window = int(layer.sliding_window) if kind == "sliding" else 0
    return LayerSpec(kind, int(keys.shape[1]), int(keys.shape[3]), window, states)


def _states(model: PreTrainedModel, index: int, layer: LinearAttentionLayer) -> Iterator[StateSpec]:
    for number in range(layer.number_of_states):
        for kind, tensor in ((CONV, layer.conv_states[number]), (RECURRENT, layer.recurrent_states[number])):
            if tensor is None:
                continue
            dtype = _DTYPES.get(tensor.dtype)
            if dtype is None or tensor.shape[0] != 1:
                raise unusable(
                    model, f"its cache: a state of layer {index} is {tuple(tensor.shape)} {tensor.dtype}", "unsupported"
                )
            yield StateSpec(tuple(tensor.shape[1:]), dtype, f"{kind}.{number}")


def _attentions(model: PreTrainedModel, spec: ModelSpec) -> tuple[str, ...]:
    """Which attention may be right, the fastest first. A short trial does not reach what comes with length or with
    large scores, so ours is not tried on windows, nor torch's where scores are capped; and a model whose modules have
    attention of their own would only be kept from making its masks."""
    text: Any = model.config.get_text_config(decoder=True)
    if not any(layer.kv_heads for layer in spec.layers) or not model._can_set_attn_implementation():
        return ("eager",)
    if getattr(text, "attn_logit_softcapping", None):
        return ("eager",)
    if any(layer.kind == "sliding" for layer in spec.layers) or getattr(text, "attention_chunk_size", None):
        return ("sdpa", "eager")
    return (attention.NAME, "sdpa", "eager")


def _ways(spec: ModelSpec) -> tuple[bool, ...]:
    return (True, False) if spec.state_bytes else (True,)


def _goes_on(
    tokens: Sequence[int],
    new_cache: Callable[[], TorchKVCache],
    read: Callable[[TorchKVCache, Sequence[int], bool], torch.Tensor],
) -> bool:
    """Whether several tokens read at once go on from the states of those before: some models' code for a chunk begins
    with empty ones. That changes little in so short a text, so the states are made large: then it changes much."""
    answers = []
    for factor in (1.0, 1_000.0):
        cache = new_cache()
        read(cache, tokens[:8], True)
        for layer in cache.layers:
            for spec, state in zip(layer.spec.states, layer.states(), strict=True):
                if spec.name.startswith(RECURRENT) or len(layer.spec.states) == 1:
                    state.mul_(factor)
        answers.append(read(cache, tokens[8:10], True))
    return not torch.equal(*answers)


def _in_pieces(
    tokens: Sequence[int],
    others: Sequence[int],
    whole: bool,
    new_cache: Callable[[], TorchKVCache],
    read: Callable[[TorchKVCache, Sequence[int], bool], torch.Tensor],
) -> torch.Tensor:
    """The last logits, with another conversation read in between."""
    cache, beside = new_cache(), new_cache()
    start = 0
    for end in _PIECES:
        found = read(cache, tokens[start:end], whole)
        read(beside, others[start:end], whole)
        start = end
    return found


def _whole(model: PreTrainedModel, tokens: Sequence[int]) -> torch.Tensor:
    ids = torch.tensor([list(tokens)], device=model.device)
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0, -1].float()
    return logits


def _tokens(vocabulary: int, factor: int) -> list[int]:
    """Numbers without an order that a model could have learnt, the same each time."""
    return [(11 + factor * 7_919 * (at + 1) * (at + 3)) % vocabulary for at in range(_TRIAL_TOKENS)]


def _distance(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Root mean square of the difference, both centred: logits say the same with a constant added."""
    difference = (one - one.mean()) - (other - other.mean())
    return difference.pow(2).mean().sqrt()


def _kernels() -> str:
    found = []
    for package in _KERNELS:
        try:
            found.append(f" {package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return "".join(found)
