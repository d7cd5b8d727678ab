"""The first layers of a model of fast_decode.FAMILIES, as a model of their own: they write what the whole would write.

Keys and values of a layer need what flows into it and nothing of what comes after, so of the last layer wanted only its
norm and its key and value projections are computed.
"""

from __future__ import annotations

import copy
from typing import Any

import torch


def first_layers(decoder: torch.nn.Module, count: int) -> torch.nn.Module:
    """``decoder`` with its first ``count`` layers alone, sharing their weights; it gives no hidden states that mean
    anything, only what is written to the cache."""
    *whole, last = list(decoder.get_submodule("layers").children())[:count]
    found = copy.copy(decoder)
    # A shallow copy shares the table of submodules with its original.
    found._modules = {
        **decoder._modules,
        "layers": torch.nn.ModuleList([*whole, _KeysAndValues(last)]),
        "norm": torch.nn.Identity(),
    }
    return found


class _KeysAndValues(torch.nn.Module):
    """Writes a layer's keys and values, and does nothing else of it."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.norm = layer.input_layernorm
        self.attention = layer.self_attn
        self.attention_type = getattr(layer, "attention_type", None)

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: Any, past_key_values: Any, **_kwargs: Any
    ) -> torch.Tensor:
        attention = self.attention
        normed = self.norm(hidden_states)
        shape = (*normed.shape[:-1], -1, attention.head_dim)
        keys = attention.k_proj(normed).view(shape).transpose(1, 2)
        values = attention.v_proj(normed).view(shape).transpose(1, 2)
        if hasattr(attention, "k_norm"):
            keys = attention.k_norm(keys)
        cos, sin = (each.unsqueeze(1) for each in position_embeddings)
        half = keys.shape[-1] // 2
        swapped = torch.cat((-keys[..., half:], keys[..., :half]), dim=-1)
        past_key_values.update(keys * cos + swapped * sin, values, attention.layer_idx)
        return hidden_states
