"""Models in a newer opset: converted by the converter of onnx, without their weights, and proven by running both."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import onnx_ir
import torch

from regauge.frontends.onnx_model.weights import DENSE_BYTES, tensors_of
from regauge.ir.errors import LoadError, RegaugeWarning, first_line
from regauge.ir.graph import Graph
from regauge.ir.running.interpret import run_seeded
from regauge.ir.running.sample_inputs import sample_runs
from regauge.settings import current

TOLERANCE = 1e-4  # of a result's greatest entry: operators that are spelled anew may round otherwise


def opset_of(model: onnx_ir.Model) -> int:
    """The version of the standard operators that a model imports."""
    return model.opset_imports.get("") or model.opset_imports.get("ai.onnx", 1)


def in_opset(model: onnx_ir.Model, opset: int, label: str) -> onnx_ir.Model:
    """The model in that opset; the same one where it is in it. Large weights are shared, not copied.

    Raises LoadError for an older opset, and where onnx has no conversion.
    """
    from onnx import helper, version_converter

    now = opset_of(model)
    if opset == now:
        return model
    if opset < now:
        raise LoadError(f"{label}: it has opset {now}, and models are converted to newer ones only, not to {opset}")
    if model.functions:
        raise LoadError(f"{label}: it has functions of its own, which onnx does not convert to another opset")
    if any(isinstance(tensor, onnx_ir.ExternalTensor) for node in model.graph for tensor in _within(node)):
        raise LoadError(f"{label}: weights of nested graphs lie beside the file, which onnx does not convert")
    skeleton, weights = _without_weights(model)
    try:
        proto = version_converter.convert_version(onnx_ir.to_proto(skeleton), opset)
    except Exception as error:  # the converter raises one type per stage
        raise LoadError(f"{label}: onnx cannot convert it from opset {now} to {opset}: {first_line(error)}") from error
    result = onnx_ir.from_proto(proto)
    _put_weights(result, model, weights)
    versions = [helper.make_opsetid(domain, version) for domain, version in result.opset_imports.items()]
    needed = helper.find_min_ir_version_for(versions, ignore_unknown=True)
    result.ir_version = max(model.ir_version or 0, needed)
    result.producer_name, result.producer_version = model.producer_name, model.producer_version
    result.metadata_props.update(model.metadata_props)
    result.meta.update(model.meta)
    return result


def _without_weights(model: onnx_ir.Model) -> tuple[onnx_ir.Model, list[str]]:
    """A copy in which large initializers are inputs, since no conversion needs to know their data; and those."""
    copied = model.clone()
    weights = []
    for name, value in list(copied.graph.initializers.items()):
        tensor = value.const_value
        if tensor is not None and tensor.dtype == onnx_ir.DataType.STRING:
            continue
        if tensor is not None and tensor.nbytes <= DENSE_BYTES:
            value.const_value = onnx_ir.Tensor(tensor.numpy(), name=name)  # not one beside the file
        elif tensor is not None:
            weights.append(name)
            value.shape, value.type = onnx_ir.Shape(tensor.shape.numpy()), onnx_ir.TensorType(tensor.dtype)
            del copied.graph.initializers[name]
            value.const_value = None
            if not value.is_graph_input():
                copied.graph.inputs.append(value)
    return copied, weights


def _within(node: onnx_ir.Node) -> Iterator[onnx_ir.TensorProtocol]:
    """The tensors of the graphs nested in a node."""
    for attribute in node.attributes.values():
        if attribute.type == onnx_ir.AttributeType.GRAPH:
            yield from tensors_of(attribute.value)
        elif attribute.type == onnx_ir.AttributeType.GRAPHS:
            for graph in attribute.value:
                yield from tensors_of(graph)


def _put_weights(model: onnx_ir.Model, source: onnx_ir.Model, weights: list[str]) -> None:
    """Initializers as in the source, in its order, and behind them those that the conversion made."""
    graph, listed = model.graph, {value.name for value in source.graph.inputs}
    inputs = {value.name: value for value in graph.inputs}
    kept = [value for value in graph.inputs if value.name in listed]
    made = dict(graph.initializers) | {name: inputs[name] for name in weights}
    graph.inputs.clear()
    graph.inputs.extend(kept)
    graph.initializers.clear()
    names = dict.fromkeys([*(name for name in source.graph.initializers if name in made), *made])
    for name in names:
        before = source.graph.initializers.get(name)
        if before is not None and before.const_value is not None:
            made[name].const_value = before.const_value
        graph.register_initializer(made[name])


def prove_equal(read: Callable[[], Graph], converted: Graph, label: str) -> None:
    """Run a graph before and after its conversion on made-up inputs; raises LoadError where results differ."""
    if current().verify != "numeric":
        return
    for inputs, results in sample_runs(read()):
        for before, after in zip(results, run_seeded(converted, inputs), strict=True):
            if not _close(before, after):
                opset = opset_of(converted.metadata["onnx"])
                raise LoadError(f"{label}: in opset {opset}, as onnx converts it, it computes something else")
        return
    warnings.warn(
        f"{label}: no made-up inputs fit it, so its conversion was not checked by numbers", RegaugeWarning, stacklevel=4
    )


def _close(before: object, after: object) -> bool:
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return type(before) is type(after)
    if before.shape != after.shape or before.dtype != after.dtype:
        return False
    if not before.is_floating_point() or not before.numel():
        return bool(torch.equal(before, after))
    allowed = TOLERANCE * float(before.nan_to_num().abs().max())
    return bool(torch.allclose(before, after, rtol=TOLERANCE, atol=allowed, equal_nan=True))
