"""Decode steps of the families we know, of one conversation or of several together, without the stock modules'
overhead.

A step on a small device is some two thousand tiny tensor operations around a few hundred matrix products, and for a
small model the former cost as much time as the latter. This does the same arithmetic, rounding where the stock
modules round, in a third of the operations: query, key and value projections in one product, gate and up
projections in another, and one rotation for queries and keys. Prefill stays with the stock modules.

A batch has a row for each conversation. The rows go through every product together, so that the weights are read
once for all; attention is each conversation's own, over a cache of its own length. One conversation is a batch of one.

The fused weights replace the modules' own, which become views of them: nothing is held twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from transformers import (
    Gemma3ForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
)

from services.model_runner.attention import packed_attention
from services.model_runner.kv_cache import TorchKVCache
from services.model_runner.products import has_bf16_products, upcast_linear

FAMILIES = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Gemma3ForCausalLM)
"""Blocks with RMS norms, rotary positions in halves, and a gated MLP. Gemma 3 has norms after attention and MLP too,
normalises queries and keys, and turns its sliding layers by another base."""

_Rotation = tuple[torch.Tensor, torch.Tensor]


class _Norm:
    """Root mean square norm (Zhang and Sennrich, 2019), rounded where the family's stock module rounds: Gemma after
    the weight, the others before it."""

    def __init__(self, module: Any, weight: torch.Tensor | None = None) -> None:
        """``module``: the stock norm; ``weight`` in place of its own, where several of a kind are applied at once."""
        self._gemma = not hasattr(module, "variance_epsilon")
        self._epsilon = float(module.eps if self._gemma else module.variance_epsilon)
        self._weight = (module.weight if weight is None else weight).detach()
        self._shape = (self._weight.shape[-1],)
        if self._gemma:
            self._weight = 1.0 + self._weight.float()

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._gemma:
            return (functional.rms_norm(hidden.float(), self._shape, None, self._epsilon) * self._weight).type_as(
                hidden
            )
        return self._weight * functional.rms_norm(hidden, self._shape, None, self._epsilon)


class _Block(NamedTuple):
    attention_norm: _Norm
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    heads_norm: _Norm | None
    """Of queries and keys."""
    rotation: str | None
    """The layer type by whose base it turns; None where there is one for all."""
    scale: float
    out: torch.Tensor
    out_bias: torch.Tensor | None
    attention_out_norm: _Norm | None
    mlp_norm: _Norm
    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    activation: Callable[[torch.Tensor], torch.Tensor]
    down: torch.Tensor
    down_bias: torch.Tensor | None
    mlp_out_norm: _Norm | None


class FastDecode:
    """Decode steps of one model of ``FAMILIES``."""

    def __init__(self, model: PreTrainedModel) -> None:
        decoder: Any = model.get_decoder()
        config: Any = model.config
        self._device = model.device
        self._embedding = decoder.embed_tokens
        self._rotary = decoder.rotary_emb
        self._norm = _Norm(decoder.norm)
        self._head: torch.Tensor = model.get_output_embeddings().weight
        self._query_heads = int(config.num_attention_heads)
        self._kv_heads = int(config.num_key_value_heads)
        self._head_dim = int(decoder.layers[0].self_attn.head_dim)
        self._blocks = [_fuse(layer, self._query_heads, self._kv_heads) for layer in decoder.layers]
        self._rotations = sorted({block.rotation for block in self._blocks}, key=str)
        upcast = self._head.device.type == "cpu" and self._head.dtype is torch.bfloat16 and not has_bf16_products()
        self._linear = upcast_linear if upcast else functional.linear
        kinds = self._rotary.rope_type
        kinds = set(kinds.values()) if isinstance(kinds, dict) else {kinds}
        self.batches = not any("dynamic" in kind or kind == "longrope" for kind in kinds)
        """Whether several conversations can be computed together: bases that follow the longest row would turn the
        shorter conversations' keys otherwise than before."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> FastDecode | None:
        """For a model of ``FAMILIES``; None for others, which decode by their own modules."""
        return cls(model) if type(model) in FAMILIES else None

    def step(self, caches: Sequence[TorchKVCache], tokens: Sequence[int]) -> torch.Tensor:
        """Append each of ``tokens`` to its cache, which must have room; the logits, (rows, vocab_size), in the
        model's dtype."""
        rows, heads, kv_heads, head_dim = len(tokens), self._query_heads, self._kv_heads, self._head_dim
        turned_heads = heads + kv_heads
        linear = self._linear
        hidden = self._embedding(torch.tensor(tokens, device=self._device))
        turns = self._turns(hidden, [cache.length for cache in caches])
        for block, layers in zip(self._blocks, zip(*(cache.layers for cache in caches), strict=True), strict=True):
            qkv = linear(block.attention_norm(hidden), block.qkv, block.qkv_bias)
            qkv = qkv.view(rows, turned_heads + kv_heads, head_dim)
            plain = qkv[:, :turned_heads]
            if block.heads_norm is not None:
                plain = block.heads_norm(plain)
            cos, sin = turns[block.rotation]
            turned = plain * cos + plain.roll(head_dim // 2, -1) * sin
            mixed = []
            for row, layer in enumerate(layers):
                keys, values = layer.update(
                    turned[row, heads:].view(1, kv_heads, 1, head_dim),
                    qkv[row, turned_heads:].view(1, kv_heads, 1, head_dim),
                )
                query = turned[row, :heads].view(1, heads, 1, head_dim)
                mixed.append(packed_attention(query, keys, values, block.scale).view(1, heads * head_dim))
            out = linear(mixed[0] if rows == 1 else torch.cat(mixed), block.out, block.out_bias)
            hidden = hidden + (out if block.attention_out_norm is None else block.attention_out_norm(out))
            gate, up = linear(block.mlp_norm(hidden), block.gate_up, block.gate_up_bias).chunk(2, dim=-1)
            down = linear(block.activation(gate) * up, block.down, block.down_bias)
            hidden = hidden + (down if block.mlp_out_norm is None else block.mlp_out_norm(down))
        return linear(self._norm(hidden), self._head)

    def _turns(self, hidden: torch.Tensor, positions: Sequence[int]) -> dict[str | None, _Rotation]:
        """Cosines and sines of each row's position, (rows, 1, head_dim), for each base of the model."""
        at = torch.tensor(positions, device=self._device).unsqueeze(1)
        half = self._head_dim // 2
        turns: dict[str | None, _Rotation] = {}
        for kind in self._rotations:
            cos, sin = self._rotary(hidden, at) if kind is None else self._rotary(hidden, at, kind)
            # The stock code negates the half it swaps; negating the sine instead gives the same bits once a step.
            turns[kind] = cos, torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
        return turns


def _fuse(layer: Any, query_heads: int, kv_heads: int) -> _Block:
    attention, mlp = layer.self_attn, layer.mlp
    qkv, qkv_bias = _joined(attention.q_proj, attention.k_proj, attention.v_proj)
    gate_up, gate_up_bias = _joined(mlp.gate_proj, mlp.up_proj)
    sandwich = hasattr(layer, "pre_feedforward_layernorm")  # Gemma: there the stock names mean other norms
    heads_norm = None
    if sandwich:
        queries, keys = (norm.weight for norm in (attention.q_norm, attention.k_norm))
        heads_norm = _Norm(attention.q_norm, torch.cat((queries.expand(query_heads, -1), keys.expand(kv_heads, -1))))
    return _Block(
        attention_norm=_Norm(layer.input_layernorm),
        qkv=qkv,
        qkv_bias=qkv_bias,
        heads_norm=heads_norm,
        rotation=attention.layer_type if sandwich else None,
        scale=float(attention.scaling),
        out=attention.o_proj.weight,
        out_bias=attention.o_proj.bias,
        attention_out_norm=_Norm(layer.post_attention_layernorm) if sandwich else None,
        mlp_norm=_Norm(layer.pre_feedforward_layernorm if sandwich else layer.post_attention_layernorm),
        gate_up=gate_up,
        gate_up_bias=gate_up_bias,
        activation=mlp.act_fn,
        down=mlp.down_proj.weight,
        down_bias=mlp.down_proj.bias,
        mlp_out_norm=_Norm(layer.post_feedforward_layernorm) if sandwich else None,
    )


def _joined(*linears: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights and biases of linear layers, one below the other; the layers' own become views of them."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    bias = None if linears[0].bias is None else torch.cat([linear.bias.detach() for linear in linears])
    start = 0
    for linear in linears:
        rows = slice(start, start + linear.weight.shape[0])
        linear.weight = torch.nn.Parameter(weight[rows], requires_grad=False)
        if bias is not None:
            linear.bias = torch.nn.Parameter(bias[rows], requires_grad=False)
        start = rows.stop
    return weight, bias
