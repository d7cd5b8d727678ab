"""Attention over a KV cache that is fast on a CPU, registered with transformers as ``mindstream``.

Grouped-query attention has several query heads for each KV head. torch's own kernel for that case
(``enable_gqa``) is slow on a CPU, and repeating the KV heads copies the cache. Here the query heads of one KV head
are packed instead, as if they were more queries of that head: the cache is read once and never copied.

Masks come from the shapes alone: a batch of one without padding, whose last query is the newest position.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as functional
from transformers import AttentionInterface

from protocol.errors import ModelError

NAME = "mindstream"

_MASKS_KEPT = 3
"""The masks of one chunk: one for full layers, one for sliding ones, one for ``Looked``."""

_MaskKey = tuple[int, int, int, torch.dtype, torch.device]
_masks: OrderedDict[_MaskKey, torch.Tensor] = OrderedDict()


def causal_mask(queries: int, keys: int, window_tokens: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Additive mask of shape (queries, keys): 0 where a query may look, -inf elsewhere.

    The last query stands at the last key. With ``window_tokens`` above 0 a query sees that many keys, itself
    included. The masks of the latest chunk are kept, since every layer of a kind asks for the same one.
    """
    wanted: _MaskKey = (queries, keys, window_tokens, dtype, device)
    found = _masks.get(wanted)
    if found is not None:
        return found
    query = torch.arange(keys - queries, keys, device=device).unsqueeze(1)
    key = torch.arange(keys, device=device).unsqueeze(0)
    hidden = key > query
    if window_tokens:
        hidden |= key <= query - window_tokens
    mask = torch.zeros((queries, keys), dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
    _masks[wanted] = mask
    while len(_masks) > _MASKS_KEPT:
        _masks.popitem(last=False)
    return mask


def packed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window_tokens: int = 0
) -> torch.Tensor:
    """Causal softmax attention for grouped query heads.

    Args:
        query: (1, query_heads, queries, head_dim); the last query is at the last key's position.
        key: (1, kv_heads, keys, head_dim).
        value: the same shape as ``key``.
        scale: factor on the scores before the softmax.
        window_tokens: keys a query sees, itself included; 0 for all.

    Returns:
        (1, queries, query_heads, head_dim), the layout transformers' modules expect.
    """
    _, query_heads, queries, head_dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    groups = query_heads // kv_heads
    if queries == 1:
        # The cache hands a single query exactly what it may see, so there is nothing to mask.
        packed = query.reshape(1, kv_heads, groups, head_dim)
        out = functional.scaled_dot_product_attention(packed, key, value, scale=scale)
        return out.reshape(1, 1, query_heads, head_dim)
    square = keys == queries and (not window_tokens or keys <= window_tokens)
    mask = None if square else causal_mask(queries, keys, window_tokens, query.dtype, query.device)
    grouped = query.view(1, kv_heads, groups, queries, head_dim)
    out = query.new_empty((1, queries, kv_heads, groups, head_dim))
    # One call a group, with one mask for all: packing many queries would need a mask a group times larger.
    for group in range(groups):
        part = functional.scaled_dot_product_attention(
            grouped[:, :, group], key, value, attn_mask=mask, is_causal=mask is None, scale=scale
        )
        out[:, :, :, group] = part.transpose(1, 2)
    return out.view(1, queries, query_heads, head_dim)


class Looked:
    """How strongly each key of full attention is looked at while ``looking`` is entered."""

    def __init__(self) -> None:
        self.most: dict[int, torch.Tensor] = {}
        """Of each layer, float32 (kv_heads, keys): the largest share of attention that any query gave a key."""

    def add(self, layer: int, query: torch.Tensor, key: torch.Tensor, scale: float) -> None:
        """Count a chunk's queries, of ``packed_attention``'s shapes. Costs about what attention itself does."""
        _, query_heads, queries, head_dim = query.shape
        kv_heads, keys = key.shape[1], key.shape[2]
        grouped = query.reshape(kv_heads, query_heads // kv_heads, queries, head_dim)
        mask = causal_mask(queries, keys, 0, torch.float32, query.device)
        rows = []
        # One KV head at a time: the scores of all would take as much memory as the cache.
        for head in range(kv_heads):
            packed = (grouped[head] * scale).float().reshape(-1, head_dim)
            scores = (packed @ key[0, head].float().T).view(-1, queries, keys).add_(mask)
            rows.append(torch.softmax(scores, -1).amax((0, 1)))
        found, before = torch.stack(rows), self.most.get(layer)
        if before is not None:
            earlier = found[:, : before.shape[1]]
            torch.maximum(earlier, before, out=earlier)
        self.most[layer] = found


_looking: list[Looked] = []


@contextlib.contextmanager
def looking(looked: Looked) -> Iterator[None]:
    """While entered, what models of this process read is counted into ``looked``. On one thread at a time."""
    _looking.append(looked)
    try:
        yield
    finally:
        _looking.remove(looked)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature around ``packed_attention``.

    Raises ModelError for what it does not compute: padding masks, soft-capped scores, attention sinks, dropout.
    """
    if attention_mask is not None or softcap is not None or s_aux is not None or dropout:
        raise ModelError(
            f"running {type(module).__name__}: it asks for a padding mask, soft-capped scores, attention sinks or "
            "dropout, which this attention does not compute",
            hint="use a model of plain causal or sliding-window attention",
            reason="unsupported attention",
        )
    scale = scaling if scaling is not None else float(query.shape[-1]) ** -0.5
    if _looking and not sliding_window:
        _looking[-1].add(int(module.layer_idx), query, key, scale)  # type: ignore[arg-type]
    return packed_attention(query, key, value, scale, sliding_window or 0), None


def register() -> None:
    """Make ``attn_implementation="mindstream"`` known to transformers; no mask function goes with it, so that
    models build no masks of their own."""
    AttentionInterface.register(NAME, attention_forward)
