"""Calls of functions on their way through torch's ONNX exporter: operators that it writes as one node each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from regauge.ir.cost import FUSED
from regauge.ir.edit import Builder, remove_node, replace_uses
from regauge.ir.graph import Graph, Node, Value
from regauge.ir.onnx_kernels import DOMAIN, KERNEL, VERSION
from regauge.ir.ops.torch_opaque import slot, tensor_schema

NAMESPACE = "regauge_functions"
_TYPES = [f"tensor({name})" for name in ("float", "float16", "bfloat16", "double", "bool", "int64", "int32", "int8")]


@dataclass
class Operators:
    """A graph whose calls are operators of torch, and how the exporter writes each of these."""

    graph: Graph
    translations: dict[Any, Callable[..., Any]] = field(default_factory=dict)


def as_operators(graph: Graph, bodies: Mapping[str, tuple[Graph, str]]) -> Operators:
    """The graph itself where it has no calls; ``bodies`` are regions by the names of their functions."""
    if not any(node.op == FUSED and not node.regions for node in graph.nodes):
        return Operators(graph)
    result = Operators(graph.copy())
    build = Builder(result.graph)
    for node in result.graph.nodes:
        if node.op == FUSED and not node.regions:
            name = node.metadata[KERNEL]
            operator = _operator(name, bodies[name][0])
            _call(build, node, name)
            result.translations[operator] = _translation(name, node)
    return result


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
