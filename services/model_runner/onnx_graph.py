"""What of an ONNX graph the engine must know before it runs it: each attention layer's window.

ONNX Runtime tells the names and shapes of a graph's inputs and nothing of its nodes. The ``onnx`` package would, and
is no dependency of a node that only runs models; so the few fields that matter are read from the file itself, by the
wire format of protocol buffers (https://protobuf.dev/programming-guides/encoding/) and the field numbers of
``onnx.proto3``. Weights lie beside the graph, in a file of their own, and are not touched.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from protocol.errors import ModelUnavailable

PAST_NAME = re.compile(r"past_key_values\.(\d+)\.(key|value)")
"""How onnxruntime-genai's builder names the KV inputs of full and sliding attention."""

INDICES_NAME = "logits_indices"
"""The input that names the positions whose logits are computed, where a graph has it (logits_rows.py)."""

_MAX_GRAPH_BYTES = 256 * 1024 * 1024
"""A graph without its weights takes well below a megabyte a gigabyte of them."""

# Field numbers of onnx.proto3.
_MODEL_GRAPH, _GRAPH_NODE = 7, 1
_NODE_INPUT, _NODE_OP_TYPE, _NODE_ATTRIBUTE = 1, 4, 5
_ATTRIBUTE_NAME, _ATTRIBUTE_I = 1, 3


class AttentionNode(NamedTuple):
    """One attention layer as the graph computes it."""

    op_type: str
    kv_heads: int
    window_tokens: int
    """Positions that a query sees, itself included; 0 for all."""
    rolls_cache: bool
    """Whether the node keeps only its window, at positions of its own choosing."""


def attention_nodes(graph: Path) -> dict[int, AttentionNode]:
    """The attention layers of the graph in ``graph``, by the number in the names of their KV inputs.

    Raises ModelUnavailable when the file is no ONNX graph, or cannot be read.
    """
    try:
        if graph.stat().st_size > _MAX_GRAPH_BYTES:
            raise ValueError(f"{graph.stat().st_size:,} bytes are no graph whose weights lie beside it")
        data = memoryview(graph.read_bytes())
        found = {}
        for node in _messages(data, _MODEL_GRAPH, _GRAPH_NODE):
            inputs = [PAST_NAME.fullmatch(_text(name)) for name in _values(node, _NODE_INPUT)]
            layer = next((int(match[1]) for match in inputs if match), None)
            if layer is not None:
                found[layer] = _attention(node)
        return found
    except (OSError, ValueError, IndexError) as error:
        raise ModelUnavailable(
            f"reading the graph {graph}: {error}",
            hint="build the model again: the file is damaged, or is no ONNX graph",
            reason="damaged graph",
        ) from error


def _attention(node: memoryview) -> AttentionNode:
    numbers = {}
    for attribute in _values(node, _NODE_ATTRIBUTE):
        name = next((_text(value) for value in _values(attribute, _ATTRIBUTE_NAME)), "")
        integer = next((value for value in _values(attribute, _ATTRIBUTE_I) if isinstance(value, int)), None)
        if integer is not None:
            numbers[name] = integer if integer < 1 << 63 else integer - (1 << 64)
    op_type = next((_text(value) for value in _values(node, _NODE_OP_TYPE)), "")
    return AttentionNode(
        op_type=op_type,
        kv_heads=numbers.get("kv_num_heads", 0),
        window_tokens=max(0, numbers.get("local_window_size", -1)),
        rolls_cache=bool(numbers.get("sliding_window_cache", 0)),
    )


def _messages(data: memoryview, *path: int) -> Iterator[memoryview]:
    """The messages at ``path``, a chain of field numbers."""
    for value in _values(data, path[0]):
        if isinstance(value, memoryview):
            if len(path) == 1:
                yield value
            else:
                yield from _messages(value, *path[1:])


def _values(data: memoryview | int, field: int) -> Iterator[memoryview | int]:
    """Every value of a field: bytes of a length-delimited one, an unsigned number of any other."""
    if isinstance(data, int):
        raise ValueError("a number stands where a message belongs")
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        value: memoryview | int
        if kind == 0:
            value, at = _varint(data, at)
        elif kind == 2:
            size, at = _varint(data, at)
            value, at = data[at : at + size], at + size
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            value, at = int.from_bytes(data[at : at + size], "little"), at + size
        else:
            raise ValueError(f"wire type {kind} at byte {at}")
        if at > len(data):
            raise ValueError("it ends in the middle of a field")
        if key >> 3 == field:
            yield value


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        byte = data[at]
        at += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, at
        shift += 7
        if shift > 63:
            raise ValueError(f"no number at byte {at}")


def _text(value: memoryview | int) -> str:
    if isinstance(value, int):
        raise ValueError("a number stands where a name belongs")
    return bytes(value).decode()
