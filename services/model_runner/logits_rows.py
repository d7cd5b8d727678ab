"""Let a built graph compute the logits of those positions alone that are asked for.

The builder's graph multiplies every position with the vocabulary. Reading a prompt needs none of these products, and
they are a fifth of the work for SmolLM2 and more than half of it for Gemma 3 270M. So the positions are gathered
before the last product, by an input of their own: ``logits_indices``, int64 of shape (positions,), counted from the
end where negative; the logits are then (batch, positions, vocabulary).

Used while building; needs the ``onnx`` package, which comes with the builder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from protocol.errors import ModelUnavailable
from services.model_runner.onnx_graph import INDICES_NAME

_PRODUCTS = ("MatMul", "MatMulNBits", "Gemm")


def choose_logits_rows(graph: Path) -> None:
    """Rewrite the graph in ``graph``; the weights beside it stay as they are. Raises ModelUnavailable, OSError."""
    import onnx

    model: Any = onnx.load(str(graph), load_external_data=False)
    nodes = model.graph.node
    if any(each.name == INDICES_NAME for each in model.graph.input):
        return
    head = _head(nodes, graph)
    name = f"{head.input[0]}/rows"
    gather = onnx.helper.make_node("Gather", [head.input[0], INDICES_NAME], [name], "/lm_head/rows/Gather", axis=1)
    head.input[0] = name
    at = next(index for index, node in enumerate(nodes) if node.name == head.name and node.output == head.output)
    nodes.insert(at, gather)
    model.graph.input.append(
        onnx.helper.make_tensor_value_info(INDICES_NAME, onnx.TensorProto.INT64, ["logits_positions"])
    )
    (logits,) = [each for each in model.graph.output if each.name == "logits"]
    logits.type.tensor_type.shape.dim[1].dim_param = "logits_positions"
    # Shapes that the builder noted between the head and the logits speak of all positions.
    for each in [each for each in model.graph.value_info if each.name.startswith("/lm_head/")]:
        model.graph.value_info.remove(each)
    graph.write_bytes(model.SerializeToString())


def _head(nodes: Any, graph: Path) -> Any:
    """The product with the vocabulary: the last one before the logits."""
    producers = {output: node for node in nodes for output in node.output}
    node = producers.get("logits")
    while node is not None and node.op_type not in _PRODUCTS:
        node = producers.get(node.input[0])
    if node is None:
        raise ModelUnavailable(f"the graph {graph} has no product that makes its logits", reason="unknown graph")
    return node
