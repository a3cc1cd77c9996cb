"""Checks that onnxruntime runs a quantized model with the kernels that it was quantized for.

A layer whose integers a runtime does not take up runs in float behind a conversion of its whole weight, at every run:
slower than before quantization, and silently so. The graph that onnxruntime makes of the file says which kernels run.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regauge.ir.errors import EmitError
from regauge.ir.graph import Graph
from regauge.ir.storage.quantized_layers import planned_for_onnxruntime, quantized_layers

INTEGER_KERNELS = {
    "QLinearMatMul", "QGemm", "QLinearConv", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulNBits",
    "MatMulInteger", "ConvInteger", "QAttention",
}  # fmt: skip
_FLOAT_KERNELS = {
    "MatMul", "Gemm", "Conv", "ConvTranspose", "FusedConv", "FusedMatMul", "FusedGemm", "LSTM", "GRU", "RNN",
}  # fmt: skip


@dataclass
class Audit:
    """Called with the staged file of a graph that was quantized for onnxruntime; raises EmitError where kernels are not
    the planned ones."""

    graph: Graph

    def __call__(self, path: Path) -> None:
        planned = len(quantized_layers(self.graph))
        kernels, stray = kernels_of(path)
        found = sum(count for name, count in kernels.items() if name in INTEGER_KERNELS)
        if stray:
            raise EmitError(
                f"onnxruntime would convert the weights of {len(stray)} layers to float at every run, first of "
                f"{stray[0]}: leave them out (exclude=...), or quantize with target=reference"
            )
        if found < planned:
            raise EmitError(
                f"onnxruntime runs {found} integer kernels where {planned} were planned: quantize with "
                f"target=reference to write the file nevertheless"
            )


def audit_of(graph: Graph) -> Audit | None:
    """The audit for a graph that was laid out for onnxruntime; None for others."""
    return Audit(graph) if planned_for_onnxruntime(graph) and quantized_layers(graph) else None


def kernels_of(path: Path) -> tuple[Counter[str], list[str]]:
    """The operators that onnxruntime runs of a file, and the float layers among them that read a converted constant."""
    import onnx

    from regauge.backends.run_onnxruntime import optimised_file

    with tempfile.TemporaryDirectory() as folder:
        optimised = Path(folder) / "optimised.onnx"
        optimised_file(path, optimised)
        model = onnx.load(optimised, load_external_data=False)
    kernels, stray = Counter[str](), list[str]()
    _look(model.graph, set(), kernels, stray)
    return kernels, stray


def _look(graph: Any, known: set[str], kernels: Counter[str], stray: list[str]) -> None:
    """Count the operators of a graph and of those nested in it; ``known`` are constants around it."""
    constants = known | {tensor.name for tensor in graph.initializer}
    converted = set[str]()
    for node in graph.node:
        kernels[node.op_type] += 1
        read = {name for name in node.input if name}
        if node.op_type == "Constant":
            constants.update(node.output)
        elif read and read <= constants | converted:
            converted.update(node.output)  # at every run: what is computed at load is gone
        elif node.op_type in _FLOAT_KERNELS and converted.intersection(node.input[1:3]):
            stray.append(node.name or node.output[0])
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                _look(inner, constants, kernels, stray)
