"""Operators that torch's ONNX exporter writes as one node each: calls of functions, and nodes that it has no form of.

Calls of functions stay what they are. Nodes that the exporter has no form of (``Operator.spelled_for_torch``) are
written by their records afterwards, each in the place of its call.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import onnx_ir
import torch
from onnx_ir.passes.common import InlinePass

from regauge.backends.onnx_model.kernels import spelled_region
from regauge.ir.cost import FUSED
from regauge.ir.edit import Builder, remove_node, replace_uses
from regauge.ir.graph import Graph, Node, Value
from regauge.ir.onnx_kernels import DOMAIN, KERNEL, VERSION
from regauge.ir.ops.torch_opaque import slot, tensor_schema

NAMESPACE = "regauge_functions"
_TYPES = [f"tensor({name})" for name in ("float", "float16", "bfloat16", "double", "bool", "int64", "int32", "int8")]


@dataclass
class Operators:
    """A graph whose calls are operators of torch, and how the exporter writes each of these.

    ``spelled`` are those that are no functions, by name: a graph of the node that each stands for.
    """

    graph: Graph
    translations: dict[Any, Callable[..., Any]] = field(default_factory=dict)
    spelled: dict[str, Graph] = field(default_factory=dict)


def as_operators(graph: Graph, bodies: Mapping[str, tuple[Graph, str]]) -> Operators:
    """The graph itself where it has no calls; ``bodies`` are regions by the names of their functions."""
    if not any(_is_call(node) or _is_spelled(node) for node in graph.nodes):
        return Operators(graph)
    result = Operators(graph.copy())
    build = Builder(result.graph)
    for node in result.graph.nodes:
        if _is_call(node):
            name = node.metadata[KERNEL]
            body = bodies[name][0]
        elif _is_spelled(node):
            name = f"{node.op}_{len(result.spelled)}_{_digest(node)}"
            body = result.spelled[name] = _alone(node)
        else:
            continue
        operator = _operator(name, body)
        _call(build, node, name)
        result.translations[operator] = _translation(name, node)
    return result


def write_spelled(model: onnx_ir.Model, spelled: Mapping[str, Graph]) -> None:
    """Write the nodes that calls in a model stand for, by their records, in the place of these."""
    if not spelled:
        return
    for name, body in spelled.items():
        function = onnx_ir.Function(DOMAIN, name, graph=spelled_region(body, model.opset_imports[""]), attributes=[])
        model.functions[function.identifier()] = function
    InlinePass(lambda function: function.name in spelled)(model)


def _is_call(node: Node) -> bool:
    return node.op == FUSED and not node.regions


def _is_spelled(node: Node) -> bool:
    wanted = node.operator.spelled_for_torch
    return (wanted(node) if callable(wanted) else wanted) and all(isinstance(one, Value) for one in node.inputs)


def _alone(node: Node) -> Graph:
    """A graph of one node, whose inputs are what the node reads."""
    graph = Graph(node.op)
    build = Builder(graph)
    operands = [build.input(f"x{slot}", value.shape, value.dtype) for slot, value in node.operands()]
    found = build(node.op, *operands, **node.attributes)
    graph.outputs = list(found) if isinstance(found, tuple) else [found]
    return graph


def _digest(node: Node) -> str:
    """What an operator of torch computes, which is one of a process: one name, one meaning."""
    said = [node.op, *sorted(node.attributes.items()), *(getattr(o, "signature", o) for o in node.inputs)]
    return hashlib.sha256(str(said).encode()).hexdigest()[:10]


def _call(build: Builder, node: Node, name: str) -> None:
    arguments = tuple(slot(place) for place in range(len(node.inputs)))
    results = [(value.shape, value.dtype) for value in node.outputs]
    with build.at(node):
        target = f"{NAMESPACE}.{name}.default"
        found = build("torch_call", *node.inputs, results=results, target=target, arguments=arguments)
    made = (found,) if isinstance(found, Value) else found
    for old, new in zip(node.outputs, made, strict=True):
        replace_uses(build.graph, old, new)
    remove_node(build.graph, node)
    for old, new in zip(node.outputs, made, strict=True):
        new.name = old.name


@cache
def _library() -> torch.library.Library:
    return torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]


_REGISTERED: set[str] = set()


def _operator(name: str, body: Graph) -> Any:
    """The operator of torch that computes a region; one for each name in a process."""
    from regauge.backends.to_torch import to_torch

    if name not in _REGISTERED:
        _REGISTERED.add(name)
        module, library = to_torch(body), _library()
        library.define(f"{name}{tensor_schema(len(body.inputs), len(body.outputs))}")  # type: ignore[no-untyped-call]
        library.impl(name, module, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"{NAMESPACE}::{name}", module, lib=library)
    return getattr(torch.ops.regauge_functions, name).default


def _translation(name: str, node: Node) -> Callable[..., Any]:
    """Writes one node that calls the function."""
    import onnx
    from onnxscript import values

    def parameters(letter: str, count: int) -> list[Any]:
        return [onnx.defs.OpSchema.FormalParameter(f"{letter}{place}", f"T{letter}{place}") for place in range(count)]

    ins, outs = parameters("x", len(node.inputs)), parameters("y", len(node.outputs))
    bounds = [(parameter.type_str, _TYPES, "") for parameter in (*ins, *outs)]
    schema = onnx.defs.OpSchema(name, DOMAIN, VERSION, inputs=ins, outputs=outs, type_constraints=bounds)
    operator = values.Op(values.Opset(DOMAIN, VERSION), name, schema)

    def call(*tensors: Any) -> Any:
        return operator(*tensors)

    return call
