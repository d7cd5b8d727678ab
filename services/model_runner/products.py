"""Matrix products with bfloat16 weights on CPUs that have no bfloat16 instructions.

There torch makes such a product row by row, at the pace of converting every weight anew for each row. One row is
bound by reading the weights all the same and is left to torch. For more it is cheaper to convert the weights once
and to multiply in float32: rounded once at the end, that is what a bfloat16 product with float32 accumulation gives.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional

UPCAST_ROWS = 4
"""Rows from which converting costs less than it saves: on AVX2, 576 x 3072, four rows take two thirds of the time,
eight two fifths, 256 an eighth."""

_FEW_ROWS = 32
_BLOCK_VALUES = 1 << 19
"""Weights converted at a time for a few rows: 2 MiB of float32, which stay in the processor's cache until they are
multiplied. A vocabulary's head converted whole takes twice as long, and memory that is not otherwise needed."""


def has_bf16_products() -> bool:
    """Whether this CPU's library multiplies bfloat16 matrices at speed (AVX-512, AMX, or Arm with bf16)."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def upcast_linear(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``functional.linear`` of bfloat16 tensors: (..., in_features) to (..., out_features)."""
    out_features, in_features = weight.shape
    count = rows.numel() // in_features
    if count < UPCAST_ROWS:
        return functional.linear(rows, weight, bias)
    block = max(1, _BLOCK_VALUES // in_features) if count < _FEW_ROWS else out_features
    exact = rows.float()
    exact_bias = None if bias is None else bias.float()
    if block >= out_features:
        return functional.linear(exact, weight.float(), exact_bias).to(rows.dtype)
    result = rows.new_empty((*rows.shape[:-1], out_features))
    for start in range(0, out_features, block):
        part = slice(start, start + block)
        result[..., part] = functional.linear(
            exact, weight[part].float(), None if exact_bias is None else exact_bias[part]
        )
    return result


class UpcastLinear(torch.nn.Module):
    """A linear layer whose product is ``upcast_linear``."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return upcast_linear(rows, self.weight, self.bias)


def upcast_linears(model: torch.nn.Module) -> None:
    """Replace the linear layers of ``model``, keeping their weights."""
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear:
            model.set_submodule(name, UpcastLinear(module))
