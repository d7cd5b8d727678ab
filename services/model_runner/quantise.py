"""Weights of a float32 graph rounded to 8 or 4 bits, in blocks of 32 along the input dimension.

8 bits: symmetric, one scale a block, for matrices, output head and embeddings alike (the last two share one array
where the model ties them).

4 bits: a scale and a minimum a block, as in GGUF's Q4_1, which ONNX Runtime's MatMulNBits does not have: its zero
points are integers, and rounding the minimum to them costs 27 % of perplexity on SmolLM2-135M, where rounding the
weights costs nearly nothing. So the integer zero point is used, and what it misses (at most half a step, the same for
all 32 weights of a block) is one more matrix with a column for each block, applied to the sums of the activations
over the blocks. These sums are appended to the activations, and that matrix, rounded to 4 bits too, to the weights:
one product still, on an input one 32nd longer. A model whose weights lie on a 4-bit grid already loses next to
nothing by it. Output head and embeddings stay at 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from edge.model_cards import GRAPH_NAME

BLOCK = 32
METHODS = {
    "int8": "8 bits symmetric in blocks of 32, head and embeddings too; activations in 8 bits",
    "int4": "4 bits with scale and minimum in blocks of 32, minima completed through appended block sums; head and "
    "embeddings 8 bits symmetric; activations in 8 bits",
}
_ACCURACY_LEVEL = 4
"""MatMulNBits rounds activations to 8 bits and multiplies integers: several times as fast as float32."""
_ALIGN_BYTES = 4096
_DOMAIN = "com.microsoft"

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


class Rounded(NamedTuple):
    """A matrix of (outputs, inputs) in blocks: ``weights`` ≈ scales · (codes − zero points)."""

    codes: Bytes
    """(outputs, blocks, 32)."""
    scales: Floats
    """(outputs, blocks)."""
    zero_points: Bytes | None = None
    """(outputs, blocks); None: the middle of the range."""


def quantise(source: Path, target: Path, precision: str, say: Callable[[str], None] = lambda _line: None) -> None:
    """Write the float32 graph in folder ``source`` to ``target`` with its weights rounded.

    Args:
        source: holds ``model.onnx`` with external data.
        target: gets ``model.onnx`` and ``model.onnx.data``.
        precision: ``int8`` or ``int4``.
        say: told how far it is.

    Raises OSError.
    """
    _Rewrite(source, target, 4 if precision == "int4" else 8).run(say)


def round_8(weights: Floats) -> Rounded:
    """Symmetric: the largest of a block becomes ±127."""
    blocks = _blocks(weights)
    scales = np.abs(blocks).max(-1) / 127
    scales[scales == 0] = 1
    codes = np.rint(blocks / scales[..., None]) + 128
    return Rounded(codes.astype(np.uint8), scales.astype(np.float32))


def round_4(weights: Floats) -> tuple[Rounded, Floats]:
    """With a minimum: codes and integer zero points, and what these miss of each block's minimum, (outputs, blocks)."""
    blocks = _blocks(weights)
    low, high = blocks.min(-1), blocks.max(-1)
    scales = (high - low) / 15
    scales[scales == 0] = 1
    codes = np.clip(np.rint((blocks - low[..., None]) / scales[..., None]), 0, 15)
    zero_points = np.clip(np.rint(-low / scales), 0, 15)
    missed = low + zero_points * scales
    return (
        Rounded(codes.astype(np.uint8), scales.astype(np.float32), zero_points.astype(np.uint8)),
        missed.astype(np.float32),
    )


def round_4_symmetric(weights: Floats) -> Rounded:
    """The largest of a block becomes the code 0, which is −8 steps."""
    blocks = _blocks(weights)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)[..., 0]
    scales = largest / -8
    scales[scales == 0] = 1
    codes = np.clip(np.rint(blocks / scales[..., None]), -8, 7) + 8
    return Rounded(codes.astype(np.uint8), scales.astype(np.float32))


