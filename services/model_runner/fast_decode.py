"""One decode step of a Llama-like model, without the stock modules' overhead.

A step on a small device is some two thousand tiny tensor operations around a few hundred matrix products, and for a
small model the former cost as much time as the latter. This does the same arithmetic, rounding where the stock
modules round, in a third of the operations: query, key and value projections in one product, gate and up
projections in another, and one rotation for queries and keys. Prefill stays with the stock modules.

The fused weights replace the modules' own, which become views of them: nothing is held twice.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from transformers import LlamaForCausalLM, MistralForCausalLM, PreTrainedModel, Qwen2ForCausalLM

from services.model_runner.attention import packed_attention
from services.model_runner.kv_cache import TorchKVCache

FAMILIES = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM)
"""Pre-norm blocks with RMS norms, rotary positions in halves, and a gated MLP; nothing else in them."""


class _Block(NamedTuple):
    attention_norm: torch.Tensor
    attention_epsilon: float
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    out: torch.Tensor
    out_bias: torch.Tensor | None
    scale: float
    mlp_norm: torch.Tensor
    mlp_epsilon: float
    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None
    activation: Any


class FastDecode:
    """Decode steps of one model of ``FAMILIES``."""

    def __init__(self, model: PreTrainedModel) -> None:
        decoder: Any = model.get_decoder()
        config: Any = model.config
        self._embedding = decoder.embed_tokens
        self._rotary = decoder.rotary_emb
        self._norm = decoder.norm.weight
        self._epsilon = float(decoder.norm.variance_epsilon)
        self._head: torch.Tensor = model.get_output_embeddings().weight
        self._query_heads = int(config.num_attention_heads)
        self._kv_heads = int(config.num_key_value_heads)
        self._blocks = [_fuse(layer) for layer in decoder.layers]
        self._head_dim = self._blocks[0].out.shape[1] // self._query_heads

    @classmethod
    def of(cls, model: PreTrainedModel) -> FastDecode | None:
        """For a model of ``FAMILIES``; None for others, which decode by their own modules."""
        return cls(model) if type(model) in FAMILIES else None

    def step(self, cache: TorchKVCache, token: int, device: torch.device) -> torch.Tensor:
        """Append ``token`` to ``cache``, which must have room; the logits, (vocab_size,) in the model's dtype."""
        query_heads, kv_heads, head_dim = self._query_heads, self._kv_heads, self._head_dim
        rotated = query_heads + kv_heads
        hidden = self._embedding(torch.tensor([token], device=device))
        position = torch.tensor([[cache.length]], device=device)
        cos, sin = (part.view(1, head_dim) for part in self._rotary(hidden, position))
        # The stock code negates the half it swaps; negating the sine instead gives the same bits once a step.
        sin = torch.cat((-sin[:, : head_dim // 2], sin[:, head_dim // 2 :]), dim=-1)
        for block, layer in zip(self._blocks, cache.layers, strict=True):
            normed = _rms_norm(hidden, block.attention_norm, block.attention_epsilon)
            qkv = functional.linear(normed, block.qkv, block.qkv_bias).view(rotated + kv_heads, head_dim)
            plain = qkv[:rotated]
            turned = plain * cos + plain.roll(head_dim // 2, -1) * sin
            keys, values = layer.update(
                turned[query_heads:].view(1, kv_heads, 1, head_dim), qkv[rotated:].view(1, kv_heads, 1, head_dim)
            )
            query = turned[:query_heads].view(1, query_heads, 1, head_dim)
            mixed = packed_attention(query, keys, values, block.scale).view(1, query_heads * head_dim)
            hidden = hidden + functional.linear(mixed, block.out, block.out_bias)
            normed = _rms_norm(hidden, block.mlp_norm, block.mlp_epsilon)
            gate, up = functional.linear(normed, block.gate_up, block.gate_up_bias).chunk(2, dim=-1)
            hidden = hidden + functional.linear(block.activation(gate) * up, block.down, block.down_bias)
        return functional.linear(_rms_norm(hidden, self._norm, self._epsilon), self._head)[0]


def _rms_norm(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Root mean square norm (Zhang and Sennrich, 2019); rounded before the weight, as the stock modules do."""
    return weight * functional.rms_norm(hidden, (hidden.shape[-1],), None, epsilon)


def _fuse(layer: Any) -> _Block:
    attention, mlp = layer.self_attn, layer.mlp
    qkv, qkv_bias = _joined(attention.q_proj, attention.k_proj, attention.v_proj)
    gate_up, gate_up_bias = _joined(mlp.gate_proj, mlp.up_proj)
    return _Block(
        attention_norm=layer.input_layernorm.weight,
        attention_epsilon=float(layer.input_layernorm.variance_epsilon),
        qkv=qkv,
        qkv_bias=qkv_bias,
        out=attention.o_proj.weight,
        out_bias=attention.o_proj.bias,
        scale=float(attention.scaling),
        mlp_norm=layer.post_attention_layernorm.weight,
        mlp_epsilon=float(layer.post_attention_layernorm.variance_epsilon),
        gate_up=gate_up,
        gate_up_bias=gate_up_bias,
        down=mlp.down_proj.weight,
        down_bias=mlp.down_proj.bias,
        activation=mlp.act_fn,
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
