"""Graphs read from ONNX files, made ready for torch source: nodes as layers, weights under the names of those layers.

Exporters spell a layer in their own way and name its tensors anew. On a copy of the graph, which has the same inputs
and results, this is undone where a module holds one layer only:

    conv1.weight_bias   conv1.bias             the bias of a convolution that took a batch norm in
    onnx::Conv_103      layer1.0.conv1.weight  exporters number what they computed themselves
    ln1.weight          also ln2.weight        equal tensors are stored once: tied here
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np
import torch

from regauge.backends.torch_module.frames import inside, module_path, scope_of
from regauge.backends.torch_module.layers import SLOT_NAMES, layer_tensors
from regauge.backends.torch_module.linear import fuse_linear
from regauge.ir.edit import Builder, remove_node, replace_uses, set_input
from regauge.ir.graph import Graph, Node, Parameter
from regauge.ir.graph_copy import copy_graph

COUNTER = "num_batches_tracked"
FOLDED_BIAS = "weight_bias"  # what torch's exporter calls the bias of a convolution that took a batch norm in
_NUMBERED = re.compile(r".*(?:::|/).*|[^.]*_?\d+")  # names that exporters give, such as val_14 or onnx::MatMul_227

Wants = dict[Parameter, dict[str, list[Node]]]


def as_layers(graph: Graph) -> Graph:
    """A graph with the same inputs and results, its layers spelt and named as torch does; others come back as is."""
    if "onnx" not in graph.metadata:
        return graph
    result = copy_graph(graph)
    build = Builder(result)
    _skip_copies(result)
    for node in result.nodes:
        _spell_as_torch(result, node)
    fuse_linear(result)
    _count_batches(build)
    wants = _wants(result)
    for parameter, names in wants.items():
        _rename(parameter, names)
    for parameter in list(result.parameters.values()):
        if parameter not in wants and parameter.kind == "parameter" and is_numbered(parameter.name):
            _move_to_use(result, build, parameter)
    result.parameters = {parameter.name: parameter for parameter in result.parameters.values()}
    return result


def _spell_as_torch(graph: Graph, node: Node) -> None:
    """Numbers as people write them, which a file holds in single precision; no bias of zeros that an exporter added."""
    for name, value in node.attributes.items():
        if isinstance(value, float) and float(np.float32(value)) == value:
            node.attributes[name] = float(str(np.float32(value)))
    slots = node.operator.slots
    if len(slots) == 3 and slots[2] == "bias" and len(node.inputs) == 3:
        bias = node.inputs[2]
        if isinstance(bias, Parameter) and bias.kind == "constant" and not bias.tensor.any():
            set_input(node, 2, None, graph)
            node.inputs = node.inputs[:2]


def _count_batches(build: Builder) -> None:
    """Batch norms of torch count the batches they have seen; files do not say how many: they begin anew."""
    graph = build.graph
    for path, nodes in _single_nodes(graph):
        name = f"{path}.{COUNTER}"
        if all(node.op == "batch_norm" for node in nodes) and build.free(name):
            if all(isinstance(operand, Parameter) for node in nodes for operand in node.inputs[1:5]):
                build.parameter(name, torch.tensor(0), "buffer")


def is_numbered(name: str) -> bool:
    """True for a name that an exporter made up for a tensor it computed itself."""
    return _NUMBERED.fullmatch(name) is not None


def _wants(graph: Graph) -> Wants:
    """The names under which standard layers would have their tensors, with the layers that want each."""
    named = {name: parameter for parameter in graph.all_parameters() for name in parameter.names}
    taken: dict[str, Parameter] = {}
    wants: Wants = {}
    for path, nodes in _single_nodes(graph):
        found = [_tensors_of_layer(node, path) for node in nodes]
        first = found[0]
        if first is None or any(other != first for other in found):
            continue
        foreign = {
            parameter
            for name, parameter in named.items()
            if inside(name, path) and parameter not in first.values() and name != f"{path}.{COUNTER}"
        }
        if foreign or any(taken.get(name, parameter) is not parameter for name, parameter in first.items()):
            continue
        for name, parameter in first.items():
            taken[name] = parameter
            wants.setdefault(parameter, {}).setdefault(name, []).extend(nodes)
    return wants


def _single_nodes(graph: Graph) -> Iterator[tuple[str, list[Node]]]:
    """Module paths of which every call runs one node, with these nodes."""
    calls: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for entry, _ in scope_of(node):
            calls.setdefault(entry, []).append(node)
    modules: dict[str, list[Node]] = {}
    sizes: Counter[str] = Counter()
    for entry, nodes in calls.items():
        modules.setdefault(module_path(entry), []).extend(nodes)
        sizes[module_path(entry)] = max(sizes[module_path(entry)], len(nodes))
    for path, nodes in modules.items():
        if sizes[path] == 1 and all(module_path(node.scope[-1][0]) == path for node in nodes):
            yield path, nodes


def _tensors_of_layer(node: Node, path: str) -> Mapping[str, Parameter] | None:
    """The tensors of the standard layer that a node is, by the names they have in the module at ``path``."""
    text = node.operator.layer(node) if node.operator.layer is not None and not node.regions else None
    if text is None:
        return None
    slots = node.operator.slots
    found: dict[str, Parameter] = {}
    for position, operand in enumerate(node.inputs):
        leaf = SLOT_NAMES.get(slots[min(position, len(slots) - 1)])
        if leaf is None or operand is None:
            continue
        if not isinstance(operand, Parameter) or not _may_move(operand, path, leaf):
            return None
        found[f"{path}.{leaf}"] = operand
    shapes = {name.rpartition(".")[2]: tuple(parameter.shape) for name, parameter in found.items()}
    expected = layer_tensors(text) or {}
    return (
        found if found and shapes == {name: shape for name, (shape, _) in expected.items() if name != COUNTER} else None
    )


def _may_move(parameter: Parameter, path: str, leaf: str) -> bool:
    """False for a tensor that the module itself holds under a name of its own: whoever wrote the module wanted it."""
    if parameter.kind == "constant":
        return False
    own = [name.rpartition(".")[2] for name in parameter.names if name.rpartition(".")[0] == path]
    return not own or leaf in own or own == [FOLDED_BIAS]


def _rename(parameter: Parameter, wants: Mapping[str, list[Node]]) -> None:
    """Give a tensor the names its layers want; it keeps its own where anything else reads it under that."""
    users = {node for nodes in wants.values() for node in nodes}
    elsewhere = any(node not in users for node, _ in parameter.uses)
    own = [name for name in parameter.names if name not in wants and not is_numbered(name)]
    kept = [name for name in own if elsewhere and name.rpartition(".")[2] != FOLDED_BIAS]
    first = [name for name in parameter.names if name in wants]
    parameter.name, *aliases = dict.fromkeys([*first, *wants, *kept])
    parameter.aliases = tuple(aliases)


def _move_to_use(graph: Graph, build: Builder, parameter: Parameter) -> None:
    """A tensor that only one module reads lives there; a single number is a constant of each module that reads it."""
    if not parameter.uses or any(output is parameter for output in graph.outputs):
        return
    readers: dict[str, list[Node]] = {}
    for node in parameter.consumers():
        readers.setdefault(module_path(scope_of(node)[-1][0]) if scope_of(node) else "", []).append(node)
    first, *others = readers
    if all(size == 1 for size in parameter.shape):
        parameter.kind = "constant"
        for path in others:
            copied = build.constant(parameter.weight, parameter.name)
            for node, slot in list(parameter.uses):
                if node in readers[path]:
                    set_input(node, slot, copied, graph)
        return
    leaf = re.sub(r"\W", "_", parameter.name.rpartition("::")[2])
    name = f"{first}.{leaf}"
    if first and not others and all(name not in other.names for other in graph.all_parameters()):
        parameter.name = name


def _skip_copies(graph: Graph) -> None:
    """Some exporters copy a tensor that several layers share, to give each a name: the layers read it itself again."""
    for node in graph.nodes:
        if node.op == "identity" and isinstance(node.inputs[0], Parameter):
            if all(output is not node.output for output in graph.outputs):
                replace_uses(graph, node.output, node.inputs[0])
                remove_node(graph, node)