def appended(weights: Floats) -> Rounded:
    """``weights`` in 4 bits followed by the blocks that multiply the sums of the activations over their blocks."""
    rounded, missed = round_4(weights)
    assert rounded.zero_points is not None
    sums = round_4_symmetric(missed)
    middle = np.full(sums.scales.shape, 8, np.uint8)
    return Rounded(
        np.concatenate([rounded.codes, sums.codes], 1),
        np.concatenate([rounded.scales, sums.scales], 1),
        np.concatenate([rounded.zero_points, middle], 1),
    )


def block_sums(inputs: int) -> Floats:
    """The matrix (inputs, blocks padded to a multiple of 32) that sums each block of the activations."""
    sums = np.zeros((inputs, _padded(inputs // BLOCK)), np.float32)
    sums[np.arange(inputs), np.arange(inputs) // BLOCK] = 1
    return sums


class _Rewrite:
    """One pass over a graph: its large constants are read one by one and written as they are replaced."""

    def __init__(self, source: Path, target: Path, bits: int) -> None:
        self._source, self._target, self._bits = source, target, bits
        self._model = onnx.load(str(source / GRAPH_NAME), load_external_data=False)
        self._constants = {each.name: each for each in self._model.graph.initializer}
        self._kept: list[TensorProto] = []
        self._nodes: list[Any] = []
        self._with_sums: dict[str, str] = {}
        self._written: set[str] = set()

    def run(self, say: Callable[[str], None]) -> None:
        graph = self._model.graph
        embeddings = {each.output[0]: each.input[0] for each in graph.node if self._turns_constant(each)}
        data_name = f"{GRAPH_NAME}.data"
        with (self._target / data_name).open("wb") as self._data:
            for node in graph.node:
                if node.op_type == "MatMul" and self._is_matrix(node.input[1]):
                    self._matmul(node)
                elif node.op_type == "Gather" and (node.input[0] in embeddings or self._is_matrix(node.input[0])):
                    self._gather(node, embeddings.get(node.input[0], ""))
                elif not self._turns_constant(node):
                    self._nodes.append(node)
            used = {name for node in self._nodes for name in node.input} - self._written
            for name in [name for name in self._constants if name in used]:
                self._write(name, self._array(name))
        say(f"{(self._target / data_name).stat().st_size / 1e6:.0f} MB of weights in {self._bits} bits")
        del graph.node[:]
        graph.node.extend(self._nodes)
        del graph.initializer[:]
        graph.initializer.extend(self._kept)
        onnx.save(self._model, str(self._target / GRAPH_NAME))

    def _matmul(self, node: Any) -> None:
        name, weights = node.input[1], self._array(node.input[1]).T
        outputs, inputs = weights.shape
        # The head decides which token it is; the appended blocks must begin where a block begins.
        bits = 8 if self._bits == 8 or node.output[0] == "logits" or inputs % BLOCK else 4
        activations, width = node.input[0], inputs
        if bits == 8:
            self._round_8_once(name, weights)
            arrays = [f"{name}.q8", f"{name}.scales8"]
        else:
            rounded = appended(weights)
            assert rounded.zero_points is not None
            activations, width = self._sums_appended(activations, inputs), inputs + _padded(inputs // BLOCK)
            arrays = [f"{name}.q4", f"{name}.scales4", f"{name}.zero_points4"]
            self._write(arrays[0], _packed(rounded.codes))
            self._write(arrays[1], rounded.scales)
            self._write(arrays[2], _packed(rounded.zero_points))
        self._nodes.append(
            helper.make_node(
                "MatMulNBits",
                [activations, *arrays],
                node.output,
                name=node.name,
                domain=_DOMAIN,
                K=width,
                N=outputs,
                bits=bits,
                block_size=BLOCK,
                accuracy_level=_ACCURACY_LEVEL,
            )
        )

    def _gather(self, node: Any, head: str) -> None:
        """Embeddings in 8 bits, of the output head (inputs, outputs) where the model ties them."""
        name = head or node.input[0]
        weights = self._array(name).T if head else self._array(name)
        tokens, width = weights.shape
        if width % BLOCK:
            # A row would end within a block: these stay as they are.
            self._write(f"{name}.rows", weights)
            self._nodes.append(helper.make_node("Gather", [f"{name}.rows", node.input[1]], node.output, name=node.name))
            return
        self._round_8_once(name, weights)
        self._write(f"{name}.shape", np.array([tokens, width], np.int64))
        rows = f"{node.name}/rows"
        self._nodes.append(helper.make_node("Reshape", [f"{name}.q8", f"{name}.shape"], [rows], name=f"{rows}/Reshape"))
        self._nodes.append(
            helper.make_node(
                "GatherBlockQuantized",
                [rows, node.input[1], f"{name}.scales8"],
                node.output,
                name=node.name,
                domain=_DOMAIN,
                gather_axis=0,
                quantize_axis=1,
                block_size=BLOCK,
                bits=8,
            )
        )

    def _round_8_once(self, name: str, weights: Floats) -> None:
        if f"{name}.q8" not in self._written:
            rounded = round_8(weights)
            self._write(f"{name}.q8", rounded.codes)
            self._write(f"{name}.scales8", rounded.scales)

    def _sums_appended(self, activations: str, inputs: int) -> str:
        if activations not in self._with_sums:
            matrix = f"block_sums_{inputs}"
            if matrix not in self._written:
                self._write(matrix, block_sums(inputs))
            sums, joined = f"{activations}/block_sums", f"{activations}/with_block_sums"
            self._nodes.append(helper.make_node("MatMul", [activations, matrix], [sums], name=sums))
            self._nodes.append(helper.make_node("Concat", [activations, sums], [joined], name=joined, axis=-1))
            self._with_sums[activations] = joined
        return self._with_sums[activations]

    def _is_matrix(self, name: str) -> bool:
        constant = self._constants.get(name)
        return constant is not None and len(constant.dims) == 2 and constant.data_type == TensorProto.FLOAT

    def _turns_constant(self, node: Any) -> bool:
        """The builder makes tied embeddings by turning the output head over."""
        return node.op_type == "Transpose" and self._is_matrix(node.input[0])

    def _array(self, name: str) -> Any:
        constant = self._constants[name]
        if constant.data_location != TensorProto.EXTERNAL:
            return onnx.numpy_helper.to_array(constant)
        place = {each.key: each.value for each in constant.external_data}
        return np.memmap(
            self._source / place["location"],
            dtype=helper.tensor_dtype_to_np_dtype(constant.data_type),
            mode="r",
            offset=int(place.get("offset", 0)),
            shape=tuple(constant.dims),
        )

    def _write(self, name: str, array: Any) -> None:
        array = np.ascontiguousarray(array)
        constant = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)
        if array.dtype == np.int64:
            # Shapes are read while the graph is, before external data is at hand.
            constant.raw_data = array.tobytes()
        else:
            self._data.write(b"\0" * (-self._data.tell() % _ALIGN_BYTES))
            constant.data_location = TensorProto.EXTERNAL
            offset = self._data.tell()
            self._data.write(array.tobytes())
            for key, value in (
                ("location", f"{GRAPH_NAME}.data"),
                ("offset", str(offset)),
                ("length", str(array.nbytes)),
            ):
                constant.external_data.add(key=key, value=value)
        self._written.add(name)
        self._kept.append(constant)


def _blocks(weights: Floats) -> Floats:
    """(outputs, blocks, 32), the last one filled with zeros."""
    outputs, inputs = weights.shape
    filled = np.zeros((outputs, _padded(inputs)), np.float32)
    filled[:, :inputs] = weights
    return filled.reshape(outputs, -1, BLOCK)


def _padded(count: int) -> int:
    return -(-count // BLOCK) * BLOCK


def _packed(codes: Bytes) -> Bytes:
    """Two 4-bit codes in a byte along the last axis, the first in the low half."""
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], 1), np.uint8)], -1)
    return (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)
