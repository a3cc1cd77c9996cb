"""Fused nodes as local functions of ONNX models, in the domain ``regauge.kernels``; :mod:`regauge.ir.onnx_kernels`.

Before a graph is written its fused nodes lose their regions: they are calls of functions that do not exist yet. These
are written once the model is there, in its opset, one for all calls that compute the same.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx_ir

from regauge.backends.onnx_model.carrier import Carrier
from regauge.backends.onnx_model.size_nodes import SizeSource
from regauge.backends.onnx_model.speller import OnnxSpeller, spell
from regauge.ir.errors import EmitError, FusionError, RegaugeWarning
from regauge.ir.fusion.fused import body_of, canonical, content, fused_nodes, unfuse, without_fused
from regauge.ir.graph import Graph, Node, Value
from regauge.ir.onnx_kernels import AXES, DOMAIN, HASH, KERNEL, REGION, ROUNDING, VERSION, function_hash
from regauge.ir.ops.spell_normalisation import RMS_NORM_OPSET

METADATA_SINCE = 10  # version of the format


@dataclass
class Calls:
    """A graph whose fused nodes have no regions, but the name of a function in their metadata; and what each is."""

    graph: Graph
    bodies: dict[str, tuple[Graph, str]] = field(default_factory=dict)  # by name: the region, and how it rounds


def as_calls(graph: Graph, *, functions: bool) -> Calls:
    """The graph with calls of functions in the place of fused nodes, or without ``functions`` with their nodes, which
    those keep, too, that have no spelling as functions."""
    calls = Calls(_spellable(graph) if functions else without_fused(graph))
    imported = graph.metadata.get("onnx_imported")
    carried = isinstance(imported, Graph) and bool(fused_nodes(imported))
    if carried or (functions and fused_nodes(graph)):
        calls.graph = calls.graph.copy()
        for node in fused_nodes(calls.graph):
            _hollow(node, calls)
        if carried and isinstance(imported, Graph):
            calls.graph.metadata["onnx_imported"] = was = imported.copy()
            for node in fused_nodes(was):
                _hollow(node, Calls(was))
    return calls


def _spellable(graph: Graph) -> Graph:
    """The graph, or a copy in which fused nodes that no function can be written of are the nodes that they hold, of
    which a RegaugeWarning tells the reasons."""
    model = graph.metadata.get("onnx")
    opset = model.opset_imports.get("", RMS_NORM_OPSET) if isinstance(model, onnx_ir.Model) else RMS_NORM_OPSET

    why: dict[Node, str] = {}
    for node in fused_nodes(graph):
        try:
            spelled_region(canonical(body_of(node)), opset)
        except EmitError as error:
            why[node] = str(error)
    if not why:
        return graph
    reasons = "; ".join(f"{count} x {reason}" for reason, count in Counter(why.values()).most_common())
    warnings.warn(
        f"{len(why)} of {len(fused_nodes(graph))} regions are written as their nodes, not as functions: {reasons}",
        RegaugeWarning,
        stacklevel=4,
    )
    result = graph.copy()
    pairs = zip(fused_nodes(graph), fused_nodes(result), strict=True)
    left = {copied for own, copied in pairs if own in why}
    unfuse(result, left.__contains__)
    return result


def _hollow(node: Node, calls: Calls) -> None:
    body, rounding = canonical(body_of(node)), node.attributes["rounding"]
    name = f"{body.name}_{_digest(content(body), rounding)}"
    node.metadata[KERNEL] = name
    node.regions = ()
    calls.bodies[name] = (body, rounding)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:10]


def add_functions(model: onnx_ir.Model, calls: Calls) -> None:
    """Write the functions that nodes of a model call and let these call them by the names they have there; remove
    functions of the domain that nothing calls."""
    made: dict[str, onnx_ir.Function] = {}
    called: set[str] = set()
    for node in _calling(model):
        known = calls.bodies.get(node.op_type)
        if known is not None and node.op_identifier() not in model.functions:
            if node.op_type not in made:
                made[node.op_type] = _function(*known, model)
            function = made[node.op_type]
            model.functions.setdefault(function.identifier(), function)
            node.op_type = function.name
        called.add(node.op_type)
    for key, function in list(model.functions.items()):
        if function.domain == DOMAIN and function.name not in called:
            del model.functions[key]
    if called:
        model.opset_imports[DOMAIN] = VERSION
        model.ir_version = max(model.ir_version or 0, METADATA_SINCE)
    else:
        model.opset_imports.pop(DOMAIN, None)


def _calling(model: onnx_ir.Model) -> Iterator[onnx_ir.Node]:
    for node in model.graph.all_nodes():
        if node.domain == DOMAIN:
            yield node


def _function(body: Graph, rounding: str, model: onnx_ir.Model) -> onnx_ir.Function:
    """The region as a function of standard operators, named by what it computes in types and attributes, not sizes."""
    opset = model.opset_imports.get("") or model.opset_imports.get("ai.onnx", 1)
    graph = spelled_region(body, opset)
    function = onnx_ir.Function(DOMAIN, body.name, graph=graph, attributes=[])
    found = function_hash(function)
    without_sizes = re.sub(r"(: [a-z0-9]+)\[[^]]*]", r"\1", content(body))
    function.name = f"{body.name}_{_digest(without_sizes, rounding, found)}"
    function.metadata_props.update({REGION: str(body), HASH: found, ROUNDING: rounding})
    axes = _axes(body)
    if axes:
        function.metadata_props[AXES] = axes
    return function


def spelled_region(body: Graph, opset: int) -> onnx_ir.Graph:
    """The nodes of a region as ONNX nodes; raises EmitError where one has no spelling."""
    inputs = [onnx_ir.Value(name=value.name) for value in body.inputs]
    imports = {"": opset}
    bare = onnx_ir.Graph(inputs, [], nodes=[], opset_imports=imports, name=body.name)
    carrier = Carrier(onnx_ir.Model(bare, ir_version=METADATA_SINCE))
    graph = carrier.model.graph
    found: dict[Value, onnx_ir.Value] = dict(zip(body.inputs, graph.inputs, strict=True))
    shapes = {found[value]: value.shape for value in body.inputs}
    sources = SizeSource(carrier, shapes, list(graph.inputs))
    for node in body.nodes:
        onnx = OnnxSpeller(node, carrier, graph, found.__getitem__, sources, f"part of the region {body.name}")
        for value, made in zip(node.outputs, spell(onnx), strict=True):
            found[value] = made
            sources.shapes.setdefault(made, value.shape)
    graph.outputs.extend(found[output] for output in body.outputs if isinstance(output, Value))
    for constant in list(graph.initializers.values()):
        _hold(graph, constant)
    return graph


def _hold(graph: onnx_ir.Graph, value: onnx_ir.Value) -> None:
    """A function has no initializers: it computes its constants."""
    assert value.name is not None and value.const_value is not None
    graph.initializers.pop(value.name)
    node = onnx_ir.Node("", "Constant", [], [onnx_ir.AttrTensor("value", value.const_value)], name=value.name)
    node.outputs[0].name = value.name
    graph.insert_before(graph[0], node)
    for use in list(value.uses()):
        use.node.replace_input_with(use.idx, node.outputs[0])


def _axes(body: Graph) -> str:
    """The loops of every operand and result, and ``x0`` and on for axes that are read elsewhere.

    Empty where they are not those of one kernel.
    """
    from regauge.ir.fusion.fuse import traced  # loads all of fusion, which few files need

    try:
        region = traced(body)
    except FusionError:
        return ""
    layouts = {load.value.value: load.value.layout for load in region.loads} | region.layouts
    others = (dim for dim in region.sized if dim not in region.names)
    names = region.names | {dim: f"x{number}" for number, dim in enumerate(others)}

    def written(value: Value) -> str:
        dims = [names[dim] for axis in layouts.get(value, ()) for dim in axis]
        return f"{value.name}: {' '.join(dims)}"

    results = [output for output in body.outputs if isinstance(output, Value)]
    return f"{', '.join(map(written, body.inputs))} -> {', '.join(map(written, results))}"
